"""Properties of a whole trace: of all events and commands since a core was made, as `trace_state` keeps them.

A property that has a check of a state or of a transition as well has another check here, by other evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fsm.domain.devices import HOST
from fsm.machine.request import Purpose
from fsm.machine.runner import EXPIRING, LOADING, READY, UNLOADED
from fsm.messages.commands import (
    Claim,
    Command,
    Finished,
    Grant,
    Inspect,
    Launch,
    NotifyContention,
    PersistMeasurement,
    Prefetch,
    Reject,
    ReleaseClaim,
    RevokeLease,
    Sample,
    Stop,
)
from fsm.messages.decision_log import Entry, Transition
from fsm.messages.events import (
    Acquire,
    Cancel,
    Close,
    Event,
    Exited,
    Expire,
    Inspected,
    Loaded,
    OutOfMemory,
    Tick,
    Unresponsive,
)
from fsm.messages.reasons import DeviceShrunk, NeededFor, RunnerLimit, RunnerReason
from fsm.messages.refusals import (
    Cancelled,
    DeadlineInfeasible,
    LoadFailedRefusal,
    QueueFullRefusal,
    SchedulerClosed,
    TimedOut,
)
from fsm.planning.failed_loads import FORGOTTEN_AFTER_S
from fsm.state.core_config import CoreConfig
from fsm.verification.property import Checks, Kind
from fsm.verification.service_guarantees import (
    a_holder_is_told_once_that_others_wait,
    a_load_begins_under_claims_of_all_its_devices,
    a_model_that_is_expired_leaves,
    every_runner_expires_when_memory_runs_out,
    no_more_requests_wait_than_may,
    the_holders_of_a_victim_are_told_that_others_wait,
    what_is_read_ahead_is_told_when_it_changes,
    what_is_read_ahead_of_a_file_only_falls,
)
from fsm.verification.state_invariants import (
    a_busy_runner_is_never_stopped,
    only_files_of_models_that_are_waited_for_are_read_ahead,
)
from fsm.verification.trace_state import TraceState, load_of
from fsm.verification.transition_invariants import (
    a_cancelled_request_is_answered,
    a_closed_scheduler_finishes_when_it_is_empty,
    a_device_claim_is_given_back_once,
    a_grant_is_of_a_runner_that_serves,
    a_lease_is_taken_back_only_from_a_runner_that_is_lost,
    a_runner_id_is_never_used_again,
    a_runner_is_stopped_once,
    a_scheduler_finishes_once,
    an_expiring_runner_is_never_granted,
    every_request_is_answered_once,
    no_request_waits_beyond_its_time_out,
    no_runner_is_launched_after_the_close,
    prompts_are_saved_of_runners_that_had_to_leave,
)

of_trace = Checks[TraceState](Kind.trace, "simulation", "core tests")
of_bounded_trace = Checks[TraceState](Kind.trace, "simulation")  # where a limit on the wait of requests is known


class TraceAuditor:
    """Is told every step, and raises Violated where a property of a trace does not hold."""

    def __init__(self, longest_wait_s: float = math.inf, limits: CoreConfig | None = None) -> None:
        self.trace = TraceState(longest_wait_s, limits)

    def step(
        self, now: float, event: Event, commands: Sequence[Command], entries: Sequence[Entry], queued: int
    ) -> None:
        """Take in one step: the event, the commands, the log entries, and how many requests the core counts."""
        trace = self.trace
        trace.learn_event(now, event)
        trace.queued = queued
        for entry in entries:
            if isinstance(entry, Transition):
                of_trace.ask_of(trace, entry)
                trace.learn_transition(entry)
        for command in commands:
            of_trace.ask_of(trace, command)
            trace.learn_command(command)
        of_trace.ask(trace)
        of_trace.ask_of(trace, event)
        if trace.longest_wait_s < math.inf:
            of_bounded_trace.ask(trace)


# -- requests ---------------------------------------------------------------------------------------------------------


@of_trace(Grant, Reject, same_as=every_request_is_answered_once)
def _answered_once(trace: TraceState, answer: Grant | Reject) -> None:
    assert answer.request in trace.waiting, f"request {answer.request} is answered twice, or never asked"


@of_trace(same_as=every_request_is_answered_once)
def _not_lost(trace: TraceState) -> None:
    assert len(trace.waiting) == trace.queued, "a request is lost, or answered in silence"


@of_trace(Cancel, same_as=a_cancelled_request_is_answered)
def _cancelled(trace: TraceState, cancel: Cancel) -> None:
    assert cancel.request not in trace.waiting, f"request {cancel.request}"


@of_trace(Tick, same_as=no_request_waits_beyond_its_time_out)
def _timed_out(trace: TraceState, _: Tick) -> None:
    if trace.due:
        late = [id for id, due in trace.due.items() if due <= trace.now]
        assert not late, f"request {late[0]}"


@of_trace(same_as=no_more_requests_wait_than_may)
def _no_more_wait(trace: TraceState) -> None:
    assert len(trace.waiting) <= trace.most, f"{len(trace.waiting)}"


@of_bounded_trace()
def no_request_waits_for_longer_than_it_can_take(trace: TraceState) -> None:
    """No request waits for longer than all waits, loads and ends that may come before its turn take together."""
    if trace.waiting:
        id, (_, since) = next(iter(trace.waiting.items()))
        assert trace.now - since <= trace.longest_wait_s, f"request {id} has waited for {trace.now - since:g} s"


@of_trace(Grant)
def no_request_is_granted_after_the_close(trace: TraceState, grant: Grant) -> None:
    """No request is granted once the scheduler is closing."""
    assert not trace.closing, f"request {grant.request}"


@of_trace(Grant)
def a_request_is_granted_what_it_asks_for(trace: TraceState, grant: Grant) -> None:
    """A request for a model is granted a live runner of that model, and a request for memory no runner."""
    spec, _ = trace.waiting[grant.request]
    if spec.purpose is Purpose.memory:
        assert grant.runner is None, f"request {grant.request} wants memory, and is granted a runner"
    else:
        same = grant.runner is not None and trace.alive.get(grant.runner) == spec.model
        assert same, f"request {grant.request}: not a runner of its model"


@of_trace(Grant, same_as=a_grant_is_of_a_runner_that_serves)
def _serves(trace: TraceState, grant: Grant) -> None:
    assert grant.runner is None or grant.runner in trace.serving, f"request {grant.request}"


@of_trace(Grant, same_as=an_expiring_runner_is_never_granted)
def _not_expiring(trace: TraceState, grant: Grant) -> None:
    going = grant.runner in trace.left_before or grant.runner in trace.stopped
    assert not going, f"runner {grant.runner} is granted to request {grant.request}"


# -- refusals ---------------------------------------------------------------------------------------------------------


@of_trace(Reject)
def a_request_times_out_when_its_time_is_over(trace: TraceState, reject: Reject) -> None:
    """A request is refused as timed out only when its time-out is over."""
    if isinstance(reject.refusal, TimedOut):
        assert trace.due.get(reject.request, math.inf) <= trace.now, f"request {reject.request}"


@of_trace(Reject)
def a_hopeless_time_out_is_told_at_once(trace: TraceState, reject: Reject) -> None:
    """A request whose time-out cannot be met is refused when it comes or its model was inspected, and only then."""
    if isinstance(reject.refusal, DeadlineInfeasible):
        at_once = isinstance(trace.event, Acquire | Inspected)
        assert at_once, f"request {reject.request} is told late"
        due = trace.due.get(reject.request, math.inf)
        assert trace.now + reject.refusal.least_s > due, f"request {reject.request} is refused, although there is time"


@of_trace(Reject)
def a_refusal_tells_its_true_cause(trace: TraceState, reject: Reject) -> None:
    """A request is refused as cancelled, closed or beyond the queue's limit only where that has just happened to it."""
    event = trace.event
    match reject.refusal:
        case Cancelled():
            assert isinstance(event, Cancel) and event.request == reject.request, "the request was not cancelled"
        case SchedulerClosed():
            assert trace.closing, "the scheduler is open"
        case QueueFullRefusal():
            assert isinstance(event, Acquire) and event.request == reject.request, "the request had its place"
        case _:
            pass


@of_trace(Reject)
def back_off_is_limited(trace: TraceState, reject: Reject) -> None:
    """No request is told to try again later than after the longest back-off."""
    if isinstance(reject.refusal, LoadFailedRefusal):
        assert reject.refusal.retry_after_s <= trace.limits.back_off_limit_s + 1e-6, f"request {reject.request}"


# -- leases -----------------------------------------------------------------------------------------------------------


@of_trace(RevokeLease, same_as=a_lease_is_taken_back_only_from_a_runner_that_is_lost)
def _taken_back(trace: TraceState, revoke: RevokeLease) -> None:
    runner, event = trace.held.get(revoke.request), trace.event
    assert runner is not None, f"lease {revoke.request} is not held"
    lost = isinstance(event, Exited | Unresponsive) and event.runner == runner
    assert lost or (trace.closing and isinstance(event, Tick)), f"lease {revoke.request} on runner {runner}"


@of_trace(NotifyContention)
def only_holders_are_told_that_others_wait(trace: TraceState, notice: NotifyContention) -> None:
    """Only a request that holds a lease on a runner is told that other requests wait for its memory."""
    for request in notice.requests:
        assert trace.held.get(request) == notice.runner, f"request {request} holds nothing of runner {notice.runner}"


@of_trace(NotifyContention, same_as=a_holder_is_told_once_that_others_wait)
def _told_once(trace: TraceState, notice: NotifyContention) -> None:
    assert trace.asked.isdisjoint(notice.requests), f"runner {notice.runner}"


@of_trace(same_as=the_holders_of_a_victim_are_told_that_others_wait)
def _victims_were_told(trace: TraceState) -> None:
    for entry in trace.transitions:
        if isinstance(trace.event, Expire | OutOfMemory | Exited | Loaded | Close):
            return  # there are other reasons too
        if entry.source is READY and entry.trigger == "expire":
            leases = [id for id, runner in trace.held.items() if runner == entry.runner]
            assert trace.asked.issuperset(leases), f"runner {entry.runner}"


# -- runners ----------------------------------------------------------------------------------------------------------


@of_trace(Transition)
def a_model_has_one_current_runner(trace: TraceState, entry: Transition) -> None:
    """A model has no more than one runner that is loading, ready or idle."""
    assert entry.source is not None or entry.model not in trace.current, f"{entry.model} has two runners"


@of_trace(Transition)
def a_runner_expires_once(trace: TraceState, entry: Transition) -> None:
    """A runner that is expiring does not expire again."""
    if entry.destination is EXPIRING:
        assert entry.runner not in trace.leaving, f"runner {entry.runner}"
        assert trace.current.get(entry.model) == entry.runner, f"runner {entry.runner} was not current"


@of_trace(Transition)
def a_runner_is_unloaded_after_its_process_has_gone(trace: TraceState, entry: Transition) -> None:
    """A runner is unloaded only after the exit of its process was reported."""
    assert entry.destination is not UNLOADED or entry.runner not in trace.alive, f"runner {entry.runner}"


@of_trace(Transition)
def a_busy_runner_is_never_unloaded(trace: TraceState, entry: Transition) -> None:
    """A runner that holds a lease is not unloaded."""
    assert entry.destination is not UNLOADED or not trace.users[entry.runner], f"runner {entry.runner}"


@of_trace(Transition)
def a_load_times_out_only_without_progress(trace: TraceState, entry: Transition) -> None:
    """A load is given up by its time-out only after it has shown no progress for that long."""
    if entry.trigger == "crash" and entry.source is LOADING and isinstance(trace.event, Tick):
        assert trace.now >= trace.shown_at[entry.runner] + trace.limits.load_timeout_s, f"runner {entry.runner}"


@of_trace(Launch, same_as=a_runner_id_is_never_used_again)
def _new_id(trace: TraceState, launch: Launch) -> None:
    assert launch.runner > trace.runners, f"runner {launch.runner}"


@of_trace(Launch, same_as=no_runner_is_launched_after_the_close)
def _launched_while_open(trace: TraceState, launch: Launch) -> None:
    assert not trace.closing, f"runner {launch.runner}"


@of_trace(Launch)
def a_failed_model_is_not_loaded_before_its_back_off_is_over(trace: TraceState, launch: Launch) -> None:
    """After a failure a model is not loaded for the back-off, which doubles with each failure in a row, to a limit.

    A failed load counts for the options that it had, and a crash whatever a request names.
    """
    for load in (load_of(launch), (launch.model, None)):
        assert trace.blocked.get(load, trace.now) <= trace.now, launch.model


@of_trace(Launch, ids=("N07",))
def a_load_after_one_that_ran_out_of_memory_takes_less(trace: TraceState, launch: Launch) -> None:
    """After a load ran out of memory, the next one of the model takes less of each GPU that the first had layers on.

    Not where a request says itself where the layers go, and not for ever.
    """
    at, before = trace.ran_out.get(launch.model, (-math.inf, ()))
    named = (launch.options.num_gpu or -1) >= 0 or trace.limits.require_gpu
    required = any(spec.options.require_gpu for spec, _ in trace.waiting.values() if spec.model == launch.model)
    if named or required or trace.now - at >= FORGOTTEN_AFTER_S:
        return
    most = {device: amount for device, amount in before if device != HOST and amount}
    for device, amount in launch.placement.bytes:
        assert amount < most.get(device, math.inf), f"runner {launch.runner}: {amount} bytes of {device}"


@of_trace(Launch, same_as=a_load_begins_under_claims_of_all_its_devices)
def _has_its_devices(trace: TraceState, launch: Launch) -> None:
    if trace.limits.claims and any(amount for _, amount in launch.placement.bytes):
        assert trace.claim_for(launch) is not None, f"runner {launch.runner}"


@of_trace(Stop)
def only_a_live_process_of_an_expiring_runner_is_stopped(trace: TraceState, stop: Stop) -> None:
    """A runner is told to stop only while it is expiring and its process lives."""
    assert stop.runner in trace.alive, f"runner {stop.runner}: its process has gone"
    assert stop.runner in trace.leaving, f"runner {stop.runner} is not expiring"


@of_trace(Stop, same_as=a_runner_is_stopped_once)
def _stopped_once(trace: TraceState, stop: Stop) -> None:
    assert stop.runner not in trace.stopped, f"runner {stop.runner}"


@of_trace(Stop, same_as=prompts_are_saved_of_runners_that_had_to_leave)
def _saved(trace: TraceState, stop: Stop) -> None:
    why = trace.left_for.get(stop.runner)
    had_to = isinstance(why, NeededFor | RunnerLimit | DeviceShrunk) or why in (
        RunnerReason.keep_alive_over,
        RunnerReason.better_place,
    )
    served = trace.limits.keeps_prompts and stop.runner in trace.loaded_at
    assert not stop.keep_prompts or (had_to and served and not trace.closing), f"runner {stop.runner}: {why}"


@of_trace(Stop, same_as=a_busy_runner_is_never_stopped)
def _stopped_in_use(trace: TraceState, stop: Stop) -> None:
    assert not trace.users[stop.runner], f"runner {stop.runner}"


@of_trace(OutOfMemory, Exited, same_as=every_runner_expires_when_memory_runs_out)
def _all_expire(trace: TraceState, _: OutOfMemory | Exited) -> None:
    stay = trace.to_expire.intersection(trace.current.values())
    assert not stay, f"runner {min(stay)} stays"


@of_trace(same_as=a_model_that_is_expired_leaves)
def _expired_models_leave(trace: TraceState) -> None:
    if trace.unwanted:
        stay = (trace.unwanted - trace.leaving) & trace.serving
        assert not stay, f"runner {min(stay)} stays"


# -- devices, files and figures ---------------------------------------------------------------------------------------


@of_trace(Sample)
def the_number_of_a_reading_is_never_used_again(trace: TraceState, sample: Sample) -> None:
    """The number of a reading of the devices is higher than that of every reading before it."""
    assert sample.number > trace.samples, f"reading {sample.number}"


@of_trace(Claim)
def device_claims_are_numbered_in_order(trace: TraceState, claim: Claim) -> None:
    """Device claims are numbered one after the other."""
    assert claim.number == trace.claims + 1, f"claim {claim.number}"


@of_trace(Inspect)
def a_model_is_inspected_once_at_a_time(trace: TraceState, inspect: Inspect) -> None:
    """A model is not inspected again before its inspection has ended."""
    assert inspect.model not in trace.inspecting, inspect.model


@of_trace(Claim)
def devices_are_claimed_only_where_that_is_on(trace: TraceState, claim: Claim) -> None:
    """No device is claimed where the limits say that loads claim none."""
    assert trace.limits.claims, f"claim {claim.number}"


@of_trace(ReleaseClaim, same_as=a_device_claim_is_given_back_once)
def _given_back_once(trace: TraceState, release: ReleaseClaim) -> None:
    assert release.number in trace.open, f"claim {release.number}"


@of_trace(Prefetch, same_as=what_is_read_ahead_is_told_when_it_changes)
def _told_when_it_changes(trace: TraceState, prefetch: Prefetch) -> None:
    assert list(dict(prefetch.files).items()) != list(trace.ahead.items()), "the same is said again"


@of_trace(Prefetch, same_as=what_is_read_ahead_of_a_file_only_falls)
def _only_falls(trace: TraceState, prefetch: Prefetch) -> None:
    for model, size in prefetch.files:
        assert size <= trace.ahead.get(model, size), model


@of_trace(Prefetch)
def no_file_of_a_loaded_model_is_read_ahead(trace: TraceState, prefetch: Prefetch) -> None:
    """A file is not read ahead while its model has a runner that is loading, ready or idle."""
    for model, _ in prefetch.files:
        assert model not in trace.current, model


@of_trace(same_as=only_files_of_models_that_are_waited_for_are_read_ahead)
def _read_ahead_for_a_request(trace: TraceState) -> None:
    due = trace.limits.plans_later and not isinstance(trace.event, Tick)  # a plan may be
    if trace.ahead and not due:
        assert {spec.model for spec, _ in trace.waiting.values()}.issuperset(trace.ahead)


@of_trace(PersistMeasurement)
def what_is_persisted_was_measured(trace: TraceState, measurement: PersistMeasurement) -> None:
    """A measurement that is persisted has the memory that the runner took, or the time of its load."""
    assert measurement.took or measurement.load_s is not None, f"runner {measurement.runner}"


@of_trace(Finished, same_as=a_closed_scheduler_finishes_when_it_is_empty)
def _over(trace: TraceState, _: Finished) -> None:
    assert trace.closing and not trace.alive and not trace.leaving, "finished too early"


@of_trace(Finished, same_as=a_scheduler_finishes_once)
def _finished_once(trace: TraceState, _: Finished) -> None:
    assert not trace.finished
