"""Leases of programs: the node's leases, for as long as the program's connection is open."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from scheduler import LeaseReleased, ModelNotFound, RunnerCrashed
from scheduler.cluster.cluster import Cluster
from tests.cluster.on_ray.ray_cluster import LIMIT_S, Front, Machine, Machines, knows
from tests.support.waiting import assert_soon

_HOLD = """
import sys, threading
from scheduler.cluster.cluster import Cluster
cluster = Cluster.connect(sys.argv[1])
lease = cluster.acquire("deep/er")
print(lease.node, flush=True)
threading.Event().wait()
"""


@pytest.fixture(scope="module")
def program(cluster: Machines) -> Iterator[Cluster]:
    """A program that is connected to the cluster."""
    with Cluster.connect(cluster.address) as connected:
        assert_soon(lambda: len(connected.nodes()) == len(cluster.nodes), LIMIT_S)
        yield connected


def leases(front: Front) -> int:
    """Return how many leases there are on all nodes."""
    return sum(int(runner["leases"]) for runner in front.get("/status").json()["runners"])


def test_a_lease_is_the_node_s_and_answers_with_a_key_of_its_own(program: Cluster, front: Front) -> None:
    with program.acquire("m") as lease:
        assert leases(front) == 1
        assert lease.client.chat("a", max_tokens=2).finish_reason == "length"
        assert "".join(lease.client.stream("a", max_tokens=2))
        assert lease.client.tokenize("abc") == [97, 98, 99]
        assert lease.api_key not in repr(lease)
        url, key = f"{lease.url}/v1/models", lease.api_key
        assert httpx2.get(url, headers={"Authorization": f"Bearer {key}"}, trust_env=False).status_code == 200
        assert httpx2.get(url, trust_env=False).status_code == 401
    assert_soon(lambda: leases(front) == 0)
    assert httpx2.get(url, headers={"Authorization": f"Bearer {key}"}, trust_env=False).status_code == 401


def test_a_lease_cannot_be_used_after_its_release(program: Cluster) -> None:
    lease = program.acquire("m")
    lease.release()
    lease.release()
    with pytest.raises(LeaseReleased):
        lease.client.chat("a")


def test_an_embedder_and_load_options_are_asked_for_as_of_a_scheduler(program: Cluster, front: Front) -> None:
    with program.acquire("m", embedding=True, num_ctx=256) as lease:
        assert len(lease.client.embed("a")) == 64
        options = [one["options"] for one in front.get("/status").json()["runners"] if one["leases"]]
        assert [one["num_ctx"] >= 256 for one in options] == [True]


def test_a_model_that_no_node_has_is_not_found(program: Cluster) -> None:
    with pytest.raises(ModelNotFound):
        program.acquire("there-is-none")


def test_the_lease_of_a_process_that_dies_is_given_back_within_seconds(cluster: Machines, front: Front) -> None:
    process = subprocess.Popen([sys.executable, "-c", _HOLD, cluster.address], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None and process.stdout.readline().strip()
        assert leases(front) == 1
        process.kill()
        assert_soon(lambda: leases(front) == 0, 5)


def test_a_lease_tells_that_its_memory_is_wanted(program: Cluster, front: Front) -> None:
    front.post("/loadmaster/expire", {"model": "deep/er"})
    assert_soon(lambda: "deep/er" not in {one["model"] for one in front.get("/status").json()["runners"]})
    with program.acquire("deep/er", num_ctx=128) as lease, ThreadPoolExecutor(1) as other:
        wanted, lost = threading.Event(), threading.Event()
        lease.on_wanted(wanted.set)
        lease.on_lost(lost.set)
        assert not lease.wanted
        more_context = {"model": "deep/er", "node": lease.node}
        load = other.submit(front.post, "/loadmaster/load", more_context)
        assert wanted.wait(LIMIT_S) and lease.wanted
        lease.release()
        assert load.result().status_code == 200
        assert not lost.is_set() and not lease.lost, "it was given back"


def test_a_lease_is_lost_with_its_node(program: Cluster, cluster: Machines, front: Front, extra: Machine) -> None:
    front.post("/loadmaster/load", {"model": "deep/er", "node": extra.name})
    assert_soon(lambda: extra.name in program.nodes(), LIMIT_S)
    lease: Any = None
    while lease is None or lease.node != extra.name:  # its digest comes a moment later
        lease = program.acquire("deep/er")
    extra.kill()
    assert_soon(lambda: lease.lost)
    with pytest.raises(RunnerCrashed):
        lease.client.chat("a")
    knows(front, *(node for node in cluster.nodes if node is not extra))
