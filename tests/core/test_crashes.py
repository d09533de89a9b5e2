"""Processes that crash or do not answer, and how the next requests for their models are answered."""

from __future__ import annotations

import pytest

from fsm.machine.runner import RunnerState
from fsm.messages.commands import RevokeLease
from fsm.messages.decision_log import Decision
from fsm.messages.reasons import BackedOff, NoAnswer, ProcessExited
from fsm.messages.refusals import LoadFailedRefusal
from tests.support.pool import a_pool, acquire, exited, launched, refused, release, stopped, unresponsive

KILLED = ProcessExited(-9, "killed", loaded=True)


def test_a_crash_breaks_the_leases() -> None:
    """A crash revokes the runner's leases, their releases are late, and the memory comes back."""
    pool = a_pool().ready("a", lease=1).ready("a", lease=2)
    assert pool.feed(exited(1, code=-9, reason="killed")) == [RevokeLease(1, KILLED), RevokeLease(2, KILLED)]
    assert pool.feed(release(1), release(2)) == []
    assert (pool.core.late, pool.state("a")) == (2, RunnerState.unloaded)


def test_the_first_crash_is_followed_by_a_new_load() -> None:
    """The first request after a crash starts a new runner."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(exited(1, code=-9))
    assert launched(pool.feed(acquire("a", request=2))) == ["a"]


def test_the_second_crash_in_a_row_is_backed_off() -> None:
    """A model that crashes twice in a row is in back-off, and requests for it are refused."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(exited(1, code=-9))
    pool.ready("a", lease=2).feed(exited(2, code=-9, reason="killed"))
    assert refused(pool.feed(acquire("a", request=3))) == {3: LoadFailedRefusal}
    assert pool.refusal(3).reason == KILLED


def test_u46_a_back_off_is_a_decision_of_its_own() -> None:
    """The decision log has a back-off also where no request is refused with it, and none for the first crash."""
    pool = a_pool(back_off_s=10.0).ready("a", lease=1)
    pool.core.decision_log = []
    pool.feed(exited(1, code=-9))
    pool.ready("a", lease=2).feed(exited(2, code=-9))
    entries = [entry for entry in pool.core.decision_log if isinstance(entry, Decision)]
    assert [(each.model, each.why) for each in entries if each.what == "backs off"] == [("a", BackedOff(2, 20.0))]


def test_the_second_crash_in_a_row_is_the_answer_of_those_who_wait() -> None:
    """The second crash in a row refuses requests that wait for the model with other options."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(exited(1, code=-9))
    pool.ready("a", lease=2).feed(acquire("a", request=3, num_thread=2))
    assert refused(pool.feed(exited(2, code=-9))) == {3: LoadFailedRefusal}


def test_a_crash_after_a_good_life_counts_as_the_first() -> None:
    """A crash of a runner that served for a minute counts as the first in a row."""
    pool = a_pool(good_life_s=60.0).ready("a", lease=1)
    pool.feed(exited(1, code=-9))
    pool.ready("a", lease=2)
    pool.advance("60s")
    pool.feed(exited(2, code=-9))
    assert launched(pool.feed(acquire("a", request=3))) == ["a"]


def test_an_idle_runner_that_dies_is_not_listed_as_loaded() -> None:
    """Rule 8: the crash of an idle runner is noticed when it happens, and the next request starts a new runner."""
    pool = a_pool(samples=False).idle("a")
    pool.feed(exited(1, code=-9))
    assert pool.state("a") is RunnerState.expiring
    assert launched(pool.feed(acquire("a", request=1), pool.sample())) == ["a"]


def test_a_runner_that_dies_while_it_drains_breaks_its_leases() -> None:
    """A runner that crashes while it drains revokes its leases, and the crash does not count against the model."""
    pool = a_pool().expiring("a", lease=1)
    assert pool.feed(exited(1, code=-9, reason="killed")) == [RevokeLease(1, KILLED)]
    assert pool.state("a") is RunnerState.unloaded
    assert launched(pool.feed(acquire("a", request=2))) == ["a"]


@pytest.mark.parametrize("state", ["ready", "idle", "expiring"])
def test_a_runner_that_answers_no_probe_is_stopped_at_once(state: str) -> None:
    """A runner that answers no probe is stopped at once, its leases are revoked, and it is never granted again."""
    pool = getattr(a_pool(), state)("a", *((1,) if state != "idle" else ()))
    commands = pool.feed(unresponsive(1))
    assert stopped(commands) == [1]
    assert commands[:-1] == ([] if state == "idle" else [RevokeLease(1, NoAnswer(10.0))])


def test_one_that_answers_no_probe_time_and_again_is_backed_off() -> None:
    """Not answering probes twice in a row counts as two crashes, and the model is in back-off."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(unresponsive(1), exited(1, code=-9))
    pool.ready("a", lease=2).feed(unresponsive(2), exited(2, code=-9))
    assert refused(pool.feed(acquire("a", request=3))) == {3: LoadFailedRefusal}


def test_a_runner_that_said_nothing_after_unresponsive_is_stopped_once() -> None:
    """A second report that a runner does not answer changes nothing."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(unresponsive(1))
    assert pool.feed(unresponsive(1), exited(1, code=-9)) == []


def test_s29_a_dead_life_is_beside_the_next_one_and_never_in_its_place() -> None:
    """S29: a crashed runner is listed beside its model's next runner, because runners are kept by their ids."""
    pool = a_pool(samples=False, each="1GiB").ready("a", lease=1)
    pool.feed(exited(1, code=-9))
    pool.ready("a", lease=2)
    assert [(view.id, view.state.name) for view in pool.core.snapshot().runners] == [(1, "expiring"), (2, "ready")]
    pool.feed(pool.sample())
    assert [(view.id, view.state.name) for view in pool.core.snapshot().runners] == [(2, "ready")]


def test_memory_that_runs_out_while_a_runner_drains_ends_the_others_too() -> None:
    """N08: memory that runs out while a runner drains expires the other runners too, as any may have taken it."""
    pool = a_pool("20GiB").ready("b", lease=2).expiring("a", lease=1)
    pool.feed(exited(pool.runner("a"), code=-9, out_of_memory=True))
    assert pool.state("b") is RunnerState.expiring


def test_of_crashes_a_good_life_apart_each_is_the_first() -> None:
    """Crashes that are a good life apart are each the first, and a third one soon after is the second in a row."""
    pool = a_pool(good_life_s=60.0).ready("a", lease=1)
    for runner in (1, 2):
        pool.advance("60s")
        pool.feed(exited(runner, code=-9, reason=f"crash {runner}"))
        pool.ready("a", lease=runner + 1)
    assert pool.core._state.models["a"].failure == ProcessExited(-9, "crash 2", loaded=True)
    pool.feed(exited(3, code=-9, reason="crash 3"))
    pool.feed(acquire("a", request=9))
    assert pool.refusal(9) == LoadFailedRefusal("a", ProcessExited(-9, "crash 3", loaded=True), 20.0)


def test_a_second_crash_in_a_row_is_no_lack_of_memory() -> None:
    """Requests that wait for the next runner are told the reason of the second crash, which is no lack of memory."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(unresponsive(1), exited(1))
    pool.ready("a", lease=2)
    pool.feed(acquire("a", request=3, num_thread=5), unresponsive(2))
    refusal = pool.refusal(3)
    assert isinstance(refusal, LoadFailedRefusal)
    assert (refusal.reason, refusal.out_of_memory) == (NoAnswer(10.0), False)
