"""Service guarantees: properties of a transition that users rely on.

They say which request is served first, how long a runner stays, when it leaves as a user asked, and what becomes of
leases and runners that are in the way. Each check works the expected outcome out again, from requests and events alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from fsm.lifecycle.prefetch import spare_bytes
from fsm.machine.request import Purpose, RequestId, RequestState
from fsm.machine.runner import EXPIRING, IDLE, LOADING, READY, Runner, RunnerId
from fsm.messages.commands import Grant, Launch, NotifyContention, Prefetch, Reject
from fsm.messages.events import (
    Acquire,
    Cancel,
    Configure,
    Exited,
    Expire,
    FilesReplaced,
    Loaded,
    OutOfMemory,
    Pin,
    Progress,
    Release,
    Tick,
    Unpin,
)
from fsm.messages.reasons import WaitFor
from fsm.messages.refusals import WouldDeadlockRefusal
from fsm.sizing.footprint import Footprint
from fsm.state.core_config import USE_PER_LOAD
from fsm.state.core_state import CoreState
from fsm.state.memory_ledger import Owner
from fsm.state.model_record import ModelRecord
from fsm.verification.state_invariants import most_leases, name_of
from fsm.verification.step import CoreStep, Expiry, of_step

# -- the queue --------------------------------------------------------------------------------------------------------


@of_step(Acquire)
def no_more_requests_wait_than_may(step: CoreStep, _: Acquire) -> None:
    """A request is queued only while fewer requests wait than the queue may hold."""
    assert step.now.queued <= max(step.now.config.max_queue, step.was.queued)


@of_step(Grant)
def a_runner_is_granted_in_queue_order(step: CoreStep, grant: Grant) -> None:
    """Requests that waited for one runner, or for equal memory, are granted by priority and age, preloads after leases.

    Requests for other memory may overtake: those before them wait behind a request that the same step may refuse.
    """
    granted, own = _granted(step, grant.runner), step.was.requests.get(grant.request)
    waited = [request for id in granted if (request := step.was.requests.get(id)) is not None]
    if grant.runner is None:
        waited = [request for request in waited if own is not None and request.spec == own.spec]
    worth = step.now.config.priority_s
    ranks = [
        (one.spec.purpose is not Purpose.lease, one.queued_at - worth * one.spec.priority, one.id) for one in waited
    ]
    assert ranks == sorted(ranks), f"request {grant.request}"
    served = [(queued_at, id) for preload, queued_at, id in ranks if not preload]
    assert not any(left < served[-1] for left in _still_waiting(step, grant.runner) if served), f"{grant.request} first"


@of_step(Grant)
def a_runner_holds_no_more_leases_than_may(step: CoreStep, grant: Grant) -> None:
    """A runner is granted a lease only while it holds fewer leases than the limit of its model, or of all models."""
    runner = step.now.runners.get(grant.runner) if grant.runner is not None else None
    most = most_leases(step.now, runner) if runner is not None else 0
    if runner is not None and most:
        earlier = step.was.runners.get(runner.id)
        assert len(runner.leases) <= max(most, len(earlier.leases) if earlier is not None else 0), name_of(runner)


@of_step(Expiry)
def a_runner_is_not_evicted_for_a_request_behind_those_that_wait_for_its_lease(step: CoreStep, expiry: Expiry) -> None:
    """A runner that holds all the leases it may is not evicted for a request while an earlier request waits for one.

    An exclusive load may evict it.
    """
    state, runner = step.now, expiry.runner
    waiting = _still_waiting(step, runner.id) if runner.loaded_at is not None else []
    for plan in (step.after.plans or ()) if expiry.victim and waiting else ():
        for spec in [spec for spec, evicted in plan.evicted.items() if runner.id in evicted]:
            model = state.models.get(spec.model)
            heads = [group.head for group in step.was.groups.values() if group.spec == spec]
            for head in heads if model is None or not model.load_exclusively else ():
                own = head.queued_at - state.config.priority_s * spec.priority, head.id
                assert own < min(waiting), f"{name_of(runner)} leaves for request {head.id}"


def _still_waiting(step: CoreStep, id: RunnerId | None) -> list[tuple[float, RequestId]]:
    """Return the ranks of the requests for a lease that a runner served or was to serve, and that wait as before."""
    runner = step.was.runners.get(id) if id is not None else None
    if runner is None or not runner.current:
        return []
    groups = [group for group in step.was.groups_served_by(runner) if group.spec.purpose is Purpose.lease]
    waited = [one for group in groups for one in group.requests.values()]
    left = [one for one in waited if one.id in step.now.requests and step.now.requests[one.id].runner is None]
    worth = step.now.config.priority_s
    return [(one.queued_at - worth * one.spec.priority, one.id) for one in left]


@of_step(Launch)
def a_load_begins_under_claims_of_all_its_devices(step: CoreStep, launch: Launch) -> None:
    """A load begins when all its devices are claimed for it, or when the wait for that is over."""
    if step.now.config.claims:
        runner = step.now.runners[launch.runner]
        devices = {device for device, amount in runner.placement.bytes if amount}
        claimed = step.was.claims[runner.claim].devices if runner.claim else frozenset()
        over = isinstance(step.event, Tick) and any(one.by <= step.now.now for one in step.was.claims.values())
        assert devices <= claimed or over, name_of(runner)


@of_step(Acquire)
def a_request_that_does_not_wait_is_planned_at_once(step: CoreStep, event: Acquire) -> None:
    """A request whose time limit is 0 is planned in its own step, so that it has what is there."""
    request = step.now.requests.get(event.request)
    if event.timeout_s == 0.0 and request is not None and request.state is RequestState.queued:
        assert step.now.groups[request.spec].waits_for is not WaitFor.plan, f"request {request.id}"


@of_step(Release, Cancel)
def a_lease_that_is_given_back_is_not_held(step: CoreStep, event: Release | Cancel) -> None:
    """A lease that is released or cancelled is not held any more; a release of a request that is queued is late."""
    request = step.was.requests.get(event.request)
    late = isinstance(event, Release) and request is not None and request.state is RequestState.queued
    assert late or event.request not in step.now.requests, f"lease {event.request}"


@of_step(Reject)
def only_a_request_that_its_own_caller_blocks_is_refused_as_a_deadlock(step: CoreStep, reject: Reject) -> None:
    """A request is refused as a deadlock only where its caller keeps leases beside which there is no room for it.

    The check covers models that have declared their bytes.
    """
    if isinstance(reject.refusal, WouldDeadlockRefusal):
        event = step.event
        acquired = isinstance(event, Acquire) and event.request == reject.request
        keeps = event.keeps if acquired else step.was.requests[reject.request].keeps  # type: ignore[union-attr]  # it is
        model = step.now.models[reject.refusal.model]
        assert _blocked(step.now, model, set(keeps)) or not model.declared, f"request {reject.request}"


@of_step()
def no_request_waits_for_its_own_caller(step: CoreStep) -> None:
    """No request waits while its caller keeps leases beside which there is no room for it, once its model is known.

    The check covers models that have declared their bytes.
    """
    for group in step.now.groups.values():
        model = step.now.models.get(group.spec.model)
        if model is not None and model.declared and model.inspected_since_launch and not model.current:
            for request in group.requests.values():
                assert not _blocked(step.now, model, set(request.keeps)), f"request {request.id}"


def _blocked(state: CoreState, model: ModelRecord, kept: set[RequestId]) -> bool:
    """Tell whether the runners with leases in `kept` leave no room for a model of declared bytes, or no lease on it."""
    staying = [runner for runner in state.runners.values() if runner.leases & kept]
    needs = model.profile.fixed if isinstance(model.profile, Footprint) else ()
    if model.current is not None:
        return model.current in staying
    held = {id: sum(state.ledger.accounts["runner", one.id].held_bytes(id) for one in staying) for id, _ in needs}
    capacity = {id: sample.capacity_bytes for id, sample in state.ledger.devices.items()}
    lacks = any(capacity.get(id, 0) >= size > capacity.get(id, 0) - held[id] for id, size in needs)
    return lacks or 0 < state.config.max_runners <= len(staying)


# -- how long runners stay --------------------------------------------------------------------------------------------


@of_step()
def a_runner_has_the_keep_alive_that_was_named_last(step: CoreStep) -> None:
    """The keep-alive of a runner is the one that the last granted request named, else the one it had, else the default.

    A runner that no request has named a keep-alive for follows a changed default.
    """
    said = step.event.keep_alive_s if isinstance(step.event, Configure) else None
    for runner in step.now.runners.values():
        if not runner.current:
            continue
        earlier = step.was.runners.get(runner.id)
        named = [_named(step, request) for request in _granted(step, runner.id)]
        last = next((keep_alive_s for keep_alive_s in reversed(named) if keep_alive_s is not None), None)
        if last is not None:
            expected = {last}
        elif earlier is None:
            queued = [
                request for group in step.now.groups_of_model(runner.model) for request in group.requests.values()
            ]
            names = [request.keep_alive_s for request in queued]
            expected = {step.now.config.keep_alive_s if name is None else name for name in names}
        else:
            expected = {said if said is not None and earlier.uses_default_keep_alive else earlier.keep_alive_s}
        assert runner.keep_alive_s in expected, name_of(runner)


@of_step(Release, Cancel)
def a_runner_without_a_keep_alive_does_not_rest(step: CoreStep, _: Release | Cancel) -> None:
    """A runner whose keep-alive is 0, and whose model is not pinned, does not become idle when its last lease ends."""
    for runner in _idle(step.now):
        earlier = step.was.runners.get(runner.id)
        if earlier is not None and earlier.state is READY:
            assert step.now.models[runner.model].pinned or runner.keep_alive_s > 0, name_of(runner)


@of_step()
def an_idle_runner_rests_for_its_keep_alive_after_its_last_use(step: CoreStep) -> None:
    """The keep-alive clock of an idle runner starts at its last use, at a pin or its end, and at nothing else."""
    event = step.event
    for runner in _idle(step.now):
        if step.now.models[runner.model].pinned:
            continue
        earlier, expires_at = step.was.runners.get(runner.id), step.now.timers.at(("keep-alive", runner.id))
        pins = isinstance(event, Pin | Unpin) and event.model == runner.model
        if earlier is None or earlier.state is not IDLE or pins or _granted(step, runner.id):
            assert expires_at == step.now.now + runner.keep_alive_s, f"{name_of(runner)}: not for as long as was named"
        elif not isinstance(event, Configure) or event.keep_alive_s is None:
            same = expires_at == step.was.timers.at(("keep-alive", runner.id))
            assert same, f"{name_of(runner)} rests anew, and was not used"


def _idle(state: CoreState) -> Iterator[Runner]:
    return (runner for runner in state.runners.values() if runner.state is IDLE)


def _granted(step: CoreStep, runner: RunnerId | None) -> list[RequestId]:
    """Return the requests that a step grants a runner, or memory where there is none, in order."""
    return [one.request for one in step.commands if isinstance(one, Grant) and one.runner == runner]


def _named(step: CoreStep, id: RequestId) -> float | None:
    """Return the keep-alive that a request named."""
    if isinstance(step.event, Acquire) and step.event.request == id:
        return step.event.keep_alive_s
    return step.was.requests[id].keep_alive_s


def _has_just_loaded(step: CoreStep, id: RunnerId) -> Runner | None:
    """Return a runner that the step found loading and has left loaded, as it is now."""
    earlier, runner = step.was.runners.get(id), step.now.runners.get(id)
    if earlier is None or earlier.state is not LOADING or runner is None or not runner.current:
        return None
    return runner


@of_step(Loaded)
def a_model_that_was_expired_while_it_loaded_leaves_once_it_has_served(step: CoreStep, loaded: Loaded) -> None:
    """A runner whose model was expired while it loaded serves the requests that waited for it, and then expires."""
    runner = _has_just_loaded(step, loaded.runner)
    assert runner is None or not step.was.runners[runner.id].expire_when_served, f"runner {loaded.runner}"


@of_step(Loaded)
def the_residency_of_a_runner_is_limited(step: CoreStep, loaded: Loaded) -> None:
    """A runner keeps its place for a limited time: as configured, else as its load took, and no wait is longer."""
    if (runner := _has_just_loaded(step, loaded.runner)) is not None:
        limits, load_s = step.now.config, step.now.now - runner.launched_at
        for until, most_s in ((runner.resident_until, load_s), (runner.drain_protected_until, USE_PER_LOAD * load_s)):
            most_s = min(most_s, limits.max_wait_s) if limits.min_residency_s is None else limits.min_residency_s
            assert until <= step.now.now + most_s, name_of(runner)


@of_step(Expire)
def a_model_that_is_expired_leaves(step: CoreStep, expire: Expire) -> None:
    """The runner of an expired model expires, at once or after it has served the requests that it loads for."""
    for earlier in step.was.runners.values():
        runner = step.now.runners.get(earlier.id)
        if earlier.current and earlier.model == expire.model and runner is not None and runner.current:
            assert runner.state is LOADING and runner.expire_when_served, name_of(runner)


@of_step()
def a_runner_of_replaced_files_leaves_at_rest(step: CoreStep) -> None:
    """A runner whose model's files were replaced expires if it is idle, and as soon as it would be idle."""
    for earlier in step.was.runners.values():
        told = isinstance(step.event, FilesReplaced) and step.event.runner == earlier.id
        runner = step.now.runners.get(earlier.id)
        if (told or earlier.files_replaced) and runner is not None and runner.current:
            assert runner.files_replaced and runner.state is not IDLE, name_of(runner)


@of_step(OutOfMemory, Exited)
def every_runner_expires_when_memory_runs_out(step: CoreStep, event: OutOfMemory | Exited) -> None:
    """When memory runs out while a runner serves, every runner expires: any runner may have taken it."""
    cause = step.was.runners.get(event.runner)
    if cause is None or not cause.process or cause.loaded_at is None:
        return
    if isinstance(event, OutOfMemory) or event.out_of_memory:
        for earlier in step.was.runners.values():
            runner = step.now.runners.get(earlier.id)
            assert runner is None or not runner.current, f"{name_of(earlier)} stays"


@of_step(Progress)
def a_load_that_shows_progress_is_given_more_time(step: CoreStep, progress: Progress) -> None:
    """The time-out of a load starts again whenever the load shows progress."""
    earlier = step.was.runners.get(progress.runner)
    if earlier is not None and earlier.state is LOADING:
        due_at = step.now.timers.at(("load", progress.runner))
        assert due_at == step.now.now + step.now.config.load_timeout_s, name_of(earlier)


@of_step(Reject)
def a_load_that_no_request_waits_for_goes_on_only_if_it_is_kept(step: CoreStep, reject: Reject) -> None:
    """A load goes on after the last request for it has left only if its runner would be kept after the load."""
    request = step.was.requests.get(reject.request) if isinstance(step.event, Cancel | Tick) else None
    model = step.now.models.get(request.spec.model) if request is not None else None
    if request is None or model is None or model.current is None or model.pinned:
        return
    runner, waited_for = model.current, model.id in step.now.specs_by_model
    if runner.state is LOADING and runner.id in step.was.runners and request.spec.options in runner.equivalent_requests:
        kept = runner.keep_alive_s > 0 and request.keep_alive_s != 0
        assert kept or waited_for, name_of(runner)


# -- contention -------------------------------------------------------------------------------------------------------


@of_step(NotifyContention)
def a_holder_is_told_once_that_others_wait(step: CoreStep, notice: NotifyContention) -> None:
    """The holder of a lease is told once that other requests wait for the memory of its runner."""
    said = [request for one in step.commands if isinstance(one, NotifyContention) for request in one.requests]
    for lease in notice.requests:
        again = lease in step.was.requests and step.was.requests[lease].asked
        assert said.count(lease) == 1 and not again, f"lease {lease}"


@of_step(Expiry)
def the_holders_of_a_victim_are_told_that_others_wait(step: CoreStep, expiry: Expiry) -> None:
    """Every holder of a lease on a runner that is evicted in use is told that other requests wait, then or before."""
    runner = step.now.runners.get(expiry.runner.id)
    if expiry.victim and runner is not None and runner.leases:
        said = {request for one in step.commands if isinstance(one, NotifyContention) for request in one.requests}
        for lease in runner.leases:
            assert lease in said or step.was.requests[lease].asked, f"lease {lease} on {name_of(runner)}"


@of_step()
def no_runner_rests_while_more_live_than_may(step: CoreStep) -> None:
    """No runner is idle while more processes live than the limit that is set, but for runners of pinned models.

    Where a plan is due, that plan sees to it.
    """
    now = step.now
    if now.config.max_runners and not now.plan_due:
        alive = sum(runner.process and runner.state is not EXPIRING for runner in now.runners.values())
        assert alive <= now.config.max_runners or not _resting(now), f"{alive} live"


@of_step()
def no_runner_rests_on_a_device_that_has_shrunk_below_what_is_held(step: CoreStep) -> None:
    """No runner is idle on a device that has less memory than is held of it, but for runners of pinned models.

    The memory of expiring runners counts only after their stop deadlines, once the core has planned since. Where a plan
    is due, that plan sees to it.
    """
    now, ledger = step.now, step.now.ledger
    if ledger.overcommitted and not now.plan_due:
        planned = not now.closing and step.after.deadline() > now.now
        expiring = [runner for runner in now.runners.values() if runner.state is EXPIRING]
        gone: set[Owner] = {("runner", one.id) for one in expiring if now.now < one.stop_deadline or not planned}
        for device in ledger.overcommitted & ledger.devices.keys():
            staying = [one.held_bytes(device) for owner, one in ledger.accounts.items() if owner not in gone]
            if sum(staying) > ledger.devices[device].capacity_bytes:
                held = [one for one in _resting(now) if ledger.accounts["runner", one.id].held_bytes(device)]
                assert not held, f"{name_of(held[0])} on {device}"


def _resting(state: CoreState) -> list[Runner]:
    return [runner for runner in _idle(state) if not state.models[runner.model].pinned]


# -- files that are read ahead -----------------------------------------------------------------------------------------


@of_step()
def what_is_read_ahead_is_told_when_it_changes(step: CoreStep) -> None:
    """The files that are to be read ahead are told in the step in which they change, and in no other."""
    before, now = step.was.prefetching, step.now.prefetching
    if before or now:
        said = [command.files for command in step.commands if isinstance(command, Prefetch)]
        assert said == ([now] if now != before else [])


@of_step(Prefetch)
def files_are_read_ahead_into_spare_memory_alone(step: CoreStep, prefetch: Prefetch) -> None:
    """No more bytes are read ahead than the host has to spare, and no more than half of them to begin with."""
    before, spare = dict(step.was.prefetching), spare_bytes(step.now.ledger)
    assert sum(size for _, size in prefetch.files) <= spare, "more than the host has to spare"
    begun = sum(size for model, size in prefetch.files if model not in before)
    assert begun <= spare // 2, "more than half to begin with"


@of_step(Prefetch)
def what_is_read_ahead_of_a_file_only_falls(step: CoreStep, prefetch: Prefetch) -> None:
    """The number of bytes to be read ahead of a file never rises while requests wait for its model."""
    before = dict(step.was.prefetching)
    for model, size in prefetch.files:
        assert 0 <= size <= before.get(model, size), model
