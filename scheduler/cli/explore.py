"""The command `loadmaster explore`: search all states of a small core, and show what was found."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.sharedctypes import SynchronizedArray

from rich.table import Table

from fsm.verification.environment import Scenario
from fsm.verification.model_checker import Exploration, explore, in_words
from fsm.verification.scenarios import SCENARIOS
from scheduler.cli.output import SafeConsole
from scheduler.errors.exceptions import InvalidSettings

VIOLATED = 1  # the exit status
PROGRESS_S = 1.0


@dataclass(frozen=True, slots=True)
class Search:
    """The result of one search, and the processor time that it took."""

    found: Exploration
    seconds: float


Progress = SynchronizedArray  # states and edges of each scenario, in turn
_progress: Progress[int] | None = None  # of this process's parent


def run_explore(chosen: argparse.Namespace) -> int:
    """Search the chosen scenarios and return the exit status: 0 where everything holds.

    Raises `InvalidSettings` for an unknown scenario.
    """
    scenarios = _chosen(chosen.scenario)
    processes = min(chosen.processes, len(scenarios))
    context = get_context("spawn")
    progress: Progress[int] = context.Array("q", 2 * len(scenarios), lock=True)
    with ProcessPoolExecutor(processes, context, _share, (progress,)) as pool:
        begun = time.monotonic()
        # the longest first, so that at the end no process is still at work on it alone
        order = sorted(range(len(scenarios)), key=lambda at: -scenarios[at].most)
        searches = {at: pool.submit(_search, at, scenarios[at], chosen.most) for at in order}
        _watch(list(searches.values()), progress, begun)
        found = [searches[at].result() for at in range(len(scenarios))]
    _print(found, time.monotonic() - begun, processes)
    return VIOLATED if any(search.found.violation for search in found) else 0


def _chosen(names: Sequence[str]) -> list[Scenario]:
    known = {scenario.name: scenario for scenario in SCENARIOS}
    for name in names:
        if name not in known:
            raise InvalidSettings("--scenario", name, f"one of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names or known)]


def _share(progress: Progress[int]) -> None:
    """Prepare a process of the pool."""
    global _progress
    _progress = progress
    gc.disable()  # states hold no reference cycles, and there are millions of objects to scan


def _search(at: int, scenario: Scenario, most: int | None) -> Search:
    shared = _progress
    assert shared is not None, "called outside of the pool"

    def watch(states: int, edges: int) -> None:
        shared[2 * at : 2 * at + 2] = [states, edges]

    begun = time.process_time()
    found = explore(scenario, most, watch=watch)
    return Search(found, time.process_time() - begun)


def _watch(searches: Sequence[Future[Search]], progress: Progress[int], begun: float) -> None:
    """Print each second how far the searches have come, until they are over."""
    while wait(searches, PROGRESS_S).not_done:
        ended = sum(search.done() for search in searches)
        states, edges = sum(progress[0::2]), sum(progress[1::2])
        line = f"{time.monotonic() - begun:6.0f} s  {ended} of {len(searches)} searches  {states:,} states"
        print(f"{line}  {edges:,} edges", end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def _print(searches: Sequence[Search], seconds: float, processes: int) -> None:
    console = SafeConsole(highlight=False)
    table = Table(box=None, pad_edge=False, show_footer=True)
    states, edges = sum(one.found.states for one in searches), sum(one.found.edges for one in searches)
    table.add_column("scenario", "all")
    table.add_column("states", f"{states:,}", justify="right")
    table.add_column("edges", f"{edges:,}", justify="right")
    table.add_column("depth", str(max(one.found.depth for one in searches)), justify="right")
    table.add_column("complete")
    table.add_column("seconds", f"{sum(one.seconds for one in searches):.1f}", justify="right")
    table.add_column("found")
    for one in searches:
        found = one.found
        table.add_row(
            found.scenario, f"{found.states:,}", f"{found.edges:,}", str(found.depth),
            "yes" if found.complete else "no", f"{one.seconds:.1f}", found.violation.what if found.violation else "",
        )  # fmt: skip
    console.print(table)
    console.print(f"{seconds:.0f} s in {processes} process{'es' if processes > 1 else ''}; depth is in events.")
    for one in searches:
        if one.found.violation is not None:
            console.print(f"\n{one.found.scenario}: {one.found.violation.what}", markup=False)
            console.print(in_words(one.found.violation.trace), markup=False, soft_wrap=True)
