"""The replay of a recording: the core is given the same events once more, and must answer with the same commands.

The file is not trusted. Lines are bounded, only known kinds are decoded, nothing of the file is executed, and every
fault of the file is one `RecordingError` that names the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from typing import BinaryIO, Never, TypeVar, cast

from fsm.core import Core
from fsm.eviction.policies import POLICIES, Candidate, EvictionPolicy
from fsm.eviction.victim_selection import in_words
from fsm.machine.request import ModelId
from fsm.machine.runner import RunnerId
from fsm.messages.commands import Command
from fsm.messages.decision_log import Entry
from fsm.messages.events import Event
from scheduler.errors.exceptions import SchedulerError
from scheduler.recording.codec import Unreadable, decode_command, decode_event, decode_state, encode, schema
from scheduler.recording.recorder import FORMAT, KIND, LONGEST_LINE, Choice, PolicyRaised

Kind = TypeVar("Kind")

_LONGEST_NUMBER = 40  # digits


@dataclass(eq=False)
class RecordingError(SchedulerError):
    """A file is no recording, or is damaged."""

    path: str
    line: int  # 0: the file as a whole
    reason: str

    def _words(self) -> str:
        return f"{self.path}: line {self.line}: {self.reason}" if self.line else f"{self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Header:
    """The beginning of a recording, or of its part after a gap."""

    policy: str  # the policy's name
    own_policy: bool  # the policy was the user's: its choices are in the recording
    step: int  # number of the step that follows
    missing: int  # steps that were left out right before
    schema: str
    version: str  # of the program that wrote the file
    written: str  # when the header was written, in the calendar


@dataclass(frozen=True, slots=True)
class Considered:
    """The candidates that an eviction policy was given, in the order that it chose."""

    candidates: tuple[Candidate, ...]
    failure: str = ""  # what the policy raised, in words; the candidates are in the core's own order then


@dataclass(frozen=True, slots=True)
class ReplayStarted:
    """A core was restored; the steps that follow are steps of `core`."""

    line: int
    header: Header
    core: Core


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """One step, with the core's entries in its decision log."""

    line: int
    at: float  # seconds of the scheduler's clock
    event: Event
    commands: Sequence[Command]
    entries: Sequence[Entry]
    considered: Sequence[Considered]
    step: int  # the step's number, which its entries have too
    raised: str = ""  # a step that failed when it was recorded has failed now


class Difference(Exception):
    """The first step whose commands differ from the recorded ones."""

    def __init__(self, line: int, event: Event, expected: str, got: str) -> None:
        super().__init__(f"line {line}: after {event!r}: expected {expected}, got {got}")
        self.line = line
        self.event = event
        self.expected = expected  # as it was recorded, in JSON; or in words
        self.got = got


class _Recorded:
    """A recorded policy, or one of loadmaster's own; keeps the candidates that it was given."""

    def __init__(self, header: Header) -> None:
        self.name = header.policy
        self.asked: list[Considered] = []
        # choices of this step that are still to come
        self.choices: list[Choice] | None = [] if header.own_policy else None
        self.unanswered = False  # the policy was asked more often than it was recorded
        self._policy: EvictionPolicy | None = None if header.own_policy else POLICIES[header.policy]

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the candidates in the recorded order; raises `PolicyRaised` where the policy raised."""
        if self._policy is not None:
            ordered = self._policy.order(now, candidates)
        elif not self.choices:
            self.unanswered = True
            raise PolicyRaised("nothing is recorded")
        elif isinstance(choice := self.choices.pop(0), str):
            self.asked.append(Considered(tuple(candidates), choice))
            raise PolicyRaised(choice)
        else:
            known = {one.runner: one for one in candidates}
            pairs = [(one, None) if isinstance(one, int) else (one[0], float(one[1])) for one in choice]
            ordered = [replace(known[RunnerId(int(id))], cost_s=cost_s) for id, cost_s in pairs if id in known]
        self.asked.append(Considered(tuple(ordered)))
        return ordered


@dataclass(slots=True)
class Replay:
    """The replay of one file; iterate over it once. Raises `RecordingError`, or the first `Difference`."""

    path: str | PathLike[str]
    steps: int = 0  # replayed so far
    commands: int = 0  # compared so far, and equal
    cut: bool = False  # the file ends in the middle of a line
    names: dict[ModelId, str] = field(default_factory=dict)  # of the models that are known so far
    _line: int = 0
    _due: int = 0  # number of the step that comes next
    _header: Header | None = None  # the last one that was read
    _core: Core | None = None
    _policy: _Recorded | None = None

    def __iter__(self) -> Iterator[ReplayStarted | ReplayedStep]:
        try:
            with Path(self.path).open("rb") as file:
                for text in self._lines(file):
                    yield self._begin(text) if "kind" in text else self._step(text)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            reason = error.strerror if isinstance(error, OSError) else None
            raise RecordingError(fspath(self.path), 0, reason or str(error)) from error
        if self._core is None:
            self._line = 0
            self._wrong("it is empty" if not self.cut else "it ends before its first header does")

    def is_of_another_version(self, header: Header) -> bool:
        """Return whether other versions of the classes wrote the recording."""
        return header.schema != schema()

    def _wrong(self, reason: str) -> Never:
        raise RecordingError(fspath(self.path), self._line, reason)

    def _lines(self, file: BinaryIO) -> Iterator[dict[str, object]]:
        while line := file.readline(LONGEST_LINE + 1):
            self._line += 1
            if not line.endswith(b"\n"):
                if len(line) > LONGEST_LINE:
                    self._wrong(f"it is longer than {LONGEST_LINE} bytes")
                self.cut = True
                return
            try:
                value = json.loads(line, parse_constant=_refuse, parse_int=_int)
            except (ValueError, RecursionError) as error:
                self._wrong(f"it is not JSON as it is recorded: {error}"[:200])
            if not isinstance(value, dict):
                self._wrong("it is not an object")
            if self._core is None and value.get("kind") != KIND:
                self._wrong("this is not a recording of loadmaster")
            yield value

    def _begin(self, text: dict[str, object]) -> ReplayStarted:
        if text["kind"] != KIND or text.get("format") != FORMAT:
            self._wrong(f"it is of format {text.get('format')!r:.20}, and only {FORMAT} can be read")
        header = Header(
            self._take(text, "policy", str),
            self._take(text, "own_policy", bool),
            self._take(text, "step", int),
            self._take(text, "missing", int),
            self._take(text, "schema", str),
            self._take(text, "version", str),
            self._take(text, "written", str),
        )
        self._header = header
        if not header.own_policy and header.policy not in POLICIES:
            self._unreadable(f"there is no policy {header.policy!r:.100}")
        if self._core is not None:
            self._expect(header.step - header.missing)
        self._due = header.step
        self._learn_names(text)
        self._policy = _Recorded(header)
        try:
            state = decode_state(text.get("state"))
            core = Core.restore(state, self._policy)
        except Exception as error:  # a value that was never a core's state may break anything
            self._unreadable(f"its state is not one of a core: {error}")
        core.decision_log = []
        self._core = core
        return ReplayStarted(self._line, header, core)

    def _expect(self, step: int) -> None:
        """Raise `RecordingError` unless this step is due: a line removed or added need not change any decision."""
        if step < self._due:
            self._wrong(f"step {step} comes again, where step {self._due} is due: is this more than one recording?")
        if step > self._due:
            missing = f"step {self._due} is" if step == self._due + 1 else f"steps {self._due} to {step - 1} are"
            self._wrong(f"{missing} missing before it")

    def _unreadable(self, reason: str) -> Never:
        """Refuse what this version cannot make sense of: as damaged for that reason, or as another version's."""
        header = cast(Header, self._header)
        if not self.is_of_another_version(header):
            self._wrong(reason[:400])
        self._wrong(
            f"it was recorded by version {header.version:.40} of loadmaster, whose recordings (schema "
            f"{header.schema:.40}) this version cannot read (schema {schema()}): replay it with the version that "
            "recorded it"
        )

    def _step(self, text: dict[str, object]) -> ReplayedStep:
        core, policy = cast(Core, self._core), cast(_Recorded, self._policy)
        step = self._take(text, "step", int)
        self._expect(step)
        self._due += 1
        at = text.get("at")
        if type(at) not in (int, float):
            self._wrong("it has no time")
        self._learn_names(text)
        raised = self._take(text, "raised", str, "")
        try:
            event = decode_event(text.get("event"))
            expected = [decode_command(command) for command in self._take(text, "commands", list, [])]
        except Unreadable as error:
            self._unreadable(str(error))
        if policy.choices is not None:
            policy.choices = [self._choice(choice) for choice in self._take(text, "choices", list, [])]
        policy.unanswered = False
        policy.asked.clear()
        got, failure = self._ask(core, cast(float, at), event)
        self._compare(event, raised or _text(expected), failure or _text(got), policy)
        self.steps += 1
        self.commands += len(expected)
        entries = tuple(core.decision_log or ())
        core.decision_log = []
        return ReplayedStep(self._line, cast(float, at), event, got, entries, tuple(policy.asked), step, raised)

    def _ask(self, core: Core, at: float, event: Event) -> tuple[Sequence[Command], str]:
        """Return the core's commands, and what the core raised, in words."""
        try:
            return core.step(at, event), ""
        except Exception as error:
            return (), in_words(error)

    def _compare(self, event: Event, expected: str, got: str, policy: _Recorded) -> None:
        if expected != got:
            raise Difference(self._line, event, expected, got)
        if policy.unanswered:
            raise Difference(self._line, event, "no more questions to the policy", "another one")
        if policy.choices:
            raise Difference(self._line, event, "more questions to the policy", f"{len(policy.choices)} fewer")

    def _choice(self, value: object) -> Choice:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(type(one) is int or _is_priced(one) for one in value):
            self._wrong(f"{value!r:.100} is not a policy's choice")
        return cast("list[int | list[int | float]]", value)

    def _learn_names(self, text: dict[str, object]) -> None:
        for pair in self._take(text, "names", list, []):
            match pair:
                case [str(model), str(name)]:
                    self.names[ModelId(model)] = name
                case _:
                    self._wrong(f"{pair!r:.100} is not a model and its name")

    def _take(self, text: dict[str, object], name: str, kind: type[Kind], default: Kind | None = None) -> Kind:
        value = text.get(name, default)
        if type(value) is not kind:
            self._wrong(f"its {name!r} is not what it should be: {value!r:.100}")
        return value


def _text(commands: Sequence[Command]) -> str:
    return json.dumps([encode(command) for command in commands])


def _is_priced(one: object) -> bool:
    return isinstance(one, list) and [type(part) for part in one] in ([int, float], [int, int])


def _refuse(constant: str) -> Never:
    raise ValueError(f"{constant} is not a number")


def _int(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError("a number with too many digits")
    return int(digits)
