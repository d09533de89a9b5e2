"""What watches the server: whether it lives, whether it is ready, its status, its events, its figures."""

from __future__ import annotations

import asyncio
import time

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from scheduler.http.actions import may_act
from scheduler.http.exchange import Exchange, as_json
from scheduler.http.openai import PROTOCOL
from scheduler.http.protocol import EVENTS
from scheduler.http.protocol_module import Body
from scheduler.http.runner_routes import RunnerRoute
from scheduler.http.service import Service
from scheduler.runtime.event_stream import Decision, Gap, Transition

_LOOK_S = 0.25  # between two looks for events
_STATUS_S = 1.0  # between two statuses, while there are no events
_STREAM = {"content-type": EVENTS, "cache-control": "no-store", "x-accel-buffering": "no"}
_KINDS = {Transition: "transition", Decision: "decision", Gap: "gap"}


async def _health(service: Service, exchange: Exchange) -> None:
    """Tell that the server lives."""
    await exchange.respond_json(200, {"status": "ok"})


async def _ready(service: Service, exchange: Exchange) -> None:
    """Tell whether the server takes requests."""
    closing = service.scheduler.status().closing
    await exchange.respond_json(503 if closing else 200, {"status": "closing" if closing else "ready"})


async def _status(service: Service, exchange: Exchange) -> None:
    """Answer with the devices, the runners and the queue as they are now."""
    await exchange.respond_json(200, service.scheduler.status().to_json(), {"cache-control": "no-store"})


async def _metrics(service: Service, exchange: Exchange) -> None:
    """Answer with figures in the text format of Prometheus."""
    await exchange.respond(200, service.metrics.text(), {"content-type": CONTENT_TYPE_PLAIN_0_0_4})


async def _events(service: Service, exchange: Exchange) -> None:
    """Stream what happens as server-sent events, until the scheduler closes."""
    if exchange.method == "HEAD":
        await exchange.respond(200, b"", _STREAM)
    else:
        await exchange.while_connected(_follow(service, exchange))


async def _follow(service: Service, exchange: Exchange) -> None:
    """Send the past, then each event, and the status with it or once a second."""
    observer = service.observer
    observer.catch_up()
    count, past = observer.count, {**observer.past(), "actions": may_act(service.settings, exchange)}
    await exchange.begin(200, _STREAM)
    await exchange.write(_sent("past", past))
    closing, told_at = False, float("-inf")
    while not closing:
        observer.catch_up()
        new, count = observer.since(count), observer.count
        if new or time.monotonic() - told_at >= _STATUS_S:
            status, told_at = service.scheduler.status(), time.monotonic()
            closing = status.closing
            told = [_sent(_KINDS[type(event)], event.to_json(service.scheduler.name)) for event in new]
            await exchange.write(b"".join((*told, _sent("status", status.to_json()))))
        if not closing:
            await asyncio.sleep(_LOOK_S)
    await exchange.end()


def _sent(kind: str, value: object) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + as_json(value) + b"\n\n"


OPEN = frozenset({("GET", "/health"), ("HEAD", "/health")})  # what needs no key
ROUTES: tuple[RunnerRoute, ...] = ()
ENDPOINTS = (
    (("GET",), "/health", _health),
    (("GET",), "/ready", _ready),
    (("GET",), "/status", _status),
    (("GET",), "/metrics", _metrics),
    (("GET",), "/events", _events),
)
BODIES: dict[str, Body] = {}
__all__ = ["BODIES", "ENDPOINTS", "OPEN", "PROTOCOL", "ROUTES"]
