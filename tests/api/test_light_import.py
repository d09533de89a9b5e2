"""What is imported when: a program that imports the package, or asks the command for help, pays for little."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import scheduler
import scheduler.public
from scheduler.models.gguf_constants import gguf_constants
from tests.support.real import write_models

MODULES = "; import sys; print(*sys.modules)"
PARSE_HELP = """
import sys
from scheduler.cli.main import main
try:
    main(["--help"])
except SystemExit:
    print(*sys.modules)
"""
FIRST_ANSWER = """
import sys
from scheduler import Scheduler
with Scheduler(measurement_file=None, lock_folder=None) as scheduler, scheduler.acquire(sys.argv[1]) as lease:
    before = set(sys.modules)
    with lease.stream("a", max_tokens=1) as pieces:
        next(pieces, None)
    print("httpx2" in before, *sys.modules.keys() - before)
"""
CLIENT = {"httpx2", "httptools", "openai", "starlette"}
FILES = {"gguf", "numpy", "rich", "xllamacpp", "matplotlib", "huggingface_hub", "fsm.verification"}
ALL = {"psutil", "pynvml", "filelock", "asyncio", "sqlite3", "scheduler.api.scheduler", "fsm.core"}


def modules_after(code: str, *arguments: str) -> set[str]:
    """Return the modules that a Python of its own has imported after this code."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("code", "left_out"),
    [
        (f"import scheduler{MODULES}", CLIENT | FILES | ALL),
        (f"from scheduler import __version__{MODULES}", CLIENT | FILES | ALL),
        (f"from scheduler import Scheduler{MODULES}", CLIENT | FILES),
        (PARSE_HELP, CLIENT | FILES | ALL),
    ],
    ids=["package", "version", "scheduler", "help"],
)
def test_what_a_program_does_not_need_is_not_imported(code: str, left_out: set[str]) -> None:
    """The package and the command's help import nothing heavy; a scheduler no HTTP client and no reader of files."""
    assert modules_after(code) & left_out == set()


def test_the_first_answer_waits_for_no_import(tmp_path: Path) -> None:
    """All that the first answer needs is imported while the model loads."""
    assert modules_after(FIRST_ANSWER, str(write_models(tmp_path, "a") / "a.gguf")) == {"True"}


def test_a_file_is_read_without_the_whole_gguf_package(tmp_path: Path) -> None:
    """Of the gguf package its constants are imported, and not its writer, its vocabularies, YAML and numpy."""
    code = f"import sys; from scheduler.models.gguf_metadata import read_metadata; read_metadata(sys.argv[1]){MODULES}"
    assert (
        modules_after(code, str(write_models(tmp_path, "a") / "a.gguf")) & {"gguf", "numpy", "yaml", "httpx2"} == set()
    )


def test_constants_that_need_their_package_are_imported_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of the gguf package whose constants cannot be imported by themselves is imported whole."""
    alone = gguf_constants()
    monkeypatch.setattr("importlib.util.module_from_spec", lambda spec: None)
    whole = gguf_constants.__wrapped__()
    assert whole is importlib.import_module("gguf.constants") is not alone
    assert vars(whole).keys() == vars(alone).keys()


def test_the_package_has_every_public_name_and_no_other() -> None:
    """Names that are imported with their first use are attributes as all others are."""
    for name in scheduler.public.__all__:
        assert getattr(scheduler, name) is getattr(scheduler.public, name)
    assert {"Scheduler", "__version__"} <= {*dir(scheduler), "__version__"}
    assert scheduler.__all__ == scheduler.public.__all__
    with pytest.raises(AttributeError, match="'scheduler' has no attribute 'Shceduler'"):
        _ = scheduler.Shceduler
