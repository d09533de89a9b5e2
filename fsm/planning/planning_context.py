"""What one plan is made on: the plan itself, the availability profile, the load slots and the candidates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from fsm.domain.devices import DeviceId
from fsm.eviction.policies import Candidate, EvictionPolicy
from fsm.eviction.victim_selection import Amount, Ranking, rank
from fsm.machine.request import ModelId, RequestSpec
from fsm.machine.runner import EXPIRING, LOADING, Runner, RunnerId
from fsm.messages.reasons import WaitReason
from fsm.planning.availability import AFTER_DRAINS, AFTER_STOPS, NOW, AvailabilityProfile, gpus_of
from fsm.planning.eviction_candidates import Candidates
from fsm.planning.load_slots import LoadSlots
from fsm.planning.plan import Plan
from fsm.state.core_state import CoreState
from fsm.state.request_queue import QueueRank, RequestGroup

GROUPS_AHEAD = 16  # victims are chosen for so many request groups at a time; a group behind them takes free memory only


class PlanningContext:
    """The scratch accounts of one plan, made for that plan alone; the state is read and never changed."""

    def __init__(self, state: CoreState, policy: EvictionPolicy, *, explains: bool) -> None:
        self.state = state
        self.explains = explains
        self.plan = Plan()
        ledger = state.ledger
        self.gpus = gpus_of(ledger)
        expiring = [runner for runner in state.runners.values() if runner.state is EXPIRING]
        self.leaving = [runner for runner in expiring if not state.is_overdue(runner)]
        self.plan.replan_at = min(
            (one.stop_deadline for one in self.leaving if one.stop_deadline > state.now), default=math.inf
        )
        self.overdue = {runner.id for runner in expiring if state.is_overdue(runner)}
        movable = [runner for runner in state.runners.values() if not state.is_unmovable(runner)]
        self.availability = AvailabilityProfile(ledger, self.gpus, state.max_runners() - state.processes, movable)
        self.availability.add(AFTER_STOPS, [one for one in self.leaving if not one.leases])
        self.availability.add(AFTER_DRAINS, [one for one in self.leaving if one.leases])
        self.unmovable = len(state.runners) - len(movable)
        self.claimed: set[RunnerId] = set()  # victims of earlier request groups
        self.successors: Counter[ModelId] = Counter()  # request groups for a model behind the first of them
        self.loading = [runner for runner in state.runners.values() if runner.state is LOADING]
        self.awaited = {runner.id for runner in self.loading if state.groups_served_by(runner)}
        self.alone = next((runner for runner in self.loading if state.models[runner.model].load_exclusively), None)
        if self.alone is not None:
            self.availability.process_slots[NOW] = 0  # no other load begins beside an exclusive one
        self.load_slots = LoadSlots(state.config, (runner.placement for runner in self.loading))
        # runners with no lease left -> the rank of the first request that waits for one of their leases
        self.serving = {runner.id: rank for runner in state.runners.values() if (rank := _first_waiting(state, runner))}
        self.candidates = Candidates(state, policy, self.awaited, self.availability.held)
        self._own_bounds: dict[RequestSpec, float] = {}
        self._rankings: dict[tuple[bool, bool, tuple[DeviceId, ...]], Ranking] = {}
        self.waiting = 0  # request groups for which victims were looked for
        self.ahead: Counter[DeviceId] = Counter()  # how many of these groups lack memory of a device

    def wait(self, group: RequestGroup, reason: WaitReason, until: float = math.inf) -> None:
        """Note what a request group waits for, and until when as far as that is known."""
        self.plan.waits[group.spec] = (reason, until)

    def bound(self, group: RequestGroup) -> float:
        """Return the time until which a request group leaves busy runners alone.

        A time limit of one of its requests' own shortens it, so that there is time left for the drain and the load.
        """
        return min(group.head.queued_at + self.state.config.max_wait_s, self._own_bound(group))

    def hurried(self, group: RequestGroup) -> bool:
        """Tell whether the bound of a request group follows from a request's own time limit."""
        return self._own_bound(group) < group.head.queued_at + self.state.config.max_wait_s

    def _own_bound(self, group: RequestGroup) -> float:
        known = self._own_bounds.get(group.spec)
        if known is None:
            known = min(map(self.state.own_bound, group.requests.values()))
            self._own_bounds[group.spec] = known
        return known

    def serving_before(self, group: RequestGroup) -> set[RunnerId]:
        """Return the runners whose leases requests wait for that come before a group: they are not evicted for it."""
        if not self.serving:
            return set()
        own = self.state.rank(group.head)
        return {runner for runner, rank in self.serving.items() if rank < own}

    def ranking(self, group: RequestGroup, memories: Sequence[DeviceId]) -> Ranking:
        """Return every candidate for a group, ranked by what it frees of these memories; made once for many groups."""
        bound, hurried = self.bound(group), self.hurried(group)
        ordered = self.candidates.ordered(bound, hurried=hurried)
        key = (hurried, bound <= self.state.now, tuple(memories))
        if (known := self._rankings.get(key)) is None:
            known = self._rankings[key] = rank(self.state.now, ordered, self.frees(memories))
        return known

    def frees(self, memories: Sequence[DeviceId]) -> Callable[[Candidate], Amount]:
        """Return a function that returns how many bytes a candidate frees in each of these memories."""
        held = self.availability.held
        return lambda victim: tuple([held[victim.runner].get(memory, 0) for memory in memories])

    def unclaimed(self, victims: Iterable[Candidate]) -> list[Runner]:
        """Return the runners of victims that no earlier request group counts on; a mandatory victim may be claimed."""
        return [self.state.runners[victim.runner] for victim in victims if victim.runner not in self.claimed]


def _first_waiting(state: CoreState, runner: Runner) -> QueueRank | None:
    """Return the rank of the first request that waits for a lease of a runner; None where it has leases left."""
    if not runner.leases or not runner.current or state.leases_left(runner) != 0:
        return None
    return min((state.rank(group.head) for group in state.groups_served_by(runner)), default=None)
