"""Victim selection: the set of runners to evict, either the first of an order that suffice, or the cheapest.

The planner says whether a set suffices, and has to find a placement for it. The answer depends only on the bytes that
the set frees on each device, and more bytes never make it worse: so an answer for one set holds for many other sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fsm.eviction.policies import Candidate, EvictionPolicy
from fsm.machine.runner import RunnerId

NO_COST = "a cost that is not a finite number"
_LONGEST_WORDS = 2000  # characters of an exception

Amount = tuple[int, ...]  # bytes by device, in some order that stays the same


Suffices = Callable[[Sequence[Candidate]], bool]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Candidates in the orders in which sets of them are tried: sorted once, for many choices."""

    ordered: Sequence[Candidate]  # by the policy
    tiers: Sequence[tuple[Sequence[Candidate], Sequence[Candidate]]]  # by cost for a byte, and by cost; or none
    frees: Mapping[RunnerId, Amount]

    def without(self, runners: Collection[RunnerId]) -> Ranking:
        """Return the ranking of the candidates that are none of these runners."""
        return self._each(lambda order: [one for one in order if one.runner not in runners]) if runners else self

    def idle(self, now: float) -> Ranking:
        """Return the ranking of the candidates that hold no lease and may leave now."""
        return self._each(lambda order: [one for one in order if not one.leases and one.free_at <= now])

    def _each(self, select: Callable[[Sequence[Candidate]], Sequence[Candidate]]) -> Ranking:
        tiers = [(select(by_byte), select(by_cost)) for by_byte, by_cost in self.tiers]
        return Ranking(select(self.ordered), [tier for tier in tiers if tier[0]], self.frees)


@dataclass(frozen=True, slots=True)
class VictimSet:
    """The victims to evict, and the expected cost of their eviction."""

    victims: tuple[Candidate, ...]  # mandatory victims first
    cost_s: float | None = None  # sum of the costs of the chosen victims; None where the policy only orders


def in_words(error: BaseException) -> str:
    """Return an exception in words, or the name of its type where its own `repr` raises: it may be the user's own."""
    try:
        return repr(error)[:_LONGEST_WORDS]
    except BaseException:  # also exceptions that would end a program
        return type(error).__name__


def apply_policy(policy: EvictionPolicy, now: float, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return every candidate once, in a policy's order and with its costs; raises the exceptions of the policy.

    A candidate that the policy leaves out comes last: it may be the only one that suffices, and the request group would
    wait for ever.
    """
    known = {one.runner: one for one in candidates}
    order = policy.order(now, list(candidates))
    preferred = {one.runner: one.cost_s for one in order if one.runner in known}
    costs = [None if cost_s is None else float(cost_s) for cost_s in preferred.values()]  # it may be a user's number
    if not all(cost_s is None or math.isfinite(cost_s) for cost_s in costs):
        raise ValueError(NO_COST)
    ordered = [known.pop(runner) for runner in preferred]
    ordered = [
        one if cost_s is None else one.at_cost(max(0.0, cost_s)) for one, cost_s in zip(ordered, costs, strict=True)
    ]
    return [*ordered, *known.values()]


def rank(now: float, ordered: Sequence[Candidate], frees: Callable[[Candidate], Amount]) -> Ranking:
    """Return the ranking of candidates that are in a policy's order."""
    freed = {one.runner: frees(one) for one in ordered}

    def cost_by_byte(one: Candidate) -> tuple[float, float, int]:  # a candidate that frees nothing comes last
        amount = sum(freed[one.runner])
        return (one.cost_s or 0.0) / amount if amount else math.inf, one.used_at, one.runner

    tiers: dict[tuple[bool, bool, bool], list[Candidate]] = {}
    if all(candidate.cost_s is not None for candidate in ordered):
        for one in ordered:
            tiers.setdefault(eviction_tier(one, now), []).append(one)
    orders = [(sorted(tiers[tier], key=cost_by_byte), sorted(tiers[tier], key=_price)) for tier in sorted(tiers)]
    return Ranking(ordered, orders, freed)


def choose_victims(
    ranking: Ranking, mandatory: Sequence[Candidate], suffices: Suffices, least: int = 0
) -> VictimSet | None:
    """Return the victims: all of `mandatory`, and some of a ranking; None if all of them together do not suffice.

    At least `least` beside the mandatory ones leave, where any have to. Where every candidate has a cost, the cheapest
    set is chosen, tier by tier. Else as few candidates are chosen as suffice, the first preferred.
    """
    if ranking.ordered and not ranking.tiers:
        victims = smallest_prefix(ranking.ordered, mandatory, suffices)
        return None if victims is None else VictimSet(tuple(victims))
    if suffices(mandatory):
        return VictimSet(tuple(mandatory), 0.0)
    if not ranking.ordered or not suffices([*mandatory, *ranking.ordered]):
        return None
    return _cheapest(ranking, mandatory, suffices, least)


def smallest_prefix(
    ordered: Sequence[Candidate], mandatory: Sequence[Candidate], suffices: Callable[[Sequence[Candidate]], bool]
) -> Sequence[Candidate] | None:
    """Return all of `mandatory` and as few of `ordered` as suffice, the first preferred; None if all do not suffice.

    Candidates are added one by one until the set suffices. Then each candidate that the set does without is removed.
    """
    chosen = list(mandatory)
    for candidate in ordered:
        if suffices(chosen):
            break
        chosen.append(candidate)
    if not suffices(chosen):
        return None
    for candidate in chosen[len(mandatory) :]:
        without = [other for other in chosen if other is not candidate]
        if suffices(without):
            chosen = without
    return chosen


def eviction_tier(candidate: Candidate, now: float) -> tuple[bool, bool, bool]:
    """Return the tier of a candidate, which counts before its cost: the lower, the earlier it is evicted.

    Candidates that may not leave yet come last, then busy candidates, then candidates with an infinite keep-alive.
    """
    return candidate.free_at > now, candidate.leases > 0, candidate.keep_alive_s == math.inf


def _cheapest(ranking: Ranking, mandatory: Sequence[Candidate], suffices: Suffices, least: int) -> VictimSet:
    """Return a cheap set that suffices, and touches no more tiers than have to be touched.

    Of the last of these tiers as cheap a part is taken as will do, then of the tier before it, beside that part, and so
    on down. Each part is the better of two greedy ones: the cheapest candidates first, and the cheapest by the byte.
    """
    tiers = ranking.tiers
    sets = SetOracle(ranking, mandatory, suffices, least)
    last = next((count for count in range(1, len(tiers)) if sets.suffice(_joined(tiers[:count]))), len(tiers))
    chosen: list[Candidate] = []
    for place in range(last - 1, -1, -1):
        beside = [*chosen, *_joined(tiers[:place])]
        if not sets.suffice(beside):
            found = [smallest_prefix(order, beside, sets.suffice) or () for order in tiers[place]]  # all of it suffices
            chosen += min((one[len(beside) :] for one in found), key=_cost)
    chosen.sort(key=_price)
    return VictimSet((*mandatory, *chosen), _cost(chosen))


def _joined(tiers: Iterable[tuple[Sequence[Candidate], Sequence[Candidate]]]) -> list[Candidate]:
    return [candidate for by_byte, _ in tiers for candidate in by_byte]


class SetOracle:
    """Tells whether a set of candidates suffices beside the mandatory victims; what a set frees answers for others."""

    def __init__(self, ranking: Ranking, mandatory: Sequence[Candidate], suffices: Suffices, least: int) -> None:
        self.frees = ranking.frees
        self.mandatory = mandatory
        self.suffices = suffices
        self.least = least
        self.too_little: list[Amount] = []  # what was freed by sets that did not suffice
        self.plenty: list[Amount] = []  # and by sets that did

    def suffice(self, chosen: Sequence[Candidate]) -> bool:
        """Tell whether a set suffices, by a placement only where no other set tells; an empty set does not."""
        if not chosen or len(chosen) < self.least:
            return False
        freed = tuple(map(sum, zip(*[self.frees[one.runner] for one in chosen], strict=True)))
        if any(_within(freed, less) for less in self.too_little):
            return False
        if any(_within(more, freed) for more in self.plenty):
            return True
        suffices = self.suffices([*self.mandatory, *chosen])
        (self.plenty if suffices else self.too_little).append(freed)
        return suffices


def _price(one: Candidate) -> tuple[float, float, int]:
    return one.cost_s or 0.0, one.used_at, one.runner


def _cost(candidates: Iterable[Candidate]) -> float:
    return sum(candidate.cost_s or 0.0 for candidate in candidates)


def _within(one: Amount, other: Amount) -> bool:
    return all(map(int.__le__, one, other))
