"""The candidates for eviction: found once a plan, in the policy's order, with the costs that the policy names."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial

from fsm.domain.devices import DeviceId
from fsm.eviction.policies import Candidate, EvictionPolicy
from fsm.eviction.reuse_prediction import IdleTimeStatistics, ReuseForecast
from fsm.eviction.victim_selection import apply_policy, in_words
from fsm.machine.runner import EXPIRING, IDLE, Runner, RunnerId
from fsm.messages.reasons import KeptReason
from fsm.state.core_state import CoreState


class Candidates:
    """Every runner that may be evicted at all, as a policy sees it."""

    def __init__(
        self,
        state: CoreState,
        policy: EvictionPolicy,
        awaited: Collection[RunnerId],
        held: Mapping[RunnerId, Mapping[DeviceId, int]],
    ) -> None:
        self.state = state
        self.held = held  # bytes by device of each runner
        self.policy = policy
        self.policy_failure = ""  # the exception that the policy raised; the oldest runners go first instead
        # why each runner that may not be evicted for any request group may not; every other runner is movable
        self.barred = {id: why for id, runner in state.runners.items() if (why := _barred(state, runner, awaited))}
        self.movable = [runner for runner in state.runners.values() if runner.id not in self.barred]
        self.idle = {  # runners that may be evicted at this moment for any request group
            runner.id
            for runner in self.movable
            if not runner.leases and evictable_at(state, runner, -math.inf) <= state.now
        }
        self._orders: dict[bool, tuple[list[Candidate], list[Candidate]]] = {}  # by whether the group is hurried
        self._statistics: IdleTimeStatistics | None = None
        self._forecasts: dict[RunnerId, ReuseForecast] = {}  # of the runners that the policy has asked about

    def ordered(self, bound: float, *, hurried: bool = False) -> Sequence[Candidate]:
        """Return the candidates for a group with this bound: first all that may leave now, then idle, then busy ones.

        The time from which on each may leave is exact only where that is now: `timed` returns the others.
        """
        if (orders := self._orders.get(hurried)) is None:
            past = self._preferred([self.candidate(one, -math.inf, hurried=hurried) for one in self.movable])
            later = self.timed(math.inf, past, hurried=hurried)
            orders = self._orders[hurried] = self._first_to_go(later), self._first_to_go(past)
        return orders[bound <= self.state.now]

    def timed(self, bound: float, candidates: Iterable[Candidate], *, hurried: bool = False) -> list[Candidate]:
        """Return candidates with the time from which on each may be evicted for a group whose bound is `bound`."""
        runners, state = self.state.runners, self.state
        return [one.from_on(evictable_at(state, runners[one.runner], bound, hurried=hurried)) for one in candidates]

    def candidate(self, runner: Runner, bound: float, *, hurried: bool = False) -> Candidate:
        """Return a runner as a policy sees it."""
        held, devices = self.held[runner.id], self.state.ledger.devices
        model = self.state.models[runner.model]
        load_s = None if runner.loaded_at is None else model.usual_load_s(runner.placement.gpu_layers)
        return Candidate(
            runner.id, runner.model, sum([held.get(device, 0) for device in devices]), runner.keep_alive_s,
            runner.used_at, load_s, len(runner.leases),
            evictable_at(self.state, runner, bound, hurried=hurried), partial(self._forecast, runner), runner.prompts_s,
        )  # fmt: skip

    def _first_to_go(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        return sorted(candidates, key=lambda one: (one.free_at > self.state.now, one.leases > 0))

    def _preferred(self, candidates: list[Candidate]) -> list[Candidate]:
        try:
            return apply_policy(self.policy, self.state.now, candidates)
        except BaseException as error:  # a policy may be the user's own, and may raise what would end a program
            self.policy_failure = in_words(error)
            return candidates

    def _forecast(self, runner: Runner) -> ReuseForecast:
        """Return how soon a runner's model may be requested again; computed once a plan, when a policy asks."""
        if self._statistics is None:
            self._statistics = IdleTimeStatistics(self.state.idle_intervals)
        if (known := self._forecasts.get(runner.id)) is None:
            idle_s = 0.0 if runner.leases else self.state.now - runner.used_at
            known = self._statistics.forecast(self.state.models[runner.model].idle_intervals, idle_s)
            self._forecasts[runner.id] = known
        return known


def _barred(state: CoreState, runner: Runner, awaited: Collection[RunnerId]) -> KeptReason | None:
    if runner.state is EXPIRING:
        return KeptReason.overdue if state.is_stuck(runner) else KeptReason.expiring
    if state.pinned(runner):
        return KeptReason.pinned
    return KeptReason.awaited if runner.id in awaited else None


def evictable_at(state: CoreState, runner: Runner, bound: float, *, hurried: bool = False) -> float:
    """Return the time from which on `runner` may be evicted for a request group whose bound is `bound`; now or later.

    A busy runner may be evicted at the bound, and not within its minimum residency in use. For a `hurried` group, whose
    bound follows from a request's own time limit, only the shorter residency counts: as long as the load took. An idle
    runner may be evicted after its grace, a small part of what its load took: callers that ask again at once find it
    there, and its memory does not change hands between two of their requests. The end of the grace ends an automatic
    minimum residency too, which is there for the callers: a runner that is idle while others wait has none left. A
    minimum residency that was set holds to its end.
    """
    if runner.leases:
        return max(state.now, runner.resident_until if hurried else runner.drain_protected_until, bound)
    resident_until = runner.resident_until if state.config.min_residency_s is not None else state.now
    kept_until = min(runner.idle_grace_until, bound) if runner.state is IDLE else state.now
    return max(state.now, resident_until, kept_until)
