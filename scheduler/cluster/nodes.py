"""The nodes that requests can be sent to, each with its last digest, and what was sent since."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any, ClassVar

from fsm.cluster.choice import Choice
from fsm.cluster.digest import ContentId, NodeId
from fsm.cluster.router import Router
from scheduler.cluster.contents import embedder_of, plain
from scheduler.cluster.endpoint import Endpoint
from scheduler.cluster.membership import ClusterUnreachable, Membership
from scheduler.cluster.node import NodeArguments
from scheduler.cluster.node_service import DRAIN, WATCH
from scheduler.cluster.relay import parts_of
from scheduler.cluster.routing import AmbiguousModel, Asked, Names, contents_of, marked
from scheduler.cluster.wire import digest_of_line
from scheduler.errors.exceptions import SchedulerError
from scheduler.http.exchange import as_json
from scheduler.http.upstream import BROKEN, answer_at

log = logging.getLogger("loadmaster")

SILENT_S = 5.0  # a node that tells nothing for so long hangs
LEAST_BOUND_S = 0.5  # a shorter wait is not worth another node
RESTART_S = 30.0  # one that has hung for so long is started again
_AGAIN_S = 0.2  # between two tries to follow a node
_OK = 200
_READY_S = 60.0  # until the first node has started


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that is to be asked, for a content, and how long a request may wait there at most; None: for ever."""

    node: Node
    content: ContentId | None = None  # None: the request is for no model that a node has
    bound_s: float | None = None


class NodeLost(Exception):
    """The node has died or hangs: what was asked of it is not answered."""


class Node:
    """One life of a node: where it is, and what is asked of it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.id = NodeId(endpoint.node)
        self.heard_at = monotonic()
        self._calls: set[asyncio.Timeout] = set()

    @property
    def name(self) -> str:
        """The short name of the node, as lists have it."""
        return short(self.id)

    def lose(self) -> None:
        """Have what was asked of the node raise `NodeLost`: it has died, or hangs."""
        for call in self._calls:
            with suppress(RuntimeError):  # it ends just now
                call.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def calling(self) -> AsyncIterator[None]:
        """Do what is asked of the node; raises `NodeLost` when the node is lost."""
        try:
            async with asyncio.timeout(None) as call:
                self._calls.add(call)
                yield
        except BROKEN as error:
            raise NodeLost from error
        except TimeoutError:
            if not call.expired():
                raise
            raise NodeLost from None
        finally:
            self._calls.discard(call)

    async def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """Send JSON, and return status and value of the answer; raises `NodeNotFound` where the node is lost."""
        to, headers = self.endpoint, {"content-type": "application/json"}
        try:
            async with self.calling(), answer_at(to.url, to.key, "POST", path, as_json(body), headers) as response:
                return response.status_code, json.loads(await response.aread())
        except NodeLost:
            raise NodeNotFound(self.name, ()) from None


@dataclass(eq=False)
class NodeNotFound(SchedulerError):
    """No node that answers has this name."""

    status: ClassVar[int] = 404
    node: str
    nodes: tuple[str, ...]  # that there are

    def _words(self) -> str:
        return f"there is no node {self.node!r}; there are {', '.join(self.nodes) or 'none that answer'}"


def short(id: str) -> str:
    """Return the short name of a node."""
    return id[:8]


class Nodes:
    """All nodes of a cluster, followed in one event loop from `open` to `close`."""

    def __init__(self, address: str, arguments: NodeArguments) -> None:
        self._address = address
        self.router = Router()  # of the nodes that answer
        self._names: Names | None = None  # None: a node has told something else since
        self._some = asyncio.Event()  # set once a node has told something
        self._membership = Membership(address, arguments, self._told)
        self._nodes: dict[str, Node] = {}
        self._tasks: dict[Endpoint, asyncio.Task[None]] = {}
        self._member: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to follow the nodes; returns when there is one. Raises `ClusterUnreachable`."""
        ready = asyncio.get_running_loop().create_future()
        self._member = asyncio.ensure_future(self._membership.run(ready))
        try:
            async with asyncio.timeout(_READY_S):
                await ready
                await self._some.wait()
        except TimeoutError:
            await self.close()
            raise ClusterUnreachable(self._address, f"no node has started within {_READY_S:g} s") from None
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Follow them no longer."""
        tasks = [task for task in (self._member, *self._tasks.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def __iter__(self) -> Iterator[Node]:
        return iter([self._nodes[id] for id in self.router.digests if id in self._nodes])

    def named(self, name: str) -> Node:
        """Return the node of an id, or of the short name that lists have; raises `NodeNotFound`."""
        for node in self:
            if name in (node.id, node.name):
                return node
        raise NodeNotFound(name, tuple(node.name for node in self))

    async def drain(self, node: Node) -> None:
        """Have a node take nothing new, and return when nothing is under way there."""
        while True:
            status, told = await node.post(DRAIN, {"draining": True})
            if status == _OK and not told["under_way"]:
                return
            await asyncio.sleep(_AGAIN_S)

    async def restart(self, node: Node) -> None:
        """Drain a node, have Ray start its actor again, and return when that has told of itself."""
        await self.drain(node)
        self._membership.restart(node.id, drained=True)
        while (there := self._nodes.get(node.id)) is node or there is None or node.id not in self.router.digests:
            await asyncio.sleep(_AGAIN_S)

    def names(self) -> Names:
        """Return what nodes have under each name."""
        if self._names is not None:
            return self._names
        found: dict[str, list[tuple[NodeId, ContentId]]] = {}
        for node, digest in self.router.digests.items():
            for content, model in digest.models.items():
                for name in model.names:
                    found.setdefault(name, []).append((node, content))
        self._names = found
        return found

    def contents_of(self, asked: Asked) -> set[ContentId]:
        """Return the contents that nodes have under the name that is asked for."""
        return set() if asked.model is None else contents_of(asked.model, self.names())

    def candidates(self, asked: Asked) -> Iterator[Candidate]:
        """Yield nodes to ask, the best of those that are there now, and how long a request may wait there at most.

        The bound is what the next node promises; there is None for the last. When all have said that a request would
        wait for longer, they are asked once more, to have it wait there. Raises `AmbiguousModel`.
        """
        contents = self._one_model(asked)
        if not contents:
            yield from (Candidate(node) for node in self)  # any of them answers
            return
        for bounded in (True, False):
            asked_already: set[NodeId] = set()
            while ranked := self._ranked(contents, asked, asked_already):
                (best, content), *others = ranked
                asked_already.add(best.node)
                if not bounded or (others or len(asked_already) > 1):
                    following_s = others[0][0].seconds if others else 0.0
                    bound_s = max(following_s, best.seconds * 2, LEAST_BOUND_S)
                    yield Candidate(self._nodes[best.node], content, bound_s if bounded else None)

    def _ranked(
        self, contents: Collection[ContentId], asked: Asked, refused: Collection[NodeId]
    ) -> list[tuple[Choice, ContentId]]:
        """Return the nodes that have any of the contents, the best first; most often there is one content."""
        ranked = [
            (choice, content)
            for content in contents
            for choice in self.router.choose(monotonic(), content, asked.options, refused)
            if choice.node in self._nodes
        ]
        return ranked if len(contents) == 1 else sorted(ranked, key=lambda one: one[0].seconds + one[0].cost_s)

    def _one_model(self, asked: Asked) -> list[ContentId]:
        """Return the contents of the model that is asked for, which are equal files; raises `AmbiguousModel`."""
        contents = sorted(self.contents_of(asked))
        if len({plain(content) for content in contents}) > 1:
            assert asked.model is not None
            raise AmbiguousModel(asked.model, tuple(sorted({marked(asked.model, one) for one in contents})))
        if asked.embeds:
            embedders = {embedder_of(content) for content in contents}
            known = {one for digest in self.router.digests.values() for one in embedders & digest.models.keys()}
            return sorted(known) or contents
        return contents

    def _told(self, endpoints: Sequence[Endpoint]) -> None:
        """Follow the nodes that there are now, and those alone."""
        for endpoint in self._tasks.keys() - set(endpoints):
            self._tasks.pop(endpoint).cancel()
            if self._nodes[endpoint.node].endpoint == endpoint:
                self._lose(self._nodes.pop(endpoint.node))
        for endpoint in endpoints:
            if endpoint not in self._tasks:
                self._nodes[endpoint.node] = node = Node(endpoint)
                self._tasks[endpoint] = asyncio.ensure_future(self._follow(node))

    def _lose(self, node: Node) -> None:
        self.router.lost(node.id)
        self._names = None
        node.lose()

    async def _follow(self, node: Node) -> None:
        """Take what a node tells, again and again; where it breaks off or is silent, the node counts as lost."""
        asked_to_restart = False
        while True:
            with suppress(*BROKEN, ValueError, TimeoutError):
                await self._listen(node)
            if node.id in self.router.digests:
                log.warning("node %s answers no more", node.name)
                self._lose(node)
            if monotonic() - node.heard_at > RESTART_S and not asked_to_restart:
                asked_to_restart = True
                self._membership.restart(node.id)
            await asyncio.sleep(_AGAIN_S)

    async def _listen(self, node: Node) -> None:
        to, rest = node.endpoint, b""
        async with asyncio.timeout(SILENT_S) as silence, answer_at(to.url, to.key, "GET", WATCH, b"", {}) as response:
            async for part in parts_of(response):
                node.heard_at = monotonic()
                silence.reschedule(asyncio.get_running_loop().time() + SILENT_S)
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    self._take(node, line)

    def _take(self, node: Node, line: bytes) -> None:
        """Take a line that a node has told; an empty one says that nothing has changed."""
        known = self.router.digests.get(node.id)
        digest = digest_of_line(line) if line else known
        if line:
            self._names = None
        if digest is not None:
            self.router.heard(digest, node.heard_at)
            if known is None:
                self._some.set()
