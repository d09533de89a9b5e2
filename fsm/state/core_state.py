"""The state of the core: models, runners, requests, lines, memory and time."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from fsm.domain.devices import DeviceId
from fsm.domain.record import Record
from fsm.eviction.reuse_prediction import Histogram
from fsm.machine.request import ModelId, Purpose, Request, RequestId, RequestSpec
from fsm.machine.runner import EXPIRING, Runner, RunnerId
from fsm.state.core_config import CoreConfig
from fsm.state.memory_ledger import Ledger
from fsm.state.model_record import ModelRecord
from fsm.state.request_queue import QueueRank, RequestGroup
from fsm.state.runner_match import match
from fsm.state.timers import Timers


@dataclass(slots=True, eq=False)
class OpenClaim(Record):
    """Devices that a planned launch asks to have to itself among the programs on the machine; over when it launches."""

    number: int
    devices: frozenset[DeviceId]
    by: float  # waited for no longer than until then
    had: bool = False  # it was had, or the wait for it is over; never between two steps
    missed: bool = False  # the wait for it is over
    contended: bool = False  # another program has one of the devices


@dataclass(slots=True)
class CoreState(Record):
    """Everything a decision may depend on. `Core` alone changes it."""

    config: CoreConfig
    ledger: Ledger = field(default_factory=Ledger)
    models: dict[ModelId, ModelRecord] = field(default_factory=dict)
    runners: dict[RunnerId, Runner] = field(default_factory=dict)  # every one that is not unloaded
    requests: dict[RequestId, Request] = field(default_factory=dict)  # queued, or granted something to give back
    groups: dict[RequestSpec, RequestGroup] = field(default_factory=dict)
    ranks: list[QueueRank] = field(default_factory=list)  # of each line's head, in order
    specs_by_model: dict[ModelId, list[RequestSpec]] = field(
        default_factory=dict
    )  # of the lines for each model, as they began
    timers: Timers = field(default_factory=Timers)
    queued: int = 0  # requests in lines
    processes: int = 0  # runners whose process may be alive
    next_runner: int = 1
    samples: int = 0  # asked for so far
    closing: bool = False
    now: float = -math.inf
    claims: dict[int, OpenClaim] = field(default_factory=dict)  # by number; for lines whose launch is planned
    next_claim: int = 1
    prefetching: tuple[tuple[ModelId, int], ...] = ()  # as last said: bytes of files to read ahead, by model that waits
    busy_on_host: int = 0  # ready runners that compute on the host
    peak_busy_on_host: int = 0  # that there ever were at once
    idle_intervals: Histogram = field(default_factory=dict)  # of all models
    steps: int = 0  # begun so far: the number of the one under way, or of the last one

    def enqueue(self, request: Request) -> RequestGroup:
        """Put a request at the end of its line."""
        group = self.groups.get(request.spec)
        if group is None:
            group = self.groups[request.spec] = RequestGroup(request.spec)
            self.specs_by_model.setdefault(request.spec.model, []).append(request.spec)
            insort(self.ranks, self.rank(request))
        group.requests[request.id] = request
        self.requests[request.id] = request
        self.queued += 1
        return group

    def dequeue(self, request: Request) -> None:
        """Take a request out of its line; the request itself stays, to be answered by the caller."""
        spec = request.spec
        group = self.groups[spec]
        led = group.head is request
        if led:
            del self.ranks[bisect_left(self.ranks, self.rank(request))]
        del group.requests[request.id]
        if not group.requests:
            del self.groups[spec]
            self.specs_by_model[spec.model].remove(spec)
            if not self.specs_by_model[spec.model]:
                del self.specs_by_model[spec.model]
        elif led:
            insort(self.ranks, self.rank(group.head))
        self.queued -= 1
        self.timers.clear(("request", request.id))

    def rank(self, head: Request) -> QueueRank:
        """Return what a line is planned by: the age of its first request, priority being worth some of it."""
        return head.queued_at - self.config.priority_s * head.spec.priority, head.id

    def groups_in_order(self) -> Iterator[RequestGroup]:
        """Yield the lines in the order in which they are planned; none may come or go meanwhile."""
        return (self.groups[self.requests[head].spec] for _, head in self.ranks)

    def groups_of_model(self, model: ModelId) -> list[RequestGroup]:
        """Return the lines for a model, in the order in which they began."""
        return [self.groups[spec] for spec in self.specs_by_model.get(model, ()) if spec.purpose is not Purpose.memory]

    def groups_served_by(self, runner: Runner) -> list[RequestGroup]:
        """Return the lines that wait for this runner's load, or that it could serve now."""
        return [group for group in self.groups_of_model(runner.model) if match(runner, group.spec.options)]

    def models_in_use(self) -> frozenset[ModelId]:
        """Return the models that are asked for, inspected, pinned or have a runner."""
        used = {*self.specs_by_model, *(runner.model for runner in self.runners.values())}
        return frozenset(used.union(id for id, model in self.models.items() if model.pinned or model.inspecting))

    def expected_at(self, runner: Runner) -> float:
        """Return when a load is expected to be over, by those before it; infinite where none is known."""
        usual_s = self.models[runner.model].usual_load_s(runner.placement.gpu_layers)
        return math.inf if usual_s is None else runner.launched_at + usual_s

    def pinned(self, runner: Runner) -> bool:
        """Tell whether a runner may not be moved for others; one that is on its way out is moved already."""
        return runner.state is not EXPIRING and self.models[runner.model].pinned

    def max_runners(self) -> int:
        """Return the limit on live processes: as set, or three a GPU and at least three, as the devices are now.

        Where none is set, those that cannot be moved do not count: what fits into memory would be refused for them.
        """
        if self.config.max_runners:
            return self.config.max_runners
        unmovable = sum(map(self.is_unmovable, self.runners.values()))
        return 3 * max(1, sum(sample.kind == "gpu" for sample in self.ledger.devices.values())) + unmovable

    def is_overdue(self, runner: Runner) -> bool:
        """Tell whether a runner that was given up ought to be gone; it may never end, and nobody counts on it."""
        return runner.state is EXPIRING and runner.process and self.now >= runner.stop_deadline

    def is_stuck(self, runner: Runner) -> bool:
        """Tell whether it is overdue although nobody holds it: it does not end as it was told."""
        return self.is_overdue(runner) and not runner.leases

    def is_unmovable(self, runner: Runner) -> bool:
        """Tell whether nobody can be given its place or its memory, as far as is known."""
        return self.pinned(runner) or self.is_stuck(runner)

    def overfull(self) -> bool:
        """Tell whether more may be alive than the limit that is set, or more be held than there is since it shrank."""
        return bool(self.ledger.overcommitted) or 0 < self.config.max_runners < self.processes

    def copy(self) -> CoreState:
        """Return an independent copy; what is immutable is shared."""
        twin = super(CoreState, self).copy()
        twin.ledger, twin.timers = self.ledger.copy(), self.timers.copy()
        twin.runners = {id: runner.copy() for id, runner in self.runners.items()}
        twin.requests = {id: request.copy() for id, request in self.requests.items()}
        twin.models = {id: model.copy() for id, model in self.models.items()}
        for model in twin.models.values():
            model.current = twin.runners[model.current.id] if model.current else None
        twin.groups = {spec: group.copy() for spec, group in self.groups.items()}
        for group in twin.groups.values():
            group.requests = {id: twin.requests[id] for id in group.requests}
        twin.specs_by_model = {model: list(specs) for model, specs in self.specs_by_model.items()}
        twin.claims = {number: claim.copy() for number, claim in self.claims.items()}
        return twin
