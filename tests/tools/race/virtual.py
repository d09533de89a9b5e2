"""The race on virtual time: the real core, and a machine whose cores are shared by loads and answers.

    python -m tests.tools.race.virtual --seeds 20

The figures are not llama.cpp's; they show what the order of decisions alone is worth, in a second and on any machine.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import statistics
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fsm.core import Core
from fsm.domain.devices import HOST, MIB, DeviceSample
from fsm.domain.options import Options
from fsm.eviction.policies import POLICIES
from fsm.machine.request import ModelId, Purpose, RequestId, RequestSpec
from fsm.machine.runner import RunnerId
from fsm.messages.commands import Command, Grant, Inspect, Launch, Reject, Sample, Stop
from fsm.messages.events import Acquire, Event, Exited, Inspected, Loaded, Release, Sampled, Tick
from fsm.sizing.footprint import Footprint
from fsm.state.core_config import CoreConfig
from tests.tools.race.trace import Ask, a_trace, percentile

MODEL_BYTES = 200 * MIB


@dataclass(frozen=True, slots=True)
class Machine:
    """The cost of work, in seconds of one core."""

    cores: int = 2
    load_s: float = 0.55  # of a core
    answer_s: float = 0.2  # of a core, whatever other answers are computed
    gap_s: float = 0.002  # between a client's answer and its next request
    stop_s: float = 0.02  # from a Stop to the exit
    slots: int = 1  # answers that a runner computes at once; others wait in it


@dataclass(slots=True, eq=False)
class Job:
    """Work that computes on one thread."""

    left_s: float  # of a core
    end: tuple[str, int]


@dataclass(slots=True)
class Run:
    """The outcome of one race."""

    total_s: float = 0.0
    loads: int = 0
    took_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)


class Track:
    """One race: a closed loop of clients on one core of the scheduler."""

    def __init__(self, trace: Sequence[Ask], clients: int, room: int, machine: Machine, core: Core) -> None:
        self.now, self.core, self.machine, self.run = 0.0, core, machine, Run()
        self._remaining: Iterator[Ask] = iter(trace)
        self._numbers = itertools.count(1)
        self._timed: list[tuple[float, int, tuple[str, int]]] = []
        self._jobs: list[Job] = []
        self._begun: dict[int, float] = {}  # requests under way
        self._busy: dict[int, set[int]] = {}  # by runner: requests that it computes
        self._queues: dict[int, deque[int]] = {}  # by runner: requests that are granted and wait inside it
        self._runner_of: dict[int, int] = {}
        memory = DeviceSample(HOST, "cpu", "", 64 * room * MODEL_BYTES, 64 * room * MODEL_BYTES)
        self._sample = (memory,)
        self._feed(Sampled(self._sample))
        for _ in range(clients):
            self._at(0.0, ("ask", 0))

    def go(self) -> Run:
        """Run to the end."""
        while self._timed or self._jobs or self._begun:
            self._advance()
        self.run.total_s = self.now
        return self.run

    def _advance(self) -> None:
        """Go to the next moment: a time, or the end of the first job."""
        rate = min(1.0, self.machine.cores / len(self._jobs)) if self._jobs else 1.0
        first = min(self._jobs, key=lambda job: job.left_s, default=None)
        done_at = self.now + first.left_s / rate if first else float("inf")
        at = min(done_at, self._timed[0][0] if self._timed else float("inf"))
        tick = self.core.deadline()
        if tick < at and tick != float("inf"):
            at = max(tick, self.now)
        for job in self._jobs:
            job.left_s -= (at - self.now) * rate
        self.now = at
        if first and at >= done_at:
            self._jobs.remove(first)
            self._happens(first.end)
        elif self._timed and self._timed[0][0] <= at:
            self._happens(heapq.heappop(self._timed)[2])
        else:
            self._feed(Tick())

    def _at(self, at: float, what: tuple[str, int]) -> None:
        heapq.heappush(self._timed, (at, next(self._numbers), what))

    def _happens(self, what: tuple[str, int]) -> None:
        kind, number = what
        match kind:
            case "ask":
                self._ask()
            case "loaded":
                self._feed(Loaded(RunnerId(number), None, ((HOST, MODEL_BYTES),)))
            case "exited":
                self._feed(Exited(RunnerId(number), 0))
            case "sampled":
                self._feed(Sampled(self._sample, (), number))
            case "answered":
                self._answered(number)

    def _ask(self) -> None:
        ask = next(self._remaining, None)
        if ask is None:
            return
        number = next(self._numbers)
        self._begun[number] = self.now
        want = RequestSpec(ModelId(ask.model), Options(), Purpose.lease, 0)
        self._feed(Acquire(RequestId(number), want))

    def _answered(self, number: int) -> None:
        runner = self._runner_of.pop(number)
        self._busy[runner].discard(number)
        self.run.took_s.append(self.now - self._begun.pop(number))
        self._work(runner)
        self._feed(Release(RequestId(number)))
        self._at(self.now + self.machine.gap_s, ("ask", 0))

    def _work(self, runner: int) -> None:
        """Start the answers of a runner's waiting requests, as far as it has slots."""
        busy, queue = self._busy.setdefault(runner, set()), self._queues.setdefault(runner, deque())
        while queue and len(busy) < self.machine.slots:
            number = queue.popleft()
            busy.add(number)
            self._jobs.append(Job(self.machine.answer_s, ("answered", number)))

    def _feed(self, event: Event) -> None:
        for command in self.core.step(self.now, event):
            self._obey(command)

    def _obey(self, command: Command) -> None:
        match command:
            case Inspect(model):
                self._feed(Inspected(model, Footprint(fixed=((HOST, MODEL_BYTES),))))
            case Launch(runner):
                self.run.loads += 1
                self._jobs.append(Job(self.machine.load_s, ("loaded", runner)))
            case Stop(runner):
                self._jobs = [job for job in self._jobs if job.end != ("loaded", runner)]
                self._at(self.now + self.machine.stop_s, ("exited", runner))
            case Sample(number):
                self._at(self.now, ("sampled", number))
            case Grant(request, runner):
                assert runner is not None
                self.run.waits_s.append(self.now - self._begun[request])
                self._runner_of[request] = runner
                self._queues.setdefault(runner, deque()).append(request)
                self._work(runner)
            case _:
                assert not isinstance(command, Reject), command


def averages(runs: Sequence[Run]) -> dict[str, float]:
    """Return means over seeds; the percentiles are of all requests together."""
    took = [one for run in runs for one in run.took_s]
    return {
        "total_s": statistics.fmean(run.total_s for run in runs),
        "loads": statistics.fmean(run.loads for run in runs),
        **{f"p{percent}_s": percentile(took, percent) for percent in (50, 95, 99)},
        "max_s": max(took),
    }


def races(limits: CoreConfig, policy: str, machine: Machine, *, requests: int, seeds: int) -> dict[str, float]:
    """Return the averages over seeds of the race's shape: four models, four clients, room for two."""
    runs = []
    for seed in range(1, seeds + 1):
        trace = a_trace(requests, [f"model-{number}" for number in range(1, 5)], exponent=1.0, seed=seed)
        runs.append(Track(trace, 4, 2, machine, Core(limits, POLICIES[policy])).go())
    return averages(runs)


def main(arguments: Sequence[str]) -> int:
    """Print a row for each order of decisions and each number of slots."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.race.virtual", description=__doc__)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--answer", type=float, default=Machine().answer_s, help="seconds of a core for an answer")
    parser.add_argument("--load", type=float, default=Machine().load_s, help="seconds of a core for a load")
    asked = parser.parse_args(arguments)
    variants: Mapping[str, tuple[str, dict[str, Any]]] = {
        "lru": ("lru", {}),
        "lru, residency 0": ("lru", {"min_residency_s": 0.0}),
        "lru, residency 1 s": ("lru", {"min_residency_s": 1.0}),
        "lru, residency 2 s": ("lru", {"min_residency_s": 2.0}),
        "lru, residency 4 s": ("lru", {"min_residency_s": 4.0}),
        "lru, one load at a time": ("lru", {"max_host_loads": 1}),
        "keep-alive, at once": ("keep-alive", {"min_residency_s": 0.0, "max_wait_s": 0.0, "max_host_loads": 1}),
    }
    print(f"{'':<26}{'total':>8}{'loads':>8}{'p50':>8}{'p95':>8}{'p99':>8}{'max':>8}")
    for name, (policy, changes) in variants.items():
        limits = CoreConfig(max_runners=2, **changes)
        machine = Machine(answer_s=asked.answer, load_s=asked.load)
        row = races(limits, policy, machine, requests=asked.requests, seeds=asked.seeds)
        print(f"{name:<26}" + "".join(f"{row[key]:>8.2f}" for key in row))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
