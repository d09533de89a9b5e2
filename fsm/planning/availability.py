"""What there is for those who wait, now and later, less what is kept for those before them.

What comes back comes at different times. A line that waits for what comes soon must not have it taken by a younger one
that counts on what comes late, so four horizons are kept, each of which has what the one before has, and more. What is
booked at one is missing from then on, and before it nobody may have more than is left then: conservative backfilling
(A. W. Mu'alem and D. G. Feitelson 2001).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fsm.domain.devices import HOST, Amounts, DeviceId, Placement
from fsm.machine.request import ModelId
from fsm.machine.runner import Runner
from fsm.placement.search import Gpu, Offload, PlacementDemand, find_placement, needed
from fsm.state.memory_ledger import Ledger
from fsm.state.request_queue import QueueRank

NOW = 0
SOON = 1  # once those have gone that were stopped
DRAINED = 2  # once those have gone too that are given up and still in use
LATER = 3  # once those have gone too that are to leave for somebody, and may not yet


@dataclass(frozen=True, slots=True)
class Requirement:
    """What somebody needs, and the best way to place it that is possible at all."""

    demand: PlacementDemand
    offload: Offload
    process: bool = True  # one has to be started; not for memory of the program's own

    def amounts(self, placement: Placement) -> Amounts:
        """Return the bytes that have to be free for a placement, headroom included."""
        return needed(placement, exact=bool(self.demand.footprint.fixed))


class AvailabilityProfile:
    """Bytes by memory and places for processes, at each horizon; what is overdrawn is negative."""

    def __init__(self, ledger: Ledger, gpus: Sequence[Gpu], places: int, movable: Collection[Runner]) -> None:
        free = {one.id: ledger.free_bytes(one.id) for one in ledger.devices.values() if not one.integrated}
        self.ledger = ledger
        self.gpus = gpus
        self.bytes = [free.copy() for _ in range(LATER + 1)]
        self.potential = dict(
            self.available_after(NOW, movable)
        )  # once everybody has left who may, whoever waits for what
        self.process_slots = [places] * (LATER + 1)
        self.reserved_by_model: dict[
            ModelId, dict[DeviceId, int]
        ] = {}  # what the runner takes that is to come first, by model
        self.queued_members: list[
            tuple[QueueRank, Requirement]
        ] = []  # who is not first in a line, and has a booking when it is their turn

    def best_offload(self, demand: PlacementDemand) -> Offload | None:
        """Return the best way to place something that there is at all."""
        ways = demand.offload_modes(self.gpus)
        return next((offload for offload in ways if find_placement(demand, offload, self.potential, self.gpus)), None)

    def memories(self, need: Requirement) -> list[DeviceId]:
        """Return where what is needed may come to lie."""
        if need.demand.footprint.fixed:
            return sorted(self.ledger.by_memory(need.demand.footprint.fixed))
        return [HOST] if need.offload is Offload.none else list(self.potential)

    def available_after(self, horizon: int, gone: Collection[Runner]) -> dict[DeviceId, int]:
        """Return the bytes that there are at a horizon once some more runners have gone; not to be changed."""
        if not gone:
            return self.bytes[horizon]
        return self.ledger.available_after(self.bytes[horizon], [("runner", runner.id) for runner in gone])

    def held_by(self, runner: Runner | None) -> dict[DeviceId, int]:
        """Return what a runner holds, which makes room for the next one of its model in the end."""
        if runner is None:
            return {}
        account = self.ledger.accounts["runner", runner.id]
        return {device: account.held_bytes(device) for device in self.potential}

    def find_placement(self, horizon: int, need: Requirement, gone: Collection[Runner] = ()) -> Placement | None:
        """Return where somebody fits at a horizon once some more runners have gone, and a process may be started."""
        if need.process and self.process_slots[horizon] + sum(runner.process for runner in gone) <= 0:
            return None
        return find_placement(need.demand, need.offload, self.available_after(horizon, gone), self.gpus)

    def earliest_fit(self, need: Requirement, since: int = SOON) -> tuple[Placement, int]:
        """Return where somebody will go, and from when on there is room; `LATER` also where that is not known."""
        for horizon in range(since, LATER):
            if (placement := self.find_placement(horizon, need)) is not None:
                return placement, horizon
        return self._placed(need, self.bytes[LATER]), LATER

    def add(self, horizon: int, gone: Collection[Runner]) -> None:
        """Count on what some runners hold, from a horizon on."""
        for one in range(horizon, LATER + 1) if gone else ():
            self.bytes[one] = self.available_after(one, gone)
            self.process_slots[one] += sum(runner.process for runner in gone)

    def reserve(self, horizon: int, amounts: Amounts, processes: int) -> None:
        """Book what somebody has from a horizon on; what is left then is the most that others may have before."""
        for one in range(horizon, LATER + 1):
            for device, amount in amounts:
                self.bytes[one][device] = self.bytes[one].get(device, 0) - amount
            self.process_slots[one] -= processes
        left = self.bytes[horizon]
        for one in range(horizon):
            for device, amount in self.bytes[one].items():
                self.bytes[one][device] = min(amount, left[device])
            self.process_slots[one] = min(self.process_slots[one], self.process_slots[horizon])

    def reserve_successor(self, model: ModelId, need: Requirement) -> None:
        """Book what the next runner of a model will need beyond the one that comes before it, and leaves for it."""
        planned, later = self.reserved_by_model[model], self.bytes[LATER]
        there = {device: amount + planned.get(device, 0) for device, amount in later.items()}
        amounts = need.amounts(self._placed(need, there))
        self.reserve(LATER, tuple((device, max(0, amount - planned.get(device, 0))) for device, amount in amounts), 0)
        planned |= {device: max(amount, planned.get(device, 0)) for device, amount in amounts}

    def reserve_earlier(self, turn: QueueRank) -> None:
        """Book what those will need who are not first in a line, and came before somebody."""
        while self.queued_members and self.queued_members[0][0] < turn:
            _, need = self.queued_members.pop(0)
            placement, horizon = self.earliest_fit(need)
            self.reserve(horizon, need.amounts(placement), need.process)

    def _placed(self, need: Requirement, free: Mapping[DeviceId, int]) -> Placement:
        ways = (find_placement(need.demand, need.offload, there, self.gpus) for there in (free, self.potential))
        placement = next(filter(None, ways), None)
        assert placement is not None, "a line that can never fit is refused before"
        return placement
