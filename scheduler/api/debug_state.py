"""What `Scheduler.debug_state()` tells: what a scheduler holds inside, as frozen values of one moment."""

from __future__ import annotations

from dataclasses import dataclass

from fsm.core import Snapshot
from fsm.domain.devices import DeviceId
from fsm.machine.request import ModelId, RequestId


@dataclass(frozen=True, slots=True)
class DebugState:
    """The books of a scheduler, for tests and for reports of bugs; the fields may change with any version."""

    snapshot: Snapshot  # of the core: runners, waiting requests, what granted ones hold, devices, limits
    step: int  # number of the core's last one, as events and recordings name it
    late_events: int  # that the core ignored, since they came twice or too late
    models: frozenset[ModelId]  # that the core knows anything of
    named_models: frozenset[ModelId]  # whose names and engines are known: at least those that are asked for
    requests: frozenset[RequestId]  # asked for, and neither refused, lost nor given back
    locked: frozenset[DeviceId]  # devices that other programs on this machine may not load on now
    listening: bool  # decisions are noted, since something reads `events()`
    to_record: int  # steps that are not written to the recording yet
    read_ahead_bytes: int  # of models' files, so far
    ended: bool  # every runner was unloaded after a close
    error: BaseException | None  # what a decision raised; nothing is decided after it
