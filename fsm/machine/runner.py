"""A runner: one life of one process, and the machine of its five states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import NewType

from fsm.domain.devices import DeviceId, Placement
from fsm.domain.model_info import Options
from fsm.domain.record import Record
from fsm.machine.request import ModelId, RequestId
from fsm.machine.transition_table import Row, Table

RunnerId = NewType("RunnerId", int)


class RunnerState(Enum):
    """The five states of a runner; `MEANING` says what is true while in each."""

    loading = "loading"
    ready = "ready"
    idle = "idle"
    expiring = "expiring"
    unloaded = "unloaded"

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is a Python call, twice a transition


LOADING, READY, IDLE, EXPIRING, UNLOADED = RunnerState

MEANING: Mapping[RunnerState, str] = MappingProxyType(
    {
        LOADING: "Its memory is reserved and its process is starting; it holds no lease.",
        READY: "It serves: it holds at least one lease.",
        IDLE: "It is loaded and holds no lease; its keep-alive clock runs, unless it is infinite or pinned.",
        EXPIRING: "One way: it takes no new lease. It drains those it has, then its process is stopped, then its "
        "memory is waited for; its reservation ends when that is back, or the wait is over.",
        UNLOADED: "Final: no lease, no process, no reserved memory.",
    }
)

RUNNER_TABLE = Table(
    "runner",
    RunnerState,
    [
        Row("serve", LOADING, READY, "it is loaded, and somebody waits: the first lease"),
        Row("serve", IDLE, READY, "the first lease of a new use"),
        Row("rest", LOADING, IDLE, "it is loaded, and nobody waits for a lease"),
        Row("rest", READY, IDLE, "its last lease is back"),
        Row("expire", LOADING, EXPIRING, "its load is cancelled"),
        Row("expire", READY, EXPIRING, "it must drain"),
        Row("expire", IDLE, EXPIRING, "its keep-alive is over, its memory is wanted, or somebody asked for it"),
        Row("crash", LOADING, EXPIRING, "its load has failed or stalled"),
        Row("crash", READY, EXPIRING, "its process is gone or answers no more, and with it every lease"),
        Row("crash", IDLE, EXPIRING, "its process is gone or answers no more"),
        Row("unload", EXPIRING, UNLOADED, "its process is gone, and its memory is back", guard="holds_no_lease"),
    ],
    initial=LOADING,
    final=UNLOADED,
)


@dataclass(slots=True, eq=False)
class Runner(Record):
    """One life of one process. A reload is a new runner with a new id; ids are never used again."""

    id: RunnerId
    model: ModelId
    launch_options: Options  # explicit: what the process was started with
    placement: Placement  # reserved from Launch to unload
    keep_alive_s: float  # how long it rests idle; infinite: for ever
    launched_at: float
    state: RunnerState = RunnerState.loading  # written by Table.fire alone
    effective_options: Options = field(
        default_factory=Options
    )  # what it really got; until it is loaded as told, but for threads
    equivalent_requests: set[Options] = field(default_factory=set)  # what was asked and comes to the same
    leases: set[RequestId] = field(default_factory=set)  # non-empty iff ready, or expiring and still draining
    loaded_at: float | None = None  # set once, when the process said that it serves
    used_at: float = 0.0  # the last grant or release
    resident_until: float = 0.0  # minimum residency: not given up for others before
    drain_protected_until: float = (
        0.0  # the same while it is in use: it does not drain for others before; never earlier
    )
    idle_grace_until: float = 0.0  # idle: its users may be about to ask again; not given up for others before
    process: bool = True  # a process may be alive: from Launch to Exited
    stopping: bool = False  # Stop has been sent; it is sent once
    expire_when_served: bool = False  # asked to expire while loading: its waiters are served, then it goes
    out_of_memory: bool = False  # it said so; the exit that follows is judged by it
    contended: bool = False  # others waited for its memory when it was last planned for them, and it might not go yet
    last_sample: int = 0  # asked for when its process had gone; only this or a later one tells what is back
    recovery_targets: dict[DeviceId, int] = field(default_factory=dict)  # what a GPU has for us once its memory is back
    stop_deadline: float = math.inf  # expiring: when it ought to be gone; after that nobody counts on its memory
    recovery_deadline: float = 0.0  # when the wait for its memory is over
    claim: int = 0  # its devices are the program's own by this Claim, while it may take more memory; 0: by none
    uses_default_keep_alive: bool = True  # no request has named its keep-alive: a changed default holds for it too
    fully_offloaded: bool = False  # all its layers are on GPUs

    def __post_init__(self) -> None:
        if self.effective_options == Options():
            self.effective_options = self.launch_options

    def holds_no_lease(self) -> bool:
        """Guard of `unload`: a runner in use is never unloaded."""
        return not self.leases

    @property
    def current(self) -> bool:
        """Whether it is its model's one runner: loading, ready or idle."""
        return self.state is LOADING or self.state is READY or self.state is IDLE

    @property
    def on_host(self) -> bool:
        """Whether it takes the host's cores while it works, as far as is known."""
        return self.placement.threads is not None and self.placement.threads.on_host
