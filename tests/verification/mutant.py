"""How a mutant is made: a method of the core is replaced by a faulty one, and put back afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from types import ModuleType

import pytest

from fsm.verification.model_checker import Exploration, Violation, explore
from fsm.verification.scenarios import SCENARIOS
from fsm.verification.simulator import simulate

MOST = 40_000  # states within which a mutant has to be found
SIMULATION = "simulation"  # in place of a scenario's name: the mutant needs more than the scenarios have
STEPS = 1000  # of each seed
Patch = pytest.MonkeyPatch


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mutant: how it is made, and the scenario that shows its fault."""

    name: str
    about: str
    defect: str  # D01 to D14, where the fault is the mechanism of one of these defects
    scenario: str
    most: int  # states, or steps of a simulation
    plant: Callable[[Patch], None]

    def search(self, *, shrinks: bool = False) -> Exploration:
        """Make the mutant, search, and put the core back; with `shrinks`, the trace of a simulation is made short."""
        with pytest.MonkeyPatch.context() as patch:
            self.plant(patch)
            if self.scenario == SIMULATION:
                return self._simulate(shrinks)
            return explore(next(one for one in SCENARIOS if one.name == self.scenario), self.most)

    def _simulate(self, shrinks: bool) -> Exploration:
        """Run one seed after another."""
        steps, seed, violation = 0, 0, None
        while violation is None and steps < self.most:
            outcome = simulate(Random(seed), STEPS, every=STEPS, shrinks=shrinks)
            steps, seed, violation = steps + outcome.steps, seed + 1, outcome.violation
        if violation is not None:
            violation = Violation(f"{violation.what} (seed {seed - 1})", violation.trace)
        return Exploration(SIMULATION, steps, steps, seed, False, violation)


MUTANTS: list[Mutant] = []


def mutant(scenario: str, defect: str = "", most: int = MOST) -> Callable[[Callable[[Patch], None]], None]:
    """Add the mutant that a function makes; its docstring says what is wrong."""

    def add(plant: Callable[[Patch], None]) -> None:
        MUTANTS.append(Mutant(plant.__name__, plant.__doc__ or "", defect, scenario, most, plant))

    return add


def instead(patch: Patch, owner: type | ModuleType, name: str) -> Callable[[Callable[..., object]], None]:
    """Replace a method, or a function of a module; the replacement is passed the original first."""
    original = getattr(owner, name)

    def put(faulty: Callable[..., object]) -> None:
        patch.setattr(owner, name, lambda *args, **how: faulty(original, *args, **how))

    return put
