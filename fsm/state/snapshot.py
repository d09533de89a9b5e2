"""What can be seen of the core's state from outside: frozen values, safe to keep and to pass on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fsm.domain.devices import HOST, Amounts, DeviceId
from fsm.domain.options import Options
from fsm.machine.request import ModelId, Purpose, RequestId, RequestState
from fsm.machine.runner import RunnerId, RunnerState
from fsm.messages.reasons import WaitReason
from fsm.state.core_config import CoreConfig
from fsm.state.core_state import CoreState
from fsm.state.memory_ledger import Account


@dataclass(frozen=True, slots=True)
class RunnerView:
    """One runner; times are seconds of the scheduler's clock, memory is bytes by device."""

    id: RunnerId
    model: ModelId
    state: RunnerState
    leases: int
    options: Options
    promised: Amounts  # reserved
    resident: Amounts  # as last measured; empty: not yet
    predicted: Amounts  # at its launch; or measured on an earlier runner like it, where there was one
    peak: Amounts  # the most that was measured
    held: Amounts  # counted as taken: the larger of reservation and peak
    mapped_bytes: int  # of the resident bytes on the host: pages of files
    settled: bool  # it has filled a context: its measured peak has replaced the prediction
    gpu_layers: Amounts  # layers by GPU
    keep_alive_s: float
    expires_at: float  # infinite unless its keep-alive clock runs
    launched_at: float
    loaded_at: float | None
    pinned: bool
    process: bool  # its process may be alive
    due_at: float  # when it is overdue; infinite unless it is expiring
    declared: bool  # the model is an object with declared bytes: nothing is predicted


@dataclass(frozen=True, slots=True)
class WaitView:
    """One waiting request."""

    request: RequestId
    model: ModelId
    purpose: Purpose
    position: int  # 0: first
    queued_at: float
    waits_for: WaitReason
    until: float  # when the wait is expected to be over, or planned again; infinite: unknown
    gives_up_at: float  # infinite: it has no time limit of its own


@dataclass(frozen=True, slots=True)
class HeldView:
    """One granted request, which holds a lease or memory of the program's own."""

    request: RequestId
    model: ModelId
    purpose: Purpose
    queued_at: float
    runner: RunnerId | None  # None: it holds memory


@dataclass(frozen=True, slots=True)
class DeviceView:
    """One device's account, in bytes."""

    id: DeviceId
    kind: Literal["cpu", "gpu"]
    name: str
    capacity_bytes: int
    reported_free_bytes: int
    held_bytes: int  # reserved, or measured where that is more
    free_bytes: int  # that can still be reserved
    missing_bytes: int  # of the capacity that other programs hold, and that cannot be reserved therefore
    integrated: bool = False  # a GPU that shares the host's memory: these are the host's figures once more

    @property
    def memory(self) -> DeviceId:
        """The device whose account holds its bytes: the host for an integrated GPU."""
        return HOST if self.integrated else self.id


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that can be seen of the state at one moment."""

    at: float
    runners: tuple[RunnerView, ...]
    queue: tuple[WaitView, ...]
    held: tuple[HeldView, ...]
    devices: tuple[DeviceView, ...]
    limits: CoreConfig
    closing: bool


def take_snapshot(state: CoreState) -> Snapshot:
    """Return a snapshot of the state as it is now."""
    return Snapshot(
        state.now, _runners(state), _queue(state), _held(state), _devices(state), state.config, state.closing
    )


def _runners(state: CoreState) -> tuple[RunnerView, ...]:
    views = []
    for runner in state.runners.values():
        account, model = state.ledger.accounts["runner", runner.id], state.models[runner.model]
        view = RunnerView(
            runner.id, runner.model, runner.state, len(runner.leases), runner.effective_options,
            tuple(account.reserved.items()),
            tuple(account.resident.items()), runner.placement.bytes, tuple(account.peak.items()), _held_bytes(account),
            account.mapped_bytes, account.peak_observed, runner.placement.gpu_layers, runner.keep_alive_s,
            state.timers.at(("keep-alive", runner.id)), runner.launched_at, runner.loaded_at,
            model.pinned, runner.process, runner.stop_deadline, model.declared,
        )  # fmt: skip
        views.append(view)
    return tuple(views)


def _held_bytes(account: Account) -> Amounts:
    return tuple((device, account.held_bytes(device)) for device in sorted({*account.reserved, *account.peak}))


def _queue(state: CoreState) -> tuple[WaitView, ...]:
    waiting = [(group, request) for group in state.groups_in_order() for request in group.requests.values()]
    return tuple(
        WaitView(
            request.id,
            request.spec.model,
            request.spec.purpose,
            position,
            request.queued_at,
            group.waits_for,
            group.until,
            gives_up_at=state.timers.at(("request", request.id)),
        )
        for position, (group, request) in enumerate(waiting)
    )


def _held(state: CoreState) -> tuple[HeldView, ...]:
    return tuple(
        HeldView(
            request.id,
            request.spec.model,
            request.spec.purpose,
            request.queued_at,
            RunnerId(request.runner) if request.runner is not None else None,
        )
        for request in state.requests.values()
        if request.state is RequestState.granted
    )


def _devices(state: CoreState) -> tuple[DeviceView, ...]:
    ledger = state.ledger
    return tuple(
        DeviceView(
            id,
            sample.kind,
            sample.name,
            sample.capacity_bytes,
            sample.free_bytes,
            ledger.held_bytes(memory),
            ledger.free_bytes(memory),
            ledger.held_by_others(memory),
            sample.integrated,
        )
        for id, sample in ledger.devices.items()
        for memory in [sample.memory if sample.memory in ledger.devices else id]  # the host may not have been read
    )
