"""The check around tests with real threads and processes finds what is left over."""

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
    """Make the check wait only for a short time."""
    monkeypatch.setattr("tests.support.leaks._SETTLE_S", 0.2)


def leave_a_process() -> int:
    """Start a program that starts another one and ends; return the process id of the other one."""
    return int(subprocess.run([sys.executable, "-c", LEAVING], stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere what loses its parent becomes a child of the first one")
def test_what_a_child_leaves_behind_is_seen(soon: None) -> None:
    """A process that a child leaves behind is found, although its parent has gone."""
    pid = 0
    with pytest.raises(AssertionError, match="left over") as told, no_leaks():
        pid = leave_a_process()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert f"'children': [{pid}]" in str(told.value)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere what loses its parent becomes a child of the first one")
def test_what_a_child_leaves_behind_and_has_ended_is_no_leak() -> None:
    """A process that a child left behind and that has ended is reaped by the check and is no leak."""
    with no_leaks():
        pid = leave_a_process()
        os.kill(pid, signal.SIGKILL)
    assert not psutil.pid_exists(pid)


def test_a_child_that_was_not_reaped_is_seen(soon: None) -> None:
    """A child that was not reaped by the code that started it is found."""
    with pytest.raises(AssertionError, match="children"), no_leaks():
        child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()


def test_a_thread_that_threading_knows_nothing_of_is_seen(soon: None) -> None:
    """A thread that the module threading does not know is found by what it runs."""
    over = threading.Event()

    def linger() -> None:
        over.wait()

    with pytest.raises(AssertionError, match=r"linger"), no_leaks():
        _thread.start_new_thread(linger, ())
    over.set()
