"""The nodes of a simulated cluster: the real core of a scheduler, and a replica of Ray Serve for several models."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from fsm.cluster.choice import Wanted, would_wait_longer
from fsm.cluster.digest import ContentId, NodeDigest, NodeId, Offer
from fsm.cluster.digest_of_core import digest_of
from fsm.core import Core
from fsm.domain.devices import HOST, DeviceSample
from fsm.domain.options import Options
from fsm.machine.request import ModelId, Purpose, RequestId, RequestSpec
from fsm.machine.runner import LOADING
from fsm.messages.commands import Command, Grant, Inspect, Launch, Reject, Sample, Stop
from fsm.messages.events import Acquire, Event, Exited, Inspected, Loaded, Release, Sampled, Tick
from fsm.sizing.footprint import Footprint
from fsm.state.core_config import CoreConfig
from tests.tools.policies.workload import Trace

STOP_S = 0.1  # from a Stop to its Exited
LONG_S = 1e9  # a keep-alive that never ends, and that no policy takes for infinite


class Cluster(Protocol):
    """What a node needs of the world that it is in."""

    now: float
    trace: Trace
    slots: int  # answers that a runner computes at once

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Have something happen later."""

    def granted(self, request: int, node: Node) -> None:
        """Tell that a node begins to answer."""

    def launched(self, model: str) -> None:
        """Count a load."""


class Node(Protocol):
    """A node, as the world sees it."""

    def release(self, request: int) -> None:
        """Take note that an answer has ended."""


class CoreNode:
    """A scheduler's core on a host of so many bytes: devices, loads and stops are as they would be without faults."""

    def __init__(self, name: str, cluster: Cluster, capacity: int, loads: int, period_s: float, phase: float) -> None:
        limits = CoreConfig(
            max_queue=10**6, max_runners=10**6, keep_alive_s=LONG_S, max_leases=cluster.slots, max_host_loads=loads
        )
        self.name, self.cluster, self.capacity = NodeId(name), cluster, capacity
        self.core = Core(limits)
        self.offers = offers_of(cluster.trace)
        self.period_s, self.phase = period_s, phase
        self.told: NodeDigest | None = None  # what was told last, at a whole number of periods
        self._changed = True  # since then
        self._occupied: dict[int, int] = {}  # bytes by process that has loaded
        self._due = math.inf
        self.in_flight = 0
        self._step(self._read())

    # -- what fronts see ----------------------------------------------------------------------------------------------

    def digest(self) -> NodeDigest:
        """Return what was told at the last whole number of periods."""
        now = self.cluster.now
        at = math.floor((now - self.phase) / self.period_s) * self.period_s + self.phase
        if self.told is None or at > self.told.at:
            if self._changed or self.told is None:
                self.told = digest_of(at, self.core, self.name, self.offers)
                self._changed = any(runner.state is LOADING for runner in self.core._state.runners.values())
            else:
                self.told = replace(self.told, at=at)
        return self.told

    def judge(self, wanted: Wanted, bound_s: float) -> NodeDigest | None:
        """Return a fresh digest where a request would wait longer than `bound_s`, None where it may be queued."""
        fresh = digest_of(self.cluster.now, self.core, self.name, self.offers)
        return fresh if would_wait_longer(fresh, wanted, bound_s) else None

    # -- what happens -------------------------------------------------------------------------------------------------

    def acquire(self, request: int, model: str) -> None:
        """Take a request."""
        self.in_flight += 1
        self._step(Acquire(RequestId(request), RequestSpec(ModelId(model), Options(), Purpose.lease, 0)))

    def release(self, request: int) -> None:
        """Take a lease back."""
        self.in_flight -= 1
        self._step(Release(RequestId(request)))

    def _step(self, event: Event) -> None:
        self.digest()  # as it was until now
        self._changed = True
        if isinstance(event, Loaded):
            self._occupied[event.runner] = sum(size for _, size in event.resident)
        elif isinstance(event, Exited):
            self._occupied.pop(event.runner, None)
        for command in self.core.step(self.cluster.now, event):
            self._perform(command)
        due = self.core.deadline()
        if due < self._due:
            self._due = due
            self.cluster.after(max(0.0, due - self.cluster.now), lambda: self._tick(due))

    def _tick(self, due: float) -> None:
        if due != self._due:
            return  # an earlier one has come instead
        self._due = math.inf
        if self.core.deadline() <= self.cluster.now:
            self._step(Tick())
        else:
            self._due = next_due = self.core.deadline()
            if next_due < math.inf:
                self.cluster.after(next_due - self.cluster.now, lambda: self._tick(next_due))

    def _perform(self, command: Command) -> None:
        after, trace = self.cluster.after, self.cluster.trace
        match command:
            case Grant(request):
                self.cluster.granted(request, self)
            case Inspect(model):
                after(0.0, lambda: self._step(self._read()))
                size = trace.bytes[model]
                after(0.0, lambda: self._step(Inspected(model, Footprint(fixed=((HOST, size),)))))
            case Launch(runner, model, _, placement):
                self.cluster.launched(model)
                after(trace.load_s[model], lambda: self._step(Loaded(runner, None, placement.bytes)))
            case Stop(runner):
                after(STOP_S, lambda: self._step(Exited(runner, 0)))
            case Sample():
                after(0.0, lambda: self._step(self._read()))
            case _:
                assert not isinstance(command, Reject), command

    def _read(self) -> Sampled:
        free = self.capacity - sum(self._occupied.values())
        return Sampled((DeviceSample(HOST, "cpu", "host", self.capacity, free),), number=self.core._state.samples)


def offers_of(trace: Trace) -> Mapping[ModelId, Offer]:
    """Return what every node has in its catalogue: all models, under names that are their contents."""
    return {ModelId(name): Offer(ContentId(name), (), size) for name, size in trace.bytes.items()}


class RayReplica:
    """A replica of Ray Serve with `@serve.multiplexed(max_num_models_per_replica=most)`, as Ray 2.60 has it.

    It counts models and not bytes, loads one at a time, and unloads the least recently used one whether or not it is in
    use; the answers that are cut off by that are counted, and go on here as if they were not.
    """

    def __init__(self, name: str, cluster: Cluster, most: int) -> None:
        self.name, self.cluster, self.most = name, cluster, most
        self.models: OrderedDict[str, None] = OrderedDict()  # loaded ones, the least recently used first
        self.loading: OrderedDict[str, list[int]] = OrderedDict()  # requests by model; the first one loads now
        self.in_flight = 0
        self.broken = 0  # answers whose model was unloaded under them
        self._busy: dict[str, set[int]] = {}  # answers under way
        self._waiting: dict[str, deque[int]] = {}  # requests that wait for a slot
        self._model_of: dict[int, str] = {}

    def known_models(self) -> set[str]:
        """Return the models that the router is told of: loaded or to be loaded."""
        return {*self.models, *self.loading}

    def acquire(self, request: int, model: str) -> None:
        """Take a request."""
        self.in_flight += 1
        self._model_of[request] = model
        if model in self.models:
            self.models.move_to_end(model)
            self._serve(model, request)
        elif model in self.loading:
            self.loading[model].append(request)
        else:
            self.loading[model] = [request]
            if len(self.loading) == 1:
                self._load()

    def release(self, request: int) -> None:
        """Take an answer's slot back."""
        self.in_flight -= 1
        model = self._model_of.pop(request)
        self._busy.setdefault(model, set()).discard(request)
        if waiting := self._waiting.get(model):
            self._begin(model, waiting.popleft())

    def _load(self) -> None:
        model = next(iter(self.loading))
        if len(self.models) >= self.most:
            victim, _ = self.models.popitem(last=False)
            self.broken += len(self._busy.pop(victim, ()))
        self.cluster.launched(model)
        self.cluster.after(self.cluster.trace.load_s[model], self._loaded)

    def _loaded(self) -> None:
        model, requests = self.loading.popitem(last=False)
        self.models[model] = None
        for request in requests:
            self._serve(model, request)
        if self.loading:
            self._load()

    def _serve(self, model: str, request: int) -> None:
        if len(self._busy.get(model, ())) < self.cluster.slots:
            self._begin(model, request)
        else:
            self._waiting.setdefault(model, deque()).append(request)

    def _begin(self, model: str, request: int) -> None:
        self._busy.setdefault(model, set()).add(request)
        self.cluster.granted(request, self)
