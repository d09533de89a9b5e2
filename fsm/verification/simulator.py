"""The core on virtual time, in an environment that is drawn from a seed, faults included; checked after every step.

Safety: the properties of a trace, and of plans, are asked after every event; `every` says how often those of a state.
Liveness: after the last event of the seed all faults end and no new request comes, and the core must settle: every
request is answered, every lease is released, no runner is left. Where closing is among the faults, the scheduler is
closed by then, and every runner must be unloaded although no lease is released.
A violation comes with as few of the seed's events as are needed to see it again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from fsm.core import Core
from fsm.machine.request import RequestState
from fsm.machine.runner import RUNNING, STOPPING, Runner
from fsm.messages.commands import Command
from fsm.messages.decision_log import Entry
from fsm.messages.events import ClaimGranted, Close, Event, Exited, Expire, Inspected, Loaded, Release, Sampled, Tick
from fsm.verification.decision_coverage import Coverage, situation_of
from fsm.verification.declared_model import profile_of
from fsm.verification.model_checker import EVERYTHING_ENDS, RAISES_NOTHING, Step, Trace, Violation
from fsm.verification.plan_invariants import check_outcome
from fsm.verification.property import Violated
from fsm.verification.sim_config import SimConfig, draw_sim_config
from fsm.verification.sim_environment import LONG_S, LONGER, SLOWER, SimEnvironment
from fsm.verification.state_invariants import check_state
from fsm.verification.trace_auditor import TraceAuditor

CLOSE_S = 10.0
PAUSE_S = 0.05  # between two events while it settles
SETTLING = 5000  # events within which a core settles
MOST_STEPS = 400_000  # that shrinking a trace may take
OVERSLEPT_S = 3000.0  # a gap lasts no longer
LATER = 0.5  # of the plans that are due
MOST_PRIORITIES = 3  # between two request specifications

Make = Callable[..., Core]
Recorded = tuple[float, Event]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one seed."""

    config: SimConfig
    steps: int  # the liveness phase among them
    virtual_s: float
    violation: Violation | None


@dataclass(slots=True)
class _Watched:
    """A core whose properties are asked after every step."""

    core: Core
    auditor: TraceAuditor
    every: int  # the properties of a state are asked after so many steps, and when the core has finished
    coverage: Coverage | None = None
    recorded: list[Recorded] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    def step(self, now: float, event: Event) -> list[Command]:
        """Have the core take in an event; raises Violated where a property does not hold."""
        core, entries, coverage = self.core, self.entries, self.coverage
        self.recorded.append((now, event))
        situation = situation_of(core, event) if coverage is not None else ""
        late = core.late
        try:
            commands = core.step(now, event)
            self.auditor.step(now, event, commands, entries, core._state.queued)
            check_outcome(event, commands, core)
            if core.plans:
                core.plans.clear()
            if len(self.recorded) % self.every == 0 or core.finished:
                check_state(core)
        except Violated:
            raise
        except Exception as error:
            raise Violated(RAISES_NOTHING, f"{type(error).__name__}: {error}") from error
        if coverage is not None:
            coverage.add(situation, event, commands, entries, core.late > late)
        entries.clear()
        return commands


def simulate(
    draw: Random,
    most: int,
    *,
    make: Make = Core,
    every: int = 1,
    coverage: Coverage | None = None,
    shrinks: bool = True,
    plans_later: bool = False,
) -> Outcome:
    """Run one seed for `most` steps and then until it has settled; with coverage, what it showed is added to that."""
    config = draw_sim_config(draw)
    config = replace(config, limits=replace(config.limits, plans_later=plans_later))
    watched = _watched(config, make, every, coverage)
    environment = SimEnvironment(config, draw)
    violation = None
    try:
        _run(watched, environment, most)
        if config.faults.closes and not watched.core._state.closing:  # with all that is under way
            watched.step(environment.now, Close(CLOSE_S))
        _settle(watched, config)
    except Violated as violated:
        kept, what = watched.recorded, str(violated)
        if shrinks:
            kept = _shrink(config, make, kept, what)
        violation = Violation(violated.property.name, what, _trace(config, make, kept))
    if coverage is not None:
        coverage.preloads += environment.preloads
    return Outcome(config, len(watched.recorded), watched.core._state.now, violation)


def _watched(config: SimConfig, make: Make, every: int, coverage: Coverage | None = None) -> _Watched:
    core = make(config.limits, config.policy)
    watched = _Watched(core, TraceAuditor(longest_wait_s(config), config.limits), every, coverage)
    core.decision_log, core.plans = watched.entries, []
    return watched


def longest_wait_s(config: SimConfig) -> float:
    """Return a time within which every request is answered: each request group has its turn, and each turn has an end.

    A turn is the wait for busy runners, their last leases, their end, and two loads: a load may run out of memory once.
    """
    limits, faults = config.limits, config.faults
    load_s = 2 * config.load_s * (SLOWER if faults.slow_load else 1)
    load_s += limits.load_timeout_s if faults.hung_load else 0.0
    load_s += limits.claim_timeout_s if limits.claims else 0.0
    turn_s = max(limits.max_wait_s, limits.min_residency_s or load_s)
    turn_s += 2 * config.hold_s * (LONGER if faults.forgets else 1)
    turn_s += (LONG_S if faults.stuck else 1.0) + limits.recovery_timeout_s
    turn_s += 2 * load_s
    longest_s = (1 + len(config.specs)) * turn_s + MOST_PRIORITIES * limits.priority_s
    return longest_s + (2 * OVERSLEPT_S if faults.gap else 0.0)


def _run(watched: _Watched, environment: SimEnvironment, most: int) -> None:
    """Let time pass from event to event."""
    core, draw, gap = watched.core, environment.draw, environment.config.faults.gap / 1000
    overslept = 0  # events that come before the Tick that is due
    environment.begin()
    while len(watched.recorded) < most:
        deadline = core.deadline()
        if gap and draw.random() < gap:
            environment.now += OVERSLEPT_S * draw.random()
            overslept = draw.randrange(20)
        overslept = max(0, overslept - 1)
        event: Event | None
        if core.plan_due and draw.random() < LATER:  # its thread comes later than the next event
            event = environment.next_event()
        elif deadline < environment.next_at() and not overslept:
            environment.now = max(environment.now, deadline)
            event = Tick()
        else:
            event = environment.next_event()
        if event is not None:
            for command in watched.step(environment.now, event):
                environment.perform(command)
        if core.finished:
            return


def _settle(watched: _Watched, config: SimConfig) -> None:
    """Let the core settle without faults; raises Violated where it does not."""
    core = watched.core
    for _ in range(SETTLING):
        now = core._state.now + PAUSE_S
        event = Tick() if core.deadline() <= now else _in_order(core, config)
        if event is None:
            break
        if isinstance(event, Tick):
            now = max(core._state.now, core.deadline())
        if now == math.inf:
            raise Violated(EVERYTHING_ENDS, "a request waits, and no event will ever come")
        watched.step(now, event)
    else:
        raise Violated(EVERYTHING_ENDS, "the core does not settle")
    _nothing_left(core)
    if not core._state.closing:
        watched.step(core._state.now, Close(CLOSE_S))
    if not core.finished:
        raise Violated(EVERYTHING_ENDS, "the scheduler is closed and never finished")


def _in_order(core: Core, config: SimConfig) -> Event | None:
    """Return the next event while no fault happens and no new request comes; None: all is over.

    A closing scheduler gets no help: no load ends, no lease is released, and time passes for the leases alone.
    """
    state = core._state
    for model in state.models.values():
        if model.inspecting:
            asked = state.options_asked_of(model.id)
            return Inspected(model.id, profile_of(dict(config.models)[model.id], asked, config.defaults))
    if not state.closing:
        for number in state.claims:
            return ClaimGranted(number)
        for runner in state.runners.values():
            if runner.process_state is RUNNING and runner.loaded_at is None:
                return Loaded(runner.id, None, runner.placement.bytes)
    for runner in state.runners.values():
        if runner.process_state is STOPPING:
            return Exited(runner.id, 0)
    if any(not runner.process for runner in state.runners.values()):
        return _all_back(core, config)
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


def _all_back(core: Core, config: SimConfig) -> Sampled:
    """Return a reading in which only the memory is taken that live processes occupy."""
    used: dict[str, int] = {}
    alive: list[Runner] = [runner for runner in core._state.runners.values() if runner.process]
    for runner in alive:
        for device, size in runner.placement.bytes:
            used[device] = used.get(device, 0) + size
    devices = tuple(
        replace(one, free_bytes=max(0, one.capacity_bytes - used.get(one.memory, 0))) for one in config.devices
    )
    return Sampled(devices, tuple((runner.id, runner.placement.bytes) for runner in alive), core._state.samples)


def _nothing_left(core: Core) -> None:
    state = core._state
    left = [
        name
        for name, things in (
            ("requests", state.requests), ("runners", state.runners), ("accounts", state.ledger.accounts),
            ("claims", state.claims), ("groups", state.groups),
        )
        if things
    ]  # fmt: skip
    if left:
        raise Violated(EVERYTHING_ENDS, f"left over at the end: {', '.join(left)}")


# -- violations -------------------------------------------------------------------------------------------------------


def failure_of(config: SimConfig, make: Make, recorded: Sequence[Recorded]) -> str | None:
    """Replay events on a new core, then let it settle; return what does not hold, if anything."""
    watched = _watched(config, make, every=1)
    try:
        for now, event in recorded:
            watched.step(now, event)
        _settle(watched, config)
    except Violated as violated:
        return str(violated)
    return None


def _shrink(config: SimConfig, make: Make, recorded: Sequence[Recorded], what: str) -> list[Recorded]:
    """Return as few of the events as still fail in the same way: smaller and smaller pieces are left out."""
    kept = list(recorded)
    steps = 0
    size = len(kept) // 2
    while size:
        at = 0
        while at < len(kept) and steps < MOST_STEPS:
            fewer = kept[:at] + kept[at + size :]
            steps += len(fewer)
            if _alike(failure_of(config, make, fewer), what):
                kept = fewer
            else:
                at += size
        size //= 2
    return kept


def _alike(one: str | None, other: str) -> bool:
    """Tell whether two failures are the same but for the numbers in them."""
    return one is not None and re.sub(r"\d+", "#", one) == re.sub(r"\d+", "#", other)


def _trace(config: SimConfig, make: Make, recorded: Sequence[Recorded]) -> Trace:
    """Replay events and note the commands of each step."""
    core = make(config.limits, config.policy)
    steps = []
    for now, event in recorded:
        try:
            commands = tuple(core.step(now, event))
        except Exception:
            commands = ()
        steps.append(Step(now, event, commands))
    return tuple(steps)
