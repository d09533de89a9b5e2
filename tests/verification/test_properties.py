"""The named properties: the page that lists them, and the layers that ask them."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from fsm.machine.runner import READY
from fsm.messages.events import Acquire
from fsm.planning.plan import Plan
from fsm.verification.model_checker import explore, of_new_state
from fsm.verification.properties import LAYERS, markdown
from fsm.verification.property import ASKED_BY, PROPERTIES, Checks, Kind, Property, Violated
from fsm.verification.scenarios import SCENARIOS
from fsm.verification.simulator import simulate
from fsm.verification.state_invariants import check_state, of_state
from fsm.verification.step import Expiry, of_outcome, of_step
from fsm.verification.trace_auditor import of_bounded_trace, of_trace
from tests.support.pool import a_pool, acquire, loaded
from tests.verification.mutant import added

PAGE = Path(__file__).resolve().parents[2] / "docs" / "invariants.md"


def test_the_page_is_what_the_checks_say() -> None:
    """Write it again with `make docs`."""
    assert PAGE.read_text(encoding="utf-8") == markdown()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_the_module_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed and not written: the core touches no files."""
    runpy.run_module("fsm.verification.properties", run_name="__main__")
    assert capsys.readouterr().out == markdown()


@pytest.mark.parametrize("one", PROPERTIES.values(), ids=lambda one: one.name)
def test_a_property_says_what_holds_and_is_asked(one: Property) -> None:
    """In sentences, without what would break a table; by a layer that the page explains."""
    assert one.says[0].isupper() and one.says.endswith(".") and "|" not in one.says
    assert ASKED_BY[one.name] and ASKED_BY[one.name].keys() <= LAYERS.keys()


def test_there_are_properties_of_each_kind() -> None:
    """A name is of one property alone: another check of it says so."""
    assert {one.kind for one in PROPERTIES.values()} == set(Kind)

    def a_ready_runner_holds_a_lease(pool: object) -> None:
        """Another one."""

    with pytest.raises(AssertionError, match="two properties of one name"):
        of_state()(a_ready_runner_holds_a_lease)


def a_test_of_the_core() -> None:
    a_pool().loading("a", 1).feed(loaded(1))


ASKED: dict[str, Callable[[], object]] = {
    "search": lambda: explore(SCENARIOS[0], 20),
    "simulation": lambda: simulate(Random(2), 50),
    "core tests": a_test_of_the_core,
}


@pytest.mark.parametrize("layer", ASKED)
@pytest.mark.parametrize(
    ("checks", "causes"),
    [
        (of_state, ()),
        (of_new_state, ()),
        (of_step, ()),
        (of_step, (Acquire,)),
        (of_outcome, (Plan,)),
        (of_trace, ()),
        (of_bounded_trace, ()),
    ],
)
def test_a_layer_asks_what_the_page_says_that_it_asks(checks: Checks[object], causes: tuple[type], layer: str) -> None:
    """A property that is added is asked by exactly these layers, and by no other."""
    asked = []

    def a_probe(*subject_and_cause: object) -> None:
        """It holds always."""
        asked.append(subject_and_cause)

    with added(checks, a_probe, *causes):
        ASKED[layer]()
        assert bool(asked) == (layer in checks.asked_by) == (layer in ASKED_BY["a probe"])
    assert "a probe" not in PROPERTIES and "a probe" not in ASKED_BY


def test_a_property_may_be_asked_of_what_expires() -> None:
    """A cause is an event, a command, a plan, or what a step has made of a runner or a lease."""
    seen = []

    def a_probe(_: object, expiry: Expiry) -> None:
        """It holds always."""
        seen.append((expiry.runner.id, expiry.victim))

    with added(of_step, a_probe, Expiry):
        a_pool(min_residency_s=0.0).idle("a").feed(acquire("b", 9))
    assert seen == [(1, True)]


def test_a_violation_names_its_property_and_where_it_does_not_hold() -> None:
    """Whatever a check raises: one that cannot be made does not hold."""
    pool = a_pool().idle("a")
    pool.life("a").state = READY
    with pytest.raises(Violated, match=r"^a ready runner holds a lease: runner 1 of a$") as violated:
        check_state(pool.core)
    assert violated.value.property is PROPERTIES["a ready runner holds a lease"]
    pool.core._state.models.clear()
    pool.core._state.runners[1].leases.add(7)
    with pytest.raises(Violated, match=r"^a model names its current runner: KeyError\('a'\)$"):
        check_state(pool.core)
