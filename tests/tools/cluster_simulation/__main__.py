"""`python -m tests.tools.cluster_simulation [--seeds N] [--nodes N …]`: which node of a cluster a request is sent to.

Generated traffic for 4, 16 and 64 nodes of 48 GB runs through the real decision core of each node, on virtual time,
with the choice by digests of three ages, beside round robin, the power of two choices, Ray Serve's multiplexed routing
and one big node with all the memory. Written to build/cluster.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from tests.tools.cluster_simulation.report import Row, table
from tests.tools.cluster_simulation.workload import CLUSTER_KINDS, draw_cluster_trace
from tests.tools.cluster_simulation.world import OURS, ROUTES, Setup, World
from tests.tools.policies.workload import GB

SIZES = (4, 16, 64)
DIGESTS_S = (0.1, 1.0, 10.0)
NODE_BYTES = 48 * GB
NODE_HOURS = 24.0  # of one run: longer ones take longer
PROCESSES = 2
BUILD = Path("build")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every seed of every kind of traffic; return 0."""
    chosen = _parser().parse_args(arguments)
    BUILD.mkdir(exist_ok=True)
    rows: list[Row] = []
    with ProcessPoolExecutor(PROCESSES) as pool:
        jobs = [pool.submit(run, *job) for job in _jobs(chosen)]
        for done, job in enumerate(as_completed(jobs), 1):
            rows = sorted([*rows, job.result()], key=_order)
            (BUILD / "cluster.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
            print(f"{done} of {len(jobs)}", file=sys.stderr, flush=True)
    text = "\n".join(table(rows))
    (BUILD / "cluster.md").write_text(text + "\n")
    print(text)
    return 0


def run(kind: str, seed: int, setup: Setup, hours: float) -> Row:
    """Return what comes of one trace."""
    outcome = World(draw_cluster_trace(kind, seed, setup.nodes, hours), setup, seed).run()
    return Row(
        setup.nodes, kind, seed, setup.route, setup.digest_s if setup.route == OURS else 0.0, outcome.mean_s,
        outcome.percentile_s(95), outcome.percentile_s(99), outcome.loads, outcome.reload_s, outcome.refusals,
        outcome.broken,
    )  # fmt: skip


def _jobs(chosen: argparse.Namespace) -> Iterator[tuple[str, int, Setup, float]]:
    for nodes in sorted(chosen.nodes or SIZES, reverse=True):
        for seed in range(1, chosen.seeds + 1):
            for kind in CLUSTER_KINDS:
                for route in ROUTES:
                    for digest_s in DIGESTS_S if route == OURS else (1.0,):
                        setup = Setup(route, nodes, NODE_BYTES, fronts=max(2, nodes // 8), digest_s=digest_s)
                        yield kind, seed, setup, chosen.hours or NODE_HOURS / nodes


def _order(row: Row) -> tuple[object, ...]:
    return row.nodes, CLUSTER_KINDS.index(row.kind), list(ROUTES).index(row.route), row.digest_s, row.seed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.cluster_simulation", description=__doc__)
    option = parser.add_argument
    option("--seeds", type=int, default=2, metavar="N", help="how many of each kind of traffic (default: 2)")
    option("--nodes", type=int, action="append", metavar="N", help="nodes; again for more (default: 4, 16, 64)")
    option("--hours", type=float, metavar="H", help="of traffic (default: 24 ÷ nodes)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
