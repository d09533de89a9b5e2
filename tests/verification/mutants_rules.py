"""Faults against what users are promised: turns, claims, back-off, how long runners stay, who takes what from whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from fsm.core import Core
from fsm.domain.devices import Amounts, Placement
from fsm.lifecycle import device_claims, failures, loads, requests, runners
from fsm.lifecycle.step_context import StepContext
from fsm.machine.request import Request
from fsm.machine.runner import LOADING, Runner, RunnerId
from fsm.messages.events import Acquire, ClaimContended, ClaimGranted, Event, Loaded, Progress
from fsm.messages.reasons import FailureReason, RanOutOfMemory, RunnerLimit
from fsm.planning import planner
from fsm.planning.availability import DRAINED, LATER, SOON, AvailabilityProfile
from fsm.planning.planning_context import PlanningContext
from fsm.state.core_config import CoreConfig
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord
from fsm.state.request_queue import RequestGroup
from tests.verification.mutant import SIMULATION, Patch, instead, mutant

# -- claims -----------------------------------------------------------------------------------------------------------


@mutant(SIMULATION)
def a_contended_claim_counts_as_had(patch: Patch) -> None:
    """A launch goes ahead although another program has its devices."""

    @instead(patch, device_claims, "claim_answered")
    def claim_answered(original: Callable[..., bool], step: StepContext, event: ClaimGranted | ClaimContended) -> bool:
        return original(step, ClaimGranted(event.number))


# -- turns ------------------------------------------------------------------------------------------------------------


@mutant("one-place")
def the_newest_goes_first(patch: Patch) -> None:
    """Whoever came last is planned before those who have waited."""

    @instead(patch, CoreState, "groups_in_order")
    def lines_in_order(original: Callable[..., Iterator[RequestGroup]], pool: CoreState) -> Iterator[RequestGroup]:
        return reversed(list(original(pool)))


@mutant("pins")
def priority_is_worth_nothing(patch: Patch) -> None:
    """Those who are worth more wait as long as others."""
    patch.setattr(CoreState, "rank", lambda pool, head: (head.queued_at, head.id))


@mutant("three-requests")
def the_newest_is_served_first(patch: Patch) -> None:
    """Of those who waited for one load the last one to come is granted first."""

    @instead(patch, requests, "serve")
    def serve(original: Callable[..., None], step: StepContext, *args: object) -> None:
        begun = len(step.commands)
        original(step, *args)
        step.commands[begun:] = reversed(step.commands[begun:])


@mutant("full-queue")
def one_more_waits_than_may(patch: Patch) -> None:
    """The queue's limit is off by one."""

    @instead(patch, Core, "_acquire")
    def acquire(original: Callable[..., None], core: Core, event: Acquire) -> None:
        limits = core._state.config
        core._state.config = replace(limits, max_queue=limits.max_queue + 1)
        original(core, event)
        core._state.config = limits


# -- back-off ---------------------------------------------------------------------------------------------------------


@mutant(SIMULATION)
def nothing_is_backed_off(patch: Patch) -> None:
    """A model whose load has failed is loaded again for the next who asks."""

    @instead(patch, failures, "back_off")
    def back_off(original: Callable[..., None], step: StepContext, model: ModelRecord, reason: FailureReason) -> None:
        original(step, model, reason)
        model.blocked_until = step.state.now


@mutant(SIMULATION)
def each_failure_is_the_first(patch: Patch) -> None:
    """A model that fails again and again is backed off for as short a time as at first."""

    @instead(patch, failures, "back_off")
    def back_off(original: Callable[..., None], step: StepContext, model: ModelRecord, reason: FailureReason) -> None:
        model.failures = 0
        original(step, model, reason)


@mutant(SIMULATION, most=400_000)
def a_crash_loop_has_no_end(patch: Patch) -> None:
    """Each crash is followed by a new load at once, as if it were the first."""

    @instead(patch, failures, "count_crash")
    def count_crash(original: Callable[..., None], step: StepContext, runner: Runner, reason: FailureReason) -> None:
        step.state.models[runner.model].failures = 0
        original(step, runner, reason)


@mutant(SIMULATION, most=400_000)
def back_off_has_no_limit(patch: Patch) -> None:
    """The time doubles for ever."""

    @instead(patch, failures, "back_off")
    def back_off(original: Callable[..., None], step: StepContext, model: ModelRecord, reason: FailureReason) -> None:
        limits = step.state.config
        step.state.config = replace(limits, back_off_limit_s=math.inf)
        original(step, model, reason)
        step.state.config = limits


# -- how long runners stay --------------------------------------------------------------------------------------------


@mutant("keep-alive")
def a_named_keep_alive_is_ignored(patch: Patch) -> None:
    """Runners rest for as long as their first user said, whatever later ones say."""

    @instead(patch, requests, "grant")
    def grant(original: Callable[..., None], step: StepContext, request: Request, runner: Runner) -> None:
        before = runner.keep_alive_s, runner.uses_default_keep_alive
        original(step, request, runner)
        runner.keep_alive_s, runner.uses_default_keep_alive = before


@mutant("keep-alive")
def none_at_all_rests(patch: Patch) -> None:
    """A runner with a keep-alive of 0 rests until the clock is looked at."""

    @instead(patch, requests, "release")
    def release(original: Callable[..., None], step: StepContext, request: Request) -> None:
        runner = step.state.runners.get(RunnerId(request.runner or 0))
        if runner is None or not runner.current or runner.keep_alive_s > 0:
            original(step, request)
            return
        runner.keep_alive_s = 1.0
        original(step, request)
        runner.keep_alive_s = 0.0
        if runner.current and not runner.leases:
            runners.start_keep_alive(step, runner)


@mutant("keep-alive")
def for_twice_as_long(patch: Patch) -> None:
    """A runner rests for longer than was said."""

    @instead(patch, runners, "start_keep_alive")
    def start_keep_alive(original: Callable[..., None], step: StepContext, runner: Runner) -> None:
        original(step, runner)
        key = ("keep-alive", runner.id)
        step.state.timers.set(key, step.state.timers.at(key) + runner.keep_alive_s)


@mutant("one-place")
def asked_to_leave_and_forgotten(patch: Patch) -> None:
    """A model that was asked to leave while it loaded stays once it has served."""

    @instead(patch, loads, "loaded")
    def loaded(original: Callable[..., None], step: StepContext, runner: Runner, event: Loaded) -> None:
        runner.expire_when_served = False
        original(step, runner, event)


@mutant("one-place")
def loads_cannot_be_asked_to_leave(patch: Patch) -> None:
    """Somebody wants a model out of memory while it is waited for, and nobody listens."""

    @instead(patch, runners, "expire_model")
    def expire_model(original: Callable[..., bool], step: StepContext, id: str) -> bool:
        current = step.state.models[id].current if id in step.state.models else None
        loading = current is not None and current.state is LOADING and bool(step.state.groups_served_by(current))
        return loading or original(step, id)


@mutant("out-of-memory")
def only_who_ran_out_of_memory_goes(patch: Patch) -> None:
    """The others stay, though one of them may have taken it."""

    @instead(patch, failures, "ran_out")
    def ran_out(original: Callable[..., None], step: StepContext, runner: Runner) -> None:
        if runner.current:
            runners.expire(step, runner, RanOutOfMemory(runner.model))


@mutant("hangs")
def progress_counts_for_nothing(patch: Patch) -> None:
    """A slow load is given up although it shows that it is alive."""

    @instead(patch, Core, "_runner_event")
    def runner_event(original: Callable[..., None], core: Core, runner: Runner, event: Event) -> None:
        if not isinstance(event, Progress) or runner.state is not LOADING:
            original(core, runner, event)


@mutant("moments-of-rest")
def residency_has_no_bound(patch: Patch) -> None:
    """A runner whose load took long keeps its place for longer than anybody may be let wait."""
    patch.setattr(CoreConfig, "residency_s", lambda limits, load_s: (load_s, 9 * load_s))


@mutant("keep-alive")
def a_load_goes_on_for_nobody(patch: Patch) -> None:
    """A load with a keep-alive of 0 goes on when the last one who waited for it has left."""
    patch.setattr(requests, "abandon_load", lambda step, request: None)


# -- those in the way -------------------------------------------------------------------------------------------------


@mutant("one-place")
def asked_again_and_again(patch: Patch) -> None:
    """Who holds what others wait for is told so by every plan."""

    @instead(patch, runners, "notify_contention")
    def ask(original: Callable[..., None], step: StepContext, wanted: Collection[RunnerId]) -> None:
        for request in step.state.requests.values():
            request.asked = False
        original(step, wanted)


@mutant("one-place")
def victims_are_not_asked(patch: Patch) -> None:
    """Nobody who is in the way hears that others wait."""

    @instead(patch, runners, "notify_contention")
    def ask(original: Callable[..., None], step: StepContext, wanted: Collection[RunnerId]) -> None:
        original(step, ())


@mutant("shrinking")
def what_is_too_much_stays(patch: Patch) -> None:
    """Idle runners rest on a device that has less than they hold."""
    patch.setattr(planner, "_evict_excess", lambda context: None)


@mutant("configure")
def a_lower_number_of_runners_waits_for_their_end(patch: Patch) -> None:
    """More idle runners are alive than may be, until their keep-alives are over."""

    @instead(patch, planner, "_evict_worth")
    def evict(original: Callable[..., None], context: PlanningContext, reason: object, *args: object) -> None:
        if not isinstance(reason, RunnerLimit):
            original(context, reason, *args)


# -- who takes what from whom -----------------------------------------------------------------------------------------


@mutant(SIMULATION, most=400_000)
def a_booking_binds_nobody_before(patch: Patch) -> None:
    """What is free is for whoever can start in it, although an older request will need it later."""

    def take(supply: AvailabilityProfile, horizon: int, amounts: Amounts, processes: int) -> None:
        for one in range(horizon, LATER + 1):
            for device, amount in amounts:
                supply.bytes[one][device] = supply.bytes[one].get(device, 0) - amount
            supply.process_slots[one] -= processes

    patch.setattr(AvailabilityProfile, "reserve", take)


@mutant(SIMULATION, most=400_000)
def what_drains_counts_as_stopped(patch: Patch) -> None:
    """What runners hold that are given up and still in use is counted on as if it came soon."""

    @instead(patch, AvailabilityProfile, "add")
    def add(original: Callable[..., None], supply: AvailabilityProfile, horizon: int, gone: Collection[Runner]) -> None:
        original(supply, SOON if horizon == DRAINED else horizon, gone)


@mutant(SIMULATION, most=400_000)
def two_count_on_one_victim(patch: Patch) -> None:
    """A runner that is to leave for one line is given to the next one once more."""

    @instead(patch, planner, "plan_eviction")
    def plan_eviction(original: Callable[..., Placement], context: PlanningContext, *args: object) -> Placement:
        claimed = set(context.claimed)
        placement = original(context, *args)
        context.claimed = claimed
        return placement


@mutant("out-of-memory")
def the_second_try_is_not_alone(patch: Patch) -> None:
    """A load that ran out of memory is tried again beside the others."""

    @instead(patch, failures, "load_failed")
    def load_failed(
        original: Callable[..., None], step: StepContext, runner: Runner, *args: object, **how: object
    ) -> None:
        original(step, runner, *args, **how)
        step.state.models[runner.model].load_exclusively = False


@mutant("out-of-memory")
def the_second_try_begins_beside_others(patch: Patch) -> None:
    """A load that has to be alone begins while others are there who may be moved."""

    @instead(patch, planner, "_plan_runner")
    def plan_runner(
        original: Callable[..., None], context: PlanningContext, group: RequestGroup, model: ModelRecord, *args: object
    ) -> None:
        alone, model.load_exclusively = model.load_exclusively, False
        original(context, group, model, *args)
        model.load_exclusively = alone
