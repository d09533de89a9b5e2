"""The core on virtual time, in a world that is drawn from a seed, faults included; checked after every step.

Safety: the audit is asked after every event, the core's own check as often as it is told to. Liveness: then all faults
end, nobody new asks, and everything must settle: whoever waits is answered, every lease comes back, the pool is empty.
Where closing is among the faults it is closed by then, and must become empty although nobody gives anything back.
What fails comes with as few of its events as are needed to have it fail again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from fsm.core import Core
from fsm.machine.request import RequestState
from fsm.machine.runner import Runner
from fsm.messages.commands import Command
from fsm.messages.decision_log import Entry
from fsm.messages.events import ClaimGranted, Close, Event, Exited, Expire, Inspected, Loaded, Release, Sampled, Tick
from fsm.verification.decision_coverage import Coverage, situation_of
from fsm.verification.model_checker import Step, Trace, Violation
from fsm.verification.service_guarantees import see_that_plans_are_fair
from fsm.verification.sim_config import SimConfig, draw_sim_config
from fsm.verification.sim_environment import LONG_S, LONGER, SLOWER, SimEnvironment
from fsm.verification.trace_auditor import TraceAuditor

CLOSE_S = 10.0
PAUSE_S = 0.05  # between two events while it settles
SETTLING = 5000  # events within which a core settles
MOST_STEPS = 400_000  # that shrinking a trace may take
OVERSLEPT_S = 3000.0  # a gap lasts no longer
MOST_PRIORITIES = 3  # between two wishes

Make = Callable[..., Core]
Recorded = tuple[float, Event]


class Broken(Exception):
    """Something does not hold."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one seed."""

    scene: SimConfig
    steps: int  # the liveness phase among them
    virtual_s: float
    violation: Violation | None


@dataclass(slots=True)
class _Watched:
    """A core that is looked at after every step."""

    core: Core
    audit: TraceAuditor
    every: int  # the core's own check is made after so many steps, and when it has finished
    coverage: Coverage | None = None
    recorded: list[Recorded] = field(default_factory=list)
    journal: list[Entry] = field(default_factory=list)

    def step(self, now: float, event: Event) -> list[Command]:
        """Have the core take in an event; raises Broken where it does what it may not, or raises itself."""
        core, journal, coverage = self.core, self.journal, self.coverage
        self.recorded.append((now, event))
        situation = situation_of(core, event) if coverage is not None else ""
        late = core.late
        try:
            commands = core.step(now, event)
            self.audit.step(now, event, commands, journal, core._state.queued)
            if core.plans:
                see_that_plans_are_fair(core, commands)
                core.plans.clear()
            if isinstance(event, Tick):
                assert core.deadline() > now, "due, although its Tick has come"
            if len(self.recorded) % self.every == 0 or core.finished:
                core.check()
        except Exception as error:
            raise Broken(f"{type(error).__name__}: {error}") from error
        if coverage is not None:
            coverage.add(situation, event, commands, journal, core.late > late)
        journal.clear()
        return commands


def simulate(
    draw: Random,
    most: int,
    *,
    make: Make = Core,
    every: int = 1,
    coverage: Coverage | None = None,
    shrinks: bool = True,
) -> Outcome:
    """Run one seed for `most` steps and then until it has settled; with coverage, what it showed is added to that."""
    scene = draw_sim_config(draw)
    watched = _watched(scene, make, every, coverage)
    world = SimEnvironment(scene, draw)
    violation = None
    try:
        _run(watched, world, most)
        if scene.faults.closes and not watched.core._state.closing:  # with all that is under way
            watched.step(world.now, Close(CLOSE_S))
        _settle(watched, scene)
    except Broken as broken:
        kept, what = watched.recorded, str(broken)
        if shrinks:
            kept = _shrink(scene, make, kept, what)
        violation = Violation(what, _way(scene, make, kept))
    if coverage is not None:
        coverage.preloads += world.preloads
    return Outcome(scene, len(watched.recorded), watched.core._state.now, violation)


def _watched(scene: SimConfig, make: Make, every: int, coverage: Coverage | None = None) -> _Watched:
    core = make(scene.limits, scene.policy)
    watched = _Watched(core, TraceAuditor(longest_wait_s(scene), scene.limits), every, coverage)
    core.decision_log, core.plans = watched.journal, []
    return watched


def longest_wait_s(scene: SimConfig) -> float:
    """Return a time within which everybody is answered: each kind of wish takes its turn, and each turn has an end.

    A turn is the wait for busy runners, what they have left to do, their end, and two loads: one may run out of memory.
    """
    limits, faults = scene.limits, scene.faults
    load_s = 2 * scene.load_s * (SLOWER if faults.slow_load else 1)
    load_s += limits.load_timeout_s if faults.hung_load else 0.0
    load_s += limits.claim_timeout_s if limits.claims else 0.0
    turn_s = max(limits.max_wait_s, limits.min_residency_s or load_s)
    turn_s += 2 * scene.hold_s * (LONGER if faults.forgets else 1)
    turn_s += (LONG_S if faults.stuck else 1.0) + limits.recovery_timeout_s
    turn_s += 2 * load_s
    longest_s = (1 + len(scene.specs)) * turn_s + MOST_PRIORITIES * limits.priority_s
    return longest_s + (2 * OVERSLEPT_S if faults.gap else 0.0)


def _run(watched: _Watched, world: SimEnvironment, most: int) -> None:
    """Let time pass from event to event."""
    core, draw, gap = watched.core, world.draw, world.scene.faults.gap / 1000
    overslept = 0  # events that come before the Tick that is due
    world.begin()
    while len(watched.recorded) < most:
        deadline = core.deadline()
        if gap and draw.random() < gap:
            world.now += OVERSLEPT_S * draw.random()
            overslept = draw.randrange(20)
        overslept = max(0, overslept - 1)
        event: Event | None
        if deadline < world.next_at() and not overslept:
            world.now = max(world.now, deadline)
            event = Tick()
        else:
            event = world.next_event()
        if event is not None:
            for command in watched.step(world.now, event):
                world.perform(command)
        if core.finished:
            return


def _settle(watched: _Watched, scene: SimConfig) -> None:
    """Have nothing go wrong any more until all is over; raises Broken where it never is."""
    core = watched.core
    for _ in range(SETTLING):
        now = core._state.now + PAUSE_S
        event = Tick() if core.deadline() <= now else _in_order(core, scene)
        if event is None:
            break
        if isinstance(event, Tick):
            now = max(core._state.now, core.deadline())
        if now == math.inf:
            raise Broken("somebody waits, and nothing will ever happen")
        watched.step(now, event)
    else:
        raise Broken("it does not settle: what waits is never answered, or the pool never empty")
    _nothing_left(core)
    if not core._state.closing:
        watched.step(core._state.now, Close(CLOSE_S))
    if not core.finished:
        raise Broken("it never finished")


def _in_order(core: Core, scene: SimConfig) -> Event | None:
    """Return what comes next where nothing goes wrong and nobody new asks; None: all is over.

    What is closed gets no help: nothing loads, no lease comes back, and time passes for the leases alone.
    """
    state = core._state
    for model in state.models.values():
        if model.inspecting:
            return Inspected(model.id, dict(scene.models)[model.id])
    if not state.closing:
        for number in state.claims:
            return ClaimGranted(number)
        for runner in state.runners.values():
            if runner.process and runner.loaded_at is None and not runner.stopping:
                return Loaded(runner.id, None, runner.placement.bytes)
    for runner in state.runners.values():
        if runner.process and runner.stopping:
            return Exited(runner.id, 0)
    if any(not runner.process for runner in state.runners.values()):
        return _all_back(core, scene)
    if state.closing:
        return Tick() if any(runner.leases for runner in state.runners.values()) else None
    for request in state.requests.values():
        if request.state is RequestState.granted:
            return Release(request.id)
    if state.groups:
        return Tick()
    for model in state.models.values():
        if model.current is not None:
            return Expire(model.id)
    return None


def _all_back(core: Core, scene: SimConfig) -> Sampled:
    """Return a reading in which nothing is missing but what the processes occupy."""
    used: dict[str, int] = {}
    alive: list[Runner] = [runner for runner in core._state.runners.values() if runner.process]
    for runner in alive:
        for device, size in runner.placement.bytes:
            used[device] = used.get(device, 0) + size
    devices = tuple(
        replace(one, free_bytes=max(0, one.capacity_bytes - used.get(one.memory, 0))) for one in scene.devices
    )
    return Sampled(devices, tuple((runner.id, runner.placement.bytes) for runner in alive), core._state.samples)


def _nothing_left(core: Core) -> None:
    state = core._state
    left = [
        name
        for name, things in (
            ("requests", state.requests), ("runners", state.runners), ("accounts", state.ledger.accounts),
            ("claims", state.claims), ("lines", state.groups),
        )
        if things
    ]  # fmt: skip
    if left:
        raise Broken(f"left over at the end: {', '.join(left)}")


# -- what failed ------------------------------------------------------------------------------------------------------


def failure_of(scene: SimConfig, make: Make, recorded: Sequence[Recorded]) -> str | None:
    """Play events to a new core, then let it settle; return what does not hold, if anything."""
    watched = _watched(scene, make, every=1)
    try:
        for now, event in recorded:
            watched.step(now, event)
        _settle(watched, scene)
    except Broken as broken:
        return str(broken)
    return None


def _shrink(scene: SimConfig, make: Make, recorded: Sequence[Recorded], what: str) -> list[Recorded]:
    """Return as few of the events as still fail in the same way: pieces are left out, smaller and smaller ones."""
    kept = list(recorded)
    steps = 0
    size = len(kept) // 2
    while size:
        at = 0
        while at < len(kept) and steps < MOST_STEPS:
            fewer = kept[:at] + kept[at + size :]
            steps += len(fewer)
            if _alike(failure_of(scene, make, fewer), what):
                kept = fewer
            else:
                at += size
        size //= 2
    return kept


def _alike(one: str | None, other: str) -> bool:
    """Tell whether two failures are the same but for the numbers in them."""
    return one is not None and re.sub(r"\d+", "#", one) == re.sub(r"\d+", "#", other)


def _way(scene: SimConfig, make: Make, recorded: Sequence[Recorded]) -> Trace:
    """Play events once more and note what is done at each."""
    core = make(scene.limits, scene.policy)
    steps = []
    for now, event in recorded:
        try:
            commands = tuple(core.step(now, event))
        except Exception:
            commands = ()
        steps.append(Step(now, event, commands))
    return tuple(steps)
