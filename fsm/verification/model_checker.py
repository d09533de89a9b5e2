"""The states that a small core can reach, breadth first: what must always hold does in each, and each can be left.

A search ends when there are no more, or after as many as its scenario says.

Safety: after every event the core's own check holds, no step is wrong by the rules of `judge`, and what comes too late
changes nothing. Liveness: from every state the order of a world without faults, new requests and leave-taking leads to
one where everybody is answered and the pool is empty. Where keep-alives are infinite no idle timer can help with that.

The search is of the real core, not of a model of it; what is found comes with the shortest way to it. Two things are
made smaller than life. The eviction policy is an oracle: each victim that may be preferred is tried. Time goes from
deadline to deadline, and states whose deadlines come in the same order are taken for one.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum

from fsm.core import Core
from fsm.domain.model_info import ModelInfo
from fsm.eviction.policies import Candidate
from fsm.machine.transition_table import IllegalTransition
from fsm.messages.commands import Command
from fsm.messages.events import Event
from fsm.sizing.footprint import Footprint
from fsm.state.core_state import CoreState
from fsm.verification.environment import (
    IdHighWater,
    Scenario,
    begin,
    enabled_events,
    fair_next_event,
    kinds,
    stale_events,
    time_of,
)
from fsm.verification.state_key import StateKeys
from fsm.verification.transition_invariants import judge

UNKNOWN, END = -1, -2  # in place of a state's number
LONGEST_WAY = 1000  # events from any state to the end of everything

Watch = Callable[[int, int], None]  # called with the states and edges seen so far
Trace = tuple["Step", ...]


@dataclass(slots=True)
class NondeterministicPolicy:
    """A policy that may prefer any runner there is to choose from."""

    name: str = "oracle"
    first: int = 0  # which candidate is preferred
    most: int = 1  # candidates that there were to choose from

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return them beginning with the one that is preferred this time."""
        self.most = max(self.most, len(candidates))
        at = self.first % max(1, len(candidates))
        return [*candidates[at:], *candidates[:at]]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a way: when, what happened, and what the core said to do."""

    now: float
    event: Event
    commands: tuple[Command, ...]


@dataclass(frozen=True, slots=True)
class Violation:
    """What does not hold, and the shortest way to it."""

    what: str
    trace: Trace


@dataclass(frozen=True, slots=True)
class Exploration:
    """What a search has seen."""

    scenario: str
    states: int
    edges: int
    depth: int  # of the last state that was expanded, in events
    complete: bool  # every state that can be reached was expanded
    violation: Violation | None


class _Broken(Exception):
    """Something does not hold in a state; with the event that showed it, and the oracle's choice."""

    def __init__(self, what: str, state: int, event: Event | None = None, choice: int = 0) -> None:
        super().__init__(what)
        self.what, self.state, self.event, self.choice = what, state, event, choice


def explore(
    scenario: Scenario,
    most: int | None = None,
    *,
    make: Callable[..., Core] = Core,
    watch: Watch = lambda states, edges: None,
) -> Exploration:
    """Search a scenario until every state has been expanded, or `most` have been seen; by default as many as it says.

    `make` takes limits and a policy, like `Core`.
    """
    return _Search(scenario, scenario.most if most is None else most, make, watch).run()


class _Search:
    def __init__(self, scenario: Scenario, most: int, make: Callable[..., Core], watch: Watch) -> None:
        self.scenario = scenario
        self.most = most
        self.make = make
        self.watch = watch
        self.oracle = NondeterministicPolicy()
        self.canonical = StateKeys(kinds(scenario), configures=bool(scenario.configures))
        self.seen: dict[bytes, int] = {}
        self.parents = array("q")  # by state: the one it was first reached from
        self.arrivals: list[tuple[Event, int] | None] = []  # by state: the event that led there, and the choice
        self.depths = array("q")
        self.nexts = array("q")  # by state: where the world's order leads
        self.edges = 0

    def run(self) -> Exploration:
        """Expand one state after the other until there are none left, enough, or one that is broken."""
        expanded, violation = 0, None
        frontier: deque[tuple[int, Core, IdHighWater]] = deque()
        try:
            frontier.append(self._begin())
            while frontier and len(self.seen) < self.most:
                expanded, core, past = frontier.popleft()
                frontier.extend(self._expand(expanded, core, past))
                self.watch(len(self.seen), self.edges)
                if self.nexts[expanded] == UNKNOWN:  # no end: that is told below, of the first state that leads there
                    break
            self._see_that_all_end({number: core for number, core, _ in frontier})
        except _Broken as broken:
            violation = Violation(broken.what, self._way(broken))
        depth = self.depths[expanded] if self.seen else 0
        complete = violation is None and not frontier
        return Exploration(self.scenario.name, len(self.seen), self.edges, depth, complete, violation)

    def _begin(self) -> tuple[int, Core, IdHighWater]:
        core = self._start()
        return self._see(self.canonical.key(core), UNKNOWN, None), core, IdHighWater()

    def _start(self) -> Core:
        core = self.make(self.scenario.limits, self.oracle)
        begin(core, self.scenario)
        return core

    def _see(self, key: bytes, parent: int, arrival: tuple[Event, int] | None) -> int:
        """Return the number of a state that was not seen before."""
        self.seen[key] = number = len(self.seen)
        self.parents.append(parent)
        self.arrivals.append(arrival)
        self.depths.append(0 if parent == UNKNOWN else self.depths[parent] + 1)
        self.nexts.append(UNKNOWN)
        return number

    def _expand(self, number: int, core: Core, past: IdHighWater) -> Iterator[tuple[int, Core, IdHighWater]]:
        """Try everything that may come next; yield the states that are new."""
        self._too_late(number, core, past)
        in_order = fair_next_event(core, self.scenario)
        for event in enabled_events(core, self.scenario, past):
            choice, choices = 0, 1
            while choice < choices:
                after, commands = self._try(number, core, event, choice, past)
                choices = max(choices, self.oracle.most)
                key = self.canonical.key(after)
                if (found := self.seen.get(key)) is None:
                    found = self._see(key, number, (event, choice))
                    self._leaves_nothing_undone(number, event, choice, after)
                    yield found, after, past.after(event, commands)
                if choice == 0 and event == in_order:
                    self.nexts[number] = found
                choice += 1
        if self.nexts[number] == UNKNOWN:  # the scenario has nobody do what comes next in order
            self.nexts[number] = self._come_back(number, core)

    def _try(self, number: int, core: Core, event: Event, choice: int, past: IdHighWater) -> tuple[Core, list[Command]]:
        after = core.copy()
        after.plans = []
        self.oracle.first, self.oracle.most = choice, 1
        self.edges += 1
        try:
            commands = after.step(time_of(core, event), event)
            after.check()
            judge(core, event, commands, after, past)
        except Exception as error:
            raise _Broken(_said(error, after), number, event, choice) from error
        after.plans = None
        return after, commands

    def _leaves_nothing_undone(self, number: int, event: Event, choice: int, after: Core) -> None:
        """See that nobody misses a change: a later event would plan anew, and hide that this one has not."""
        if undone := after.undone():
            raise _Broken(f"left undone: {_brief(undone[0])}", number, event, choice)

    def _too_late(self, number: int, core: Core, past: IdHighWater) -> None:
        """What comes when its time is over is counted, and changes nothing else."""
        after = core.copy()
        for event in stale_events(core, past):
            try:
                commands = after.step(core._state.now, event)
            except Exception as error:
                raise _Broken(f"an event that came too late: {_said(error, after)}", number, event) from error
            if commands:
                raise _Broken("an event that came too late had an effect", number, event)
        self.edges += 1
        if self.seen.get(self.canonical.key(after)) != number:
            raise _Broken("an event that came too late changed something", number, self._which(number, core, past))

    def _which(self, number: int, core: Core, past: IdHighWater) -> Event | None:
        """Return the event that changed something, although it came too late."""
        for event in stale_events(core, past):
            after = core.copy()
            after.step(core._state.now, event)
            if self.seen.get(self.canonical.key(after)) != number:
                return event
        return None

    def _come_back(self, number: int, core: Core) -> int:
        """Follow the world's order from a state to another that was seen, or to the end; UNKNOWN: to neither."""
        core = core.copy()
        self.oracle.first = 0
        for _ in range(LONGEST_WAY):
            event = fair_next_event(core, self.scenario)
            if event is None:
                return END if _is_over(core._state) else UNKNOWN
            try:
                core.step(time_of(core, event), event)
            except Exception as error:
                raise _Broken(_said(error, core), number) from error
            found = self.seen.get(self.canonical.key(core), number)
            if found != number:
                return found
        return UNKNOWN

    def _see_that_all_end(self, frontier: Mapping[int, Core]) -> None:
        """Follow the world's order from every state to the end; of those that lead to none the first is told.

        Where that comes to the frontier it goes on among states that were not seen, until it is back.
        """
        ends = bytearray(len(self.nexts))
        for number in range(len(self.nexts)):
            passed: dict[int, None] = {}
            at = number
            while at != END and not ends[at]:
                if at in frontier and self.nexts[at] == UNKNOWN:
                    self.nexts[at] = self._come_back(at, frontier[at])
                if at in passed or self.nexts[at] == UNKNOWN:
                    raise _Broken("from here on somebody waits for ever, or the pool is never empty", number)
                passed[at] = None
                at = self.nexts[at]
            for at in passed:
                ends[at] = 1

    def _way(self, broken: _Broken) -> Trace:
        """Play the shortest way to a state again, and the event that broke it, or what comes next in order."""
        arrivals = [(broken.event, broken.choice)] if broken.event is not None else []
        number = broken.state
        while number > 0:
            arrival = self.arrivals[number]
            assert arrival is not None, "only the first state was not arrived at"
            arrivals.append(arrival)
            number = self.parents[number]
        core = self._start()
        steps = []
        for event, choice in reversed(arrivals):
            self.oracle.first = choice
            steps.append(_step(core, event))
        return tuple(steps)


def _is_over(state: CoreState) -> bool:
    """Tell whether nothing is left of anybody."""
    return not (state.groups or state.runners or state.requests or state.claims or state.ledger.accounts)


def _step(core: Core, event: Event) -> Step:
    """Take a step of a way; what raises said nothing."""
    now = time_of(core, event)
    try:
        return Step(now, event, tuple(core.step(now, event)))
    except Exception:
        return Step(now, event, ())


def _said(error: Exception, core: Core) -> str:
    """Return what an exception says, runners by their names."""
    said = str(error) if isinstance(error, AssertionError | IllegalTransition) else repr(error)
    for runner in core._state.runners.values():
        said = said.replace(repr(runner), f"runner {runner.id} of {runner.model}")
    return said


def in_words(way: Trace) -> str:
    """Return a way as lines: what happened, and what the core said to do; what is as usual is not said."""
    groups = []
    for number, step in enumerate(way, 1):
        done = ", ".join(map(_brief, step.commands)) or "nothing"
        groups.append(f"{number:3}. at {step.now:g} s  {_brief(step.event)}\n{'':13} -> {done}")
    return "\n".join(groups)


def _brief(thing: object) -> str:
    """Return a record without the fields that have their defaults, and without what a model is made of."""
    if isinstance(thing, tuple):
        return f"({', '.join(map(_brief, thing))})"
    if isinstance(thing, Enum):
        return thing.name
    if isinstance(thing, ModelInfo | Footprint):
        return "a model"
    if not is_dataclass(thing):
        return repr(thing)
    told = []
    for each in fields(thing):
        value = getattr(thing, each.name)
        usual = each.default_factory() if each.default_factory is not MISSING else each.default
        if value != usual:
            told.append(f"{each.name}={_brief(value)}")
    return f"{type(thing).__name__}({', '.join(told)})"
