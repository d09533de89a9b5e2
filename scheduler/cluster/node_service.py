"""What a node of a cluster answers beside the usual: its digest, leases for programs, and when it takes nothing new."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar

from starlette.types import ASGIApp, Receive, Scope, Send

from fsm.cluster.choice import Wanted, would_wait_longer
from fsm.cluster.digest import NodeDigest, NodeId, Offer
from fsm.machine.request import ModelId
from scheduler.api.lease import Lease
from scheduler.api.scheduler import Scheduler
from scheduler.cluster.contents import Contents
from scheduler.cluster.digests import take_digest
from scheduler.cluster.relay import headers_along, pass_answer
from scheduler.cluster.routing import options_in, parted
from scheduler.cluster.wire import line_of
from scheduler.errors.exceptions import LeaseReleased, ModelNotFound, RunnerCrashed, SchedulerError
from scheduler.http.errors import ErrorAnswer, answer_to
from scheduler.http.exchange import BodyRefused, ClientLeft, Exchange, as_json, object_of
from scheduler.http.guard import has_key, path_of
from scheduler.http.openai import PROTOCOL
from scheduler.http.protocol import Protocol
from scheduler.http.protocol_module import Body
from scheduler.http.runner_routes import Call, Model, RunnerRoute, model_of, scheduling_of
from scheduler.http.service import Service, refuse
from scheduler.http.settings import ServerSettings
from scheduler.http.upstream import BROKEN, answer_at
from scheduler.models.model_spec import ModelSpec

WITHIN = "x-loadmaster-within"  # seconds: a request that would wait for longer is to be asked of another node
WATCH = "/loadmaster/node/watch"
LEASE = "/loadmaster/node/lease"
WANTED = b'{"wanted":true}\n'  # a line to the holder of a lease: others wait for its runner's memory
DRAIN = "/loadmaster/node/drain"
_HELD = "/loadmaster/held/"  # then the id of a lease, then a path of the runner's own server
_LOOK_S = 0.25  # between two digests
_OFFERED_S = 5.0  # for so long the models of a catalogue are not looked for again
_LINES = {"content-type": "application/x-ndjson", "cache-control": "no-store"}


class WouldWait(SchedulerError):
    """A request would wait here for longer than it may: another node is to be asked."""

    status: ClassVar[int] = 503

    def _words(self) -> str:
        return "it would wait here for longer than on another node"


class Draining(SchedulerError):
    """The node takes no new requests: another node is to be asked."""

    status: ClassVar[int] = 503

    def _words(self) -> str:
        return "the node is drained: it takes no new requests"


@dataclass(frozen=True, slots=True)
class Held:
    """A lease that a program holds over the network, and the key of the lease's own."""

    lease: Lease
    key: str


class NodeService(Service):
    """The scheduler of a node as its routes see it."""

    def __init__(
        self,
        node: str,
        scheduler: Scheduler,
        settings: ServerSettings,
    ) -> None:
        super().__init__(scheduler, settings)
        self._node = NodeId(node)
        self._contents = Contents()
        self._offers: tuple[Mapping[ModelId, Offer], float] = {}, 0.0  # and until when they serve
        self._embedded: dict[ModelId, ModelSpec] = {}  # models that were asked for as embedders
        self.draining = False
        self.held: dict[str, Held] = {}  # by an id that is no secret
        self.under_way = 0  # requests for a model, and leases

    @asynccontextmanager
    async def lease(self, exchange: Exchange, call: Call, protocol: Protocol) -> AsyncIterator[tuple[Model, Lease]]:
        """Yield what `Service.lease` yields; raises `Draining` and `WouldWait` before anything is asked for."""
        if self.draining:
            raise Draining
        spec = await self.find(call.model)
        if call.asking.get("embedding") and not spec.embedding:
            spec = replace(spec, embedding=True)
            self._embedded[spec.id] = spec
        if (within := exchange.headers.get(WITHIN)) is not None and self._would_wait(spec, call, float(within)):
            raise WouldWait
        self.under_way += 1
        try:
            async with super().lease(exchange, call, protocol) as leased:
                yield leased
        finally:
            self.under_way -= 1

    async def find(self, name: str) -> ModelSpec:
        """Return the model of a name, which may say which content it means."""
        plain, content = parted(name)
        if not content:
            return await super().find(name)
        try:
            return await super().find(name)
        except ModelNotFound:
            spec = await super().find(plain)
            if not (await asyncio.to_thread(self._contents.of, spec) or "").startswith(content):
                raise
            return spec

    async def digest(self) -> NodeDigest:
        """Return what the node tells of itself now."""
        if time.monotonic() >= self._offers[1]:
            models = await self.models()
            offers = await asyncio.to_thread(self._contents.offers, models, [*self._embedded.values()])
            self._offers = offers, time.monotonic() + _OFFERED_S
        digest = take_digest(self.scheduler, self._node, self._offers[0])
        return replace(digest, closing=True) if self.draining else digest

    def _would_wait(self, spec: ModelSpec, call: Call, bound_s: float) -> bool:
        offer = self._offers[0].get(spec.id)
        if offer is None:  # it is not listed
            return False
        digest = take_digest(self.scheduler, self._node, self._offers[0])
        return would_wait_longer(digest, Wanted(offer.content, options_in(call.asking)), bound_s)


async def _watch(service: Service, exchange: Exchange) -> None:
    """Stream the digest of the node, a line each quarter of a second: an empty one where nothing has changed."""
    assert isinstance(service, NodeService)
    await exchange.while_connected(_tell(service, exchange))


async def _tell(service: NodeService, exchange: Exchange) -> None:
    await exchange.begin(200, _LINES)
    last = b""
    while True:
        line = line_of(await service.digest())
        await exchange.write(b"\n" if line == last else line)
        last = line
        await asyncio.sleep(_LOOK_S)


async def _lease(service: Service, exchange: Exchange) -> None:
    """Grant a lease that is held for as long as the connection is open."""
    assert isinstance(service, NodeService)
    asked = object_of(await exchange.body(service.settings.body_limit, service.settings.body_timeout))
    asking, _ = scheduling_of(asked, exchange.headers)
    if asked.get("embedding") is True:
        asking["embedding"] = True
    call = Call(model_of(asked), asking, "", lambda spec: b"", patience_s=inf)
    await exchange.while_connected(_hold(service, exchange, call))


async def _hold(service: NodeService, exchange: Exchange, call: Call) -> None:
    loop, news = asyncio.get_running_loop(), asyncio.Queue[bytes | None]()
    async with service.lease(exchange, call, PROTOCOL) as (spec, lease):
        lease.on_wanted(lambda: loop.call_soon_threadsafe(news.put_nowait, WANTED))
        lease.on_lost(lambda: loop.call_soon_threadsafe(news.put_nowait, None))
        id, key = secrets.token_hex(8), secrets.token_urlsafe(32)
        service.held[id] = Held(lease, key)
        try:
            told = {"model": spec.name, "path": _HELD + id, "key": key, "runner": lease.runner}
            await exchange.begin(200, _LINES)
            await exchange.write(as_json(told) + b"\n")
            while (line := await news.get()) is not None:
                await exchange.write(line)
            await exchange.end()
        finally:
            del service.held[id]


async def _drain(service: Service, exchange: Exchange) -> None:
    """Take no new requests, or take them again; answer with how many are under way."""
    assert isinstance(service, NodeService)
    asked = object_of(await exchange.body(service.settings.body_limit, service.settings.body_timeout))
    service.draining = asked.get("draining") is not False
    await exchange.respond_json(200, {"draining": service.draining, "under_way": service.under_way})


class HeldLeases:
    """An ASGI application in front of another, which passes requests under a lease's key to the lease's runner."""

    def __init__(self, app: ASGIApp, service: NodeService) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = path_of(scope) if scope["type"] == "http" else ""
        if not path.startswith(_HELD):
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send)
        id, _, target = path.removeprefix(_HELD).partition("/")
        held = self._service.held.get(id)
        if held is None or not has_key(exchange.headers, held.key):
            answer = ErrorAnswer(401, "invalid_api_key", "there is no lease with this key: it may have been released")
            await refuse(exchange, PROTOCOL, answer)
            return
        if query := scope.get("query_string", b"").decode("latin-1"):
            target += f"?{query}"
        settings = self._service.settings
        try:
            content = await exchange.body(settings.body_limit, settings.body_timeout)
            await exchange.while_connected(_to_runner(exchange, held.lease, scope["method"], f"/{target}", content))
        except ClientLeft:
            exchange.notes["left"] = True
        except BodyRefused as error:
            await refuse(exchange, PROTOCOL, ErrorAnswer(error.status, "body_refused", str(error)))


async def _to_runner(exchange: Exchange, lease: Lease, method: str, target: str, content: bytes) -> None:
    """Pass a request on to the runner of a lease, which is held until the answer ends."""
    try:
        lease._begin_use()
    except (LeaseReleased, RunnerCrashed) as error:
        await refuse(exchange, PROTOCOL, answer_to(error))
        return
    try:
        headers = headers_along(exchange.headers)
        async with answer_at(lease.url, lease.api_key, method, target, content, headers) as response:
            await pass_answer(exchange, response, method)
    except BROKEN as error:
        crashed = await asyncio.to_thread(lease._crashed, ConnectionError(str(error)))
        await refuse(exchange, PROTOCOL, answer_to(crashed))
    finally:
        lease._end_use()


ROUTES: tuple[RunnerRoute, ...] = ()
ENDPOINTS = (
    (("GET",), WATCH, _watch),
    (("POST",), LEASE, _lease),
    (("POST",), DRAIN, _drain),
)
BODIES: dict[str, Body] = {}
__all__ = ["BODIES", "ENDPOINTS", "PROTOCOL", "ROUTES", "HeldLeases", "NodeService"]
