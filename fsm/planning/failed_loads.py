"""What failed loads have taught of places: where a model needs more than predicted, and which GPUs come last.

After a load that ran out of memory with its projector on a GPU the projector stays on the host. After another one, or
without a projector, the model may take a fifth less of each GPU that it had layers on, so the next load
has fewer layers there, or goes elsewhere. A GPU on which a load failed otherwise comes last, after the host: for the
same load, and for all models where several have failed there and no runner is loaded on it. Both are forgotten in time:
what held the memory, or was wrong with the GPU, may be over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fsm.domain.devices import HOST, DeviceId
from fsm.domain.options import Options
from fsm.machine.runner import Runner
from fsm.placement.search import Free, Gpu, PlacementDemand, find_placement
from fsm.sizing.load_history import note_bounded
from fsm.sizing.model_profile import ResolvedLoad
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord, anywhere

FORGOTTEN_AFTER_S = 1800.0
NEXT_PART = 0.8  # of what a load that ran out of memory was to take: it took a quarter more, if that was all
MODELS_THAT_FAIL = 2  # so many models whose loads failed on a GPU tell of the GPU


def note_failed_load(state: CoreState, runner: Runner, *, out_of_memory: bool) -> None:
    """Note what a runner's failed load says of the GPUs that it had layers on."""
    model, gpus = state.models[runner.model], [gpu for gpu, _ in runner.placement.gpu_layers]
    predicted = state.ledger.accounts["runner", runner.id].predicted
    if out_of_memory and gpus and predicted.projectors_bytes and not model.projector_on_host:
        model.projector_on_host = True
        model.demands.clear()
    elif out_of_memory:
        taken = [(memory, amount) for memory, amount in runner.placement.bytes if gpus and memory != HOST]
        model.ran_out |= {memory: (int(amount * NEXT_PART), state.now) for memory, amount in taken}
    else:
        for gpu in gpus:
            note_bounded(state.failed_loads, (model.id, anywhere(runner.launch_options), gpu), state.now)


def note_load(state: CoreState, runner: Runner) -> None:
    """Note that a runner has loaded: its GPUs take its model."""
    for gpu, _ in runner.placement.gpu_layers if state.failed_loads else ():
        state.failed_loads.pop((runner.model, anywhere(runner.launch_options), gpu), None)


def taught(
    state: CoreState, model: ModelRecord, load: ResolvedLoad, demand: PlacementDemand, free: Free, gpus: Sequence[Gpu]
) -> PlacementDemand:
    """Return the demand of a load as failed loads have taught; `free` are the bytes that can be made free.

    A request that says itself where the layers go is believed, but for the GPUs, unless it names one.
    """
    if not (model.ran_out or state.failed_loads):
        return demand
    if not demand.is_explicit:
        demand = replace(demand, most=_most(state, model))
    named = gpus[demand.main_gpu].id if demand.main_gpu is not None and demand.main_gpu in range(len(gpus)) else None
    elsewhere = replace(demand, excluded=demand.excluded | _last_gpus(state, model, load.options) - {named})
    modes = elsewhere.offload_modes(gpus)
    fits = any(find_placement(elsewhere, offload, free, gpus, free) is not None for offload in modes)
    return elsewhere if fits else demand


def _most(state: CoreState, model: ModelRecord) -> dict[DeviceId, int]:
    """Return the bytes by memory that a model may take, where loads ran out of it."""
    since = state.now - FORGOTTEN_AFTER_S
    return {memory: amount for memory, (amount, at) in model.ran_out.items() if at > since}


def _last_gpus(state: CoreState, model: ModelRecord, options: Options) -> frozenset[DeviceId]:
    since = state.now - FORGOTTEN_AFTER_S
    failed = [key for key, at in state.failed_loads.items() if at > since]
    own = {gpu for id, named, gpu in failed if id == model.id and named == anywhere(options)}
    models = Counter(gpu for _, gpu in {(id, gpu) for id, _, gpu in failed})
    loaded = {gpu for one in state.runners.values() if one.loaded_at is not None for gpu, _ in one.placement.gpu_layers}
    return frozenset(own.union(gpu for gpu, count in models.items() if count >= MODELS_THAT_FAIL and gpu not in loaded))
