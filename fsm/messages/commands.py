"""What to do: the outputs of `Core.step`."""

from __future__ import annotations

from dataclasses import dataclass

from fsm.domain.devices import Amounts, DeviceId, Placement
from fsm.domain.model_info import Options
from fsm.machine.request import ModelId, RequestId
from fsm.machine.runner import RunnerId
from fsm.messages.reasons import FailureReason
from fsm.messages.refusals import Refusal


@dataclass(frozen=True, slots=True)
class Inspect:
    """Read a model's metadata, and sample the devices. Ends in Sampled and one Inspected."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class Launch:
    """Start a runner. Ends in exactly one Exited, whenever that is; Progress and one Loaded may come before it."""

    runner: RunnerId
    model: ModelId
    options: Options  # every automatic value made explicit
    placement: Placement


@dataclass(frozen=True, slots=True)
class Stop:
    """End a runner: terminate, then kill. Ends in the Exited of its Launch, which it cancels if that has not begun."""

    runner: RunnerId


@dataclass(frozen=True, slots=True)
class Sample:
    """Read the devices, now or later but after this. Ends in one Sampled of this number or a higher one."""

    number: int


@dataclass(frozen=True, slots=True)
class Claim:
    """Have devices for this program alone, all of them or none, then read them. Ends in Sampled and one Claimed.

    Contended may come before them; what comes after its Unclaim is late.
    """

    number: int  # never used before
    devices: tuple[DeviceId, ...]  # where the memory is: the host for an integrated GPU


@dataclass(frozen=True, slots=True)
class ReleaseClaim:
    """Give up a Claim, had or not: the one end of each."""

    number: int


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Read so many bytes of these models' files into the page cache, one after the other; nobody hears of it.

    It replaces the one before: what is not named is to be read no further, and 0 bytes of one are no more of it.
    """

    files: tuple[tuple[ModelId, int], ...]  # bytes from their beginning, the model's own first


@dataclass(frozen=True, slots=True)
class PersistMeasurement:
    """Keep, for programs to come, what the life of a runner showed; it ends in nothing, and may be forgotten."""

    runner: RunnerId  # whose Launch says of which model, and with which options and split
    took: Amounts = ()  # bytes by device that the next one like it is to be promised; empty: not known yet
    load_s: float | None = None  # how long it took to load; None: as said before, or not known


@dataclass(frozen=True, slots=True)
class Grant:
    """Answer a request; a lease is booked on the runner already. None: memory of the program's own."""

    request: RequestId
    runner: RunnerId | None


@dataclass(frozen=True, slots=True)
class Reject:
    """Answer a request with a refusal."""

    request: RequestId
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class RevokeLease:
    """Tell a lease's holder that its runner is gone; the lease is released already."""

    request: RequestId
    reason: FailureReason | None  # None: the scheduler was closed


@dataclass(frozen=True, slots=True)
class NotifyContention:
    """Tell the holders of a runner's leases that others wait for its memory."""

    runner: RunnerId
    requests: tuple[RequestId, ...]  # the leases


@dataclass(frozen=True, slots=True)
class Finished:
    """Everything is unloaded after a Close: the shell may end."""


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
