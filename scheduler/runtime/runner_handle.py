"""One runner as the shell holds it: its process, its client, its lock."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from fsm.messages.commands import Launch
from fsm.messages.events import Event, Exited, Loaded, Progress
from scheduler.engines.interface import Endpoint, Engine, Memory, Process
from scheduler.engines.runner_client import RunnerClient
from scheduler.errors.formatting import without_addresses
from scheduler.models.measurement_store import Identity

log = logging.getLogger("loadmaster")
_PROGRESS_S = 1.0  # progress is posted at most so often


class RunnerHandle:
    """One runner's process, from Launch to Exited; the engine reports to it. Its calls may come from any thread."""

    def __init__(self, launch: Launch, engine: Engine, model: object, post: Callable[[Event], None]) -> None:
        self.runner = launch.runner
        self.model = launch.model
        self.endpoint: Endpoint | None = None  # set before Loaded is posted, where the runner is a server
        self.value: object = None  # the object itself, where the runner is one
        self.process: Process | None = None  # set when the launch has begun
        self.launch = launch
        self.identity: Identity | None = None  # of the files that were inspected for it
        self._engine = engine
        self._what = model  # as the engine is to be told it
        self._post = post
        self._lock = threading.Lock()  # orders begin and stop; held for an assignment
        self._stop_grace_s: float | None = None  # a Stop came; a launch that has not begun never does
        self.serves = False  # Loaded was posted, or is about to be
        self.over = False  # Exited was posted, or is about to be
        self.probed = False  # a probe is queued or under way
        self.lease_ended = False  # since it was last looked at
        self.looked_at = False  # a look is queued or under way
        self.settled = False  # Filled was posted
        self._progress_at = 0.0
        self._client: RunnerClient | None = None

    @property
    def client(self) -> RunnerClient | None:
        """The client of a runner that is a server, made when it is first used; None for an object."""
        with self._lock:
            if self._client is None and self.endpoint is not None:
                self._client = self.endpoint.client or RunnerClient(self.endpoint.url, self.endpoint.key)
            return self._client

    def begin(self) -> None:
        """Carry out the Launch; no lock is held while the engine takes its time, so that no Stop waits for it."""
        if self._stop_grace_s is not None:
            self.exited(None, "stopped before it began", False)
            return
        try:
            process = self._engine.launch(self._what, self.launch.options, self.launch.placement, self)
        except Exception as error:
            log.debug("a launch failed", exc_info=True)
            self.exited(None, str(error) or repr(error), False)
            return
        with self._lock:
            self.process = process
            grace_s = self._stop_grace_s
        if grace_s is not None:  # it came meanwhile, when there was nothing to stop
            process.stop(grace_s)

    def stop(self, grace_s: float) -> None:
        """Carry out a Stop."""
        with self._lock:
            self._stop_grace_s = grace_s
            process = self.process
        if process is not None:
            process.stop(grace_s)

    def progressed(self) -> None:
        """Report of the engine: the load is alive."""
        now = time.monotonic()
        if now - self._progress_at >= _PROGRESS_S:
            self._progress_at = now
            self._post(Progress(self.runner))

    def loaded(self, endpoint: Endpoint | object, num_ctx: int | None, memory: Memory) -> None:
        """Report of the engine: it serves."""
        if isinstance(endpoint, Endpoint):
            self.endpoint = endpoint
        else:
            self.value = endpoint
        self.serves = True
        resident, to_come = (tuple(sorted(amounts.items())) for amounts in (memory.resident, memory.to_come))
        self._post(Loaded(self.runner, num_ctx, resident, memory.mapped_bytes, to_come))

    def exited(self, code: int | None, detail: str, out_of_memory: bool) -> None:
        """Report of the engine: the process is gone."""
        with self._lock:
            if self.over:
                return
            self.over = True
        detail = without_addresses(detail)  # last words may tell where it listened, and whoever is told may record it
        self.value = None  # else it would stay in memory that is accounted as free
        self._post(Exited(self.runner, code, detail, out_of_memory))
        if self._client is not None:
            self._client.close()
