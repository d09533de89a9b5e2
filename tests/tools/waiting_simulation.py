"""Three models and one place: how long requests wait in strict order, warm first, and as loadmaster orders them.

    python -m tests.tools.waiting_simulation [--seeds 5] [--hours 1] [--livelock-seeds 1000]

The real core on virtual time (`tests/tools/waiting_world.py`). Load is the requested answer seconds per second of a
slot; swaps come on top of it. The figures go to build/waiting.json, the chart to build/waiting.png.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.tools.waiting_world import CASES, ORDERS, Machine, Outcome, draw_traffic

LOADS = (0.6, 0.9, 1.2)
OURS, WARM_FIRST = "ours", "warm first"
MEAN_AIM, MAX_AIM = 1.3, 0.5  # of ours, as multiples of warm first
SHORT_S = 600.0  # of traffic for each seed of the livelock check
HOUR_S = 3600.0
BUILD = Path("build")


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one order for one case at one load, over all seeds; seconds."""

    case: str
    load: float
    order: str
    requests: int
    mean_s: float
    p95_s: float
    p99_s: float
    max_s: float
    worst_model_p99_s: float
    swaps_per_hour: float  # of traffic
    swapping: float  # part of the time in which a request waited for a runner
    livelocks: int  # how many seeds


def simulate(case: str, load: float, order: str, seed: int, seconds: float) -> Outcome:
    """Run one seed; the same arguments give the same outcome."""
    return Machine(CASES[case], ORDERS[order], draw_traffic(CASES[case], load, seed, seconds)).run()


def percentile(ordered: Sequence[float], part: float) -> float:
    """Return the smallest value that is not exceeded by `part` of the values."""
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def row_of(case: str, load: float, order: str, outcomes: Sequence[Outcome], seconds: float) -> Row:
    """Sum up all seeds of one order."""
    models = [sorted(wait for one in outcomes for wait in one.waits_s[model]) for model in range(3)]
    waits = sorted(wait for model in models for wait in model)
    return Row(
        case,
        load,
        order,
        len(waits),
        sum(waits) / len(waits),
        percentile(waits, 0.95),
        percentile(waits, 0.99),
        waits[-1],
        max(percentile(model, 0.99) for model in models),
        sum(one.swaps for one in outcomes) / len(outcomes) / (seconds / HOUR_S),
        sum(one.swapping_s for one in outcomes) / max(1.0, sum(one.waited_s for one in outcomes)),
        sum(one.livelocked for one in outcomes),
    )


def compare(pool: ProcessPoolExecutor, seeds: int, seconds: float) -> list[Row]:
    """Run every order on the same traffic, in every case and at every load."""
    rows: list[Row] = []
    for case in CASES:
        for load in LOADS:
            print(f"\n{case}, {load:.0%} load: seconds of waiting")
            print(f"  {'':14}{'mean':>9}{'p95':>9}{'p99':>9}{'max':>9}{'worst p99':>11}{'swaps/h':>9}{'swapping':>10}")
            found = {}
            for order in ORDERS:
                of = [pool.submit(simulate, case, load, order, seed, seconds) for seed in range(seeds)]
                row = found[order] = row_of(case, load, order, [one.result() for one in of], seconds)
                print(
                    f"  {order:14}{row.mean_s:9.1f}{row.p95_s:9.1f}{row.p99_s:9.1f}{row.max_s:9.1f}"
                    f"{row.worst_model_p99_s:11.1f}{row.swaps_per_hour:9.1f}{row.swapping:10.0%}",
                    flush=True,
                )
            mean, most = ratios(found[OURS], found[WARM_FIRST])
            print(f"  ours : warm first  mean {mean:.2f} (aim {MEAN_AIM}), max {most:.2f} (aim {MAX_AIM})")
            rows += found.values()
    return rows


def ratios(ours: Row, other: Row) -> tuple[float, float]:
    """Return the mean and the longest wait of one order as multiples of another's."""
    return ours.mean_s / other.mean_s, ours.max_s / other.max_s


def count_livelocks(pool: ProcessPoolExecutor, seeds: int) -> int:
    """Return how many short seeds of ours livelock, over cases and loads in turns, and check that all are served."""
    turns = [(case, load) for case in CASES for load in LOADS]
    of = [pool.submit(simulate, *turns[seed % len(turns)], OURS, seed, SHORT_S) for seed in range(seeds)]
    found = sum(one.result().livelocked for one in of)
    print(f"{OURS}: {found} of {seeds} seeds of {SHORT_S / 60:g} minutes livelock")
    return found


def draw_chart(rows: Sequence[Row], path: Path) -> None:
    """Draw the mean, the 99th percentile and the longest wait of every order; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * len(CASES)), layout="constrained")
    axes = figure.subplots(len(CASES), len(LOADS), squeeze=False)
    for line, case in zip(axes, CASES, strict=True):
        for axis, load in zip(line, LOADS, strict=True):
            shown = [row for row in rows if (row.case, row.load) == (case, load)]
            for place, (label, color) in enumerate((("mean_s", "C0"), ("p99_s", "C1"), ("max_s", "C3"))):
                at = [number + 0.26 * (place - 1) for number in range(len(shown))]
                axis.bar(at, [getattr(row, label) for row in shown], 0.24, color=color, label=label.removesuffix("_s"))
            axis.set_xticks(range(len(shown)), [row.order.replace(" ", "\n") for row in shown])
            axis.set_yscale("log")
            axis.set_title(f"{case}, {load:.0%} load", fontsize="medium")
        line[0].set_ylabel("seconds of waiting")
    axes[0][0].legend()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the orders, count livelocks, write the figures and the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="of the comparison (5)")
    parser.add_argument("--hours", type=float, default=1.0, help="of traffic for each of them (1)")
    parser.add_argument("--livelock-seeds", type=int, default=1000, help="of the check for livelocks (1000)")
    chosen = parser.parse_args(arguments)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = compare(pool, chosen.seeds, chosen.hours * HOUR_S)
        print()
        livelocks = count_livelocks(pool, chosen.livelock_seeds)
    BUILD.mkdir(exist_ok=True)
    figures = {
        "cases": [asdict(case) for case in CASES.values()],
        "seeds": chosen.seeds,
        "hours": chosen.hours,
        "rows": [asdict(row) for row in rows],
        "livelocks": {"seeds": chosen.livelock_seeds, "found": livelocks},
    }
    (BUILD / "waiting.json").write_text(json.dumps(figures, indent=1))
    try:
        draw_chart(rows, BUILD / "waiting.png")
    except ImportError:
        print("no chart: matplotlib is not installed")
    print(f"written to {BUILD}/waiting.json")


if __name__ == "__main__":
    main()
