"""Mutants with faults that any scheduler might have: in answers, runners, memory, claims and files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from fsm.core import Core
from fsm.domain.devices import HOST, DeviceId
from fsm.lifecycle import apply_plan, device_claims, failures, loads, memory_recovery, prefetch, requests, runners
from fsm.lifecycle.step_context import StepContext
from fsm.machine.request import Request, RequestState
from fsm.machine.runner import EXPIRING, LOADING, STOPPING, Runner
from fsm.messages.commands import Finished, Grant, ReleaseClaim
from fsm.messages.events import Acquire, Cancel, Event, Exited, Inspected, Loaded, Release, Sampled
from fsm.messages.reasons import ExpireReason, RunnerReason
from fsm.messages.refusals import Refusal, SchedulerClosed
from fsm.planning import eviction_candidates
from fsm.planning.availability import AFTER_STOPS, NOW
from fsm.planning.plan import Plan
from fsm.planning.planning_context import PlanningContext
from fsm.state.core_state import CoreState, OpenClaim
from fsm.state.request_queue import RequestGroup
from fsm.state.timers import Timers
from tests.verification.mutant import Patch, instead, mutant

# -- answers ----------------------------------------------------------------------------------------------------------


@mutant("one-place")
def granted_twice(patch: Patch) -> None:
    """A load grants its first request twice."""

    @instead(patch, requests, "serve")
    def serve(original: Callable[..., None], step: StepContext, runner: Runner, lines: list[object]) -> None:
        original(step, runner, lines)
        step.commands += [one for one in step.commands if isinstance(one, Grant)][:1]


@mutant("time-outs")
def a_time_out_is_forgotten(patch: Patch) -> None:
    """A request with a time limit is not refused when the limit is over."""

    @instead(patch, Core, "_time_is_up")
    def time_is_up(original: Callable[..., None], core: Core, key: tuple[str, int]) -> None:
        if key[0] != "request":
            original(core, key)


@mutant("time-outs")
def a_time_out_outlives_its_request(patch: Patch) -> None:
    """The timer of an answered request goes on."""

    @instead(patch, Timers, "clear")
    def clear(original: Callable[..., None], timers: Timers, key: tuple[str, int]) -> None:
        if key[0] != "request":
            original(timers, key)


@mutant("one-place")
def a_close_forgets_the_queue(patch: Patch) -> None:
    """Waiting requests are not answered when the core closes."""

    @instead(patch, requests, "reject_group")
    def reject_line(original: Callable[..., None], step: StepContext, line: RequestGroup, refusal: Refusal) -> None:
        if not isinstance(refusal, SchedulerClosed):
            original(step, line, refusal)


@mutant("one-place")
def closing_has_no_end(patch: Patch) -> None:
    """A close never sends Finished."""

    @instead(patch, Core, "step")
    def step(original: Callable[..., list[object]], core: Core, now: float, event: Event) -> list[object]:
        commands = [one for one in original(core, now, event) if not isinstance(one, Finished)]
        core.finished = False
        return commands


@mutant("one-place")
def a_closed_scheduler_takes_requests(patch: Patch) -> None:
    """A request after the close waits for a load, as before it."""

    @instead(patch, Core, "_acquire")
    def acquire(original: Callable[..., None], core: Core, event: Acquire) -> None:
        closing, core._state.closing = core._state.closing, False
        original(core, event)
        core._state.closing = closing


@mutant("one-place")
def a_second_close_allows_more_time(patch: Patch) -> None:
    """Each close begins the time limit anew."""

    @instead(patch, Core, "_close")
    def close(original: Callable[..., None], core: Core, timeout_s: float) -> None:
        original(core, timeout_s)
        core._state.timers.set(("close", 0), core._state.now + timeout_s)


@mutant("one-place", most=2000)
def a_close_does_not_stop_loads(patch: Patch) -> None:
    """A close lets loads go on, and finishes only when they end by themselves."""

    @instead(patch, Core, "_close")
    def close(original: Callable[..., None], core: Core, timeout_s: float) -> None:
        loads = [runner for runner in core._state.runners.values() if runner.state is LOADING]
        with pytest.MonkeyPatch.context() as closing:
            for runner in loads:
                closing.setattr(runner, "state", EXPIRING)
            original(core, timeout_s)


@mutant("one-place", most=2000)
def the_time_limit_of_a_close_breaks_no_lease(patch: Patch) -> None:
    """A lease that is never released keeps the core open beyond the close's time limit."""

    @instead(patch, Core, "_time_is_up")
    def time_is_up(original: Callable[..., None], core: Core, key: tuple[str, int]) -> None:
        if key[0] != "close":
            original(core, key)


@mutant("one-place")
def who_leaves_as_they_are_granted_keeps_the_lease(patch: Patch) -> None:
    """A cancel after the grant does not release the lease."""

    @instead(patch, Core, "_leave")
    def leave(original: Callable[..., None], core: Core, event: Release | Cancel) -> None:
        request = core._state.requests.get(event.request)
        if not (isinstance(event, Cancel) and request is not None and request.state is RequestState.granted):
            original(core, event)


@mutant("one-place")
def a_release_ends_a_wait(patch: Patch) -> None:
    """A release of a lease that is not granted yet takes the request out of the queue without an answer."""

    @instead(patch, Core, "_leave")
    def leave(original: Callable[..., None], core: Core, event: Release | Cancel) -> None:
        request = core._state.requests.get(event.request)
        if isinstance(event, Release) and request is not None and request.state is RequestState.queued:
            core._state.dequeue(request)
            del core._state.requests[request.id]
        else:
            original(core, event)


@mutant("out-of-memory")
def loads_fail_again_and_again(patch: Patch) -> None:
    """Each load that runs out of memory is followed by another one for the same request."""

    @instead(patch, failures, "load_failed")
    def load_failed(original: Callable[..., None], step: StepContext, *args: object, **how: object) -> None:
        original(step, *args, **how)
        for request in step.state.requests.values():
            request.survived = False


@mutant("one-place", most=2000)
def nobody_looks_again(patch: Patch) -> None:
    """No timer is set for the moment at which a victim may be evicted."""

    @instead(patch, Timers, "set")
    def set_timer(original: Callable[..., None], timers: Timers, key: tuple[str, int], at: float) -> None:
        if key[0] != "plan":
            original(timers, key, at)


@mutant("one-place", most=2000)
def what_was_read_wakes_nobody(patch: Patch) -> None:
    """The result of an inspection causes no plan."""

    @instead(patch, Core, "_inspected")
    def inspected(original: Callable[..., None], core: Core, event: Inspected) -> None:
        original(core, event)
        core._context.replan = False


# -- runners ----------------------------------------------------------------------------------------------------------


@mutant("three-requests")
def stopped_in_use(patch: Patch) -> None:
    """A victim is stopped while it has leases."""

    @instead(patch, runners, "expire")
    def expire(original: Callable[..., None], step: StepContext, runner: Runner, reason: ExpireReason) -> None:
        original(step, runner, reason)
        runners.stop(step, runner)


@mutant("three-requests")
def busy_runners_go_at_once(patch: Patch) -> None:
    """A busy runner is drained before the bound on a request's wait is over."""

    @instead(patch, eviction_candidates, "evictable_at")
    def may_go_at(original: Callable[..., float], pool: CoreState, runner: Runner, bound: float, **how: bool) -> float:
        return max(pool.now, runner.resident_until)


@mutant("one-place")
def no_residency(patch: Patch) -> None:
    """A runner may be evicted as soon as it is loaded, so two clients could unload each other's models for ever."""

    @instead(patch, eviction_candidates, "evictable_at")
    def may_go_at(original: Callable[..., float], pool: CoreState, runner: Runner, bound: float, **how: bool) -> float:
        return original(pool, runner, bound, **how) if runner.leases else pool.now


@mutant("pins")
def pins_do_not_hold(patch: Patch) -> None:
    """A pinned runner is evicted for another model."""
    patch.setattr(CoreState, "pinned", lambda pool, runner: False)


@mutant("one-place")
def a_late_load_counts(patch: Patch) -> None:
    """A runner that was expired while it loaded serves when it has loaded after all."""

    @instead(patch, Core, "_runner_event")
    def runner_event(original: Callable[..., None], core: Core, runner: Runner, event: Event) -> None:
        if isinstance(event, Loaded) and runner.loaded_at is None:
            loads.loaded(core._context, runner, event)
        else:
            original(core, runner, event)


@mutant("one-place")
def a_load_counts_twice(patch: Patch) -> None:
    """A second Loaded of a runner begins its minimum residency again."""

    @instead(patch, Core, "_runner_event")
    def runner_event(original: Callable[..., None], core: Core, runner: Runner, event: Event) -> None:
        original(core, runner, event)
        if isinstance(event, Loaded) and runner.leases:
            idle_s, in_use_s = core._state.config.residency_s(0.0)
            runner.resident_until, runner.drain_protected_until = core._state.now + idle_s, core._state.now + in_use_s


@mutant("one-place")
def an_end_counts_twice(patch: Patch) -> None:
    """A second Exited of a runner begins its memory recovery again."""

    @instead(patch, Core, "_handle")
    def handle(original: Callable[..., None], core: Core, event: Event) -> None:
        runner = core._state.runners.get(event.runner) if isinstance(event, Exited) else None
        if runner is not None and not runner.process:
            memory_recovery.await_memory(core._context, runner)
        else:
            original(core, event)


@mutant("one-place")
def loads_have_no_clock(patch: Patch) -> None:
    """A load without progress is waited for without end."""

    @instead(patch, loads, "launch")
    def launch(original: Callable[..., Runner], step: StepContext, *args: object) -> Runner:
        runner = original(step, *args)
        step.state.timers.clear(("load", runner.id))
        return runner


@mutant("configure")
def stopped_processes_do_not_count(patch: Patch) -> None:
    """Runners that are being stopped do not count towards the limit of runners."""

    @instead(patch, PlanningContext, "__init__")
    def init(original: Callable[..., None], context: PlanningContext, state: CoreState, policy: object) -> None:
        original(context, state, policy)
        stopping = sum(runner.process_state is STOPPING for runner in state.runners.values())
        context.availability.process_slots = [places + stopping for places in context.availability.process_slots]


# -- memory -----------------------------------------------------------------------------------------------------------


@mutant("one-place")
def memory_is_promised_before_it_is_back(patch: Patch) -> None:
    """A load begins in memory that an expiring runner still holds."""

    @instead(patch, PlanningContext, "__init__")
    def init(original: Callable[..., None], context: PlanningContext, state: CoreState, policy: object) -> None:
        original(context, state, policy)
        context.availability.bytes[NOW] = dict(context.availability.bytes[AFTER_STOPS])


@mutant("one-place")
def an_account_stays_open(patch: Patch) -> None:
    """The account of an unloaded runner is not closed, so its memory is never free again."""

    @instead(patch, memory_recovery, "unload")
    def unload(original: Callable[..., None], step: StepContext, runner: Runner, reason: RunnerReason) -> None:
        account = step.state.ledger.accounts["runner", runner.id]
        original(step, runner, reason)
        step.state.ledger.accounts["runner", runner.id] = account


@mutant("own-memory")
def own_memory_is_not_given_back(patch: Patch) -> None:
    """Memory of the program's own stays reserved after its release."""

    @instead(patch, requests, "release")
    def release(original: Callable[..., None], step: StepContext, request: Request) -> None:
        account = step.state.ledger.accounts.get(("memory", request.id))
        original(step, request)
        if account is not None:
            step.state.ledger.accounts["memory", request.id] = account


@mutant("one-place")
def an_early_reading_counts(patch: Patch) -> None:
    """A reading that began before the exit counts as memory that is back."""

    @instead(patch, Core, "_sampled")
    def sampled(original: Callable[..., None], core: Core, event: Sampled) -> None:
        original(core, replace(event, number=core._state.samples))


# -- claims -----------------------------------------------------------------------------------------------------------


@mutant("claims")
def a_claim_is_kept(patch: Patch) -> None:
    """A claim is kept after the load that it was made for."""

    @instead(patch, runners, "release_claim")
    def release_claim(original: Callable[..., None], step: StepContext, runner: Runner) -> None:
        if not runner.process:
            original(step, runner)


@mutant("claims")
def a_claim_is_given_back_twice(patch: Patch) -> None:
    """A claim is released with its load and again with its process."""

    @instead(patch, failures, "exited")
    def exited(original: Callable[..., None], step: StepContext, runner: Runner, event: Exited) -> None:
        claim = runner.claim
        original(step, runner, event)
        if claim:
            step.commands.append(ReleaseClaim(claim))


@mutant("claims-of-both")
def some_of_the_devices_are_enough(patch: Patch) -> None:
    """A load on two GPUs begins under a claim of one, so that another program may load on the other GPU."""

    @instead(patch, device_claims, "_match")
    def match(
        original: Callable[..., list[OpenClaim | None]],
        unused: dict[int, OpenClaim],
        wanted: Sequence[frozenset[DeviceId]],
    ) -> list[OpenClaim | None]:
        matches = original(unused, wanted)
        for place, devices in enumerate(wanted):
            others = [claim for claim in unused.values() if devices & claim.devices]
            if matches[place] is None and others:
                matches[place] = unused.pop(others[0].number)
        return matches


# -- files ------------------------------------------------------------------------------------------------------------


@mutant("read-ahead")
def a_file_is_read_ahead_for_whoever_has_left(patch: Patch) -> None:
    """Prefetching goes on when the last request for the model has left."""

    def read_ahead(step: StepContext, plan: Plan | None) -> None:
        if plan is not None:
            prefetch.read_ahead(step, plan)

    patch.setattr(apply_plan, "read_ahead", read_ahead)


@mutant("read-ahead")
def what_is_read_ahead_forgets_what_is_promised(patch: Patch) -> None:
    """Prefetching fills all memory that the host reports as free, reserved memory included."""
    patch.setattr(prefetch, "spare_bytes", lambda ledger: ledger.devices[HOST].free_bytes)


# -- the grace after last use -----------------------------------------------------------------------------------------


@mutant("moments-of-rest")
def nobody_is_kept_for_the_next_user(patch: Patch) -> None:
    """A runner is evicted in the moment of its last release, although its client may ask again at once."""

    @instead(patch, eviction_candidates, "evictable_at")
    def may_go_at(original: Callable[..., float], pool: CoreState, runner: Runner, bound: float, **how: bool) -> float:
        return original(pool, runner, bound if runner.leases else -math.inf, **how)
