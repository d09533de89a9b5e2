"""Options that a request leaves open and the devices decide: the context by the GPUs' memory, the batch by free memory.

Both are the reference's rules, and both are only ever a bonus. A context by the GPUs' size (where the setting asks for
it) is taken as far as the model stays whole on GPUs, a batch above the usual one as far as the model goes on the same
GPUs with memory to spare. No runner is evicted and no request is refused for a larger batch, and neither option is ever
a reason to load a model again.
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
CONTEXTS = ((47 * GIB, 262144), (23 * GIB, 32768))  # (memory of all GPUs from which on, tokens); else the usual context


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch above the usual one, and the conditions under which a runner has it."""

    tokens: int
    above: int  # tokens of context that the runner has at least, and one more
    part: float  # of the free memory of each GPU that the model may take with this batch
    surcharge_bytes: int  # on each GPU, over the usual batch; the predicted difference counts if it is more


BATCHES = (Batch(2048, 32768, 0.60, 2048 * MIB), Batch(1024, 4096, 0.75, 768 * MIB))


def resolved_demand(
    model: ModelRecord, asked: Options, state: CoreState, free: Mapping[DeviceId, int], gpus: Sequence[Gpu]
) -> tuple[Options, PlacementDemand]:
    """Return the explicit options and the demand of a runner for `asked`.

    A context by the GPUs' memory is the largest with which the model is whole on GPUs within `free`, else the usual.
    """
    gpu_bytes = sum(state.ledger.devices[memory].capacity_bytes for memory in {gpu.memory for gpu in gpus})
    for context in _contexts(model.info, asked, state.config, gpu_bytes):
        if context <= (model.context_limit or context):
            larger = model.demand(replace(asked, num_ctx=context), state.config)
            if find_placement(larger[1], Offload.whole, free, gpus):
                return larger
    return model.demand(asked, state.config)


def with_batch(
    model: ModelRecord,
    asked: Options,
    limits: CoreConfig,
    planned: tuple[Options, Placement],
    free: Mapping[DeviceId, int],
    gpus: Sequence[Gpu],
) -> tuple[Options, Placement]:
    """Return options and placement with the largest batch that leaves memory to spare on the GPUs of a whole model.

    A model that has run out of memory before keeps the usual batch.
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
        free_for_it = _free_with_batch(batch, free, memories, predicted_bytes)
        if found := find_placement(demand, Offload.whole, free_for_it, same):
            return larger, found
    return planned


def _contexts(info: ModelInfo | Footprint | None, asked: Options, limits: CoreConfig, gpu_bytes: int) -> Iterator[int]:
    """Yield the contexts to try, in tokens, the largest first; none where the request or a setting names a context."""
    named = asked.num_ctx is not None or limits.defaults.num_ctx is not None
    if not limits.auto_context_from_vram or named or not isinstance(info, ModelInfo) or computes_every_logit(info):
        return
    for least_bytes, tokens in CONTEXTS:
        if gpu_bytes >= least_bytes:
            yield tokens


def _batches(
    info: ModelInfo | Footprint | None, asked: Options, limits: CoreConfig, explicit: Options
) -> Iterator[Batch]:
    """Yield the batches to try, the largest first; none where the request or a setting names a batch."""
    named = asked.num_batch is not None or limits.defaults.num_batch is not None
    if named or not isinstance(info, ModelInfo) or info.embedding:
        return
    for batch in BATCHES:
        if (explicit.num_ctx or 0) > batch.above:
            yield batch


def _free_with_batch(
    batch: Batch, free: Mapping[DeviceId, int], memories: Collection[DeviceId], predicted_bytes: int
) -> dict[DeviceId, int]:
    """Return the bytes by device that a model with a larger batch is placed in.

    The usual headroom over a placement within them leaves as much free as the batch demands. `predicted_bytes` is how
    much larger the model's compute buffers are predicted to be.
    """
    more_bytes = max(0, batch.surcharge_bytes - predicted_bytes)
    return {
        device: int((1 + PREDICTED_HEADROOM) * (batch.part * amount - more_bytes)) if device in memories else amount
        for device, amount in free.items()
    }
