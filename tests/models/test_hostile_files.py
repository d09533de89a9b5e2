"""Hostile files: each is refused with file, reason and offset, at once, and within little memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scheduler.errors.exceptions import InvalidModel, ModelNotFound
from scheduler.models.gguf_metadata import read_metadata
from scheduler.models.model_info import ModelInfo
from tests.support.gguf_bytes import TEXT, a_model, array, text
from tests.support.hostile_files import CONTENTS, SOMEWHERE, SOUND, Content, Expected
from tests.support.hostile_places import MAKERS
from tests.tools import fuzz_metadata

LIMIT_S = 0.5  # ten times what the documentation promises
ROOM_BYTES = 64 << 20

# Read files under a limit of the address space, and print those that were neither read nor refused.
_CHILD = """
import json, resource, sys
from scheduler.errors.exceptions import SchedulerError
from scheduler.models.gguf_metadata import read_metadata

first, given, room = json.load(sys.stdin)
read_metadata(first)  # from here on, everything is imported
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + room, resource.RLIM_INFINITY))
wrong = {}
for path, adapters, projectors in given:
    try:
        read_metadata(path, adapters=adapters, projectors=projectors)
        wrong[path] = "it was read"
    except SchedulerError:
        pass
    except BaseException as error:
        wrong[path] = repr(error)
try:
    bytearray(2 * room)  # the reader may have given back some of what it had at first
    wrong["the limit"] = "it does not hold"
except MemoryError:
    pass
print(json.dumps(wrong))
"""


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import the gguf package, which reading the first file does otherwise."""
    path = tmp_path_factory.mktemp("sound") / "m.gguf"
    path.write_bytes(SOUND)
    assert read_metadata(str(path)).context_trained == 64


def check(expected: Expected) -> None:
    """Read a file that should be refused, and check how."""
    begin = time.thread_time()  # the thread's own time on the processor
    with pytest.raises(ModelNotFound if expected.missing else InvalidModel) as caught:
        read_metadata(expected.path, adapters=expected.adapters, projectors=expected.projectors)
    taken_s = time.thread_time() - begin
    assert caught.value.path == expected.wrong
    assert taken_s < LIMIT_S
    if isinstance(error := caught.value, InvalidModel):
        assert re.search(expected.reason, error.reason)
        if expected.at == SOMEWHERE:
            assert error.offset is not None and 0 <= error.offset <= os.path.getsize(expected.wrong)
        else:
            assert error.offset == expected.at


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_s11_what_is_no_model_is_refused_at_once(tmp_path: Path, content: Content) -> None:
    """S11: a file that is no model is refused with one error type that has the file, the reason and the offset."""
    check(content.into(tmp_path))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_s11_what_is_no_file_or_does_not_belong_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], Expected]
) -> None:
    """S11: a path that is no file is never opened, and of several files the wrong one is named."""
    check(make(tmp_path))


def test_s11_what_is_refused_takes_little_memory(tmp_path: Path) -> None:
    """S11: a process reads all hostile files with 64 MiB more than it has after a sound one."""
    (tmp_path / "sound.gguf").write_bytes(a_model(array("tokenizer.ggml.tokens", TEXT, 999, text("token") * 999)))
    makers = [content.into for content in CONTENTS.values()] + [*MAKERS.values()]
    given = []
    for number, make in enumerate(makers):
        folder = tmp_path / str(number)
        folder.mkdir()
        expected = make(folder)
        given.append((expected.path, expected.adapters, expected.projectors))
    asked = json.dumps((str(tmp_path / "sound.gguf"), given, ROOM_BYTES))
    done = subprocess.run([sys.executable, "-c", _CHILD], input=asked, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {}
    for path, *_ in given:
        if os.path.isfile(path):
            os.unlink(path)  # some of them are large


@pytest.mark.parametrize("mode", ["cut", "grown"])
def test_s11_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """S11: a file that is written between the first two reads of it is refused."""
    path = tmp_path / "m.gguf"
    tokens = array("tokenizer.ggml.tokens", TEXT, 1 << 16, text("token") * (1 << 16))
    path.write_bytes(a_model(tokens))
    size, read = path.stat().st_size, os.read

    def read_and_write(descriptor: int, count: int) -> bytes:
        os.truncate(path, 500_000 if mode == "cut" else size + 1)
        return read(descriptor, count)

    monkeypatch.setattr("scheduler.models.bounded_reader.os.read", read_and_write)
    with pytest.raises(InvalidModel, match=r"became shorter while|changed while") as caught:
        read_metadata(str(path))
    assert caught.value.path == str(path)
    monkeypatch.undo()
    path.write_bytes(a_model(tokens))
    assert read_metadata(str(path)).vocabulary == 1 << 16


def test_s11_no_mutant_of_a_sound_file_does_anything_but_load_or_be_refused() -> None:
    """S11: three thousand of the mutated files that `make fuzz-metadata` tries are loaded or refused."""
    result = fuzz_metadata.run(3000, seed=1)
    assert result.failures == []
    assert result.accepted > 300 and result.refused > 300
    assert result.accepted + result.refused == 3000


def test_a_mutant_that_does_anything_else_is_saved_and_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mutated file that is neither loaded nor refused is saved, with the command that makes it again."""

    def fault(path: str, **beside: Any) -> ModelInfo:
        info = read_metadata(path, **beside)
        assert info.context_trained in (0, 64, 512), "the context is not as written"
        return info

    monkeypatch.setattr(fuzz_metadata, "read_metadata", fault)
    monkeypatch.setattr(fuzz_metadata, "SAVED", tmp_path)
    monkeypatch.setattr(sys, "argv", ["fuzz", "--mutations", "20000"])
    assert fuzz_metadata.main() == 1
    first = capsys.readouterr().err
    saved = [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(saved) == 1 and "not as written" in first and str(tmp_path) in first
    monkeypatch.setattr(sys, "argv", ["fuzz", *first.split("tests.tools.fuzz_metadata ")[1].split()])
    assert fuzz_metadata.main() == 1
    again = capsys.readouterr().err
    assert again.split("\n")[-3:] == first.split("\n")[-3:]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == saved
