"""An account of its own of who asked, who was answered and who holds what, kept from events and commands alone.

It believes nothing that the pool says of itself: what it is given is what the shell is given. Only which runners are on
their way out, which no command tells, is taken from the journal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import assert_never

from fsm import commands as do
from fsm import events as on
from fsm.commands import Command
from fsm.journal import Entry, Transition
from fsm.request import ModelId, Purpose, RequestId, Want
from fsm.runner import EXPIRING, UNLOADED, RunnerId


class Audit:
    """Told of every step; raises AssertionError where what was said to do cannot be right."""

    def __init__(self, longest_wait_s: float = math.inf, *, claims: bool = False) -> None:
        self.longest_wait_s = longest_wait_s  # nobody waits for longer, whatever goes wrong
        self.waiting: dict[RequestId, tuple[Want, float]] = {}  # since when, the oldest first
        self.due: dict[RequestId, float] = {}  # of those who wait and named a time-out
        self.held: dict[RequestId, RunnerId | None] = {}  # None: memory of the program's own
        self.alive: dict[RunnerId, ModelId] = {}  # from Launch to Exited
        self.users: dict[RunnerId, int] = {}  # leases on each of those
        self.serving: set[RunnerId] = set()  # those that said that they serve
        self.stopped: set[RunnerId] = set()  # of those alive
        self.leaving: set[RunnerId] = set()  # expiring
        self.current: dict[ModelId, RunnerId] = {}  # loading, ready or idle
        self.inspecting: set[ModelId] = set()
        self.open: set[int] = set()  # claims
        self.ahead: dict[ModelId, int] = {}  # bytes of files that are to be read ahead, as last said
        self.runners = self.claims = self.samples = 0  # the last number of each
        self.claiming = claims
        self.closing = self.finished = False

    def step(
        self, now: float, event: on.Event, commands: Sequence[Command], entries: Sequence[Entry], queued: int
    ) -> None:
        """Take in one step: what happened, what was said to do, what was noted; and how many are said to wait."""
        left = self._learn(now, event)
        leaving = frozenset(self.leaving)
        for entry in entries:
            if isinstance(entry, Transition):
                self._moved(entry)
        for command in commands:
            self._told(now, event, command, leaving)
        assert left is None or left not in self.waiting, "who left is not answered"
        assert len(self.waiting) == queued, "a request is lost, or answered in silence"
        if self.ahead:
            models = {want.model for want, _ in self.waiting.values()}
            assert models.issuperset(self.ahead), "a file is read ahead for nobody"
        if self.due and isinstance(event, on.Tick):
            late = [id for id, due in self.due.items() if due <= now]
            assert not late, f"request {late[0]} waits beyond its time"
        if self.waiting and self.longest_wait_s < math.inf:
            id, (_, since) = next(iter(self.waiting.items()))
            assert now - since <= self.longest_wait_s, f"request {id} has waited for {now - since:g} s"

    def _learn(self, now: float, event: on.Event) -> RequestId | None:
        """Take in what happened; return who has left and is to be told so."""
        match event:
            case on.Acquire(id, want):
                if id not in self.waiting and id not in self.held:
                    self.waiting[id] = want, now
                    if event.timeout_s is not None:
                        self.due[id] = now + event.timeout_s
            case on.Release(id) | on.Cancel(id):
                runner = self.held.pop(id, None)
                if runner is not None:
                    self.users[runner] -= 1
                elif id in self.waiting and isinstance(event, on.Cancel):
                    return id
            case on.Exited(runner):
                if self.alive.pop(runner, None) is not None:
                    self.stopped.discard(runner)
            case on.Loaded(runner):
                if runner in self.alive and runner not in self.leaving:
                    self.serving.add(runner)
            case on.Inspected(model):
                self.inspecting.discard(model)
            case on.Close():
                self.closing = True
                self.held = {id: runner for id, runner in self.held.items() if runner is not None}
            case _:
                pass
        return None

    def _moved(self, entry: Transition) -> None:
        if entry.source is None:
            assert entry.model not in self.current, f"{entry.model} has two runners at once"
            self.current[entry.model] = entry.runner
        elif entry.destination is EXPIRING:
            assert entry.runner not in self.leaving, "given up twice"
            self.leaving.add(entry.runner)
            del self.current[entry.model]
        elif entry.destination is UNLOADED:
            assert entry.runner not in self.alive, "unloaded before its process has gone"
            assert not self.users.pop(entry.runner), "unloaded in use"
            self.leaving.discard(entry.runner)
            self.serving.discard(entry.runner)

    def _told(self, now: float, event: on.Event, command: Command, leaving: frozenset[RunnerId]) -> None:
        match command:
            case do.Grant(id, runner):
                self._granted(id, runner, leaving)
            case do.Reject(id, refusal):
                assert id in self.waiting, f"request {id} is answered twice, or never asked"
                del self.waiting[id]
                self._refused(now, event, id, refusal)
            case do.Revoke(id):
                self._revoked(event, id)
            case do.Launch(runner):
                self._launched(command)
            case do.Stop(runner):
                self._told_to_stop(runner)
            case do.Sample(number):
                assert number > self.samples, "a number is used again"
                self.samples = number
            case do.Inspect(model):
                assert model not in self.inspecting, f"{model} is inspected twice at a time"
                self.inspecting.add(model)
            case do.Claim(number):
                assert number > self.claims, "a number is used again"
                assert self.claiming, "claimed, although claims are off"
                self.claims = number
                self.open.add(number)
            case do.Unclaim(number):
                assert number in self.open, f"claim {number} is given up twice, or was never made"
                self.open.remove(number)
            case do.Prefetch(files):
                self._read_ahead(dict(files))
            case do.Remember(runner, took, load_s):
                assert took or load_s is not None, "nothing is to be remembered"
            case do.Ask(runner, requests):
                assert all(self.held.get(id) == runner for id in requests), "those who hold nothing are asked for it"
            case do.Finish():
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
        want, _ = self.waiting.pop(id)
        self.due.pop(id, None)
        assert not self.closing, f"request {id} is granted after the close"
        if want.purpose is Purpose.memory:
            assert runner is None, "a runner for who wants memory"
            self.held[id] = None
            return
        assert runner is not None and self.alive.get(runner) == want.model, f"request {id}: not a runner of its model"
        assert runner in self.serving, f"request {id} is granted a runner that does not serve"
        assert runner not in leaving and runner not in self.stopped, f"request {id} is granted one on its way out"
        if want.purpose is Purpose.lease:
            self.held[id] = runner
            self.users[runner] += 1

    def _refused(self, now: float, event: on.Event, id: RequestId, refusal: do.Refusal) -> None:
        due = self.due.pop(id, math.inf)
        match refusal:
            case do.TimedOut():
                assert due <= now, f"request {id} is timed out before its time"
            case do.NotInTime():
                assert isinstance(event, on.Acquire | on.Inspected), f"request {id} is told late that it is hopeless"
                assert now + refusal.least_s > due, f"request {id} is refused, although there is time"
            case do.Cancelled():
                assert isinstance(event, on.Cancel) and event.request == id, f"request {id} has not left"
            case do.Closed():
                assert self.closing, "refused as closed, but open"
            case do.QueueFull():
                assert isinstance(event, on.Acquire) and event.request == id, f"request {id} had its place"
            case _:
                pass

    def _launched(self, launch: do.Launch) -> None:
        assert launch.runner > self.runners, "an id is used again"
        assert not self.closing, "launched after the close"
        self.runners = launch.runner
        self.alive[launch.runner] = launch.model
        self.users[launch.runner] = 0

    def _told_to_stop(self, runner: RunnerId) -> None:
        assert runner in self.alive, f"{runner} is stopped, but its process has gone"
        assert runner not in self.stopped, f"{runner} is stopped twice"
        assert runner in self.leaving, f"{runner} is stopped, but not given up"
        assert not self.users[runner], f"{runner} is stopped in use"
        self.stopped.add(runner)

    def _revoked(self, event: on.Event, id: RequestId) -> None:
        runner = self.held.pop(id, None)
        assert runner is not None, f"lease {id} is taken back from nobody"
        self.users[runner] -= 1
        ended = isinstance(event, on.Exited | on.Unresponsive) and event.runner == runner
        assert ended or (self.closing and isinstance(event, on.Tick)), f"lease {id} is taken back in use"
