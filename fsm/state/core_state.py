"""The state of the core: models, runners, requests, request groups, memory and time."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from fsm.domain.devices import DeviceId
from fsm.domain.options import SLOTS, Options
from fsm.domain.record import Record
from fsm.eviction.reuse_prediction import Histogram
from fsm.machine.request import ModelId, Purpose, Request, RequestId, RequestSpec
from fsm.machine.runner import EXPIRING, Runner, RunnerId
from fsm.sizing.footprint import Footprint
from fsm.sizing.load_history import NOTHING, LoadHistory
from fsm.sizing.model_profile import ModelProfile
from fsm.state.core_config import CoreConfig
from fsm.state.memory_ledger import Ledger
from fsm.state.model_record import ModelRecord
from fsm.state.request_queue import QueueRank, RequestGroup
from fsm.state.runner_match import match
from fsm.state.timers import Timers

MOST_MODELS = 1024  # model records that are kept; more only while their models are in use
MOST_PROCESSES = 1 << 16  # where no limit is set: memory decides long before


@dataclass(slots=True, eq=False)
class OpenClaim(Record):
    """A device claim of a planned launch, until the launch; from then on the claim is its runner's."""

    number: int
    devices: frozenset[DeviceId]
    by: float  # when the wait for it is over
    had: bool = False  # it was granted, or the wait for it is over; between two steps only while a plan is due
    missed: bool = False  # the wait for it is over
    contended: bool = False  # another program loads on one of the devices


@dataclass(slots=True)
class CoreState(Record):
    """Everything that a decision may depend on; `Core` alone changes it."""

    config: CoreConfig
    ledger: Ledger = field(default_factory=Ledger)
    models: dict[ModelId, ModelRecord] = field(default_factory=dict)
    runners: dict[RunnerId, Runner] = field(default_factory=dict)  # every runner that is not unloaded
    requests: dict[RequestId, Request] = field(default_factory=dict)  # queued, or holding a lease or memory
    groups: dict[RequestSpec, RequestGroup] = field(default_factory=dict)
    ranks: list[QueueRank] = field(default_factory=list)  # of the heads of request groups, in order
    unread_ranks: list[QueueRank] = field(default_factory=list)  # the same of groups whose model was never inspected
    specs_by_model: dict[ModelId, list[RequestSpec]] = field(default_factory=dict)  # of its groups, as they began
    timers: Timers = field(default_factory=Timers)
    queued: int = 0  # requests in request groups
    processes: int = 0  # runners whose process may be alive
    next_runner: int = 1
    # (model, options but for its place, GPU) -> when a load failed there, not for want of memory; none loaded since
    failed_loads: dict[tuple[ModelId, Options, DeviceId], float] = field(default_factory=dict)
    samples: int = 0  # Sample commands so far
    read_at: float = -math.inf  # when the devices were read, or a reading was asked for, the last time
    closing: bool = False
    now: float = -math.inf
    claims: dict[int, OpenClaim] = field(default_factory=dict)  # by number; of groups whose launch is planned
    next_claim: int = 1
    prefetching: tuple[tuple[ModelId, int], ...] = ()  # by the last Prefetch: bytes to read ahead of a model's files
    busy_on_host: int = 0  # ready runners that compute on the host
    peak_busy_on_host: int = 0  # the most of them at once so far
    idle_intervals: Histogram = field(default_factory=dict)  # of all models
    plan_due: bool = False  # the next Tick makes a plan, and comes at once; only with `plans_later`
    unevaluated: dict[RequestSpec, bool] = field(default_factory=dict)  # groups for the next plan, however far back
    steps: int = 0  # begun so far: the number of the step under way, or of the last step

    def enqueue(self, request: Request) -> RequestGroup:
        """Put a request at the end of its request group, and return the group."""
        group = self.groups.get(request.spec)
        if group is None:
            group = self.groups[request.spec] = RequestGroup(request.spec)
            self.specs_by_model.setdefault(request.spec.model, []).append(request.spec)
            insort(self._ranks_of(request.spec.model), self.rank(request))
        group.requests[request.id] = request
        self.requests[request.id] = request
        self.queued += 1
        return group

    def dequeue(self, request: Request) -> None:
        """Take a request out of its request group; the request stays in `requests` until it is answered."""
        spec = request.spec
        group = self.groups[spec]
        was_head = group.head is request
        if was_head:
            ranks = self._ranks_of(spec.model)
            del ranks[bisect_left(ranks, self.rank(request))]
        del group.requests[request.id]
        if not group.requests:
            del self.groups[spec]
            self.unevaluated.pop(spec, None)
            self.specs_by_model[spec.model].remove(spec)
            if not self.specs_by_model[spec.model]:
                del self.specs_by_model[spec.model]
        elif was_head:
            insort(self._ranks_of(spec.model), self.rank(group.head))
        self.queued -= 1
        self.timers.clear(("request", request.id))

    def rank(self, head: Request) -> QueueRank:
        """Return the rank of a request group by its head: the time when it was queued, less a time for its priority."""
        return head.queued_at - self.config.priority_s * head.spec.priority, head.id

    def _ranks_of(self, model: ModelId) -> list[QueueRank]:
        """Return the ranks that those of a model's request groups are among."""
        record = self.models.get(model)
        return self.ranks if record is None or record.profile is not None else self.unread_ranks

    def apply_inspection(
        self, model: ModelRecord, profile: ModelProfile | Footprint, known: LoadHistory = NOTHING
    ) -> None:
        """Take over what an inspection found; after the first of a model its request groups can be planned."""
        if model.profile is None:
            for group in self.groups_of_model(model.id):
                rank = self.rank(group.head)
                del self.unread_ranks[bisect_left(self.unread_ranks, rank)]
                insort(self.ranks, rank)
        model.apply_inspection(profile, self.next_runner, known, self.options_asked_of(model.id))

    def groups_in_order(self, unread: Collection[RequestSpec] | None = None) -> Iterator[RequestGroup]:
        """Yield the request groups in the order in which they are planned; no group may come or go meanwhile.

        With `unread`, those of the groups whose model was never inspected are left out that are not among them: nothing
        can be planned for them, and nothing is reserved.
        """
        others = self.unread_ranks
        if unread is not None and others:
            named = [self.groups[spec] for spec in unread if spec in self.groups]
            others = sorted(self.rank(one.head) for one in named if self._ranks_of(one.spec.model) is self.unread_ranks)
        return (self.groups[self.requests[head].spec] for _, head in heapq.merge(self.ranks, others))

    def rank_after(self, group: RequestGroup) -> QueueRank | None:
        """Return the rank of the next request group behind one; None where there is none."""
        at = bisect_right(self.ranks, self.rank(group.head))
        return self.ranks[at] if at < len(self.ranks) else None

    def groups_of_model(self, model: ModelId) -> list[RequestGroup]:
        """Return the request groups for a model, in the order in which they began."""
        return [self.groups[spec] for spec in self.specs_by_model.get(model, ()) if spec.purpose is not Purpose.memory]

    def options_asked_of(self, model: ModelId) -> tuple[Options, ...]:
        """Return the options that the request groups for a model name, each once, in the order in which they came."""
        return tuple(dict.fromkeys(group.spec.options for group in self.groups_of_model(model)))

    def groups_served_by(self, runner: Runner) -> list[RequestGroup]:
        """Return the request groups that wait for this runner's load, or that the runner could serve now."""
        return [group for group in self.groups_of_model(runner.model) if match(runner, group.spec.options)]

    def own_bound(self, request: Request) -> float:
        """Return when busy runners drain for a request because of its own time limit; infinite where none does.

        Half of the time that the limit leaves beside a load of its model is for runners to become idle by themselves.
        The other half is for the leases that are held then. For a limit that is shorter than a load no runner hurries.
        """
        gives_up_at = self.timers.at(("request", request.id))
        if gives_up_at == math.inf:
            return math.inf
        model = self.models.get(request.spec.model)
        load_s = (model.load_s if model is not None else None) or 0.0
        spare_s = gives_up_at - request.queued_at - load_s
        return request.queued_at + spare_s / 2 if spare_s > 0.0 else math.inf

    def leases_left(self, runner: Runner) -> int | None:
        """Return how many more leases a runner may hold, none below 0; None where its leases are not limited."""
        named = self.models[runner.model].max_leases
        limit = self.config.max_leases if named is None else named
        if limit == SLOTS:
            limit = runner.effective_options.num_parallel or 0
        return max(0, limit - len(runner.leases)) if limit else None

    def may_be_granted(self, runner: Runner, purpose: Purpose) -> bool:
        """Tell whether a loaded runner may be granted now to a request that it matches: a preload takes no lease."""
        return purpose is Purpose.preload or self.leases_left(runner) != 0

    def models_in_use(self) -> frozenset[ModelId]:
        """Return the models that are requested, inspected, pinned or have a runner."""
        used = {*self.specs_by_model, *(runner.model for runner in self.runners.values())}
        return frozenset(used.union(id for id, model in self.models.items() if model.pinned or model.inspecting))

    def model(self, id: ModelId) -> ModelRecord:
        """Return the record of a model; a new one may take the place of others, since most may never be loaded."""
        if id not in self.models:
            if len(self.models) >= MOST_MODELS and len(self.models) % (MOST_MODELS // 2) == 0:
                self.forget_models()
            self.models[id] = ModelRecord(id)
        return self.models[id]

    def forget_models(self) -> None:
        """Delete records of models that are not in use until half of `MOST_MODELS` remain.

        The longest unused go first, and last the models that are backed off, those first whose back-off ends first.
        """
        used = self.models_in_use()
        unused = [one for id, one in self.models.items() if id not in used]
        by_use = sorted((max(one.blocked_until, self.now), one.rested_at, one.id) for one in unused)
        for *_, id in by_use[: len(self.models) - MOST_MODELS // 2]:
            del self.models[id]

    def expected_at(self, runner: Runner) -> float:
        """Return the time at which a load is expected to be over, by earlier loads; infinite where none is known."""
        usual_s = self.models[runner.model].usual_load_s(runner.placement.gpu_layers)
        return math.inf if usual_s is None else runner.launched_at + usual_s

    def pinned(self, runner: Runner) -> bool:
        """Tell whether a runner may not be evicted, since its model is pinned; an expiring runner leaves anyway."""
        return runner.state is not EXPIRING and self.models[runner.model].pinned

    def max_runners(self) -> int:
        """Return the limit on live processes: as set, or else so many that memory decides alone."""
        return self.config.max_runners or MOST_PROCESSES

    def is_overdue(self, runner: Runner) -> bool:
        """Tell whether an expiring runner has not ended in time; it may never end, so no plan counts on its memory."""
        return runner.state is EXPIRING and runner.process and self.now >= runner.stop_deadline

    def is_stuck(self, runner: Runner) -> bool:
        """Tell whether a runner is overdue although it holds no lease: it was stopped and has not ended."""
        return self.is_overdue(runner) and not runner.leases

    def is_unmovable(self, runner: Runner) -> bool:
        """Tell whether no other runner can have the runner's process slot or its memory, as far as is known."""
        return self.pinned(runner) or self.is_stuck(runner)

    def overfull(self) -> bool:
        """Tell whether more processes may be alive than the set limit allows, or a device holds more than it has."""
        return bool(self.ledger.overcommitted) or 0 < self.config.max_runners < self.processes

    def is_memory_awaited(self) -> bool:
        """Tell whether a request group waits for what a reading of the devices may show."""
        return any(map(self._awaits_memory, self.groups))

    def _awaits_memory(self, spec: RequestSpec) -> bool:
        if spec.purpose is Purpose.memory:
            return True
        model = self.models[spec.model]
        served = model.current is not None and match(model.current, spec.options)
        return not served and model.is_read_for(spec.options)

    def copy(self) -> CoreState:
        """Return an independent copy; immutable values are shared."""
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
