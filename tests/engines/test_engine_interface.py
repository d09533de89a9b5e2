"""The interface of engines: those that are here keep it, and another package's engine is found and used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

import scheduler.engines
from scheduler import (
    EngineMissing,
    EngineUnusable,
    InvalidSettings,
    PythonModel,
    Scheduler,
    UnsupportedOption,
)
from scheduler.engines import HOST, Engine, EngineModel, Footprint, Memory, Options, registered
from scheduler.engines.python import PythonEngine
from scheduler.models.model_spec import ModelSpec
from scheduler.testing import EngineConformance, check_engine
from tests.support.leaks import no_leaks
from tests.support.own_server import an_engine
from tests.support.real import settings
from tests.support.tiny_models import write_tiny_model


class TestLlama(EngineConformance):
    """The wheel's llama.cpp, and a `llama-server`."""

    options = Options(num_ctx=256, num_parallel=1)

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _file(cls, served_by: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls.file = write_tiny_model(tmp_path_factory.mktemp("models") / "a.gguf", context=1024)

    file: ClassVar[Path]

    def make_engine(self) -> Engine:
        return an_engine()

    def make_model(self) -> ModelSpec:
        return ModelSpec("a", str(self.file))


class TestObjects(EngineConformance):
    """Python objects in this process."""

    def make_engine(self) -> Engine:
        return PythonEngine()

    def make_model(self) -> PythonModel:
        return PythonModel("a", object, memory={"cpu": "1MiB"})


@dataclass(frozen=True)
class Echo(EngineModel):
    """A model of the engine below."""

    engine: ClassVar[str] = "echo"
    times: int = 1


class EchoProcess:
    """A runner of the engine below."""

    pid: int | None = None
    buffers = ()

    def __init__(self, report: Any) -> None:
        self.report = report
        self.over = False
        self.again = False  # a fault: each stop is reported

    def stop(self, grace_s: float) -> None:
        if not self.over or self.again:
            self.over = True
            Thread(target=self.report.exited, args=(0, "stopped", False)).start()

    def memory(self) -> Memory:
        return Memory({} if self.over else {HOST: 1 << 20})

    def context_filled(self, timeout_s: float) -> None:
        return None

    def healthy(self, timeout_s: float) -> bool:
        return not self.over


class EchoEngine(Engine):
    """An engine with nothing but what it must have."""

    def __init__(self, settings: Any = None) -> None:
        self.processes: list[EchoProcess] = []
        self.closed = False

    def inspect(self, model: Echo, asked: Any) -> Footprint:
        return Footprint(fixed=((HOST, 1 << 20),))

    def launch(self, model: Echo, options: Any, settings: Any, placement: Any, report: Any) -> EchoProcess:
        if self.closed:
            raise RuntimeError("closed")
        process = EchoProcess(report)
        self.processes.append(process)
        Thread(target=report.loaded, args=(model.name * model.times, None, process.memory())).start()
        return process

    def close(self, timeout_s: float) -> None:
        self.closed = True
        for process in self.processes:
            process.stop(0.0)


@pytest.fixture(autouse=True)
def _nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered, "_registered", {})


class Reloaded(EchoEngine):
    """An engine that reports inside its launch."""

    def launch(self, model: Echo, options: Any, settings: Any, placement: Any, report: Any) -> EchoProcess:
        report.progressed()
        return super().launch(model, options, settings, placement, report)


class Twice(EchoEngine):
    """An engine that reports two exits."""

    def launch(self, model: Echo, options: Any, settings: Any, placement: Any, report: Any) -> EchoProcess:
        process = super().launch(model, options, settings, placement, report)
        process.again = True
        return process


class Forgetful(EchoEngine):
    """An engine whose runners outlive its close."""

    def close(self, timeout_s: float) -> None:
        self.processes.clear()


class Changing(EchoEngine):
    """An engine that tells something else each time."""

    calls = 0

    def inspect(self, model: Echo, asked: Any) -> Footprint:
        self.calls += 1
        return Footprint(fixed=((HOST, self.calls),))


def test_the_checks_pass_an_engine_and_find_each_fault() -> None:
    """An engine that keeps the interface passes, and each of some faults is found."""
    check_engine(EchoEngine, lambda: Echo("a"))
    faults: list[tuple[Callable[[], Engine], str]] = [
        (Reloaded, "from inside launch"), (Twice, "stopped.*stopped"), (Forgetful, "no exit"),
        (Changing, "another profile"),
    ]  # fmt: skip
    for engine, words in faults:
        with pytest.raises(AssertionError, match=words):
            check_engine(engine, lambda: Echo("a"), limit_s=0.5)


def test_models_of_a_registered_engine_are_scheduled() -> None:
    """A model finds its engine by name; equal models share a runner, and others have one of their own."""
    scheduler.engines.register("echo", EchoEngine)
    with no_leaks(), Scheduler(settings()) as one:
        with one.acquire(Echo("ab", times=2)) as lease, one.acquire(Echo("ab", times=2)) as same:
            assert lease.value == "abab" and same.runner == lease.runner
            with one.acquire(Echo("ab")) as other:
                assert other.value == "ab" and other.runner != lease.runner
            assert [runner.model for runner in one.status().runners] == ["ab", "ab"]
        assert one.fit(Echo("new", priority=3), num_ctx=512).verdict == "fits"
        with pytest.raises(UnsupportedOption, match="no such part"):
            one.acquire(Echo("ab"), embedding=True)
        one.expire(Echo("ab"))


def test_an_engine_that_is_not_there_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, with one that cannot be imported, and with an engine that cannot be made, it is told how."""
    with Scheduler(settings()) as one:
        with pytest.raises(EngineMissing, match="install the package that has it"):
            one.acquire(Echo("a"))
        scheduler.engines.register("echo", lambda settings: 1 / 0)  # type: ignore[arg-type, return-value]  # a fault
        with pytest.raises(EngineUnusable, match="ZeroDivisionError"):
            one.acquire(Echo("a"))
    with pytest.raises(InvalidSettings):
        scheduler.engines.register("", EchoEngine)


@pytest.mark.parametrize("content", ["from tests.engines.test_engine_interface import EchoEngine", "import nowhere"])
def test_an_engine_is_found_as_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """An installed package's entry point of the group `loadmaster.engines` is an engine."""
    (tmp_path / "echo_package.py").write_text(content)
    about = tmp_path / "echo_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[loadmaster.engines]\necho = echo_package:EchoEngine\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "echo_package", raising=False)
    with Scheduler(settings()) as one:
        if "nowhere" in content:
            with pytest.raises(EngineUnusable, match="ModuleNotFoundError"):
                one.acquire(Echo("a"))
        else:
            with one.acquire(Echo("a")) as lease:
                assert lease.value == "a"


def test_the_public_names_are_there() -> None:
    """Every public name of the package is at hand, and no other is."""
    assert {name for name in scheduler.engines.__all__ if getattr(scheduler.engines, name) is None} == set()
    assert set(scheduler.engines.__all__) <= set(dir(scheduler.engines))
    with pytest.raises(AttributeError):
        scheduler.engines.nothing  # noqa: B018
