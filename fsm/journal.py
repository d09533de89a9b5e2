"""What the core decided and why, in order: for the user's eyes, never an input of a decision."""

from __future__ import annotations

from dataclasses import dataclass

from fsm.request import ModelId, RequestId
from fsm.runner import RunnerId, RunnerState


@dataclass(frozen=True, slots=True)
class Transition:
    """A runner changed its state."""

    at: float  # seconds of the scheduler's clock
    runner: RunnerId
    model: ModelId
    trigger: str
    source: RunnerState | None  # None: the runner is new
    destination: RunnerState
    reason: str
    leases: int  # held after it


@dataclass(frozen=True, slots=True)
class Decision:
    """Something was decided about a request, or found out about a runner."""

    at: float  # seconds of the scheduler's clock
    what: str  # queued, waits, granted or rejected; of a runner: measured
    model: ModelId
    reason: str
    request: RequestId | None = None
    runner: RunnerId | None = None


Entry = Transition | Decision
