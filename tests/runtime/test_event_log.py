"""The log: what is logged at which level, with which fields, and that no handler delays a decision."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from fsm.machine.request import ModelId
from fsm.messages.decision_log import Decision
from fsm.messages.reasons import Queued
from scheduler import PythonModel, Scheduler, SchedulerError
from scheduler.concurrency.thread_pool import ThreadPool
from scheduler.errors.wording import DECISIONS
from scheduler.runtime.event_log import EventLog
from scheduler.testing import FakeMachine
from tests.support.real import LONG, ROOM_FOR_ONE, SHORT, settings, write_models
from tests.support.waiting import assert_soon

LIMIT_S = 60.0
OWN = {*vars(logging.makeLogRecord({})), "message", "asctime"}  # attributes of every record


class Lines(logging.Handler):
    """A handler that keeps its records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def told(self, level: int) -> list[str]:
        return [each.getMessage() for each in self.records if each.levelno == level and each.name == "loadmaster"]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """Keep all that is logged by any library, at any level."""
    handler, root = Lines(), logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    root.setLevel(before)
    root.removeHandler(handler)


def a_life_with_everything(fake: FakeMachine) -> None:
    """Load, evict, crash, fail to load, back off, refuse and close."""
    fake.model("a", size="5GiB", load="1s").model("b", size="5GiB").model("huge", size="90GiB")
    fake.scheduler.acquire("a").release()
    with fake.scheduler.acquire("b"):
        fake.crash("b", "it fell\nover")
    fake.fail_load("a", "boom")
    for name in ("a", "a", "huge"):
        with suppress(SchedulerError):
            fake.scheduler.acquire(name)


def test_u46_each_kind_of_event_has_a_line_at_its_level(lines: Lines) -> None:
    """Transitions are informed of, failures and refusals are warnings, and decisions are for debugging."""
    with FakeMachine(memory="8GiB") as fake:
        a_life_with_everything(fake)
    assert lines.told(logging.INFO) == [
        "runner 1 of a is loading: request 1 waits for it",
        "runner 1 of a is ready: a lease was granted",
        "runner 1 of a is expiring: b needs its memory",
        "runner 1 of a is unloaded: its memory is free again",
        "runner 2 of b is loading: request 2 waits for it",
        "runner 2 of b is ready: a lease was granted",
        "runner 2 of b is unloaded: its memory is free again",
        "runner 3 of a is loading: request 3 waits for it",
        "runner 3 of a is unloaded: its memory is free again",
        "the scheduler is closed",
    ]
    warned = lines.told(logging.WARNING)
    assert warned[:4] == [
        "runner 2 of b has crashed: it fell; over",
        "runner 3 of a has failed to load: boom",
        "a backs off: it failed with these options, and is not loaded so for 10s",
        "request 3 for a is refused: loading 'a' failed: boom; try again in 10s",
    ]
    assert [line.partition(":")[0] for line in warned[4:]] == [
        "request 4 for a is refused",
        "request 5 for huge is refused",
    ]
    debugged = lines.told(logging.DEBUG)
    assert "request 1 for a is granted: it waited 1.000 s" in debugged
    assert "runner 1 of a is idle: its last lease was released" in debugged


def test_u46_each_line_has_its_values_as_fields(lines: Lines) -> None:
    """A handler that writes JSON finds every value in the record, and needs to read no sentence."""
    with FakeMachine(memory="8GiB") as fake:
        a_life_with_everything(fake)
    entries = [each for each in lines.records if hasattr(each, "event")]
    names = {"event", "what", "model", "runner", "reason", "at_s", "step"}
    for each in entries:
        fields = {name: value for name, value in vars(each).items() if name not in OWN}
        assert fields.keys() == names | (
            {"source", "destination", "leases"} if fields["event"] == "transition" else {"request", "error"}
        )
        json.dumps(fields, allow_nan=False)
    crashed = next(vars(each) for each in entries if vars(each)["what"] == "crash")
    assert (crashed["model"], crashed["runner"], crashed["source"]) == ("b", 2, "ready")
    errors = [vars(each)["error"] for each in entries if vars(each)["what"] == "rejected"]
    assert errors == ["LoadFailed", "LoadFailed", "DoesNotFit"]
    assert {vars(each)["what"] for each in entries if vars(each)["event"] == "decision"} <= DECISIONS.keys()


def test_u46_warm_requests_are_silent_at_info(lines: Lines) -> None:
    """A thousand requests for a loaded model add no line to a log at INFO."""
    logging.getLogger().setLevel(logging.INFO)
    with FakeMachine() as fake:
        fake.model("a")
        for _ in range(50):
            fake.scheduler.acquire("a").release()
        fake.advance("1s")
        assert len(lines.told(logging.INFO)) == 2


def test_u46_logging_that_is_set_up_later_is_heard(lines: Lines) -> None:
    """A scheduler that was made before a handler was added logs to it from then on."""
    root = logging.getLogger()
    root.setLevel(logging.CRITICAL)
    with FakeMachine() as fake:
        fake.model("a").model("b")
        fake.scheduler.acquire("a").release()
        assert not lines.records
        root.setLevel(logging.INFO)
        fake.scheduler.acquire("b").release()
    assert "runner 2 of b is loading: request 2 waits for it" in lines.told(logging.INFO)


def test_u46_a_handler_that_blocks_delays_no_request(lines: Lines) -> None:
    """Requests are granted while a handler hangs, and the last lines are written once it goes on."""
    gate = threading.Event()
    logging.getLogger().setLevel(logging.INFO)
    emit = lines.emit

    def hang(record: logging.LogRecord) -> None:
        assert gate.wait(LIMIT_S)
        emit(record)

    lines.emit = hang  # type: ignore[method-assign]
    with Scheduler(settings(measurement_file=None)) as scheduler:
        for name in ("a", "b"):
            scheduler.acquire(PythonModel(name, load=object), timeout=LIMIT_S).release()
        assert not lines.records
        gate.set()
    assert "runner 2 of b is ready: a lease was granted" in lines.told(logging.INFO)


def test_u46_a_line_that_comes_as_the_last_one_is_written_is_not_left_waiting(lines: Lines) -> None:
    """An entry that is offered when the thread that writes finds none is written without another one."""
    event_log, late = EventLog(10, str, ThreadPool), [Decision(1.0, "queued", ModelId("late"), Queued(2))]
    take = event_log._stream.take

    def take_and_offer(timeout_s: float) -> object:
        if (found := take(timeout_s)) is None and late:
            event_log.offer([late.pop()])
        return found

    event_log._stream.take = take_and_offer  # type: ignore[method-assign,assignment]  # offers meanwhile
    try:
        event_log.offer([Decision(0.0, "queued", ModelId("first"), Queued(1))])
        assert_soon(lambda: [vars(each)["model"] for each in lines.records] == ["first", "late"])
    finally:
        assert event_log.close(LIMIT_S) == []


def test_u46_a_handler_that_raises_loses_its_own_line_only(lines: Lines) -> None:
    """A handler that raises, against the rules of logging, ends neither the log nor the scheduler."""
    emit = lines.emit

    def fail(record: logging.LogRecord) -> None:
        emit(record)
        if "loading" in record.getMessage():
            raise RuntimeError("a handler of the user's")

    lines.emit = fail  # type: ignore[method-assign]
    with FakeMachine() as fake:
        fake.model("a")
        fake.scheduler.acquire("a").release()
    assert "runner 1 of a is ready: a lease was granted" in lines.told(logging.INFO)


def test_u46_without_a_handler_nothing_is_printed() -> None:
    """A program that sets up no logging sees no line of it, also where a model fails."""
    code = (
        "from scheduler import *\n"
        "s = Scheduler(Settings(gpus=False, measurement_file=None))\n"
        "try: s.acquire(PythonModel('a', load=lambda: 1 / 0))\n"
        "except LoadFailed: pass\n"
        "s.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_u46_the_client_is_quiet_and_the_engine_log_is_written(tmp_path: Path, lines: Lines) -> None:
    """No line of the HTTP library for any kind of answer; a killed runner is a warning; the engine's log is a file."""
    folder, file = write_models(tmp_path, "a"), tmp_path / "engine.log"
    file.touch(mode=0o644)
    with (
        Scheduler(settings(memory_limit=ROOM_FOR_ONE, measurement_file=None, engine_log=file)) as scheduler,
        scheduler.acquire(folder / "a.gguf", timeout=LIMIT_S) as lease,
    ):
        lease.chat("hi", **SHORT)
        assert list(lease.stream("hi", **SHORT))
        next(iter(stream := lease.stream("hi", **LONG)))
        stream.close()
        asyncio.run(lease.achat("hi", **SHORT))
        asyncio.run(_streamed(lease))
        with pytest.raises(SchedulerError):
            lease.embed("hi")
        pid = lease.pid or 0
        os.kill(pid, signal.SIGKILL)
        assert_soon(lambda: lines.told(logging.WARNING))
    assert not [each.getMessage() for each in lines.records if each.name.startswith("http")]
    (crashed,) = lines.told(logging.WARNING)
    assert crashed.startswith("runner 1 of a has crashed: killed by SIGKILL")
    assert file.stat().st_mode & 0o777 == 0o600
    written = file.read_text().splitlines()
    assert len(written) > 5 and all(f" a[{pid}]: " in line for line in written)


async def _streamed(lease: object) -> None:
    async for _ in lease.astream("hi", **SHORT):  # type: ignore[attr-defined]
        pass


def test_u46_requests_of_the_program_are_still_logged(lines: Lines) -> None:
    """The HTTP library's lines for the program's own requests are as they were."""
    with httpx2.Client(transport=httpx2.MockTransport(lambda _: httpx2.Response(200))) as client:
        client.get("http://example.invalid/")
    assert [each.name for each in lines.records if each.name == "httpx2"] == ["httpx2"]
