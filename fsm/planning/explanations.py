"""Why a decision is as it is: which runners and devices were considered, with figures, and why they were not chosen.

Entries are made only where a decision log is kept, from the plan as it was carried out; no decision reads them.
"""

from __future__ import annotations

from fsm.eviction.policies import Candidate
from fsm.machine.runner import LOADING, Runner, RunnerId
from fsm.messages.decision_log import ConsideredDevice, ConsideredRunner, Decision, Entry
from fsm.messages.reasons import KeptReason
from fsm.messages.refusals import DoesNotFitRefusal, Refusal
from fsm.planning.plan import Plan, PlannedPlacement
from fsm.state.core_state import CoreState
from fsm.state.request_queue import RequestGroup


def tell_victims(state: CoreState, plan: Plan, decision_log: list[Entry]) -> None:
    """Log which runners are evicted for which request group, before they expire."""
    for spec in plan.evicted:
        group, planned = state.groups[spec], plan.placements[spec]
        entry = Decision(
            state.now, "evicts", spec.model, None, group.head.id,
            runners=runners_considered(state, plan, planned), devices=devices_considered(state, planned),
            step=state.steps,
        )  # fmt: skip
        decision_log.append(entry)


def tell_placed(state: CoreState, plan: Plan, since: RunnerId, decision_log: list[Entry]) -> None:
    """Log the placements of the launches from runner `since` on; other launches may still wait for device claims."""
    for group, _, placement in plan.launches:
        spec, runner = group.spec, state.models[group.spec.model].current
        if runner is None or runner.id < since:
            continue
        devices = devices_considered(state, plan.placements[spec])
        entry = Decision(
            state.now, "placed", spec.model, placement, group.head.id, runner.id, devices=devices, step=state.steps
        )
        decision_log.append(entry)


def tell_waits(state: CoreState, plan: Plan, decision_log: list[Entry]) -> None:
    """Log what request groups wait for, and until when, for the groups whose reason has changed."""
    for group in plan.evaluated:
        if group.spec in state.groups and group.told != group.waits_for:
            tell_wait(state, group, decision_log, plan)


def tell_wait(state: CoreState, group: RequestGroup, decision_log: list[Entry], plan: Plan | None = None) -> None:
    """Log what a request group waits for, by a plan or without one."""
    group.told = group.waits_for
    planned = plan.placements.get(group.spec) if plan is not None else None
    runners = runners_considered(state, plan, planned) if plan is not None and planned is not None else ()
    devices = devices_considered(state, planned) if planned is not None else ()
    why, id = group.waits_for, group.head.id
    entry = Decision(state.now, "waits", group.spec.model, why, id, None, group.until, runners, devices, state.steps)
    decision_log.append(entry)


def runners_considered(state: CoreState, plan: Plan, planned: PlannedPlacement) -> tuple[ConsideredRunner, ...]:
    """Return every runner that holds memory or a process, with why it is not evicted for a request group."""
    known = {one.runner: one for one in (*planned.considered, *planned.victims)}
    loading = [one for one in state.runners.values() if one.state is LOADING and state.groups_served_by(one)]
    awaited = {one.id: KeptReason.awaited for one in loading}
    kept = {**awaited, **dict.fromkeys(plan.victims, KeptReason.other_victim), **plan.barred, **planned.kept}
    return tuple(
        _considered(state, runner, known.get(id), kept.get(id, KeptReason.not_needed))
        for id, runner in state.runners.items()
    )


def devices_considered(state: CoreState, planned: PlannedPlacement) -> tuple[ConsideredDevice, ...]:
    """Return every device, with the bytes that a planned placement needs of it and that are available for it."""
    needs, free = dict(planned.needed), dict(planned.free)
    devices = (device.id for device in state.ledger.devices.values() if not device.integrated)
    figures = ((device, needs.get(device, 0), free.get(device, 0)) for device in devices)
    return tuple(ConsideredDevice(device, need, there, 0 < need <= there) for device, need, there in figures)


def devices_refused(refusal: Refusal) -> tuple[ConsideredDevice, ...]:
    """Return the devices that a refusal names, with the bytes that would be needed and are available at most."""
    if not isinstance(refusal, DoesNotFitRefusal):
        return ()
    needs, most = dict(refusal.needed), dict(refusal.available)
    devices = sorted({*needs, *most})
    return tuple(ConsideredDevice(device, needs.get(device, 0), most.get(device, 0), False) for device in devices)


def runners_refused(state: CoreState, refusal: Refusal) -> tuple[ConsideredRunner, ...]:
    """Return the runners that may not be evicted for a refused request, and why not."""
    if not isinstance(refusal, DoesNotFitRefusal):
        return ()
    return tuple(
        _considered(state, runner, None, KeptReason.pinned if state.pinned(runner) else KeptReason.overdue)
        for runner in state.runners.values()
        if state.is_unmovable(runner)
    )


def _considered(
    state: CoreState, runner: Runner, candidate: Candidate | None, why: KeptReason | None
) -> ConsideredRunner:
    account = state.ledger.accounts["runner", runner.id]
    return ConsideredRunner(
        runner.id,
        runner.model,
        tuple((device, account.held_bytes(device)) for device in sorted({*account.reserved, *account.peak})),
        runner.state,
        len(runner.leases),
        state.now - runner.used_at if runner.loaded_at is not None else 0.0,
        candidate.cost_s if candidate is not None else None,
        why is None,
        why,
        candidate.free_at - state.now if candidate is not None and why is KeptReason.goes_later else 0.0,
    )
