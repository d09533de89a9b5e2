"""The verbs of requests: grant, release, reject and serve."""

from __future__ import annotations

from fsm.lifecycle import runners
from fsm.lifecycle.step_context import StepContext
from fsm.machine.request import Purpose, Request, RequestState
from fsm.machine.runner import EXPIRING, IDLE, LOADING, READY, Runner, RunnerId
from fsm.messages.commands import Grant, NotifyContention, Reject
from fsm.messages.decision_log import Decision
from fsm.messages.reasons import RunnerReason, Waited
from fsm.messages.refusals import Refusal
from fsm.planning.explanations import devices_refused, runners_refused
from fsm.state.request_queue import RequestGroup
from fsm.state.runner_match import match


def grant(step: StepContext, request: Request, runner: Runner) -> None:
    """Grant a request a runner; its lease begins in the same step, so a runner that is stopped is never granted."""
    state = step.state
    runner.used_at = state.now
    if request.keep_alive_s is not None:
        runner.keep_alive_s, runner.uses_default_keep_alive = request.keep_alive_s, False
    if request.spec.purpose is Purpose.preload:
        request.state = RequestState.released
        if runner.state is IDLE:
            runners.start_keep_alive(step, runner)
    else:
        request.state = RequestState.granted
        request.runner = runner.id
        state.requests[request.id] = request
        runner.leases.add(request.id)
        if runner.state is not READY:
            state.timers.clear(("keep-alive", runner.id))
            step.replan = step.replan or runner.contended  # a new plan finds the runner busy, and notifies its callers
            step.fire(runner, "serve", RunnerReason.granted)
    step.commands.append(Grant(request.id, runner.id))
    if runner.contended and state.groups and request.runner is not None and not step.replan:
        request.asked = True
        step.commands.append(NotifyContention(runner.id, (request.id,)))  # its other callers were notified before
    if step.decision_log is not None:
        step.decide("granted", runner.model, Waited(state.now - request.queued_at), request.id, runner.id)


def release(step: StepContext, request: Request) -> None:
    """Release the lease or memory of a request; a request that waits for a lease of its runner has the next one.

    After its last lease a runner becomes idle, expires or is stopped.
    """
    state = step.state
    request.state = RequestState.released
    del state.requests[request.id]
    if request.runner is None:
        state.ledger.release(("memory", request.id))
        step.replan = True
        return
    runner = state.runners[RunnerId(request.runner)]
    runner.leases.discard(request.id)
    runner.used_at = state.now
    if (awaited := runner.model in state.specs_by_model) and runner.state is not EXPIRING:
        serve(step, runner, state.groups_served_by(runner))
    if runner.leases:
        step.replan = step.replan or awaited
        return
    if runner.state is EXPIRING:
        model = state.models[runner.model]
        if model.current is None:  # its model is unused from now on, and not since its runner expired
            model.rested_at = max(model.rested_at, state.now)
        runners.stop(step, runner)
        step.replan = True  # the stop sets the deadline by which the runner is gone
    elif runner.keep_alive_s <= 0 and not state.models[runner.model].pinned:
        runners.expire(step, runner, RunnerReason.no_keep_alive)
    elif runner.files_replaced:
        runners.expire(step, runner, RunnerReason.files_replaced)
    else:
        load_s = (runner.loaded_at or 0.0) - runner.launched_at
        grace_s = min(state.config.idle_grace_limit_s, state.config.idle_grace_part * load_s)
        runner.idle_grace_until = state.now + grace_s
        runners.rest(step, runner, RunnerReason.released)


def reject(step: StepContext, request: Request, refusal: Refusal) -> None:
    """Reject a request that is in no request group, or in no group any more."""
    request.state = RequestState.rejected
    step.commands.append(Reject(request.id, refusal))
    if step.decision_log is not None:
        entry = Decision(
            step.state.now, "rejected", request.spec.model, refusal, request.id,
            runners=runners_refused(step.state, refusal), devices=devices_refused(refusal), step=step.state.steps,
        )  # fmt: skip
        step.decision_log.append(entry)


def answer(step: StepContext, request: Request, state: RequestState, refusal: Refusal) -> None:
    """Reject a queued request, and leave it in the final `state`; its place in the queue is free at once."""
    step.state.dequeue(request)
    del step.state.requests[request.id]
    if request.spec.model in step.state.models and request.spec.model not in step.state.specs_by_model:
        step.state.models[request.spec.model].load_exclusively = False  # only requests that waited needed it
    reject(step, request, refusal)
    request.state = state
    step.replan = True


def reject_group(step: StepContext, group: RequestGroup, refusal: Refusal) -> None:
    for request in list(group.requests.values()):
        answer(step, request, RequestState.rejected, refusal)


def abandon_load(step: StepContext, request: Request) -> None:
    """Expire the load that a request waited for, if no other request waits for it and its keep-alive is 0.

    Any other load goes on: it belongs to its model, and not to the request that caused it.
    """
    model = step.state.models.get(request.spec.model)
    runner = model.current if model is not None else None
    if model is None or runner is None or runner.state is not LOADING or step.state.groups_served_by(runner):
        return
    if not match(runner, request.spec.options):  # the request never waited for this load
        return
    kept = model.pinned or (runner.keep_alive_s > 0 and request.keep_alive_s != 0)
    if runner.expire_when_served or not kept:
        runners.expire(step, runner, RunnerReason.abandoned)


def retry_after_s(step: StepContext) -> float:
    """Return the estimated seconds until a place in the queue is free: as if each group's load came after the other."""
    known = [model.load_s for model in step.state.models.values() if model.load_s is not None]
    return max(1.0, len(step.state.groups) * (sum(known) / len(known) if known else 1.0))


def grant_memory(step: StepContext, request: Request) -> None:
    step.state.dequeue(request)
    request.state = RequestState.granted
    step.state.ledger.reserve(("memory", request.id), step.state.ledger.by_memory(request.spec.memory).items())
    step.commands.append(Grant(request.id, None))
    step.decide("granted", request.spec.model, Waited(step.state.now - request.queued_at), request.id)


def serve(step: StepContext, runner: Runner, groups: list[RequestGroup]) -> None:
    """Grant a loaded runner to the requests that wait for it, in the order of the queue, as many leases as it may hold.

    Preloads come after the requests for leases. Requests beyond the limit of leases go on waiting.
    """
    state = step.state
    requests = sorted((r for group in groups for r in group.requests.values()), key=state.rank)
    leases = [request for request in requests if request.spec.purpose is Purpose.lease][: state.leases_left(runner)]
    preloads = [request for request in requests if request.spec.purpose is Purpose.preload]
    for request in (*leases, *preloads):
        state.dequeue(request)
        del state.requests[request.id]
    for request in leases:
        grant(step, request, runner)
    for request in preloads:
        if runner.state is LOADING:
            runner.keep_alive_s = runner.keep_alive_s if request.keep_alive_s is None else request.keep_alive_s
            runners.rest(step, runner, RunnerReason.preloaded)
        grant(step, request, runner)
    step.replan = step.replan or bool(leases or preloads)  # another request is the first that waits
