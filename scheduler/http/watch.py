"""What watches the server: whether it lives, and whether it is ready."""

from __future__ import annotations

from scheduler.http.exchange import Exchange
from scheduler.http.openai import PROTOCOL
from scheduler.http.runner_routes import RunnerRoute
from scheduler.http.service import Service


async def _health(service: Service, exchange: Exchange) -> None:
    """Tell that the server lives."""
    await exchange.respond_json(200, {"status": "ok"})


async def _ready(service: Service, exchange: Exchange) -> None:
    """Tell whether the server takes requests."""
    closing = service.status().closing
    await exchange.respond_json(503 if closing else 200, {"status": "closing" if closing else "ready"})


OPEN = frozenset({("GET", "/health")})  # what needs no key
ROUTES: tuple[RunnerRoute, ...] = ()
ENDPOINTS = (
    (("GET",), "/health", _health),
    (("GET",), "/ready", _ready),
)
__all__ = ["ENDPOINTS", "OPEN", "PROTOCOL", "ROUTES"]
