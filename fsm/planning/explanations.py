"""Why a decision is as it is: who and what was considered, with figures, and why the others were not taken.

Made only where somebody reads the journal, from the plan as it was carried out; nothing is decided by it.
"""

from __future__ import annotations

from collections.abc import Iterator

from fsm.domain.devices import MIB, Placement
from fsm.eviction.policies import Candidate
from fsm.machine.request import Purpose, Want
from fsm.machine.runner import EXPIRING, LOADING, Runner, RunnerId
from fsm.messages.decision_log import ConsideredDevice, ConsideredRunner, Decision, Entry
from fsm.messages.refusals import DoesNotFit, Refusal
from fsm.placement.search import needed
from fsm.planning.plan import Plan, Room
from fsm.sizing.footprint import Footprint
from fsm.state.core_state import Pool
from fsm.state.request_queue import Line

NOBODY_GOES = "nobody has to go"


def tell_victims(pool: Pool, plan: Plan, journal: list[Entry]) -> None:
    """Note who is given up for whom, before it happens."""
    for want, room in plan.rooms.items():
        going = [one for one in room.victims if one.runner in plan.victims]
        if not going:
            continue
        line = pool.lines[want]
        entry = Decision(
            pool.now, "evicts", want.model, _costs(", ".join(one.model for one in going), room), line.head.id,
            runners=runners_considered(pool, plan, line), devices=devices_considered(pool, want, room),
        )  # fmt: skip
        journal.append(entry)


def tell_placed(pool: Pool, plan: Plan, since: RunnerId, journal: list[Entry]) -> None:
    """Note what was placed where, of the launches from runner `since` on; others may still wait for their devices."""
    for line, _, placement in plan.launches:
        want, runner = line.want, pool.models[line.want.model].current
        if runner is None or runner.id < since:
            continue
        devices = devices_considered(pool, want, plan.rooms[want])
        entry = Decision(
            pool.now, "placed", want.model, placement_in_words(placement), line.head.id, runner.id, devices=devices
        )
        journal.append(entry)


def tell_waits(pool: Pool, plan: Plan, journal: list[Entry]) -> None:
    """Note what those wait for of whom that has changed, and until when."""
    for line in plan.looked_at:
        if line.want not in pool.lines or line.told == line.waits_for:
            continue
        line.told = line.waits_for
        room = plan.rooms.get(line.want)
        runners = runners_considered(pool, plan, line) if room else ()
        devices = devices_considered(pool, line.want, room) if room else ()
        reason, id = f"for {line.waits_for}", line.head.id
        journal.append(Decision(pool.now, "waits", line.want.model, reason, id, None, line.until, runners, devices))


def runners_considered(pool: Pool, plan: Plan, line: Line) -> tuple[ConsideredRunner, ...]:
    """Return every runner that holds memory or a place, with what became of it when room was made for a line."""
    room = plan.rooms.get(line.want)
    known = {one.runner: one for one in (*room.considered, *room.victims)} if room else {}
    return tuple(
        _considered(pool, runner, known.get(runner.id), _verdict(pool, plan, room, runner))
        for runner in pool.runners.values()
    )


def devices_considered(pool: Pool, want: Want, room: Room) -> tuple[ConsideredDevice, ...]:
    """Return every device, with what a placement needs of it and what there is for it."""
    info = pool.models[want.model].info if want.purpose is not Purpose.memory else None
    exact = info is None or (isinstance(info, Footprint) and bool(info.fixed))
    needs, free = dict(needed(room.placement, exact=exact)), dict(room.free)
    whole = sum(needs.values())
    found = []
    for device in pool.ledger.devices.values():
        if device.integrated:
            continue
        need, there = needs.get(device.id, 0), free.get(device.id, 0)
        if need:
            verdict = "" if need <= there else f"{_mib(need - there)} are missing"
        else:
            verdict = "not needed" if whole <= there else f"{_mib(there)} are not enough for all of it"
        found.append(ConsideredDevice(device.id, need, there, bool(need) and not verdict, verdict))
    return tuple(found)


def devices_refused(refusal: Refusal) -> tuple[ConsideredDevice, ...]:
    """Return the devices that a refusal speaks of: what would be needed of each, and had at most."""
    if not isinstance(refusal, DoesNotFit):
        return ()
    needs, most = dict(refusal.needed), dict(refusal.available)
    pairs = {device: (needs.get(device, 0), most.get(device, 0)) for device in sorted({*needs, *most})}
    return tuple(
        ConsideredDevice(device, need, there, False, _lack(need, there)) for device, (need, there) in pairs.items()
    )


def runners_refused(pool: Pool, refusal: Refusal) -> tuple[ConsideredRunner, ...]:
    """Return the runners that may not make room for what was refused, and why not."""
    if not isinstance(refusal, DoesNotFit):
        return ()
    return tuple(
        _considered(pool, runner, None, "pinned" if pool.pinned(runner) else "stopped, but it does not end")
        for runner in pool.runners.values()
        if pool.pinned(runner) or (runner.state is EXPIRING and not runner.leases and pool.now >= runner.due_at)
    )


def _lack(need: int, there: int) -> str:
    return f"{_mib(need - there)} are missing" if need > there else "there is enough"


def _considered(pool: Pool, runner: Runner, candidate: Candidate | None, verdict: str) -> ConsideredRunner:
    account = pool.ledger.accounts["runner", runner.id]
    return ConsideredRunner(
        runner.id,
        runner.model,
        tuple((device, account.held_bytes(device)) for device in sorted({*account.promised, *account.peak})),
        runner.state,
        len(runner.leases),
        pool.now - runner.used_at if runner.loaded_at is not None else 0.0,
        candidate.cost_s if candidate is not None else None,
        not verdict,
        verdict,
    )


def _verdict(pool: Pool, plan: Plan, room: Room | None, runner: Runner) -> str:
    """Return why a runner is not given up for a line; empty where it is."""
    victims = {one.runner: one for one in room.victims} if room else {}
    if runner.id in victims and runner.id in plan.victims:
        return ""
    return next(_reasons(pool, plan, room, runner))


def _reasons(pool: Pool, plan: Plan, room: Room | None, runner: Runner) -> Iterator[str]:
    victim = next((one for one in room.victims if one.runner == runner.id), None) if room else None
    considered = next((one for one in room.considered if one.runner == runner.id), None) if room else None
    if victim is not None and victim.free_at <= pool.now:
        yield "it is to go when nothing else is missing"
    if victim is not None:
        yield f"it is to go in {victim.free_at - pool.now:.1f} s, or when it rests"
    if runner.state is EXPIRING:
        yield "it was stopped, but does not end" if pool.is_stuck(runner) else "it is on its way out"
    if pool.pinned(runner):
        yield "pinned"
    if runner.id in plan.victims or _is_victim_of_another(plan, room, runner.id):
        yield "it goes for somebody else"
    if runner.state is LOADING and pool.lines_for(runner):
        yield "others wait for its load"
    if room is None or not room.considered:
        yield NOBODY_GOES
    if runner.leases:
        yield "in use"
    if considered is not None and considered.free_at > pool.now:
        set_by_hand = pool.limits.min_residency_s is not None and runner.resident_until > pool.now
        yield "it has only just been loaded" if set_by_hand else "it was used a moment ago"
    if room is None or room.choice is None:
        yield "all that may go would not be enough"
    elif room.choice.cost_s is not None:
        yield f"to give up others costs less: {room.choice.cost_s:.2f} s are expected"
    yield "others come first in the policy's order, and suffice"


def _is_victim_of_another(plan: Plan, room: Room | None, id: RunnerId) -> bool:
    return any(each is not room and any(one.runner == id for one in each.victims) for each in plan.rooms.values())


def _costs(names: str, room: Room) -> str:
    """Return who goes, and what that is expected to cost where the policy says so."""
    cost_s = room.choice.cost_s if room.choice is not None else None
    return names if cost_s is None else f"{names}, which is expected to cost {cost_s:.2f} s of loading"


def _mib(amount: int) -> str:
    return f"{amount / MIB:.1f} MiB"


def placement_in_words(placement: Placement) -> str:
    """Return where a runner goes: layers by GPU, and bytes by device."""
    layers = [f"{count} layers on {device}" for device, count in placement.gpu_layers]
    return ", ".join([*layers, *(f"{_mib(size)} of {device}" for device, size in placement.bytes)])
