"""The state of the core: models, runners, requests, lines, memory and time, and what must always be true of them."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from fsm.domain.devices import DeviceId
from fsm.domain.record import Record
from fsm.eviction.reuse_prediction import Histogram
from fsm.machine.request import ModelId, Purpose, Request, RequestId, RequestSpec, RequestState
from fsm.machine.runner import EXPIRING, IDLE, LOADING, READY, UNLOADED, Runner, RunnerId
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

    def check(self) -> None:
        """Raise AssertionError where an invariant does not hold; for tests and searches, after every step."""
        leases, processes, working = set[RequestId](), 0, 0
        for runner in self.runners.values():
            self._check_runner(runner)
            leases |= runner.leases
            processes += runner.process
            working += runner.state is READY and runner.on_host
        queued = [request for group in self.groups.values() for request in group.requests.values()]
        assert len(queued) == self.queued, "the queue is miscounted"
        assert self.ranks == sorted(self.rank(group.head) for group in self.groups.values()), "a line is out of turn"
        listed = [spec for model, specs in self.specs_by_model.items() for spec in specs if spec.model == model]
        wanted = len(listed) == len(self.groups) and all(spec in self.groups for spec in listed)
        assert wanted and all(self.specs_by_model.values()), "a line is under no model, or another's"
        assert processes == self.processes, "the processes are miscounted"
        assert all(group.requests for group in self.groups.values()), "an empty line"
        assert all(request.state is RequestState.queued for request in queued), "answered, but still in a line"
        held = {id for id, request in self.requests.items() if request.state is RequestState.granted}
        assert held | {request.id for request in queued} == set(self.requests), "neither queued nor granted"
        owners = {("runner", id) for id in self.runners} | {("memory", id) for id in held - leases}
        assert owners == set(self.ledger.accounts), "an account without an owner, or the other way round"
        for device, sample in self.ledger.devices.items():
            promised = self.ledger.reserved_bytes(device)
            fits = promised <= sample.capacity_bytes
            assert fits or device in self.ledger.overcommitted, f"{device}: promised more than there is"
        assert working == self.busy_on_host <= self.peak_busy_on_host, "those at work are miscounted"
        assert not (self.closing and self.groups), "somebody waits for a closed scheduler"
        loaded = [runner for runner in self.runners.values() if runner.current and runner.state is not LOADING]
        assert not any(map(self.groups_served_by, loaded)), "somebody waits for what is there"
        self._check_claims()
        waited_for = {spec.model for spec in self.groups}
        ahead = [model for model, _ in self.prefetching]
        assert waited_for.issuperset(ahead), "a file is read ahead for nobody"
        read = sum(size > 0 for _, size in self.prefetching)  # the others keep their places in the order alone
        assert len(set(ahead)) == len(ahead) and read <= self.config.prefetches, "more files are read ahead than may be"

    def _check_runner(self, runner: Runner) -> None:
        assert runner.state is not UNLOADED, f"{runner} is unloaded but listed"
        assert (runner.state is READY) <= bool(runner.leases), f"{runner} is ready without a lease"
        assert bool(runner.leases) <= (runner.state in (READY, EXPIRING)), f"{runner} holds leases it may not"
        assert runner.current == (self.models[runner.model].current is runner), f"{runner}: not its model's current one"
        assert runner.process or (runner.state is EXPIRING and not runner.leases), f"{runner} serves without a process"
        default = runner.keep_alive_s == self.config.keep_alive_s
        assert default or not runner.uses_default_keep_alive, f"{runner}: neither the default nor one named"
        assert not (runner.stopping and runner.leases), f"{runner} is stopped in use"
        lingers = runner.process and runner.state is EXPIRING and not runner.leases and not runner.stopping
        assert not lingers, f"{runner} is neither in use nor stopped"
        for lease in runner.leases:
            assert self.requests[lease].runner == runner.id, f"lease {lease} is on another runner"
        account = self.ledger.accounts["runner", runner.id]
        for device, promised in account.reserved.items() if account.peak_observed else ():
            most = account.peak.get(device, promised) + account.expected_growth.get(device, 0)
            assert promised <= most, f"{runner}: more is promised than was measured"
        assert account.peak_observed <= (runner.loaded_at is not None), f"{runner} has settled before it served"
        timed = runner.state is IDLE and runner.keep_alive_s < math.inf and not self.models[runner.model].pinned
        assert timed == (self.timers.at(("keep-alive", runner.id)) < math.inf), f"{runner}: keep-alive clock"
        assert (runner.state is LOADING) == (self.timers.at(("load", runner.id)) < math.inf), f"{runner}: load clock"

    def _check_claims(self) -> None:
        under = [runner for runner in self.runners.values() if runner.claim]
        numbers = {*self.claims, *(runner.claim for runner in under)}
        assert len(numbers) == len(self.claims) + len(under), "a claim is used twice"
        assert all(number < self.next_claim for number in numbers), "a claim that was never made"
        assert len(self.claims) <= len(self.groups), "a claim for nobody"
        for claim in self.claims.values():
            assert not claim.had and claim.devices, f"{claim}: had, but nothing was launched"
            assert self.timers.at(("claim", claim.number)) == claim.by, f"{claim}: nothing ends the wait for it"
        for runner in under:
            assert runner.process and runner.loaded_at is None, f"{runner} keeps devices that it needs no more"
            timed = self.timers.at(("claim", runner.claim)) < math.inf
            assert timed == runner.stopping, f"{runner}: how long it keeps its devices"

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
