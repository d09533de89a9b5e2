"""Measurements across restarts, with real children: programs that share nothing but a store."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fsm.domain.options import Options
from scheduler import InvalidSettings, PythonModel, Scheduler, Settings
from scheduler.cli.main import main
from scheduler.config.paths import VERSION, default_measurement_file
from scheduler.engines.llama import LlamaEngine
from tests.support.leaks import no_leaks
from tests.support.lives import live, resident_bytes
from tests.support.real import SHORT, quiet_end, settings
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import assert_soon
from tests.tools.memory.rows import Row, write_row

NEAR = 0.03  # the part that is kept free beyond a measurement
CONTEXT = 256


@pytest.fixture(autouse=True)
def _quiet_end(caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest) -> Iterator[None]:
    warns = "_warns_" in request.node.name
    with no_leaks() if warns else quiet_end(caplog):
        yield


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "footprints.sqlite3"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model whose 8 MiB of weights show in what it takes."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "a.gguf", layers=4, width=512, context=1024)


def life_of(model: Path, store: Path, **options: int) -> tuple[int, int, bool]:
    """Load a model once; return its reserved bytes, its resident bytes, and whether the former were measured."""
    with Scheduler(settings(measurement_file=store, probe_interval="1h")) as scheduler:
        fit = scheduler.fit(model, **options)
        with scheduler.acquire(model, **options) as lease:
            lease.chat("hello", **SHORT)
            (runner,) = scheduler.status().runners
            assert runner.promised_bytes["cpu"] == fit.devices[0].takes_bytes
            return runner.promised_bytes["cpu"], resident_bytes(lease.pid), fit.measured


# -- how near measurements come ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        Row("llama Q4_0", Options(num_ctx=CONTEXT, use_mmap=True)),
        Row("llama", Options(num_ctx=CONTEXT, flash_attention=False)),
        Row("llama", Options(num_ctx=CONTEXT), embedding=True),
    ],
    ids=["mapped", "no flash attention", "embeds"],
)  # fmt: skip
def test_after_one_load_a_new_program_knows_what_a_model_takes(row: Row, store: Path, tmp_path: Path) -> None:
    """After a full run, `fit` and the account are within 3 % of the next full run's resident bytes."""
    model = write_row(tmp_path, row)
    first, second, third = (live(store, model, row, fills=fills) for fills in (False, True, True))
    figures = [f"predicted {first.expected_bytes}"]
    for life in (second, third):
        figures.append(f"expected {life.expected_bytes}, taken {life.taken_bytes}: {life.off:+.2%}")
        assert life.measured and life.promised_bytes == life.expected_bytes, figures
        assert life.expected_bytes == pytest.approx(life.taken_bytes, rel=NEAR), figures
        assert life.held_bytes == pytest.approx(life.taken_bytes, rel=NEAR), figures
    assert not first.measured
    print(*figures, sep="\n")


# -- across restarts --------------------------------------------------------------------------------------------------


def test_a_second_scheduler_knows_what_the_first_one_measured(store: Path, model: Path) -> None:
    """After one load a second scheduler has the measurement of the first one."""
    predicted, _, known = life_of(model, store, num_ctx=CONTEXT)
    assert not known
    remembered, took, known = life_of(model, store, num_ctx=CONTEXT)
    assert known and remembered != predicted
    assert took < remembered < 1.3 * took  # no context was filled, so buffers and caches are still to come


def test_how_long_it_loaded_is_known_too(store: Path, model: Path) -> None:
    """The load time of an earlier scheduler is known before the first load."""
    for _ in range(2):
        life_of(model, store)
    with Scheduler(settings(measurement_file=store)) as scheduler, scheduler.acquire(model) as lease:
        known = scheduler._executor.runner_handles[lease.runner].model
        loads = scheduler._driver.query(lambda core: dict(core._state.models[known].loads))
    assert [len(seconds) for seconds in loads.values()] == [3]


def test_a_replaced_file_is_predicted_anew(store: Path, model: Path, tmp_path: Path) -> None:
    """A replaced file of the same name and size is predicted and not taken as measured."""
    copy = tmp_path / "copy.gguf"
    shutil.copyfile(model, copy)
    os.utime(copy, ns=(1, 1))
    life_of(copy, store)
    assert life_of(copy, store)[2]
    os.utime(copy, ns=(2, 2))
    assert not life_of(copy, store)[2]


def test_a_file_that_is_replaced_while_it_is_inspected_measures_nothing(
    store: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a runner takes is not kept for a file that was replaced between its inspection and the load."""
    copy, inspect = tmp_path / "copy.gguf", LlamaEngine.inspect
    shutil.copyfile(model, copy)
    os.utime(copy, ns=(1, 1))

    def replaced(*arguments: Any) -> Any:
        found = inspect(*arguments)
        os.utime(copy, ns=(2, 2))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(LlamaEngine, "inspect", replaced)
        with Scheduler(settings(measurement_file=store)) as scheduler:
            scheduler.acquire(copy).release()
    os.utime(copy, ns=(1, 1))
    assert not life_of(copy, store)[2]
    assert life_of(copy, store)[2]


def test_other_options_are_predicted(store: Path, model: Path) -> None:
    """A larger context than the measured one is predicted."""
    life_of(model, store, num_ctx=256)
    assert not life_of(model, store, num_ctx=512)[2]
    assert life_of(model, store, num_ctx=256)[2]


def test_without_a_store_nothing_is_known_and_nothing_is_written(tmp_path: Path, model: Path) -> None:
    """With `measurement_file="none"` nothing is known and no file is written."""
    for _ in range(2):
        with Scheduler(settings(measurement_file=None)) as scheduler:
            assert not scheduler.fit(model).measured
            scheduler.acquire(model).release()
    assert not list(tmp_path.iterdir())


def test_an_object_is_not_remembered(store: Path) -> None:
    """An object is not kept in the store."""
    with Scheduler(settings(measurement_file=store)) as scheduler:
        scheduler.acquire(PythonModel("a", load=object, memory={"cpu": 1000})).release()
    assert not store.exists()


def test_nothing_of_what_was_asked_is_in_it(store: Path, model: Path) -> None:
    """Neither prompts, answers nor keys are in the store."""
    with Scheduler(settings(measurement_file=store)) as scheduler, scheduler.acquire(model) as lease:
        answer = lease.chat("a very private question", **SHORT)
        key = lease.api_key
    content = store.read_bytes()
    assert str(model).encode() in content
    assert answer and not any(each.encode() in content for each in ("private question", key, answer) if each)


# -- a store that cannot be used --------------------------------------------------------------------------------------


def test_a_damaged_store_warns_once_and_is_begun_anew(
    store: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged store is warned of once, and the model is loaded and measured."""
    store.parent.mkdir()
    store.write_bytes(b"nonsense" * 1000)
    assert not life_of(model, store)[2]
    assert life_of(model, store)[2]
    assert len([each for each in caplog.records if each.levelname == "WARNING"]) == 1


def test_a_store_that_cannot_be_written_warns_once_and_is_a_problem(
    store: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that cannot be written is warned of once and is a problem in `status()`."""
    store.mkdir(parents=True)
    with Scheduler(settings(measurement_file=store)) as scheduler:
        for _ in range(2):
            scheduler.acquire(model, keep_alive=0).release()
            assert_soon(lambda: not scheduler.status().runners)
        assert_soon(lambda: scheduler.status().problems)
        (problem,) = scheduler.status().problems
    assert str(store) in problem
    assert len([each for each in caplog.records if each.levelname == "WARNING"]) == 1


# -- the command, and the setting -------------------------------------------------------------------------------------


def test_the_command_knows_it_as_well(
    store: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`loadmaster fit` in a program of its own uses the measurement and says so."""
    monkeypatch.setenv("LOADMASTER_MEASUREMENT_FILE", str(store))
    monkeypatch.setenv("LOADMASTER_GPUS", "0")
    life_of(model, store)
    remembered, _, _ = life_of(model, store)
    assert main(["fit", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["measured"], found["devices"][0]["takes_bytes"]) == (True, remembered)
    assert main(["fit", str(model)]) == 0
    assert "was measured before, so 3 % more is made free" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setenv("LOADMASTER_MEASUREMENT_FILE", "none")
    assert main(["fit", str(model)]) == 0
    assert "It is a prediction, so 25 % more is made free" in " ".join(capsys.readouterr().out.split())


def test_the_usual_file_is_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The usual file is in the user's cache folder, one for each version of the table."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = default_measurement_file()
    assert path.name == f"footprints-{VERSION}.sqlite3" and path.parent.name == "loadmaster"


def test_the_setting_takes_a_file_or_none(tmp_path: Path) -> None:
    """The setting takes a file, "none" or "auto"."""
    assert Settings(measurement_file=str(tmp_path / "a.db")).measurement_file == tmp_path / "a.db"
    assert Settings(measurement_file="none").measurement_file is None
    assert Settings(measurement_file=None).measurement_file is None
    assert Settings(measurement_file="auto").measurement_file == Settings().measurement_file
    wrong: tuple[Any, ...] = ("", 5, ["a", "b"], ("a",), "a\0b")
    for value in wrong:
        with pytest.raises(InvalidSettings, match='"auto" or the path of a file, or "none"'):
            Settings(measurement_file=value)


def test_a_user_without_a_home_has_a_scheduler_that_warns_of_it(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """Without a home folder the scheduler warns and has a problem in its status."""
    monkeypatch.setattr("scheduler.config.settings.default_measurement_file", default_measurement_file)
    monkeypatch.setattr("platformdirs.user_cache_path", Mock(side_effect=RuntimeError("no home directory")))
    with no_leaks(), Scheduler(Settings(gpus=False)) as scheduler:
        scheduler.acquire(model).release()
        (problem,) = scheduler.status().problems
        assert "this user has none; name a file by the setting measurement_file" in problem


def test_tests_keep_out_of_the_developers_own_file(footprints: Path) -> None:
    """Each test has a file of its own, and child processes have none."""
    path = Settings().measurement_file
    assert path is not None and path.parent == footprints
    assert Settings.from_environment().measurement_file is None


def test_the_file_is_what_any_tool_can_read(store: Path, model: Path) -> None:
    """The file has one row for each set of options, in plain text for any tool."""
    life_of(model, store, num_ctx=CONTEXT)
    with sqlite3.connect(store) as file:
        rows = file.execute("SELECT files, options, split, took, loads FROM footprints").fetchall()
    file.close()
    ((files, options, split, took, loads),) = rows
    assert str(model) in files and json.loads(options)["num_ctx"] == CONTEXT and json.loads(split) == []
    assert [device for device, _ in json.loads(took)] == ["cpu"] and len(json.loads(loads)) == 1
