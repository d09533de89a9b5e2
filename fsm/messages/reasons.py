"""Why something is as it is: values that are compared, stored and recorded. The shell alone makes words of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fsm.domain.devices import DeviceId
from fsm.machine.request import ModelId, RequestId


class WaitFor(Enum):
    """What a request group waits for, where no other runner has to be named."""

    plan = "plan"  # it has not been planned yet
    metadata = "metadata"  # of its model
    load = "load"  # of its model
    other_load = "other_load"  # of its model, with other options
    earlier_requests = "earlier_requests"
    same_model = "same_model"  # an earlier request for its model
    memory = "memory"  # that is being freed
    load_slot = "load_slot"
    other_program = "other_program"  # that loads a model on the same device


class RunnerStep(Enum):
    """What has to become of other runners."""

    leave = "leave"
    idle = "idle"
    drain = "drain"
    load_then_idle = "load_then_idle"
    load_alone = "load_alone"  # with no other load beside it


@dataclass(frozen=True, slots=True)
class WaitForRunners:
    """A request group waits for a step of other runners."""

    models: tuple[ModelId, ...]
    step: RunnerStep


WaitReason = WaitFor | WaitForRunners


class RunnerReason(Enum):
    """Why a runner changes its state, where nothing else has to be named."""

    granted = "granted"
    released = "released"  # its last lease
    loaded = "loaded"  # and no request waits for a lease
    preloaded = "preloaded"
    no_keep_alive = "no_keep_alive"
    keep_alive_over = "keep_alive_over"
    abandoned = "abandoned"  # no request waits for its load any more
    asked = "asked"
    asked_while_awaited = "asked_while_awaited"  # and carried out once it has served the requests that waited
    closing = "closing"
    memory_freed = "memory_freed"
    memory_overdue = "memory_overdue"


@dataclass(frozen=True, slots=True)
class AskedBy:
    """A runner is new, since this request waits for it."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class NeededFor:
    """A runner's memory, or its load slot, is needed for this model; empty: for the program itself."""

    model: ModelId
    load_slot: bool = False


@dataclass(frozen=True, slots=True)
class RunnerLimit:
    """No more runners may be alive than this; those of these models cannot be given up."""

    limit: int
    unmovable: tuple[ModelId, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceShrunk:
    """A device has less memory than before."""

    device: DeviceId


@dataclass(frozen=True, slots=True)
class RanOutOfMemory:
    """A runner of this model ran out of memory."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class ProcessExited:
    """A runner's process has gone."""

    code: int | None  # negative: the signal; None: unknown, or never started
    text: str  # what the engine and the system say of it; may be empty
    loaded: bool  # it had loaded before


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """A runner that has loaded answered no probe in this time."""

    timeout_s: float
    disconnected: bool = False  # its connections broke before


@dataclass(frozen=True, slots=True)
class LoadStalled:
    """A load showed no progress for this time."""

    timeout_s: float


ExpireReason = RunnerReason | NeededFor | RunnerLimit | DeviceShrunk | RanOutOfMemory
FailureReason = ProcessExited | NoAnswer | LoadStalled
TransitionReason = AskedBy | ExpireReason | FailureReason


class Infeasible(Enum):
    """Why a model has no place, where nothing has to be named."""

    held_elsewhere = "held_elsewhere"  # by other programs, or by the program's own reservations
    no_gpu = "no_gpu"  # for layers that are to be on GPUs
    no_required_gpu = "no_required_gpu"
    too_large = "too_large"


@dataclass(frozen=True, slots=True)
class NoSuchDevice:
    """Memory is asked for on a device that is not among those there are."""

    device: DeviceId
    devices: tuple[DeviceId, ...]


@dataclass(frozen=True, slots=True)
class MemoryHeld:
    """Runners of these models hold the memory: they are pinned, or were stopped and do not end."""

    models: tuple[ModelId, ...]
    pinned: bool


InfeasibleReason = Infeasible | NoSuchDevice | RunnerLimit | MemoryHeld


class KeptReason(Enum):
    """Why a runner is not given up for a request group."""

    goes_last = "goes_last"  # when nothing else is missing
    goes_later = "goes_later"
    overdue = "overdue"  # it was stopped, and does not end
    expiring = "expiring"
    pinned = "pinned"
    other_victim = "other_victim"  # it goes for another request group
    awaited = "awaited"  # other requests wait for its load
    not_needed = "not_needed"  # no runner has to go
    in_use = "in_use"
    just_loaded = "just_loaded"
    just_used = "just_used"
    not_enough = "not_enough"  # all that may go would not be
    others_cost_less = "others_cost_less"
    others_come_first = "others_come_first"


@dataclass(frozen=True, slots=True)
class Queued:
    """A request waits: with it, this many do."""

    waiting: int


@dataclass(frozen=True, slots=True)
class Waited:
    """A request was granted after this time."""

    waited_s: float


@dataclass(frozen=True, slots=True)
class Prefetched:
    """So much of a model's files is read ahead while a request waits for memory."""

    bytes: int


@dataclass(frozen=True, slots=True)
class Measured:
    """A runner takes another amount than was predicted, on these devices."""

    bytes: tuple[tuple[DeviceId, int, int, int], ...]  # predicted, measured at most, and held from now on
    known: bool  # what was predicted had been measured before
    filled: bool  # a request has filled a context


@dataclass(frozen=True, slots=True)
class ClaimMissed:
    """A launch goes ahead although other programs that load models kept these devices for this time."""

    devices: tuple[DeviceId, ...]
    timeout_s: float
