"""What a cluster adds: a warm request through a front and a node, beside the same to the node's own HTTP front.

Runs on real Ray, in the environment of `make test-cluster`: `make bench-cluster`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from tests.cluster.on_ray.ray_cluster import knows, machines
from tests.support.tiny_models import write_tiny_model
from tests.tools.bench.http_server import CLIENTS, ONE, ask, milliseconds
from tests.tools.bench.measure import summary

ROUNDS = 5
_ENDPOINT = """
import sys, ray
ray.init(address=sys.argv[1], namespace="loadmaster", log_to_driver=False, logging_level="ERROR")
endpoint = ray.get(ray.get_actor(sys.argv[2]).endpoint.remote())
print(endpoint.url, endpoint.key)
"""


def main() -> None:
    """Print the figures: both ways in turns."""
    with TemporaryDirectory() as name, machines(Path(name)) as cluster:
        folder = Path(name)
        write_tiny_model(folder / "m.gguf", context=4096)
        node = cluster.add(folder)
        with cluster.front() as front:
            knows(front, node)
            asking = [sys.executable, "-c", _ENDPOINT, cluster.address, node.id]
            url, key = subprocess.run(asking, capture_output=True, text=True, check=True).stdout.split()
            ways = {"the node's own front": lambda: ask(url, key, ONE), "a front": lambda: ask(front.url, "", ONE)}
            process = psutil.Process(front.process.pid)
            before, asked = sum(process.cpu_times()[:2]), 0
            for clients in (1, CLIENTS):
                taken: dict[str, list[float]] = {way: [] for way in ways}
                for _ in range(ROUNDS):
                    for way, request in ways.items():
                        taken[way] += milliseconds(request, clients)
                asked += len(taken["a front"])
                print(f"one token, {clients} clients (ms)                       p50      p99")
                for way, each in taken.items():
                    figures = summary(each)
                    print(f"  {way:<40} {figures['p50']:>9.2f} {figures['p99']:>8.2f}")
            spent_us = (sum(process.cpu_times()[:2]) - before) * 1e6 / asked
            print(f"the front takes {spent_us:.0f} µs of the processor for a request, its look at the node included")


if __name__ == "__main__":
    main()
