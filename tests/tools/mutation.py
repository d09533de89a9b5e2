"""`python -m tests.tools.mutation [module …]`: change the core in small ways, and list changes that no test notices.

mutmut makes the changes; `make mutation` installs it. It works on a copy in build/mutation with a suite of its own: the
core's tests told in events, and a few drawn tests with fixed examples. An interrupted run continues; functions that
changed are tried again. `--again` tries the survivors once more, for when tests were added.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from shutil import rmtree

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "mutation"
MODULES = (
    "machine.transition_table", "machine.runner", "machine.request", "state.memory_ledger", "placement.layer_split",
    "placement.search", "eviction.reuse_prediction", "eviction.policies", "eviction.victim_selection",
    "planning.availability", "planning.deadline_admission", "planning.eviction_candidates", "planning.load_slots",
    "planning.infeasibility", "planning.planning_context", "planning.planner", "planning.make_room",
    "planning.deadlock", "planning.relocation", "planning.failed_loads", "planning.automatic_options",
    "planning.thread_allocation", "state.runner_match", "state.model_record", "state.core_state",
    "state.request_queue", "sizing.footprint", "sizing.load_history",
    "lifecycle.requests", "lifecycle.runners", "lifecycle.loads", "lifecycle.measurements", "lifecycle.failures",
    "lifecycle.memory_recovery", "lifecycle.device_claims", "lifecycle.apply_plan", "core",
)  # fmt: skip
SMALLEST = "machine.request"  # the module with the fewest mutants, some fifteen
SUITE = (
    "tests/__init__.py", "tests/*/__init__.py", "tests/support/pool.py", "tests/support/models.py",
    "tests/core/test_*.py",
    "tests/tools/bench/__init__.py", "tests/tools/bench/growth.py", "tests/support/brute_force.py",
)  # fmt: skip
BY_CHANCE = ("--ignore=tests/core/test_machine.py", "--deselect=tests/core/test_shrink.py::TestLimits")
CONFIGURATION = """\
[tool:pytest]
pythonpath = .
addopts = --import-mode=importlib -p no:cacheprovider {options}

[mutmut]
source_paths = fsm
pytest_add_cli_args_test_selection = tests
only_mutate =
{files}
"""
CONFTEST = """\
from hypothesis import settings

settings.register_profile("mutation", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("mutation")
"""
UNNOTICED = ("survived", "no tests", "suspicious")


def prepare() -> None:
    """Bring the copy up to date; unchanged files stay untouched."""
    files = "".join(
        f"    fsm/{module.replace('.', '/')}.py\n" for module in MODULES
    )  # always all: mutmut forgets functions that are left out
    wanted = {"setup.cfg": CONFIGURATION.format(options=" ".join(BY_CHANCE), files=files).encode()}
    wanted["tests/conftest.py"] = CONFTEST.encode()
    for pattern in ("fsm/**/*.py", "scheduler/**/*.py", *SUITE):  # the tests have llama.cpp's models sized
        wanted |= {str(path.relative_to(ROOT)): path.read_bytes() for path in sorted(ROOT.glob(pattern))}
    (WORK / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)  # which test runs what: tests may have changed
    for old in [*WORK.glob("fsm/**/*.py"), *WORK.glob("scheduler/**/*.py"), *WORK.glob("tests/**/*.py")]:
        if str(old.relative_to(WORK)) not in wanted:
            old.unlink()
    for name, content in wanted.items():
        path = WORK / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def mutmut(*arguments: str, quiet: bool = True) -> str:
    """Run mutmut on the copy; return its output where that is not shown at once."""
    command = [sys.executable, "-m", "mutmut", *arguments]
    done = subprocess.run(command, cwd=WORK, stdout=subprocess.PIPE if quiet else None, text=True, check=False)
    if done.returncode:
        sys.exit(f"mutmut {arguments[0]} failed with status {done.returncode}")
    return done.stdout or ""


def verdicts() -> dict[str, str]:
    """Return the outcome of each mutant: killed, timeout, survived, no tests, not checked …"""
    lines = [line.strip().rpartition(": ") for line in mutmut("results", "--all", "true").splitlines()]
    return {name: verdict for name, _, verdict in lines if name.startswith("fsm.")}


def module_of(name: str) -> str:
    """Return the module of `fsm` that a mutant is in: "planning.planner" of "fsm.planning.planner.x_…"."""
    return name.rpartition(".")[0].removeprefix("fsm.")


def edited() -> bool:
    """Return whether the core was changed since mutmut last read it."""
    files = [(source, WORK / "mutants" / source.relative_to(WORK)) for source in WORK.glob("fsm/**/*.py")]
    return any(copy.exists() and copy.stat().st_mtime < source.stat().st_mtime for source, copy in files)


def to_do(modules: Iterable[str], *, again: bool) -> list[str]:
    """Return the mutants of some modules that are to be tried: by name, or all of a module without outcomes."""
    found = verdicts()
    wanted = ("not checked", *UNNOTICED) if again else ("not checked",)
    known = {module_of(name) for name in found}
    names = [name for name, verdict in found.items() if module_of(name) in modules and verdict in wanted]
    return names + [f"fsm.{module}.*" for module in modules if module not in known]


def report(found: dict[str, str], modules: Sequence[str]) -> None:
    """Print each mutant that no test noticed, then the score by module."""
    for name, verdict in found.items():
        if verdict in UNNOTICED and module_of(name) in modules:
            print(f"\n{name}: {verdict}\n{mutmut('show', name).rstrip()}")
    print(f"\n{'module':<30}{'mutants':>9}{'killed':>9}{'survived':>9}{'not run':>9}{'score':>8}")
    total: Counter[str] = Counter()
    for module in (*modules, "all"):
        counts = Counter(verdict for name, verdict in found.items() if module_of(name) == module)
        total += counts
        print(_row(module, total if module == "all" else counts))


def _row(module: str, counts: Counter[str]) -> str:
    missed, not_run = sum(counts[verdict] for verdict in UNNOTICED), counts["not checked"]
    tried = counts.total() - not_run
    score = f"{100 * (tried - missed) / tried:.1f} %" if tried else "-"
    return f"{module:<30}{counts.total():>9}{tried - missed:>9}{missed:>9}{not_run:>9}{score:>8}"


def main() -> int:
    """Run the mutants that have not been run, and print the outcomes."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.mutation", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("modules", nargs="*", help=f"of fsm; by default {' '.join(MODULES)}")
    parser.add_argument("--again", action="store_true", help="try once more what had survived")
    parser.add_argument("--fresh", action="store_true", help="forget what was found before")
    parser.add_argument("--report", action="store_true", help="run nothing, print what was found so far")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="at once; default: one for each core"
    )
    chosen = parser.parse_args()
    modules = tuple(chosen.modules or MODULES)
    if chosen.fresh:
        rmtree(WORK, ignore_errors=True)
    if not chosen.report:
        prepare()
        everything = modules == MODULES and not chosen.again
        if not everything and edited():  # mutmut first forgets the outcomes of functions that changed
            mutmut("run", "--max-children", str(chosen.processes), f"fsm.{SMALLEST}.*", quiet=False)
        names = [] if everything else to_do(modules, again=chosen.again)
        if everything or names:
            mutmut("run", "--max-children", str(chosen.processes), *names, quiet=False)
    report(verdicts(), modules)
    return 0


if __name__ == "__main__":
    sys.exit(main())
