"""Prefetching real files: which pages are in the page cache afterwards, in which order, and what stops it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler import PythonModel, Scheduler
from scheduler.models.model_spec import ModelSpec
from scheduler.runtime.prefetcher import STEP_BYTES, Prefetcher, _cached, _open
from tests.support.leaks import no_leaks
from tests.support.real import ROOM_FOR_ONE, settings
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import LIMIT_S, assert_soon

STEPS = 3
SIZE = STEPS * STEP_BYTES - 1000


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with no_leaks():
        yield


@pytest.fixture
def a_file(tmp_path: Path) -> Path:
    """Make a file that is not in the page cache, where the system can be told to drop it."""
    path = tmp_path / "a.gguf"
    path.write_bytes(os.urandom(SIZE))
    forget(path)
    return path


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def is_cached(path: Path, at: int, size: int) -> bool:
    with _open(str(path)) as file:
        return _cached(file, at, size)


class Disk:
    """A prefetcher that finds files by their names, and may be told that a model loads."""

    def __init__(self, *paths: Path) -> None:
        self.paths = {path.name: str(path) for path in paths}
        self.loads = threading.Event()
        self.asked: list[str] = []  # the models whose files were asked for, in order
        self.prefetcher = Prefetcher(self.files_of, self.loads.is_set)

    def files_of(self, model: str) -> list[str]:
        self.asked.append(model)
        return [self.paths[name] for name in model.split("+")]

    def __enter__(self) -> Prefetcher:
        return self.prefetcher

    def __exit__(self, *_: object) -> None:
        assert self.prefetcher.close(LIMIT_S) == []


def test_a_file_is_in_the_page_cache_afterwards(a_file: Path) -> None:
    """All pages of a prefetched file are in the page cache."""
    if is_cached(a_file, 0, SIZE):
        pytest.skip("what is in the page cache cannot be told here, or not be dropped")
    with Disk(a_file) as prefetcher:
        prefetcher.ask((("a.gguf", SIZE),))
        assert_soon(lambda: prefetcher.ahead_bytes == SIZE)
        assert prefetcher.copied_bytes > 0
    assert is_cached(a_file, 0, SIZE)


def test_what_is_in_the_page_cache_is_not_read_again(a_file: Path) -> None:
    """Pages in the page cache are not read again."""
    a_file.read_bytes()
    if not is_cached(a_file, 0, SIZE):
        pytest.skip("what is in the page cache cannot be told here")
    with Disk(a_file) as prefetcher:
        prefetcher.ask((("a.gguf", SIZE),))
        assert_soon(lambda: prefetcher.ahead_bytes == SIZE)
        assert prefetcher.copied_bytes == 0


def test_no_more_is_read_than_was_said(a_file: Path) -> None:
    """No byte is read beyond what was asked for."""
    with Disk(a_file) as prefetcher:
        prefetcher.ask((("a.gguf", STEP_BYTES + 5),))
        assert_soon(lambda: not prefetcher._busy)
        assert prefetcher.ahead_bytes == STEP_BYTES + 5


def test_models_are_read_one_after_the_other_and_each_once(a_file: Path, tmp_path: Path) -> None:
    """Models are read one after the other in the order in which they are named, and once each."""
    other = tmp_path / "b.gguf"
    other.write_bytes(bytes(1000))
    disk = Disk(a_file, other)
    with disk as prefetcher:
        for _ in range(2):
            prefetcher.ask((("b.gguf", 1000), ("a.gguf", SIZE)))
            assert_soon(lambda: not prefetcher._busy)
        assert disk.asked == ["b.gguf", "a.gguf"]
        assert prefetcher.ahead_bytes == SIZE + 1000
        prefetcher.ask(())
        prefetcher.ask((("b.gguf", 1000),))  # another wait
        assert_soon(lambda: disk.asked == ["b.gguf", "a.gguf", "b.gguf"])


def test_a_model_of_several_files_is_read_from_the_first_on(a_file: Path, tmp_path: Path) -> None:
    """The bytes that are asked for count over all files of a model, from the first one on."""
    other = tmp_path / "b.gguf"
    other.write_bytes(bytes(1000))
    with Disk(a_file, other) as prefetcher:
        prefetcher.ask((("b.gguf+a.gguf", 3000),))
        assert_soon(lambda: not prefetcher._busy)
        assert prefetcher.ahead_bytes == 3000


def test_nothing_is_read_while_a_model_loads(a_file: Path) -> None:
    """Nothing is read while a model loads, and reading goes on afterwards."""
    disk = Disk(a_file)
    with disk as prefetcher:
        disk.loads.set()
        prefetcher.ask((("a.gguf", SIZE),))
        assert_soon(lambda: disk.asked or prefetcher._readings["a.gguf"].begun)
        assert prefetcher.ahead_bytes == 0
        disk.loads.clear()
        assert_soon(lambda: prefetcher.ahead_bytes == SIZE)


@pytest.mark.parametrize("end", ["another is asked for", "less is asked for", "it is closed"])
def test_it_stops_when(end: str, a_file: Path) -> None:
    """Reading stops between two steps, whatever is left."""
    disk = Disk(a_file)
    with disk as prefetcher:
        disk.loads.set()
        prefetcher.ask((("a.gguf", SIZE),))
        assert_soon(lambda: prefetcher._readings["a.gguf"].begun)
        match end:
            case "another is asked for":
                prefetcher.ask(())
            case "less is asked for":
                prefetcher.ask((("a.gguf", 0),))
            case _:
                assert prefetcher.close(LIMIT_S) == []
        disk.loads.clear()
        assert_soon(lambda: not prefetcher._busy)
        assert prefetcher.ahead_bytes == 0


def test_files_that_cannot_be_read_are_passed_over(a_file: Path, tmp_path: Path) -> None:
    """A missing file, a folder and a pipe are passed over, and the next file is read."""
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    with no_leaks(), Disk(a_file, pipe, folder, tmp_path / "gone") as prefetcher:
        prefetcher.ask((("gone+folder+pipe", SIZE), ("a.gguf", SIZE)))
        assert_soon(lambda: prefetcher.ahead_bytes == SIZE)


def test_an_error_that_nobody_expected_ends_one_reading_only(a_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected error is logged and ends one reading, and the next one is done."""

    def files_of(model: str) -> list[str]:
        if model == "b.gguf":
            raise MemoryError
        return [str(a_file)]

    prefetcher = Prefetcher(files_of, lambda: False)
    prefetcher.ask((("b.gguf", SIZE), ("a.gguf", SIZE)))
    assert_soon(lambda: prefetcher.ahead_bytes == SIZE)
    prefetcher.ask((("b.gguf", SIZE), ("c.gguf", SIZE)))
    assert_soon(lambda: prefetcher.ahead_bytes == 2 * SIZE)
    assert prefetcher.close(LIMIT_S) == []
    assert [each.getMessage() for each in caplog.records] == ["b.gguf could not be read ahead"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
def test_the_thread_gives_way_to_all_others(a_file: Path) -> None:
    """The thread has the lowest priority on the processor and on the disk."""
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    with Disk(a_file) as prefetcher:
        prefetcher.ask((("a.gguf", SIZE),))
        assert_soon(lambda: prefetcher.ahead_bytes == SIZE)
        thread = next(one for one in threading.enumerate() if one.name.startswith("loadmaster-prefetcher"))
        assert os.getpriority(os.PRIO_PROCESS, thread.native_id or 0) == 19
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_a_split_model_is_all_of_its_parts(tmp_path: Path) -> None:
    """A split model is read with all of its parts and the files beside it, in the order of a load."""
    names = [str(tmp_path / f"m-{part:05}-of-00003.gguf") for part in (1, 2, 3)]
    beside = [str(tmp_path / name) for name in ("lora.gguf", "projector.gguf")]
    spec = ModelSpec("m", names[0], adapters=(beside[0],), projectors=(beside[1],))
    assert list(spec.files) == [*names, *beside]
    assert ModelSpec("one", str(tmp_path / "one.gguf")).files == (str(tmp_path / "one.gguf"),)


# -- in the scheduler --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [True, False])
def test_who_waits_for_memory_finds_the_file_read(prefetch: bool, tmp_path: Path) -> None:
    """The file of a model that waits for memory is in the page cache, unless prefetching is switched off."""
    path = write_tiny_model(tmp_path / "tiny.gguf")
    busy = PythonModel("busy", load=lambda: None, memory={"cpu": "60MiB"})  # None is a value like any other
    with Scheduler(settings(memory_limit=ROOM_FOR_ONE, prefetch=prefetch)) as scheduler:
        lease = scheduler.acquire(busy)
        waiting = scheduler.submit(path)
        assert_soon(lambda: any(wait.waits_for == "busy to become idle" for wait in scheduler.status().queue))
        if prefetch:
            assert_soon(lambda: scheduler.debug_state().read_ahead_bytes == path.stat().st_size)
        lease.release()
        waiting.result(LIMIT_S).release()
        assert scheduler.debug_state().read_ahead_bytes == (path.stat().st_size if prefetch else 0)
