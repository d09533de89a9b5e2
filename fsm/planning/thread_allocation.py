"""How many threads a runner computes with: the host's cores, divided among the runners that are likely to work at once.

A loaded runner keeps its number of threads: llama.cpp's server has no way to change it, and a new load for it would
cost more than it brings. So the number is chosen by what can be foreseen at the launch, and a wrong guess has to be
bearable, which the engine's way of waiting sees to (docs/benchmarks.md has the figures for both).
"""

from __future__ import annotations

from itertools import islice

from fsm.domain.devices import HOST, Placement, Threads
from fsm.domain.options import MOST_THREADS
from fsm.machine.runner import IDLE
from fsm.sizing.model_profile import ModelProfile, ResolvedLoad
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord

WITHOUT_LAYERS = 1  # threads of a runner whose layers are all on GPUs: the host only looks up their input


def threads_for(state: CoreState, model: ModelRecord, load: ResolvedLoad, placement: Placement) -> Threads | None:
    """Return the threads of a runner that is launched now; None where the engine decides, or the model is an object.

    A number that the request names comes first, then the setting. Otherwise answers get an even part of the cores.
    Prompts get all cores: threads work long on them between two waits, so that runners which have more threads than
    there are cores lose nothing.
    """
    if not isinstance(model.profile, ModelProfile):
        return None
    on_host = placement.offloaded < load.footprint.layers
    if named := load.options.num_thread or state.config.cpu_threads:
        return Threads(min(named, MOST_THREADS), min(named, MOST_THREADS), on_host)
    host = state.ledger.devices.get(HOST)
    cores = min(host.cores, MOST_THREADS) if host is not None else 0
    if not cores:
        return None
    if not on_host:
        return Threads(WITHOUT_LAYERS, WITHOUT_LAYERS, on_host)
    return Threads(max(1, cores // at_once(state, model, placement)), cores)


def at_once(state: CoreState, model: ModelRecord, placement: Placement) -> int:
    """Return how many runners are likely to work on the host at once, a runner that is launched now among them.

    Runners that are in use or load count, and models that other requests wait for and that fit beside the new runner.
    Idle runners count as far as so many runners have been ready at once: models that are used alternately do not share
    the cores.
    """
    others = [runner for runner in state.runners.values() if runner.current and runner.on_host]
    idle = sum(runner.state is IDLE for runner in others)
    busy = len(others) - idle + _coming(state, model, placement)
    return 1 + max(busy, min(busy + idle, state.peak_busy_on_host - 1))


def _coming(state: CoreState, model: ModelRecord, placement: Placement) -> int:
    """Return how many models that other requests wait for fit beside a placement; 0 where they may go to a GPU."""
    devices = state.ledger.devices
    if any(sample.kind == "gpu" for sample in devices.values()):
        return 0
    own_bytes = dict(placement.bytes).get(HOST, 0)
    fitting = max(0, state.ledger.free_bytes(HOST) - own_bytes) // max(1, own_bytes)
    most = max(0, min(fitting, state.max_runners() - state.processes - 1))
    others = (state.models.get(id) for id in state.specs_by_model)  # None for memory of the program's own
    return sum(1 for _ in islice((one for one in others if one not in (None, model) and one.current is None), most))
