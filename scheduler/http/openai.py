"""OpenAI's API, with what llama.cpp's server adds to it: answered by the runner itself, and passed on as it comes."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx2
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from scheduler.engines.answer_requests import CHAT_PARAMETERS, COMPLETION_PARAMETERS, EMBEDDING_PARAMETERS
from scheduler.engines.command_model import CommandModel
from scheduler.errors.exceptions import UnsupportedOption
from scheduler.http.errors import ErrorAnswer
from scheduler.http.exchange import Exchange, as_json
from scheduler.http.protocol import EVENTS, Waiting
from scheduler.http.protocol_module import Body
from scheduler.http.rules import TIMING
from scheduler.http.runner_routes import Call, Model, RunnerRoute, model_of, scheduling_of, value_of
from scheduler.http.service import Service
from scheduler.models.chat_defaults import ChatDefaults

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_STREAMED = {"model", "stream", "stream_options", "return_progress"}


class OpenAI:
    """Errors and signs of life in OpenAI's terms."""

    content_type = EVENTS

    def error(self, answer: ErrorAnswer) -> Mapping[str, Any]:
        """Return the body of an answer that is an error."""
        kind = _TYPES.get(answer.status, "invalid_request_error" if answer.status < 500 else "server_error")
        told = {"message": answer.message, "type": kind, "param": None, "code": answer.code}
        return {"error": {**answer.figures, **told}}

    def error_event(self, answer: ErrorAnswer) -> bytes:
        """Return the end of a stream that breaks."""
        return b"\n\ndata: " + as_json(self.error(answer)) + b"\n\ndata: [DONE]\n\n"

    def missing(self, lines: bytes, model: str) -> bytes | None:
        """Return nothing: the first event is one like the others."""
        return b""

    def sign_of_life(self, waiting: Waiting) -> bytes:
        """Return a comment, which clients skip."""
        return f": {waiting.line()}\n\n".encode()


class Responses(OpenAI):
    """The same in the events of OpenAI's Responses, which have a type and no end but the last one."""

    def error_event(self, answer: ErrorAnswer) -> bytes:
        """Return the end of a stream that breaks."""
        told = {"type": "error", "code": answer.code, "message": answer.message, "param": None, "sequence_number": 0}
        return b"\n\nevent: error\ndata: " + as_json({**told, **self.error(answer)}) + b"\n\n"


def _text(body: Mapping[str, Any], defaults: ChatDefaults) -> Mapping[str, Any]:
    return defaults.with_parameters(body)


def _chat(body: Mapping[str, Any], defaults: ChatDefaults) -> Mapping[str, Any]:
    body = defaults.with_parameters(body)
    if isinstance(messages := body.get("messages"), list):
        return {**body, "messages": defaults.with_messages(messages)}
    return body


def _response(body: Mapping[str, Any], defaults: ChatDefaults) -> Mapping[str, Any]:
    """Return the body with the model's system message as `instructions`, and its others as items of the input."""
    body = defaults.with_parameters(body)
    said = body.get("input")
    items = [{"role": "user", "content": said}] if isinstance(said, str) else said
    if not isinstance(items, list):
        return body
    own = bool(items) and isinstance(items[0], Mapping) and items[0].get("role") in ("system", "developer")
    named = own or bool(body.get("instructions")) or not defaults.system
    system = {} if named else {"instructions": defaults.system}
    first = [_item(message) for message in defaults.messages]
    return {**body, **system, "input": [*first, *items] if first else said}


def _item(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if message.get("role") != "assistant":
        return message
    return {**message, "type": "message", "content": [{"type": "output_text", "text": message.get("content", "")}]}


_RESPONSES = """
    include input instructions max_output_tokens max_tool_calls metadata parallel_tool_calls reasoning temperature text
    tool_choice tools top_logprobs top_p truncation
"""
PROTOCOL, RESPONSES = OpenAI(), Responses()
_NOT_KEPT = dict.fromkeys(
    ("previous_response_id", "conversation"), "nothing is kept between requests: send what was said before as input"
)
_TRANSCRIPTION = {"model", "language", "prompt", "response_format", "temperature", "stream"}

# What a route takes from a client: what reaches beyond the request, as `id_slot` does, is not among it.
_REACHING = {"id_slot"}
ROUTES = (
    RunnerRoute(
        ("/v1/chat/completions", "/chat/completions"), {"messages", *CHAT_PARAMETERS, *_STREAMED} - _REACHING,
        "answer a chat", defaulted=_chat,
    ),
    RunnerRoute(
        ("/v1/completions", "/completions"), {"prompt", "suffix", *COMPLETION_PARAMETERS, *_STREAMED} - _REACHING,
        "continue a text", defaulted=_text,
    ),
    RunnerRoute(
        ("/v1/responses", "/responses"), {*_RESPONSES.split(), *COMPLETION_PARAMETERS, *_STREAMED} - _REACHING,
        "answer with OpenAI's Responses", defaulted=_response, refused=_NOT_KEPT,
    ),
    RunnerRoute(
        ("/v1/embeddings", "/embeddings"), {"input", "encoding_format", "dimensions", "model", *EMBEDDING_PARAMETERS},
        "compute vectors of texts", embedding=True,
    ),
    RunnerRoute(
        ("/v1/rerank", "/rerank", "/v1/reranking", "/reranking"),
        {"model", "query", "documents", "texts", "top_n", "return_text"}, "score documents for a query", embedding=True,
    ),
    RunnerRoute(
        ("/infill",), {"input_prefix", "input_suffix", "input_extra", "prompt", *COMPLETION_PARAMETERS, *_STREAMED}
        - _REACHING, "fill in a gap in a text", defaulted=_text,
    ),
    RunnerRoute(
        ("/tokenize",), {"model", "content", "add_special", "parse_special", "with_pieces"}, "return a text's tokens",
    ),
    RunnerRoute(("/detokenize",), {"model", "tokens"}, "return the text of tokens"),
)  # fmt: skip


async def _transcribe(service: Service, exchange: Exchange) -> None:
    """Transcribe speech: the fields of a form, with the file in it."""
    content = await exchange.body(service.settings.body_limit, service.settings.body_timeout)

    async def stream() -> AsyncGenerator[bytes, None]:
        yield content

    try:
        form = await MultiPartParser(exchange.headers, stream()).parse()
    except (MultiPartException, KeyError) as error:
        raise UnsupportedOption("body", "…", f"it must be a form with a file ({error})") from None
    try:
        asked = {name: value for name, value in form.items() if isinstance(value, str)}
        if not isinstance(file := form.get("file"), UploadFile):
            raise UnsupportedOption("file", None, "name a file to transcribe")
        speech = file.filename, await file.read()
    finally:
        await form.close()
    fields = {name: value for name, value in asked.items() if name in _TRANSCRIPTION}
    told = httpx2.Request("POST", "http://runner", data=fields, files={"file": speech})
    named = {name: value_of(asked[name]) for name in (*TIMING, "ttl") if name in asked}
    asking, patience_s = scheduling_of(named, exchange.headers)
    call = Call(
        model_of(asked), asking, "/v1/audio/transcriptions", lambda spec: told.read(), told.headers["content-type"],
        streamed=asked.get("stream") == "true", patience_s=patience_s, passed_as_it_is=True,
    )  # fmt: skip
    await exchange.while_connected(service.pass_on(exchange, call, PROTOCOL))


async def _list_models(service: Service, exchange: Exchange) -> None:
    """Answer with the models that have a name."""
    found: dict[str, Model] = {**await service.models(), **service.commands}
    await exchange.respond_json(200, {"object": "list", "data": [_model(name, spec) for name, spec in found.items()]})


async def _show_model(service: Service, exchange: Exchange) -> None:
    """Answer with one model."""
    name = exchange.path_params["id"]
    await exchange.respond_json(200, _model(name, service.commands.get(name) or await service.find(name)))


def _model(name: str, spec: Model) -> Mapping[str, Any]:
    try:
        created = 0 if isinstance(spec, CommandModel) else int(os.stat(spec.path).st_mtime)
    except OSError:
        created = 0
    return {"id": name, "object": "model", "created": created, "owned_by": "loadmaster"}


ENDPOINTS = (
    (("POST",), "/v1/audio/transcriptions", _transcribe),
    (("GET",), "/v1/models", _list_models),
    (("GET",), "/v1/models/{id:path}", _show_model),
)
BODIES = {
    "/v1/audio/transcriptions": Body(f"file {' '.join((*_TRANSCRIPTION, *TIMING, 'ttl'))}", "model file", form=True)
}
