"""The verbs of runners: rest, expire, stop and crash, with pins and keep-alives."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from fsm.lifecycle import memory_recovery
from fsm.lifecycle.step_context import StepContext
from fsm.machine.request import ModelId, RequestState
from fsm.machine.runner import IDLE, LOADING, RUNNING, Runner, RunnerId
from fsm.messages.commands import NotifyContention, ReleaseClaim, RevokeLease, Stop
from fsm.messages.events import Configure
from fsm.messages.reasons import DeviceShrunk, ExpireReason, FailureReason, NeededFor, RunnerLimit, RunnerReason
from fsm.state.model_record import ModelRecord


def rest(step: StepContext, runner: Runner, reason: RunnerReason) -> None:
    step.fire(runner, "rest", reason)
    start_keep_alive(step, runner)
    step.replan = True


def start_keep_alive(step: StepContext, runner: Runner) -> None:
    pinned = step.state.models[runner.model].pinned
    step.state.timers.set(("keep-alive", runner.id), math.inf if pinned else step.state.now + runner.keep_alive_s)


def configure(step: StepContext, event: Configure) -> None:
    """Take over changed limits; a new keep-alive also holds for runners whose keep-alive no request has named."""
    state = step.state
    changes = {name: value for name in event.__slots__ if (value := getattr(event, name)) is not None}
    state.config = replace(state.config, **changes)
    step.replan = True
    if event.keep_alive_s is None:
        return
    for runner in [runner for runner in state.runners.values() if runner.uses_default_keep_alive]:
        expires_at = state.timers.at(("keep-alive", runner.id))
        rests_since = expires_at - runner.keep_alive_s if expires_at < math.inf else runner.used_at
        runner.keep_alive_s = event.keep_alive_s
        if runner.state is not IDLE or state.models[runner.model].pinned:
            continue
        if rests_since + runner.keep_alive_s > state.now:
            state.timers.set(("keep-alive", runner.id), rests_since + runner.keep_alive_s)
        else:
            expire(step, runner, RunnerReason.keep_alive_over)


def pin(step: StepContext, model: ModelRecord, pinned: bool) -> None:
    model.pinned = pinned
    if model.current is not None and model.current.state is IDLE:
        start_keep_alive(step, model.current)
    step.replan = True


def expire_model(step: StepContext, id: ModelId) -> bool:
    """Expire a model's current runner, now or once it has loaded and served; return False where there is none."""
    model = step.state.models.get(id)
    runner = model.current if model is not None else None
    if runner is None:
        return False
    if runner.state is LOADING and step.state.groups_served_by(runner):
        runner.expire_when_served = True
    else:
        expire(step, runner, RunnerReason.asked)
    return True


def replace_files(step: StepContext, runner: Runner) -> bool:
    """Expire a runner of other files than its model's, now or at its next rest; return False where it does so anyway.

    Its leases are finished, and requests that come before its next rest are served by it.
    """
    if not runner.current or runner.files_replaced:
        return False
    runner.files_replaced = True
    if runner.state is IDLE:
        expire(step, runner, RunnerReason.files_replaced)
    return True


def expire(step: StepContext, runner: Runner, reason: ExpireReason) -> None:
    """Take a runner out of service for good: it drains if it holds leases, and is stopped else."""
    step.fire(runner, "expire", reason)
    if runner.loaded_at is not None:
        step.state.models[runner.model].failures = 0  # the runner served, and did not crash
        runner.keeps_prompts = step.state.config.keeps_prompts and runner.keep_alive_s > 0 and gives_up(reason)
    forget_current(step, runner)
    if not runner.leases:
        stop(step, runner)
    else:
        limits = step.state.config
        runner.stop_deadline = step.state.now + max(limits.max_wait_s, limits.stop_timeout_s)


def gives_up(reason: ExpireReason) -> bool:
    """Tell whether a runner expires although its caller would still have it: for others, or by its keep-alive."""
    return isinstance(reason, NeededFor | RunnerLimit | DeviceShrunk) or reason in (
        RunnerReason.keep_alive_over,
        RunnerReason.better_place,
    )


def forget_current(step: StepContext, runner: Runner) -> None:
    """Let the model of a runner that left service have another runner."""
    model = step.state.models[runner.model]
    model.current = None
    if runner.loaded_at is not None:
        model.rested_at = runner.used_at
    step.state.timers.clear(("keep-alive", runner.id))
    step.state.timers.clear(("load", runner.id))
    step.replan = True


def notify_contention(step: StepContext, contended: Collection[RunnerId]) -> None:
    """Tell the callers of contended runners, each once, that request groups wait for the memory of their runner.

    The runners in `contended` are the only contended ones from now on.
    """
    for runner in step.state.runners.values():
        runner.contended = runner.id in contended
        held = [step.state.requests[lease] for lease in sorted(runner.leases)]
        if unasked := [request for request in held if runner.contended and not request.asked]:
            step.commands.append(NotifyContention(runner.id, tuple(request.id for request in unasked)))
            for request in unasked:
                request.asked = True


def stop(step: StepContext, runner: Runner) -> None:
    if runner.process_state is RUNNING:
        step.fire_process(runner, "stop")
        memory_recovery.note_end(step, runner, stopped=True)
        runner.stop_deadline = step.state.now + step.state.config.stop_timeout_s
        step.commands.append(Stop(runner.id, runner.keeps_prompts and not step.state.closing))
    if runner.claim:
        step.state.timers.set(("claim", runner.claim), runner.stop_deadline)


def revoke_leases(step: StepContext, runner: Runner, reason: FailureReason | None) -> None:
    for lease in sorted(runner.leases):
        step.state.requests.pop(lease).state = RequestState.released
        step.commands.append(RevokeLease(lease, reason))
    runner.leases.clear()


def crash(step: StepContext, runner: Runner, reason: FailureReason) -> None:
    revoke_leases(step, runner, reason)
    step.fire(runner, "crash", reason)
    forget_current(step, runner)


def release_claim(step: StepContext, runner: Runner) -> None:
    if runner.claim:
        step.state.timers.clear(("claim", runner.claim))
        step.commands.append(ReleaseClaim(runner.claim))
        runner.claim = 0
