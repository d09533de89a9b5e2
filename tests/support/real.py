"""What the tests with real child processes share: settings, waiting, and how to stop a process while it loads."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest

from scheduler import Lease, Scheduler, Settings
from scheduler.engines import llama, llama_server_binary
from tests.support.leaks import no_leaks
from tests.support.own_server import chosen
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import assert_soon

STOPPING_CHILD = Path(__file__).with_name("stopping_child.py")
STOPPING_SERVER_CHILD = Path(__file__).with_name("stopping_server_child.py")
ROOM_FOR_ONE = "64MiB"  # a tiny runner takes 35 to 41 MiB, and 25 % more must be free before its first load
ROOM_FOR_TWO = "100MiB"
SHORT: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
LONG: dict[str, Any] = {"temperature": 0, "max_tokens": 900, "ignore_eos": True}  # takes about half a second


@contextmanager
def quiet_end(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail if anything is left over afterwards, or if a warning was logged meanwhile that is about no decision."""
    with no_leaks():
        yield
    warnings = [each for each in caplog.get_records("call") if each.levelno >= logging.WARNING]
    told = [each.getMessage() for each in warnings if not hasattr(each, "event")]
    # a close may have to wait for an answer on a busy machine, and says so; so does a context that is cut
    assert not [text for text in told if not text.startswith("the close waits up to") and "is cut to that" not in text]


def settings(**arguments: Any) -> Settings:
    """Return settings under which models stay on the host, with one thread each, served as `served_by` says."""
    return Settings(**{"gpus": False, "cpu_threads": 1, "llama_server": chosen(), **arguments})


def write_models(folder: Path, names: str) -> Path:
    """Write a tiny model for each letter, trained with a context of 1024 tokens; return the folder."""
    for seed, name in enumerate(names):
        write_tiny_model(folder / f"{name}.gguf", seed=seed, context=1024)
    return folder


def is_gone(pid: int | None) -> bool:
    """Return whether a process has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def states(scheduler: Scheduler) -> dict[str, str]:
    """Return the state of each model's newest runner."""
    return {runner.model: runner.state for runner in scheduler.status().runners}


def send(pid: int | None, number: signal.Signals) -> None:
    """Send a signal to a runner's process."""
    assert pid is not None
    os.kill(pid, number)


@contextmanager
def stopping_loads() -> Iterator[None]:
    """Make each process that is launched meanwhile stop itself before it loads; SIGCONT makes it go on."""
    with (
        patch.object(llama, "CHILD", STOPPING_CHILD),
        patch.object(llama_server_binary, "CHILD", STOPPING_SERVER_CHILD),
    ):
        yield


def begin_a_load(scheduler: Scheduler, model: Path, **asking: Any) -> tuple[Future[Lease], int]:
    """Request a model whose process stops while it loads; return the request and the process id."""
    with stopping_loads():
        waiting = scheduler.submit(model, **asking)
        return waiting, stopped_load(scheduler)


def stopped_load(scheduler: Scheduler, *, after: int = 0) -> int:
    """Wait until the one process that loads, other than `after`, has stopped itself; return its id."""

    def loading() -> int:
        pids = [runner.pid for runner in scheduler.status().runners if runner.state == "loading"]
        return next((pid for pid in pids if pid and pid != after), 0)

    assert_soon(loading)
    pid = loading()
    assert_soon(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return pid
