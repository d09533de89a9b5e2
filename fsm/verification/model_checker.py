"""The model checker: it searches the states that a small core can reach, breadth first.

A search ends when every state was expanded, or after as many states as its scenario says.

Safety: after every event every property of a state and of a transition holds, and a late event changes nothing.
Liveness: from every state the fair order of events, without faults, new requests and cancellations, leads to a state in
which every request is answered and no runner is left. Infinite keep-alives keep idle timers from helping with that.

The search is of the real core, not of a model of it, and a violation comes with the shortest trace to it. Two things
are simplified. The eviction policy is nondeterministic: each candidate is tried as the first victim. Time goes from
deadline to deadline, and states whose deadlines come in the same order count as one state.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum

from fsm.core import Core
from fsm.eviction.policies import Candidate
from fsm.machine.transition_table import IllegalTransition
from fsm.messages.commands import Command
from fsm.messages.events import Event
from fsm.sizing.footprint import Footprint
from fsm.sizing.model_profile import ModelProfile
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
from fsm.verification.property import Checks, Kind, Violated, declare
from fsm.verification.state_invariants import check_state, name_of
from fsm.verification.state_key import StateKeys
from fsm.verification.transition_invariants import check_step

UNKNOWN, END = -1, -2  # in place of a state's number
LONGEST_TRACE = 1000  # events from any state to the end of everything

RAISES_NOTHING = declare(
    "no event makes the core raise",
    Kind.transition,
    "The core takes in every event, late and duplicate ones too, and raises nothing.",
    __name__,
    ids=("D09",),
    asked_by=("search", "simulation", "core tests"),
)
LATE_CHANGES_NOTHING = declare(
    "a late event changes nothing",
    Kind.transition,
    "An event that comes when its request, runner or device claim is over, or a second time, has no effect.",
    __name__,
    ids=("D05",),
    asked_by=("search",),
)
EVERYTHING_ENDS = declare(
    "every request is answered in the end",
    Kind.trace,
    "Where no fault happens and no new request comes, every request is answered, every lease comes back, and every "
    "runner is unloaded; a scheduler that is closed finishes.",
    __name__,
    asked_by=("search", "simulation", "core tests"),
)

of_new_state = Checks[Core](Kind.state, "search")  # asked once of each state: it takes long

Watch = Callable[[int, int], None]  # called with the states and edges seen so far
Trace = tuple["Step", ...]


@dataclass(slots=True)
class NondeterministicPolicy:
    """A policy that may prefer any of the candidates."""

    name: str = "nondeterministic"
    first: int = 0  # which candidate is preferred
    most: int = 1  # candidates, in the longest list since the last reset

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the candidates, beginning with the candidate that is preferred this time."""
        self.most = max(self.most, len(candidates))
        at = self.first % max(1, len(candidates))
        return [*candidates[at:], *candidates[:at]]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a trace: when, the event, and the commands of the core."""

    now: float
    event: Event
    commands: tuple[Command, ...]


@dataclass(frozen=True, slots=True)
class Violation:
    """What does not hold, and the shortest trace to it."""

    name: str  # of the property
    what: str  # in words: its name, and where it does not hold
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
    """A property does not hold in a state; with the event that showed it, and the choice of the policy."""

    def __init__(self, violated: Violated, state: int, event: Event | None = None, choice: int = 0) -> None:
        super().__init__(violated)
        self.violated, self.state, self.event, self.choice = violated, state, event, choice


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
        self.policy = NondeterministicPolicy()
        self.canonical = StateKeys(kinds(scenario), configures=bool(scenario.configures))
        self.seen: dict[bytes, int] = {}
        self.parents = array("q")  # by state: the one it was first reached from
        self.arrivals: list[tuple[Event, int] | None] = []  # by state: the event that led there, and the choice
        self.depths = array("q")
        self.nexts = array("q")  # by state: where the fair order of events leads
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
                if self.nexts[expanded] == UNKNOWN:  # no end: reported below, for the first state that leads there
                    break
            self._see_that_all_end({number: core for number, core, _ in frontier})
        except _Broken as broken:
            name, what = broken.violated.property.name, str(broken.violated)
            violation = Violation(name, what, self._trace(broken))
        depth = self.depths[expanded] if self.seen else 0
        complete = violation is None and not frontier
        return Exploration(self.scenario.name, len(self.seen), self.edges, depth, complete, violation)

    def _begin(self) -> tuple[int, Core, IdHighWater]:
        core = self._start()
        return self._see(self.canonical.key(core), UNKNOWN, None), core, IdHighWater()

    def _start(self) -> Core:
        core = self.make(self.scenario.limits, self.policy)
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
        """Try every event that may come next; yield the states that are new."""
        self._too_late(number, core, past)
        in_order = fair_next_event(core, self.scenario)
        for event in enabled_events(core, self.scenario, past):
            choice, choices = 0, 1
            while choice < choices:
                after, commands = self._try(number, core, event, choice, past)
                choices = max(choices, self.policy.most)
                key = self.canonical.key(after)
                if (found := self.seen.get(key)) is None:
                    found = self._see(key, number, (event, choice))
                    self._leaves_nothing_undone(number, event, choice, after)
                    yield found, after, past.after(event, commands)
                if choice == 0 and event == in_order:
                    self.nexts[number] = found
                choice += 1
        if self.nexts[number] == UNKNOWN:  # the scenario lacks the fair next event
            self.nexts[number] = self._come_back(number, core)

    def _try(self, number: int, core: Core, event: Event, choice: int, past: IdHighWater) -> tuple[Core, list[Command]]:
        after = core.copy()
        after.plans = []
        self.policy.first, self.policy.most = choice, 1
        self.edges += 1
        try:
            commands = after.step(time_of(core, event), event)
            check_state(after)
            check_step(core, event, commands, after, past)
        except Exception as error:
            raise _Broken(_violated(error, after), number, event, choice) from error
        after.plans = None
        return after, commands

    def _leaves_nothing_undone(self, number: int, event: Event, choice: int, after: Core) -> None:
        """Ask the properties of a new state: a later event would plan anew, and hide that this event has not."""
        try:
            of_new_state.ask(after)
        except Violated as violated:
            raise _Broken(violated, number, event, choice) from violated

    def _too_late(self, number: int, core: Core, past: IdHighWater) -> None:
        """A late event is counted, and changes nothing else."""
        after = core.copy()
        for event in stale_events(core, past):
            try:
                commands = after.step(core._state.now, event)
            except Exception as error:
                raise _Broken(_violated(error, after), number, event) from error
            if commands:
                raise _Broken(Violated(LATE_CHANGES_NOTHING, _brief(commands[0])), number, event)
        self.edges += 1
        if self.seen.get(self.canonical.key(after)) != number:
            raise _Broken(Violated(LATE_CHANGES_NOTHING), number, self._which(number, core, past))

    def _which(self, number: int, core: Core, past: IdHighWater) -> Event | None:
        """Return the late event that changed something."""
        for event in stale_events(core, past):
            after = core.copy()
            after.step(core._state.now, event)
            if self.seen.get(self.canonical.key(after)) != number:
                return event
        return None

    def _come_back(self, number: int, core: Core) -> int:
        """Follow the fair order from a state to another that was seen, or to the end; UNKNOWN: to neither."""
        core = core.copy()
        self.policy.first = 0
        for _ in range(LONGEST_TRACE):
            event = fair_next_event(core, self.scenario)
            if event is None:
                return END if _is_over(core._state) else UNKNOWN
            try:
                core.step(time_of(core, event), event)
            except Exception as error:
                raise _Broken(_violated(error, core), number) from error
            found = self.seen.get(self.canonical.key(core), number)
            if found != number:
                return found
        return UNKNOWN

    def _see_that_all_end(self, frontier: Mapping[int, Core]) -> None:
        """Follow the fair order from every state to the end; raise _Broken for the first state that leads to none.

        Where the order leads to the frontier, it goes on among states that were not seen, until it is back.
        """
        ends = bytearray(len(self.nexts))
        for number in range(len(self.nexts)):
            passed: dict[int, None] = {}
            at = number
            while at != END and not ends[at]:
                if at in frontier and self.nexts[at] == UNKNOWN:
                    self.nexts[at] = self._come_back(at, frontier[at])
                if at in passed or self.nexts[at] == UNKNOWN:
                    raise _Broken(Violated(EVERYTHING_ENDS, "not from here on"), number)
                passed[at] = None
                at = self.nexts[at]
            for at in passed:
                ends[at] = 1

    def _trace(self, broken: _Broken) -> Trace:
        """Replay the shortest trace to a state, and the event that broke it, or the fair next event."""
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
            self.policy.first = choice
            steps.append(_step(core, event))
        return tuple(steps)


def _is_over(state: CoreState) -> bool:
    """Tell whether no request, runner, claim or account is left."""
    return not (state.groups or state.runners or state.requests or state.claims or state.ledger.accounts)


def _step(core: Core, event: Event) -> Step:
    """Take a step of a trace; a step that raises returns no commands."""
    now = time_of(core, event)
    try:
        return Step(now, event, tuple(core.step(now, event)))
    except Exception:
        return Step(now, event, ())


def _violated(error: Exception, core: Core) -> Violated:
    """Return which property an exception is a violation of."""
    if isinstance(error, Violated):
        return error
    said = str(error) if isinstance(error, AssertionError | IllegalTransition) else repr(error)
    for runner in core._state.runners.values():
        said = said.replace(repr(runner), name_of(runner))
    return Violated(RAISES_NOTHING, said)


@of_new_state(ids=("D06",))
def nothing_is_left_undone(core: Core) -> None:
    """Planning again would change nothing, unless a plan is due: everything that can be done for a request is done."""
    undone = core.undone() if not core.plan_due else ()
    assert not undone, _brief(undone[0])


def in_words(trace: Trace) -> str:
    """Return a trace as lines: the events and the commands, without the fields that have their defaults."""
    groups = []
    for number, step in enumerate(trace, 1):
        done = ", ".join(map(_brief, step.commands)) or "nothing"
        groups.append(f"{number:3}. at {step.now:g} s  {_brief(step.event)}\n{'':13} -> {done}")
    return "\n".join(groups)


def _brief(thing: object) -> str:
    """Return a record without the fields that have their defaults, and without what a model is made of."""
    if isinstance(thing, tuple):
        return f"({', '.join(map(_brief, thing))})"
    if isinstance(thing, Enum):
        return thing.name
    if isinstance(thing, ModelProfile | Footprint):
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
