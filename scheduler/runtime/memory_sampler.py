"""Reads the devices and the runners' memory, one reading at a time, and posts the samples in that order."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

from fsm.domain.devices import DeviceId
from fsm.machine.runner import RunnerId
from fsm.messages.events import Event, Resident, Sampled
from scheduler.concurrency.latch import Latch
from scheduler.concurrency.thread_pool import ThreadPool
from scheduler.devices.device_reader import DeviceReader
from scheduler.engines.interface import Process, pids_of, prompts_of

log = logging.getLogger("loadmaster")


class MemorySampler:
    """Answers any number of requests for a sample with as few readings as possible.

    A call of a device's driver may stall: then only samples are late, and the core's own time limits go on without
    them.
    """

    def __init__(
        self,
        devices: DeviceReader,
        workers: ThreadPool,
        running: Callable[[], Iterable[tuple[RunnerId, Process]]],
        post: Callable[[Event], None],
    ) -> None:
        self._devices = devices
        self._workers = workers
        self._running = running
        self._post = post
        # numbers and waiting threads for which no reading has begun
        self._asked: deque[tuple[int, Latch | None]] = deque()
        self._begun: list[Latch] = []  # the threads that wait for the reading under way
        self._highest = 0  # highest number that was requested
        self._closed = False  # no reading may begin any more

    def request(self, number: int = 0, done: Latch | None = None) -> None:
        """Order a reading that begins after this call, and return at once; `done` is set when its sample is posted."""
        self._asked.append((number, done))
        # for each request: a request that Ctrl-C kept from being queued is served with the next one
        self._workers.put(self._read_all)
        if self._closed and done is not None:
            done.set()

    def refresh(self, timeout_s: float) -> bool:
        """Order a reading and wait for it; return whether it was posted in time. Returns at once when closed."""
        done = Latch()
        self.request(done=done)
        return done.wait(timeout_s)

    def close(self) -> None:
        """Wake the threads that wait for a reading, since it may never begin or never end."""
        self._closed = True
        for done in (*self._begun, *self._take()):
            done.set()

    def _take(self) -> list[Latch]:
        """Take over all requests for a reading; return the latches of the threads that wait for it."""
        waiting = []
        with suppress(IndexError):
            while True:
                number, done = self._asked.popleft()
                self._highest = max(self._highest, number)
                if done is not None:
                    waiting.append(done)
        return waiting

    def _read_all(self) -> None:
        if not self._asked:  # the reading of an earlier job has served the request
            return
        before = self._highest
        self._begun = self._take()
        if self._begun or self._highest > before:  # a decision waits for it
            self._devices.want_figures()
        try:
            if not self._closed:
                self._read(self._highest)
        except Exception:
            log.exception("the devices could not be read")
        finally:
            for done in self._begun:
                done.set()

    def _read(self, number: int) -> None:
        running = list(self._running())
        memories = [(id, process.memory()) for id, process in running]
        amounts: dict[RunnerId, dict[DeviceId, int]] = {id: dict(memory.resident) for id, memory in memories}
        pids = {id: pids_of(process) for id, process in running}
        samples = self._devices.sample()
        if any(sample.kind == "gpu" for sample in samples):
            for gpu, held in self._devices.gpu_processes().items():
                for id, own in amounts.items():
                    # In a container the pids of the GPU's driver may be other processes': a runner holds its buffers
                    # anyway.
                    if any(pid in held for pid in pids[id]):
                        own[gpu] = max(sum(held.get(pid, 0) for pid in pids[id]), own.get(gpu, 0))
        resident: tuple[tuple[RunnerId, Resident], ...] = tuple(
            (id, tuple(sorted(held.items()))) for id, held in amounts.items() if held
        )
        mapped = tuple((id, memory.mapped_bytes) for id, memory in memories if memory.mapped_bytes)
        kept = ((id, prompts_of(process)) for id, process in running)
        prompts = tuple((id, one.again_s) for id, one in kept if one is not None)
        self._post(Sampled(samples, resident, number, mapped, prompts))
