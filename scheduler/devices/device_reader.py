"""Reads the machine's memory and cores: through psutil and control groups, GPUs through drivers and engines."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import psutil

from fsm.domain.devices import HOST, DeviceId, DeviceSample
from scheduler.devices.cgroups import cgroup_memory
from scheduler.devices.cpu_cores import usable_cores
from scheduler.devices.gpu_sources import EngineList, GpuSources
from scheduler.devices.gpus import Gpu, Reading

FIRST_ANSWER_S = 8.0  # how long the first reading waits for the driver's answer: the driver may have to wake the GPUs
ANSWER_S = 1.5  # how long any other reading waits
TRUST_S = 30.0  # a driver that has not answered for longer gets no loads: it might never release their memory
_CLOSE_S = 1.0


GpuBytes = tuple[tuple[str, int], ...]  # by the id of a GPU; "" stands for every GPU that is not named


def of_gpu(amounts: GpuBytes, gpu: str) -> int | None:
    """Return the bytes of one GPU, or else of every GPU that is not named; None where there are none."""
    known = dict(amounts)
    return known.get(gpu, known.get(""))


class DeviceReader:
    """Reads the devices; safe to call from several threads, one of which reads at a time.

    `memory_limit_bytes` caps the host's capacity, and not the free bytes that it reports; `gpu_limit_bytes` does the
    same on GPUs with memory of their own. `gpu_reserve_bytes` are taken off both there. These two are by the ids of
    GPUs; "" stands for every GPU that is not named. Nothing here raises because of a GPU or its driver: a device that
    cannot be read is left out and named in `problems`.

    The driver is called on a thread of its own, since a call may take long or never return. A thread that reads waits
    `ANSWER_S` for it, and then gets the GPUs' last known figures, marked as not fresh. Until the driver answers no
    thread waits for it again, and after `TRUST_S` there are no GPUs. The host's figures are always those of the moment.
    """

    def __init__(
        self,
        *,
        memory_limit_bytes: int | None = None,
        gpus: bool = True,
        integrated_gpus: bool = False,
        gpu_reserve_bytes: GpuBytes = (),
        gpu_limit_bytes: GpuBytes | None = None,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory_limit_bytes = memory_limit_bytes
        self._gpu_reserve_bytes = gpu_reserve_bytes
        self._gpu_limit_bytes = gpu_limit_bytes or ()
        self._clock = clock
        self._given_up_bytes: Callable[[], int] = lambda: 0
        self._driver = GpuSources(environment, clock, integrated=integrated_gpus) if gpus else None
        self._lock = threading.Lock()  # held during a reading; the driver's thread never takes it
        self._asking: threading.Thread | None = None  # the last thread that called the driver
        self._asked_at = 0.0  # when that call began
        self._closing = False
        self._reading: Reading | None = None  # the driver's last answer; None: it has never answered
        self._fresh = True  # the last sample has an answer that the driver gave for it

    @property
    def problems(self) -> tuple[str, ...]:
        """The problems of the last reading, and of a driver that still does not answer, in sentences."""
        problems = self._reading.problems if self._reading is not None else ()
        overdue_s = self._overdue_s()
        if overdue_s < ANSWER_S:
            return problems
        meanwhile = "their figures are from before" if self._trusted() else "they are not used until it does"
        return (*problems, f"the GPUs' driver has not answered for {overdue_s:.0f} s: {meanwhile}")

    def sample(self) -> tuple[DeviceSample, ...]:
        """Return the host and then each visible GPU, as they are now."""
        with self._lock:
            self._fresh = self._ask()
            host = self._sample_host()
            reading = self._reading if self._trusted() else None
            return (host, *(self._sample_gpu(gpu, host) for gpu in (reading.gpus if reading is not None else ())))

    def gpus(self) -> Sequence[Gpu]:
        """Return the GPUs of the last sample; nothing is read for it."""
        return self._reading.gpus if self._reading is not None else ()

    def list_by(self, engine: EngineList) -> None:
        """Have an engine list GPUs too: those that no driver tells of, and which of all that it can use."""
        if self._driver is not None:
            self._driver.engine = engine

    def want_figures(self) -> None:
        """Have the next sample ask anew what is not read each time, since it takes a process: an engine's list."""
        if self._driver is not None and self._driver.engine is not None:
            self._driver.engine.want()

    def gpu_processes(self) -> Mapping[DeviceId, Mapping[int, int]]:
        """Return the bytes that each process held on each visible GPU, by pid, at the last sample.

        A GPU whose driver does not report its processes is missing, and so is a process whose bytes are not known.
        Inside a container that has pids of its own the driver usually reports no processes. Memory on an integrated GPU
        is not part of the process's own resident memory: the ledger adds it to the process's bytes of the host.
        """
        with self._lock:
            reading = self._reading if self._fresh else None
            gpus = reading.gpus if reading is not None else ()
            return {gpu.id: gpu.processes for gpu in gpus if gpu.processes is not None}

    def set_memory_limit(self, memory_limit_bytes: int | None) -> None:
        """Change the cap on the host's capacity, None for no cap; the next sample shows it."""
        self._memory_limit_bytes = memory_limit_bytes

    def count_as_free(self, held_bytes: Callable[[], int]) -> None:
        """Count bytes of the host as free that this program holds, and gives up as soon as they are wanted."""
        self._given_up_bytes = held_bytes

    def close(self) -> None:
        """Shut the driver's library down.

        Returns soon, even where the driver does not answer. Later samples are allowed.
        """
        with self._lock:
            # a thread that still waits for the driver shuts the library down when it has the answer
            self._closing = True
            if self._asking is not None and self._wait(_CLOSE_S) and self._start(self._let_go):
                self._wait(_CLOSE_S)

    # -- the driver, on a thread of its own ---------------------------------------------------------------------------

    def _ask(self) -> bool:
        """Call the driver; return whether it has answered. An overdue call is not waited for again."""
        if self._driver is None:
            return True
        if self._asking is not None and self._asking.is_alive():
            return False
        self._closing = False
        if not self._start(self._read):
            return False
        return self._wait(ANSWER_S if self._reading is not None else FIRST_ANSWER_S)

    def _start(self, job: Callable[[], None]) -> bool:
        """Run a job on a thread of its own; return False if the system allows no more threads."""
        self._asked_at = self._clock()
        self._asking = threading.Thread(target=job, name="loadmaster-gpus", daemon=True)
        try:
            self._asking.start()
        except RuntimeError:
            self._asking = None
        return self._asking is not None

    def _wait(self, timeout_s: float) -> bool:
        """Wait for the thread that calls the driver; return whether the thread has ended."""
        assert self._asking is not None
        self._asking.join(timeout_s)
        return not self._asking.is_alive()

    def _read(self) -> None:
        assert self._driver is not None
        self._reading = self._driver.read()
        if self._closing:
            self._driver.close()

    def _let_go(self) -> None:
        assert self._driver is not None
        self._driver.close()

    def _overdue_s(self) -> float:
        """Return for how many seconds the driver has been called without an answer; 0 where it has answered."""
        asking = self._asking
        return self._clock() - self._asked_at if asking is not None and asking.is_alive() else 0.0

    def _trusted(self) -> bool:
        return self._overdue_s() < TRUST_S

    # -- samples ------------------------------------------------------------------------------------------------------

    def _sample_host(self) -> DeviceSample:
        memory = psutil.virtual_memory()
        capacity, free = memory.total, memory.available
        limits = cgroup_memory()
        if limits is not None:
            capacity, free = min(capacity, limits.limit_bytes), min(free, limits.free_bytes)
        free = min(capacity, free + self._given_up_bytes())
        reaches = [gpu.reach_bytes for gpu in self.gpus() if gpu.reach_bytes]
        limits_bytes = [capacity, *reaches, *([] if self._memory_limit_bytes is None else [self._memory_limit_bytes])]
        capacity = min(limits_bytes)
        return DeviceSample(HOST, "cpu", "host", capacity, free, cores=usable_cores())

    def _sample_gpu(self, gpu: Gpu, host: DeviceSample) -> DeviceSample:
        """Return a GPU's sample; a GPU without memory of its own is integrated, and its memory is the host's.

        The free bytes less the reserve may be negative, so that memory being freed can still be told from the reserve.
        """
        if not gpu.capacity_bytes:
            return DeviceSample(
                gpu.id, "gpu", gpu.name, host.capacity_bytes, host.free_bytes, integrated=True, library=gpu.library
            )
        reserve_bytes = of_gpu(self._gpu_reserve_bytes, gpu.id) or 0
        limit_bytes = of_gpu(self._gpu_limit_bytes, gpu.id)
        capacity_bytes = max(0, gpu.capacity_bytes - reserve_bytes)
        capacity_bytes = capacity_bytes if limit_bytes is None else min(capacity_bytes, limit_bytes)
        free_bytes = gpu.free_bytes - reserve_bytes
        return DeviceSample(
            gpu.id,
            "gpu",
            gpu.name,
            capacity_bytes,
            free_bytes,
            instance=gpu.instance,
            fresh=self._fresh and gpu.fresh,
            library=gpu.library,
        )


__all__ = ["DeviceReader"]
