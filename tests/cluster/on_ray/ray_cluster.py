"""Real Ray on this machine: nodes that differ in their folders of models and their memory, and fronts as processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
from ray.cluster_utils import Cluster as Ray

from tests.support.waiting import assert_soon

LIMIT_S = 90.0  # for the start of an actor on a machine with two cores that does much else
_SMALL: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}

_ASK = """
import sys, ray
ray.init(address=sys.argv[1], namespace="loadmaster", log_to_driver=False, logging_level="ERROR")
for name in sys.argv[2:]:
    print(ray.get(ray.get_actor(name).endpoint.remote()).key)
"""


@dataclass
class Machine:
    """A node of Ray, and what it has."""

    ray: Any
    id: str

    @property
    def name(self) -> str:
        return self.id[:8]

    def actor(self) -> psutil.Process:
        """Return the process of the node's scheduler."""
        raylet = psutil.Process(self.ray.all_processes["raylet"][0].process.pid)
        found = [
            one
            for one in raylet.children(recursive=True)
            if "Node" in one.name() or "ray::Node" in " ".join(one.cmdline())
        ]
        assert len(found) == 1, found
        return found[0]

    def processes(self) -> list[psutil.Process]:
        """Return the raylet, the scheduler and its runners, as far as they live."""
        with suppress(psutil.NoSuchProcess):
            raylet = psutil.Process(self.ray.all_processes["raylet"][0].process.pid)
            return [raylet, *raylet.children(recursive=True)]
        return []

    def kill(self) -> None:
        """End all processes of the node at once, as a power cut does."""
        for one in self.processes():
            with suppress(psutil.NoSuchProcess):
                one.kill()


@dataclass
class Front:
    """A front in a process of its own."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def get(self, path: str) -> httpx2.Response:
        """Return the whole answer."""
        return httpx2.get(f"{self.url}{path}", timeout=60, trust_env=False)

    def post(self, path: str, body: object, **headers: str) -> httpx2.Response:
        """Send JSON and return the whole answer."""
        return httpx2.post(f"{self.url}{path}", json=body, headers=headers, timeout=60, trust_env=False)

    def complete(self, model: str, **more: Any) -> httpx2.Response:
        """Return a short answer of a model."""
        return self.post("/v1/completions", {"model": model, "prompt": "a", "max_tokens": 2, **more})

    def nodes(self) -> set[str]:
        """Return the short names of the nodes that the front knows."""
        return set(self.get("/status").json()["nodes"])


@dataclass
class Machines:
    """A cluster of Ray, and its nodes in the order in which they were added."""

    ray: Ray
    folder: Path
    nodes: list[Machine] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.ray.address)

    def add(self, models: Path, memory: str = "1GiB", **more: str) -> Machine:
        """Add a node with a folder of models, and with more variables in its environment."""
        variables = {
            "LOADMASTER_MODELS": str(models), "LOADMASTER_MEMORY_LIMIT": memory, "LOADMASTER_GPUS": "false",
            "LOADMASTER_LOCK_FOLDER": "none", "LOADMASTER_MEASUREMENT_FILE": "none", "LOADMASTER_PRESTART": "false",
            "LOADMASTER_NUM_PARALLEL": "4", **more,
        }  # fmt: skip
        node = self.ray.add_node(env_vars=variables, **_SMALL)
        machine = Machine(node, node.node_id)
        self.nodes.append(machine)
        return machine

    def remove(self, machine: Machine) -> None:
        """Take a node out of the cluster, if it lives or not."""
        self.nodes.remove(machine)
        self.ray.remove_node(machine.ray, allow_graceful=False)

    def keys(self) -> set[str]:
        """Return the keys of the nodes, as Ray tells them to one who asks."""
        names = [machine.id for machine in self.nodes]
        asking = [sys.executable, "-c", _ASK, self.address, *names]
        return set(subprocess.run(asking, capture_output=True, text=True, check=True).stdout.split())

    def logs(self) -> Path:
        """Return the folder of what Ray and the actors write."""
        return Path(self.nodes[0].ray.get_session_dir_path()) / "logs"

    @contextmanager
    def front(self, *arguments: str) -> Iterator[Front]:
        """Run a front; the block begins when it serves."""
        command = [sys.executable, "-m", "scheduler.cli", "serve", "--ray", self.address, "--port", "0", *arguments]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            front, serving = Front(process), threading.Event()

            def read() -> None:
                assert process.stderr is not None
                for line in process.stderr:
                    front.lines.append(line)
                    if " at http://" in line:
                        front.url = line.partition(" at ")[2].partition(";")[0]
                        serving.set()
                serving.set()

            threading.Thread(target=read, daemon=True).start()
            try:
                assert serving.wait(LIMIT_S) and front.url, front.lines
                yield front
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()


@contextmanager
def machines(folder: Path) -> Iterator[Machines]:
    """Run a cluster without nodes but its head, which has no models."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no usage statistics are sent
    ray = Ray()
    try:
        yield Machines(ray, folder)
    finally:
        ray.shutdown()


def knows(front: Front, *machines: Machine) -> None:
    """Wait until a front knows these nodes, and no others."""
    wanted = {machine.name for machine in machines}
    assert_soon(lambda: front.nodes() == wanted, LIMIT_S)


def events_of(response: httpx2.Response) -> Iterator[Any]:
    """Yield what comes of a stream in OpenAI's terms, but its last word."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
