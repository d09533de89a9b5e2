"""A trace, replayed through the core on virtual time: devices, loads and stops as they would be without faults."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fsm.core import Core
from fsm.domain.devices import HOST, DeviceSample
from fsm.domain.options import Options
from fsm.eviction.policies import Candidate, EvictionPolicy
from fsm.machine.request import ModelId, Purpose, RequestId, RequestSpec
from fsm.messages.commands import Command, Grant, Inspect, Launch, Reject, Sample, Stop
from fsm.messages.events import Acquire, Event, Exited, Inspected, Loaded, Release, Sampled, Tick
from fsm.sizing.footprint import Footprint
from fsm.state.core_config import CoreConfig
from fsm.verification.state_invariants import check_state
from tests.tools.policies.workload import Trace

STOP_S = 0.1  # from a Stop to its Exited
LONG_S = 1e9  # a keep-alive that never ends, and that no policy takes for infinite


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a policy on a trace."""

    reload_s: float  # seconds of loads, without each model's first
    reloads: int
    mean_wait_s: float
    longest_wait_s: float
    refused: int
    steps: int


class Foreknowing:
    """Belady's rule: the model that is requested again last is evicted first, which needs knowledge of the future."""

    name = "foreknowing"

    def __init__(self, trace: Trace) -> None:
        self.asked: dict[str, list[float]] = {}
        for ask in trace.asks:
            self.asked.setdefault(ask.model, []).append(ask.at)

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the candidates by the time of their next request, the latest first."""
        return sorted(candidates, key=lambda one: (-self._next(now, one.model), one.runner))

    def _next(self, now: float, model: str) -> float:
        times = self.asked[model]
        place = bisect_right(times, now)
        return times[place] if place < len(times) else math.inf


def replay(trace: Trace, capacity: int, policy: EvictionPolicy) -> Result:
    """Return the outcome of a trace on a host of so many bytes."""
    return _World(trace, capacity, policy).run()


class _World:
    def __init__(self, trace: Trace, capacity: int, policy: EvictionPolicy) -> None:
        self.trace = trace
        self.capacity = capacity
        limits = CoreConfig(max_queue=10**6, max_runners=10**6, keep_alive_s=LONG_S)
        self.core = Core(limits, policy)
        self.now = 0.0
        self.ahead: list[tuple[float, int, Event]] = []
        self.order = 0  # of events at one time
        self.occupied: dict[int, int] = {}  # bytes by process that has loaded
        self.wants = {model: RequestSpec(ModelId(model), Options(), Purpose.lease, 0) for model in trace.bytes}
        self.asked: dict[int, tuple[float, float]] = {}  # by request: its time, and how long it holds its lease
        self.waited: list[float] = []
        self.loaded: set[str] = set()
        self.reload_s, self.reloads, self.refused, self.steps = 0.0, 0, 0, 0

    def run(self) -> Result:
        """Run every event, then let loads and stops under way end."""
        self._step(self._read())
        for number, ask in enumerate(self.trace.asks, 1):
            self._pass_until(ask.at)
            self.asked[number] = ask.at, ask.hold_s
            self._step(Acquire(RequestId(number), self.wants[ask.model]))
        self._pass_until(self.now + 1e6)
        assert not self.asked, "a request was never answered"
        check_state(self.core)
        waits = self.waited or [0.0]
        return Result(
            self.reload_s, self.reloads, sum(waits) / len(waits), max(waits), self.refused, self.steps
        )  # fmt: skip

    def _pass_until(self, until: float) -> None:
        while True:
            due, next_at = self.core.deadline(), self.ahead[0][0] if self.ahead else math.inf
            if min(due, next_at) > until:
                self.now = until
                return
            if due < next_at:
                self.now = max(self.now, due)
                self._step(Tick())
            else:
                self.now, _, event = heapq.heappop(self.ahead)
                self._step(event)

    def _after(self, delay_s: float, event: Event) -> None:
        self.order += 1
        heapq.heappush(self.ahead, (self.now + delay_s, self.order, event))

    def _step(self, event: Event) -> None:
        self.steps += 1
        if isinstance(event, Loaded):
            self.occupied[event.runner] = sum(size for _, size in event.resident)
        elif isinstance(event, Exited):
            self.occupied.pop(event.runner, None)
        for command in self.core.step(self.now, event):
            self._perform(command)

    def _perform(self, command: Command) -> None:
        match command:
            case Grant(request):
                asked_at, hold_s = self.asked.pop(request)
                self.waited.append(self.now - asked_at)
                self._after(hold_s, Release(request))
            case Reject(request):
                del self.asked[request]
                self.refused += 1
            case Inspect(model):
                self._after(0.0, self._read())
                self._after(0.0, Inspected(model, Footprint(fixed=((HOST, self.trace.bytes[model]),))))
            case Launch(runner, model, _, placement):
                self._after(self.trace.load_s[model], Loaded(runner, None, placement.bytes))
                if model in self.loaded:
                    self.reload_s += self.trace.load_s[model]
                    self.reloads += 1
                self.loaded.add(model)
            case Stop(runner):
                self._after(STOP_S, Exited(runner, 0))
            case Sample():
                self._after(0.0, self._read())
            case _:
                pass

    def _read(self) -> Sampled:
        free = self.capacity - sum(self.occupied.values())
        device = DeviceSample(HOST, "cpu", "host", self.capacity, free)
        return Sampled((device,), number=self.core._state.samples)


def policies(trace: Trace, named: Mapping[str, EvictionPolicy]) -> dict[str, EvictionPolicy]:
    """Return the policies to compare, with the one that knows the future."""
    oracle = Foreknowing(trace)
    return {**named, oracle.name: oracle}
