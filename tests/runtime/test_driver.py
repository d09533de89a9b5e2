"""The driver: one order for all events, and the five precautions that keep a step whole."""

from __future__ import annotations

import gc
import math
import queue
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

import fsm.core
from fsm.core import Core, CoreConfig
from fsm.domain.devices import HOST, MIB, DeviceSample
from fsm.domain.options import Options
from fsm.machine.request import ModelId, Purpose, RequestId, RequestSpec
from fsm.messages.commands import Command, Inspect, Launch, Reject
from fsm.messages.decision_log import Decision, Entry
from fsm.messages.events import Acquire, Event, Exited, Inspected, Loaded, Release, Sampled, Tick
from fsm.messages.reasons import Queued
from fsm.messages.refusals import TimedOut
from fsm.planning.plan import Plan
from fsm.planning.planner import make_plan
from fsm.sizing.footprint import Footprint
from fsm.verification.state_invariants import check_state
from scheduler.concurrency.clock import monotonic_clock
from scheduler.concurrency.thread_pool import ThreadPool
from scheduler.engines.interface import Memory
from scheduler.runtime.driver import Driver
from scheduler.runtime.event_stream import EventStream
from scheduler.runtime.runner_handle import RunnerHandle
from tests.support.interrupts import as_main, interrupted
from tests.support.waiting import LIMIT_S, assert_soon


def nobody_listens(entries: Sequence[Entry]) -> bool:
    """Take entries and do nothing."""
    return False


@pytest.fixture
def start() -> Iterator[Callable[..., Driver]]:
    """Yield a function that makes drivers, which are ended afterwards."""
    drivers: list[Driver] = []

    def make(
        core: Core,
        perform: Callable[[Command], None] = lambda command: None,
        fail: list[BaseException] | None = None,
        publish: Callable[[Sequence[Entry]], bool] = nobody_listens,
    ) -> Driver:
        failures = [] if fail is None else fail
        driver = Driver(core, monotonic_clock, perform, publish, failures.append)
        driver.start()
        drivers.append(driver)
        return driver

    yield make
    for driver in drivers:
        assert driver.stop(LIMIT_S)


def in_thread(action: Callable[[], object]) -> None:
    """Run `action` on a thread that is not the main one, and wait for it."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert not thread.is_alive(), "the action hangs"


def acquire(request: int, model: str = "a") -> Acquire:
    """Return a request."""
    return Acquire(RequestId(request), RequestSpec(ModelId(model), Options(), Purpose.lease, 0))


class Watched(Core):
    """A core that notes which threads run its steps, and can do something in the middle of one."""

    def __init__(self, inside: Callable[[Event], object] = lambda event: None) -> None:
        super().__init__()
        self.inside = inside
        self.stepped: list[Event] = []
        self.threads: set[int] = set()

    def step(self, now: float, event: Event) -> list[Command]:
        """Note the thread that runs the step."""
        self.threads.add(threading.get_ident())
        self.stepped.append(event)
        commands = super().step(now, event)
        self.inside(event)
        return commands


def interrupt(event: Event) -> None:
    """Raise Ctrl-C while a step runs: the handler's exception is raised in the main thread, wherever that is."""
    if isinstance(event, Acquire):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_never_interrupts_a_step_that_the_main_thread_asked_for(start: Callable[..., Driver]) -> None:
    """Ctrl-C does not interrupt a step that the main thread caused, because another thread runs it."""
    core = Watched(interrupt)
    driver = start(core)
    with pytest.raises(KeyboardInterrupt):
        driver.post(acquire(1))
        assert_soon(lambda: False)
    assert_soon(lambda: RequestId(1) in driver.query(lambda core: core._state.requests))
    assert driver.broken is None
    assert threading.main_thread().ident not in core.threads
    check_state(core)


def test_without_the_hand_over_ctrl_c_breaks_a_step(start: Callable[..., Driver]) -> None:
    """Ctrl-C breaks a step that the main thread runs itself, which is the control of the test above."""
    failures: list[BaseException] = []
    driver = start(Watched(interrupt), fail=failures)
    driver._main = None  # no thread is the main one
    driver.post(acquire(1))
    assert [type(failure) for failure in failures] == [KeyboardInterrupt]


def test_ctrl_c_between_an_event_and_the_wake_up_loses_nothing(start: Callable[..., Driver]) -> None:
    """An event that the main thread posted is handled although Ctrl-C came right after it."""
    driver = start(Watched())

    class Inbox(type(driver._inbox)):  # type: ignore[misc]  # a deque that is interrupted
        def append(self, event: Event) -> None:
            super().append(event)
            raise KeyboardInterrupt

    driver._inbox = Inbox()
    with pytest.raises(KeyboardInterrupt):
        driver.post(acquire(1))
    assert_soon(lambda: not driver._inbox)


def test_a_finaliser_inside_a_step_posts_without_a_deadlock(start: Callable[..., Driver]) -> None:
    """A finaliser that runs in the thread that holds the lock posts its event without a deadlock."""

    class Lost:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            driver.post(Release(RequestId(99)))

    def collect(event: Event) -> None:
        if isinstance(event, Acquire):
            Lost()
            gc.collect()

    core = Watched(collect)
    driver = start(core)
    in_thread(lambda: driver.post(acquire(1)))
    assert_soon(lambda: [type(event) for event in core.stepped] == [Acquire, Release])


def test_an_exception_in_a_step_fails_everybody_and_decides_nothing_more(start: Callable[..., Driver]) -> None:
    """The first exception in a step is kept, and each later event is answered with it."""

    def fail(event: Event) -> None:
        raise ZeroDivisionError

    failures: list[BaseException] = []
    core = Watched(fail)
    driver = start(core, fail=failures)
    in_thread(lambda: driver.post(acquire(1)))
    in_thread(lambda: driver.post(acquire(2)))
    assert isinstance(driver.broken, ZeroDivisionError)
    assert failures == [driver.broken, driver.broken]
    assert len(core.stepped) == 1
    assert driver._deadline == math.inf  # else time would fail the core again and again


def test_commands_are_handed_on_in_the_order_in_which_they_were_decided(start: Callable[..., Driver]) -> None:
    """Commands of events from many threads are performed in the order in which the core decided them."""
    performed: list[Command] = []
    core = Watched()
    driver = start(core, perform=performed.append)
    threads = [
        threading.Thread(
            target=lambda first=first: [driver.post(acquire(id, f"m{id}")) for id in range(first, first + 50)]
        )  # type: ignore[misc]
        for first in range(0, 400, 50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    replayed = Core()
    expected = [command for event in core.stepped for command in replayed.step(0.0, event)]
    assert len(core.stepped) == 400
    assert [type(command) for command in performed] == [type(command) for command in expected]
    assert [command for command in performed if isinstance(command, Inspect)] == [
        command for command in expected if isinstance(command, Inspect)
    ]


def test_time_is_kept_while_nothing_happens(start: Callable[..., Driver]) -> None:
    """The driver's thread wakes at the core's deadline, so that a request's time limit ends its wait."""
    answers: queue.SimpleQueue[Command] = queue.SimpleQueue()
    driver = start(Core(), perform=answers.put)
    question = Acquire(RequestId(1), RequestSpec(ModelId("a"), Options(), Purpose.lease, 0), timeout_s=0.05)
    in_thread(lambda: driver.post(question))
    assert isinstance(answers.get(timeout=LIMIT_S), Inspect)
    rejected = answers.get(timeout=LIMIT_S)
    assert isinstance(rejected, Reject) and isinstance(rejected.refusal, TimedOut)


def test_a_deadline_that_comes_during_a_step_is_told_once(start: Callable[..., Driver]) -> None:
    """The driver's thread waits for the thread that holds the lock, and posts one tick for a deadline."""
    entered, go_on = threading.Event(), threading.Event()

    def linger(event: Event) -> None:
        if isinstance(event, Acquire) and event.request == 2:
            entered.set()
            assert go_on.wait(LIMIT_S)

    core = Watched(linger)
    driver = start(core)
    in_thread(lambda: driver.post(replace(acquire(1), timeout_s=2.0)))  # time for the holder to begin its step
    holder = threading.Thread(target=lambda: driver.post(acquire(2)), daemon=True)
    holder.start()
    assert entered.wait(LIMIT_S)
    assert_soon(lambda: driver._asleep_until == -math.inf)
    threading.Event().wait(0.05)
    go_on.set()
    holder.join(LIMIT_S)
    assert_soon(lambda: 1 not in driver.query(lambda core: core._state.requests))
    assert core.stepped.count(Tick()) == 1


def come(driver: Driver, model: str, request: int) -> None:
    """Post a request, and what its inspection finds: a model of no bytes."""
    driver.post(acquire(request, model))
    driver.post(Inspected(ModelId(model), Footprint()))


@pytest.fixture
def planners(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which every plan adds the thread that makes it."""
    threads: list[int] = []

    def noted(*args: Any, **how: Any) -> Plan:
        threads.append(threading.get_ident())
        return make_plan(*args, **how)

    monkeypatch.setattr(fsm.core, "make_plan", noted)
    return threads


def a_later_core() -> Core:
    core = Core(CoreConfig(plans_later=True, max_host_loads=10))
    core.step(0.0, Sampled((DeviceSample(HOST, "cpu", "host", 8 * MIB, 8 * MIB),)))
    return core


def test_only_the_driver_s_thread_plans(start: Callable[..., Driver], planners: list[int]) -> None:
    """Whichever threads post events, the driver's own thread makes the plans, soon and without another event."""
    core = a_later_core()
    driver = start(core)
    for number in range(1, 4):
        in_thread(lambda number=number: come(driver, f"model {number}", number))  # type: ignore[misc]  # binds now
        assert_soon(lambda number=number: len(core._state.runners) == number)
    assert set(planners) == {driver._thread.ident}


def test_all_that_comes_before_a_plan_is_planned_together(start: Callable[..., Driver], planners: list[int]) -> None:
    """For ten newcomers whose events wait in the inbox there is one plan, and one more that finds nothing to do."""
    core = a_later_core()
    driver = start(core)
    with driver._lock:  # another thread is in a step
        for number in range(1, 11):
            come(driver, f"model {number}", number)
    in_thread(lambda: driver.post(Release(RequestId(11))))  # late: it has the inbox drained, and that is all
    assert_soon(lambda: len(core._state.runners) == 10)
    assert len(driver.query(lambda core: planners)) == 2


def test_a_reader_sees_the_plan_for_what_it_posted_before(start: Callable[..., Driver], planners: list[int]) -> None:
    """A query that comes before the driver's thread plans has the plan made first."""
    driver = start(a_later_core())
    found: list[int] = []

    def look() -> None:
        come(driver, "a", 1)
        found.append(driver.query(lambda core: len(core._state.runners)))

    in_thread(look)
    assert found == [1]


def test_a_caller_steps_with_no_event_that_comes_meanwhile(start: Callable[..., Driver]) -> None:
    """A caller's thread is not kept by events that others post without end: the driver's thread goes on with them."""
    posted = iter(range(2, 50))

    def post_another(event: Event) -> None:
        if (id := next(posted, None)) is not None:
            in_thread(lambda: driver.post(acquire(id)))

    core = Watched(post_another)
    driver = start(core)
    by_caller: list[list[Event]] = []
    in_thread(lambda: (driver.post(acquire(1)), by_caller.append(core.stepped.copy())))
    assert by_caller == [[acquire(1)]]
    assert_soon(lambda: len(driver.query(lambda core: core._state.requests)) == 49)


def test_a_reader_sees_what_it_posted_before(start: Callable[..., Driver]) -> None:
    """A query sees the events that its thread posted before it, on the main thread and on others."""
    driver = start(Core())
    driver.post(acquire(1))
    assert driver.query(lambda core: list(core._state.requests)) == [1]
    in_thread(lambda: driver.post(acquire(2)))
    assert driver.query(lambda core: list(core._state.requests)) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        driver.query(lambda core: 1 // 0)
    assert driver.broken is None


def test_whoever_reads_has_been_told_of_what_is_found(start: Callable[..., Driver]) -> None:
    """The answers to events are published before a query that was posted after them returns."""
    told: list[Entry] = []
    driver = start(Core(), publish=lambda entries: told.extend(entries) is None)
    driver.query(lambda core: setattr(core, "decision_log", []))
    driver._inbox.append(acquire(1))
    assert driver.query(lambda core: len(told))


def test_a_stop_cancels_a_launch_that_has_not_begun() -> None:
    """A stop that overtakes its launch cancels it."""
    posted: list[Event] = []

    class Engine:
        def launch(self, *arguments: object) -> None:
            raise AssertionError("it was launched")

    launch = Launch(7, ModelId("a"), Options(), None)  # type: ignore[arg-type]  # never looked at
    life = RunnerHandle(launch, Engine(), None, posted.append)  # type: ignore[arg-type]
    life.stop(1.0)
    life.begin()
    life.begin()
    assert posted == [Exited(7, None, "stopped before it began", False)]  # type: ignore[arg-type]


def test_a_launch_that_hangs_does_not_hold_up_its_stop() -> None:
    """A launch that hangs does not delay its stop, because stops have threads of their own."""
    posted: list[Event] = []
    entered, go_on, stopped = threading.Event(), threading.Event(), threading.Event()

    class Process:
        def stop(self, grace_s: float) -> None:
            stopped.set()

    class Engine:
        def launch(self, *arguments: object) -> Process:
            entered.set()
            assert go_on.wait(LIMIT_S)
            return Process()

    life = RunnerHandle(Launch(7, ModelId("a"), Options(), None), Engine(), None, posted.append)  # type: ignore[arg-type]
    thread = threading.Thread(target=life.begin)
    thread.start()
    assert entered.wait(LIMIT_S)
    in_thread(lambda: life.stop(1.0))
    go_on.set()
    assert stopped.wait(LIMIT_S)
    thread.join()


def test_a_load_that_ends_within_its_launch_is_told_with_its_process() -> None:
    """A runner that serves before its launch has returned is granted only when its process is known."""
    processes: list[object] = []

    class Engine:
        def launch(self, *arguments: object) -> Process:
            life.loaded(object(), None, Memory())
            return Process()

    class Process:
        pass

    def post(event: Event) -> None:
        assert isinstance(event, Loaded)
        processes.append(life.process)

    life = RunnerHandle(Launch(7, ModelId("a"), Options(), None), Engine(), None, post)  # type: ignore[arg-type]
    life.begin()
    assert [type(one) for one in processes] == [Process]


def test_a_thread_that_cannot_be_started_loses_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose thread cannot be started waits for the next thread, and nothing raises."""
    workers = ThreadPool("test", 2)
    done: queue.SimpleQueue[int] = queue.SimpleQueue()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        workers.put(lambda: done.put(1))
    workers.put(lambda: done.put(2))
    assert [done.get(timeout=LIMIT_S), done.get(timeout=LIMIT_S)] == [1, 2]
    assert workers.close(LIMIT_S) == []


def test_a_finaliser_may_post_while_its_thread_reads_the_events() -> None:
    """What is offered to an event stream from inside a read of it neither blocks nor is lost."""
    stream = EventStream(10, str)
    entry = Decision(0.0, "queued", ModelId("a"), Queued(1))

    class Entries(type(stream._entries)):  # type: ignore[misc]  # a deque whose use runs a finaliser
        def popleft(self) -> tuple[int, Decision]:
            found: tuple[int, Decision] = super().popleft()
            if found[1].why == Queued(1):
                stream.offer([Decision(1.0, "queued", ModelId("b"), Queued(2))])
            return found

    stream._entries = Entries()
    stream.offer([entry])
    taken: list[object] = []
    in_thread(lambda: taken.extend([stream.take(LIMIT_S), stream.take(LIMIT_S)]))
    assert [getattr(each, "model", None) for each in taken] == ["a", "b"]


def test_a_job_that_hangs_cannot_hang_the_exit() -> None:
    """The interpreter exits although a job never ends."""
    program = """
        import threading
        from scheduler.concurrency.thread_pool import ThreadPool
        workers = ThreadPool("test", 2)
        begun = threading.Event()
        workers.put(lambda: (begun.set(), threading.Event().wait()))
        begun.wait()
        print("over", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert (done.returncode, done.stdout) == (0, "over\n")


def test_workers_are_bounded_and_survive_a_job_that_fails() -> None:
    """Never more threads than the limit run, and a job's exception is logged."""
    workers = ThreadPool("test", 2)
    done: queue.SimpleQueue[int] = queue.SimpleQueue()
    workers.put(lambda: 1 // 0)
    for number in range(20):
        workers.put(lambda number=number: done.put(number))  # type: ignore[misc]
    assert sorted(done.get(timeout=LIMIT_S) for _ in range(20)) == list(range(20))
    assert len(workers._threads) <= 2
    assert workers.close(LIMIT_S) == []


def test_a_job_that_exits_ends_no_thread() -> None:
    """A job that calls sys.exit does not end its thread."""
    workers = ThreadPool("test", 1)
    done: queue.SimpleQueue[int] = queue.SimpleQueue()
    workers.put(sys.exit)
    workers.put(lambda: done.put(1))
    assert done.get(timeout=LIMIT_S) == 1
    assert workers.close(LIMIT_S) == []


def test_a_handler_may_read_while_its_thread_waits_for_a_reading(
    start: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler may query while its thread waits for a query, at any moment of the wait."""
    monkeypatch.setattr("scheduler.runtime.driver._CHECK_S", 0.0)  # the wait has no end, so that every moment comes
    for moment in range(1, 300):
        driver = start(Core())
        driver._lock.acquire()  # nothing is answered before the handler comes

        def read(count: int, driver: Driver = driver, moment: int = moment) -> None:
            if count == moment:
                driver._lock.release()
                driver._wake.put(True)
                assert driver.query(lambda core: "inner") == "inner"

        as_main(driver, lambda driver=driver, read=read: interrupted(lambda: driver.query(id), read))  # type: ignore[misc]
        assert driver.stop(LIMIT_S)


def test_nobody_waits_to_read_once_the_driver_has_stopped(
    start: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query after the driver has stopped is made on the calling thread."""
    monkeypatch.setattr("scheduler.runtime.driver._CHECK_S", 10 * LIMIT_S)
    driver = start(Core())
    assert driver.stop(LIMIT_S)
    found: list[object] = []
    as_main(driver, lambda: found.append(driver.query(lambda core: list(core._state.requests))))
    assert found == [[]] and not driver._inbox
