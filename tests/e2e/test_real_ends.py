"""Ends with real child processes: close, exit, Ctrl-C, a fork, and a killed host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from scheduler import RunnerCrashed, Scheduler, SchedulerClosed
from tests.support.real import LONG, SHORT, begin_a_load, is_gone, quiet_end, send, settings, states, write_models
from tests.support.waiting import LIMIT_S, assert_soon

ORPHANED_S = 10.0  # ten times the second within which no child of a killed host is left

pytestmark = pytest.mark.usefixtures("served_by")  # each by the wheel, and by a `llama-server`


@pytest.fixture(autouse=True)
def _quiet_end(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with quiet_end(caplog):
        yield


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    """Yield a scheduler with the machine's memory."""
    with Scheduler(settings()) as scheduler:
        yield scheduler


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), "a") / "a.gguf"


# -- close -------------------------------------------------------------------------------------------------------------


def test_d09_d20_close_during_a_load_answers_and_ends_it(scheduler: Scheduler, model: Path) -> None:
    """D09, D20: closes from several threads during a load answer its request and leave no child."""
    waiting, pid = begin_a_load(scheduler, model)
    with ThreadPoolExecutor(3) as pool:
        for closed in [pool.submit(scheduler.close, 5) for _ in range(3)]:
            closed.result(LIMIT_S)
    assert is_gone(pid) and isinstance(waiting.exception(LIMIT_S), SchedulerClosed)
    with pytest.raises(SchedulerClosed):
        scheduler.acquire(model)
    scheduler.close()


def test_d17_close_breaks_leases_that_nobody_gives_back(scheduler: Scheduler, model: Path) -> None:
    """D17: a close revokes leases that are never released, soon after its time limit."""
    lease = scheduler.acquire(model)
    stream, pid = lease.stream("hello", **LONG), lease.pid
    next(stream)
    begin = time.monotonic()
    scheduler.close("100ms")
    assert time.monotonic() - begin < LIMIT_S and is_gone(pid) and lease.lost
    with pytest.raises(RunnerCrashed, match="closed"):
        lease.chat("hello")
    with pytest.raises(RunnerCrashed, match="closed"):
        list(stream)


def test_close_lets_an_answer_finish(scheduler: Scheduler, model: Path) -> None:
    """A close within its time limit lets an answer finish."""
    with scheduler.acquire(model) as lease:
        whole = lease.chat("hello", **LONG)
        stream = lease.stream("hello", **LONG)
        text = next(stream)
    closing = threading.Thread(target=scheduler.close, args=(LIMIT_S,))
    closing.start()
    assert_soon(lambda: states(scheduler) == {"a": "expiring"})
    assert text + "".join(stream) == whole
    closing.join(LIMIT_S)
    assert not closing.is_alive()


def test_a_callback_may_close(scheduler: Scheduler, model: Path) -> None:
    """A callback may close the scheduler while other threads close it too."""
    closed = threading.Event()

    def close() -> None:
        scheduler.close(0)
        closed.set()

    lease = scheduler.acquire(model)
    lease.on_lost(close)
    send(lease.pid, signal.SIGKILL)
    assert closed.wait(LIMIT_S)


# -- the host ----------------------------------------------------------------------------------------------------------


@contextmanager
def a_host(model: Path, script: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a program that takes a lease and goes on to `script`; yield it and its runner's process id."""
    head = f"""
        import os, signal, sys, threading
        from scheduler import Scheduler, Settings
        model, long = {str(model)!r}, {LONG!r}
        scheduler = Scheduler(Settings(gpus=False, cpu_threads=1))
        lease = scheduler.acquire(model)
        print(lease.pid, flush=True)
    """
    arguments = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(head) + script]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as host:
        try:
            yield host, int(next_line(host))
        finally:
            host.kill()


def next_line(host: subprocess.Popen[str]) -> str:
    """Wait for the next line that a program prints."""
    assert host.stdout is not None
    return host.stdout.readline()


def test_a_host_that_is_killed_leaves_no_orphan(model: Path) -> None:
    """A host that is killed in the middle of an answer leaves no child."""
    with a_host(model, "for piece in lease.stream('hello', **long): print(flush=True)") as (host, child):
        assert next_line(host)
        host.kill()
        assert_soon(lambda: is_gone(child), ORPHANED_S)


ANOTHER = """
while not (pids := {each.pid for each in scheduler.status().runners} - {None, lease.pid}):
    pass
print(*pids)
"""


@pytest.mark.parametrize(
    "end",
    [
        "pass",
        "lease.release()",
        "stream = lease.stream('hello', **long); next(stream)",
        "waiting = scheduler.submit(model, num_batch=64)",
        f"waiting = scheduler.submit(model, embedding=True){ANOTHER}",
        "lease.release(); del lease; scheduler.expire(model)",
        "os.kill(lease.pid, signal.SIGSTOP)",
        "os.kill(lease.pid, signal.SIGKILL)",
    ],
    ids=["lease", "idle", "stream", "queue", "load", "leaving", "hanging", "killed"],
)
def test_a_host_that_exits_without_close_leaves_no_orphan(model: Path, end: str) -> None:
    """A host that exits without a close leaves no child and prints no error, whatever is under way."""
    with a_host(model, end) as (host, child):
        output, errors = host.communicate(timeout=LIMIT_S)
    assert (host.returncode, errors) == (0, "")
    children = [child, *map(int, output.split())]
    assert len(children) == 1 + end.count(ANOTHER)
    assert_soon(lambda: all(map(is_gone, children)), ORPHANED_S)


@pytest.mark.parametrize(
    "script",
    [
        "while True: lease.chat('hello', **long)",
        "with scheduler, lease: threading.Event().wait()",
        "scheduler.acquire(model, num_batch=64)",
        "scheduler.close(60)",
    ],
    ids=["talking", "holding", "waiting", "closing"],
)
def test_ctrl_c_ends_the_host_and_its_child(model: Path, script: str) -> None:
    """Ctrl-C, which the terminal sends to the whole process group, ends the host with one error, and its child."""
    with a_host(model, f"print(flush=True)\n{script}") as (host, child):
        assert next_line(host)
        os.killpg(host.pid, signal.SIGINT)
        _, errors = host.communicate(timeout=LIMIT_S)
    assert host.returncode == -signal.SIGINT and errors.endswith("\nKeyboardInterrupt\n")
    assert_soon(lambda: is_gone(child), ORPHANED_S)


def test_a_signal_handler_may_close(model: Path) -> None:
    """A signal handler may close the scheduler from within a request that waits."""
    script = """
def end(*_):
    scheduler.close(0)
    raise SystemExit(7)
signal.signal(signal.SIGTERM, end)
print(flush=True)
scheduler.acquire(model, num_batch=64)
"""
    with a_host(model, script) as (host, child):
        assert next_line(host)
        host.terminate()
        _, errors = host.communicate(timeout=LIMIT_S)
    assert (host.returncode, errors) == (7, "")
    assert_soon(lambda: is_gone(child), ORPHANED_S)


def test_a_fork_that_ends_takes_no_child_of_its_parent_with_it(model: Path) -> None:
    """A forked child that exits leaves its parent's runner serving."""
    script = f"""
before = lease.chat("hello", **{SHORT!r})
if (pid := os.fork()) == 0:
    sys.exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), lease.chat("hello", **{SHORT!r}) == before, lease.lost)
"""
    with a_host(model, script) as (host, _):
        output, errors = host.communicate(timeout=LIMIT_S)
    assert (output, errors) == ("3 True False\n", "")


def test_a_fork_reads_and_writes_nothing_on_its_parents_connections(model: Path) -> None:
    """A forked child neither reads nor writes on its parent's connections, kept ones and open streams."""
    script = """
from scheduler import SchedulerForked
whole = lease.chat("hello", **long)
stream = lease.stream("hello", **long)
text = next(stream)
asks = [lambda: lease.chat("x"), lambda: list(stream), lambda: lease.url, lambda: list(lease.stream("x"))]
if (pid := os.fork()) == 0:
    refused = 0
    for ask in asks:
        try:
            ask()
        except SchedulerForked:
            refused += 1
    stream.close()
    del stream
    sys.exit(refused)
forked = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(forked, text + "".join(stream) == whole, lease.chat("hello", **long) == whole)
"""
    with a_host(model, script) as (host, _):
        output, errors = host.communicate(timeout=LIMIT_S)
    assert (output, errors) == ("4 True True\n", "")
