"""Reads the devices and the runners' memory, one reading at a time, and posts what was read in that order."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from fsm.events import Event, Resident, Sampled
from fsm.model import DeviceId
from fsm.runner import RunnerId
from scheduler.devices import Devices
from scheduler.engines import Process
from scheduler.workers import Workers

log = logging.getLogger("loadmaster")


class Sampler:
    """Answers any number of wishes for a sample with as few readings as will do.

    A driver's call may stall: then only samples are late, and the core's own time limits go on without them.
    """

    def __init__(
        self,
        devices: Devices,
        workers: Workers,
        running: Callable[[], Iterable[tuple[RunnerId, Process]]],
        post: Callable[[Event], None],
    ) -> None:
        self._devices = devices
        self._workers = workers
        self._running = running
        self._post = post
        self._lock = threading.RLock()  # guards the six below; re-entered by a finaliser
        self._wanted = 0  # the highest number asked for
        self._again = False  # somebody asked since the reading under way began
        self._busy = False  # a job is queued or running
        self._done: list[threading.Event] = []  # those who wait for a reading that has not begun
        self._begun: list[threading.Event] = []  # those who wait for the reading under way
        self._closed = False  # no reading may begin any more

    def request(self, number: int = 0, done: threading.Event | None = None) -> None:
        """Have the devices read, beginning after this call; `done` is set when the reading has been posted."""
        with self._lock:
            self._wanted = max(self._wanted, number)
            self._again = True
            if done is not None and not self._closed:
                self._done.append(done)
            elif done is not None:
                done.set()
            if self._busy:
                return
            self._busy = True
        self._workers.put(self._read_all)

    def refresh(self, timeout_s: float) -> bool:
        """Have the devices read and wait for it; return whether it came in time. Once closed, nobody waits."""
        done = threading.Event()
        self.request(done=done)
        return done.wait(timeout_s)

    def close(self) -> None:
        """Let go of those who wait for a reading that may never begin, or never end."""
        with self._lock:
            self._closed = True
            waiting = [*self._begun, *self._done]
            self._done = []
        for done in waiting:
            done.set()

    def _read_all(self) -> None:
        while True:
            with self._lock:
                if not self._again:
                    self._busy = False
                    return
                self._again = False
                number, self._begun, self._done = self._wanted, self._done, []
            try:
                self._read(number)
            except Exception:
                log.exception("the devices could not be read")
            for done in self._begun:
                done.set()

    def _read(self, number: int) -> None:
        running = list(self._running())
        memories = [(id, process.memory()) for id, process in running]
        amounts: dict[RunnerId, dict[DeviceId, int]] = {id: dict(memory.resident) for id, memory in memories}
        pids = {process.pid: id for id, process in running if process.pid is not None}
        samples = self._devices.sample()
        if any(sample.kind == "gpu" for sample in samples):
            for gpu, held in self._devices.gpu_processes().items():
                for pid in held.keys() & pids.keys():
                    own = amounts[pids[pid]]
                    # in a container the driver's pids may be others': it holds its buffers anyway
                    own[gpu] = max(held[pid], own.get(gpu, 0))
        resident: tuple[tuple[RunnerId, Resident], ...] = tuple(
            (id, tuple(sorted(held.items()))) for id, held in amounts.items() if held
        )
        mapped = tuple((id, memory.mapped_bytes) for id, memory in memories if memory.mapped_bytes)
        self._post(Sampled(samples, resident, number, mapped))
