"""The defects D01 to D14 of the reference, each as the same mechanism in our core."""

from __future__ import annotations

import math
from collections.abc import Callable

from fsm.core import Core
from fsm.lifecycle import failures, loads, memory_recovery, requests, runners
from fsm.lifecycle.step_context import StepContext
from fsm.machine.request import Request, RequestState
from fsm.machine.runner import EXPIRING, LOADING, READY, RUNNING, STOPPING, Runner
from fsm.messages.events import Acquire, Cancel, Event, Exited, Release
from fsm.messages.reasons import NeededFor, RunnerReason, RunnerStep, WaitForRunners
from fsm.messages.refusals import Cancelled, Refusal
from fsm.planning import eviction_candidates
from fsm.state.core_state import CoreState
from tests.verification.mutant import Patch, instead, mutant


@mutant("four-requests", "D01")
def a_victim_comes_back(patch: Patch) -> None:
    """A warm request makes a busy victim serve again."""

    @instead(patch, Core, "_acquire")
    def acquire(original: Callable[..., None], core: Core, event: Acquire) -> None:
        for runner in core._state.runners.values():
            model = core._state.models[runner.model]
            if runner.model == event.spec.model and runner.state is EXPIRING and runner.leases and not model.current:
                runner.state, model.current = READY, runner
        original(core, event)


@mutant("three-requests", "D02")
def busy_for_ever(patch: Patch) -> None:
    """A victim that is always in use is waited for without end."""

    @instead(patch, eviction_candidates, "evictable_at")
    def may_go_at(original: Callable[..., float], pool: CoreState, runner: Runner, bound: float, **how: bool) -> float:
        return math.inf if runner.leases else original(pool, runner, bound, **how)


@mutant("keep-alive", "D03")
def the_clock_runs_on(patch: Patch) -> None:
    """A renewal of the keep-alive leaves the earlier timer running."""

    @instead(patch, requests, "grant")
    def grant(original: Callable[..., None], step: StepContext, request: Request, runner: Runner) -> None:
        expires_at = step.state.timers.at(("keep-alive", runner.id))
        original(step, request, runner)
        step.state.timers.set(("keep-alive", runner.id), expires_at)


@mutant("one-place", "D04")
def granted_then_booked(patch: Patch) -> None:
    """A request is granted before its lease is added to the runner."""

    @instead(patch, requests, "grant")
    def grant(original: Callable[..., None], step: StepContext, request: Request, runner: Runner) -> None:
        original(step, request, runner)
        runner.leases.discard(request.id)


@mutant("one-place", "D05")
def a_late_release_counts(patch: Patch) -> None:
    """A release that comes after its runner has gone takes a lease of the next runner."""

    @instead(patch, Core, "_leave")
    def leave(original: Callable[..., None], core: Core, event: Release) -> None:
        held = [request for request in core._state.requests.values() if request.state is RequestState.granted]
        if event.request not in core._state.requests and held:
            requests.release(core._context, held[0])
        else:
            original(core, event)


@mutant("own-memory", "D06")
def a_load_keeps_everybody_waiting(patch: Patch) -> None:
    """While any model loads, every request has to wait, even for a loaded model."""

    @instead(patch, Core, "_acquire")
    def acquire(original: Callable[..., None], core: Core, event: Acquire) -> None:
        pool = core._state
        if any(runner.state is LOADING for runner in pool.runners.values()) and event.request not in pool.requests:
            core._context.model(event.spec.model)
            pool.enqueue(Request(event.request, event.spec, event.keep_alive_s, pool.now))
        else:
            original(core, event)


@mutant("full-queue", "D07")
def the_full_queue_is_waited_for(patch: Patch) -> None:
    """An eviction posts to a bounded queue that only it reads, and a full queue stops every step."""

    @instead(patch, Core, "step")
    def step(original: Callable[..., object], core: Core, now: float, event: Event) -> object:
        pool = core._state
        evicts = any(runner.state is EXPIRING for runner in pool.runners.values())
        return [] if evicts and pool.queued >= pool.config.max_queue else original(core, now, event)


@mutant("one-place", "D08")
def a_failed_load_keeps_its_place(patch: Patch) -> None:
    """A model whose load failed still has a runner that loads."""

    @instead(patch, runners, "forget_current")
    def forget(original: Callable[..., None], step: StepContext, runner: Runner) -> None:
        original(step, runner)
        if runner.loaded_at is None and runner.process_state is RUNNING:
            step.state.models[runner.model].current = runner


@mutant("one-place", "D09")
def a_close_expects_loaded_runners(patch: Patch) -> None:
    """A close during a load raises."""

    @instead(patch, Core, "_close")
    def close(original: Callable[..., None], core: Core, timeout_s: float) -> None:
        assert all(runner.loaded_at is not None for runner in core._state.runners.values()), "a runner has no server"
        original(core, timeout_s)


@mutant("two-gpus", "D10")
def free_memory_is_subtracted_unsigned(patch: Patch) -> None:
    """Free memory that falls during a memory recovery counts as memory that is back."""

    @instead(patch, memory_recovery, "memory_is_back")
    def memory_is_back(original: Callable[..., bool], step: StepContext, runner: Runner) -> bool:
        ledger, part = step.state.ledger, step.state.config.recovery_fraction
        account = ledger.accounts["runner", runner.id]
        for gpu, awaited in runner.recovery_targets.items():
            expected = int(part * account.occupied_bytes(gpu))
            if (ledger.total_available(gpu) - (awaited - expected)) % 2**64 < expected:
                return False
        return True


@mutant("one-place", "D11")
def ids_are_used_again(patch: Patch) -> None:
    """A new runner gets the id of a runner that has gone, as processes get each other's ids."""

    @instead(patch, loads, "launch")
    def launch(original: Callable[..., Runner], step: StepContext, *args: object) -> Runner:
        step.state.next_runner = max(step.state.runners, default=0) + 1
        return original(step, *args)


@mutant("own-memory", "D12")
def ends_have_no_names(patch: Patch) -> None:
    """The exit of one runner is taken for the exit of the one that is waited for."""

    @instead(patch, failures, "exited")
    def exited(original: Callable[..., None], step: StepContext, runner: Runner, event: Exited) -> None:
        stopping = [one for one in step.state.runners.values() if one.process_state is STOPPING]
        original(step, stopping[0] if stopping else runner, event)


@mutant("three-requests", "D13")
def an_eviction_outlives_its_waiter(patch: Patch) -> None:
    """A victim is stopped although the request that it was chosen for was cancelled."""

    @instead(patch, Core, "_leave")
    def leave(original: Callable[..., None], core: Core, event: Release | Cancel) -> None:
        request = core._state.requests.get(event.request)
        line = core._state.groups.get(request.spec) if request is not None else None
        original(core, event)
        if not isinstance(event, Cancel) or line is None:
            return
        if isinstance(line.waits_for, WaitForRunners) and line.waits_for.step is RunnerStep.idle:
            for runner in [runner for runner in core._state.runners.values() if runner.state is READY]:
                runners.expire(core._context, runner, NeededFor(line.spec.model))


@mutant("one-place", "D13")
def a_cancel_is_not_answered(patch: Patch) -> None:
    """A cancelled request is not answered."""

    @instead(patch, requests, "reject")
    def reject(original: Callable[..., None], step: StepContext, request: Request, refusal: Refusal) -> None:
        if not isinstance(refusal, Cancelled):
            original(step, request, refusal)


@mutant("one-place", "D14")
def for_ever_is_not_at_all(patch: Patch) -> None:
    """An infinite keep-alive unloads the runner at once."""

    @instead(patch, runners, "rest")
    def rest(original: Callable[..., None], step: StepContext, runner: Runner, reason: RunnerReason) -> None:
        if runner.keep_alive_s == math.inf and runner.state is READY:
            runners.expire(step, runner, reason)
        else:
            original(step, runner, reason)
