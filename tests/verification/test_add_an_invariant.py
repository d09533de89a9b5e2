"""How do I add an invariant, and see it fail? An example; docs/invariants.md lists the invariants of the core."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fsm.lifecycle import loads
from fsm.lifecycle.step_context import StepContext
from fsm.machine.runner import IDLE, READY, Runner
from fsm.messages.events import Loaded
from fsm.state.core_state import CoreState
from fsm.verification.model_checker import explore, in_words
from fsm.verification.scenarios import SCENARIOS
from fsm.verification.state_invariants import name_of, of_state
from tests.verification.mutant import Patch, added, instead

ONE_PLACE = next(scenario for scenario in SCENARIOS if scenario.name == "one-place")


# 1. Write the check. Its name is the name of the invariant, its docstring the sentence that the documentation shows. To
#    add it for good, decorate it with `@of_state()` in fsm/verification/state_invariants.py; a step and a trace have
#    decorators too.
def a_runner_that_serves_has_loaded(state: CoreState) -> None:
    """A runner is ready or idle only after its process has said that it has loaded."""
    for runner in state.runners.values():
        assert runner.state not in (READY, IDLE) or runner.loaded_at is not None, name_of(runner)


# 2. Plant a fault that breaks it: a function of the core is replaced by a faulty one, which is handed the original.
def forget_when_runners_have_loaded(patch: Patch) -> None:
    @instead(patch, loads, "loaded")
    def loaded(original: Callable[..., None], step: StepContext, runner: Runner, event: Loaded) -> None:
        original(step, runner, event)
        runner.loaded_at = None


# 3. Search a small scenario in every order of events: without the fault the invariant holds in every state; with the
#    fault the search finds the shortest trace to a state in which it does not.
def test_an_invariant_that_a_fault_breaks_is_found_by_its_name() -> None:
    with added(of_state, a_runner_that_serves_has_loaded), pytest.MonkeyPatch.context() as monkeypatch:
        assert explore(ONE_PLACE, 500).violation is None
        forget_when_runners_have_loaded(Patch(monkeypatch))
        found = explore(ONE_PLACE, 500).violation
    assert found is not None
    assert found.name == "a runner that serves has loaded"
    assert in_words(found.trace).splitlines()[-2:] == [
        "  3. at 0 s  Loaded(runner=1, resident=(('cpu', 6442450944)))",
        "              -> Grant(request=1, runner=1)",
    ]
