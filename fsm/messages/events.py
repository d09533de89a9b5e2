"""What happened: the only inputs of `Core.step`, in the order in which it is given them."""

from __future__ import annotations

from dataclasses import dataclass

from fsm.domain.devices import DeviceId, DeviceSample
from fsm.domain.model_info import ModelInfo
from fsm.machine.request import ModelId, RequestId, RequestSpec
from fsm.machine.runner import RunnerId
from fsm.messages.reasons import NoAnswer
from fsm.messages.refusals import InvalidModelRefusal, ModelNotFoundRefusal
from fsm.sizing.footprint import Footprint
from fsm.sizing.load_history import NOTHING, LoadHistory

Resident = tuple[tuple[DeviceId, int], ...]  # measured bytes by device


@dataclass(frozen=True, slots=True)
class Acquire:
    """A request begins. It is answered by exactly one Grant or Reject; after a Cancel by a Reject with Cancelled."""

    request: RequestId  # never used before
    spec: RequestSpec
    keep_alive_s: float | None = None  # None: the runner keeps its own; infinite: for ever
    timeout_s: float | None = None  # None: waits as long as the rules let it


@dataclass(frozen=True, slots=True)
class Cancel:
    """The asker left. A waiting request is rejected with Cancelled, a granted one released, so that no lease leaks."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class Release:
    """A lease, or the program's own memory, is given back; twice is harmless."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class Expire:
    """Somebody wants a model out of memory: idle at once, busy after its leases, loading after its waiters."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class Pin:
    """A model is never given up for others, nor by its keep-alive."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class Unpin:
    """The model is like any other again; its keep-alive clock starts anew."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class Configure:
    """Limits were changed while running; None leaves one as it is. A changed memory limit comes with the next Sampled.

    Nobody who waits is turned away by a lower `max_queue`. Where more are alive than a lower `max_runners` allows, idle
    ones go at once, in the policy's order, busy ones when they rest, pinned ones never. A keep-alive holds for new
    runners, and for those that took the one before.
    """

    max_queue: int | None = None
    max_runners: int | None = None
    keep_alive_s: float | None = None


@dataclass(frozen=True, slots=True)
class Inspected:
    """An Inspect is over: what the model is made of, or why it cannot be used; and what is known of earlier lives."""

    model: ModelId
    outcome: ModelInfo | Footprint | ModelNotFoundRefusal | InvalidModelRefusal
    history: LoadHistory = NOTHING  # of this very file


@dataclass(frozen=True, slots=True)
class Progress:
    """A load showed that it is alive."""

    runner: RunnerId


@dataclass(frozen=True, slots=True)
class Loaded:
    """A Launch succeeded: the runner serves, with these options, and occupies this much."""

    runner: RunnerId
    num_ctx: int | None = None  # the context it really got; None: as asked
    resident: Resident = ()
    mapped_bytes: int = 0  # of those on the host: pages of files
    expected_growth: Resident = ()  # the most that it may still take, where its engine can tell; else empty


@dataclass(frozen=True, slots=True)
class ContextFilled:
    """A request filled a context of a runner's; a Sampled that came before this measured its memory after that."""

    runner: RunnerId
    expected_growth: Resident = ()  # what a full context does not show: most that it may still take beside it


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """A runner reported that it ran out of memory, while it loads or while it serves."""

    runner: RunnerId


@dataclass(frozen=True, slots=True)
class Unresponsive:
    """A runner's process lives but answers no probe."""

    runner: RunnerId
    reason: NoAnswer


@dataclass(frozen=True, slots=True)
class Exited:
    """A runner's process is gone, asked for or not, started or not: the one end of every Launch."""

    runner: RunnerId
    code: int | None  # negative: the signal; None: unknown, or never started
    reason: str = ""  # the engine's and the system's own words, with the end of what it printed
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class Sampled:
    """Devices were read, and the runners' own memory with them; such events come in the order of their readings."""

    devices: tuple[DeviceSample, ...]
    resident: tuple[tuple[RunnerId, Resident], ...] = ()
    number: int = 0  # the last Sample command that was known when the reading began; 0: none
    mapped: tuple[tuple[RunnerId, int], ...] = ()  # of a runner's bytes on the host: pages of files


@dataclass(frozen=True, slots=True)
class ClaimContended:
    """A Claim is not had yet: another program loads on one of its devices."""

    number: int


@dataclass(frozen=True, slots=True)
class ClaimGranted:
    """A Claim is had, as far as that is possible here; the devices were read after that, and Sampled came before."""

    number: int


@dataclass(frozen=True, slots=True)
class Tick:
    """The time of `Core.deadline()` has come, or passed."""


@dataclass(frozen=True, slots=True)
class Close:
    """No new requests; queued ones are rejected, loads stopped; leases may finish until the time-out."""

    timeout_s: float


Event = (
    Acquire
    | Cancel
    | Release
    | Expire
    | Pin
    | Unpin
    | Configure
    | Inspected
    | Progress
    | Loaded
    | ContextFilled
    | OutOfMemory
    | Unresponsive
    | Exited
    | Sampled
    | ClaimContended
    | ClaimGranted
    | Tick
    | Close
)
