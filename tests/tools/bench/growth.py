"""The cost of one decision as more runners are loaded and more requests wait.

The host is full and busy: every runner has a lease but a small one, whose memory is of no use to any request. Every
request that waits, each for a model of its own, waits for a runner to become idle. Only the core is measured, without
threads and processes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

from fsm.core import Core
from fsm.domain.devices import HOST, MIB, DeviceSample
from fsm.domain.options import Options
from fsm.eviction.policies import POLICIES
from fsm.machine.request import ModelId, Purpose, Request, RequestId, RequestSpec
from fsm.messages.commands import Command, Inspect, Launch
from fsm.messages.events import Acquire, Cancel, Event, Inspected, Loaded, Release, Sampled
from fsm.sizing.footprint import Footprint
from fsm.state.core_config import CoreConfig
from fsm.state.model_record import ModelRecord

RUNNERS = (10, 100)
WAITING = (10, 100, 1_000, 10_000)
REPEATS = 30
EACH_BYTES = 100 * MIB
SMALL, SMALL_BYTES = "small", MIB


class Crowd:
    """A core with `runners` runners that fill the host, all but a small one busy, and `waiting` requests for others."""

    def __init__(self, runners: int, waiting: int) -> None:
        limits = CoreConfig(max_queue=2 * waiting + 100, max_runners=2 * runners, max_wait_s=1e9)
        self.core = Core(limits, POLICIES["reuse"])
        self.ids = count(1)
        self.now = 0.0
        capacity = (runners - 1) * EACH_BYTES + SMALL_BYTES
        self.host = DeviceSample(HOST, "cpu", "host", capacity, 2 * capacity)
        self.feed(Sampled((self.host,)))
        for number in range(runners - 1):
            self.acquire(f"busy {number}")
        self.feed(Release(self.acquire(SMALL)))
        for number in range(waiting):
            self.stand_in_line(f"waiting {number}")
        self.reading()  # the reading plans for all of them
        pool = self.core._state
        assert len(pool.runners) == runners and pool.queued == waiting, "the crowd has other runners or requests"

    def feed(self, event: Event) -> list[Command]:
        """Feed the core an event, and the events that its commands lead to at once."""
        self.now += 0.001
        commands = self.core.step(self.now, event)
        for command in commands:
            match command:
                case Inspect(model):
                    size_bytes = SMALL_BYTES if model == SMALL else EACH_BYTES
                    self.feed(Inspected(model, Footprint(fixed=((HOST, size_bytes),))))
                case Launch(runner):
                    self.feed(Loaded(runner))
        return commands

    def acquire(self, model: str) -> RequestId:
        """Request a model; return the request."""
        request = RequestId(next(self.ids))
        self.feed(Acquire(request, RequestSpec(ModelId(model), Options(), Purpose.lease, 0)))
        return request

    def stand_in_line(self, model: str) -> None:
        """Add a waiting request for a model with known metadata; an event for each of thousands would take minutes."""
        pool, id = self.core._state, ModelId(model)
        pool.models[id] = ModelRecord(id)
        pool.models[id].apply_inspection(Footprint(fixed=((HOST, EACH_BYTES),)), pool.next_runner)
        pool.enqueue(Request(RequestId(next(self.ids)), RequestSpec(id, Options(), Purpose.lease, 0), None, self.now))

    def warm(self) -> None:
        """Request a model that is loaded and in use, and release it."""
        self.feed(Release(self.acquire("busy 0")))

    def newcomer(self) -> None:
        """Request a model that is neither loaded nor requested, and cancel."""
        self.feed(Cancel(self.acquire("new")))

    def join(self) -> None:
        """Request a model that other requests wait for, and cancel."""
        self.feed(Cancel(self.acquire("waiting 3")))

    def reading(self) -> None:
        """Read the devices, which show another figure each time: else it would not be planned with."""
        self.host = replace(self.host, free_bytes=self.host.free_bytes ^ 1)
        self.feed(Sampled((self.host,)))


ACTIONS = ("warm", "newcomer", "join", "reading")


def microseconds(crowd: Crowd, name: str) -> float:
    """Return the median time of one action, in microseconds."""
    action = getattr(crowd, name)
    taken = []
    for _ in range(REPEATS):
        begin = time.thread_time_ns()
        action()
        taken.append((time.thread_time_ns() - begin) / 1000)
    return statistics.median(taken)


def rows() -> Iterator[dict[str, Any]]:
    """Yield the medians of every action, for each number of runners and of waiting requests."""
    for runners in RUNNERS:
        for waiting in WAITING:
            crowd = Crowd(runners, waiting)
            yield {"runners": runners, "waiting": waiting} | {name: microseconds(crowd, name) for name in ACTIONS}


def run() -> dict[str, Any]:
    """Return the medians, and the ratio of the largest crowd's cost to the smallest one's; print them."""
    print("one decision of the core, median in µs (asking and giving back are two)")
    print(f"{'runners':>8}{'waiting':>9}" + "".join(f"{name:>12}" for name in ACTIONS))
    found = []
    for row in rows():
        found.append(row)
        print(f"{row['runners']:>8}{row['waiting']:>9}" + "".join(f"{row[name]:>12.1f}" for name in ACTIONS))
    growth = {}
    for runners in RUNNERS:
        few, many = (
            next(row for row in found if (row["runners"], row["waiting"]) == (runners, waiting))
            for waiting in (WAITING[0], WAITING[-1])
        )
        growth[str(runners)] = {name: round(many[name] / few[name], 2) for name in ACTIONS}
        times = ", ".join(f"{name} {ratio:.2f}" for name, ratio in growth[str(runners)].items())
        print(f"{WAITING[-1]:,} waiting cost as many times what {WAITING[0]} do, with {runners} runners: {times}")
    return {"rows": found, "growth": growth}
