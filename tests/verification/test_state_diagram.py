"""The drawn state machines: complete, and as printed in the documentation."""

from __future__ import annotations

import runpy
from enum import Enum
from pathlib import Path

import pytest

from fsm.machine import request, runner
from fsm.machine.request import RequestState
from fsm.machine.runner import PROCESS_TABLE, RUNNER_TABLE, ProcessState, RunnerState
from fsm.machine.transition_table import Table
from fsm.verification.state_diagram import REQUEST_ROWS, markdown, mermaid

PAGE = Path(__file__).resolve().parents[2] / "docs" / "states.md"


def test_the_page_is_what_the_tables_say() -> None:
    """The page of the documentation equals the drawing; `make docs` draws it again."""
    assert PAGE.read_text(encoding="utf-8") == markdown()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_the_module_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """The module prints the page and writes no file."""
    runpy.run_module("fsm.verification.state_diagram", run_name="__main__")
    assert capsys.readouterr().out == markdown()


@pytest.mark.parametrize("table", [RUNNER_TABLE, PROCESS_TABLE], ids=lambda table: table.name)
def test_every_row_is_an_arrow(table: Table[Enum]) -> None:
    """Every row is on the arrow between its two states."""
    lines = mermaid(table).splitlines()
    assert lines[0] == "stateDiagram-v2"
    for row in table.rows:
        way = f"    {row.source.name} --> {row.destination.name}: "
        assert [row.trigger in line for line in lines if line.startswith(way)] == [True]


def test_the_diagram_begins_and_ends() -> None:
    """The diagram has an arrow to the initial state and one from the final state."""
    lines = mermaid(RUNNER_TABLE).splitlines()
    assert "    [*] --> loading" in lines
    assert "    unloaded --> [*]" in lines


def test_every_state_says_what_is_true_in_it() -> None:
    """Every state of a runner, of its process and of a request has a meaning, in the order of the states."""
    assert list(runner.MEANING) == list(RunnerState)
    assert list(runner.PROCESS_MEANING) == list(ProcessState)
    assert list(request.MEANING) == list(RequestState)


def test_every_row_says_when_it_is_fired() -> None:
    """Every row says when it is fired."""
    assert all(row.when for row in RUNNER_TABLE.rows)
    assert all(row.when for row in PROCESS_TABLE.rows)
    assert all(row.when for row in REQUEST_ROWS)


def test_every_state_of_a_request_is_drawn() -> None:
    """Every state of a request is part of a row."""
    assert {state for row in REQUEST_ROWS for state in (row.source, row.destination)} == set(RequestState)
