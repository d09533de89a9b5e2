"""What the scheduler has done of late, for whatever watches the server: metrics, the page, traces.

The scheduler's events are taken when a request of a client ends, and when something looks; no thread waits for them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fsm.machine.request import ModelId
from fsm.machine.runner import IDLE, READY, UNLOADED, RunnerId, RunnerState
from fsm.messages.decision_log import DecisionKind
from scheduler.api.scheduler import Scheduler
from scheduler.errors.formatting import shown
from scheduler.runtime.event_stream import Decision, Gap, Transition

Event = Transition | Decision | Gap

_TOLD = 2000  # events kept for followers
_DECISIONS = 50  # kept for followers that come later
_RUNNERS = 200  # whose lives are kept
_CHANGES = 500  # of one runner
_PAST_S = 600.0  # for so long an ended runner is kept
_FLICKER_S = 0.5  # a runner that was idle for less than this counts as ready all the time
_EVERY_S = 0.25  # the least between two times at which events are taken as requests end
LOADED = (READY, IDLE)
_ROUTINE: tuple[DecisionKind, ...] = ("queued", "granted")  # decisions that come with every request


@dataclass(slots=True)
class Life:
    """What became of one runner: its changes of state in order, in seconds of the scheduler's clock."""

    model: ModelId
    changes: list[tuple[float, RunnerState]] = field(default_factory=list)

    @property
    def load(self) -> tuple[float, float] | None:
        """When its load began and ended; None while it loads, or where it is not known any more."""
        if [state in LOADED for _, state in self.changes[:2]] != [False, True]:
            return None
        return self.changes[0][0], self.changes[1][0]

    def change(self, at: float, state: RunnerState) -> None:
        """Add a change of state; a short rest between two uses is left out."""
        last = self.changes[-2:]
        if [state for _, state in last] == [READY, IDLE] and state is READY and at - last[1][0] < _FLICKER_S:
            self.changes.pop()
            return
        self.changes.append((at, state))
        if len(self.changes) > _CHANGES:
            del self.changes[0]


class Observer:
    """Keeps the last events of a scheduler, and calls `heard` with each. Safe to use from any thread."""

    def __init__(self, scheduler: Scheduler, heard: Callable[[Event], None]) -> None:
        self._scheduler = scheduler
        self._heard = heard
        self._stream = scheduler.events()
        self._lock = threading.Lock()
        self._taken_at = 0.0
        self._events: deque[Event] = deque(maxlen=_TOLD)
        self._decisions: deque[Decision] = deque(maxlen=_DECISIONS)
        self.lives: dict[RunnerId, Life] = {}
        self.count = 0  # events so far

    @property
    def ended(self) -> bool:
        """Whether no more events come, since the scheduler has closed."""
        return self._stream.ended

    def catch_up(self) -> None:
        """Take the events that have come; called where something looks."""
        with self._lock:
            self._taken_at = time.monotonic()
            while (event := self._stream.take(0)) is not None:
                self._take(event)

    def keep_up(self) -> None:
        """Take the events that have come, unless that was done a moment ago; called as each request ends."""
        if time.monotonic() - self._taken_at > _EVERY_S:
            self.catch_up()

    def since(self, count: int) -> list[Event]:
        """Return the events that came after the first `count`, with a gap where some are not kept any more."""
        with self._lock:
            new = self.count - count
            kept = list(self._events)[-new:] if new else []
        return kept if len(kept) == new else [Gap(new - len(kept)), *kept]

    def load_of(self, runner: RunnerId | None) -> tuple[float, float] | None:
        """Return when the load of a runner began and ended, in seconds of the scheduler's clock; None: not known."""
        if runner is None:
            return None
        self.catch_up()
        if (load := self._load_of(runner)) is None:  # what has just granted a request may still tell of its load
            self._scheduler.status()
            self.catch_up()
            load = self._load_of(runner)
        return load

    def _load_of(self, runner: RunnerId) -> tuple[float, float] | None:
        life = self.lives.get(runner)
        return None if life is None else life.load

    def past(self) -> dict[str, Any]:
        """Return the lives of runners and the last decisions as JSON values."""
        name = self._scheduler.name
        with self._lock:
            runners = [
                {
                    "runner": id,
                    "model": shown(name(life.model)),
                    "changes": [[at, state.value] for at, state in life.changes],
                }
                for id, life in self.lives.items()
            ]
            return {"runners": runners, "decisions": [one.to_json(name) for one in self._decisions]}

    def _take(self, event: Event) -> None:
        self.count += 1
        self._events.append(event)
        match event:
            case Transition():
                self._change(event)
            case Decision():
                if event.what not in _ROUTINE:
                    self._decisions.append(event)
            case Gap():
                pass
        self._heard(event)

    def _change(self, event: Transition) -> None:
        life = self.lives.setdefault(event.runner, Life(event.model))
        life.change(event.at, event.destination)
        for id, one in [*self.lives.items()]:
            at, state = one.changes[-1]
            if (state is UNLOADED and at < event.at - _PAST_S) or len(self.lives) > _RUNNERS:
                del self.lives[id]
