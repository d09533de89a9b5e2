"""A lease: the right to use a runner until the lease is released."""

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

_IS_OBJECT = "it is an object without a server: use the value of the lease"


def _silence_s(timeout: str | float | None) -> float | None:
    """Return how many seconds a runner may be silent, None for ever; raises `InvalidSettings` for another value."""
    if timeout is None:
        return None
    silence_s = parse_duration(timeout, name="timeout")
    if silence_s == 0:
        raise InvalidSettings("timeout", timeout, "a duration longer than 0")
    return wait_limit(silence_s)


class Lease(NonCopyable):
    """A runner that serves for as long as its lease is held: it is not stopped before `release`, unless it crashes.

    Use a lease in a `with` block, or call `release`; a second call is harmless. A lease that is lost to the garbage
    collector is released with a `ResourceWarning`. Methods that talk to the runner raise `RunnerCrashed` when it is
    gone, `LeaseReleased` after the release, and `EngineError` when the engine refuses; methods that begin with `a` are
    awaited.
    """

    __slots__ = ("__weakref__", "_broker", "_lock", "_pending", "_released", "_streams")

    def __init__(self, broker: RequestBroker, pending: PendingRequest) -> None:
        self._broker = broker
        self._pending = pending
        self._released = False
        self._streams = 0  # open streams; the lease is released after the last
        self._lock = threading.RLock()  # guards `_streams` and `_released`; re-entered by the finaliser of a stream

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def model(self) -> str:
        """The model's name."""
        return self._pending.model

    @property
    def runner(self) -> RunnerId:
        """The id of the runner; no later runner has the same id."""
        assert self._pending.runner is not None, "a lease is granted with a runner"
        return self._pending.runner.runner

    @property
    def pid(self) -> int | None:
        """The process of the runner; None for an object."""
        process = self._pending.runner.process if self._pending.runner else None
        return process.pid if process is not None else None

    @property
    def url(self) -> str:
        """The address of the runner's own OpenAI-compatible server; requests need `api_key` as a bearer token."""
        return self._endpoint().url

    @property
    def api_key(self) -> str:
        """The key of this runner's server."""
        return self._endpoint().key

    @property
    def value(self) -> Any:
        """The object itself, where the model is one (`PythonModel`)."""
        self._check()
        assert self._pending.runner is not None, "a lease is granted with a runner"
        return self._pending.runner.value

    @property
    def lost(self) -> bool:
        """Whether the runner is gone, so that it cannot be used any more."""
        return bool(self._pending.lost)

    @property
    def wanted(self) -> bool:
        """Whether other requests wait for the runner's memory: a holder that keeps leases long should release it."""
        return self._pending.wanted

    def on_lost(self, callback: Callable[[], object]) -> None:
        """Have `callback` called from another thread, once, when the runner is gone; at once if it is."""
        self._broker.add_listener(self._pending, "lost", callback)

    def on_wanted(self, callback: Callable[[], object]) -> None:
        """Have `callback` called from another thread, once, when other requests wait for the runner's memory.

        The callback is called at once if requests wait already.
        """
        self._broker.add_listener(self._pending, "wanted", callback)

    # -- its end ------------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Release the lease, at once or after its last open stream is exhausted or closed."""
        with self._lock:
            self._released = True
            if self._streams:
                return
        self._broker.release(self._pending)

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
        if not hasattr(self, "_lock"):  # Ctrl-C came while the lease was made, before anything was requested
            return
        if self._broker.release(self._pending) and not self._released:
            warnings.warn(f"a lease on {self.model} was never released", ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        state = "lost" if self.lost else "released" if self._released else "held"
        return f"<Lease {self._pending.id} on {self.model}: {state}>"

    # -- its use ------------------------------------------------------------------------------------------------------

    def chat(self, messages: Messages, *, timeout: str | float | None = None, **parameters: Any) -> str:
        """Return the answer to a chat; `parameters` are those of OpenAI's chat completions.

        `timeout` is the longest silence that is allowed; a longer one raises `TimeoutError`.
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
        """Return the vector of a text, or the vectors of several; the model must be acquired with `embedding=True`."""
        with self._talking():
            return self._client().embed(text, timeout_s=_silence_s(timeout), **parameters)

    def stream(self, messages: Messages, *, timeout: str | float | None = None, **parameters: Any) -> Stream:
        """Return the answer to a chat piece by piece; the stream holds the lease until it is exhausted or closed."""
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
        if self._pending.lost:
            raise RunnerCrashed(self.model, self.runner, self._pending.lost, self._pending.closed)
        if self._released and not self._streams:
            raise LeaseReleased(self.model)

    def _endpoint(self) -> Endpoint:
        self._broker.check()  # first: what a fork sends on an inherited connection would mix with its parent's answers
        self._check()
        endpoint = self._pending.runner.endpoint if self._pending.runner else None
        if endpoint is None:
            raise UnsupportedOption("model", self.model, _IS_OBJECT)
        return endpoint

    def _client(self) -> RunnerClient:
        self._broker.check()
        self._check()
        client = self._pending.runner.client if self._pending.runner else None
        if client is None:
            raise UnsupportedOption("model", self.model, _IS_OBJECT)
        return client

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Check the runner when its connection breaks: it is most likely gone, and its exit reported a moment later."""
        try:
            yield
        except ConnectionError as error:
            self._broker.verify_runner(self._pending)
            raise RunnerCrashed(
                self.model, self.runner, self._pending.lost or str(error), self._pending.closed
            ) from error

    async def _awaiting(self, answer: Awaitable[Answer]) -> Answer:
        """As `_talking`; the event loop goes on meanwhile."""
        try:
            return await answer
        except ConnectionError as error:
            await asyncio.to_thread(self._broker.verify_runner, self._pending)
            raise RunnerCrashed(
                self.model, self.runner, self._pending.lost or str(error), self._pending.closed
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
            self._broker.release(self._pending)


class Stream(NonCopyable, Iterator[str]):
    """The pieces of an answer; holds its lease until it is exhausted, closed, or lost to the garbage collector."""

    def __init__(self, lease: Lease, pieces: Generator[str, None, None]) -> None:
        self._pieces = pieces
        self._lease: Lease | None = lease  # None: released
        self._unwanted = False  # closed while another thread was reading
        lease._begin_stream()

    def __next__(self) -> str:
        if (lease := self._lease) is None:
            raise StopIteration
        lease._broker.check()
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
        """End the answer here, and the engine's work on it; a second call is harmless.

        While another thread waits for the next piece, the stream ends with that piece.
        """
        lease, self._lease = self._lease, None
        if lease is None or lease._broker.forked:
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
        lease._broker.check()
        try:
            return await lease._awaiting(anext(self._pieces))
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """End the answer here; a second call is harmless."""
        lease, self._lease = self._lease, None
        if lease is not None and not lease._broker.forked:
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
        if lease is not None and not lease._broker.forked:
            self._connection.cut()  # the event loop closes the generator, unless the loop ends before
            lease._end_stream()
