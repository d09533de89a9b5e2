"""How many threads a runner computes with: the host's cores, dealt to those that are likely to work at once.

A loaded runner keeps its number: llama.cpp's server has no way to change it, and to load a model again for it would
cost more than it brings. So it is dealt for what can be foreseen at the launch, and a wrong guess has to be bearable,
which the engine's way of waiting sees to (docs/benchmarks.md has the figures for both).
"""

from __future__ import annotations

from itertools import islice

from fsm.domain.devices import HOST, Placement, Threads
from fsm.domain.model_info import ModelInfo, Options
from fsm.machine.runner import IDLE
from fsm.sizing.load_options import MOST_THREADS
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord

WITHOUT_LAYERS = 1  # threads of a runner whose layers are all on GPUs: it only looks up what they work on


def threads_for(state: CoreState, model: ModelRecord, options: Options, placement: Placement) -> Threads | None:
    """Return the threads of a runner that is launched now; None where that is not for the core to say.

    What a request names wins, then what is set. Otherwise answers get an even part of the cores. Prompts get all of
    them: they take long between two waits, so that runners which have more threads than there are cores lose nothing.
    """
    if not isinstance(model.info, ModelInfo):
        return None
    on_host = placement.offloaded <= len(model.info.layers_bytes)
    if named := options.num_thread or state.config.cpu_threads:
        return Threads(min(named, MOST_THREADS), min(named, MOST_THREADS), on_host)
    host = state.ledger.devices.get(HOST)
    cores = min(host.cores, MOST_THREADS) if host is not None else 0
    if not cores:
        return None
    if not on_host:
        return Threads(WITHOUT_LAYERS, WITHOUT_LAYERS, on_host)
    return Threads(max(1, cores // at_once(state, model, placement)), cores)


def at_once(state: CoreState, model: ModelRecord, placement: Placement) -> int:
    """Return how many runners are likely to work on the host at once with one that is launched now, itself included.

    Those that are in use or load now, and those that others wait for and that have room beside it. Idle ones count as
    far as that many have been seen at work at once: models that are used in turns do not share the cores.
    """
    others = [runner for runner in state.runners.values() if runner.current and runner.on_host]
    idle = sum(runner.state is IDLE for runner in others)
    busy = len(others) - idle + _coming(state, model, placement)
    return 1 + max(busy, min(busy + idle, state.peak_busy_on_host - 1))


def _coming(state: CoreState, model: ModelRecord, placement: Placement) -> int:
    """Return how many models that others wait for can be loaded beside it; where there is a GPU, they may go there."""
    devices = state.ledger.devices
    if any(sample.kind == "gpu" for sample in devices.values()):
        return 0
    own_bytes = dict(placement.bytes).get(HOST, 0)
    room = max(0, state.ledger.free_bytes(HOST) - own_bytes) // max(1, own_bytes)
    most = max(0, min(room, state.max_runners() - state.processes - 1))
    others = (state.models.get(id) for id in state.specs_by_model)  # none: memory of the program's own
    return sum(1 for _ in islice((one for one in others if one not in (None, model) and one.current is None), most))
