"""Ollama's API: the runner answers in OpenAI's terms or llama.cpp's own, and each line is translated."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx2

from scheduler.api.lease import Lease
from scheduler.errors.exceptions import EngineError, ModelNotFound, UnsupportedOption
from scheduler.http.errors import ErrorAnswer
from scheduler.http.exchange import Exchange, as_json, body_of, object_of
from scheduler.http.ollama_models import list_models, list_runners, show_model
from scheduler.http.ollama_translation import (
    Question,
    Reply,
    Shape,
    chat_question,
    events_of,
    generate_question,
    keep_alive_of,
    line_of,
    options_of,
)
from scheduler.http.ollama_truncate import Ask, shortened, tokens_of
from scheduler.http.protocol import Waiting
from scheduler.http.protocol_module import Body, Endpoint, Respond
from scheduler.http.runner_routes import Call, Model, RunnerRoute, scheduling_of
from scheduler.http.service import Service, refuse
from scheduler.models.model_spec import ModelSpec
from scheduler.runtime.request_parser import AcquireOptions

VERSION = "0.12.11"  # of Ollama, whose API this is; clients compare its numbers

_NS = 1_000_000_000
_MOST_TEXTS = 4096  # to embed at once


class Ollama:
    """Errors in Ollama's terms; a stream is lines of JSON, which leave no room for signs of life."""

    content_type = "application/x-ndjson"

    def error(self, answer: ErrorAnswer) -> Mapping[str, Any]:
        """Return the body of an answer that is an error."""
        return {**answer.figures, "error": answer.message}

    def error_event(self, answer: ErrorAnswer) -> bytes:
        """Return the end of a stream that breaks."""
        return as_json(self.error(answer)) + b"\n"

    def missing(self, lines: bytes, model: str) -> bytes | None:
        """Return nothing: the lines are the server's own."""
        return b""

    def sign_of_life(self, waiting: Waiting) -> bytes:
        """Return nothing: clients take each line for a part of the answer."""
        return b""


PROTOCOL = Ollama()


# -- chats and prompts -------------------------------------------------------------------------------------------------


async def _chat(service: Service, exchange: Exchange) -> None:
    """Answer a chat."""
    await _talk(service, exchange, "chat", chat_question)


async def _generate(service: Service, exchange: Exchange) -> None:
    """Continue a text, answer a prompt, or fill in a gap in a text."""
    await _talk(service, exchange, "generate", generate_question)


async def _talk(
    service: Service,
    exchange: Exchange,
    shape: Shape,
    question_of: Callable[[Mapping[str, Any], Mapping[str, Any]], Question],
) -> None:
    began, asked = time.monotonic(), await _asked(service, exchange)
    call, sampling = _call(asked, exchange)
    question = question_of(asked, sampling)
    if question.empty:
        await exchange.while_connected(_load(service, exchange, shape, call))
        return
    call = replace(call, path=question.path, content=lambda spec: _content(question, spec))
    truncate = asked.get("truncate") is not False
    await exchange.while_connected(_answer(service, exchange, shape, call, question.needs, began, truncate))


async def _answer(
    service: Service, exchange: Exchange, shape: Shape, call: Call, needs: frozenset[str], began: float, truncate: bool
) -> None:
    if needs:
        card = await service.files.card(await service.find(call.model))
        for need in needs.difference(card.capabilities):
            raise UnsupportedOption("model", call.model, f"it does not support {need}")
    async with service.lease(exchange, call, PROTOCOL) as (spec, lease):
        reply = Reply(shape, call.model, began, time.monotonic() - began)
        async with _response(service, exchange, call, spec, lease, truncate) as response:
            async for event in events_of(response.aiter_raw()):
                line = reply.feed(event)
                if line is not None and call.streamed:
                    await service.begin_stream(exchange, PROTOCOL)
                    await exchange.write(as_json(line) + b"\n")
    exchange.notes["tokens_in"], exchange.notes["tokens_out"] = reply.tokens_in, reply.tokens_out
    await _respond(service, exchange, call, reply.last(whole=not call.streamed))


@asynccontextmanager
async def _response(
    service: Service, exchange: Exchange, call: Call, spec: Model, lease: Lease, truncate: bool
) -> AsyncIterator[httpx2.Response]:
    """Yield the runner's answer; a prompt that its context does not hold is shortened first, where that is wanted."""
    content = call.content(spec)
    async with AsyncExitStack() as stack:
        try:
            response = await stack.enter_async_context(service.answer(exchange, call, PROTOCOL, content, lease))
        except EngineError as error:
            if not truncate or error.status != 400:
                raise
            context, ask = await _context(service, lease), _asker(service, exchange, call, lease)
            body = await shortened(call.path, json.loads(content), context, ask)
            if body is None:
                raise
            response = await stack.enter_async_context(service.answer(exchange, call, PROTOCOL, body_of(body), lease))
        yield response


async def _load(service: Service, exchange: Exchange, shape: Shape, call: Call) -> None:
    """Load a model without a lease, or unload it where the keep-alive is 0: that waits for nothing."""
    spec = await service.find(call.model)
    exchange.notes |= {"model": spec.name, "model_id": spec.id}
    asking = await service.ruled(exchange, spec, call)
    reason = "unload" if asking.get("keep_alive") == 0 else "load"
    if reason == "unload":
        for embedding in {spec.embedding, True}:
            service.scheduler.expire(spec, embedding=embedding)
    else:
        await _preload(service, exchange, spec, call, asking)
    await _respond(service, exchange, call, line_of(shape, call.model, "", done=True, done_reason=reason))


async def _preload(service: Service, exchange: Exchange, spec: ModelSpec, call: Call, asking: AcquireOptions) -> None:
    loading = asyncio.wrap_future(service.scheduler.preload(spec, **asking))
    await service.patiently(exchange, call, PROTOCOL, loading, lambda: Waiting("loading"), call.patience_s or math.inf)


async def _respond(service: Service, exchange: Exchange, call: Call, line: Mapping[str, Any]) -> None:
    """End a response with a line."""
    if call.streamed:
        await service.begin_stream(exchange, PROTOCOL)
        await exchange.end(as_json(line) + b"\n")
    else:
        await exchange.respond_json(200, line)


async def _asked(service: Service, exchange: Exchange) -> dict[str, Any]:
    return object_of(await exchange.body(service.settings.body_limit, service.settings.body_timeout))


def _call(asked: Mapping[str, Any], exchange: Exchange, *, streams: bool = True) -> tuple[Call, Mapping[str, Any]]:
    """Return what a body asks of a model, and its parameters of sampling; raises what `scheduling_of` raises."""
    loading, sampling = options_of(asked)
    timing = {name: asked.get(name) for name in ("priority", "timeout", "adapter")}
    timing["keep_alive"] = keep_alive_of(asked)
    if asked.get("shift") is not None:
        loading["context_shift"] = asked["shift"]
    asking, patience_s = scheduling_of({**timing, "options": loading}, exchange.headers)
    streamed = streams and asked.get("stream") is not False
    call = Call(
        _model_of(asked), asking, "", lambda spec: b"", streamed=streamed,
        patience_s=math.inf if patience_s is None else patience_s,
    )  # fmt: skip
    return call, sampling


def _model_of(asked: Mapping[str, Any]) -> str:
    """Return the name of the model, by which of the two fields the client names it."""
    name = asked.get("model") or asked.get("name")
    if not isinstance(name, str) or not name:
        raise UnsupportedOption("model", name, "name a model; GET /api/tags lists them")
    return name


def _content(question: Question, spec: Model) -> bytes:
    """Return the request to the runner, with what the model's chats begin with, and its parameters."""
    body = dict(spec.chat.with_parameters(question.body))
    if "messages" in body:
        body["messages"] = spec.chat.with_messages(body["messages"])
    return body_of(body)


# -- vectors -----------------------------------------------------------------------------------------------------------


async def _embed(service: Service, exchange: Exchange) -> None:
    """Compute vectors of length 1 of texts."""
    began, asked = time.monotonic(), await _asked(service, exchange)
    given = asked.get("input")
    texts = [given] if isinstance(given, str) else given if given is not None else []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or len(texts) > _MOST_TEXTS:
        raise UnsupportedOption("input", "…", f"it must be a text, or a list of at most {_MOST_TEXTS} texts")
    call, _ = _call(asked, exchange, streams=False)

    async def work() -> None:
        vectors, tokens, load_s = await _vectors(service, exchange, call, texts, asked.get("truncate") is not False)
        dimensions = asked.get("dimensions")
        if isinstance(dimensions, int) and dimensions > 0:
            vectors = [_cut(vector, dimensions) for vector in vectors]
        told = {"model": call.model, "embeddings": vectors, "prompt_eval_count": tokens}
        durations = {"total_duration": time.monotonic() - began, "load_duration": load_s}
        await exchange.respond_json(200, told | {name: int(value * _NS) for name, value in durations.items()})

    await exchange.while_connected(work())


async def _embed_one(service: Service, exchange: Exchange) -> None:
    """Compute the vector of a text, of any length: the older form."""
    asked = await _asked(service, exchange)
    call, _ = _call(asked, exchange, streams=False)
    prompt = asked.get("prompt") or ""
    if not isinstance(prompt, str):
        raise UnsupportedOption("prompt", prompt, "it must be a text")

    async def work() -> None:
        vectors, *_ = await _vectors(service, exchange, call, [prompt], True, embd_normalize=-1)
        await exchange.respond_json(200, {"embedding": vectors[0] if vectors else []})

    await exchange.while_connected(work())


async def _vectors(
    service: Service, exchange: Exchange, call: Call, texts: Sequence[str], truncate: bool, **parameters: int
) -> tuple[list[list[float]], int, float]:
    """Return vectors, the tokens that were read, and the seconds until the model was there; no text loads it alone."""
    began = time.monotonic()
    call = replace(call, path="/v1/embeddings", asking={**call.asking, "embedding": True})
    if not any(texts):
        spec = await service.find(call.model)
        exchange.notes |= {"model": spec.name, "model_id": spec.id}
        await _preload(service, exchange, spec, call, await service.ruled(exchange, spec, call))
        return [], 0, time.monotonic() - began
    async with service.lease(exchange, call, PROTOCOL) as (_, lease):
        load_s = time.monotonic() - began
        try:
            told = await _post(service, exchange, call, lease, {"input": texts, **parameters})
        except EngineError as error:
            if not truncate or error.status != 400:
                raise
            told = await _post_cut(service, exchange, call, lease, texts, parameters)
    exchange.notes["tokens_in"] = told["usage"]["prompt_tokens"]
    return [one["embedding"] for one in told["data"]], told["usage"]["prompt_tokens"], load_s


async def _post_cut(
    service: Service, exchange: Exchange, call: Call, lease: Lease, texts: Sequence[str], parameters: Mapping[str, int]
) -> Any:
    """Return what the engine answers for the beginnings of texts: as much of each as the context holds."""
    context, ask = await _context(service, lease), _asker(service, exchange, call, lease)
    cut = [_cut_tokens(*await tokens_of(ask, text), context) for text in texts]
    return await _post(service, exchange, call, lease, {"input": cut, **parameters})


def _cut_tokens(tokens: list[int], last: int, context: int | None) -> list[int]:
    if context is None or len(tokens) <= context:
        return tokens
    return [*tokens[: context - last], *tokens[len(tokens) - last :]]


async def _post(service: Service, exchange: Exchange, call: Call, lease: Lease, body: Mapping[str, Any]) -> Any:
    return await _asker(service, exchange, call, lease)(call.path, body)


def _asker(service: Service, exchange: Exchange, call: Call, lease: Lease) -> Ask:
    """Return a function that asks the runner, and returns its whole answer."""

    async def ask(path: str, body: Mapping[str, Any]) -> Any:
        asking = replace(call, path=path, content_type="application/json")
        async with service.answer(exchange, asking, PROTOCOL, body_of(body), lease) as response:
            return json.loads(await response.aread())

    return ask


async def _context(service: Service, lease: Lease) -> int | None:
    """Return the context of a lease's runner, in tokens."""
    status = await asyncio.to_thread(service.scheduler.status)
    return next((one.options.num_ctx for one in status.runners if one.id == lease.runner), None)


def _cut(vector: list[float], dimensions: int) -> list[float]:
    """Return the first elements of a vector, again with length 1."""
    first = vector[:dimensions]
    length = math.hypot(*first)
    return [value / length for value in first] if length else first


# -- models ------------------------------------------------------------------------------------------------------------


async def _tags(service: Service, exchange: Exchange) -> None:
    """List the models that have a name."""
    await exchange.respond_json(200, {"models": await list_models(service)})


async def _ps(service: Service, exchange: Exchange) -> None:
    """List the models that are loaded, those that stay longest first."""
    await exchange.respond_json(200, {"models": await list_runners(service)})


async def _show(service: Service, exchange: Exchange) -> None:
    """Show one model."""
    name = _model_of(await _asked(service, exchange))
    await exchange.respond_json(200, await show_model(service, name))


async def _pull(service: Service, exchange: Exchange) -> None:
    """Tell whether a model is there; nothing is downloaded."""
    asked = await _asked(service, exchange)
    name = _model_of(asked)
    try:
        await service.find(name)
    except ModelNotFound:
        how = "get it with `ollama pull`, with `hf download`, or put its file into a folder of models"
        error = ErrorAnswer(404, "model_not_found", f"there is no model {name!r}, and none is downloaded here: {how}")
        await refuse(exchange, PROTOCOL, error)
        return
    if asked.get("stream") is False:
        await exchange.respond_json(200, {"status": "success"})
    else:
        await exchange.respond(200, b'{"status":"success"}\n', {"content-type": PROTOCOL.content_type})


async def _version(service: Service, exchange: Exchange) -> None:
    """Tell which version of Ollama has this API."""
    await exchange.respond_json(200, {"version": VERSION})


def _not_here(reason: str) -> Respond:
    """Return what refuses a change of models' files."""

    async def respond(service: Service, exchange: Exchange) -> None:
        """Refuse: files of models are not changed from here."""
        await refuse(exchange, PROTOCOL, ErrorAnswer(501, "not_implemented", reason))

    return respond


ROUTES: tuple[RunnerRoute, ...] = ()
ENDPOINTS: tuple[Endpoint, ...] = (
    (("POST",), "/api/chat", _chat),
    (("POST",), "/api/generate", _generate),
    (("POST",), "/api/embed", _embed),
    (("POST",), "/api/embeddings", _embed_one),
    (("GET",), "/api/tags", _tags),
    (("GET",), "/api/ps", _ps),
    (("POST",), "/api/show", _show),
    (("POST",), "/api/pull", _pull),
    (("GET",), "/api/version", _version),
    (("POST",), "/api/push", _not_here("models are not published from here")),
    (("POST",), "/api/create", _not_here("put the model's file into a folder of models, or create it with Ollama")),
    (("POST",), "/api/copy", _not_here("in a folder of models, a link to a model's file is a second name for it")),
    (("DELETE",), "/api/delete", _not_here("delete the model's file, or use `ollama rm`: nothing is deleted here")),
    (("HEAD", "POST"), "/api/blobs/{digest}", _not_here("put the model's file into a folder of models")),
)
_TALK = "model format think stream options keep_alive adapter logprobs top_logprobs shift truncate"
BODIES = {
    "/api/chat": Body(f"{_TALK} messages tools"),
    "/api/generate": Body(f"{_TALK} prompt suffix system images raw"),
    "/api/embed": Body("model input truncate dimensions options keep_alive"),
    "/api/embeddings": Body("model prompt options keep_alive"),
    "/api/show": Body("model"),
    "/api/pull": Body("model stream"),
}
