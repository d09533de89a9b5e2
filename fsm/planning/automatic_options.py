"""Options that the devices decide: the context by the GPUs' memory, or with room to grow, and the batch by free memory.

All are only ever a bonus, and all but the room to grow are the reference's rules. A context by the GPUs' size (where
the engine offers it) is taken as far as the model stays whole on GPUs, a context with room to grow where it costs no
layer on GPUs, a batch above the usual one as far as the model goes on the same GPUs with memory to spare. No runner is
evicted and no request is refused for any of them, and none is ever a reason to load a model again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from fsm.domain.devices import DeviceId, Placement
from fsm.domain.options import Options
from fsm.placement.search import PREDICTED_HEADROOM, Gpu, Offload, PlacementDemand, find_placement
from fsm.planning.failed_loads import taught
from fsm.sizing.model_profile import LargerBatch, Resolution, ResolvedLoad
from fsm.state.core_config import CoreConfig
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord


def resolved_demand(
    model: ModelRecord, resolution: Resolution, state: CoreState, free: Mapping[DeviceId, int], gpus: Sequence[Gpu]
) -> tuple[ResolvedLoad, PlacementDemand]:
    """Return the load of a runner for a resolution, and its demand.

    A load for GPUs of a certain size is taken only with such GPUs, and where the model is whole on them within `free`.
    """
    gpu_bytes = sum(state.ledger.devices[memory].capacity_bytes for memory in {gpu.memory for gpu in gpus})
    loads = (load for load in model.loads_for(resolution) if load.least_gpu_bytes <= gpu_bytes)
    known = ((load, model.demand(load, resolution.asked, state.config)) for load in loads)
    demands = ((load, taught(state, model, load, demand, free, gpus)) for load, demand in known)
    return next(
        (load, demand)
        for load, demand in demands
        if not load.least_gpu_bytes or find_placement(demand, Offload.whole, free, gpus)
    )


def with_room(
    state: CoreState,
    model: ModelRecord,
    asked: Options,
    planned: tuple[ResolvedLoad, Placement],
    free: Mapping[DeviceId, int],
    gpus: Sequence[Gpu],
) -> tuple[ResolvedLoad, Placement]:
    """Return a load and its placement with room for a context that keeps growing, where that costs no layer on GPUs.

    The engine gives no more than the model was trained with.
    """
    _, placement = planned
    roomier = model.with_room(asked)
    resolution = model.resolution(roomier) if roomier is not None else None
    if resolution is None or model.declared:
        return planned
    load, demand = resolved_demand(model, resolution, state, free, gpus)
    places = (find_placement(demand, offload, free, gpus) for offload in demand.offload_modes(gpus))
    found = next(filter(None, places), None)
    return (load, found) if found is not None and found.offloaded >= placement.offloaded else planned


def with_batch(
    model: ModelRecord,
    asked: Options,
    limits: CoreConfig,
    planned: tuple[ResolvedLoad, Placement],
    free: Mapping[DeviceId, int],
    gpus: Sequence[Gpu],
) -> tuple[ResolvedLoad, Placement]:
    """Return a load and its placement with the largest batch that leaves memory to spare on the GPUs of a whole model.

    A model that has run out of memory before keeps the usual batch.
    """
    usual, placement = planned
    careful = model.load_exclusively or model.context_limit is not None or model.ran_out
    if careful or not usual.batches or not placement.gpu_layers:
        return planned
    if placement.offloaded < usual.footprint.layers:
        return planned
    same = [gpu for gpu in gpus if gpu.id in dict(placement.gpu_layers)]
    memories = {gpu.memory for gpu in same}
    for batch in usual.batches:
        predicted_bytes = batch.load.footprint.compute_bytes - usual.footprint.compute_bytes
        free_for_it = _free_with_batch(batch, free, memories, predicted_bytes)
        demand = model.demand(batch.load, asked, limits)
        if found := find_placement(demand, Offload.whole, free_for_it, same):
            return batch.load, found
    return planned


def _free_with_batch(
    batch: LargerBatch, free: Mapping[DeviceId, int], memories: Collection[DeviceId], predicted_bytes: int
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
