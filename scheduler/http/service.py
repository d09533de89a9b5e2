"""What every protocol asks of the scheduler: a model by its name, a lease in time, the runner's answer passed on."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TypeVar

import httpx2

from fsm.machine.request import ModelId
from scheduler.api.lease import Lease
from scheduler.api.pending_lease import Acquiring
from scheduler.api.scheduler import Scheduler
from scheduler.api.status import Status
from scheduler.engines.command_model import CommandModel
from scheduler.engines.runner_client import engine_error
from scheduler.errors.exceptions import ModelNotFound, SchedulerError, UnsupportedOption
from scheduler.errors.formatting import printable
from scheduler.http.errors import ERROR_HEADER, ErrorAnswer, answer_to
from scheduler.http.exchange import Exchange, as_json
from scheduler.http.metrics import Metrics
from scheduler.http.model_files import ModelFiles
from scheduler.http.protocol import EVENTS, Protocol, Waiting
from scheduler.http.rules import ALL, apply_rules
from scheduler.http.runner_routes import HEADER, Call, Model
from scheduler.http.settings import ServerSettings
from scheduler.http.tracing import write_spans
from scheduler.http.upstream import BROKEN, Renaming, answer_of
from scheduler.models.catalog import MOST_NAMES, found_by
from scheduler.models.model_spec import ModelSpec
from scheduler.runtime.request_parser import AcquireOptions

Value = TypeVar("Value")

_LATEST = ":latest"
_KNOWN_S = 2.0  # for so long a name counts as leading where it led
_LISTED_S = 5.0  # for so long a list of all models serves
_MOST_KNOWN = 4096  # names
_WARM_S = 0.01  # a request that waited for no longer has not waited for a load
_SIGN_EVERY_S = 1.0
_FOR_EVER_S = 30 * 86400.0  # an event loop takes no timer without end
_STATUS_S = 0.5  # for so long a status serves all who wait
_LAST_BYTES = 4096  # of an answer, where its counts are, but for those that its first part may have
_COUNT = re.compile(
    rb'"((?:prompt|input|cache_read_input|completion|output)_tokens|(?:prompt|cache|predicted)_n)":(\d+)'
)
# What an answer tells its tokens by, of which the first that is there counts: a stream may have the engine's alone.
_COUNTS = {
    "tokens_in": ((b"prompt_tokens",), (b"input_tokens", b"cache_read_input_tokens"), (b"prompt_n", b"cache_n")),
    "tokens_out": ((b"completion_tokens",), (b"output_tokens",), (b"predicted_n",)),
}


class StillWaiting(Exception):
    """A request that is not streamed has waited for as long as its client has patience."""

    def __init__(self, model: str, waiting: Waiting) -> None:
        super().__init__(f"{model!r} is {waiting.line()}: try again in a moment")
        self.waiting = waiting

    def answer(self) -> ErrorAnswer:
        """Return what the client is told."""
        eta_s = self.waiting.eta_s
        loading = {
            "state": self.waiting.state, "position": self.waiting.position, "progress": self.waiting.progress,
            "eta_s": eta_s,
        }  # fmt: skip
        return ErrorAnswer(503, "still_waiting", str(self), {"loading": loading}, eta_s or _SIGN_EVERY_S, True)


class Service:
    """A scheduler as the routes see it."""

    def __init__(self, scheduler: Scheduler, settings: ServerSettings) -> None:
        self.scheduler = scheduler
        self.settings = settings
        self.metrics = Metrics(scheduler)
        self.observer = self.metrics.observer
        self.files = ModelFiles()
        self.commands: Mapping[str, CommandModel] = {}  # by name; replaced, never changed
        self._known: dict[str, tuple[ModelSpec, float]] = {}  # by name, and until when
        self._listed: tuple[dict[str, ModelSpec], float] | None = None  # and until when it serves
        self._status: tuple[Status, float] | None = None  # and until when it serves
        self._ruled: tuple[dict[str, ModelId], float] | None = None  # models by their names in rules, and until when

    async def find(self, name: str) -> ModelSpec:
        """Return the model of a name, and never of a path; raises what `Catalog.find` raises.

        `:latest` may end any name, since clients of Ollama add it. Raises `UnsupportedOption` for the model of a
        command.
        """
        if name in self.commands or name.removesuffix(_LATEST) in self.commands:
            raise UnsupportedOption("model", name, "a command serves it: only OpenAI's routes pass requests on to it")
        known = self._known.get(name)
        if known is not None and time.monotonic() < known[1]:
            return known[0]
        spec = await asyncio.to_thread(self._find, name)
        if spec.max_leases is None and not self.scheduler.settings.max_leases:
            spec = replace(spec, max_leases="slots")
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[name] = spec, time.monotonic() + _KNOWN_S
        return spec

    def _find(self, name: str) -> ModelSpec:
        try:
            return self.scheduler.catalog.find(name)
        except ModelNotFound:
            if not name.endswith(_LATEST):
                raise
            return self.scheduler.catalog.find(name.removesuffix(_LATEST))

    async def models(self) -> dict[str, ModelSpec]:
        """Return the models that have a name, by name; a model that cannot be read is left out."""
        if self._listed is None or time.monotonic() >= self._listed[1]:
            self._listed = await asyncio.to_thread(self._list), time.monotonic() + _LISTED_S
        return self._listed[0]

    def _list(self) -> dict[str, ModelSpec]:
        found: dict[str, ModelSpec] = {}
        for name, resolver in islice(self.scheduler.catalog.listing(), MOST_NAMES):
            with suppress(Exception):  # a resolver may be the user's own
                if (spec := found_by(resolver, name)) is not None:
                    found[name] = spec
        return found

    @asynccontextmanager
    async def lease(self, exchange: Exchange, call: Call, protocol: Protocol) -> AsyncIterator[tuple[Model, Lease]]:
        """Yield the model that a call names and a lease on it; the client gets signs of life while the call waits."""
        command = self.commands.get(call.model) if call.passed_as_it_is else None
        spec = command or await self.find(call.model)
        exchange.notes |= {"model": spec.name, "model_id": spec.id}
        asking = await self.ruled(exchange, spec, call)
        if command is not None:
            asking.pop("embedding", None)  # any program may compute vectors
        acquiring = self.scheduler.acquire_async(spec, **asking)
        patience_s = self.settings.patience if call.patience_s is None else call.patience_s
        asked_at, granted_at, granted = time.monotonic(), None, list[Lease]()

        async def acquire() -> None:
            granted.append(await acquiring)

        try:
            try:
                waiting = partial(self._waiting, spec, acquiring)
                await self.patiently(exchange, call, protocol, acquire(), waiting, patience_s)
            except StillWaiting:
                asking.pop("keep_alive", None)  # it is for behind the answer
                loading = self.scheduler.preload(spec, **asking)  # the load goes on: the retry is warm
                loading.add_done_callback(lambda done: done.cancelled() or done.exception())
                raise
            granted_at = time.monotonic()
            exchange.notes["wait_s"] = granted_at - asked_at
            yield spec, granted[0]
        finally:
            for lease in granted:  # also one that was granted as the client left
                lease.release()
            if granted_at is not None:
                exchange.notes["answer_s"] = time.monotonic() - granted_at
            load = partial(self.observer.load_of, granted[0].runner if granted else None)
            if granted_at is not None and granted_at - asked_at > _WARM_S:
                began, ended = load() or (granted_at, asked_at)
                if ended > asked_at:  # else the load was over before
                    exchange.notes["load_s"] = granted_at - max(asked_at, began)
            write_spans(exchange.notes, exchange.headers, asked_at, granted_at, load)

    async def ruled(self, exchange: Exchange, spec: Model, call: Call) -> AcquireOptions:
        """Return what counts of a call's keywords; the client is told in a header of those that do not."""
        names = (*await self._names_in_rules(spec), spec.name, call.model)
        asking, ignored = apply_rules(self.settings.rules, names, call.asking)
        if ignored:
            exchange.more_headers[f"{HEADER}ignored"] = (
                printable("; ".join(ignored)).encode("ascii", "replace").decode()
            )
        return asking

    async def _names_in_rules(self, spec: Model) -> list[str]:
        """Return the names by which rules name a model: a rule holds under all names that lead to it."""
        if not self.settings.rules.keys() - {ALL}:
            return []
        if self._ruled is None or time.monotonic() >= self._ruled[1]:
            self._ruled = await asyncio.to_thread(self._ids_in_rules), time.monotonic() + _LISTED_S
        return [name for name, id in self._ruled[0].items() if id == spec.id]

    def _ids_in_rules(self) -> dict[str, ModelId]:
        found: dict[str, ModelId] = {}
        for name in self.settings.rules.keys() - {ALL}:
            with suppress(SchedulerError):  # there is no such model now
                found[name] = self._find(name).id
        return found

    async def pass_on(self, exchange: Exchange, call: Call, protocol: Protocol) -> None:
        """Have the runner of a model answer a call, and pass the answer on as it comes."""
        try:
            async with self.lease(exchange, call, protocol) as (spec, lease):
                await self._answer(exchange, call, protocol, call.content(spec), lease)
        except (SchedulerError, StillWaiting) as error:
            await refuse(exchange, protocol, error.answer() if isinstance(error, StillWaiting) else answer_to(error))

    async def patiently(
        self,
        exchange: Exchange,
        call: Call,
        protocol: Protocol,
        work: Awaitable[Value],
        waiting: Callable[[], Waiting],
        patience_s: float = math.inf,
    ) -> Value:
        """Return what `work` returns; meanwhile the response to a streamed call begins, and shows signs of life.

        Raises `StillWaiting` where a call that is not streamed has waited for `patience_s`.
        """
        loop = asyncio.get_running_loop()
        late: StillWaiting | None = None
        signs: asyncio.Task[None] | None = None

        def has_waited() -> None:
            nonlocal late, signs
            if call.streamed:
                signs = loop.create_task(self._show_signs(exchange, protocol, waiting))
            else:
                late = StillWaiting(call.model, waiting())  # before the work, and what it waits for, is gone
                limit.reschedule(loop.time())

        patience_s = self.settings.sign_of_life if call.streamed else min(patience_s, _FOR_EVER_S)
        timer = loop.call_later(patience_s, has_waited)
        try:
            async with asyncio.timeout(None) as limit:
                return await work
        except TimeoutError:
            if late is None:
                raise
            raise late from None
        finally:
            timer.cancel()
            if signs is not None:
                signs.cancel()
                await asyncio.gather(signs, return_exceptions=True)

    async def _show_signs(self, exchange: Exchange, protocol: Protocol, waiting: Callable[[], Waiting]) -> None:
        await self.begin_stream(exchange, protocol)
        while True:
            if sign := protocol.sign_of_life(waiting()):
                await exchange.write(sign)
            await asyncio.sleep(_SIGN_EVERY_S)

    async def begin_stream(self, exchange: Exchange, protocol: Protocol) -> None:
        """Begin the response to a streamed call, if it has not begun."""
        if not exchange.status:
            headers = {"content-type": protocol.content_type, "cache-control": "no-cache", "x-accel-buffering": "no"}
            await exchange.begin(200, headers)

    def status(self) -> Status:
        """Return the scheduler's status, half a second old at most."""
        now = time.monotonic()
        if self._status is None or now >= self._status[1]:
            self._status = self.scheduler.status(), now + _STATUS_S
        return self._status[0]

    def _waiting(self, spec: Model, acquiring: Acquiring) -> Waiting:
        """Return what a request waits for."""
        status = self.status()
        for wait in status.queue:
            if wait.id == acquiring.request:
                loads = next(
                    (one for one in status.runners if one.model == wait.model and one.state == "loading"), None
                )
                eta_s = wait.until_s if math.isfinite(wait.until_s) else None
                if loads is None:
                    return Waiting("queued", wait.waits_for, wait.position, eta_s=eta_s)
                expected, there = sum(loads.promised_bytes.values()), sum(loads.resident_bytes.values())
                progress = min(0.99, there / expected) if expected else None
                return Waiting("loading", wait.waits_for, wait.position, progress, eta_s)
        return Waiting("queued")

    @asynccontextmanager
    async def answer(
        self, exchange: Exchange, call: Call, protocol: Protocol, content: bytes, lease: Lease
    ) -> AsyncIterator[httpx2.Response]:
        """Yield the runner's answer to a call, whose content has not been read; raises what a lease's methods raise."""
        try:
            async with AsyncExitStack() as stack:
                opening = stack.enter_async_context(answer_of(lease, call.path, content, call.content_type))
                response = await self.patiently(exchange, call, protocol, opening, lambda: Waiting("answering"))
                if response.is_error:
                    raise engine_error(response.status_code, await response.aread())
                yield response
        except BROKEN as error:
            raise await asyncio.to_thread(lease._crashed, ConnectionError(str(error))) from None

    async def _answer(self, exchange: Exchange, call: Call, protocol: Protocol, content: bytes, lease: Lease) -> None:
        async with self.answer(exchange, call, protocol, content, lease) as response:
            if response.headers.get("content-type", "").startswith(EVENTS):
                await self._stream(exchange, call, protocol, response)
            else:
                content = Renaming(as_json(call.model)).whole(await response.aread())
                note_counts(exchange, content)
                kind = response.headers.get("content-type", "application/json")
                await exchange.respond(response.status_code, content, {"content-type": kind})

    async def _stream(self, exchange: Exchange, call: Call, protocol: Protocol, response: httpx2.Response) -> None:
        renaming, first, last, begun = Renaming(as_json(call.model)), b"", b"", False
        await self.begin_stream(exchange, protocol)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        async for chunk in response.stream:
            if lines := renaming.feed(chunk):
                first += lines if len(first) < _LAST_BYTES else b""
                last = lines if len(lines) > _LAST_BYTES else (last + lines)[-_LAST_BYTES:]
                if not begun and (missing := protocol.missing(lines, call.model)) is not None:
                    begun, lines = True, missing + lines
                await exchange.write(lines)
        note_counts(exchange, first + last)
        await exchange.end(renaming.rest())


async def refuse(exchange: Exchange, protocol: Protocol, answer: ErrorAnswer) -> None:
    """Answer with an error: with its status, or at the end of a response that has begun."""
    exchange.notes["error"] = answer.code
    if exchange.status:
        await exchange.end(protocol.error_event(answer))
    else:
        headers = {ERROR_HEADER: answer.code, **answer.headers()}
        await exchange.respond_json(answer.status, protocol.error(answer), headers)


def note_counts(exchange: Exchange, content: bytes) -> None:
    """Note the tokens that an answer tells, the last time that it does, for the access log."""
    told = {name: int(count) for name, count in _COUNT.findall(content)}
    for note, ways in _COUNTS.items():
        if (way := next((each for each in ways if each[0] in told), None)) is not None:
            exchange.notes[note] = sum(told.get(name, 0) for name in way)
