"""How runners end without being stopped: failed loads, crashes, and the back-off of their models."""

from __future__ import annotations

from fsm.lifecycle import memory_recovery, requests, runners
from fsm.lifecycle.step_context import StepContext
from fsm.machine.request import RequestState
from fsm.machine.runner import LOADING, Runner
from fsm.messages.events import Exited
from fsm.messages.reasons import FailureReason, LoadStalled, ProcessExited, RanOutOfMemory
from fsm.messages.refusals import LoadFailedRefusal, LoadTimeoutRefusal
from fsm.state.model_record import ModelRecord


def exited(step: StepContext, runner: Runner, event: Exited) -> None:
    """Take in that a runner's process is gone, stopped or not; from now on the runner recovers its memory."""
    reason = ProcessExited(event.code, event.reason, runner.loaded_at is not None)
    if runner.state is LOADING:
        load_failed(step, runner, reason, out_of_memory=event.out_of_memory or runner.out_of_memory)
    elif runner.current:
        runners.crash(step, runner, reason)
        count_crash(step, runner, reason)
    else:
        runners.revoke_leases(step, runner, reason)  # the process ended while the runner drained
    if event.out_of_memory and runner.loaded_at is not None:
        ran_out(step, runner)
    step.fire_process(runner, "exit")
    step.state.processes -= 1
    step.replan = True  # another process may be started
    runner.recovery_targets = memory_recovery.memory_to_come(step, runner)
    runner.recovery_deadline = runner.stop_deadline = step.state.now + step.state.config.recovery_timeout_s
    memory_recovery.await_memory(step, runner)
    runners.release_claim(step, runner)


def unresponsive(step: StepContext, runner: Runner, reason: FailureReason) -> None:
    """Revoke the leases of a runner whose process is alive but does not answer, and stop it."""
    if runner.state is LOADING:
        load_failed(step, runner, reason)
    elif runner.current:
        runners.crash(step, runner, reason)
        count_crash(step, runner, reason)
    else:
        runners.revoke_leases(step, runner, reason)
    runners.stop(step, runner)


def ran_out(step: StepContext, runner: Runner) -> None:
    """Expire every runner, since memory ran out while a runner served and any runner may have taken it."""
    for other in [other for other in step.state.runners.values() if other.current]:
        runners.expire(step, other, RanOutOfMemory(runner.model))


def load_failed(step: StepContext, runner: Runner, reason: FailureReason, *, out_of_memory: bool = False) -> None:
    """Crash a runner whose load failed, and reject the requests that waited for it.

    A request survives one load that ran out of memory. The next load has a smaller context where the context was
    automatic and large, or else is exclusive: all other runners leave before. An exclusive load may fail once for
    requests that came later, and not again: such requests might come for ever.
    """
    model = step.state.models[runner.model]
    waiting = [request for group in step.state.groups_served_by(runner) for request in group.requests.values()]
    runners.crash(step, runner, reason)
    again = out_of_memory and not (model.load_exclusively and model.failures)
    survivors = [request for request in waiting if again and not request.survived]
    if survivors:
        model.failure = reason
        model.failures += model.load_exclusively
        model.load_exclusively = not model.step_down(runner)
        for request in survivors:  # to a request that named its context, the load with a smaller one is no second try
            request.survived = model.load_exclusively or request.spec.options.num_ctx is None
    else:
        back_off(step, model, reason)
        model.load_exclusively = False
    stalled = LoadTimeoutRefusal(model.id, reason.timeout_s) if isinstance(reason, LoadStalled) else None
    failure = stalled or load_failure(step, model, out_of_memory=out_of_memory)
    if not survivors:  # the model is backed off for all its requests
        waiting = [request for group in step.state.groups_of_model(model.id) for request in group.requests.values()]
    for request in waiting:
        if request not in survivors:
            requests.answer(step, request, RequestState.rejected, failure)


def count_crash(step: StepContext, runner: Runner, reason: FailureReason) -> None:
    """Back a model off from its second crash in a row on; after the first crash it may be loaded at once."""
    model = step.state.models[runner.model]
    if runner.loaded_at is not None and step.state.now - runner.loaded_at >= step.state.config.good_life_s:
        model.failures = 0
    if model.failures:
        back_off(step, model, reason)
        for group in step.state.groups_of_model(model.id):
            requests.reject_group(step, group, load_failure(step, model, out_of_memory=False))
    else:
        model.failures, model.failure = 1, reason


def back_off(step: StepContext, model: ModelRecord, reason: FailureReason) -> None:
    limits = step.state.config
    model.failure = reason
    model.blocked_until = step.state.now + min(
        limits.back_off_limit_s, limits.back_off_s * 2.0 ** min(model.failures, 16)
    )
    model.failures += 1


def load_failure(step: StepContext, model: ModelRecord, *, out_of_memory: bool) -> LoadFailedRefusal:
    assert model.failure is not None, f"{model.id} has not failed"
    retry_after_s = max(0.0, model.blocked_until - step.state.now)
    return LoadFailedRefusal(model.id, model.failure, retry_after_s, out_of_memory)
