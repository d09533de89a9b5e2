"""Reasons of waits, transitions and refusals: values that are compared, stored and recorded.

The shell alone makes words of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fsm.domain.devices import DeviceId
from fsm.machine.request import ModelId, RequestId


class WaitFor(Enum):
    """What a request group waits for, where no other runner has to be named."""

    plan = "plan"  # the group has not been planned yet
    metadata = "metadata"  # of its model
    load = "load"  # of its model
    other_load = "other_load"  # of its model, with other options
    earlier_requests = "earlier_requests"
    same_model = "same_model"  # an earlier request for its model
    lease = "lease"  # its model's runner holds as many leases as it may
    memory = "memory"  # memory that is being freed
    load_slot = "load_slot"
    claim = "claim"  # the answer to the claim of its devices
    other_program = "other_program"  # another program that loads a model on the same device


class RunnerStep(Enum):
    """What other runners have to do before a request group can start."""

    leave = "leave"
    idle = "idle"
    drain = "drain"
    load_then_idle = "load_then_idle"
    release = "release"  # their leases are held by callers of requests that wait themselves
    load_alone = "load_alone"  # the load is exclusive: no other load may begin beside it


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
    loaded = "loaded"  # while no request waits for a lease
    preloaded = "preloaded"
    no_keep_alive = "no_keep_alive"
    keep_alive_over = "keep_alive_over"
    abandoned = "abandoned"  # no request waits for its load any more
    asked = "asked"  # a caller expired the model
    asked_while_awaited = "asked_while_awaited"  # the same during the load: the requests that waited were served first
    better_place = "better_place"  # has been free for longer than its load took, and a request came for it at rest
    files_replaced = "files_replaced"  # its model's files are others now, and it is at rest
    closing = "closing"
    memory_freed = "memory_freed"
    memory_overdue = "memory_overdue"


@dataclass(frozen=True, slots=True)
class AskedBy:
    """A runner was launched because this request waits for it."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class NeededFor:
    """A runner is evicted because its memory, or its load slot, is needed for this model; empty: for the program."""

    model: ModelId
    load_slot: bool = False


@dataclass(frozen=True, slots=True)
class RunnerLimit:
    """No more runners may be alive than this limit."""

    limit: int
    unmovable: tuple[ModelId, ...] = ()  # models whose runners cannot be evicted


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
    text: str  # of the engine and the system; may be empty
    loaded: bool  # the runner had loaded before


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """A runner that has loaded answered no probe for this time."""

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
    """Why no placement of a model is possible, where nothing has to be named."""

    held_elsewhere = "held_elsewhere"  # other programs, or the program's own reservations, hold the memory
    no_gpu = "no_gpu"  # the request places layers on GPUs, and there is none
    no_required_gpu = "no_required_gpu"
    too_large = "too_large"


@dataclass(frozen=True, slots=True)
class NoSuchDevice:
    """Memory is requested on a device that does not exist."""

    device: DeviceId
    devices: tuple[DeviceId, ...]  # that exist


@dataclass(frozen=True, slots=True)
class MemoryHeld:
    """Runners of these models hold the memory: they are pinned, or stuck."""

    models: tuple[ModelId, ...]
    pinned: bool  # False: they were stopped and have not ended in time


InfeasibleReason = Infeasible | NoSuchDevice | RunnerLimit | MemoryHeld


class KeptReason(Enum):
    """Why a runner is not evicted for a request group, or not yet."""

    goes_last = "goes_last"  # it leaves when the group lacks nothing else
    goes_later = "goes_later"
    overdue = "overdue"  # it was stopped, and has not ended in time
    expiring = "expiring"
    evicted = "evicted"  # for this request group, and it expires
    pinned = "pinned"
    other_victim = "other_victim"  # it is a victim of another request group
    awaited = "awaited"  # other requests wait for its load
    not_needed = "not_needed"  # no runner has to be evicted
    in_use = "in_use"
    just_loaded = "just_loaded"
    just_used = "just_used"
    not_enough = "not_enough"  # the memory of all candidates would not suffice
    others_cost_less = "others_cost_less"
    others_come_first = "others_come_first"


@dataclass(frozen=True, slots=True)
class Queued:
    """A request was queued; with it, this many requests wait."""

    waiting: int


@dataclass(frozen=True, slots=True)
class Waited:
    """A request was granted after this time."""

    waited_s: float


@dataclass(frozen=True, slots=True)
class Prefetched:
    """This many bytes of a model's files are read ahead while a request waits for memory."""

    bytes: int


@dataclass(frozen=True, slots=True)
class Measured:
    """A runner takes other amounts of memory than were predicted, on these devices."""

    bytes: tuple[tuple[DeviceId, int, int, int], ...]  # predicted, measured at most, and held from now on
    known: bool  # the prediction was the measurement of an earlier runner
    filled: bool  # a request has filled a context


@dataclass(frozen=True, slots=True)
class BackedOff:
    """A model is not loaded for this time, after failed loads and crashes in a row."""

    failures: int
    back_off_s: float
    these_options: bool = False  # only the options that failed are not tried again


@dataclass(frozen=True, slots=True)
class ClaimMissed:
    """A launch goes ahead without its claim, since other programs that load models kept these devices for this time."""

    devices: tuple[DeviceId, ...]
    timeout_s: float
