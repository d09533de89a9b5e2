"""Mutants that break service guarantees: the order of service, claims, back-off, residency and reservations."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import pytest

import fsm.core
from fsm.core import Core
from fsm.domain.devices import Amounts, DeviceId, Placement
from fsm.domain.options import AUTOMATIC
from fsm.eviction.policies import Candidate, ExpectedReloadCost
from fsm.lifecycle import device_claims, failures, loads, memory_recovery, requests, runners
from fsm.lifecycle.step_context import StepContext
from fsm.machine.request import Request
from fsm.machine.runner import LOADING, Runner, RunnerId
from fsm.messages.commands import Stop
from fsm.messages.events import Acquire, ClaimContended, ClaimGranted, Event, Loaded, Progress, Sampled
from fsm.messages.reasons import FailureReason, RanOutOfMemory, RunnerReason
from fsm.placement import search
from fsm.placement.search import Free, Gpu, Offload, PlacementDemand
from fsm.planning import deadlock, planner, relocation
from fsm.planning.availability import AFTER_DRAINS, AFTER_EVICTIONS, AFTER_STOPS, HORIZONS, AvailabilityProfile, Horizon
from fsm.planning.load_slots import LoadSlots
from fsm.planning.planning_context import PlanningContext
from fsm.sizing.footprint import Footprint
from fsm.sizing.load_history import LoadHistory
from fsm.state import runner_match
from fsm.state.core_config import CoreConfig
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord
from fsm.state.request_queue import RequestGroup
from tests.verification.mutant import SIMULATION, Patch, instead, mutant

# -- claims -----------------------------------------------------------------------------------------------------------


@mutant(SIMULATION)
def a_contended_claim_counts_as_had(patch: Patch) -> None:
    """A launch goes ahead although another program holds the lock of its devices."""

    @instead(patch, device_claims, "claim_answered")
    def claim_answered(original: Callable[..., bool], step: StepContext, event: ClaimGranted | ClaimContended) -> bool:
        return original(step, ClaimGranted(event.number))


# -- headroom ---------------------------------------------------------------------------------------------------------


@mutant(SIMULATION)
def a_runner_starts_beside_others_with_its_bytes_alone(patch: Patch) -> None:
    """A runner starts as soon as its bytes are free, and no other runner leaves for its headroom."""
    patch.setattr(search, "needed", lambda demand, placement, potential=None: placement.bytes)


# -- matching ---------------------------------------------------------------------------------------------------------


@mutant(SIMULATION)
def what_the_plan_has_chosen_counts_as_unnamed(patch: Patch) -> None:
    """A request that names the layers or the GPU that a runner has been given loads the model anew."""
    patch.setattr(loads, "_chosen", lambda state, footprint, placement: AUTOMATIC)


@mutant(SIMULATION)
def more_layers_than_there_are_is_another_number(patch: Patch) -> None:
    """A request for 99 layers loads a model anew that has all its 33 layers on GPUs."""
    for module in (runner_match, planner):
        patch.setattr(module, "without_what_is_had", lambda runner, asked: asked)


@mutant(SIMULATION)
def any_gpu_will_do(patch: Patch) -> None:
    """Layers go to any GPU, although the request names others."""
    patch.setattr(PlacementDemand, "may_use", lambda demand, gpu: True)


# -- better places ----------------------------------------------------------------------------------------------------


@mutant("better-place")
def a_runner_moves_as_soon_as_it_can(patch: Patch) -> None:
    """A runner is loaded anew in a better place at once, however short the place has been free."""
    patch.setattr(relocation, "moves_from", lambda runner: -math.inf)


@mutant("better-place")
def a_request_that_names_its_layers_moves_the_model(patch: Patch) -> None:
    """A request for no layers on GPUs has its model loaded on one, and then loaded on the host again."""

    @instead(patch, fsm.core, "is_to_move")
    def is_to_move(original: Callable[..., bool], state: CoreState, runner: Runner, event: Acquire) -> bool:
        return original(state, runner, replace(event, spec=replace(event.spec, options=AUTOMATIC)))


# -- the order of service ---------------------------------------------------------------------------------------------


@mutant("one-place")
def the_newest_goes_first(patch: Patch) -> None:
    """The youngest request group is planned before older ones."""

    @instead(patch, CoreState, "groups_in_order")
    def lines_in_order(original: Callable[..., Iterator[RequestGroup]], *args: object) -> Iterator[RequestGroup]:
        return reversed(list(original(*args)))


@mutant("pins")
def priority_is_worth_nothing(patch: Patch) -> None:
    """Priority does not change the order of request groups."""
    patch.setattr(CoreState, "rank", lambda pool, head: (head.queued_at, head.id))


@mutant("three-requests")
def the_newest_is_served_first(patch: Patch) -> None:
    """Of the requests that waited for one load, the youngest is granted first."""

    @instead(patch, requests, "serve")
    def serve(original: Callable[..., None], step: StepContext, *args: object) -> None:
        begun = len(step.commands)
        original(step, *args)
        step.commands[begun:] = reversed(step.commands[begun:])


@mutant("full-queue")
def one_more_waits_than_may(patch: Patch) -> None:
    """The queue takes one request more than its limit."""

    @instead(patch, Core, "_acquire")
    def acquire(original: Callable[..., None], one: Core, event: Acquire) -> None:
        limits = one._state.config
        one._state.config = replace(limits, max_queue=limits.max_queue + 1)
        original(one, event)
        one._state.config = limits


# -- leases -----------------------------------------------------------------------------------------------------------


@mutant("leases")
def a_runner_takes_one_lease_more(patch: Patch) -> None:
    """A runner takes one lease more than it may."""

    @instead(patch, CoreState, "leases_left")
    def leases_left(original: Callable[..., int | None], state: CoreState, runner: Runner) -> int | None:
        left = original(state, runner)
        return None if left is None else left + 1


@mutant(SIMULATION, first=79)
def a_limit_that_a_request_names_is_ignored(patch: Patch) -> None:
    """The limit of leases that requests name for their model holds for nothing."""

    @instead(patch, CoreState, "leases_left")
    def leases_left(original: Callable[..., int | None], state: CoreState, runner: Runner) -> int | None:
        model = state.models[runner.model]
        named, model.max_leases = model.max_leases, None
        left = original(state, runner)
        model.max_leases = named
        return left


@mutant("leases")
def a_lease_that_comes_back_is_given_to_nobody(patch: Patch) -> None:
    """A request that waits for a lease is not looked at when one is released, where other leases remain."""

    @instead(patch, requests, "release")
    def release(original: Callable[..., None], step: StepContext, request: Request) -> None:
        planned, runner = step.replan, step.state.runners.get(RunnerId(request.runner or 0))
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(requests, "serve", lambda step, runner, groups: None)
            original(step, request)
        if runner is not None and runner.leases:
            step.replan = planned


@mutant("leases")
def a_lease_goes_to_the_one_that_came_first(patch: Patch) -> None:
    """Priority does not count among the requests that wait for a lease."""

    @instead(patch, requests, "serve")
    def serve(
        original: Callable[..., None], step: StepContext, runner: Runner, groups: Collection[RequestGroup]
    ) -> None:
        original(step, runner, sorted(groups, key=lambda group: group.head.id)[:1])
        original(step, runner, [group for group in groups if group.requests])


@mutant("leases")
def a_runner_leaves_before_those_who_wait_for_it(patch: Patch) -> None:
    """A runner is evicted for a request although earlier requests wait for its leases."""
    patch.setattr(PlanningContext, "serving_before", lambda context, group: set())


@mutant("own-leases")
def a_caller_waits_for_itself(patch: Patch) -> None:
    """A request waits although its own caller keeps the leases beside which there is no room for it."""
    patch.setattr(fsm.core, "would_deadlock", lambda state, request: None)


@mutant("own-leases")
def any_lease_that_is_kept_counts_as_in_the_way(patch: Patch) -> None:
    """A request of a caller that keeps a lease is refused as a deadlock although there is room for both."""
    patch.setattr(deadlock, "has_room", lambda state, demand, staying, process: not staying)


# -- back-off ---------------------------------------------------------------------------------------------------------


@mutant(SIMULATION)
def nothing_is_backed_off(patch: Patch) -> None:
    """A model whose load failed is loaded again for the next request."""

    @instead(patch, failures, "back_off")
    def back_off(original: Callable[..., float], step: StepContext, model: ModelRecord, reason: FailureReason) -> float:
        original(step, model, reason)
        model.blocked_until = step.state.now
        return step.state.now


@mutant(SIMULATION)
def options_are_not_backed_off(patch: Patch) -> None:
    """A load that failed with options of its own is tried the same way for the next request."""
    patch.setattr(failures, "back_off_options", lambda step, model, options, reason: step.state.now)


@mutant(SIMULATION, first=25)
def memory_that_ran_out_teaches_nothing(patch: Patch) -> None:
    """After a load ran out of memory of a GPU, the next one takes as much of it."""
    patch.setattr(failures, "note_failed_load", lambda state, runner, out_of_memory: None)


@mutant(SIMULATION)
def each_failure_is_the_first(patch: Patch) -> None:
    """Every failure of a model has the back-off of a first one."""

    @instead(patch, failures, "back_off")
    def back_off(original: Callable[..., float], step: StepContext, model: ModelRecord, reason: FailureReason) -> float:
        model.failures = 0
        return original(step, model, reason)


@mutant(SIMULATION, most=400_000, first=150)
def a_crash_loop_has_no_end(patch: Patch) -> None:
    """Each crash is followed by a load at once, as if it were the first."""

    @instead(patch, failures, "count_crash")
    def count_crash(original: Callable[..., None], step: StepContext, runner: Runner, reason: FailureReason) -> None:
        step.state.models[runner.model].failures = 0
        original(step, runner, reason)


@mutant(SIMULATION, most=400_000, first=225)
def back_off_has_no_limit(patch: Patch) -> None:
    """The back-off doubles without a limit."""

    @instead(patch, failures, "back_off")
    def back_off(original: Callable[..., float], step: StepContext, model: ModelRecord, reason: FailureReason) -> float:
        limits = step.state.config
        step.state.config = replace(limits, back_off_limit_s=math.inf)
        until = original(step, model, reason)
        step.state.config = limits
        return until


# -- how long runners stay --------------------------------------------------------------------------------------------


@mutant("keep-alive")
def a_named_keep_alive_is_ignored(patch: Patch) -> None:
    """A keep-alive that a later request names is ignored."""

    @instead(patch, requests, "grant")
    def grant(original: Callable[..., None], step: StepContext, request: Request, runner: Runner) -> None:
        before = runner.keep_alive_s, runner.uses_default_keep_alive
        original(step, request, runner)
        runner.keep_alive_s, runner.uses_default_keep_alive = before


@mutant("keep-alive")
def none_at_all_rests(patch: Patch) -> None:
    """A runner with a keep-alive of 0 is stopped at the next tick, and not with its last release."""

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
    """A runner stays for twice its keep-alive."""

    @instead(patch, runners, "start_keep_alive")
    def start_keep_alive(original: Callable[..., None], step: StepContext, runner: Runner) -> None:
        original(step, runner)
        key = ("keep-alive", runner.id)
        step.state.timers.set(key, step.state.timers.at(key) + runner.keep_alive_s)


@mutant("one-place")
def asked_to_leave_and_forgotten(patch: Patch) -> None:
    """A model that was expired while it loaded stays after it has served."""

    @instead(patch, loads, "loaded")
    def loaded(original: Callable[..., None], step: StepContext, runner: Runner, event: Loaded) -> None:
        runner.expire_when_served = False
        original(step, runner, event)


@mutant("replaced-files")
def replaced_files_are_forgotten_in_use(patch: Patch) -> None:
    """A runner whose files were replaced while it was in use rests with the former files."""

    @instead(patch, requests, "release")
    def release(original: Callable[..., None], step: StepContext, request: Request) -> None:
        if request.runner is not None:
            step.state.runners[RunnerId(request.runner)].files_replaced = False
        original(step, request)


@mutant("replaced-files")
def replaced_files_are_forgotten_in_a_load(patch: Patch) -> None:
    """A runner whose files were replaced while it loaded for nobody rests with the former files."""

    @instead(patch, loads, "loaded")
    def loaded(original: Callable[..., None], step: StepContext, runner: Runner, event: Loaded) -> None:
        replaced, runner.files_replaced = runner.files_replaced, False
        original(step, runner, event)
        runner.files_replaced = replaced


@mutant("replaced-files")
def replaced_files_drain_a_runner(patch: Patch) -> None:
    """A runner whose files were replaced takes no new leases although it is in use."""

    @instead(patch, runners, "replace_files")
    def replace_files(original: Callable[..., bool], step: StepContext, runner: Runner) -> bool:
        changed = original(step, runner)
        if runner.current:
            runners.expire(step, runner, RunnerReason.files_replaced)
        return changed


@mutant("one-place")
def loads_cannot_be_asked_to_leave(patch: Patch) -> None:
    """An expire of a model that a request waits for is ignored."""

    @instead(patch, runners, "expire_model")
    def expire_model(original: Callable[..., bool], step: StepContext, id: str) -> bool:
        current = step.state.models[id].current if id in step.state.models else None
        loading = current is not None and current.state is LOADING and bool(step.state.groups_served_by(current))
        return loading or original(step, id)


@mutant("out-of-memory")
def only_who_ran_out_of_memory_goes(patch: Patch) -> None:
    """Only the runner that ran out of memory expires, although another one may have taken the memory."""

    @instead(patch, failures, "ran_out")
    def ran_out(original: Callable[..., None], step: StepContext, runner: Runner) -> None:
        if runner.current:
            runners.expire(step, runner, RanOutOfMemory(runner.model))


@mutant("hangs")
def progress_counts_for_nothing(patch: Patch) -> None:
    """A slow load is stopped although it reports progress."""

    @instead(patch, Core, "_runner_event")
    def runner_event(original: Callable[..., None], core: Core, runner: Runner, event: Event) -> None:
        if not isinstance(event, Progress) or runner.state is not LOADING:
            original(core, runner, event)


@mutant("moments-of-rest")
def residency_has_no_bound(patch: Patch) -> None:
    """A runner with a long load stays beyond the bound on a request's wait."""
    patch.setattr(CoreConfig, "residency_s", lambda limits, load_s: (load_s, 9 * load_s))


@mutant("keep-alive")
def a_load_goes_on_for_nobody(patch: Patch) -> None:
    """A load with a keep-alive of 0 goes on when its last request has left."""
    patch.setattr(requests, "abandon_load", lambda step, request: None)


@mutant(SIMULATION)
def a_time_limit_of_ones_own_hurries_no_runner(patch: Patch) -> None:
    """A busy runner drains for a request after `max_wait` alone, although the request leaves the queue before."""
    patch.setattr(PlanningContext, "_own_bound", lambda context, group: math.inf)


# -- runners in the way -----------------------------------------------------------------------------------------------


@mutant("one-place")
def asked_again_and_again(patch: Patch) -> None:
    """A lease holder is notified of contention by every plan."""

    @instead(patch, runners, "notify_contention")
    def ask(original: Callable[..., None], step: StepContext, wanted: Collection[RunnerId]) -> None:
        for request in step.state.requests.values():
            request.asked = False
        original(step, wanted)


@mutant("one-place")
def victims_are_not_asked(patch: Patch) -> None:
    """No lease holder is notified of contention."""

    @instead(patch, runners, "notify_contention")
    def ask(original: Callable[..., None], step: StepContext, wanted: Collection[RunnerId]) -> None:
        original(step, ())


@mutant("shrinking")
def what_is_too_much_stays(patch: Patch) -> None:
    """Idle runners stay on a device that has less memory than they hold."""
    patch.setattr(planner, "_evict_excess", lambda context: None)


@mutant("configure")
def a_lower_number_of_runners_waits_for_their_end(patch: Patch) -> None:
    """More idle runners stay than the limit allows, until their keep-alives are over."""

    @instead(patch, planner, "_evict_excess")
    def evict(original: Callable[..., None], context: PlanningContext) -> None:
        supply = context.availability
        missing = max(0, -supply.process_slots[AFTER_EVICTIONS])
        supply.process_slots = [places + missing for places in supply.process_slots]
        original(context)
        supply.process_slots = [places - missing for places in supply.process_slots]


# -- reservations -----------------------------------------------------------------------------------------------------


@mutant(SIMULATION, most=400_000)
def a_booking_binds_nobody_before(patch: Patch) -> None:
    """A younger request starts in free memory that an older one will need later."""

    def take(supply: AvailabilityProfile, horizon: Horizon, amounts: Amounts, processes: int) -> None:
        for one in HORIZONS[horizon:]:
            for device, amount in amounts:
                supply.bytes[one][device] = supply.bytes[one].get(device, 0) - amount
            supply.process_slots[one] -= processes

    patch.setattr(AvailabilityProfile, "reserve", take)


@mutant(SIMULATION, most=100_000, first=1940)
def what_drains_counts_as_stopped(patch: Patch) -> None:
    """Memory of runners that drain counts as free as soon as that of runners that stop."""

    @instead(patch, AvailabilityProfile, "add")
    def add(
        original: Callable[..., None], supply: AvailabilityProfile, horizon: Horizon, gone: Collection[Runner]
    ) -> None:
        original(supply, AFTER_STOPS if horizon == AFTER_DRAINS else horizon, gone)


@mutant(SIMULATION, most=400_000)
def two_count_on_one_victim(patch: Patch) -> None:
    """A victim's memory counts for two request groups."""

    @instead(patch, planner, "plan_eviction")
    def plan_eviction(original: Callable[..., Placement], context: PlanningContext, *args: object) -> Placement:
        claimed = set(context.claimed)
        placement = original(context, *args)
        context.claimed = claimed
        return placement


@mutant("out-of-memory")
def the_second_try_is_not_alone(patch: Patch) -> None:
    """The second try of a load that ran out of memory starts beside other runners."""

    @instead(patch, failures, "load_failed")
    def load_failed(
        original: Callable[..., None], step: StepContext, runner: Runner, *args: object, **how: object
    ) -> None:
        original(step, runner, *args, **how)
        step.state.models[runner.model].load_exclusively = False


@mutant("out-of-memory")
def the_second_try_begins_beside_others(patch: Patch) -> None:
    """A load that has to be alone starts while other runners could still be evicted."""

    @instead(patch, planner, "_plan_runner")
    def plan_runner(
        original: Callable[..., None], context: PlanningContext, group: RequestGroup, model: ModelRecord, *args: object
    ) -> None:
        alone, model.load_exclusively = model.load_exclusively, False
        original(context, group, model, *args)
        model.load_exclusively = alone


# -- memory recovery --------------------------------------------------------------------------------------------------


@mutant("early-return")
def memory_counts_from_the_exit_on(patch: Patch) -> None:
    """What a driver had back before the exit of a process was told is waited for once more."""

    @instead(patch, memory_recovery, "note_end")
    def note_end(original: Callable[..., None], step: StepContext, runner: Runner, *, stopped: bool) -> None:
        if not stopped:
            original(step, runner, stopped=True)

    @instead(patch, memory_recovery, "memory_is_back")
    def memory_is_back(original: Callable[..., bool], step: StepContext, runner: Runner) -> bool:
        available = step.state.ledger.total_available
        return all(available(gpu) >= target for gpu, target in runner.recovery_targets.items())


# -- nothing is needed ------------------------------------------------------------------------------------------------


@mutant("shrinking")
def no_bytes_lack_room_on_an_overdrawn_device(patch: Patch) -> None:
    """A model that needs no bytes of a device waits until the device is not overdrawn."""

    def lacking(demand: PlacementDemand, placement: Placement, free: Free, potential: Free | None) -> set[DeviceId]:
        amounts = search.needed(demand, placement, potential)
        return {device for device, amount in amounts if amount > free.get(device, 0)}

    patch.setattr(search, "_lacking", lacking)


# -- bounded costs ----------------------------------------------------------------------------------------------------


@mutant("one-place")
def a_group_is_not_planned_when_its_model_is_read(patch: Patch) -> None:
    """A request group whose model is inspected for the first time stays among those that cannot be planned."""

    @instead(patch, CoreState, "apply_inspection")
    def apply_inspection(
        original: Callable[..., None], state: CoreState, model: ModelRecord, profile: Footprint, known: LoadHistory
    ) -> None:
        model.apply_inspection(profile, state.next_runner, known, state.options_asked_of(model.id))


# -- load slots -------------------------------------------------------------------------------------------------------


@mutant("three-gpus")
def only_the_best_placement_is_passed_over(patch: Patch) -> None:
    """A model waits for a load slot where the two roomiest GPUs have loads, although a third takes it."""

    @instead(patch, LoadSlots, "find_placement")
    def find(
        original: Callable[..., Placement | None], slots: LoadSlots, demand: PlacementDemand, offload: Offload,
        free: Free, gpus: Sequence[Gpu], potential: Free | None,
    ) -> Placement | None:  # fmt: skip
        best = search.find_placement(demand, offload, free, gpus, potential)
        full = slots.full(best) if best is not None else set()
        other = search.find_placement(demand, offload, free, [gpu for gpu in gpus if gpu.id not in full], potential)
        return None if other is None or slots.full(other) else other


# -- prompts that are kept --------------------------------------------------------------------------------------------


@mutant("keep-alive")
def prompts_are_saved_for_a_user_who_has_the_model_unloaded(patch: Patch) -> None:
    """A runner saves its prompts whatever it leaves for, an expire by its user too."""
    patch.setattr(runners, "gives_up", lambda reason: True)


@mutant("keep-alive")
def a_victim_forgets_its_prompts(patch: Patch) -> None:
    """A runner that is evicted is stopped without its prompts being saved."""
    patch.setattr(runners, "gives_up", lambda reason: False)


@mutant(SIMULATION)
def prompts_are_saved_while_the_scheduler_closes(patch: Patch) -> None:
    """A victim that drains saves its prompts although the scheduler closes meanwhile."""

    @instead(patch, runners, "stop")
    def stop(original: Callable[..., None], step: StepContext, runner: Runner) -> None:
        before = len(step.commands)
        original(step, runner)
        for place, one in enumerate(step.commands[before:], before):
            if isinstance(one, Stop):
                step.commands[place] = replace(one, keep_prompts=runner.keeps_prompts)


@mutant("keep-alive")
def what_is_told_of_prompts_is_lost(patch: Patch) -> None:
    """A reading tells how long prompts take to be had again, and it is not noted."""

    @instead(patch, Core, "_sampled")
    def sampled(original: Callable[..., None], core: Core, event: Sampled) -> None:
        original(core, replace(event, prompts=()))


@mutant(SIMULATION)
def prompts_cost_nothing(patch: Patch) -> None:
    """The price of a victim is that of its load alone."""

    @instead(patch, ExpectedReloadCost, "order")
    def order(
        original: Callable[..., Sequence[Candidate]],
        policy: ExpectedReloadCost,
        now: float,
        candidates: Sequence[Candidate],
    ) -> Sequence[Candidate]:
        prompts_s = {one.runner: one.prompts_s for one in candidates}
        ordered = original(policy, now, [replace(one, prompts_s=0.0) for one in candidates])
        return [replace(one, prompts_s=prompts_s[one.runner]) for one in ordered]
