"""Mutants of the core made by hand are found, each with the shortest trace."""

from __future__ import annotations

import pytest

from fsm.lifecycle import failures
from fsm.verification.model_checker import in_words
from fsm.verification.property import PROPERTIES
from tests.verification.mutant import SIMULATION, Patch, PatchesNothing, instead
from tests.verification.mutants import MUTANTS, Mutant, main

DEFECTS = {f"D{number:02}" for number in range(1, 15)}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: f"{one.defect}_{one.name}".lstrip("_"))
def test_the_search_finds(mutant: Mutant) -> None:
    """The search finds a named property violated in each mutant, a property of its defect, with a short trace."""
    found = mutant.search().violation
    assert found is not None
    assert found.name in PROPERTIES and found.what.startswith(found.name)
    assert not mutant.defect or mutant.defect in PROPERTIES[found.name].ids
    assert 1 <= len(found.trace) <= (2000 if mutant.scenario == SIMULATION else 12), in_words(found.trace)


def test_every_defect_of_the_reference_is_among_them() -> None:
    """D01 to D14 are among the mutants; other defects live in threads and processes."""
    assert {one.defect for one in MUTANTS if one.defect} == DEFECTS


def test_a_fault_that_patches_nothing_is_none() -> None:
    """A function that is never called, since a name has moved or no caller is left, changes nothing."""

    def plant(patch: Patch) -> None:
        instead(patch, failures, "ran_out")(lambda original, *args: original(*args))

    nothing = Mutant("nothing", "No memory runs out in this scenario.", "", "one-place", 300, plant)
    with pytest.raises(
        PatchesNothing, match=r"nothing patches nothing: never called: fsm\.lifecycle\.failures\.ran_out"
    ):
        nothing.search()


def test_a_fault_is_taken_out_again() -> None:
    """A mutant is put back after its search, so that two searches of it are equal."""
    one = next(one for one in MUTANTS if one.name == "granted_twice")
    first, second = one.search(), one.search()
    assert first == second, "two searches of one mutant differ"


def test_the_table_names_what_finds_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    """The table has the scenario of each mutant, and with `-v` the trace in words."""
    assert main(["granted_twice", "-v"]) == 0
    printed = capsys.readouterr().out
    assert "Loaded(runner=1" in printed
    assert "every request is answered once: a request is lost, or answered twice" in printed
    assert "1 of 1 faults are found." in printed


def test_a_fault_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown mutant is refused, and the known ones are named."""
    with pytest.raises(SystemExit) as ended:
        main(["granted_twice", "granted_thrice"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "granted_thrice" in printed.err and "granted_twice" in printed.err and "D14" in printed.err
    assert "faults are found" not in printed.out
