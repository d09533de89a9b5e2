"""What memory and cores there are: the host's through psutil and its groups, GPUs' through their driver, patiently."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping

import psutil

from fsm.domain.devices import HOST, DeviceId, DeviceSample
from scheduler.devices.cgroups import cgroup_memory
from scheduler.devices.cpu_cores import usable_cores
from scheduler.devices.nvml import Gpu, Nvml, Reading

FIRST_ANSWER_S = 8.0  # how long the driver's first answer is waited for: it may have to wake the GPUs
ANSWER_S = 1.5  # and any other
TRUST_S = 30.0  # a driver that does not answer for longer is not to be trusted with a load: it may never let go of it
_CLOSE_S = 1.0


class DeviceReader:
    """Reads the devices; safe to call from several threads, one of which reads at a time.

    `memory_limit_bytes` caps the host's capacity, not what it reports as free; `gpu_reserve_bytes` are taken off both,
    on every GPU with memory of its own. Nothing here raises because of a GPU or its driver: what cannot be read is left
    out and named in `problems`.

    The driver is asked on a thread of its own, since a call may take long or never return. Whoever reads waits
    `ANSWER_S` for it and gets the GPUs' last known figures then, marked as not fresh; until it answers nobody waits
    again, and after `TRUST_S` there are no GPUs. The host's figures are always those of the moment.
    """

    def __init__(
        self,
        *,
        memory_limit_bytes: int | None = None,
        gpus: bool = True,
        gpu_reserve_bytes: int = 0,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory_limit_bytes = memory_limit_bytes
        self._gpu_reserve_bytes = gpu_reserve_bytes
        self._clock = clock
        self._driver = Nvml(environment, clock) if gpus else None
        self._lock = threading.Lock()  # held while one reads; the driver's thread never takes it
        self._asking: threading.Thread | None = None  # the last one that asked the driver
        self._asked_at = 0.0  # when it began
        self._closing = False
        self._reading: Reading | None = None  # the driver's last answer; None: it has never answered
        self._fresh = True  # what was sampled last is an answer to that sample's own question

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be read at the last look, and what still does not answer, in sentences."""
        problems = self._reading.problems if self._reading is not None else ()
        overdue_s = self._overdue_s()
        if overdue_s < ANSWER_S:
            return problems
        meanwhile = "what is known of them is from before" if self._trusted() else "they are not used until it does"
        return (*problems, f"the GPUs' driver has not answered for {overdue_s:.0f} s: {meanwhile}")

    def sample(self) -> tuple[DeviceSample, ...]:
        """Return the host and then each visible GPU, as they are now."""
        with self._lock:
            self._fresh = self._ask()
            host = self._sample_host()
            reading = self._reading if self._trusted() else None
            return (host, *(self._sample_gpu(gpu, host) for gpu in (reading.gpus if reading is not None else ())))

    def gpu_processes(self) -> Mapping[DeviceId, Mapping[int, int]]:
        """Return the bytes that each process held on each visible GPU, by pid, when the devices were last sampled.

        A GPU that did not tell is missing, and so is a process whose bytes are not known. Inside a container that has
        pids of its own the driver usually tells nothing. What is held on an integrated GPU is not part of the process's
        own resident memory: the ledger adds it to what that holds of the host's.
        """
        with self._lock:
            reading = self._reading if self._fresh else None
            gpus = reading.gpus if reading is not None else ()
            return {gpu.id: gpu.processes for gpu in gpus if gpu.processes is not None}

    def set_memory_limit(self, memory_limit_bytes: int | None) -> None:
        """Change the cap on the host's capacity, None for none; the next sample shows it."""
        self._memory_limit_bytes = memory_limit_bytes

    def close(self) -> None:
        """Let go of the driver; returns soon, whatever it does. Sampling again later is allowed."""
        with self._lock:
            self._closing = True  # a thread that is still asking lets go when it has its answer
            if self._asking is not None and self._wait(_CLOSE_S) and self._start(self._let_go):
                self._wait(_CLOSE_S)

    # -- the driver, on a thread of its own ---------------------------------------------------------------------------

    def _ask(self) -> bool:
        """Have the driver asked; return whether it has answered. A question that is overdue is not waited for again."""
        if self._driver is None:
            return True
        if self._asking is not None and self._asking.is_alive():
            return False
        self._closing = False
        if not self._start(self._read):
            return False
        return self._wait(ANSWER_S if self._reading is not None else FIRST_ANSWER_S)

    def _start(self, job: Callable[[], None]) -> bool:
        """Run a job on a thread of its own; return False if there can be no more threads."""
        self._asked_at = self._clock()
        self._asking = threading.Thread(target=job, name="loadmaster-gpus", daemon=True)
        try:
            self._asking.start()
        except RuntimeError:
            self._asking = None
        return self._asking is not None

    def _wait(self, timeout_s: float) -> bool:
        """Wait for the thread that asks; return whether it has ended."""
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
        """Return for how long the driver has been asked without an answer; 0 where it has answered."""
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
        if self._memory_limit_bytes is not None:
            capacity = min(capacity, self._memory_limit_bytes)
        return DeviceSample(HOST, "cpu", "host", capacity, free, cores=usable_cores())

    def _sample_gpu(self, gpu: Gpu, host: DeviceSample) -> DeviceSample:
        """Return a GPU's sample; one without memory of its own is integrated, and what it has is the host's.

        What is free is signed once the reserve is taken off, so that what comes back can still be told from it.
        """
        if not gpu.capacity_bytes:
            return DeviceSample(gpu.id, "gpu", gpu.name, host.capacity_bytes, host.free_bytes, integrated=True)
        capacity_bytes = max(0, gpu.capacity_bytes - self._gpu_reserve_bytes)
        free_bytes = gpu.free_bytes - self._gpu_reserve_bytes
        return DeviceSample(
            gpu.id, "gpu", gpu.name, capacity_bytes, free_bytes, instance=gpu.instance, fresh=self._fresh
        )


__all__ = ["DeviceReader"]
