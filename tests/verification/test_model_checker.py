"""The model checker: which states it visits, which it takes for the same, and which faults it would find."""

from __future__ import annotations

import ast
import gc
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import pytest

from fsm.core import Core
from fsm.domain.devices import HOST
from fsm.domain.options import Options
from fsm.eviction.policies import Candidate
from fsm.machine.request import RequestId, RequestState
from fsm.machine.runner import RunnerId
from fsm.messages.commands import Command, Grant, Launch, Stop
from fsm.messages.events import (
    Acquire,
    Cancel,
    Close,
    Configure,
    Event,
    Exited,
    Expire,
    Inspected,
    Loaded,
    Pin,
    Progress,
    Release,
    Tick,
)
from fsm.state.model_record import ModelRecord
from fsm.verification import state_key
from fsm.verification.declared_model import profile_of
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
from fsm.verification.model_checker import EVERYTHING_ENDS, RAISES_NOTHING, NondeterministicPolicy, explore, in_words
from fsm.verification.property import Violated
from fsm.verification.scenarios import SCENARIOS
from fsm.verification.state_key import LEFT_OUT, StateKeys
from fsm.verification.transition_invariants import check_step
from scheduler.cli import explore as explore_command
from scheduler.cli.main import main
from tests.verification.mutant import Patch
from tests.verification.mutants import MUTANTS

NAMED = {scenario.name: scenario for scenario in SCENARIOS}
ONE_PLACE = NAMED["one-place"]
A, B = ONE_PLACE.specs


def a_core(*happened: Event, scenario: Scenario = ONE_PLACE) -> Core:
    """Return a core that was told these events, each at its time."""
    core = Core(scenario.limits, NondeterministicPolicy())
    begin(core, scenario)
    for event in happened:
        core.step(time_of(core, event), event)
    return core


def inspected(model: str, scenario: Scenario = ONE_PLACE) -> Inspected:
    return Inspected(model, profile_of(dict(scenario.models)[model], [Options()]))


def loaded(core: Core, runner: int) -> Loaded:
    return Loaded(runner, None, core._state.runners[runner].placement.bytes)


def key_of(core: Core, scenario: Scenario = ONE_PLACE, keys: StateKeys | None = None) -> bytes:
    return (keys or StateKeys(kinds(scenario))).key(core)


def alike(one: Core, other: Core, scenario: Scenario = ONE_PLACE) -> bool:
    keys = StateKeys(kinds(scenario))
    return keys.key(one) == keys.key(other)


# -- the search --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_everything_holds_in_the_first_states_of(scenario: Scenario) -> None:
    """Every property holds in the first states of each scenario; `make explore` searches many more."""
    found = explore(scenario, 300)
    assert found.violation is None, f"{found.violation.what}\n{in_words(found.violation.trace)}"
    assert found.states >= 300
    assert found.edges > found.states


def test_every_state_that_one_request_at_a_time_can_lead_to_is_looked_at() -> None:
    """A small scenario is searched to its end below the bound on states."""
    small = replace(ONE_PLACE, models=ONE_PLACE.models[:1], specs=(A,), requests=1, expires=False, closes=False)
    found = explore(small, 100_000)
    assert found.complete and found.violation is None
    assert explore(small, found.states + 1) == found


def test_the_scenarios_are_as_the_page_on_testing_says() -> None:
    """Each scenario of the page on testing has a name of its own and a bound on its states."""
    assert len(NAMED) == len(SCENARIOS)
    millions = sum(scenario.most for scenario in SCENARIOS) / 1_000_000
    said = (Path(state_key.__file__).parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")
    assert f"{len(SCENARIOS)} small scenarios" in said and f"({millions:.1f} million at most)" in said
    assert f"| {len(MUTANTS)} faults put into that core" in said


def test_an_event_that_changes_nothing_is_not_the_end() -> None:
    """A state that the environment's order leads back to itself while a request waits is found."""

    class Deaf(Core):
        def step(self, now: float, event: Event) -> list[Command]:
            return [] if isinstance(event, Inspected) else super().step(now, event)

    found = explore(ONE_PLACE, 200, make=Deaf).violation
    assert found is not None and found.name == EVERYTHING_ENDS.name
    assert [type(step.event) for step in found.trace] == [Acquire], "the shortest trace"


def test_the_way_to_who_waits_for_ever_is_the_shortest_however_many_states_are_seen() -> None:
    """The trace to a request that waits for ever is the shortest, also with a bound on the states."""
    one = next(one for one in MUTANTS if one.name == "the_time_limit_of_a_close_breaks_no_lease")
    ways = []
    for most in (100, 1000):
        found = replace(one, most=most).search().violation
        assert found is not None and found.name == EVERYTHING_ENDS.name
        ways.append([type(step.event) for step in found.trace])
    assert ways == [[Acquire, Inspected, Loaded, Close]] * 2


def test_an_exception_is_found_with_the_event_that_raised_it() -> None:
    """An exception is found, with a trace that ends with the event that raised it."""

    class Broken(Core):
        def _close(self, timeout_s: float) -> None:
            raise KeyError("a runner")

    found = explore(ONE_PLACE, 200, make=Broken).violation
    assert found is not None and found.what == f"{RAISES_NOTHING.name}: KeyError('a runner')"
    assert [step.event for step in found.trace] == [Close(30.0)]


def test_the_oracle_prefers_each_candidate_in_turn() -> None:
    """The nondeterministic policy prefers each candidate in turn."""
    oracle = NondeterministicPolicy(first=1)
    a, b, c = (Candidate(RunnerId(number), A.model, 0, 0.0, 0.0, None, 0, 0.0) for number in (1, 2, 3))
    assert list(oracle.order(0.0, [a, b, c])) == [b, c, a]
    assert oracle.most == 3


def test_a_way_is_told_without_what_is_as_usual() -> None:
    """A trace is told with its events, times and commands, and without the usual answers."""
    found = next(one for one in MUTANTS if one.name == "a_cancel_is_not_answered").search().violation
    assert found is not None
    assert in_words(found.trace).splitlines() == [
        "  1. at 0 s  Acquire(request=1, spec=RequestSpec(model='a', options=Options(), purpose=lease, priority=0))",
        "              -> Inspect(model='a', options=(Options()))",
        "  2. at 0 s  Cancel(request=1)",
        "              -> nothing",
    ]


# -- the state key -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", LEFT_OUT, ids=lambda record: record.__name__)
def test_every_field_of_a_record_is_in_the_key_or_left_out_for_a_reason(record: type) -> None:
    """Every field of a record is in the state key or left out for a reason, so that a new field is considered."""
    tree = ast.parse(Path(state_key.__file__).read_text(encoding="utf-8"))
    names = {"CoreState": "state", "ModelRecord": "model", "RequestGroup": "group", "RequestSpec": "spec"}
    name = {**names, "OpenClaim": "claim"}.get(record.__name__, record.__name__.lower())
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (
            (isinstance(node.value, ast.Name) and node.value.id == name)
            or (isinstance(node.value, ast.Attribute) and node.value.attr == name)
        )
    }
    everything = {field.name for field in fields(record)}
    left_out = set(LEFT_OUT[record])
    assert left_out <= everything, "a name that is left out is no field"
    assert everything - left_out <= read, "a field is neither in the key nor left out"


def test_numbers_of_lives_past_do_not_count() -> None:
    """After a runner that has ended, the state key is as before it, whatever ids were used."""
    first = a_core(Acquire(1, A), inspected("a"))
    again = a_core(Acquire(1, A), inspected("a"), loaded(first, 1), Release(1), Expire("a"), Exited(1, 0))
    begin(again, ONE_PLACE)
    for event in (Acquire(7, A), inspected("a")):
        again.step(0.0, event)
    seen = again._state.models["a"]
    assert list(again._state.runners) == [2]
    seen.measured.clear()  # a measurement of a runner is part of the key
    seen.loads.clear()  # as is whether the file has ever loaded
    assert alike(first, again)


def test_what_was_measured_counts() -> None:
    """A measurement changes the state key, because the next launch is reserved by it."""
    one, other = a_core(Acquire(1, A)), a_core(Acquire(1, A))
    other._state.models["a"].measured[A.options, ()] = ((HOST, 1),)
    assert not alike(one, other)


def test_models_of_one_kind_may_be_exchanged() -> None:
    """Two states that differ in which of two equal models is waited for have the same key."""
    assert alike(a_core(Acquire(1, A)), a_core(Acquire(1, B)))


def test_models_that_will_turn_out_different_may_not() -> None:
    """Two models that an inspection will find different are not exchanged, although neither is inspected yet."""
    claims = NAMED["claims"]
    one, other = (a_core(Acquire(1, want), scenario=claims) for want in claims.specs)
    assert not alike(one, other, scenario=claims)


def test_how_far_off_a_deadline_is_does_not_count_but_the_order_of_deadlines_does() -> None:
    """The order of deadlines is part of the key, and how far off they are is not."""
    near, far, behind = (a_core(Acquire(1, A, None, timeout_s)) for timeout_s in (5.0, 6.0, 0.0))
    assert alike(near, far)
    assert not alike(near, behind)
    first, second = (
        a_core(Acquire(1, A, None, one_s), Acquire(2, B, None, other_s)) for one_s, other_s in ((5.0, 6.0), (6.0, 5.0))
    )
    assert not alike(first, second)


def test_a_clock_that_belongs_to_nothing_counts() -> None:
    """A timer that belongs to nothing is part of the key, because it is a fault."""
    one, other = a_core(), a_core()
    other._state.timers.set(("request", 99), 5.0)
    assert not alike(one, other)


def test_priority_counts_by_the_order_of_turns() -> None:
    """The order of request groups by priority is part of the key."""
    urgent = replace(B, priority=1)
    one = a_core(Acquire(1, A), Acquire(2, B))
    other = a_core(Acquire(1, A), Acquire(2, urgent))
    assert not alike(one, other)


def test_equal_states_have_equal_keys_whatever_they_share() -> None:
    """A copy has the key of its original, although they share no containers."""
    core = a_core(Acquire(1, A), Acquire(2, B), inspected("a"))
    assert alike(core, core.copy())


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_states_with_one_key_have_one_future(scenario: Scenario) -> None:
    """The key has everything that a decision depends on, except how far off deadlines are.

    With exact times, the events that are enabled in two states with one key lead to the same keys.
    """
    keys = StateKeys(kinds(scenario), configures=bool(scenario.configures), exact_times=True)

    def nexts(core: Core, past: IdHighWater) -> dict[bytes, tuple[Core, IdHighWater]]:
        found = {}
        for event in enabled_events(core, scenario, past):
            after = core.copy()
            commands = after.step(time_of(core, event), event)
            found[keys.key(after)] = after, past.after(event, commands)
        return found

    core = Core(scenario.limits, NondeterministicPolicy())
    begin(core, scenario)
    seen = {keys.key(core): (core, IdHighWater())}
    frontier, compared = deque(seen.values()), 0
    while len(seen) < 400:
        for key, state in nexts(*frontier.popleft()).items():
            if key not in seen:
                seen[key] = state
                frontier.append(state)
            elif compared < 100:
                compared += 1
                assert nexts(*state).keys() == nexts(*seen[key]).keys()
    assert compared > 20


def test_how_long_a_runner_rests_is_told_where_a_keep_alive_may_change() -> None:
    """The key has how long a runner was idle where a new keep-alive might stop one and not the other."""
    scenario = next(one for one in SCENARIOS if one.name == "configure")
    keys, cores = StateKeys(kinds(scenario), configures=True), []
    for rested_s in (0.0, 71.0):
        core = a_core(Acquire(1, scenario.specs[0]), inspected("a", scenario), Tick(), scenario=scenario)
        for event in (loaded(core, 1), Release(1)):
            core.step(core._state.now, event)
        core.step(core._state.now + rested_s, Cancel(9))
        cores.append(core)
    assert keys.key(cores[0]) != keys.key(cores[1])
    keep_alive = Configure(keep_alive_s=70.0)
    assert [core.step(core._state.now, keep_alive) for core in cores] == [[], [Stop(1)]]


# -- the environment ---------------------------------------------------------------------------------------------------


def test_time_passes_a_back_off_that_no_timer_marks() -> None:
    """Time passes to the end of a back-off, which has no timer, so that a failed model is requested again."""
    core = a_core(Acquire(1, A), inspected("a"), Exited(1, 1))
    begin(core, ONE_PLACE)  # the runner's memory is back
    assert core.deadline() == math.inf or not core._state.timers.items()
    assert time_of(core, Tick()) == core._state.models["a"].blocked_until == 11.0
    assert Tick() in list(enabled_events(core, ONE_PLACE, IdHighWater(1, 1)))


def test_what_comes_late_is_of_the_lives_that_have_ended() -> None:
    """Late events have the ids of runners and requests that have ended, and of none that lives."""
    core = a_core(Acquire(1, A), inspected("a"), Exited(1, 1), Acquire(2, B))
    events = list(stale_events(core, IdHighWater(requests=2, runners=1)))
    assert Release(1) in events and Exited(1, None) in events
    assert Cancel(2) not in events


def test_what_has_happened_already_comes_late_too() -> None:
    """Events that have happened happen again, or are told of a runner that is not that far yet."""
    core = a_core(Acquire(1, A), inspected("a"))
    core.step(0.0, loaded(core, 1))
    core.step(0.0, Acquire(2, B))
    events = list(stale_events(core, IdHighWater(requests=2, runners=1)))
    assert loaded(core, 1) in events and Progress(1) in events
    assert Release(2) in events and Release(1) not in events
    assert not any(isinstance(event, Close) for event in events)
    core.step(0.0, Close(30.0))
    assert Close(math.inf) in list(stale_events(core, IdHighWater(requests=2, runners=1)))


def test_after_a_close_the_world_helps_nobody_to_the_end() -> None:
    """After a close the environment releases no lease and ends no load by itself."""
    core = a_core(Acquire(1, A), inspected("a"))
    core.step(0.0, loaded(core, 1))
    core.step(0.0, Close(30.0))
    assert fair_next_event(core, ONE_PLACE) == Tick()
    loading = a_core(Acquire(1, A), inspected("a"))
    loading._state.closing = True
    assert fair_next_event(loading, ONE_PLACE) is None


def test_what_may_happen_after_a_close_is_asked_and_closed_again() -> None:
    """After a close the enabled events are further requests, which are refused, and a shorter close."""
    core = a_core(Acquire(1, A), inspected("a"), Close(30.0))
    events = list(enabled_events(core, ONE_PLACE, IdHighWater(1, 1)))
    assert {Acquire(2, A), Acquire(2, B), Close(0.0)} <= set(events)


def test_who_was_granted_may_leave_as_if_they_had_not_been_told() -> None:
    """A cancel may come after the grant, as when the two crossed."""
    core = a_core(Acquire(1, A), inspected("a"))
    core.step(0.0, loaded(core, 1))
    assert {Release(1), Cancel(1)} <= set(enabled_events(core, ONE_PLACE, IdHighWater(1, 1)))


def test_the_worlds_order_ends_with_an_empty_pool() -> None:
    """The environment's order ends with an empty core, and every request is answered."""
    core = a_core(Acquire(1, A), Acquire(2, B))
    answered = []
    while (event := fair_next_event(core, ONE_PLACE)) is not None:
        answered += [one.request for one in core.step(time_of(core, event), event) if isinstance(one, Grant)]
    assert sorted(answered) == [1, 2]
    assert not core._state.runners and not core._state.requests


def test_the_past_remembers_the_highest_numbers() -> None:
    """The highest ids are kept apart from the state, because the state does not have them."""
    launch = Launch(3, "a", A.options, None)
    assert IdHighWater(2, 1).after(Acquire(5, A), [launch]) == IdHighWater(5, 3)
    assert IdHighWater(9, 9).after(Acquire(5, A), [launch]) == IdHighWater(9, 9)


# -- properties of a transition ----------------------------------------------------------------------------------------


def violated(core: Core, event: Event, spoil: Callable[[Core, list[Command]], None]) -> str:
    """Return the name of the property that a step violates after it was spoiled."""
    after = core.copy()
    after.plans = []
    commands = after.step(core._state.now, event)
    check_step(core, event, commands, after, IdHighWater(1, 1))
    spoil(after, commands)
    with pytest.raises(Violated) as caught:
        check_step(core, event, commands, after, IdHighWater(1, 1))
    return caught.value.property.name


def test_a_request_that_is_not_answered_is_found() -> None:
    """A request that vanishes without an answer is found."""
    found = violated(a_core(Acquire(1, A)), Cancel(1), lambda after, said: said.clear())
    assert found == "every request is answered once"


def test_a_lease_that_is_lost_is_found() -> None:
    """A lease that vanishes without a release or a revocation is found."""
    core = a_core(Acquire(1, A), inspected("a"))
    core.step(0.0, loaded(core, 1))

    def lose(after: Core, said: list[Command]) -> None:
        after._state.runners[RunnerId(1)].leases.clear()
        after._state.requests.pop(RequestId(1)).state = RequestState.released

    assert violated(core, Pin("a"), lose) == "a lease is lost only if its holder is told"


def test_a_wait_that_the_core_does_not_look_at_again_is_found() -> None:
    """A step that leaves a waiting request without a deadline or a runner to wait for is found."""
    core = a_core(Acquire(1, A), inspected("a"))
    core.step(0.0, loaded(core, 1))
    core.step(0.0, Acquire(2, B))
    forget: Callable[[Core, list[Command]], None] = lambda after, said: after._state.timers.clear(("plan", 0))  # noqa: E731
    assert violated(core, inspected("b"), forget) == "the core plans again when victims may go"


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_shows_what_it_has_seen(capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints a row for each scenario, and its progress each second."""
    assert main(["explore", "--scenario", "hangs", "--scenario", "claims", "--most", "200"]) == 0
    printed = capsys.readouterr()
    assert "hangs" in printed.out and "claims" in printed.out and "all" in printed.out
    assert "in 2 processes" in printed.out


def test_a_scenario_that_is_named_twice_is_searched_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A scenario that is named twice is searched once."""
    assert main(["explore", "--scenario", "hangs", "--scenario", "hangs", "--most", "100"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("hangs") == 1 and "in 1 process;" in printed


def test_the_command_refuses_a_scenario_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown scenario is refused in one line that names the known ones."""
    assert main(["explore", "--scenario", "everything"]) == 2
    assert "one-place" in capsys.readouterr().err


def test_the_command_tells_the_shortest_way_to_what_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints the shortest trace to a violation and exits with 1."""

    def in_this_process(processes: int, context: object, begin: Callable[..., None], shared: tuple[object]) -> object:
        return ThreadPoolExecutor(1, "search", begin, shared)

    monkeypatch.setattr(explore_command, "ProcessPoolExecutor", in_this_process)
    next(one for one in MUTANTS if one.name == "a_cancel_is_not_answered").plant(Patch(monkeypatch))
    try:
        assert main(["explore", "--scenario", "one-place", "--most", "200"]) == 1
    finally:
        gc.enable()
    printed = capsys.readouterr().out
    assert "every request is answered once: a request is lost, or answered twice" in printed
    assert "2. at 0 s  Cancel(request=1)" in printed


def test_a_model_knows_nothing_of_itself_at_first() -> None:
    """A new model record has no metadata, so the state key has the scenario's declaration in its place."""
    assert ModelRecord("a").profile is None
    assert key_of(a_core(Acquire(1, A))) != key_of(a_core())
