"""The debug state of a scheduler: what it holds inside, as frozen values of one moment."""

from __future__ import annotations

from dataclasses import dataclass

from fsm.core import Snapshot
from fsm.domain.devices import DeviceId
from fsm.machine.request import ModelId, RequestId


@dataclass(frozen=True, slots=True)
class DebugState:
    """The inner state of a scheduler, for tests and for reports of bugs; the fields may change with any version."""

    snapshot: Snapshot  # of the core: runners, waiting requests, what granted requests hold, devices, limits
    step: int  # number of the core's last step, as events and recordings name it
    late_events: int  # events that the core ignored, since they came twice or too late
    models: frozenset[ModelId]  # models that the core has a record of
    named_models: frozenset[ModelId]  # models whose names and engines are registered: at least the requested ones
    requests: frozenset[RequestId]  # submitted, and not refused, lost or released
    locked: frozenset[DeviceId]  # devices that other programs on this machine may not load on now
    listening: bool  # a stream of `events()` is open
    to_record: int  # steps that are not written to the recording yet
    read_ahead_bytes: int  # bytes of models' files that were read ahead, in all
    ended: bool  # every runner was unloaded after a close
    error: BaseException | None  # what a step raised; nothing is decided after it
