"""What may be done by hand through a front: to a node that is named, or to all nodes that have a model."""

from __future__ import annotations

from typing import Any

from scheduler.cluster.node_service import DRAIN
from scheduler.cluster.nodes import Node, Nodes
from scheduler.cluster.routing import Asked
from scheduler.errors.exceptions import UnsupportedOption
from scheduler.http.exchange import Exchange, object_of

_LOAD = "/loadmaster/load"
_DRAIN = "/loadmaster/drain"
_RESTART = "/loadmaster/restart"
_OF_ONE = (_DRAIN, _RESTART)
ACTIONS = frozenset({_LOAD, *_OF_ONE, "/loadmaster/expire", "/loadmaster/pin", "/loadmaster/unpin"})


async def act(nodes: Nodes, exchange: Exchange, path: str, content: bytes) -> bool:
    """Do what is asked for; return False where it is a request like others: a load on the best node."""
    body = object_of(content)
    name, runner = body.pop("node", None), body.get("runner")
    if isinstance(runner, str) and "/" in runner:  # as the status of all nodes has it
        name, _, number = runner.partition("/")
        body["runner"] = int(number) if number.isdecimal() else runner
    if name is None and path == _LOAD:
        return False
    if name is None and path in _OF_ONE:
        raise UnsupportedOption("node", None, "name the node; GET /status lists them")
    status: int = 404
    told: Any = {"error": {"message": "no node has this model", "code": "model_not_found"}}
    for node in [nodes.named(str(name))] if name is not None else _having(nodes, body.get("model")):
        if path == _RESTART:
            await nodes.restart(node)
            status, told = 200, {"status": "restarted"}
        else:
            status, told = await node.post(DRAIN if path == _DRAIN else path, body)
    await exchange.respond_json(status, told)
    return True


def _having(nodes: Nodes, model: object) -> list[Node]:
    contents = nodes.contents_of(Asked(str(model)))
    return [node for node in nodes if contents & nodes.router.digests[node.id].models.keys()]
