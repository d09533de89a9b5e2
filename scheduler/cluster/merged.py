"""What a front tells of all nodes together: lists, status, events and figures; each says which node it is of."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from scheduler.cluster.contents import plain
from scheduler.cluster.nodes import Node, NodeLost, Nodes
from scheduler.cluster.relay import parts_of
from scheduler.cluster.routing import marked
from scheduler.http.exchange import Exchange, as_json
from scheduler.http.protocol import EVENTS
from scheduler.http.upstream import answer_at

_ANSWER_S = 5.0  # a node that does not answer within it is left out
_STREAM = {"content-type": EVENTS, "cache-control": "no-store", "x-accel-buffering": "no"}
_STATUS_S = 1.0  # between two statuses
_OF_DEVICES = ("promised_bytes", "peak_bytes", "held_bytes", "resident_bytes", "gpu_layers")  # amounts by device


async def _contents(nodes: Nodes, path: str) -> list[tuple[Node, bytes]]:
    """Return what each node answers, without those that do not answer."""

    async def ask(node: Node) -> tuple[Node, bytes] | None:
        to = node.endpoint
        with suppress(NodeLost, TimeoutError):
            async with (
                asyncio.timeout(_ANSWER_S),
                node.calling(),
                answer_at(to.url, to.key, "GET", path, b"", {}) as response,
            ):
                content = await response.aread()
                return None if response.is_error else (node, content)
        return None

    return [found for found in await asyncio.gather(*map(ask, nodes)) if found is not None]


async def _values(nodes: Nodes, path: str) -> list[tuple[Node, Any]]:
    return [(node, json.loads(content)) for node, content in await _contents(nodes, path)]


async def _ready(nodes: Nodes, exchange: Exchange) -> None:
    """Tell whether there is a node that takes requests."""
    ready = any(not digest.closing for digest in nodes.router.digests.values())
    await exchange.respond_json(200 if ready else 503, {"status": "ready" if ready else "no node"})


async def _health(nodes: Nodes, exchange: Exchange) -> None:
    """Tell that the front lives."""
    await exchange.respond_json(200, {"status": "ok"})


async def _models(nodes: Nodes, exchange: Exchange) -> None:
    """List the models by name, with the nodes that have them; names that stand for several files say which."""
    rows = [(node, one, one["id"]) for node, told in await _values(nodes, "/v1/models") for one in told["data"]]
    found = _by_content(nodes, rows)
    data = [{**one, "id": name, "nodes": names} for name, (one, names) in found.items()]
    await exchange.respond_json(200, {"object": "list", "data": data})


async def _tags(nodes: Nodes, exchange: Exchange) -> None:
    """List the models as Ollama does, with the nodes that have them."""
    rows = [
        (node, one, str(one["name"]).removesuffix(":latest"))
        for node, told in await _values(nodes, "/api/tags")
        for one in told["models"]
    ]
    found = _by_content(nodes, rows)
    models = []
    for name, (one, names) in found.items():
        whole = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
        models.append({**one, "name": whole, "model": whole, "nodes": names})
    await exchange.respond_json(200, {"models": models})


def _by_content(nodes: Nodes, rows: Iterable[tuple[Node, Any, str]]) -> dict[str, tuple[Any, list[str]]]:
    """Return one row of each model with its nodes, by a name that leads to it alone."""
    contents = nodes.names()
    found: dict[str, tuple[Any, list[str]]] = {}
    for node, row, name in rows:
        several = len({plain(content) for _, content in contents.get(name, ())}) > 1
        own = next((content for one, content in contents.get(name, ()) if one == node.id), None)
        shown = marked(name, own) if several and own is not None else name
        found.setdefault(shown, (row, []))[1].append(node.name)
    return found


async def _ps(nodes: Nodes, exchange: Exchange) -> None:
    """List the models that are loaded, as Ollama does, each with its node."""
    loaded = await _values(nodes, "/api/ps")
    models = [{**one, "node": node.name} for node, told in loaded for one in told["models"]]
    await exchange.respond_json(200, {"models": models})


async def _status(nodes: Nodes, exchange: Exchange) -> None:
    """Answer with the devices, the runners and the queues of all nodes."""
    await exchange.respond_json(200, await status_of(nodes), {"cache-control": "no-store"})


async def status_of(nodes: Nodes) -> dict[str, Any]:
    """Return the status of all nodes as one: ids begin with the name of their node."""
    told = await _values(nodes, "/status")
    merged: dict[str, Any] = {"runners": [], "queue": [], "devices": [], "problems": []}
    for node, status in told:
        merged["runners"] += [_runner(node, one) for one in status["runners"]]
        merged["queue"] += [_of(node, one) for one in status["queue"]]
        merged["devices"] += [_of(node, one) for one in status["devices"]]
        merged["problems"] += [f"node {node.name}: {text}" for text in status["problems"]]
    known = {
        node.name: {"id": node.id, "url": node.endpoint.url, "draining": nodes.router.digests[node.id].closing}
        for node in nodes
    }
    return {**merged, "closing": False, "at": time.monotonic(), "nodes": known}


def _of(node: Node, value: Mapping[str, Any]) -> dict[str, Any]:
    return {**value, "id": f"{node.name}/{value['id']}", "node": node.name}


def _runner(node: Node, runner: Mapping[str, Any]) -> dict[str, Any]:
    amounts = {
        field: {f"{node.name}/{device}": amount for device, amount in runner[field].items()} for field in _OF_DEVICES
    }
    return {**_of(node, runner), **amounts}


async def _metrics(nodes: Nodes, exchange: Exchange) -> None:
    """Answer with the figures of all nodes, each with the label `node`."""
    families: dict[str, Metric] = {}
    for node, content in await _contents(nodes, "/metrics"):
        for family in text_string_to_metric_families(content.decode()):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                merged.add_sample(sample.name, {"node": node.name, **sample.labels}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Collected(families.values()))
    await exchange.respond(200, generate_latest(registry), {"content-type": CONTENT_TYPE_PLAIN_0_0_4})


class _Collected:
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Return the figures."""
        return self._families


async def tell_events(nodes: Nodes, exchange: Exchange, *, actions: bool) -> None:
    """Stream what happens on the nodes there are now, as one server does, until the client leaves."""
    await exchange.begin(200, _STREAM)
    lines: asyncio.Queue[bytes] = asyncio.Queue(1000)
    offsets: dict[str, float] = {}  # of this process's clock from that of each node
    past: dict[str, Any] = {"runners": [], "decisions": [], "actions": actions}
    followed: dict[Node, asyncio.Task[None]] = {}
    try:
        await exchange.write(_sent("past", past))
        while True:
            for node in {*nodes} - {*followed}:
                followed[node] = asyncio.ensure_future(_follow(node, offsets, lines))
            with suppress(TimeoutError):
                async with asyncio.timeout(_STATUS_S):
                    while True:
                        await exchange.write(await lines.get())
            await exchange.write(_sent("status", await status_of(nodes)))
    finally:
        for task in followed.values():
            task.cancel()


async def _follow(node: Node, offsets: dict[str, float], lines: asyncio.Queue[bytes]) -> None:
    """Put the events of a node into the queue, on the clock of this process."""
    to, rest = node.endpoint, b""
    with suppress(NodeLost, ValueError, KeyError):
        async with node.calling(), answer_at(to.url, to.key, "GET", "/events", b"", {}) as response:
            async for part in parts_of(response):
                *events, rest = (rest + part).split(b"\n\n")
                for event in events:
                    kind, _, text = event.removeprefix(b"event: ").partition(b"\ndata: ")
                    value = json.loads(text)
                    if kind == b"status":
                        offsets[node.id] = time.monotonic() - value["at"]
                    elif kind in (b"transition", b"decision") and node.id in offsets:
                        await lines.put(_sent(kind.decode(), _event(node, value, offsets[node.id])))


def _event(node: Node, value: Mapping[str, Any], offset: float) -> dict[str, Any]:
    ids = {
        name: f"{node.name}/{value[name]}" for name in ("runner", "request") if value.get(name) is not None
    }  # fmt: skip
    return {**value, **ids, "at": value["at"] + offset, "node": node.name}


def _sent(kind: str, value: object) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + as_json(value) + b"\n\n"


Tell = Callable[[Nodes, Exchange], Coroutine[Any, Any, None]]
MERGED: Mapping[tuple[str, str], Tell] = {
    ("GET", "/health"): _health,
    ("GET", "/ready"): _ready,
    ("GET", "/status"): _status,
    ("GET", "/metrics"): _metrics,
    ("GET", "/v1/models"): _models,
    ("GET", "/api/tags"): _tags,
    ("GET", "/api/ps"): _ps,
}
__all__ = ["MERGED", "Tell", "status_of", "tell_events"]
