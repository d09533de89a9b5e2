"""The command `loadmaster models`: which models it lists, and what it prints of those that cannot be read."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from fsm.core import Core
from fsm.domain.devices import HOST, DeviceId, DeviceSample
from fsm.messages.events import Sampled
from fsm.state.core_config import CoreConfig
from scheduler.cli import main as cli
from scheduler.cli import models as command
from scheduler.engines.llama import LlamaEngine
from scheduler.models.catalog import Catalog
from scheduler.models.sources import Folder, OllamaStore
from tests.support.stores import PARAMS, hub_repository, ollama_model, write_manifest
from tests.support.tiny_models import write_tiny_model

MIB = 2**20
GIB = 2**30


@pytest.fixture
def model(tmp_path: Path) -> bytes:
    """Make a tiny model that loads."""
    return write_tiny_model(tmp_path / "tiny.bytes").read_bytes()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the only place that is searched, which is empty."""
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setenv("LOADMASTER_MODELS", str(folder))
    monkeypatch.setenv("LOADMASTER_GPUS", "off")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("COLUMNS", "160")
    return folder


def a_core(*gpus_free: int, host_free: int = 8 * GIB) -> Core:
    """Return a core with a host and GPUs that have so many bytes free."""
    core = Core(CoreConfig())
    gpus = [DeviceSample(DeviceId(f"gpu{i}"), "gpu", "a GPU", 8 * GIB, free) for i, free in enumerate(gpus_free)]
    core.step(0.0, Sampled((DeviceSample(HOST, "cpu", "host", 8 * GIB, host_free), *gpus)))
    return core


def rows(catalog: Catalog, core: Core | None = None) -> list[command.Row]:
    """Return the rows that would be listed."""
    return list(command.read_rows(catalog, core or a_core(), LlamaEngine(), Progress(disable=True)))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command and return its output; fail on another status than 0 or on an error output."""
    assert cli.main(["models", *arguments]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def test_every_model_is_listed_under_the_place_where_it_is(
    capsys: pytest.CaptureFixture[str], folder: Path, model: bytes
) -> None:
    """Each model is listed under its place with its name, size, architecture, context and whether it fits."""
    (folder / "chat.gguf").write_bytes(model)
    ollama_model(folder.parent / "ollama", "registry.ollama.ai/library/tiny:1b", model)
    hub_repository(folder.parent / "hub", "user/repo", {"m.gguf": model})
    lines = printed(capsys).splitlines()
    for place, name in (("the folder", "chat"), ("Ollama's store", "tiny:1b"), ("the Hugging Face cache", "user/repo")):
        at = next(number for number, line in enumerate(lines) if line.startswith(place))
        assert lines[at + 1].split()[:5] == ["name", "size", "architecture", "quantisation", "context"]
        words = lines[at + 2].split()
        assert words[:4] == [name, "423.3", "KiB", "llama"] and "512" in words and words[-1] == "fits"


def test_programs_are_given_a_list_of_objects(capsys: pytest.CaptureFixture[str], folder: Path, model: bytes) -> None:
    """`--json` prints a list of objects, with sizes in bytes and contexts in tokens."""
    (folder / "chat.gguf").write_bytes(model)
    (one,) = json.loads(printed(capsys, "--json"))
    assert one.pop("needed_bytes") > 10 * MIB
    assert one.pop("quantisation") in ("", "F32")
    assert one == {
        "name": "chat",
        "place": f"the folder {folder}",
        "path": str(folder / "chat.gguf"),
        "size_bytes": len(model),
        "architecture": "llama",
        "context_trained": 512,
        "fits": "fits",
        "problem": "",
    }


def test_what_cannot_be_read_is_listed_with_the_reason(folder: Path, model: bytes) -> None:
    """A file that cannot be read is listed with the reason, beside the others."""
    store = folder.parent / "ollama"
    (folder / "broken.gguf").write_bytes(b"GGUF, it says")
    (folder / "good.gguf").write_bytes(model)
    (folder / "out.gguf").symlink_to(folder.parent / "tiny.bytes")
    write_manifest(store, "registry.ollama.ai/library/bad:latest", b"{")
    ollama_model(store, "registry.ollama.ai/library/worse:latest", model, (PARAMS, b"[]"))
    found = {row.name: row.problem for row in rows(Catalog([Folder(folder), OllamaStore(store)]))}
    assert found.pop("good") == ""
    assert all(found.values())
    assert "leads out of" in found["out"] and "no JSON" in found["bad:latest"] and "no object" in found["worse:latest"]
    assert sorted(found) == ["bad:latest", "broken", "out", "worse:latest"]


def test_a_file_that_is_no_model_keeps_its_path(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """A file that is no model is listed by its path, so that it can be removed."""
    (folder / "broken.gguf").write_bytes(b"GGUF, it says")
    (one,) = json.loads(printed(capsys, "--json"))
    assert (one["path"], one["fits"]) == (str(folder / "broken.gguf"), "")
    assert "cannot be read: " in printed(capsys)


@pytest.mark.parametrize(
    ("core", "fits"),
    [
        (a_core(), command.FITS),
        (a_core(8 * GIB), command.FITS),
        (a_core(3 * MIB + MIB // 2), command.IN_PART),
        (a_core(0), command.ON_HOST),
        (a_core(host_free=MIB), command.TOO_LARGE),
        (a_core(8 * GIB, host_free=0), command.TOO_LARGE),
    ],
)
def test_whether_it_fits_is_judged_by_what_is_free(folder: Path, core: Core, fits: str) -> None:
    """Whether a model fits is judged by the free memory with automatic options: on GPUs, in part, or on the host."""
    write_tiny_model(folder / "a.gguf", layers=8)
    (row,) = rows(Catalog([Folder(folder)]), core)
    assert (row.fits, row.needed_bytes > 0) == (fits, True), row.needed_bytes


def test_a_limit_on_memory_counts(
    capsys: pytest.CaptureFixture[str], folder: Path, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory limit of the environment counts."""
    (folder / "chat.gguf").write_bytes(model)
    monkeypatch.setenv("LOADMASTER_MEMORY_LIMIT", "1MiB")
    assert "too large" in printed(capsys)


def test_where_there_is_nothing_it_says_where_it_looked_and_what_to_do(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without models the command prints where it looked and what to do, and exits with 0."""
    said = printed(capsys)
    assert all(text in said for text in (str(folder), str(folder.parent / "ollama"), "LOADMASTER_MODELS"))
    assert json.loads(printed(capsys, "--json")) == []
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'loadmaster[hub]'" in printed(capsys)


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_place_that_cannot_be_listed_is_told(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A place that cannot be listed is printed with its problem, and in JSON as an object without a name."""
    wrong = folder / "wrong"
    if kind == "a file":
        wrong.touch()
    monkeypatch.setenv("LOADMASTER_MODELS", str(wrong))
    assert "cannot be read: " in printed(capsys)
    (row,) = json.loads(printed(capsys, "--json"))
    assert (row["name"], row["place"]) == ("", f"the folder {wrong}") and str(wrong) in row["problem"]


def test_names_cannot_command_the_terminal(folder: Path, model: bytes) -> None:
    """A file whose name has control characters is listed without a name, and markup is printed as text."""
    (folder / "a\x1b[2Jb.gguf").write_bytes(model)
    (folder / "[red]c.gguf").write_bytes(model)
    found = rows(Catalog([Folder(folder)]))
    assert [row.name for row in found] == ["[red]c"]
    assert any(line.startswith("[red]c ") for line in command.table_of(found))


class Slow:
    """A place where listing takes long."""

    location = "the attic"

    def find(self, name: str) -> None:
        """Find nothing, after a while."""
        time.sleep(0.05)

    def names(self) -> Iterable[str]:
        """Yield many names."""
        return map(str, range(20))


@pytest.fixture
def terminal() -> Iterator[Console]:
    """Yield a terminal that keeps what is shown."""
    yield Console(file=io.StringIO(), force_terminal=True, width=80)


def test_what_takes_long_shows_how_far_it_is(terminal: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is shown on a terminal once listing has taken long."""
    monkeypatch.setattr(command, "PATIENCE_S", 0.2)
    with command.progress_on(terminal) as progress:
        assert list(command.read_rows(Catalog([Slow()]), a_core(), LlamaEngine(), progress)) == []
    file = terminal.file
    assert isinstance(file, io.StringIO) and "Reading models" in file.getvalue()


@pytest.mark.parametrize("console", [Console(file=io.StringIO(), force_terminal=True), Console(file=io.StringIO())])
def test_what_is_quick_or_shown_to_nobody_shows_no_progress(console: Console) -> None:
    """Nothing shows progress where listing is quick or the output is no terminal."""
    with command.progress_on(console) as progress:
        assert list(command.read_rows(Catalog(), a_core(), LlamaEngine(), progress)) == []
    assert isinstance(console.file, io.StringIO) and console.file.getvalue() == ""


LONG_NAMES = ("Meta-Llama-3.1-8B-Instruct-Q4_K_M-imat", "模型-" * 12 + "x", "a name of several words " * 4 + "b")


@pytest.mark.parametrize("columns", ["20", "80", "300"])
def test_u55_every_model_is_one_line_with_its_whole_name(
    capsys: pytest.CaptureFixture[str], folder: Path, model: bytes, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    """However narrow the terminal and however long the name, a line has a model's name whole, and all about it."""
    monkeypatch.setenv("COLUMNS", columns)
    for name in LONG_NAMES:
        (folder / f"{name}.gguf").write_bytes(model)
    (folder / "broken.gguf").write_bytes(b"GGUF, it says, and goes on and on")
    lines = printed(capsys).splitlines()
    for name in LONG_NAMES:
        (line,) = (line for line in lines if name in line)
        assert "423.3 KiB" in line and line.endswith("fits")
    assert len([line for line in lines if "cannot be read" in line]) == 1


def test_u55_folders_can_be_named(capsys: pytest.CaptureFixture[str], folder: Path, model: bytes) -> None:
    """With folders as arguments their models are listed and no others; what is no folder is wrong use."""
    (folder / "here.gguf").write_bytes(model)
    for name in ("one", "two"):
        (folder.parent / name).mkdir()
        (folder.parent / name / f"{name}.gguf").write_bytes(model)
    listed = json.loads(printed(capsys, "--json", str(folder.parent / "one"), str(folder.parent / "two")))
    assert [(row["name"], row["place"]) for row in listed] == [
        (name, f"the folder {folder.parent / name}") for name in ("one", "two")
    ]
    (empty := folder.parent / "empty").mkdir()
    assert str(empty) in printed(capsys, str(empty)) and str(folder) not in printed(capsys, str(empty))
    for wrong in (str(folder / "here.gguf"), str(folder / "missing")):
        assert cli.main(["models", wrong]) == 2
        told = capsys.readouterr()
        assert told.out == "" and wrong in told.err and "a folder" in told.err and told.err.count("\n") == 1


@pytest.mark.parametrize("left", [100, 300, 1000, 5000, 430_000])
def test_u55_a_download_that_stopped_says_how_far_it_came(folder: Path, model: bytes, left: int) -> None:
    """Wherever a file was cut, the problem has its bytes, and the bytes that it has at least."""
    (folder / "part.gguf").write_bytes(model[:left])
    (row,) = rows(Catalog([Folder(folder)]))
    found = re.match(r"it is cut short: (\d+) of (at least )?(\d+) bytes", row.problem)
    assert found is not None and int(found[1]) == left < int(found[3]) <= len(model)
    assert (found[2] is None) == (left == 430_000)
