"""A lease: the right to use a runner until the lease is released."""

from __future__ import annotations

import asyncio
import functools
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, cast, overload

from fsm.machine.runner import RunnerId
from scheduler.api.streams import AsyncStream, Stream
from scheduler.concurrency.event_loops import warn_if_loop_runs
from scheduler.config.quantities import parse_duration, wait_limit
from scheduler.engines.answer import Answer
from scheduler.engines.answer_requests import Messages
from scheduler.engines.interface import Endpoint, with_scales
from scheduler.engines.object_calls import ObjectCalls, ObjectProxy
from scheduler.engines.python import Value
from scheduler.errors.exceptions import InvalidSettings, LeaseReleased, RunnerCrashed, UnsupportedOption
from scheduler.errors.formatting import printable
from scheduler.runtime.lease_holders import this_asker
from scheduler.runtime.pending_request import NonCopyable, PendingRequest

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

    from scheduler.engines.runner_client import Progress, RunnerClient
    from scheduler.models.chat_defaults import ChatDefaults
    from scheduler.runtime.request_broker import RequestBroker

_IS_OBJECT = "it is an object without a server: use the value of the lease"


def _limits(timeout: str | float | None, total_timeout: str | float | None) -> dict[str, float | None]:
    """Return the limits of a call in seconds, None for ever; raises `InvalidSettings` for another value."""
    return {
        "timeout_s": _limit_s("timeout", timeout),
        "total_timeout_s": _limit_s("total_timeout", total_timeout),
    }


def _limit_s(name: str, value: str | float | None) -> float | None:
    if value is None:
        return None
    limit_s = parse_duration(value, name=name)
    if limit_s == 0:
        raise InvalidSettings(name, value, "a duration longer than 0")
    return wait_limit(limit_s)


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Raise `UnsupportedOption` where a package of an extra of the same name is not installed."""
    try:
        yield
    except ImportError:
        how = f"the package is not installed: pip install 'loadmaster[{name}]'"
        raise UnsupportedOption("client", name, how) from None


class Lease(NonCopyable, Generic[Value]):
    """A runner that serves for as long as its lease is held: it is not stopped before `release`, unless it crashes.

    Use a lease in a `with` block, or call `release`; a second call is harmless. A lease that is lost to the garbage
    collector is released with a `ResourceWarning`. Methods that talk to the runner raise `RunnerCrashed` when it is
    gone, `LeaseReleased` after the release, and `EngineError` when the engine refuses; methods that begin with `a` are
    awaited.
    """

    __slots__ = ("__weakref__", "_broker", "_ended", "_entered", "_holder", "_lock", "_pending", "_released", "_uses")

    def __init__(self, broker: RequestBroker, pending: PendingRequest) -> None:
        self._broker = broker
        self._pending = pending
        self._released = False
        self._holder: object = None  # the thread or task that holds it, as far as is known
        self._entered = False  # in a `with` block of the holder
        self._uses = 0  # answers and open streams under way; the lease is released after the last
        self._lock = threading.RLock()  # guards `_uses` and `_released`; re-entered by the finaliser of a stream
        self._ended = False  # released, and nothing is left of it

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
        """The process of the runner; None for an object in this process."""
        process = self._pending.runner.process if self._pending.runner else None
        return process.pid if process is not None else None

    @property
    def url(self) -> str:
        """The address of the runner's own server; requests need `api_key` as a bearer token.

        OpenAI's API is under `/v1` there. A user of the address has to stop before the release: the runner may end
        at any time after it. A client of `openai` knows that by itself.
        """
        return self._endpoint().url

    @property
    def api_key(self) -> str:
        """The key of this runner's server; where the model has adapters to choose from, it says which are chosen."""
        return with_scales(self._endpoint().key, self._pending.scales)

    @property
    def value(self) -> Value:
        """The object itself, where the model is one (`PythonModel`); every other lease on it has the same object.

        Of an object in a process of its own, what calls its methods there.
        """
        self._check()
        assert self._pending.runner is not None, "a lease is granted with a runner"
        found = self._pending.runner.value
        if isinstance(found, ObjectCalls):
            return cast(Value, ObjectProxy(functools.partial(self._called, found)))
        return cast(Value, found)

    @property
    def lost(self) -> bool:
        """Whether the runner is gone, so that it cannot be used any more."""
        return bool(self._pending.lost)

    @property
    def wanted(self) -> bool:
        """Whether other requests wait for the runner's memory now: a long holder does well to release its lease."""
        return self._broker.is_wanted(self._pending)

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
        """Release the lease, at once or when what is under way has ended: answers, and streams until they are closed.

        Nothing new is begun after it.
        """
        with self._lock:
            self._released = True
            if self._uses:
                return
        self._broker.release(self._pending)
        self._broker.holders.drop(self._holder, self._pending.id)
        self._ended = True

    def __enter__(self) -> Self:
        if threading.get_ident() != self._holder:  # it is entered elsewhere than it was granted, or in a task
            self._hold(this_asker())
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    async def __aenter__(self) -> Self:
        self._hold(this_asker(), entered=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_ended", True):  # without it Ctrl-C came while the lease was made, before a request
            return
        self._broker.holders.drop(self._holder, self._pending.id)
        if self._broker.release(self._pending) and not self._released:
            warnings.warn(
                f"a lease on {printable(self.model)} was never released", ResourceWarning, stacklevel=2, source=self
            )

    def _hold(self, asker: object, *, entered: bool = False) -> None:
        """Note that a thread or task holds the lease from now on."""
        if asker != self._holder:
            holders = self._broker.holders
            if self._holder is not None:
                holders.drop(self._holder, self._pending.id)
            holders.hold(asker, self._pending.id, self)
            self._holder = asker
        self._entered = entered

    def _kept(self) -> bool:
        """Tell whether the lease is released by its holder alone, as far as the lease knows."""
        return self._entered and not (self._uses or self._released or self._pending.callbacks)

    def __repr__(self) -> str:
        state = "lost" if self.lost else "released" if self._released else "held"
        return f"<Lease {self._pending.id} on {printable(self.model)}: {state}>"

    # -- its use ------------------------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Messages,
        *,
        timeout: str | float | None = None,
        total_timeout: str | float | None = None,
        **parameters: Any,
    ) -> Answer:
        """Return the answer to a chat; `parameters` are those of OpenAI's chat completions, and llama.cpp's own.

        `timeout` is the longest silence that is allowed, in which no token is computed, and `total_timeout` the longest
        time until the answer is complete; a longer one raises `AnswerTimeout`.
        """
        call = self._client().chat_call(messages, *self._asked, **_limits(timeout, total_timeout), **parameters)
        with self._using() as client:
            return client.answer(call)

    def complete(
        self,
        prompt: str,
        *,
        timeout: str | float | None = None,
        total_timeout: str | float | None = None,
        **parameters: Any,
    ) -> Answer:
        """Return the continuation of a prompt; limits and parameters are those of `chat`."""
        call = self._client().completion_call(prompt, *self._asked, **_limits(timeout, total_timeout), **parameters)
        with self._using() as client:
            return client.answer(call)

    def stream(
        self,
        messages: Messages,
        *,
        timeout: str | float | None = None,
        total_timeout: str | float | None = None,
        **parameters: Any,
    ) -> Stream:
        """Return the answer to a chat piece by piece; the stream holds the lease until it is exhausted or closed."""
        client = self._client()
        call = client.chat_call(messages, *self._asked, **_limits(timeout, total_timeout), **parameters)
        return Stream(self, client, call)

    @overload
    def embed(
        self,
        text: str,
        *,
        timeout: str | float | None = None,
        total_timeout: str | float | None = None,
        **parameters: Any,
    ) -> list[float]: ...
    @overload
    def embed(
        self,
        text: Sequence[str],
        *,
        progress: Progress | None = None,
        timeout: str | float | None = None,
        total_timeout: str | float | None = None,
        **parameters: Any,
    ) -> list[list[float]]: ...
    def embed(
        self,
        text: str | Sequence[str],
        *,
        progress: Progress | None = None,
        timeout: str | float | None = None,
        total_timeout: str | float | None = None,
        **parameters: Any,
    ) -> list[float] | list[list[float]]:
        """Return the vector of a text, or the vectors of several; the model must be acquired with `embedding=True`.

        Many texts are computed a few at a time: `timeout` is the longest silence between them, and `progress` is called
        with the number of texts done and the number of all after each.
        """
        limits = _limits(timeout, total_timeout)
        with self._using(embeds=True) as client:
            return client.embed(text, progress=progress, **limits, **parameters)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        progress: Progress | None = None,
        timeout: str | float | None = None,
        total_timeout: str | float | None = None,
    ) -> list[float]:
        """Return a score for each document, in their order: the higher, the better it answers the query.

        The model must be a reranker, acquired with `embedding=True`. `progress` is called as for `embed`.
        """
        limits = _limits(timeout, total_timeout)
        with self._using() as client:
            return client.rerank(query, documents, progress=progress, **limits)

    def tokenize(
        self,
        text: str,
        *,
        special: bool = False,
        timeout: str | float | None = None,
        total_timeout: str | float | None = None,
    ) -> list[int]:
        """Return the tokens of a text; `special` adds those that the model puts around each text."""
        limits = _limits(timeout, total_timeout)
        with self._using() as client:
            return client.tokenize(text, special=special, **limits)

    async def achat(
        self,
        messages: Messages,
        *,
        timeout: str | float | None = None,
        total_timeout: str | float | None = None,
        **parameters: Any,
    ) -> Answer:
        """Like `chat`."""
        call = self._client().chat_call(messages, *self._asked, **_limits(timeout, total_timeout), **parameters)
        async with self._ausing() as client:
            return await client.aanswer(call)

    async def acomplete(
        self,
        prompt: str,
        *,
        timeout: str | float | None = None,
        total_timeout: str | float | None = None,
        **parameters: Any,
    ) -> Answer:
        """Like `complete`."""
        call = self._client().completion_call(prompt, *self._asked, **_limits(timeout, total_timeout), **parameters)
        async with self._ausing() as client:
            return await client.aanswer(call)

    def astream(
        self,
        messages: Messages,
        *,
        timeout: str | float | None = None,
        total_timeout: str | float | None = None,
        **parameters: Any,
    ) -> AsyncStream:
        """Like `stream`, for `async for`."""
        client = self._client()
        call = client.chat_call(messages, *self._asked, **_limits(timeout, total_timeout), **parameters)
        return AsyncStream(self, client, call)

    @overload
    async def aembed(
        self,
        text: str,
        *,
        timeout: str | float | None = None,
        total_timeout: str | float | None = None,
        **parameters: Any,
    ) -> list[float]: ...
    @overload
    async def aembed(
        self,
        text: Sequence[str],
        *,
        progress: Progress | None = None,
        timeout: str | float | None = None,
        total_timeout: str | float | None = None,
        **parameters: Any,
    ) -> list[list[float]]: ...
    async def aembed(
        self,
        text: str | Sequence[str],
        *,
        progress: Progress | None = None,
        timeout: str | float | None = None,
        total_timeout: str | float | None = None,
        **parameters: Any,
    ) -> list[float] | list[list[float]]:
        """Like `embed`."""
        limits = _limits(timeout, total_timeout)
        async with self._ausing(embeds=True) as client:
            return await client.aembed(text, progress=progress, **limits, **parameters)

    async def arerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        progress: Progress | None = None,
        timeout: str | float | None = None,
        total_timeout: str | float | None = None,
    ) -> list[float]:
        """Like `rerank`."""
        limits = _limits(timeout, total_timeout)
        async with self._ausing() as client:
            return await client.arerank(query, documents, progress=progress, **limits)

    async def atokenize(
        self,
        text: str,
        *,
        special: bool = False,
        timeout: str | float | None = None,
        total_timeout: str | float | None = None,
    ) -> list[int]:
        """Like `tokenize`."""
        limits = _limits(timeout, total_timeout)
        async with self._ausing() as client:
            return await client.atokenize(text, special=special, **limits)

    def openai(self) -> OpenAI:
        """Return a client of the package openai that talks to the runner; use it in a `with` block, or close it.

        An answer to it that is under way holds the lease, as a stream does. After the release its requests raise
        `LeaseReleased`. It needs the extra `openai`.
        """
        self._endpoint()
        with _extra("openai"):
            from scheduler.api.openai_clients import client_of
        return client_of(self)

    def async_openai(self) -> AsyncOpenAI:
        """Like `openai`, for event loops."""
        self._endpoint()
        with _extra("openai"):
            from scheduler.api.openai_clients import async_client_of
        return async_client_of(self)

    @property
    def _asked(self) -> tuple[ChatDefaults, tuple[float, ...]]:
        """What is asked with each chat and completion: the model's defaults, and the scales of its adapters."""
        return self._pending.chat, self._pending.scales

    def _check(self) -> None:
        if self._pending.lost:
            raise RunnerCrashed(self.model, self.runner, self._pending.lost, self._pending.closed)
        if self._released:
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
    def _using(self, *, embeds: bool = False) -> Iterator[RunnerClient]:
        """Hold the lease for one call, also past its release."""
        warn_if_loop_runs("this method of a lease", "await its twin, as `achat` is, or use `astream`")
        client = self._client()
        self._check_use(embeds)
        self._begin_use()
        try:
            yield client
        except ConnectionError as error:
            raise self._crashed(error) from None
        finally:
            self._end_use()

    @asynccontextmanager
    async def _ausing(self, *, embeds: bool = False) -> AsyncIterator[RunnerClient]:
        """As `_using`; the event loop goes on meanwhile."""
        client = self._client()
        self._check_use(embeds)
        self._begin_use()
        try:
            yield client
        except ConnectionError as error:
            raise await asyncio.to_thread(self._crashed, error) from None
        finally:
            self._end_use()

    def _called(self, calls: ObjectCalls, name: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Call an object in a process of its own, and hold the lease for that, also past its release."""
        self._begin_use()
        try:
            return calls.call(name, arguments, named)
        except ConnectionError as error:
            raise self._crashed(error) from None
        finally:
            self._end_use()

    def _check_use(self, embeds: bool) -> None:
        if embeds and self._endpoint().ranks:
            raise UnsupportedOption("model", self.model, "it is a reranker, which has no vectors: use rerank")

    def _crashed(self, error: ConnectionError) -> RunnerCrashed:
        """Check a runner whose connection broke: it is most likely gone, and its exit reported a moment later."""
        self._broker.verify_runner(self._pending)
        return RunnerCrashed(self.model, self.runner, self._pending.lost or str(error), self._pending.closed)

    def _begin_use(self) -> None:
        self._broker.check()
        with self._lock:
            self._check()
            self._uses += 1

    def _end_use(self) -> None:
        with self._lock:
            self._uses -= 1
            last = self._released and not self._uses
        if last:
            self._broker.release(self._pending)


class Leases(list[Lease[Any]]):
    """Several leases that were granted together, in the order of their models; a `with` block releases all of them."""

    def release(self) -> None:
        """Release all of them; a second call is harmless."""
        for lease in reversed(self):
            lease.release()

    def __enter__(self) -> Self:
        asker = this_asker()
        for lease in self:
            lease._hold(asker, entered=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
