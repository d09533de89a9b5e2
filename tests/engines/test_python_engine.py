"""Python objects as models: when they are loaded and unloaded, and what is reported."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from fsm.domain.devices import HOST, DeviceId, Placement
from fsm.domain.options import Options
from fsm.sizing.footprint import Footprint
from scheduler.engines.interface import Endpoint, Memory
from scheduler.engines.python import PythonEngine, PythonModel, PythonProcess
from scheduler.errors.exceptions import InvalidSettings
from tests.support.leaks import no_leaks

LIMIT_S = 10.0  # ten times what anything here is expected to take, and more
MIB = 2**20


class Told:
    """A listener that keeps what it is told, in order."""

    def __init__(self) -> None:
        self.loads: list[tuple[object, int | None, dict[DeviceId, int]]] = []
        self.exits: list[tuple[int | None, str, bool]] = []
        self.errors: list[BaseException] = []

    def progressed(self) -> None:
        raise AssertionError("an object says nothing while it loads")

    def loaded(
        self, endpoint: Endpoint | object, num_ctx: int | None, memory: Memory, flash_attention: bool | None = None
    ) -> None:
        assert not self.exits
        self.loads.append((endpoint, num_ctx, dict(memory.resident)))

    def failed(self, error: BaseException) -> None:
        self.errors.append(error)

    def exited(self, code: int | None, detail: str, out_of_memory: bool) -> None:
        self.exits.append((code, detail, out_of_memory))

    def exit(self) -> tuple[int | None, str, bool]:
        """Wait for the exit; return it."""
        wait_until(lambda: self.exits)
        assert len(self.exits) == 1
        return self.exits[0]


class Thing:
    """An object that is loaded here."""


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "the condition did not hold in time"
        threading.Event().wait(0.002)


@pytest.fixture
def engine() -> Iterator[PythonEngine]:
    with no_leaks():
        engine = PythonEngine()
        yield engine
        engine.close()


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Yield an event that loads and unloads wait for; it is set at the end of the test."""
    gate = threading.Event()
    yield gate
    gate.set()


def launch(engine: PythonEngine, model: PythonModel) -> tuple[PythonProcess, Told]:
    told = Told()
    return engine.launch(model, Options(), (), Placement(model.declared), told), told


def launch_and_wait(engine: PythonEngine, model: PythonModel) -> tuple[PythonProcess, Told]:
    process, told = launch(engine, model)
    wait_until(lambda: told.loads)
    return process, told


def fail(error: BaseException) -> object:
    raise error


def test_what_it_takes_is_what_was_declared(engine: PythonEngine) -> None:
    """An object takes what it declares, in numbers or text, for any number of devices."""
    model = PythonModel("thing", Thing, memory={"gpu": 5, "cpu": "200MiB"})
    assert engine.inspect(model, ()) == Footprint(fixed=((HOST, 200 * MIB), (DeviceId("gpu"), 5)))
    assert engine.inspect(PythonModel("thing", Thing), ()) == Footprint(fixed=(("cpu", 0),))


def test_a_size_that_cannot_be_read_is_refused_at_once() -> None:
    """A size that cannot be read is refused when the model is made, and the error names the device."""
    with pytest.raises(InvalidSettings, match="memory\\['cpu'\\]"):
        PythonModel("thing", Thing, memory={"cpu": "a lot"})


def test_the_name_is_the_identity() -> None:
    """A model's identity is its name, so that models can be keys whatever their callables are."""
    model = PythonModel("thing", Thing, memory={"cpu": 1})
    assert model.id == "python:thing"
    assert {model: 1}[PythonModel("thing", Thing, memory={"cpu": 1})] == 1


def test_the_object_itself_is_reported(engine: PythonEngine) -> None:
    """A load reports the object, with its declared bytes as resident."""
    thing = Thing()
    process, told = launch_and_wait(engine, PythonModel("thing", lambda: thing, memory={"cpu": "1MiB"}))
    assert told.loads == [(thing, None, {HOST: MIB})]
    assert process.memory().resident == {HOST: MIB}
    assert process.pid is None
    assert process.healthy(1.0)
    assert not told.exits


def test_launch_returns_while_it_loads(engine: PythonEngine, gate: threading.Event) -> None:
    """A launch returns while the object loads, and nothing is resident yet."""
    process, told = launch(engine, PythonModel("thing", gate.wait, memory={"cpu": 1}))
    assert not told.loads
    assert process.memory().resident == {}
    gate.set()
    wait_until(lambda: told.loads)


def test_stop_unloads(engine: PythonEngine) -> None:
    """A stop passes the object to unload once, on the thread that loaded it."""
    calls: list[tuple[object, int]] = []

    def load() -> Thing:
        calls.append(("load", threading.get_ident()))
        return thing

    thing = Thing()
    model = PythonModel("thing", load, lambda thing: calls.append((thing, threading.get_ident())), {"cpu": 1})
    process, told = launch_and_wait(engine, model)
    process.stop(0.0)
    process.stop(0.0)
    assert told.exit() == (0, "unloaded", False)
    assert [what for what, _ in calls] == ["load", thing]
    assert calls[0][1] == calls[1][1] != threading.get_ident()
    assert process.memory().resident == {}


def test_without_unload_the_object_is_let_go_of(engine: PythonEngine) -> None:
    """An object without unload is dropped before the exit is reported."""
    alive: list[bool] = []

    class Watching(Told):
        def loaded(
            self, endpoint: object, num_ctx: int | None, memory: Memory, flash_attention: bool | None = None
        ) -> None:
            self.reference = weakref.ref(endpoint)
            self.loads.append((None, num_ctx, dict(memory.resident)))

        def exited(self, code: int | None, detail: str, out_of_memory: bool) -> None:
            alive.append(self.reference() is not None)
            super().exited(code, detail, out_of_memory)

    told = Watching()
    process = engine.launch(PythonModel("thing", Thing), Options(), (), Placement(()), told)
    wait_until(lambda: told.loads)
    process.stop(0.0)
    told.exit()
    assert alive == [False]


def test_a_stop_while_it_loads_waits_for_the_load(engine: PythonEngine, gate: threading.Event) -> None:
    """A stop during a load waits for the load, and unloads the object, which never served."""
    unloaded: list[object] = []
    process, told = launch(engine, PythonModel("thing", gate.wait, unloaded.append))
    process.stop(0.0)
    assert not told.exits and not unloaded
    gate.set()
    assert told.exit() == (0, "unloaded", False)
    assert unloaded == [True]
    assert not told.loads


@pytest.mark.parametrize("error", [ValueError("no such thing"), SystemExit(3), KeyboardInterrupt()])
def test_a_load_that_raises_is_a_failed_load(engine: PythonEngine, error: BaseException) -> None:
    """A load that raises anything ends with an exit that has the error and its type."""
    _, told = launch(engine, PythonModel("thing", lambda: fail(error), lambda _: fail(AssertionError("not loaded"))))
    code, detail, out_of_memory = told.exit()
    assert (code, out_of_memory) == (1, False)
    assert detail.startswith(f"load() raised {type(error).__name__}")
    assert str(error) in detail


class OutOfMemoryError(RuntimeError):
    """An error with the name of torch's, which must be known without importing torch."""


@pytest.mark.parametrize("error", [MemoryError(), OutOfMemoryError("CUDA out of memory")])
def test_a_load_that_runs_out_of_memory_is_told_from_others(engine: PythonEngine, error: Exception) -> None:
    """A load that raises Python's or torch's error of memory ran out of memory."""
    _, told = launch(engine, PythonModel("thing", lambda: fail(error)))
    assert told.exit()[2]


def test_an_unload_that_raises_ends_it_all_the_same(engine: PythonEngine) -> None:
    """An unload that raises reports one exit with the error."""
    process, told = launch_and_wait(engine, PythonModel("thing", Thing, lambda _: fail(ValueError("stuck"))))
    process.stop(0.0)
    assert told.exit() == (1, "unload() raised ValueError: stuck", False)


def test_an_unload_that_hangs_is_not_told_as_over(engine: PythonEngine, gate: threading.Event) -> None:
    """The exit of an unload that hangs is not reported, and a close does not wait for ever."""
    unloading = threading.Event()

    def hang(thing: object) -> None:
        unloading.set()
        gate.wait()

    process, told = launch_and_wait(engine, PythonModel("thing", Thing, hang, {"cpu": 1}))
    process.stop(0.0)
    assert unloading.wait(LIMIT_S)
    launch_and_wait(engine, PythonModel("other", Thing))
    before = time.monotonic()
    engine.close(timeout_s=0.1)
    assert time.monotonic() - before < LIMIT_S
    assert not told.exits
    assert process.memory().resident == {HOST: 1}
    gate.set()
    assert told.exit()[0] == 0


def test_close_unloads_every_object() -> None:
    """After a close there is no thread, each exit was reported, and nothing is loaded."""
    with no_leaks():
        engine = PythonEngine()
        unloaded: list[object] = []
        all_told = [launch_and_wait(engine, PythonModel(f"{n}", Thing, unloaded.append))[1] for n in range(5)]
        engine.close()
        assert [len(told.exits) for told in all_told] == [1] * 5
        assert len(unloaded) == 5
        with pytest.raises(RuntimeError):
            launch(engine, PythonModel("late", Thing))
