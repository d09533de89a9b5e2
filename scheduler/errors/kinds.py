"""Kinds of reasons, for programs: short words that stay the same, and of which there are few."""

from __future__ import annotations

import re
from enum import Enum

from fsm.messages.reasons import RunnerStep, WaitFor, WaitForRunners


def kind_of(reason: object) -> str:
    """Return the kind of a reason: `memory`, `runners_drain`, `needed_for`, `keep_alive_over`."""
    if isinstance(reason, WaitForRunners):
        return _of_runners(reason.step)
    if isinstance(reason, Enum):
        return str(reason.value)
    return snake_case(type(reason).__name__).removesuffix("_refusal")


def snake_case(name: str) -> str:
    """Return the name of a class as a code: `does_not_fit` for `DoesNotFit`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _of_runners(step: RunnerStep) -> str:
    return f"runners_{step.value}"


WAIT_KINDS = (*(each.value for each in WaitFor), *map(_of_runners, RunnerStep))  # all that a request can wait for
