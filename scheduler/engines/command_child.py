"""The guard of a user's own program: it starts the program, and ends all that came of it.

Like `llama_child` it is run by its path, and its parent writes one JSON object on a line of standard input (`Order`
defines it) and keeps that stream open. The guard's process is the leader of the group that the program and its children
are in. On Linux it adopts their orphans too: what has left the group ends with the program like the rest of it.

- The order to stop is SIGTERM: the guard stops the program as its order says, and waits for its end. Before that its
  parent writes on a line how many seconds the program has, after which the guard kills it, with all it has started.
- Where the parent is gone, there is no one who would kill the program later: it is killed at once, or stopped by its
  command, where that is how it is stopped.
- When the program has ended, what it has left is killed, and the guard ends as the program did. Where a command stops
  it, that command is run before, if it was not.

On standard output it writes a line of the runner's protocol where the program cannot be run: "failed", with a reason.
What the program writes goes to standard error, all of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Never, TypedDict

sys.path.append(os.path.dirname(os.path.abspath(__file__)))

from llama_child import LINUX_PARENT_DEATH_SIGNAL, PARENT_CHECK_S, read_line, settle, take_over_output, tell

LINUX_ADOPT = 36  # PR_SET_CHILD_SUBREAPER
STOP_COMMAND_S = 15.0  # how long a command that stops the program may take, where the parent is gone


class Order(TypedDict):
    """What the parent orders."""

    parent: int  # the process whose end ends the program
    arguments: list[str]  # the program's path first
    environment: dict[str, str]
    stop: list[str] | int  # a command, or the number of a signal


def control(what: int, value: int) -> None:
    """Set an attribute of this process, where the kernel is Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(what, value, 0, 0, 0)


def start(protocol: int, arguments: Sequence[str], environment: Mapping[str, str], *, quiet: bool = False) -> int:
    """Start a program in this process's group, with nothing to read; return its process. What is quiet is not heard."""
    if started := os.fork():
        return started
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        control(LINUX_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        nothing = os.open(os.devnull, os.O_RDWR)
        for each in (0, 1, 2, protocol) if quiet else (0,):
            os.dup2(nothing, each, inheritable=each != protocol)
        os.execve(arguments[0], list(arguments), dict(environment))  # the pipe of the protocol is closed by it
    except OSError as error:
        tell(protocol, "failed", reason=f"{arguments[0]} could not be run: {error.strerror or error}")
    os._exit(127)


class Guard:
    """A program and what is left of it."""

    def __init__(self, protocol: int, order: Order) -> None:
        self._protocol = protocol
        self._order = order
        self._running = {start(protocol, order["arguments"], order["environment"])}  # the program, and what stops it
        (self._program,) = self._running
        self._status = 0  # of the program, once it has ended
        self._stopping = False
        self._over = False  # the parent writes no more
        self._grace_s = STOP_COMMAND_S if isinstance(order["stop"], list) else 0.0  # where the parent is gone
        self._until = float("inf")  # of the monotonic clock: when what has not ended is killed

    def run(self, woken: int) -> int:
        """Wait for the program's end, and have it come when it should; return how it ended, as `waitpid` tells it."""
        while self._running and (left_s := self._until - time.monotonic()) > 0:
            watched = [woken] if self._over else [woken, 0]
            ready = select.select(watched, [], [], max(0.0, min(PARENT_CHECK_S, left_s)))[0]
            signals = os.read(woken, 1 << 10) if woken in ready else b""
            if 0 in ready:
                self._hear(os.read(0, 1 << 10))
            orphaned = os.getppid() != self._order["parent"]
            if not self._stopping and (self._over or orphaned or signal.SIGTERM in signals):
                self._stopping = True
                self._stop()
            if orphaned:  # the end of standard input may have come before
                self._until = min(self._until, time.monotonic() + self._grace_s)
            self._reap()
            if not self._running and not self._stopping and self._grace_s:  # a container may go on
                self._stopping = True
                self._until = min(self._until, time.monotonic() + self._grace_s)
                self._stop(quiet=True)
        for left in iter(children, []):
            for each in left:
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            self._reap(0)
        return self._status

    def _hear(self, said: bytes) -> None:
        """Take in how long the program has, or that the parent says no more."""
        self._over = not said
        with suppress(ValueError):
            self._until = min(self._until, time.monotonic() + float(said))

    def _stop(self, *, quiet: bool = False) -> None:
        stop = self._order["stop"]
        if isinstance(stop, list):
            self._running.add(start(self._protocol, stop, self._order["environment"], quiet=quiet))
        else:
            with suppress(ProcessLookupError):
                os.kill(self._program, stop)

    def _reap(self, options: int = os.WNOHANG) -> None:
        """Take in the ends of processes, adopted ones too."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, options)) != (0, 0):
                self._running.discard(ended[0])
                self._status = ended[1] if ended[0] == self._program else self._status
                options = os.WNOHANG


def children() -> list[int]:
    """Return the children of this process, adopted ones too; none where the system does not list processes."""
    return list(_children())


def _children() -> Iterator[int]:
    with suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                    yield int(name)


def end_as(status: int) -> Never:
    """End this process as another one has ended."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with suppress(OSError):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def main() -> None:
    """Run as the guard of a program."""
    protocol = take_over_output()
    settle()
    line = read_line()
    order: Order | None = json.loads(line) if line else None
    if order is None or order["parent"] != os.getppid():
        return
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(wake)
    control(LINUX_ADOPT, 1)
    control(LINUX_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    end_as(Guard(protocol, order).run(woken))


if __name__ == "__main__":
    main()
