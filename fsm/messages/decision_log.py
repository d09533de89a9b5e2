"""What the core decided and why, in order: for the user's eyes, never an input of a decision."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fsm.domain.devices import Amounts, DeviceId, Placement
from fsm.machine.request import ModelId, RequestId
from fsm.machine.runner import RunnerId, RunnerState
from fsm.messages.reasons import (
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
    """A runner that might make room, and why it does not."""

    runner: RunnerId
    model: ModelId
    held_bytes: Amounts  # by device
    state: RunnerState
    leases: int
    unused_s: float  # since its last grant or release
    cost_s: float | None  # seconds of loading that giving it up is expected to cost; None: the policy does not say
    taken: bool  # it is given up
    why: KeptReason | None  # why it is not; None where it is
    goes_in_s: float  # of one that goes later: at most; else 0


@dataclass(frozen=True, slots=True)
class ConsideredDevice:
    """A device that a model might go on; where it does not, the figures say why."""

    device: DeviceId
    needed_bytes: int  # that must be free on it, headroom included; 0: nothing goes there
    free_bytes: int  # what that is judged by
    taken: bool  # it goes there


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
    leases: int  # held after it
    step: int = 0  # number of the core's step in which it did


DecisionReason = Queued | Waited | WaitReason | Placement | Refusal | ClaimMissed | Prefetched | Measured


@dataclass(frozen=True, slots=True)
class Decision:
    """Something was decided about a request, or found out about a runner."""

    at: float  # seconds of the scheduler's clock
    what: str  # queued, waits, evicts, placed, launched, prefetched, granted or rejected; of a runner: measured
    model: ModelId
    why: DecisionReason | None = None  # None: of evicts, which its runners tell
    request: RequestId | None = None
    runner: RunnerId | None = None
    until: float = math.inf  # of waits: when that is expected to be over, or looked at again; infinite: unknown
    runners: tuple[ConsideredRunner, ...] = ()  # of waits, evicts and rejected: who might have made room
    devices: tuple[ConsideredDevice, ...] = ()  # of waits, evicts, placed and rejected: where it might have gone
    step: int = 0  # number of the core's step in which it was


Entry = Transition | Decision
