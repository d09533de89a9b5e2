"""Memory recovery: how the memory of a runner whose process has gone is seen to be free, and how the runner ends."""

from __future__ import annotations

import math

from fsm.domain.devices import DeviceId
from fsm.lifecycle import measurements
from fsm.lifecycle.step_context import StepContext
from fsm.machine.runner import Runner
from fsm.messages.reasons import RunnerReason
from fsm.state.core_state import MOST_MODELS


def note_end(step: StepContext, runner: Runner, *, stopped: bool) -> None:
    """Note the bytes available on each GPU of a runner before its process began to end; the first call counts.

    A driver may have the memory back before the exit of the process is told. Of a process that ends by itself the last
    reading may show that already, so the reading before it counts too, where that one shows less. So it does where
    another runner of the GPU began to end before: what came back of that runner is not there to come back again.
    """
    ledger = step.state.ledger
    samples = [ledger.devices[device] for device, _ in runner.placement.bytes if device in ledger.devices]
    for gpu in [sample.id for sample in samples if sample.kind == "gpu" and not sample.integrated]:
        ending = [one.available_before[gpu] for one in step.state.runners.values() if gpu in one.available_before]
        now = ledger.total_available(gpu)
        before = now if stopped else ledger.available_before.get(gpu, now)
        runner.available_before.setdefault(gpu, min(now, before, *ending))


def memory_to_come(step: StepContext, runner: Runner) -> dict[DeviceId, int]:
    """Return the bytes available to the scheduler, by GPU, once most of the memory that a runner occupied is back."""
    account, part = step.state.ledger.accounts["runner", runner.id], step.state.config.recovery_fraction
    return {gpu: amount + int(part * account.occupied_bytes(gpu)) for gpu, amount in runner.available_before.items()}


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
    """Tell whether every GPU shows a runner's memory as free; the host's memory is back when the process has gone.

    It is back in any case where nothing but what other runners occupy is missing on the GPU.
    """
    ledger = step.state.ledger
    own = ledger.accounts["runner", runner.id].resident_at_last_sample
    for gpu, target in runner.recovery_targets.items():
        if (sample := ledger.devices.get(gpu)) is not None:
            enough = min(target, sample.capacity_bytes + own.get(gpu, 0))
            if not sample.fresh or ledger.total_available(gpu) < enough:
                return False
    return True


def unload(step: StepContext, runner: Runner, reason: RunnerReason) -> None:
    """End a runner: its reservation ends, and its measurement is kept for the next runner like it."""
    state, model = step.state, step.state.models[runner.model]
    measurements.record_measurement(step, runner)
    if runner.loaded_at is not None and model.context_limit is not None:  # the next runner may find more free memory
        model.context_limit = None
    state.timers.clear(("memory", runner.id))
    if reason is RunnerReason.memory_overdue:
        _count_as_others(step, runner)
    state.ledger.release(("runner", runner.id))
    step.fire(runner, "unload", reason)
    del state.runners[runner.id]
    if len(state.models) > MOST_MODELS:
        state.forget_models()
    step.replan = True


def _count_as_others(step: StepContext, runner: Runner) -> None:
    """Count the memory of a runner that did not come back in time as another program's, for the runners that end too.

    A reading has it among the bytes available to the scheduler no more.
    """
    lost = step.state.ledger.accounts["runner", runner.id].resident_at_last_sample
    for other in step.state.runners.values():
        for bytes_by_gpu in (other.available_before, other.recovery_targets):
            for gpu in bytes_by_gpu.keys() & runner.available_before.keys():
                bytes_by_gpu[gpu] -= lost.get(gpu, 0)
