"""What to do for those who wait, oldest first, on a scratch account; of the pool, only why lines wait is changed.

Every plan is made from nothing. A victim is a plan until it expires, so whatever becomes idle first serves the waiter,
and a waiter that leaves costs nobody anything. A later line starts only in what the earlier ones leave (`supply`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from fsm.domain.model_info import Options
from fsm.eviction.policies import EvictionPolicy
from fsm.machine.request import ModelId, Purpose, RequestSpec
from fsm.machine.runner import Runner, RunnerId
from fsm.messages.reasons import DeviceShrunk, RunnerLimit, WaitFor, WaitReason
from fsm.messages.refusals import UnsupportedOption
from fsm.placement.search import Offload, PlacementDemand
from fsm.planning.automatic_options import resolved_demand, with_batch
from fsm.planning.availability import DRAINED, LATER, NOW, SOON, Requirement
from fsm.planning.infeasibility import infeasible_reason
from fsm.planning.make_room import plan_eviction
from fsm.planning.plan import Plan, PlannedPlacement
from fsm.planning.planning_context import LINES_AHEAD, PlanningContext
from fsm.sizing.footprint import Footprint
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord
from fsm.state.request_queue import RequestGroup
from fsm.state.runner_match import match

NO_MODEL = ModelId("")  # of groups for memory of the program's own


def make_plan(state: CoreState, policy: EvictionPolicy, newcomers: Collection[RequestSpec]) -> Plan:
    """Return what to do for the lines, in order, until nothing is left that any of them could have.

    Those behind are not looked at, but for `newcomers`: whoever has just come is judged at once, wherever it stands.
    """
    context = PlanningContext(state, policy)
    _evict_excess(context)
    for group in state.groups_in_order():
        if _nothing_left(context):
            break
        if not _is_behind_same_model(context, group, newcomers):
            _plan_group(context, group)
    ahead = {group.spec for group in context.plan.evaluated}
    for spec in state.specs_by_model.get(NO_MODEL, ()):  # memory of the program's own takes no process's place
        if spec not in ahead:
            _plan_group(context, state.groups[spec])
            ahead.add(spec)
    for spec in newcomers:
        if spec in state.groups and spec not in ahead:
            _evaluate(context, state.groups[spec], WaitFor.earlier_requests)
    context.plan.policy_failure = context.candidates.policy_failure
    return context.plan


def _evict_excess(context: PlanningContext) -> None:
    """Give up idle runners where more are alive, or more is held, than may be; those in use follow when they rest.

    The number counts only where it is set: the automatic one is a rule of thumb that follows the devices, and what
    is not read at the moment may be back at the next.
    """
    limit, ledger, runners = context.state.config.max_runners, context.state.ledger, context.state.runners
    if limit:
        _evict_worth(context, RunnerLimit(limit), -context.availability.process_slots[LATER], dict.fromkeys(runners, 1))
    for device in sorted(ledger.overcommitted & ledger.devices.keys()):
        held = {id: ledger.accounts["runner", id].held_bytes(device) for id in runners}
        going = context.claimed.union(runner.id for runner in context.leaving)
        staying = ledger.held_bytes(device) - sum(held[id] for id in going)
        _evict_worth(context, DeviceShrunk(device), staying - ledger.devices[device].capacity_bytes, held)


def _evict_worth(
    context: PlanningContext, reason: RunnerLimit | DeviceShrunk, excess: int, worth: Mapping[RunnerId, int]
) -> None:
    """Give up as few idle runners as are worth the excess together, or all that are worth something."""
    may = [
        one
        for one in context.candidates.evictable_until(-math.inf, context.claimed)
        if not one.leases and worth[one.runner]
    ]
    choice = context.choose(
        may, (), lambda victims: sum(worth[victim.runner] for victim in victims) >= excess,
        lambda victim: (worth[victim.runner],),
    )  # fmt: skip
    victims = context.unclaimed(may if choice is None else choice.victims)
    context.plan.victims.update((runner.id, reason) for runner in victims)
    context.claimed.update(runner.id for runner in victims)
    context.availability.add(SOON, victims)


def _nothing_left(context: PlanningContext) -> bool:
    """Whether no line behind could have anything: enough wait already, and nothing is free or can be given up."""
    if context.waiting < LINES_AHEAD:
        return False
    idle = [context.state.runners[id] for id in context.candidates.idle - context.claimed]
    if context.availability.process_slots[DRAINED] + sum(runner.process for runner in idle) <= 0:
        return True
    there = context.availability.available_after(DRAINED, idle)
    return all(amount <= 0 and context.ahead[device] >= LINES_AHEAD for device, amount in there.items())


def _is_behind_same_model(context: PlanningContext, group: RequestGroup, newcomers: Collection[RequestSpec]) -> bool:
    """Tell whether a line is far behind others for its model, and has been judged before: those go first."""
    if context.successors[group.spec.model] < LINES_AHEAD or group.spec in newcomers:
        return False
    current = context.state.models[group.spec.model].current
    if current is not None and current.id in context.awaited and match(current, group.spec.options):
        return False
    context.wait(group, WaitFor.same_model)
    return True


def _plan_group(context: PlanningContext, group: RequestGroup) -> None:
    """Plan one line."""
    context.availability.reserve_earlier(context.state.rank(group.head))
    if (judged := _evaluate(context, group)) is None:
        return
    options, need = judged
    if group.spec.purpose is Purpose.memory:
        _plan_memory(context, group, need)
        return
    model = context.state.models[group.spec.model]
    if model.id in context.availability.reserved_by_model:  # it has one runner at a time
        context.wait(group, WaitFor.same_model)
        context.successors[model.id] += 1
        context.availability.reserve_successor(model.id, need)
    elif model.current is not None and model.current.id in context.awaited:
        context.wait(group, WaitFor.other_load, context.state.expected_at(model.current))
        context.availability.reserved_by_model[model.id] = context.availability.held_by(model.current)
        context.availability.reserve_successor(model.id, need)
    else:
        _plan_runner(context, group, model, options, need)


def _evaluate(
    context: PlanningContext, group: RequestGroup, waits_for: WaitReason | None = None
) -> tuple[Options, Requirement] | None:
    """Return what a line needs and the best way to place it; None where that is not the question, or is unknown.

    Then it is refused, or served as it is, or waits for its model's load or metadata.
    """
    context.plan.evaluated.append(group)
    if waits_for:
        context.wait(group, waits_for)
    if group.spec.purpose is Purpose.memory:
        options, demand, current = group.spec.options, PlacementDemand(Footprint(fixed=group.spec.memory)), None
    else:
        model = context.state.models[group.spec.model]
        current = model.current
        if current is not None and current.id in context.awaited and match(current, group.spec.options):
            context.wait(group, WaitFor.load, context.state.expected_at(current))
            return None
        if not model.inspected_since_launch:
            context.wait(group, WaitFor.metadata)
            context.plan.inspections.append(model)
            if model.info is not None and not waits_for and len(context.state.groups) > 1:
                _reserve_stale_estimate(context, model, group.spec.options)
            return None
        options, demand = resolved_demand(
            model, group.spec.options, context.state, context.availability.potential, context.gpus
        )
        context.plan.options[group.spec] = options
        if current is not None and match(current, group.spec.options, options):
            context.plan.matches.append((group, current))
            return None
        if (objection := model.impossible(options)) is not None:
            context.plan.refusals.append((group, UnsupportedOption(model.id, *objection)))
            return None
    offload = _best_offload(context, group, demand, current)
    return (
        None if offload is None else (options, Requirement(demand, offload, group.spec.purpose is not Purpose.memory))
    )


def _plan_memory(context: PlanningContext, group: RequestGroup, need: Requirement) -> None:
    head, *others = group.requests.values()  # each is as old as it is: once the first has it the next is first
    context.availability.queued_members = sorted(
        [*context.availability.queued_members, *((context.state.rank(request), need) for request in others)],
        key=lambda one: one[0],
    )
    if context.availability.find_placement(NOW, need) is None:
        plan_eviction(context, group, need, ())
    else:
        context.plan.memory.append(head)
        context.availability.reserve(NOW, tuple(context.state.ledger.by_memory(group.spec.memory).items()), 0)


def _reserve_stale_estimate(context: PlanningContext, model: ModelRecord, asked: Options) -> None:
    """Book what a model will need by what was last read of it: it may have changed, but most likely it has not."""
    _, demand = resolved_demand(model, asked, context.state, context.availability.potential, context.gpus)
    if (offload := context.availability.best_offload(demand)) is not None:
        context.availability.reserved_by_model.setdefault(model.id, context.availability.held_by(model.current))
        context.availability.reserve_successor(model.id, Requirement(demand, offload))


def _plan_runner(
    context: PlanningContext, group: RequestGroup, model: ModelRecord, options: Options, need: Requirement
) -> None:
    forced = _mandatory_victims(context, model)
    others = [runner for runner in context.state.runners.values() if runner.id not in context.overdue]
    accompanied = model.load_exclusively and bool(context.plan.launches or not all(map(context.state.pinned, others)))
    places = context.availability.process_slots[NOW]
    if model.load_exclusively:
        context.availability.process_slots[NOW] = 0  # nobody begins beside it; else there might always be somebody
    if not forced and not accompanied and places > 0:
        free = context.availability.bytes[NOW]
        placement = context.load_slots.find_placement(need.demand, need.offload, free, context.gpus)
        if placement is not None:
            asked, planned = group.spec.options, (options, placement)
            options, placement = with_batch(model, asked, context.state.config, planned, free, context.gpus)
            context.plan.options[group.spec] = options
            context.plan.placements[group.spec] = PlannedPlacement(placement, tuple(sorted(free.items())))
            context.plan.launches.append((group, options, placement))
            context.availability.reserve(NOW, placement.bytes, 1)
            context.availability.reserved_by_model[model.id] = dict(placement.bytes)
            context.load_slots.add(placement)
            return
    context.availability.reserved_by_model[model.id] = dict(need.amounts(plan_eviction(context, group, need, forced)))


def _best_offload(
    context: PlanningContext, group: RequestGroup, demand: PlacementDemand, current: Runner | None
) -> Offload | None:
    """Return the best way that is possible at all; None: the line is refused, since there is none."""
    no_place = group.spec.purpose is not Purpose.memory and context.unmovable >= context.state.max_runners()
    reload_pinned = current is not None and context.state.pinned(current)
    if not (no_place or reload_pinned) and (possible := context.availability.best_offload(demand)) is not None:
        return possible
    refusal, need = infeasible_reason(
        context.state, context.gpus, group.spec.model, demand, context.availability.potential
    )
    if need is not None:
        context.plan.placements[group.spec] = PlannedPlacement(
            need, tuple(sorted(context.availability.potential.items()))
        )
    context.plan.refusals.append((group, refusal))
    return None


def _mandatory_victims(context: PlanningContext, model: ModelRecord) -> list[Runner]:
    """Return what must go whatever fits: the model's own runner with other options; after out of memory, all."""
    if model.load_exclusively:
        runners = [runner for runner in context.state.runners.values() if runner.current]
        return [runner for runner in runners if runner.id not in context.awaited and not context.state.pinned(runner)]
    return [model.current] if model.current is not None else []
