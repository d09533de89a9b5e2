"""A stand-in for NVIDIA's library, and tests that run in a process whose binding finds it.

    @beside_stand_in()
    def test_memory_that_others_take_is_seen(nvml: StandIn) -> None:
        nvml.say(Gpu("GPU-a", total=1000))
        ...

The body runs in a child process, because a process finds its library once and keeps it.
Nothing may be left over when the body returns (`tests.support.leaks`): a stall is ended by the last `say`.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from ctypes.util import find_library
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from fsm.domain.devices import HOST, DeviceSample
from scheduler.devices.device_reader import DeviceReader

SOURCE = Path(__file__).with_name("stand_in.c")
ROOT = SOURCE.parents[3]
TIMEOUT_S = 120.0
# set by tests in which llama.cpp says which GPUs it can use; in all others it is taken to have a backend for CUDA
ASKS_LLAMA = "ASKS_LLAMA"
NOT_SUPPORTED, NO_PERMISSION, NO_DRIVER, LOST, MISMATCH = 3, 4, 9, 15, 18  # what NVML's functions return


@dataclass(frozen=True)
class Gpu:
    """What the stand-in reports of one GPU, or of one instance; in bytes."""

    id: str
    total: int = 1000
    free: int | None = None  # None: all memory but the reserve
    reserved: int = 0  # what the driver takes itself
    processes: Mapping[int, int] = field(default_factory=dict)  # bytes by process id; -1: not reported
    instances: Sequence[Gpu] | None = None  # the instances of a divided GPU; None: the GPU is not divided
    capability: tuple[int, int] = (9, 0)
    open_code: int = 0  # what the call for its handle returns
    memory_code: int = 0  # what the call for its memory returns
    processes_code: int = 0  # what the call for its processes returns

    def lines(self, kind: str = "gpu") -> list[str]:
        """Return the GPU's lines in the state file."""
        free = self.total - self.reserved if self.free is None else self.free
        codes = f"{self.open_code} {self.memory_code} {self.processes_code} {int(self.instances is not None)}"
        memory = f"{self.total} {self.reserved} {free}"
        own = f"{kind} {self.id} {codes} {self.capability[0]} {self.capability[1]} {memory}"
        processes = [f"process {pid} {used}" for pid, used in self.processes.items()]
        return [own, *processes, *(line for each in self.instances or () for line in each.lines("instance"))]

    def but(self, **changes: object) -> Gpu:
        """Return a copy with changes."""
        return replace(self, **changes)


class StandIn:
    """Sets what the library answers."""

    def __init__(self, state: Path) -> None:
        self._state = state

    def say(self, *gpus: Gpu, init: int = 0, stall: str = "-") -> None:
        """Report these GPUs; `init` is what initialising returns, `stall` names a function that does not return."""
        lines = [f"init {init}", f"stall {stall}", *(line for gpu in gpus for line in gpu.lines())]
        new = self._state.with_suffix(".new")
        new.write_text("\n".join(lines) + "\n")
        new.replace(self._state)  # the library never reads half of it


class Clock:
    """A clock that the test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def gpus_of(source: DeviceReader) -> dict[str, DeviceSample]:
    """Read the devices; return the GPUs by id, in their order."""
    host, *gpus = source.sample()
    assert host.id == HOST and host.fresh, "the host was not read"
    return {gpu.id: gpu for gpu in gpus}


def free_of(source: DeviceReader) -> dict[str, int]:
    """Read the devices; return each GPU's free bytes."""
    return {id: gpu.free_bytes for id, gpu in gpus_of(source).items()}


@functools.cache
def build(flags: tuple[str, ...] = ()) -> Path:
    """Build the stand-in once with the machine's compiler; skip the test where there is none."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the stand-in for NVIDIA's library needs Linux and a C compiler, and there is none")
    folder = Path(tempfile.mkdtemp(prefix="loadmaster-nvml-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    built = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, *flags, "-shared", "-fPIC", "-o", built, SOURCE], check=True, capture_output=True)
    return built


def beside_stand_in(
    *flags: str, library: str | None = "stand-in", **environment: str
) -> Callable[[Callable[[StandIn], None]], Callable[[Path], None]]:
    """Run a test's body in a child where the stand-in, built with `flags`, is NVIDIA's library.

    `library` is what stands in the file in place of the stand-in, or None for no file. Other arguments are set in the
    child's environment.
    """

    def decorate(body: Callable[[StandIn], None]) -> Callable[[Path], None]:
        def test(tmp_path: Path) -> None:
            folder = tmp_path
            if library == "stand-in":
                folder = build(flags).parent
            elif library is not None:
                (folder / "libnvidia-ml.so.1").write_text(library)
            elif find_library("nvidia-ml"):
                pytest.skip("the machine has NVIDIA's library, so that it cannot be missing")
            _run(body, folder, tmp_path / "state", environment)

        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        test.body = body  # type: ignore[attr-defined]  # for the child; not __wrapped__, whose arguments pytest reads
        return test

    return decorate


def _run(body: Callable[[StandIn], None], folder: Path, state: Path, environment: Mapping[str, str]) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "LOADMASTER_"))}
    program = (
        "from pathlib import Path; from tests.support.leaks import no_leaks; from tests.support.nvml import StandIn\n"
        "from scheduler.engines.llama_gpus import GpuBackends\n"
        f"if not {ASKS_LLAMA in environment}: GpuBackends.usable = lambda self: ('CUDA',)\n"
        f"from {body.__module__} import {body.__name__} as test\n"
        f"with no_leaks(): test.body(StandIn(Path({str(state)!r})))"
    )
    child = {**kept, "LD_LIBRARY_PATH": str(folder), "NVML_STAND_IN_STATE": str(state), **environment}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=child, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
