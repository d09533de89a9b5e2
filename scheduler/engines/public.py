"""What is public of engines: the package `scheduler.engines` has all of these names."""

from fsm.domain.devices import HOST, DeviceId, Placement, Threads
from fsm.domain.options import Options
from fsm.machine.request import ModelId
from fsm.sizing.footprint import Footprint
from fsm.sizing.model_profile import (
    EngineSettings,
    LargerBatch,
    ModelProfile,
    Resolution,
    ResolvedLoad,
    UnsupportedReason,
)
from scheduler.engines.engine_model import EngineModel
from scheduler.engines.interface import Buffer, BufferKind, Endpoint, Engine, Memory, Process, Prompts, RunnerListener
from scheduler.engines.registered import EngineFactory, register

__all__ = [
    "HOST",
    "Buffer",
    "BufferKind",
    "DeviceId",
    "Endpoint",
    "Engine",
    "EngineFactory",
    "EngineModel",
    "EngineSettings",
    "Footprint",
    "LargerBatch",
    "Memory",
    "ModelId",
    "ModelProfile",
    "Options",
    "Placement",
    "Process",
    "Prompts",
    "Resolution",
    "ResolvedLoad",
    "RunnerListener",
    "Threads",
    "UnsupportedReason",
    "register",
]
