"""Faults of the host's program and of its clock: gaps in time, floods, closes at bad moments, exits without a close."""

from __future__ import annotations

import ast
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from fsm.core import Core
from fsm.messages.events import Event, Tick
from scheduler import (
    Lease,
    LoadTimeout,
    PythonModel,
    QueueFull,
    Scheduler,
    SchedulerClosed,
)
from scheduler.engines.llama import LlamaEngine
from scheduler.runtime.driver import Driver
from tests.support.leaks import no_leaks
from tests.support.real import STOPPING_CHILD, begin_a_load, is_gone, settings, states, write_models
from tests.support.waiting import LIMIT_S, assert_soon

ROOT = Path(__file__).parents[2]
TELL_THE_TIME = {"recorder.py", "tracing.py", "ollama_translation.py", "ollama_models.py"}
ORPHANED_S = 10.0  # ten times the second within which no child of a killed host is left
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with no_leaks():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), "a") / "a.gguf"


class Gate:
    """A call that returns when the gate is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self, *_: object) -> object:
        self.entered.set()
        assert self.open.wait(LIMIT_S)
        return object()


def a_model(name: str, size: str = "400MiB", **fields: Any) -> PythonModel:
    return PythonModel(name, memory={"cpu": size}, **{"load": object, **fields})


def a_scheduler(**more: Any) -> Scheduler:
    """Return a scheduler with room for two objects of 400 MiB."""
    return Scheduler(settings(**{"memory_limit": "1000MiB", "min_residency": 0, **more}))


# -- time --------------------------------------------------------------------------------------------------------------


class Clock:
    """The machine's clock, which a test may set."""

    ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


class Noting(Core):
    """A core that keeps the events that it was told."""

    def __init__(self, told: list[object]) -> None:
        super().__init__()
        self.told = told

    def step(self, now: float, event: Event) -> list[Any]:
        self.told.append(event)
        return super().step(now, event)


def test_a_gap_is_noticed_before_anything_is_judged_by_it() -> None:
    """After a gap in time, the listener of gaps is called before the next tick; an ordinary tick calls no listener."""
    told: list[object] = []
    clock, core = Clock(), Noting(told)
    driver = Driver(core, clock, lambda _: None, lambda _: False, lambda _: None, lambda: told.append("gap"))
    driver.start()
    try:
        driver.query(lambda core: core._state.timers.set(("plan", 0), clock() + 0.02))
        assert_soon(lambda: isinstance(told[-1:] and told[-1], Tick))
        assert "gap" not in told
        driver.query(lambda core: core._state.timers.set(("plan", 0), clock() + 60.0))
        clock.ahead_s = 3600.0
        driver._wake.put(True)  # as any event of the main thread
        assert_soon(lambda: told[-2:] == ["gap", Tick()])
    finally:
        assert driver.stop(LIMIT_S)


def test_a_load_is_not_stopped_for_time_in_which_nothing_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a gap of an hour the devices are read, and a load has its load timeout anew, once."""
    clock, gate = Clock(), Gate()
    monkeypatch.setattr("scheduler.api.environment.monotonic_clock", clock)
    with a_scheduler(load_timeout=60) as scheduler:
        scheduler._prober.close(LIMIT_S)  # it would read the devices every second
        waiting = scheduler.submit(a_model("a", load=gate))
        assert gate.entered.wait(LIMIT_S)
        sampled: list[float] = []
        sample = scheduler._devices.sample
        scheduler._devices.sample = lambda: (sampled.append(clock()), sample())[1]  # type: ignore[method-assign]
        jump = clock()
        clock.ahead_s += 3600.0
        scheduler.status()
        assert_soon(lambda: sampled and sampled[-1] >= jump + 3600.0)
        assert states(scheduler) == {"a": "loading"} and not waiting.done()
        clock.ahead_s += 3.0
        assert states(scheduler) == {"a": "loading"}
        for _ in range(60):  # time passes without a gap
            clock.ahead_s += 1.0
            scheduler.status()
        assert isinstance(waiting.exception(LIMIT_S), LoadTimeout)
        gate.open.set()


def test_a_host_that_was_stopped_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    """After a SIGSTOP of host and child for longer than the load timeout, the load goes on and is served."""
    script = f"""
        from pathlib import Path
        from scheduler import Scheduler, Settings
        from scheduler.runtime import driver
        from scheduler.engines import llama
        llama.CHILD = Path({str(STOPPING_CHILD)!r})
        driver._GAP_S = 0.3
        scheduler = Scheduler(Settings(gpus=False, cpu_threads=1, load_timeout=2))
        waiting = scheduler.submit({str(model)!r})
        while not (pid := next((one.pid for one in scheduler.status().runners), None)):
            pass
        print(pid, flush=True)
        try:
            waiting.result({LIMIT_S}).release()
            print("served", flush=True)
        except Exception as error:
            print(repr(error), flush=True)
        scheduler.close()
    """
    with a_host(script) as host:
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        assert_soon(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        host.send_signal(signal.SIGSTOP)
        assert_soon(lambda: psutil.Process(host.pid).status() == psutil.STATUS_STOPPED)
        threading.Event().wait(4.0)
        host.send_signal(signal.SIGCONT)
        threading.Event().wait(0.2)  # the host notices the time, and that its child shows no progress
        os.kill(pid, signal.SIGCONT)
        assert host.communicate(timeout=LIMIT_S) == ("served\n", "")


def test_nothing_reads_the_clock_on_the_wall() -> None:
    """No time limit is read from the clock of the wall, which may be set.

    What is told to people and other programs has it: recordings, spans, and the API of Ollama.
    """
    wall = {"time.time", "time.time_ns", "datetime.now", "datetime.today", "datetime.utcnow"}
    files = [path for folder in ("fsm", "scheduler") for path in (ROOT / folder).rglob("*.py")]
    files = [path for path in files if path.name not in TELL_THE_TIME]
    found = [
        f"{path.name}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in wall
    ]
    assert len(files) > 50 and found == []


# -- floods ------------------------------------------------------------------------------------------------------------


def test_a_flood_is_refused_at_once_beyond_the_queues_limit() -> None:
    """Of 10,000 requests of eight threads for a queue of 512 each is answered once, in bounded memory."""
    gate, answers = Gate(), Counter[int]()
    with a_scheduler(max_queue=512) as scheduler:
        model = a_model("a", load=gate)
        first = scheduler.submit(model)
        assert gate.entered.wait(LIMIT_S)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def ask() -> list[Future[Lease]]:
            asked = [scheduler.submit(model) for _ in range(1250)]
            for future in asked:
                future.add_done_callback(lambda done: answers.update([id(done)]))
            return asked

        with ThreadPoolExecutor(8) as pool:
            futures = [future for asked in [pool.submit(ask) for _ in range(8)] for future in asked.result(LIMIT_S)]
        assert_soon(lambda: sum(future.done() for future in futures) == 10_000 - 511)
        assert len(scheduler.status().queue) == 512
        errors = [future.exception() for future in futures if future.done()]
        assert all(isinstance(error, QueueFull) and error.limit == 512 for error in errors)
        gate.open.set()
        first.result(LIMIT_S).release()
        for future in futures:
            if future.exception(LIMIT_S) is None:
                future.result().release()
        assert_soon(lambda: len(answers) == 10_000)
        assert set(answers.values()) == {1}
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024, "KiB; some 20 KiB a request"


def test_ten_thousand_waiters_that_leave_at_once_are_each_answered_once() -> None:
    """Of 10,000 requests that are cancelled while their load ends each is cancelled or granted, and never both."""
    gate, answers = Gate(), Counter[int]()
    with a_scheduler(max_queue=10_000) as scheduler:
        futures = [scheduler.submit(a_model("a", load=gate)) for _ in range(10_000)]
        for future in futures:
            future.add_done_callback(lambda done: answers.update([id(done)]))
        assert gate.entered.wait(LIMIT_S)

        def leave(part: int) -> int:
            return sum(future.cancel() for future in futures[part::8])

        with ThreadPoolExecutor(9) as pool:
            leaving = [pool.submit(leave, part) for part in range(8)]
            pool.submit(gate.open.set)
            cancelled = sum(each.result(LIMIT_S) for each in leaving)
        served = [future for future in futures if not future.cancelled()]
        for future in served:
            future.result(LIMIT_S).release()
        assert cancelled + len(served) == 10_000
        assert_soon(
            lambda: len(answers) == 10_000 and scheduler.status().queue == () and not scheduler.debug_state().requests
        )
        assert set(answers.values()) == {1}
        assert_soon(lambda: states(scheduler) == {"a": "idle"})


# -- threads that cannot be started ------------------------------------------------------------------------------------


POOLS = ("worker", "launcher", "caller", "deliverer", "stopper", "sampler", "inspector")


def test_whoever_asks_while_no_worker_can_be_started_is_served_later(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that no thread could be started for is served, and its runner stopped, by threads of a later start."""
    begin, called = threading.Thread.start, threading.Event()

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith(tuple(f"loadmaster-{pool}" for pool in POOLS)):
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr("scheduler.api.scheduler._FIRST_SAMPLE_S", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        scheduler = a_scheduler()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(scheduler.submit, model).result(LIMIT_S)
        waiting.add_done_callback(lambda _: called.set())
        assert not waiting.done()
    with scheduler:
        waiting.result(LIMIT_S).release()
        assert called.wait(LIMIT_S)
        scheduler.expire(model)
        assert_soon(lambda: states(scheduler) == {})


# -- close at bad moments ----------------------------------------------------------------------------------------------


def assert_closes(scheduler: Scheduler, *waiting: Future[Lease], gate: Gate | None = None) -> None:
    """Close; fail if that takes long or if a request is not answered before the gate opens."""
    begin = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(scheduler.close, 0)
        for future in waiting:
            assert isinstance(future.exception(LIMIT_S), SchedulerClosed)
        if gate is not None:
            gate.open.set()
        closing.result(LIMIT_S)
    assert time.monotonic() - begin < LIMIT_S


def test_close_during_an_eviction() -> None:
    """A close during an eviction answers the waiting request before the victim's slow unload ends."""
    gate = Gate()
    scheduler = a_scheduler()
    scheduler.acquire(a_model("victim", "900MiB", unload=gate)).release()
    waiting = scheduler.submit(a_model("b", "900MiB"))
    assert gate.entered.wait(LIMIT_S)
    assert_closes(scheduler, waiting, gate=gate)


def test_close_with_leases_out_whose_eviction_is_due() -> None:
    """A close with a draining victim answers its lease holder and the waiting request."""
    scheduler = a_scheduler(max_wait=0)
    lease = scheduler.acquire(a_model("victim", "900MiB"))
    waiting = scheduler.submit(a_model("b", "900MiB"))
    assert_soon(lambda: states(scheduler) == {"victim": "expiring"})
    assert_closes(scheduler, waiting)
    assert lease.lost
    lease.release()


def test_close_while_a_file_is_read(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """A close while a file is read answers the waiting request before the read ends."""
    gate = Gate()
    monkeypatch.setattr(LlamaEngine, "inspect", gate)
    scheduler = a_scheduler()
    waiting = scheduler.submit(model)
    assert gate.entered.wait(LIMIT_S)
    assert_closes(scheduler, waiting, gate=gate)


def test_close_while_a_child_loads_and_another_is_called_off(model: Path) -> None:
    """A close ends a child that was stopped in its load and cancels a launch that has not begun."""
    scheduler = a_scheduler(max_host_loads=1, memory_limit=None, stop_grace="100ms")
    first, pid = begin_a_load(scheduler, model)
    waiting = [first]
    waiting.append(scheduler.submit(model, embedding=True))
    waiting[0].cancel()
    assert_closes(scheduler, *waiting[1:])
    assert is_gone(pid)


def test_close_while_every_callback_is_busy() -> None:
    """A close waits for callbacks for a limited time."""
    gate = Gate()
    scheduler = a_scheduler(stop_grace="100ms")
    lease = scheduler.acquire(a_model("a"))
    lease.on_lost(gate)
    scheduler.preload(a_model("a")).add_done_callback(gate)
    assert gate.entered.wait(LIMIT_S)
    assert_closes(scheduler)
    gate.open.set()
    lease.release()


@pytest.mark.parametrize("name", ["load", "unload"])
def test_a_load_or_an_unload_may_close(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A load or unload that closes the scheduler is named in the log, and everything else is ended."""
    raised: list[BaseException] = []
    done = threading.Event()
    scheduler = a_scheduler(stop_grace="100ms", close_timeout=0)

    def close(*_: object) -> None:
        try:
            scheduler.close()
        except BaseException as error:
            raised.append(error)
        finally:
            done.set()

    calls: dict[str, Any] = {"load": object, name: close}
    waiting = scheduler.submit(a_model("a", **calls), keep_alive=0)
    if name == "unload":
        waiting.result(LIMIT_S).release()
    assert done.wait(LIMIT_S)
    assert raised == []
    assert [each for each in caplog.records if each.getMessage().startswith("closed, but these did not end: a")]
    caplog.clear()


# -- the end of the host -----------------------------------------------------------------------------------------------


@contextmanager
def a_host(script: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program of its own, which has ended afterwards."""
    arguments = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as host:
        try:
            yield host
        finally:
            host.kill()


@pytest.mark.parametrize("state", ["starting", "idle", "stopped"])
def test_no_child_outlives_a_host_that_is_killed(model: Path, state: str) -> None:
    """No child outlives a host that is killed: a starting, an idle and a SIGSTOPped child end."""
    script = f"""
        import os, signal, threading
        from scheduler import Scheduler, Settings
        scheduler = Scheduler(Settings(gpus=False, cpu_threads=1))
        waiting = scheduler.submit({str(model)!r})
        if {state!r} != "starting":
            waiting.result({LIMIT_S}).release()
        while not (pid := next((one.pid for one in scheduler.status().runners), None)):
            pass
        if {state!r} == "stopped":
            os.kill(pid, signal.SIGSTOP)
        print(pid, flush=True)
        threading.Event().wait()
    """
    with a_host(script) as host:
        assert host.stdout is not None
        child = int(host.stdout.readline())
        host.kill()
        assert_soon(lambda: is_gone(child), ORPHANED_S)
