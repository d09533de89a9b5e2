"""Refusals: why a request is not granted, with figures; a Reject carries one."""

from __future__ import annotations

from dataclasses import dataclass

from fsm.domain.devices import Amounts
from fsm.machine.request import ModelId
from fsm.messages.reasons import FailureReason, InfeasibleReason, WaitReason
from fsm.sizing.model_profile import UnsupportedReason


@dataclass(frozen=True, slots=True)
class QueueFullRefusal:
    """As many requests wait as may wait."""

    limit: int
    retry_after_s: float  # estimated seconds until a place in the queue is free


@dataclass(frozen=True, slots=True)
class ModelNotFoundRefusal:
    """The model's file does not exist."""

    path: str


@dataclass(frozen=True, slots=True)
class InvalidModelRefusal:
    """The file is not a model that can be used."""

    path: str
    reason: str
    offset: int | None = None  # bytes from the file's start


@dataclass(frozen=True, slots=True)
class DoesNotFitRefusal:
    """The model fits on no device, even if every runner left that may be evicted."""

    model: ModelId
    needed: Amounts  # bytes by device, headroom included
    available: Amounts  # bytes by device if every runner left that may
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
    """The load that the request waited for failed, or its model is backed off after failures."""

    model: ModelId
    reason: FailureReason
    retry_after_s: float  # seconds that are left of the back-off
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class LoadTimeoutRefusal:
    """The load that the request waited for shows no progress any more."""

    model: ModelId
    stalled_s: float


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The request's own time limit passed."""

    model: ModelId
    timeout_s: float
    waiting_for: WaitReason


@dataclass(frozen=True, slots=True)
class DeadlineInfeasible:
    """The request's own time limit is shorter than what it must wait at least; it is refused at once.

    That is a load of its model, and the rest of a minimum residency that was set: every other wait is uncertain, since
    memory may be free at any moment.
    """

    model: ModelId
    timeout_s: float
    least_s: float  # the shortest load, less the time since the load began, if it has begun
    load_s: float  # the shortest load that was measured of this file with these options; 0: not known
    begun_s: float | None  # how many seconds ago the load began; None: it has not begun
    resident_s: float = 0.0  # for how long runners beside which there is no room keep a minimum residency that was set


@dataclass(frozen=True, slots=True)
class WouldDeadlockRefusal:
    """The request waits for leases that its own caller keeps until the answer; it is refused at once."""

    model: ModelId
    holders: tuple[ModelId, ...]  # models on which the caller keeps leases, and beside which there is no room


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The caller left before its request was answered."""

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
    | WouldDeadlockRefusal
    | Cancelled
    | SchedulerClosed
)
