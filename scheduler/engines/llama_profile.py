"""The profile of a GGUF model: every load that a request may lead to, with its memory and settings. It is pure.

Two of the options that a request leaves open may be larger than usual, by the reference's rules: the context by the
GPUs' memory, where a setting asks for it, and the batch by the memory that is left. The core decides which of the loads
is taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Self

from fsm.domain.devices import MIB
from fsm.domain.options import AUTOMATIC, Options
from fsm.sizing.model_profile import EngineSettings, LargerBatch, ModelProfile, Resolution, ResolvedLoad
from scheduler.engines.llama_options import impossible, maps_file, micro_batch, resolve, without_doubtful
from scheduler.engines.llama_sizing import (
    CHECKPOINTS,
    MOST_TOLD_SLOTS,
    EngineSizes,
    draft_bytes,
    estimate,
    images_bytes,
    results_bytes,
    work_bytes,
)
from scheduler.models.model_info import ModelInfo

GIB = 1024 * MIB
CONTEXTS = ((47 * GIB, 262144), (23 * GIB, 32768))  # (memory of all GPUs from which on, tokens); else the usual context
CONTEXT_STEPS = (32768, 4096)  # tokens to which an automatic context is stepped down after it ran out of memory


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch above the usual one, and the conditions under which a runner has it."""

    tokens: int
    above: int  # tokens of context that the runner has at least, and one more
    part: float  # as in `LargerBatch`
    surcharge_bytes: int  # as in `LargerBatch`


BATCHES = (Batch(2048, 32768, 0.60, 2048 * MIB), Batch(1024, 4096, 0.75, 768 * MIB))


RANKS = "rank"  # the pooling of a reranker


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """What llama.cpp is told beside the options, and what is expected of it."""

    embedding: bool  # whether it has vectors of texts, and goes on with none
    num_micro_batch: int  # tokens of one pass
    prompt_cache_mib: int
    num_checkpoints: int
    use_mmap: bool  # where the runner has layers on GPUs
    use_mmap_on_host: bool  # where it has none
    pooling: str | None  # None: the pooling that the model's file names
    projector_work_bytes: int  # the most that a projector computes with, with its first image
    kept_bytes: int  # the most that a runner keeps of earlier prompts, and works in beside its buffers, on the host
    results_bytes: int  # that an embedder takes with its first result

    def encoded(self) -> EngineSettings:
        """Return the settings as the core passes them on."""
        return tuple(asdict(self).items())

    @classmethod
    def decoded(cls, settings: EngineSettings) -> Self:
        """Return the settings that a launch carries."""
        return cls(**dict(settings))  # type: ignore[arg-type]  # they were encoded by this class


Told = Mapping[Options, EngineSizes]  # what the engine itself has told, by `sized_options`
NOTHING_TOLD: Told = MappingProxyType({})


def profile_of(
    info: ModelInfo,
    asked: Iterable[Options],
    defaults: Options = AUTOMATIC,
    *,
    larger_contexts: bool = False,
    told: Told | None = None,
) -> ModelProfile:
    """Return the profile of a model, with resolutions for the options `asked`.

    `defaults` are of options that a request leaves open. With `larger_contexts` an automatic context may be larger on
    large GPUs. Loads of which the engine has `told` nothing are estimated roughly, by formulas; None stands for a model
    for which the formulas are known to hold.
    """
    files_bytes = info.file_bytes + info.adapters_bytes + info.projectors_bytes
    files_bytes += info.draft.file_bytes if info.draft is not None else 0
    resolutions = tuple(_resolution(info, options, defaults, larger_contexts, told) for options in asked)
    explicit = resolve(info, AUTOMATIC, defaults)
    usual = Options(num_ctx=explicit.num_ctx, num_parallel=explicit.num_parallel)
    return ModelProfile(fingerprint(info), files_bytes, resolutions, info.embedding, usual)


def fingerprint(info: ModelInfo) -> str:
    """Return a short text that stays the same as long as all that is known of the model's files does."""
    return hashlib.sha256(repr(info).encode()).hexdigest()[:32]


def sized_options(options: Options) -> Options:
    """Return the part of resolved options that caches and compute buffers depend on, with the slots of a dry run."""
    slots = min(options.num_parallel or 1, MOST_TOLD_SLOTS)
    return replace(without_place(options), num_parallel=slots)


def without_place(options: Options) -> Options:
    """Return options without where a model goes and how its file is read: its cache is the same with all of these."""
    return replace(options, num_gpu=None, main_gpu=None, num_thread=None, use_mmap=None, devices=None, require_gpu=None)


def loads_of(profile: ModelProfile) -> Iterator[ResolvedLoad]:
    """Yield every load of a profile, larger batches included."""
    for resolution in profile.resolutions:
        for load in resolution.loads:
            yield load
            yield from (batch.load for batch in load.batches)


def _resolution(
    info: ModelInfo, asked: Options, defaults: Options, larger_contexts: bool, told: Told | None
) -> Resolution:
    usual = _load(info, asked, defaults, told)
    loads = [usual]
    if asked.num_ctx is None:
        context = usual.options.num_ctx or 0
        steps = [replace(asked, num_ctx=step) for step in CONTEXT_STEPS if step < context]
        loads += [_load(info, options, defaults, told) for options in steps]
        if larger_contexts and defaults.num_ctx is None and not info.embedding:
            larger = [(least, replace(asked, num_ctx=tokens)) for least, tokens in CONTEXTS]
            bonuses = [
                replace(_load(info, options, defaults, told), least_gpu_bytes=least) for least, options in larger
            ]
            loads = [*(load for load in bonuses if (load.options.num_ctx or 0) > context), *loads]
    plain_loads: tuple[ResolvedLoad, ...] = ()
    plain = without_doubtful(defaults)
    if resolve(info, asked, plain) != resolve(info, asked, defaults):
        plain_loads = _resolution(info, asked, plain, larger_contexts, told).loads
    return Resolution(asked, tuple(loads), impossible(info, usual.options), plain_loads)


def _told_pooling(info: ModelInfo) -> str | None:
    """Return the pooling that llama.cpp has to be told: it would refuse to embed without one, and to rank."""
    if not info.embedding:
        return None
    return "mean" if info.pooling is None else RANKS if info.pooling == RANKS else None


def _load(info: ModelInfo, options: Options, defaults: Options, told: Told | None) -> ResolvedLoad:
    """Return the load for these options, with the larger batches that it may have: only where no batch is named."""
    usual = _with_sizes(info, resolve(info, options, defaults), told)
    if options.num_batch is not None or defaults.num_batch is not None or info.embedding:
        return usual
    batches = [batch for batch in BATCHES if (usual.options.num_ctx or 0) > batch.above]
    loads = [
        _with_sizes(info, resolve(info, replace(usual.options, num_batch=batch.tokens)), told) for batch in batches
    ]
    larger = zip(loads, batches, strict=True)
    return replace(usual, batches=tuple(LargerBatch(load, batch.part, batch.surcharge_bytes) for load, batch in larger))


def _with_sizes(info: ModelInfo, options: Options, told: Told | None) -> ResolvedLoad:
    sizes = told.get(sized_options(options)) if told is not None else None
    use_mmap, use_mmap_on_host = (maps_file(info, options, on_host=on_host) for on_host in (False, True))
    footprint = replace(
        estimate(info, options, sizes),
        mapped=use_mmap,
        mapped_on_host=use_mmap_on_host,
        rough=told is not None and sizes is None,
    )
    settings = LlamaSettings(
        embedding=info.embedding,
        num_micro_batch=micro_batch(info, options),
        prompt_cache_mib=footprint.prompt_cache_bytes // MIB,
        num_checkpoints=CHECKPOINTS,
        use_mmap=use_mmap,
        use_mmap_on_host=use_mmap_on_host,
        pooling=_told_pooling(info),
        projector_work_bytes=footprint.projectors_bytes - info.projectors_bytes - draft_bytes(info, options),
        kept_bytes=footprint.prompt_cache_bytes
        + footprint.checkpoints_bytes
        + work_bytes(info, options)
        + images_bytes(info),
        results_bytes=results_bytes(info, options),
    )
    return ResolvedLoad(replace(options, devices=None, require_gpu=None), footprint, settings.encoded())
