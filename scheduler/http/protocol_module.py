"""What the module of a protocol defines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol as Interface

from scheduler.http.exchange import Exchange
from scheduler.http.protocol import Protocol
from scheduler.http.runner_routes import RunnerRoute
from scheduler.http.service import Service

Respond = Callable[[Service, Exchange], Awaitable[None]]
Endpoint = tuple[Sequence[str], str, Respond]  # methods, path, what answers


class ProtocolModule(Interface):
    """What the module of a protocol defines."""

    @property
    def PROTOCOL(self) -> Protocol:
        """How errors and signs of life look."""

    @property
    def ROUTES(self) -> Sequence[RunnerRoute]:
        """What the runner answers itself."""

    @property
    def ENDPOINTS(self) -> Sequence[Endpoint]:
        """What the server answers."""
