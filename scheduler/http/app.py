"""The ASGI application: its routes, and who may call them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Unpack

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from scheduler import __version__
from scheduler.api.scheduler import Scheduler
from scheduler.errors.exceptions import SchedulerError
from scheduler.http import actions, anthropic, ollama, openai, page, watch
from scheduler.http.errors import ErrorAnswer, answer_to
from scheduler.http.exchange import CLIENT_LEFT, BodyRefused, ClientLeft, Exchange
from scheduler.http.guard import Guard, path_of
from scheduler.http.metrics import Counted
from scheduler.http.openapi import description
from scheduler.http.protocol import Protocol
from scheduler.http.protocol_module import Endpoint, ProtocolModule, Respond
from scheduler.http.runner_routes import RunnerRoute
from scheduler.http.service import Service, StillWaiting, refuse
from scheduler.http.settings import ServerArguments, ServerSettings

log = logging.getLogger("loadmaster")

_MODULES: tuple[ProtocolModule, ...] = (openai, anthropic, ollama, watch, actions, page)


def create_app(scheduler: Scheduler, **settings: Unpack[ServerArguments]) -> ASGIApp:
    """Return an ASGI application that serves the models of a scheduler; it may be mounted under any prefix.

    The scheduler stays the program's own: closing it ends the waits and the answers of the application's clients. The
    application needs no lifespan. Names of models are looked up in `scheduler.catalog`, and never taken as paths.
    Keywords are listed in `ServerArguments`. Raises `InvalidSettings`.
    """
    return application(Service(scheduler, ServerSettings(**settings)))


def application(service: Service, more: Sequence[ProtocolModule] = ()) -> ASGIApp:
    """Return the application of a service, with the endpoints of more modules."""
    routes = [
        Route(path, _Endpoint(service, protocol_of(path), respond), methods=[*methods])
        for module in (*_MODULES, *more)
        for methods, path, respond in (*_runner_endpoints(module), *module.ENDPOINTS)
    ]
    routes.append(Route("/openapi.json", _Endpoint(service, openai.PROTOCOL, _describe), methods=["GET"]))

    inner = Starlette(routes=routes, exception_handlers={HTTPException: _refused})
    inner.router.default = _no_route
    inner.router.redirect_slashes = False
    return Counted(Guard(inner, service.settings, protocol_of, needs_no_key), service.metrics)


class _Endpoint:
    """The application of one route: whatever goes wrong is told in the terms of its protocol."""

    def __init__(self, service: Service, protocol: Protocol, respond: Respond) -> None:
        self._service = service
        self._protocol = protocol
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            await self._respond(self._service, exchange)
        except ClientLeft:
            exchange.notes["left"] = True
        except BodyRefused as error:
            await refuse(exchange, self._protocol, ErrorAnswer(error.status, "body_refused", str(error)))
        except SchedulerError as error:
            await refuse(exchange, self._protocol, answer_to(error))
        except StillWaiting as error:
            await refuse(exchange, self._protocol, error.answer())
        except Exception:
            log.exception("a request failed")  # a bug: the client is not told of what is inside
            await refuse(exchange, self._protocol, ErrorAnswer(500, "internal_error", "the server has failed"))
        if exchange.notes.get("left") and not exchange.status:  # a program around this one may want a response
            with suppress(ClientLeft):
                await exchange.respond(CLIENT_LEFT, b"", {})


def _runner_endpoints(module: ProtocolModule) -> Iterator[Endpoint]:
    """Yield the endpoints of a protocol that the runner answers itself."""
    for row in module.ROUTES:
        for path in row.paths:
            yield ("POST",), path, _passed_on(row, protocol_of(path))


def _passed_on(route: RunnerRoute, protocol: Protocol) -> Respond:
    async def respond(service: Service, exchange: Exchange) -> None:
        content = await exchange.body(service.settings.body_limit, service.settings.body_timeout)
        call = route.call(content, exchange.headers)
        await exchange.while_connected(service.pass_on(exchange, call, protocol))

    return respond


async def _describe(service: Service, exchange: Exchange) -> None:
    await exchange.respond_json(200, description(_MODULES, __version__))


async def _refused(request: Request, error: Exception) -> Response:
    """Answer for a route that there is not with this method."""
    assert isinstance(error, HTTPException)
    answer = ErrorAnswer(error.status_code, "not_allowed", f"{request.method} is not for {request.url.path}")
    return JSONResponse(protocol_of(path_of(request.scope)).error(answer), error.status_code, error.headers)


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close"})
    if scope["type"] == "http":
        path = path_of(scope)
        answer = ErrorAnswer(404, "not_found", f"there is nothing at {scope['method']} {path}")
        await refuse(Exchange(scope, receive, send), protocol_of(path), answer)


def protocol_of(path: str) -> Protocol:
    """Return the protocol that a path belongs to."""
    if path.startswith("/api/"):
        return ollama.PROTOCOL
    if path.removeprefix("/v1") == "/responses":
        return openai.RESPONSES
    return anthropic.PROTOCOL if path.startswith("/v1/messages") else openai.PROTOCOL


def needs_no_key(method: str, path: str) -> bool:
    """Tell whether a request is answered without a key."""
    return (method, path) in watch.OPEN or page.is_open(method, path)
