"""The actor of one node: its scheduler, and the HTTP front of it at the node's address. It runs inside Ray."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scheduler.api.scheduler import Scheduler
from scheduler.cluster import node_service
from scheduler.cluster.endpoint import Endpoint
from scheduler.cluster.node_service import HeldLeases, NodeService
from scheduler.config.settings import Settings
from scheduler.http.app import application
from scheduler.http.server import HttpServer, ServerOptions
from scheduler.http.settings import ServerArguments, ServerSettings

LOST_S = 15  # after so long a machine that does not answer counts as lost: what its programs hold is given back
_BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class NodeArguments:
    """What all nodes are told; a node reads all else in its own environment."""

    settings: Mapping[str, Any] = field(default_factory=dict)  # of the scheduler
    server: ServerArguments = field(default_factory=ServerArguments)


class Node:
    """One node's scheduler and its HTTP front, with a key that is made here and told to those alone who ask Ray."""

    def __init__(self, node: str, address: str, arguments: NodeArguments) -> None:
        environment = {"LOADMASTER_MAX_LEASES": "slots", **os.environ}
        settings = Settings.from_environment(environment, **arguments.settings)
        key = secrets.token_urlsafe(32)
        self._scheduler = scheduler = Scheduler(settings)
        service = NodeService(node, scheduler, ServerSettings(**(arguments.server | ServerArguments(api_key=key))))
        app = HeldLeases(application(service, (node_service,)), service)
        listening = _listening(address)
        host, port = listening.getsockname()[:2]
        self._endpoint = Endpoint(node, f"http://{f'[{host}]' if ':' in host else host}:{port}", key)
        server = HttpServer(scheduler, {}, ServerOptions(), app=app)
        threading.Thread(
            target=server.run_without_signals, args=([listening],), name="loadmaster-node", daemon=True
        ).start()

    def endpoint(self) -> Endpoint:
        """Return where the node is reached, and with which key."""
        return self._endpoint


def _listening(address: str) -> socket.socket:
    """Return a socket at any free port, whose connections end when the other machine is lost."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    # connections that are accepted have the same options
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LOST_S // 3)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LOST_S // 3)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_S * 1000)
    listening.bind((address, 0))
    listening.listen(_BACKLOG)
    return listening
