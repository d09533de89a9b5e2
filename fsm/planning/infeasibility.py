"""Why a request can never be placed: the reason in words, and the way to place it that lacks least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fsm.domain.devices import HOST, DeviceId, Placement
from fsm.machine.request import ModelId
from fsm.machine.runner import Runner
from fsm.messages.refusals import DoesNotFit
from fsm.placement.search import Demand, Gpu, Offload, needed, place
from fsm.state.core_state import Pool
from fsm.state.memory_ledger import Owner

BOUNDLESS = 2**62  # bytes


def why_never(
    pool: Pool, gpus: Sequence[Gpu], model: ModelId, demand: Demand, potential: Mapping[DeviceId, int]
) -> tuple[DoesNotFit, Placement | None]:
    """Return the refusal of what would not fit into `potential`, and what it would need; None where that is not known.

    `potential` is what is free once everybody has left who may.
    """
    capacity = {device.id: device.capacity_bytes for device in pool.ledger.devices.values() if not device.integrated}
    offload, need = _least_lacking(demand, dict.fromkeys((*capacity, HOST), BOUNDLESS), potential, gpus)
    exact = bool(demand.footprint.fixed)
    amounts = needed(need, exact=exact) if need else demand.footprint.fixed
    reason = _reason(pool, gpus, demand, offload, potential, capacity)
    return DoesNotFit(model, amounts, tuple(sorted(potential.items())), reason), need


def _reason(
    pool: Pool,
    gpus: Sequence[Gpu],
    demand: Demand,
    offload: Offload,
    potential: Mapping[DeviceId, int],
    capacity: Mapping[DeviceId, int],
) -> str:
    devices, runners = pool.ledger.devices, pool.runners.values()
    unknown = sorted({device for device, _ in demand.footprint.fixed} - devices.keys())
    stuck = [runner for runner in runners if pool.is_stuck(runner)]
    pins = sorted({runner.model for runner in runners if pool.pinned(runner)})
    free = {device: pool.ledger.free_bytes(device) for device in capacity}
    if unknown:
        return f"there is no device {unknown[0]!r}; there is {', '.join(devices) or 'none'}"
    unmovable = [runner.model for runner in runners if pool.is_unmovable(runner)]
    if 0 < pool.limits.max_runners <= len(unmovable) and place(demand, offload, potential, gpus):
        names = ", ".join(sorted(set(unmovable)))
        return f"only {pool.limits.max_runners} runners may be alive, and no room is made by: {names}"
    if stuck and place(demand, offload, pool.ledger.freed(potential, map(_owner, stuck)), gpus):
        names = ", ".join(sorted({runner.model for runner in stuck}))
        return f"its memory is held by what was stopped and does not end: {names}"
    if place(demand, offload, pool.ledger.freed(free, map(_owner, runners)), gpus) and pins:
        return f"it would fit only by moving what is pinned: {', '.join(pins)}"
    if place(demand, offload, capacity, gpus):
        return "other programs, or the program's own reservations, hold the memory"
    if not gpus and offload is not Offload.none:
        return f"{'a GPU is required' if demand.require_gpu else 'it is to be on GPUs'}, and there is none"
    return "it is larger than the memory there is"


def _least_lacking(
    demand: Demand, boundless: Mapping[DeviceId, int], potential: Mapping[DeviceId, int], gpus: Sequence[Gpu]
) -> tuple[Offload, Placement | None]:
    """Return the way to place it that lacks least, and what it would need."""

    def lacking_bytes(need: Placement | None) -> int:
        amounts = needed(need, exact=bool(demand.footprint.fixed)) if need else ()
        return sum(max(0, amount - potential.get(device, 0)) for device, amount in amounts)

    ways = [(offload, place(demand, offload, boundless, gpus)) for offload in demand.offloads(gpus)]
    return min((way for way in ways if way[1]), key=lambda way: lacking_bytes(way[1]), default=ways[-1])


def _owner(runner: Runner) -> Owner:
    return "runner", runner.id
