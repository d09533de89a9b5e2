"""How runners end without being stopped: failed loads, crashes, and the back-off of their models."""

from __future__ import annotations

from collections.abc import Iterable

from fsm.domain.options import Options
from fsm.lifecycle import memory_recovery, requests, runners
from fsm.lifecycle.step_context import StepContext
from fsm.machine.request import Request, RequestState
from fsm.machine.runner import LOADING, Runner
from fsm.messages.events import Exited
from fsm.messages.reasons import BackedOff, FailureReason, LoadStalled, ProcessExited, RanOutOfMemory
from fsm.messages.refusals import LoadFailedRefusal, LoadTimeoutRefusal, Refusal
from fsm.planning.failed_loads import note_failed_load
from fsm.sizing.load_history import note_bounded
from fsm.state.core_state import CoreState
from fsm.state.model_record import BackOff, ModelRecord

MOST_BACKED_OFF = 2  # options of one model at a time: after that its model is backed off, whatever a request names


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
    memory_recovery.note_end(step, runner, stopped=False)
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
    """Crash a runner whose load failed, and answer the requests that waited for it:

    1. A request survives one load that ran out of memory. The next load has a smaller context where the context was
       automatic and large, or else is exclusive: all other runners leave before. An exclusive load may fail once for
       requests that came later, and not again: such requests might come for ever.
    2. After a load with defaults of settings, all survive it: the next load is without them.
    3. Where the file has loaded before, the options are to blame: requests with the same options are refused, now and
       during a back-off. Requests with others that joined the load are planned by themselves.
    4. Else all requests for the model are. Options that have failed before are backed off for longer besides.
    """
    state, model = step.state, step.state.models[runner.model]
    waiting = [request for group in state.groups_served_by(runner) for request in group.requests.values()]
    runners.crash(step, runner, reason)
    note_failed_load(state, runner, out_of_memory=out_of_memory)
    model.context_growths = 0  # the next load has no room to grow
    if out_of_memory and _try_again(step, runner, waiting, reason):  # 1
        return
    model.load_exclusively = False
    options, has_defaults = model.load_of(runner)
    if has_defaults and not out_of_memory:  # 2
        model.without_defaults = True
        back_off_options(step, model, options, reason)
        return
    model.without_defaults = False
    if options_are_to_blame(state, model):  # 3
        until = back_off_options(step, model, options, reason)
        waiting = [request for request in waiting if request.spec.options == runner.asked]
    else:  # 4
        until = back_off(step, model, reason)
        if options in model.back_offs:
            longer = max(until, back_off_options(step, model, options, reason))
            asked = [request for request in waiting if request.spec.options == runner.asked]
            refuse_failed(step, asked, reason, longer, out_of_memory=out_of_memory)
        waiting = [request for group in state.groups_of_model(model.id) for request in group.requests.values()]
    refuse_failed(step, waiting, reason, until, out_of_memory=out_of_memory)


def _try_again(step: StepContext, runner: Runner, waiting: list[Request], reason: FailureReason) -> bool:
    """Have a load that ran out of memory tried once more for each request that waited; False where there is none."""
    model = step.state.models[runner.model]
    again = not (model.load_exclusively and model.failures)
    survivors = [request for request in waiting if again and not request.survived]
    if not survivors:
        return False
    model.failure = reason
    model.failures += model.load_exclusively
    model.load_exclusively = not model.step_down(runner)
    for request in survivors:  # to a request that named its context, the load with a smaller one is no second try
        request.survived = model.load_exclusively or request.spec.options.num_ctx is None
    others = [request for request in waiting if request not in survivors]
    refuse_failed(step, others, reason, step.state.now, out_of_memory=True)
    return True


def options_are_to_blame(state: CoreState, model: ModelRecord) -> bool:
    """Tell whether a failed load tells of its options: the file has loaded, and few others are backed off."""
    others = [one for one in model.back_offs.values() if one.until > state.now]
    return bool(model.loads) and not model.failures and len(others) < MOST_BACKED_OFF


def refuse_failed(
    step: StepContext, waiting: Iterable[Request], reason: FailureReason, until: float, *, out_of_memory: bool = False
) -> None:
    """Refuse requests that waited for a load that failed, or whose model is backed off `until` then."""
    for request in waiting:
        refusal: Refusal = LoadFailedRefusal(
            request.spec.model, reason, max(0.0, until - step.state.now), out_of_memory
        )
        if isinstance(reason, LoadStalled):
            refusal = LoadTimeoutRefusal(request.spec.model, reason.timeout_s)
        requests.answer(step, request, RequestState.rejected, refusal)


def count_crash(step: StepContext, runner: Runner, reason: FailureReason) -> None:
    """Back a model off from its second crash in a row on; after the first crash it may be loaded at once."""
    model = step.state.models[runner.model]
    if runner.loaded_at is not None and step.state.now - runner.loaded_at >= step.state.config.good_life_s:
        model.failures = 0
    if model.failures:
        back_off(step, model, reason)
        for group in step.state.groups_of_model(model.id):
            refuse_failed(step, list(group.requests.values()), reason, model.blocked_until)
    else:
        model.failures, model.failure = 1, reason


def back_off(step: StepContext, model: ModelRecord, reason: FailureReason) -> float:
    """Refuse all requests for a model for a while; return until when."""
    model.failure = reason
    back_off_s = _back_off_s(step, model.failures)
    model.blocked_until = step.state.now + back_off_s
    model.failures += 1
    step.decide("backs off", model.id, BackedOff(model.failures, back_off_s), None)
    return model.blocked_until


def back_off_options(step: StepContext, model: ModelRecord, options: Options, reason: FailureReason) -> float:
    """Refuse requests whose load has these options for a while; return until when."""
    failures = model.back_offs[options].failures if options in model.back_offs else 0
    back_off_s = _back_off_s(step, failures)
    until = step.state.now + back_off_s
    note_bounded(model.back_offs, options, BackOff(failures + 1, until, reason))
    step.decide("backs off", model.id, BackedOff(failures + 1, back_off_s, these_options=True), None)
    return until


def _back_off_s(step: StepContext, failures: int) -> float:
    limits = step.state.config
    return min(limits.back_off_limit_s, limits.back_off_s * 2.0 ** min(failures, 16))
