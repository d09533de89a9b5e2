"""A client of one runner's OpenAI-compatible endpoint, for callers with and without an event loop."""

from __future__ import annotations

import asyncio
import encodings.idna  # noqa: F401 - each new connection's address goes through it, the first answer's too
import json
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, overload

import httpcore2  # noqa: F401 - httpx2 imports it with its first client, which the first answer would wait for
import httpx2

from scheduler.engines.answer import Answer, PartialAnswer
from scheduler.engines.answer_requests import (
    Messages,
    Request,
    chat_request,
    completion_request,
    embedding_requests,
    rerank_requests,
    token_request,
)
from scheduler.engines.interface import with_scales
from scheduler.engines.loop_transport import LoopTransport
from scheduler.engines.quiet_client import quiet, quiet_next
from scheduler.errors.exceptions import OUT_OF_FILES, AnswerTimeout, EngineError, is_out_of_files
from scheduler.models.chat_defaults import NO_DEFAULTS, ChatDefaults

Value = TypeVar("Value")
Progress = Callable[[int, int], object]  # called with the number of texts that are done, and the number of all

CONNECT_TIMEOUT_S = 5.0
# llama.cpp's server closes a connection after 5 s without a request, so no connection is kept for as long as that.
_KEEP_S = 4.0
# llama.cpp's advice in the errors of embeddings, and the advice that fits here.
_ADVICE = {
    "Start it with `--embeddings`": "Acquire the model with embedding=True",
    "Start it with `--reranking`": "Acquire a reranker, with embedding=True",
    "increase the physical batch size": "shorten it, or acquire the model with a larger num_ctx",
}
# Said where the request is at fault, although the server answers 500: of a text to embed, of what cannot be read, and
# of a token that the model does not have.
_REQUEST_AT_FAULT = re.compile(
    r"is too large to process|^Failed to parse (?:messages|tools)|^Unknown reasoning format|^'\w+' is required"
    r"|^vector::_M_range_check"
)
# The errors of a connection that the server closed while it was kept, or just as a request was sent.
_STALE = (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError, httpx2.ConnectError)
EVENTS = "text/event-stream"


@dataclass(slots=True)
class Limits:
    """How long a caller waits for an answer, in seconds; None is without limit."""

    silence_s: float | None = None  # for the next part of it
    total_s: float | None = None  # for the whole
    _until: float | None = field(default=None, init=False)  # of the monotonic clock; None: without limit, or not begun

    def begin(self) -> None:
        """Begin to count the whole; a second call is harmless."""
        if self.total_s is not None and self._until is None:
            self._until = time.monotonic() + self.total_s

    def left_s(self) -> float | None:
        """Return how long the next silence may be; raises `AnswerTimeout` when the whole time has passed."""
        if self._until is None:
            return self.silence_s
        if (left_s := self._until - time.monotonic()) <= 0:
            raise self.passed()
        return left_s if self.silence_s is None else min(left_s, self.silence_s)

    def passed(self) -> AnswerTimeout:
        """Return the error for the limit that has passed."""
        whole = self._until is not None and (self.silence_s is None or time.monotonic() >= self._until)
        return AnswerTimeout((self.total_s if whole else self.silence_s) or 0.0, whole)


class Connection:
    """The connection of one call, which any thread may cut: the runner stops its work on the answer then."""

    def __init__(self) -> None:
        self.is_cut = False  # set before the connection is cut, or before there is one: it is cut as it opens
        self._socket: Any = None

    def cut(self) -> None:
        """Cut the connection, now or as it opens, whether or not an event loop runs that could close it."""
        self.is_cut = True
        if self._socket is not None:
            # the connection was closed before, or the loop's sockets cannot be shut down
            with suppress(OSError, TypeError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def opened(self, connected: Any) -> None:
        """Take in the socket of the connection, which is open now."""
        self._socket = connected
        if self.is_cut:
            self.cut()

    def trace(self, event: str, told: Mapping[str, Any]) -> None:
        """Take in an event of httpx2, which tells of the connection once it is open."""
        if event == "connection.connect_tcp.complete":
            self.opened(told["return_value"].get_extra_info("socket"))


class Call:
    """One request for an answer that comes piece by piece, with as much of the answer as has come."""

    def __init__(self, request: Request, limits: Limits, *, chat: bool) -> None:
        self.request = request
        self.limits = limits
        self.partial = PartialAnswer(chat=chat)
        self.connection = Connection()
        self.expired = False  # the time for the whole answer has passed

    def expire(self) -> None:
        """End the answer: its time has passed."""
        self.expired = True
        self.connection.cut()


class RunnerClient:
    """A client of one runner at `url` (scheme, host and port) with its `key`.

    Several threads may use a client at once.

    Every method takes the engine's own request parameters by name (`max_tokens`, `temperature`, …) and two limits in
    seconds, of which None is the default and without limit: `timeout_s` for the longest silence, and `total_timeout_s`
    for the whole answer. `UnsupportedOption` refuses parameters that the engine would pass over. All methods raise
    `EngineError` if the runner answers with an error, `ConnectionError` if it does not answer or breaks off, and
    `AnswerTimeout` when a limit has passed.

    A text to embed is sent at most twice, and all else once.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        transport: httpx2.MockTransport | None = None,  # answers in the server's place
    ) -> None:
        self._url = url
        self._key = key
        self._connect_timeout_s = connect_timeout_s
        self._closed = False  # set before anything is closed: what breaks after that is no fault of the runner's
        # A runner is on this machine: no proxy is asked, and no certificates are loaded, which takes 30 ms.
        arguments: dict[str, Any] = {
            "base_url": url,
            "headers": {"Content-Type": "application/json"},
            "trust_env": False,
            "verify": url.startswith("https:"),
        }
        limits = httpx2.Limits(keepalive_expiry=_KEEP_S)
        self._pooled = httpx2.Client(limits=limits, transport=transport, **arguments)
        # A connection of its own for each answer, so that it can be cut; it takes 0.2 ms.
        limits = httpx2.Limits(max_keepalive_connections=0)
        self._fresh = httpx2.Client(limits=limits, transport=transport, **arguments)
        # The same for all that an event loop asks for: a connection that is kept could not be closed once its loop has
        # ended.
        self._in_loops = httpx2.AsyncClient(transport=transport or LoopTransport(), **arguments)

    # -- answers ------------------------------------------------------------------------------------------------------

    def chat_call(
        self,
        messages: Messages,
        defaults: ChatDefaults = NO_DEFAULTS,
        scales: tuple[float, ...] = (),
        /,
        *,
        timeout_s: float | None = None,
        total_timeout_s: float | None = None,
        **parameters: Any,
    ) -> Call:
        """Return a call for the answer to `messages`: a list of role and content, or one text that the user says.

        `defaults` are those of the model: what a caller says and names counts more. `scales` say by how much each
        adapter is applied, where there is one to choose from.
        """
        request = replace(chat_request(messages, parameters, defaults), scales=scales)
        return Call(request, Limits(timeout_s, total_timeout_s), chat=True)

    def completion_call(
        self,
        prompt: str,
        defaults: ChatDefaults = NO_DEFAULTS,
        scales: tuple[float, ...] = (),
        /,
        *,
        timeout_s: float | None = None,
        total_timeout_s: float | None = None,
        **parameters: Any,
    ) -> Call:
        """Return a call for the text that follows `prompt`; of `defaults` the parameters count."""
        request = replace(completion_request(prompt, parameters, defaults), scales=scales)
        return Call(request, Limits(timeout_s, total_timeout_s), chat=False)

    def chat(self, messages: Messages, **parameters: Any) -> Answer:
        """Return the whole answer to `messages`."""
        return self.answer(self.chat_call(messages, **parameters))

    def complete(self, prompt: str, **parameters: Any) -> Answer:
        """Return the text that follows `prompt`."""
        return self.answer(self.completion_call(prompt, **parameters))

    def stream(self, messages: Messages, **parameters: Any) -> Generator[str, None, None]:
        """Yield the answer to `messages` piece by piece, as `pieces` does."""
        return self.pieces(self.chat_call(messages, **parameters))

    async def achat(self, messages: Messages, **parameters: Any) -> Answer:
        """As `chat`, in an event loop."""
        return await self.aanswer(self.chat_call(messages, **parameters))

    async def acomplete(self, prompt: str, **parameters: Any) -> Answer:
        """As `complete`, in an event loop."""
        return await self.aanswer(self.completion_call(prompt, **parameters))

    def astream(self, messages: Messages, **parameters: Any) -> AsyncGenerator[str, None]:
        """As `stream`, in an event loop."""
        return self.apieces(self.chat_call(messages, **parameters))

    def answer(self, call: Call) -> Answer:
        """Return the whole answer to a call."""
        with closing(self.pieces(call)) as pieces:
            for _ in pieces:
                continue
        return call.partial.answer()

    async def aanswer(self, call: Call) -> Answer:
        """As `answer`, in an event loop."""
        async with aclosing(self.apieces(call)) as pieces:
            async for _ in pieces:
                continue
        return call.partial.answer()

    def pieces(self, call: Call) -> Generator[str, None, None]:
        """Yield the text of an answer piece by piece; the request is sent when the first piece is requested.

        Closing the iterator stops the runner's work on the answer.
        """
        events = _Events(call.partial)
        with self._translated(call.limits, call), _expiring(call):
            request = self._built(self._fresh, call.request, call.limits, call.connection)
            with quiet():  # not around a yield: what the caller logs meanwhile is its own
                response = self._fresh.send(request, stream=True)
            chunks = response.iter_bytes()
            try:
                if response.is_error or not _has_events(response):
                    with quiet():
                        body = response.read()
                    yield from events.whole(response.status_code, body)
                    return
                while (chunk := quiet_next(chunks)) is not None:
                    yield from events.feed(chunk)
                events.finish(self._url)
            finally:
                with quiet():
                    del chunks
                    response.close()

    async def apieces(self, call: Call) -> AsyncGenerator[str, None]:
        """As `pieces`, in an event loop."""
        events = _Events(call.partial)
        with self._translated(call.limits, call), _expiring_in_loop(call):
            request = self._built(self._in_loops, call.request, call.limits, call.connection)
            with quiet():
                response = await self._in_loops.send(request, stream=True)
            chunks = response.aiter_bytes()
            try:
                if response.is_error or not _has_events(response):
                    for piece in events.whole(response.status_code, await response.aread()):
                        yield piece
                    return
                async for chunk in chunks:
                    for piece in events.feed(chunk):
                        yield piece
                events.finish(self._url)
            finally:
                await chunks.aclose()
                await response.aclose()

    # -- what is answered at once -------------------------------------------------------------------------------------

    @overload
    def embed(
        self,
        text: str,
        *,
        timeout_s: float | None = None,
        total_timeout_s: float | None = None,
        **parameters: Any,
    ) -> list[float]: ...
    @overload
    def embed(
        self,
        text: Sequence[str],
        *,
        progress: Progress | None = None,
        timeout_s: float | None = None,
        total_timeout_s: float | None = None,
        **parameters: Any,
    ) -> list[list[float]]: ...
    def embed(
        self,
        text: str | Sequence[str],
        *,
        progress: Progress | None = None,
        timeout_s: float | None = None,
        total_timeout_s: float | None = None,
        **parameters: Any,
    ) -> list[float] | list[list[float]]:
        """Return the vector of one text, or the vectors of several in their order, which are sent a few at a time."""
        limits, vectors = Limits(timeout_s, total_timeout_s), list[list[float]]()
        texts = [text] if isinstance(text, str) else list(text)
        for request in embedding_requests(texts, parameters):
            vectors += self._post(request, _vectors, limits)
            if progress is not None:
                progress(len(vectors), len(texts))
        return vectors[0] if isinstance(text, str) else vectors

    @overload
    async def aembed(
        self,
        text: str,
        *,
        timeout_s: float | None = None,
        total_timeout_s: float | None = None,
        **parameters: Any,
    ) -> list[float]: ...
    @overload
    async def aembed(
        self,
        text: Sequence[str],
        *,
        progress: Progress | None = None,
        timeout_s: float | None = None,
        total_timeout_s: float | None = None,
        **parameters: Any,
    ) -> list[list[float]]: ...
    async def aembed(
        self,
        text: str | Sequence[str],
        *,
        progress: Progress | None = None,
        timeout_s: float | None = None,
        total_timeout_s: float | None = None,
        **parameters: Any,
    ) -> list[float] | list[list[float]]:
        """As `embed`, in an event loop."""
        limits, vectors = Limits(timeout_s, total_timeout_s), list[list[float]]()
        texts = [text] if isinstance(text, str) else list(text)
        for request in embedding_requests(texts, parameters):
            vectors += await self._apost(request, _vectors, limits)
            if progress is not None:
                progress(len(vectors), len(texts))
        return vectors[0] if isinstance(text, str) else vectors

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        progress: Progress | None = None,
        timeout_s: float | None = None,
        total_timeout_s: float | None = None,
    ) -> list[float]:
        """Return how well each document answers the query, in their order, which are sent a few at a time."""
        limits, scores = Limits(timeout_s, total_timeout_s), list[float]()
        for request in rerank_requests(query, documents):
            scores += self._post(request, _scores, limits)
            if progress is not None:
                progress(len(scores), len(documents))
        return scores

    async def arerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        progress: Progress | None = None,
        timeout_s: float | None = None,
        total_timeout_s: float | None = None,
    ) -> list[float]:
        """As `rerank`, in an event loop."""
        limits, scores = Limits(timeout_s, total_timeout_s), list[float]()
        for request in rerank_requests(query, documents):
            scores += await self._apost(request, _scores, limits)
            if progress is not None:
                progress(len(scores), len(documents))
        return scores

    def tokenize(
        self, text: str, *, special: bool = False, timeout_s: float | None = None, total_timeout_s: float | None = None
    ) -> list[int]:
        """Return the tokens of a text; `special` adds those that the model puts around each text."""
        return self._post(token_request(text, special), _tokens, Limits(timeout_s, total_timeout_s))

    async def atokenize(
        self, text: str, *, special: bool = False, timeout_s: float | None = None, total_timeout_s: float | None = None
    ) -> list[int]:
        """As `tokenize`, in an event loop."""
        return await self._apost(token_request(text, special), _tokens, Limits(timeout_s, total_timeout_s))

    def close(self) -> None:
        """Close every connection; later calls, and calls under way in other threads, raise `ConnectionError`."""
        self._closed = True
        with quiet():
            self._pooled.close()
            self._fresh.close()

    def _post(self, request: Request, parse: Callable[[Any], Value], limits: Limits) -> Value:
        with self._translated(limits), quiet():
            try:
                response = self._pooled.send(self._built(self._pooled, request, limits))
            except _STALE:
                # Most likely the server closed the connection while it was kept: the request is sent once more, on a
                # new connection.
                response = self._fresh.send(self._built(self._fresh, request, limits))
            return _of_response(response, parse)

    async def _apost(self, request: Request, parse: Callable[[Any], Value], limits: Limits) -> Value:
        with self._translated(limits), quiet():
            response = await self._in_loops.send(self._built(self._in_loops, request, limits))
            return _of_response(response, parse)

    def _built(
        self,
        client: httpx2.Client | httpx2.AsyncClient,
        request: Request,
        limits: Limits,
        connection: Connection | None = None,
    ) -> httpx2.Request:
        if self._closed:
            raise self._closed_error()
        limits.begin()
        timeout = httpx2.Timeout(limits.left_s(), connect=self._connect_timeout_s, pool=None)
        # httpx2's own transport takes the first, and that of event loops the second
        extensions = {} if connection is None else {"trace": connection.trace, "opened": connection.opened}
        headers = authorization(with_scales(self._key, request.scales))
        return client.build_request(
            "POST", request.path, content=request.content(), headers=headers, timeout=timeout, extensions=extensions
        )

    def _closed_error(self) -> ConnectionError:
        return ConnectionError(f"this client of the runner at {self._url} is closed")

    @contextmanager
    def _translated(self, limits: Limits, call: Call | None = None) -> Iterator[None]:
        """Turn httpx2's errors into Python's own and ours; what httpx2 was doing when they came says no more."""
        try:
            yield
        except (EngineError, AnswerTimeout):
            raise
        except (httpx2.ReadTimeout, httpx2.WriteTimeout):
            raise limits.passed() from None
        except Exception as error:
            if call is not None and call.expired:
                raise limits.passed() from None
            if self._closed:  # httpx2 has many errors for this, of several kinds
                raise self._closed_error() from None
            if isinstance(error, httpx2.RequestError):
                if is_out_of_files(error):
                    raise EngineError(503, f"the request was not sent: {OUT_OF_FILES}") from None
                raise ConnectionError(f"the runner at {self._url} cannot be reached: {error}") from None
            raise


def authorization(key: str) -> dict[str, str]:
    """Return the header that has a server's key; none where it has no key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextmanager
def _expiring(call: Call) -> Iterator[None]:
    """End a call when its time has passed."""
    if call.limits.total_s is None:
        yield
        return
    call.limits.begin()  # first: else the timer might end before the time that the limits count
    timer = threading.Timer(call.limits.total_s, call.expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


@contextmanager
def _expiring_in_loop(call: Call) -> Iterator[None]:
    """As `_expiring`, in an event loop."""
    if call.limits.total_s is None:
        yield
        return
    call.limits.begin()
    timer = asyncio.get_running_loop().call_later(call.limits.total_s, call.expire)
    try:
        yield
    finally:
        timer.cancel()


def _has_events(response: httpx2.Response) -> bool:
    return bool(response.headers.get("Content-Type", "").startswith(EVENTS))


def _of_response(response: httpx2.Response, parse: Callable[[Any], Value]) -> Value:
    if response.is_error:
        raise engine_error(response.status_code, response.content)
    return _parsed(response.content, parse)


def _scores(answer: Any) -> list[float]:
    return [float(each["relevance_score"]) for each in sorted(answer["results"], key=lambda each: int(each["index"]))]


def _tokens(answer: Any) -> list[int]:
    return [int(token) for token in answer["tokens"]]


def _vectors(answer: Any) -> list[list[float]]:
    return [each["embedding"] for each in sorted(answer["data"], key=lambda each: int(each["index"]))]


def _parsed(content: bytes, parse: Callable[[Any], Value]) -> Value:
    """Return what `parse` finds in an answer; raises `EngineError` if the answer is of another shape."""
    try:
        return parse(json.loads(content))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        shown = content[:200].decode(errors="replace")
        raise EngineError(500, f"the answer does not have the expected form: {shown}") from None


def engine_error(status_code: int, content: bytes) -> EngineError:
    """Return the error in an answer's body, which is JSON if the engine wrote it."""
    try:
        return _error_of(json.loads(content)["error"], status_code)
    except (ValueError, KeyError, TypeError):
        return EngineError(status_code, content[:2000].decode(errors="replace").strip() or "(no message)")


def _error_of(error: Any, status_code: int) -> EngineError:
    if not isinstance(error, Mapping):
        return EngineError(status_code, str(error))
    code, message = error.get("code"), str(error.get("message", error))
    if _REQUEST_AT_FAULT.search(message):
        code = httpx2.codes.BAD_REQUEST
    for llamas, ours in _ADVICE.items():
        message = message.replace(llamas, ours)
    return EngineError(int(code) if isinstance(code, int) else status_code, message)


class _Events:
    """Reads server-sent events from chunks of any size and yields the pieces of text in them.

    Lines end with a line feed only: httpx2's own lines also end at characters such as U+2028, which llama.cpp sends
    unescaped inside its JSON.
    """

    def __init__(self, partial: PartialAnswer) -> None:
        self._partial = partial
        self._rest = b""  # the beginning of a line whose end has not come yet
        self._done = False

    def feed(self, chunk: bytes) -> Iterator[str]:
        """Yield the pieces that end in this chunk; raises `EngineError` for an error among them."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            name, _, value = line.rstrip(b"\r").partition(b":")
            match name:
                case b"data" if value.strip() == b"[DONE]":
                    self._done = True
                case b"data":
                    if piece := _parsed(value, self._piece):
                        yield piece
                case b"error":
                    raise engine_error(500, b'{"error":' + value + b"}")
                case _:  # comments keep the connection alive; event names and ids are not used here
                    continue

    def finish(self, url: str) -> None:
        """Raise `ConnectionError` if the stream ended before the answer did."""
        if not self._done:
            raise ConnectionError(f"the runner at {url} broke off in the middle of its answer")

    def whole(self, status_code: int, content: bytes) -> Iterator[str]:
        """Yield the text of an answer that came whole; raises `EngineError` if it is an error."""
        if status_code >= httpx2.codes.BAD_REQUEST:
            raise engine_error(status_code, content)
        if piece := _parsed(content, self._whole):
            yield piece

    def _whole(self, answer: Any) -> str:
        """Take in a whole answer, which has a message or a text where events have a part of one."""
        first = answer["choices"][0]
        return self._partial.feed({**answer, "choices": [{**first, "delta": first.get("message"), "index": 0}]})

    def _piece(self, event: Any) -> str:
        """Return the text in one event, or an empty string: the first has only a role, the last only numbers."""
        if "error" in event:
            raise _error_of(event["error"], 500)
        return self._partial.feed(event)


__all__ = ["CONNECT_TIMEOUT_S", "EVENTS", "Call", "Connection", "Limits", "RunnerClient", "authorization"]
