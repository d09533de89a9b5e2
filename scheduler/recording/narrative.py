"""The narrative of a replay: requests, decisions with their reasons and alternatives, and what was waited for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import PurePath
from typing import assert_never

from fsm.core import Core, CoreConfig, HeldView, Snapshot, WaitView
from fsm.domain.devices import HOST, Amounts, DeviceId, DeviceSample
from fsm.machine.request import ModelId, Purpose, RequestId
from fsm.machine.runner import UNLOADED, RunnerId, RunnerState
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
from fsm.messages.decision_log import ConsideredRunner, Decision, DecisionKind, Entry, Transition
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
from fsm.messages.reasons import KeptReason
from fsm.messages.refusals import Cancelled, InvalidModelRefusal, ModelNotFoundRefusal
from scheduler.errors.formatting import format_bytes, format_duration, lines_of, printable
from scheduler.errors.from_refusals import decision_words, error_of
from scheduler.errors.wording import (
    device_reason,
    failure_reason,
    kept_reason,
    revoke_reason,
    transition_reason,
    wait_reason,
)
from scheduler.recording.replay import ReplayedStep, ReplayStarted
from scheduler.recording.request_history import BEFORE, GRANTED_BEFORE, UNSEEN, Wait
from scheduler.recording.timeline import Timeline

# decisions that are narrated with a command or a transition
_BY_A_COMMAND: set[DecisionKind] = {"granted", "rejected", "queued", "waits", "launched"}


@dataclass(frozen=True, slots=True)
class NarrativeLine:
    """One line of a narrative: an event or a decision."""

    at_s: float  # seconds from the recording's beginning
    line: int  # line of the file
    text: str
    step: int  # number of the core's step; 0: of none
    detail: bool = False  # gives details of the line before


class Narrative:
    """Narrates the steps of one replay, in order, and keeps the figures for a summary and a timeline."""

    def __init__(self, names: Mapping[ModelId, str]) -> None:
        self._names = names
        self.begin: float | None = None  # the scheduler's time that counts as 0
        self.end = 0.0  # time of the last step, in the scheduler's time
        self.waits: dict[RequestId, Wait] = {}
        self.loads = self.evictions = 0
        self.timeline = Timeline(0.0, self.name)
        self._core = Core()
        self._seen: Snapshot = self._core.snapshot()  # after the step that is narrated
        self._limits = CoreConfig()  # the limits as last narrated
        self._devices: dict[DeviceId, int] = {}  # capacities as last narrated
        self._models: dict[RunnerId, ModelId] = {}  # of every runner in the recording so far
        self._states: dict[RunnerId, RunnerState] = {}
        self._at_s, self._line, self._step = 0.0, 0, 0

    def tell(self, moment: ReplayStarted | ReplayedStep) -> Iterator[NarrativeLine]:
        """Yield the lines for one step, in order."""
        self._line = moment.line
        self._step = 0 if isinstance(moment, ReplayStarted) else moment.step
        if isinstance(moment, ReplayStarted):
            yield from self._begun(moment)
            return
        self._now(moment.at)
        if not moment.raised:  # else the core is in the middle of a step
            self._seen = self._core.snapshot()
        yield from self._event(moment.event)
        for entry in moment.entries:
            match entry:
                case Transition():
                    self.timeline.add(entry.at, entry.runner, entry.model, entry.destination)
                    self._states[entry.runner], self._models[entry.runner] = entry.destination, entry.model
                    yield from self._transition(entry, moment)
                case Decision() if entry.what not in _BY_A_COMMAND:
                    yield self._say(f"{self.name(entry.model)} {entry.what}: {decision_words(entry, self.name)}")
                    yield from self._considered(entry)
                case Decision(what="launched"):
                    yield self._say(f"{self.name(entry.model)} is started {decision_words(entry, self.name)}")
                case _:
                    pass
        self.evictions += len({id for entry in moment.entries for id in _given_up(entry)})
        reasons = _untold(moment.entries)
        for command in moment.commands:
            yield from self._command(command)
            if isinstance(command, Reject) and command.request in reasons:
                yield from self._considered(reasons[command.request])
        yield from self._waiting(reasons)
        for considered in moment.considered:
            if considered.failure:
                yield self._say(f"the eviction policy raised {considered.failure}: it is passed over")
        if moment.raised:
            yield self._say(f"the decision failed, and the scheduler stopped: {moment.raised}")
        if moment.entries or isinstance(moment.event, Sampled):
            self._note_memory()

    def name(self, id: ModelId) -> str:
        """Return the model's name in the recording, or else its file's name."""
        return printable(self._names.get(id) or PurePath(id).name.removesuffix(".gguf") or "the program's own memory")

    def finish(self) -> None:
        """End the narrative: every request that still waits has waited until here."""
        for wait in self.waits.values():
            if not wait.answer:
                wait.lasts_until(self.end - (self.begin or 0.0))

    @property
    def limit_bytes(self) -> int | None:
        """The bytes of the host that models may take, as last read; None where that is not known."""
        return self._devices.get(HOST)

    def _now(self, at: float) -> None:
        if self.begin is None and math.isfinite(at):
            self.begin = at
            self.timeline = Timeline(at, self.name)
        self.end = max(self.end, at)
        self._at_s = at - (self.begin or 0.0)

    def _say(self, text: str, *, detail: bool = False) -> NarrativeLine:
        """Return the first line of a text, safe to show: text that is read from a file may hold anything."""
        return NarrativeLine(self._at_s, self._line, next(iter(lines_of(text)), ""), self._step, detail)

    def _begun(self, begun: ReplayStarted) -> Iterator[NarrativeLine]:
        """Begin with a restored core: changes since the core before, while nothing was recorded, are taken over."""
        self._core, header = begun.core, begun.header
        seen = self._seen = begun.core.snapshot()
        self._limits = seen.limits
        if seen.at > -math.inf:
            self._now(seen.at)
        if header.missing:
            yield self._say(f"{header.missing} steps are missing here: they were not recorded")
        if self._states or seen.runners:
            living = {runner.id: (runner.model, runner.state) for runner in seen.runners}
            for id, before in list(self._states.items()):
                if id not in living and before is not UNLOADED:
                    self._take_over(id, self._models[id], UNLOADED)
            for id, (model, state) in living.items():
                if self._states.get(id) is not state:
                    self._take_over(id, model, state)
        asked: tuple[WaitView | HeldView, ...] = (*seen.queue, *seen.held)
        requests = {one.request: one for one in asked}
        for wait in self.waits.values():
            if wait.request not in requests:
                wait.answer, wait.holds = wait.answer or UNSEEN, False
        for _, request in sorted(requests.items()):
            self._take_over_request(request)
        if seen.runners or requests:
            names = ", ".join(f"{self._runner(runner.id)} {runner.state.value}" for runner in seen.runners)
            yield self._say(f"it begins with {names or 'no runner'} and {len(seen.queue)} waiting")
        yield from self._waiting({})

    def _take_over(self, id: RunnerId, model: ModelId, state: RunnerState) -> None:
        self._states[id], self._models[id] = state, model
        self.timeline.add(self._seen.at, id, model, state)

    def _take_over_request(self, request: WaitView | HeldView) -> None:
        asked_at_s = request.queued_at - (self.begin or 0.0)
        new = Wait(request.request, self.name(request.model), asked_at_s, request.purpose.value)
        wait = self.waits.setdefault(request.request, new)
        if isinstance(request, HeldView):
            wait.answer, wait.holds = wait.answer or GRANTED_BEFORE, True
        elif not wait.reasons:
            wait.waits_for(BEFORE, asked_at_s)

    # -- events -------------------------------------------------------------------------------------------------------

    def _event(self, event: Event) -> Iterator[NarrativeLine]:
        match event:
            case Acquire():
                yield from self._asked(event)
            case Cancel(request) | Release(request):
                what = "releases" if isinstance(event, Release) else "had left, and releases"
                if (wait := self.waits.get(request)) is not None and wait.holds:
                    wait.holds = False
                    yield self._say(f"{_number(request)} {what} {wait.model}")
            case Expire(wanted):
                yield self._say(f"{self.name(wanted)} is expired")
            case Pin(model):
                yield self._say(f"{self.name(model)} is pinned")
            case Unpin(model):
                yield self._say(f"{self.name(model)} is no longer pinned")
            case Configure():
                before, self._limits = self._limits, self._seen.limits
                changed = [name for name in event.__slots__ if getattr(before, name) != getattr(self._limits, name)]
                if changed:
                    changes = [_limit(name, getattr(self._limits, name)) for name in changed]
                    yield self._say(f"limits change: {', '.join(changes)}")
            case Inspected(model, outcome):
                if isinstance(outcome, ModelNotFoundRefusal | InvalidModelRefusal):
                    yield self._say(f"{self.name(model)} cannot be read")
            case Sampled(devices):
                yield from self._sampled(devices)
            case ClaimContended():
                yield self._say("another program loads on a device that a model is to be loaded on")
            case Close(timeout_s):
                yield self._say(f"the scheduler is closed; leases may last {format_duration(timeout_s)}")
            case Loaded() | OutOfMemory() | FilesReplaced() | Unresponsive() | Exited():
                yield from self._of_a_runner(event)
            case Progress() | ContextFilled() | ClaimGranted() | Tick():
                pass
            case _:
                assert_never(event)

    def _of_a_runner(
        self, event: Loaded | OutOfMemory | FilesReplaced | Unresponsive | Exited
    ) -> Iterator[NarrativeLine]:
        match event:
            case Loaded(runner, _, resident, _):
                yield self._say(f"{self._runner(runner)} is loaded{_prefixed(', and takes ', resident)}")
            case OutOfMemory(runner):
                yield self._say(f"{self._runner(runner)} ran out of memory")
            case FilesReplaced(runner):
                yield self._say(f"the files of {self._runner(runner)} were replaced")
            case Unresponsive(runner, reason):
                yield self._say(f"{self._runner(runner)} does not answer: {failure_reason(reason)}")
            case Exited(runner, code, reason, out_of_memory):
                why = lines_of(reason) or ["never started" if code is None else f"with status {code}"]
                lack = ", for lack of memory" if out_of_memory else ""
                yield self._say(f"the process of {self._runner(runner)} is gone: {why[0]}{lack}")
                for last_words in why[1:]:
                    yield self._say(last_words, detail=True)

    def _asked(self, event: Acquire) -> Iterator[NarrativeLine]:
        spec = event.spec
        name = self.name(spec.model)
        if event.request in self.waits:
            return  # a duplicate, which the core ignores
        self.waits[event.request] = Wait(event.request, name, self._at_s, spec.purpose.value)
        options = [f"{each} {getattr(spec.options, each)}" for each in spec.options.__slots__]
        said = [text for text in options if not text.endswith(" None")]
        if spec.memory:
            said.append(_amounts(spec.memory))
        if spec.priority:
            said.append(f"priority {spec.priority}")
        if event.keep_alive_s is not None:
            said.append(f"keep-alive {format_duration(event.keep_alive_s)}")
        if event.timeout_s is not None:
            said.append(f"for at most {format_duration(event.timeout_s)}")
        verb = "wants loaded" if spec.purpose is Purpose.preload else "asks for"
        yield self._say(f"{_number(event.request)} {verb} {name}" + (f" ({', '.join(said)})" if said else ""))

    def _sampled(self, devices: tuple[DeviceSample, ...]) -> Iterator[NarrativeLine]:
        now = {one.id: one.capacity_bytes for one in devices}
        if now != self._devices:
            self._devices = now
            texts = [f"{one.id} {format_bytes(one.capacity_bytes)}" for one in devices]
            yield self._say(f"memory there is: {', '.join(texts) or 'none'}")

    # -- what was decided ---------------------------------------------------------------------------------------------

    def _transition(self, entry: Transition, moment: ReplayedStep) -> Iterator[NarrativeLine]:
        name, reason = self._runner(entry.runner), transition_reason(entry.why, self.name, entry.model)
        if entry.source is None:
            self.loads += 1
            launch = next(one for one in moment.commands if isinstance(one, Launch) and one.runner == entry.runner)
            layers = "".join(f", {count} layers on {gpu}" for gpu, count in launch.placement.gpu_layers)
            declared = any(one.declared for one in self._seen.runners if one.id == entry.runner)
            known = "as measured before" if launch.placement.measured else "as declared" if declared else "as predicted"
            yield self._say(f"{name} is started: {_amounts(launch.placement.bytes)}, {known}{layers}; {reason}")
            return
        yield self._say(f"{name}: {entry.source.value} → {entry.destination.value}, {reason}")

    def _considered(self, entry: Decision) -> Iterator[NarrativeLine]:
        """Yield the runners and devices that were considered and not taken, with the reasons."""
        runners = [one for one in entry.runners if one.why is not KeptReason.not_needed]
        texts = [f"{self._with_figures(one)}: {kept_reason(one) or 'evicted'}" for one in runners]
        devices = [one for one in entry.devices if not one.taken]
        texts += [f"not on {one.device}: {device_reason(one, entry.devices)}" for one in devices]
        if texts:
            yield self._say("; ".join(texts), detail=True)

    def _with_figures(self, one: ConsideredRunner) -> str:
        cost = "" if one.cost_s is None else f" and {one.cost_s:.2f} s of loading expected"
        leases = "" if not one.leases else f" ({one.leases} {'lease' if one.leases == 1 else 'leases'})"
        return f"{self._runner(one.runner)} with {format_bytes(sum(size for _, size in one.held_bytes))}{cost}{leases}"

    def _command(self, command: Command) -> Iterator[NarrativeLine]:
        match command:
            case Grant(request, runner):
                wait = self._answer(request, "granted")
                if wait is not None:
                    wait.holds = True
                what = self._runner(runner) if runner is not None else "memory of its own"
                yield self._say(f"{_number(request)} is granted {what}{_waited(wait)}")
            case Reject(request, Cancelled()):
                wait = self._answer(request, "cancelled")
                yield self._say(f"{_number(request)} leaves{_waited(wait)}")
            case Reject(request, refusal):
                if isinstance(refusal, InvalidModelRefusal | ModelNotFoundRefusal):
                    refusal = replace(refusal, path=self.name(ModelId(refusal.path)))
                error = error_of(refusal, self.name)
                wait = self._answer(request, type(error).__name__)
                text = next(iter(lines_of(str(error))), "")
                yield self._say(f"{_number(request)} is refused: {text}{_waited(wait)}")
            case RevokeLease(request, reason):
                if (wait := self._answer(request, "lost")) is not None:
                    wait.holds = False
                yield self._say(f"{_number(request)} loses its lease: {revoke_reason(reason)}")
            case NotifyContention(runner, requests):
                told = "its holder is" if len(requests) == 1 else f"its {len(requests)} holders are"
                yield self._say(f"other requests wait for the memory of {self._runner(runner)}; {told} told")
            case Claim(_, devices):
                yield self._say(f"{', '.join(devices)} is to be claimed among the programs on the machine")
            case Finished():
                yield self._say("everything is unloaded")
            case Inspect() | Launch() | Stop() | Sample() | ReleaseClaim() | Prefetch() | PersistMeasurement():
                pass
            case _:
                assert_never(command)

    def _waiting(self, reasons: Mapping[RequestId | None, Decision]) -> Iterator[NarrativeLine]:
        for (_, waits_for), waits in groupby(self._seen.queue, lambda wait: (wait.model, wait.waits_for)):
            reason = printable(wait_reason(waits_for, self.name))
            ids = [wait.request for wait in waits if wait.request in self.waits]
            news = [id for id in ids if self.waits[id].waits_for(reason, self._at_s)]
            if news:
                verb = "waits" if len(news) == 1 else "wait"
                yield self._say(f"{', '.join(map(_number, news))} {verb} for {reason}")
                for entry in [reasons[id] for id in news if id in reasons]:
                    yield from self._considered(entry)

    def _answer(self, request: RequestId, answer: str) -> Wait | None:
        if (wait := self.waits.get(request)) is not None:
            if not wait.answer:  # else the request lost what it held
                wait.lasts_until(self._at_s)
            wait.answer = answer
        return wait

    def _note_memory(self) -> None:
        held = sum(device.held_bytes for device in self._seen.devices if device.id == HOST)
        resident = sum(size for one in self._seen.runners for device, size in one.resident if device == HOST)
        self.timeline.add_memory(self.end, held, resident)

    def _runner(self, id: RunnerId) -> str:
        return f"runner {id}" + (f" of {self.name(self._models[id])}" if id in self._models else "")


def _number(request: RequestId) -> str:
    return f"request {request}"


def _limit(name: str, value: float) -> str:
    return f"{name.removesuffix('_s')} {format_duration(value) if name.endswith('_s') else value}"


def _untold(entries: Sequence[Entry]) -> dict[RequestId | None, Decision]:
    """Return why requests wait or are refused, for decisions whose alternatives no other decision shows."""
    decisions = [entry for entry in entries if isinstance(entry, Decision)]
    told = {entry.request for entry in decisions if entry.what not in _BY_A_COMMAND}
    return {entry.request: entry for entry in decisions if entry.request not in told}


def _given_up(entry: Entry) -> list[RunnerId]:
    """Return the runners that were evicted for another model."""
    if not isinstance(entry, Decision) or entry.what != "evicts":
        return []
    return [one.runner for one in entry.runners if one.taken and one.model != entry.model]


def _amounts(amounts: Amounts) -> str:
    return " and ".join(f"{format_bytes(size)} of {device}" for device, size in amounts) or "nothing"


def _prefixed(before: str, amounts: Amounts) -> str:
    return before + _amounts(amounts) if amounts else ""


def _waited(wait: Wait | None) -> str:
    if wait is None or not wait.reasons:
        return ""
    reasons = ", ".join(f"{took_s:.3f} s for {reason}" for reason, took_s in wait.reasons)
    return f", after {wait.waited_s:.3f} s" + (
        f": {reasons}" if len(wait.reasons) > 1 else f" for {wait.reasons[0][0]}"
    )
