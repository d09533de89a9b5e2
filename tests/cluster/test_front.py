"""A front and two nodes without Ray: what is told of the nodes is told by the test, all else is as in a cluster."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import pytest

from scheduler import Scheduler, Settings
from scheduler.cli.server_client import ServerClient
from scheduler.cli.top import run_ps
from scheduler.cluster import node_service
from scheduler.cluster.endpoint import Endpoint
from scheduler.cluster.front import Front
from scheduler.cluster.node import NodeArguments, _listening
from scheduler.cluster.node_service import HeldLeases, NodeService
from scheduler.cluster.nodes import Nodes
from scheduler.http.app import application
from scheduler.http.settings import ServerSettings
from tests.http.conftest import model_folder as model_folder
from tests.support.running import running
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import assert_soon

BODY = {"prompt": "a", "max_tokens": 2}


class Told(Nodes):
    """Nodes that are told of by the test, in place of Ray."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        super().__init__("", NodeArguments())
        self._endpoints = endpoints

    async def open(self) -> None:
        """Follow the nodes; returns when all have told something."""
        self._told(self._endpoints)
        while len([*self]) < len(self._endpoints):
            await asyncio.sleep(0.01)


@dataclass
class Two:
    """A front with two nodes, `a…` and `b…`."""

    url: str
    services: dict[str, NodeService] = field(default_factory=dict)

    def post(self, path: str, body: object, **headers: str) -> httpx2.Response:
        return httpx2.post(f"{self.url}{path}", json=body, headers=headers, timeout=60, trust_env=False)

    def get(self, path: str) -> Any:
        return httpx2.get(f"{self.url}{path}", timeout=60, trust_env=False).json()

    def complete(self, model: str, **headers: str) -> httpx2.Response:
        return self.post("/v1/completions", {**BODY, "model": model}, **headers)


@pytest.fixture(scope="module")
def two(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    """Node `a` has the models of the folder; `b` has the same file `m`, another file `other`, and `alone`."""
    folder = tmp_path_factory.mktemp("b")
    (folder / "m.gguf").write_bytes((model_folder / "m.gguf").read_bytes())
    write_tiny_model(folder / "other.gguf", seed=77)
    write_tiny_model(folder / "alone.gguf", seed=78)
    (folder / "twin.gguf").write_bytes((folder / "m.gguf").read_bytes())
    with ExitStack() as stack:
        two, endpoints = Two(""), []
        for name, models in (("a", model_folder), ("b", folder)):
            id, key = name * 8, f"key-of-{name}"
            scheduler = stack.enter_context(Scheduler(gpus=False, models=models, max_leases="slots"))
            two.services[id] = service = NodeService(id, scheduler, ServerSettings(api_key=key))
            url = stack.enter_context(running(HeldLeases(application(service, (node_service,)), service)))
            endpoints.append(Endpoint(id, url, key))
        front = Front(Told(endpoints), Settings(), ServerSettings(dashboard_actions=True))
        two.url = stack.enter_context(running(front))
        yield two


def test_a_model_goes_to_the_node_that_has_it(two: Two) -> None:
    for model, node in (("slow", "a" * 8), ("alone", "b" * 8)):
        answer = two.complete(model)
        assert (answer.status_code, answer.headers["x-loadmaster-node"]) == (200, node), answer.text


def test_equal_files_are_one_model_and_different_files_of_one_name_are_told_apart(two: Two) -> None:
    listed = {one["id"]: one["nodes"] for one in two.get("/v1/models")["data"]}
    assert sorted(listed["m"]) == ["a" * 8, "b" * 8]
    marked = sorted(name for name in listed if name.startswith("other"))
    assert len(marked) == 2 and all("@" in name for name in marked) and "other" not in listed
    refusal = two.complete("other")
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (409, "ambiguous_model")
    assert all(name in refusal.json()["error"]["message"] for name in marked)
    for name in marked:
        answer = two.complete(name)
        assert (answer.status_code, [answer.headers["x-loadmaster-node"]]) == (200, listed[name]), answer.text
        assert answer.json()["model"] == name


def test_equal_files_of_one_node_are_models_of_their_own(two: Two) -> None:
    """A model is known by its name where a node has its file twice; the other node's is the same."""
    assert two.complete("twin").headers["x-loadmaster-node"] == "b" * 8
    for _ in range(2):
        assert two.complete("m").status_code == 200
    loaded = {one["model"] for one in two.get("/status")["runners"] if one["node"] == "b" * 8}
    assert "twin" in loaded


def test_a_node_says_at_once_that_a_request_would_wait_and_loads_nothing(two: Two) -> None:
    service = two.services["a" * 8]
    url = two.get("/status")["nodes"]["a" * 8]["url"]
    headers = {"x-loadmaster-within": "0.001", "authorization": "Bearer key-of-a"}
    body = {**BODY, "model": "deep/er"}
    answer = httpx2.post(f"{url}/v1/completions", json=body, headers=headers, trust_env=False)
    assert (answer.status_code, answer.headers["x-loadmaster-error"]) == (503, "would_wait")
    assert "deep/er" not in [one.model for one in service.scheduler.status().runners]


def test_a_drained_node_is_asked_for_nothing_and_others_answer(two: Two) -> None:
    """The front that does not know it yet is told, and asks the other node."""
    for drained, other in (("a" * 8, "b" * 8), ("b" * 8, "a" * 8)):
        two.services[drained].draining = True
        try:
            assert {two.complete("m").headers["x-loadmaster-node"] for _ in range(3)} == {other}
        finally:
            two.services[drained].draining = False
        assert_soon(lambda: not two.get("/status")["nodes"][drained]["draining"])  # noqa: B023


@pytest.mark.parametrize("content", [b"", b"no JSON", b'{"model":7}', b"[1]", b'{"prompt":"a"}'])
def test_a_body_without_a_model_is_refused_as_by_a_server(two: Two, content: bytes) -> None:
    answer = httpx2.post(f"{two.url}/v1/completions", content=content, timeout=60, trust_env=False)
    assert (answer.status_code, answer.headers["x-loadmaster-error"]) == (400, "unsupported_option"), answer.text


def test_actions_are_of_one_node_or_of_all_that_have_the_model(two: Two) -> None:
    loaded: Callable[[], list[str]] = lambda: [  # noqa: E731
        one["node"] for one in two.get("/status")["runners"] if one["model"] == "m" and one["state"] != "expiring"
    ]
    for node in two.services:
        assert two.post("/loadmaster/load", {"model": "m", "node": node}).json()["status"] in ("loaded", "loading")
    assert_soon(lambda: sorted(loaded()) == sorted(two.services))
    assert two.post("/loadmaster/expire", {"model": "m"}).json() == {"status": "expired"}
    assert_soon(lambda: not loaded())
    assert two.post("/loadmaster/load", {"model": "m", "node": "c"}).status_code == 404
    assert two.post("/loadmaster/drain", {"model": "m"}).status_code == 400


def test_ps_and_top_show_the_nodes_of_a_front(two: Two, capsys: pytest.CaptureFixture[str]) -> None:
    """What a front tells has the form of a server's status and events, with the node before each id."""
    two.complete("alone")
    assert run_ps(two.url, as_json=False) == 0
    shown = capsys.readouterr().out
    assert all(f"{node}/cpu" in shown for node in two.services) and f"{'b' * 8}/" in shown
    kinds, nodes = list[str](), set[str]()
    for kind, value in ServerClient(two.url).events():
        kinds.append(kind)
        nodes |= value.get("nodes", {}).keys()
        if kind == "status" and "transition" in kinds:
            break
        if kind == "status" and kinds.count("status") == 1:
            two.complete("alone", **{"x-loadmaster-num-ctx": "300"})  # a reload
    assert kinds[0] == "past" and nodes == {*two.services}


def test_the_key_of_a_client_stays_at_the_front(two: Two) -> None:
    """What the node is sent has the node's key alone: else it would refuse."""
    assert two.complete("m", authorization="Bearer of-the-client", cookie="a=b").status_code == 200


def test_a_head_alone_is_passed_on(two: Two) -> None:
    answer = httpx2.head(f"{two.url}/", timeout=20, trust_env=False)
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed, and would look for the cluster")
def test_without_ray_a_front_does_not_start_and_says_how_to_get_it() -> None:
    command = [sys.executable, "-m", "scheduler.cli", "serve", "--ray", "127.0.0.1:1", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    told = "loadmaster: no Ray cluster can be reached at 127.0.0.1:1: pip install 'loadmaster[ray]'\n"
    assert (ended.returncode, ended.stderr) == (2, told)


def test_connections_to_a_node_end_when_the_other_machine_is_lost() -> None:
    """The kernel asks a silent machine after 5 s and gives up after 15, so that its leases are given back."""
    with _listening("127.0.0.1") as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
            assert [accepted.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [5, 5, 2, 15000]
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
