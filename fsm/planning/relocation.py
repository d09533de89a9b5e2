"""Whether a runner that rests in a worse place than its model could have now is loaded in the better one.

A place is worse with notably fewer layers on GPUs. A runner comes to one when memory was taken, when a reading of the
devices lacked a GPU, or when a request named fewer layers; what one request named is not for the others. No runner
leaves for the better place, and the move comes with the next request, once the place was free for longer than the
runner took to load: so at most half of the time goes into moves, whatever comes and goes.
"""

from __future__ import annotations

import math
from dataclasses import replace

from fsm.domain.options import Options
from fsm.machine.runner import IDLE, Runner
from fsm.messages.events import Acquire
from fsm.placement.search import Offload, find_placement
from fsm.planning.availability import NOW, AvailabilityProfile, gpus_of
from fsm.planning.failed_loads import taught
from fsm.sizing.model_profile import ResolvedLoad
from fsm.state.core_state import CoreState

PLACES_LOOK_S = 10.0  # the least time between readings that look for a better place
NOTABLE_PART = 10  # a tenth of a model's layers on GPUs is worth a load


def is_notably_better(offloaded: int, than: int, layers: int) -> bool:
    """Tell whether a place with `offloaded` of a model's `layers` on GPUs is worth a load, where it has `than` now."""
    return than < offloaded and (offloaded == layers or offloaded - offloaded // NOTABLE_PART > than)


def may_move(state: CoreState, runner: Runner) -> bool:
    """Tell whether a runner may ever be moved: it has layers that are not on GPUs, and its model is not pinned."""
    if runner.fully_offloaded or runner.loaded_at is None or not runner.current or state.pinned(runner):
        return False
    return not state.models[runner.model].declared


def is_better_place_free(state: CoreState, runner: Runner, asked: Options) -> bool:
    """Tell whether a runner would go to a better place if it were loaded again now, while no request waits.

    Its own memory counts as free. The placement is the planner's for a request that names the options `asked`, and no
    layers.
    """
    gpus = gpus_of(state.ledger)
    if not gpus or state.groups or not may_move(state, runner):
        return False
    footprint = state.ledger.accounts["runner", runner.id].predicted
    options = replace(runner.launch_options, num_gpu=None, main_gpu=None)
    movable = [one for one in state.runners.values() if not state.is_unmovable(one)]
    availability = AvailabilityProfile(state.ledger, gpus, 0, movable)
    model, load = state.models[runner.model], ResolvedLoad(options, footprint)
    known = model.demand_of(load, asked, state.config)
    demand = taught(state, model, load, known, availability.potential, gpus)
    offload = availability.best_offload(demand)
    if offload is None or offload is Offload.none:
        return False
    free = availability.available_after(NOW, [runner])
    place = find_placement(demand, offload, free, gpus, availability.potential)
    return place is not None and is_notably_better(place.offloaded, runner.placement.offloaded, footprint.layers)


def moves_from(runner: Runner) -> float:
    """Return the time from which on a runner is moved at its next request; infinite where no better place is known."""
    return math.inf if runner.loaded_at is None else runner.better_place_since + runner.loaded_at - runner.launched_at


def looks_from(state: CoreState) -> float:
    """Return the time from which on a request for a runner has better places looked for; infinite: it never does."""
    any_may_move = any(may_move(state, runner) for runner in state.runners.values())
    return state.read_at + PLACES_LOOK_S if any_may_move else math.inf


def is_to_move(state: CoreState, runner: Runner, event: Acquire) -> bool:
    """Tell whether a runner that serves a request is loaded in a better place for it first.

    Not where the request names its layers, gives up before the load is over, or would be refused if it had to wait.
    """
    if runner.state is not IDLE or runner.loaded_at is None or state.now < moves_from(runner):
        return False
    load_s, layers = runner.loaded_at - runner.launched_at, event.spec.options.num_gpu
    return (
        (layers is None or layers < 0)
        and (event.timeout_s is None or event.timeout_s > 2 * load_s)
        and state.queued < state.config.max_queue
        and state.now >= state.models[runner.model].blocked_until
        and is_better_place_free(state, runner, event.spec.options)
    )
