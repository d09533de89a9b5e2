"""Loads models on demand, keeps them warm, shares them by lease, and gives them up when a device is full."""

from fsm.domain.model_info import Options
from fsm.eviction.policies import Candidate, EvictionPolicy
from fsm.messages.decision_log import ConsideredDevice, ConsideredRunner, Decision, Transition
from scheduler.asking import Reservation
from scheduler.catalog import Catalog, Resolver
from scheduler.engines.python import PythonModel
from scheduler.errors import (
    AcquireTimeout,
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
)
from scheduler.fit import Fit, FitAdvice, FitDevice, FitVictim
from scheduler.hub import EventStream, Gap
from scheduler.lease import Lease
from scheduler.scheduler import Scheduler
from scheduler.settings import Settings
from scheduler.spec import ModelSpec
from scheduler.status import RunnerStatus, Status, WaitStatus

__all__ = [
    "AcquireTimeout",
    "Candidate",
    "Catalog",
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
]
