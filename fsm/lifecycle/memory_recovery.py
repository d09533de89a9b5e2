"""How the memory of a runner whose process has gone comes back, and how its life ends."""

from __future__ import annotations

import math

from fsm.domain.devices import DeviceId
from fsm.lifecycle import measurements
from fsm.lifecycle.step_context import StepContext
from fsm.machine.runner import Runner
from fsm.messages.commands import (
    Sample,
)
from fsm.messages.reasons import (
    RunnerReason,
)

MOST_MODELS = 1024  # that are remembered; more only where somebody uses them


def memory_to_come(step: StepContext, runner: Runner) -> dict[DeviceId, int]:
    """Return what a GPU will have for us, by GPU, once a runner's memory is back: most of what it occupied."""
    ledger, account = step.state.ledger, step.state.ledger.accounts["runner", runner.id]
    samples = [ledger.devices[device] for device, _ in runner.placement.bytes if device in ledger.devices]
    gpus = [sample.id for sample in samples if sample.kind == "gpu" and not sample.integrated]
    part = step.state.config.recovery_fraction
    return {gpu: ledger.total_available(gpu) + int(part * account.occupied_bytes(gpu)) for gpu in gpus}


def await_memory(step: StepContext, runner: Runner) -> None:
    """Its process has gone: look until its memory is back, or the wait is over."""
    state = step.state
    if state.now >= runner.recovery_deadline:
        unload(step, runner, RunnerReason.memory_overdue)
        return
    state.samples += 1
    runner.last_sample = runner.last_sample or state.samples
    step.commands.append(Sample(state.samples))
    wait_s = state.config.recovery_interval_s if runner.recovery_targets else math.inf
    state.timers.set(("memory", runner.id), min(runner.recovery_deadline, state.now + wait_s))


def memory_is_back(step: StepContext, runner: Runner) -> bool:
    """Judge device by device with signed arithmetic; the host's memory is back when the process has gone."""
    ledger = step.state.ledger
    awaited = [(gpu, expected) for gpu, expected in runner.recovery_targets.items() if gpu in ledger.devices]
    return all(ledger.devices[gpu].fresh and ledger.total_available(gpu) >= expected for gpu, expected in awaited)


def unload(step: StepContext, runner: Runner, reason: RunnerReason) -> None:
    """End a runner's life: its reservation ends, and what it took is remembered for the next."""
    state, model = step.state, step.state.models[runner.model]
    measurements.record_measurement(step, runner)
    if runner.loaded_at is not None and model.context_limit is not None:  # the next may have more room
        model.context_limit = None
        model.demands.clear()
    state.timers.clear(("memory", runner.id))
    state.ledger.release(("runner", runner.id))
    step.fire(runner, "unload", reason)
    del state.runners[runner.id]
    if len(state.models) > MOST_MODELS:
        forget_models(step)
    step.replan = True


def forget_models(step: StepContext) -> None:
    """Forget of those models that are of no use to anybody now the ones that rested longest, many at a time."""
    state = step.state
    kept = state.models_in_use().union(id for id, one in state.models.items() if one.failures)
    rested = sorted((one.rested_at, id) for id, one in state.models.items() if id not in kept)
    for _, id in rested[: len(state.models) - MOST_MODELS // 2]:
        del state.models[id]
