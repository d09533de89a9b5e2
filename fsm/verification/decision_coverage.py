"""What a simulation has made the core do: which rows of the tables, which events in which states, which decisions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import get_args

from fsm.core import Core
from fsm.machine.request import ModelId, RequestState
from fsm.machine.runner import EXPIRING, RUNNER_TABLE, Runner, RunnerState
from fsm.messages.commands import Command, Grant, Reject, RevokeLease
from fsm.messages.decision_log import Entry, Transition
from fsm.messages.events import (
    Acquire,
    Cancel,
    ClaimContended,
    ClaimGranted,
    Close,
    Configure,
    ContextFilled,
    Event,
    Exited,
    Expire,
    FilesReplaced,
    Inspected,
    Loaded,
    OutOfMemory,
    Pin,
    Progress,
    Release,
    Sampled,
    Tick,
    Unpin,
    Unresponsive,
)
from fsm.messages.refusals import Cancelled, Refusal
from fsm.verification.state_diagram import REQUEST_ROWS

Situation = str  # what an event met
Triple = tuple[Situation, type, object]  # and what was decided: a kind of command, refusal or transition

NOTHING, LATE = "nothing", "late"
POOL_EVENTS: frozenset[type] = frozenset((Sampled, Tick, Configure, Close))
RUNNER_EVENTS = (Loaded, Progress, ContextFilled, OutOfMemory, FilesReplaced, Unresponsive, Exited)
MODEL_EVENTS = (Expire, Pin, Unpin, Inspected)
REQUEST_EVENTS = (Acquire, Release, Cancel)
# Where an event meets nothing but these, nothing else is possible.
OF_A_RUNNER = (*(state.value for state in RunnerState if state not in (EXPIRING, RunnerState.unloaded)),
               "draining", "stopping", "recovering", "gone")  # fmt: skip


@dataclass(slots=True)
class Coverage:
    """What has been seen since it was made."""

    triples: dict[Triple, int] = field(default_factory=dict)  # how often each, in the order in which they came first
    first_at: dict[Triple, int] = field(default_factory=dict)  # the step that added each, in that order too
    steps: int = 0
    news_at: int = 0  # the step that added the last triple
    longest: int = 0  # most steps in a row that added none
    preloads: int = 0  # granted; no command tells them apart

    def add(
        self, situation: Situation, event: Event, commands: Sequence[Command], entries: Sequence[Entry], late: bool
    ) -> None:
        """Take in one step."""
        self.steps += 1
        kind, triples = type(event), self.triples
        before = len(triples)
        decided = False
        for command in commands:
            what: object = type(command.refusal) if isinstance(command, Reject) else type(command)
            triples[situation, kind, what] = triples.get((situation, kind, what), 0) + 1
            decided = True
        for entry in entries:
            if isinstance(entry, Transition):
                fired = entry.trigger, entry.source, entry.destination
                triples[situation, kind, fired] = triples.get((situation, kind, fired), 0) + 1
                decided = True
        if not decided:
            none = situation, kind, LATE if late else NOTHING
            triples[none] = triples.get(none, 0) + 1
        if (news := len(triples) - before) > 0:
            for triple in [*islice(reversed(triples), news)][::-1]:
                self._note(triple, self.steps)

    def append(self, other: Coverage) -> None:
        """Take in what was seen elsewhere, as if it had come after this."""
        for triple, step in other.first_at.items():
            if triple not in self.triples:
                self._note(triple, self.steps + step)
        for triple, times in other.triples.items():
            self.triples[triple] = self.triples.get(triple, 0) + times
        self.steps += other.steps
        self.preloads += other.preloads

    def _note(self, triple: Triple, step: int) -> None:
        self.first_at[triple] = step
        self.longest = max(self.longest, step - self.news_at - 1)
        self.news_at = step

    @property
    def without_news(self) -> int:
        """Steps since the last that added something."""
        return self.steps - self.news_at

    def decisions(self) -> dict[str, int]:
        """Return how often each kind of command, refusal and transition came."""
        counted: dict[str, int] = {}
        for (_, _, what), times in self.triples.items():
            counted[_name(what)] = counted.get(_name(what), 0) + times
        return counted

    def pairs(self) -> dict[tuple[Situation, str], int]:
        """Return how often each kind of event met what; an event that had several effects counts once for each."""
        counted: dict[tuple[Situation, str], int] = {}
        for (situation, kind, _), times in self.triples.items():
            counted[situation, kind.__name__] = counted.get((situation, kind.__name__), 0) + times
        return counted

    def rows_never_fired(self) -> list[str]:
        """Return the rows of the runner's table, and of the request's, that nothing has fired."""
        fired = {what for _, _, what in self.triples}
        runners = [
            f"runner: {row.trigger} from {row.source.name}"
            for row in RUNNER_TABLE.rows
            if (row.trigger, row.source, row.destination) not in fired
        ]
        requests = [
            f"request: {row.trigger} from {row.source.name} to {row.destination.name}"
            for row in REQUEST_ROWS
            if not self._request_fired(row.trigger, row.destination, fired)
        ]
        return runners + requests

    def kinds_never_seen(self) -> list[str]:
        """Return the kinds of events, commands and refusals that never came."""
        seen = {kind for _, kind, _ in self.triples} | {what for _, _, what in self.triples}
        kinds = (*get_args(Event), *get_args(Command), *get_args(Refusal))
        return [kind.__name__ for kind in kinds if kind not in seen and kind is not Reject]

    def pairs_never_seen(self) -> list[str]:
        """Return which events of a runner never met which of its states, and which of a model's."""
        seen = self.pairs()
        expected = [(state, kind.__name__) for kind in RUNNER_EVENTS for state in OF_A_RUNNER]
        expected += [(state, kind.__name__) for kind in (*MODEL_EVENTS, Acquire) for state in OF_A_RUNNER]
        return [f"{kind} while {state}" for state, kind in expected if (state, kind) not in seen]

    def _request_fired(self, trigger: str, destination: RequestState, fired: set[object]) -> bool:
        match trigger:
            case "grant" if destination is RequestState.released:
                return self.preloads > 0
            case "grant":
                return Grant in fired
            case "reject":
                return any(what in get_args(Refusal) and what is not Cancelled for what in fired)
            case "cancel":
                return Cancelled in fired
            case "revoke":
                return RevokeLease in fired
            case _:
                return any(situation == "granted" and kind is Release for situation, kind, _ in self.triples)


def situation_of(core: Core, event: Event) -> Situation:
    """Return what an event is about to meet: the state of its runner, of its model's, or of its request."""
    state = core._state
    kind = type(event)
    if kind in POOL_EVENTS:
        return "closing" if state.closing else "requests wait" if state.queued else "no request waits"
    match event:
        case Release(id) | Cancel(id):
            request = state.requests.get(id)
            return "unknown" if request is None else request.state.value
        case Acquire(_, spec) if not spec.model:
            return "memory"
        case ClaimGranted(number) | ClaimContended(number):
            return "claimed" if number in state.claims else "given up"
        case Acquire() | Expire() | Pin() | Unpin() | Inspected():
            return _of_model(core, event.spec.model if isinstance(event, Acquire) else event.model)
        case (
            Loaded(id)
            | Progress(id)
            | ContextFilled(id)
            | OutOfMemory(id)
            | FilesReplaced(id)
            | Unresponsive(id)
            | Exited(id)
        ):
            runner = state.runners.get(id)
            return "gone" if runner is None else _of_runner(runner)
        case _:
            return kind.__name__


def _of_model(core: Core, id: ModelId) -> Situation:
    model = core._state.models.get(id)
    if model is not None and model.current is not None:
        return _of_runner(model.current)
    for runner in core._state.runners.values():
        if runner.model == id:
            return _of_runner(runner)
    return "gone"


def _of_runner(runner: Runner) -> Situation:
    if runner.state is not EXPIRING:
        return runner.state.value
    return "draining" if runner.leases else "stopping" if runner.process else "recovering"


def _name(what: object) -> str:
    if isinstance(what, tuple):
        trigger, source, destination = what
        return f"{trigger} {source.name if source else 'nothing'} → {destination.name}"
    return what.__name__ if isinstance(what, type) else str(what)


def lines_of(coverage: Coverage) -> Iterator[str]:
    """Yield what was covered, as lines for a reader."""
    yield "decisions: " + ", ".join(f"{name} {times:,}" for name, times in sorted(coverage.decisions().items()))
    yield f"(state, event) pairs: {len(coverage.pairs())}; (state, event, decision) triples: {len(coverage.triples)}"
    for what, missing in (
        ("kinds that never came", coverage.kinds_never_seen()),
        ("events that never met a state", coverage.pairs_never_seen()),
        ("rows of tables that never fired", coverage.rows_never_fired()),
    ):
        yield f"{what}: {', '.join(missing) or 'none'}"
