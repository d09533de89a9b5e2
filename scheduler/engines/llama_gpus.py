"""Which GPUs llama.cpp, as it is installed, can use: it is asked once, in a child of its own.

The driver tells which GPUs there are, and not whether this build of llama.cpp has a backend for them. Without one it
would put every layer on the host, and say nothing.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from typing import TYPE_CHECKING, Final, Protocol

from scheduler.concurrency.latch import Latch
from scheduler.devices.gpus import CUDA
from scheduler.engines.child_process import Child, Exit, Program
from scheduler.engines.child_runner import VISIBLE_GPUS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fsm.domain.devices import DeviceId
    from scheduler.devices.gpus import Gpu
    from scheduler.engines.process_supervisor import ChildLauncher

log = logging.getLogger("loadmaster")

TIMEOUT_S = 20.0  # a GPU's driver may have to wake it
# The child's program, given the folder that holds llama.cpp: it prints the names of the devices that are not the host,
# and what llama.cpp prints meanwhile goes where errors go.
QUESTION: Final = """
import json, os, sys
out = os.dup(1)
os.dup2(2, 1)
sys.path.insert(0, sys.argv[1])
import xllamacpp
host = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
names = [device["name"] for device in xllamacpp.get_device_info() if device["type"] != host]
os.write(out, (json.dumps({"devices": names}) + "\\n").encode())
"""
_NAME = re.compile(r"([A-Za-z]+)\d+")  # a backend, and the number of one of its devices


class Backends(Protocol):
    """What a build of llama.cpp can use of the machine's GPUs; any thread may use it."""

    @property
    def problems(self) -> tuple[str, ...]:
        """The GPUs that it cannot use, in a sentence."""

    def usable(self) -> tuple[str, ...] | None:
        """Return the libraries of the GPUs that it can use; None where there are no GPUs, or it does not tell."""

    def names(self, ids: Sequence[DeviceId]) -> tuple[Sequence[str], Mapping[str, str]]:
        """Return its names for GPUs, and the variables with which its process has these names."""


class GpuBackends(Backends):
    """Asks llama.cpp for its backends, once; of GPUs it is told CUDA's alone, by their ids."""

    def __init__(
        self, processes: ChildLauncher, program: Callable[[], Program | None], gpus: Callable[[], Sequence[Gpu]]
    ) -> None:
        self._processes = processes
        self._program = program  # that asks; None: llama.cpp is not installed
        self._gpus = gpus  # returns those of the last reading
        self._lock = threading.Lock()
        self._told: tuple[str, ...] | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """The GPUs that llama.cpp cannot use, in sentences; none where it can, or was not asked yet."""
        others = ", ".join(gpu.id for gpu in self._gpus() if gpu.library != CUDA)
        problems = (
            f"llama.cpp, as it is installed, is not told to use {others}: name a llama-server that was built for these "
            "GPUs, by the setting llama_server",
        )
        if self._told is None or CUDA in self._told or not any(gpu.library == CUDA for gpu in self._gpus()):
            return problems if others else ()
        return (
            "llama.cpp, as it is installed, has no CUDA backend: models go to the host, not to the GPUs that are here; "
            "install a build of xllamacpp for CUDA",
            *(problems if others else ()),
        )

    def usable(self) -> tuple[str, ...] | None:
        """Return CUDA where llama.cpp can use it; None where there are no GPUs.

        Where it does not tell, it is believed to. Blocks for a part of a second when it is first asked, and for
        `TIMEOUT_S` seconds at most.
        """
        libraries = {gpu.library for gpu in self._gpus()}
        if CUDA not in libraries:
            return () if libraries else None
        with self._lock:
            if self._told is None:
                self._told = self._ask()
            return (CUDA,) if self._told is None or CUDA in self._told else ()

    def names(self, ids: Sequence[DeviceId]) -> tuple[Sequence[str], Mapping[str, str]]:
        """Return llama.cpp's names for GPUs of CUDA's, in the order in which its process is told their ids."""
        return [f"{CUDA}{place}" for place in range(len(ids))], {VISIBLE_GPUS: ",".join(ids)}

    def _ask(self) -> tuple[str, ...] | None:
        if (program := self._program()) is None:
            return None
        answer = _Answer()
        child = Child(program, answer)
        try:
            self._processes.start(child)
        except (RuntimeError, OSError) as error:  # closed, in a fork, or no thread or descriptor is left
            log.info("llama.cpp was not asked for its GPUs: %s", error)
            return None
        try:
            answer.over.wait(TIMEOUT_S)
        finally:
            child.stop(0.0)
        return answer.told


class _Answer:
    """What the child tells; it calls the methods, on the supervisor's thread."""

    def __init__(self) -> None:
        self.told: tuple[str, ...] | None = None
        self.over = Latch()

    def printed(self, line: str) -> None:
        """Take in the names of the devices."""
        try:
            names = [str(name) for name in json.loads(line)["devices"]]
        except (ValueError, TypeError, LookupError):
            return
        found = (_NAME.fullmatch(name) for name in names)
        self.told = tuple(sorted({name[1] for name in found if name is not None}))
        self.over.set()

    def logged(self, chunk: bytes) -> None:
        """Nothing follows from what the child writes to its log."""

    def on_tick(self) -> bool:
        """Nothing is due while it runs."""
        return False

    def ended(self, exit: Exit) -> None:
        """Let the thread go on that waits, with an answer or without."""
        if self.told is None:
            log.info("llama.cpp did not tell which GPUs it can use: status %s, %s", exit.code, exit.tail.strip()[-200:])
        self.over.set()
