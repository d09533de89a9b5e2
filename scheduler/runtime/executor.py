"""The executor: carries out the commands of the core as jobs on thread pools, and posts their results as events."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from fsm.domain.devices import DeviceId
from fsm.domain.options import Options
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
from scheduler.engines.engine_model import EngineModel
from scheduler.engines.interface import Engine, Process, inspect, prompts_of, version_of
from scheduler.errors.exceptions import EngineMissing, InvalidModel, ModelNotFound, SchedulerError
from scheduler.models.measurement_store import Identity
from scheduler.models.measurements import Measurements, identity_of
from scheduler.models.model_spec import FileStates, ModelSpec
from scheduler.runtime.device_locks import DeviceLocks
from scheduler.runtime.inspections import MOST_AT_ONCE, Inspection, Inspections
from scheduler.runtime.memory_sampler import MemorySampler
from scheduler.runtime.prefetcher import Prefetcher
from scheduler.runtime.runner_handle import RunnerHandle

log = logging.getLogger("loadmaster")

_WORKERS = 8  # jobs that may block at once: probes, polls, claims, and ends of inspections, which wait for a reading
_LAUNCHERS = 8  # launches at once: each may wait for a file that cannot be read
_CALLERS = 64  # callbacks of the user's at once: each may block, even on the scheduler
_DELIVERERS = 4  # answers that are delivered at once: each may meet a lock of a future that a signal interrupted
_STOPPERS = 2  # threads for stops only, so that no other job can delay a stop
_SAVERS = 8  # runners whose prompts are saved at once
_CALLBACKS_WAIT = f"{_CALLERS} callbacks of futures and leases have not returned: all others wait for one of them"
_FRESH_S = 2.0  # how long an inspection, or a device claim, waits for a sample of the devices
_LOOK_S = 1.0  # how long a runner may take to say whether its context is filled
_LEAST_S = 0.1  # for each thread pool to end where another has used up the time, so that it is not reported as hanging
_LAST_LOOK_S = 0.2  # how long a runner may take to say so right before it is stopped


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
        self._forget = forget  # called for a model that was refused, after the core was told
        self.worker_pool = pool("loadmaster-worker", _WORKERS)
        self.launch_pool = pool("loadmaster-launcher", _LAUNCHERS)
        self.callback_pool = pool("loadmaster-caller", _CALLERS)
        self.delivery_pool = pool("loadmaster-deliverer", _DELIVERERS)  # never runs the user's code
        self.stop_pool = pool("loadmaster-stopper", _STOPPERS)
        # for runners whose prompts are saved before they are stopped
        self.saver_pool = None if settings.keep_prompts is None else pool("loadmaster-saver", _SAVERS)
        self._saving: dict[RunnerId, RunnerHandle] = {}
        self._closing = False  # nothing is saved any more
        self._callbacks_wait = False  # all threads for callbacks were busy at the last look
        self._lives_on = lives_on  # whether the core still knows a runner; called under the driver's lock
        # the runners that the core knows, and a few past ones; written under the driver's lock
        self.runner_handles: dict[RunnerId, RunnerHandle] = {}
        # of models whose last load raised in this process, or whose engine could not be used; for the users' errors
        self.load_errors: dict[ModelId, BaseException] = {}
        self._readers = pool("loadmaster-sampler", 1)  # of their own: the worker pool's jobs wait for what it reads
        self.sampler = MemorySampler(devices, self._readers, self._running, post)
        self.prefetcher = Prefetcher(self._files_of, lambda: any(self._loading()))
        self.locks = self._locks(settings)
        self.measurements = Measurements(settings.measurement_file) if settings.measurement_file is not None else None
        self.inspections = Inspections(pool("loadmaster-inspector", MOST_AT_ONCE), self._read, self._give_up)
        self._file_states: dict[ModelId, FileStates | None] = {}  # right before the last inspection
        self._identities: dict[ModelId, Identity | None] = {}  # as of the last inspection, unless it refused the model

    def perform(
        self,
        command: Inspect | Launch | Stop | Sample | Claim | ReleaseClaim | Prefetch | PersistMeasurement,
    ) -> None:
        """Queue a command, in the order in which the core decided the commands, and return at once."""
        match command:
            case Inspect(model, options):
                self._inspect(model, options)
            case Launch(runner, model):
                engine, what = self._engine_of(model)
                self.forget_past()
                handle = self.runner_handles[runner] = RunnerHandle(
                    command, engine, what, self._post, self.load_errors.__setitem__
                )
                handle.identity = self._identities.get(model)
                handle.file_states = self._file_states.get(model)
                self.launch_pool.put(handle.begin)
            case Stop(runner, keep_prompts):
                if (stopped := self.runner_handles.get(runner)) is None:
                    pass
                elif keep_prompts and self.saver_pool is not None:
                    self.saver_pool.put(lambda: self._save_and_stop(stopped))
                else:
                    self.stop_pool.put(lambda: self._stop(stopped))
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
                persisted = self.runner_handles.get(runner)
                if self.measurements is not None and persisted is not None and persisted.identity is not None:
                    self.measurements.remember(persisted.identity, persisted.launch, command)

    def forget_model(self, model: ModelId) -> None:
        """Forget the identity of a model that the core does not know any more."""
        self._identities.pop(model, None)
        self.load_errors.pop(model, None)
        self._file_states.pop(model, None)

    def forget_past(self) -> None:
        """Drop the handles of runners that the core does not know any more; called under the driver's lock."""
        for past in [id for id in self.runner_handles if not self._lives_on(id)]:
            del self.runner_handles[past]

    def runner_of_other_files(self, model: ModelSpec) -> RunnerId | None:
        """Return a model's newest runner if it was loaded from other files than there are now under their paths."""
        handles = [handle for handle in list(self.runner_handles.values()) if handle.model == model.id]
        if not handles or (handle := handles[-1]).over or handle.file_states is None:
            return None
        return handle.runner if model.file_states() not in (None, handle.file_states) else None

    def probe(self, handle: RunnerHandle) -> None:
        """Have a runner probed, and post `Unresponsive` if it does not answer; one probe of a runner at a time."""
        if not handle.probed:
            handle.probed = True
            self.worker_pool.put(lambda: self._probe(handle))

    def _probe(self, handle: RunnerHandle) -> None:
        timeout_s = self._settings.probe_timeout
        try:
            if handle.process is not None and not handle.process.healthy(timeout_s) and not handle.over:
                handle.lease_ended = False  # a poll would not be answered either
                self._post(Unresponsive(handle.runner, NoAnswer(timeout_s)))
        finally:
            handle.probed = False

    def poll_context_filled(self, handle: RunnerHandle) -> None:
        """Have a runner polled, and post `ContextFilled` when its context is filled; one poll of a runner at a time."""
        if not handle.looked_at:
            handle.looked_at = True
            self.worker_pool.put(lambda: self._poll(handle))

    def _poll(self, handle: RunnerHandle) -> None:
        try:
            if (prompts := prompts_of(handle.process)) is not None:
                prompts.look(_LOOK_S)
        finally:
            self._look(handle, _LOOK_S)

    def _look(self, handle: RunnerHandle, timeout_s: float) -> None:
        handle.lease_ended = False
        try:
            looks = handle.process is not None and not handle.settled
            to_come = handle.process.context_filled(timeout_s) if looks and handle.process is not None else None
            if to_come is None or handle.settled:
                return
            handle.settled = self.sampler.refresh(timeout_s)  # the sample must be read after the context was filled
            handle.lease_ended = not handle.settled  # else the runner is polled again soon
            if handle.settled:
                self._post(ContextFilled(handle.runner, tuple(sorted(to_come.items()))))
        finally:
            handle.looked_at = False

    def _stop(self, handle: RunnerHandle) -> None:
        try:
            # else the growth that its last lease showed would be lost
            if handle.lease_ended and not handle.settled and not handle.over:
                self._look(handle, _LAST_LOOK_S)
        finally:
            handle.stop(self._settings.stop_grace)

    def _save_and_stop(self, handle: RunnerHandle) -> None:
        """Save a runner's prompts and then stop it; a close stops it at once."""
        self._saving[handle.runner] = handle
        try:
            if (prompts := prompts_of(handle.process)) is not None and not self._closing:
                prompts.save()
        finally:
            del self._saving[handle.runner]
            self._stop(handle)

    def end_saving(self) -> None:
        """Stop the runners whose prompts are being saved; from now on none are saved."""
        self._closing = True
        for handle in list(self._saving.values()):
            handle.stop(self._settings.stop_grace)

    def forget_prompts(self, model: ModelId) -> None:
        """Keep no prompts of a model's runners."""
        for handle in list(self.runner_handles.values()):
            if handle.model == model and (prompts := prompts_of(handle.process)) is not None:
                prompts.forget()

    def call(self, callback: Callable[[], object]) -> None:
        """Run a callback of the user's on a thread that may block, and return at once."""
        self.callback_pool.put(callback)

    def deliver(self, answer: Callable[[], object]) -> None:
        """Deliver an answer on a thread that runs no code of the user's, and return at once."""
        self.delivery_pool.put(answer)

    def refresh(self, timeout_s: float) -> bool:
        """Order a reading of the devices and wait for it; return whether it came within `timeout_s` seconds.

        Returns at once when the sampler is closed.
        """
        return self.sampler.refresh(timeout_s)

    def request_sample(self) -> None:
        """Order a reading of the devices and return at once."""
        self.sampler.request()

    def resample(self) -> None:
        """Provide for a time in which the machine or the program stood still: read the devices, and extend the loads.

        Loads could show no progress in that time and are given their time anew. The last sample of the devices is old.
        """
        log.info("the machine or this program stood still for a while: the devices are read again")
        for handle in self._loading():
            self._post(Progress(handle.runner))
        self.sampler.request()

    def ensure_threads(self) -> None:
        """Start the threads that could not be started when jobs needed them."""
        for pool in (
            self.worker_pool,
            self.launch_pool,
            self.inspections,
            self.callback_pool,
            self.delivery_pool,
            self.stop_pool,
            self.saver_pool,
            self._readers,
            self.prefetcher,
            self.measurements,
            self.locks,
        ):
            if pool is not None:
                pool.ensure_threads()
        full = self.callback_pool.full
        if full and not self._callbacks_wait:
            log.warning("%s", _CALLBACKS_WAIT)
        self._callbacks_wait = full

    def close(self, timeout_s: float) -> list[str]:
        """End the threads within `timeout_s` seconds; return the names of the threads that hang."""
        end = time.monotonic() + timeout_s
        self.sampler.close()  # first: a job may wait for a reading that never begins, or hangs
        ends = [self.locks.close] if self.locks is not None else []
        ends += [self.prefetcher.close, self.stop_pool.close, self.worker_pool.close, self._readers.close]
        ends += [self.saver_pool.close] if self.saver_pool is not None else []
        ends += [self.measurements.close] if self.measurements is not None else []
        ends += [self.delivery_pool.close]
        # last: files that cannot be read, and the callbacks of users, may take all the time
        ends += [self.launch_pool.close, self.inspections.close, self.callback_pool.close]
        return [name for close in ends for name in close(max(_LEAST_S, end - time.monotonic()))]

    @property
    def locked(self) -> frozenset[DeviceId]:
        """The devices that are locked against other programs on this machine."""
        return self.locks.held if self.locks is not None else frozenset()

    @property
    def read_ahead_bytes(self) -> int:
        """Bytes of models' files that were read into the page cache while their models waited, in all."""
        return self.prefetcher.ahead_bytes

    @property
    def problems(self) -> tuple[str, ...]:
        """Problems that the executor works round, in sentences."""
        found = [each.problem for each in (self.locks, self.measurements) if each is not None]
        return tuple(
            filter(None, [*found, *self.inspections.problems, _CALLBACKS_WAIT if self._callbacks_wait else ""])
        )

    def _running(self) -> Iterator[tuple[RunnerId, Process]]:
        for id, handle in list(self.runner_handles.items()):
            if handle.process is not None and not handle.over:
                yield id, handle.process

    def _loading(self) -> Iterator[RunnerHandle]:
        for handle in list(self.runner_handles.values()):
            if not handle.serves and not handle.over:
                yield handle

    def _files_of(self, model: ModelId) -> tuple[str, ...]:
        try:
            _, what = self._engine_of(model)
        except KeyError:  # forgotten, since the caller has left
            return ()
        return what.files if isinstance(what, ModelSpec | EngineModel) else ()

    def _locks(self, settings: Settings) -> DeviceLocks | None:
        """Return the locks among the programs on this machine, or None where locking is off and no claim is made."""
        if settings.lock_folder is None:
            return None

        def had(number: int) -> None:
            self.worker_pool.put(lambda: self._claimed(number))

        return DeviceLocks(settings.lock_folder, had, lambda number: self._post(ClaimContended(number)))

    def _claimed(self, number: int) -> None:
        self.sampler.refresh(_FRESH_S)  # includes the memory that other programs took before the claim
        self._post(ClaimGranted(number))

    def _inspect(self, model: ModelId, asked: tuple[Options, ...]) -> None:
        """Queue an inspection: an object has no files, and needs no thread that may wait for them."""
        if files := self._files_of(model):
            self.inspections.put(files, model, asked)
        else:
            inspection = Inspection(model, asked, "", time.monotonic())
            self.worker_pool.put(lambda: self._read(inspection))

    def _read(self, inspection: Inspection) -> None:
        """Read a model's files; the reading of the devices, which follows, is waited for on another thread."""
        try:
            engine, what = self._engine_of(inspection.model)
        except KeyError:  # forgotten, since the caller has left
            if inspection.answer():
                self._post(Inspected(inspection.model, refusals.ModelNotFoundRefusal(inspection.model)))
            return
        states = what.file_states() if isinstance(what, ModelSpec) else None
        # read before and after the inspection: the file may be replaced in between
        identity = identity_of(what, version_of(engine, what))
        if isinstance(self.load_errors.get(inspection.model), EngineMissing):
            del self.load_errors[inspection.model]
        outcome = _outcome(engine, inspection.model, what, inspection.options, self.load_errors)
        identity = identity if identity == identity_of(what, version_of(engine, what)) else None
        if inspection.answer():
            self.worker_pool.put(lambda: self._inspected(inspection.model, outcome, identity, states))

    def _inspected(self, model: ModelId, outcome: object, identity: Identity | None, states: FileStates | None) -> None:
        self.sampler.refresh(_FRESH_S)  # free memory is read again right before each launch
        refused = isinstance(outcome, refusals.ModelNotFoundRefusal | refusals.InvalidModelRefusal)
        if refused:
            self._identities.pop(model, None)
            self._file_states.pop(model, None)
        else:
            self._identities[model] = identity
            self._file_states[model] = states
        known = self.load_measurements(identity)
        self._post(Inspected(model, outcome, known))  # type: ignore[arg-type]  # either what an engine returns, or a refusal from above
        if refused:
            self._forget(model)

    def _give_up(self, inspection: Inspection, reason: str) -> None:
        if inspection.answer():
            log.warning("%s cannot be read: %s", inspection.path, reason)
            refusal = refusals.InvalidModelRefusal(inspection.path, reason)
            self.worker_pool.put(lambda: self._inspected(inspection.model, refusal, None, None))

    def load_measurements(self, identity: Identity | None) -> LoadHistory:
        """Return the measurements of earlier runners of these files, of any program; `NOTHING` where there are none."""
        return self.measurements.recall(identity) if self.measurements is not None else NOTHING


def _outcome(
    engine: Engine, model: ModelId, what: object, asked: Sequence[Options], errors: dict[ModelId, BaseException]
) -> object:
    """Return what an engine tells of a model, or the refusal of its requests; an unusable engine is in `errors`."""
    try:
        return inspect(engine, what, asked)
    except ModelNotFound as error:
        return refusals.ModelNotFoundRefusal(error.path)
    except InvalidModel as error:
        return refusals.InvalidModelRefusal(error.path, error.reason, error.offset)
    except SchedulerError as error:
        if isinstance(error, EngineMissing):
            errors[model] = error
        return refusals.InvalidModelRefusal(model, str(error))
    except Exception as error:
        log.debug("an inspection failed", exc_info=True)
        lacking = isinstance(error, OSError | MemoryError | ImportError)
        hint = "; see what this program may use (ulimit -a)" if lacking else ""
        reason = f"its inspection failed with {type(error).__name__}: {error}{hint}"
        return refusals.InvalidModelRefusal(model, reason)
