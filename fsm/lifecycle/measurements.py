"""Measurements: the bytes that runners were seen to take, and what they say of the next runner like them."""

from __future__ import annotations

from collections.abc import Iterable

from fsm.domain.devices import HOST, Amounts, DeviceId
from fsm.lifecycle.step_context import StepContext
from fsm.machine.runner import Runner
from fsm.messages.commands import PersistMeasurement
from fsm.messages.events import ContextFilled, Loaded
from fsm.messages.reasons import Measured
from fsm.sizing.load_history import note_bounded


def measure(step: StepContext, runner: Runner, amounts: Amounts, mapped_bytes: int) -> bool:
    """Enter measured bytes into a runner's account, even beyond its reservation; return whether it has grown.

    Of a runner that is placed without the pages of its file, only the bytes without pages count.
    """
    account = step.state.ledger.accounts["runner", runner.id]
    if runner.placement.without_pages:
        amounts = tuple((one, max(0, size - mapped_bytes) if one == HOST else size) for one, size in amounts)
        mapped_bytes = 0
    account.mapped_bytes = mapped_bytes
    within = [device for device, reserved in account.reserved.items() if account.peak.get(device, 0) <= reserved]
    grown = account.measure(step.state.ledger.by_memory(amounts))
    beyond = [device for device in within if account.peak.get(device, 0) > account.reserved[device]]
    if beyond and step.decision_log is not None and not account.peak_observed:
        step.decide("measured", runner.model, _figures(step, runner, beyond, filled=False), None, runner.id)
    return grown


def observe_peak(step: StepContext, runner: Runner, event: ContextFilled) -> bool:
    """Let measurements replace predictions, since a runner has filled a context; False where they have already."""
    account = step.state.ledger.accounts["runner", runner.id]
    if account.peak_observed:
        return False
    account.observe_peak(dict(event.expected_growth))
    record_measurement(step, runner)
    if step.decision_log is not None:
        step.decide("measured", runner.model, _figures(step, runner, account.peak, filled=True), None, runner.id)
    step.replan = True  # memory may be free for the request groups that wait
    return True


def expect(step: StepContext, runner: Runner, event: Loaded) -> None:
    """Note the most that a runner will take, where its engine can tell that as soon as the runner has loaded.

    A measured placement is more exact: an earlier runner may have filled a context.
    """
    account = step.state.ledger.accounts["runner", runner.id]
    for device, expected_growth in event.expected_growth if not runner.placement.measured else ():
        if device in account.peak:
            account.projected_peak[device] = account.peak[device] + expected_growth


def record_measurement(step: StepContext, runner: Runner, load_s: float | None = None) -> None:
    """Keep the bytes that a runner took, or may yet take, as the reservation of the next runner like it.

    Where neither a full context nor the engine has shown them, the prediction stands, as it does for a runner that is
    placed without the pages of its file. `load_s` is given once a runner.
    """
    model, account = step.state.models[runner.model], step.state.ledger.accounts["runner", runner.id]
    if runner.loaded_at is None or runner.id < model.first_runner_of_file:
        return
    key = runner.launch_options, runner.placement.gpu_layers
    took = before = model.measured.get(key, ())
    unseen = [device for device, size in account.reserved.items() if size and device not in account.peak]
    known = load_s is None or account.projected_peak  # just loaded, only the engine can tell what is still to come
    if not unseen and known and not runner.placement.without_pages:
        took = tuple((device, account.expected_bytes(device)) for device in sorted(account.reserved))
    if took != before:
        note_bounded(model.measured, key, took)
        model.demands.clear()
    if load_s is not None:
        model.note_load(runner.placement.gpu_layers, load_s)
    if step.state.config.persists_measurements and (took != before or load_s is not None):
        step.commands.append(PersistMeasurement(runner.id, took, load_s))


def _figures(step: StepContext, runner: Runner, devices: Iterable[DeviceId], *, filled: bool) -> Measured:
    account, predicted = step.state.ledger.accounts["runner", runner.id], dict(runner.placement.bytes)
    figures = (
        (device, predicted.get(device, 0), account.peak[device], account.held_bytes(device))
        for device in sorted(devices)
    )
    return Measured(tuple(figures), runner.placement.measured, filled)
