"""Runners that should have ended and have not: no plan counts on their memory for ever, and every wait has an end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fsm.eviction.policies import Candidate
from fsm.machine.runner import RunnerState
from fsm.messages.commands import Stop
from fsm.messages.reasons import MemoryHeld, RunnerStep, WaitFor, WaitForRunners
from fsm.messages.refusals import DoesNotFitRefusal
from tests.support.pool import a_pool, acquire, exited, expire, launched, release, stopped


def test_a_runner_that_does_not_stop_is_not_counted_on() -> None:
    """Rule 11: a runner that does not stop in time is no longer counted on, and another one is evicted."""
    pool = a_pool(capacity="5GiB", sizes={"a": "3GiB", "b": "2GiB", "c": "2GiB"}).idle("b").idle("a")
    pool.feed(expire("a"))
    assert stopped(pool.feed(acquire("c", request=9))) == []
    assert pool.waits_for(9) == WaitFor.memory
    assert stopped(pool.advance("20s")) == [pool.runner("b")]


def test_a_drain_that_takes_too_long_is_not_counted_on() -> None:
    """A runner that drains for longer than the bound is no longer counted on, and an idle one is evicted."""
    pool = a_pool(capacity="5GiB", sizes={"a": "3GiB", "b": "2GiB", "c": "2GiB"}).idle("b").ready("a", lease=1)
    pool.feed(expire("a"), acquire("c", request=9))
    assert pool.waits_for(9) == WaitForRunners(("a",), RunnerStep.drain)
    assert stopped(pool.advance("119s")) == []
    assert stopped(pool.advance("2s")) == [pool.runner("b")]
    assert pool.state("a") is RunnerState.expiring
    assert pool.feed(release(1)) == [Stop(pool.runner("a"))]


def test_what_only_a_stuck_runner_could_make_room_for_is_refused_and_names_it() -> None:
    """A request that only a stuck runner's memory could serve is refused, and the refusal names the runner."""
    pool = a_pool(capacity="5GiB", sizes={"a": "3GiB", "c": "4GiB"}).idle("a")
    pool.feed(expire("a"), acquire("c", request=9))
    pool.advance("20s")
    refusal = pool.refusal(9)
    assert isinstance(refusal, DoesNotFitRefusal) and refusal.reason == MemoryHeld(("a",), pinned=False)


def test_a_load_that_needs_to_be_alone_does_not_wait_for_what_is_stuck() -> None:
    """N07: the second try of a load that ran out of memory does not wait for a stuck runner."""
    pool = a_pool(capacity="20GiB", sizes={"a": "3GiB", "b": "6GiB"}).idle("a")
    pool.feed(expire("a"))
    pool.loading("b", request=9)
    again = launched(pool.feed(exited(pool.runner("b"), out_of_memory=True))) + launched(pool.advance("30s"))
    assert len(again) == 1


@pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit, KeyboardInterrupt])
def test_a_policy_that_raises_does_not_stop_the_scheduler(kind: type[BaseException]) -> None:
    """A policy that raises is replaced by the least recently used order, and its failure is kept for the status."""

    class Broken:
        name = "broken"

        def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
            raise kind("a policy's bug")

    pool = a_pool(capacity="8GiB", policy=Broken()).idle("a")
    assert stopped(pool.feed(acquire("b", request=9))) == [1]
    assert "a policy's bug" in pool.core.policy_failure


def test_whom_a_policy_leaves_out_is_given_up_last() -> None:
    """Rule 11: a policy only orders, so a candidate that it leaves out comes last."""

    class Protective:
        name = "protective"

        def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
            return [one for one in candidates if one.model != "a"]

    sizes = {"a": "2GiB", "b": "2GiB", "c": "5GiB"}
    pool = a_pool(capacity="6GiB", sizes=sizes, policy=Protective()).idle("a").idle("b")
    assert stopped(pool.feed(acquire("c", request=9))) == [pool.runner("b"), pool.runner("a")]


def test_whom_a_policy_names_twice_counts_once() -> None:
    """A candidate that a policy names twice counts once."""

    class Repetitive:
        name = "repetitive"

        def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
            return [candidates[0], *candidates]

    sizes = {"a": "3GiB", "b": "3GiB", "c": "6GiB"}
    pool = a_pool(capacity="6GiB", sizes=sizes, policy=Repetitive()).idle("a").ready("b", lease=1)
    assert stopped(pool.feed(acquire("c", request=9))) == []
    assert pool.waits_for(9) == WaitForRunners(("a", "b"), RunnerStep.idle)


def test_a_younger_load_does_not_take_the_place_of_one_that_starts_in_a_moment() -> None:
    """Rule 5: a younger request does not take the load slot of an older one whose memory is being freed."""
    sizes = {"a": "6GiB", "b": "6GiB", "c": "1GiB"}
    pool = a_pool(capacity="8GiB", sizes=sizes, max_host_loads=1).idle("a")
    pool.feed(acquire("b", request=8))
    assert launched(pool.feed(acquire("c", request=9))) == []
    assert launched(pool.feed(exited(1)) + pool.feed(pool.sample())) == ["b"]
