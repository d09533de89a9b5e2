"""The folder is the boundary: what `fsm` may import, and how the code is laid out."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FSM = {path.stem: path for path in sorted((ROOT / "fsm").glob("*.py"))}
SOURCES = sorted(path for folder in ("fsm", "scheduler") for path in (ROOT / folder).rglob("*.py"))

# Pure parts of the standard library: nothing that knows of time, threads, files, processes, sockets or chance.
PURE = {
    "__future__", "array", "bisect", "collections", "collections.abc", "dataclasses", "enum", "functools", "hashlib",
    "heapq", "itertools", "marshal", "math", "operator", "types", "typing", "zlib",
}  # fmt: skip
EXCEPTIONS = {
    "table": {"logging", "transitions"},  # it shields the rest from the library, and quietens its logger
    "faults": {"random"},  # these for the type of what they are handed
    "scene": {"random"},
    "simulated": {"random"},
    "simulation": {"random", "re"},
}
# Imports point one way: a module may import those above it. One that is not listed stands on top of them all.
ORDER = (
    "table", "model", "footprint", "remembered", "options", "estimate", "limits", "timers", "request", "ledger",
    "runner", "commands", "events", "journal", "dealing", "placement", "reuse", "eviction", "choosing", "pool",
    "supply", "keeping", "threads", "automatic", "waiting", "candidates", "loading", "plan", "refusing", "explain",
    "planning", "snapshot", "actions", "prefetching", "endings", "claims", "core", "record", "preview", "world",
    "canonical", "promises", "judge", "explore", "scenarios",
)  # fmt: skip
IMPURE_NAMES = {"open", "input", "print", "exec", "eval", "__import__", "globals", "breakpoint"}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(path: Path) -> set[str]:
    """Return the full names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            whole = node.module == "fsm"
            names |= {f"fsm.{alias.name}" for alias in node.names} if whole else {node.module or ""}
    return names


def siblings_of(module: str) -> set[str]:
    """Return the modules of `fsm` that one of them imports."""
    return {name.removeprefix("fsm.") for name in imports_of(FSM[module]) if name.startswith("fsm.")}


def under_main(tree: ast.Module) -> set[ast.AST]:
    """Return every node under `if __name__ == "__main__"`, which runs as a program and not as the core."""
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test).startswith("__name__")]
    return {inner for block in blocks for inner in ast.walk(block)}


@pytest.mark.parametrize("module", FSM)
def test_the_core_imports_nothing_impure(module: str) -> None:
    """No threads, no time, no files, no sockets, no chance, and nothing of the shell."""
    foreign = {name for name in imports_of(FSM[module]) if not name.startswith("fsm")}
    assert foreign <= PURE | EXCEPTIONS.get(module, set())


def test_only_the_table_imports_transitions() -> None:
    """The rest of the code is shielded from the library."""
    importers = {str(path.relative_to(ROOT)) for path in SOURCES if "transitions" in imports_of(path)}
    assert importers == {"fsm/machine/transition_table.py"}


@pytest.mark.parametrize("module", [name for name, allowed in EXCEPTIONS.items() if "random" in allowed])
def test_the_simulation_makes_no_chance_of_its_own(module: str) -> None:
    """It is handed a `random.Random`, and makes none; the library's own functions share hidden state."""
    imports = [node for node in ast.walk(tree_of(FSM[module])) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in imports if "random" in ast.unparse(node) for alias in node.names]
    assert names == ["Random"]
    assert not [
        node
        for node in ast.walk(tree_of(FSM[module]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Random"
    ]


@pytest.mark.parametrize("module", FSM)
def test_the_core_calls_nothing_impure(module: str) -> None:
    """No printing and no reading, but where a module is run as a program."""
    tree = tree_of(FSM[module])
    as_program = under_main(tree)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node not in as_program}
    assert not names & IMPURE_NAMES


@pytest.mark.parametrize("module", FSM)
def test_the_core_knows_the_type_of_everything(module: str) -> None:
    """No `Any`, by name or by attribute."""
    tree = tree_of(FSM[module])
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "Any" not in names | attributes


@pytest.mark.parametrize("module", FSM)
def test_imports_point_one_way(module: str) -> None:
    """A module may import those that come before it in the order; the search and the simulation stand on top."""
    allowed = set(ORDER[: ORDER.index(module)]) if module in ORDER else set(FSM) - {module}
    assert siblings_of(module) <= allowed


def test_there_are_no_circles() -> None:
    """Not even among those on top."""
    order = list(TopologicalSorter({module: siblings_of(module) for module in FSM}).static_order())
    assert set(ORDER) <= set(order)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_at_most_400_lines_long(path: Path) -> None:
    """What is longer has two subjects."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_at_most_40_lines_long(path: Path) -> None:
    """What is longer does two things; a docstring counts."""
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > 40} == {}
