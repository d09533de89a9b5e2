"""The cluster for programs: leases on runners of any node, held over the network."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from time import monotonic
from typing import Any, ClassVar, Self, TypeVar, Unpack

import httpx2

from scheduler.cluster.node import NodeArguments
from scheduler.cluster.node_service import LEASE, WANTED, WITHIN
from scheduler.cluster.nodes import Candidate, Node, NodeLost, Nodes
from scheduler.cluster.relay import parts_of
from scheduler.cluster.routing import Asked, options_in
from scheduler.concurrency.event_loops import warn_if_loop_runs
from scheduler.config.settings import SettingsArguments
from scheduler.engines.runner_client import RunnerClient
from scheduler.errors.exceptions import LeaseReleased, ModelNotFound, RunnerCrashed, SchedulerError
from scheduler.http.errors import ERROR_HEADER
from scheduler.http.exchange import as_json
from scheduler.http.rules import LOAD_OPTIONS
from scheduler.http.upstream import answer_at
from scheduler.runtime.request_parser import AcquireOptions

Value = TypeVar("Value")
_GO_ON = frozenset({"would_wait", "draining", "queue_full", "scheduler_closed", "model_not_found"})


@dataclass(eq=False)
class NotGranted(SchedulerError):
    """No node has granted a lease: `code` is that of the last refusal, as the server has them."""

    status: ClassVar[int] = 503
    model: str
    code: str
    message: str

    def _words(self) -> str:
        return f"no node has granted a lease on {self.model!r}: {self.message}"


class ClusterLease:
    """A lease on a runner of a node, held for as long as its connection to the node is open.

    It is given back by `release`, at the end of a `with` block, and within seconds when the process of the holder ends.
    `client` has the methods of a lease (`chat`, `complete`, `stream`, `embed`, their twins for event loops, …); `url`
    and `api_key` are for other clients, with OpenAI's API under `/v1`.
    """

    def __init__(self, node: Node, told: Mapping[str, Any], release: Callable[[], None]) -> None:
        self.node = node.name
        self.model = str(told["model"])
        self.url = node.endpoint.url + told["path"]
        self._lost, self._wanted = Future[None](), Future[None]()
        self._key = str(told["key"])
        self._heard = b""
        self._release = release
        self._released = False

    @property
    def api_key(self) -> str:
        """The key of this lease, which ends with it."""
        return self._key

    @property
    def lost(self) -> bool:
        """Whether the runner, or its node, is gone."""
        return self._lost.done()

    @property
    def wanted(self) -> bool:
        """Whether other requests have waited for the runner's memory: a long holder does well to release its lease."""
        return self._wanted.done()

    def on_lost(self, callback: Callable[[], object]) -> None:
        """Have `callback` called from another thread, once, when the runner or its node is gone; at once if it is."""
        self._lost.add_done_callback(lambda _: _in_a_thread(callback))

    def on_wanted(self, callback: Callable[[], object]) -> None:
        """Have `callback` called from another thread, once, when other requests wait for the runner's memory."""
        self._wanted.add_done_callback(lambda _: _in_a_thread(callback))

    @cached_property
    def client(self) -> RunnerClient:
        """A client of the runner; raises `LeaseReleased` after the release, and `RunnerCrashed` when it is lost."""
        if self._released:
            raise LeaseReleased(self.model)
        if self.lost:
            raise RunnerCrashed(self.model, 0, f"it was lost with its node {self.node}, or has ended there")
        return RunnerClient(self.url, self._key)

    def _hear(self, part: bytes) -> None:
        self._heard += part
        if WANTED in self._heard and not self.wanted:
            self._wanted.set_result(None)

    def release(self) -> None:
        """Release the lease; a second call is harmless. Answers under way go on to their end."""
        self._released = True
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "released" if self._released else "lost" if self.lost else "held"
        return f"<ClusterLease on {self.model!r} of node {self.node}: {state}>"


class Cluster:
    """The nodes of a Ray cluster, for a program; any of its threads may use it. Close it, or use a `with` block."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._loop = asyncio.new_event_loop()
        self._held: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="loadmaster-cluster", daemon=True)
        self._thread.start()

    @classmethod
    def connect(cls, address: str = "auto", **settings: Unpack[SettingsArguments]) -> Cluster:
        """Return the cluster at the address of a Ray cluster, once one of its nodes answers.

        Nodes that have no scheduler yet start one with these settings. Raises `ClusterUnreachable`.
        """
        cluster = cls(Nodes(address, NodeArguments({**settings})))
        try:
            cluster._run(cluster._nodes.open())
        except BaseException:
            cluster.close()
            raise
        return cluster

    def acquire(self, model: str, **asking: Unpack[AcquireOptions]) -> ClusterLease:
        """Return a lease on a model, from the node that grants it soonest; keywords are those of `Scheduler.acquire`.

        Raises `ModelNotFound`, `AmbiguousModel` where nodes have different files under the name, and `NotGranted`.
        """
        warn_if_loop_runs("acquire", "await aacquire")
        return self._run(self._acquire(model, asking))

    async def aacquire(self, model: str, **asking: Unpack[AcquireOptions]) -> ClusterLease:
        """Like `acquire`, for event loops."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._acquire(model, asking), self._loop))

    def nodes(self) -> list[str]:
        """Return the short names of the nodes that answer now."""
        return [node.name for node in self._nodes]

    def drain(self, node: str) -> None:
        """Have a node take nothing new, and return when nothing is under way there: its machine may be stopped."""
        self._run(self._nodes.drain(self._nodes.named(node)))

    def restart(self, node: str) -> None:
        """Drain a node and start its scheduler again, as after an update; returns when it answers again."""
        self._run(self._nodes.restart(self._nodes.named(node)))

    def close(self) -> None:
        """Release all leases, and follow the nodes no longer; a second call is harmless."""
        if self._loop.is_closed():
            return
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, Value]) -> Value:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # Ctrl-C came

    async def _close(self) -> None:
        for task in self._held:
            task.cancel()
        await asyncio.gather(*self._held, return_exceptions=True)
        await self._nodes.close()

    async def _acquire(self, model: str, asking: AcquireOptions) -> ClusterLease:
        options = {name: value for name, value in asking.items() if name in LOAD_OPTIONS}
        asked = Asked(model, options_in(options), embeds=bool(asking.get("embedding")))
        body = {"model": model, **{k: v for k, v in asking.items() if k not in options}, "options": options}
        refusal: NotGranted | None = None
        for candidate in self._nodes.candidates(asked):
            found = await self._lease_of(candidate, body)
            if isinstance(found, ClusterLease):
                return found
            refusal = found or refusal
            if refusal is not None and refusal.code not in _GO_ON:
                raise refusal
        if refusal is None or refusal.code == "model_not_found":
            raise ModelNotFound(model) if self.nodes() else NotGranted(model, "no_node", "no node answers")
        raise refusal

    async def _lease_of(self, candidate: Candidate, body: Mapping[str, Any]) -> ClusterLease | NotGranted | None:
        """Ask a node for a lease; None: the node was lost."""
        granted: asyncio.Future[ClusterLease | NotGranted | None] = self._loop.create_future()
        task = self._loop.create_task(self._hold(candidate, body, granted))
        self._held.add(task)
        task.add_done_callback(self._held.discard)
        try:
            return await granted
        except asyncio.CancelledError:
            task.cancel()
            raise

    async def _hold(
        self, candidate: Candidate, body: Mapping[str, Any], granted: asyncio.Future[ClusterLease | NotGranted | None]
    ) -> None:
        """Ask for a lease and hold it until it is released or lost."""
        node, to, router = candidate.node, candidate.node.endpoint, self._nodes.router
        headers = {"content-type": "application/json"}
        if candidate.bound_s is not None:
            headers[WITHIN] = f"{min(candidate.bound_s, 1e9):.3f}"
        sent = None if candidate.content is None else router.forward(monotonic(), node.id, candidate.content)
        lease: ClusterLease | None = None
        try:
            async with node.calling(), answer_at(to.url, to.key, "POST", LEASE, as_json(body), headers) as response:
                if response.is_error:
                    granted.set_result(await _refusal(body["model"], response))
                    return
                parts = parts_of(response)
                told, more = await _first_line(parts)
                lease = ClusterLease(node, json.loads(told), self._releasing(asyncio.current_task()))
                granted.set_result(lease)
                lease._hear(more)
                async for part in parts:  # the node ends the answer when the runner is gone
                    lease._hear(part)
        except NodeLost:
            pass
        finally:
            if sent is not None:
                router.ended(sent)
            if lease is not None and not lease._released:
                lease._lost.set_result(None)
            if not granted.done():
                granted.set_result(None)

    def _releasing(self, task: asyncio.Task[None] | None) -> Callable[[], None]:
        assert task is not None

        def release() -> None:
            with suppress(RuntimeError):  # the cluster is closed
                self._loop.call_soon_threadsafe(task.cancel)

        return release


def _in_a_thread(callback: Callable[[], object]) -> None:
    threading.Thread(target=callback, name="loadmaster-lease", daemon=True).start()


async def _first_line(parts: AsyncIterator[bytes]) -> tuple[bytes, bytes]:
    """Return the first line, and what came with it."""
    heard = b""
    while b"\n" not in heard:
        heard += await anext(parts)
    line, _, more = heard.partition(b"\n")
    return line, more


async def _refusal(model: str, response: httpx2.Response) -> NotGranted:
    content = await response.aread()
    try:
        message = str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = "the node has refused the request"
    return NotGranted(model, response.headers.get(ERROR_HEADER, "error"), message)


__all__ = ["Cluster", "ClusterLease", "NotGranted"]
