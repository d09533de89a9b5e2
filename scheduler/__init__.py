"""Loads models on demand, keeps them loaded, shares them by lease, and evicts them when memory is full."""

import importlib.metadata
import logging

from fsm.domain.options import Options
from fsm.eviction.policies import Candidate, EvictionPolicy
from scheduler.api.fit import Fit, FitAdvice, FitDevice, FitVictim
from scheduler.api.lease import Lease, Leases
from scheduler.api.pending_lease import Reservation
from scheduler.api.scheduler import Scheduler
from scheduler.api.status import RunnerStatus, Status, WaitStatus
from scheduler.config.settings import Settings
from scheduler.engines.answer import Answer
from scheduler.engines.python import PythonModel
from scheduler.errors.exceptions import (
    AcquireTimeout,
    AnswerTimeout,
    DoesNotFit,
    EngineError,
    EngineMissing,
    InvalidModel,
    InvalidSettings,
    LeaseReleased,
    LoadFailed,
    LoadTimeout,
    ModelNotFound,
    QueueFull,
    RequestCancelled,
    RunnerCrashed,
    SchedulerBroken,
    SchedulerClosed,
    SchedulerError,
    SchedulerForked,
    TimeoutTooShort,
    UnsupportedOption,
    WouldDeadlock,
)
from scheduler.errors.safe_log import prepare
from scheduler.models.catalog import Catalog, Resolver
from scheduler.models.chat_defaults import ChatDefaults
from scheduler.models.model_spec import ModelSpec
from scheduler.runtime.event_stream import ConsideredDevice, ConsideredRunner, Decision, EventStream, Gap, Transition

__all__ = [
    "AcquireTimeout",
    "Answer",
    "AnswerTimeout",
    "Candidate",
    "Catalog",
    "ChatDefaults",
    "ConsideredDevice",
    "ConsideredRunner",
    "Decision",
    "DoesNotFit",
    "EngineError",
    "EngineMissing",
    "EventStream",
    "EvictionPolicy",
    "Fit",
    "FitAdvice",
    "FitDevice",
    "FitVictim",
    "Gap",
    "InvalidModel",
    "InvalidSettings",
    "Lease",
    "LeaseReleased",
    "Leases",
    "LoadFailed",
    "LoadTimeout",
    "ModelNotFound",
    "ModelSpec",
    "Options",
    "PythonModel",
    "QueueFull",
    "RequestCancelled",
    "Reservation",
    "Resolver",
    "RunnerCrashed",
    "RunnerStatus",
    "Scheduler",
    "SchedulerBroken",
    "SchedulerClosed",
    "SchedulerError",
    "SchedulerForked",
    "Settings",
    "Status",
    "TimeoutTooShort",
    "Transition",
    "UnsupportedOption",
    "WaitStatus",
    "WouldDeadlock",
]


def _version() -> str:
    """Return the version of the installed distribution; "0+unknown" where the code runs without being installed."""
    try:
        return importlib.metadata.version("loadmaster")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


prepare(logging.getLogger("loadmaster"))  # the program says where lines go

__version__ = _version()
