"""Mutants of the core made by hand, each with a fault that some scheduler has had: the search has to find them all.

A mutant is a patch of behaviour: a method of the core is replaced by one that does something else, mostly the right
thing and then something wrong. `python -m tests.verification.mutants` shows what finds each mutant,
`-v` with the shortest trace.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fsm.verification.model_checker import in_words
from tests.verification import mutants_known, mutants_other, mutants_rules, mutants_undone
from tests.verification.mutant import MUTANTS, Mutant, PatchesNothing

__all__ = ["MUTANTS", "Mutant", "main", "mutants_known", "mutants_other", "mutants_rules", "mutants_undone"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what finds each mutant; return 1 where one is not found, and exit with 2 for unknown arguments."""
    parser = argparse.ArgumentParser(prog="python -m tests.verification.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="FAULT", help="these only, by name or defect")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the shortest trace to each")
    chosen = parser.parse_args(arguments)
    known = dict.fromkeys(name for one in MUTANTS for name in (one.defect, one.name) if name)
    if unknown := [name for name in chosen.names if name not in known]:
        parser.error(f"no fault is called {', '.join(unknown)}; there are {', '.join(known)}")
    mutants = [one for one in MUTANTS if not chosen.names or {one.name, one.defect} & set(chosen.names)]
    console, missed = Console(highlight=False, width=200), 0
    table = Table(box=None, pad_edge=False)
    for column in ("defect", "fault", "scenario", "states", "seconds", "steps", "found by"):
        table.add_column(column, justify="right" if column in ("states", "seconds", "steps") else "left")
    for one in mutants:
        begun = time.process_time()
        try:
            result = one.search(shrinks=chosen.verbose)
        except PatchesNothing as nothing:
            missed += 1
            table.add_row(one.defect, one.name, one.scenario, "", "", "", str(nothing).upper())
            continue
        seconds, found = time.process_time() - begun, result.violation
        missed += found is None
        what = found.what if found else "NOT FOUND"
        steps = str(len(found.trace)) if found else ""
        table.add_row(one.defect, one.name, one.scenario, f"{result.states:,}", f"{seconds:.2f}", steps, what)
        if chosen.verbose and found is not None:
            console.print(f"{one.defect or '---'} {one.name}: {one.about}\n{in_words(found.trace)}\n  => {what}\n")
    console.print(table)
    console.print(f"{len(mutants) - missed} of {len(mutants)} faults are found.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
