"""The handle of one runner in the shell: its process, its client and its lock."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fsm.machine.request import ModelId
from fsm.messages.commands import Launch
from fsm.messages.events import Event, Exited, Loaded, Progress
from scheduler.engines.interface import Endpoint, Engine, Memory, Process
from scheduler.errors.formatting import without_addresses
from scheduler.models.measurement_store import Identity
from scheduler.models.model_spec import FileStates

if TYPE_CHECKING:
    from scheduler.engines.runner_client import RunnerClient

log = logging.getLogger("loadmaster")
_PROGRESS_S = 1.0  # least time between two posts of progress


class RunnerHandle:
    """Holds one runner's process, from `Launch` to `Exited`, and listens to its engine; any thread may call it."""

    def __init__(
        self,
        launch: Launch,
        engine: Engine,
        model: object,
        post: Callable[[Event], None],
        note_failure: Callable[[ModelId, BaseException], None] = lambda model, error: None,
    ) -> None:
        self.runner = launch.runner
        self.model = launch.model
        self.endpoint: Endpoint | None = None  # set before Loaded is posted, where the runner is a server
        self.value: object = None  # the object itself, where the runner is one
        self.process: Process | None = None  # set when the launch has begun
        self.launch = launch
        self.identity: Identity | None = None  # identity of the files that were inspected for this runner
        self.file_states: FileStates | None = None  # of the files before that inspection; None: unknown
        self._engine = engine
        self._what = model  # the model as its engine takes it
        self._post = post
        self._note_failure = note_failure
        self._lock = threading.Lock()  # orders begin and stop; held for assignments only
        self._stop_grace_s: float | None = None  # set by a Stop; a launch that has not begun by then never begins
        self.serves = False  # Loaded was posted, or is about to be
        self.over = False  # Exited was posted, or is about to be
        self.probed = False  # a probe is queued or under way
        self.lease_ended = False  # a lease has ended since the runner was last polled
        self.looked_at = False  # a poll of the runner is queued or under way
        self.settled = False  # ContextFilled was posted
        self._progress_at = 0.0
        self._loaded: Loaded | None = None  # to be posted when the launch returns
        self._client: RunnerClient | None = None

    @property
    def client(self) -> RunnerClient | None:
        """The client of a runner that is a server, made at its first use; None where the runner is an object."""
        with self._lock:
            if self._client is None and self.endpoint is not None:
                from scheduler.engines.runner_client import RunnerClient  # here, as few programs' first lines need it

                self._client = self.endpoint.client or RunnerClient(self.endpoint.url, self.endpoint.key)
            return self._client

    def begin(self) -> None:
        """Carry out the `Launch`; no lock is held while the engine launches, so a `Stop` never waits for the launch."""
        if self._stop_grace_s is not None:
            self.exited(None, "stopped before it began", False)
            return
        try:
            launch = self.launch
            process = self._engine.launch(self._what, launch.options, launch.settings, launch.placement, self)
        except Exception as error:
            log.debug("a launch failed", exc_info=True)
            self.exited(None, str(error) or repr(error), False)
            return
        with self._lock:
            self.process = process
            grace_s, loaded = self._stop_grace_s, self._loaded
        if loaded is not None and not self.over:
            self._post(loaded)
        if grace_s is not None:  # the Stop came during the launch, when there was no process to stop
            process.stop(grace_s)

    def stop(self, grace_s: float) -> None:
        """Carry out a `Stop`: the process is killed after `grace_s` seconds."""
        with self._lock:
            self._stop_grace_s = grace_s
            process = self.process
        if process is not None:
            process.stop(grace_s)

    def progressed(self) -> None:
        """Post `Progress`: the engine reports that the load is alive."""
        now = time.monotonic()
        if now - self._progress_at >= _PROGRESS_S:
            self._progress_at = now
            self._post(Progress(self.runner))

    def loaded(
        self, endpoint: Endpoint | object, num_ctx: int | None, memory: Memory, flash_attention: bool | None = None
    ) -> None:
        """Post `Loaded`: the engine reports that the runner serves, with its memory in bytes."""
        if isinstance(endpoint, Endpoint):
            self.endpoint = endpoint
        else:
            self.value = endpoint
        self.serves = True
        resident, to_come = (tuple(sorted(amounts.items())) for amounts in (memory.resident, memory.to_come))
        loaded = Loaded(self.runner, num_ctx, resident, memory.mapped_bytes, to_come, flash_attention)
        with self._lock:
            if self.process is None:  # the launch has not returned yet, and a lease needs the process
                self._loaded = loaded
                return
        self._post(loaded)

    def failed(self, error: BaseException) -> None:
        """Keep the exception that ended the load."""
        self._note_failure(self.model, error)

    def exited(self, code: int | None, detail: str, out_of_memory: bool) -> None:
        """Post `Exited`, once: the engine reports that the process is gone."""
        with self._lock:
            if self.over:
                return
            self.over = True
        # a process's last words may tell its address, and the detail may be recorded
        detail = without_addresses(detail)
        self.value = None  # else the object would stay in memory that is accounted as free
        self._post(Exited(self.runner, code, detail, out_of_memory))
        if self._client is not None:
            self._client.close()
