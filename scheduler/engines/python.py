"""Any Python object as a model: an embedder, a reranker, a torch model share the ledger with the rest."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fsm.estimate import DeviceId, Footprint
from fsm.request import ModelId
from scheduler.settings import parse_bytes

if TYPE_CHECKING:
    from fsm.estimate import Options
    from fsm.ledger import Placement
    from scheduler.engines import Report

log = logging.getLogger("loadmaster")

_OUT_OF_MEMORY = frozenset({"MemoryError", "OutOfMemoryError"})  # the second is torch's


@dataclass(frozen=True, slots=True)
class PythonModel:
    """An object that `load` makes and `unload` ends, with the memory it takes, declared by device.

    Both run on threads of their own. Its lease gives the object as `value`.
    """

    name: str
    load: Callable[[], object]
    unload: Callable[[Any], object] | None = None  # None: it is enough to forget the object
    memory: Mapping[str, str | int] = field(default_factory=dict)  # {"cpu": "200MiB"}
    keep_alive: str | float | None = None
    pin: bool = False
    priority: int = 0

    def __post_init__(self) -> None:
        for device, size in self.memory.items():
            parse_bytes(size, name=f"memory of {self.name!r} on {device}")

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def id(self) -> ModelId:
        """Its identity: models of one name share one runner."""
        return ModelId(f"python:{self.name}")

    @property
    def declared_bytes(self) -> tuple[tuple[DeviceId, int], ...]:
        """What it takes, by device."""
        return tuple((DeviceId(device), parse_bytes(size)) for device, size in self.memory.items())


class PythonEngine:
    """Runs objects in this process."""

    def inspect(self, model: PythonModel) -> Footprint:
        """Return what was declared."""
        return Footprint(fixed=model.declared_bytes)

    def launch(self, model: PythonModel, options: Options, placement: Placement, report: Report) -> _Object:
        """Begin to load it."""
        return _Object(model, report)

    def close(self) -> None:
        """Nothing to do: an object whose `unload` hangs cannot be ended by force."""


class _Object:
    """One life of an object."""

    pid = None
    _numbers = itertools.count(1)

    def __init__(self, model: PythonModel, report: Report) -> None:
        self._model = model
        self._report = report
        self._lock = threading.Lock()  # guards the two below
        self._loaded = False
        self._stopped = False
        self._value: object = None
        self._run(self._load)

    def stop(self, grace_s: float) -> None:
        """Have it unloaded: now, or when its load has returned, since it holds its memory until then."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            loaded = self._loaded
        if loaded:
            self._run(self._unload)

    def resident(self) -> Mapping[DeviceId, int]:
        """Return what was declared, while it is there."""
        return dict(self._model.declared_bytes) if self._loaded else {}

    def healthy(self, timeout_s: float) -> bool:
        """An object answers when it is called."""
        return True

    def _run(self, job: Callable[[], None]) -> None:
        name = f"loadmaster-{self._model.name}-{next(self._numbers)}"
        threading.Thread(target=job, name=name, daemon=True).start()

    def _load(self) -> None:
        try:
            self._value = self._model.load()
        except BaseException as error:
            self._report.exited(1, f"{type(error).__name__}: {error}", type(error).__name__ in _OUT_OF_MEMORY)
            return
        with self._lock:
            self._loaded = True
            stopped = self._stopped
        if stopped:
            self._unload()
        else:
            self._report.loaded(self._value, None, self.resident())

    def _unload(self) -> None:
        value, self._value = self._value, None
        detail = ""
        try:
            if self._model.unload is not None:
                self._model.unload(value)
        except BaseException as error:
            log.warning("unloading %s failed", self._model.name, exc_info=True)
            detail = f"its unload failed: {type(error).__name__}: {error}"
        self._loaded = False
        self._report.exited(0, detail, False)
