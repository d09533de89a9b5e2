"""The transition table: what it allows, what it refuses, and what it rejects when it is built."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum

import pytest

from fsm.domain.devices import Placement
from fsm.domain.options import Options
from fsm.machine.runner import EXPIRING, PROCESS_TABLE, RUNNER_TABLE, UNLOADED, ProcessState, Runner, RunnerState
from fsm.machine.transition_table import IllegalTransition, Row, Table, TableError


class Light(Enum):
    red = "red"
    green = "green"
    broken = "broken"


RED, GREEN, BROKEN = Light
ROWS = (Row("go", RED, GREEN), Row("halt", GREEN, RED), Row("fail", GREEN, BROKEN, guard="is_old"))


@dataclass(slots=True)
class Lamp:
    state: Light = RED
    old: bool = True

    def is_old(self) -> bool:
        return self.old


def a_table(*rows: Row[Light]) -> Table[Light]:
    return Table("light", Light, rows or ROWS, initial=RED, final=BROKEN)


# -- firing -----------------------------------------------------------------------------------------------------------


def test_a_trigger_moves_the_subject() -> None:
    """One table serves any number of subjects with a state each."""
    table, lamp, other = a_table(), Lamp(), Lamp()
    table.fire(lamp, "go")
    assert (lamp.state, other.state) == (GREEN, RED)


def test_equal_subjects_are_not_mistaken_for_each_other() -> None:
    """Equal subjects have states of their own, although the library compares models with ==."""
    table, lamps = a_table(), [Lamp(), Lamp()]
    assert lamps[0] == lamps[1]
    for lamp in lamps:
        table.fire(lamp, "go")
    assert [lamp.state for lamp in lamps] == [GREEN, GREEN]


@pytest.mark.parametrize("trigger", ["halt", "fail", "explode"])
def test_a_trigger_that_is_not_allowed_raises(trigger: str) -> None:
    """A trigger that is forbidden or unknown raises and leaves the subject's state."""
    lamp = Lamp()
    with pytest.raises(IllegalTransition, match=f"light: '{trigger}' is not allowed while red") as raised:
        a_table().fire(lamp, trigger)
    assert (raised.value.trigger, raised.value.state, lamp.state) == (trigger, RED, RED)


def test_a_guard_that_refuses_raises() -> None:
    """A guard that refuses raises, although the library would return False."""
    lamp = Lamp(GREEN, old=False)
    with pytest.raises(IllegalTransition):
        a_table().fire(lamp, "fail")
    assert lamp.state is GREEN


def test_a_guard_that_agrees_lets_it_pass() -> None:
    """A guard that agrees lets the transition happen."""
    lamp = Lamp(GREEN)
    a_table().fire(lamp, "fail")
    assert lamp.state is BROKEN


def test_a_destination_can_be_looked_up() -> None:
    """A destination can be looked up without firing, and is None where there is none."""
    assert a_table().destination("go", RED) is GREEN
    assert a_table().destination("go", GREEN) is None


# -- what is rejected when a table is built ---------------------------------------------------------------------------


def test_a_duplicate_row_is_rejected() -> None:
    """Two rows with the same trigger and source are rejected."""
    with pytest.raises(TableError, match=r"duplicate row 'go' from <Light\.red"):
        a_table(*ROWS, Row("go", RED, BROKEN))


@pytest.mark.parametrize("row", [Row("fly", EXPIRING, BROKEN), Row("fly", RED, EXPIRING)])
def test_an_unknown_state_is_rejected(row: Row[Light]) -> None:
    """A row with an unknown source or destination is rejected."""
    with pytest.raises(TableError, match=r"unknown state <RunnerState\.expiring"):
        a_table(*ROWS, row)


def test_an_unknown_initial_or_final_state_is_rejected() -> None:
    """An unknown initial or final state is rejected."""
    with pytest.raises(TableError, match="unknown state"):
        Table("light", Light, ROWS, initial=RED, final=UNLOADED)  # type: ignore[misc]  # a state of another kind
    with pytest.raises(TableError, match="unknown state"):
        Table("light", Light, ROWS, initial=UNLOADED, final=BROKEN)  # type: ignore[misc]  # a state of another kind


def test_an_unreachable_state_is_rejected() -> None:
    """A state that no row leads to from the initial one is rejected."""
    with pytest.raises(TableError, match=r"unreachable \['green'\]"):
        a_table(Row("fail", RED, BROKEN), Row("fail", GREEN, BROKEN))


def test_a_dead_end_is_rejected() -> None:
    """A state without a way to the final one is rejected."""
    with pytest.raises(TableError, match=r"dead end \['green'\]"):
        a_table(Row("fail", RED, BROKEN), Row("go", RED, GREEN))
    with pytest.raises(TableError, match=r"dead end \['green'\]"):
        a_table(Row("fail", RED, BROKEN), Row("go", RED, GREEN), Row("stay", GREEN, GREEN))


def test_a_final_state_with_a_way_out_is_rejected() -> None:
    """A final state with a row that leaves it is rejected."""
    with pytest.raises(TableError, match="is final but has a way out"):
        a_table(*ROWS, Row("mend", BROKEN, RED))


# -- the runner's table -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Subject:
    """What the runner's table needs of a runner."""

    state: RunnerState
    leases: int = 0

    def holds_no_lease(self) -> bool:
        return not self.leases


@pytest.mark.parametrize("trigger", sorted({row.trigger for row in RUNNER_TABLE.rows}))
@pytest.mark.parametrize("state", RunnerState)
def test_every_state_with_every_trigger(state: RunnerState, trigger: str) -> None:
    """A trigger of a row leads where the row says, and every other trigger raises and leaves the state."""
    subject = Subject(state)
    destination = RUNNER_TABLE.destination(trigger, state)
    if destination is None:
        with pytest.raises(IllegalTransition):
            RUNNER_TABLE.fire(subject, trigger)
    else:
        RUNNER_TABLE.fire(subject, trigger)
    assert subject.state is (destination or state)


def test_a_runner_in_use_is_never_unloaded() -> None:
    """A runner with a lease is never unloaded."""
    subject = Subject(EXPIRING, leases=1)
    with pytest.raises(IllegalTransition):
        RUNNER_TABLE.fire(subject, "unload")
    assert subject.state is EXPIRING


@pytest.mark.parametrize("trigger", sorted({row.trigger for row in PROCESS_TABLE.rows}))
@pytest.mark.parametrize("leases", [set(), {1}])
@pytest.mark.parametrize("before", ProcessState)
def test_a_process_in_use_is_neither_stopped_nor_gone(trigger: str, leases: set[int], before: ProcessState) -> None:
    """A process changes its state by the rows of its table, and never while its runner holds a lease."""
    runner = Runner(1, "a", Options(), Placement(()), 0.0, 0.0, process_state=before, leases=leases)
    destination = PROCESS_TABLE.destination(trigger, before)
    if leases or destination is None:
        with pytest.raises(IllegalTransition):
            PROCESS_TABLE.fire(runner, trigger)
        destination = before
    else:
        PROCESS_TABLE.fire(runner, trigger)
    assert (runner.process_state, runner.process) == (destination, destination is not ProcessState.gone)
    assert runner.state is RunnerState.loading


def test_unload_is_the_only_way_into_unloaded() -> None:
    """Only the trigger unload leads to unloaded, and only from expiring."""
    assert [(row.trigger, row.source) for row in RUNNER_TABLE.rows if row.destination is UNLOADED] == [
        ("unload", EXPIRING)
    ]


# -- shielding --------------------------------------------------------------------------------------------------------


def test_an_applications_debug_logging_does_not_reach_the_library(caplog: pytest.LogCaptureFixture) -> None:
    """Debug logging of an application does not make the library format messages."""
    caplog.set_level(logging.DEBUG)
    lamp = Lamp()
    a_table().fire(lamp, "go")
    assert not logging.getLogger("transitions.core").isEnabledFor(logging.INFO)
    assert caplog.records == []


def test_rows_are_values() -> None:
    """Rows are equal where their fields are, and can be kept in a set."""
    assert len({Row("go", RED, GREEN), Row("go", RED, GREEN)}) == 1
