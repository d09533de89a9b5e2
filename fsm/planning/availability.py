"""The availability profile: the memory and the places for processes that request groups can count on, by horizon.

Memory that runners hold is freed at different times. There are four horizons, and each has what the horizon before it
has, and more. A reservation made at a horizon reduces the availability at that horizon and at every later one.
Availability at earlier horizons is capped at what remains at that horizon, so a younger request group can never start
in memory that an older one will need: conservative backfilling (A. W. Mu'alem and D. G. Feitelson 2001).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from fsm.domain.devices import HOST, Amounts, DeviceId, Placement
from fsm.machine.request import ModelId
from fsm.machine.runner import Runner, RunnerId
from fsm.placement.search import Free, Gpu, Offload, PlacementDemand, find_placement, needed
from fsm.state.memory_ledger import Ledger
from fsm.state.request_queue import QueueRank


class Horizon(IntEnum):
    """A moment that planning looks at; each counts on the memory of more runners than the one before."""

    NOW = 0
    AFTER_STOPS = 1  # once the runners that were stopped have gone
    AFTER_DRAINS = 2  # once the runners that drain have gone too
    AFTER_EVICTIONS = 3  # once the runners that are chosen as victims and may not leave yet have gone too


NOW, AFTER_STOPS, AFTER_DRAINS, AFTER_EVICTIONS = HORIZONS = tuple(Horizon)


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a request group needs, and the best offload that is possible for it at all."""

    demand: PlacementDemand
    offload: Offload
    process: bool = True  # a process has to be started; False for memory of the program's own
    potential: Free | None = None  # bytes by memory that can be made free; None: whatever is asked for

    def amounts(self, placement: Placement) -> Amounts:
        """Return the bytes that have to be free for a placement, by device, headroom included."""
        return needed(self.demand, placement, self.potential)


def gpus_of(ledger: Ledger) -> list[Gpu]:
    """Return the GPUs that layers may go to, in the order in which they were read, which `main_gpu` counts in."""
    devices = ledger.devices.values()
    return [Gpu(one.id, one.memory, one.instance, one.library) for one in devices if one.kind == "gpu"]


class AvailabilityProfile:
    """Bytes by memory and places for processes, at each horizon; negative where a memory is overdrawn."""

    def __init__(self, ledger: Ledger, gpus: Sequence[Gpu], places: int, movable: Collection[Runner]) -> None:
        free = {one.id: ledger.free_bytes(one.id) for one in ledger.devices.values() if not one.integrated}
        self.ledger = ledger
        self.gpus = gpus
        self.bytes = [free.copy() for _ in HORIZONS]
        self.held = {  # bytes by memory that each runner leaves to others in the end
            RunnerId(id): account.held for (kind, id), account in ledger.accounts.items() if kind == "runner"
        }
        # bytes by memory once every movable runner has left, whatever other request groups wait for
        self.potential = dict(self.available_after(NOW, movable))
        self.process_slots = [places] * len(HORIZONS)
        # bytes that the runner which is to come first takes, by its model
        self.reserved_by_model: dict[ModelId, dict[DeviceId, int]] = {}
        # what each request of a group for the program's own memory needs, and the ranks of those behind its head, which
        # get their reservations when planning reaches them
        self.queued_members: list[tuple[Requirement, deque[QueueRank]]] = []

    def best_offload(self, demand: PlacementDemand) -> Offload | None:
        """Return the best offload that is possible at all; None where the demand can never be placed."""
        free = self.potential
        modes = demand.offload_modes(self.gpus)
        return next((offload for offload in modes if find_placement(demand, offload, free, self.gpus, free)), None)

    def memories(self, need: Requirement) -> list[DeviceId]:
        """Return the memories in which a requirement may be placed."""
        if need.demand.footprint.fixed:
            return sorted(self.ledger.by_memory(need.demand.footprint.fixed))
        return [HOST] if need.offload is Offload.none else list(self.potential)

    def available_after(self, horizon: Horizon, gone: Collection[Runner]) -> dict[DeviceId, int]:
        """Return the bytes by memory at a horizon once the runners `gone` have left too; not to be changed."""
        if not gone:
            return self.bytes[horizon]
        held = [self.held[runner.id] for runner in gone]
        return {
            device: amount + sum([one.get(device, 0) for one in held]) for device, amount in self.bytes[horizon].items()
        }

    def left_to_next(self, runner: Runner | None) -> dict[DeviceId, int]:
        """Return the bytes by memory that a runner leaves to the next runner of its model."""
        return {} if runner is None else {device: self.held[runner.id].get(device, 0) for device in self.potential}

    def find_placement(self, horizon: Horizon, need: Requirement, gone: Collection[Runner] = ()) -> Placement | None:
        """Return a placement that is possible at a horizon once the runners `gone` have left too.

        None where it does not fit, or where its process may not be started.
        """
        slots = self.process_slots[horizon]
        if need.process and slots <= 0 and slots + sum(runner.process for runner in gone) <= 0:
            return None
        free = self.available_after(horizon, gone)
        return find_placement(need.demand, need.offload, free, self.gpus, need.potential)

    def earliest_fit(self, need: Requirement, since: Horizon = AFTER_STOPS) -> tuple[Placement, Horizon]:
        """Return the placement at the earliest horizon at which a requirement fits, and that horizon.

        The horizon is `AFTER_EVICTIONS` also where it is not known when the requirement fits.
        """
        for horizon in HORIZONS[since:AFTER_EVICTIONS]:
            if (placement := self.find_placement(horizon, need)) is not None:
                return placement, horizon
        return self._placed(need, self.bytes[AFTER_EVICTIONS]), AFTER_EVICTIONS

    def add(self, horizon: Horizon, gone: Collection[Runner]) -> None:
        """Count on the memory and the processes of runners, from a horizon on."""
        for at in HORIZONS[horizon:] if gone else ():
            self.bytes[at] = self.available_after(at, gone)
            self.process_slots[at] += sum(runner.process for runner in gone)

    def reserve(self, horizon: Horizon, amounts: Amounts, processes: int) -> None:
        """Reserve memory and processes from a horizon on; earlier horizons are capped at what remains there."""
        for at in HORIZONS[horizon:]:
            for device, amount in amounts:
                self.bytes[at][device] = self.bytes[at].get(device, 0) - amount
            self.process_slots[at] -= processes
        left = self.bytes[horizon]
        for at in HORIZONS[:horizon]:
            for device, amount in self.bytes[at].items():
                self.bytes[at][device] = min(amount, left[device])
            self.process_slots[at] = min(self.process_slots[at], self.process_slots[horizon])

    def reserve_successor(self, model: ModelId, need: Requirement) -> None:
        """Reserve what the next runner of a model needs beyond the memory that the runner before it leaves to it."""
        reserved, last = self.reserved_by_model[model], self.bytes[AFTER_EVICTIONS]
        there = {device: amount + reserved.get(device, 0) for device, amount in last.items()}
        amounts = need.amounts(self._placed(need, there))
        beyond = tuple((device, max(0, amount - reserved.get(device, 0))) for device, amount in amounts)
        self.reserve(AFTER_EVICTIONS, beyond, 0)
        reserved |= {device: max(amount, reserved.get(device, 0)) for device, amount in amounts}

    def reserve_earlier(self, rank: QueueRank) -> None:
        """Reserve for the requests that are not the heads of their groups and stand before `rank` in the queue."""
        for need, members in self.queued_members:
            count = 0
            while members and members[0] < rank:
                members.popleft()
                count += 1
            for horizon in HORIZONS[AFTER_STOPS:] if count else ():
                fits = self.count(horizon, need, count) if horizon < AFTER_EVICTIONS else count
                self.reserve_several(horizon, need, fits)
                count -= fits

    def count(self, horizon: Horizon, need: Requirement, most: int) -> int:
        """Return how many equal requests for the program's own memory fit at a horizon, `most` at most."""
        amounts = self.ledger.by_memory(need.demand.footprint.fixed)
        fits = (self.bytes[horizon].get(device, 0) // amount for device, amount in amounts.items() if amount)
        return max(0, min((most, *fits)))

    def reserve_several(self, horizon: Horizon, need: Requirement, count: int) -> None:
        """Reserve what equal requests for the program's own memory need, from a horizon on."""
        amounts = self.ledger.by_memory(need.demand.footprint.fixed)
        if count:
            self.reserve(horizon, tuple((device, count * amount) for device, amount in amounts.items()), 0)

    def _placed(self, need: Requirement, free: Mapping[DeviceId, int]) -> Placement:
        frees = (free, self.potential)
        found = (find_placement(need.demand, need.offload, there, self.gpus, need.potential) for there in frees)
        placement = next(filter(None, found), None)
        assert placement is not None, "a request group that can never fit is refused before"
        return placement
