"""What the module of a protocol defines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol as Interface

from scheduler.http.exchange import Exchange
from scheduler.http.protocol import Protocol
from scheduler.http.runner_routes import RunnerRoute
from scheduler.http.service import Service

Respond = Callable[[Service, Exchange], Awaitable[None]]
Endpoint = tuple[Sequence[str], str, Respond]  # methods, path, what answers


@dataclass(frozen=True, slots=True)
class Body:
    """What the body of a request to an endpoint may hold: names of fields, and those of them that it must hold."""

    fields: str  # with spaces in between
    required: str = "model"
    form: bool = False  # with a file in it


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

    @property
    def BODIES(self) -> Mapping[str, Body]:
        """What the endpoints take that have a body, by path: for the description."""
