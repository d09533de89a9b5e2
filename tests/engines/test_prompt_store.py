"""The files of kept prompts: how many, for how long, and what is left of them when their program has ended."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fsm.domain.options import Options
from scheduler.engines import prompt_store
from scheduler.engines.prompt_store import KeptPrompt, Life, PromptStore
from scheduler.models.measurement_store import Identity
from tests.support.leaks import no_leaks
from tests.support.waiting import assert_soon

A, B, C = ((name, Identity(name, ""), Options(num_ctx=256)) for name in "abc")


@contextmanager
def a_store(base: Path, limit_bytes: int = 100, **limits: float) -> Iterator[PromptStore]:
    with no_leaks():
        store = PromptStore(base, limit_bytes, **limits)
        assert store.folder() is not None
        yield store
        assert store.close(5.0)
        assert not list(base.iterdir())


def keep(store: PromptStore, life: Life, *sizes: int) -> list[str]:
    """Keep prompts of these sizes, as an engine would write them; return the names of their files."""
    names = []
    for slot, size in enumerate(sizes):
        name = store.reserve(life, size)
        assert name is not None
        (folder(store) / name).write_bytes(bytes(size))
        assert store.keep(life, KeptPrompt(slot, name, size, size, 100.0))
        names.append(name)
    return names


def folder(store: PromptStore) -> Path:
    found = store.folder()
    assert found is not None
    return found


def files(store: PromptStore) -> set[str]:
    return {path.name for path in folder(store).iterdir()}


def test_prompts_are_given_back_once_and_to_the_same_life_alone(tmp_path: Path) -> None:
    """A model gets its prompts back with the same files and options, and once."""
    with a_store(tmp_path) as store:
        (name,) = keep(store, A, 10)
        model, identity, _ = A
        assert store.take(B) == store.take((model, Identity("a", "replaced"), A[2])) == ()
        assert store.take((model, identity, Options(num_ctx=512))) == ()
        assert [prompt.name for prompt in store.take(A)] == [name]
        assert store.take(A) == ()
        store.drop([name])
        assert_soon(lambda: not files(store))


def test_the_longest_unused_prompts_make_room(tmp_path: Path) -> None:
    """The files never take more than the limit: the longest unused prompts of other models go, whole models first."""
    with a_store(tmp_path, limit_bytes=100) as store:
        keep(store, A, 30, 20)
        kept = keep(store, B, 40)
        new = keep(store, C, 30)
        assert_soon(lambda: files(store) == {*kept, *new})
        assert store.take(A) == ()


def test_a_prompt_that_has_no_room_is_not_written_and_takes_none(tmp_path: Path) -> None:
    """No prompt makes room that is larger than all of it, and none of a model's own later prompts."""
    with a_store(tmp_path, limit_bytes=100) as store:
        kept = keep(store, A, 60)
        assert store.reserve(B, 101) is None
        assert store.reserve(A, 50) is None
        assert files(store) == set(kept)


def test_a_prompt_that_is_larger_than_expected_is_removed(tmp_path: Path) -> None:
    """The limit holds for what was written, and not only for what was expected."""
    with a_store(tmp_path, limit_bytes=100) as store:
        name = store.reserve(A, 10)
        assert name is not None
        (folder(store) / name).write_bytes(bytes(200))
        assert not store.keep(A, KeptPrompt(0, name, 200, 200, 100.0))
        assert_soon(lambda: not files(store))
        keep(store, B, 100)


def test_prompts_are_forgotten_when_asked_and_after_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's prompts are removed when its user expires it, all others once they are old."""
    monkeypatch.setattr(prompt_store, "CHECK_S", 0.01)
    with a_store(tmp_path, kept_s=0.5) as store:
        keep(store, A, 10)
        kept = keep(store, B, 10)
        store.forget("a")
        assert store.take(A) == ()
        assert_soon(lambda: files(store) == set(kept))
        assert_soon(lambda: not files(store))
        assert store.take(B) == ()


def test_the_files_are_this_users_alone(tmp_path: Path) -> None:
    """Only the owner may enter the folders and read the lock; the names of files tell nothing of models."""
    base = tmp_path / "kept"
    with a_store(base) as store:
        (name,) = keep(store, A, 1)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (base, folder(store))}
        assert modes == {0o700}
        (lock,) = base.glob("*.lock")
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600
        assert len(bytes.fromhex(name)) == 16


@pytest.mark.parametrize("spoil", [lambda base: base.chmod(0o777), lambda base: (base.rmdir(), base.write_text(""))])
def test_a_folder_that_cannot_be_used_is_a_problem_and_nothing_is_kept(
    tmp_path: Path, spoil: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    """Prompts are not written to a folder that others may write to, nor where there is no folder: it is said."""
    base = tmp_path / "kept"
    base.mkdir()
    spoil(base)
    store = PromptStore(base, 100)
    assert store.folder() is None
    assert store.close(5.0)
    assert store.problem.startswith("prompts are not kept: ") and str(base) in store.problem
    assert [record.getMessage() for record in caplog.records] == [store.problem]


_KILLED = """
import os, sys
from pathlib import Path
from scheduler.engines.prompt_store import PromptStore
store = PromptStore(Path(sys.argv[1]), 100)
(store.folder() / "left").write_text("a secret")
print("ready", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_program_left_is_removed_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    """The next start removes the folder of a program that was killed, and only that."""
    arguments, pipe = [sys.executable, "-c", _KILLED, str(tmp_path)], subprocess.PIPE
    programs = [subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    try:
        for program in programs:
            assert program.stdout is not None and program.stdout.readline() == "ready\n"
        assert len(list(tmp_path.glob("*/left"))) == 2
        os.kill(programs[0].pid, signal.SIGKILL)
        programs[0].wait()
        store = PromptStore(tmp_path, 100)
        assert_soon(lambda: len(list(tmp_path.glob("*/left"))) == 1)
        assert store.close(5.0)
        assert len(list(tmp_path.iterdir())) == 2  # the living program's folder and lock
    finally:
        for program in programs:
            program.kill()
            program.communicate()


def test_a_fork_removes_nothing_of_its_parent(tmp_path: Path) -> None:
    """A fork that closes its copy of the store leaves the files to the program that keeps them."""
    with a_store(tmp_path) as store:
        kept = keep(store, A, 10)
        if (child := os.fork()) == 0:
            store.close(1.0)
            os._exit(0)
        os.waitpid(child, 0)
        assert files(store) == set(kept)
