"""loadmaster on nodes of Ray, with the room for models divided among them, reached through a front."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2

from tests.tools.race.contestants import Course, Opened
from tests.tools.race.router import fresh_client, http_asker

NODES = 2
AUTOMATIC = {"LOADMASTER_NUM_PARALLEL": ""}  # as many slots as of every contestant
_LOADS = re.compile(r"^loadmaster_load_seconds_count\{[^}]*\} ([0-9.]+)$", re.MULTILINE)


def no_cluster() -> str:
    """Return why there can be no cluster in this Python; empty: there can."""
    return "" if find_spec("ray") else "no Ray in this Python: run it in that of `make test-cluster`"


@contextmanager
def two_nodes(course: Course) -> Iterator[Opened]:
    """Two nodes on this machine with half of the room each, and a front in a process of its own."""
    from tests.cluster.on_ray.ray_cluster import knows, machines

    with TemporaryDirectory(prefix="race-nodes-") as name, machines(Path(name)) as cluster:
        for _ in range(NODES):
            cluster.add(course.folder, memory="8GiB", LOADMASTER_MAX_RUNNERS=str(course.room // NODES), **AUTOMATIC)
        with cluster.front() as front, fresh_client(front.url) as client:
            knows(front, *cluster.nodes)

            def loads() -> int:
                figures = httpx2.get(f"{front.url}/metrics", timeout=60, trust_env=False).text
                return sum(int(float(count)) for count in _LOADS.findall(figures))

            yield Opened(http_asker(client, course), loads)
