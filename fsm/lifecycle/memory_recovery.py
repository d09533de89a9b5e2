"""Memory recovery: how the memory of a runner whose process has gone is seen to be free, and how the runner ends."""

from __future__ import annotations

import math

from fsm.domain.devices import DeviceId
from fsm.lifecycle import measurements
from fsm.lifecycle.step_context import StepContext
from fsm.machine.runner import Runner
from fsm.messages.reasons import RunnerReason

MOST_MODELS = 1024  # model records that are kept; more only while their models are in use


def memory_to_come(step: StepContext, runner: Runner) -> dict[DeviceId, int]:
    """Return the bytes available to the scheduler, by GPU, once most of the memory that a runner occupied is back."""
    ledger, account = step.state.ledger, step.state.ledger.accounts["runner", runner.id]
    samples = [ledger.devices[device] for device, _ in runner.placement.bytes if device in ledger.devices]
    gpus = [sample.id for sample in samples if sample.kind == "gpu" and not sample.integrated]
    part = step.state.config.recovery_fraction
    return {gpu: ledger.total_available(gpu) + int(part * account.occupied_bytes(gpu)) for gpu in gpus}


def await_memory(step: StepContext, runner: Runner) -> None:
    """Have the devices read until the memory of a runner without a process is back; unload it when the wait is over."""
    state = step.state
    if state.now >= runner.recovery_deadline:
        unload(step, runner, RunnerReason.memory_overdue)
        return
    step.read_devices()
    runner.last_sample = runner.last_sample or state.samples
    wait_s = state.config.recovery_interval_s if runner.recovery_targets else math.inf
    state.timers.set(("memory", runner.id), min(runner.recovery_deadline, state.now + wait_s))


def memory_is_back(step: StepContext, runner: Runner) -> bool:
    """Tell whether every GPU shows a runner's memory as free; the host's memory is back when the process has gone."""
    ledger = step.state.ledger
    targets = [(gpu, target) for gpu, target in runner.recovery_targets.items() if gpu in ledger.devices]
    return all(ledger.devices[gpu].fresh and ledger.total_available(gpu) >= target for gpu, target in targets)


def unload(step: StepContext, runner: Runner, reason: RunnerReason) -> None:
    """End a runner: its reservation ends, and its measurement is kept for the next runner like it."""
    state, model = step.state, step.state.models[runner.model]
    measurements.record_measurement(step, runner)
    if runner.loaded_at is not None and model.context_limit is not None:  # the next runner may find more free memory
        model.context_limit = None
    state.timers.clear(("memory", runner.id))
    state.ledger.release(("runner", runner.id))
    step.fire(runner, "unload", reason)
    del state.runners[runner.id]
    if len(state.models) > MOST_MODELS:
        forget_models(step)
    step.replan = True


def forget_models(step: StepContext) -> None:
    """Delete records of models that are not in use, the longest unused first, until half of `MOST_MODELS` remain."""
    state = step.state
    kept = state.models_in_use().union(id for id, one in state.models.items() if one.failures)
    rested = sorted((one.rested_at, id) for id, one in state.models.items() if id not in kept)
    for _, id in rested[: len(state.models) - MOST_MODELS // 2]:
        del state.models[id]
