"""The engine log: what the processes of runners write to standard error, in a file that only its owner may read.

The engine may quote requests there, so that the file may hold prompts: it is written only where a setting names it.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from pathlib import Path

from scheduler.concurrency.thread_pool import ThreadPool
from scheduler.errors.formatting import printable

log = logging.getLogger("loadmaster")

LIMIT_BYTES = 64 << 20  # of the file; it is FILE.1 from then on, in place of the one before it
_WAITING_BYTES = 4 << 20  # that may wait to be written: what comes on top is left out
_LONGEST_LINE = 1 << 16  # a longer line is cut
_FLAGS = os.O_CREAT | os.O_APPEND | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
_FLAGS |= getattr(os, "O_NONBLOCK", 0)  # a pipe in its place must not block


class EngineLog:
    """Appends the lines of all runners to one file, on a thread of its own; the callers never wait for the disk.

    A file that cannot be written is a problem, which is logged once; what comes meanwhile is lost.
    """

    def __init__(self, path: Path) -> None:
        self.problem = ""  # why the file cannot be written, in a sentence
        self._path = path
        self._pool = ThreadPool("loadmaster-engine-log", 1)
        self._waiting_bytes = 0  # roughly: two threads change it
        self._left_out = 0  # lines since the last one that was taken

    def of_runner(self, model: str, key: str = "") -> RunnerLog:
        """Return the log of one runner; the key of its server, where it has one, is never written."""
        return RunnerLog(self, model, key)

    def add(self, lines: list[str]) -> None:
        """Have lines written, and return at once."""
        if self._waiting_bytes > _WAITING_BYTES:
            self._left_out += len(lines)
            return
        if self._left_out:
            lines = [f"({self._left_out} lines are left out: they came faster than they could be written)", *lines]
            self._left_out = 0
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        text = "".join(f"{stamp} {line}\n" for line in lines).encode(errors="replace")
        self._waiting_bytes += len(text)
        self._pool.put(lambda: self._write(text))

    def close(self, timeout_s: float) -> bool:
        """Write what is left and end the thread; return whether it ended."""
        return not self._pool.close(timeout_s)

    def _write(self, text: bytes) -> None:
        self._waiting_bytes -= len(text)
        try:
            file = self._opened()
            try:
                while text:
                    text = text[os.write(file, text) :]
            finally:
                os.close(file)
        except OSError as error:
            if not self.problem:
                log.warning("the engine log cannot be written to %s: %s", printable(str(self._path)), error.strerror)
            self.problem = f"the engine log cannot be written to {self._path}: {error.strerror}"
        else:
            self.problem = ""

    def _opened(self) -> int:
        """Open the file for each piece: other programs may write to it, or put it aside, in between."""
        file = os.open(self._path, _FLAGS, 0o600)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(0, "it is no regular file")
            if stat.S_IMODE(found.st_mode) & 0o077:
                os.fchmod(file, 0o600)
        except OSError:
            os.close(file)
            raise
        if found.st_size < LIMIT_BYTES:
            return file
        os.close(file)
        os.replace(self._path, f"{self._path}.1")
        return os.open(self._path, _FLAGS, 0o600)


class RunnerLog:
    """What one runner's process writes to standard error, as lines of the engine log; used by one thread."""

    def __init__(self, target: EngineLog, model: str, key: str) -> None:
        self._target = target
        self._model = printable(model)
        self._key = key
        self._rest = b""  # the beginning of a line whose end has not come yet

    def write(self, pid: int | None, chunk: bytes) -> None:
        """Take in what the process wrote; whole lines go to the file."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            lines, self._rest = [*lines, self._rest], b""
        if lines:
            self._target.add([self._line(pid, line) for line in lines])

    def end(self, pid: int | None) -> None:
        """Take in that the process is gone: its last line may have no end."""
        if self._rest:
            self.write(pid, b"\n")

    def _line(self, pid: int | None, line: bytes) -> str:
        text = line.decode(errors="replace").rstrip("\r")
        text = text.replace(self._key, "(key)") if self._key else text
        return f"{self._model}[{pid}]: {printable(text)}"
