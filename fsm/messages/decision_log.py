"""The decision log: what the core decided and why, in order, for readers outside; no decision ever reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fsm.domain.devices import Amounts, DeviceId, Placement
from fsm.machine.request import ModelId, RequestId
from fsm.machine.runner import RunnerId, RunnerState
from fsm.messages.reasons import (
    BackedOff,
    ClaimMissed,
    KeptReason,
    Measured,
    Prefetched,
    Queued,
    TransitionReason,
    Waited,
    WaitReason,
)
from fsm.messages.refusals import Refusal


@dataclass(frozen=True, slots=True)
class ConsideredRunner:
    """A runner that was considered for eviction, and why it is not evicted."""

    runner: RunnerId
    model: ModelId
    held_bytes: Amounts  # by device
    state: RunnerState
    leases: int
    unused_s: float  # since its last grant or release
    cost_s: float | None  # seconds of loading that its eviction is expected to cost; None: the policy names no cost
    taken: bool  # it is evicted
    why: KeptReason | None  # why it is not evicted; None where it is
    goes_in_s: float  # of a victim that leaves later: seconds until then, at most; else 0


@dataclass(frozen=True, slots=True)
class ConsideredDevice:
    """A device that was considered for a placement; where the model is not placed on it, the figures say why."""

    device: DeviceId
    needed_bytes: int  # that must be free on it, headroom included; 0: the placement takes nothing of it
    free_bytes: int  # that the placement is judged by
    taken: bool  # the model is placed on it, or would be


@dataclass(frozen=True, slots=True)
class Transition:
    """A runner changed its state."""

    at: float  # seconds of the scheduler's clock
    runner: RunnerId
    model: ModelId
    trigger: str
    source: RunnerState | None  # None: the runner is new
    destination: RunnerState
    why: TransitionReason
    leases: int  # that the runner holds after the transition
    step: int = 0  # number of the core's step that made the transition


# Of a request, or of its group; but a runner is measured, and a model backs off.
DecisionKind = Literal[
    "queued", "waits", "evicts", "placed", "launched", "prefetched", "granted", "rejected", "measured", "backs off"
]
DecisionReason = Queued | Waited | WaitReason | Placement | Refusal | ClaimMissed | Prefetched | Measured | BackedOff


@dataclass(frozen=True, slots=True)
class Decision:
    """The core decided about a request or a model, or learned the measurement of a runner."""

    at: float  # seconds of the scheduler's clock
    what: DecisionKind
    model: ModelId
    why: DecisionReason | None = None  # None for `evicts`, where `runners` says it
    request: RequestId | None = None
    runner: RunnerId | None = None
    until: float = math.inf  # for `waits`: when the wait is expected to be over, or planned again; infinite: unknown
    runners: tuple[ConsideredRunner, ...] = ()  # for `waits`, `evicts` and `rejected`: considered for eviction
    devices: tuple[ConsideredDevice, ...] = ()  # for `waits`, `evicts`, `placed` and `rejected`: considered for it
    step: int = 0  # number of the core's step that decided


Entry = Transition | Decision
