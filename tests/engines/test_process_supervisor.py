"""Child processes: what is heard of them, how they are ended, and that nothing is left of them; real processes only."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest

from scheduler.engines.child_process import Child, Exit, Program
from scheduler.engines.process_supervisor import TAIL_BYTES, ChildLauncher
from tests.support.leaks import no_leaks

LIMIT_S = 10.0  # ten times what anything here is expected to take, and more
NOTICED_S = 5.0  # fifty times the 100 ms within which an exit is noticed, and half of what a probe may take to
LONG_S = 60.0  # a grace that no test waits for

FOREVER = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = os.fork()
if grandchild: print(grandchild, flush=True)
time.sleep(600)
"""


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.exits: list[Exit] = []
        self.threads: set[str] = set()
        self.logs = 0
        self.pulses = 0
        self.pulses_wanted = 0

    def printed(self, line: str) -> None:
        self.threads.add(threading.current_thread().name)
        self.lines.append(line)

    def logged(self, chunk: bytes) -> None:
        self.logs += 1

    def on_tick(self) -> bool:
        self.pulses += 1
        return self.pulses < self.pulses_wanted

    def ended(self, exit: Exit) -> None:
        self.threads.add(threading.current_thread().name)
        self.exits.append(exit)

    def exit(self) -> Exit:
        """Wait for the exit; return it."""
        wait_until(lambda: self.exits)
        assert len(self.exits) == 1
        return self.exits[0]


def wait_until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "the condition did not hold in time"
        threading.Event().wait(0.005)


def is_gone(pid: int) -> bool:
    """Return whether a process has ended, also if it was not reaped."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def start(processes: ChildLauncher, script: str, heard: Heard, input: bytes = b"") -> Child:
    child = Child(Program((sys.executable, "-I", "-S", "-c", script), {}, input), heard)
    processes.start(child)
    return child


def start_and_wait(processes: ChildLauncher, script: str, heard: Heard) -> Child:
    """Start a script and wait for its first line."""
    child = start(processes, script, heard)
    wait_until(lambda: heard.lines)
    return child


@pytest.fixture
def processes() -> Iterator[ChildLauncher]:
    with no_leaks():
        processes = ChildLauncher()
        yield processes
        assert processes.close(LIMIT_S)


@pytest.fixture(params=["pidfd", "polled"])
def either(request: pytest.FixtureRequest, processes: ChildLauncher, monkeypatch: pytest.MonkeyPatch) -> ChildLauncher:
    """Return a launcher, with and without the kernel's means to watch processes."""

    def refused(pid: int, flags: int = 0) -> int:
        raise OSError("not here")

    if request.param == "polled":
        monkeypatch.setattr(os, "pidfd_open", refused)
    return processes


def test_lines_come_in_order_and_before_the_end(either: ChildLauncher) -> None:
    """Every line that a child printed is heard in order, and then its exit."""
    heard = Heard()
    start(either, "import sys\nfor number in range(2000): print(number)\nsys.exit(3)", heard)
    assert heard.exit().code == 3
    assert heard.lines == [str(number) for number in range(2000)]
    assert heard.threads == {"loadmaster-watcher"}


def test_input_arrives_and_its_stream_stays_open(processes: ChildLauncher) -> None:
    """A child reads its input without coming to an end of it."""
    heard = Heard()
    child = start(processes, "import sys\nfor line in sys.stdin: print(line, end='', flush=True)", heard, b"hello\n")
    wait_until(lambda: heard.lines == ["hello"])
    assert not heard.exits
    child.stop(LONG_S)
    assert heard.exit().asked


def test_input_that_finds_no_room_ends_the_child(processes: ChildLauncher) -> None:
    """A child that does not read its input is ended, so that it does not hold the thread that starts children."""
    heard = Heard()
    start(processes, FOREVER, heard, b"x" * (1 << 20))
    exit = heard.exit()
    assert "found room" in exit.reason
    assert exit.code == -signal.SIGKILL and not exit.asked


def test_only_the_last_of_the_log_is_kept(processes: ChildLauncher) -> None:
    """The last lines of a child's log are kept, up to a bound."""
    heard = Heard()
    start(processes, "import sys\nfor number in range(20000): print(number, file=sys.stderr)", heard)
    tail = heard.exit().tail
    assert len(tail) == TAIL_BYTES
    assert tail.endswith("19998\n19999\n")
    assert heard.logs > 0


def test_a_line_that_never_ends_is_dropped(processes: ChildLauncher) -> None:
    """A line without an end is dropped, and the lines after it are heard."""
    heard = Heard()
    start(processes, "import sys\nprint('x' * (1 << 20))\nprint('after')", heard)
    assert heard.exit().code == 0
    assert heard.lines[-1] == "after"
    assert sum(map(len, heard.lines)) < 1 << 18


def test_a_kill_from_outside_is_noticed(either: ChildLauncher) -> None:
    """A kill from outside is reported within a tenth of a second (here: ten times that)."""
    heard = Heard()
    child = start_and_wait(either, FOREVER, heard)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: heard.exits, NOTICED_S)
    assert heard.exit() == Exit(-signal.SIGKILL)


def test_stop_terminates(either: ChildLauncher) -> None:
    """A child that is stopped gets SIGTERM, and its exit says that it was asked for."""
    heard = Heard()
    child = start_and_wait(either, FOREVER, heard)
    child.stop(LONG_S)
    child.stop(LONG_S)
    assert heard.exit() == Exit(-signal.SIGTERM, asked=True)


def test_stop_returns_at_once(processes: ChildLauncher) -> None:
    """A stop returns at once and does not wait for its grace."""
    heard = Heard()
    child = start_and_wait(processes, STUBBORN, heard)
    before = time.monotonic()
    child.stop(LONG_S)
    assert time.monotonic() - before < LIMIT_S
    assert not heard.exits


def test_a_child_that_ignores_sigterm_is_killed_with_what_it_started(either: ChildLauncher) -> None:
    """A child that ignores SIGTERM is killed after the grace with its whole process group."""
    heard = Heard()
    child = start_and_wait(either, STUBBORN, heard)
    grandchild = int(heard.lines[0])
    child.stop(0.2)
    assert heard.exit() == Exit(-signal.SIGKILL, asked=True)
    wait_until(lambda: is_gone(grandchild))


def test_a_child_that_nothing_else_is_due_for_is_killed_after_the_grace(processes: ChildLauncher) -> None:
    """The end of a grace wakes the thread that watches, also when no call of a listener is due any more."""
    heard = Heard()
    child = start_and_wait(processes, STUBBORN, heard)
    wait_until(lambda: heard.pulses == 1)
    child.stop(0.2)
    assert heard.exit().code == -signal.SIGKILL


def test_a_later_stop_may_shorten_the_grace(processes: ChildLauncher) -> None:
    """A later stop may shorten the grace, as a close does."""
    heard = Heard()
    child = start_and_wait(processes, STUBBORN, heard)
    child.stop(LONG_S)
    child.stop(0.0)
    assert heard.exit().code == -signal.SIGKILL


def test_a_later_stop_never_lengthens_the_grace(processes: ChildLauncher) -> None:
    """A child is killed when the grace of the first stop is over, although a later stop has a longer one."""
    heard = Heard()
    child = start_and_wait(processes, STUBBORN, heard)
    child.stop(0.2)
    child.stop(LONG_S)
    assert heard.exit().code == -signal.SIGKILL


def test_what_a_child_leaves_behind_is_killed(either: ChildLauncher) -> None:
    """A child that ends by itself takes its process group with it."""
    heard = Heard()
    child = start_and_wait(either, STUBBORN, heard)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGINT)
    assert not heard.exit().asked
    wait_until(lambda: is_gone(int(heard.lines[0])))


def test_a_child_that_is_stopped_can_be_ended(processes: ChildLauncher) -> None:
    """A child that SIGSTOP has stopped can be ended."""
    heard = Heard()
    child = start_and_wait(processes, FOREVER, heard)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    child.stop(LONG_S)
    assert heard.exit() == Exit(-signal.SIGTERM, asked=True)


def test_a_program_that_is_not_there_never_starts(processes: ChildLauncher) -> None:
    """A program that does not exist has an exit without a code and with the reason."""
    heard = Heard()
    child = Child(Program(("/no/such/program",), {}), heard)
    processes.start(child)
    exit = heard.exit()
    assert exit.code is None and child.pid is None
    assert "No such file" in exit.reason


def test_a_stop_before_the_start_calls_it_off(processes: ChildLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop of a child that waits for its start ends it at once."""
    go_on, begun = threading.Event(), threading.Event()

    class SlowPopen(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            begun.set()
            assert go_on.wait(LIMIT_S)
            super().__init__(*arguments, **keywords)

    monkeypatch.setattr(subprocess, "Popen", SlowPopen)
    first, second = Heard(), Heard()
    slow = start(processes, FOREVER, first)
    waiting = start(processes, FOREVER, second)
    assert begun.wait(LIMIT_S)
    waiting.stop(LONG_S)
    assert second.exit() == Exit(None, "stopped before it began", asked=True)
    slow.stop(LONG_S)  # too late to cancel: the child is ended when it has started
    assert not first.exits
    go_on.set()
    assert first.exit() == Exit(-signal.SIGTERM, asked=True)
    assert waiting.pid is None


def test_a_child_that_is_stopped_and_cannot_be_started_is_let_go(
    processes: ChildLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop of a child whose start then fails leaves nothing that keeps the child in memory."""
    go_on, begun = threading.Event(), threading.Event()

    def fail(*_: Any, **__: Any) -> None:
        begun.set()
        assert go_on.wait(LIMIT_S)
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "Popen", fail)
    heard, stopped = Heard(), threading.Event()
    child = start(processes, FOREVER, heard)
    assert begun.wait(LIMIT_S) and child.watcher is not None
    child.stop(LONG_S)
    child.watcher.post(stopped.set)  # after the stop
    assert stopped.wait(LIMIT_S)
    go_on.set()
    assert heard.exit().code is None
    ended = weakref.ref(child)
    del child
    wait_until(lambda: gc.collect() >= 0 and ended() is None)


def test_a_listener_that_raises_harms_nobody(processes: ChildLauncher) -> None:
    """What a listener raises is logged, the next child is watched, and descriptors are closed."""

    class Broken(Heard):
        def printed(self, line: str) -> None:
            raise RuntimeError("printed")

        def ended(self, exit: Exit) -> None:
            super().ended(exit)
            raise RuntimeError("ended")

    broken, heard = Broken(), Heard()
    start(processes, "print('x')", broken)
    assert broken.exit().code == 0
    start(processes, "print('x')", heard)
    assert heard.exit().code == 0


def test_exits_are_noticed_when_the_host_ignores_sigchld(either: ChildLauncher) -> None:
    """Exits are noticed when the host ignores SIGCHLD, although the exit codes are lost."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        heard = Heard()
        child = start_and_wait(either, FOREVER, heard)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        wait_until(lambda: heard.exits, NOTICED_S)
        assert not heard.exit().asked
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_child_pulses_for_as_long_as_it_is_wanted(processes: ChildLauncher) -> None:
    """A listener is called about once a second until it returns that it need not be."""
    heard = Heard()
    heard.pulses_wanted = 1
    start_and_wait(processes, FOREVER, heard)
    wait_until(lambda: heard.pulses == 1)
    other = Heard()
    start_and_wait(processes, FOREVER, other)
    wait_until(lambda: other.pulses == 1)
    assert heard.pulses == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_of_the_host_kills_nothing(processes: ChildLauncher) -> None:
    """A fork of the host can neither stop nor close children, nor start any."""
    heard = Heard()
    child = start_and_wait(processes, FOREVER, heard)
    copy = os.fork()
    if copy == 0:
        status = 1
        try:
            child.stop(0.0)
            processes.close(1.0)
            try:
                processes.start(Child(child.program, Heard()))
            except RuntimeError:
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) == 0
    assert child.pid is not None and not is_gone(child.pid)
    assert not heard.exits


def test_close_kills_every_child_and_tells_of_it() -> None:
    """After a close no child, thread or descriptor is left, and each exit was reported."""
    with no_leaks():
        processes = ChildLauncher()
        all_heard = [Heard() for _ in range(6)]
        children = [start_and_wait(processes, (FOREVER, STUBBORN)[n % 2], heard) for n, heard in enumerate(all_heard)]
        assert children[0].pid is not None
        os.kill(children[0].pid, signal.SIGSTOP)
        assert processes.close(LIMIT_S)
        assert [len(heard.exits) for heard in all_heard] == [1] * 6
        assert processes.close(LIMIT_S)
        with pytest.raises(RuntimeError):
            start(processes, FOREVER, Heard())
        children[0].stop(0.0)


@pytest.mark.parametrize("refused", ["loadmaster-watcher", "loadmaster-spawner"])
def test_a_thread_that_cannot_be_started_is_started_for_the_next_child(
    refused: str, processes: ChildLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread whose start failed is started again for the next child, and the start of the first child raises."""
    begin = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == refused:
            raise RuntimeError("can't start new thread")
        begin(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        other = ChildLauncher()
        for either in (processes, other):
            with pytest.raises(RuntimeError, match="can't start"):
                start(either, FOREVER, Heard())
        assert other.close(LIMIT_S)
    start_and_wait(processes, FOREVER, heard := Heard())
    assert heard.lines == ["up"]


def test_close_without_any_child_has_nothing_to_do() -> None:
    """A close without any child starts no thread."""
    with no_leaks():
        assert ChildLauncher().close(0.0)


def test_descriptors_are_not_inherited_by_other_programs(processes: ChildLauncher) -> None:
    """A program that the host starts by other means inherits none of the pipes."""
    before = inheritable()
    start_and_wait(processes, FOREVER, Heard())
    assert inheritable() == before


def inheritable() -> set[int]:
    """Return the descriptors of this process that survive an exec."""
    found = set()
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the descriptor that listed the folder
            if os.get_inheritable(fd):
                found.add(fd)
    return found
