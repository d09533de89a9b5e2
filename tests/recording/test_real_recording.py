"""Recordings of real runs: with real children, in places that cannot be written, and when the program is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fsm.messages.commands import Finished, Launch, Reject, RevokeLease, Stop
from fsm.messages.events import Acquire, Cancel, Exited, Inspected, Progress
from fsm.sizing.model_profile import ModelProfile
from scheduler import InvalidSettings, LoadFailed, PythonModel, RunnerCrashed, Scheduler, Settings
from scheduler.cli.main import main
from scheduler.config.settings import SMALLEST_RECORD_BYTES
from scheduler.engines.llama import ENGINE
from scheduler.engines.llama_sizing import holds
from scheduler.models.gguf_metadata import read_metadata
from scheduler.models.measurements import installed_version
from scheduler.recording import recorder
from scheduler.recording.replay import Replay, ReplayedStep, ReplayStarted
from tests.support.engine_models import write
from tests.support.leaks import no_leaks
from tests.support.real import LONG, ROOM_FOR_TWO, SHORT, begin_a_load, send, settings, write_models
from tests.support.waiting import LIMIT_S, assert_soon

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "only the model is to read this"
OBJECT = PythonModel("object", load=object, memory={"cpu": "1MiB"})


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with no_leaks():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make three tiny models."""
    return write_models(tmp_path_factory.mktemp("models"), "abc")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "incident.jsonl"


def recorded(file: Path, **arguments: Any) -> Scheduler:
    return Scheduler(settings(recording_file=file, **arguments))


def steps(file: Path) -> list[ReplayedStep]:
    """Replay a file and return its steps; raise where a decision differs."""
    return [moment for moment in Replay(file) if isinstance(moment, ReplayedStep)]


def incident(scheduler: Scheduler, folder: Path) -> set[str]:
    """Make an eviction, a kill, a cancelled load and a bad file; return texts that must not be in the recording."""
    a = scheduler.acquire(folder / "a.gguf")
    assert a.chat(PROMPT, **SHORT) and a.url
    secrets = {
        PROMPT,
        a.url,
        a.url.removeprefix("http://").rstrip("/"),
        a.api_key,
    }
    scheduler.acquire(folder / "b.gguf").release()
    with scheduler.acquire(folder / "c.gguf") as c:  # "b" is evicted for it
        assert c.complete(PROMPT, **SHORT)
    send(a.pid, signal.SIGKILL)
    with pytest.raises(RunnerCrashed):
        a.chat(PROMPT, **LONG)
    waiting, pid = begin_a_load(scheduler, folder / "b.gguf")
    waiting.cancel()
    send(pid, signal.SIGCONT)
    bad = folder / "bad.gguf"
    bad.write_bytes(b"GGUF")
    with pytest.raises(Exception, match="bad"):
        scheduler.acquire(bad)
    return secrets


def test_a_real_run_replays_exactly(file: Path, folder: Path, tmp_path: Path) -> None:
    """A run with an eviction, a kill and a cancel replays exactly in another process, without the models."""
    with recorded(file, memory_limit=ROOM_FOR_TWO) as scheduler:
        secrets = incident(scheduler, folder)
        assert scheduler.status().problems == ()
    done = [type(each) for moment in steps(file) for each in (moment.event, *moment.commands)]
    for kind in (Acquire, Exited, Cancel, Launch, RevokeLease, Reject, Stop, Finished):
        assert kind in done
    picture = tmp_path / "timeline.svg"
    replayed = subprocess.run(
        [sys.executable, "-m", "scheduler.cli", "replay", file, "--timeline", picture],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "11", "PYTHONUTF8": "1"},
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=LIMIT_S * 3,
    )  # fmt: skip
    assert (replayed.returncode, replayed.stderr) == (0, "")
    for said in ("c needs its memory", "killed by SIGKILL", "leaves", "'bad' cannot be loaded", "The same"):
        assert said in replayed.stdout, f"{said!r} is missing: {replayed.stdout}"
    assert picture.read_text().startswith("<?xml")
    text = file.read_text()
    assert [secret for secret in secrets if secret in text] == [] and "http://127" not in text


def test_a_run_in_which_llama_cpp_was_asked_replays_without_it(file: Path, tmp_path: Path) -> None:
    """What a dry run told is in the recording: it replays in a process without the engine, and without the model."""
    model = write(tmp_path, "gemma4")
    assert not holds(read_metadata(str(model)), installed_version(ENGINE))  # llama.cpp is asked
    with recorded(file) as scheduler:
        for tokens in (256, 512, 256):  # the last time the answer is remembered
            scheduler.acquire(model, num_ctx=tokens, timeout=LIMIT_S, keep_alive=0).release()
        assert scheduler.status().problems == ()  # and has told
    model.unlink()
    code = (
        "import sys; sys.modules['xllamacpp'] = None\n"
        "from scheduler.engines.process_supervisor import ChildLauncher; del ChildLauncher.start\n"
        "from scheduler.cli.main import main; sys.exit(main(['replay', sys.argv[1]]))"
    )
    replayed = subprocess.run(
        [sys.executable, "-c", code, file], env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=LIMIT_S * 3,
    )  # fmt: skip
    assert (replayed.returncode, replayed.stderr) == (0, "") and "The same" in replayed.stdout
    profiles = [one.event.outcome for one in steps(file) if isinstance(one.event, Inspected)]
    assert profiles and all(isinstance(one, ModelProfile) for one in profiles)
    launched = [command for one in steps(file) for command in one.commands if isinstance(command, Launch)]
    assert [one.options.num_ctx for one in launched] == [256, 512, 256]


def test_a_rotated_recording_of_a_real_run_replays_exactly(file: Path, folder: Path) -> None:
    """Both files of a rotated recording replay exactly, with a runner that was there before the second file."""
    model, before = folder / "a.gguf", Path(f"{file}.1")
    with recorded(file, recording_limit=SMALLEST_RECORD_BYTES) as scheduler, scheduler.acquire(model) as lease:
        for _ in range(40):
            for _ in range(20):
                scheduler.acquire(model).release()
            if before.exists() and file.stat().st_size > 2000:
                break
            threading.Event().wait(0.1)
        assert lease.chat(PROMPT, **SHORT) and scheduler.status().problems == ()
    for part in (before, file):
        begun, *_ = list(Replay(part))
        assert isinstance(begun, ReplayStarted) and begun.header.missing == 0 and len(steps(part)) > 20
    assert file.stat().st_size + before.stat().st_size < 2 * SMALLEST_RECORD_BYTES
    assert main(["replay", str(file)]) == 0


def test_a_recording_survives_the_program(file: Path) -> None:
    """After a kill of the host all but the last moments are in the file, and a line that is cut is left out."""
    code = f"""
from scheduler import PythonModel, Scheduler, Settings
scheduler = Scheduler(Settings(gpus=False, recording_file={str(file)!r}))
model = PythonModel("object", load=object, memory={{"cpu": "1MiB"}})
print("ready", flush=True)
while True:
    scheduler.acquire(model).release()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None and host.stdout.readline() == "ready\n"
        assert_soon(lambda: file.exists() and file.stat().st_size > 100_000)
        host.kill()
    assert len(steps(file)) > 100


def test_a_place_that_cannot_be_written_is_a_problem_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording that cannot be written is a problem, and goes on when it can be written again."""
    monkeypatch.setattr(recorder, "_RETRY_S", 0.05)
    file = tmp_path / "later" / "incident.jsonl"
    with recorded(file) as scheduler:
        scheduler.acquire(OBJECT).release()
        assert_soon(lambda: f"nothing is recorded to {file}: No such file or directory" in scheduler.status().problems)
        file.parent.mkdir()

        def problems() -> tuple[str, ...]:
            scheduler.acquire(OBJECT).release()
            return scheduler.status().problems

        assert_soon(lambda: not problems())
    begun, *rest = list(Replay(file))
    assert isinstance(begun, ReplayStarted) and begun.header.missing > 0 and rest


@pytest.mark.parametrize("what", ["deleted", "moved", "replaced", "emptied"])
def test_a_file_that_is_taken_away_is_a_problem_and_begun_anew(
    what: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is moved away, as by logrotate, is a problem, and a new file is begun."""
    monkeypatch.setattr(recorder, "_RETRY_S", 1.0)
    with recorded(file) as scheduler:

        def problems() -> str:
            scheduler.acquire(OBJECT).release()
            return " ".join(scheduler.status().problems)

        assert not problems()
        assert_soon(lambda: file.exists() and file.stat().st_size > 0)
        if what == "deleted":
            file.unlink()
        elif what == "emptied":
            os.truncate(file, 0)
        else:
            file.rename(f"{file}.old")
        if what == "replaced":
            file.write_text("another program's")
        assert_soon(lambda: f"nothing is recorded to {file}: it was moved, deleted or changed" in problems())
        assert_soon(lambda: not problems())
    begun, *rest = list(Replay(file))
    assert isinstance(begun, ReplayStarted) and begun.header.missing > 0 and rest


def test_two_schedulers_on_one_file_both_say_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two schedulers with one file both report that the other put the file aside, and each part is whole."""
    monkeypatch.setattr(recorder, "_RETRY_S", 0.3)
    with recorded(file) as one, recorded(file) as other:
        found = set()

        def both() -> bool:
            for scheduler in (one, other):
                scheduler.acquire(OBJECT).release()
                if any("does another scheduler write to it?" in each for each in scheduler.status().problems):
                    found.add(scheduler)
            return len(found) == 2

        assert_soon(both)
    assert list(Replay(file)) and list(Replay(f"{file}.1"))


@pytest.mark.parametrize("what", ["folder", "fifo", "device"])
def test_what_is_no_regular_file_is_left_alone(what: str, tmp_path: Path) -> None:
    """A path that is no regular file is neither moved nor waited for."""
    file = {"device": Path("/dev/null")}.get(what, tmp_path / what)
    if what == "folder":
        file.mkdir()
    elif what == "fifo":
        os.mkfifo(file)
    with recorded(file) as scheduler:
        scheduler.acquire(OBJECT).release()
        assert_soon(lambda: any("not a regular file" in each for each in scheduler.status().problems))
    assert file.exists() and not Path(f"{file}.1").exists()


def test_a_full_disk_is_a_problem_until_there_is_room(tmp_path: Path) -> None:
    """A full disk is a problem, the file stays whole and can be replayed, and the recording goes on with room."""
    file = tmp_path / "incident.jsonl"
    code = f"""
import resource, time
from scheduler import PythonModel, Scheduler, Settings
from scheduler.recording import recorder
recorder._RETRY_S = 0.05
model = PythonModel("object", load=object, memory={{"cpu": "1MiB"}})
def until(condition):
    end = time.monotonic() + {LIMIT_S}
    while not condition():
        assert time.monotonic() < end
        scheduler.acquire(model).release()
        time.sleep(0.002)
with Scheduler(Settings(gpus=False, recording_file={str(file)!r})) as scheduler:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    until(lambda: any("File too large" in each for each in scheduler.status().problems))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    until(lambda: not scheduler.status().problems)
    print(scheduler.status().problems)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False, timeout=LIMIT_S * 4,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "()\n"), done.stderr
    parts = [each for each in Replay(file) if isinstance(each, ReplayStarted)]
    assert len(parts) > 1 and parts[-1].header.missing > 0 and file.stat().st_size > 20_000


def test_what_comes_too_fast_is_left_out_and_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that come too fast for the disk are left out and counted, and the rest replays from a new beginning."""
    monkeypatch.setattr(recorder, "_MOST_WAITING", 50)
    monkeypatch.setattr(recorder, "_GATHER_S", 0.3)
    with recorded(file) as scheduler:
        for _ in range(6):
            for _ in range(100):
                scheduler.acquire(OBJECT).release()
                assert scheduler.debug_state().to_record <= 51
            assert_soon(lambda: not scheduler.debug_state().to_record)
        problems = scheduler.status().problems
    assert any("came faster than they could be written" in each for each in problems)
    parts = [each for each in Replay(file) if isinstance(each, ReplayStarted)]
    assert len(parts) > 2 and all(part.header.missing > 0 for part in parts[1:])
    assert len(steps(file)) > 100


def test_what_cannot_be_recorded_is_left_out(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that no JSON can hold ends a part of the recording, and the next part begins without it."""
    monkeypatch.setattr(recorder, "_RETRY_S", 0.0)
    with recorded(file) as scheduler:
        scheduler.acquire(OBJECT).release()
        scheduler._broker.post(Progress(object()))  # type: ignore[arg-type]  # there is no such runner
        assert_soon(lambda: any("cannot be recorded" in each for each in scheduler.status().problems))

        def problems() -> tuple[str, ...]:
            scheduler.acquire(OBJECT).release()
            return scheduler.status().problems

        assert_soon(lambda: not problems())
    assert len([each for each in Replay(file) if isinstance(each, ReplayStarted)]) > 1


def test_failed_loads_of_objects_replay(file: Path) -> None:
    """Failed loads of objects replay with the words of the user's code."""

    def fail() -> object:
        raise RuntimeError("schlecht \ud800 \x1b[31m http://127.0.0.1:8080/secret")

    with recorded(file) as scheduler:
        with pytest.raises(LoadFailed):
            scheduler.acquire(PythonModel("bad", load=fail, memory={"cpu": "1MiB"}))
        assert scheduler.status().problems == ()
    assert len(steps(file)) > 3 and "127.0.0.1:8080" not in file.read_text()


def test_the_settings_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting takes a path, made absolute, or "none", and a size that is large enough."""
    monkeypatch.chdir(tmp_path)
    assert Settings().recording_file is None and Settings(recording_file="none").recording_file is None
    for path in ("x.jsonl", Path("x.jsonl")):
        assert Settings(recording_file=path).recording_file == tmp_path / "x.jsonl"
    environment = {"LOADMASTER_RECORDING_FILE": "a:b", "LOADMASTER_RECORDING_LIMIT": "1MiB"}
    assert Settings.from_environment(environment).recording_limit == 2**20
    names = ("recording_file", "recording_file", "recording_file", "recording_limit", "recording_limit")
    for wrong in ({name: value} for name, value in zip(names, (7, "", "a\0b", "1KiB", "all"), strict=True)):
        with pytest.raises(InvalidSettings):
            Settings(**wrong)  # type: ignore[arg-type]
