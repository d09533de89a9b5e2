"""How long a request must wait at least: what is certain of its wait beforehand, and nothing that is only likely."""

from __future__ import annotations

import math

from fsm.domain.model_info import Options
from fsm.machine.request import Purpose, Request, RequestSpec
from fsm.machine.runner import LOADING, Runner
from fsm.messages.refusals import DeadlineInfeasible
from fsm.sizing.footprint import Footprint
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord
from fsm.state.runner_match import match

ENOUGH_LOADS = 2  # of one alone the file may have been read from the disk, and may be in memory now
LOAD_TIME_TTL_S = (
    600.0  # how long a measured load is counted on: what has been read since may load sooner the next time
)


def infeasible_deadline(state: CoreState, request: Request) -> DeadlineInfeasible | None:
    """Return the refusal of a queued request that leaves before its model can be there; None: it may be served.

    Only the model's own load is counted, the shortest of several that were measured of its file with these options.
    Every other wait may be over at once: a lease is given back, a process ends, somebody leaves the queue.
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
    least_s = shortest_s - (begun_s or 0.0)
    if loads < ENOUGH_LOADS or state.now - measured_at > LOAD_TIME_TTL_S or state.now + least_s <= gives_up_at:
        return None
    return DeadlineInfeasible(model.id, gives_up_at - request.queued_at, least_s, shortest_s, begun_s)


def is_fastest_placement(state: CoreState, runner: Runner) -> bool:
    """Tell whether a runner is loaded in the fastest way: where it is not whole on GPUs, it never could be."""
    gpus = any(sample.kind == "gpu" for sample in state.ledger.devices.values())
    info = state.models[runner.model].info
    declared = isinstance(info, Footprint) and bool(info.fixed)
    return runner.fully_offloaded or declared or runner.launch_options.num_gpu == 0 or not gpus


def _load(state: CoreState, model: ModelRecord, spec: RequestSpec) -> tuple[Options, float | None] | None:
    """Return the options of the load that has to end first, and how long ago it began; None: there may be none.

    Of a file that was not looked at since the last launch nothing is certain: another may be in its place.
    """
    current = model.current
    if current is not None and match(current, spec.options):
        return (current.launch_options, state.now - current.launched_at) if current.state is LOADING else None
    if not model.inspected_since_launch:
        return None
    options, _ = model.demand(spec.options, state.config)
    if current is not None and match(current, spec.options, options):
        return None  # the plan will find it to be the same
    return options, None
