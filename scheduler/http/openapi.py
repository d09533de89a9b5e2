"""The OpenAPI description of the server, made from its routes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from scheduler.http.protocol_module import ProtocolModule
from scheduler.http.rules import LOAD_OPTIONS, TIMING
from scheduler.http.runner_routes import RunnerRoute

_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_TYPES: Mapping[str, Mapping[str, Any]] = {
    "model": {"type": "string"},
    "stream": {"type": "boolean"},
    "messages": {"type": "array", "items": {"type": "object"}},
    "documents": {"type": "array", "items": {"type": "string"}},
    "query": {"type": "string"},
    "max_tokens": {"type": "integer"},
    "temperature": {"type": "number"},
    "keep_alive": {"type": ["string", "number"]},
    "timeout": {"type": ["string", "number"]},
    "priority": {"type": "integer"},
    "options": {"type": "object", "properties": {name: {} for name in sorted(LOAD_OPTIONS)}},
}
_ERRORS = {"4XX": "the request cannot be answered as it is", "5XX": "the request cannot be answered now"}


def description(modules: Iterable[ProtocolModule], version: str) -> Mapping[str, Any]:
    """Return the description as JSON values."""
    paths: dict[str, dict[str, Any]] = {}
    for module in modules:
        for route in module.ROUTES:
            for path in route.paths:
                paths.setdefault(path, {})["post"] = _operation(route.summary, _body(route))
        for methods, path, respond in module.ENDPOINTS:
            summary = inspect.cleandoc(respond.__doc__ or "").partition("\n")[0]
            for method in methods:
                operation = {**_operation(summary, None), **_parameters(path)}
                paths.setdefault(_PARAMETER.sub(r"{\1}", path), {})[method.lower()] = operation
    header = {"type": "apiKey", "in": "header", "name": "x-api-key"}
    keys = {"bearer": {"type": "http", "scheme": "bearer"}, "header": header}
    return {
        "openapi": "3.1.0",
        "info": {"title": "loadmaster", "version": version},
        "paths": paths,
        "components": {"securitySchemes": keys},
        "security": [{}, {"bearer": []}, {"header": []}],
    }


def _operation(summary: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
    answers = {"200": {"description": "the answer"}, **{code: {"description": why} for code, why in _ERRORS.items()}}
    operation: dict[str, Any] = {"summary": summary, "responses": answers}
    return operation if body is None else {**operation, "requestBody": body}


def _body(route: RunnerRoute) -> Mapping[str, Any]:
    names = sorted({"model", *route.fields, *TIMING, "ttl", "options"})
    schema = {"type": "object", "required": ["model"], "properties": {name: _TYPES.get(name, {}) for name in names}}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _parameters(path: str) -> Mapping[str, Any]:
    names = _PARAMETER.findall(path)
    told = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    return {"parameters": told} if told else {}
