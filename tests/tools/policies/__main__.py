"""`python -m tests.tools.policies [--seeds N] [--trace FILE]`: how much each policy reloads, beside the least possible.

Each trace is replayed through the core with each policy. The seconds of reloads count, divided by the least that any
policy could have with knowledge of the future (`bound`). Written to build/policies.json and .svg.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from fsm.eviction.policies import POLICIES
from tests.tools.policies import report
from tests.tools.policies.bound import lower_bound_s
from tests.tools.policies.report import Row
from tests.tools.policies.workload import GB, KINDS, Trace, draw_trace, read_trace
from tests.tools.policies.world import policies, replay

CAPACITIES_GB = (24, 48, 96)
PROCESSES = 2
BUILD = Path("build")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every seed of both kinds, or a user's own trace; return 0."""
    chosen = _parser().parse_args(arguments)
    rows: list[Row] = []
    BUILD.mkdir(exist_ok=True)
    with ProcessPoolExecutor(PROCESSES) as pool:
        jobs = [pool.submit(_run, *job) for job in _jobs(chosen)]
        for done, job in enumerate(as_completed(jobs), 1):
            found = job.result()
            rows = sorted([*rows, *found], key=lambda row: (row.kind, row.seed, row.capacity_gb))
            (BUILD / "policies.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
            print(f"{done} of {len(jobs)}: {found[0].kind}, seed {found[0].seed}", file=sys.stderr, flush=True)
    print("\n".join(report.lines(rows)))
    report.draw(rows, BUILD / "policies.svg")
    print(f"written to {BUILD}/policies.json and {BUILD}/policies.svg")
    return 0


def _jobs(chosen: argparse.Namespace) -> Iterator[tuple[str, int, tuple[float, ...]]]:
    capacities = tuple(chosen.capacity or CAPACITIES_GB)
    if chosen.trace:
        yield chosen.trace, 0, capacities
        return
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        for kind in KINDS:
            yield kind, seed, capacities


def _run(kind: str, seed: int, capacities_gb: Sequence[float]) -> list[Row]:
    """Replay one trace with each policy, at each capacity."""
    trace = draw_trace(kind, seed) if seed else read_trace(Path(kind))
    return [row for capacity in capacities_gb for row in _rows(trace, kind, seed, capacity)]


def _rows(trace: Trace, kind: str, seed: int, capacity_gb: float) -> Iterator[Row]:
    capacity = int(capacity_gb * GB)
    bound_s = lower_bound_s(trace, capacity)
    for name, policy in policies(trace, POLICIES).items():
        result = replay(trace, capacity, policy)
        yield Row(
            kind, seed, capacity_gb, name, result.reload_s, bound_s, result.reloads, result.mean_wait_s,
            result.longest_wait_s, result.refused,
        )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.policies", description=__doc__)
    option = parser.add_argument
    option("--seeds", type=int, default=10, metavar="N", help="how many of each kind (default: 10)")
    option("--first", type=int, default=1, metavar="S", help="the first of them (default: 1)")
    option("--capacity", type=float, action="append", metavar="GB", help="memory; again for more (default: 24, 48, 96)")
    option("--trace", metavar="FILE", help="a CSV file of your own instead: at_s, model, bytes; load_s, hold_s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
