"""Restarts: of nodes one after the other, without a failed request, and of Ray's head, with Redis and without."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.on_ray.ray_cluster import LIMIT_S, Front, Machines, knows, machines
from tests.support.waiting import assert_soon


def test_nodes_are_restarted_one_after_the_other_without_a_failed_request(cluster: Machines, front: Front) -> None:
    """Clients ask all the time; each node has another process afterwards."""
    before = {node.name: node.actor().pid for node in cluster.nodes}
    statuses: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            statuses.extend(front.complete(model).status_code for model in ("m", "other"))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for node in cluster.nodes:
            assert front.post("/loadmaster/restart", {"node": node.name}).json() == {"status": "restarted"}
    finally:
        done.set()
        for thread in threads:
            thread.join()
    after = {node.name: node.actor().pid for node in cluster.nodes}
    assert {*statuses} == {200} and len(statuses) > 20
    assert before.keys() == after.keys() and not {*before.values()} & {*after.values()}


@pytest.fixture
def redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Redis server where Ray's head keeps what it knows."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("there is no redis-server: apt-get install redis-server")
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    arguments = [program, "--port", str(port), "--save", "", "--dir", str(tmp_path), "--bind", "127.0.0.1"]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
        monkeypatch.setenv("RAY_REDIS_ADDRESS", f"127.0.0.1:{port}")
        yield f"127.0.0.1:{port}"
        process.terminate()


def test_requests_go_on_while_the_head_is_away_and_nodes_join_after_its_restart(
    redis: str, model_folder: Path, tmp_path: Path
) -> None:
    """With external Redis, the head finds again what it knew: nodes, their actors and keys stay."""
    with machines(tmp_path) as cluster:
        cluster.add(model_folder)
        node = cluster.add(model_folder)
        with cluster.front() as front:
            knows(front, *cluster.nodes)
            pids = [one.actor().pid for one in cluster.nodes]
            head = cluster.ray.head_node
            head.kill_gcs_server()
            assert [front.complete("m").status_code for _ in range(5)] == [200] * 5
            head.start_gcs_server()
            added = cluster.add(model_folder)
            knows(front, *cluster.nodes)
            assert [one.actor().pid for one in cluster.nodes if one is not added] == pids
            node.kill()
            cluster.nodes.remove(node)
            assert_soon(lambda: node.name not in front.nodes(), LIMIT_S)
            assert front.complete("other").status_code == 200
