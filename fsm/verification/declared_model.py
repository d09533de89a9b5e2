"""Models of declared sizes for the search and the simulation: simple sums in place of an engine's estimates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fsm.domain.devices import MIB
from fsm.domain.options import AUTOMATIC, MOST_SLOTS, Options
from fsm.sizing.footprint import Footprint
from fsm.sizing.model_profile import LargerBatch, ModelProfile, Resolution, ResolvedLoad, UnsupportedReason

_BATCH = 512  # tokens
_CONTEXTS = (32768, 4096)  # tokens of an automatic context; the smaller one is for after an out of memory
_LARGER_CONTEXT = 4096  # tokens; a model with more may have a larger batch
_PROCESS_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class DeclaredModel:
    """A model with layers whose cache grows with its context and slots, and its compute buffers with its batch.

    A model with an even number of layers is mapped.
    """

    layers_bytes: tuple[int, ...]
    token_bytes: int = 128  # of a token's cache in each layer
    context_trained: int = 8192
    one_slot: bool = False  # it cannot have several

    def resolution(self, asked: Options, defaults: Options) -> Resolution:
        """Return how the model is loaded for these options; the context of `defaults` counts where none is named."""
        usual = min(asked.num_ctx or defaults.num_ctx or _CONTEXTS[-1], self.context_trained)
        contexts = [usual] if asked.num_ctx else [usual, *(step for step in _CONTEXTS if step < usual)]
        slots = asked.num_parallel or 1
        unsupported = ("num_parallel", slots, UnsupportedReason.too_many_slots) if slots > MOST_SLOTS else None
        loads = tuple(self._load(asked, context, 1 if self.one_slot else slots) for context in contexts)
        return Resolution(asked, loads, None if self.one_slot else unsupported)

    def _load(self, asked: Options, context: int, slots: int) -> ResolvedLoad:
        options = replace(asked, num_ctx=context, num_parallel=slots, num_batch=_BATCH, require_gpu=None)
        usual = ResolvedLoad(options, self._footprint(options, _BATCH))
        if context <= _LARGER_CONTEXT:
            return usual
        larger = ResolvedLoad(replace(options, num_batch=2 * _BATCH), self._footprint(options, 2 * _BATCH))
        return replace(usual, batches=(LargerBatch(larger, 0.75, 768 * MIB),))

    def _footprint(self, options: Options, batch: int) -> Footprint:
        cache_bytes = (options.num_ctx or 0) * (options.num_parallel or 0) * self.token_bytes
        layers = len(self.layers_bytes)
        compute_bytes = 2 * (options.num_ctx or 0) * batch
        mapped = layers % 2 == 0
        return Footprint(
            self.layers_bytes,
            (cache_bytes,) * layers,
            compute_bytes=compute_bytes,
            process_bytes=_PROCESS_BYTES,
            mapped=mapped,
            mapped_on_host=mapped,
        )


def profile_of(
    model: DeclaredModel | Footprint, asked: Iterable[Options], defaults: Options = AUTOMATIC
) -> ModelProfile | Footprint:
    """Return what an inspection finds that was ordered for the options `asked`."""
    if isinstance(model, Footprint):
        return model
    resolutions = tuple(model.resolution(options, defaults) for options in asked)
    explicit = model.resolution(AUTOMATIC, defaults).loads[0].options
    usual = Options(num_ctx=explicit.num_ctx, num_parallel=explicit.num_parallel)
    return ModelProfile(repr(model), sum(model.layers_bytes), resolutions, usual=usual)
