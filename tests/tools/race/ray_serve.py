"""Ray Serve's `@serve.multiplexed`, over the same engine as ours; it runs in a Python that has Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.tools.race.contestants import Course, Opened
from tests.tools.race.router import fresh_client, http_asker

APP = Path(__file__).with_name("ray_app.py")
START_S = 180.0
STOP_S = 60.0
_PROBE = "import importlib.util as u, sys; sys.exit(not (u.find_spec('ray') and u.find_spec('starlette')))"


def find_ray(named: str | None) -> tuple[str, str]:
    """Return a Python that has Ray Serve and "", or "" and the reason why there is none."""
    python = named or os.environ.get("RAY_PYTHON") or sys.executable
    try:
        there = subprocess.run([python, "-c", _PROBE], capture_output=True, timeout=START_S, check=False)
    except OSError as error:
        return "", f"no Ray Serve: {python} cannot be run ({error})"
    if there.returncode:
        return "", f"no Ray Serve in {python}: name a Python that has ray[serve] with --ray-python PATH or RAY_PYTHON"
    return python, ""


@contextmanager
def ray_serve(course: Course, python: str, replicas: int = 1) -> Iterator[Opened]:
    """A deployment whose replicas hold as many models together as there is room for."""
    with TemporaryDirectory(prefix="race-ray-") as name:
        folder = Path(name)
        root = Path(__file__).parents[3]
        task = {
            "models": {model: str(course.folder / f"{model}.gguf") for model in course.models},
            "room": course.room // replicas,
            "replicas": replicas,
            "paths": [str(root), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")],
            "folder": name,
        }
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}  # no usage statistics are sent
        with (folder / "log").open("wb") as output:
            process = subprocess.Popen(
                [python, str(APP)], stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment,
                start_new_session=True,
            )  # fmt: skip
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.flush()
            url = _await(process, folder)
            with fresh_client(url) as client:
                yield Opened(http_asker(client, course), lambda: _lines(folder / "loads"))
        finally:
            _stop(process)


def _lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def _await(process: subprocess.Popen[bytes], folder: Path) -> str:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        if _lines(folder / "url"):
            return (folder / "url").read_text().strip()
        time.sleep(0.2)
    raise RuntimeError(f"Ray Serve did not start: {(folder / 'log').read_text(errors='replace')[-2000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the program by the end of its input, and kill the rest of its process group."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
