"""Models that share too few places: drawn traffic, and a machine that serves it on virtual time as the core decides.

Every model takes one place, so with one place each change of models is a swap: the loaded runner ends, the next model
loads. A runner answers `slots` requests at once; requests that were granted without a slot wait inside the engine,
first come, first served. A request has waited when its answer begins, wherever it waited.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass, field
from random import Random

from fsm.core import Core
from fsm.domain.devices import HOST, DeviceSample
from fsm.domain.options import Options
from fsm.eviction.policies import POLICIES
from fsm.machine.request import ModelId, Purpose, RequestId, RequestSpec
from fsm.machine.runner import RunnerId
from fsm.messages.commands import Command, Grant, Inspect, Launch, NotifyContention, Sample, Stop
from fsm.messages.events import Acquire, Event, Exited, Inspected, Loaded, Release, Sampled, Tick
from fsm.sizing.footprint import Footprint
from fsm.state.core_config import CoreConfig

MODELS = tuple(map(ModelId, "abcdef"))
SIZE = 2**30  # bytes of a model, and of a place
WANTS = [RequestSpec(model, Options(), Purpose.lease, 0) for model in MODELS]


@dataclass(frozen=True, slots=True)
class Case:
    """A machine and its traffic."""

    name: str
    slots: int  # answers at once
    service_s: float  # an answer takes, on average; lognormal, its standard deviation as large as its mean
    loads_s: tuple[float, ...]  # of each model
    stop_s: float
    zipf: float  # popularity of the n-th model: 1 / n ** zipf
    places: int = 1  # models that are loaded at the same time


@dataclass(frozen=True, slots=True)
class Order:
    """How waiting requests are ordered: the core's limits, and whether it is told of one request at a time."""

    name: str
    limits: CoreConfig
    one_by_one: bool = False


CASES = {
    case.name: case
    for case in (
        Case("16 answers at once", 16, 10.0, (8.0, 10.0, 12.0), 1.0, 1.0),
        Case("4 answers at once", 4, 10.0, (8.0, 10.0, 12.0), 1.0, 1.0),
        Case("one answer at a time", 1, 2.0, (2.0, 2.0, 2.0), 0.5, 1.0),
    )
}
EVERYBODY = 10**9  # requests may wait
ORDERS = {
    order.name: order
    for order in (
        Order(
            "strict order", CoreConfig(max_queue=EVERYBODY, max_wait_s=math.inf, min_residency_s=0.0), one_by_one=True
        ),
        Order("warm first", CoreConfig(max_queue=EVERYBODY, max_wait_s=math.inf, min_residency_s=0.0)),
        Order("bound alone", CoreConfig(max_queue=EVERYBODY, min_residency_s=0.0)),
        Order("ours", CoreConfig(max_queue=EVERYBODY)),
    )
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the traffic."""

    at: float
    model: int
    service_s: float


@dataclass(slots=True)
class Outcome:
    """The outcome of one seed."""

    waits_s: list[list[float]]  # by model
    swaps: int  # loads
    swapping_s: float  # spent on loads and stops of runners
    waited_s: float  # during which a request waited for a runner
    useless: int  # runners that were stopped without having served a request

    @property
    def livelocked(self) -> bool:
        """Whether swaps and not answers kept the machine busy, for most of the time in which requests waited."""
        return bool(self.useless) or self.swapping_s > self.waited_s / 2 > 0


def draw_traffic(case: Case, load: float, seed: int, seconds: float) -> list[Arrival]:
    """Return requests at random times, of exactly `load` answer seconds per second of a slot over all of them."""
    draw = Random(f"{case.name} {load} {seed}")
    shares = [1 / place**case.zipf for place in range(1, len(case.loads_s) + 1)]
    models = range(len(shares))
    sigma = math.sqrt(math.log(2.0))  # of a lognormal distribution whose standard deviation is its mean
    found: list[tuple[float, int, float]] = []
    at = draw.expovariate(load * case.slots / case.service_s)
    while at < seconds:
        found.append((at, draw.choices(models, shares)[0], draw.lognormvariate(0.0, sigma)))
        at += draw.expovariate(load * case.slots / case.service_s)
    scale = load * case.slots * seconds / sum(work for _, _, work in found)
    return [Arrival(at, model, work * scale) for at, model, work in found]


@dataclass(slots=True)
class _Runner:
    """A runner's process and its requests."""

    model: ModelId
    loaded: bool = False
    busy: int = 0  # slots
    inside: deque[int] = field(default_factory=deque)  # requests that are granted and have no slot yet
    served: int = 0


class Machine:
    """One place for a model, the traffic, and a core that decides."""

    def __init__(self, case: Case, order: Order, traffic: list[Arrival]) -> None:
        self.case, self.order, self.traffic = case, order, traffic
        self.core = Core(order.limits, POLICIES["lru"])
        self.now = 0.0
        self.begun: list[float] = [math.inf] * len(traffic)  # when each request's answer began
        self.runners: dict[RunnerId, _Runner] = {}
        self.of: dict[int, RunnerId] = {}  # the runner of each request that was granted
        self.outside: deque[int] = deque()  # requests that the core was not told of
        self.heard = False  # the core has a request that waits
        self.outcome = Outcome([[] for _ in case.loads_s], 0, 0.0, 0.0, 0)
        self.heap: list[tuple[float, int, Event | int]] = []  # what happens next: a number is a request that arrives
        self._numbers = itertools.count()

    def run(self) -> Outcome:
        """Serve all of the traffic."""
        for index, arrival in enumerate(self.traffic):
            self._later(arrival.at, index)
        self._step(self._sampled())
        while self.heap or self.core._state.queued:
            before, waiting = self.now, self.core._state.queued or self.outside
            self._next()
            self.outcome.waited_s += self.now - before if waiting else 0.0
            while self.outside and not (self.heard and self.order.one_by_one):
                self._ask(self.outside.popleft())
        for arrival, begun in zip(self.traffic, self.begun, strict=True):
            assert begun < math.inf, "a request was never served"
            self.outcome.waits_s[arrival.model].append(begun - arrival.at)
        return self.outcome

    def _next(self) -> None:
        deadline = self.core.deadline()
        if not self.heap or deadline <= self.heap[0][0]:
            assert deadline < math.inf, "a request waits without a deadline or an event"
            self.now = max(self.now, deadline)
            self._step(Tick())
            return
        self.now, _, what = heapq.heappop(self.heap)
        match what:
            case int():
                self.outside.append(what)
            case Release(request):
                runner = self.runners[self.of[request]]
                runner.busy -= 1
                self._step(what)
                self._begin(runner)
            case Loaded(id):
                self.runners[id].loaded = True
                self._step(what)
            case Exited(id):
                self.outcome.useless += not self.runners.pop(id).served
                self._step(what)
            case _:
                raise AssertionError(what)

    def _ask(self, index: int) -> None:
        self.heard = True
        self._step(Acquire(RequestId(index), WANTS[self.traffic[index].model]))

    def _step(self, event: Event) -> None:
        for command in self.core.step(self.now, event):
            self._perform(command)

    def _perform(self, command: Command) -> None:
        case = self.case
        match command:
            case Grant(request, id):
                assert id is not None
                self.heard = False
                self.of[request] = id
                self.runners[id].inside.append(request)
                self._begin(self.runners[id])
            case Launch(id, model):
                self.runners[id] = _Runner(model)
                load_s = case.loads_s[MODELS.index(model)]
                self.outcome.swaps += 1
                self.outcome.swapping_s += load_s
                self._later(self.now + load_s, Loaded(id, None, ((HOST, SIZE),)))
            case Stop(id):
                self.outcome.swapping_s += case.stop_s
                self._later(self.now + case.stop_s, Exited(id, 0))
            case Sample():
                self._step(self._sampled())
            case Inspect(model):
                self._step(self._sampled())
                self._step(Inspected(model, Footprint(fixed=((HOST, SIZE),))))
            case NotifyContention():
                pass
            case _:
                raise AssertionError(command)

    def _begin(self, runner: _Runner) -> None:
        """Answer the requests for which there is a slot."""
        while runner.inside and runner.busy < self.case.slots:
            request = runner.inside.popleft()
            runner.busy += 1
            runner.served += 1
            self.begun[request] = self.now
            self._later(self.now + self.traffic[request].service_s, Release(RequestId(request)))

    def _sampled(self) -> Sampled:
        resident = tuple((id, ((HOST, SIZE),)) for id, runner in self.runners.items() if runner.loaded)
        capacity = SIZE * self.case.places
        host = DeviceSample(HOST, "cpu", "host", capacity, capacity - SIZE * len(resident))
        return Sampled((host,), resident, self.core._state.samples)

    def _later(self, at: float, what: Event | int) -> None:
        heapq.heappush(self.heap, (at, next(self._numbers), what))
