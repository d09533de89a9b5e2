"""The planner: what to do for the request groups that wait, oldest first, on scratch accounts of memory and processes.

Every plan is made from nothing, and reads the state without changing it. A victim is only part of a plan until it
expires, so the first runner that becomes idle serves the group that waits, and a group that leaves costs no other group
anything. A younger group starts only in memory that the older groups leave (`availability`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile

from fsm.domain.devices import DeviceId
from fsm.domain.options import Options
from fsm.eviction.policies import Candidate, EvictionPolicy
from fsm.eviction.victim_selection import Amount, choose_victims, rank
from fsm.machine.request import ModelId, Purpose
from fsm.machine.runner import LOADING, Runner
from fsm.messages.reasons import DeviceShrunk, RunnerLimit, WaitFor, WaitReason
from fsm.messages.refusals import LoadFailedRefusal, UnsupportedOption
from fsm.placement.search import Offload, PlacementDemand, find_placement
from fsm.planning.automatic_options import resolved_demand, with_batch, with_room
from fsm.planning.availability import AFTER_DRAINS, AFTER_EVICTIONS, AFTER_STOPS, NOW, Requirement
from fsm.planning.infeasibility import infeasible_reason
from fsm.planning.make_room import plan_eviction
from fsm.planning.plan import Plan, PlannedPlacement
from fsm.planning.planning_context import GROUPS_AHEAD, PlanningContext
from fsm.planning.relocation import NOTABLE_PART
from fsm.sizing.footprint import Footprint
from fsm.sizing.model_profile import Resolution, ResolvedLoad, UnsupportedReason
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord
from fsm.state.request_queue import RequestGroup
from fsm.state.runner_match import match, serves, without_what_is_had

NO_MODEL = ModelId("")  # of groups for memory of the program's own


def make_plan(state: CoreState, policy: EvictionPolicy, *, explains: bool = False) -> Plan:
    """Return the plan for the request groups, in order, until nothing is left that any of them could have.

    Planning stops at the first group that cannot be helped. The groups of `state.unevaluated` are still evaluated, so a
    request that can never be satisfied is refused at once, whatever its position in the queue. With `explains` the plan
    says of each runner why it is not evicted.
    """
    context = PlanningContext(state, policy, explains=explains)
    _evict_excess(context)
    for group in state.groups_in_order(state.unevaluated):
        if _nothing_left(context):
            break
        if not _is_behind_same_model(context, group):
            _plan_group(context, group)
    ahead = {group.spec for group in context.plan.evaluated}
    for spec in state.specs_by_model.get(NO_MODEL, ()):  # memory of the program's own takes no place of a process
        if context.waiting >= GROUPS_AHEAD and _no_memory_left(context):
            break
        if spec not in ahead:
            _plan_group(context, state.groups[spec])
            ahead.add(spec)
    for spec in state.unevaluated:
        if spec not in ahead:
            _evaluate(context, state.groups[spec], WaitFor.earlier_requests)
    context.plan.policy_failure, context.plan.barred = context.candidates.policy_failure, context.candidates.barred
    return context.plan


def _evict_excess(context: PlanningContext) -> None:
    """Evict idle runners where more are alive, or hold more, than allowed; busy runners follow when they are idle.

    As few are evicted as suffice, or as free all that idle runners can free.
    """
    limit, ledger = context.state.config.max_runners, context.state.ledger
    excess = max(0, -context.availability.process_slots[AFTER_EVICTIONS])
    shrunk = [sample for id, sample in sorted(ledger.devices.items()) if id in ledger.overcommitted]
    allowed = {sample.id: sample.capacity_bytes - ledger.held_bytes(sample.id) for sample in shrunk}
    left = ledger.available_after(allowed, [("runner", runner.id) for runner in context.leaving])
    if not excess and min(left.values(), default=0) >= 0:
        return
    short = [device for device, amount in left.items() if amount < 0]
    frees = context.frees(short)
    idle = [one for one in context.candidates.ordered(-math.inf) if not one.leases]
    may = [one for one in idle if excess or any(frees(one))]
    most = _freed(short, map(frees, may))
    wanted = [min(-left[device], amount) for device, amount in zip(short, most, strict=True)]  # more cannot be freed
    least = min(excess, len(may))

    def suffices(victims: Sequence[Candidate]) -> bool:
        return len(victims) >= least and all(map(int.__ge__, _freed(short, map(frees, victims)), wanted))

    victim_set = choose_victims(rank(context.state.now, may, frees), (), suffices, least)
    for victim in victim_set.victims if victim_set is not None else ():
        held = ledger.accounts["runner", victim.runner]
        device = next(filter(held.held_bytes, short), None)
        context.plan.victims[victim.runner] = RunnerLimit(limit) if device is None else DeviceShrunk(device)
        context.claimed.add(victim.runner)
    context.availability.add(AFTER_STOPS, [context.state.runners[id] for id in context.plan.victims])


def _freed(devices: Sequence[DeviceId], amounts: Iterable[Amount]) -> Amount:
    """Return the bytes that several runners free, by device; zeros where there are no runners."""
    return tuple(map(sum, zip(*amounts, strict=True))) or (0,) * len(devices)


def _nothing_left(context: PlanningContext) -> bool:
    """Tell whether no group behind could have anything: enough groups wait, and nothing is free or can be evicted."""
    if context.waiting < GROUPS_AHEAD:
        return False
    idle = [context.state.runners[id] for id in context.candidates.idle - context.claimed]
    if context.availability.process_slots[AFTER_DRAINS] + sum(runner.process for runner in idle) <= 0:
        return True
    return _no_memory_left(context)


def _no_memory_left(context: PlanningContext) -> bool:
    """Tell whether no memory is left that can be freed now, and enough groups wait for each."""
    idle = [context.state.runners[id] for id in context.candidates.idle - context.claimed]
    there = context.availability.available_after(AFTER_DRAINS, idle)
    return all(amount <= 0 and context.ahead[device] >= GROUPS_AHEAD for device, amount in there.items())


def _is_behind_same_model(context: PlanningContext, group: RequestGroup) -> bool:
    """Tell whether an evaluated group is far behind other groups for its model, which are served first."""
    if context.successors[group.spec.model] < GROUPS_AHEAD or group.spec in context.state.unevaluated:
        return False
    current = context.state.models[group.spec.model].current
    if current is not None and match(current, group.spec.options):
        return False
    context.wait(group, WaitFor.same_model)
    return True


def _plan_group(context: PlanningContext, group: RequestGroup) -> None:
    """Plan one request group:

    1. Requests that are not the heads of their groups and are older than this group get their reservations first.
    2. The group is evaluated; where it needs no placement of its own, that is all.
    3. Memory of the program's own is granted, or victims are chosen for it.
    4. Where an older group has a runner of the same model planned, this group waits, since a model has one runner at a
       time. The memory of its runner is reserved as the successor's.
    5. Where the model's runner loads for other requests with other options, likewise; and where earlier requests wait
       for its leases.
    6. Else a runner is planned.
    """
    context.availability.reserve_earlier(context.state.rank(group.head))  # 1
    if (evaluated := _evaluate(context, group)) is None:  # 2
        return
    load, need = evaluated
    if group.spec.purpose is Purpose.memory:  # 3
        _plan_memory(context, group, need)
        return
    model = context.state.models[group.spec.model]
    if model.id in context.availability.reserved_by_model:  # 4
        context.wait(group, WaitFor.same_model)
        context.successors[model.id] += 1
        context.availability.reserve_successor(model.id, need)
    elif model.current is not None and model.current.id in context.awaited:  # 5
        _plan_successor(context, group, model.current, need, WaitFor.other_load)
    elif model.current is not None and model.current.id in context.serving_before(group):  # 5
        _plan_successor(context, group, model.current, need, WaitFor.same_model)
    else:  # 6
        _plan_runner(context, group, model, load, need)


def _plan_successor(
    context: PlanningContext, group: RequestGroup, current: Runner, need: Requirement, waits_for: WaitFor
) -> None:
    """Let a group wait for the runner of its model with other options, and reserve what its own needs beyond that."""
    context.wait(group, waits_for, context.state.expected_at(current) if current.state is LOADING else math.inf)
    context.availability.reserved_by_model[current.model] = context.availability.left_to_next(current)
    context.availability.reserve_successor(current.model, need)


def _evaluate(
    context: PlanningContext, group: RequestGroup, waits_for: WaitReason | None = None
) -> tuple[ResolvedLoad, Requirement] | None:
    """Return the load and the requirement of a group; None where it needs no placement, or none is known:

    1. A group for memory of the program's own names its bytes itself.
    2. Where a load that is under way serves the group, the group waits for it; where a loaded runner does, it is
       matched, or waits for one of the runner's leases.
    3. Where the file was not inspected since the last launch, or not for these options, the group waits for that.
    4. Where the model's runner serves the group with its automatic options made explicit, the group is matched, and
       also where the runner is pinned and has all that the group names.
    5. Where the engine would refuse an option, or a load with these options is backed off, the group is refused.
    6. Where no placement is possible at all, the group is refused. Where only a part of a model goes to GPUs, as many
       layers are asked for as would go there once the idle runners have left.

    `waits_for` is the reason why a group that is evaluated out of its order waits.
    """
    context.plan.evaluated.append(group)
    if waits_for:
        context.wait(group, waits_for)
    if group.spec.purpose is Purpose.memory:  # 1
        footprint = Footprint(fixed=group.spec.memory)
        load, demand = ResolvedLoad(group.spec.options, footprint), PlacementDemand(footprint)
    elif (resolved := _evaluate_model(context, group, in_order=waits_for is None)) is None:  # 2 to 5
        return None
    else:
        load, demand = resolved
    if (offload := _best_offload(context, group, demand)) is None:  # 6
        return None
    if offload is Offload.partial and not (demand.num_gpu or 0) > 0:
        demand = _with_least_layers(context, demand)
    process, potential = group.spec.purpose is not Purpose.memory, context.availability.potential
    return load, Requirement(demand, offload, process, potential)


def _with_least_layers(context: PlanningContext, demand: PlacementDemand) -> PlacementDemand:
    """Return the demand of a model that goes in part, without the placements that idle runners make notably worse.

    A worse place would stay for as long as the runner does, so idle runners leave for it; for a tenth of the layers
    none does.
    """
    idle = [one for one in context.candidates.ordered(-math.inf) if not one.leases]
    free = context.availability.available_after(AFTER_STOPS, context.unclaimed(idle))
    best = find_placement(demand, Offload.partial, free, context.gpus, context.availability.potential)
    if best is None:
        return demand
    return replace(demand, least_layers=best.offloaded - best.offloaded // NOTABLE_PART)


def _evaluate_model(
    context: PlanningContext, group: RequestGroup, *, in_order: bool
) -> tuple[ResolvedLoad, PlacementDemand] | None:
    """Return the load and the demand of a group for a model; None by the branches 2 to 5 of `_evaluate`."""
    model, asked = context.state.models[group.spec.model], group.spec.options
    current = model.current
    if current is not None and match(current, asked):  # 2
        _await_or_match(context, group, current)
        return None
    resolution = model.resolution(asked)
    if not model.inspected_since_launch or resolution is None:  # 3
        context.wait(group, WaitFor.metadata)
        context.plan.inspections.append(model)
        likely = resolution or model.last_resolution
        if likely is not None and in_order and len(context.state.groups) > 1:
            _reserve_stale_estimate(context, model, likely)
        return None
    load, demand = resolved_demand(model, resolution, context.state, context.availability.potential, context.gpus)
    context.plan.loads[group.spec] = load
    if current is not None and (match(current, asked, load.options) or _stays(context, current, asked)):  # 4
        _await_or_match(context, group, current)
        return None
    if resolution.unsupported is not None:  # 5
        context.plan.refusals.append((group, UnsupportedOption(model.id, *resolution.unsupported)))
        return None
    if (back_off := model.blocked(load, context.state.now)) is not None:
        retry_after_s = back_off.until - context.state.now
        context.plan.refusals.append((group, LoadFailedRefusal(model.id, back_off.reason, retry_after_s)))
        return None
    if (refused := _refused_option(context, demand)) is not None:
        context.plan.refusals.append((group, UnsupportedOption(model.id, *refused)))
        return None
    return load, demand


def _refused_option(
    context: PlanningContext, demand: PlacementDemand
) -> tuple[str, int | str, UnsupportedReason] | None:
    """Return the name of an option that no placement can obey, its value, and why."""
    gpus, main = context.gpus, demand.main_gpu
    if demand.devices is not None and not any(gpu.id in demand.devices for gpu in gpus):
        return "devices", ", ".join(sorted(demand.devices)), UnsupportedReason.no_such_gpu
    if main is not None and gpus and main not in range(len(gpus)):
        return "main_gpu", main, UnsupportedReason.no_such_gpu
    if demand.names_too_few_layers:
        return "num_gpu", demand.num_gpu or 0, UnsupportedReason.needs_all_layers
    return None


def _await_or_match(context: PlanningContext, group: RequestGroup, current: Runner) -> None:
    """Match a group with the runner that serves it, or let it wait for the runner's load, or for one of its leases."""
    if not match(current, group.spec.options):  # from now on the runner is known to serve the group
        context.plan.matches.append((group, current))
    elif current.state is LOADING:
        context.wait(group, WaitFor.load, context.state.expected_at(current))
    elif context.state.may_be_granted(current, group.spec.purpose):
        context.plan.matches.append((group, current))
    else:
        context.wait(group, WaitFor.lease)


def _stays(context: PlanningContext, runner: Runner, asked: Options) -> bool:
    """Tell whether a pinned runner serves a request although it has less than usual of what the request leaves open."""
    if not context.state.pinned(runner) or asked.require_gpu:
        return False
    return serves(runner.effective_options, without_what_is_had(runner, asked))


def _plan_memory(context: PlanningContext, group: RequestGroup, need: Requirement) -> None:
    """Grant a group its memory, or choose victims for its head.

    The requests that are older than the next group are granted together, as far as there is room; the others follow by
    their own age.
    """
    members = list(group.requests.values())
    after = context.state.rank_after(group)
    older = sum(1 for _ in takewhile(lambda one: after is None or context.state.rank(one) < after, members))
    fits = context.availability.count(NOW, need, older)
    others = deque(map(context.state.rank, members[max(1, fits) :]))  # the next request is the head then
    if others:
        context.availability.queued_members.append((need, others))
    if not fits:
        plan_eviction(context, group, need, ())
    else:
        context.plan.memory += members[:fits]
        context.availability.reserve_several(NOW, need, fits)


def _reserve_stale_estimate(context: PlanningContext, model: ModelRecord, resolution: Resolution) -> None:
    """Reserve what a model needs by its last inspection: its file may have changed, but most likely it has not.

    Where the options of the group are not resolved yet, the resolution is of other options: no younger group starts in
    the memory that the model is likely to need. The group counts among those that wait for it.
    """
    before = context.availability.bytes[AFTER_DRAINS].copy()
    _, demand = resolved_demand(model, resolution, context.state, context.availability.potential, context.gpus)
    if (offload := context.availability.best_offload(demand)) is not None:
        context.availability.reserved_by_model.setdefault(model.id, context.availability.left_to_next(model.current))
        context.availability.reserve_successor(
            model.id, Requirement(demand, offload, potential=context.availability.potential)
        )
        left = context.availability.bytes[AFTER_DRAINS]
        context.ahead.update(device for device, amount in left.items() if amount <= 0 and amount < before[device])
        context.waiting += 1


def _plan_runner(
    context: PlanningContext, group: RequestGroup, model: ModelRecord, load: ResolvedLoad, need: Requirement
) -> None:
    """Plan a runner for a request group, and reserve its memory:

    1. From a load that has to be exclusive on, no other load begins: else another one might always be under way.
    2. Where no runner has to leave before, a process may be started, and a load slot and the memory are free, the
       runner is launched.
    3. Else its victims are chosen.
    """
    mandatory = _mandatory_victims(context, model)
    accompanied = model.load_exclusively and (context.plan.launches or not _all_others_pinned(context))
    places = context.availability.process_slots[NOW]
    if model.load_exclusively:  # 1
        context.availability.process_slots[NOW] = 0
    if not mandatory and not accompanied and places > 0:  # 2
        free = context.availability.bytes[NOW]
        placement = context.load_slots.find_placement(need.demand, need.offload, free, context.gpus, need.potential)
        if placement is not None:
            asked, planned = (
                group.spec.options,
                with_room(context.state, model, group.spec.options, (load, placement), free, context.gpus),
            )
            load, placement = with_batch(model, asked, context.state.config, planned, free, context.gpus)
            context.plan.loads[group.spec] = load
            there = tuple(sorted(free.items()))
            context.plan.placements[group.spec] = PlannedPlacement(placement, need.amounts(placement), there)
            context.plan.launches.append((group, load, placement))
            context.availability.reserve(NOW, placement.bytes, 1)
            context.availability.reserved_by_model[model.id] = dict(placement.bytes)
            context.load_slots.add(placement)
            return
    placement = plan_eviction(context, group, need, mandatory)  # 3
    context.availability.reserved_by_model[model.id] = dict(need.amounts(placement))


def _all_others_pinned(context: PlanningContext) -> bool:
    others = [runner for runner in context.state.runners.values() if runner.id not in context.overdue]
    return all(map(context.state.pinned, others))


def _best_offload(context: PlanningContext, group: RequestGroup, demand: PlacementDemand) -> Offload | None:
    """Return the best offload that is possible at all; None where there is none, and the group is refused."""
    model = context.state.models[group.spec.model] if group.spec.purpose is not Purpose.memory else None
    no_place = model is not None and context.unmovable >= context.state.max_runners()
    reload_pinned = model is not None and model.current is not None and context.state.pinned(model.current)
    if not (no_place or reload_pinned) and (possible := context.availability.best_offload(demand)) is not None:
        return possible
    potential = context.availability.potential
    refusal, need = infeasible_reason(context.state, context.gpus, group.spec.model, demand, potential)
    if need is not None:
        context.plan.placements[group.spec] = PlannedPlacement(need, refusal.needed, tuple(sorted(potential.items())))
    context.plan.refusals.append((group, refusal))
    return None


def _mandatory_victims(context: PlanningContext, model: ModelRecord) -> list[Runner]:
    """Return the runners that must leave although the memory suffices.

    A model's own runner with other options must leave; before an exclusive load, all runners that may.
    """
    if model.load_exclusively:
        runners = [runner for runner in context.state.runners.values() if runner.current]
        return [runner for runner in runners if runner.id not in context.awaited and not context.state.pinned(runner)]
    return [model.current] if model.current is not None else []
