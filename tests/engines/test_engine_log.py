"""The engine log: whole lines, without keys and control characters, in a file that only its owner may read."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduler.engines import engine_log
from scheduler.engines.engine_log import EngineLog

LIMIT_S = 60.0


def written(file: Path) -> list[str]:
    """Return the lines of a file without their times."""
    return [line.partition(" ")[2] for line in file.read_text().splitlines()]


def test_u46_lines_are_whole_and_without_keys_and_control_characters(tmp_path: Path) -> None:
    """Chunks become lines with the model and the process; keys and escape sequences do not get into the file."""
    log = EngineLog(tmp_path / "log")
    first, second = log.of_runner("chat\x1b[1A", "s3cret"), log.of_runner("other", "key")
    first.write(7, b"a line with s3")
    second.write(8, b"between\n")
    first.write(7, b"cret\x1b[2J\nunended")
    first.end(7)
    assert log.close(LIMIT_S)
    lines = written(tmp_path / "log")
    assert lines[0] == "other[8]: between" and "\x1b" not in "".join(lines) and "s3cret" not in "".join(lines)
    assert "a line with (key)" in lines[1] and lines[2].endswith("[7]: unended")
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("place", ["link", "folder", "missing"])
def test_u46_a_file_that_cannot_be_written_is_a_problem(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A link, a folder, or a folder that is missing, in the file's place is a problem, logged once."""
    file = tmp_path / "log"
    match place:
        case "link":
            file.symlink_to(tmp_path / "elsewhere")
        case "folder":
            file.mkdir()
        case _:
            file = tmp_path / "missing" / "log"
    log = EngineLog(file)
    for line in (b"one\n", b"two\n"):
        log.of_runner("chat", "key").write(7, line)
    assert log.close(LIMIT_S)
    assert str(file) in log.problem and not (tmp_path / "elsewhere").exists()
    assert len([each for each in caplog.records if "engine log" in each.getMessage()]) == 1


def test_u46_a_large_file_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is FILE.1 once it is large, and the lines that follow are in a new file of the same mode."""
    monkeypatch.setattr(engine_log, "LIMIT_BYTES", 50)
    log = EngineLog(tmp_path / "log")
    for number in range(3):
        log.of_runner("chat", "key").write(7, f"line {number}\n".encode())
    assert log.close(LIMIT_S)
    assert written(tmp_path / "log.1") + written(tmp_path / "log") == [f"chat[7]: line {n}" for n in range(3)]
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
