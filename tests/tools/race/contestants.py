"""The contestants: each opens with a folder of models and gives out a function that answers a request."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fsm.machine.runner import LOADING
from fsm.messages.decision_log import Transition
from scheduler import Lease, ModelSpec, RunnerCrashed, Scheduler, Settings
from scheduler.runtime.event_stream import EventStream
from tests.tools.race.trace import Ask, Asker, Killed, clock

PATIENCE_S = 600.0  # for one answer, of every contestant


@dataclass(frozen=True, slots=True)
class Course:
    """The conditions of a race, the same for every contestant."""

    folder: Path  # of the models, NAME.gguf each
    models: tuple[str, ...]
    room: int  # models that may be loaded at once
    tokens: int  # of every answer

    def spec(self, model: str) -> ModelSpec:
        """Return a model as the scheduler takes it."""
        return ModelSpec(model, str(self.folder / f"{model}.gguf"))

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of every request beside its question, in the words of llama.cpp's server."""
        return {"max_tokens": self.tokens, "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Opened:
    """A contestant that is ready for requests."""

    ask: Asker
    loads: Callable[[], int]  # loads begun so far
    details: Callable[[], dict[str, object]] = dict


@dataclass(frozen=True, slots=True)
class Contestant:
    """One contestant of the race."""

    key: str  # the name by which it is chosen
    name: str
    missing: str  # why it cannot take part; empty: it can
    open: Callable[[Course], Any]  # a context manager that yields an `Opened`


def settings(course: Course, **others: Any) -> Settings:
    """Return settings under which only the number of models is bounded, on the host alone."""
    return Settings(gpus=False, measurement_file=None, max_runners=course.room, event_buffer=1_000_000, **others)


class Tally:
    """Counts the scheduler's events: loads, and the seconds in which a model was loading."""

    def __init__(self, events: EventStream) -> None:
        self.loads = 0
        self.load_s: list[float] = []
        self._begun: dict[int, float] = {}
        self._thread = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._thread.start()

    def _read(self, events: EventStream) -> None:
        for entry in events:
            if not isinstance(entry, Transition):
                continue
            if entry.trigger == "launch":
                self.loads += 1
                self._begun[entry.runner] = entry.at
            elif entry.source is LOADING:
                self.load_s.append(entry.at - self._begun.pop(entry.runner))

    def details(self) -> dict[str, object]:
        """Return the figures of the loads."""
        mean = sum(self.load_s) / len(self.load_s) if self.load_s else 0.0
        return {"load_mean_s": round(mean, 3), "load_max_s": round(max(self.load_s, default=0.0), 3)}


def _use(lease: Lease, ask: Ask, course: Course) -> float:
    granted_at = clock()
    try:
        lease.chat(ask.question, timeout=PATIENCE_S, **course.parameters())
    except RunnerCrashed as error:
        raise Killed(str(error)) from error
    return granted_at


@contextmanager
def loadmaster(course: Course, **others: Any) -> Iterator[Opened]:
    """The scheduler in this process, with its defaults but for `others`."""
    with Scheduler(settings(course, **others)) as scheduler:
        tally = Tally(scheduler.events())

        def ask(ask: Ask) -> float:
            with scheduler.acquire(course.spec(ask.model)) as lease:
                return _use(lease, ask, course)

        yield Opened(ask, lambda: tally.loads, tally.details)


@contextmanager
def room_for_all(course: Course) -> Iterator[Opened]:
    """The scheduler with room for all models: the time that is left is the engine's answers."""
    with loadmaster(replace(course, room=len(course.models))) as opened:
        yield opened


class Turnstile:
    """Lets one thread through at a time, in the order of their arrival."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Wait for a turn, and end it afterwards."""
        turn = threading.Event()
        with self._lock:
            self._waiting.append(turn)
            if self._waiting[0] is turn:
                turn.set()
        turn.wait()
        try:
            yield
        finally:
            with self._lock:
                self._waiting.popleft()
                if self._waiting:
                    self._waiting[0].set()


@contextmanager
def reference(course: Course) -> Iterator[Opened]:
    """The same scheduler made to decide as the reference does, as far as its settings and one turnstile can.

    The victim is chosen by keep-alive and then by path, and expires at once, busy or not. A request that needs a load
    waits until no earlier request does; a request whose model is loaded does not wait.
    """
    order = settings(course, eviction="keep-alive", max_host_loads=1, min_residency=0, max_wait=0)
    with Scheduler(order) as scheduler:
        tally, turnstile = Tally(scheduler.events()), Turnstile()

        def warm(model: str) -> bool:
            return any(one.model == model and one.state in ("ready", "idle") for one in scheduler.status().runners)

        def ask(ask: Ask) -> float:
            if warm(ask.model):
                lease = scheduler.acquire(course.spec(ask.model))
            else:
                with turnstile.passing():
                    lease = scheduler.acquire(course.spec(ask.model))
            with lease:
                return _use(lease, ask, course)

        yield Opened(ask, lambda: tally.loads, tally.details)
