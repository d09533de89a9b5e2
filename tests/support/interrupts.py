"""What a signal handler does to the thread that it interrupts, at every moment of a call, without real signals."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from scheduler.api import pending_lease, scheduler
from scheduler.concurrency import latch, thread_pool
from scheduler.models import measurements
from scheduler.runtime import (
    driver,
    event_stream,
    executor,
    health_monitor,
    memory_sampler,
    pending_request,
    request_broker,
    request_future,
)
from scheduler.runtime.driver import Driver
from tests.support.waiting import LIMIT_S

MODULES = (
    driver, event_stream, executor, health_monitor, latch, measurements, memory_sampler, pending_lease, pending_request,
    request_broker, request_future, scheduler, thread_pool, threading,
)  # fmt: skip  # in which the handler is called
FILES = frozenset(str(module.__file__) for module in MODULES)


def as_main(core_driver: Driver, action: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Run an action on a thread that the driver takes for the main one; fail if the action hangs or raises."""
    raised: list[BaseException] = []

    def run() -> None:
        core_driver._main = threading.get_ident()
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    assert not thread.is_alive(), "the action hangs"
    if raised:
        raise raised[0]


def interrupted(call: Callable[[], object], handler: Callable[[int], object]) -> int:
    """Make a call, calling `handler` with a number from 1 wherever a signal could arrive; return the number of moments.

    These are the moments at which the interpreter looks for signals: after calls of functions of C, at the begin of
    functions of Python, at jumps backwards. A profile function and the events of lines tell them in the same way in
    every version of Python. One moment is left out: Python 3.14 looks between `__enter__` and the block of a `with`
    too (https://github.com/python/cpython/issues/148874), where not even the locks of `threading` are safe.
    """
    count = 0

    def moment() -> None:
        nonlocal count
        count += 1
        handler(count)

    def profile(frame: FrameType, what: str, function: object) -> None:
        entered = what == "c_return" and getattr(function, "__name__", "") == "__enter__"
        if what in ("call", "c_return") and not entered and frame.f_code.co_filename in FILES:
            moment()

    def enter(frame: FrameType, _: str, __: object) -> Any:
        last = frame.f_lasti
        if frame.f_code.co_filename not in FILES:
            return None

        def go_on(frame: FrameType, what: str, _: object) -> Any:
            nonlocal last
            if what == "line":
                before, last = last, frame.f_lasti
                if last < before:
                    moment()
            return go_on

        return go_on

    sys.setprofile(profile)
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(None)
        sys.setprofile(None)
    return count
