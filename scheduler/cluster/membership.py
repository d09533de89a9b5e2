"""Which nodes there are, as Ray has it: told by a process of its own, which is started again where it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import sys
from asyncio.subprocess import PIPE, Process
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

from scheduler.cluster.endpoint import Endpoint
from scheduler.cluster.node import NodeArguments
from scheduler.errors.exceptions import SchedulerError

log = logging.getLogger("loadmaster")

_AGAIN_S = 1.0
_LONGEST_LINE = 1 << 20


@dataclass(eq=False)
class ClusterUnreachable(SchedulerError):
    """There is no Ray cluster at an address, or Ray is not installed."""

    status: ClassVar[int] = 503
    address: str
    reason: str

    def _words(self) -> str:
        return f"no Ray cluster can be reached at {self.address}: {self.reason}"


class Membership:
    """Calls `told` with the nodes that there are, again whenever that changes."""

    def __init__(self, address: str, arguments: NodeArguments, told: Callable[[Sequence[Endpoint]], None]) -> None:
        self._address = address
        self._arguments = arguments
        self._told = told
        self._process: Process | None = None
        self._last: object = None

    async def run(self, ready: asyncio.Future[None]) -> None:
        """Tell of nodes until cancelled; `ready` is done once nodes have been told, or fails at the first start."""
        if find_spec("ray") is None:
            ready.set_exception(ClusterUnreachable(self._address, "pip install 'loadmaster[ray]'"))
            return
        while True:
            try:
                await self._follow(ready)
            finally:
                await self._end()
            await asyncio.sleep(_AGAIN_S)  # the head does not answer, perhaps: what was told goes on to count

    def restart(self, node: str, *, drained: bool = False) -> None:
        """Have Ray start the actor of a node again, which is drained, or else answers nothing any more."""
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps({"restart": node, "drained": drained}).encode() + b"\n")

    async def _follow(self, ready: asyncio.Future[None]) -> None:
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "scheduler.cluster.ray_watch", stdin=PIPE, stdout=PIPE, limit=_LONGEST_LINE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        task = {"address": self._address, "arguments": b64encode(pickle.dumps(self._arguments)).decode()}
        process.stdin.write(json.dumps(task).encode() + b"\n")
        async for line in process.stdout:
            told = json.loads(line)
            if "unreachable" in told:
                if not ready.done():
                    ready.set_exception(ClusterUnreachable(self._address, told["unreachable"]))
                continue
            if told != self._last:
                self._last = told
                for problem in told["problems"]:
                    log.error("%s", problem)
                self._told([Endpoint(**each) for each in told["nodes"]])
            if told["nodes"] and not ready.done():
                ready.set_result(None)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()
