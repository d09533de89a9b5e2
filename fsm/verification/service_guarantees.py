"""What users are promised of a single step, whatever happened; a part of what `judge` asks.

Whose turn it is, how long a runner rests, when it leaves as somebody asked, and what becomes of those in the way. What
is compared is worked out here once more, from the requests and the events alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from fsm.core import Core
from fsm.domain.devices import DeviceId
from fsm.machine.request import ModelId, Purpose, Request, RequestId
from fsm.machine.runner import EXPIRING, IDLE, LOADING, READY, Runner, RunnerId
from fsm.messages.commands import Command, Grant, Launch, NotifyContention, Reject
from fsm.messages.events import (
    Acquire,
    Cancel,
    Configure,
    Event,
    Exited,
    Expire,
    Loaded,
    OutOfMemory,
    Pin,
    Progress,
    Release,
    Tick,
    Unpin,
)
from fsm.planning.plan import PlannedPlacement
from fsm.sizing.footprint import Footprint
from fsm.state.core_config import USE_PER_LOAD
from fsm.state.core_state import CoreState
from fsm.state.memory_ledger import Owner
from fsm.state.request_queue import RequestGroup


def check_service_guarantees(before: Core, event: Event, commands: Sequence[Command], after: Core) -> None:
    """Raise AssertionError where a step breaks a promise; `after.plans` are those of the step."""
    was, now = before._state, after._state
    if after.plans:
        _planned_in_turn(after)
        see_that_plans_are_fair(after, commands)
    _granted_in_turn(was, commands)
    _has_what_it_loads_on(was, event, commands, now)
    if isinstance(event, Acquire):
        assert now.queued <= max(now.config.max_queue, was.queued), "more wait than may"
    for runner in now.runners.values():
        if runner.current:
            _keep_alive(was, event, commands, now, runner)
    if isinstance(event, Release | Cancel):
        assert event.request not in now.requests, "given back, but held"
    match event:
        case Loaded(id) if id in was.runners and was.runners[id].state is LOADING:
            _loaded(was.runners[id], now)
        case Expire(model):
            _asked_to_leave(was, model, now)
        case OutOfMemory(id) | Exited(id) if isinstance(event, OutOfMemory) or event.out_of_memory:
            _ran_out(was, id, now)
        case Progress(id) if id in was.runners and was.runners[id].state is LOADING:
            due_at = now.timers.at(("load", id))
            assert due_at == now.now + now.config.load_timeout_s, "a load that is alive is not given more time"
        case Cancel() | Tick():
            _abandoned(was, commands, now)
        case _:
            pass
    if any(runner.leases for runner in was.runners.values()):
        _asked_first(was, commands, after)
    if now.ledger.overcommitted or now.config.max_runners:
        _nobody_rests_in_excess(now)


# -- turns ------------------------------------------------------------------------------------------------------------


def _planned_in_turn(after: Core) -> None:
    """Lines go by the age of their oldest request; a step of priority counts as some waiting."""
    plan = (after.plans or [])[-1]
    if plan.memory:
        return  # who was granted is no longer the oldest
    waited = [list(group.requests.values()) for group in plan.evaluated if group.requests]
    turns = [min(_turn(request, after._state) for request in requests) for requests in waited]
    assert turns == sorted(turns), "somebody is planned before it is their turn"


def _turn(request: Request, state: CoreState) -> tuple[float, RequestId]:
    return request.queued_at - request.spec.priority * state.config.priority_s, request.id


def _turn_in(state: CoreState) -> Callable[[Request], tuple[float, RequestId]]:
    return lambda request: _turn(request, state)


def _granted_in_turn(was: CoreState, commands: Sequence[Command]) -> None:
    """Who waited for one runner is served in the order in which they came, those who want no lease last."""
    granted: dict[int | None, list[tuple[bool, float, RequestId]]] = {}
    for one in commands:
        if isinstance(one, Grant) and (request := was.requests.get(one.request)) is not None:
            last = request.spec.purpose is not Purpose.lease
            granted.setdefault(one.runner, []).append((last, request.queued_at, request.id))
    for order in granted.values():
        assert order == sorted(order), "somebody is served before it is their turn"


def see_that_plans_are_fair(after: Core, commands: Sequence[Command]) -> None:
    """Raise AssertionError where somebody was planned, or started, with what others wait for; the step had a plan."""
    _victim_of_one(after)
    _nobody_is_overtaken(after, commands)


def _nobody_is_overtaken(after: Core, commands: Sequence[Command]) -> None:
    """Whoever starts has left alone what the first of those who came before, and wait, will have.

    That is asked of what has declared its bytes, which need no headroom and can be nowhere else. It will have them once
    those have gone that were stopped, or those that drain too, or those whose place it is to have: if it would have had
    enough then without what was just taken, it still does.
    """
    state = after._state
    started = [one.runner for one in commands if isinstance(one, Launch)]
    granted = [one.request for one in commands if isinstance(one, Grant) and one.runner is None]
    if not state.groups or not after.plans or not (started or granted):
        return
    first = _first_without(after, {state.runners[id].model for id in started if id in state.runners})
    if first is None:
        return
    group, room = first
    turn = min(_turn(request, state) for request in group.requests.values())
    younger: list[Owner] = [("memory", id) for id in granted if _turn(state.requests[id], state) > turn]
    for planned, _, _ in (launch for plan in after.plans for launch in plan.launches):
        runner = state.models[planned.spec.model].current
        if runner is not None and runner.id in started and min(map(_turn_in(state), planned.requests.values())) > turn:
            younger.append(("runner", runner.id))
    accounts = state.ledger.accounts
    places = math.inf if group.spec.purpose is Purpose.memory else sum(kind == "runner" for kind, _ in younger)
    for device, need in state.ledger.by_memory(room.placement.bytes).items():
        taken = sum(accounts[owner].held_bytes(device) for owner in younger if owner in accounts)
        for there in _horizons(state, room, device, places) if taken else ():
            assert not there < need <= there + taken, "who came later takes what another waits for"


def _first_without(after: Core, started: Collection[ModelId]) -> tuple[RequestGroup, PlannedPlacement] | None:
    """Return the first line that waits for memory, of declared bytes, and where that goes; None: there is another."""
    state, rooms = after._state, (after.plans or [])[-1].placements
    for group in sorted(state.groups.values(), key=lambda one: min(map(_turn_in(state), one.requests.values()))):
        model = state.models.get(group.spec.model)
        if model is not None and model.current is not None and model.current.state is LOADING:
            if model.id in started or group.spec.options in model.current.equivalent_requests:
                continue
            return None
        declared = model is None or (isinstance(model.info, Footprint) and model.info.fixed)
        room = rooms.get(group.spec)
        return (group, room) if room is not None and declared else None
    return None


def _horizons(state: CoreState, room: PlannedPlacement, device: DeviceId, places: float) -> list[int]:
    """Return what there is of a device for the first who waits, at each time at which it may be enough.

    Memory without a place for its process, of which as many as `places` were just taken, is not enough.
    """
    going = [one for one in state.runners.values() if one.state is EXPIRING and not state.is_overdue(one)]
    held = {one.id: state.ledger.accounts["runner", one.id].held_bytes(device) for one in state.runners.values()}
    soon = state.ledger.free_bytes(device) + sum(held[one.id] for one in going if not one.leases)
    drained = soon + sum(held[one.id] for one in going if one.leases)
    victims = [state.runners[one.runner] for one in room.victims if one.runner in state.runners]
    staying = [one for one in victims if one.current]
    if staying:
        return [drained + sum(held[one.id] for one in staying)]
    places += state.max_runners() - state.processes + sum(one.process for one in going if not one.leases)
    if any(one.leases for one in victims) or places <= 0:
        return [drained] if places + sum(one.process for one in going if one.leases) > 0 else []
    return [soon, drained]


def _victim_of_one(after: Core) -> None:
    """No two lines count on what one runner leaves, but for who has to leave whoever else counts on it."""
    state = after._state
    counted: set[RunnerId] = set()
    for spec, room in (after.plans or [])[-1].placements.items():
        model = state.models.get(spec.model)
        forced = model.current if model is not None else None
        for victim in room.victims if model is None or not model.load_exclusively else ():
            if forced is None or victim.runner != forced.id:
                assert victim.runner not in counted, f"two count on what {victim.model} leaves"
                counted.add(victim.runner)


def _has_what_it_loads_on(was: CoreState, event: Event, commands: Sequence[Command], now: CoreState) -> None:
    """A load begins when all its devices are claimed for it, or when the wait for that is over."""
    for command in commands if now.config.claims else ():
        if isinstance(command, Launch):
            runner = now.runners[command.runner]
            devices = {device for device, amount in runner.placement.bytes if amount}
            claimed = was.claims[runner.claim].devices if runner.claim else frozenset()
            assert devices <= claimed or isinstance(event, Tick), "launched on devices that are not all claimed"


# -- how long runners stay --------------------------------------------------------------------------------------------


def _keep_alive(was: CoreState, event: Event, commands: Sequence[Command], now: CoreState, runner: Runner) -> None:
    """A runner rests for as long as was named last, from its last use on."""
    earlier = was.runners.get(runner.id)
    grants = [one.request for one in commands if isinstance(one, Grant) and one.runner == runner.id]
    named = [_named(was, event, request) for request in grants]
    last = next((keep_alive_s for keep_alive_s in reversed(named) if keep_alive_s is not None), None)
    said = event.keep_alive_s if isinstance(event, Configure) else None
    if last is not None:
        expected = {last}
    elif earlier is None:
        waiting = [request for group in now.groups_of_model(runner.model) for request in group.requests.values()]
        names = [request.keep_alive_s for request in waiting]
        expected = {now.config.keep_alive_s if name is None else name for name in names}
    else:
        expected = {said if said is not None and earlier.uses_default_keep_alive else earlier.keep_alive_s}
    assert runner.keep_alive_s in expected, f"{runner.model} is kept for as long as nobody said"
    if runner.state is not IDLE:
        return
    expires_at, pinned = now.timers.at(("keep-alive", runner.id)), now.models[runner.model].pinned
    if isinstance(event, Release | Cancel) and earlier is not None and earlier.state is READY:
        assert pinned or runner.keep_alive_s > 0, f"{runner.model} rests, although it is not to be kept"
    if pinned:
        assert expires_at == math.inf, f"{runner.model} is pinned, and rests for a time"
    elif earlier is None or earlier.state is not IDLE or grants or _pins(event, runner):
        assert expires_at == now.now + runner.keep_alive_s, f"{runner.model} does not rest for as long as was said"
    elif said is None:
        assert expires_at == was.timers.at(("keep-alive", runner.id)), f"{runner.model} rests anew, and nobody used it"


def _named(was: CoreState, event: Event, id: RequestId) -> float | None:
    """Return the keep-alive that a request named."""
    if isinstance(event, Acquire) and event.request == id:
        return event.keep_alive_s
    return was.requests[id].keep_alive_s


def _pins(event: Event, runner: Runner) -> bool:
    return isinstance(event, Pin | Unpin) and event.model == runner.model


def _loaded(earlier: Runner, now: CoreState) -> None:
    """Who was asked to leave leaves once it has served; others keep their place for a time that is bounded."""
    runner = now.runners.get(earlier.id)
    if runner is None or not runner.current:
        return
    assert not earlier.expire_when_served, f"{runner.model} was asked to leave once it has served, and stays"
    limits, load_s = now.config, now.now - runner.launched_at
    for until, most_s in ((runner.resident_until, load_s), (runner.drain_protected_until, USE_PER_LOAD * load_s)):
        most_s = min(most_s, limits.max_wait_s) if limits.min_residency_s is None else limits.min_residency_s
        assert until <= now.now + most_s, f"{runner.model} keeps its place for too long"


def _asked_to_leave(was: CoreState, model: str, now: CoreState) -> None:
    """A model that is asked to leave does, or will once those who wait for its load are served."""
    for earlier in was.runners.values():
        runner = now.runners.get(earlier.id)
        if earlier.current and earlier.model == model and runner is not None and runner.current:
            assert runner.state is LOADING and runner.expire_when_served, f"{model} is asked to leave, and stays"


def _ran_out(was: CoreState, id: RunnerId, now: CoreState) -> None:
    """Memory ran out while a runner served: everybody is given up, since nobody knows who took it."""
    cause = was.runners.get(id)
    if cause is None or not cause.process or cause.loaded_at is None:
        return
    for earlier in was.runners.values():
        runner = now.runners.get(earlier.id)
        assert runner is None or not runner.current, f"memory ran out, and {earlier.model} stays"


def _abandoned(was: CoreState, commands: Sequence[Command], now: CoreState) -> None:
    """A load that nobody waits for any more goes on, but not where it would not be kept."""
    for one in commands:
        request = was.requests.get(one.request) if isinstance(one, Reject) else None
        model = now.models.get(request.spec.model) if request is not None else None
        if request is None or model is None or model.current is None or model.pinned:
            continue
        runner, waited_for = model.current, model.id in now.specs_by_model
        if runner.state is LOADING and runner.id in was.runners and request.spec.options in runner.equivalent_requests:
            kept = runner.keep_alive_s > 0 and request.keep_alive_s != 0
            assert kept or waited_for, f"{model.id} is loaded for nobody, and would not be kept"


# -- those in the way -------------------------------------------------------------------------------------------------


def _asked_first(was: CoreState, commands: Sequence[Command], after: Core) -> None:
    """The holders of what is given up for others are told so, once."""
    now = after._state
    said = [request for one in commands if isinstance(one, NotifyContention) for request in one.requests]
    assert len(said) == len(set(said)), "somebody is told twice that others wait"
    assert not any(was.requests[id].asked for id in said if id in was.requests), (
        "somebody is told again that others wait"
    )
    for id in {id for plan in after.plans or () for id in plan.victims}:
        for lease in now.runners[id].leases if id in now.runners else ():
            assert lease in said or was.requests[lease].asked, "given up in use, and nobody told that others wait"


def _nobody_rests_in_excess(now: CoreState) -> None:
    """Nobody rests where more is held than there is, or more are alive than may be, but for who is pinned."""
    going = {runner.id for runner in now.runners.values() if runner.state is EXPIRING}
    resting = [one for one in now.runners.values() if one.state is IDLE and not now.models[one.model].pinned]
    alive = sum(runner.process and runner.id not in going for runner in now.runners.values())
    assert not resting or not 0 < now.config.max_runners < alive, "somebody rests, and more are alive than may be"
    gone: set[Owner] = {("runner", id) for id in going}
    for device in now.ledger.overcommitted & now.ledger.devices.keys():
        staying = [one.held_bytes(device) for owner, one in now.ledger.accounts.items() if owner not in gone]
        if sum(staying) > now.ledger.devices[device].capacity_bytes:
            in_excess = [one for one in resting if now.ledger.accounts["runner", one.id].held_bytes(device)]
            assert not in_excess, f"somebody rests on {device}, which has less than is held"
