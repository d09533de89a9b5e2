"""A child that has imported the engine before there is a model for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from scheduler import Scheduler, Settings
from scheduler.engines.child_process import Child
from scheduler.engines.llama import LlamaEngine, LlamaProcess, child_environment
from scheduler.engines.llama_spare import SPARE_BYTES, Spares
from scheduler.models.model_spec import ModelSpec
from tests.engines.test_llama_engine import ON_HOST, SMALL, Told, ask, start, wait_until
from tests.support.leaks import no_leaks
from tests.support.tiny_models import write_tiny_model

ROOM = 2 * SPARE_BYTES


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spare") / "tiny.gguf"
    write_tiny_model(path)
    return path


@pytest.fixture(autouse=True)
def spares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a child ready, which other tests do without."""
    monkeypatch.setattr("scheduler.engines.llama.Spares", Spares)


@pytest.fixture
def engine() -> Iterator[LlamaEngine]:
    with no_leaks():
        engine = LlamaEngine(prestart=True)
        yield engine
        engine.close()


def launch(engine: LlamaEngine, file: Path, **how: bool) -> tuple[LlamaProcess, Told]:
    told = Told()
    return start(engine, ModelSpec("tiny", str(file)), SMALL, replace(ON_HOST, **how), told), told


def has_served(engine: LlamaEngine, file: Path) -> LlamaProcess:
    """Load a model, and return its process."""
    process, told = launch(engine, file)
    told.endpoint()
    return process


def look_round(engine: LlamaEngine, room: int = ROOM) -> None:
    engine.look_round(lambda: room)


def spare_of(engine: LlamaEngine) -> psutil.Process | None:
    """Return the process of the spare child once it has started; None where there is none."""
    spare = engine._spares._spare
    if spare is None:
        return None
    wait_until(lambda: spare.child.pid)
    return psutil.Process(spare.child.pid)


def has_imported(process: psutil.Process) -> bool:
    return any("xllamacpp" in each.path for each in process.memory_maps())


def test_the_next_load_takes_the_child_over(engine: LlamaEngine, file: Path) -> None:
    """A load goes on in the spare child, which has imported the engine, with a key and an environment as always."""
    first = has_served(engine, file)
    look_round(engine)
    spare = spare_of(engine)
    assert spare is not None
    wait_until(lambda: has_imported(spare))
    second, told = launch(engine, file, holds_back=True)
    endpoint = told.endpoint()
    assert second.pid == spare.pid != first.pid and endpoint.key != first._key
    assert ask(endpoint, "/v1/completions", {"prompt": "ab", "max_tokens": 2})[0] == 200
    assert (
        spare.environ()
        == psutil.Process(first.pid).environ()
        == {**child_environment(os.environ), "CUDA_VISIBLE_DEVICES": ""}
    )
    wait_until(lambda: Path(f"/proc/{spare.pid}/autogroup").read_text().strip().endswith("nice 0"))
    assert spare_of(engine) is None
    second.stop(1.0)
    assert "stopped" in told.exit()[1]


def test_a_load_takes_over_a_child_that_is_just_being_started(engine: LlamaEngine, file: Path) -> None:
    """What a load asks for reaches a child that was ordered a moment ago, whether or not it runs yet."""
    for _ in range(3):
        has_served(engine, file).stop(0.0)
        look_round(engine)
        begun = engine._spares._spare
        assert begun is not None and has_served(engine, file).child is begun.child


def test_no_child_is_started_beside_a_load(engine: LlamaEngine, file: Path) -> None:
    """There is none before a load is expected, and none is started while a model loads; there is one at most."""
    look_round(engine)
    assert spare_of(engine) is None
    _, told = launch(engine, file)
    look_round(engine)  # an engine's import takes longer than this
    assert spare_of(engine) is None
    told.endpoint()
    look_round(engine)
    spare = spare_of(engine)
    look_round(engine)
    assert spare == spare_of(engine) is not None


def test_the_first_load_has_one_that_was_started_as_its_file_was_read(engine: LlamaEngine, file: Path) -> None:
    """The first inspection starts a child, the load after it takes it over, and no other inspection starts one."""
    spec = ModelSpec("tiny", str(file))
    engine.inspect(spec, [SMALL])
    begun = engine._spares._spare
    engine.inspect(spec, [SMALL])
    assert begun is not None and engine._spares._spare is begun
    assert has_served(engine, file).child is begun.child
    engine.inspect(spec, [SMALL])
    assert engine._spares._spare is None


def test_a_child_that_cannot_be_started_is_no_child(
    engine: LlamaEngine, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system allows no more threads a load does not wait for a child that never runs."""

    def refuse(child: Child) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(engine._processes, "start", refuse)
        engine.inspect(ModelSpec("tiny", str(file)), [SMALL])
    assert engine._spares._spare is not None and engine._spares._spare.over
    has_served(engine, file)


def test_it_is_there_only_where_the_host_has_room(engine: LlamaEngine, file: Path) -> None:
    """None is started without room for it twice, and one that is there goes when its own bytes are wanted."""
    has_served(engine, file)
    look_round(engine, ROOM - 1)
    assert spare_of(engine) is None
    look_round(engine)
    spare = spare_of(engine)
    look_round(engine, SPARE_BYTES)
    assert spare == spare_of(engine) is not None
    look_round(engine, SPARE_BYTES - 1)
    assert spare_of(engine) is None
    spare.wait(10)


def test_one_that_has_died_is_replaced_after_the_next_load(engine: LlamaEngine, file: Path) -> None:
    """A load does without a child that has died, and one that dies each time is not started each second."""
    has_served(engine, file)
    look_round(engine)
    dead = spare_of(engine)
    assert dead is not None
    dead.send_signal(signal.SIGKILL)
    wait_until(lambda: engine._spares._spare is None or engine._spares._spare.over)
    look_round(engine)
    look_round(engine)
    assert spare_of(engine) is None
    assert has_served(engine, file).pid != dead.pid
    look_round(engine)
    assert spare_of(engine) is not None


def test_a_load_with_another_environment_takes_a_new_child(
    engine: LlamaEngine, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that was started with another environment than the load is to have is ended."""
    has_served(engine, file)
    look_round(engine)
    spare = spare_of(engine)
    assert spare is not None
    monkeypatch.setenv("TZ", "UTC+3")
    process = has_served(engine, file)
    assert process.pid != spare.pid and psutil.Process(process.pid).environ()["TZ"] == "UTC+3"
    spare.wait(10)


def test_its_parent_takes_it_along(file: Path) -> None:
    """A program that is killed leaves no spare child behind."""
    code = """
        import os, sys, time
        from scheduler.engines.llama_spare import Spares
        from scheduler.engines.child_process import Program
        from scheduler.engines.llama import CHILD, find_library
        from scheduler.engines.process_supervisor import ChildLauncher
        spares = Spares(ChildLauncher(), enabled=True)
        spares._next = Program((sys.executable, "-I", "-S", str(CHILD), find_library()), {})
        spares.look_round(lambda: 1 << 30)
        while not (pid := spares._spare.child.pid):
            time.sleep(0.001)
        time.sleep(0.2)
        print(pid, flush=True)
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def free_is_all(scheduler: Scheduler) -> bool:
    host = scheduler._devices.sample()[0]
    return host.free_bytes == host.capacity_bytes


@pytest.mark.parametrize("prestart", [True, False])
def test_a_scheduler_keeps_one_where_it_is_told_to(file: Path, monkeypatch: pytest.MonkeyPatch, prestart: bool) -> None:
    """The setting decides whether there is one; it counts as free memory, and ends with the scheduler."""
    with no_leaks(), Scheduler(Settings(gpus=False, prestart=prestart, probe_interval=0.05)) as scheduler:
        engine = scheduler._registry.engines[0]
        assert isinstance(engine, LlamaEngine)
        with scheduler.acquire(file):
            if prestart:
                wait_until(lambda: engine._spares._spare)
                wait_until(lambda: 0 < engine.spare_bytes() < SPARE_BYTES)
                monkeypatch.setattr(engine._spares, "held_bytes", lambda: 1 << 60)
                assert free_is_all(scheduler)
            else:
                assert not free_is_all(scheduler)
                look_round(engine)
                assert engine._spares._spare is None
