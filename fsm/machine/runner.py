"""A runner is one life of one process (or object) that serves a model, and a machine of five states.

A runner begins with its launch. It is `loading` until its process says that it serves. A model has at most one runner
that is `loading`, `ready` or `idle`, its current one. A loaded runner is `ready` while it holds leases and `idle` while
it holds none, and changes between the two as leases are granted and released. `expiring` is one way: a runner in it is
no longer its model's current runner and is never granted again, so the model may have a new runner beside it. It ends
as `unloaded`, and is removed from the state. A reload is a new runner with a new id.

The process of a runner has a machine of its own (`PROCESS_TABLE`): it is `running` from the launch on, `stopping` once
it was told to stop, and `gone` after its exit. So what an `expiring` runner does comes in up to three phases:

1. Draining: it holds leases, and its process is running and serves them. After the last release the process is told to
   stop. `stop_deadline` is when the runner is overdue; no plan counts on its memory from then on.
2. Stopping: it holds no lease, and its process is stopping: `Stop` was sent, once, and the core waits for `Exited`. At
   `stop_deadline` the runner is stuck: its memory stays reserved, and no plan counts on it.
3. Recovering memory: its process is gone. Each reading of the devices is compared with `recovery_targets`, until the
   memory is back on every GPU or `recovery_deadline` has passed. Then the runner is unloaded, and its reservation ends.

A runner enters `expiring` by `expire` (it is evicted, its keep-alive is over, a caller expires its model, the scheduler
closes) and drains if it must. It enters by `crash` when its load fails or its process is gone or answers no more: its
leases are revoked first, so it does not drain. `Exited` may come in any state but `unloaded`, and leads to phase 3.

What may never happen, by the table, the guard of `unload`, and the invariants (docs/invariants.md) that tests ask:

- A runner holds a lease while it is `loading`, `idle` or `unloaded`, or while its process is stopping or gone.
- A runner is `ready` without a lease, or `loading`, `ready` or `idle` without a process.
- A runner leaves `expiring` for any state but `unloaded`, or is granted while it is in it.
- A runner is `expiring`, holds no lease, and its process is running: it would stay for ever.
- A reservation ends while the process may be alive: other models would be placed in memory that is still in use.

Only `Table.fire` writes `state` and `process_state`. The rows of the two tables are all transitions that there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import NewType

from fsm.domain.devices import DeviceId, Placement
from fsm.domain.options import AUTOMATIC, Options
from fsm.domain.record import Record
from fsm.machine.request import ModelId, RequestId
from fsm.machine.transition_table import Row, Table

RunnerId = NewType("RunnerId", int)


class RunnerState(Enum):
    """The five states of a runner; `MEANING` says what is true while a runner is in each."""

    loading = "loading"
    ready = "ready"
    idle = "idle"
    expiring = "expiring"
    unloaded = "unloaded"

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is a Python call, twice a transition


LOADING, READY, IDLE, EXPIRING, UNLOADED = RunnerState

MEANING: Mapping[RunnerState, str] = MappingProxyType(
    {
        LOADING: "Its memory is reserved and its process is starting; the runner holds no lease.",
        READY: "The runner serves: it holds at least one lease.",
        IDLE: "The runner is loaded and holds no lease; its keep-alive clock runs, unless its keep-alive is infinite "
        "or its model is pinned.",
        EXPIRING: "One way: the runner takes no new lease. It drains its leases, then its process is stopped, then its "
        "memory is recovered; its reservation ends when the memory is back, or the wait is over.",
        UNLOADED: "Final: no lease, no process, no reserved memory.",
    }
)


class ProcessState(Enum):
    """The states of a runner's process; `PROCESS_MEANING` says what is true in each."""

    running = "running"
    stopping = "stopping"
    gone = "gone"

    __hash__ = object.__hash__


RUNNING, STOPPING, GONE = ProcessState

PROCESS_MEANING: Mapping[ProcessState, str] = MappingProxyType(
    {
        RUNNING: "It starts or serves, as far as is known, and was not told to stop.",
        STOPPING: "It was told to stop. Its runner is `expiring` and holds no lease.",
        GONE: "It has ended, or was never started. Its runner is `expiring` and recovers its memory, or is `unloaded`.",
    }
)

RUNNER_TABLE = Table(
    "runner",
    RunnerState,
    [
        Row("serve", LOADING, READY, "it is loaded, and a request waits for a lease: the first lease"),
        Row("serve", IDLE, READY, "the first lease of a new use"),
        Row("rest", LOADING, IDLE, "it is loaded, and no request waits for a lease"),
        Row("rest", READY, IDLE, "its last lease is released"),
        Row("expire", LOADING, EXPIRING, "its load is cancelled"),
        Row("expire", READY, EXPIRING, "it must drain"),
        Row("expire", IDLE, EXPIRING, "its keep-alive is over, it is evicted, or a caller expires its model"),
        Row("crash", LOADING, EXPIRING, "its load has failed or stalled"),
        Row("crash", READY, EXPIRING, "its process is gone or answers no more, and with it every lease"),
        Row("crash", IDLE, EXPIRING, "its process is gone or answers no more"),
        Row("unload", EXPIRING, UNLOADED, "its process is gone, and its memory is back", guard="holds_no_lease"),
    ],
    initial=LOADING,
    final=UNLOADED,
)

PROCESS_TABLE = Table(
    "process",
    ProcessState,
    [
        Row("stop", RUNNING, STOPPING, "its runner expires, and holds no lease any more", guard="holds_no_lease"),
        Row("exit", RUNNING, GONE, "it ended by itself, or could not be started", guard="holds_no_lease"),
        Row("exit", STOPPING, GONE, "it was stopped", guard="holds_no_lease"),
    ],
    initial=RUNNING,
    final=GONE,
    field="process_state",
)


@dataclass(slots=True, eq=False)
class Runner(Record):
    """One life of one process. A reload is a new runner with a new id; ids are never used again."""

    id: RunnerId
    model: ModelId
    launch_options: Options  # explicit: the process was started with them
    placement: Placement  # reserved from Launch to unload
    keep_alive_s: float  # how long the runner stays idle; infinite: for ever
    launched_at: float
    state: RunnerState = RunnerState.loading  # written by Table.fire alone
    effective_options: Options = field(default_factory=Options)  # as launched (but for threads), then as loaded
    chosen_options: Options = AUTOMATIC  # layers, GPU, mapping, flash attention: by the plan and the engine
    usual_options: Options = AUTOMATIC  # context and slots that a request which names none has to have at least
    equivalent_requests: set[Options] = field(default_factory=set)  # options of requests that the runner serves
    asked: Options = AUTOMATIC  # as the request named them that the runner was launched for
    leases: set[RequestId] = field(default_factory=set)  # non-empty iff ready, or expiring and still draining
    loaded_at: float | None = None  # set once, when the process said that it serves
    used_at: float = 0.0  # the last grant or release
    resident_until: float = 0.0  # minimum residency while idle: the runner is not evicted before
    drain_protected_until: float = 0.0  # minimum residency while in use: it is not evicted before; never earlier
    idle_grace_until: float = 0.0  # while idle: its callers may be about to ask again; it is not evicted before
    process_state: ProcessState = ProcessState.running  # written by Table.fire alone
    expire_when_served: bool = False  # to expire after its load: the requests that wait are served first
    files_replaced: bool = False  # of its model, since its load: to expire at its next rest; never idle with it
    out_of_memory: bool = False  # the process reported it; the exit that follows is judged by it
    contended: bool = False  # a group waited for its memory in the last plan, and the runner might not leave yet
    last_sample: int = 0  # number of the Sample after its exit; only this or a later one tells which memory is back
    available_before: dict[DeviceId, int] = field(default_factory=dict)  # bytes on its GPUs as its process began to end
    recovery_targets: dict[DeviceId, int] = field(default_factory=dict)  # bytes available on a GPU once memory is back
    stop_deadline: float = math.inf  # expiring: when it is overdue; no plan counts on its memory from then on
    recovery_deadline: float = 0.0  # when the wait for its memory is over
    claim: int = 0  # number of the Claim that it loads under, while it may take more memory; 0: of none
    uses_default_keep_alive: bool = True  # no request has named its keep-alive: a changed default holds for it too
    fully_offloaded: bool = False  # all its layers are on GPUs
    prompts_s: float = 0.0  # how long it takes to have its prompts again once it is given up, as last told
    keeps_prompts: bool = False  # expiring: its prompts are to be saved before it is stopped
    better_place_since: float = math.inf  # readings have shown a better place free since then; infinite: none

    def __post_init__(self) -> None:
        if self.effective_options == Options():
            self.effective_options = self.launch_options

    def holds_no_lease(self) -> bool:
        """Guard of `unload`, and of a process's end: a runner in use is neither stopped nor unloaded."""
        return not self.leases

    @property
    def current(self) -> bool:
        """Whether this is its model's one runner: loading, ready or idle."""
        return self.state is LOADING or self.state is READY or self.state is IDLE

    @property
    def process(self) -> bool:
        """Whether a process may be alive: from Launch to Exited."""
        return self.process_state is not GONE

    @property
    def on_host(self) -> bool:
        """Whether the runner keeps the host's cores busy while it works, as far as is known."""
        return self.placement.threads is not None and self.placement.threads.on_host
