"""The bound that no policy can beat: reload seconds by a linear programme over the whole trace.

Each request but the first of its model is served from its model's previous one, by a share that was kept until then,
or by a reload. At every request the bytes that are kept, and those of the requested model, fit. A policy's choice is
such a choice with shares of 0 and 1, so the best one with any share is never dearer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array

from tests.tools.policies.workload import Trace


def lower_bound_s(trace: Trace, capacity: int) -> float:
    """Return the least seconds that any policy spends on loads beyond each model's first."""
    order = turns(trace, capacity)
    previous: dict[str, int] = {}
    intervals: list[tuple[str, int, int]] = []  # a model that is requested at two turns and not in between
    for at, model in enumerate(order):
        if model in previous:
            intervals.append((model, previous[model], at))
        previous[model] = at
    crossing = [interval for interval in intervals if interval[2] - interval[1] > 1]
    if not crossing:
        return 0.0
    rows, columns, shares = [], [], []
    room = np.array([(capacity - trace.bytes[model]) / 1e9 for model in order])
    for column, (model, start, end) in enumerate(crossing):
        rows.append(np.arange(start + 1, end))
        columns.append(np.full(end - start - 1, column))
        shares.append(np.full(end - start - 1, trace.bytes[model] / 1e9))
    used = csr_array(
        (np.concatenate(shares), (np.concatenate(rows), np.concatenate(columns))), shape=(len(order), len(crossing))
    )
    saved_s = np.array([trace.load_s[model] for model, _, _ in crossing])
    found = linprog(-saved_s, A_ub=used, b_ub=room, bounds=(0, 1), method="highs")
    assert found.status == 0, found.message
    return float(saved_s.sum() + found.fun)


def turns(trace: Trace, capacity: int) -> Sequence[str]:
    """Return the models in the order of the requests, without repetitions and models that never fit."""
    order: list[str] = []
    for ask in trace.asks:
        if trace.bytes[ask.model] <= capacity and (not order or order[-1] != ask.model):
            order.append(ask.model)
    return order
