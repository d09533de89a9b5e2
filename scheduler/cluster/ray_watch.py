"""A program beside each front: it has Ray start an actor on each node, and tells where the nodes are reached.

It is a process of its own, since Ray ends the process that it runs in when the head does not answer for long: the front
goes on with what it was told. It reads lines of JSON (what it is to do, then the nodes that have gone silent), writes
lines of JSON (where the nodes are, and what is wrong), and ends with its input.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import threading
import time
from base64 import b64decode
from dataclasses import asdict
from typing import Any, TextIO

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from scheduler.cluster.endpoint import NAMESPACE, Endpoint
from scheduler.cluster.node import Node, NodeArguments

_LOOK_S = 1.0  # between two looks
_ANSWER_S = 0.5  # for so long a look waits for actors; answers that come later count in the next one
_HANGS_S = 5.0  # an actor that answers nothing for so long hangs
_AGAIN_S = 10.0  # until an actor that could not start is started again


class _Nodes:
    """The actors of the nodes, as far as they are known."""

    def __init__(self, arguments: NodeArguments) -> None:
        self._arguments = arguments
        self._actors: dict[str, Any] = {}
        self._asked: dict[str, Any] = {}  # answers that are awaited
        self._endpoints: dict[str, Endpoint] = {}
        self._failed: dict[str, tuple[float, str]] = {}  # when an actor could not start, and why
        self._lock = threading.Lock()  # around `_actors`

    def look(self) -> dict[str, Any]:
        """Return where the nodes are reached, once actors are started where there are none."""
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for gone in self._endpoints.keys() - alive.keys():
            self._forget(gone)
        for id in [id for id in self._failed if time.monotonic() - self._failed[id][0] > _AGAIN_S]:
            del self._failed[id]
        for id, node in alive.items():
            if id not in self._asked and id not in self._failed:
                self._asked[id] = self._actor(node).endpoint.remote()
        awaited = [*self._asked.values()]
        ready = ray.wait(awaited, num_returns=len(awaited), timeout=_ANSWER_S)[0] if awaited else []
        for id in [id for id, asked in self._asked.items() if asked in ready]:
            self._take(id, self._asked.pop(id))
        return {
            "nodes": [asdict(self._endpoints[id]) for id in alive if id in self._endpoints],
            "problems": [f"node {id[:8]}: {why}" for id, (_, why) in self._failed.items()],
        }

    def restart(self, id: str, *, drained: bool) -> None:
        """Have Ray end the actor of a node; the next look starts another, with what this front is told.

        One that is not drained and answers stays: it is the network between it and the front that is at fault.
        """
        with self._lock:
            actor = self._actors.get(id)
        if actor is not None and (drained or not ray.wait([actor.endpoint.remote()], timeout=_HANGS_S)[0]):
            ray.kill(actor, no_restart=True)

    def _actor(self, node: dict[str, Any]) -> Any:
        """Return the actor of a node, which is started where there is none: no one else gets the node's GPUs."""
        id = node["NodeID"]
        with self._lock:
            if id not in self._actors:
                options = ray.remote(Node).options(
                    name=id, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, max_restarts=-1,
                    num_cpus=0, num_gpus=node["Resources"].get("GPU", 0),
                    scheduling_strategy=NodeAffinitySchedulingStrategy(id, soft=False),
                )  # fmt: skip
                self._actors[id] = options.remote(id, node["NodeManagerAddress"], self._arguments)
            return self._actors[id]

    def _take(self, id: str, asked: Any) -> None:
        try:
            self._endpoints[id] = ray.get(asked)
        except RayError as error:
            self._forget(id)
            if "__init__" in str(error):  # what it was told, or its environment, cannot be used
                self._failed[id] = time.monotonic(), str(error).strip().rpartition("\n")[2]

    def _forget(self, id: str) -> None:
        self._endpoints.pop(id, None)
        self._asked.pop(id, None)
        with self._lock:
            self._actors.pop(id, None)


def main() -> None:
    """Tell where the nodes are until the input ends."""
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray writes is no line of ours
    task = json.loads(sys.stdin.readline())
    try:
        ray.init(address=task["address"], namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        _tell(told, {"unreachable": str(error).strip().partition("\n")[0]})
        return
    nodes = _Nodes(pickle.loads(b64decode(task["arguments"])))
    threading.Thread(target=_listen, args=(nodes,), daemon=True).start()
    while True:
        _tell(told, nodes.look())
        time.sleep(_LOOK_S)


def _tell(told: TextIO, value: dict[str, Any]) -> None:
    told.write(json.dumps(value) + "\n")


def _listen(nodes: _Nodes) -> None:
    """Restart the nodes that the front names; end with the input."""
    for line in sys.stdin:
        told = json.loads(line)
        nodes.restart(told["restart"], drained=told["drained"])
    os._exit(0)


if __name__ == "__main__":
    main()
