"""Two programs on one machine that load models agree about memory: real processes, and one GPU for both of them.

The GPU is a stand-in whose state is a file. A model takes its memory there when its load ends, as a real one does.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.leaks import no_leaks
from tests.support.nvml import ROOT, Gpu, StandIn, build
from tests.support.waiting import assert_soon

GIB = 2**30

# The program needs 6 of the GPU's 10 GiB, prints what becomes of its request, and loads until it is told to end.
PROGRAM = """
import fcntl, os, subprocess, sys, time
from pathlib import Path
from scheduler import DoesNotFit, PythonModel, Scheduler, Settings
from tests.support.nvml import Gpu, StandIn

GIB = 2**30
state = Path(os.environ["NVML_STAND_IN_STATE"])

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # at once: two threads talk

def take():
    with open(state.with_name("taken"), "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        taken = 6 * GIB + int(file.read() or 0)
        if taken > 10 * GIB:
            say("has no room")
            raise MemoryError("the GPU is full")
        file.truncate(0)
        file.write(str(taken))
        file.flush()
        StandIn(state).say(Gpu("GPU-0", total=10 * GIB, free=10 * GIB - taken))

def load():
    say("loads")
    if "children" in sys.argv:
        child = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if (fork := os.fork()) == 0:
            os.close(0), os.close(1), time.sleep(60), os._exit(0)
        say("children", child.pid, fork)
    sys.stdin.readline()
    take()
    return object()

with Scheduler(Settings.from_environment(close_timeout=0)) as scheduler:
    say("ready")
    sys.stdin.readline()
    future = scheduler.submit(PythonModel("model", load, memory={"GPU-0": 6 * GIB}))
    told = ""
    while not future.done():
        for wait in scheduler.status().queue:
            if wait.waits_for != told:
                told = wait.waits_for
                say("waits for", told)
        time.sleep(0.005)
    error = future.exception()
    if isinstance(error, DoesNotFit):
        say("refused", error.needed_bytes // GIB, error.free_bytes["GPU-0"] // GIB)
    else:
        say(f"failed: {error}" if error else "resident")
    sys.stdin.readline()
"""


class Program:
    """One of the two programs; what it prints is read as it comes."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT, bufsize=0,
        )  # fmt: skip
        self.said: list[str] = []
        self._rest = b""

    def go_on(self) -> None:
        """Let the program do what it waits for: request its model, end its load, end."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")

    def has_said(self, word: str) -> bool:
        """Read what the program has printed by now, and return whether any line begins with `word`."""
        assert self.process.stdout is not None
        while select.select([self.process.stdout], [], [], 0)[0] and (
            piece := os.read(self.process.stdout.fileno(), 4096)
        ):
            *lines, self._rest = (self._rest + piece).split(b"\n")
            self.said += [line.decode() for line in lines]
        return any(line.startswith(word) for line in self.said)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Yield a function that starts programs which share a GPU of 10 GiB and the folder of their locks."""
    state = tmp_path / "state"
    StandIn(state).say(Gpu("GPU-0", total=10 * GIB))
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(build().parent),
        "NVML_STAND_IN_STATE": str(state),
        "LOADMASTER_LOCK_FOLDER": str(tmp_path / "locks"),
    }
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    programs: list[Program] = []

    def begin(*arguments: str, **more: str) -> Program:
        programs.append(Program(environment | more, *arguments))
        return programs[-1]

    with no_leaks():
        yield begin
        for program in programs:
            program.end()


def both_ask(start: Start, **environment: str) -> tuple[Program, Program]:
    """Make two programs request their models at the same moment."""
    one, other = start(**environment), start(**environment)
    assert_soon(lambda: one.has_said("ready") and other.has_said("ready"))
    one.go_on()
    other.go_on()
    return one, other


def test_of_two_programs_that_want_the_same_memory_one_loads(start: Start) -> None:
    """One of two programs loads, and the other sees what was taken and is refused with figures."""
    programs = both_ask(start)
    assert_soon(lambda: any(one.has_said("loads") for one in programs))
    first, second = programs if programs[0].has_said("loads") else programs[::-1]
    assert_soon(lambda: second.has_said("waits for another program that loads a model"))
    assert not second.has_said("loads")
    first.go_on()
    assert_soon(lambda: first.has_said("resident") and second.has_said("refused"))
    assert second.said[-1] == "refused 6 4"
    assert not second.has_said("loads")


def test_without_locks_both_plan_with_the_same_memory(start: Start) -> None:
    """Without locks both programs load, and one of them runs out of memory."""
    programs = both_ask(start, LOADMASTER_LOCK_FOLDER="none")
    assert_soon(lambda: all(one.has_said("loads") for one in programs))
    for one in programs:
        one.go_on()
    assert_soon(lambda: any(one.has_said("resident") for one in programs))
    assert_soon(lambda: any(one.has_said("has no room") for one in programs))


def test_a_program_that_is_killed_while_it_loads_keeps_nobody_out(start: Start) -> None:
    """A program that is killed while it loads keeps no lock, nor do the processes that it leaves behind."""
    first, second = start("children"), start()
    assert_soon(lambda: first.has_said("ready") and second.has_said("ready"))
    first.go_on()
    assert_soon(lambda: first.has_said("children"))
    second.go_on()
    assert_soon(lambda: second.has_said("waits for another program"))
    (line,) = [line for line in first.said if line.startswith("children")]
    children = [int(word) for word in line.split()[1:]]
    try:
        os.kill(first.process.pid, signal.SIGKILL)
        assert_soon(lambda: second.has_said("loads"))
        second.go_on()
        assert_soon(lambda: second.has_said("resident"))
        assert all(Path(f"/proc/{child}").exists() for child in children), "the children ended with the program"
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
