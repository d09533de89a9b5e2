"""Properties of a state of the core, between any two steps."""

from __future__ import annotations

import math

from fsm.core import Core
from fsm.domain.options import SLOTS
from fsm.machine.request import Purpose, Request, RequestId, RequestState
from fsm.machine.runner import EXPIRING, IDLE, LOADING, READY, RUNNING, STOPPING, UNLOADED, Runner
from fsm.state.core_state import CoreState
from fsm.verification.property import Checks, Kind

of_state = Checks[CoreState](Kind.state, "search", "simulation", "core tests", "API tests")


def check_state(core: Core) -> None:
    """Raise Violated where a property of a state does not hold."""
    of_state.ask(core._state)


def name_of(runner: Runner) -> str:
    """Return a runner as a violation names it."""
    return f"runner {runner.id} of {runner.model}"


# -- runners ----------------------------------------------------------------------------------------------------------


@of_state()
def an_unloaded_runner_is_forgotten(state: CoreState) -> None:
    """A runner that is unloaded is no longer among the runners."""
    for runner in state.runners.values():
        assert runner.state is not UNLOADED, name_of(runner)


@of_state(ids=("D04",))
def a_ready_runner_holds_a_lease(state: CoreState) -> None:
    """A runner is ready only while it holds at least one lease."""
    for runner in state.runners.values():
        assert runner.state is not READY or runner.leases, name_of(runner)


@of_state()
def only_ready_and_expiring_runners_hold_leases(state: CoreState) -> None:
    """A runner that is loading, idle or unloaded holds no lease."""
    for runner in state.runners.values():
        assert not runner.leases or runner.state in (READY, EXPIRING), name_of(runner)


@of_state(ids=("D08",))
def a_model_names_its_current_runner(state: CoreState) -> None:
    """A runner is loading, ready or idle if and only if its model names it as its current runner."""
    for runner in state.runners.values():
        assert runner.current == (state.models[runner.model].current is runner), name_of(runner)


@of_state()
def only_an_expiring_runner_without_leases_is_without_a_process(state: CoreState) -> None:
    """A runner whose process has gone is expiring and holds no lease."""
    for runner in state.runners.values():
        assert runner.process or (runner.state is EXPIRING and not runner.leases), name_of(runner)


@of_state()
def a_runner_keeps_the_default_keep_alive_until_a_request_names_one(state: CoreState) -> None:
    """The keep-alive of a runner is the default until a request has named another."""
    for runner in state.runners.values():
        assert not runner.uses_default_keep_alive or runner.keep_alive_s == state.config.keep_alive_s, name_of(runner)


@of_state()
def a_busy_runner_is_never_stopped(state: CoreState) -> None:
    """A runner that holds a lease has not been told to stop."""
    for runner in state.runners.values():
        assert not (runner.leases and runner.process_state is STOPPING), name_of(runner)


@of_state()
def an_expiring_runner_without_leases_is_stopped(state: CoreState) -> None:
    """An expiring runner whose process lives holds a lease or has been told to stop."""
    for runner in state.runners.values():
        lingers = runner.process_state is RUNNING and runner.state is EXPIRING and not runner.leases
        assert not lingers, name_of(runner)


@of_state()
def a_lease_is_on_the_runner_that_it_names(state: CoreState) -> None:
    """A lease is held by the runner that its request was granted."""
    for runner in state.runners.values():
        for lease in runner.leases:
            assert state.requests[lease].runner == runner.id, f"lease {lease} on {name_of(runner)}"


@of_state()
def a_measured_runner_reserves_no_more_than_it_was_measured_to_take(state: CoreState) -> None:
    """Once a full context was measured, a runner reserves no more than its measured peak and its expected growth."""
    for runner in state.runners.values():
        account = state.ledger.accounts["runner", runner.id]
        for device, promised in account.reserved.items() if account.peak_observed else ():
            most = account.peak.get(device, promised) + account.expected_growth.get(device, 0)
            assert promised <= most, f"{name_of(runner)} on {device}"


@of_state()
def a_runner_is_measured_after_it_has_loaded(state: CoreState) -> None:
    """The reservation of a runner is set by measurement only after the runner has loaded."""
    for runner in state.runners.values():
        assert not state.ledger.accounts["runner", runner.id].peak_observed or runner.loaded_at is not None, name_of(
            runner
        )


@of_state(ids=("D03",))
def the_keep_alive_clock_runs_while_a_runner_is_idle(state: CoreState) -> None:
    """The keep-alive clock runs if and only if the runner is idle, its keep-alive finite and its model not pinned."""
    for runner in state.runners.values():
        timed = runner.state is IDLE and runner.keep_alive_s < math.inf and not state.models[runner.model].pinned
        assert timed == (state.timers.at(("keep-alive", runner.id)) < math.inf), name_of(runner)


@of_state()
def the_load_clock_runs_while_a_runner_loads(state: CoreState) -> None:
    """The time-out of a load runs if and only if the runner is loading."""
    for runner in state.runners.values():
        assert (runner.state is LOADING) == (state.timers.at(("load", runner.id)) < math.inf), name_of(runner)


@of_state()
def live_processes_are_counted(state: CoreState) -> None:
    """The count of live processes is the number of runners that have one."""
    alive = 0
    for runner in state.runners.values():
        alive += runner.process
    assert alive == state.processes, f"{state.processes} instead of {alive}"


@of_state()
def working_runners_are_counted(state: CoreState) -> None:
    """The count of runners at work on the host's cores is the number of ready runners that compute there."""
    working = 0
    for runner in state.runners.values():
        working += runner.state is READY and runner.on_host
    assert working == state.busy_on_host <= state.peak_busy_on_host, f"{state.busy_on_host} instead of {working}"


# -- requests ---------------------------------------------------------------------------------------------------------


@of_state()
def no_request_group_is_empty(state: CoreState) -> None:
    """A request group ends with its last request."""
    for group in state.groups.values():
        assert group.requests, f"of {group.spec.model}"


@of_state()
def queued_requests_are_counted(state: CoreState) -> None:
    """The count of queued requests is the number of requests in all request groups."""
    queued = 0
    for group in state.groups.values():
        queued += len(group.requests)
    assert queued == state.queued, f"{state.queued} instead of {queued}"


@of_state()
def request_groups_are_in_queue_order(state: CoreState) -> None:
    """The order of the queue is the order of the first requests of all request groups, by priority and age.

    Groups for models that were never inspected stand in an order of their own, until their model is inspected.
    """
    unread = {id for id, model in state.models.items() if model.profile is None}
    known = [group for group in state.groups.values() if group.spec.model not in unread]
    others = [group for group in state.groups.values() if group.spec.model in unread]
    assert state.ranks == sorted([state.rank(group.head) for group in known])
    assert state.unread_ranks == sorted([state.rank(group.head) for group in others])


@of_state()
def every_request_group_is_listed_under_its_model(state: CoreState) -> None:
    """Every request group is listed once under its model, and nothing else is listed."""
    listed = [spec for model, specs in state.specs_by_model.items() for spec in specs if spec.model == model]
    assert len(listed) == len(state.groups) and all(spec in state.groups for spec in listed)
    assert all(state.specs_by_model.values())


@of_state()
def every_request_is_queued_or_granted(state: CoreState) -> None:
    """Every known request is queued in a request group, or was granted and is in no request group."""
    queued = set[RequestId]()
    for group in state.groups.values():
        for request in group.requests.values():
            assert request.state is RequestState.queued, f"request {request.id} is answered, and in a request group"
            queued.add(request.id)
    held = {id for id, request in state.requests.items() if request.state is RequestState.granted}
    assert held | queued == set(state.requests), f"{sorted(set(state.requests).symmetric_difference(held | queued))}"


@of_state()
def no_request_waits_after_the_close(state: CoreState) -> None:
    """No request is queued once the scheduler is closing."""
    assert not (state.closing and state.groups)


@of_state()
def no_request_waits_for_a_runner_that_could_serve_it_now(state: CoreState) -> None:
    """No request is queued while the current runner of its model has loaded, satisfies it and has a lease left."""
    for runner in state.runners.values():
        if runner.current and runner.state is not LOADING:
            full = 0 < most_leases(state, runner) <= len(runner.leases)
            waiting = [group.spec.purpose for group in state.groups_served_by(runner)]
            assert not waiting or (full and set(waiting) == {Purpose.lease}), name_of(runner)


def most_leases(state: CoreState, runner: Runner) -> int:
    """Return how many leases a runner may hold; 0: as many as there are requests."""
    named = state.models[runner.model].max_leases
    most = state.config.max_leases if named is None else named
    return most if most != SLOTS else runner.effective_options.num_parallel or 0


def bound_of(request: Request, state: CoreState) -> float:
    """Return when busy runners have to leave for a request.

    That is after the longest wait, or earlier where its own time limit leaves less: half of what is left beside a load
    of its model.
    """
    spare_s = state.timers.at(("request", request.id)) - request.queued_at
    if request.spec.model in state.models:
        spare_s -= state.models[request.spec.model].load_s or 0.0
    most_s = state.config.max_wait_s
    return request.queued_at + (min(most_s, spare_s / 2) if spare_s > 0 else most_s)


# -- memory -----------------------------------------------------------------------------------------------------------


@of_state()
def every_account_has_an_owner(state: CoreState) -> None:
    """Each runner, and each grant of the program's own memory, has an account of memory; there is no other account."""
    leases = {lease for runner in state.runners.values() for lease in runner.leases}
    held = {id for id, request in state.requests.items() if request.state is RequestState.granted}
    owners = {("runner", id) for id in state.runners} | {("memory", id) for id in held - leases}
    assert owners == set(state.ledger.accounts), f"{sorted(owners.symmetric_difference(state.ledger.accounts))}"


@of_state()
def reservations_fit_each_device(state: CoreState) -> None:
    """No more memory of a device is reserved than the device has, unless the device has shrunk since."""
    for device, sample in state.ledger.devices.items():
        reserved = sum(account.reserved.get(device, 0) for account in state.ledger.accounts.values())
        assert reserved <= sample.capacity_bytes or device in state.ledger.overcommitted, device


@of_state()
def only_files_of_models_that_are_waited_for_are_read_ahead(state: CoreState) -> None:
    """A file is read ahead only while a request waits for its model, or until the next plan, and only once."""
    if state.prefetching:
        ahead = [model for model, _ in state.prefetching]
        assert state.plan_due or {spec.model for spec in state.groups}.issuperset(ahead)
        assert len(set(ahead)) == len(ahead)


@of_state()
def no_more_files_are_read_ahead_than_may_be(state: CoreState) -> None:
    """No more files are read ahead at a time than the limit allows."""
    if state.prefetching:
        read = sum(size > 0 for _, size in state.prefetching)  # the others keep their places in the order alone
        assert read <= state.config.prefetches


# -- device claims ----------------------------------------------------------------------------------------------------


@of_state()
def every_claim_has_a_number_of_its_own(state: CoreState) -> None:
    """Each device claim belongs to one planned launch or one runner, under a number that was handed out."""
    numbers = [*state.claims, *(runner.claim for runner in state.runners.values() if runner.claim)]
    assert len(set(numbers)) == len(numbers), "a claim is used twice"
    assert all(number < state.next_claim for number in numbers), "a claim that was never made"


@of_state()
def every_open_claim_is_for_a_request_group(state: CoreState) -> None:
    """There are no more open device claims than request groups whose launch is planned, or until the next plan."""
    assert state.plan_due or len(state.claims) <= len(state.groups)


@of_state()
def the_wait_for_a_claim_has_an_end(state: CoreState) -> None:
    """An open device claim names devices, has a time-out, and is not granted without a launch, or a plan to come."""
    for claim in state.claims.values():
        idle = claim.had and not state.plan_due
        assert claim.devices and not idle, f"claim {claim.number}: granted, but nothing was launched"
        assert state.timers.at(("claim", claim.number)) == claim.by, f"claim {claim.number}: nothing ends the wait"


@of_state()
def a_runner_claims_devices_only_while_it_loads(state: CoreState) -> None:
    """A runner keeps its device claim only while its process loads, and for a limited time once it is stopped."""
    for runner in state.runners.values():
        if runner.claim:
            assert runner.process and runner.loaded_at is None, name_of(runner)
            timed = state.timers.at(("claim", runner.claim)) < math.inf
            assert timed == (runner.process_state is STOPPING), f"{name_of(runner)}: how long it keeps its devices"
