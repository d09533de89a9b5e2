"""The documentation: its examples run, its tables are complete, and the names in it exist."""

from __future__ import annotations

import ast
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import scheduler
from fsm.eviction.policies import Candidate
from fsm.machine.runner import RunnerState
from fsm.messages.commands import Command
from fsm.messages.decision_log import Decision, Transition
from fsm.messages.events import Event
from fsm.messages.refusals import Refusal
from fsm.state.snapshot import DeviceView
from scheduler import Lease, RunnerStatus, Scheduler, SchedulerError, Status, WaitStatus
from scheduler.config.settings import settings_table
from scheduler.runtime.request_parser import AcquireOptions
from tests.support.tiny_models import write_adapter, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md"))]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
EXAMPLES = [ROOT / "README.md", ROOT / "docs" / "api.md", ROOT / "docs" / "engines.md", ARCHITECTURE]
LIMIT_S = 120.0  # an example takes about 2 s

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PRINTED = re.compile(r"# → (.+)$", re.MULTILINE)  # the output that an example names
_NAMED_TEST = re.compile(r"`(\w+/test_\w+\.py)::(\w+)`")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def sections(page: Path) -> Iterator[tuple[str, str]]:
    """Yield each section's title and text; text before the first heading has the page's name."""
    title, lines, fenced = page.stem, list[str](), False
    for line in read(page).splitlines(keepends=True):
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            yield title, "".join(lines)
            title, lines = line[3:].strip(), []
        lines.append(line)
    yield title, "".join(lines)


def programs() -> dict[str, str]:
    """Return the Python blocks of each section that has any, in order, as one program."""
    found = {}
    for page in EXAMPLES:
        for title, text in sections(page):
            if code := "\n".join(source for language, source in _FENCE.findall(text) if language == "python"):
                found[f"{page.name}: {title}"] = code
    return found


def without_fences(text: str) -> str:
    return _FENCE.sub("", text)


def rows(text: str) -> list[list[str]]:
    """Return the cells of every row of every table, headings and rules left out."""
    found = []
    for line in without_fences(text).splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            found.append([cell.strip() for cell in line.strip()[1:-1].split("|")])
    return found


def words(text: str) -> set[str]:
    """Return the identifiers that are set as code."""
    spans = re.findall(r"`([^`]+)`", without_fences(text))
    return {word for span in spans for word in re.findall(r"[A-Za-z_][A-Za-z_0-9]*", span)}


def anchors(text: str) -> list[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_fences(text), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with models under the names that the examples use."""
    models = tmp_path_factory.mktemp("documentation") / "models"
    models.mkdir()
    for seed, name in enumerate(("smollm2", "embedder")):
        write_tiny_model(models / f"{name}.gguf", seed=seed, context=1024)
    for seed, name in enumerate(("sql", "tone")):
        write_adapter(models / f"{name}-lora.gguf", seed)
    return models.parent


# -- examples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", programs())
def test_an_example_runs_and_prints_what_it_says(title: str, folder: Path, tmp_path: Path) -> None:
    """An example runs as a program of its own with real models, ends in order, and prints what it says.

    An example of the README runs as pasted in an empty folder, with the demonstration's model.
    """
    code = programs()[title]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path if title.startswith("README.md") else folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=LIMIT_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    printed = iter(done.stdout.splitlines())
    for expected in _PRINTED.findall(code):
        assert any(line.endswith(expected) for line in printed), f"{expected!r} is missing, or too late: {done.stdout}"


@pytest.mark.parametrize("title", programs())
def test_an_example_fits_the_page(title: str) -> None:
    """The lines of an example have at most 120 characters."""
    assert [line for line in programs()[title].splitlines() if len(line) > 120] == []


# -- settings and links ------------------------------------------------------------------------------------------------


def test_the_table_of_settings_is_the_one_that_is_generated() -> None:
    """The table of settings between its markers is what `settings_table()` returns."""
    before, _, rest = read(ROOT / "docs" / "settings.md").partition("<!-- settings -->\n")
    table, _, after = rest.partition("<!-- /settings -->\n")
    assert before and after and table == settings_table()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    """Every link leads to a file that exists, and to a heading that exists."""
    for target in _LINK.findall(without_fences(read(page))):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.is_file(), f"{page.name}: no file {target}"
            assert not anchor or anchor in anchors(read(file)), f"{page.name}: no heading {target}"


# -- the API -----------------------------------------------------------------------------------------------------------


def test_every_error_is_listed_with_its_fields_and_its_status() -> None:
    """Every error is a row of the table with its fields and its status."""
    listed = {}
    for cells in rows(dict(sections(ROOT / "docs" / "api.md"))["Errors"]):
        if cells[0].startswith("`"):
            listed[cells[0].strip("`")] = (cells[1].split()[0], re.findall(r"\w+", cells[2]))
    public = [getattr(scheduler, name) for name in scheduler.__all__]
    kinds = [each for each in public if isinstance(each, type) and issubclass(each, SchedulerError)]
    assert {name: (status, sorted(named)) for name, (status, named) in listed.items()} == {
        kind.__name__: (str(kind.status), sorted(each.name for each in fields(kind))) for kind in kinds
    }


def test_every_keyword_of_a_request_is_listed() -> None:
    """Every keyword argument of a request is listed in the order of declaration."""
    section = dict(sections(ROOT / "docs" / "api.md"))["Asking for a model"]
    listed = [cells[0].strip("`") for cells in rows(section) if cells[0].startswith("`")]
    assert listed == list(get_type_hints(AcquireOptions))


def test_everything_public_is_described() -> None:
    """Every public name is described: imports, methods of schedulers and leases, and fields of their results."""
    described = words(read(ROOT / "docs" / "api.md"))
    methods = {name for kind in (Scheduler, Lease) for name in vars(kind) if not name.startswith("_")}
    values = (Status, RunnerStatus, WaitStatus, DeviceView, Transition, Decision, Candidate)
    held = {each.name for kind in values for each in fields(kind)}
    assert {*scheduler.__all__, *methods, *held} - described == set()


# -- the design --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "kinds"),
    [
        ("Events", [kind.__name__ for kind in get_args(Event)]),
        ("Commands", [kind.__name__ for kind in get_args(Command)]),
        ("Refusals", [kind.__name__ for kind in get_args(Refusal)]),
        ("The runner's machine", [state.name for state in RunnerState]),
    ],
)
def test_every_part_of_the_core_is_listed(section: str, kinds: list[str]) -> None:
    """Each event, command and refusal of the core is a row of its section's table."""
    listed = [cells[0].strip("`") for cells in rows(dict(sections(ROOT / "docs" / "design.md"))[section])]
    assert sorted(listed[1:]) == sorted(kinds)


# -- the architecture --------------------------------------------------------------------------------------------------


def test_every_file_that_is_named_exists() -> None:
    """Every file that the page on the architecture names exists."""
    named = re.findall(r"`((?:fsm|scheduler|tests)/[\w/.]+)`", read(ARCHITECTURE))
    assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_every_package_has_its_row() -> None:
    """Every package of `fsm` and `scheduler`, and every module beside the packages, is a row of the table."""
    entries = [entry for top in ("fsm", "scheduler") for entry in (ROOT / top).iterdir()]
    packages = {entry for entry in entries if (entry / "__init__.py").is_file()}
    modules = {entry for entry in entries if entry.suffix == ".py" and entry.name != "__init__.py"}
    listed = [cells[0].strip("`") for cells in rows(dict(sections(ARCHITECTURE))["The packages"])]
    assert sorted(listed[1:]) == sorted(entry.relative_to(ROOT).as_posix() for entry in packages | modules)


@pytest.mark.parametrize("page", ["architecture.md", "glossary.md"])
def test_every_symbol_that_is_named_can_be_imported(page: str) -> None:
    """Every class and function that the pages name can be imported by that name."""
    named = re.findall(r"`((?:fsm|scheduler|tests)(?:\.\w+)+)`", without_fences(read(ROOT / "docs" / page)))
    assert named and [name for name in named if not is_there(name)] == []


def is_there(symbol: str) -> bool:
    try:
        pkgutil.resolve_name(symbol)
    except (ImportError, AttributeError):
        return False
    return True


# -- parity ------------------------------------------------------------------------------------------------------------


@cache
def names_in(file: str) -> frozenset[str]:
    """Return the names of the tests in a file, none where the file does not exist."""
    path = ROOT / "tests" / file
    if not path.is_file():
        return frozenset()
    nodes = ast.walk(ast.parse(read(path)))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    return frozenset(name for name in names if name.startswith(("test_", "Test")))


def test_every_behaviour_of_the_reference_has_its_row_with_tests() -> None:
    """S01 to S34 have a row with tests and a verdict each, in order, and N01 to N15 and D01 to D20 are mentioned."""
    text = read(ROOT / "docs" / "parity.md")
    table = {cells[0]: cells for cells in rows(text)}
    assert [id for id in table if re.fullmatch(r"S\d\d", id)] == [f"S{number:02}" for number in range(1, 35)]
    others = [*(f"N{number:02}" for number in range(1, 16)), *(f"D{number:02}" for number in range(1, 21))]
    assert [id for id in others if id not in table] == []
    for id, cells in table.items():
        if re.fullmatch(r"S\d\d", id):
            assert _NAMED_TEST.search(cells[2]), f"{id} has no test"
            assert cells[3].startswith(("same", "better")), f"{id} has no verdict"
        elif re.fullmatch(r"[ND]\d\d", id):
            spoken_of = cells[2].startswith(
                ("not yet", "on purpose", "comes with", "better, because")
            ) or _NAMED_TEST.search(cells[2])
            assert spoken_of, f"{id} is not mentioned"


def test_every_test_that_is_named_exists() -> None:
    """Every test that the page on parity names exists."""
    named = _NAMED_TEST.findall(read(ROOT / "docs" / "parity.md"))
    assert [f"{file}::{name}" for file, name in named if name not in names_in(file)] == []
