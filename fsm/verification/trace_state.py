"""What the events and commands of a core say so far about its requests, leases, runners, devices and files.

The state of the core is not read: a trace is what the shell sees. Only which runners are expiring, which no command
tells, is taken from the decision log. The properties of a trace are in `trace_auditor`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import assert_never

from fsm.domain.devices import Amounts, DeviceId, Placement
from fsm.domain.options import Options
from fsm.machine.request import ModelId, Purpose, RequestId, RequestSpec
from fsm.machine.runner import EXPIRING, LOADING, UNLOADED, RunnerId
from fsm.messages.commands import (
    Claim,
    Command,
    Finished,
    Grant,
    Inspect,
    Launch,
    NotifyContention,
    PersistMeasurement,
    Prefetch,
    Reject,
    ReleaseClaim,
    RevokeLease,
    Sample,
    Stop,
)
from fsm.messages.decision_log import Transition
from fsm.messages.events import (
    Acquire,
    Cancel,
    ClaimGranted,
    Close,
    Configure,
    Event,
    Exited,
    Expire,
    Inspected,
    Loaded,
    OutOfMemory,
    Progress,
    Release,
    Tick,
)
from fsm.messages.reasons import TransitionReason
from fsm.sizing.model_profile import ModelProfile
from fsm.state.core_config import CoreConfig


@dataclass(slots=True, eq=False)
class ClaimedDevices:
    """Devices that were claimed."""

    devices: frozenset[DeviceId]
    since: float  # when the wait began; a plan that moves to other devices does not wait anew
    had: bool = False  # ClaimGranted came, and no runner was launched under the claim yet


Load = tuple[ModelId, Options | None]  # a model, and the options that its process is started with, but for the batch


def load_of(launch: Launch) -> Load:
    """Return the load that a launch begins: its batch may be larger where there is memory."""
    return launch.model, replace(launch.options, num_batch=None)


class TraceState:
    """What events and commands have said so far; each `learn_…` takes in one thing more."""

    def __init__(self, longest_wait_s: float = math.inf, limits: CoreConfig | None = None) -> None:
        self.longest_wait_s = longest_wait_s  # no request waits for longer, whatever goes wrong
        self.limits = limits or CoreConfig()  # as they were at first
        self.max_queue = self.limits.max_queue  # as it is now
        self.waiting: dict[RequestId, tuple[RequestSpec, float]] = {}  # since when, the oldest first
        self.due: dict[RequestId, float] = {}  # of requests that wait and named a time-out
        self.held: dict[RequestId, RunnerId | None] = {}  # None: memory of the program's own
        self.alive: dict[RunnerId, ModelId] = {}  # from Launch to Exited
        self.users: dict[RunnerId, int] = {}  # leases on each live runner
        self.serving: set[RunnerId] = set()  # runners that have loaded
        self.stopped: set[RunnerId] = set()  # live runners that were told to stop
        self.leaving: set[RunnerId] = set()  # expiring
        self.left_for: dict[RunnerId, TransitionReason] = {}  # why each of them is, until it is unloaded
        self.current: dict[ModelId, RunnerId] = {}  # loading, ready or idle
        self.inspecting: set[ModelId] = set()
        self.open: dict[int, ClaimedDevices] = {}  # until ReleaseClaim
        self.ahead: dict[ModelId, int] = {}  # bytes to be read ahead of files, by the last Prefetch
        self.loaded_at: dict[RunnerId, float] = {}
        self.shown_at: dict[RunnerId, float] = {}  # when a load was launched, or last showed progress
        self.short: set[RunnerId] = set()  # runners that have told that memory ran out
        self.failures: dict[ModelId, int] = {}  # crashes and failed loads in a row, or fewer
        self.loads: dict[RunnerId, Load] = {}
        self.failed_loads: dict[Load, int] = {}  # in a row, or fewer
        self.files: dict[ModelId, object] = {}  # what the last inspection found, but for the options it was for
        self.placements: dict[RunnerId, Placement] = {}
        self.ran_out: dict[ModelId, tuple[float, Amounts]] = {}  # when a load of this file did last, and its bytes
        self.blocked: dict[Load, float] = {}  # not loaded again before; no options: whatever a request names
        self.unwanted: set[RunnerId] = set()  # runners whose models a user has expired, and that are not expiring yet
        self.asked: set[RequestId] = set()  # leases whose holders were told that other requests wait
        self.runners = self.claims = self.samples = 0  # the last number of each
        self.closing = self.finished = False
        # of the present step:
        self.now = 0.0
        self.event: Event = Tick()
        self.queued = 0  # requests that the core counts as queued, after it
        self.most = 0  # requests that may wait, after it
        self.left_before: frozenset[RunnerId] = frozenset()  # expiring before it
        self.to_expire: set[RunnerId] = set()  # runners that were current when memory ran out
        self.given_up: list[ClaimedDevices] = []  # claims that were released with no launch in their place
        self.transitions: list[Transition] = []  # in order

    def learn_event(self, now: float, event: Event) -> None:
        """Take in what happened; a new step begins."""
        self.now, self.event = now, event
        self.most = max(len(self.waiting), self.max_queue)
        self.left_before = frozenset(self.leaving)
        self.to_expire = set(self.current.values()) if self._runs_out(event) else set()
        self.unwanted -= self.leaving
        self.given_up, self.transitions = [], []
        match event:
            case Acquire(id, spec):
                if id not in self.waiting and id not in self.held:
                    self.waiting[id] = spec, now
                    if event.timeout_s is not None:
                        self.due[id] = now + event.timeout_s
            case Release(id) | Cancel(id):
                runner = self.held.pop(id, None)
                if runner is not None:
                    self.users[runner] -= 1
            case Exited() | Loaded() | Progress() | OutOfMemory():
                self._learn_of_process(event)
            case ClaimGranted(number):
                if number in self.open:
                    self.open[number].had = True
            case Expire(model):
                if model in self.current:
                    self.unwanted.add(self.current[model])
            case Configure():
                self.max_queue = self.max_queue if event.max_queue is None else event.max_queue
            case Inspected():
                self._learn_inspection(event)
            case Close():
                self.closing = True
                self.held = {id: runner for id, runner in self.held.items() if runner is not None}
            case _:
                pass

    def _learn_inspection(self, event: Inspected) -> None:
        """Take in what an inspection found: failures of loads of another file say nothing of this one."""
        model, found = event.model, event.outcome
        self.inspecting.discard(model)
        file = replace(found, resolutions=()) if isinstance(found, ModelProfile) else found
        if self.files.get(model) != file:
            self.files[model] = file
            self.ran_out.pop(model, None)
            for load in [load for load in self.blocked if load[0] == model and load[1] is not None]:
                del self.blocked[load]
                self.failed_loads.pop(load, None)

    def _learn_of_process(self, event: Exited | Loaded | Progress | OutOfMemory) -> None:
        """Take in an event of a process."""
        runner = event.runner
        match event:
            case Exited():
                if self.alive.pop(runner, None) is not None:
                    self.stopped.discard(runner)
            case Loaded():
                if runner in self.alive and runner not in self.leaving:
                    self.serving.add(runner)
                    self.loaded_at.setdefault(runner, self.now)
            case Progress():
                self.shown_at[runner] = self.now
            case OutOfMemory():
                self.short.add(runner)

    def _runs_out(self, event: Event) -> bool:
        """Tell whether memory runs out while a runner serves."""
        if isinstance(event, OutOfMemory) or (isinstance(event, Exited) and event.out_of_memory):
            return event.runner in self.alive and event.runner in self.serving
        return False

    def learn_transition(self, entry: Transition) -> None:
        """Take in that a runner has another state."""
        self.transitions.append(entry)
        if entry.source is LOADING and entry.destination is not EXPIRING:
            self.failed_loads.pop(self.loads[entry.runner], None)
        if entry.source is None:
            self.current[entry.model] = entry.runner
        elif entry.destination is EXPIRING:
            self.leaving.add(entry.runner)
            self.left_for[entry.runner] = entry.why
            del self.current[entry.model]
            if entry.trigger == "crash":
                self._learn_failure(entry)
            elif entry.source is not LOADING:  # it served, and ends in order
                self.failures.pop(entry.model, None)
                self.failed_loads = {load: count for load, count in self.failed_loads.items() if load[0] != entry.model}
        elif entry.destination is UNLOADED:
            del self.users[entry.runner], self.loads[entry.runner], self.placements[entry.runner]
            self.leaving.discard(entry.runner)
            self.left_for.pop(entry.runner, None)
            self.serving.discard(entry.runner)

    def _learn_failure(self, entry: Transition) -> None:
        """Count a failure, and how long the model is not loaded again: twice as long each time.

        A load that ran out of memory is no failure: the next load may be smaller, or alone. A first crash is no
        failure, nor is a second crash after a long life.
        """
        model, runner, limits, event = entry.model, entry.runner, self.limits, self.event
        if entry.source is LOADING:
            if isinstance(event, Exited) and (event.out_of_memory or runner in self.short):
                if self.placements[runner].gpu_layers:
                    self.ran_out[model] = self.now, self.placements[runner].bytes
                return
        elif self.now - self.loaded_at[runner] >= limits.good_life_s or not self.failures.get(model):
            self.failures[model] = 1
            return
        load = self.loads[runner] if entry.source is LOADING else (model, None)
        before = self.failed_loads.get(load, 0) if entry.source is LOADING else self.failures.get(model, 0)
        if entry.source is LOADING:
            self.failed_loads[load] = before + 1
        else:
            self.failures[model] = before + 1
        self.blocked[load] = self.now + min(limits.back_off_limit_s, limits.back_off_s * 2.0 ** min(before, 16))

    def learn_command(self, command: Command) -> None:
        """Take in a command."""
        match command:
            case Grant(id, runner):
                spec, _ = self.waiting.pop(id)
                self.due.pop(id, None)
                if spec.purpose is not Purpose.preload:
                    self.held[id] = runner
                    if runner is not None:
                        self.users[runner] += 1
            case Reject(id):
                del self.waiting[id]
                self.due.pop(id, None)
            case RevokeLease(id):
                if (runner := self.held.pop(id)) is not None:
                    self.users[runner] -= 1
            case Launch():
                self._learn_launch(command)
            case Stop(runner):
                self.stopped.add(runner)
            case Sample(number):
                self.samples = number
            case Inspect(model):
                self.inspecting.add(model)
            case Claim(number, devices):
                self.claims = number
                since = min([self.now, *(claim.since for claim in self.given_up)])
                self.open[number] = ClaimedDevices(frozenset(devices), since)
            case ReleaseClaim(number):
                self.given_up.append(self.open.pop(number))
            case Prefetch(files):
                self.ahead = dict(files)
            case NotifyContention(_, requests):
                self.asked.update(requests)
            case Finished():
                self.finished = True
            case PersistMeasurement():
                pass
            case _:
                assert_never(command)

    def _learn_launch(self, launch: Launch) -> None:
        claim = self.claim_for(launch)
        if claim in self.given_up:
            self.given_up.remove(claim)
        elif claim is not None:
            claim.had = False
        self.loads[launch.runner], self.placements[launch.runner] = load_of(launch), launch.placement
        self.shown_at[launch.runner], self.users[launch.runner] = self.now, 0
        self.runners, self.alive[launch.runner] = launch.runner, launch.model

    def claim_for(self, launch: Launch) -> ClaimedDevices | None:
        """Return the claim of all devices of a launch: a granted claim, or a claim that was waited for in vain."""
        devices = {device for device, amount in launch.placement.bytes if amount}
        granted = [claim for claim in self.open.values() if devices and claim.had and devices <= claim.devices]
        if granted:  # several may be granted before a plan; the others are for launches on more devices
            return min(granted, key=lambda claim: len(claim.devices))
        for claim in self.given_up:
            if devices and self.now >= claim.since + self.limits.claim_timeout_s:
                return claim
        return None
