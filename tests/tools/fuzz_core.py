"""`python -m tests.tools.fuzz_core [--seeds N] [--first S] [--steps M]`: the core in environments drawn from seeds.

Each seed has devices, models, clients and faults of its own. A property that does not hold ends the run with status 1:
the command that repeats the failure is printed, with as few events as are needed. A row of a table that never fired in
all seeds is status 1 too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from random import Random

from fsm.verification.decision_coverage import Coverage, lines_of
from fsm.verification.model_checker import in_words
from fsm.verification.sim_faults import in_words as faults_in_words
from fsm.verification.simulator import simulate

PROGRESS_S = 10.0
CHUNK = 8  # seeds that a process takes at a time
ENOUGH_STEPS = 50_000  # with fewer, a row that never fired shows nothing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the seeds; return 0 if every property holds."""
    chosen = _parser().parse_args(arguments)
    coverage, virtual_s, used_s, told_at = Coverage(), 0.0, 0.0, time.monotonic()
    last = chosen.first
    run = partial(_run, steps=chosen.steps, every=chosen.check_every)
    with _mapped(run, range(chosen.first, chosen.first + chosen.seeds), chosen.processes) as ran:
        for one in ran:
            last = one.seed
            coverage.append(one.coverage)
            virtual_s, used_s = virtual_s + one.virtual_s, used_s + one.used_s
            if one.broken:
                _report_failure(one.seed, chosen)
                return 1
            if time.monotonic() - told_at >= PROGRESS_S:
                told_at = time.monotonic()
                print(f"seed {one.seed}: {_summary(coverage, virtual_s, used_s)}", flush=True)
            if chosen.quiet and coverage.without_news >= chosen.quiet:
                break
    print(f"seeds {chosen.first} to {last}, {chosen.steps:,} steps each and until it settled")
    print(_summary(coverage, virtual_s, used_s))
    print("\n".join(lines_of(coverage)))
    return 1 if coverage.rows_never_fired() and coverage.steps >= ENOUGH_STEPS else 0


@dataclass(frozen=True, slots=True)
class Ran:
    """The outcome of one seed."""

    seed: int
    coverage: Coverage  # of this seed alone
    virtual_s: float
    used_s: float  # of one processor
    broken: bool


def _run(seed: int, steps: int, every: int) -> Ran:
    coverage, begun = Coverage(), time.process_time()
    outcome = simulate(Random(seed), steps, every=every, coverage=coverage, shrinks=False, plans_later=seed % 2 == 1)
    return Ran(seed, coverage, outcome.virtual_s, time.process_time() - begun, outcome.violation is not None)


@contextmanager
def _mapped(run: Callable[[int], Ran], seeds: Iterable[int], processes: int) -> Iterator[Iterator[Ran]]:
    """Yield the outcomes of the seeds, in their order."""
    if processes == 1:
        yield map(run, seeds)
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        try:
            yield pool.map(run, seeds, chunksize=CHUNK)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _summary(coverage: Coverage, virtual_s: float, used_s: float) -> str:
    return (
        f"{coverage.steps:,} steps, {virtual_s / 3600:,.1f} virtual hours, "
        f"{coverage.steps / used_s:,.0f} steps a second of a core; "
        f"{len(coverage.triples)} (state, event, decision), none new for {coverage.without_news:,} steps, "
        f"at most {max(coverage.longest, coverage.without_news):,}"
    )


def _report_failure(seed: int, chosen: argparse.Namespace) -> None:
    """Run a seed that failed again, and print how few of its events fail."""
    outcome = simulate(Random(seed), chosen.steps, every=chosen.check_every, plans_later=seed % 2 == 1)
    assert outcome.violation is not None
    print(f"seed {seed}: {outcome.violation.what}")
    print(f"faults: {faults_in_words(outcome.config.faults)}")
    print(f"limits: {outcome.config.limits}")
    print(f"policy: {outcome.config.policy}")
    print(f"what is needed for it, of {outcome.steps:,} events:")
    print(in_words(outcome.violation.trace))
    options = f"--first {seed} --seeds 1 --steps {chosen.steps} --check-every {chosen.check_every}"
    print(f"again: {sys.executable} -m tests.tools.fuzz_core {options}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.fuzz_core", description=__doc__)
    option = parser.add_argument
    option("--seeds", type=_count, default=200, metavar="N", help="how many (default: 200)")
    option("--first", type=_seed, default=1, metavar="S", help="the first of them (default: 1)")
    steps = "events of each before it is to settle (default: 2000)"
    option("--steps", type=_count, default=2000, metavar="M", help=steps)
    every = "ask the properties of a state at each K-th step, and at the end; all others at every step (default: 1)"
    option("--check-every", type=_count, default=1, metavar="K", help=every)
    option("--quiet", type=_count, metavar="Q", help="end once Q steps in a row add no new (state, event, decision)")
    option("--processes", type=_count, default=1, metavar="P", help="that run at a time (default: 1)")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():  # a seed below 0 would draw the same as its counterpart above 0
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
