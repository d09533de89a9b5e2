"""How a mutant is made: a function of the core is replaced by a faulty one, and put back afterwards.

And how a property is added for a while, to see a mutant violate it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from types import ModuleType

import pytest

from fsm.verification.model_checker import Exploration, explore
from fsm.verification.property import Checks, Subject
from fsm.verification.scenarios import SCENARIOS
from fsm.verification.simulator import simulate

MOST = 40_000  # states within which a mutant has to be found
SIMULATION = "simulation"  # in place of a scenario's name: the mutant needs more than the scenarios have
STEPS = 1000  # of each seed


class PatchesNothing(Exception):
    """No replaced function was called in a search: whatever the search found, the mutant is not the cause."""


class Patch:
    """Replaces functions of the core, and knows which of them are called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.called: dict[str, bool] = {}  # by the name of each replaced function

    def setattr(self, owner: type | ModuleType, name: str, faulty: Callable[..., object]) -> None:
        """Replace a method, or a function of a module, which must be there."""
        full_name = f"{owner.__name__}.{name}"
        self.called[full_name] = False

        def put(*args: object, **how: object) -> object:
            self.called[full_name] = True
            return faulty(*args, **how)

        self._monkeypatch.setattr(owner, name, put)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mutant: how it is made, and the scenario that shows its fault."""

    name: str
    about: str
    defect: str  # D01 to D14, where the fault is the mechanism of one of these defects
    scenario: str
    most: int  # states, or steps of a simulation
    plant: Callable[[Patch], None]
    first: int = 0  # seed of a simulation, where it takes many to meet the fault

    def search(self, *, shrinks: bool = False) -> Exploration:
        """Make the mutant, search, and put the core back; with `shrinks`, the trace of a simulation is made short.

        Raises PatchesNothing where no replaced function was ever called.
        """
        with pytest.MonkeyPatch.context() as monkeypatch:
            patch = Patch(monkeypatch)
            self.plant(patch)
            if self.scenario == SIMULATION:
                found = self._simulate(shrinks)
            else:
                found = explore(next(one for one in SCENARIOS if one.name == self.scenario), self.most)
        if not any(patch.called.values()):
            raise PatchesNothing(f"{self.name} patches nothing: never called: {', '.join(patch.called)}")
        return found

    def _simulate(self, shrinks: bool) -> Exploration:
        """Run one seed after another."""
        steps, seed, violation = 0, self.first, None
        while violation is None and steps < self.most:
            outcome = simulate(Random(seed), STEPS, every=STEPS, shrinks=shrinks)
            steps, seed, violation = steps + outcome.steps, seed + 1, outcome.violation
        if violation is not None:
            violation = replace(violation, what=f"{violation.what} (seed {seed - 1})")
        return Exploration(SIMULATION, steps, steps, seed - self.first, False, violation)


@contextmanager
def added(checks: Checks[Subject], check: Callable[..., None], *causes: type) -> Iterator[None]:
    """Add a check and its property until the block ends."""
    checks(*causes)(check)
    try:
        yield
    finally:
        checks.remove(check)


MUTANTS: list[Mutant] = []


def mutant(
    scenario: str, defect: str = "", most: int = MOST, first: int = 0
) -> Callable[[Callable[[Patch], None]], None]:
    """Add the mutant that a function makes; its docstring says what is wrong."""

    def add(plant: Callable[[Patch], None]) -> None:
        MUTANTS.append(Mutant(plant.__name__, plant.__doc__ or "", defect, scenario, most, plant, first))

    return add


def instead(patch: Patch, owner: type | ModuleType, name: str) -> Callable[[Callable[..., object]], None]:
    """Replace a method, or a function of a module; the replacement is passed the original first."""
    original = getattr(owner, name)

    def put(faulty: Callable[..., object]) -> None:
        patch.setattr(owner, name, lambda *args, **how: faulty(original, *args, **how))

    return put
