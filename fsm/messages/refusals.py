"""Why a request is not granted: what a Reject carries."""

from __future__ import annotations

from dataclasses import dataclass

from fsm.domain.devices import Amounts
from fsm.machine.request import ModelId
from fsm.messages.reasons import FailureReason, InfeasibleReason, WaitReason
from fsm.sizing.load_options import UnsupportedReason


@dataclass(frozen=True, slots=True)
class QueueFullRefusal:
    """As many wait as may wait."""

    limit: int
    retry_after_s: float  # an estimate


@dataclass(frozen=True, slots=True)
class ModelNotFoundRefusal:
    """There is no such file."""

    path: str


@dataclass(frozen=True, slots=True)
class InvalidModelRefusal:
    """The file is not a model that can be used."""

    path: str
    reason: str
    offset: int | None = None  # bytes from the file's start


@dataclass(frozen=True, slots=True)
class DoesNotFitRefusal:
    """It fits on no device, even with everything gone that may be moved."""

    model: ModelId
    needed: Amounts  # headroom included
    available: Amounts  # the most that could be had
    reason: InfeasibleReason


@dataclass(frozen=True, slots=True)
class UnsupportedOption:
    """The engine would refuse this model with this option."""

    model: ModelId
    option: str
    value: int | bool | str
    reason: UnsupportedReason


@dataclass(frozen=True, slots=True)
class LoadFailedRefusal:
    """The load it waited for failed, or the model is backed off after failures."""

    model: ModelId
    reason: FailureReason
    retry_after_s: float
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class LoadTimeoutRefusal:
    """The load it waited for stopped showing progress."""

    model: ModelId
    stalled_s: float


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The asker's own time limit passed."""

    model: ModelId
    timeout_s: float
    waiting_for: WaitReason


@dataclass(frozen=True, slots=True)
class DeadlineInfeasible:
    """The asker's own time limit is shorter than the model has ever taken to load: told at once, and nothing is done.

    What else it might wait for is left out, since none of it is certain: memory may be back any moment.
    """

    model: ModelId
    timeout_s: float
    least_s: float  # the load, less what has passed of one that is under way
    load_s: float  # the shortest that was measured of this file with these options
    begun_s: float | None  # how long ago the load began that it would wait for; None: it has not


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The asker left before it was answered."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class SchedulerClosed:
    """The scheduler is closing or closed."""


Refusal = (
    QueueFullRefusal
    | ModelNotFoundRefusal
    | InvalidModelRefusal
    | DoesNotFitRefusal
    | UnsupportedOption
    | LoadFailedRefusal
    | LoadTimeoutRefusal
    | TimedOut
    | DeadlineInfeasible
    | Cancelled
    | SchedulerClosed
)
