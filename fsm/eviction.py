"""Which runners to give up so that another fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fsm.request import ModelId
from fsm.runner import RunnerId


@dataclass(frozen=True, slots=True)
class Candidate:
    """A runner that may be given up, as a policy sees it."""

    runner: RunnerId
    model: ModelId
    held_bytes: int
    keep_alive_s: float  # infinite: for ever
    used_at: float  # its last grant or release, seconds of the core's time
    load_s: float | None  # what its load took; None while it is loading
    leases: int
    free_at: float  # when it may go: now, after its minimum residency, or at the bound of who waits


class EvictionPolicy(Protocol):
    """An order of preference; called inside a step, so it must be quick and must not block."""

    @property
    def name(self) -> str:
        """What it is called in settings and in events."""

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the candidates, the first to be given up first; a pure function of its arguments."""


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


POLICIES: dict[str, EvictionPolicy] = {policy.name: policy for policy in (LeastRecentlyUsed(), KeepAliveOrder())}


def choose(
    ordered: Sequence[Candidate], forced: Sequence[Candidate], suffices: Callable[[Sequence[Candidate]], bool]
) -> Sequence[Candidate] | None:
    """Return the victims: `forced` ones, and as few of `ordered` as suffice, the first preferred; None if all do not.

    Taken one by one until they suffice, then those that turned out not to be needed are kept after all.
    """
    chosen = list(forced)
    for candidate in ordered:
        if suffices(chosen):
            break
        chosen.append(candidate)
    if not suffices(chosen):
        return None
    for candidate in chosen[len(forced) :]:
        without = [other for other in chosen if other is not candidate]
        if suffices(without):
            chosen = without
    return chosen
