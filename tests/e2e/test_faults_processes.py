"""Faults of children and of the files that they load, on the real scheduler, where llama.cpp would not misbehave.

Most faults are shown with real models elsewhere (`test_real_faults.py`). Where llama.cpp does not misbehave on demand,
the child's program is replaced by one that speaks its protocol, but ignores SIGTERM, leaves processes behind, is slow.
"""

from __future__ import annotations

import os
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scheduler import InvalidModel, Lease, LoadFailed, PythonModel, RunnerCrashed, Scheduler
from scheduler.engines import llama
from scheduler.runtime import runner_handle
from tests.support.real import (
    ROOM_FOR_ONE,
    SHORT,
    begin_a_load,
    is_gone,
    quiet_end,
    send,
    settings,
    states,
    write_models,
)
from tests.support.waiting import LIMIT_S, assert_soon

NOTICED_S = 5.0  # fifty times the 100 ms within which an exit is noticed, and half of what a probe may take to
GRACE = "100ms"
LONG = "60s"  # no test waits for it

Program = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _quiet_end(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with quiet_end(caplog):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two tiny models, a and b."""
    return write_models(tmp_path_factory.mktemp("models"), "ab")


@pytest.fixture
def model(folder: Path) -> Path:
    return folder / "a.gguf"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    """Return a function that makes children run `body` in place of llama.cpp; it returns their file of processes."""

    def replace(body: str) -> Path:
        path, started = tmp_path / "child.py", tmp_path / "started"
        head = f"""
            import json, os, signal, socket, sys, time
            request = json.loads(sys.stdin.readline())
            def start():
                if (pid := os.fork()) == 0:
                    time.sleep(600)
                    os._exit(0)
                with open({str(started)!r}, "w") as file:
                    file.write(str(pid))
            def loaded(port=9):
                url = f"http://127.0.0.1:{{port}}"
                print(json.dumps({{"event": "loaded", "url": url, "num_ctx": 512, "buffers": []}}), flush=True)
        """
        path.write_text(textwrap.dedent(head) + textwrap.dedent(body))
        monkeypatch.setattr(llama, "CHILD", path)
        return started

    return replace


STUBBORN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
start()
loaded()
time.sleep(600)
"""
DEAF = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
start()
server = socket.create_server(("127.0.0.1", 0))
loaded(server.getsockname()[1])
time.sleep(600)
"""
SLOW = """
for _ in range(100):
    time.sleep(0.02)
    print("a little more", file=sys.stderr, flush=True)
loaded()
time.sleep(600)
"""


# -- children ----------------------------------------------------------------------------------------------------------


def test_a_victim_that_ignores_sigterm_is_killed_with_what_it_started(
    program: Program, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A victim that ignores SIGTERM is killed after its grace with what it started, and the request is served."""
    with Scheduler(settings(memory_limit=ROOM_FOR_ONE, min_residency=0, stop_grace=GRACE)) as scheduler:
        started = program(STUBBORN)
        with scheduler.acquire(folder / "a.gguf") as lease:
            pid = lease.pid
        grandchild = int(started.read_text())
        monkeypatch.undo()
        with scheduler.acquire(folder / "b.gguf") as lease:
            assert lease.chat("hello", **SHORT)
            assert is_gone(pid)
            assert_soon(lambda: is_gone(grandchild))


def test_a_kill_while_it_is_being_stopped_is_noticed(program: Program, model: Path) -> None:
    """A child that is killed while it is being stopped is noticed at once, and its model can load again."""
    started = program(STUBBORN)
    with Scheduler(settings(stop_grace=LONG)) as scheduler:
        with scheduler.acquire(model) as lease:
            pid = lease.pid
        scheduler.expire(model)
        assert_soon(lambda: states(scheduler) == {"a": "expiring"})
        send(pid, signal.SIGKILL)
        assert_soon(lambda: scheduler.status().runners == (), NOTICED_S)
        assert scheduler.status().devices[0].held_bytes == 0
        assert_soon(lambda: is_gone(int(started.read_text())), NOTICED_S)
        with scheduler.acquire(model) as lease:
            assert lease.pid != pid
            send(lease.pid, signal.SIGKILL)
            assert_soon(lambda: lease.lost, NOTICED_S)


def test_what_a_child_that_died_has_left_behind_is_killed(program: Program, model: Path) -> None:
    """Processes that a crashed child left behind are killed, because they may hold memory."""
    started = program(STUBBORN)
    with Scheduler(settings()) as scheduler, scheduler.acquire(model) as lease:
        send(lease.pid, signal.SIGKILL)
        assert_soon(lambda: lease.lost, NOTICED_S)
        assert_soon(lambda: is_gone(int(started.read_text())), NOTICED_S)


def test_a_child_that_lives_and_answers_nothing_is_killed(program: Program, model: Path) -> None:
    """A child that takes connections and answers nothing is found by the probe and killed after its grace."""
    started = program(DEAF)
    with Scheduler(settings(probe_interval="50ms", probe_timeout="200ms", stop_grace=GRACE)) as scheduler:
        lease = scheduler.acquire(model)
        pid = lease.pid
        assert_soon(lambda: lease.lost and is_gone(pid) and is_gone(int(started.read_text())))
        with pytest.raises(RunnerCrashed, match="did not answer within"):
            lease.chat("hello")


def test_a_load_that_is_slow_but_goes_on_is_waited_for(
    program: Program, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow load that shows progress is waited for, although it takes longer than the load timeout."""
    monkeypatch.setattr(runner_handle, "_PROGRESS_S", 0.02)
    program(SLOW)
    with Scheduler(settings(load_timeout="1s", stop_grace=GRACE)) as scheduler, scheduler.acquire(model) as lease:
        (runner,) = scheduler.status().runners
        assert runner.load_s is not None and runner.load_s > 2.0 and lease.pid == runner.pid


def test_close_ends_children_that_ignore_it_in_time(program: Program, folder: Path) -> None:
    """A close ends serving, loading and stopping children that ignore SIGTERM in its time."""
    started = program(STUBBORN)
    with Scheduler(settings(stop_grace=GRACE)) as scheduler:
        held, leaving = scheduler.acquire(folder / "a.gguf"), scheduler.acquire(folder / "b.gguf")
        leaving.release()
        pids = [held.pid, leaving.pid, int(started.read_text())]
        scheduler.expire(folder / "b.gguf")
        program("signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)")
        waiting = scheduler.submit(folder / "a.gguf", embedding=True)
        assert_soon(lambda: any(one.state == "loading" and one.pid for one in scheduler.status().runners))
        begin = time.monotonic()
        scheduler.close(0)
        assert time.monotonic() - begin < 10 * 0.3  # three graces, if they came one after the other
        assert held.lost and waiting.exception(LIMIT_S) is not None
        assert_soon(lambda: all(map(is_gone, pids)))


# -- out of memory -----------------------------------------------------------------------------------------------------


def test_memory_is_read_again_before_the_second_try() -> None:
    """N07: the devices are read again before the second try of a load that ran out of memory."""
    times: list[tuple[str, float]] = []

    def load() -> object:
        times.append(("load", time.monotonic()))
        if len([what for what, _ in times if what == "load"]) == 1:
            raise MemoryError
        return object()

    with Scheduler(settings()) as scheduler:
        scheduler._prober.close(LIMIT_S)
        sample = scheduler._devices.sample
        scheduler._devices.sample = lambda: (times.append(("sample", time.monotonic())), sample())[1]  # type: ignore[method-assign]
        scheduler.acquire(PythonModel("a", load=load)).release()
    what = [each for each, _ in times]
    first, second = (place for place, each in enumerate(what) if each == "load")
    assert "sample" in what[:first] and "sample" in what[first:second]


def test_a_model_that_fails_to_load_is_backed_off_longer_each_time(program: Program, model: Path) -> None:
    """The back-off is 10 s at first and doubles with each failed load, on the core's clock."""
    program("sys.exit('no such tensor')")
    with Scheduler(settings()) as scheduler:
        waits = []
        for _ in range(3):
            with pytest.raises(LoadFailed, match="no such tensor"):
                scheduler.acquire(model)
            with pytest.raises(LoadFailed) as refused:
                scheduler.acquire(model)
            waits.append(refused.value.retry_after_s or 0)
            scheduler._driver.query(
                lambda core: [setattr(one, "blocked_until", 0.0) for one in core._state.models.values()]
            )
    assert all(most_s / 2 < wait_s < most_s + 1 for wait_s, most_s in zip(waits, (10, 20, 40), strict=True)), waits


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_a_device_is_refused(path: str) -> None:
    """A device file is refused at once and never opened."""
    with Scheduler(settings()) as scheduler:
        with pytest.raises(InvalidModel) as refused:
            scheduler.acquire(path)
        assert refused.value.path == path and states(scheduler) == {}


def test_a_file_that_is_cut_while_its_load_waits_for_its_turn_is_never_loaded(folder: Path, tmp_path: Path) -> None:
    """A file that is cut while its load waits for a load slot fails that load, and the reason names what is wrong."""
    path = tmp_path / "cut.gguf"
    path.write_bytes((folder / "b.gguf").read_bytes())
    with Scheduler(settings(max_host_loads=1)) as scheduler:
        first, pid = begin_a_load(scheduler, folder / "a.gguf")
        waiting = scheduler.submit(path)
        assert_soon(lambda: len(scheduler.status().queue) == 2)
        assert_soon(lambda: not scheduler._driver.query(inspecting))
        os.truncate(path, 20_000)
        send(pid, signal.SIGCONT)
        first.result(LIMIT_S).release()
        error = waiting.exception(LIMIT_S)
        assert isinstance(error, LoadFailed) and error.retry_after_s
        assert "data is not within the file bounds" in error.reason


def inspecting(core: object) -> bool:
    """Return whether any model's file is being inspected."""
    return any(model.inspecting for model in core._state.models.values())  # type: ignore[attr-defined]  # a Core


def test_a_file_that_is_cut_while_it_is_loaded_fails_that_load_only(folder: Path, tmp_path: Path) -> None:
    """A file that is cut during its load fails that load or its runner, and other models are served."""
    path = tmp_path / "cut.gguf"
    path.write_bytes((folder / "b.gguf").read_bytes())
    with Scheduler(settings()) as scheduler:
        waiting, pid = begin_a_load(scheduler, path, use_mmap=True)
        os.truncate(path, 20_000)
        send(pid, signal.SIGCONT)
        error = waiting.exception(LIMIT_S)
        if error is None:  # the file was mapped already, and its first use ends the runner
            with waiting.result() as lease, pytest.raises(RunnerCrashed):
                lease.chat("hello", **SHORT)
        else:
            assert isinstance(error, LoadFailed | InvalidModel)
        with scheduler.acquire(folder / "a.gguf") as other:
            assert other.chat("hello", **SHORT)


# -- callbacks ---------------------------------------------------------------------------------------------------------


def test_a_callback_may_ask_for_the_next_life(model: Path) -> None:
    """A callback of a crash may request the next runner, and may raise."""
    got: list[Lease] = []
    done = threading.Event()
    with Scheduler(settings()) as scheduler:
        lease = scheduler.acquire(model)

        def again() -> None:
            got.append(scheduler.acquire(model))
            done.set()

        lease.on_lost(again)
        send(lease.pid, signal.SIGKILL)
        assert done.wait(LIMIT_S)
        lease.release()  # a late release, which releases nothing else
        assert [one.leases for one in scheduler.status().runners] == [1]
        assert got[0].chat("hello", **SHORT)
        got[0].release()
        got[0].release()
        assert_soon(lambda: states(scheduler) == {"a": "idle"})
