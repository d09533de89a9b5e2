"""Requests through a front: answered by one of the nodes, in every protocol, as the node's own front answers them."""

from __future__ import annotations

import json
import threading
from collections import Counter
from typing import Any

import httpx2
import pytest

from tests.cluster.on_ray.ray_cluster import Front, Machines, events_of

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


def test_a_request_is_answered_by_a_node_that_says_which(front: Front, cluster: Machines) -> None:
    answer = front.complete("m")
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "m"
    assert answer.headers["x-loadmaster-node"] in {node.name for node in cluster.nodes}


def test_a_model_stays_on_the_node_that_has_loaded_it(front: Front) -> None:
    nodes = Counter(front.complete("other").headers["x-loadmaster-node"] for _ in range(6))
    assert len(nodes) == 1
    runners = [one for one in front.get("/status").json()["runners"] if one["model"] == "other"]
    assert [one["node"] for one in runners] == [*nodes]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", CHAT, "choices"),
        ("/v1/messages", CHAT, "content"),
        ("/api/chat", {**CHAT, "stream": False, "options": {"num_predict": 2}}, "message"),
        ("/api/generate", {"prompt": "a", "stream": False, "options": {"num_predict": 2}}, "response"),
        ("/api/embed", {"input": "a"}, "embeddings"),
        ("/tokenize", {"content": "abc"}, "tokens"),
        ("/api/show", {}, "model_info"),
    ],
)
def test_every_protocol_is_answered(front: Front, path: str, body: dict[str, Any], field: str) -> None:
    answer = front.post(path, {"model": "m", **body})
    assert answer.status_code == 200 and field in answer.json(), answer.text


def test_a_stream_comes_as_it_is_computed(front: Front) -> None:
    body = {"model": "m", "prompt": "a", "max_tokens": 5, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", f"{front.url}/v1/completions", json=body, timeout=60, trust_env=False) as response:
        assert response.headers["content-type"] == "text/event-stream"
        choices = [event["choices"][0] for event in events_of(response)]
    assert len(choices) > 1 and [one["finish_reason"] for one in choices if one["finish_reason"]] == ["length"]
    lines = [json.loads(line) for line in front.post("/api/generate", {"model": "m", "prompt": "a"}).text.splitlines()]
    assert lines[-1]["done"] is True


@pytest.mark.parametrize(("path", "field"), [("/v1/completions", "message"), ("/api/generate", None)])
def test_an_error_is_told_in_the_protocol_of_the_request(front: Front, path: str, field: str | None) -> None:
    answer = front.post(path, {"model": "there-is-none", "prompt": "a"})
    error = answer.json()["error"]
    assert answer.status_code == 404 and "there-is-none" in (error if field is None else error[field])


def test_a_hot_model_gets_a_second_copy_when_its_slots_are_taken(front: Front) -> None:
    """More streams than one runner has slots are served by several nodes at once."""
    body = {"model": "slow", "prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
    nodes: list[str] = []

    def stream() -> None:
        with httpx2.stream("POST", f"{front.url}/v1/completions", json=body, timeout=60, trust_env=False) as response:
            for _ in events_of(response):
                continue
            nodes.append(response.headers["x-loadmaster-node"])

    front.complete("slow")
    threads = [threading.Thread(target=stream) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(nodes) == 12 and len({*nodes}) > 1, Counter(nodes)


def test_lists_name_the_nodes(front: Front, cluster: Machines) -> None:
    names = sorted(node.name for node in cluster.nodes)
    listed = {one["id"]: one for one in front.get("/v1/models").json()["data"]}
    assert {*listed} == {"m", "other", "deep/er", "slow"}
    assert sorted(listed["m"]["nodes"]) == names
    tags = {one["name"]: one for one in front.get("/api/tags").json()["models"]}
    assert sorted(tags["m:latest"]["nodes"]) == names and tags["m:latest"]["size"] > 0
    front.complete("m")
    loaded = [one for one in front.get("/api/ps").json()["models"] if one["name"] == "m:latest"]
    assert loaded and all(one["node"] in names for one in loaded)
    figures = front.get("/metrics").text
    assert all(f'node="{name}"' in figures for name in names)
    assert figures.count("# TYPE loadmaster_queue gauge") == 1
