"""The OpenAPI description of the server, made from its routes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from scheduler.http.errors import ErrorAnswer
from scheduler.http.protocol import Protocol
from scheduler.http.protocol_module import Body, ProtocolModule
from scheduler.http.rules import LOAD_OPTIONS, TIMING
from scheduler.http.runner_routes import RunnerRoute

_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_OBJECTS = {"type": "array", "items": {"type": "object"}}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "user", "assistant", "tool"]},
        "content": {"anyOf": [{"type": "string"}, _OBJECTS]},
    },
}
_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_DURATION = {
    "anyOf": [{"type": "number"}, {"type": "string", "pattern": "^-?[0-9]+(ms|s|m|h)$"}],
    "examples": ["5m", 300, -1],
}
_SIMPLE: Mapping[str, str] = {
    "integer": """
        dimensions dry_allowed_length dry_penalty_last_n max_completion_tokens max_output_tokens max_tokens
        max_tool_calls min_keep mirostat n n_cmpl n_discard n_indent n_keep n_predict n_probs priority
        reasoning_budget_tokens repeat_last_n runner seed t_max_predict_ms thinking_budget_tokens top_k top_logprobs
        top_n num_ctx num_batch num_gpu main_gpu num_thread num_parallel draft_num_predict
    """,
    "number": """
        dry_base dry_multiplier dynatemp_exponent dynatemp_range frequency_penalty min_p mirostat_eta mirostat_tau
        presence_penalty repeat_penalty temperature top_n_sigma top_p ttl typical_p xtc_probability xtc_threshold
    """,
    "boolean": """
        add_special cache_prompt ignore_eos parallel_tool_calls parse_special parse_tool_calls raw return_progress
        return_text return_tokens shift stream timings_per_token truncate use_mmap with_pieces
    """,
    "string": """
        content grammar input_prefix input_suffix instructions language model query suffix
    """,
}
_PLAIN = {name: {"type": kind} for kind, names in _SIMPLE.items() for name in names.split()}
_TYPES: Mapping[str, Mapping[str, Any]] = {
    **_PLAIN,
    "documents": {"type": "array", "items": {"type": "string"}},
    "file": {"type": "string", "contentMediaType": "application/octet-stream"},
    "images": {"type": "array", "items": {"type": "string", "contentEncoding": "base64"}},
    "input": {"anyOf": [*_TEXTS["anyOf"], _OBJECTS]},
    "keep_alive": _DURATION,
    "messages": {"type": "array", "items": _MESSAGE},
    "options": {"type": "object", "properties": {name: _PLAIN.get(name, {}) for name in sorted(LOAD_OPTIONS)}},
    "prompt": _TEXTS,
    "reasoning_format": {"enum": ["none", "auto", "deepseek", "deepseek-legacy"]},
    "stop": _TEXTS,
    "timeout": _DURATION,
    "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    "tools": _OBJECTS,
}
_REQUIRED = ("messages", "input", "query", "content", "tokens")  # where a route that the runner answers has them
_ERRORS = {
    400: "the request is not valid",
    401: "a key is needed",
    403: "this host, this web page or this machine may not call",
    404: "there is no such model",
    408: "the body came too slowly",
    413: "the body is too large",
    499: "the request was cancelled",
    500: "the engine or the server has failed",
    501: "the model, or this server, cannot",
    502: "the runner of the model has crashed",
    503: "the request cannot be answered now: `Retry-After` may say when it can",
    504: "the time limit of the request has passed",
    507: "the model does not fit",
}


def description(modules: Iterable[ProtocolModule], version: str) -> Mapping[str, Any]:
    """Return the description as JSON values."""
    paths: dict[str, dict[str, Any]] = {}
    for module in modules:
        for route in module.ROUTES:
            operation = _operation(module.PROTOCOL, route.summary, _body_of(route))
            paths |= {path: {"post": operation} for path in route.paths}
        for methods, path, respond in module.ENDPOINTS:
            summary = inspect.cleandoc(respond.__doc__ or "").partition("\n")[0]
            operation = {**_operation(module.PROTOCOL, summary, module.BODIES.get(path)), **_parameters(path)}
            described = paths.setdefault(_PARAMETER.sub(r"{\1}", path), {})
            described |= {method.lower(): operation for method in methods}
    header = {"type": "apiKey", "in": "header", "name": "x-api-key"}
    keys = {"bearer": {"type": "http", "scheme": "bearer"}, "header": header}
    return {
        "openapi": "3.1.0",
        "info": {"title": "loadmaster", "version": version},
        "paths": paths,
        "components": {"securitySchemes": keys},
        "security": [{}, {"bearer": []}, {"header": []}],
    }


def _operation(protocol: Protocol, summary: str, body: Body | None) -> dict[str, Any]:
    error = {"application/json": {"schema": _shape(protocol.error(ErrorAnswer(400, "code", "message")))}}
    answers = {f"{status}": {"description": why, "content": error} for status, why in _ERRORS.items()}
    operation: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "the answer"}, **answers}}
    if body is None:
        return operation
    properties = {name: _TYPES.get(name, {}) for name in sorted(body.fields.split())}
    schema = {"type": "object", "required": body.required.split(), "properties": properties}
    kind = "multipart/form-data" if body.form else "application/json"
    return {**operation, "requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


def _shape(value: object) -> Mapping[str, Any]:
    """Return a schema of values that are like this one."""
    match value:
        case str():
            return {"type": "string"}
        case Mapping():
            properties = {name: _shape(each) for name, each in value.items()}
            return {"type": "object", "required": [*value], "properties": properties}
        case _:
            return {}


def _body_of(route: RunnerRoute) -> Body:
    required = ["model", *(name for name in _REQUIRED if name in route.fields)]
    return Body(" ".join({"model", *route.fields, *TIMING, "ttl", "adapter", "options"}), " ".join(required))


def _parameters(path: str) -> Mapping[str, Any]:
    names = _PARAMETER.findall(path)
    told = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    return {"parameters": told} if told else {}
