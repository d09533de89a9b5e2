"""How a fault is put into the core: a method is replaced by one that does something else, until it is taken out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest

from fsm.explore import Exploration, explore
from fsm.scenarios import SCENARIOS

MOST = 40_000  # states within which a fault has to be found
Patch = pytest.MonkeyPatch


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault: how it is planted, and the scenario that shows it."""

    name: str
    about: str
    defect: str  # D01 to D14, where it is the mechanism of one
    scenario: str
    most: int
    plant: Callable[[Patch], None]

    def search(self) -> Exploration:
        """Plant the fault, search, and take it out again."""
        scenario = next(one for one in SCENARIOS if one.name == self.scenario)
        with pytest.MonkeyPatch.context() as patch:
            self.plant(patch)
            return explore(scenario, self.most)


MUTANTS: list[Mutant] = []


def mutant(scenario: str, defect: str = "", most: int = MOST) -> Callable[[Callable[[Patch], None]], None]:
    """Add the fault that a function plants; its docstring says what is wrong."""

    def add(plant: Callable[[Patch], None]) -> None:
        MUTANTS.append(Mutant(plant.__name__, plant.__doc__ or "", defect, scenario, most, plant))

    return add


def instead(patch: Patch, owner: type | ModuleType, name: str) -> Callable[[Callable[..., object]], None]:
    """Replace a method, or a function of a module; what replaces it is handed the original first."""
    original = getattr(owner, name)

    def put(faulty: Callable[..., object]) -> None:
        patch.setattr(owner, name, lambda *args, **how: faulty(original, *args, **how))

    return put
