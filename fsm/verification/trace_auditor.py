"""An account of its own of who asked, who was answered and who holds what, kept from events and commands alone.

It believes nothing that the pool says of itself: what it is given is what the shell is given. Only which runners are on
their way out, which no command tells, is taken from the journal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from fsm.domain.devices import DeviceId
from fsm.machine.request import ModelId, Purpose, RequestId, RequestSpec
from fsm.machine.runner import EXPIRING, LOADING, READY, UNLOADED, RunnerId
from fsm.messages import events
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
from fsm.messages.decision_log import Entry, Transition
from fsm.messages.events import (
    Acquire,
    Cancel,
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
    Unresponsive,
)
from fsm.messages.refusals import (
    Cancelled,
    DeadlineInfeasible,
    LoadFailedRefusal,
    QueueFullRefusal,
    Refusal,
    SchedulerClosed,
    TimedOut,
)
from fsm.state.core_config import CoreConfig


@dataclass(slots=True)
class Claimed:
    """Devices that were claimed."""

    devices: frozenset[DeviceId]
    since: float  # when that was first waited for; a plan that moves to other devices does not wait anew
    had: bool = False  # the answer was Claimed, and nothing was launched under it yet


class TraceAuditor:
    """Told of every step; raises AssertionError where what was said to do cannot be right."""

    def __init__(self, longest_wait_s: float = math.inf, limits: CoreConfig | None = None) -> None:
        self.longest_wait_s = longest_wait_s  # nobody waits for longer, whatever goes wrong
        self.limits = limits or CoreConfig()  # as they were at first
        self.max_queue = self.limits.max_queue  # as it is now
        self.waiting: dict[RequestId, tuple[RequestSpec, float]] = {}  # since when, the oldest first
        self.due: dict[RequestId, float] = {}  # of those who wait and named a time-out
        self.held: dict[RequestId, RunnerId | None] = {}  # None: memory of the program's own
        self.alive: dict[RunnerId, ModelId] = {}  # from Launch to Exited
        self.users: dict[RunnerId, int] = {}  # leases on each of those
        self.serving: set[RunnerId] = set()  # those that said that they serve
        self.stopped: set[RunnerId] = set()  # of those alive
        self.leaving: set[RunnerId] = set()  # expiring
        self.current: dict[ModelId, RunnerId] = {}  # loading, ready or idle
        self.inspecting: set[ModelId] = set()
        self.open: dict[int, Claimed] = {}  # until Unclaim
        self.given_up: list[Claimed] = []  # in this step, and nothing was launched in place of it
        self.ahead: dict[ModelId, int] = {}  # bytes of files that are to be read ahead, as last said
        self.loaded_at: dict[RunnerId, float] = {}
        self.shown_at: dict[RunnerId, float] = {}  # when a load was launched, or last said that it is alive
        self.short: set[RunnerId] = set()  # those that said that memory ran out
        self.failures: dict[ModelId, int] = {}  # in a row, or less
        self.blocked: dict[ModelId, float] = {}  # not loaded again before
        self.unwanted: set[RunnerId] = set()  # somebody asked for them to leave, and they have not
        self.asked: set[RequestId] = set()  # leases whose holders were told that others wait
        self.runners = self.claims = self.samples = 0  # the last number of each
        self.closing = self.finished = False

    def step(
        self, now: float, event: Event, commands: Sequence[Command], entries: Sequence[Entry], queued: int
    ) -> None:
        """Take in one step: what happened, what was said to do, what was noted; and how many are said to wait."""
        most = max(len(self.waiting), self.max_queue)
        out_of_memory = self._runs_out(event)
        everybody = set(self.current.values()) if out_of_memory else set()
        left = self._learn(now, event)
        leaving = frozenset(self.leaving)
        if self.given_up:
            self.given_up.clear()
        for entry in entries:
            if isinstance(entry, Transition):
                self._moved(now, event, entry)
        for command in commands:
            self._told(now, event, command, leaving)
        if entries:
            self._victims_were_asked(event, entries)
        assert len(self.waiting) <= most, "more wait than may"
        assert everybody.isdisjoint(self.current.values()), "memory ran out, and somebody stays"
        if self.unwanted:
            self.unwanted -= self.leaving
            assert self.unwanted.isdisjoint(self.serving), "somebody asked for it to leave, and it stays"
        assert left is None or left not in self.waiting, "who left is not answered"
        assert len(self.waiting) == queued, "a request is lost, or answered in silence"
        if self.ahead:
            models = {spec.model for spec, _ in self.waiting.values()}
            assert models.issuperset(self.ahead), "a file is read ahead for nobody"
        if self.due and isinstance(event, Tick):
            late = [id for id, due in self.due.items() if due <= now]
            assert not late, f"request {late[0]} waits beyond its time"
        if self.waiting and self.longest_wait_s < math.inf:
            id, (_, since) = next(iter(self.waiting.items()))
            assert now - since <= self.longest_wait_s, f"request {id} has waited for {now - since:g} s"

    def _learn(self, now: float, event: Event) -> RequestId | None:
        """Take in what happened; return who has left and is to be told so."""
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
                elif id in self.waiting and isinstance(event, Cancel):
                    return id
            case Exited() | Loaded() | Progress() | OutOfMemory():
                self._heard(now, event)
            case events.ClaimGranted(number):
                if number in self.open:
                    self.open[number].had = True
            case Expire(model):
                if model in self.current:
                    self.unwanted.add(self.current[model])
            case Configure():
                self.max_queue = self.max_queue if event.max_queue is None else event.max_queue
            case Inspected(model):
                self.inspecting.discard(model)
            case Close():
                self.closing = True
                self.held = {id: runner for id, runner in self.held.items() if runner is not None}
            case _:
                pass
        return None

    def _heard(self, now: float, event: Exited | Loaded | Progress | OutOfMemory) -> None:
        """Take in what was said of a process."""
        runner = event.runner
        match event:
            case Exited():
                if self.alive.pop(runner, None) is not None:
                    self.stopped.discard(runner)
            case Loaded():
                if runner in self.alive and runner not in self.leaving:
                    self.serving.add(runner)
                    self.loaded_at.setdefault(runner, now)
            case Progress():
                self.shown_at[runner] = now
            case OutOfMemory():
                self.short.add(runner)

    def _runs_out(self, event: Event) -> bool:
        """Tell whether memory runs out while a runner serves."""
        if isinstance(event, OutOfMemory) or (isinstance(event, Exited) and event.out_of_memory):
            return event.runner in self.alive and event.runner in self.serving
        return False

    def _moved(self, now: float, event: Event, entry: Transition) -> None:
        if entry.source is None:
            assert entry.model not in self.current, f"{entry.model} has two runners at once"
            self.current[entry.model] = entry.runner
        elif entry.destination is EXPIRING:
            assert entry.runner not in self.leaving, "given up twice"
            self.leaving.add(entry.runner)
            del self.current[entry.model]
            if entry.trigger == "crash":
                self._failed(now, event, entry)
            elif entry.source is not LOADING:  # it served, and ends in order
                self.failures.pop(entry.model, None)
        elif entry.destination is UNLOADED:
            assert entry.runner not in self.alive, "unloaded before its process has gone"
            assert not self.users.pop(entry.runner), "unloaded in use"
            self.leaving.discard(entry.runner)
            self.serving.discard(entry.runner)

    def _failed(self, now: float, event: Event, entry: Transition) -> None:
        """Count a failure, and how long the model is not loaded again: twice as long each time.

        Of a load that ran out of memory nothing is concluded: there may be another way. A first crash is no failure,
        nor is a second one after a good life.
        """
        model, runner, limits = entry.model, entry.runner, self.limits
        if entry.source is LOADING:
            if isinstance(event, Tick):
                assert now >= self.shown_at[runner] + limits.load_timeout_s, "a load is given up that is alive"
            if isinstance(event, Exited) and (event.out_of_memory or runner in self.short):
                return
        elif now - self.loaded_at[runner] >= limits.good_life_s or not self.failures.get(model):
            self.failures[model] = 1
            return
        before = self.failures.get(model, 0)
        self.failures[model] = before + 1
        self.blocked[model] = now + min(limits.back_off_limit_s, limits.back_off_s * 2.0 ** min(before, 16))

    def _told(self, now: float, event: Event, command: Command, leaving: frozenset[RunnerId]) -> None:
        match command:
            case Grant(id, runner):
                self._granted(id, runner, leaving)
            case Reject(id, refusal):
                assert id in self.waiting, f"request {id} is answered twice, or never asked"
                del self.waiting[id]
                self._refused(now, event, id, refusal)
            case RevokeLease(id):
                self._revoked(event, id)
            case Launch(runner):
                self._launched(now, command)
            case Stop(runner):
                self._told_to_stop(runner)
            case Sample(number):
                assert number > self.samples, "a number is used again"
                self.samples = number
            case Inspect(model):
                assert model not in self.inspecting, f"{model} is inspected twice at a time"
                self.inspecting.add(model)
            case Claim(number, devices):
                assert number > self.claims, "a number is used again"
                assert self.limits.claims, "claimed, although claims are off"
                self.claims = number
                since = min([now, *(claim.since for claim in self.given_up)])
                self.open[number] = Claimed(frozenset(devices), since)
            case ReleaseClaim(number):
                assert number in self.open, f"claim {number} is given up twice, or was never made"
                self.given_up.append(self.open.pop(number))
            case Prefetch(files):
                self._read_ahead(dict(files))
            case PersistMeasurement(runner, took, load_s):
                assert took or load_s is not None, "nothing is to be remembered"
            case NotifyContention(runner, requests):
                self._asked_for(runner, requests)
            case Finished():
                assert self.closing and not self.finished and not self.alive and not self.leaving, "finished too early"
                self.finished = True
            case _:
                assert_never(command)

    def _read_ahead(self, files: dict[ModelId, int]) -> None:
        assert list(files.items()) != list(self.ahead.items()), "the same is said again"
        assert all(size <= self.ahead.get(model, size) for model, size in files.items()), "an amount grows in a wait"
        assert not files.keys() & set(self.current), "a file is read ahead of a model that lives"
        self.ahead = files

    def _granted(self, id: RequestId, runner: RunnerId | None, leaving: frozenset[RunnerId]) -> None:
        assert id in self.waiting, f"request {id} is answered twice, or never asked"
        spec, _ = self.waiting.pop(id)
        self.due.pop(id, None)
        assert not self.closing, f"request {id} is granted after the close"
        if spec.purpose is Purpose.memory:
            assert runner is None, "a runner for who wants memory"
            self.held[id] = None
            return
        assert runner is not None and self.alive.get(runner) == spec.model, f"request {id}: not a runner of its model"
        assert runner in self.serving, f"request {id} is granted a runner that does not serve"
        assert runner not in leaving and runner not in self.stopped, f"request {id} is granted one on its way out"
        if spec.purpose is Purpose.lease:
            self.held[id] = runner
            self.users[runner] += 1

    def _refused(self, now: float, event: Event, id: RequestId, refusal: Refusal) -> None:
        due = self.due.pop(id, math.inf)
        match refusal:
            case TimedOut():
                assert due <= now, f"request {id} is timed out before its time"
            case DeadlineInfeasible():
                assert isinstance(event, Acquire | Inspected), f"request {id} is told late that it is hopeless"
                assert now + refusal.least_s > due, f"request {id} is refused, although there is time"
            case Cancelled():
                assert isinstance(event, Cancel) and event.request == id, f"request {id} has not left"
            case SchedulerClosed():
                assert self.closing, "refused as closed, but open"
            case QueueFullRefusal():
                assert isinstance(event, Acquire) and event.request == id, f"request {id} had its place"
            case LoadFailedRefusal():
                assert refusal.retry_after_s <= self.limits.back_off_limit_s + 1e-6, "backed off for too long"
            case _:
                pass

    def _launched(self, now: float, launch: Launch) -> None:
        assert launch.runner > self.runners, "an id is used again"
        assert not self.closing, "launched after the close"
        assert self.blocked.get(launch.model, now) <= now, f"{launch.model} is loaded again before its time"
        if self.limits.claims:
            self._has_its_devices(now, launch)
        self.shown_at[launch.runner] = now
        self.runners = launch.runner
        self.alive[launch.runner] = launch.model
        self.users[launch.runner] = 0

    def _asked_for(self, runner: RunnerId, requests: Sequence[RequestId]) -> None:
        assert all(self.held.get(id) == runner for id in requests), "those who hold nothing are asked for it"
        assert self.asked.isdisjoint(requests), "somebody is told twice that others wait"
        self.asked.update(requests)

    def _has_its_devices(self, now: float, launch: Launch) -> None:
        """A launch is under a claim of its own for all devices that it takes memory on, or one was waited for."""
        devices = {device for device, amount in launch.placement.bytes if amount}
        if not devices:
            return
        for claim in self.open.values():
            if claim.had and devices <= claim.devices:
                claim.had = False
                return
        for claim in self.given_up:
            if now >= claim.since + self.limits.claim_timeout_s:
                self.given_up.remove(claim)
                return
        raise AssertionError(f"{launch.runner} is launched without its devices")

    def _victims_were_asked(self, event: Event, entries: Sequence[Entry]) -> None:
        """Whoever holds what is given up for others was told that they wait for it."""
        if isinstance(event, Expire | OutOfMemory | Exited | Loaded | Close):
            return  # there are other reasons too
        for entry in entries:
            if isinstance(entry, Transition) and entry.source is READY and entry.trigger == "expire":
                leases = [id for id, runner in self.held.items() if runner == entry.runner]
                assert self.asked.issuperset(leases), f"{entry.runner} is given up, and its holders were not asked"

    def _told_to_stop(self, runner: RunnerId) -> None:
        assert runner in self.alive, f"{runner} is stopped, but its process has gone"
        assert runner not in self.stopped, f"{runner} is stopped twice"
        assert runner in self.leaving, f"{runner} is stopped, but not given up"
        assert not self.users[runner], f"{runner} is stopped in use"
        self.stopped.add(runner)

    def _revoked(self, event: Event, id: RequestId) -> None:
        runner = self.held.pop(id, None)
        assert runner is not None, f"lease {id} is taken back from nobody"
        self.users[runner] -= 1
        ended = isinstance(event, Exited | Unresponsive) and event.runner == runner
        assert ended or (self.closing and isinstance(event, Tick)), f"lease {id} is taken back in use"
