"""A client of one runner's OpenAI-compatible endpoint, for callers with and without an event loop."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, overload
from weakref import WeakKeyDictionary

import httpx

from scheduler.errors.exceptions import OUT_OF_FILES, EngineError, UnsupportedOption, is_out_of_files
from scheduler.errors.formatting import format_duration

Messages = str | Sequence[Mapping[str, Any]]
Answer = TypeVar("Answer")

CONNECT_TIMEOUT_S = 5.0
# llama.cpp's server closes a connection after 5 s without a request, so no connection is kept for as long as that.
_KEEP_S = 4.0
# llama.cpp's advice in the errors of embeddings, and the advice that fits here.
_ADVICE = {
    "Start it with `--embeddings`": "Acquire the model with embedding=True",
    "increase the physical batch size": "shorten it, or acquire the model with a larger num_ctx",
}
# said of a text to embed: the request is at fault, although the server answers 500
_TOO_LONG = "is too large to process"
# The errors of a connection that the server closed while it was kept, or just as a request was sent.
_STALE = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError, httpx.ConnectError)


class RunnerClient:
    """A client of one runner at `url` (scheme, host and port) with its `key`.

    Several threads may use a client at once.

    Every method takes the engine's own request parameters by name (`max_tokens`, `temperature`, …) and `timeout_s`, the
    longest silence that is allowed, in seconds; None, which is the default, is without limit. A method returns one
    text: `UnsupportedOption` refuses parameters that would return more (`n`, `tools`). All raise `EngineError` if the
    runner answers with an error, `ConnectionError` if it does not answer or breaks off, and `TimeoutError` after
    `timeout_s`. A request is sent at most twice, and never again once its answer has begun.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        transport: httpx.MockTransport | None = None,  # answers in the server's place
    ) -> None:
        self._url = url
        self._connect_timeout_s = connect_timeout_s
        # A runner is on this machine: no proxy is asked, and no certificates are loaded, which takes 30 ms.
        self._arguments: dict[str, Any] = {
            "base_url": url,
            "headers": {"Authorization": f"Bearer {key}"},
            "trust_env": False,
            "verify": url.startswith("https:"),
            "transport": transport,
        }
        self._pooled = httpx.Client(limits=httpx.Limits(keepalive_expiry=_KEEP_S), **self._arguments)
        self._fresh = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), **self._arguments)
        self._of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()

    def chat(self, messages: Messages, *, timeout_s: float | None = None, **parameters: Any) -> str:
        """Return the whole answer to `messages`, a list of role and content, or one string that the user says."""
        return self._post(_chat_request(messages, parameters), _chat_text, timeout_s)

    def complete(self, prompt: str, *, timeout_s: float | None = None, **parameters: Any) -> str:
        """Return the text that follows `prompt`."""
        return self._post(_completion_request(prompt, parameters), _completion_text, timeout_s)

    def stream(
        self, messages: Messages, *, timeout_s: float | None = None, **parameters: Any
    ) -> Generator[str, None, None]:
        """Yield the answer to `messages` piece by piece; the request is sent when the first piece is requested.

        Closing the iterator stops the runner's work on the answer.
        """
        pieces = _Pieces()
        with self._send(_chat_request(messages, parameters, stream=True), timeout_s) as response:
            for chunk in response.iter_bytes():
                yield from pieces.feed(chunk)
            pieces.finish(self._url)

    @overload
    def embed(self, text: str, *, timeout_s: float | None = None, **parameters: Any) -> list[float]: ...
    @overload
    def embed(self, text: Sequence[str], *, timeout_s: float | None = None, **parameters: Any) -> list[list[float]]: ...
    def embed(
        self, text: str | Sequence[str], *, timeout_s: float | None = None, **parameters: Any
    ) -> list[float] | list[list[float]]:
        """Return the vector of one string, or the vectors of several in their order."""
        vectors = self._post(_embedding_request(text, parameters), _vectors, timeout_s)
        return vectors[0] if isinstance(text, str) else vectors

    async def achat(self, messages: Messages, *, timeout_s: float | None = None, **parameters: Any) -> str:
        """As `chat`, in an event loop."""
        return await self._apost(_chat_request(messages, parameters), _chat_text, timeout_s)

    async def acomplete(self, prompt: str, *, timeout_s: float | None = None, **parameters: Any) -> str:
        """As `complete`, in an event loop."""
        return await self._apost(_completion_request(prompt, parameters), _completion_text, timeout_s)

    async def astream(
        self,
        messages: Messages,
        *,
        connection: Connection | None = None,
        timeout_s: float | None = None,
        **parameters: Any,
    ) -> AsyncGenerator[str, None]:
        """As `stream`, in an event loop.

        `connection` holds the connection too, to be cut where no loop is left to close it.
        """
        pieces, request = _Pieces(), _chat_request(messages, parameters, stream=True)
        with self._translated(timeout_s):
            async with aclosing(await self._asend(request, timeout_s)) as response:
                if connection is not None:
                    connection.response = response
                async for chunk in response.aiter_bytes():
                    for piece in pieces.feed(chunk):
                        yield piece
                pieces.finish(self._url)

    @overload
    async def aembed(self, text: str, *, timeout_s: float | None = None, **parameters: Any) -> list[float]: ...
    @overload
    async def aembed(
        self, text: Sequence[str], *, timeout_s: float | None = None, **parameters: Any
    ) -> list[list[float]]: ...
    async def aembed(
        self, text: str | Sequence[str], *, timeout_s: float | None = None, **parameters: Any
    ) -> list[float] | list[list[float]]:
        """As `embed`, in an event loop."""
        vectors = await self._apost(_embedding_request(text, parameters), _vectors, timeout_s)
        return vectors[0] if isinstance(text, str) else vectors

    def close(self) -> None:
        """Close every connection; later calls, and calls under way in other threads, raise `ConnectionError`."""
        self._pooled.close()
        self._fresh.close()
        self._drop_ended_loops()

    async def aclose(self) -> None:
        """Close the running event loop's client, and then the others as `close` does."""
        client = self._of_loops.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()
        self.close()

    def _post(self, request: _Request, parse: Callable[[Any], Answer], timeout_s: float | None) -> Answer:
        with self._send(request, timeout_s) as response:
            return _parsed(response.read(), parse)

    async def _apost(self, request: _Request, parse: Callable[[Any], Answer], timeout_s: float | None) -> Answer:
        with self._translated(timeout_s):
            async with aclosing(await self._asend(request, timeout_s)) as response:
                return _parsed(await response.aread(), parse)

    @contextmanager
    def _send(self, request: _Request, timeout_s: float | None) -> Iterator[httpx.Response]:
        """Send a request and yield its answer, of which only the head has been read."""
        with self._translated(timeout_s):
            try:
                response = self._pooled.send(self._built(self._pooled, request, timeout_s), stream=True)
            except _STALE:
                # Most likely the server closed the connection while it was kept: the request is sent once more, on a
                # new connection.
                response = self._fresh.send(self._built(self._fresh, request, timeout_s), stream=True)
            try:
                if response.is_error:
                    raise _engine_error(response.status_code, response.read())
                yield response
            finally:
                response.close()

    async def _asend(self, request: _Request, timeout_s: float | None) -> httpx.Response:
        """As `_send`, each time on a new connection, so that no connection can be stale.

        The caller closes the answer.

        This is no generator as `_send` is: a loop that ends closes all generators at once, a stream and what it is
        awaiting.
        """
        client = self._of_running_loop()
        response = await client.send(self._built(client, request, timeout_s), stream=True)
        if response.is_error:
            async with aclosing(response):
                raise _engine_error(response.status_code, await response.aread())
        return response

    def _of_running_loop(self) -> httpx.AsyncClient:
        """Return the running loop's client, since connections and locks belong to a loop.

        The client keeps no connection between calls: it could not be closed once its loop has ended. That costs 0.6 ms
        a call.
        """
        loop = asyncio.get_running_loop()
        client = self._of_loops.get(loop)
        if client is None:
            self._drop_ended_loops()
            client = httpx.AsyncClient(limits=httpx.Limits(max_keepalive_connections=0), **self._arguments)
            self._of_loops[loop] = client
        return client

    def _drop_ended_loops(self) -> None:
        """Forget the clients of loops that have ended: an open connection would keep its loop alive for ever."""
        for reference in self._of_loops.keyrefs():
            if (loop := reference()) is not None and loop.is_closed():
                self._of_loops.pop(loop, None)

    def _built(
        self, client: httpx.Client | httpx.AsyncClient, request: _Request, timeout_s: float | None
    ) -> httpx.Request:
        if self._pooled.is_closed:
            raise ConnectionError(f"this client of the runner at {self._url} is closed")
        timeout = httpx.Timeout(timeout_s, connect=self._connect_timeout_s, pool=None)
        return client.build_request("POST", request.path, json=request.body, timeout=timeout)

    @contextmanager
    def _translated(self, timeout_s: float | None) -> Iterator[None]:
        """Turn httpx's errors into Python's own."""
        try:
            yield
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            limit = format_duration(timeout_s or 0.0)
            raise TimeoutError(f"the runner at {self._url} was silent for {limit}: allow it more") from error
        except httpx.RequestError as error:
            if is_out_of_files(error):
                raise EngineError(503, f"the request was not sent: {OUT_OF_FILES}") from error
            raise ConnectionError(f"the runner at {self._url} cannot be reached: {error}") from error


@dataclass(slots=True)
class Connection:
    """The connection of an answer that is streamed in an event loop, once the answer has begun."""

    response: httpx.Response | None = None

    def cut(self) -> None:
        """End the connection, so that the runner stops its work; from any thread, and whether or not the loop runs."""
        if self.response is not None:
            # the connection was closed before, or the loop's sockets cannot be shut down
            with suppress(OSError, TypeError):
                self.response.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True)
class _Request:
    """A request of a caller with or without an event loop."""

    path: str
    body: dict[str, Any]


def _check(parameters: Mapping[str, Any]) -> None:
    """Raise `UnsupportedOption` for parameters whose answer would be more than the one text that is returned."""
    if parameters.get("n") not in (None, 1):
        raise UnsupportedOption("n", parameters["n"], "one answer is returned: ask once for each")
    for name in ("tools", "functions"):
        if parameters.get(name):
            advice = "text is returned, and no calls: point an OpenAI client to the lease's url, with its api_key"
            raise UnsupportedOption(name, parameters[name], advice)


def _chat_request(messages: Messages, parameters: Mapping[str, Any], *, stream: bool = False) -> _Request:
    _check(parameters)
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return _Request("/v1/chat/completions", {**parameters, "messages": said, "stream": stream})


def _completion_request(prompt: str, parameters: Mapping[str, Any]) -> _Request:
    _check(parameters)
    if not isinstance(prompt, str):
        raise UnsupportedOption("prompt", prompt, "it must be one text: ask once for each")
    return _Request("/v1/completions", {**parameters, "prompt": prompt, "stream": False})


def _embedding_request(text: str | Sequence[str], parameters: Mapping[str, Any]) -> _Request:
    return _Request("/v1/embeddings", {**parameters, "input": [text] if isinstance(text, str) else list(text)})


def _chat_text(answer: Any) -> str:
    return answer["choices"][0]["message"]["content"] or ""  # it may be null


def _completion_text(answer: Any) -> str:
    return str(answer["choices"][0]["text"])


def _vectors(answer: Any) -> list[list[float]]:
    return [each["embedding"] for each in sorted(answer["data"], key=lambda each: int(each["index"]))]


def _parsed(content: bytes, parse: Callable[[Any], Answer]) -> Answer:
    """Return what `parse` finds in an answer; raises `EngineError` if the answer is of another shape."""
    try:
        return parse(json.loads(content))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        shown = content[:200].decode(errors="replace")
        raise EngineError(500, f"the answer does not have the expected form: {shown}") from error


def _engine_error(status_code: int, content: bytes) -> EngineError:
    """Return the error in an answer's body, which is JSON if the engine wrote it."""
    try:
        return _error_of(json.loads(content)["error"], status_code)
    except (ValueError, KeyError, TypeError):
        return EngineError(status_code, content[:2000].decode(errors="replace").strip() or "(no message)")


def _error_of(error: Any, status_code: int) -> EngineError:
    if not isinstance(error, Mapping):
        return EngineError(status_code, str(error))
    code, message = error.get("code"), str(error.get("message", error))
    if _TOO_LONG in message:
        code = httpx.codes.BAD_REQUEST
    for llamas, ours in _ADVICE.items():
        message = message.replace(llamas, ours)
    return EngineError(int(code) if isinstance(code, int) else status_code, message)


class _Pieces:
    """Reads server-sent events from chunks of any size and yields the pieces of text in them.

    Lines end with a line feed only: httpx's own lines also end at characters such as U+2028, which llama.cpp sends
    unescaped inside its JSON.
    """

    def __init__(self) -> None:
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
                    if piece := _parsed(value, _piece):
                        yield piece
                case b"error":
                    raise _engine_error(500, b'{"error":' + value + b"}")
                case _:  # comments keep the connection alive; event names and ids are not used here
                    continue

    def finish(self, url: str) -> None:
        """Raise `ConnectionError` if the stream ended before the answer did."""
        if not self._done:
            raise ConnectionError(f"the runner at {url} broke off in the middle of its answer")


def _piece(event: Any) -> str:
    """Return the text in one event, or an empty string: the first event only has a role, the last only numbers."""
    if "error" in event:
        raise _error_of(event["error"], 500)
    first = [choice for choice in event["choices"] if choice.get("index", 0) == 0]
    return (first[0]["delta"].get("content") or "") if first else ""


__all__ = ["CONNECT_TIMEOUT_S", "Connection", "Messages", "RunnerClient"]
