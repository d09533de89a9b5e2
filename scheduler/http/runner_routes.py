"""Routes that a runner answers itself: what of a client's request goes to the scheduler, and what to the runner."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers

from scheduler.config.quantities import parse_duration
from scheduler.engines.answer_requests import refuse_fetches
from scheduler.engines.command_model import CommandModel
from scheduler.errors.exceptions import InvalidSettings, UnsupportedOption
from scheduler.http.exchange import body_of, object_of
from scheduler.http.rules import LOAD_OPTIONS, TIMING
from scheduler.models.chat_defaults import ChatDefaults
from scheduler.models.model_spec import ModelSpec
from scheduler.runtime.request_parser import AcquireOptions

HEADER = "x-loadmaster-"
Model = ModelSpec | CommandModel  # that has a name at the server
_WHOLE = re.compile(r"-?[0-9]{1,18}")
_PING_S = 10  # the runner's own signs of life, while it computes a long prompt


@dataclass(frozen=True, slots=True)
class Call:
    """What a client asks of a model."""

    model: str  # as the client calls it
    asking: AcquireOptions
    path: str  # of the runner's server
    content: Callable[[Model], bytes]  # of the request to the runner
    content_type: str = "application/json"
    streamed: bool = False
    patience_s: float | None = None  # None: the server's
    passed_as_it_is: bool = False  # so that any program may answer it, which a command serves


def _as_it_is(body: Mapping[str, Any], defaults: ChatDefaults) -> Mapping[str, Any]:
    return body


@dataclass(frozen=True, slots=True)
class RunnerRoute:
    """A route that the runner answers: its paths, the first being the runner's, and the fields that it takes."""

    paths: tuple[str, ...]
    fields: set[str]
    summary: str
    defaulted: Callable[[Mapping[str, Any], ChatDefaults], Mapping[str, Any]] = _as_it_is  # with what the model names
    embedding: bool = False  # it needs an embedder or a reranker
    refused: Mapping[str, str] = field(
        default_factory=dict
    )  # fields without which an answer would be wrong, and advice

    def call(self, content: bytes, headers: Headers) -> Call:
        """Return what a body and its headers ask for; raises `UnsupportedOption` and `InvalidSettings`."""
        asked = object_of(content)
        asking, patience_s = scheduling_of(asked, headers)
        for name, advice in self.refused.items():
            if asked.get(name) is not None:
                raise UnsupportedOption(name, asked[name], advice)
        if self.embedding:
            asking["embedding"] = True
        body = {name: value for name, value in asked.items() if name in self.fields}
        for name in ("messages", "input"):
            refuse_fetches(body.get(name))
        streamed = body.get("stream") is True
        pings = {"sse_ping_interval": _PING_S} if streamed else {}

        def content_for(spec: Model) -> bytes:
            if isinstance(spec, CommandModel):  # which knows itself by its own name, and no words of llama.cpp's
                return body_of({**body, "model": spec.name})
            return body_of(self.defaulted(body | pings, spec.chat))

        return Call(
            model_of(asked), asking, self.paths[0], content_for,
            streamed=streamed, patience_s=patience_s, passed_as_it_is=True,
        )  # fmt: skip


def model_of(asked: Mapping[str, Any]) -> str:
    """Return the name of the model that a body asks for; raises `UnsupportedOption` where there is none."""
    name = asked.get("model")
    if not isinstance(name, str) or not name:
        raise UnsupportedOption("model", name, "name a model; GET /v1/models lists them")
    return name


def scheduling_of(asked: Mapping[str, Any], headers: Headers) -> tuple[AcquireOptions, float | None]:
    """Return the keywords of a request to the scheduler, and the client's patience in seconds.

    They are fields of the body, as `keep_alive`, `ttl` (in seconds), `priority`, `timeout`, `adapter` and `options`
    are, or headers that begin with `x-loadmaster-`, which count more.
    """
    asking: dict[str, Any] = {name: asked[name] for name in (*TIMING, "adapter") if asked.get(name) is not None}
    if asked.get("ttl") is not None and "keep_alive" not in asking:
        asking["keep_alive"] = asked["ttl"]
    options = asked.get("options")
    if options is not None and not isinstance(options, Mapping):
        raise UnsupportedOption("options", options, "it must be an object")
    for name, value in (options or {}).items():
        if name not in LOAD_OPTIONS:
            known = ", ".join(sorted(LOAD_OPTIONS))
            raise UnsupportedOption(f"options.{name}", value, f"there is no such option; there are {known}")
        asking[name] = value
    for name in (*TIMING, *LOAD_OPTIONS):
        if (text := headers.get(HEADER + name.replace("_", "-"))) is not None:
            asking[name] = value_of(text)
    patience = headers.get(f"{HEADER}patience")
    patience_s = None if patience is None else parse_duration(value_of(patience), name=f"{HEADER}patience")
    if patience_s == 0:
        raise InvalidSettings(f"{HEADER}patience", patience, "a duration longer than 0")
    return asking, patience_s  # type: ignore[return-value]  # the scheduler checks the values


def value_of(text: str) -> Any:
    """Return what a text of a header or a form stands for: a whole number, a truth value, or itself."""
    if _WHOLE.fullmatch(text):
        return int(text)
    return {"true": True, "false": False}.get(text.lower(), text)
