"""How calls are timed here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def microseconds(action: Callable[[], object], repeats: int) -> list[float]:
    """Return the microseconds of each call, after some that do not count."""
    for _ in range(repeats // 10):
        action()
    clock, taken = time.perf_counter_ns, []
    for _ in range(repeats):
        begin = clock()
        action()
        taken.append((clock() - begin) / 1000)
    return taken


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that `percent` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return median, tail and mean."""
    return {
        "p50": round(statistics.median(values), 3),
        "p99": round(percentile(values, 99), 3),
        "p99.9": round(percentile(values, 99.9), 3),
        "mean": round(statistics.fmean(values), 3),
        "count": len(values),
    }
