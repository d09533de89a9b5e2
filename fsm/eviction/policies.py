"""Eviction policies: in which order candidates are evicted, or what the eviction of each of them costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fsm.eviction.reuse_prediction import ReuseForecast, request_rate
from fsm.machine.request import ModelId
from fsm.machine.runner import RunnerId

PRICED_PART = 0.35  # of the bytes of all candidates: the part that saves least shows what memory costs at the moment
PRICE_FACTOR = 0.5
TIE_BREAK_S = 10.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A runner that may be evicted, as a policy sees it."""

    runner: RunnerId
    model: ModelId
    held_bytes: int
    keep_alive_s: float  # infinite: for ever
    used_at: float  # its last grant or release, seconds of the core's time
    load_s: float | None  # seconds that a load of its model usually takes with its split; None while it is loading
    leases: int
    free_at: float  # when it may be evicted: now, after its minimum residency, or at the bound of the group that waits
    outlook: Callable[[], ReuseForecast] = field(default=tuple, compare=False, repr=False)  # of requests for its model
    prompts_s: float = 0.0  # seconds to have its prompts again, by reading or computing them; 0: not known
    cost_s: float | None = None  # seconds of loading that its eviction costs, by the policy; None: not named

    def at_cost(self, cost_s: float) -> Candidate:
        """Return the candidate with this cost; for the many of a plan `dataclasses.replace` takes too long."""
        return self._with(self.free_at, cost_s)

    def from_on(self, free_at: float) -> Candidate:
        """Return the candidate with another time from which on it may be evicted."""
        return self._with(free_at, self.cost_s)

    def _with(self, free_at: float, cost_s: float | None) -> Candidate:
        return Candidate(
            self.runner, self.model, self.held_bytes, self.keep_alive_s, self.used_at, self.load_s, self.leases,
            free_at, self.outlook, self.prompts_s, cost_s,
        )  # fmt: skip


class EvictionPolicy(Protocol):
    """An order of candidates, or the cost of each; called inside a step, so it must be quick and must not block."""

    @property
    def name(self) -> str:
        """The name of the policy in settings and in events."""

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the candidates, the first to be evicted first; a pure function of its arguments.

        Where every candidate is returned with a `cost_s`, the set that costs least is evicted, in place of the first.
        """


@dataclass(frozen=True, slots=True)
class KeepAliveOrder:
    """The reference's order: shortest keep-alive first, then by path."""

    name: str = "keep-alive"

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the candidates by keep-alive, infinite last, then by model."""
        return sorted(candidates, key=lambda candidate: (candidate.keep_alive_s, candidate.model))


@dataclass(frozen=True, slots=True)
class LeastRecentlyUsed:
    """The longest unused runner first; runners with an infinite keep-alive last."""

    name: str = "lru"

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the candidates by last use."""
        return sorted(candidates, key=lambda one: (one.keep_alive_s == math.inf, one.used_at, one.runner))


@dataclass(frozen=True, slots=True)
class ExpectedReloadCost:
    """The expected cost of loading each candidate again, by its load time and by how soon its model may be requested.

    Where prompts are kept, the time to have a runner's prompts again is part of its load time.

    A runner that stays loaded for some time occupies memory until its model is requested or the time is over, and saves
    a load if its model is requested. With a price for memory there is a time for which staying is worth most, and after
    it the runner would be evicted anyway. That worth is lost when the runner is evicted now: it is the candidate's
    cost. The price of memory is the loading that a byte saves in the runners that save least. A small cost is added by
    the rate at which a runner saves loading, which orders the runners that are worth nothing at that price.
    """

    name: str = "reuse"

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the candidates with their costs, the cheapest first; a load that no request awaits costs nothing."""
        outlooks = [candidate.outlook() for candidate in candidates]
        loads_s = [0.0 if one.load_s is None else one.load_s + one.prompts_s for one in candidates]
        rates = [load_s * request_rate(outlook) for load_s, outlook in zip(loads_s, outlooks, strict=True)]
        price = PRICE_FACTOR * _price(candidates, rates)
        priced = [
            candidate.at_cost(_worth(outlook, load_s, price * candidate.held_bytes) + TIE_BREAK_S * rate)
            for candidate, outlook, load_s, rate in zip(candidates, outlooks, loads_s, rates, strict=True)
        ]
        return sorted(priced, key=lambda one: (one.cost_s, one.used_at, one.runner))


def _price(candidates: Sequence[Candidate], rates: Sequence[float]) -> float:
    """Return the seconds of loading that a byte saves in a second, on average over the bytes that save least."""
    held = sorted((rate / max(1, one.held_bytes), one.held_bytes) for one, rate in zip(candidates, rates, strict=True))
    priced = PRICED_PART * sum(amount for _, amount in held)
    taken, saved = 0, 0.0
    for density, amount in held:
        if taken >= priced:
            break
        taken, saved = taken + amount, saved + density * amount
    return saved / max(1, taken)


def _worth(outlooks: ReuseForecast, load_s: float, rent: float) -> float:
    """Return the seconds of loading that a runner saves if it stays as long as that pays, at `rent` a second."""
    return max(0.0, max((load_s * asked - rent * rest_s for asked, rest_s in outlooks), default=0.0))


POLICIES: dict[str, EvictionPolicy] = {
    policy.name: policy for policy in (ExpectedReloadCost(), LeastRecentlyUsed(), KeepAliveOrder())
}
DEFAULT_POLICY = POLICIES["reuse"]  # of a core, and of the setting `eviction`
