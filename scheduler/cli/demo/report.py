"""The report of the demonstration: a checklist from the event stream, every answer, and a summary of them."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from fsm.domain.devices import HOST, MIB
from fsm.machine.request import ModelId
from fsm.machine.runner import EXPIRING, IDLE, LOADING, READY, UNLOADED, RunnerId
from fsm.messages.decision_log import Decision, Entry, Transition
from fsm.messages.reasons import NeededFor, RunnerReason
from scheduler.api.status import Status
from scheduler.cli.demo.models import Player
from scheduler.errors.formatting import format_bytes
from scheduler.recording.timeline import Timeline

_KEEP_ALIVE = (RunnerReason.no_keep_alive, RunnerReason.keep_alive_over)


class Feature(Enum):
    """A feature that the demonstration shows, in the order of the acts."""

    cold_start = "cold start: a model was loaded because a client requested it"
    shared_lease = "shared lease: several clients used one runner at the same time"
    answer = "answer: a model wrote text of its own"
    keep_alive = "keep-alive: an idle runner answered without another load"
    eviction = "eviction: an idle runner was evicted because another model needed its memory"
    drain = "drain: a busy runner took no more clients, ended its answer, and was unloaded"
    expiry = "expiry: an idle runner was unloaded when its keep-alive was over"


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of one request; times are in the scheduler's seconds."""

    client: str
    model: str
    runner: RunnerId | None  # None: the request was never granted
    asked_at: float
    granted_at: float
    ended_at: float
    text: str
    error: str = ""  # empty: the request was answered


@dataclass(frozen=True, slots=True)
class Measured:
    """The most memory of the host that a model's runners took; bytes."""

    private_bytes: int = 0
    shared_bytes: int = 0  # pages of files
    settled: bool = False  # a request filled a runner's context: the measurement has replaced the prediction

    @property
    def total_bytes(self) -> int:
        """The sum of private and shared bytes."""
        return self.private_bytes + self.shared_bytes


class Checklist:
    """Notes when each feature was first seen, from every entry of the event stream, in order."""

    def __init__(self) -> None:
        self.seen_at: dict[Feature, float] = {}
        self._granted: dict[RunnerId, int] = {}  # grants since a runner became ready, so that it is leased
        self._draining: dict[RunnerId, float] = {}  # since when the runner drains

    def note(self, entry: Entry) -> None:
        """Note the features that an entry shows."""
        match entry:
            case Decision(at=at, what="granted", runner=runner) if runner is not None:
                self._granted[runner] = self._granted.get(runner, 0) + 1
                if self._granted[runner] > 1:  # no transition since the first grant: the runner is leased all the while
                    self.see(Feature.shared_lease, at)
            case Transition():
                self._granted.pop(entry.runner, None)
                self._transition(entry)
            case _:
                pass

    def see(self, feature: Feature, at: float) -> None:
        """Note a feature, if it is seen for the first time."""
        self.seen_at.setdefault(feature, at)

    def _transition(self, entry: Transition) -> None:
        match entry.source, entry.destination:
            case (source, destination) if source is LOADING and destination is READY:
                self.see(Feature.cold_start, entry.at)
            case (source, destination) if source is IDLE and destination is READY:
                self.see(Feature.keep_alive, entry.at)
            case (source, destination) if source is IDLE and destination is EXPIRING:
                if _for_another(entry):
                    self.see(Feature.eviction, entry.at)
                elif entry.why in _KEEP_ALIVE:
                    self.see(Feature.expiry, entry.at)
            case (source, destination) if source is READY and destination is EXPIRING:
                if _for_another(entry) and entry.leases:
                    self._draining[entry.runner] = entry.at
                elif entry.why in _KEEP_ALIVE:
                    self.see(Feature.expiry, entry.at)
            case (_, destination) if destination is UNLOADED and entry.runner in self._draining:
                self.see(Feature.drain, self._draining[entry.runner])
            case _:
                pass


@dataclass(slots=True)
class Record:
    """All that was seen; one thread writes entries and status, and the clients' threads add their answers."""

    begin: float  # the scheduler's time that counts as 0
    players: Sequence[Player]
    timeline: Timeline
    checklist: Checklist = field(default_factory=Checklist)
    answers: list[Answer] = field(default_factory=list)
    loaded_at: dict[RunnerId, float] = field(default_factory=dict)
    _leaving: set[RunnerId] = field(default_factory=set)  # expiring or gone
    loads: int = 0
    evictions: int = 0
    drains: int = 0
    missed: int = 0  # entries that the stream dropped
    measured: dict[str, Measured] = field(default_factory=dict)  # by model; models that were never loaded are missing

    def name(self, id: ModelId) -> str:
        """Return a model's name."""
        return next((player.name for player in self.players if player.spec.id == id), id)

    def add_entry(self, entry: Entry) -> None:
        """Add an entry of the event stream."""
        self.checklist.note(entry)
        if isinstance(entry, Decision):
            return
        self.timeline.add(entry.at, entry.runner, entry.model, entry.destination)
        if entry.source is None:
            self.loads += 1
        if entry.source is LOADING and entry.destination is not EXPIRING:
            self.loaded_at[entry.runner] = entry.at
        if entry.destination is EXPIRING:
            self._leaving.add(entry.runner)
            if _for_another(entry):
                self.evictions += 1
                self.drains += entry.leases > 0

    def add_status(self, now: float, status: Status) -> None:
        """Add the memory at `now`."""
        resident = 0
        for runner in status.runners:
            resident += runner.resident_bytes.get(HOST, 0)
            self.add_measured(runner.model, Measured(runner.private_bytes, runner.shared_bytes, runner.settled))
        held = sum(device.held_bytes for device in status.devices if device.id == HOST)
        self.timeline.add_memory(now, held, resident)

    def add_measured(self, model: str, measured: Measured) -> None:
        """Add the memory of a model's runner, of which the most is kept."""
        before = self.measured.get(model, Measured())
        larger = max(before, measured, key=lambda one: one.total_bytes)
        self.measured[model] = replace(larger, settled=before.settled or measured.settled)

    def is_leaving(self, runner: RunnerId) -> bool:
        """Return whether a runner is expiring, or gone."""
        return runner in self._leaving

    def cold(self, answer: Answer) -> bool:
        """Return whether a request had to wait for a load."""
        return answer.runner is not None and self.loaded_at.get(answer.runner, 0.0) > answer.asked_at

    def failures(self) -> tuple[Answer, ...]:
        """The requests that were not answered."""
        return tuple(answer for answer in self.answers if answer.error)


def _for_another(entry: Transition) -> bool:
    return isinstance(entry.why, NeededFor) and not entry.why.load_slot


def summary(record: Record, now: float, expected: Collection[Feature], *, complete: bool) -> list[str]:
    """Return the summary, in lines.

    A missing feature counts as not seen only where the demonstration was `complete`.
    """
    answers, failures = record.answers, record.failures()
    granted = [answer for answer in answers if answer.runner is not None]
    cold = [answer.granted_at - answer.asked_at for answer in granted if record.cold(answer)]
    warm = [answer.granted_at - answer.asked_at for answer in granted if not record.cold(answer)]
    lines = [
        f"Summary of {now - record.begin:.1f} s",
        f"  requests    {len(answers)}: {len(cold)} cold, {len(warm)} warm, {len(failures)} failed",
        f"  loads       {record.loads}",
        f"  evictions   {record.evictions}, {record.drains} of them of a busy runner",
        f"  cold waits  {_waits(cold)}",
        f"  warm waits  {_waits(warm)}",
    ]
    if record.missed:
        lines.append(f"  {record.missed} events were missed, so there was more than is shown here")
    lines += ["", "Memory          predicted    measured =  private +  shared"]
    lines += [_memory_line(record, player) for player in record.players]
    lines.append("  (Shared are pages of the file. The measurement replaces the prediction once a context was full.)")
    lines += ["", "Seen", *(_feature_line(record, feature, feature in expected, complete) for feature in Feature)]
    if any(feature not in expected and feature not in record.checklist.seen_at for feature in Feature):
        lines.append("  (Not here: with these models and this limit there is no occasion for it.)")
    lines += [f"  failed: {answer.client} requested {answer.model}: {answer.error}" for answer in failures]
    return lines


def missing(record: Record, expected: Collection[Feature]) -> list[Feature]:
    """Return the features that should have been seen and were not."""
    return [feature for feature in Feature if feature in expected and feature not in record.checklist.seen_at]


def wait_text(wait_s: float) -> str:
    """Return a wait for a person to read: two digits at least, from microseconds up."""
    if wait_s < 0.001:
        return f"{wait_s * 1e6:.0f} µs"
    return f"{wait_s * 1000:.1f} ms" if wait_s < 0.1 else f"{wait_s:.2f} s"


def quantiles(waits_s: Sequence[float]) -> tuple[float, float]:
    """Return the median and the 95th percentile of at least one value."""
    if len(waits_s) == 1:
        return waits_s[0], waits_s[0]
    cuts = statistics.quantiles(waits_s, n=20, method="inclusive")
    return cuts[9], cuts[18]


def _waits(waits_s: Sequence[float]) -> str:
    if not waits_s:
        return "none"
    median, most = quantiles(waits_s)
    return f"p50 {wait_text(median)}, p95 {wait_text(most)}"


def _memory_line(record: Record, player: Player) -> str:
    measured = record.measured.get(player.name, Measured())
    if not measured.total_bytes:
        return f"  {player.name:<12.24} {format_bytes(player.predicted_bytes):>11}   never loaded"
    sizes = f"{player.predicted_bytes / MIB:>7.1f} MiB {measured.total_bytes / MIB:>7.1f} MiB"
    parts = f"{measured.private_bytes / MIB:>7.1f} {measured.shared_bytes / MIB:>9.1f} MiB"
    share = f"{100 * measured.total_bytes / player.predicted_bytes:.0f} % of it"
    return f"  {player.name:<12.24} {sizes}  {parts}   {share}{', and replaced it' if measured.settled else ''}"


def _feature_line(record: Record, feature: Feature, expected: bool, complete: bool) -> str:
    if (at := record.checklist.seen_at.get(feature)) is not None:
        return f"  ✓ {at - record.begin:6.2f} s  {feature.value}"
    if not expected:
        return f"  – not here  {feature.value}"
    what = "NOT SEEN" if complete else "not yet"
    return f"  ✗ {what:<8}  {feature.value}"
