"""What leaves so that a group that does not start now gets its memory, and what the group waits for meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

from fsm.domain.devices import HOST, Placement
from fsm.eviction.policies import Candidate
from fsm.eviction.victim_selection import VictimSet
from fsm.machine.request import ModelId, Purpose
from fsm.machine.runner import Runner
from fsm.messages.reasons import NeededFor, RunnerStep, WaitFor, WaitForRunners, WaitReason
from fsm.planning.availability import DRAINED, LATER, NOW, SOON, Requirement
from fsm.planning.load_slots import loads_on
from fsm.planning.plan import PlannedPlacement
from fsm.planning.planning_context import LINES_AHEAD, PlanningContext
from fsm.state.request_queue import RequestGroup


def plan_eviction(
    context: PlanningContext, group: RequestGroup, need: Requirement, forced: Sequence[Runner]
) -> Placement:
    """Choose what to give up for a line that does not start now, and book what it will need."""
    may, choice = _select_victims(context, group, need, forced)
    chosen = context.candidates.timed(context.bound(group), choice.victims) if choice is not None else []
    at = max((victim.free_at for victim in chosen), default=math.inf)
    victims = context.unclaimed(chosen)
    there = (
        one
        for one in (SOON, DRAINED)
        if at <= context.state.now and context.availability.find_placement(one, need, victims)
    )
    horizon = next(there, LATER)  # from when on there is room with what the victims leave
    goes = horizon == SOON or (horizon == DRAINED and any(victim.leases for victim in chosen))
    before = context.availability.bytes[DRAINED].copy()
    context.claimed.update(runner.id for runner in victims)
    for runner in victims:
        context.availability.add(max(horizon, DRAINED if runner.leases else SOON), [runner])
    enough = choice is not None and not chosen  # on its way, or there
    startable = enough and context.availability.find_placement(NOW, need) is not None
    final, horizon = context.availability.earliest_fit(need, SOON if enough or goes else horizon)
    free = tuple(sorted(context.availability.bytes[horizon].items()))
    context.availability.reserve(horizon, need.amounts(final), need.process)
    context.ahead.update(device for device, amount in final.bytes if amount > before.get(device, 0))
    if choice is None:
        context.wait(group, *_blocking_reason(context))
    elif goes:
        _evict(context, group, chosen)
    elif at > context.state.now and chosen:
        _wait_for_idle(context, group, chosen, at, may)
    else:
        chosen += _wait_for_memory(context, group, final, horizon, startable=startable)
    context.plan.contended.update(victim.runner for victim in chosen if not goes)
    context.plan.placements[group.spec] = PlannedPlacement(final, free, tuple(chosen), tuple(may), choice)
    return final


def _select_victims(
    context: PlanningContext, group: RequestGroup, need: Requirement, forced: Sequence[Runner]
) -> tuple[list[Candidate], VictimSet | None]:
    """Return who may be given up for a line, and who is: rather idle ones now than what others leave later."""
    bound = context.bound(group)
    must = [context.candidates.candidate(runner, bound) for runner in forced]
    taken = context.claimed.union(runner.id for runner in forced)
    context.waiting += 1
    if _suffices(context, need, DRAINED, must):
        return [], VictimSet(tuple(must), 0.0)
    may = context.candidates.evictable_until(bound, taken)
    memories = context.availability.memories(need)
    where = [device for device in memories if device != HOST] or memories
    if all(context.ahead[device] >= LINES_AHEAD for device in where):  # far back: it is given what nobody uses
        may = [one for one in may if one.runner in context.candidates.idle]
    lacking = need.process - sum(one.process for one in context.unclaimed(must))
    at_rest = [one for one in may if not one.leases and one.free_at <= context.state.now]
    hopes = (
        context.availability.bytes[LATER] != context.availability.bytes[DRAINED]
        or len(set(context.availability.process_slots[DRAINED:])) > 1
    )
    for horizon, ones in ((DRAINED, at_rest), (LATER, may))[not hopes :]:
        least = max(0, lacking - context.availability.process_slots[horizon]) if need.process else 0
        if choice := context.choose(
            ones, must, partial(_suffices, context, need, horizon), context.frees(memories), least
        ):
            return may, choice
    return may, None


def _suffices(context: PlanningContext, need: Requirement, horizon: int, victims: Iterable[Candidate]) -> bool:
    return context.availability.find_placement(horizon, need, context.unclaimed(victims)) is not None


def _evict(context: PlanningContext, group: RequestGroup, chosen: Sequence[Candidate]) -> None:
    context.wait(group, WaitForRunners(_models(chosen), RunnerStep.leave))
    for victim in chosen:
        context.plan.victims.setdefault(victim.runner, NeededFor(group.spec.model))


def _wait_for_idle(
    context: PlanningContext, group: RequestGroup, chosen: Sequence[Candidate], at: float, may: Iterable[Candidate]
) -> None:
    """Wait until all of them may go: none is unloaded for a room that another still holds.

    Whenever another may go, the choice is made again: whoever may first serves the waiter.
    """
    context.wait(group, WaitForRunners(_models(chosen), RunnerStep.idle), at)
    moments = (at, context.bound(group), *(one.free_at for one in may))
    context.plan.replan_at = min(context.plan.replan_at, *(moment for moment in moments if moment > context.state.now))


def _wait_for_memory(
    context: PlanningContext, group: RequestGroup, placement: Placement, horizon: int, *, startable: bool
) -> Sequence[Candidate]:
    """Enough is on its way already, or only a place among the loads is missing: give up a load nobody waits for."""
    if horizon == LATER:
        context.wait(group, WaitFor.earlier_requests)
        return ()
    by = min(
        (runner.stop_deadline for runner in context.leaving if runner.stop_deadline > context.state.now),
        default=math.inf,
    )
    if horizon == DRAINED:
        context.wait(group, WaitForRunners(_draining(context, placement), RunnerStep.drain), by)
        return ()
    if any(not runner.leases for runner in context.leaving):
        context.wait(group, WaitFor.memory, by)
    elif context.alone is not None:
        reason = WaitForRunners((context.alone.model,), RunnerStep.load_alone)
        context.wait(group, reason, context.state.expected_at(context.alone))
    else:
        context.wait(group, *_blocking_reason(context))
    if group.spec.purpose is Purpose.memory:
        return ()
    full = context.load_slots.full(placement)
    context.load_slots.add(placement)  # it starts in a moment: its place among the loads is not for younger ones
    on_full = [runner for runner in context.loading if full & set(loads_on(runner.placement))]
    if full:
        context.wait(group, WaitFor.load_slot, min(map(context.state.expected_at, on_full), default=math.inf))
    for runner in on_full if startable else ():
        if runner.id not in context.claimed | context.awaited and not context.state.pinned(runner):
            context.plan.victims[runner.id] = NeededFor(group.spec.model, load_slot=True)
            context.claimed.add(runner.id)
            return [context.candidates.candidate(runner, context.bound(group))]
    return ()


def _blocking_reason(context: PlanningContext) -> tuple[WaitReason, float]:
    """Return why nobody can be chosen to make room, and until when as far as that is known."""
    runners = context.state.runners
    if context.waiting > 1 or not (context.overdue or context.awaited):
        return WaitFor.earlier_requests, math.inf
    if context.overdue:
        return WaitForRunners(_models(runners[id] for id in sorted(context.overdue)), RunnerStep.drain), math.inf
    loads = [runners[id] for id in sorted(context.awaited)]
    return WaitForRunners(_models(loads), RunnerStep.load_then_idle), min(map(context.state.expected_at, loads))


def _draining(context: PlanningContext, placement: Placement) -> tuple[ModelId, ...]:
    """Return who is given up and still in use, of those who hold what is needed there."""
    accounts, devices = context.state.ledger.accounts, [device for device, amount in placement.bytes if amount]
    draining = [runner for runner in context.leaving if runner.leases]
    holding = [one for one in draining if any(map(accounts["runner", one.id].held_bytes, devices))]
    return _models(holding or draining)


def _models(runners: Iterable[Runner | Candidate]) -> tuple[ModelId, ...]:
    return tuple(runner.model for runner in runners)
