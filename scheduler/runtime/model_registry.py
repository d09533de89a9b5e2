"""The models that are requested or that the core knows, by their identities, with their engines and names."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from fsm.domain.options import Options
from fsm.machine.request import ModelId
from fsm.sizing.footprint import Footprint
from fsm.sizing.model_profile import ModelProfile
from scheduler.engines.engine_model import EngineModel
from scheduler.engines.interface import Engine, inspect
from scheduler.engines.python import PythonModel
from scheduler.models.model_spec import ModelSpec

AnyModel = ModelSpec | PythonModel | EngineModel
_PAST_NAMES = 1024  # names kept of forgotten models: events and recordings are read and written somewhat later


class ModelRegistry:
    """Every model that is requested or that the core knows, with the engine that runs it."""

    def __init__(self, llama: Engine, python: Engine, make: Callable[[ModelSpec | EngineModel], Engine]) -> None:
        self._engines: Mapping[type, Engine] = {ModelSpec: llama, PythonModel: python}
        self._make = make  # makes the engine that a model names itself
        self._named: dict[tuple[str, str], Engine] = {}  # by kind and name; made when they are first needed
        self._making = threading.Lock()
        self._closed = False  # no more are made
        self._models: dict[ModelId, AnyModel] = {}
        self.pinned_by_name: set[ModelId] = set()  # by calls, not by their own declaration
        self._past: dict[ModelId, str] = {}  # names of the models that were forgotten last

    def name(self, id: ModelId) -> str:
        """Return the name to show for an identity: the last known name, or the identity itself."""
        model = self._models.get(id)
        return model.name if model is not None else self._past.get(id, id) or "the program's own memory"

    @property
    def problems(self) -> tuple[str, ...]:
        """What the engines could not find out of models, in sentences."""
        return tuple(problem for engine in self.engines for problem in engine.problems)

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Every engine that there is so far."""
        return (*dict.fromkeys((*self._engines.values(), *list(self._named.values()))),)

    def end(self) -> tuple[Engine, ...]:
        """Make no more engines, and return those that there are."""
        with self._making:
            self._closed = True
        return self.engines

    def engine_for(self, model: AnyModel) -> Engine:
        """Return the engine of a model, made if it is the first that names it.

        Raises `EngineMissing` where there is none, and RuntimeError where the scheduler closes.
        """
        if isinstance(model, EngineModel):
            key = "engine", model.engine
        elif isinstance(model, ModelSpec) and model.llama_server:
            key = "llama-server", model.llama_server
        else:
            return self._engines[type(model)]
        if (engine := self._named.get(key)) is None:
            with self._making:
                if (engine := self._named.get(key)) is None:
                    if self._closed:
                        raise RuntimeError("closed: no more engines are made")
                    engine = self._named[key] = self._make(model)
        return engine

    def register(self, id: ModelId, model: AnyModel) -> None:
        """Add a model of this identity to the registry, until it is unregistered."""
        self._models[id] = model

    def unregister(self, id: ModelId) -> AnyModel | None:
        """Remove a model, but keep its name for a while; return the model, or None where it was not registered.

        Two threads must not call this at the same time.
        """
        if (model := self._models.get(id)) is not None:
            self._past[id] = model.name
        if len(self._past) > _PAST_NAMES:
            del self._past[next(iter(self._past))]
        return self._models.pop(id, None)

    def known(self) -> frozenset[ModelId]:
        """Return every model that is registered."""
        return frozenset(self._models)

    def objects(self) -> list[ModelId]:
        """Return every Python object that is registered."""
        return [id for id, model in self._models.copy().items() if isinstance(model, PythonModel)]

    def engine_of(self, id: ModelId) -> tuple[Engine, AnyModel]:
        """Return the engine of a model, and the model as its engine takes it; raises KeyError for an unknown model."""
        model = self._models[id]
        return self.engine_for(model), model

    def require(self, model: AnyModel) -> None:
        """Raise `EngineMissing` if what the engine of a model needs is not installed."""
        self.engine_for(model).require()

    def inspect(self, model: AnyModel, asked: Sequence[Options]) -> ModelProfile | Footprint:
        """Return what a model is, and how it would be loaded for the options `asked`.

        Raises `ModelNotFound` or `InvalidModel`.
        """
        return inspect(self.engine_for(model), model, asked)
