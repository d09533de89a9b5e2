"""Events: what happened, told to the core; the only inputs of `Core.step` beside the time."""

from __future__ import annotations

from dataclasses import dataclass

from fsm.domain.devices import DeviceId, DeviceSample
from fsm.domain.record import message
from fsm.machine.request import ModelId, RequestId, RequestSpec
from fsm.machine.runner import RunnerId
from fsm.messages.reasons import NoAnswer
from fsm.messages.refusals import InvalidModelRefusal, ModelNotFoundRefusal
from fsm.sizing.footprint import Footprint
from fsm.sizing.load_history import NOTHING, LoadHistory
from fsm.sizing.model_profile import ModelProfile

Resident = tuple[tuple[DeviceId, int], ...]  # measured bytes by device


@message
class Acquire:
    """A request begins. It is answered by exactly one Grant or Reject; after a Cancel by a Reject with Cancelled."""

    request: RequestId  # never used before
    spec: RequestSpec
    keep_alive_s: float | None = None  # None: the runner keeps its own; infinite: for ever
    timeout_s: float | None = None  # None: the request has no time limit of its own
    max_leases: int | None = None  # of a runner of its model from now on; 0: none; SLOTS: by its slots; None: as it was
    holds: tuple[RequestId, ...] = ()  # leases that the caller holds while it waits
    keeps: tuple[RequestId, ...] = ()  # of these: leases that are released by the caller alone, and after the answer


@message
class Cancel:
    """The caller left. A queued request is rejected with Cancelled, a granted one released, so that no lease leaks."""

    request: RequestId


@message
class Release:
    """A lease, or the program's own memory, is released; a second Release is harmless."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class Expire:
    """A caller wants a model's runner unloaded: idle at once, busy after its leases, loading after its requests."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class Pin:
    """A model's runner is neither evicted nor expired by its keep-alive from now on."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class Unpin:
    """The model is not pinned any more; the keep-alive clock of its runner starts again."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class Configure:
    """Limits were changed; None leaves a limit as it is. A changed memory limit comes with the next Sampled.

    A lower `max_queue` refuses no request that is queued, and a lower `max_leases` ends no lease. Where more runners
    are alive than a lower `max_runners` allows, idle runners are evicted at once, in the policy's order, busy runners
    once they are idle, pinned runners never. A keep-alive holds for new runners, and for runners whose keep-alive no
    request has named.
    """

    max_queue: int | None = None
    max_runners: int | None = None
    keep_alive_s: float | None = None
    memory_limited: bool | None = None  # whether a limit is set on the host's memory
    max_leases: int | None = None


@dataclass(frozen=True, slots=True)
class Inspected:
    """An Inspect is over: what the model is, or why it cannot be used, and the history of its file."""

    model: ModelId
    outcome: ModelProfile | Footprint | ModelNotFoundRefusal | InvalidModelRefusal
    history: LoadHistory = NOTHING  # of this very file


@dataclass(frozen=True, slots=True)
class Progress:
    """A load shows progress."""

    runner: RunnerId


@dataclass(frozen=True, slots=True)
class Loaded:
    """A Launch succeeded: the runner serves, with these options, and occupies this much."""

    runner: RunnerId
    num_ctx: int | None = None  # the context that it really has; None: as launched
    resident: Resident = ()
    mapped_bytes: int = 0  # of the resident bytes on the host: pages of files
    expected_growth: Resident = ()  # the most that it may still take, where its engine can tell; else empty
    flash_attention: bool | None = None  # whether the engine has chosen it; None: not reported


@dataclass(frozen=True, slots=True)
class ContextFilled:
    """A context of a runner was filled, and a Sampled that came before this event measured its memory after that."""

    runner: RunnerId
    expected_growth: Resident = ()  # the most that the runner may still take although a context is full


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """A runner reported that it ran out of memory, while it loads or while it serves."""

    runner: RunnerId


@dataclass(frozen=True, slots=True)
class FilesReplaced:
    """The files of a runner's model are not those that the runner was loaded from; it is told when a request comes."""

    runner: RunnerId


@dataclass(frozen=True, slots=True)
class Unresponsive:
    """A runner's process lives but answers no probe."""

    runner: RunnerId
    reason: NoAnswer


@dataclass(frozen=True, slots=True)
class Exited:
    """A runner's process is gone, stopped or not, started or not: every Launch ends so, exactly once."""

    runner: RunnerId
    code: int | None  # negative: the signal; None: unknown, or never started
    reason: str = ""  # the engine's and the system's own words, with the end of what it printed
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class Sampled:
    """Devices were read, and the runners' memory with them; these events come in the order of their readings."""

    devices: tuple[DeviceSample, ...]
    resident: tuple[tuple[RunnerId, Resident], ...] = ()
    number: int = 0  # the last Sample command that was known when the reading began; 0: none
    mapped: tuple[tuple[RunnerId, int], ...] = ()  # of a runner's bytes on the host: pages of files
    prompts: tuple[tuple[RunnerId, float], ...] = ()  # seconds to have a runner's prompts again, once it is given up


@dataclass(frozen=True, slots=True)
class ClaimContended:
    """A Claim is not granted yet: another program loads on one of its devices."""

    number: int


@dataclass(frozen=True, slots=True)
class ClaimGranted:
    """A Claim is granted, as far as the machine supports it; the Sampled before this event was read after the grant."""

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
    | FilesReplaced
    | Unresponsive
    | Exited
    | Sampled
    | ClaimContended
    | ClaimGranted
    | Tick
    | Close
)
