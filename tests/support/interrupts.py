"""What a signal handler does to the thread that it interrupts, at every moment of a call, without real signals."""

from __future__ import annotations

import dis
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
)  # fmt: skip  # in which the handler is called between instructions
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

    These are the moments at which the interpreter looks for signals: after calls, at the begin of functions, at jumps.
    """
    count = 0

    def enter(frame: FrameType, what: str, _: Any) -> Any:
        code, before = frame.f_code.co_code, ""
        if frame.f_code.co_filename not in FILES:
            return None

        def go_on(frame: FrameType, what: str, _: Any) -> Any:
            nonlocal before, count
            if what == "opcode":
                looks = before.startswith(("CALL", "RESUME", "JUMP_BACK", "POP_JUMP_BACK"))
                before = dis.opname[code[frame.f_lasti]]
                if looks:
                    count += 1
                    handler(count)
            return go_on

        frame.f_trace_opcodes = True
        return go_on

    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(None)
    return count
