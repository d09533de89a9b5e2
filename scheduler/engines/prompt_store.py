"""The prompts that one program keeps from a runner to the next: files of slots, bounded in bytes and in time.

The engine writes and reads the files; this store names them, counts them and removes them. They hold what was asked.
So their folder is new for each program and this user's alone, and is removed when the program closes its scheduler.
Where a program was killed, the next one removes it: a folder whose lock file is not locked has no owner any more.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import filelock

from fsm.domain.options import Options
from fsm.machine.request import ModelId
from scheduler.concurrency.latch import Latch
from scheduler.models.measurement_store import Identity

log = logging.getLogger("loadmaster")

KEPT_S = 3600.0  # how long a prompt is kept at most
READY_S = 1.0  # how long a launch waits for the folder
CHECK_S = 10.0  # between two looks at what has become too old
PREFIX, LOCK = "prompts-", ".lock"
NAME_BYTES = 16

Life = tuple[ModelId, Identity, Options]  # a model, its files as they are, and load options: what a prompt belongs to


@dataclass(frozen=True, slots=True)
class KeptPrompt:
    """The saved state of one slot."""

    slot: int
    name: str  # of its file
    tokens: int
    bytes: int
    tokens_per_s: float  # at which its runner computed prompts


@dataclass(slots=True)
class _Saved:
    prompts: list[KeptPrompt]
    at: float


class PromptStore:
    """Knows the prompts of one scheduler; safe to use from any thread. Files are removed on a thread of its own.

    `forget` and `drop` wait for no lock: they may be called in signal handlers, and by threads that others wait for.
    """

    def __init__(self, folder: Path, limit_bytes: int, kept_s: float = KEPT_S) -> None:
        self.problem = ""  # why no prompts are kept, in a sentence
        self.limit_bytes = limit_bytes
        self._base = folder
        self._kept_s = kept_s
        self._owner = os.getpid()
        self._lock = threading.Lock()  # guards the tables below; held for no file
        self._saved: dict[Life, _Saved] = {}  # the longest unused first
        self._writing: dict[str, int] = {}  # files that are being written -> bytes
        self._folder: Path | None = None  # set when the folder is there and locked
        self._locked: filelock.BaseFileLock | None = None
        self._ready = Latch()  # the folder is there, or cannot be made
        self._forgetting: dict[ModelId, None] = {}  # models that `forget` was called for, until the thread has seen it
        # jobs of the thread: names of files to remove; a model to forget; None: close
        self._jobs: queue.SimpleQueue[tuple[str, ...] | ModelId | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="loadmaster-prompts", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the system allows no more threads now
            self._give_up(error)

    def folder(self) -> Path | None:
        """Return the folder of this program's files; None where there is none within a second."""
        self._ready.wait(READY_S)
        return self._folder

    def take(self, life: Life) -> tuple[KeptPrompt, ...]:
        """Return the prompts kept for a runner that is launched, and forget them: `drop` removes their files."""
        with self._lock:
            saved = self._saved.pop(life, None) if life[0] not in self._forgetting else None
        return tuple(saved.prompts) if saved is not None else ()

    def reserve(self, life: Life, size_bytes: int) -> str | None:
        """Return a new name for a file of about this size; prompts of other lives make room. None: it has no room.

        It has none where it would take more than half of what is free on the disk.
        """
        with suppress(OSError):
            if self._folder is None or 2 * size_bytes > shutil.disk_usage(self._folder).free:
                return None
        with self._lock:
            if self._held(life) + size_bytes > self.limit_bytes:
                return None
            name = secrets.token_hex(NAME_BYTES)
            self._writing[name] = size_bytes
            removed = self._make_room(life)
        self.drop(removed)
        return name

    def keep(self, life: Life, prompt: KeptPrompt) -> bool:
        """Keep a prompt whose file was written under a reserved name; return False where it is too large after all."""
        with self._lock:
            self._writing.pop(prompt.name, None)
            saved = self._saved.pop(life, None) or _Saved([], 0.0)
            self._saved[life] = saved  # last: used most recently
            kept = self._held(life) + prompt.bytes <= self.limit_bytes
            if kept:
                saved.prompts.append(prompt)
                saved.at = time.monotonic()
            elif not saved.prompts:
                del self._saved[life]
            removed = self._make_room(life)
        self.drop(removed if kept else [*removed, prompt.name])
        return kept

    def forget(self, model: ModelId) -> None:
        """Forget a model's prompts, have their files removed, and return at once."""
        self._forgetting[model] = None
        self._jobs.put(model)

    def drop(self, names: Iterable[str]) -> None:
        """Have files removed, written or not, and return at once."""
        self._jobs.put(tuple(names))

    def close(self, timeout_s: float) -> bool:
        """Remove the folder and end the thread; return whether that was done in time. Does nothing in a fork."""
        if os.getpid() != self._owner or self._thread.ident is None:
            return True
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _held(self, *lives: Life) -> int:
        """Return the bytes of the prompts of some lives, and of all files that are being written."""
        kept = (one.bytes for life in lives if life in self._saved for one in self._saved[life].prompts)
        return sum(self._writing.values()) + sum(kept)

    def _make_room(self, life: Life) -> list[str]:
        """Forget prompts of other lives, the longest unused first, until the limit holds; return their files."""
        held = self._held(*self._saved)
        removed: list[str] = []
        for other in [other for other in self._saved if other != life]:
            if held <= self.limit_bytes:
                break
            prompts = self._saved.pop(other).prompts
            held -= sum(one.bytes for one in prompts)
            removed += [one.name for one in prompts]
        return removed

    def _run(self) -> None:
        try:
            self._open()
        except Exception as error:  # no such folder, no right to write, a file system that cannot lock
            self._give_up(error)
        while (job := self._next_job()) is not None:
            if isinstance(job, str):
                self._forget(job)
                self._forgetting.pop(job, None)
            else:
                self._unlink(job)
        if self._folder is not None and self._locked is not None:
            _remove(self._folder, self._locked)

    def _give_up(self, error: Exception) -> None:
        self.problem = f"prompts are not kept: {error}"
        log.warning("%s", self.problem)
        self._ready.set()

    def _open(self) -> None:
        self._base.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self._base.stat()
        if hasattr(os, "getuid") and (found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022):
            raise PermissionError(f"{self._base} is not a folder that this user alone may write to")
        folder = self._base / f"{PREFIX}{secrets.token_hex(NAME_BYTES)}"
        self._locked = _lock(folder)  # before there is a folder: no other program finds it without its lock
        folder.mkdir(mode=0o700)
        self._folder = folder
        self._ready.set()
        for other in self._base.glob(f"{PREFIX}*"):
            if other != folder and other.is_dir() and not other.is_symlink():
                with suppress(filelock.Timeout, OSError):  # Timeout: its program lives
                    _remove(other, _lock(other))

    def _next_job(self) -> tuple[str, ...] | ModelId | None:
        """Return the next job; meanwhile, forget what is too old."""
        while True:
            try:
                return self._jobs.get(timeout=CHECK_S)
            except queue.Empty:
                self._forget()

    def _forget(self, model: ModelId | None = None) -> None:
        """Forget the prompts of a model, and those that are too old."""
        before = time.monotonic() - self._kept_s
        with self._lock:
            lives = [life for life, saved in self._saved.items() if life[0] == model or saved.at <= before]
            removed = [one.name for life in lives for one in self._saved.pop(life).prompts]
        self._unlink(removed)

    def _unlink(self, names: Iterable[str]) -> None:
        for name in names:
            with self._lock:
                self._writing.pop(name, None)
            if self._folder is not None:
                with suppress(OSError):
                    (self._folder / name).unlink(missing_ok=True)


def _lock(folder: Path) -> filelock.BaseFileLock:
    """Return the lock of a program's folder, taken; raises `filelock.Timeout` where another program has it."""
    path = folder.with_name(folder.name + LOCK)
    lock = filelock.FileLock(path, mode=0o600, thread_local=False, blocking=False, fallback_to_soft=False)
    lock.acquire()
    return lock


def _remove(folder: Path, lock: filelock.BaseFileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
    with suppress(OSError):
        folder.with_name(folder.name + LOCK).unlink(missing_ok=True)
