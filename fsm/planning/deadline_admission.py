"""How long a request must wait at least: the part of its wait that is certain beforehand, and no merely likely part."""

from __future__ import annotations

import math

from fsm.domain.options import Options
from fsm.machine.request import Purpose, Request, RequestSpec
from fsm.machine.runner import LOADING, Runner
from fsm.messages.refusals import DeadlineInfeasible
from fsm.planning.deadlock import has_room, known_demand
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord
from fsm.state.runner_match import match

ENOUGH_LOADS = 2  # a single load may have read the file from the disk, and the file may be in memory now
LOAD_TIME_TTL_S = 600.0  # how long a measured load counts: a file that has been read since may load sooner


def infeasible_deadline(state: CoreState, request: Request) -> DeadlineInfeasible | None:
    """Return the refusal of a queued request that ends before its model can be loaded; None where it may be served.

    The model's own load counts, the shortest of several that were measured of its file with these options, and the rest
    of a minimum residency that was set. Every other wait may be over at once: a lease is released, a process ends, an
    earlier request leaves the queue.
    """
    gives_up_at = state.timers.at(("request", request.id))
    if gives_up_at == math.inf or request.spec.purpose is Purpose.memory:
        return None
    model = state.models[request.spec.model]
    load = _load(state, model, request.spec)
    if load is None:
        return None
    options, begun_s = load
    shortest_s, measured_at, loads = model.shortest_load.get(options, (0.0, -math.inf, 0))
    if loads < ENOUGH_LOADS or state.now - measured_at > LOAD_TIME_TTL_S:
        shortest_s = 0.0
    resident_s = 0.0 if begun_s is not None else _resident_s(state, request)
    least_s = resident_s + shortest_s - (begun_s or 0.0)
    if state.now + max(0.0, least_s) <= gives_up_at or not (shortest_s or resident_s):
        return None
    return DeadlineInfeasible(model.id, gives_up_at - request.queued_at, least_s, shortest_s, begun_s, resident_s)


def _resident_s(state: CoreState, request: Request) -> float:
    """Return for how many seconds there is no room for a request, as runners keep a minimum residency that was set."""
    demand = known_demand(state, request) if state.config.min_residency_s is not None else None
    current = state.models[request.spec.model].current
    if demand is None or not has_room(state, demand, (), process=True):
        return 0.0
    until = current.resident_until if current is not None else state.now
    staying = [one for one in state.runners.values() if one.current and one.resident_until > state.now]
    staying.sort(key=lambda one: one.resident_until)
    while not has_room(state, demand, staying, process=True):
        until = max(until, staying.pop(0).resident_until)
    return max(0.0, until - state.now)


def is_fastest_placement(state: CoreState, runner: Runner) -> bool:
    """Tell whether a runner is loaded in the fastest way: whole on GPUs, or where that is never possible."""
    gpus = any(sample.kind == "gpu" for sample in state.ledger.devices.values())
    declared = state.models[runner.model].declared
    return runner.fully_offloaded or declared or runner.launch_options.num_gpu == 0 or not gpus


def _load(state: CoreState, model: ModelRecord, spec: RequestSpec) -> tuple[Options, float | None] | None:
    """Return the options of the load that has to end first, and how many seconds ago it began; None for either.

    The seconds are None where the load has not begun. The whole is None where no load may be needed, and where the file
    was not inspected since the last launch: another file may be in its place.
    """
    current = model.current
    if current is not None and match(current, spec.options):
        return (current.launch_options, state.now - current.launched_at) if current.state is LOADING else None
    resolution = model.resolution(spec.options)
    if not model.inspected_since_launch or resolution is None:
        return None
    options = model.fallback_load(resolution).options
    if current is not None and match(current, spec.options, options):
        return None  # the next plan will match the request with this runner
    return options, None
