"""What `Scheduler.status()` tells: frozen values of one moment."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fsm.core import DeviceView, RunnerView, Snapshot
from fsm.domain.devices import HOST
from fsm.domain.model_info import Options
from fsm.machine.request import RequestId
from fsm.machine.runner import RunnerId
from scheduler.errors.wording import Name, wait_reason

if TYPE_CHECKING:
    from scheduler.engines.interface import Process
    from scheduler.runtime.runner_handle import RunnerHandle


@dataclass(frozen=True, slots=True)
class RunnerStatus:
    """One runner that is not unloaded."""

    id: RunnerId
    model: str  # its name
    state: str  # loading, ready, idle or expiring
    leases: int
    pid: int | None  # None: not started yet, or an object
    url: str | None  # its server; None: not loaded yet, or an object
    options: Options  # explicit
    promised_bytes: dict[str, int]  # by device, at its launch: the prediction, or what was measured before
    peak_bytes: dict[str, int]  # by device, the most that was measured
    held_bytes: dict[str, int]  # by device, what counts as taken: the larger of both, or what was measured once settled
    settled: bool  # a request has filled a context: what was measured has replaced what was predicted
    resident_bytes: dict[str, int]  # by device, as last measured; mapped weights count though they are page cache
    private_bytes: int  # of those on the host: its own, given back only at its end
    shared_bytes: int  # of those on the host: pages of files, its weights above all, which others may have mapped too
    buffers_bytes: dict[
        str, dict[str, int]
    ]  # by kind (weights, cache, compute, output, projector) and device, as it says
    gpu_layers: dict[str, int]  # by GPU
    expires_in_s: float  # infinite unless its keep-alive clock runs
    load_s: float | None  # None: still loading
    pinned: bool
    stuck: bool  # it was stopped and ought to be gone: its memory stays booked, and nobody counts on it


@dataclass(frozen=True, slots=True)
class WaitStatus:
    """One waiting request."""

    id: RequestId
    model: str
    position: int  # 0: first
    waited_s: float
    waits_for: str
    until_s: float  # in how long that is expected to be over, or looked at again; infinite: unknown, or overdue
    gives_up_in_s: float  # infinite: no time limit of its own


@dataclass(frozen=True, slots=True)
class Status:
    """Everything at one moment."""

    runners: tuple[RunnerStatus, ...]
    queue: tuple[WaitStatus, ...]
    devices: tuple[DeviceView, ...]
    problems: tuple[str, ...]  # what could not be read of the devices, or went wrong in a policy, in sentences
    closing: bool


def status_of(
    snapshot: Snapshot,
    now: float,
    name: Name,
    life: Callable[[RunnerId], RunnerHandle | None],
    problems: tuple[str, ...],
) -> Status:
    """Return a snapshot in the user's terms: names for identities, and what only the shell knows of a process."""
    runners = tuple(_runner_status(view, now, name(view.model), life(view.id)) for view in snapshot.runners)
    queue = tuple(
        WaitStatus(
            wait.request,
            name(wait.model),
            wait.position,
            now - wait.queued_at,
            wait_reason(wait.waits_for, name),
            wait.until - now if wait.until > now else math.inf,
            wait.gives_up_at - now,
        )
        for wait in snapshot.queue
    )
    return Status(runners, queue, snapshot.devices, problems, snapshot.closing)


def _runner_status(view: RunnerView, now: float, name: str, life: RunnerHandle | None) -> RunnerStatus:
    process = life.process if life is not None else None
    endpoint = life.endpoint if life is not None else None
    return RunnerStatus(
        view.id,
        name,
        view.state.value,
        view.leases,
        process.pid if process is not None else None,
        endpoint.url if endpoint is not None else None,
        view.options,
        dict(view.predicted),
        dict(view.peak),
        dict(view.held),
        view.settled,
        dict(view.resident),
        max(0, dict(view.resident).get(HOST, 0) - view.mapped_bytes),
        view.mapped_bytes,
        _buffers_bytes(process),
        dict(view.gpu_layers),
        view.expires_at - now,
        None if view.loaded_at is None else view.loaded_at - view.launched_at,
        view.pinned,
        not view.leases and now >= view.due_at,
    )


def _buffers_bytes(process: Process | None) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for buffer in process.buffers if process is not None else ():
        found.setdefault(buffer.kind, {})[buffer.device] = buffer.bytes
    return found
