"""From what a caller names to what the core plans: paths and specs become identities, keywords become options."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from fsm.domain.options import SLOTS, Options
from fsm.machine.request import ModelId, Purpose, RequestSpec
from scheduler.concurrency.clock import Clock, monotonic_clock
from scheduler.config.quantities import parse_duration
from scheduler.config.value_parsers import CACHE_TYPES, LARGEST_NUMBER
from scheduler.engines.engine_model import EngineModel
from scheduler.engines.python import PythonModel
from scheduler.errors.exceptions import InvalidModel, InvalidSettings, ModelNotFound, UnsupportedOption
from scheduler.errors.formatting import printable
from scheduler.models.catalog import Catalog, is_like_a_path, is_path
from scheduler.models.model_spec import ChosenAdapters, Files, ModelSpec, chosen_adapters, device_ids
from scheduler.runtime.object_lives import ObjectLives
from scheduler.runtime.past_references import PastReferences, Reference, is_there

log = logging.getLogger("loadmaster")

Model = str | os.PathLike[str] | ModelSpec | PythonModel | EngineModel


class IdentityOptions(TypedDict, total=False):
    """The keywords that are parts of a model's identity, where the model is named by its path or a name."""

    adapters: Files | None  # LoRA files
    projectors: Files | None  # files of a vision model
    embedding: bool | None


class RequestOptions(TypedDict, total=False):
    """The keywords of a request that say how it waits and how its model is loaded."""

    keep_alive: str | float | None  # how long the runner stays loaded without leases; 0: not at all; negative: for ever
    timeout: str | float | None  # how long the request may wait
    priority: int | None  # a request group of higher priority goes first
    adapter: ChosenAdapters | None  # of the model's `named_adapters`, for what the lease asks its runner
    num_ctx: int | None  # context of one slot, tokens
    num_batch: int | None
    num_gpu: int | None  # layers on GPUs; negative: automatic; 0: host only
    main_gpu: int | None
    num_thread: int | None
    num_parallel: int | None  # slots, each with a context of its own
    use_mmap: bool | None
    flash_attention: bool | None
    cache_type_k: str | None  # f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl
    cache_type_v: str | None
    draft_num_predict: int | None  # tokens that are guessed ahead of the model, at most; 0: none
    context_shift: bool | None  # a full context gives up its older half, and the answer goes on
    devices: Sequence[str] | None  # ids of the GPUs that layers may go to
    require_gpu: bool | None  # place the model whole on GPUs, or refuse the request


class AcquireOptions(RequestOptions, IdentityOptions, total=False):
    """The keywords of a request: its waiting, its load-time options, and the parts of its model's identity."""


class ParsedRequest(NamedTuple):
    """A request whose model and keywords have been parsed."""

    spec: RequestSpec
    name: str  # name of the model
    keep_alive_s: float | None
    timeout_s: float | None
    model: ModelSpec | PythonModel | EngineModel | None = None  # None: the request is for memory of the program's own
    max_leases: int | None = None  # of the model's runner; 0: no limit; None: as another request has named it


class _Known(NamedTuple):
    """A request that was parsed before, and until when its model's name and links count as leading where they led."""

    parsed: ParsedRequest
    until: float


MOST_PRIORITY = 10**6  # a step of priority counts as a minute of waiting, so this is two years of it
LASTING_S = 2.0  # after a tag or a link was moved, warm requests may be granted the old model for so long

_TIMING = frozenset({"keep_alive", "timeout", "priority"})
_IDENTITY = ("adapters", "projectors", "embedding")  # keywords that name another model, and do not reload the same one
_NO_OPTIONS = frozenset({*_IDENTITY, *_TIMING, "adapter"})  # keywords that are no load-time options
_KINDS: dict[str, type] = {
    **dict.fromkeys(("num_ctx", "num_batch", "num_thread", "num_parallel", "num_gpu", "main_gpu"), int),
    "draft_num_predict": int,
    **dict.fromkeys(("use_mmap", "flash_attention", "context_shift", "require_gpu"), bool),
    **dict.fromkeys(("cache_type_k", "cache_type_v"), str),
}
_POSITIVE = frozenset({"num_ctx", "num_batch", "num_thread", "num_parallel"})
MOST_DRAFTED = 64  # tokens at once
_KNOWN_QUESTIONS = 4096  # parsed requests that are kept; beyond it all are dropped


class RequestParser:
    """Parses what callers name, and keeps the requests that were parsed last."""

    def __init__(
        self,
        catalog: Catalog,
        require: Callable[[ModelSpec | PythonModel | EngineModel], None],
        pin: Callable[[ModelId], None],
        end: Callable[[ModelId, ModelId], None] = lambda past, id: None,
        in_use: Callable[[], frozenset[ModelId]] = frozenset,
        look_at: Callable[[ModelSpec], None] = lambda model: None,
        clock: Clock = monotonic_clock,
    ) -> None:
        self._catalog = catalog
        self._require = require  # raises `EngineMissing` if what a model's engine needs is not installed
        self._pin = pin  # called once for each spec with `pin`, before its first request
        self._end = end  # called with the identities of a life of an object that is over, and of the one that follows
        self._lives = ObjectLives()
        self._clock = clock
        self._past = PastReferences(in_use)
        self._look_at = look_at  # called for the model of a request whose files may be others than before
        self._told: set[tuple[str, ...]] = set()  # names of models, with what is not applied of them
        self._pinned: set[ModelId] = set()
        self._known: dict[object, _Known] = {}

    def parse_cached(self, model: Model, asking: AcquireOptions, purpose: Purpose = Purpose.lease) -> ParsedRequest:
        """Return the parsed request; raises `UnsupportedOption` or `InvalidSettings` for a keyword that is not valid.

        Raises `ModelNotFound` or `InvalidModel` for a name that leads to no model.
        """
        try:
            key: object = model
            if asking or purpose is not Purpose.lease:  # the key holds the types as well, since 1 and True are equal
                key = (model, purpose, *asking.items(), *map(type, asking.values()))
            if (known := self._known.get(key)) is not None and self._clock() < known.until:
                return known.parsed
        except TypeError:  # a list among the keywords is not hashable
            key = None
        parsed = self._understand(model, asking, purpose)
        if key is not None and _lasts(model):
            if len(self._known) >= _KNOWN_QUESTIONS:
                self._known.clear()
            until = math.inf if isinstance(model, PythonModel) else self._clock() + LASTING_S
            self._known[key] = _Known(parsed, until)
        return parsed

    def identity(self, model: Model, asking: IdentityOptions) -> ModelId:
        """Return the identity of the model that a caller names; raises `UnsupportedOption` for other keywords."""
        for name, value in asking.items():
            if name not in _IDENTITY:
                raise UnsupportedOption(name, value, f"it is no part of a model's identity; {', '.join(_IDENTITY)} are")
        return self._spec(model, asking).id

    def objects(self) -> set[ModelId]:
        """Return the Python objects whose parsed requests are kept, whether or not a request was made."""
        kept = (known.parsed for known in self._known.copy().values())
        return {parsed.spec.model for parsed in kept if isinstance(parsed.model, PythonModel)}

    def forget(self, id: ModelId) -> None:
        """Drop the parsed requests for an object, which would keep it alive; not for two threads at the same time."""
        for key, known in self._known.copy().items():
            if known.parsed.spec.model == id:
                self._known.pop(key, None)

    def parse(
        self, model: Model, asking: AcquireOptions, purpose: Purpose = Purpose.lease
    ) -> tuple[ModelSpec | PythonModel | EngineModel, ParsedRequest]:
        """Return a model and the parsed request for it; raises what `parse_cached` raises.

        The model is not pinned by this, and its engine need not be installed.
        """
        spec = _with_adapter(self._spec(model, asking), asking.get("adapter"))
        if isinstance(spec, ModelSpec) and len(spec.projectors) > 1:
            raise UnsupportedOption("projectors", spec.projectors, "llama.cpp loads one projector for a model")
        named: dict[str, Any] = {name: value for name, value in asking.items() if name not in _NO_OPTIONS}
        for name, value in named.items():
            check_option(name, value)
            if value is not None and not getattr(spec, "takes_options", True):
                raise UnsupportedOption(name, value, f"{_kind(spec)} has no load-time options")
        named = {name: value for name, value in named.items() if value is not None}
        if "devices" in named:
            named["devices"] = device_ids(named["devices"])
        options = Options() if isinstance(spec, PythonModel) else replace(spec.options, **named)
        keep_alive, timeout = asking.get("keep_alive"), asking.get("timeout")
        if keep_alive is None:
            keep_alive = spec.keep_alive
        keep_alive_s = None if keep_alive is None else parse_duration(keep_alive, name="keep_alive")
        timeout_s = None if timeout is None else parse_duration(timeout, name="timeout")
        if options.devices is None and not isinstance(spec, PythonModel) and spec.devices is not None:
            options = replace(options, devices=spec.devices)
        for each in fields(options):  # the options of the model itself are checked too
            check_option(each.name, getattr(options, each.name))
        priority = asking.get("priority")
        if priority is None:
            priority = spec.priority
        if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > MOST_PRIORITY:
            raise InvalidSettings("priority", priority, f"a whole number from -{MOST_PRIORITY} to {MOST_PRIORITY}")
        request_spec = RequestSpec(spec.id, options, purpose, priority)
        timeout_s = None if timeout_s == math.inf else timeout_s
        return spec, ParsedRequest(request_spec, spec.name, keep_alive_s, timeout_s, spec, lease_limit(spec.max_leases))

    def _understand(self, model: Model, asking: AcquireOptions, purpose: Purpose) -> ParsedRequest:
        past: ModelId | None = None
        if isinstance(model, PythonModel):
            model, past = self._lives.meet(model)
        spec, parsed = self.parse(model, asking, purpose)
        self._require(spec)
        if past is not None:
            self.forget(past)
            self._end(past, spec.id)
        if spec.pin and spec.id not in self._pinned:
            self._pinned.add(spec.id)
            self._pin(spec.id)
        if isinstance(spec, ModelSpec):
            self._look_at(spec)
            self._tell(spec)
        return parsed

    def _tell(self, model: ModelSpec) -> None:
        """Warn, once, of what a model comes with and what has no effect here."""
        told = (model.name, *model.chat.unapplied)
        if len(told) > 1 and told not in self._told:
            if len(self._told) >= _KNOWN_QUESTIONS:
                self._told.clear()
            self._told.add(told)
            log.warning("%s has what is not applied: %s", printable(model.name), printable("; ".join(told[1:])))

    def _spec(self, model: Model, asking: IdentityOptions) -> ModelSpec | PythonModel | EngineModel:
        identity = {name: value for name, value in asking.items() if name in _IDENTITY}
        if isinstance(model, PythonModel | EngineModel):
            for name, value in identity.items():
                if value is not None:
                    raise UnsupportedOption(name, value, f"{_kind(model)} has no such part")
            return self._lives.current(model) if isinstance(model, PythonModel) else model
        identity = {name: value for name, value in identity.items() if value is not None}
        try:
            spec = model if isinstance(model, ModelSpec) else self._named(model)
            spec = (replace(spec, **identity) if identity else spec).resolved()  # type: ignore[arg-type]  # ModelSpec checks the types
        except (ModelNotFound, InvalidModel):
            if (loaded := self._past.model_in_use(_references(model, identity))) is None:
                raise
            return loaded
        references = _references(model, identity)
        if is_there(spec):
            self._past.note(references[0], spec)
            return spec
        return self._past.model_in_use(references) or spec

    def _named(self, model: str | os.PathLike[str]) -> ModelSpec:
        """Return the model at a path, or of a name; raises `UnsupportedOption` or `ModelNotFound`."""
        text = os.fspath(model) if isinstance(model, str | os.PathLike) else None
        if not isinstance(text, str):
            raise UnsupportedOption("model", model, "it must be a path, a name, a ModelSpec or a PythonModel")
        if not text or text.startswith("-"):
            raise UnsupportedOption("model", text, "it must be a path or a name, and not begin with '-'")
        if not isinstance(model, str) or is_path(model):
            return ModelSpec(Path(text).name.removesuffix(".gguf"), text)
        try:
            return self._catalog.find(model)
        except ModelNotFound as error:
            if is_like_a_path(model):
                error.looked_in = ("the working folder", *error.looked_in)
            raise


def _with_adapter(
    model: ModelSpec | PythonModel | EngineModel, adapter: ChosenAdapters | None
) -> ModelSpec | PythonModel | EngineModel:
    """Return the model with the adapters that a request chooses; raises `UnsupportedOption` where it has none such."""
    if adapter is None:
        return model
    if not isinstance(model, ModelSpec):
        chosen_adapters(adapter, {})
        return model
    return replace(model, adapter=adapter)


def lease_limit(value: int | Literal["slots"] | None) -> int | None:
    """Return a limit of leases as the core takes it."""
    return SLOTS if value == "slots" else value


def _kind(model: Model) -> str:
    return "an object" if isinstance(model, PythonModel) else "a model of another engine"


def _references(model: str | os.PathLike[str] | ModelSpec, identity: Mapping[str, object]) -> list[Reference]:
    """Return what tells a reference from others: what it counts as now, then what it may have counted as before."""
    if isinstance(model, ModelSpec):
        files = model.adapters, model.named_adapters, model.projectors, model.draft
        return [(model.path, repr((files, model.embedding, model.llama_server, identity)))]
    text, rest = os.fspath(model), repr(identity)
    path = os.path.abspath(os.path.expanduser(text))
    if not isinstance(model, str) or is_path(text):
        return [(path, rest)]
    return [(text, rest), (path, rest)] if is_like_a_path(text) else [(text, rest)]


def _lasts(model: Model) -> bool:
    """Return whether a parsed model may be kept; a path from the working folder may not, since that folder changes."""
    if isinstance(model, ModelSpec | PythonModel | EngineModel):
        return True
    return os.path.isabs(model) or (isinstance(model, str) and not is_path(model))


def check_option(name: str, value: object) -> None:
    """Raise `UnsupportedOption` for a value that no load-time option of that name can have."""
    if name == "devices":
        device_ids(value)
        return
    kind = _KINDS.get(name)
    if kind is None:
        known = ", ".join(sorted({*_NO_OPTIONS, *(each.name for each in fields(Options))}))
        raise UnsupportedOption(name, value, f"there is no such option; there are {known}")
    if value is None:
        return
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UnsupportedOption(name, value, f"it must be of type {kind.__name__}")
    if name in _POSITIVE and value < 1:  # type: ignore[operator]  # it is an int
        raise UnsupportedOption(name, value, "it must be at least 1")
    if name == "draft_num_predict" and not 0 <= value <= MOST_DRAFTED:  # type: ignore[operator]  # it is an int
        raise UnsupportedOption(name, value, f"it must be from 0 to {MOST_DRAFTED}")
    if kind is int and abs(value) >= LARGEST_NUMBER:  # type: ignore[arg-type]  # it is an int
        raise UnsupportedOption(name, value, "it must be between -2**63 and 2**63")
    if kind is str and value not in CACHE_TYPES:
        raise UnsupportedOption(name, value, f"it must be one of {', '.join(CACHE_TYPES)}")
