"""Why a request group can never be placed: the reason, and the offload for which the least memory is lacking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fsm.domain.devices import HOST, DeviceId, Placement
from fsm.machine.request import ModelId
from fsm.machine.runner import Runner
from fsm.messages.reasons import Infeasible, InfeasibleReason, MemoryHeld, NoSuchDevice, RunnerLimit
from fsm.messages.refusals import DoesNotFitRefusal
from fsm.placement.search import Gpu, Offload, PlacementDemand, find_placement, needed
from fsm.state.core_state import CoreState
from fsm.state.memory_ledger import Owner

BOUNDLESS = 2**62  # bytes, more than any device has


def infeasible_reason(
    state: CoreState, gpus: Sequence[Gpu], model: ModelId, demand: PlacementDemand, potential: Mapping[DeviceId, int]
) -> tuple[DoesNotFitRefusal, Placement | None]:
    """Return the refusal of a demand that does not fit into `potential`, and its placement if memory were boundless.

    `potential` are the bytes by device that are free once every runner has left that may. The placement is None where
    no amount of memory would do.
    """
    capacity = state.ledger.capacity
    offload, need = _least_lacking(demand, dict.fromkeys((*capacity, HOST), BOUNDLESS), potential, gpus)
    amounts = needed(demand, need, potential) if need else demand.footprint.fixed
    reason = _reason(state, gpus, demand, offload, potential, capacity)
    return DoesNotFitRefusal(model, amounts, tuple(sorted(potential.items())), reason), need


def _reason(
    state: CoreState,
    gpus: Sequence[Gpu],
    demand: PlacementDemand,
    offload: Offload,
    potential: Mapping[DeviceId, int],
    capacity: Mapping[DeviceId, int],
) -> InfeasibleReason:
    devices, runners = state.ledger.devices, state.runners.values()
    unknown = sorted({device for device, _ in demand.footprint.fixed} - devices.keys())
    stuck = [runner for runner in runners if state.is_stuck(runner)]
    pinned = [runner for runner in runners if state.pinned(runner)]
    free = {device: state.ledger.free_bytes(device) for device in capacity}
    if unknown:
        return NoSuchDevice(unknown[0], tuple(devices))
    unmovable = [runner for runner in runners if state.is_unmovable(runner)]

    def fits(there: Mapping[DeviceId, int]) -> bool:
        return find_placement(demand, offload, there, gpus, there) is not None

    if 0 < state.config.max_runners <= len(unmovable) and fits(potential):
        return RunnerLimit(state.config.max_runners, _models(unmovable))
    if stuck and fits(state.ledger.available_after(potential, map(_owner, stuck))):
        return MemoryHeld(_models(stuck), pinned=False)
    if pinned and fits(state.ledger.available_after(free, map(_owner, runners))):
        return MemoryHeld(_models(pinned), pinned=True)
    if fits(capacity):
        return Infeasible.held_elsewhere
    if not any(map(demand.may_use, gpus)) and offload is not Offload.none:
        return Infeasible.no_required_gpu if demand.require_gpu else Infeasible.no_gpu
    return Infeasible.too_large


def _least_lacking(
    demand: PlacementDemand, boundless: Mapping[DeviceId, int], potential: Mapping[DeviceId, int], gpus: Sequence[Gpu]
) -> tuple[Offload, Placement | None]:
    """Return the offload for which the least memory is lacking, and its placement if memory were boundless."""

    def lacking_bytes(need: Placement | None) -> int:
        amounts = needed(demand, need, potential) if need else ()
        return sum(max(0, amount - potential.get(device, 0)) for device, amount in amounts)

    modes = [(offload, find_placement(demand, offload, boundless, gpus)) for offload in demand.offload_modes(gpus)]
    return min((mode for mode in modes if mode[1]), key=lambda mode: lacking_bytes(mode[1]), default=modes[-1])


def _models(runners: Iterable[Runner]) -> tuple[ModelId, ...]:
    return tuple(sorted({runner.model for runner in runners}))


def _owner(runner: Runner) -> Owner:
    return "runner", runner.id
