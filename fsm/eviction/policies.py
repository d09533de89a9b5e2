"""Which runners to give up so that another fits: the policies, and the choice of a set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from fsm.eviction.reuse_prediction import ReuseForecast
from fsm.machine.request import ModelId
from fsm.machine.runner import RunnerId

PRICED_PART = 0.35  # of what the candidates hold: to give up that much shows what memory costs at the moment
PRICE_FACTOR = 0.5
TIE_BREAK_S = 10.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A runner that may be given up, as a policy sees it."""

    runner: RunnerId
    model: ModelId
    held_bytes: int
    keep_alive_s: float  # infinite: for ever
    used_at: float  # its last grant or release, seconds of the core's time
    load_s: float | None  # what a load of its model usually takes where it is; None while it is loading
    leases: int
    free_at: float  # when it may go: now, after its minimum residency, or at the bound of who waits
    outlook: Callable[[], ReuseForecast] = field(
        default=tuple, compare=False, repr=False
    )  # how soon it may be asked for
    cost_s: float | None = None  # seconds of loading that giving it up is expected to cost, by the policy; None: unsaid


class EvictionPolicy(Protocol):
    """An order of preference, or a price of each; called inside a step, so it must be quick and must not block."""

    @property
    def name(self) -> str:
        """What it is called in settings and in events."""

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the candidates, the first to be given up first; a pure function of its arguments.

        Where each is returned with a `cost_s`, not the first ones are given up but the set that costs least.
        """


@dataclass(frozen=True, slots=True)
class KeepAliveOrder:
    """The reference's order: shortest keep-alive first, then by path."""

    name: str = "keep-alive"

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return them by keep-alive, infinite last, then by model."""
        return sorted(candidates, key=lambda candidate: (candidate.keep_alive_s, candidate.model))


@dataclass(frozen=True, slots=True)
class LeastRecentlyUsed:
    """The longest unused first; what is kept for ever goes last."""

    name: str = "lru"

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return them by last use."""
        return sorted(candidates, key=lambda one: (one.keep_alive_s == math.inf, one.used_at, one.runner))


@dataclass(frozen=True, slots=True)
class ExpectedReloadCost:
    """What it would cost to have each back, weighed with how soon that may be.

    A runner that stays for a while takes memory until it is asked for or the while is over, and saves a load if it is
    asked for. With a price for memory there is a while for which that is worth most, after which it would be given up
    anyway: what it is worth then is lost when it goes now. The price is what memory is held for by those of whom the
    least is expected. A little is added for each by the rate at which it saves loading, which tells apart what is
    worth nothing at that price.
    """

    name: str = "reuse"

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return them with their costs, the cheapest first; a load that nobody waits for costs nothing."""
        outlooks = [candidate.outlook() for candidate in candidates]
        loads_s = [candidate.load_s or 0.0 for candidate in candidates]
        rates = [
            load_s * max((asked / rest_s for asked, rest_s in outlook), default=0.0)
            for load_s, outlook in zip(loads_s, outlooks, strict=True)
        ]
        price = PRICE_FACTOR * _price(candidates, rates)
        priced = [
            replace(candidate, cost_s=_worth(outlook, load_s, price * candidate.held_bytes) + TIE_BREAK_S * rate)
            for candidate, outlook, load_s, rate in zip(candidates, outlooks, loads_s, rates, strict=True)
        ]
        return sorted(priced, key=lambda one: (one.cost_s, one.used_at, one.runner))


def _price(candidates: Sequence[Candidate], rates: Sequence[float]) -> float:
    """Return the seconds of loading that a byte saves in a second, of those bytes that save least."""
    held = sorted((rate / max(1, one.held_bytes), one.held_bytes) for one, rate in zip(candidates, rates, strict=True))
    wanted = PRICED_PART * sum(amount for _, amount in held)
    taken, saved = 0, 0.0
    for density, amount in held:
        if taken >= wanted:
            break
        taken, saved = taken + amount, saved + density * amount
    return saved / max(1, taken)


def _worth(outlooks: ReuseForecast, load_s: float, rent: float) -> float:
    """Return what it is worth to keep a runner as long as that pays, if a second of it costs `rent`."""
    return max(0.0, max((load_s * asked - rent * rest_s for asked, rest_s in outlooks), default=0.0))


POLICIES: dict[str, EvictionPolicy] = {
    policy.name: policy for policy in (ExpectedReloadCost(), LeastRecentlyUsed(), KeepAliveOrder())
}
DEFAULT_POLICY = POLICIES["reuse"]  # of a core, and of the setting `eviction`
