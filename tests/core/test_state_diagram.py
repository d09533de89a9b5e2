"""The drawn state machines: complete, and as printed in the documentation."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from fsm.machine import request, runner
from fsm.machine.request import RequestState
from fsm.machine.runner import RUNNER_TABLE, RunnerState
from fsm.machine.state_diagram import REQUEST_ROWS, markdown, mermaid

PAGE = Path(__file__).resolve().parents[2] / "docs" / "states.md"


def test_the_page_is_what_the_tables_say() -> None:
    """Draw it again with `make docs`."""
    assert PAGE.read_text(encoding="utf-8") == markdown()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_the_module_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed and not written: the core touches no files."""
    runpy.run_module("fsm.machine.state_diagram", run_name="__main__")
    assert capsys.readouterr().out == markdown()


def test_every_row_is_an_arrow() -> None:
    """Those of one way share it."""
    lines = mermaid(RUNNER_TABLE).splitlines()
    assert lines[0] == "stateDiagram-v2"
    for row in RUNNER_TABLE.rows:
        way = f"    {row.source.name} --> {row.destination.name}: "
        assert [row.trigger in line for line in lines if line.startswith(way)] == [True]


def test_the_diagram_begins_and_ends() -> None:
    """With the initial and the final state."""
    lines = mermaid(RUNNER_TABLE).splitlines()
    assert "    [*] --> loading" in lines
    assert "    unloaded --> [*]" in lines


def test_every_state_says_what_is_true_in_it() -> None:
    """A runner's, and a request's, in the order of their lives."""
    assert list(runner.MEANING) == list(RunnerState)
    assert list(request.MEANING) == list(RequestState)


def test_every_row_says_when_it_is_fired() -> None:
    """For whoever reads the page."""
    assert all(row.when for row in RUNNER_TABLE.rows)
    assert all(row.when for row in REQUEST_ROWS)


def test_every_state_of_a_request_is_drawn() -> None:
    """The description names each of them."""
    assert {state for row in REQUEST_ROWS for state in (row.source, row.destination)} == set(RequestState)
