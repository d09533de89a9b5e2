"""`python -m tests.tools.trace_request`: count the files and functions of this project that one request passes.

A request is traced from `Scheduler.acquire` to the end of what the release of its lease causes, on every thread of
this process. Three kinds are traced: of a model that is loaded (warm), of one that is not (cold), and of one that gets
memory only when an idle runner is evicted (evicting). Models are objects, or with `--llama` tiny files of llama.cpp's.

Each kind is traced several times, with a new scheduler each time, and a function counts if every trace has it. That
and the short time that a scheduler lives here keep its housekeeping out, which begins after a second.

Only the public API is used, so `--root` can name a checkout of another revision.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from tests.support.tiny_models import write_tiny_model

PACKAGES = ("fsm", "scheduler")
KINDS = ("warm", "cold", "evicting")
PASSES = 3  # traces of each kind
QUIET_S = 0.05  # a request is over when no function of the project has been called for so long
LONGEST_REST_S = 5.0
_ITERATIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")  # parts of a function, and none in later Pythons


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the project: its file, relative to the root, and its name in there."""

    file: str
    name: str


class Tracer:
    """Notes the project's functions that are called while it records; it is installed before the threads start."""

    def __init__(self, root: Path) -> None:
        self._folders = tuple(f"{root / package}{os.sep}" for package in PACKAGES)
        self._root = root
        self._recording = False
        self._called_at = 0.0
        self._calls: dict[tuple[str, str], None] = {}  # in the order of the first call

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Make every thread that starts meanwhile report its calls."""
        threading.setprofile(self._profile)
        try:
            yield
        finally:
            threading.setprofile(None)

    def trace(self, request: Callable[[], None]) -> list[Function]:
        """Return the functions that are called until `request` has returned and no more calls follow."""
        self.rest()
        self._calls.clear()
        self._recording = True
        try:
            request()
            self.rest()
        finally:
            self._recording = False
        return [Function(str(Path(file).relative_to(self._root)), name) for file, name in self._calls]

    def rest(self) -> None:
        """Wait until no function of the project has been called for a moment."""
        begun_at = self._called_at = time.monotonic()
        while time.monotonic() - self._called_at < QUIET_S:
            if time.monotonic() - begun_at > LONGEST_REST_S:
                raise TimeoutError(f"the scheduler did not come to rest within {LONGEST_REST_S:g} s")
            time.sleep(QUIET_S / 10)

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(self._folders):
            return
        self._called_at = time.monotonic()
        is_function = code.co_flags & inspect.CO_OPTIMIZED  # and not the body of a class or module
        if self._recording and is_function and code.co_name not in _ITERATIONS:
            self._calls.setdefault((code.co_filename, code.co_qualname))


@dataclass(frozen=True, slots=True)
class Stage:
    """What requests are traced with: two models, memory for one of them, and a folder for lock files."""

    first: Any
    second: Any
    memory_limit: str
    folder: Path


def objects(folder: Path) -> Stage:
    """Return two objects of declared size."""
    from scheduler import PythonModel

    first, second = (PythonModel(name, load=object, memory={"cpu": "40MiB"}) for name in ("first", "second"))
    return Stage(first, second, "60MiB", folder)


def files(folder: Path) -> Stage:
    """Return two tiny models of llama.cpp's."""
    first, second = folder / "first.gguf", folder / "second.gguf"
    for seed, path in enumerate((first, second)):
        write_tiny_model(path, seed=seed, context=1024)
    return Stage(first, second, "64MiB", folder)


def traced(kind: str, stage: Stage, tracer: Tracer) -> list[Function]:
    """Return the functions that one request passes, with a new scheduler."""
    from scheduler import Scheduler, Settings

    def ask() -> None:
        with scheduler.acquire(stage.second if kind == "evicting" else stage.first):
            tracer.rest()

    settings = Settings(memory_limit=stage.memory_limit, lock_folder=stage.folder, gpus=False)
    with Scheduler(settings) as scheduler:
        if kind != "cold":
            scheduler.acquire(stage.first).release()
        return tracer.trace(ask)


def always(traces: list[list[Function]]) -> list[Function]:
    """Return the functions that are in every trace, in the order of the first one."""
    times = Counter(function for trace in traces for function in trace)
    return [function for function in traces[0] if times[function] == len(traces)]


def trace_all(root: Path, folder: Path, *, llama: bool) -> dict[str, list[Function]]:
    """Return the functions that a request of each kind passes; `folder` is for files of the schedulers."""
    tracer = Tracer(root)
    stage = files(folder) if llama else objects(folder)

    def trace(kind: str) -> list[Function]:
        traced(kind, stage, tracer)  # once for imports and caches
        return always([traced(kind, stage, tracer) for _ in range(PASSES)])

    with tracer.installed(), ThreadPoolExecutor(1) as thread:  # requests of the main thread run on another one
        return {kind: thread.submit(trace, kind).result() for kind in KINDS}


def table(found: dict[str, list[Function]]) -> str:
    """Return one line for each kind of request."""
    rows = [f"{'request':<10}{'files':>8}{'functions':>12}"]
    for kind, functions in found.items():
        rows.append(f"{kind:<10}{len({function.file for function in functions}):>8}{len(functions):>12}")
    return "\n".join(rows)


def main() -> int:
    """Trace, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.trace_request", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the checkout whose packages are traced")
    parser.add_argument("--llama", action="store_true", help="with real children; what these do is not traced")
    parser.add_argument("--verbose", action="store_true", help="list the functions too, in the order of the first call")
    chosen = parser.parse_args()
    root = chosen.root.resolve()
    if missing := [package for package in PACKAGES if not (root / package).is_dir()]:
        parser.error(f"{root} has no package {missing[0]}")
    sys.path.insert(0, str(root))
    with TemporaryDirectory() as folder:
        os.environ.update(HOME=folder, XDG_CACHE_HOME=folder)  # where a scheduler keeps its measurements
        found = trace_all(root, Path(folder), llama=chosen.llama)
    for kind, functions in found.items() if chosen.verbose else ():
        print(f"{kind}:")
        for function in functions:
            print(f"  {function.file}: {function.name}")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
