"""What can be seen and repeated: decision log, snapshot, copies, determinism, deadlines and timers."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from fsm.core import Core
from fsm.domain.devices import HOST, DeviceId, DeviceSample, Placement
from fsm.domain.options import Options
from fsm.eviction.policies import KeepAliveOrder
from fsm.machine.request import Purpose, Request, RequestSpec
from fsm.machine.runner import EXPIRING, IDLE, LOADING, READY, UNLOADED, Runner, RunnerState
from fsm.machine.transition_table import IllegalTransition
from fsm.messages.commands import Stop
from fsm.messages.decision_log import Decision, Entry, Transition
from fsm.messages.events import Configure, Inspected, OutOfMemory, Progress, Sampled, Tick
from fsm.messages.reasons import (
    ClaimMissed,
    LoadStalled,
    NeededFor,
    Queued,
    RunnerReason,
    RunnerStep,
    TransitionReason,
    WaitFor,
    WaitForRunners,
)
from fsm.state.timers import Timers
from fsm.verification.state_invariants import check_state
from scheduler.recording.codec import decode_state, encode
from tests.support.pool import (
    START,
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    cancel,
    close,
    exited,
    expire,
    layered,
    loaded,
    memory,
    pin,
    preload,
    progress,
    release,
    unpin,
    unresponsive,
)


def a_busy_pool() -> PoolUnderTest:
    """Return a pool with runners in every state, waiting requests, leases, pins, memory, failures and timers."""
    pool = a_pool(capacity="16GiB", gpus=("8GiB",), each="2GiB", max_runners=6).declare("g", layered(4, "1GiB"))
    pool.ready("a", lease=1).idle("b").expiring("c", lease=2).loading("d", request=3, timeout="1h").idle("g")
    pool.feed(pin("b"), memory(4, cpu="1GiB"), acquire("a", request=5, num_thread=3), preload("e", request=6))
    pool.feed(acquire("e", request=7, priority=3), exited(pool.runner("g"), code=-9))
    return pool


def test_the_journal_tells_a_life() -> None:
    """The decision log has every transition of a runner with its reason and its leases afterwards."""
    pool = a_pool()
    log: list[Entry] = []
    pool.core.decision_log = log
    pool.ready("a", lease=1)
    pool.advance("2s")
    pool.feed(release(1), expire("a"), exited(1))
    life = [(entry.trigger, entry.source, entry.destination, entry.leases) for entry in transitions(log)]
    assert life == [
        ("launch", None, LOADING, 0),
        ("serve", LOADING, READY, 1),
        ("rest", READY, IDLE, 0),
        ("expire", IDLE, EXPIRING, 0),
        ("unload", EXPIRING, UNLOADED, 0),
    ]
    assert [entry.at for entry in transitions(log)] == [START, START, START + 2, START + 2, START + 2]
    assert all(entry.why and entry.runner == 1 and entry.model == "a" for entry in transitions(log))


def transitions(log: list[Entry]) -> list[Transition]:
    return [entry for entry in log if isinstance(entry, Transition)]


def test_the_journal_tells_what_was_decided_about_requests() -> None:
    """The decision log has the decisions on requests in order: queued, granted, rejected."""
    pool = a_pool()
    log: list[Entry] = []
    pool.core.decision_log = log
    pool.ready("a", lease=1)
    pool.feed(acquire("b", request=2), cancel(2), memory(3, cpu="1GiB"))
    told = [(entry.what, entry.request) for entry in decisions(log) if entry.what not in ("waits", "placed")]
    assert told == [("queued", 1), ("granted", 1), ("queued", 2), ("rejected", 2), ("queued", 3), ("granted", 3)]


def decisions(log: list[Entry]) -> list[Decision]:
    return [entry for entry in log if isinstance(entry, Decision)]


def test_the_journal_tells_what_is_waited_for_once_each_time_it_changes() -> None:
    """The decision log has what a request waits for, once for each change, as the queue shows it."""
    pool = a_pool().ready("a", lease=1)
    log: list[Entry] = []
    pool.core.decision_log = log
    pool.feed(acquire("b", request=2), pool.sample(), pool.sample(), expire("a"), release(1), exited(1))
    waits = [(entry.request, entry.why) for entry in decisions(log) if entry.what == "waits"]
    assert waits == [
        (2, WaitFor.metadata),
        (2, WaitForRunners(("a",), RunnerStep.idle)),
        (2, WaitForRunners(("a",), RunnerStep.drain)),
        (2, WaitFor.memory),
        (2, WaitFor.load),
    ]


def test_a_victims_end_says_whose_memory_it_makes() -> None:
    """The log of a victim's transition names the model whose memory it makes, or the program's own memory."""
    for wish, model in ((acquire("b", request=2), "b"), (memory(2, cpu="6GiB"), "")):
        pool = a_pool().idle("a")
        log: list[Entry] = []
        pool.core.decision_log = log
        pool.feed(wish)
        assert [entry.why for entry in transitions(log) if entry.trigger == "expire"] == [NeededFor(model)]


def test_the_journal_is_no_input_of_a_decision() -> None:
    """With and without a decision log the same events lead to the same commands."""
    with_journal, without = a_pool(), a_pool()
    with_journal.core.decision_log = []
    for pool in (with_journal, without):
        pool.ready("a", lease=1).feed(acquire("b", request=2), release(1), exited(1), loaded(2))
    assert with_journal.commands == without.commands


def test_the_same_events_give_the_same_commands() -> None:
    """The same events at the same times give the same commands."""
    first, second = a_busy_pool(), a_busy_pool()
    for pool in (first, second):
        pool.advance("10m")
        pool.feed(close("1s"))
        pool.advance("1m")
        pool.settle()
    assert first.commands == second.commands
    assert first.core.snapshot() == second.core.snapshot()


def test_a_copy_goes_its_own_way() -> None:
    """A copy of the core and the original do not change each other."""
    pool = a_busy_pool()
    before = pool.core.snapshot()
    copy = pool.core.copy()
    assert copy.snapshot() == before
    for event in (release(1), cancel(3), exited(2), Configure(max_runners=1), close("0s")):
        copy.step(pool.now, event)
        check_state(copy)
    copy.step(pool.now + 1e6, Tick())
    check_state(copy)
    assert pool.core.snapshot() == before
    check_state(pool.core)


def test_a_copy_decides_like_the_original() -> None:
    """After a copy, the same events give the same commands in the copy and in the original."""
    pool = a_busy_pool()
    copy = pool.core.copy()
    events = [release(1), loaded(4), Tick(), cancel(6), expire("a"), exited(1), close("5s"), Tick()]
    for later, event in enumerate(events):
        now = pool.now + 100.0 * later
        assert copy.step(now, event) == pool.core.step(now, event)
        assert copy.deadline() == pool.core.deadline()


def test_a_copy_keeps_count_of_what_was_late_and_of_the_end() -> None:
    """A copy keeps the number of late events and whether Finished was sent."""
    pool = a_pool()
    pool.feed(release(9), close())
    copy = pool.core.copy()
    assert (copy.late, copy.step(pool.now, close())) == (1, [])


def test_a_snapshot_shows_everything() -> None:
    """A snapshot has the runners, the queue with what each request waits for, leases, devices, limits and closing."""
    snapshot = a_busy_pool().core.snapshot()
    states = {view.model: view.state for view in snapshot.runners}
    assert states == {
        "a": RunnerState.ready,
        "b": RunnerState.idle,
        "c": RunnerState.expiring,
        "d": RunnerState.loading,
        "e": RunnerState.loading,
    }
    assert {view.model for view in snapshot.runners if view.pinned} == {"b"}
    assert [(view.request, view.position) for view in snapshot.queue] == [(7, 0), (3, 1), (5, 2), (6, 3)]
    assert {view.request: view.purpose for view in snapshot.queue}[6] is Purpose.preload
    assert [view.gives_up_at for view in snapshot.queue if view.request == 3] == [START + 3600.0]
    host = next(view for view in snapshot.devices if view.id == "cpu")
    assert (host.capacity_bytes, host.held_bytes) == (amount("16GiB"), amount("11GiB"))
    assert [(view.request, view.model, view.purpose, view.runner) for view in snapshot.held] == [
        (1, "a", Purpose.lease, 1),
        (2, "c", Purpose.lease, 3),
        (4, "", Purpose.memory, None),
    ]
    assert all(view.declared for view in snapshot.runners)
    assert snapshot.limits.max_runners == 6 and not snapshot.closing


def test_a_snapshot_tells_a_declared_size_from_a_predicted_one() -> None:
    """A snapshot marks sizes that an object declared, and leaves a file's predicted size unmarked."""
    pool = a_pool(each="1GiB").declare("layers", layered(2, "1GiB")).idle("layers").idle("object")
    assert {view.model: view.declared for view in pool.core.snapshot().runners} == {"layers": False, "object": True}


def test_a_snapshot_shows_an_integrated_gpu_where_the_host_was_not_read() -> None:
    """An integrated GPU has the figures of its own reading where the host was not read."""
    core = Core()
    core.step(0.0, Sampled((DeviceSample(DeviceId("gpu0"), "gpu", "gpu0", 8, 4, integrated=True),)))
    assert [(view.id, view.free_bytes) for view in core.snapshot().devices] == [("gpu0", 4)]


def test_the_core_tells_which_models_and_runners_it_keeps() -> None:
    """The core names a model as in use while a request, an inspection, a pin or a runner needs it."""
    pool = a_pool(inspects=False)
    core = pool.core
    assert not core.knows("a") and not core.lives(1) and core.models_in_use() == frozenset()
    pool.feed(acquire("a", request=1))
    assert core.knows("a") and core.models_in_use() == {"a"}
    pool.feed(cancel(1))
    assert core.models_in_use() == {"a"}, "an inspection needs the model"
    pool.feed(pool.inspection("a"), pin("b"))
    assert core.models_in_use() == {"b"} and core.checkpoint().models() == ("a", "b")
    pool.inspects = True
    pool.idle("a")
    assert core.lives(1) and core.models_in_use() == {"a", "b"}
    pool.feed(expire("a"), exited(1), unpin("b"))
    assert not core.lives(1) and core.models_in_use() == frozenset() and core.knows("a")


def test_a_snapshot_does_not_change_afterwards() -> None:
    """A snapshot does not change when the core does."""
    pool = a_pool().ready("a", lease=1)
    snapshot = pool.core.snapshot()
    pool.feed(release(1), expire("a"), exited(1))
    assert [view.state for view in snapshot.runners] == [RunnerState.ready]


def test_every_entry_names_the_step_that_caused_it() -> None:
    """Every log entry has the number of its step, and late events are steps too."""
    pool = a_pool().idle("a")
    log: list[Entry] = []
    pool.core.decision_log, first = log, pool.core.steps + 1
    assert pool.feed(acquire("b", request=7), release(99)) == [Stop(1)]
    assert pool.core.steps == first + 3, "an acquire, a reading, an inspection and a late release"
    decided = [(entry.step, entry.what) for entry in decisions(log) if entry.what in ("queued", "evicts")]
    assert decided == [(first, "queued"), (first + 2, "evicts")]
    assert [(entry.step, entry.trigger) for entry in transitions(log)] == [(first + 2, "expire")]


def test_steps_are_counted_on_in_a_copy_and_from_a_state() -> None:
    """Steps are numbered on in a copy and in a restored state, and no number is used twice."""
    pool = a_busy_pool()
    steps = pool.core.steps
    assert steps > 10
    for twin in (pool.core.copy(), Core.restore(decode_state(encode(pool.core.checkpoint())))):
        twin.step(pool.now, Tick())
        assert (twin.steps, pool.core.steps) == (steps + 1, steps)


def test_a_step_that_raises_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that raises has a number of its own."""
    core = Core()
    monkeypatch.setattr(Core, "_close", lambda core, timeout_s: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        core.step(0.0, close())
    assert core.steps == 1


def test_an_illegal_transition_tells_what_its_runner_has_been_through() -> None:
    """An illegal transition names the runner's last transitions if there is a log, and its times if there is none."""
    said = {}
    for name, log in {"quiet": None, "loud": list[Entry]()}.items():
        pool = a_pool()
        pool.core.decision_log = log
        pool.feed(acquire("a", request=1))
        pool.advance("3s")
        pool.feed(loaded(1), release(1), expire("a"))
        with pytest.raises(IllegalTransition, match="runner: 'serve' is not allowed while expiring") as raised:
            pool.core._context.fire(pool.life("a"), "serve", "granted")
        said[name] = str(raised.value)
        assert raised.value.story not in repr(raised.value), "the recorded text is the same without a log"
    assert said["quiet"].endswith(
        "; step 7, at 1003 s; runner 1 before it: launched at 1000 s; loaded at 1003 s; last used at 1003 s"
    )
    assert "in step 4, at 1000 s: launch, loading (AskedBy(request=1)); in step 5, at 1003 s: serve" in said["loud"]
    assert said["loud"].endswith("in step 7, at 1003 s: expire, expiring (RunnerReason.asked)")


def test_time_never_goes_back() -> None:
    """An event with an earlier time than the last one counts as of the last time."""
    pool = a_pool().ready("a", lease=1)
    pool.core.step(pool.now - 500.0, release(1))
    assert pool.core.snapshot().runners[0].expires_at == pool.now + 300.0


def test_an_empty_pool_waits_for_nothing() -> None:
    """A core without runners and requests has no deadline, an empty snapshot, and holds its invariants."""
    core = Core()
    check_state(core)
    assert core.deadline() == math.inf
    assert core.step(0.0, Tick()) == []
    assert (core.snapshot().runners, core.snapshot().queue, core.snapshot().devices) == ((), (), ())


def test_late_events_are_counted_and_change_nothing() -> None:
    """S15: events with unknown ids are counted as late and change nothing."""
    pool = a_busy_pool()
    pool.core.late, before = 0, pool.core.snapshot()
    strangers = [
        release(99), cancel(99), loaded(99), exited(99), Progress(99), OutOfMemory(99),
        unresponsive(99), expire("unknown"), Inspected("unknown", layered(1, "1GiB")),
    ]  # fmt: skip
    assert pool.feed(*strangers) == []
    assert pool.core.late == len(strangers)
    assert pool.core.snapshot() == before


RUNNER = Runner(1, "a", Options(num_ctx=1), Placement(((HOST, 1),)), 2.0, 3.0)


REQUEST = Request(1, RequestSpec("a", Options(), Purpose.lease, 0), 2.0, 3.0)


@pytest.mark.parametrize("original", [RUNNER, REQUEST], ids=lambda original: type(original).__name__)
def test_a_copy_is_like_the_original_in_every_field(original: Runner | Request) -> None:
    """A copy is equal in every field and shares no set or dictionary."""
    for number, each in enumerate(fields(original)):
        value = getattr(original, each.name)
        match value:
            case bool():
                setattr(original, each.name, not value)
            case int() | float() | None:
                setattr(original, each.name, 100 + number)
            case set():
                value.add(number)
            case dict():
                value[HOST] = number
            case _:
                pass
    copy = original.copy()
    for each in fields(original):
        value, copied = getattr(original, each.name), getattr(copy, each.name)
        assert copied == value, each.name
        assert copied is not value or not isinstance(value, set | dict), each.name


def test_a_copy_of_a_core_has_its_policy_and_its_failures() -> None:
    """A copy of the core has its policy, its limits, its failures and its number of late events."""
    core, missed = Core(policy=KeepAliveOrder()), ClaimMissed((HOST,), 60.0)
    core.policy_failure, core._context.claim_failure, core.late = "ValueError()", missed, 3
    copy = core.copy()
    assert copy.policy is core.policy and copy._state.config == core._state.config
    assert (copy.policy_failure, copy._context.claim_failure, copy.late) == ("ValueError()", missed, 3)


def test_failures_are_told() -> None:
    """Failures are empty at first, and then have the error of a policy and a missed claim."""
    core, missed = Core(), ClaimMissed((HOST,), 60.0)
    assert core.failures() == ()
    core._context.claim_failure = missed
    assert core.failures() == (missed,)
    core.policy_failure = "ValueError()"
    assert core.failures() == ("ValueError()", missed)


def test_every_late_event_is_counted() -> None:
    """Each late event adds one to the count, whatever its type."""
    pool = a_pool().idle("a")
    late = pool.core.late
    pool.feed(progress(pool.runner("a")), release(999), loaded(999), exited(999), release(998))
    assert pool.core.late == late + 5


def reasons(pool: PoolUnderTest) -> list[TransitionReason]:
    """Return the reasons of transitions since the decision log was begun."""
    return [entry.why for entry in pool.core.decision_log or () if isinstance(entry, Transition)]


def told(pool: PoolUnderTest) -> PoolUnderTest:
    """Begin a decision log and return the pool."""
    pool.core.decision_log = []
    return pool


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("keep-alive", RunnerReason.keep_alive_over),
        ("close", RunnerReason.closing),
        ("stall", LoadStalled(300.0)),
    ],
)
def test_a_transition_tells_its_reason(what: str, reason: TransitionReason) -> None:
    """The log of a transition has its reason, and a stalled load's reason has its time limit."""
    pool = told(a_pool().loading("a") if what == "stall" else a_pool().idle("a"))
    if what == "close":
        pool.feed(close(0))
    else:
        pool.advance("301s")
    assert reason in reasons(pool)


def test_a_queued_request_is_told_with_its_model_and_its_place() -> None:
    """The log of a queued request has the model, the request and its place in the queue."""
    pool = told(a_pool())
    pool.feed(acquire("a", request=7))
    entries = [
        entry for entry in pool.core.decision_log or () if isinstance(entry, Decision) and entry.what == "queued"
    ]
    assert [(entry.model, entry.why, entry.request) for entry in entries] == [("a", Queued(1), 7)]


def test_nothing_is_due_once_everything_has_gone() -> None:
    """No timer of a runner, a claim or a request remains once its runner has gone."""
    pool = a_pool(claims=True).idle("a")
    runner = pool.runner("a")
    pool.feed(expire("a"), exited(runner))
    pool.advance("600s")
    assert pool.core.deadline() == math.inf


# -- timers -----------------------------------------------------------------------------------------------------------


def test_timers_come_up_in_order() -> None:
    """Timers come up once each, the earliest first."""
    timers = Timers()
    timers.set(("keep-alive", 1), 3.0)
    timers.set(("keep-alive", 2), 1.0)
    timers.set(("plan", 0), 2.0)
    assert timers.items() == [(1.0, ("keep-alive", 2)), (2.0, ("plan", 0)), (3.0, ("keep-alive", 1))]
    assert [timers.take_due(2.5) for _ in range(3)] == [("keep-alive", 2), ("plan", 0), None]
    assert timers.deadline() == 3.0


def test_a_timer_that_was_moved_comes_up_at_its_new_time_only() -> None:
    """A timer that was set again comes up at its new time only, later or earlier."""
    timers = Timers()
    timers.set(("load", 1), 1.0)
    timers.set(("load", 1), 5.0)
    timers.set(("load", 2), 5.0)
    timers.set(("load", 2), 1.0)
    assert [timers.take_due(4.0) for _ in range(2)] == [("load", 2), None]
    assert [timers.take_due(9.0) for _ in range(2)] == [("load", 1), None]


def test_a_timer_that_was_cleared_never_comes_up() -> None:
    """A timer that was cleared or set to infinity never comes up."""
    timers = Timers()
    timers.set(("load", 1), 1.0)
    timers.clear(("load", 1))
    timers.set(("load", 2), 1.0)
    timers.set(("load", 2), math.inf)
    timers.clear(("load", 3))
    assert timers.take_due(9.0) is None
    assert (timers.at(("load", 1)), timers.deadline()) == (math.inf, math.inf)


def test_a_cleared_timer_can_be_set_again_to_an_earlier_or_later_time() -> None:
    """A timer that was cleared can be set again, and its old entry does not disturb the new one."""
    for again in (0.5, 1.0, 2.0):
        timers = Timers()
        timers.set(("load", 1), 1.0)
        timers.clear(("load", 1))
        timers.set(("load", 1), again)
        assert timers.deadline() <= again
        assert [timers.take_due(3.0) for _ in range(2)] == [("load", 1), None]


def test_what_lingers_is_swept_out_and_nothing_else() -> None:
    """Entries of cleared timers are removed, and every timer that was set comes up."""
    timers = Timers()
    for number in range(1000):
        timers.set(("request", number), 1000.0 - number)
        if number % 10:
            timers.clear(("request", number))
    assert [timers.take_due(2000.0) for _ in range(101)] == [
        *(("request", number) for number in range(990, -1, -10)), None,
    ]  # fmt: skip


def test_copied_timers_are_independent() -> None:
    """A copy of the timers shares nothing with the original."""
    timers = Timers()
    timers.set(("load", 1), 1.0)
    other = timers.copy()
    other.take_due(1.0)
    other.set(("load", 2), 0.5)
    assert timers.items() == [(1.0, ("load", 1))]
    assert timers.take_due(2.0) == ("load", 1)
