"""A cluster of three nodes on real Ray, with real llama.cpp on tiny models; collected where Ray is installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.http.conftest import model_folder as model_folder

collect_ignore_glob = [] if find_spec("ray") else ["*.py"]

if find_spec("ray"):
    from tests.cluster.on_ray.ray_cluster import Front, Machine, Machines, knows, machines

    @pytest.fixture(scope="session")
    def cluster(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
        """Three nodes that have all models, for tests that leave them as they are."""
        with machines(tmp_path_factory.mktemp("cluster")) as found:
            for _ in range(3):
                found.add(model_folder)
            yield found

    @pytest.fixture(scope="session")
    def front(cluster: Machines) -> Iterator[Front]:
        """A front of the three nodes."""
        with cluster.front("--dashboard-actions") as one:
            knows(one, *cluster.nodes)
            yield one

    @pytest.fixture
    def extra(cluster: Machines, front: Front, model_folder: Path) -> Iterator[Machine]:
        """A fourth node, to be killed."""
        machine = cluster.add(model_folder)
        knows(front, *cluster.nodes)
        yield machine
        cluster.remove(machine)
        knows(front, *cluster.nodes)
