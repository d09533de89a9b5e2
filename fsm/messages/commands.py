"""Commands: what the core orders the shell to do, the outputs of `Core.step`."""

from __future__ import annotations

from dataclasses import dataclass

from fsm.domain.devices import Amounts, DeviceId, Placement
from fsm.domain.options import Options
from fsm.domain.record import message
from fsm.machine.request import ModelId, RequestId
from fsm.machine.runner import RunnerId
from fsm.messages.reasons import FailureReason
from fsm.messages.refusals import Refusal
from fsm.sizing.model_profile import EngineSettings


@dataclass(frozen=True, slots=True)
class Inspect:
    """Read a model's files, resolve options, and sample the devices. Ends in Sampled and one Inspected."""

    model: ModelId
    options: tuple[Options, ...] = ()  # as requests name them; others are known, if the files have not changed


@dataclass(frozen=True, slots=True)
class Launch:
    """Start a runner. Ends in exactly one Exited, at any time; Progress and one Loaded may come before it."""

    runner: RunnerId
    model: ModelId
    options: Options  # every automatic value made explicit
    placement: Placement
    settings: EngineSettings = ()  # beside the options, as the engine itself has resolved them


@dataclass(frozen=True, slots=True)
class Stop:
    """End a runner: terminate, then kill. Ends in the Exited of its Launch, which is cancelled if it has not begun."""

    runner: RunnerId
    keep_prompts: bool = False  # first save what it has computed of prompts, in bounded time, for the next one like it


@dataclass(frozen=True, slots=True)
class Sample:
    """Read the devices, now or later but after this. Ends in one Sampled of this number or a higher one."""

    number: int


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim devices for this program alone, all or none, then read them. Ends in Sampled and one ClaimGranted.

    ClaimContended may come before them; an event of this claim after its ReleaseClaim is late.
    """

    number: int  # never used before
    devices: tuple[DeviceId, ...]  # by memory: the host for an integrated GPU


@dataclass(frozen=True, slots=True)
class ReleaseClaim:
    """Release a Claim, granted or not: every Claim ends so, exactly once."""

    number: int


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Read so many bytes of these models' files into the page cache, one after the other; no event answers it.

    A Prefetch replaces the one before it: a model that is not named is read no further, nor is one with 0 bytes.
    """

    files: tuple[tuple[ModelId, int], ...]  # bytes from the beginning of a model's files, its own file first


@dataclass(frozen=True, slots=True)
class PersistMeasurement:
    """Keep the measurement of a runner for later programs; no event answers it, and it may be lost."""

    runner: RunnerId  # its Launch names the model, the options and the split
    took: Amounts = ()  # bytes by device to reserve for the next runner like it; empty: not known yet
    load_s: float | None = None  # how long its load took; None: as told before, or not known


@message
class Grant:
    """Answer a request with what it asked for; a lease on the runner has begun already."""

    request: RequestId
    runner: RunnerId | None  # None: memory of the program's own


@dataclass(frozen=True, slots=True)
class Reject:
    """Answer a request with a refusal."""

    request: RequestId
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class RevokeLease:
    """Tell a lease's caller that its runner is gone; the lease is released already."""

    request: RequestId
    reason: FailureReason | None  # None: the scheduler was closed


@dataclass(frozen=True, slots=True)
class NotifyContention:
    """Tell the callers that hold a runner's leases that other requests wait for its memory."""

    runner: RunnerId
    requests: tuple[RequestId, ...]  # the leases


@dataclass(frozen=True, slots=True)
class Finished:
    """Every runner is unloaded after a Close: the shell may end."""


Command = (
    Inspect
    | Launch
    | Stop
    | Sample
    | Claim
    | ReleaseClaim
    | Prefetch
    | PersistMeasurement
    | Grant
    | Reject
    | RevokeLease
    | NotifyContention
    | Finished
)
