"""Who may be given up for somebody who waits: found once a plan, in the policy's order, with what it says they cost."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial

from fsm.eviction.policies import Candidate, EvictionPolicy
from fsm.eviction.reuse_prediction import IdleTimeStatistics, ReuseForecast
from fsm.eviction.victim_selection import apply_policy, in_words
from fsm.machine.runner import IDLE, Runner, RunnerId
from fsm.state.core_state import CoreState


class Candidates:
    """Every runner that may be given up at all, as a policy sees it."""

    def __init__(self, state: CoreState, policy: EvictionPolicy, awaited: Collection[RunnerId]) -> None:
        self.pool = state
        self.policy = policy
        self.policy_failure = ""  # the exception that the policy raised; the oldest runners go first instead
        self.movable = [
            runner
            for runner in state.runners.values()
            if runner.current and runner.id not in awaited and not state.pinned(runner)
        ]
        self.idle = {  # may be given up at this moment, whoever waits
            runner.id
            for runner in self.movable
            if not runner.leases and evictable_at(state, runner, -math.inf) <= state.now
        }
        self._orders: tuple[list[Candidate], list[Candidate]] | None = None
        self._experience: IdleTimeStatistics | None = None
        self._outlooks: dict[RunnerId, ReuseForecast] = {}  # as far as a policy has asked

    def evictable_until(self, bound: float, without: Collection[RunnerId]) -> list[Candidate]:
        """Return who may be given up for somebody who waits until `bound`: who may go now, then idle ones, then others.

        When each may go is exact only where that is now: `timed` says the rest.
        """
        if self._orders is None:
            over = self._preferred([self.candidate(runner, -math.inf) for runner in self.movable])
            self._orders = self._first_to_go(self.timed(math.inf, over)), self._first_to_go(over)
        return [one for one in self._orders[bound <= self.pool.now] if one.runner not in without]

    def timed(self, bound: float, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Return candidates with the time from which on each may go for somebody who waits until `bound`."""
        runners = self.pool.runners
        return [replace(one, free_at=evictable_at(self.pool, runners[one.runner], bound)) for one in candidates]

    def candidate(self, runner: Runner, bound: float) -> Candidate:
        """Return a runner as a policy sees it."""
        account = self.pool.ledger.accounts["runner", runner.id]
        model = self.pool.models[runner.model]
        load_s = None if runner.loaded_at is None else model.usual_load_s(runner.placement.gpu_layers)
        return Candidate(
            runner.id, runner.model, sum(map(account.held_bytes, self.pool.ledger.devices)), runner.keep_alive_s,
            runner.used_at, load_s, len(runner.leases), evictable_at(self.pool, runner, bound),
            partial(self._outlook, runner),
        )  # fmt: skip

    def _first_to_go(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        return sorted(candidates, key=lambda one: (one.free_at > self.pool.now, one.leases > 0))

    def _preferred(self, candidates: list[Candidate]) -> list[Candidate]:
        try:
            return apply_policy(self.policy, self.pool.now, candidates)
        except BaseException as error:  # a policy may be the user's own: also what would end a program
            self.policy_failure = in_words(error)
            return candidates

    def _outlook(self, runner: Runner) -> ReuseForecast:
        """Return how soon a runner's model may be asked for again; found once a plan, and only where it is wanted."""
        if self._experience is None:
            self._experience = IdleTimeStatistics(self.pool.idle_intervals)
        if (known := self._outlooks.get(runner.id)) is None:
            rest_s = 0.0 if runner.leases else self.pool.now - runner.used_at
            known = self._experience.forecast(self.pool.models[runner.model].idle_intervals, rest_s)
            self._outlooks[runner.id] = known
        return known


def evictable_at(state: CoreState, runner: Runner, bound: float) -> float:
    """Return when `runner` may go for somebody who waits for others' convenience until `bound`; now at the least.

    A busy one goes at the bound, and not within its minimum residency. An idle one goes once it has rested for a small
    part of what its load took: users that ask again at once find it there, and its memory is not turned over between
    two requests of theirs. That ends an automatic residency early too, since it is there for the users, and a runner
    that rests while others wait has none left; one that was set holds to its end.
    """
    if runner.leases:
        return max(state.now, runner.drain_protected_until, bound)
    resident_until = runner.resident_until if state.config.min_residency_s is not None else state.now
    kept_until = min(runner.idle_grace_until, bound) if runner.state is IDLE else state.now
    return max(state.now, resident_until, kept_until)
