"""`python -m tests.fuzz_core [--seeds N] [--first S] [--steps M]`: the core in worlds drawn from seeds, with faults.

Each seed has devices, models, clients and faults of its own. Whatever does not hold ends the run with status 1: the
command that does it again is printed, and as few of its events as are needed. A row of a table that never fired in all
seeds is status 1 too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from random import Random

from fsm.coverage import Coverage, lines_of
from fsm.explore import in_words
from fsm.faults import in_words as faults_in_words
from fsm.simulation import Outcome, simulate

PROGRESS_S = 10.0
ENOUGH_STEPS = 50_000  # with fewer, a row that never fired says nothing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the seeds; return 0 where everything holds."""
    chosen = _parser().parse_args(arguments)
    coverage, virtual_s, begun = Coverage(), 0.0, time.process_time()
    told_at = time.monotonic()
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        outcome = simulate(Random(seed), chosen.steps, every=chosen.check_every, coverage=coverage)
        virtual_s += outcome.virtual_s
        if outcome.violation is not None:
            _report_failure(outcome, seed, chosen)
            return 1
        if time.monotonic() - told_at >= PROGRESS_S:
            told_at = time.monotonic()
            print(f"seed {seed}: {_summary(coverage, virtual_s, begun)}", flush=True)
    print(
        f"seeds {chosen.first} to {chosen.first + chosen.seeds - 1}, {chosen.steps:,} steps each and until it settled"
    )
    print(_summary(coverage, virtual_s, begun))
    print("\n".join(lines_of(coverage)))
    return 1 if coverage.rows_never_fired() and coverage.steps >= ENOUGH_STEPS else 0


def _summary(coverage: Coverage, virtual_s: float, begun: float) -> str:
    used_s = time.process_time() - begun
    return (
        f"{coverage.steps:,} steps, {virtual_s / 3600:,.1f} virtual hours, "
        f"{coverage.steps / used_s:,.0f} steps a second; "
        f"{len(coverage.triples)} (state, event, decision), none new for {coverage.without_news:,} steps, "
        f"at most {max(coverage.longest, coverage.without_news):,}"
    )


def _report_failure(outcome: Outcome, seed: int, chosen: argparse.Namespace) -> None:
    assert outcome.violation is not None
    print(f"seed {seed}: {outcome.violation.what}")
    print(f"faults: {faults_in_words(outcome.scene.faults)}")
    print(f"limits: {outcome.scene.limits}")
    print(f"policy: {outcome.scene.policy}")
    print(f"what is needed for it, of {outcome.steps:,} events:")
    print(in_words(outcome.violation.way))
    options = f"--first {seed} --seeds 1 --steps {chosen.steps} --check-every {chosen.check_every}"
    print(f"again: {sys.executable} -m tests.fuzz_core {options}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_core", description=__doc__)
    option = parser.add_argument
    option("--seeds", type=int, default=200, metavar="N", help="how many (default: 200)")
    option("--first", type=int, default=1, metavar="S", help="the first of them (default: 1)")
    option("--steps", type=int, default=2000, metavar="M", help="events of each before it is to settle (default: 2000)")
    every = "make the core's own check at each K-th step, and at the end; the audit is made at every one (default: 1)"
    option("--check-every", type=int, default=1, metavar="K", help=every)
    return parser


if __name__ == "__main__":
    sys.exit(main())
