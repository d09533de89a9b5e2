"""What runners were measured to occupy, and what that says of the next runner like them."""

from __future__ import annotations

from collections.abc import Iterable

from fsm.domain.devices import Amounts, DeviceId
from fsm.lifecycle.step_context import StepContext
from fsm.machine.runner import Runner
from fsm.messages.commands import (
    PersistMeasurement,
)
from fsm.messages.events import ContextFilled, Loaded
from fsm.messages.reasons import (
    Measured,
)
from fsm.sizing.load_history import note_bounded


def measure(step: StepContext, runner: Runner, amounts: Amounts, mapped_bytes: int) -> bool:
    """Book what a runner was seen to occupy, even beyond its promise; return whether it has grown."""
    account = step.state.ledger.accounts["runner", runner.id]
    account.mapped_bytes = mapped_bytes
    within = [device for device, promised in account.reserved.items() if account.peak.get(device, 0) <= promised]
    grown = account.measure(step.state.ledger.by_memory(amounts))
    beyond = [device for device in within if account.peak.get(device, 0) > account.reserved[device]]
    if beyond and step.decision_log is not None and not account.peak_observed:
        step.decide("measured", runner.model, _figures(step, runner, beyond, filled=False), None, runner.id)
    return grown


def observe_peak(step: StepContext, runner: Runner, event: ContextFilled) -> bool:
    """Hold what was measured of a runner, where more was predicted too; False where that is done already."""
    account = step.state.ledger.accounts["runner", runner.id]
    if account.peak_observed:
        return False
    account.observe_peak(dict(event.expected_growth))
    record_measurement(step, runner)
    if step.decision_log is not None:
        step.decide("measured", runner.model, _figures(step, runner, account.peak, filled=True), None, runner.id)
    step.replan = True  # there may be room for those who wait
    return True


def expect(step: StepContext, runner: Runner, event: Loaded) -> None:
    """Note the most that a runner will take, where its engine can tell that as soon as it has loaded.

    What was measured before is more exact: an earlier life may have filled a context.
    """
    account = step.state.ledger.accounts["runner", runner.id]
    for device, to_come in event.expected_growth if not runner.placement.measured else ():
        if device in account.peak:
            account.projected_peak[device] = account.peak[device] + to_come


def record_measurement(step: StepContext, runner: Runner, load_s: float | None = None) -> None:
    """Have the next runner like this one promised what this one took, or may yet take, where that was measured.

    What was neither settled nor said by the engine is as much as was predicted. `load_s` is told once a life.
    """
    model, account = step.state.models[runner.model], step.state.ledger.accounts["runner", runner.id]
    if runner.loaded_at is None or runner.id < model.first_runner_of_file:
        return
    key = runner.launch_options, runner.placement.gpu_layers
    took = before = model.measured.get(key, ())
    unseen = [device for device, size in account.reserved.items() if size and device not in account.peak]
    if not unseen and (
        load_s is None or account.projected_peak
    ):  # later there is more to go by, if the engine said nothing
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
