"""What a request leaves open and the devices decide: its context by the GPUs' memory, its batch by what is free there.

Both are the reference's rules, and both are only ever a bonus: a context by the GPUs' size (where that is asked for) is
taken as far as the model stays whole on GPUs, a batch above the usual one as far as the model goes on the same GPUs
with room to spare. Nobody is evicted or refused for a batch, and neither is ever a reason to load a model anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fsm.domain.devices import MIB, DeviceId, Placement
from fsm.domain.model_info import ModelInfo, Options
from fsm.placement.search import PREDICTED_HEADROOM, Gpu, Offload, PlacementDemand, find_placement
from fsm.sizing.footprint import Footprint
from fsm.sizing.load_options import computes_every_logit
from fsm.state.core_config import CoreConfig
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord

GIB = 1024 * MIB
CONTEXTS = ((47 * GIB, 262144), (23 * GIB, 32768))  # so many tokens from so much memory of all GPUs on; else the usual


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch above the usual one, and when it may be had."""

    tokens: int
    above: int  # tokens of context
    part: float  # of what is free on each GPU, that the model may take with it
    surcharge_bytes: int  # on each GPU, over the usual batch; what is predicted counts if it is more


BATCHES = (Batch(2048, 32768, 0.60, 2048 * MIB), Batch(1024, 4096, 0.75, 768 * MIB))


def resolved_demand(
    model: ModelRecord, asked: Options, state: CoreState, free: Mapping[DeviceId, int], gpus: Sequence[Gpu]
) -> tuple[Options, PlacementDemand]:
    """Return the explicit options and the demand of a runner for `asked`.

    A context by the GPUs' memory is the largest with which the model is whole on them within `free`, else the usual.
    """
    gpu_bytes = sum(state.ledger.devices[memory].capacity_bytes for memory in {gpu.memory for gpu in gpus})
    for context in _contexts(model.info, asked, state.config, gpu_bytes):
        if context <= (model.context_limit or context):
            wish = model.demand(replace(asked, num_ctx=context), state.config)
            if find_placement(wish[1], Offload.whole, free, gpus):
                return wish
    return model.demand(asked, state.config)


def with_batch(
    model: ModelRecord,
    asked: Options,
    limits: CoreConfig,
    planned: tuple[Options, Placement],
    free: Mapping[DeviceId, int],
    gpus: Sequence[Gpu],
) -> tuple[Options, Placement]:
    """Return options and placement with the largest batch that leaves room to spare where the model goes whole.

    What has run out of memory before keeps the usual one.
    """
    options, placement = planned
    careful = model.load_exclusively or model.context_limit is not None
    steps = () if careful or not placement.gpu_layers else tuple(_batches(model.info, asked, limits, options))
    if not steps:
        return planned
    _, usual = model.demand(options, limits)
    if placement.offloaded < usual.layers:
        return planned
    same = [gpu for gpu in gpus if gpu.id in dict(placement.gpu_layers)]
    memories = {gpu.memory for gpu in same}
    for batch in steps:
        larger, demand = model.demand(replace(options, num_batch=batch.tokens), limits)
        predicted_bytes = demand.footprint.compute_bytes - usual.footprint.compute_bytes
        room = _room_for(batch, free, memories, predicted_bytes)
        if found := find_placement(demand, Offload.whole, room, same):
            return larger, found
    return planned


def _contexts(info: ModelInfo | Footprint | None, asked: Options, limits: CoreConfig, gpu_bytes: int) -> Iterator[int]:
    """Yield the contexts to try for what names none, the largest first; none where the usual one is taken."""
    named = asked.num_ctx is not None or limits.defaults.num_ctx is not None
    if not limits.auto_context_from_vram or named or not isinstance(info, ModelInfo) or computes_every_logit(info):
        return
    for least_bytes, tokens in CONTEXTS:
        if gpu_bytes >= least_bytes:
            yield tokens


def _batches(
    info: ModelInfo | Footprint | None, asked: Options, limits: CoreConfig, explicit: Options
) -> Iterator[Batch]:
    """Yield the batches to try for what names none, the largest first; none where the usual one is taken."""
    named = asked.num_batch is not None or limits.defaults.num_batch is not None
    if named or not isinstance(info, ModelInfo) or info.embedding:
        return
    for batch in BATCHES:
        if (explicit.num_ctx or 0) > batch.above:
            yield batch


def _room_for(
    batch: Batch, free: Mapping[DeviceId, int], memories: Collection[DeviceId], predicted_bytes: int
) -> dict[DeviceId, int]:
    """Return what is free for a model with a larger batch, so that the usual headroom leaves as much as it should.

    `predicted_bytes` is how much larger its compute buffers are predicted to be.
    """
    more_bytes = max(0, batch.surcharge_bytes - predicted_bytes)
    return {
        device: int((1 + PREDICTED_HEADROOM) * (batch.part * amount - more_bytes)) if device in memories else amount
        for device, amount in free.items()
    }
