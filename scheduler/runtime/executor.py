"""Commands become jobs, and what the jobs find becomes events."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from fsm.domain.devices import DeviceId
from fsm.machine.request import ModelId
from fsm.machine.runner import RunnerId
from fsm.messages import refusals
from fsm.messages.commands import Claim, Inspect, Launch, PersistMeasurement, Prefetch, ReleaseClaim, Sample, Stop
from fsm.messages.events import ClaimContended, ClaimGranted, ContextFilled, Event, Inspected, Progress, Unresponsive
from fsm.messages.reasons import NoAnswer
from fsm.sizing.load_history import NOTHING, LoadHistory
from scheduler.concurrency.thread_pool import ThreadPool
from scheduler.config.settings import Settings
from scheduler.devices.device_reader import DeviceReader
from scheduler.engines.interface import Engine, Process
from scheduler.errors.exceptions import InvalidModel, ModelNotFound, SchedulerError
from scheduler.models.measurement_store import Identity
from scheduler.models.measurements import Measurements, identity_of
from scheduler.models.model_spec import ModelSpec
from scheduler.runtime.device_locks import DeviceLocks
from scheduler.runtime.memory_sampler import MemorySampler
from scheduler.runtime.prefetcher import Prefetcher
from scheduler.runtime.runner_handle import RunnerHandle

log = logging.getLogger("loadmaster")

_WORKERS = 8  # jobs that may block at once: inspections, launches, looks; all but launches wait for a reading
_CALLERS = 64  # of the user's callbacks at once: each may block, on the scheduler too
_STOPPERS = 2  # of their own, so that nothing can starve a stop
_FRESH_S = 2.0  # how long an inspection, or a claim, waits for a sample of the devices
_LOOK_S = 1.0  # how long a runner may take to say whether it has settled
_LEAST_S = 0.1  # for each pool of threads to end, where another has used up the time: else it would be blamed
_LAST_LOOK_S = 0.2  # the same, right before it is stopped


class Executor:
    """Carries out what may block: inspections, launches, stops, samples. `perform` itself never blocks."""

    def __init__(
        self,
        settings: Settings,
        devices: DeviceReader,
        engine_of: Callable[[ModelId], tuple[Engine, object]],
        post: Callable[[Event], None],
        lives_on: Callable[[RunnerId], bool],
        forget: Callable[[ModelId], None],
        pool: Callable[[str, int], ThreadPool] = ThreadPool,
    ) -> None:
        self._settings = settings
        self._engine_of = engine_of
        self._post = post
        self._forget = forget  # a model that was refused; called when the core has been told
        self.worker_pool = pool("loadmaster-worker", _WORKERS)
        self.callback_pool = pool("loadmaster-caller", _CALLERS)
        self.stop_pool = pool("loadmaster-stopper", _STOPPERS)
        self._lives_on = lives_on  # whether the core still knows a runner; called under the driver's lock
        self.runner_handles: dict[
            RunnerId, RunnerHandle
        ] = {}  # of those that it knows, and a few past ones; written under that lock
        self._readers = pool("loadmaster-sampler", 1)  # of its own: workers wait for what it reads
        self.sampler = MemorySampler(devices, self._readers, self._running, post)
        self.prefetcher = Prefetcher(self._files_of, lambda: any(self._loading()))
        self.locks = self._locks(settings)
        self.measurements = Measurements(settings.measurement_file) if settings.measurement_file is not None else None
        self._identities: dict[ModelId, Identity | None] = {}  # as of the last inspection, unless that refused it

    def perform(
        self,
        command: Inspect | Launch | Stop | Sample | Claim | ReleaseClaim | Prefetch | PersistMeasurement,
    ) -> None:
        """File a command, in the order in which they are decided; returns at once."""
        match command:
            case Inspect(model):
                self.worker_pool.put(lambda: self._inspect(model))
            case Launch(runner, model):
                engine, what = self._engine_of(model)
                self.forget_past()
                life = self.runner_handles[runner] = RunnerHandle(command, engine, what, self._post)
                life.identity = self._identities.get(model)
                self.worker_pool.put(life.begin)
            case Stop(runner):
                if (life_to_stop := self.runner_handles.get(runner)) is not None:
                    self.stop_pool.put(lambda: self._stop(life_to_stop))
            case Sample(number):
                self.sampler.request(number)
            case Claim(number, devices):
                if self.locks is not None:
                    self.locks.claim(number, devices)
            case ReleaseClaim(number):
                if self.locks is not None:
                    self.locks.give_back(number)
            case Prefetch(files):
                self.prefetcher.ask(files)
            case PersistMeasurement(runner):
                told = self.runner_handles.get(runner)
                if self.measurements is not None and told is not None and told.identity is not None:
                    self.measurements.remember(told.identity, told.launch, command)

    def forget_past(self) -> None:
        """Let go of runners that the core knows no more; under the driver's lock."""
        for past in [id for id in self.runner_handles if not self._lives_on(id)]:
            del self.runner_handles[past]

    def probe(self, life: RunnerHandle) -> None:
        """Have a runner asked whether it still answers, and post it if it does not; one probe of it at a time."""
        if not life.probed:
            life.probed = True
            self.worker_pool.put(lambda: self._probe(life))

    def _probe(self, life: RunnerHandle) -> None:
        timeout_s = self._settings.probe_timeout
        try:
            if life.process is not None and not life.process.healthy(timeout_s) and not life.over:
                life.lease_ended = False  # nor would it answer a look
                self._post(Unresponsive(life.runner, NoAnswer(timeout_s)))
        finally:
            life.probed = False

    def poll_context_filled(self, life: RunnerHandle) -> None:
        """Have a runner asked whether it has settled, and post it when it has; one look at it at a time."""
        if not life.looked_at:
            life.looked_at = True
            self.worker_pool.put(lambda: self._look(life, _LOOK_S))

    def _look(self, life: RunnerHandle, timeout_s: float) -> None:
        life.lease_ended = False
        try:
            to_come = life.process.context_filled(timeout_s) if life.process is not None else None
            if to_come is None or life.settled:
                return
            life.settled = self.sampler.refresh(timeout_s)  # its memory is read after it was filled
            life.lease_ended = not life.settled  # else it is looked at again soon
            if life.settled:
                self._post(ContextFilled(life.runner, tuple(sorted(to_come.items()))))
        finally:
            life.looked_at = False

    def _stop(self, life: RunnerHandle) -> None:
        try:
            if life.lease_ended and not life.settled and not life.over:  # else what its last lease showed would be lost
                self._look(life, _LAST_LOOK_S)
        finally:
            life.stop(self._settings.stop_grace)

    def call(self, callback: Callable[[], object]) -> None:
        """Have a callback of the user's run on a thread that may block; returns at once."""
        self.callback_pool.put(callback)

    def refresh(self, timeout_s: float) -> bool:
        """Have the devices read and wait for it; return whether it came in time. Once closed, nobody waits."""
        return self.sampler.refresh(timeout_s)

    def request_sample(self) -> None:
        """Have the devices read; returns at once."""
        self.sampler.request()

    def resample(self) -> None:
        """Time has passed in which nothing ran here: it is no load's fault, and what was read of the devices is old.

        The devices are read again, and loads, which could show nothing in that time, are given their time anew.
        """
        log.info("nothing ran here for a while: the devices are read again")
        for life in self._loading():
            self._post(Progress(life.runner))
        self.sampler.request()

    def ensure_threads(self) -> None:
        """Start the threads that could not be started when jobs needed them."""
        for pool in (
            self.worker_pool,
            self.callback_pool,
            self.stop_pool,
            self._readers,
            self.prefetcher,
            self.measurements,
        ):
            if pool is not None:
                pool.ensure_threads()

    def close(self, timeout_s: float) -> list[str]:
        """End the threads; return the names of those that hang."""
        end = time.monotonic() + timeout_s
        self.sampler.close()  # first: a worker may wait for a reading that never begins, or hangs
        ends = [self.locks.close] if self.locks is not None else []
        ends += [pool.close for pool in (self.prefetcher, self.stop_pool, self.worker_pool, self._readers)]
        ends += [self.measurements.close] if self.measurements is not None else []
        ends += [self.callback_pool.close]  # last: what users do there may take all the time
        return [name for close in ends for name in close(max(_LEAST_S, end - time.monotonic()))]

    @property
    def locked(self) -> frozenset[DeviceId]:
        """The devices that are locked against other programs on this machine."""
        return self.locks.held if self.locks is not None else frozenset()

    @property
    def read_ahead_bytes(self) -> int:
        """What was read of models' files while they waited, since the beginning."""
        return self.prefetcher.ahead_bytes

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be done and was worked round, in sentences."""
        found = [each.problem for each in (self.locks, self.measurements) if each is not None]
        return tuple(filter(None, found))

    def _running(self) -> Iterator[tuple[RunnerId, Process]]:
        for id, life in list(self.runner_handles.items()):
            if life.process is not None and not life.over:
                yield id, life.process

    def _loading(self) -> Iterator[RunnerHandle]:
        for life in list(self.runner_handles.values()):
            if not life.serves and not life.over:
                yield life

    def _files_of(self, model: ModelId) -> tuple[str, ...]:
        _, what = self._engine_of(model)
        return what.files if isinstance(what, ModelSpec) else ()

    def _locks(self, settings: Settings) -> DeviceLocks | None:
        """Return the locks among the programs on this machine; None where they are off, and nothing is claimed."""
        if settings.lock_folder is None:
            return None

        def had(number: int) -> None:
            self.worker_pool.put(lambda: self._claimed(number))

        return DeviceLocks(settings.lock_folder, had, lambda number: self._post(ClaimContended(number)))

    def _claimed(self, number: int) -> None:
        self.sampler.refresh(_FRESH_S)  # what other programs took before it
        self._post(ClaimGranted(number))

    def _inspect(self, model: ModelId) -> None:
        try:
            engine, what = self._engine_of(model)
        except KeyError:  # forgotten, since whoever asked has left
            self._post(Inspected(model, refusals.ModelNotFoundRefusal(model)))
            return
        identity = identity_of(what)  # before it is read, and once more after that: it may be replaced in between
        try:
            outcome: object = engine.inspect(what)
        except ModelNotFound as error:
            outcome = refusals.ModelNotFoundRefusal(error.path)
        except InvalidModel as error:
            outcome = refusals.InvalidModelRefusal(error.path, error.reason, error.offset)
        except SchedulerError as error:
            outcome = refusals.InvalidModelRefusal(model, str(error))
        except Exception as error:
            log.debug("an inspection failed", exc_info=True)
            reason = (
                f"looking at it failed with {type(error).__name__}: {error}; see what this program may use (ulimit -a)"
            )
            outcome = refusals.InvalidModelRefusal(model, reason)
        self.sampler.refresh(_FRESH_S)  # what is free is read again right before each start
        identity = identity if identity == identity_of(what) else None
        refused = isinstance(outcome, refusals.ModelNotFoundRefusal | refusals.InvalidModelRefusal)
        if refused:
            self._identities.pop(model, None)
        else:
            self._identities[model] = identity
        known = self.load_measurements(identity)
        self._post(Inspected(model, outcome, known))  # type: ignore[arg-type]  # what an engine returns, or one of the two above
        if refused:
            self._forget(model)

    def load_measurements(self, identity: Identity | None) -> LoadHistory:
        """Return what earlier lives of these files showed, in whatever program; nothing where that is not known."""
        return self.measurements.recall(identity) if self.measurements is not None else NOTHING
