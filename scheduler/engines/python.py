"""Any Python object as a model: a callable to load it, a callable to unload it, and its declared bytes."""

from __future__ import annotations

import functools
import logging
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal

from fsm.domain.devices import DeviceId
from fsm.domain.options import Options
from fsm.machine.request import ModelId
from fsm.sizing.footprint import Footprint
from fsm.sizing.model_profile import EngineSettings
from scheduler.concurrency.latch import Latch
from scheduler.config.settings import parse_bytes
from scheduler.engines.interface import Buffer, Engine, Memory
from scheduler.errors.exceptions import InvalidSettings
from scheduler.models.model_spec import check_limit, check_name, check_switch

if TYPE_CHECKING:
    from fsm.domain.devices import Placement
    from scheduler.engines.interface import Process, RunnerListener
    from scheduler.engines.object_process import ObjectEngine

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # type checkers know it; only its default needs it

    Value = TypeVar("Value", default=Any)
else:
    from typing import TypeVar

    Value = TypeVar("Value")

log = logging.getLogger("loadmaster")

CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class PythonModel(Generic[Value]):
    """An object that is loaded on demand and shared by lease, in this process; its name is its identity.

    Every lease on it has the same object, and several threads may use it at once. An object that is not made for that
    is given `max_leases=1`: the next lease is granted when the one before it is released.

    The same name with another `load` is another model from then on.

    `load` and `unload` run on one thread of the object's own and may take as long as they need. Without `unload` the
    object is dropped. Raises `InvalidSettings` for bytes that cannot be read, and for arguments of a wrong type.
    """

    takes_options: ClassVar[bool] = False

    name: str
    load: Callable[[], Value]
    unload: Callable[[Value], object] | None = None
    memory: Mapping[str, str | int] = field(default_factory=dict)  # bytes by device: {"cpu": "200MiB"}
    keep_alive: str | float | None = None
    pin: bool = False  # never evicted for other models
    priority: int = 0  # a request group of higher priority goes first
    max_leases: int | Literal["slots"] | None = None  # at once; 0: no limit; None: the setting
    process: bool = False  # whether it lives in a process of its own, which `load` and `unload` are pickled for
    # numbers the objects that have had this name with another `load`; set by the scheduler
    life: int = field(default=1, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        check_switch("pin", self.pin)
        check_limit("max_leases", self.max_leases)
        for name, call in (("load", self.load), ("unload", self.unload)):
            if not callable(call) and (name, call) != ("unload", None):
                raise InvalidSettings(name, call, "callable")
        check_switch("process", self.process)
        if self.process:
            _check_pickles(self)
        if not isinstance(self.memory, Mapping) or not all(isinstance(device, str) for device in self.memory):
            raise InvalidSettings("memory", self.memory, 'sizes by device, like {"cpu": "200MiB"}')
        parsed = {device: parse_bytes(size, name=f"memory[{device!r}]") for device, size in self.memory.items()}
        object.__setattr__(self, "memory", parsed)

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def id(self) -> ModelId:
        """The model's identity."""
        return ModelId(f"python:{self.name}" if self.life == 1 else f"python@{self.life}:{self.name}")

    @property
    def calls(self) -> tuple[Callable[..., object], ...]:
        """The functions that load and unload it, without the arguments that are bound to them."""
        found: list[Callable[..., object]] = []
        call: Any
        for call in filter(None, (self.load, self.unload)):
            while isinstance(call, functools.partial):
                call = call.func
            found.append(call)
        return tuple(found)

    @property
    def declared(self) -> tuple[tuple[DeviceId, int], ...]:
        """The bytes that the object is declared to take, by device."""
        return tuple((DeviceId(device), parse_bytes(size)) for device, size in sorted(self.memory.items()))


class PythonProcess:
    """The handle of one object, from the start of its load until its unload has returned.

    `load` and `unload` run on one thread, which waits in between, since some objects may only be touched by the thread
    that made them. The thread is a daemon: a `load` or `unload` that hangs must not hang the interpreter's exit.
    """

    pid: int | None = None  # the object lives in this process
    buffers: tuple[Buffer, ...] = ()

    def __init__(self, model: PythonModel, report: RunnerListener, on_end: Callable[[PythonProcess], None]) -> None:
        self.model = model
        self._report = report
        self._on_end = on_end
        self._owner = os.getpid()
        self._stop = Latch()
        self._loaded = False  # load has returned, unload has not
        self._thread = threading.Thread(target=self._live, name=f"loadmaster-object-{model.name}", daemon=True)

    def begin(self) -> None:
        """Start the load; raises RuntimeError if the system allows no more threads."""
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end of the thread.

        Return whether it came in time. The thread itself, which may close too, does not wait.
        """
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stop(self, grace_s: float) -> None:
        """Have the object unloaded, once its load has returned; a load cannot be ended by force after `grace_s`."""
        if os.getpid() == self._owner:  # a fork has a copy of the object, but not the thread
            self._stop.set()

    def memory(self) -> Memory:
        """Return the declared bytes from the end of the load to the end of the unload."""
        return Memory(dict(self.model.declared) if self._loaded else {})

    def context_filled(self, timeout_s: float) -> None:
        """Return None: an object never takes more than its declared bytes, as far as its engine can tell."""

    def healthy(self, timeout_s: float) -> bool:
        """Return True: an object cannot be probed."""
        return True

    def _live(self) -> None:
        try:
            code, detail, out_of_memory = self._load_and_unload()
            self._loaded = False
            self._report.exited(code, detail, out_of_memory)
        finally:
            self._on_end(self)

    def _load_and_unload(self) -> tuple[int, str, bool]:
        """Load and unload the object.

        Return the status, a description, and whether memory ran out. The object is dropped then.
        """
        try:
            value = self.model.load()
        except BaseException as error:  # also what would end a program: here it only ends the load
            log.debug("load() of %r failed", self.model.name, exc_info=True)
            trace = error.__traceback__.tb_next if error.__traceback__ is not None else None  # the user's part of it
            traceback.clear_frames(trace)  # else what was loaded so far would stay in memory
            self._report.failed(error.with_traceback(trace))
            return 1, f"load() raised {_in_words(error)}", _is_out_of_memory(error)
        self._loaded = True
        if not self._stop.is_set():
            self._report.loaded(value, None, self.memory())
        self._stop.wait()
        try:
            if self.model.unload is not None:
                self.model.unload(value)
        except BaseException as error:
            log.warning("unload() of %r failed", self.model.name, exc_info=True)
            return 1, f"unload() raised {_in_words(error)}", False
        return 0, "unloaded", False


class PythonEngine(Engine):
    """Runs `PythonModel`s; each object has a daemon thread of its own, so that one object may hang."""

    def __init__(self, *, log_file: Path | None = None) -> None:
        self._log_file = log_file  # of what objects in processes of their own write
        self._elsewhere: ObjectEngine | None = None  # runs these; made for the first of them
        self._lock = threading.Lock()  # guards `_processes`, `_elsewhere` and `_closed`
        self._processes: set[PythonProcess] = set()  # the objects whose threads run
        self._closed = False

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the log of objects in processes of their own is not kept."""
        engine_log = self._elsewhere.log if self._elsewhere is not None else None
        return (engine_log.problem,) if engine_log is not None and engine_log.problem else ()

    def inspect(self, model: PythonModel, asked: Sequence[Options]) -> Footprint:
        """Return the bytes that were declared."""
        return Footprint(fixed=model.declared)

    def launch(
        self,
        model: PythonModel,
        options: Options,
        settings: EngineSettings,
        placement: Placement,
        report: RunnerListener,
    ) -> Process:
        """Start to load an object.

        Options, settings and placement change nothing. Raises RuntimeError once the engine is closed.
        """
        if model.process:
            return self._of_processes().launch(model, report)
        process = PythonProcess(model, report, self._forget)
        with self._lock:
            if self._closed:
                raise RuntimeError("closed: no more objects are loaded")
            self._processes.add(process)
        try:
            process.begin()
        except RuntimeError:  # no thread could be started
            self._forget(process)
            raise
        return process

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Unload every object; a load or unload that does not return within `timeout_s` seconds is left running."""
        with self._lock:
            self._closed = True
            elsewhere = self._elsewhere
            left = sorted(self._processes, key=lambda process: process.model.name)
        for process in left:
            process.stop(0.0)
        end = time.monotonic() + timeout_s
        for process in left:
            if not process.join(max(0.0, end - time.monotonic())):
                log.warning("load() or unload() of %r did not return in time", process.model.name)
        if elsewhere is not None:
            elsewhere.close(timeout_s)

    def _of_processes(self) -> ObjectEngine:
        from scheduler.engines.object_process import ObjectEngine  # most programs have no such objects

        with self._lock:
            if self._closed:
                raise RuntimeError("closed: no more objects are loaded")
            if self._elsewhere is None:
                self._elsewhere = ObjectEngine(self._log_file)
            return self._elsewhere

    def _forget(self, process: PythonProcess) -> None:
        with self._lock:
            self._processes.discard(process)


def _check_pickles(model: PythonModel) -> None:
    """Raise `InvalidSettings` where a process of its own could not find what loads and unloads an object."""
    allowed = (
        "a function of a module, or a functools.partial of one, for an object in a process of its own: "
        "no lambda, and no function that is defined inside another"
    )
    for name, call in (("load", model.load), ("unload", model.unload)):
        try:
            pickle.dumps(call)
        except Exception as error:  # whatever an argument raises that is bound to it
            raise InvalidSettings(name, call, f"{allowed} ({error})") from None
    main = sys.modules["__main__"]
    of_main = any(getattr(call, "__module__", None) == "__main__" for call in model.calls)
    if of_main and main.__spec__ is None and not os.path.isfile(str(getattr(main, "__file__", None))):
        raise InvalidSettings("load", model.load, f"{allowed}, and in a file: not in a notebook or a console")


def _in_words(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: Python's own error, or an error with the name that torch and others use."""
    return isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
