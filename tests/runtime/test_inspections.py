"""Inspections on threads of their own: a folder that does not answer stops neither other loads nor probes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fsm.domain.options import Options
from fsm.machine.request import ModelId
from scheduler import AcquireTimeout, InvalidModel, ModelSpec, PythonModel, Scheduler, Settings
from scheduler.concurrency.thread_pool import ThreadPool
from scheduler.engines.llama import LlamaEngine
from scheduler.runtime import inspections
from scheduler.runtime.inspections import AT_ONCE, LIMIT_S, Inspection, Inspections
from tests.support.leaks import no_leaks
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import LIMIT_S as SOON_S
from tests.support.waiting import assert_soon

ASKED = (Options(),)


class Reader:
    """Inspections whose files are read only when their folder answers, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.answers = {"dead": threading.Event()}
        self.begun: list[str] = []
        self.read: list[str] = []
        self.refused: dict[str, str] = {}
        self.inspections = Inspections(ThreadPool("test", 16), self._inspect, self._refuse, lambda: self.now)

    def put(self, *files: str) -> None:
        self.inspections.put(files, ModelId(files[0]), ASKED)

    def _inspect(self, inspection: Inspection) -> None:
        self.begun.append(inspection.path)
        if (answers := self.answers.get(os.path.dirname(inspection.path))) is not None:
            answers.wait(SOON_S)
        if "broken" in inspection.path:
            raise MemoryError("too little")
        if inspection.answer():
            self.read.append(inspection.path)

    def _refuse(self, inspection: Inspection, reason: str) -> None:
        if inspection.answer():
            self.refused[inspection.path] = reason


@pytest.fixture
def reader() -> Iterator[Reader]:
    with no_leaks():
        reader = Reader()
        yield reader
        reader.answers["dead"].set()
        assert reader.inspections.close(SOON_S) == []


def test_u67_a_folder_that_hangs_takes_few_threads(reader: Reader) -> None:
    """At most `AT_ONCE` threads wait for one folder, and other folders are read meanwhile."""
    for number in range(30):
        reader.put(f"dead/{number}")
    for number in range(30):
        reader.put(f"there/{number}")
    assert_soon(lambda: len(reader.read) == 30)
    assert {os.path.dirname(path) for path in reader.read} == {"there"}
    assert sorted(reader.begun)[:AT_ONCE] == ["dead/0", "dead/1"]
    assert len([path for path in reader.begun if path.startswith("dead")]) == AT_ONCE
    assert reader.inspections.problems == ()


def test_u67_files_that_cannot_be_read_are_given_up_in_time(reader: Reader) -> None:
    """After the time limit every inspection in a folder that hangs is refused, once, and the folder is named."""
    for number in range(5):
        reader.put(f"dead/{number}")
    assert_soon(lambda: len(reader.begun) == AT_ONCE)
    reader.now = LIMIT_S - 1
    reader.inspections.look()
    assert reader.refused == {}
    reader.now = LIMIT_S
    reader.inspections.look()
    reader.inspections.look()
    assert sorted(reader.refused) == [f"dead/{number}" for number in range(5)]
    assert set(reader.refused.values()) == {"dead has not answered for 60 s"}
    assert reader.inspections.problems == ("dead does not answer: models there cannot be read",)
    reader.answers["dead"].set()  # what is read now is told to nobody
    reader.put("dead/5")
    assert_soon(lambda: reader.read == ["dead/5"])
    assert_soon(lambda: reader.inspections.problems == ())
    assert len(reader.begun) == AT_ONCE + 1  # those that were given up while they waited are not read
    reader.inspections.look()
    assert_soon(lambda: reader.inspections.look() or not reader.inspections._folders)


def test_u67_an_inspection_that_raises_is_refused_and_keeps_no_place(reader: Reader) -> None:
    """More inspections of a folder that raise than run at once are all refused, and the next one there is made."""
    reader.answers["there"] = reader.answers["dead"]
    paths = [f"there/broken{number}" for number in range(3 * AT_ONCE)]
    for path in paths:
        reader.put(path)
    reader.put("there/whole")
    reader.answers["dead"].set()
    assert_soon(lambda: reader.read == ["there/whole"])
    assert_soon(lambda: sorted(reader.refused) == paths)
    assert set(reader.refused.values()) == {"its inspection failed with MemoryError: too little"}
    assert reader.inspections.problems == ()


def test_u67_a_slow_folder_is_given_its_time(reader: Reader) -> None:
    """Inspections that wait for others of their folder are not given up as long as these end in time."""
    for number in range(4):
        reader.put(f"dead/{number}")
    assert_soon(lambda: len(reader.begun) == AT_ONCE)
    reader.now = LIMIT_S - 1
    reader.answers["dead"].set()
    assert_soon(lambda: len(reader.read) == 4)
    reader.now = 2 * LIMIT_S
    reader.inspections.look()
    assert reader.refused == {}


def test_u67_a_model_in_two_folders_keeps_none_of_them(reader: Reader) -> None:
    """A local model whose adapter is in a folder that hangs keeps no other local model waiting."""
    reader.answers["local"] = reader.answers["dead"]
    for number in range(5):
        reader.put(f"local/{number}", "dead/adapter")
    reader.answers.pop("local")
    reader.put("local/5")
    assert_soon(lambda: "local/5" in reader.read)


# -- a scheduler -------------------------------------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Have everything that is read in folders named nfs wait until this is set."""
    answers = threading.Event()

    def hanging(method: Callable[..., Any]) -> Callable[..., Any]:
        def wait(engine: LlamaEngine, model: ModelSpec, *more: Any) -> Any:
            if any("nfs" in file for file in model.files):
                answers.wait(3 * SOON_S)
            return method(engine, model, *more)

        return wait

    monkeypatch.setattr(LlamaEngine, "inspect", hanging(LlamaEngine.inspect))
    yield answers
    answers.set()


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    with no_leaks(), Scheduler(Settings(gpus=False, cpu_threads=1, probe_interval="100ms")) as scheduler:
        yield scheduler


def a_file(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tiny_model(path, seed=seed, context=1024)


@pytest.mark.parametrize("folder", ["nfs", "nfs/{}"], ids=["one folder", "a folder each"])
def test_u67_a_local_model_is_loaded_beside_a_folder_that_hangs(
    folder: str, scheduler: Scheduler, answers: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local models and objects are loaded, and loaded ones are probed, while twenty inspections hang."""
    local = a_file(tmp_path / "local" / "a.gguf")
    dead = [a_file(tmp_path / folder.format(number) / f"{number}.gguf", number) for number in range(20)]
    waiting = [scheduler.submit(model, num_ctx=256, timeout=1) for model in dead]
    with scheduler.acquire(local, num_ctx=256, timeout=SOON_S) as lease:
        lease.chat("hello", max_tokens=4, timeout=SOON_S)
        asked = threading.Event()
        process = scheduler._executor.runner_handles[lease.runner].process
        monkeypatch.setattr(type(process), "healthy", lambda *_: bool(asked.set()) or True)
        assert asked.wait(SOON_S)
    scheduler.acquire(PythonModel("object", load=object), timeout=SOON_S).release()
    assert {type(each.exception(SOON_S)) for each in waiting} == {AcquireTimeout}
    assert not answers.is_set()
    answers.set()


def test_u67_a_request_without_a_time_limit_is_refused_in_the_end(
    scheduler: Scheduler, answers: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request for a model that cannot be read is refused by its folder's name, and served once the folder answers."""
    monkeypatch.setattr(inspections, "LIMIT_S", 0.5)
    model = a_file(tmp_path / "nfs" / "a.gguf")
    with pytest.raises(InvalidModel, match=r"nfs has not answered for 0\.5 s"):
        scheduler.acquire(model, num_ctx=256)
    assert any("nfs does not answer" in problem for problem in scheduler.status().problems)
    monkeypatch.setattr(inspections, "LIMIT_S", LIMIT_S)
    answers.set()
    scheduler.acquire(model, num_ctx=256, timeout=SOON_S).release()
    assert not scheduler.status().problems


def test_u67_a_launch_that_hangs_stops_no_probe_and_no_other_launch(
    scheduler: Scheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch that waits for its file, after its inspection, takes no thread from probes and other launches."""
    go_on, launch = threading.Event(), LlamaEngine.launch

    def hang(engine: LlamaEngine, model: ModelSpec, *more: Any) -> Any:
        if "nfs" in model.path:
            go_on.wait(3 * SOON_S)
        return launch(engine, model, *more)

    monkeypatch.setattr(LlamaEngine, "launch", hang)
    local, dead = a_file(tmp_path / "local" / "a.gguf"), a_file(tmp_path / "nfs" / "a.gguf")
    waiting = scheduler.submit(dead, num_ctx=256)
    assert_soon(lambda: [runner.state for runner in scheduler.status().runners] == ["loading"])
    scheduler.acquire(local, num_ctx=256, timeout=SOON_S).release()
    busy = threading.Semaphore(0)
    for _ in range(8):  # every worker is free
        scheduler._executor.worker_pool.put(lambda: (busy.release(), go_on.wait(0.2)))
    assert all(busy.acquire(timeout=SOON_S) for _ in range(8))
    go_on.set()
    waiting.result(SOON_S).release()
