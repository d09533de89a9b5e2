"""Requests that wait for leases which are held by callers that wait themselves."""

from __future__ import annotations

from collections.abc import Collection

from fsm.machine.request import ModelId, Purpose, Request, RequestId, RequestState
from fsm.machine.runner import LOADING, Runner
from fsm.messages.refusals import WouldDeadlockRefusal
from fsm.placement.search import PlacementDemand, find_placement
from fsm.planning.automatic_options import resolved_demand
from fsm.planning.availability import gpus_of
from fsm.sizing.footprint import Footprint
from fsm.state.core_state import CoreState
from fsm.state.runner_match import match


def would_deadlock(state: CoreState, request: Request) -> WouldDeadlockRefusal | None:
    """Return the refusal of a queued request that waits for its own caller; None where that is not certain.

    It is certain where no room can be made beside the runners on which the caller keeps leases until the answer,
    whatever else leaves, and in whatever way the model is placed.
    """
    kept = set(request.keeps)
    models = _in_the_way(state, request, kept) if kept else ()
    return WouldDeadlockRefusal(request.spec.model, models) if models else None


def held_up(state: CoreState) -> dict[RequestId, tuple[ModelId, ...]]:
    """Return the models whose leases queued requests wait for, by request, where callers that wait hold these leases.

    The leases may be released all the same: by another thread, or when a caller gives up.
    """
    queued = [request for request in state.requests.values() if request.state is RequestState.queued]
    held = {lease for request in queued for lease in request.holds}
    found = {request.id: _in_the_way(state, request, held) for request in queued} if held else {}
    return {request: models for request, models in found.items() if models}


def _in_the_way(state: CoreState, request: Request, held: Collection[RequestId]) -> tuple[ModelId, ...]:
    """Return the models of the runners that a request cannot be granted beside, all with leases in `held`:

    1. Where the model's runner serves the request, that runner has no lease left, and all its leases are held.
    2. Where the model's runner has other options, that runner has to leave, and cannot.
    3. Where the model is not loaded, as many processes are alive as may be, or its placement does not fit.
    """
    spec = request.spec
    model = state.models.get(spec.model)
    current = model.current if model is not None else None
    staying = [runner for runner in state.runners.values() if not runner.leases.isdisjoint(held)]
    if current is not None and match(current, spec.options):  # 1
        full = current.state is not LOADING and not state.may_be_granted(current, spec.purpose)
        return (current.model,) if full and current.leases <= set(held) else ()
    if (demand := known_demand(state, request)) is None:
        return ()
    if current is not None and current in staying:  # 2
        return (current.model,)
    process = spec.purpose is not Purpose.memory
    if not has_room(state, demand, (), process) or has_room(state, demand, staying, process):  # 3
        return ()
    for runner in list(staying):  # one beside which there is room without the others is not in the way
        others = [other for other in staying if other is not runner]
        staying = staying if has_room(state, demand, others, process) else others
    return tuple(dict.fromkeys(runner.model for runner in staying))


def known_demand(state: CoreState, request: Request) -> PlacementDemand | None:
    """Return what a request needs; None where that is not known yet, or where a runner serves it after all."""
    spec = request.spec
    if spec.purpose is Purpose.memory:
        return PlacementDemand(Footprint(fixed=spec.memory))
    model = state.models[spec.model]
    resolution = model.resolution(spec.options)
    if not model.inspected_since_launch or resolution is None:
        return None
    load, demand = resolved_demand(model, resolution, state, state.ledger.capacity, gpus_of(state.ledger))
    serves = model.current is not None and match(model.current, spec.options, load.options)
    return None if serves else demand


def has_room(state: CoreState, demand: PlacementDemand, staying: Collection[Runner], process: bool) -> bool:
    """Tell whether there is room where only the runners `staying` are alive: for a demand, and for a process."""
    if process and 0 < state.config.max_runners <= len(staying):
        return False
    free = state.ledger.capacity
    for runner in staying:
        account = state.ledger.accounts["runner", runner.id]
        free = {device: amount - account.held_bytes(device) for device, amount in free.items()}
    gpus = gpus_of(state.ledger)
    return any(find_placement(demand, offload, free, gpus, free) for offload in demand.offload_modes(gpus))
