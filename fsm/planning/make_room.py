"""Which runners are evicted so that a request group that does not start now gets its memory, and what it waits for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

from fsm.domain.devices import HOST, Amounts, Placement
from fsm.eviction.policies import Candidate
from fsm.eviction.victim_selection import VictimSet, choose_victims
from fsm.machine.request import ModelId, Purpose
from fsm.machine.runner import STOPPING, Runner, RunnerId
from fsm.messages.reasons import KeptReason, NeededFor, RunnerStep, WaitFor, WaitForRunners, WaitReason
from fsm.planning.availability import AFTER_DRAINS, AFTER_EVICTIONS, AFTER_STOPS, NOW, Horizon, Requirement
from fsm.planning.load_slots import loads_on
from fsm.planning.plan import PlannedPlacement
from fsm.planning.planning_context import GROUPS_AHEAD, PlanningContext
from fsm.state.request_queue import RequestGroup


def plan_eviction(
    context: PlanningContext, group: RequestGroup, need: Requirement, mandatory: Sequence[Runner]
) -> Placement:
    """Return the placement that is reserved for a request group that does not start now, its victims chosen:

    1. Where no victims suffice, the group waits for the requests or runners that block it.
    2. Where all victims may leave now and the group fits once they have left, the victims are evicted.
    3. Where a victim may not leave yet, the group waits until all of them may.
    4. Else the group waits for memory that is being freed, or for a load slot.
    """
    may, victim_set = _select_victims(context, group, need, mandatory)
    hurried, chosen = context.hurried(group), victim_set.victims if victim_set is not None else ()
    victims = context.candidates.timed(context.bound(group), chosen, hurried=hurried)
    at = max((victim.free_at for victim in victims), default=math.inf)
    horizon = _horizon_after(context, need, victims, at)
    goes = horizon == AFTER_STOPS or (horizon == AFTER_DRAINS and any(victim.leases for victim in victims))
    enough = victim_set is not None and not victims  # the memory is free, or is being freed
    startable = enough and context.availability.find_placement(NOW, need) is not None
    since = AFTER_STOPS if enough or goes else horizon
    placement, horizon, free = _claim_and_reserve(context, need, context.unclaimed(victims), horizon, since)
    if victim_set is None:  # 1
        context.wait(group, *_blocking_reason(context))
    elif goes:  # 2
        _evict(context, group, victims)
    elif at > context.state.now and victims:  # 3
        _wait_for_idle(context, group, victims, at, may)
    else:  # 4
        victims += _wait_for_memory(context, group, placement, horizon, startable=startable)
    context.plan.contended.update(victim.runner for victim in victims if not goes)
    kept = _kept(context, group, may, victims, victim_set) if context.explains else {}
    context.plan.placements[group.spec] = PlannedPlacement(
        placement, need.amounts(placement), free, tuple(victims), tuple(may), kept
    )
    return placement


def _kept(
    context: PlanningContext,
    group: RequestGroup,
    may: Sequence[Candidate],
    victims: Iterable[Candidate],
    victim_set: VictimSet | None,
) -> dict[RunnerId, KeptReason | None]:
    """Return why each runner is not evicted for a request group, and None for the runners that are.

    `may` are the candidates that were considered; none were where no victim is needed.
    """
    now, by_hand = context.state.now, context.state.config.min_residency_s is not None
    kept: dict[RunnerId, KeptReason | None] = dict.fromkeys(context.state.runners, KeptReason.not_needed)
    others = KeptReason.others_cost_less
    if victim_set is None or victim_set.cost_s is None:
        others = KeptReason.not_enough if victim_set is None else KeptReason.others_come_first
    later = {one.runner for one in may if one.free_at > now}
    for runner in context.candidates.movable if may else ():
        just = KeptReason.just_loaded if by_hand and runner.resident_until > now else KeptReason.just_used
        kept[runner.id] = KeptReason.in_use if runner.leases else just if runner.id in later else others
    kept |= dict.fromkeys(context.claimed, KeptReason.other_victim)
    kept |= context.candidates.barred
    kept |= {id: KeptReason.evicted for id in group.evicted if kept.get(id) is KeptReason.expiring}
    for victim in victims:
        if victim.runner not in context.plan.victims:
            kept[victim.runner] = KeptReason.goes_last if victim.free_at <= now else KeptReason.goes_later
    return kept | dict.fromkeys(context.plan.evicted.get(group.spec, ()))


def _horizon_after(context: PlanningContext, need: Requirement, victims: Sequence[Candidate], at: float) -> Horizon:
    """Return the horizon from which on a requirement fits with the memory that victims leave, who all may go `at`."""
    leaving = context.unclaimed(victims)
    for horizon in (AFTER_STOPS, AFTER_DRAINS):
        if at <= context.state.now and context.availability.find_placement(horizon, need, leaving):
            return horizon
    return AFTER_EVICTIONS


def _claim_and_reserve(
    context: PlanningContext, need: Requirement, victims: Sequence[Runner], horizon: Horizon, since: Horizon
) -> tuple[Placement, Horizon, Amounts]:
    """Count on the memory of victims from `horizon` on, and reserve a requirement where it fits first from `since` on.

    Returns its placement, the horizon of the reservation, and the bytes by device that were available at it.
    """
    before = context.availability.bytes[AFTER_DRAINS].copy()
    context.claimed.update(runner.id for runner in victims)
    for runner in victims:
        context.availability.add(max(horizon, AFTER_DRAINS if runner.leases else AFTER_STOPS), [runner])
    placement, reserved_at = context.availability.earliest_fit(need, since)
    free = tuple(sorted(context.availability.bytes[reserved_at].items()))
    context.availability.reserve(reserved_at, need.amounts(placement), need.process)
    context.ahead.update(device for device, amount in placement.bytes if amount > before.get(device, 0))
    return placement, reserved_at, free


def _select_victims(
    context: PlanningContext, group: RequestGroup, need: Requirement, mandatory: Sequence[Runner]
) -> tuple[Sequence[Candidate], VictimSet | None]:
    """Return the candidates that were considered for a request group, and its victims; None where none suffice:

    1. Where the memory that is free or being freed suffices, only the mandatory victims leave.
    2. A group behind `GROUPS_AHEAD` groups that lack the same memory is given idle runners only.
    3. Idle runners that may leave now come before the memory of victims of earlier groups, which leave later.
    4. Else any candidate may leave, and the memory of victims of earlier groups counts.

    A runner whose leases earlier requests wait for is no candidate.
    """
    bound, hurried = context.bound(group), context.hurried(group)
    must = [context.candidates.candidate(runner, bound, hurried=hurried) for runner in mandatory]
    taken = context.claimed.union(context.serving_before(group), (runner.id for runner in mandatory))
    context.waiting += 1
    if _suffices(context, need, AFTER_DRAINS, must):  # 1
        return [], VictimSet(tuple(must), 0.0)
    memories = context.availability.memories(need)
    where = [device for device in memories if device != HOST] or memories
    if all(context.ahead[device] >= GROUPS_AHEAD for device in where):  # 2
        taken.update(runner.id for runner in context.candidates.movable if runner.id not in context.candidates.idle)
    may = context.ranking(group, memories).without(taken)
    for horizon in (AFTER_DRAINS, AFTER_EVICTIONS) if _more_after_evictions(context) else (AFTER_EVICTIONS,):  # 3, 4
        candidates = may.idle(context.state.now) if horizon == AFTER_DRAINS else may
        least = _fewest_victims(context, need, must, horizon)
        if victim_set := choose_victims(candidates, must, partial(_suffices, context, need, horizon), least):
            return may.ordered, victim_set
    return may.ordered, None


def _more_after_evictions(context: PlanningContext) -> bool:
    """Tell whether the victims of earlier request groups leave anything that drained runners do not."""
    availability = context.availability
    more_bytes = availability.bytes[AFTER_EVICTIONS] != availability.bytes[AFTER_DRAINS]
    return more_bytes or len(set(availability.process_slots[AFTER_DRAINS:])) > 1


def _fewest_victims(context: PlanningContext, need: Requirement, must: Iterable[Candidate], horizon: Horizon) -> int:
    """Return how many victims beside the mandatory ones must leave so that a process may be started at a horizon."""
    if not need.process:
        return 0
    lacking = 1 - sum(one.process for one in context.unclaimed(must))
    return max(0, lacking - context.availability.process_slots[horizon])


def _suffices(context: PlanningContext, need: Requirement, horizon: Horizon, victims: Iterable[Candidate]) -> bool:
    return context.availability.find_placement(horizon, need, context.unclaimed(victims)) is not None


def _evict(context: PlanningContext, group: RequestGroup, victims: Sequence[Candidate]) -> None:
    context.wait(group, WaitForRunners(_models(victims), RunnerStep.leave))
    for victim in victims:
        context.plan.victims.setdefault(victim.runner, NeededFor(group.spec.model))
    others = {runner for evicted in context.plan.evicted.values() for runner in evicted}
    if own := [victim.runner for victim in victims if victim.runner not in others]:
        context.plan.evicted[group.spec] = tuple(own)


def _wait_for_idle(
    context: PlanningContext, group: RequestGroup, victims: Sequence[Candidate], at: float, may: Iterable[Candidate]
) -> None:
    """Wait until all victims may leave: no victim leaves for a placement that another victim still prevents.

    Whenever another candidate may leave, a new plan chooses again, so the first runners that may leave serve the group.
    """
    context.wait(group, WaitForRunners(_models(victims), RunnerStep.idle), at)
    moments = (at, context.bound(group), *[one.free_at for one in may])
    context.plan.replan_at = min([context.plan.replan_at, *[one for one in moments if one > context.state.now]])


def _wait_for_memory(
    context: PlanningContext, group: RequestGroup, placement: Placement, horizon: Horizon, *, startable: bool
) -> Sequence[Candidate]:
    """Let a group wait for memory that is being freed, or for a load slot; return the load that it evicts, if any:

    1. Where the group fits only once the victims of earlier groups have left, it waits for the earlier requests.
    2. Where it fits once draining runners have left, it waits for the draining runners that hold its memory.
    3. Where it fits once the stopped runners have left, it waits for those that were evicted for it, or for their
       memory, or for the load that bars others.
    4. Memory of the program's own needs no load slot.
    5. A runner needs one, and may evict a load for it.
    """
    if horizon == AFTER_EVICTIONS:  # 1
        context.wait(group, WaitFor.earlier_requests)
        return ()
    by = min(
        (runner.stop_deadline for runner in context.leaving if runner.stop_deadline > context.state.now),
        default=math.inf,
    )
    if horizon == AFTER_DRAINS:  # 2
        context.wait(group, WaitForRunners(_draining(context, placement), RunnerStep.drain), by)
        return ()
    if not all(runner.leases for runner in context.leaving):  # 3
        context.wait(group, _stopping(context, group), by)
    elif context.alone is not None:
        reason = WaitForRunners((context.alone.model,), RunnerStep.load_alone)
        context.wait(group, reason, context.state.expected_at(context.alone))
    else:
        context.wait(group, *_blocking_reason(context))
    if group.spec.purpose is Purpose.memory:  # 4
        return ()
    return _wait_for_load_slot(context, group, placement, startable=startable)  # 5


def _wait_for_load_slot(
    context: PlanningContext, group: RequestGroup, placement: Placement, *, startable: bool
) -> Sequence[Candidate]:
    """Take a load slot for a placement; where its devices have none left, let the group wait for one.

    Where only the load slot is missing (`startable`), a load that no request waits for is evicted, and returned.
    """
    full = context.load_slots.full(placement)
    context.load_slots.add(placement)  # its load starts in a moment: younger groups must not take its load slot
    on_full = [runner for runner in context.loading if full & set(loads_on(runner.placement))]
    if full:
        context.wait(group, WaitFor.load_slot, min(map(context.state.expected_at, on_full), default=math.inf))
    for runner in on_full if startable else ():
        if runner.id not in context.claimed | context.awaited and not context.state.pinned(runner):
            context.plan.victims[runner.id] = NeededFor(group.spec.model, load_slot=True)
            context.plan.evicted[group.spec] = (runner.id,)
            context.claimed.add(runner.id)
            return [context.candidates.candidate(runner, context.bound(group))]
    return ()


def _blocking_reason(context: PlanningContext) -> tuple[WaitReason, float]:
    """Return why no victims can be chosen, and until when as far as that is known."""
    runners = context.state.runners
    if context.waiting > 1 or not (context.overdue or context.awaited):
        return WaitFor.earlier_requests, math.inf
    if context.overdue:
        return WaitForRunners(_models(runners[id] for id in sorted(context.overdue)), RunnerStep.drain), math.inf
    loads = [runners[id] for id in sorted(context.awaited)]
    return WaitForRunners(_models(loads), RunnerStep.load_then_idle), min(map(context.state.expected_at, loads))


def _draining(context: PlanningContext, placement: Placement) -> tuple[ModelId, ...]:
    """Return the models of the draining runners that hold memory of a placement's devices, or of all that drain."""
    accounts, devices = context.state.ledger.accounts, [device for device, amount in placement.bytes if amount]
    draining = [runner for runner in context.leaving if runner.leases]
    holding = [one for one in draining if any(map(accounts["runner", one.id].held_bytes, devices))]
    return _models(holding or draining)


def _stopping(context: PlanningContext, group: RequestGroup) -> WaitReason:
    """Return what a group waits for that fits once runners have stopped: those that were evicted for it, or memory."""
    stopping = {one.id: one for one in context.leaving if one.process_state is STOPPING}
    own = [stopping[id] for id in group.evicted if id in stopping]
    return WaitForRunners(_models(own), RunnerStep.leave) if own else WaitFor.memory


def _models(runners: Iterable[Runner | Candidate]) -> tuple[ModelId, ...]:
    return tuple(runner.model for runner in runners)
