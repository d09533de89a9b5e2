"""Properties of a transition: of the state before a step, its event, its commands, and the state after it.

`service_guarantees` and `plan_invariants` have further properties of a transition. A check needs no history but the
highest ids that were in use, so a search can branch anywhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from fsm.core import Core
from fsm.domain.devices import HOST, DeviceId, DeviceSample
from fsm.machine.request import Request, RequestId, RequestState
from fsm.machine.runner import IDLE, LOADING, RUNNING, Runner, RunnerId
from fsm.messages.commands import Claim, Command, Finished, Grant, Launch, Reject, ReleaseClaim, RevokeLease, Stop
from fsm.messages.events import (
    Acquire,
    Cancel,
    Close,
    Configure,
    Event,
    Exited,
    Expire,
    FilesReplaced,
    Loaded,
    OutOfMemory,
    Release,
    Sampled,
    Tick,
    Unresponsive,
)
from fsm.state.core_state import CoreState
from fsm.state.memory_ledger import Owner
from fsm.verification import service_guarantees
from fsm.verification.environment import IdHighWater
from fsm.verification.plan_invariants import check_outcome
from fsm.verification.state_invariants import a_busy_runner_is_never_stopped, bound_of, name_of
from fsm.verification.step import CoreStep, EndedLease, Expiry, of_step

ALSO_ASKED = (service_guarantees,)  # imported so that its checks are added


def check_step(before: Core, event: Event, commands: Sequence[Command], after: Core, past: IdHighWater) -> None:
    """Raise Violated where a property of a transition does not hold.

    `after.plans` are the plans of the step: empty, not None, before it.
    """
    step = CoreStep(before, event, commands, after, past)
    of_step.ask(step)
    for cause in step.causes:
        of_step.ask_of(step, cause)
    check_outcome(event, commands, after)


# -- requests and leases ----------------------------------------------------------------------------------------------


@of_step(ids=("D07", "D13"))
def every_request_is_answered_once(step: CoreStep) -> None:
    """A request is queued until the step in which it is answered, and it is answered once."""
    asked = _waiting(step.was)
    event = step.event
    if isinstance(event, Acquire) and event.request not in step.was.requests:
        asked.add(event.request)
    answered = [one.request for one in step.commands if isinstance(one, Grant | Reject)]
    assert sorted(answered) == sorted(asked - _waiting(step.now)), "a request is lost, or answered twice"


@of_step(Cancel, ids=("D13",))
def a_cancelled_request_is_answered(step: CoreStep, cancel: Cancel) -> None:
    """A request that is cancelled while it is queued is answered at once."""
    assert cancel.request not in _waiting(step.now), f"request {cancel.request}"


@of_step(Tick)
def no_request_waits_beyond_its_time_out(step: CoreStep, _: Tick) -> None:
    """A request that is still queued when its time-out is over is refused then."""
    due = [id for (at, (kind, id)) in step.was.timers.items() if kind == "request" and at <= step.now.now]
    if due:
        answered = {one.request for one in step.commands if isinstance(one, Grant | Reject)}
        assert answered.issuperset(due), f"request {min(set(due) - answered)}"


@of_step(Grant)
def a_grant_is_of_a_runner_that_serves(step: CoreStep, grant: Grant) -> None:
    """A request is granted a runner that has loaded, and holds its lease from then on."""
    if grant.runner is not None:
        runner = step.now.runners[RunnerId(grant.runner)]
        assert runner.loaded_at is not None, f"{name_of(runner)} has not loaded"
        held = step.now.requests.get(grant.request)
        assert held is None or grant.request in runner.leases, f"{name_of(runner)} does not hold the lease"


@of_step(Grant, ids=("D01",))
def an_expiring_runner_is_never_granted(step: CoreStep, grant: Grant) -> None:
    """A runner that is expiring takes no new lease."""
    earlier = step.was.runners.get(RunnerId(grant.runner)) if grant.runner is not None else None
    assert earlier is None or earlier.current, f"{name_of(earlier)} is granted to request {grant.request}"


@of_step(EndedLease)
def a_lease_is_lost_only_if_its_holder_is_told(step: CoreStep, ended: EndedLease) -> None:
    """A lease ends when it is released or cancelled, or with a command that tells its holder."""
    told = any(isinstance(one, RevokeLease) and one.request == ended.lease for one in step.commands)
    assert ended.given_back or told, f"lease {ended.lease} on {name_of(ended.runner)}"


@of_step(EndedLease)
def a_lease_is_taken_back_only_from_a_runner_that_is_lost(step: CoreStep, ended: EndedLease) -> None:
    """A lease is taken back from its holder only if its runner exits or hangs, or the time limit of a close is over."""
    event = step.event
    lost = isinstance(event, Exited | Unresponsive) and event.runner == ended.runner.id
    closed = step.now.closing and isinstance(event, Tick)
    assert ended.given_back or lost or closed, f"lease {ended.lease} on {name_of(ended.runner)}"


@of_step(RevokeLease)
def a_lease_that_is_taken_back_is_not_held(step: CoreStep, revoke: RevokeLease) -> None:
    """A lease whose holder is told that it is taken back is not held any more."""
    assert revoke.request not in step.now.requests, f"lease {revoke.request}"


def _waiting(state: CoreState) -> set[RequestId]:
    return {id for id, request in state.requests.items() if request.state is RequestState.queued}


# -- the end of runners -----------------------------------------------------------------------------------------------


@of_step(ids=("D12",))
def a_process_has_gone_when_its_own_exit_is_reported(step: CoreStep) -> None:
    """A process is taken to have gone when its own exit is reported, and on no other event."""
    for runner in step.was.runners.values():
        if runner.process:
            own = isinstance(step.event, Exited) and step.event.runner == runner.id
            after = step.now.runners.get(runner.id)
            assert own or (after is not None and after.process), f"{name_of(runner)}: by the exit of another"
            assert not own or after is None or not after.process, f"{name_of(runner)}: its exit is not noted"


@of_step(Sampled, ids=("D10",))
def a_runner_is_unloaded_when_its_memory_is_back(step: CoreStep, sampled: Sampled) -> None:
    """A reading of the devices unloads a runner if it began after the process had gone and finds the memory free."""
    for runner in step.was.runners.values():
        if not runner.process and runner.id not in step.now.runners:
            assert sampled.number >= runner.last_sample, f"{name_of(runner)}: the reading was begun too early"
            for_us = {one.id: _for_us(step.was, sampled, one) for one in sampled.devices if one.fresh}
            account = step.was.ledger.accounts["runner", runner.id]
            all_free = {one.id: one.capacity_bytes + account.occupied_bytes(one.id) for one in sampled.devices}
            back = all(
                for_us.get(gpu, math.inf) >= min(awaited, all_free.get(gpu, math.inf))
                for gpu, awaited in runner.recovery_targets.items()
            )
            assert back, f"{name_of(runner)}: its memory is not back"


@of_step(Sampled)
def no_runner_waits_for_memory_that_is_free(step: CoreStep, sampled: Sampled) -> None:
    """A reading unloads a runner whose process has gone if nothing but what others hold is missing on its GPUs."""
    samples = {one.id: one for one in sampled.devices}
    accounts = step.now.ledger.accounts
    for runner in step.now.runners.values():
        read = [samples.get(gpu) for gpu in runner.recovery_targets]
        if runner.process or sampled.number < runner.last_sample or not all(one and one.fresh for one in read):
            continue
        missing = {
            one.id: one.capacity_bytes - one.free_bytes
            - sum(held.occupied_bytes(one.id) for owner, held in accounts.items() if owner != ("runner", runner.id))
            for one in read if one
        }  # fmt: skip
        assert any(amount > 0 for amount in missing.values()), f"{name_of(runner)}: its memory is free"


def _for_us(was: CoreState, event: Sampled, sample: DeviceSample) -> int:
    """Return the bytes of a device that are free, or occupied by runners of this scheduler, by a reading."""
    seen: dict[Owner, dict[DeviceId, int]] = {("runner", id): dict(amounts) for id, amounts in event.resident}
    taken = [
        seen.get(owner, {}).get(sample.id, account.occupied_bytes(sample.id))
        for owner, account in was.ledger.accounts.items()
    ]
    return sample.free_bytes + sum(taken)


@of_step(Expiry, ids=("D13", "D14"))
def a_runner_expires_for_a_reason(step: CoreStep, expiry: Expiry) -> None:
    """A runner expires as the victim of a plan, or for a reason of its own.

    The reasons are its end, the end of its keep-alive or of its load's time-out, a user's wish, memory that ran out, a
    close, that no request waits for its load any more, a better place for it at its next use, and that its model's
    files were replaced.
    """
    assert expiry.victim or _has_reason(step.was, expiry.runner, step.event, step.now), name_of(expiry.runner)


def _has_reason(was: CoreState, runner: Runner, event: Event, now: CoreState) -> bool:
    pinned = was.models[runner.model].pinned
    unwanted = runner.state is LOADING and not now.groups_served_by(runner)
    match event:
        case Unresponsive(id):
            return id == runner.id
        case Exited(id):
            return id == runner.id or (event.out_of_memory and was.runners[id].loaded_at is not None)
        case Expire(model):
            return model == runner.model
        case Loaded(id):
            return id == runner.id and (runner.expire_when_served or runner.files_replaced)
        case FilesReplaced(id):
            return id == runner.id and runner.state is IDLE
        case Release(request) | Cancel(request):
            leaves = (runner.keep_alive_s <= 0 and not pinned) or runner.files_replaced
            last = runner.leases == {request} and leaves
            return last or unwanted
        case Tick():
            timers = {key for at, key in was.timers.items() if at <= now.now}
            over = runner.state is IDLE and ("keep-alive", runner.id) in timers
            return over or ("load", runner.id) in timers or unwanted
        case Acquire():
            load_s = math.inf if runner.loaded_at is None else runner.loaded_at - runner.launched_at
            layers = event.spec.options.num_gpu
            asked = event.spec.model == runner.model and (layers is None or layers < 0)
            rests = runner.state is IDLE and not pinned and not runner.fully_offloaded
            return asked and rests and now.now - runner.better_place_since >= load_s
        case Configure():
            return runner.uses_default_keep_alive and runner.state is IDLE and not pinned
        case OutOfMemory(id):
            return was.runners[id].loaded_at is not None
        case Close():
            return True
        case _:
            return False


# -- victims ----------------------------------------------------------------------------------------------------------


@of_step(Expiry)
def a_victim_is_evicted_for_a_request(step: CoreStep, expiry: Expiry) -> None:
    """A runner is evicted only while a request waits, for memory just granted, or where runners hold too much."""
    if expiry.victim:
        waits = any(group.requests for group in step.now.groups.values())
        assert waits or _memory_was_granted(step) or _overfull(step), name_of(expiry.runner)


@of_step(Expiry)
def a_pinned_model_is_never_evicted(step: CoreStep, expiry: Expiry) -> None:
    """The runner of a pinned model is never the victim of a plan."""
    assert not (expiry.victim and step.now.models[expiry.runner.model].pinned), name_of(expiry.runner)


@of_step(Expiry)
def a_runner_is_not_evicted_within_its_residency(step: CoreStep, expiry: Expiry) -> None:
    """A runner keeps its place for its minimum residency; an automatic one is over when the runner is idle.

    In use it keeps its place for as long as its load took, where a request's own time limit would pass, and for longer
    else.
    """
    runner = expiry.runner
    if expiry.victim and (expiry.in_use or step.now.config.min_residency_s is not None):
        longer = expiry.in_use and not _hurried(step)
        until = runner.drain_protected_until if longer else runner.resident_until
        assert until <= step.now.now or _overfull(step), name_of(runner)


@of_step(Expiry)
def an_idle_runner_is_not_evicted_before_its_user_can_ask_again(step: CoreStep, expiry: Expiry) -> None:
    """An idle runner is not evicted within the grace after its last use, unless a request is overdue."""
    runner = expiry.runner
    if expiry.victim and runner.state is IDLE and runner.idle_grace_until > step.now.now:
        assert _overdue(step) or _memory_was_granted(step) or _overfull(step), name_of(runner)


@of_step(Expiry)
def a_busy_runner_is_not_evicted_before_a_request_is_overdue(step: CoreStep, expiry: Expiry) -> None:
    """A runner in use is evicted only for a request that has waited as long as it may, or for memory just granted."""
    if expiry.victim and expiry.in_use:
        assert _overdue(step) or _memory_was_granted(step), name_of(expiry.runner)


def _overdue(step: CoreStep) -> bool:
    """Tell whether a request has waited for as long as busy runners may keep it waiting."""
    queued = [request for group in step.now.groups.values() for request in group.requests.values()]
    return any(bound_of(request, step.now) <= step.now.now for request in queued)


def _hurried(step: CoreStep) -> bool:
    """Tell whether busy runners have to leave for a request because of its own time limit."""
    queued = [request for group in step.now.groups.values() for request in group.requests.values()]
    most_s = step.now.config.max_wait_s
    return any(bound_of(one, step.now) <= min(step.now.now, one.queued_at + most_s) for one in queued)


def _memory_was_granted(step: CoreStep) -> bool:
    return any(isinstance(one, Grant) and one.runner is None for one in step.commands)


def _overfull(step: CoreStep) -> bool:
    return step.was.overfull() or step.now.overfull()


# -- stops and launches -----------------------------------------------------------------------------------------------


@of_step(Stop)
def a_runner_is_stopped_once(step: CoreStep, stop: Stop) -> None:
    """A process is told to stop once."""
    earlier = step.was.runners.get(stop.runner)
    assert earlier is None or earlier.process_state is RUNNING, name_of(earlier)


@of_step(Stop, same_as=a_busy_runner_is_never_stopped)
def _stopped_in_use(step: CoreStep, stop: Stop) -> None:
    assert stop.runner not in step.now.runners or not step.now.runners[stop.runner].leases, f"runner {stop.runner}"


@of_step(Stop)
def prompts_are_saved_of_runners_that_had_to_leave(step: CoreStep, stop: Stop) -> None:
    """A runner saves its prompts before its stop where that is on and others, or its keep-alive, made it leave.

    It saves none for a user who had it unloaded, by an expire or with a keep-alive of 0, and none at the close.
    """
    state, runner = step.now, step.now.runners[stop.runner]
    may = state.config.keeps_prompts and not state.closing and runner.loaded_at is not None and runner.keep_alive_s > 0
    if any(runner.id in plan.victims for plan in step.after.plans or ()):
        assert stop.keep_prompts == may, f"{name_of(runner)}, which is evicted"
    else:
        may = may and not isinstance(step.event, Expire | Configure)
        assert may or not stop.keep_prompts, name_of(runner)


@of_step(Sampled)
def what_prompts_take_is_as_it_was_told_last(step: CoreStep, sampled: Sampled) -> None:
    """How long a runner's prompts take to be had again is known as the last reading told it."""
    for id, prompts_s in sampled.prompts:
        runner = step.now.runners.get(id)
        assert runner is None or runner.prompts_s == prompts_s, name_of(runner)


@of_step(Launch, ids=("D11",))
def a_runner_id_is_never_used_again(step: CoreStep, launch: Launch) -> None:
    """The id of a launched runner is higher than that of every runner before it."""
    assert launch.runner > step.past.runners, f"runner {launch.runner}"


@of_step(Launch)
def no_runner_is_launched_after_the_close(step: CoreStep, launch: Launch) -> None:
    """No runner is launched once the scheduler is closing."""
    assert not step.now.closing, f"runner {launch.runner}"


@of_step(Launch)
def no_more_processes_live_than_may(step: CoreStep, launch: Launch) -> None:
    """A launch keeps to the limit on live processes, those that were told to stop among them."""
    assert sum(one.process for one in step.now.runners.values()) <= step.now.max_runners(), f"runner {launch.runner}"


@of_step(Launch)
def no_more_runners_load_on_a_device_than_may(step: CoreStep, launch: Launch) -> None:
    """A launch keeps to the limit on loads at a time, on each GPU and on the host."""
    limits = step.now.config
    loading = [_gpus(one) for one in step.now.runners.values() if one.state is LOADING]
    for device in _gpus(step.now.runners[launch.runner]):
        most = limits.max_host_loads if device == HOST else limits.max_loads_per_gpu
        assert sum(device in devices for devices in loading) <= most, f"runner {launch.runner} on {device}"


def _gpus(runner: Runner) -> list[str]:
    """Return what a runner loads on: its GPUs, else the host."""
    return [device for device, amount in runner.placement.bytes if device != HOST and amount] or [HOST]


@of_step(Exited)
def a_request_waits_for_one_more_load_after_one_ran_out_of_memory(step: CoreStep, exited: Exited) -> None:
    """A request whose load ran out of memory waits for one more load at most.

    A load with a smaller context does not count for a request that named its context.
    """
    for request, runner in _survivors(step, exited):
        left, smaller = step.now.requests.get(request.id), _steps_down(step, runner)
        last = left is None or (left.survived and not request.survived)
        assert last or (smaller and request.spec.options.num_ctx is not None), f"request {request.id}"


@of_step(Exited)
def a_load_is_tried_again_alone_after_it_ran_out_of_memory(step: CoreStep, exited: Exited) -> None:
    """After a load ran out of memory, the next load of its model is alone, or is of a smaller context."""
    for request, runner in _survivors(step, exited):
        waits = request.id in step.now.requests
        assert not waits or _steps_down(step, runner) or step.now.models[runner.model].load_exclusively, (
            f"request {request.id}"
        )


def _survivors(step: CoreStep, exited: Exited) -> Iterator[tuple[Request, Runner]]:
    """Yield the requests, as they were, that waited for a load that has just run out of memory."""
    runner = step.was.runners.get(exited.runner) if exited.out_of_memory else None
    if runner is not None and runner.state is LOADING:
        for group in step.was.groups_served_by(runner):
            yield from ((request, runner) for request in group.requests.values())


def _steps_down(step: CoreStep, runner: Runner) -> bool:
    """Tell whether the next load of a runner's model is of a smaller context."""
    return step.now.models[runner.model].context_limit != step.was.models[runner.model].context_limit


@of_step(Launch)
def a_load_that_must_be_alone_is_alone(step: CoreStep, launch: Launch) -> None:
    """While a load is tried again after one ran out of memory, every current runner beside it is pinned."""
    runner, models = step.now.runners[launch.runner], step.now.models
    others = [one for one in step.now.runners.values() if one.current and one is not runner]
    model = step.was.models.get(runner.model)
    if model is not None and model.load_exclusively and models[runner.model].load_exclusively:
        assert all(models[one.model].pinned for one in others), f"{name_of(runner)} is loaded again, and not alone"
    for one in others:
        begun = one.state is LOADING and models[one.model].load_exclusively
        assert not begun, f"{name_of(runner)} is loaded beside {name_of(one)}, which is to be alone"


# -- device claims ----------------------------------------------------------------------------------------------------


@of_step()
def a_device_claim_is_given_back_once(step: CoreStep) -> None:
    """A device claim is kept by a planned launch or a runner until it is given back, and it is given back once."""
    if step.was.claims or step.now.claims or step.now.config.claims:
        made = Counter(command.number for command in step.commands if isinstance(command, Claim))
        ended = Counter(command.number for command in step.commands if isinstance(command, ReleaseClaim))
        left = _open_claims(step.was) + made
        assert left - ended == _open_claims(step.now) and ended <= left, "a claim is lost, or given back twice"


def _open_claims(state: CoreState) -> Counter[int]:
    return Counter([*state.claims, *(runner.claim for runner in state.runners.values() if runner.claim)])


# -- the end ----------------------------------------------------------------------------------------------------------


@of_step()
def a_closed_scheduler_finishes_when_it_is_empty(step: CoreStep) -> None:
    """Finished is returned by the step in which the last runner of a closed scheduler is unloaded, and not before."""
    over = step.now.closing and not step.now.runners
    assert over or not step.after.finished, "finished, but not over"
    due = over and not isinstance(step.event, Tick)
    assert step.after.finished or step.before.finished or not due, "closed and empty, but not finished"


@of_step(Finished)
def a_scheduler_finishes_once(step: CoreStep, _: Finished) -> None:
    """Finished is returned once."""
    assert not step.before.finished
