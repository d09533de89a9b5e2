"""The scheduler that a program embeds: `with scheduler.acquire("model.gguf") as lease: …`."""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from types import TracebackType
from typing import Self, Unpack, overload
from weakref import WeakSet

from fsm.core import Core, CoreConfig, Snapshot
from fsm.domain.devices import DeviceId
from fsm.domain.options import Options
from fsm.machine.request import ModelId, Purpose, RequestSpec
from fsm.messages.events import Close, Configure, Expire, FilesReplaced, Pin
from scheduler.api.debug_state import DebugState
from scheduler.api.environment import Environment
from scheduler.api.fit import Fit, fit_of
from scheduler.api.lease import Lease, Leases
from scheduler.api.pending_lease import Acquiring, AcquiringAll, GroupRequest, Reservation
from scheduler.api.status import Status, status_of
from scheduler.concurrency.event_loops import running_loop, warn_if_loop_runs
from scheduler.config.quantities import parse_bytes, parse_duration
from scheduler.config.settings import (
    ChangeableArguments,
    Settings,
    SettingsArguments,
    changeable_keywords,
    settings_keywords,
)
from scheduler.config.signatures import with_keywords
from scheduler.engines.engine_model import EngineModel
from scheduler.engines.interface import version_of
from scheduler.engines.python import PythonModel, Value
from scheduler.errors.exceptions import InvalidSettings, ModelNotFound, SchedulerClosed, WouldDeadlock, not_beside
from scheduler.errors.formatting import format_duration, shown
from scheduler.errors.wording import problem
from scheduler.models.catalog import Catalog
from scheduler.models.measurements import identity_of
from scheduler.models.model_spec import ModelSpec, check_text
from scheduler.recording.recorder import Recorder
from scheduler.runtime.event_log import EventLog
from scheduler.runtime.event_stream import EventStream, Hub
from scheduler.runtime.executor import Executor
from scheduler.runtime.health_monitor import HealthMonitor
from scheduler.runtime.lease_holders import Held, this_asker
from scheduler.runtime.model_registry import ModelRegistry
from scheduler.runtime.pending_request import FutureRequest, settle_in_loop
from scheduler.runtime.request_broker import RequestBroker
from scheduler.runtime.request_parser import (
    AcquireOptions,
    IdentityOptions,
    Model,
    ParsedRequest,
    RequestParser,
    lease_limit,
)

log = logging.getLogger("loadmaster")

_FIRST_SAMPLE_S = 10.0  # how long a slow GPU driver may hold up the start
_AT_ONCE_S = 0.0  # leases are not waited for: at the interpreter's exit, after an exception, or where none is left
_LAST_WORDS_S = 2.0  # beyond the timeouts, for killed processes to be reaped and threads to end
_FRESH_S = 2.0  # how long a reservation, or a new memory limit, waits for a sample of the devices
_PREFETCHES = 2  # models whose files are read ahead while they wait for memory
_KILL_S = 10.0  # beyond the grace, for a driver to release the memory of a killed process
_CLOSE_LOOK_S = 0.1  # between two checks, during a close, of whether leases are still held
_SILENT_S = 1.0  # how long a close waits for leases before it says so
_AWAIT_CLOSE = "use `async with Scheduler()`, or await `aclose()`"
_AWAIT_LEASE = "await `acquire_async`"
_request_keywords = with_keywords(AcquireOptions, {})
_identity_keywords = with_keywords(IdentityOptions, {})
_ON_A_THREAD = "await `asyncio.to_thread(scheduler.{}, …)`"


class Scheduler:
    """Loads models on demand into runners, shares the runners by lease, and evicts them when their memory is needed.

    Safe to use from any thread, from event loops and from signal handlers. Close it, or use it in a `with` block, or in
    an `async with` block on an event loop. A scheduler that is not closed is closed when the main thread ends, or, with
    a `ResourceWarning`, when neither the program nor a lease or a request has a reference to it any more. After a fork
    only the parent may use it.

    Settings are given as `Settings`, or as keywords: those that `settings` does not have, or else the environment, see
    `Settings.from_environment`. Raises `InvalidSettings`.
    """

    @settings_keywords
    def __init__(
        self,
        settings: Settings | None = None,
        *,
        _environment: Environment | None = None,
        **more: Unpack[SettingsArguments],
    ) -> None:
        if not isinstance(settings, Settings | None):
            raise InvalidSettings("settings", settings, "made of Settings, or keywords, as in Scheduler(max_queue=9)")
        self.settings = Settings.from_environment(**more) if settings is None else settings.with_arguments(**more)
        self._close_lock = threading.RLock()  # one thread ends what is left, the other threads wait for it
        self._ending: int | None = None  # the thread that does
        self._acquiring_all = threading.RLock()  # callers of `acquire_all` take turns, tasks too
        self._configuring = threading.RLock()  # one thread changes limits; a signal handler may do so in between
        self._assemble(_environment or Environment())
        try:
            _close_at_exit()
            _open_schedulers.add(self)
            self._driver.start()
            self._executor.refresh(_FIRST_SAMPLE_S)
            self._prober.start()
        except BaseException:  # Ctrl-C, for example: the caller has no scheduler yet that it could close
            self._broker.closing = True
            self._end()
            raise

    def _assemble(self, environment: Environment) -> None:
        """Make the parts: they hold one another and never the scheduler, as a thread would then keep it for ever."""
        self._clock = environment.clock
        self._devices = environment.devices(self.settings)
        self.catalog = Catalog(environment.resolvers(self.settings))
        registry = self._registry = ModelRegistry(
            *environment.engines(self.settings), partial(environment.engine_of, self.settings)
        )
        self._parser = RequestParser(
            self.catalog, self._registry.require, lambda model: broker.post(Pin(model)),
            lambda past, id: broker.end_life(past, id),
            lambda: broker.query(Core.models_in_use), lambda model: broker.look_at_files(model),
        )  # fmt: skip
        event_log = self._event_log = EventLog(self.settings.event_buffer, self._registry.name, environment.thread_pool)
        self._hub = Hub(self.settings.event_buffer, self._registry.name, event_log)
        core = Core(replace(limits_of(self.settings), plans_later=environment.plans_later), self.settings.eviction)
        self._recorder: Recorder | None = None
        if (file := self.settings.recording_file) is not None:
            self._recorder = Recorder(file, self.settings.recording_limit, core, self._registry.name)
        self._driver = environment.driver(
            core, lambda command: broker.perform(command), self._hub.publish,
            lambda error: broker.fail(error), lambda: executor.resample(),
            self._recorder.step if self._recorder is not None else None,
        )  # fmt: skip
        executor = self._executor = Executor(
            self.settings, self._devices, self._registry.engine_of, self._driver.post, core.lives,
            lambda model: broker.forget(model), environment.thread_pool,
        )  # fmt: skip
        broker = self._broker = RequestBroker(
            self._registry, self._parser, self._driver, self._executor, core.knows, self.settings.probe_timeout
        )

        def tend() -> None:
            event_log.ensure_threads()
            broker.look_round()
            for engine in registry.engines:
                engine.look_round(lambda: broker.query(Core.free_host_bytes))

        self._prober = HealthMonitor(self._executor, self.settings.probe_interval, tend)

    # -- asking for models --------------------------------------------------------------------------------------------

    @overload
    def acquire(self, model: PythonModel[Value], **asking: Unpack[AcquireOptions]) -> Lease[Value]: ...
    @overload
    def acquire(self, model: Model, **asking: Unpack[AcquireOptions]) -> Lease: ...
    @_request_keywords
    def acquire(self, model: Model, **asking: Unpack[AcquireOptions]) -> Lease:
        """Return a lease on a runner of `model`, loading it if need be; blocks until the lease is granted.

        `model` is the path of a GGUF file, a name that `catalog` finds, a `ModelSpec` or a `PythonModel`;
        `AcquireOptions` lists the keywords. Load-time options matter only if they are named: a runner that was loaded
        with other options serves a request that names none.

        Raises `QueueFull`, `ModelNotFound`, `InvalidModel`, `DoesNotFit`, `LoadFailed`, `LoadTimeout`, `AcquireTimeout`
        (at once, as `TimeoutTooShort`, where it is certain), `UnsupportedOption`, `InvalidSettings`, `SchedulerClosed`,
        `WouldDeadlock` (where there is no room beside leases that this thread or task keeps in `with` blocks).
        """
        asker: object = threading.get_ident()
        if running_loop() is not None:  # looked up here, without a call more, for the sake of warm requests
            warn_if_loop_runs("acquire", _AWAIT_LEASE)
            asker = this_asker()
        parsed, holders = self._parser.parse_cached(model, asking), self._broker.holders
        held = holders.held(asker)
        try:
            return self._acquire(parsed, held, asker)
        except WouldDeadlock:
            if holders.are_out_of_reach(held.keeps):
                raise
        return self._acquire(parsed, Held(held.holds), asker)  # a lease may be released elsewhere: the request waits

    def _acquire(self, parsed: ParsedRequest, held: Held, asker: object) -> Lease:
        pending = self._broker.new_request(parsed, self)
        # made first: if Ctrl-C interrupts, the end of the lease releases what was granted
        lease: Lease = Lease(self._broker, pending)
        self._broker.submit_and_wait(pending, parsed, held)
        lease._hold(asker)
        return lease

    @_request_keywords
    def acquire_all(self, models: Iterable[Model], **asking: Unpack[AcquireOptions]) -> Leases:
        """Return leases on several models at once, in their order; blocks until all are granted.

        Callers that ask for several models one after the other may wait for one another for ever; callers of this
        method do not, since they take turns. The keywords are those of `acquire`, and hold for each model; `timeout` is
        for all together. Raises what `acquire` raises, with nothing granted, and `DoesNotFit` where a model never fits
        beside the others.
        """
        warn_if_loop_runs("acquire_all", "await `acquire_all_async`")
        group, asker = GroupRequest([self._parser.parse_cached(model, asking) for model in models]), this_asker()
        try:
            if not self._acquiring_all.acquire(timeout=-1 if (left_s := group.left_s) is None else left_s):
                raise group.too_late()
            for one, held in group.requests(self._broker.holders):
                group.leases.append(self._acquire(one, held, asker))
        except WouldDeadlock as error:
            group.leases.release()
            raise not_beside(error) from None
        except BaseException:  # Ctrl-C, for example
            group.leases.release()
            raise
        finally:
            with suppress(RuntimeError):  # its turn did not come
                self._acquiring_all.release()
        return group.leases

    @_request_keywords
    def acquire_all_async(self, models: Iterable[Model], **asking: Unpack[AcquireOptions]) -> AcquiringAll:
        """Like `acquire_all`, for `await` and `async with`; cancelling a task while it waits cancels its requests."""
        parsed = [self._parser.parse_cached(model, asking) for model in models]
        return AcquiringAll(self._broker, parsed, self, self._acquiring_all)

    @overload
    def submit(self, model: PythonModel[Value], **asking: Unpack[AcquireOptions]) -> Future[Lease[Value]]: ...
    @overload
    def submit(self, model: Model, **asking: Unpack[AcquireOptions]) -> Future[Lease]: ...
    @_request_keywords
    def submit(self, model: Model, **asking: Unpack[AcquireOptions]) -> Future[Lease]:
        """Like `acquire`, as a future.

        `cancel()` works until the lease is granted, and after that the lease is released.
        """

        def settle(pending: FutureRequest, future: Future[Lease]) -> None:
            lease = Lease(self._broker, pending) if pending.error is None else None
            if not pending.settle(future, lease) and lease is not None:
                lease.release()

        return self._broker.submit_future(self._parser.parse_cached(model, asking), settle, self)

    @overload
    def acquire_async(self, model: PythonModel[Value], **asking: Unpack[AcquireOptions]) -> Acquiring[Value]: ...
    @overload
    def acquire_async(self, model: Model, **asking: Unpack[AcquireOptions]) -> Acquiring: ...
    @_request_keywords
    def acquire_async(self, model: Model, **asking: Unpack[AcquireOptions]) -> Acquiring:
        """Like `acquire`, for `await` and `async with`; cancelling a task while it waits cancels its request."""
        return Acquiring(self._broker, self._parser.parse_cached(model, asking), self)

    @_request_keywords
    def preload(self, model: Model, **asking: Unpack[AcquireOptions]) -> Future[None]:
        """Load a model without a lease; the future is done when the model is loaded and its runner idle."""

        def settle(pending: FutureRequest, future: Future[None]) -> None:
            self._broker.requests.pop(pending.id, None)
            pending.settle(future, None)

        return self._broker.submit_future(self._parser.parse_cached(model, asking, Purpose.preload), settle, self)

    @_identity_keywords
    def expire(self, model: Model, **asking: Unpack[IdentityOptions]) -> None:
        """Unload a model: at once if its runner is idle, after its leases if busy; harmless if it is not loaded.

        Prompts that were kept of it are removed.
        """
        id = self._parser.identity(model, asking)
        self._executor.forget_prompts(id)
        for engine in self._registry.engines:
            engine.forget_prompts(id)
        self._broker.post(Expire(id))

    @_identity_keywords
    def pin(self, model: Model, **asking: Unpack[IdentityOptions]) -> None:
        """Keep a model from eviction and from ending by its keep-alive from now on; it need not be loaded yet."""
        self._broker.pin(self._parser.identity(model, asking))

    @_identity_keywords
    def unpin(self, model: Model, **asking: Unpack[IdentityOptions]) -> None:
        """Let a model be evicted, or end by its keep-alive, again."""
        self._broker.unpin(self._parser.identity(model, asking))

    def reserve(self, device: str, size: str | int, *, timeout: str | float | None = None) -> Reservation:
        """Reserve memory for the program itself until the reservation is released, evicting idle runners for it.

        `device` is "cpu" or a GPU's id as `status()` shows it. Blocks until there is room. Raises `DoesNotFit` at once
        where there never can be room, `AcquireTimeout`, `InvalidSettings`, `SchedulerClosed`, `WouldDeadlock` (as
        `acquire` does).
        """
        warn_if_loop_runs("reserve", _ON_A_THREAD.format("reserve"))
        self._broker.check()
        check_text("device", device)
        amount = ((DeviceId(device), parse_bytes(size)),)
        self._executor.refresh(_FRESH_S)
        spec = RequestSpec(ModelId(""), Options(), Purpose.memory, 0, amount)
        timeout_s = None if timeout is None else parse_duration(timeout, name="timeout")
        parsed, holders = ParsedRequest(spec, f"{size} on {device}", None, timeout_s), self._broker.holders
        held = holders.held(this_asker())
        try:
            return self._reserve(parsed, held)
        except WouldDeadlock:
            if holders.are_out_of_reach(held.keeps):
                raise
        return self._reserve(parsed, Held(held.holds))  # a lease may be released elsewhere: the request waits

    def _reserve(self, parsed: ParsedRequest, held: Held) -> Reservation:
        pending = self._broker.new_request(parsed, self)
        reservation = Reservation(self._broker, pending)
        self._broker.submit_and_wait(pending, parsed, held)
        return reservation

    @_request_keywords
    def fit(self, model: Model, **asking: Unpack[AcquireOptions]) -> Fit:
        """Return what would become of a request now: its placement, its victims, and options with which it would fit.

        Takes the arguments of `acquire`. Nothing is loaded, evicted or reserved; a request that follows meets whatever
        has changed meanwhile. The engine need not be installed. The model's file is read, and so are the devices, which
        may take at most 2 s; llama.cpp may be asked about the model, for some seconds at most. Raises `ModelNotFound`,
        `InvalidModel`, `UnsupportedOption`, `InvalidSettings`, `SchedulerClosed`.
        """
        warn_if_loop_runs("fit", _ON_A_THREAD.format("fit"))
        self._broker.check()
        if self._broker.closing:
            raise SchedulerClosed()
        spec, parsed = self._parser.parse(model, asking)
        known = self._executor.load_measurements(identity_of(spec, version_of(self._registry.engine_for(spec), spec)))
        self._executor.refresh(_FRESH_S)
        core, inspect = self._broker.query(Core.copy), partial(self._registry.inspect, spec)
        if isinstance(spec, ModelSpec) and (runner := self._executor.runner_of_other_files(spec)) is not None:
            core.step(self._clock(), FilesReplaced(runner))
        return fit_of(self._clock(), core, parsed, inspect, self._registry.name, known)

    # -- changing its limits ------------------------------------------------------------------------------------------

    @changeable_keywords
    def configure(self, **limits: Unpack[ChangeableArguments]) -> None:
        """Change limits while running: `memory_limit`, `max_queue`, `max_runners`, `max_leases`, `keep_alive`.

        Either all of them change, or none.

        No waiting request is refused, and no lease is revoked. Of the runners that are too many, idle ones are unloaded
        at once, busy ones when they become idle, and pinned ones never. A keep-alive holds for loaded models too,
        except where a request has named one. A new memory limit takes effect when the devices have been read with it,
        within at most 2 s.

        Raises `InvalidSettings` for a value that is not allowed and for a setting that cannot change,
        `SchedulerClosed`.
        """
        self._broker.check()
        if self._broker.closing:
            raise SchedulerClosed()
        with self._configuring:
            before = None
            while before is not self.settings:  # a signal handler has changed it meanwhile: both changes hold
                before = self.settings
                changed = before.changed(**limits)
            self.settings, told = changed, None
            while told is not self.settings:  # or now: the devices and the core are told the last change last
                told = self.settings
                limited = told.memory_limit is not None
                limits_told = told.max_queue, told.max_runners, told.keep_alive, limited, lease_limit(told.max_leases)
                self._broker.post(Configure(*limits_told))
                self._devices.set_memory_limit(told.memory_limit)
        if "memory_limit" in limits:
            self._executor.refresh(_FRESH_S)

    # -- looking at it ------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """Return the runners, the queue and the devices as they are now."""
        snapshot, failures = self._broker.query(lambda core: (core.snapshot(), core.failures()))
        problems = (*self._devices.problems, *self._registry.problems, *map(problem, failures))
        problems = (*problems, *self._executor.problems, *(self._recorder.problems if self._recorder else ()))
        handles, told = dict(self._executor.runner_handles), tuple(map(shown, problems))
        return status_of(snapshot, self._clock(), self._registry.name, handles.get, told)

    def debug_state(self) -> DebugState:
        """Return the inner state, for tests and for reports of bugs; works after a close, and after a bug, too.

        Raises `SchedulerForked` in a fork.
        """

        def look(core: Core) -> tuple[Snapshot, int, int, tuple[ModelId, ...]]:
            return core.snapshot(), core.steps, core.late, core.checkpoint().models()

        snapshot, step, late, models = self._broker.query(look)
        return DebugState(
            snapshot=snapshot,
            step=step,
            late_events=late,
            models=frozenset(models),
            named_models=self._registry.known(),
            requests=frozenset(self._broker.requests),
            locked=self._executor.locked,
            listening=self._hub.listening,
            to_record=self._recorder.waiting if self._recorder is not None else 0,
            read_ahead_bytes=self._executor.read_ahead_bytes,
            ended=self._broker.finished.is_set(),
            error=self._driver.broken,
        )

    def name(self, model: ModelId) -> str:
        """Return the name of a model whose identity an event has.

        Of models that could not be found or read, and of objects that do not exist any more, the last thousand names
        are kept; after that the identity is returned.
        """
        return self._registry.name(model)

    def model(self, model: ModelId) -> ModelSpec | PythonModel | EngineModel:
        """Return the model whose identity an event has; raises `ModelNotFound` where the scheduler has forgotten it."""
        try:
            return self._registry.engine_of(model)[1]
        except KeyError:
            raise ModelNotFound(self.name(model)) from None

    def events(self) -> EventStream:
        """Return an iterator over every transition and decision from now on, with its reason.

        The iterator blocks for the next entry and ends when the scheduler has closed. A reader that falls more than
        `event_buffer` entries behind finds a `Gap` in place of the oldest entries.
        """

        def listen(core: Core) -> EventStream:
            if core.decision_log is None:
                core.decision_log = []
            return self._hub.open()

        return self._broker.query(listen)

    # -- its end ------------------------------------------------------------------------------------------------------

    def close(self, timeout: str | float | None = None) -> None:
        """Refuse new requests, answer the queued ones, let leases finish for `timeout`, then stop every runner.

        `timeout` defaults to the setting `close_timeout`; leases that last longer are revoked. A close that waits for
        leases names their models in a warning. Returns soon after the timeout in every case; an object whose `unload`
        hangs is named in a warning. A second call is harmless.
        """
        warn_if_loop_runs("close", _AWAIT_CLOSE)
        self._close(timeout)

    async def aclose(self, timeout: str | float | None = None) -> None:
        """Like `close`; the tasks of the event loop go on meanwhile, and may release their leases.

        The close goes on where the task is cancelled that awaits it.
        """
        loop = asyncio.get_running_loop()
        closed: asyncio.Future[None] = loop.create_future()

        def close() -> None:
            error: BaseException | None = None
            try:
                self._close(timeout)
            except BaseException as raised:
                error = raised
            settle_in_loop(loop, closed, None, error, lambda: None)

        # of its own: the threads of the loop's executor may all wait for the scheduler
        threading.Thread(target=close, name="loadmaster-closer", daemon=True).start()
        await closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(_AT_ONCE_S if kind is not None else None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose(_AT_ONCE_S if kind is not None else None)

    def __del__(self) -> None:
        broker = getattr(self, "_broker", None)
        if broker is None or broker.closing or broker.forked:
            return
        _open_schedulers.add(self)  # again: the garbage collector may have taken it out
        # on another thread: a finaliser may run anywhere, in a step of the core too; no lease and no request is left
        self._executor.deliver(lambda: self._close(_AT_ONCE_S))
        warnings.warn("a scheduler was never closed", ResourceWarning, stacklevel=2, source=self)

    def _close(self, timeout: str | float | None) -> None:
        if self._broker.forked or self._ending == threading.get_ident():  # the latter: called in a signal handler
            return
        timeout_s = self.settings.close_timeout if timeout is None else parse_duration(timeout, name="timeout")
        self._broker.closing = True
        self._driver.post(Close(timeout_s))
        self._executor.end_saving()
        try:
            if self._driver.broken is None:
                self._await_the_end(timeout_s)
        finally:  # after Ctrl-C too
            with self._close_lock:
                self._ending = threading.get_ident()
                try:
                    self._end()
                finally:
                    self._ending = None

    def _await_the_end(self, timeout_s: float) -> None:
        """Wait until every runner is unloaded: as long as leases may last, and then as long as a stop may take."""
        stop_s = self.settings.stop_grace + _LAST_WORDS_S
        now = time.monotonic()
        leases_end, end, silent_end = now + timeout_s, now + stop_s, now + _SILENT_S
        while not self._broker.finished.is_set() and (now := time.monotonic()) < end:
            if self._broker.requests and now < leases_end:
                end = now + stop_s
                if now >= silent_end and (held := self._broker.held()):
                    left = format_duration(leases_end - now)
                    log.warning("the close waits up to %s more for the release of %s", left, ", ".join(held))
                    silent_end = math.inf
            self._broker.finished.wait(min(end - now, _CLOSE_LOOK_S))

    def _end(self) -> None:
        """Stop what is left: processes first, then threads, and then refuse the requests that still wait.

        Each step is taken, whatever the step before raised. An exception that is no mere failure, Ctrl-C for example,
        is raised after the last step. The next call, if need be at the interpreter's exit, ends what this call has not
        ended.
        """
        end, hung = time.monotonic() + _LAST_WORDS_S, list[str]()
        raised: BaseException | None = None
        try:
            for step in self._last_steps(hung):
                try:
                    step(max(0.1, end - time.monotonic()))
                except Exception:
                    log.exception("a step of the close failed")
                except BaseException as error:
                    raised = error
        finally:
            self._dismiss()  # again, as Ctrl-C may have come between two steps
        if raised is not None:
            raise raised
        if self in _open_schedulers:
            log.info("the scheduler is closed")
        _open_schedulers.discard(self)

    def _last_steps(self, hung: list[str]) -> Iterator[Callable[[float], object]]:
        """Yield what is to be stopped, each with its time limit in seconds.

        What hangs is added to `hung` and to a warning.
        """
        yield self._prober.close
        for engine in self._registry.end():
            yield engine.close
        yield lambda timeout_s: hung.extend(self._executor.close(timeout_s))
        yield self._driver.stop
        yield lambda timeout_s: hung.extend(self._event_log.close(timeout_s))
        if (recorder := self._recorder) is not None:
            yield lambda timeout_s: None if recorder.close(timeout_s) else hung.append("the recorder")
        yield lambda _: self._tell(hung)
        yield lambda _: self._dismiss()
        yield lambda _: self._devices.close()

    def _dismiss(self) -> None:
        """Refuse the requests that still wait, and end the event streams."""
        self._broker.answer_all(SchedulerClosed)
        self._hub.close()

    def _tell(self, hung: list[str]) -> None:
        stuck = [
            self._registry.name(handle.model) for handle in self._executor.runner_handles.values() if not handle.over
        ]
        if hung or stuck:
            log.warning("closed, but these did not end: %s", ", ".join([*stuck, *hung]))


def limits_of(settings: Settings) -> CoreConfig:
    """Return the core's configuration under these settings."""
    return CoreConfig(
        max_queue=settings.max_queue,
        max_runners=settings.max_runners,
        max_leases=lease_limit(settings.max_leases) or 0,
        keep_alive_s=settings.keep_alive,
        max_wait_s=settings.max_wait,
        min_residency_s=settings.min_residency,
        load_timeout_s=settings.load_timeout,
        stop_timeout_s=max(CoreConfig().stop_timeout_s, settings.stop_grace + _KILL_S),
        recovery_timeout_s=settings.recovery_timeout,
        max_loads_per_gpu=settings.max_loads_per_gpu,
        max_host_loads=settings.max_host_loads,
        prefetches=_PREFETCHES if settings.prefetch else 0,
        memory_limited=settings.memory_limit is not None,
        claims=settings.lock_folder is not None,
        cpu_threads=settings.cpu_threads or 0,
        persists_measurements=settings.measurement_file is not None,
        keeps_prompts=settings.keep_prompts is not None,
        spread_over_gpus=settings.spread_over_gpus,
        require_gpu=settings.require_gpu,
    )


_open_schedulers: WeakSet[Scheduler] = WeakSet()


def _close_all() -> None:
    for scheduler in list(_open_schedulers):
        scheduler._close(_AT_ONCE_S)


def _disown() -> None:
    for scheduler in list(_open_schedulers):
        scheduler._broker.forked = True


@cache
def _close_at_exit() -> None:
    """Have every scheduler closed when the main thread ends, before the interpreter joins the program's threads.

    `atexit` comes too late for threads that wait for a grant or an event: they are joined first, and would be waited
    for without end. `concurrent.futures` closes its pools by `threading._register_atexit`, which is there since Python
    3.9 and has no public name. It calls the last registered function first, so importing
    `concurrent.futures.thread` before this has the schedulers closed before that joins its workers, who may wait for
    them. `atexit` is for a Python without that function, and for a scheduler that is made later still.
    """
    import concurrent.futures.thread  # noqa: F401

    with suppress(AttributeError, RuntimeError):  # the latter: the interpreter is ending already
        threading._register_atexit(_close_all)  # type: ignore[attr-defined]  # it has no public name
    atexit.register(_close_all)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown)
