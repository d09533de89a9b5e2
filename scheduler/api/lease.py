"""A lease: the right to use a runner until it is given back."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

from fsm.machine.runner import RunnerId
from scheduler.config.quantities import parse_duration, wait_limit
from scheduler.engines.interface import Endpoint
from scheduler.engines.runner_client import Answer, Connection, Messages, RunnerClient
from scheduler.errors.exceptions import InvalidSettings, LeaseReleased, RunnerCrashed, UnsupportedOption
from scheduler.runtime.pending_request import NonCopyable, PendingRequest

if TYPE_CHECKING:
    from scheduler.runtime.request_broker import RequestBroker

_IS_OBJECT = "it is an object without a server: use the lease's value"


def _silence_s(timeout: str | float | None) -> float | None:
    """Return how long a runner may be silent, None for ever; raises `InvalidSettings` for what is no such time."""
    if timeout is None:
        return None
    silence_s = parse_duration(timeout, name="timeout")
    if silence_s == 0:
        raise InvalidSettings("timeout", timeout, "a duration longer than 0")
    return wait_limit(silence_s)


class Lease(NonCopyable):
    """A runner that serves, for as long as this is held: it is not stopped before `release`, unless it crashes.

    Use it in a `with` block, or call `release`; twice is harmless. One that is lost to the garbage collector is
    released with a `ResourceWarning`. Methods that talk to the runner raise `RunnerCrashed` when it is gone,
    `LeaseReleased` after the release, and `EngineError` when the engine refuses; those that begin with `a` are awaited.
    """

    __slots__ = ("__weakref__", "_desk", "_lock", "_released", "_streams", "_ticket")

    def __init__(self, desk: RequestBroker, ticket: PendingRequest) -> None:
        self._desk = desk
        self._ticket = ticket
        self._released = False
        self._streams = 0  # open streams; the runner is given back after the last
        self._lock = threading.RLock()  # guards the two above; re-entered by the finaliser of a stream

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def model(self) -> str:
        """The model's name."""
        return self._ticket.model

    @property
    def runner(self) -> RunnerId:
        """The id of the runner; never used again for another."""
        assert self._ticket.runner is not None, "a lease is granted with a runner"
        return self._ticket.runner.runner

    @property
    def pid(self) -> int | None:
        """The process of the runner; None for an object."""
        process = self._ticket.runner.process if self._ticket.runner else None
        return process.pid if process is not None else None

    @property
    def url(self) -> str:
        """Where the runner's own OpenAI-compatible server listens; requests need `api_key` as a bearer token."""
        return self._endpoint().url

    @property
    def api_key(self) -> str:
        """The key of this life of the runner."""
        return self._endpoint().key

    @property
    def value(self) -> Any:
        """The object itself, where the model is one (`PythonModel`)."""
        self._check()
        assert self._ticket.runner is not None, "a lease is granted with a runner"
        return self._ticket.runner.value

    @property
    def lost(self) -> bool:
        """Whether the runner is gone, so that nothing more can be had from it."""
        return bool(self._ticket.lost)

    @property
    def wanted(self) -> bool:
        """Whether others wait for the runner's memory: a long holder does well to give it back."""
        return self._ticket.wanted

    def on_lost(self, callback: Callable[[], object]) -> None:
        """Have `callback` called from another thread, once, when the runner is gone; at once if it is."""
        self._desk.add_listener(self._ticket, "lost", callback)

    def on_wanted(self, callback: Callable[[], object]) -> None:
        """Have `callback` called from another thread, once, when others wait for its memory; at once if they do."""
        self._desk.add_listener(self._ticket, "wanted", callback)

    # -- its end ------------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Give the runner back; once its open streams are exhausted or closed, where there are any."""
        with self._lock:
            self._released = True
            if self._streams:
                return
        self._desk.release(self._ticket)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if not hasattr(self, "_lock"):  # Ctrl-C came while it was made, before anything was asked for
            return
        if self._desk.release(self._ticket) and not self._released:
            warnings.warn(f"a lease on {self.model} was never released", ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        state = "lost" if self.lost else "released" if self._released else "held"
        return f"<Lease {self._ticket.id} on {self.model}: {state}>"

    # -- its use ------------------------------------------------------------------------------------------------------

    def chat(self, messages: Messages, *, timeout: str | float | None = None, **parameters: Any) -> str:
        """Return the answer to a chat; `parameters` are those of OpenAI's chat completions.

        `timeout` is the longest silence that is put up with, then `TimeoutError`.
        """
        with self._talking():
            return self._client().chat(messages, timeout_s=_silence_s(timeout), **parameters)

    def complete(self, prompt: str, *, timeout: str | float | None = None, **parameters: Any) -> str:
        """Return the continuation of a prompt."""
        with self._talking():
            return self._client().complete(prompt, timeout_s=_silence_s(timeout), **parameters)

    @overload
    def embed(self, text: str, *, timeout: str | float | None = None, **parameters: Any) -> list[float]: ...
    @overload
    def embed(
        self, text: Sequence[str], *, timeout: str | float | None = None, **parameters: Any
    ) -> list[list[float]]: ...
    def embed(
        self, text: str | Sequence[str], *, timeout: str | float | None = None, **parameters: Any
    ) -> list[float] | list[list[float]]:
        """Return the vector of a text, or those of several; the model must be asked for with `embedding=True`."""
        with self._talking():
            return self._client().embed(text, timeout_s=_silence_s(timeout), **parameters)

    def stream(self, messages: Messages, *, timeout: str | float | None = None, **parameters: Any) -> Stream:
        """Return the answer to a chat piece by piece; holds the lease until it is exhausted or closed."""
        return Stream(self, self._client().stream(messages, timeout_s=_silence_s(timeout), **parameters))

    async def achat(self, messages: Messages, *, timeout: str | float | None = None, **parameters: Any) -> str:
        """Like `chat`."""
        return await self._awaiting(self._client().achat(messages, timeout_s=_silence_s(timeout), **parameters))

    async def acomplete(self, prompt: str, *, timeout: str | float | None = None, **parameters: Any) -> str:
        """Like `complete`."""
        return await self._awaiting(self._client().acomplete(prompt, timeout_s=_silence_s(timeout), **parameters))

    @overload
    async def aembed(self, text: str, *, timeout: str | float | None = None, **parameters: Any) -> list[float]: ...
    @overload
    async def aembed(
        self, text: Sequence[str], *, timeout: str | float | None = None, **parameters: Any
    ) -> list[list[float]]: ...
    async def aembed(
        self, text: str | Sequence[str], *, timeout: str | float | None = None, **parameters: Any
    ) -> list[float] | list[list[float]]:
        """Like `embed`."""
        return await self._awaiting(self._client().aembed(text, timeout_s=_silence_s(timeout), **parameters))

    def astream(self, messages: Messages, *, timeout: str | float | None = None, **parameters: Any) -> AsyncStream:
        """Like `stream`, for `async for`."""
        connection = Connection()
        pieces = self._client().astream(messages, connection=connection, timeout_s=_silence_s(timeout), **parameters)
        return AsyncStream(self, pieces, connection)

    def _check(self) -> None:
        if self._ticket.lost:
            raise RunnerCrashed(self.model, self.runner, self._ticket.lost, self._ticket.closed)
        if self._released and not self._streams:
            raise LeaseReleased(self.model)

    def _endpoint(self) -> Endpoint:
        self._desk.check()  # first: what a fork sends on an inherited connection ends up in its parent's answers
        self._check()
        endpoint = self._ticket.runner.endpoint if self._ticket.runner else None
        if endpoint is None:
            raise UnsupportedOption("model", self.model, _IS_OBJECT)
        return endpoint

    def _client(self) -> RunnerClient:
        self._desk.check()
        self._check()
        client = self._ticket.runner.client if self._ticket.runner else None
        if client is None:
            raise UnsupportedOption("model", self.model, _IS_OBJECT)
        return client

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """A connection that breaks means that the runner is gone; the exit that says why may be a moment behind."""
        try:
            yield
        except ConnectionError as error:
            self._desk.verify_runner(self._ticket)
            raise RunnerCrashed(
                self.model, self.runner, self._ticket.lost or str(error), self._ticket.closed
            ) from error

    async def _awaiting(self, answer: Awaitable[Answer]) -> Answer:
        """As `_talking`; the event loop goes on meanwhile."""
        try:
            return await answer
        except ConnectionError as error:
            await asyncio.to_thread(self._desk.verify_runner, self._ticket)
            raise RunnerCrashed(
                self.model, self.runner, self._ticket.lost or str(error), self._ticket.closed
            ) from error

    def _begin_stream(self) -> None:
        with self._lock:
            self._check()
            self._streams += 1

    def _end_stream(self) -> None:
        with self._lock:
            self._streams -= 1
            last = self._released and not self._streams
        if last:
            self._desk.release(self._ticket)


class Stream(NonCopyable, Iterator[str]):
    """The pieces of an answer. Holds its lease until it is exhausted, closed, or lost to the garbage collector."""

    def __init__(self, lease: Lease, pieces: Generator[str, None, None]) -> None:
        self._pieces = pieces
        self._lease: Lease | None = lease  # None: given back
        self._unwanted = False  # closed while another thread was reading
        lease._begin_stream()

    def __next__(self) -> str:
        if (lease := self._lease) is None:
            raise StopIteration
        lease._desk.check()
        try:
            with lease._talking():
                piece = next(self._pieces)
            if self._unwanted:
                raise StopIteration
            return piece
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the answer here; the engine stops working on it. Twice is harmless.

        While another thread waits for the next piece, it ends with that.
        """
        lease, self._lease = self._lease, None
        if lease is None or lease._desk.forked:
            return
        try:
            self._pieces.close()
        except ValueError:  # another thread is reading
            self._unwanted, self._lease = True, lease
            return
        except BaseException:
            lease._end_stream()
            raise
        lease._end_stream()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_lease", None) is not None:
            self.close()


class AsyncStream(NonCopyable, AsyncIterator[str]):
    """Like `Stream`, for `async for`."""

    def __init__(self, lease: Lease, pieces: AsyncGenerator[str, None], connection: Connection) -> None:
        self._pieces = pieces
        self._connection = connection
        self._lease: Lease | None = lease
        lease._begin_stream()

    async def __anext__(self) -> str:
        if (lease := self._lease) is None:
            raise StopAsyncIteration
        lease._desk.check()
        try:
            return await lease._awaiting(anext(self._pieces))
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """End the answer here. Twice is harmless."""
        lease, self._lease = self._lease, None
        if lease is not None and not lease._desk.forked:
            try:
                await self._pieces.aclose()
            finally:
                lease._end_stream()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        lease = getattr(self, "_lease", None)
        if lease is not None and not lease._desk.forked:
            self._connection.cut()  # its event loop closes the generator, unless it ends before
            lease._end_stream()
