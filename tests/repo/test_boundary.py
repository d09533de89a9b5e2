"""The folders are the boundary: which package may import which, what `fsm` may import, and how the code is laid out."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("fsm", "scheduler")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
FSM = [module for module in SOURCES if module.split(".")[0] == "fsm"]
PURE_MODULES = [
    *FSM,
    "scheduler.api.fit_advice",
    "scheduler.recording.codec",
    "scheduler.models.model_info",
    "scheduler.engines.llama_options",
    "scheduler.engines.llama_profile",
    "scheduler.engines.llama_sizing",
]  # the core, and pure modules of the shell

# The packages from the bottom to the top, and the modules that stand beside them. A package imports itself and packages
# of lower layers, and no package of its own layer.
LAYERS = (
    ("fsm.domain",),
    ("fsm.sizing", "fsm.machine"),
    ("fsm.placement", "fsm.eviction", "fsm.messages"),
    ("fsm.state",),
    ("fsm.planning",),
    ("fsm.lifecycle",),
    ("fsm.core",),
    ("fsm.preview", "fsm.verification", "fsm.cluster"),
    ("scheduler.errors", "scheduler.devices", "scheduler.concurrency"),
    ("scheduler.config", "scheduler.recording"),
    ("scheduler.models",),
    ("scheduler.engines",),
    ("scheduler.runtime",),
    ("scheduler.api",),
    ("scheduler",),
    ("scheduler.http", "scheduler.testing"),
    ("scheduler.cluster",),
    ("scheduler.cli",),
)
# Packages that few packages may import: (package, its importers).
RESERVED = (
    ("fsm.verification", {"fsm.verification", "scheduler.cli.explore"}),
    ("scheduler.recording", {"scheduler.recording", "scheduler.api", "scheduler.cli"}),
)
# Pure parts of the standard library, without time, threads, files, processes, sockets or randomness.
PURE = {
    "__future__", "array", "bisect", "collections", "collections.abc", "dataclasses", "enum", "functools", "hashlib",
    "heapq", "itertools", "marshal", "math", "operator", "types", "typing", "zlib",
}  # fmt: skip
EXCEPTIONS = {
    "fsm.machine.transition_table": {"logging", "transitions"},  # it shields others from the library and its logger
    "fsm.verification.sim_faults": {"random"},  # for the type of the generator that it is passed
    "fsm.verification.sim_config": {"random"},
    "fsm.verification.sim_environment": {"random"},
    "fsm.verification.simulator": {"random", "re"},
}
# Parts of the core that the shell may not import: state, planning and lifecycle, and the records of their tables.
PRIVATE = ("fsm.state", "fsm.planning", "fsm.lifecycle")
TABLES = {"Request", "Runner", "RUNNER_TABLE", "Table"}
SEEN_BY_THE_SHELL = {  # the codec encodes whole states, with the records in them
    "scheduler.recording.codec": {"fsm.machine.request.Request", "fsm.machine.runner.Runner"},
}
IMPURE_NAMES = {"open", "input", "print", "exec", "eval", "__import__", "globals", "breakpoint"}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"), module)


@cache
def imports_of(module: str, *, when_run: bool = False) -> frozenset[str]:
    """Return the full names of the modules that a module imports; `when_run` leaves imports for types alone out."""
    names: set[str] = set()
    tree = tree_of(module)
    for node in set(ast.walk(tree)) - (under(tree, "TYPE_CHECKING") if when_run else set()):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: the module has a relative import"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {part if part in SOURCES else node.module or "" for part in parts}
    return frozenset(names)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def package_of(module: str) -> str | None:
    """Return the package of `LAYERS` that a module belongs to, or None for the empty `fsm/__init__.py`."""
    packages = [package for layer in LAYERS for package in layer if is_in(module, package)]
    return max(packages, key=len, default=None)


def layer_of(module: str) -> int:
    package = package_of(module)
    return next(place for place, layer in enumerate(LAYERS) if package in layer)


def under(tree: ast.Module, condition: str) -> set[ast.AST]:
    """Return every node under an `if` of the module whose condition begins with `condition`."""
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test).startswith(condition)]
    return {inner for block in blocks for inner in ast.walk(block)}


@pytest.mark.parametrize("module", SOURCES)
def test_a_package_imports_itself_and_lower_layers(module: str) -> None:
    """A module imports its own package and packages of lower layers only."""
    ours = {name for name in imports_of(module) if name.split(".")[0] in ("fsm", "scheduler")}
    too_high = {name for name in ours if package_of(name) != package_of(module) and layer_of(name) >= layer_of(module)}
    assert not too_high


def test_every_module_has_a_layer() -> None:
    """Every package has a layer, and `fsm/__init__.py` is empty."""
    assert [module for module in SOURCES if package_of(module) is None] == ["fsm"]
    assert not imports_of("fsm")


def test_no_module_imports_itself_in_a_circle() -> None:
    """No module imports itself in a circle, imports for types alone left out."""
    graph = {module: imports_of(module, when_run=True) & SOURCES.keys() for module in SOURCES}
    assert set(TopologicalSorter(graph).static_order()) == set(SOURCES)


@pytest.mark.parametrize(("package", "importers"), RESERVED)
def test_few_import_a_reserved_package(package: str, importers: set[str]) -> None:
    """The proof tools and the recordings are imported by few packages, and by none that runs in production."""
    found = [module for module in SOURCES if any(is_in(name, package) for name in imports_of(module))]
    assert [module for module in found if not any(is_in(module, one) for one in importers)] == []


@pytest.mark.parametrize("module", [module for module in SOURCES if is_in(module, "scheduler")])
def test_the_shell_asks_the_core_and_does_not_hold_its_tables(module: str) -> None:
    """The shell imports values, events and commands of the core, and asks `Core` about its state."""
    tree = tree_of(module)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    private = {name for name in names if any(is_in(name, package) for package in PRIVATE)}
    tables = {name for name in names if is_in(name, "fsm") and name.rpartition(".")[2] in TABLES}
    assert private | tables == SEEN_BY_THE_SHELL.get(module, set())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "_state" not in attributes


def test_what_is_private_to_the_core_exists() -> None:
    """The modules that are private to the core exist, so that a renamed module stays private."""
    assert set(PRIVATE) <= set(SOURCES)
    bodies = [node for module in FSM for node in tree_of(module).body]
    defined = {node.name for node in bodies if isinstance(node, ast.ClassDef)}
    assigned = {ast.unparse(target) for node in bodies if isinstance(node, ast.Assign) for target in node.targets}
    assert defined | assigned >= TABLES


@pytest.mark.parametrize("module", PURE_MODULES)
def test_the_core_imports_nothing_impure(module: str) -> None:
    """A pure module imports nothing with threads, time, files, sockets or randomness; the core nothing of the shell."""
    pure = {"fsm"} if is_in(module, "fsm") else {"fsm", *PURE_MODULES}
    foreign = {name for name in imports_of(module) if not any(is_in(name, one) for one in pure)}
    assert foreign <= PURE | EXCEPTIONS.get(module, set())


def test_only_the_table_imports_transitions() -> None:
    """One module alone imports the library transitions."""
    assert [module for module in SOURCES if "transitions" in imports_of(module)] == ["fsm.machine.transition_table"]


@pytest.mark.parametrize("module", [name for name, allowed in EXCEPTIONS.items() if "random" in allowed])
def test_the_simulation_makes_no_chance_of_its_own(module: str) -> None:
    """The simulation makes no `random.Random` of its own and calls no function of the module random."""
    nodes = list(ast.walk(tree_of(module)))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in imports if "random" in ast.unparse(node) for alias in node.names]
    assert names == ["Random"]
    assert not [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "Random"]


@pytest.mark.parametrize("module", PURE_MODULES)
def test_the_core_calls_nothing_impure(module: str) -> None:
    """The core neither prints nor reads, except where a module is run as a program."""
    tree = tree_of(module)
    as_program = under(tree, "__name__")  # code that runs as a program
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node not in as_program}
    assert not names & IMPURE_NAMES


@pytest.mark.parametrize("module", PURE_MODULES)
def test_the_core_knows_the_type_of_everything(module: str) -> None:
    """The core uses no `Any`, by name or by attribute."""
    tree = tree_of(module)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "Any" not in names | attributes


@pytest.mark.parametrize("module", SOURCES)
def test_functions_are_at_most_40_lines_long(module: str) -> None:
    """No function is longer than 40 lines, docstring included."""
    functions = [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > 40} == {}
