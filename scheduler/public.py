"""What is public: the package `scheduler` has all of these names."""

from fsm.domain.options import Options
from fsm.eviction.policies import Candidate, EvictionPolicy
from scheduler.api.fit import Fit, FitAdvice, FitDevice, FitVictim
from scheduler.api.lease import Lease, Leases
from scheduler.api.pending_lease import Reservation
from scheduler.api.scheduler import Scheduler
from scheduler.api.status import RunnerStatus, Status, WaitStatus
from scheduler.config.settings import Settings
from scheduler.engines.answer import Answer
from scheduler.engines.command_model import CommandModel
from scheduler.engines.python import PythonModel
from scheduler.errors.exceptions import (
    AcquireTimeout,
    AnswerTimeout,
    DoesNotFit,
    EngineError,
    EngineMissing,
    EngineUnusable,
    InvalidModel,
    InvalidSettings,
    LeaseReleased,
    LoadFailed,
    LoadTimeout,
    ModelNotFound,
    ObjectError,
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
    "CommandModel",
    "ConsideredDevice",
    "ConsideredRunner",
    "Decision",
    "DoesNotFit",
    "EngineError",
    "EngineMissing",
    "EngineUnusable",
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
    "ObjectError",
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
