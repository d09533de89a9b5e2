"""Child processes: started on one thread, watched on another, ended in bounded time, and never left behind.

POSIX only. Where the kernel has no pidfd (before Linux 5.3, macOS: untested) exits are polled for.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import selectors
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

from scheduler.config.quantities import LONGEST_WAIT_S
from scheduler.engines.child_process import Child, Exit

log = logging.getLogger("loadmaster")

TAIL_BYTES = 8 << 10  # of standard error that is kept
POLL_S = 0.05  # between two polls of a process that has no pidfd
PULSE_S = 1.0
CLOSE_TIMEOUT_S = 5.0

_CHUNK_BYTES = _LINE_BYTES = 1 << 16  # a longer line is no line of a protocol, and is dropped
# read at most from each stream of a process that is gone: other processes may still write to the stream
_LAST_CHUNKS = 16


@dataclass(slots=True, eq=False)
class _RunningChild:
    """A process that was started and is not reaped; only the supervisor's thread uses it."""

    child: Child
    process: subprocess.Popen[bytes]
    pidfd: int | None
    pulse_at: float | None
    reason: str = ""
    line: bytearray = field(default_factory=bytearray)  # of standard output, not ended yet
    tail: bytearray = field(default_factory=bytearray)
    kill_at: float | None = None  # set once the process was told to stop, until it was killed
    asked: bool = False
    killed: bool = False
    over: bool = False

    @property
    def outputs(self) -> list[IO[bytes]]:
        """The process's standard output and error, unless they are closed."""
        return [each for each in (self.process.stdout, self.process.stderr) if each is not None and not each.closed]

    def take_lines(self, chunk: bytes) -> list[str]:
        """Add to standard output; return the lines that are complete now."""
        *lines, rest = (self.line + chunk).split(b"\n")
        self.line = rest if len(rest) <= _LINE_BYTES else bytearray()
        return [line.decode(errors="replace") for line in lines]

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            if self.pidfd is not None:
                signal.pidfd_send_signal(self.pidfd, number)
            else:
                os.kill(self.process.pid, number)

    def kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def is_gone(self) -> bool:
        """Return whether the process has ended, without reaping it, since reaping frees its group's number."""
        if not hasattr(os, "waitid"):  # macOS before Python 3.13: untested
            return self.process.poll() is not None
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # the host ignores SIGCHLD, or reaps every child
            return True


class ChildSupervisor:
    """Notices within 100 ms what children print and how they end, and ends children that must stop, on a daemon thread.

    Everything about a running child happens on that thread: `post` queues a call for it.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = os.pipe()
        for end in (self._woken, self._wake):
            os.set_blocking(end, False)
        self._selector.register(self._woken, selectors.EVENT_READ, lambda: os.read(self._woken, _CHUNK_BYTES))
        self._calls: deque[Callable[[], None]] = deque()
        # so that the pipe is not closed during a wake; reentrant, since a finaliser may post
        self._wake_lock = threading.RLock()
        self._runs: dict[Child, _RunningChild] = {}
        self._stops: dict[Child, float] = {}  # the grace of children that are being started and must stop at once
        self._inputs: dict[Child, bytes] = {}  # of children that are being started, beside their programs' own
        self._children: set[Child] = set()  # handed over and not ended
        self._changed = threading.Condition()  # guards `_children`
        self._ending = False
        self._thread = threading.Thread(target=self._watch, name="loadmaster-watcher", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system allows no more threads now
            self._let_go()
            raise

    def post(self, call: Callable[[], None]) -> None:
        """Queue `call` for the supervisor's thread; does nothing in a fork, or once the supervisor is closed."""
        if os.getpid() != self._owner:
            return
        self._calls.append(call)
        with self._wake_lock:
            if self._wake >= 0:
                with suppress(BlockingIOError):
                    os.write(self._wake, b"\0")

    def add(self, child: Child) -> None:
        """Take a child over, before its start."""
        child.watcher = self
        with self._changed:
            self._children.add(child)

    def started(self, child: Child, process: subprocess.Popen[bytes], reason: str) -> None:
        """Watch a process, or end it at once if `reason` says why.

        On the supervisor's thread, as all methods below but `close`.
        """
        try:
            pidfd = os.pidfd_open(process.pid) if hasattr(os, "pidfd_open") else None
        except OSError:  # no pidfd here, not allowed, or the process is gone already and reaped by the host
            pidfd = None
        run = self._runs[child] = _RunningChild(child, process, pidfd, time.monotonic() + PULSE_S, reason)
        for stream in run.outputs:
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, selectors.EVENT_READ, functools.partial(self._read, run, stream))
        if pidfd is not None:
            self._selector.register(pidfd, selectors.EVENT_READ, functools.partial(self._end, run))
        if (grace_s := self._stops.pop(child, None)) is not None:
            self.stop(child, grace_s)
        elif reason:
            self._kill(run)
        elif (input := self._inputs.pop(child, None)) is not None:
            self.send(child, input)

    def send(self, child: Child, input: bytes) -> None:
        """Write to a child's standard input once it has started, and have its listener's ticks begin again."""
        if (run := self._runs.get(child)) is None:
            if child in self._children:
                self._inputs[child] = input
        elif not run.asked:
            run.pulse_at = time.monotonic() + PULSE_S
            if reason := _feed(run.process, input):
                run.reason = reason
                self._kill(run)

    def stop(self, child: Child, grace_s: float) -> None:
        """Terminate a child, and kill it after `grace_s` seconds."""
        if (run := self._runs.get(child)) is not None:
            kill_at = time.monotonic() + grace_s
            if not run.asked:
                run.asked = True
                for number in (signal.SIGTERM, signal.SIGCONT):  # a stopped process ends only when it is continued
                    run.send(number)
                if run.process.stdin is not None:
                    run.process.stdin.close()
            if not run.killed:
                run.kill_at = kill_at if run.kill_at is None else min(run.kill_at, kill_at)
        elif child.settle():
            self.finish(child, Exit(None, "stopped before it began", asked=True))
        elif child in self._children:
            self._stops[child] = min(grace_s, self._stops.get(child, grace_s))

    def finish(self, child: Child, exit: Exit) -> None:
        """Report a child's end to its listener and forget the child."""
        self._stops.pop(child, None)
        self._inputs.pop(child, None)
        _attempt(functools.partial(child.listener.ended, exit))
        with self._changed:
            self._children.discard(child)
            self._changed.notify_all()

    def close(self, timeout_s: float) -> bool:
        """Kill every child that is left, reap it, and end the thread; return whether that was done in time."""
        end = time.monotonic() + timeout_s
        self._ending = True  # the thread goes on while there are children
        self.post(lambda: None)
        with self._changed:
            for child in self._children:
                child.stop(0.0)
            self._changed.wait_for(lambda: not self._children, timeout_s)
        self._thread.join(max(0.0, end - time.monotonic()))
        return not self._thread.is_alive()

    def _watch(self) -> None:
        while self._children or not self._ending:
            for key, _ in self._selector.select(self._wait_s()):
                _attempt(key.data)
            while self._calls:
                _attempt(self._calls.popleft())
            now = time.monotonic()
            for run in tuple(self._runs.values()):
                _attempt(functools.partial(self._look_at, run, now))
        self._let_go()

    def _let_go(self) -> None:
        with self._wake_lock:
            os.close(self._wake)
            self._wake = -1
        self._selector.close()
        os.close(self._woken)

    def _wait_s(self) -> float | None:
        """Return the seconds until something is due; None: nothing is due unless something happens."""
        times = [at for run in self._runs.values() for at in (run.kill_at, run.pulse_at) if at is not None]
        if any(run.pidfd is None for run in self._runs.values()):
            times.append(time.monotonic() + POLL_S)
        return min(max(0.0, min(times) - time.monotonic()), LONGEST_WAIT_S) if times else None

    def _look_at(self, run: _RunningChild, now: float) -> None:
        if run.kill_at is not None and run.kill_at <= now:
            self._kill(run)
        if run.pulse_at is not None and run.pulse_at <= now:
            run.pulse_at = None
            if run.child.listener.on_tick():
                run.pulse_at = now + PULSE_S
        if run.pidfd is None and run.is_gone():
            self._end(run)

    def _kill(self, run: _RunningChild) -> None:
        run.kill_at = None
        run.killed = True
        run.kill_group()
        run.send(signal.SIGKILL)  # as the process may have left its group

    def _read(self, run: _RunningChild, stream: IO[bytes]) -> bool:
        """Read what is there, up to a limit; return whether there may be more."""
        if stream.closed:
            return False
        try:
            chunk = os.read(stream.fileno(), _CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not chunk:
            self._selector.unregister(stream)
            stream.close()
        elif stream is run.process.stderr:
            run.tail += chunk
            del run.tail[:-TAIL_BYTES]
            _attempt(functools.partial(run.child.listener.logged, chunk))
        else:
            for line in run.take_lines(chunk):
                _attempt(functools.partial(run.child.listener.printed, line))
        return bool(chunk)

    def _end(self, run: _RunningChild) -> None:
        """Reap a process that has ended, and kill what is left of its group."""
        if run.over:
            return
        run.over = True
        for stream in run.outputs:
            any(not self._read(run, stream) for _ in range(_LAST_CHUNKS))
        run.kill_group()  # before the process is reaped, so that the number can't be another group's by now
        code = run.process.wait()
        for stream in run.outputs:
            self._selector.unregister(stream)
            stream.close()
        if run.process.stdin is not None:
            run.process.stdin.close()
        if run.pidfd is not None:
            self._selector.unregister(run.pidfd)
            os.close(run.pidfd)
        del self._runs[run.child]
        self.finish(run.child, Exit(code, run.reason, run.tail.decode(errors="replace"), run.asked))


class ChildLauncher:
    """Starts children, watches them and ends them; its two threads start with the first child.

    One daemon thread starts every process, and lives on: children are killed when the thread that started them ends.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Child | None] = queue.SimpleQueue()  # children to be started; None: no more
        self._watcher: ChildSupervisor | None = None
        self._spawner: threading.Thread | None = None
        self._closed = False

    def start(self, child: Child) -> None:
        """Order a child's start, once, and return at once; the listener hears what follows.

        Raises RuntimeError once the launcher is closed, and in a fork of the process that made it.
        """
        with self._lock:
            self.require()
            if self._watcher is None:
                self._watcher = ChildSupervisor()
            if self._spawner is None:
                name = "loadmaster-spawner"
                spawner = threading.Thread(target=self._spawn, args=(self._watcher,), name=name, daemon=True)
                spawner.start()
                self._spawner = spawner
            self._watcher.add(child)
            self._queue.put(child)

    def require(self) -> None:
        """Raise RuntimeError once the launcher is closed, and in a fork of the process that made it."""
        if os.getpid() != self._owner:
            raise RuntimeError("a fork cannot use its parent's child processes: make a scheduler of its own")
        if self._closed:
            raise RuntimeError("closed: no more processes are started")

    def send(self, child: Child, input: bytes) -> None:
        """Write some KiB to the standard input of a child that was ordered to start, unless it has ended."""
        if child.watcher is not None:
            child.watcher.post(functools.partial(child.watcher.send, child, input))

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Kill the children that are left and end the threads.

        Return whether all were gone in time. In a fork it does nothing.
        """
        if os.getpid() != self._owner:
            return True
        with self._lock:
            self._closed = True
            watcher, spawner = self._watcher, self._spawner
        end = time.monotonic() + timeout_s
        try:
            done = watcher is None or watcher.close(timeout_s)
        finally:
            self._queue.put(None)  # last, since on Linux the end of that thread kills every child that is left
        if spawner is not None:
            spawner.join(max(0.0, end - time.monotonic()))
        return done and (spawner is None or not spawner.is_alive())

    def _spawn(self, watcher: ChildSupervisor) -> None:
        while (child := self._queue.get()) is not None:
            if child.settle():
                watcher.post(_start(child, watcher))
            del child  # an idle thread keeps no child alive


def _start(child: Child, watcher: ChildSupervisor) -> Callable[[], None]:
    """Start a process; return a call for the supervisor's thread that reports the start or its failure."""
    program, pipe = child.program, subprocess.PIPE
    try:  # a new session is a group of its own, and gets no Ctrl-C from the terminal
        process = subprocess.Popen(
            program.arguments, 0, None, pipe, pipe, pipe, env=program.environment, start_new_session=True,
            pass_fds=program.passed,
        )  # fmt: skip
    except Exception as error:  # a file that is missing, no memory for a process, an argument with a zero byte
        return functools.partial(watcher.finish, child, Exit(None, f"could not be started: {error}"))
    child.pid = process.pid
    return functools.partial(watcher.started, child, process, _feed(process, program.input))


def _attempt(call: Callable[[], object]) -> None:
    """Make a call that must not end the supervisor's thread; an exception that it raises is logged."""
    try:
        call()
    except Exception:
        log.exception("a call about a child process failed")


def _feed(process: subprocess.Popen[bytes], input: bytes) -> str:
    """Write the input into the pipe without blocking; return why that failed, or an empty string."""
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    try:
        written = process.stdin.write(input) or 0
    except BrokenPipeError:  # the process is gone already, and its end is reported elsewhere
        return ""
    return "" if written == len(input) else f"only {written} of {len(input)} bytes of input found room in the pipe"
