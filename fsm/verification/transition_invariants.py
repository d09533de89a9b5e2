"""What must hold of a single step, whatever happened: judged from what was before it, what was said, and what is after.

`Core.check` says what must hold of a state; this, what must hold of a change. It needs no history but the highest
numbers, so a search can branch anywhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from fsm.core import Core
from fsm.domain.devices import HOST, DeviceId, DeviceSample
from fsm.lifecycle.prefetch import spare_bytes
from fsm.machine.request import Request, RequestState
from fsm.machine.runner import EXPIRING, IDLE, LOADING, Runner, RunnerId
from fsm.messages.commands import (
    Claim,
    Command,
    Finished,
    Grant,
    Launch,
    Prefetch,
    Reject,
    ReleaseClaim,
    RevokeLease,
    Stop,
)
from fsm.messages.events import (
    Acquire,
    Cancel,
    Close,
    Configure,
    Event,
    Exited,
    Expire,
    Loaded,
    OutOfMemory,
    Release,
    Sampled,
    Tick,
    Unresponsive,
)
from fsm.state.core_state import CoreState
from fsm.state.memory_ledger import Owner
from fsm.verification.environment import IdHighWater
from fsm.verification.service_guarantees import check_service_guarantees


def judge(before: Core, event: Event, commands: Sequence[Command], after: Core, past: IdHighWater) -> None:
    """Raise AssertionError where a step was wrong; `after.plans` must have been empty, not None, before it."""
    was, now = before._state, after._state
    _answers(was, event, commands, now)
    if was.runners or now.runners:
        _leases(was, event, commands, now)
        _lives(was, event, now)
        _one_more_load(was, event, now)
        _given_up(was, event, commands, after)
    for command in commands:
        _told(before, event, command, now, past)
    if was.prefetching or now.prefetching:
        _read_ahead(was, commands, now)
    if was.claims or now.claims or now.config.claims:
        _claims(was, commands, now)
    if after.plans:
        _bounded(after)
    check_service_guarantees(before, event, commands, after)
    assert not after.finished or (now.closing and not now.runners), "finished, but not over"
    over = now.closing and not now.runners and not isinstance(event, Tick)
    assert after.finished or before.finished or not over, "closed and empty, but not finished"


def _waiting(state: CoreState) -> set[int]:
    return {id for id, request in state.requests.items() if request.state is RequestState.queued}


def _answers(was: CoreState, event: Event, commands: Sequence[Command], now: CoreState) -> None:
    """Everybody is answered once, and at once where what they want is there."""
    asked = _waiting(was)
    if isinstance(event, Acquire) and event.request not in was.requests:
        asked.add(event.request)
    answered = [one.request for one in commands if isinstance(one, Grant | Reject)]
    assert sorted(answered) == sorted(asked - _waiting(now)), "a request is lost, or answered twice"
    if isinstance(event, Cancel) and event.request in asked:
        assert event.request in answered, "who left is not answered"
    if isinstance(event, Tick):
        due = [id for (at, (kind, id)) in was.timers.items() if kind == "request" and at <= now.now]
        assert set(due) <= set(answered), "somebody waits beyond their time"


def _one_more_load(was: CoreState, event: Event, now: CoreState) -> None:
    """Whoever waited for a load that ran out of memory waits for one more at most.

    One that is of a smaller context is none for who named theirs.
    """
    runner = was.runners.get(event.runner) if isinstance(event, Exited) and event.out_of_memory else None
    if runner is not None and runner.state is LOADING:
        for request in [request for group in was.groups_served_by(runner) for request in group.requests.values()]:
            left = now.requests.get(request.id)
            smaller = now.models[runner.model].context_limit != was.models[runner.model].context_limit
            other = smaller and request.spec.options.num_ctx is not None
            last = left is None or (left.survived and not request.survived)
            assert last or other, "loads fail for somebody again and again"
            assert left is None or smaller or now.models[runner.model].load_exclusively, (
                "the next load may not be alone"
            )


def _leases(was: CoreState, event: Event, commands: Sequence[Command], now: CoreState) -> None:
    """A lease ends with its release, or is taken back, and its holder told, where its runner is of no more use."""
    revoked = {one.request for one in commands if isinstance(one, RevokeLease)}
    for runner in was.runners.values():
        left = now.runners[runner.id].leases if runner.id in now.runners else set()
        for lease in runner.leases - left:
            given = isinstance(event, Release | Cancel) and event.request == lease
            assert given or lease in revoked, "a lease is lost, and nobody told"
            useless = isinstance(event, Exited | Unresponsive) and event.runner == runner.id
            closing = now.closing and isinstance(event, Tick)
            assert given or useless or closing, "a lease is taken back in use"


def _for_us(was: CoreState, event: Sampled, sample: DeviceSample) -> int:
    """Return what a reading says that a device has for all of us: free, or occupied by us."""
    seen: dict[Owner, dict[DeviceId, int]] = {("runner", id): dict(amounts) for id, amounts in event.resident}
    taken = [
        seen.get(owner, {}).get(sample.id, account.occupied_bytes(sample.id))
        for owner, account in was.ledger.accounts.items()
    ]
    return sample.free_bytes + sum(taken)


def _lives(was: CoreState, event: Event, now: CoreState) -> None:
    """A process is gone when it says so, and nobody else; a runner is unloaded once its memory is back."""
    for runner in was.runners.values():
        own_end = isinstance(event, Exited) and event.runner == runner.id
        after = now.runners.get(runner.id)
        if runner.process:
            assert own_end or (after is not None and after.process), "another's end is taken for its own"
            assert not own_end or after is None or not after.process, "its end is not noted"
        elif after is None and isinstance(event, Sampled):
            assert event.number >= runner.last_sample, "judged by a reading from before its process went"
            for_us = {sample.id: _for_us(was, event, sample) for sample in event.devices if sample.fresh}
            back = all(for_us.get(gpu, math.inf) >= awaited for gpu, awaited in runner.recovery_targets.items())
            assert back, "unloaded, although its memory is not back"


def _given_up(was: CoreState, event: Event, commands: Sequence[Command], after: Core) -> None:
    """A runner goes for a reason of its own, or as the victim of somebody who may have it."""
    now = after._state
    victims = {id for plan in after.plans or () for id in plan.victims}
    for runner in was.runners.values():
        left = now.runners.get(runner.id)
        if not runner.current or (left is not None and left.current):
            continue
        if runner.id in victims:
            given = {event.request} if isinstance(event, Release | Cancel) else set()
            _may_be_victim(was, runner, commands, now, in_use=bool(runner.leases - given))
        else:
            assert _has_reason(was, runner, event, now), f"{runner.model} is given up for nothing"


def _has_reason(was: CoreState, runner: Runner, event: Event, now: CoreState) -> bool:
    pinned = was.models[runner.model].pinned
    unwanted = runner.state is LOADING and not now.groups_served_by(runner)
    match event:
        case Exited(id) | Unresponsive(id):
            return id == runner.id
        case Expire(model):
            return model == runner.model
        case Loaded(id):
            return id == runner.id and runner.expire_when_served
        case Release(request) | Cancel(request):
            last = runner.leases == {request} and runner.keep_alive_s <= 0 and not pinned
            return last or unwanted
        case Tick():
            timers = {key for at, key in was.timers.items() if at <= now.now}
            over = runner.state is IDLE and ("keep-alive", runner.id) in timers
            return over or ("load", runner.id) in timers or unwanted
        case Configure():
            return runner.uses_default_keep_alive and runner.state is IDLE and not pinned
        case OutOfMemory(id):
            return was.runners[id].loaded_at is not None
        case Close():
            return True
        case _:
            return False


def _may_be_victim(
    was: CoreState, runner: Runner, commands: Sequence[Command], now: CoreState, *, in_use: bool
) -> None:
    waiting = [request for group in now.groups.values() for request in group.requests.values()]
    granted = any(isinstance(one, Grant) and one.runner is None for one in commands)
    full = was.overfull() or now.overfull()
    assert waiting or granted or full, f"{runner.model} is given up for nobody"
    assert not now.models[runner.model].pinned, f"{runner.model} is pinned, and given up for others"
    resident_until = runner.drain_protected_until if in_use else runner.resident_until
    if not in_use and now.config.min_residency_s is None:
        resident_until = -math.inf  # an automatic one is over when nobody uses it
    assert resident_until <= now.now or full, f"{runner.model} is given up within its residency"
    overdue = any(_bound(request, now) <= now.now for request in waiting)
    resting = runner.state is IDLE and runner.idle_grace_until > now.now
    assert not resting or overdue or granted or full, f"{runner.model} is given up before its users could ask again"
    assert not in_use or overdue or granted, f"{runner.model} is given up in use"


def _told(before: Core, event: Event, command: Command, now: CoreState, past: IdHighWater) -> None:
    was = before._state
    match command:
        case Grant(request, int(id)):
            runner = now.runners[RunnerId(id)]
            held = now.requests.get(request)
            assert runner.loaded_at is not None, "granted what does not serve"
            assert held is None or request in runner.leases, "granted, but not held"
            earlier = was.runners.get(RunnerId(id))
            assert earlier is None or earlier.current, "granted what is on its way out"
        case Stop(id):
            assert id not in now.runners or not now.runners[id].leases, "stopped in use"
            assert id not in was.runners or not was.runners[id].stopping, "stopped twice"
        case Launch(id):
            assert id > past.runners, "an id is used again"
            assert not now.closing, "launched after the close"
            _room_to_start(now, now.runners[id])
            _alone_where_it_must(was, now, now.runners[id])
        case RevokeLease(request):
            assert request not in now.requests, "taken back, but held"
        case Finished():
            assert not before.finished, "finished twice"
        case _:
            pass


def _room_to_start(now: CoreState, runner: Runner) -> None:
    assert sum(one.process for one in now.runners.values()) <= now.max_runners(), "more processes than there may be"
    loading = [_gpus(one) for one in now.runners.values() if one.state is LOADING]
    for device in _gpus(runner):
        most = now.config.max_host_loads if device == HOST else now.config.max_loads_per_gpu
        assert sum(device in devices for devices in loading) <= most, f"more loads on {device} than there may be"


def _alone_where_it_must(was: CoreState, now: CoreState, runner: Runner) -> None:
    """After a load that ran out of memory the next one has everybody out of its way who may be moved, until it ends."""
    others = [one for one in now.runners.values() if one.current and one is not runner]
    model = was.models.get(runner.model)
    if model is not None and model.load_exclusively and now.models[runner.model].load_exclusively:
        assert all(now.models[one.model].pinned for one in others), "loaded again, and not alone"
    for one in others:
        assert one.state is not LOADING or not now.models[one.model].load_exclusively, (
            "begun beside a load that is to be alone"
        )


def _gpus(runner: Runner) -> list[str]:
    """Return what a runner loads on: its GPUs, else the host."""
    return [device for device, amount in runner.placement.bytes if device != HOST and amount] or [HOST]


def _claims(was: CoreState, commands: Sequence[Command], now: CoreState) -> None:
    """What was claimed and is not given back is somebody's, and the other way round."""

    def open_in(state: CoreState) -> Counter[int]:
        return Counter([*state.claims, *(runner.claim for runner in state.runners.values() if runner.claim)])

    made = Counter(command.number for command in commands if isinstance(command, Claim))
    ended = Counter(command.number for command in commands if isinstance(command, ReleaseClaim))
    left = open_in(was) + made
    assert left - ended == open_in(now) and ended <= left, "a claim is lost, or given back twice"


def _read_ahead(was: CoreState, commands: Sequence[Command], now: CoreState) -> None:
    """What is read ahead is said when it changes, and leaves alone what is promised, mapped, or others' to fill."""
    said = [command.files for command in commands if isinstance(command, Prefetch)]
    assert said == ([now.prefetching] if now.prefetching != was.prefetching else []), "it is not as it was said"
    before, spare = dict(was.prefetching), spare_bytes(now.ledger)
    for files in said:
        assert sum(size for _, size in files) <= spare, "more is read ahead than there is memory to spare"
        begun = sum(size for model, size in files if model not in before)
        assert begun <= spare // 2, "more than half of it is filled to begin with"
        assert all(0 <= size <= before.get(model, size) for model, size in files), "an amount grows in a wait"


def _bounded(after: Core) -> None:
    """Whoever waits for what is in use, or resides, does so for a bounded time, and the core looks again by then."""
    state = after._state
    plan = (after.plans or [])[-1]
    look_at = state.timers.at(("plan", 0))
    going = [
        one.stop_deadline for one in state.runners.values() if one.state is EXPIRING
    ]  # until then nobody need go for it
    for spec, room in plan.placements.items():
        group = state.groups.get(spec)
        if group is None or not room.victims:
            continue
        for victim in room.victims:
            runner = state.runners.get(victim.runner)
            if runner is None or not runner.current or runner.state is LOADING:
                continue
            latest = max(_bound(group.head, state), runner.resident_until, runner.drain_protected_until)
            assert look_at <= max([*going, *(victim.free_at for victim in room.victims)]), "nobody looks again"
            assert victim.free_at <= max(latest, state.now), f"{spec.model} waits for {runner.model} without a bound"
            assert state.now < max(_bound(group.head, state), *map(_resident_until, state.runners.values())), (
                f"{spec.model} still waits for {runner.model}"
            )


def _resident_until(runner: Runner) -> float:
    """Return until when a runner keeps its place at most, in use or not."""
    return max(runner.resident_until, runner.drain_protected_until)


def _bound(request: Request, state: CoreState) -> float:
    """Return when busy runners have to leave for a request."""
    return request.queued_at + state.config.max_wait_s
