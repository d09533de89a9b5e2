"""What a scheduler finds around itself: time, devices, engines, names of models and threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fsm.core import Core
from fsm.domain.options import Options
from fsm.messages.commands import Command
from fsm.messages.decision_log import Entry
from fsm.messages.events import Event
from scheduler.concurrency.clock import Clock, monotonic_clock
from scheduler.concurrency.thread_pool import ThreadPool
from scheduler.config.settings import Settings
from scheduler.devices.device_reader import DeviceReader
from scheduler.devices.gpus import Gpu
from scheduler.engines.command_model import CommandModel
from scheduler.engines.engine_model import EngineModel
from scheduler.engines.interface import Engine
from scheduler.engines.llama import LlamaEngine
from scheduler.engines.prompt_store import PromptStore
from scheduler.engines.python import PythonEngine
from scheduler.engines.registered import factory_of
from scheduler.errors.exceptions import EngineUnusable, SchedulerError
from scheduler.models.catalog import Resolver
from scheduler.models.model_spec import ModelSpec
from scheduler.models.sources import default_resolvers
from scheduler.runtime.driver import Driver


def llama_engine(
    settings: Settings,
    gpus: Callable[[], Sequence[Gpu]] = tuple,
    prompts: PromptStore | None = None,
    *,
    prestart: bool = False,
) -> LlamaEngine:
    """Return the engine of model files, with the settings for the options that requests leave open.

    Where there are `gpus`, the engine is asked which it can use. Where there are `prompts`, they keep those of runners.
    """
    if settings.llama_server is not None:
        return server_engine(settings, settings.llama_server, gpus, lists=True)
    return LlamaEngine(
        _defaults(settings),
        larger_contexts=settings.auto_context_from_vram,
        gpus=gpus,
        log_file=settings.engine_log,
        prompts=prompts,
        prestart=prestart,
    )


def server_engine(
    settings: Settings, path: Path, gpus: Callable[[], Sequence[Gpu]] = tuple, *, lists: bool = False
) -> LlamaEngine:
    """Return the engine of model files that a `llama-server` serves; where it `lists`, the GPUs have its names."""
    from scheduler.engines.llama_server import LlamaServerEngine  # most programs have the wheel serve them

    return LlamaServerEngine(
        path,
        _defaults(settings),
        larger_contexts=settings.auto_context_from_vram,
        gpus=gpus,
        lists=lists,
        log_file=settings.engine_log,
        keeps_prompts=settings.keep_prompts is not None,
    )


def other_engine(settings: Settings, model: EngineModel) -> Engine:
    """Return the engine of another package that a model names; raises `EngineMissing`."""
    try:
        return factory_of(model.engine)(settings)
    except SchedulerError:
        raise
    except Exception as error:  # whatever the package raises
        raise EngineUnusable(model.engine, f"it cannot be made: {type(error).__name__}: {error}") from error


def _defaults(settings: Settings) -> Options:
    return Options(
        num_ctx=settings.num_ctx,
        num_batch=settings.num_batch,
        num_parallel=settings.num_parallel,
        flash_attention=settings.flash_attention,
        cache_type_k=settings.cache_type,
        cache_type_v=settings.cache_type,
    )


def device_reader(settings: Settings, *, gpus: bool = True) -> DeviceReader:
    """Return the reader of the host and of its GPUs, unless these are left out, with the limits of settings."""
    return DeviceReader(
        memory_limit_bytes=settings.memory_limit,
        gpus=settings.gpus and gpus,
        integrated_gpus=settings.integrated_gpus,
        gpu_reserve_bytes=settings.gpu_reserve,
        gpu_limit_bytes=settings.gpu_limit,
    )


class Environment:
    """The machine as it is. `scheduler.testing` replaces every part of it."""

    plans_later = True  # the driver's thread plans, once for all events that came meanwhile

    def __init__(self) -> None:
        self.clock: Clock = monotonic_clock
        self._devices: DeviceReader | None = None

    def devices(self, settings: Settings) -> DeviceReader:
        """Return the reader of the host and of its GPUs."""
        self._devices = device_reader(settings)
        return self._devices

    def engines(self, settings: Settings) -> tuple[Engine, Engine]:
        """Return the engine of model files and the engine of Python objects."""
        kept = settings.keep_prompts if settings.llama_server is None else None
        prompts = None if kept is None else PromptStore(kept.path, kept.limit_bytes)
        llama = llama_engine(settings, self._gpus, prompts, prestart=settings.prestart)
        if self._devices is not None:
            self._devices.count_as_free(llama.spare_bytes)
            if llama.gpu_list is not None:
                self._devices.list_by(llama.gpu_list)
        return llama, PythonEngine(log_file=settings.engine_log)

    def engine_of(self, settings: Settings, model: ModelSpec | EngineModel) -> Engine:
        """Return the engine that a model names: a `llama-server` by its path, or another engine by its name."""
        if isinstance(model, CommandModel):
            from scheduler.engines.command import CommandEngine  # most programs have no such models

            return CommandEngine(log_file=settings.engine_log)
        if isinstance(model, ModelSpec):
            return server_engine(settings, Path(model.llama_server), self._gpus)
        return other_engine(settings, model)

    def _gpus(self) -> Sequence[Gpu]:
        return self._devices.gpus() if self._devices is not None else ()

    def resolvers(self, settings: Settings) -> Sequence[Resolver]:
        """Return the places where models are found by name."""
        return default_resolvers(settings.models)

    def thread_pool(self, name: str, limit: int) -> ThreadPool:
        """Return the threads that carry out commands of one kind, `limit` of them at most."""
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
        """Return the driver of a core, which keeps this environment's time."""
        return Driver(core, self.clock, perform, publish, fail, stood_still, step)
