"""The check around tests with real threads and processes sees what is left over."""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from tests.support.leaks import no_leaks

LEAVING = """
import os, time
if (pid := os.fork()) == 0:
    os.close(1)
    time.sleep(600)
    os._exit(0)
print(pid)
"""


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have it not wait long for what does not end."""
    monkeypatch.setattr("tests.support.leaks._SETTLE_S", 0.2)


def leave_a_process() -> int:
    """Have a program start another one, and end; return that one."""
    return int(subprocess.run([sys.executable, "-c", LEAVING], stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere what loses its parent becomes a child of the first one")
def test_what_a_child_leaves_behind_is_seen(soon: None) -> None:
    """Though nothing leads to it from here any more."""
    pid = 0
    with pytest.raises(AssertionError, match="left over") as told, no_leaks():
        pid = leave_a_process()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert f"'children': [{pid}]" in str(told.value)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere what loses its parent becomes a child of the first one")
def test_what_a_child_leaves_behind_and_has_ended_is_no_leak() -> None:
    """The check reaps it, since nothing else can."""
    with no_leaks():
        pid = leave_a_process()
        os.kill(pid, signal.SIGKILL)
    assert not psutil.pid_exists(pid)


def test_a_child_that_was_not_reaped_is_seen(soon: None) -> None:
    """It is for whoever started it to reap it."""
    with pytest.raises(AssertionError, match="children"), no_leaks():
        child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()


def test_a_thread_that_threading_knows_nothing_of_is_seen(soon: None) -> None:
    """By what it runs."""
    over = threading.Event()

    def linger() -> None:
        over.wait()

    with pytest.raises(AssertionError, match=r"linger"), no_leaks():
        _thread.start_new_thread(linger, ())
    over.set()
