"""Objects in processes of their own: how they are called, what comes back, and that they can be killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest

from scheduler import InvalidSettings, LoadFailed, ObjectError, PythonModel, RunnerCrashed, Scheduler
from scheduler.engines import object_protocol
from scheduler.engines.interface import Engine
from scheduler.engines.python import PythonEngine
from scheduler.testing import EngineConformance
from tests.support.leaks import no_leaks
from tests.support.real import is_gone, settings
from tests.support.small_object import Thing, no_long_thing, no_thing, noted
from tests.support.waiting import LIMIT_S, assert_soon


def a_model(load: Any = Thing, **more: Any) -> PythonModel:
    return PythonModel("a", load, process=True, **{"memory": {"cpu": "64MiB"}, **more})


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    with no_leaks(), Scheduler(settings(stop_grace=0.5, recovery_timeout=0.3)) as scheduler:
        yield scheduler


class TestProcesses(EngineConformance):
    """An object in a process of its own."""

    def make_engine(self) -> Engine:
        return PythonEngine()

    def make_model(self) -> PythonModel:
        return a_model()


def test_an_object_is_called_in_its_process(scheduler: Scheduler) -> None:
    """Its methods and itself are called there, and plain values and arrays come back as they are."""
    with scheduler.acquire(a_model(partial(Thing, "named"))) as lease:
        thing = lease.value
        assert thing.where() == (lease.pid, "") and lease.pid != os.getpid()
        assert thing(1, b=2) == ["named", 1, {"b": 2}]
        for value in (
            None, True, -(10**30), 1.5, float("inf"), "é\ud800", b"\0", (1, [2, {"three": (4,)}]), {1: "a", (2,): b"c"}
        ):  # fmt: skip
            assert thing.echo(value) == value and type(thing.echo(value)) is type(value)
        array = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)
        doubled = thing.double(array)
        assert doubled.dtype == array.dtype and (doubled == 2 * array).all() and doubled.flags.writeable
        assert thing.echo(numpy.float32(2)) == 2 and thing.echo(numpy.zeros((0, 4))).shape == (0, 4)


def test_what_a_call_raises_is_told_and_the_object_goes_on(scheduler: Scheduler) -> None:
    """An exception comes as its class's name, its words and its traceback; so does a value that may not leave."""
    with scheduler.acquire(a_model()) as lease:
        with pytest.raises(ObjectError, match="'a' raised KeyError: 'no such part'") as caught:
            lease.value.raises()
        assert caught.value.kind == "KeyError" and "in raises" in caught.value.trace
        with pytest.raises(ObjectError, match=r"a tests.*\.Thing cannot leave.*numpy arrays"):
            lease.value.itself()
        with pytest.raises(ObjectError, match="no attribute 'missing'"):
            lease.value.missing()
        with pytest.raises(AttributeError):
            lease.value._private  # noqa: B018
        with pytest.raises(TypeError, match="pickle"):
            lease.value.echo(threading.Lock())
        assert lease.value.echo(1) == 1


def test_odd_errors_and_values_are_told_and_the_object_goes_on(scheduler: Scheduler) -> None:
    """No class of an exception keeps a call waiting, and no value that may not leave ends the process."""
    with scheduler.acquire(a_model()) as lease:
        with pytest.raises(ObjectError, match=r"raised OddError: \(its words cannot be told"):
            lease.value.raises_odd()
        with pytest.raises(ObjectError, match=r"ValueError: .* in more than 200 of their kind"):
            lease.value.nested(300)
        with pytest.raises(ObjectError, match=r"numpy\.ma\.MaskedArray cannot leave"):
            lease.value.masked()
        with pytest.raises(ObjectError, match=r"numpy\.ndarray of object cannot leave"):
            lease.value.echo(numpy.array([None]))
        with pytest.raises(ObjectError, match="raised EOFError"):
            lease.value.reads()
        assert lease.value.empty_text()[0] == "" and lease.value.nested(199)
        assert not lease.lost


def test_what_is_too_large_for_a_frame_is_refused_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other end would take it for no frame, and the process would be ended."""
    monkeypatch.setattr(object_protocol, "MOST_BYTES", 1 << 10)
    monkeypatch.setattr(object_protocol, "MOST_PARTS", 4)
    with pytest.raises(ValueError, match="too much for one call"):
        object_protocol.pickled(b"a" * 2000)
    with pytest.raises(ValueError, match="too much for one call"):
        object_protocol.encoded({"value": [b""] * 4})
    assert len(object_protocol.encoded({"value": [b""] * 3})) == 4


def test_several_threads_call_at_once(scheduler: Scheduler) -> None:
    """Eight calls that wait for each other all return."""
    with scheduler.acquire(a_model()) as lease, ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(lease.value.meet) for _ in range(8)]
        assert sorted(call.result(LIMIT_S) for call in calls) == list(range(8))


def test_its_memory_is_measured(scheduler: Scheduler) -> None:
    """What it takes beyond its declaration counts."""
    with scheduler.acquire(a_model()) as lease:
        lease.value.take(100)
        assert_soon(lambda: scheduler.status().runners[0].resident_bytes["cpu"] > 100 << 20)


def test_a_load_that_raises_is_told(scheduler: Scheduler) -> None:
    """The error of the load has what was raised as its cause."""
    with pytest.raises(LoadFailed, match="raised ValueError: no such file") as caught:
        scheduler.acquire(a_model(no_thing))
    assert isinstance(caught.value.__cause__, ObjectError) and "in no_thing" in caught.value.__cause__.trace


def test_a_load_that_raises_many_words_is_told(scheduler: Scheduler) -> None:
    """Words of any length and script are cut to what is told in a line, and the error has its cause."""
    with pytest.raises(LoadFailed, match="raised ValueError: \N{SNOWMAN}") as caught:
        scheduler.acquire(a_model(no_long_thing))
    assert isinstance(caught.value.__cause__, ObjectError) and caught.value.__cause__.trace.endswith("\N{SNOWMAN}\n")


def test_a_process_that_sends_what_is_no_answer_is_ended(scheduler: Scheduler) -> None:
    """The holder is told why its runner is gone."""
    with scheduler.acquire(a_model()) as lease, pytest.raises(RunnerCrashed, match="sent what is no answer"):
        lease.value.writes_nonsense()


def test_it_is_unloaded_in_its_process(scheduler: Scheduler, tmp_path: Path) -> None:
    """`unload` is called there before the process ends."""
    model = a_model(unload=partial(noted, tmp_path / "unloaded"))
    scheduler.acquire(model).release()
    pid = scheduler.status().runners[0].pid
    scheduler.expire(model)
    assert_soon(lambda: is_gone(pid))
    assert (tmp_path / "unloaded").read_text() == "thing"


@pytest.mark.parametrize("unload", [None, print])
def test_a_call_that_never_returns_ends_with_its_process(unload: Any) -> None:
    """A close that waits no longer kills the process, and the call ends with the error of a crashed runner."""
    raised: list[BaseException] = []

    def call(thing: Thing) -> None:
        try:
            thing.hang()
        except BaseException as error:
            raised.append(error)

    with no_leaks():
        scheduler = Scheduler(settings(stop_grace=0.2))
        lease = scheduler.acquire(a_model(unload=unload))
        pid, thread = lease.pid, threading.Thread(target=call, args=(lease.value,))
        thread.start()
        scheduler.close(timeout=0.1)
        thread.join(LIMIT_S)
        assert isinstance(raised[0], RunnerCrashed) and is_gone(pid)
        lease.release()


@pytest.mark.parametrize("how", ["crash", "stopped"])
def test_a_process_that_is_gone_or_hangs_is_a_crashed_runner(how: str) -> None:
    """A call under way raises what it does elsewhere, and the next request has a new process."""
    with no_leaks(), Scheduler(settings(probe_interval=0.2, probe_timeout=0.3, stop_grace=0.2)) as one:
        with one.acquire(a_model()) as lease:
            with pytest.raises(RunnerCrashed, match="SIGSEGV" if how == "crash" else "answer"):
                getattr(lease.value, how)()
            assert lease.lost
        with one.acquire(a_model()) as lease:
            assert lease.value.echo("again") == "again"


def test_what_a_process_could_not_find_is_refused() -> None:
    """A lambda, a function inside another, and what cannot be sent are refused with what to do."""

    def inside() -> Thing:
        return Thing()

    for load in (lambda: Thing(), inside, partial(Thing, threading.Lock())):
        with pytest.raises(InvalidSettings, match=r"load cannot be .* a function of a module"):
            a_model(load)
    with pytest.raises(InvalidSettings, match=r"unload cannot be .* a function of a module"):
        a_model(unload=lambda thing: None)


def test_a_program_of_one_file_has_its_objects(tmp_path: Path) -> None:
    """`load` may be defined in the program itself, whose file is run again; its end ends the process."""
    program = tmp_path / "program.py"
    program.write_text("""
import os, signal
from scheduler import PythonModel, Scheduler
from tests.support.real import settings

def load():
    return os.path

if __name__ == "__main__":
    lease = Scheduler(settings()).acquire(PythonModel("a", load, process=True))
    print(lease.value.basename("b/c"), lease.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
""")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, program], env=environment, stdout=subprocess.PIPE, text=True, check=False)
    name, pid = done.stdout.split()
    assert name == "c"
    assert_soon(lambda: is_gone(int(pid)))


@pytest.mark.parametrize(
    "parts",
    [
        [b"[1]"],
        [b'{"number": 1, "value": {"array": ["|O8", [1], 0]}}', b"\0" * 8],
        [b'{"number": 1, "value": {"array": ["<f4", [3], 0]}}', b"\0" * 8],
        [b'{"number": 1, "value": {"bytes": 7}}'],
        [b'{"number": 1, "value": {"os.system": ["true"]}}'],
        [b'{"value": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"],
        [],
    ],
)
def test_what_is_no_answer_is_an_error_and_is_never_run(parts: list[bytes]) -> None:
    """An answer that was not made by the child's code raises, whatever stands in it."""
    with pytest.raises((ValueError, LookupError, TypeError, RecursionError)):
        object_protocol.decoded([bytearray(part) for part in parts])


def test_a_frame_that_is_too_large_is_refused() -> None:
    """Sizes are checked before anything is allocated."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for head in (b"\xff" * 4, b"\0\0\0\x01" + b"\xff" * 8):
            theirs.sendall(head)
            with pytest.raises(ValueError, match="too"):
                object_protocol.receive(ours)
