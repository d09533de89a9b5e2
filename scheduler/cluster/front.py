"""The front of a cluster: an ASGI application that sends each request to the node where it is served soonest.

It keeps nothing that another front would miss. The node answers the request as it came, in the client's protocol, and
the front passes the answer on as it comes. A request that has not begun to be answered is asked of another node where
its node dies or refuses it; one that has ends with its protocol's error. None is answered twice.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from urllib.parse import quote

import httpx2
from starlette.types import ASGIApp, Receive, Scope, Send

from scheduler.cluster.front_actions import ACTIONS, act
from scheduler.cluster.merged import MERGED, tell_events
from scheduler.cluster.node_service import WITHIN
from scheduler.cluster.nodes import Candidate, Node, NodeLost, Nodes
from scheduler.cluster.relay import content_of, headers_along, headers_back, is_stream, parts_of
from scheduler.cluster.routing import Asked, asked_in
from scheduler.config.settings import Settings
from scheduler.errors.exceptions import SchedulerClosed, SchedulerError
from scheduler.http.actions import NOT_ALLOWED, may_act
from scheduler.http.app import needs_no_key, protocol_of
from scheduler.http.errors import ERROR_HEADER, ErrorAnswer, answer_to
from scheduler.http.exchange import BodyRefused, ClientLeft, Exchange
from scheduler.http.guard import Guard, path_of
from scheduler.http.protocol import Protocol
from scheduler.http.service import refuse
from scheduler.http.settings import ServerSettings
from scheduler.http.upstream import answer_at

log = logging.getLogger("loadmaster")

NODE_HEADER = "x-loadmaster-node"  # of an answer: the node that has answered
# Refusals of a node that say nothing of the others.
_ELSEWHERE = frozenset({"would_wait", "draining", "queue_full", "scheduler_closed", "model_not_found"})
_NONE = ErrorAnswer(503, "no_node", "no node of the cluster can answer now: try again", {}, 1.0, True)
_LOST = ErrorAnswer(502, "node_lost", "the node that answered is lost", {}, None, True)
# What a node sends while a request waits: comments, and Anthropic's pings. No part of an answer has come then.
_SIGNS = re.compile(rb"(?::[^\n]*\n+|event: ping\ndata: [^\n]*\n+|\n)*")


@dataclass(frozen=True, slots=True)
class Asking:
    """A request as it is sent to nodes."""

    method: str
    target: str
    content: bytes
    headers: Mapping[str, str]
    protocol: Protocol


@dataclass(slots=True)
class Answering:
    """How far the answer to a request has come."""

    begun: bool = False  # a part of the answer itself was sent: no other node can answer any more
    begun_at: float | None = None  # when the first part of a stream came
    refusal: tuple[int, bytes, Mapping[str, str]] | None = None  # of the last node that has refused


class Front:
    """An ASGI application, and the requests that it has under way."""

    def __init__(self, nodes: Nodes, settings: Settings, server: ServerSettings) -> None:
        self.settings = settings
        self.nodes = nodes
        self.failure: SchedulerError | None = None  # why there are no nodes to begin with
        self._server = server
        self._closing = False  # what is under way is told so, in its protocol
        self._under_way: set[asyncio.Task[None]] = set()
        self._app: ASGIApp = Guard(self._respond, server, protocol_of, needs_no_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await self._app(scope, receive, send)

    async def aclose(self) -> None:
        """Wait for answers under way for the setting `close_timeout`, then end them."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=self.settings.close_timeout)
        self._closing = True
        for task in self._under_way:
            task.cancel()

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.nodes.open()
        except SchedulerError as error:
            self.failure = error  # for what runs the server, which ends it
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.nodes.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange, path = Exchange(scope, receive, send), path_of(scope)
        protocol = protocol_of(path)
        try:
            if (tell := MERGED.get((scope["method"], path))) is not None:
                await exchange.while_connected(tell(self.nodes, exchange))
                return
            if (scope["method"], path) == ("GET", "/events"):
                actions = may_act(self._server, exchange)
                await exchange.while_connected(tell_events(self.nodes, exchange, actions=actions))
                return
            content = await exchange.body(self._server.body_limit, self._server.body_timeout)
            if path in ACTIONS:
                if not may_act(self._server, exchange):
                    await refuse(exchange, protocol, NOT_ALLOWED)
                    return
                if await act(self.nodes, exchange, path, content):
                    return
            query = scope.get("query_string", b"").decode("latin-1")
            target = quote(path) + (f"?{query}" if query else "")
            asking = Asking(scope["method"], target, content, headers_along(exchange.headers), protocol)
            await exchange.while_connected(self._serve(exchange, asking, asked_in(path, content, exchange.headers)))
        except ClientLeft:
            exchange.notes["left"] = True
        except BodyRefused as error:
            await refuse(exchange, protocol, ErrorAnswer(error.status, "body_refused", str(error)))
        except SchedulerError as error:
            await refuse(exchange, protocol, answer_to(error))
        except Exception:
            log.exception("a request failed")  # a bug: the client is not told of what is inside
            await refuse(exchange, protocol, ErrorAnswer(500, "internal_error", "the front has failed"))

    async def _serve(self, exchange: Exchange, asking: Asking, asked: Asked) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._under_way.add(task)
        answering = Answering()
        try:
            for candidate in self.nodes.candidates(asked):
                if await self._ask(exchange, asking, answering, candidate):
                    return
            await self._none(exchange, asking.protocol, answering)
        except NodeLost:
            await refuse(exchange, asking.protocol, _LOST)
        except asyncio.CancelledError:
            if not self._closing:
                raise
            await refuse(exchange, asking.protocol, answer_to(SchedulerClosed()))
        finally:
            self._under_way.discard(task)

    async def _ask(self, exchange: Exchange, asking: Asking, answering: Answering, candidate: Candidate) -> bool:
        """Ask a node, and pass its answer on; return False where another node is to be asked."""
        node, to, headers = candidate.node, candidate.node.endpoint, asking.headers
        if candidate.bound_s is not None:
            headers = {**headers, WITHIN: f"{min(candidate.bound_s, 1e9):.3f}"}
        router, sent = self.nodes.router, None
        if candidate.content is not None:
            sent = router.forward(monotonic(), node.id, candidate.content)
        try:
            async with (
                node.calling(),
                answer_at(to.url, to.key, asking.method, asking.target, asking.content, headers) as response,
            ):
                if response.headers.get(ERROR_HEADER) in _ELSEWHERE:
                    content_told = await content_of(response, asking.method)
                    answering.refusal = response.status_code, content_told, headers_back(response)
                    return False
                exchange.notes["node"] = node.name
                await self._pass(exchange, asking, answering, node, response)
                if sent is not None and answering.begun_at is not None:
                    router.answered(sent, monotonic() - answering.begun_at)
                return True
        except NodeLost:
            if answering.begun:
                raise
            log.warning("node %s was lost before it answered %s: another is asked", node.name, asking.target)
            return False
        finally:
            if sent is not None:
                router.ended(sent)

    async def _pass(
        self, exchange: Exchange, asking: Asking, answering: Answering, node: Node, response: httpx2.Response
    ) -> None:
        """Pass an answer on as it comes."""
        headers = {**headers_back(response), NODE_HEADER: node.name}
        if not is_stream(response):
            content = await content_of(response, asking.method)  # all of it, before any of it is sent
            answering.begun = True
            await _end(exchange, asking.protocol, response.status_code, content, headers)
            return
        if not exchange.status:
            await exchange.begin(response.status_code, headers)
        async for part in parts_of(response):
            if not answering.begun and not _SIGNS.fullmatch(part):
                answering.begun, answering.begun_at = True, monotonic()
            await exchange.write(part)
        answering.begun = True
        await exchange.end()

    async def _none(self, exchange: Exchange, protocol: Protocol, answering: Answering) -> None:
        """Answer with the last refusal, where no node serves the request."""
        if answering.refusal is None:
            await refuse(exchange, protocol, _NONE)
        else:
            status, content, headers = answering.refusal
            exchange.notes["error"] = headers.get(ERROR_HEADER)
            await _end(exchange, protocol, status, content, headers)


async def _end(exchange: Exchange, protocol: Protocol, status: int, content: bytes, headers: Mapping[str, str]) -> None:
    """Send an answer that has come whole, or, where a response has begun, its error as the last part of it."""
    if not exchange.status:
        await exchange.respond(status, content, headers)
    elif status < 400:
        await exchange.end(content)
    else:
        await refuse(exchange, protocol, ErrorAnswer(status, headers.get(ERROR_HEADER, "error"), _message_in(content)))


def _message_in(content: bytes) -> str:
    """Return the message of an error in any of the protocols."""
    try:
        error = json.loads(content)["error"]
        return str(error if isinstance(error, str) else error["message"])
    except (ValueError, KeyError, TypeError):
        return "the node has refused the request"


__all__ = ["NODE_HEADER", "Front"]
