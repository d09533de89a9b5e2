"""Properties of the plans of a step: the order of the queue, what requests wait for, and when the core plans again.

A check needs no state before the step, so a simulation asks it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence

from fsm.core import Core
from fsm.domain.devices import HOST, DeviceId
from fsm.domain.options import Options
from fsm.eviction.policies import TIE_BREAK_S, ExpectedReloadCost
from fsm.machine.request import ModelId, Purpose, Request, RequestId
from fsm.machine.runner import EXPIRING, LOADING, Runner, RunnerId
from fsm.messages.commands import Command, Grant, Launch
from fsm.messages.events import Event, Tick
from fsm.messages.reasons import WaitFor
from fsm.placement.search import MEASURED_HEADROOM, PREDICTED_HEADROOM, Gpu, Offload, find_placement
from fsm.planning.load_slots import loads_on
from fsm.planning.plan import Plan, PlannedPlacement
from fsm.state.core_state import CoreState
from fsm.state.memory_ledger import Owner
from fsm.state.request_queue import RequestGroup
from fsm.verification.state_invariants import bound_of
from fsm.verification.step import StepOutcome, of_outcome


def check_outcome(event: Event, commands: Sequence[Command], after: Core) -> None:
    """Raise Violated where a property of plans, or of a Tick, does not hold; `after.plans` are those of the step."""
    if after.plans or type(event) in of_outcome.by_cause:
        outcome = StepOutcome(commands, after)
        of_outcome.ask_of(outcome, event)
        if after.plans:
            of_outcome.ask_of(outcome, after.plans[-1])


# -- ranks ------------------------------------------------------------------------------------------------------------


@of_outcome(Plan)
def request_groups_are_planned_in_queue_order(step: StepOutcome, plan: Plan) -> None:
    """Request groups are planned by the age of their oldest request; a step of priority counts as a time of waiting."""
    if plan.memory:
        return  # a request that was granted memory is no longer the oldest
    waited = [list(group.requests.values()) for group in plan.evaluated if group.requests]
    ranks = [min(_rank(request, step.after._state) for request in requests) for requests in waited]
    assert ranks == sorted(ranks)


def _rank(request: Request, state: CoreState) -> tuple[float, RequestId]:
    return request.queued_at - request.spec.priority * state.config.priority_s, request.id


def _rank_in(state: CoreState) -> Callable[[Request], tuple[float, RequestId]]:
    return lambda request: _rank(request, state)


@of_outcome(Plan)
def no_two_request_groups_count_on_one_victim(step: StepOutcome, plan: Plan) -> None:
    """No two request groups count on the memory of one victim, but for a runner that must leave in any case.

    That is the runner of the group's own model, and every runner where a load has to be alone.
    """
    counted: set[RunnerId] = set()
    for spec, planned in plan.placements.items():
        model = step.after._state.models.get(spec.model)
        forced = model.current if model is not None else None
        for victim in planned.victims if model is None or not model.load_exclusively else ():
            if forced is None or victim.runner != forced.id:
                assert victim.runner not in counted, f"runner {victim.runner} of {victim.model}"
                counted.add(victim.runner)


@of_outcome(Plan)
def the_cost_of_a_victim_counts_its_prompts(step: StepOutcome, plan: Plan) -> None:
    """Where `reuse` prices a victim, the time to have its prompts again counts like the time of its load."""
    if not isinstance(step.after.policy, ExpectedReloadCost):
        return
    for planned in plan.placements.values():
        for one in planned.victims:
            runner = step.after._state.runners[one.runner]
            if one.load_s is not None and one.cost_s is not None:
                asked = max((asked / rest_s for asked, rest_s in one.outlook()), default=0.0)
                least_s = TIE_BREAK_S * (one.load_s + runner.prompts_s) * asked
                assert one.cost_s >= 0.999 * least_s, f"runner {one.runner}: {one.cost_s} s, and at least {least_s} s"


@of_outcome(Plan)
def a_runner_starts_with_its_headroom_or_nothing_leaves_for_it(step: StepOutcome, plan: Plan) -> None:
    """A runner whose headroom is not free on a device starts only where no runner there may leave for it.

    Pages of a mapped file need none, since the system can take them back.
    """
    state = step.after._state
    movable = [one for one in state.runners.values() if not state.is_unmovable(one) and one.state is not EXPIRING]
    for group, load, placement in plan.launches:
        free = dict(plan.placements[group.spec].free)
        headroom = MEASURED_HEADROOM if placement.measured else PREDICTED_HEADROOM
        pages = 0 if placement.without_pages else load.footprint.mapped_bytes(placement.gpu_layers)
        for device, amount in placement.bytes if not load.footprint.fixed else ():
            own = max(0, amount - pages) if device == HOST else amount
            if own and free.get(device, 0) < int(own * (1 + headroom)):
                others = [one for one in movable if one.model != group.spec.model]
                there = [one.id for one in others if state.ledger.accounts["runner", one.id].held_bytes(device)]
                assert not there, f"{amount} bytes on {device}, with {free.get(device, 0)} free beside {there}"


@of_outcome(Plan)
def no_runner_leaves_for_no_bytes(step: StepOutcome, plan: Plan) -> None:
    """A request group that needs no bytes has no victims but its model's own runner, unless it needs a place."""
    state = step.after._state
    for spec, planned in plan.placements.items():
        model = state.models.get(spec.model)
        alone = model is not None and model.load_exclusively
        if any(amount for _, amount in planned.needed) or state.config.max_runners or alone:
            continue
        others = [victim.runner for victim in planned.victims if victim.model != spec.model]
        assert not others, f"{spec.model}: runner {others[0]} is to leave for no bytes"


@of_outcome(Plan)
def no_runner_leaves_for_what_it_has(step: StepOutcome, plan: Plan) -> None:
    """A runner leaves for a load of its own model only where the request names what the runner has not.

    The check covers requests that name layers on GPUs and a GPU to prefer alone, and runners that were loaded for a
    request that named neither context nor slots.
    """
    state = step.after._state
    for spec, planned in plan.placements.items():
        asked = spec.options
        about_gpus = asked == Options(num_gpu=asked.num_gpu, main_gpu=asked.main_gpu)
        if about_gpus and spec in plan.loads and not plan.loads[spec].footprint.fixed:
            own = [state.runners[RunnerId(one.runner)] for one in planned.victims if one.model == spec.model]
            for runner in own:
                usual = runner.usual_options == Options() and runner.id >= state.models[spec.model].first_runner_of_file
                assert not (usual and _has(runner, asked, state)), f"{asked} has runner {runner.id} leave"


def _has(runner: Runner, asked: Options, state: CoreState) -> bool:
    layers = sum(count for _, count in runner.placement.gpu_layers)
    wanted = asked.num_gpu
    if wanted is not None and wanted >= 0 and wanted != layers and not (runner.fully_offloaded and wanted > layers):
        return False
    if asked.main_gpu is None or layers == 0:
        return True
    gpus = [device.id for device in state.ledger.devices.values() if device.kind == "gpu"]
    return gpus[asked.main_gpu : asked.main_gpu + 1] == [runner.placement.gpu_layers[0][0]]


@of_outcome(Plan)
def layers_go_to_the_gpus_that_are_named(_: StepOutcome, plan: Plan) -> None:
    """Where a request names GPUs, no layer of its model goes to another one."""
    for group, _load, placement in plan.launches:
        if (named := group.spec.options.devices) is not None:
            others = [gpu for gpu, _ in placement.gpu_layers if gpu not in named]
            assert not others, f"{group.spec.model} goes to {', '.join(others)}"


@of_outcome(Plan)
def no_younger_request_takes_what_an_older_one_waits_for(step: StepOutcome, plan: Plan) -> None:
    """A launch, or a grant of memory, leaves alone what the oldest request group that waits will have.

    The check covers models that have declared their bytes, which need no headroom and have one possible placement. The
    group will have its memory once stopped runners have gone, once draining runners have gone too, or once its victims
    have gone: where the memory would be enough then without the launch or grant, it is enough with it.
    """
    state, commands = step.after._state, step.commands
    started = [one.runner for one in commands if isinstance(one, Launch)]
    granted = [one.request for one in commands if isinstance(one, Grant) and one.runner is None]
    if not state.groups or not (started or granted):
        return
    first = _first_without(state, plan, {state.runners[id].model for id in started if id in state.runners})
    if first is None:
        return
    group, planned = first
    rank = min(_rank(request, state) for request in group.requests.values())
    younger: list[Owner] = [("memory", id) for id in granted if _rank(state.requests[id], state) > rank]
    for launched, _, _ in (launch for one in step.after.plans or () for launch in one.launches):
        runner = state.models[launched.spec.model].current
        if runner is not None and runner.id in started and min(map(_rank_in(state), launched.requests.values())) > rank:
            younger.append(("runner", runner.id))
    accounts = state.ledger.accounts
    places = math.inf if group.spec.purpose is Purpose.memory else sum(kind == "runner" for kind, _ in younger)
    for device, need in state.ledger.by_memory(planned.placement.bytes).items():
        taken = sum(accounts[owner].held_bytes(device) for owner in younger if owner in accounts)
        for there in _horizons(state, planned, device, places) if taken else ():
            assert not there < need <= there + taken, f"what {group.spec.model or 'own memory'} waits for on {device}"


def _first_without(
    state: CoreState, plan: Plan, started: Collection[ModelId]
) -> tuple[RequestGroup, PlannedPlacement] | None:
    """Return the first group that waits for memory, of declared bytes, and its placement; None: there is another."""
    for group in sorted(state.groups.values(), key=lambda one: min(map(_rank_in(state), one.requests.values()))):
        model = state.models.get(group.spec.model)
        if model is not None and model.current is not None and model.current.state is LOADING:
            if model.id in started or group.spec.options in model.current.equivalent_requests:
                continue
            return None
        declared = model is None or model.declared
        planned = plan.placements.get(group.spec)
        return (group, planned) if planned is not None and declared else None
    return None


def _horizons(state: CoreState, planned: PlannedPlacement, device: DeviceId, places: float) -> list[int]:
    """Return the bytes of a device that the first group can count on, at each horizon at which they may be enough.

    Memory without a slot for its process, of which as many as `places` were just taken, is not enough.
    """
    going = [one for one in state.runners.values() if one.state is EXPIRING and not state.is_overdue(one)]
    held = {one.id: state.ledger.accounts["runner", one.id].held_bytes(device) for one in state.runners.values()}
    soon = state.ledger.free_bytes(device) + sum(held[one.id] for one in going if not one.leases)
    drained = soon + sum(held[one.id] for one in going if one.leases)
    victims = [state.runners[one.runner] for one in planned.victims if one.runner in state.runners]
    staying = [one for one in victims if one.current]
    if staying:
        return [drained + sum(held[one.id] for one in staying)]
    places += state.max_runners() - state.processes + sum(one.process for one in going if not one.leases)
    if any(one.leases for one in victims) or places <= 0:
        return [drained] if places + sum(one.process for one in going if one.leases) > 0 else []
    return [soon, drained]


# -- waits ------------------------------------------------------------------------------------------------------------


@of_outcome(Plan, ids=("D02",))
def a_request_waits_for_victims_for_a_limited_time(step: StepOutcome, plan: Plan) -> None:
    """A loaded runner that a request waits for is evicted when the request has waited for as long as it may.

    The runner keeps its place for its residency, and while other memory that the request needs is not free yet.
    """
    state = step.after._state
    for group, victims, others_free_at in _waited_for(step, plan):
        bound = min(bound_of(request, state) for request in group.requests.values())
        hurried = bound < group.head.queued_at + state.config.max_wait_s
        resident_until = max(_resident_until(runner, hurried) for runner in state.runners.values())
        for runner, free_at in victims:
            latest = max(bound, _resident_until(runner, hurried))
            where = f"{group.spec.model} waits for {runner.model}"
            assert free_at <= max(latest, state.now), f"{where} without a bound"
            assert state.now < max(bound, others_free_at, resident_until), f"{where} still"


@of_outcome(Plan)
def the_core_plans_again_when_victims_may_go(step: StepOutcome, plan: Plan) -> None:
    """The core plans again when the victims that a request waits for may go, or when other memory for it is free."""
    look_at = step.after._state.timers.at(("plan", 0))
    for group, _, others_free_at in _waited_for(step, plan):
        free_at = [victim.free_at for victim in plan.placements[group.spec].victims]
        assert look_at <= max(others_free_at, *free_at), f"the core does not plan again for {group.spec.model}"


def _waited_for(step: StepOutcome, plan: Plan) -> Iterator[tuple[RequestGroup, list[tuple[Runner, float]], float]]:
    """Yield each request group that waits for loaded runners, the runners with the time at which each may be evicted,
    and the time at which the memory of expiring runners, and of the victims of earlier groups, is free.

    An idle runner stays while the rest of the memory is not free yet: until then it would be unloaded for nothing.
    """
    if not any(planned.victims for planned in plan.placements.values()):
        return
    state = step.after._state
    others_free_at = max(
        (one.stop_deadline for one in state.runners.values() if one.state is EXPIRING), default=-math.inf
    )
    for spec, planned in plan.placements.items():
        group = state.groups.get(spec)
        found = []
        for victim in planned.victims:
            runner = state.runners.get(victim.runner)
            if runner is not None and runner.current and runner.state is not LOADING:
                found.append((runner, victim.free_at))
        if group is not None and found:
            yield group, found, others_free_at
        others_free_at = max([others_free_at, *(victim.free_at for victim in planned.victims)])


@of_outcome(Plan)
def the_first_group_waits_for_a_load_slot_only_where_no_other_gpu_takes_its_model(
    step: StepOutcome, plan: Plan
) -> None:
    """The first request group does not wait for a load slot while GPUs that nothing loads on take its model whole.

    A load on an integrated GPU takes the host's load slot.
    """
    state = step.after._state
    group = next(iter(plan.evaluated), None)
    if group is None or plan.waits.get(group.spec, (None,))[0] is not WaitFor.load_slot:
        return
    model, config = state.models[group.spec.model], state.config
    demand = model.demand(plan.loads[group.spec], group.spec.options, config)
    if demand.spread or demand.main_gpu is not None or model.ran_out or state.failed_loads:
        return  # the placement is another than that of the demand alone
    places = state.max_runners() - state.processes
    loading = [device for one in state.runners.values() if one.state is LOADING for device in loads_on(one.placement)]
    devices = [one for one in state.ledger.devices.values() if loading.count(one.id) < config.max_loads_per_gpu]
    gpus = [Gpu(one.id, one.memory, one.instance, one.library) for one in devices if one.kind == "gpu"]
    free = {one.id: state.ledger.free_bytes(one.id) for one in devices if not one.integrated}
    if places > 0 and Offload.whole in demand.offload_modes(gpus) and HOST in free:
        found = find_placement(demand, Offload.whole, free, gpus)
        assert found is None or loads_on(found) == [HOST], f"{group.spec.model} waits for a load slot"


def _resident_until(runner: Runner, hurried: bool) -> float:
    """Return until when a runner keeps its place at most; a request with a limit of its own waits less."""
    return runner.resident_until if hurried else max(runner.resident_until, runner.drain_protected_until)


# -- time -------------------------------------------------------------------------------------------------------------


@of_outcome(Tick)
def a_tick_leaves_nothing_due(step: StepOutcome, _: Tick) -> None:
    """After a Tick the next deadline of the core is ahead."""
    assert step.after.deadline() > step.after._state.now
