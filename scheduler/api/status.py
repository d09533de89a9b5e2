"""The status of a scheduler: frozen values of one moment."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from fsm.core import DeviceView, RunnerView, Snapshot
from fsm.domain.devices import HOST
from fsm.domain.options import Options
from fsm.machine.request import RequestId
from fsm.machine.runner import RunnerId
from scheduler.config.json_values import json_value
from scheduler.engines.interface import prompts_of
from scheduler.errors.kinds import kind_of
from scheduler.errors.wording import Name, wait_reason

if TYPE_CHECKING:
    from scheduler.engines.interface import Process
    from scheduler.runtime.runner_handle import RunnerHandle


@dataclass(frozen=True, slots=True)
class RunnerStatus:
    """One runner that is not unloaded."""

    id: RunnerId
    model: str  # the model's name
    state: str  # loading, ready, idle or expiring
    leases: int
    pid: int | None  # None: not started yet, or an object
    url: str | None  # of its server; None: not loaded yet, or an object
    options: Options  # explicit
    promised_bytes: dict[str, int]  # by device, at its launch: the prediction, or an earlier measurement
    peak_bytes: dict[str, int]  # by device, the most that was measured
    held_bytes: dict[str, int]  # by device, what counts as taken: the larger of both, or the measurement once settled
    settled: bool  # a request has filled a context: the measurement has replaced the prediction
    resident_bytes: dict[str, int]  # by device, as last measured; mapped weights count though they are page cache
    private_bytes: int  # the part on the host that is the runner's own, freed only at its end
    # the part on the host that is pages of files, above all weights, which other processes may have mapped too
    shared_bytes: int
    buffers_bytes: dict[
        str, dict[str, int]
    ]  # by kind (weights, cache, compute, output, projector) and device, as the engine reports them
    gpu_layers: dict[str, int]  # by GPU
    keep_alive_s: float  # how long it stays without leases; infinite: for ever
    expires_in_s: float  # infinite unless its keep-alive clock runs
    load_s: float | None  # None: still loading
    pinned: bool
    restored_tokens: int  # of prompts that an earlier runner has computed; 0 unless prompts are kept
    stuck: bool  # it was stopped and should be gone: its memory stays reserved, and no plan counts on it


@dataclass(frozen=True, slots=True)
class WaitStatus:
    """One waiting request."""

    id: RequestId
    model: str
    position: int  # 0: first
    waited_s: float
    waits_for: str
    until_s: float  # in how long that is expected to be over, or to be evaluated again; infinite: unknown, or overdue
    gives_up_in_s: float  # infinite: the request has no time limit
    waits_for_kind: str  # the same as `waits_for`, for programs: one of a few words


@dataclass(frozen=True, slots=True)
class Status:
    """The runners, the queue and the devices of one moment."""

    runners: tuple[RunnerStatus, ...]
    queue: tuple[WaitStatus, ...]
    devices: tuple[DeviceView, ...]
    problems: tuple[str, ...]  # what went wrong, and what to do about it, in sentences; empty where all is well
    closing: bool
    at: float  # the moment, in seconds of the scheduler's clock, as events have it

    def to_json(self) -> dict[str, Any]:
        """Return the status as JSON values; an infinite time becomes None."""
        return cast(dict[str, Any], json_value(self))


def status_of(
    snapshot: Snapshot,
    now: float,
    name: Name,
    handle_of: Callable[[RunnerId], RunnerHandle | None],
    problems: tuple[str, ...],
) -> Status:
    """Return a snapshot in the user's terms: names for identities, and the figures of processes that the shell has."""
    runners = tuple(_runner_status(view, now, name(view.model), handle_of(view.id)) for view in snapshot.runners)
    queue = tuple(
        WaitStatus(
            wait.request,
            name(wait.model),
            wait.position,
            now - wait.queued_at,
            wait_reason(wait.waits_for, name),
            wait.until - now if wait.until > now else math.inf,
            wait.gives_up_at - now,
            kind_of(wait.waits_for),
        )
        for wait in snapshot.queue
    )
    return Status(runners, queue, snapshot.devices, problems, snapshot.closing, now)


def _runner_status(view: RunnerView, now: float, name: str, handle: RunnerHandle | None) -> RunnerStatus:
    process = handle.process if handle is not None else None
    endpoint = handle.endpoint if handle is not None else None
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
        view.keep_alive_s,
        view.expires_at - now,
        None if view.loaded_at is None else view.loaded_at - view.launched_at,
        view.pinned,
        prompts.restored_tokens if (prompts := prompts_of(process)) is not None else 0,
        not view.leases and now >= view.due_at,
    )


def _buffers_bytes(process: Process | None) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for buffer in process.buffers if process is not None else ():
        found.setdefault(buffer.kind, {})[buffer.device] = buffer.bytes
    return found
