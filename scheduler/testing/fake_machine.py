"""A scheduler for tests: the real one, with declared models and devices, on virtual time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Self, Unpack

from fsm.core import Core
from fsm.domain.devices import HOST, DeviceId
from fsm.messages.commands import Command
from fsm.messages.decision_log import Entry
from fsm.messages.events import Event
from scheduler.api.environment import Environment
from scheduler.api.scheduler import Scheduler
from scheduler.concurrency.thread_pool import ThreadPool
from scheduler.config.quantities import parse_bytes, parse_duration
from scheduler.config.settings import Settings, SettingsArguments, settings_keywords
from scheduler.devices.device_reader import DeviceReader
from scheduler.engines.engine_model import EngineModel
from scheduler.engines.interface import Engine
from scheduler.errors.exceptions import InvalidSettings
from scheduler.models.catalog import Resolver
from scheduler.models.model_spec import ModelSpec
from scheduler.runtime.driver import Driver
from scheduler.runtime.request_broker import RequestBroker
from scheduler.testing.fake_engine import Answer, Failure, FakeDevices, FakeEngine, FakeModel, FakeProcess, FakeResolver
from scheduler.testing.virtual_time import InlinePool, VirtualDriver, VirtualPool, VirtualTime

Size = str | int | Mapping[str, str | int]  # of the host, or by device: {"cpu": "1GiB", "gpu0": "8GiB"}


class FakeMachine:
    """A machine with memory and models as declared, and `scheduler`, a real `Scheduler` on it.

    No process, file, GPU or socket is used. Time is virtual: while a request waits for its answer, time moves by itself
    to whatever happens next; otherwise it stands still until `advance`. With `auto_advance=False` it moves by `advance`
    alone. `settings` are those of `Settings`. Close it, or use it in a `with` block.
    """

    @settings_keywords
    def __init__(
        self, memory: Size = "8GiB", *, auto_advance: bool = True, **settings: Unpack[SettingsArguments]
    ) -> None:
        self._time = VirtualTime()
        self._engine = FakeEngine(self._time)
        alone: SettingsArguments = {"lock_folder": None, "measurement_file": None, "prefetch": False}
        environment = _FakeEnvironment(self._time, self._engine, dict(_amounts(memory)))
        self.scheduler = Scheduler(Settings(**(alone | settings)), _environment=environment)
        self._time.start(self.scheduler._driver, partial(_waits, self.scheduler._broker, auto_advance))

    # -- what there is, and what fails --------------------------------------------------------------------------------

    def model(
        self,
        name: str,
        *,
        size: Size = 0,
        load: str | float = 0.0,
        answer: Answer = "",
        vector: Sequence[float] = (1.0, 0.0),
    ) -> Self:
        """Declare a model: what it takes once it is loaded, how long a load takes, what it says to every chat.

        It is found by its name, and under any path whose last part is the name, with or without `.gguf`. Declared once
        more, it is another from its next load on; its size stays what it was when it was asked for first.
        """
        load_s = parse_duration(load, name="load")
        self._engine.models[name] = FakeModel(name, _amounts(size), load_s, answer, tuple(vector))
        return self

    def fail_load(
        self, name: str, reason: str = "ordered by the test", *, out_of_memory: bool = False, times: int = 1
    ) -> None:
        """Have the next loads of a model fail, each at the end of its load time; raises `LookupError` if undeclared."""
        if name not in self._engine.models:
            raise LookupError(f"no model {name} was declared")
        self._engine.models[name].failures.extend([Failure(reason, out_of_memory)] * times)

    def crash(self, name: str, reason: str = "ordered by the test", *, out_of_memory: bool = False) -> None:
        """Have the runners of a model die now, loading or loaded; raises `LookupError` if there are none."""
        hit: list[FakeProcess] = []

        def die() -> None:
            hit.extend(process for process in self._engine.processes if process.model.name == name)
            for process in hit:
                process.end(1, reason, out_of_memory)

        self._time.settle(die)
        if not hit:
            raise LookupError(f"no runner of {name} is there")

    # -- time ---------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Seconds since the machine was made."""
        return self._time.now

    def advance(self, duration: str | float) -> None:
        """Let time pass, with everything that happens meanwhile; returns when the scheduler has nothing left to do.

        Raises `InvalidSettings` for a duration that is endless.
        """
        duration_s = parse_duration(duration)
        if duration_s == math.inf:
            raise InvalidSettings("duration", duration, "a duration that ends")
        self._time.advance(duration_s)

    # -- what has happened --------------------------------------------------------------------------------------------

    @property
    def loads(self) -> list[str]:
        """The names of the models whose load has begun, in order, from the beginning on."""
        self._time.settle()
        return list(self._engine.loads)

    @property
    def loading(self) -> list[str]:
        """The names of the models that are being loaded, in the order of their launch."""
        self._time.settle()
        return [process.model.name for process in list(self._engine.processes) if not process.loaded]

    @property
    def running(self) -> list[str]:
        """The names of the models that are loaded, in the order of their launch."""
        self._time.settle()
        return [process.model.name for process in list(self._engine.processes) if process.loaded]

    # -- its end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the scheduler; a lease that is still held is broken without a wait. Twice is harmless."""
        self.scheduler._close(None)  # on an event loop too: nothing is waited for but virtual time

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _waits(broker: RequestBroker, auto_advance: bool) -> bool:
    """Tell whether a request, or the close, waits for what only time can bring."""
    if broker.closing:
        return not broker.finished.is_set()
    return auto_advance and any(not pending.answered for pending in list(broker.requests.values()))


class _FakeEnvironment(Environment):
    """The parts of a fake machine, where a scheduler looks for them."""

    plans_later = False  # what a test sees must not depend on when a thread comes to plan

    def __init__(self, time: VirtualTime, engine: FakeEngine, capacities: Mapping[DeviceId, int]) -> None:
        super().__init__()
        self._time = time
        self._engine = engine
        self._capacities = capacities
        self.clock = lambda: time.now

    def devices(self, settings: Settings) -> DeviceReader:
        return FakeDevices(self._capacities, settings.memory_limit, self._engine)

    def engines(self, settings: Settings) -> tuple[Engine, Engine]:
        return self._engine, self._engine

    def engine_of(self, settings: Settings, model: ModelSpec | EngineModel) -> Engine:
        return self._engine if isinstance(model, ModelSpec) else super().engine_of(settings, model)

    def resolvers(self, settings: Settings) -> Sequence[Resolver]:
        return (FakeResolver(self._engine.models),)

    def thread_pool(self, name: str, limit: int) -> ThreadPool:
        match name:
            case (
                "loadmaster-worker"
                | "loadmaster-launcher"
                | "loadmaster-inspector"
                | "loadmaster-stopper"
                | "loadmaster-log"
            ):
                return VirtualPool(self._time)
            case "loadmaster-sampler":
                return InlinePool()
            case _:
                return ThreadPool(name, limit)

    def driver(
        self,
        core: Core,
        perform: Callable[[Command], None],
        publish: Callable[[Sequence[Entry]], bool],
        fail: Callable[[BaseException], None],
        stood_still: Callable[[], None],
        step: Callable[[float, Event], Sequence[Command]] | None,
    ) -> Driver:
        return VirtualDriver(self._time, core, perform, publish, fail, step)


def _amounts(size: Size) -> tuple[tuple[DeviceId, int], ...]:
    sizes = size if isinstance(size, Mapping) else {HOST: size}
    return tuple((DeviceId(device), parse_bytes(amount)) for device, amount in sorted(sizes.items()))
