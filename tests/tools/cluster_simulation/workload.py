"""Traffic for a cluster: the generated traffic of `tests.tools.policies`, from several times as many clients."""

from __future__ import annotations

from dataclasses import replace

from tests.tools.policies.workload import HOUR_S, KINDS, Ask, Trace, draw_trace

NODES_PER_SET = 2  # there are 24 models for each two nodes
LAYERS = 2  # and the clients of two traces
SURGE_S, SURGE_HOLD_S = 900.0, 4.0  # how long one model is asked for all the time, and how long an answer lasts then
SURGE_RATE = 2.5  # of what one copy can answer


def draw_cluster_trace(kind: str, seed: int, nodes: int, hours: float, slots: int = 4) -> Trace:
    """Return the traffic of a seed for so many nodes; `kind` is one of `CLUSTER_KINDS`.

    For each two nodes there are 24 models, and the clients of two traces. `surge` is steady traffic in which a
    popular model is asked for more than one copy of it can answer, for a quarter of an hour in each two hours.
    """
    base = "steady" if kind == "surge" else kind
    sizes: dict[str, int] = {}
    loads: dict[str, float] = {}
    asks: list[Ask] = []
    for number in range(max(1, nodes // NODES_PER_SET)):
        layers = [draw_trace(base, 10_000 * seed + 100 * number + layer) for layer in range(LAYERS)]
        names = [f"{number}/{name}" for name in _by_use(layers[0])]
        for name, original in zip(names, _by_use(layers[0]), strict=True):
            sizes[name], loads[name] = layers[0].bytes[original], layers[0].load_s[original]
        for layer in layers:
            named = dict(zip(_by_use(layer), names, strict=True))
            asks += [replace(ask, model=named[ask.model]) for ask in layer.asks if ask.at < hours * HOUR_S]
    if kind == "surge":
        asks += _surges(asks, hours, slots)
    return Trace(f"{kind} {seed}", sizes, loads, tuple(sorted(asks, key=lambda ask: (ask.at, ask.model))))


def _by_use(trace: Trace) -> list[str]:
    """Return the models of a trace, the most requested first."""
    counts = dict.fromkeys(trace.bytes, 0)
    for ask in trace.asks:
        counts[ask.model] += 1
    return sorted(counts, key=lambda name: (-counts[name], name))


def _surges(asks: list[Ask], hours: float, slots: int) -> list[Ask]:
    counts: dict[str, int] = {}
    for ask in asks:
        counts[ask.model] = counts.get(ask.model, 0) + 1
    popular = sorted(counts, key=lambda name: (-counts[name], name))
    gap_s = SURGE_HOLD_S / (slots * SURGE_RATE)
    found = []
    for number in range(max(1, int(hours / 2))):
        begin_s, model = (2 * number + 0.5) * HOUR_S, popular[number % len(popular)]
        found += [Ask(begin_s + place * gap_s, model, SURGE_HOLD_S) for place in range(int(SURGE_S / gap_s))]
    return [ask for ask in found if ask.at < hours * HOUR_S]


CLUSTER_KINDS = (*KINDS, "surge")
