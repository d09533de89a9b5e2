"""What dies: nodes while idle, loading and answering, actors that hang, fronts, clients. Each answer comes once."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil

from tests.cluster.on_ray.ray_cluster import LIMIT_S, Front, Machine, Machines, events_of, knows
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import assert_soon

LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 20000, "ignore_eos": True, "stream": True}


def alone_on(front: Front, machine: Machine, model: str) -> None:
    """Have one node alone hold a model, by asking for it as the node is asked by fronts."""
    front.post("/loadmaster/load", {"model": model, "node": machine.name})
    assert_soon(lambda: (machine.name, model) in loaded(front), LIMIT_S)


def loaded(front: Front) -> list[tuple[str, str]]:
    """Return which nodes hold which models."""
    return [(one["node"], one["model"]) for one in front.get("/status").json()["runners"] if one["state"] != "expiring"]


class Asking:
    """A streamed request on a thread of its own."""

    def __init__(self, front: Front, model: str, **more: Any) -> None:
        self.texts: list[str] = []
        self.errors: list[Any] = []
        self.finished: list[str] = []  # how the answer ended, for each answer that came
        self.ended = ""  # how the connection ended
        self.status = 0
        self.node = ""
        self._thread = threading.Thread(target=self._run, args=(front, {**LONG, "model": model, **more}))
        self._thread.start()

    def _run(self, front: Front, body: dict[str, Any]) -> None:
        try:
            with httpx2.stream("POST", f"{front.url}/v1/completions", json=body, timeout=60, trust_env=False) as got:
                self.status, self.node = got.status_code, got.headers.get("x-loadmaster-node", "")
                for event in events_of(got):
                    if "error" in event:
                        self.errors.append(event["error"])
                    else:
                        (choice,) = event["choices"]
                        self.texts += [choice["text"]] if choice["text"] else []
                        self.finished += [choice["finish_reason"]] if choice.get("finish_reason") else []
            self.ended = "whole"
        except httpx2.TransportError as error:
            self.ended = repr(error)

    def join(self) -> None:
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()


def test_an_idle_node_is_killed_and_its_requests_are_served_elsewhere(front: Front, extra: Machine) -> None:
    """No request fails from the moment of the kill on, and nothing of the node is left running."""
    alone_on(front, extra, "other")
    there = extra.processes()
    extra.kill()
    answers = [front.complete("other") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200] * 5, [answer.text for answer in answers]
    assert extra.name not in {answer.headers["x-loadmaster-node"] for answer in answers}
    assert_soon(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in there))


def test_an_answer_that_has_begun_ends_with_an_error_when_its_node_dies(front: Front, extra: Machine) -> None:
    """The stream breaks in its protocol, and is not begun again elsewhere."""
    alone_on(front, extra, "slow")
    asking = Asking(front, "slow")
    assert_soon(lambda: len(asking.texts) > 3, LIMIT_S)
    extra.kill()
    asking.join()
    assert (
        asking.ended == "whole" and not asking.finished and [one["code"] for one in asking.errors] == ["node_lost"]
    ), asking.errors
    assert asking.node == extra.name


def test_a_request_whose_node_dies_while_it_loads_is_answered_elsewhere(
    cluster: Machines, front: Front, tmp_path: Path
) -> None:
    """It has been told that its model loads; its answer comes from another node, once."""
    write_tiny_model(tmp_path / "late.gguf", seed=7)
    first = cluster.add(tmp_path)
    knows(front, *cluster.nodes)
    actor = first.actor()
    asking = Asking(front, "late", max_tokens=5)
    assert_soon(lambda: [one.suspend() for one in actor.children()], LIMIT_S)  # a load that does not end
    assert_soon(lambda: asking.status == 200, LIMIT_S)  # signs of life come
    second = cluster.add(tmp_path)
    knows(front, *cluster.nodes)
    assert not asking.texts
    first.kill()
    asking.join()
    assert asking.texts and (asking.ended, asking.errors, asking.finished) == ("whole", [], ["length"])
    cluster.remove(first)
    cluster.remove(second)
    knows(front, *cluster.nodes)


def test_a_node_that_hangs_loses_its_requests_to_others_and_is_started_again(front: Front, extra: Machine) -> None:
    """Requests that have not begun are answered elsewhere within seconds; Ray starts the actor again."""
    alone_on(front, extra, "deep/er")
    actor = extra.actor()
    actor.send_signal(signal.SIGSTOP)
    answer = front.complete("deep/er")
    assert answer.status_code == 200 and answer.headers["x-loadmaster-node"] != extra.name
    assert extra.name not in front.nodes()
    assert_soon(lambda: extra.name in front.nodes(), 60)
    assert_soon(lambda: not actor.is_running(), 60)  # Ray may start the next one first
    assert extra.actor().pid != actor.pid


def test_a_front_is_killed_in_the_middle_of_streams_and_others_go_on(cluster: Machines, front: Front) -> None:
    """The streams of the dead front end, and their leases are given back; those of other fronts go on."""
    with cluster.front() as other:
        knows(other, *cluster.nodes)
        dying = [Asking(other, "slow") for _ in range(2)]
        staying = Asking(front, "slow", max_tokens=300)
        asking = (*dying, staying)
        assert_soon(lambda: all(one.texts or one.ended for one in asking), LIMIT_S)
        assert not [one.ended or one.errors for one in asking if one.ended or one.errors]
        other.process.kill()
        killed_at = time.monotonic()
        for one in dying:
            one.join()
        staying.join()
        assert (staying.ended, staying.errors, staying.finished) == ("whole", [], ["length"])
        assert_soon(lambda: not any(one["leases"] for one in front.get("/status").json()["runners"]), 5)
        assert [one.ended == "whole" for one in dying] == [False, False]
        assert time.monotonic() - killed_at < LIMIT_S


def test_a_client_that_leaves_ends_its_request_on_the_node(front: Front) -> None:
    body = {**LONG, "model": "slow"}
    with httpx2.stream("POST", f"{front.url}/v1/completions", json=body, timeout=60, trust_env=False) as response:
        next(events_of(response))
    assert_soon(lambda: not any(one["leases"] for one in front.get("/status").json()["runners"]), 5)


def test_a_node_that_is_added_is_used(cluster: Machines, front: Front, tmp_path: Path) -> None:
    """A model that the new node alone has goes there."""
    write_tiny_model(tmp_path / "new.gguf", seed=9)
    assert front.complete("new").status_code == 404
    machine = cluster.add(tmp_path)
    knows(front, *cluster.nodes)
    assert front.complete("new").headers["x-loadmaster-node"] == machine.name
    cluster.remove(machine)
    knows(front, *cluster.nodes)
    assert front.complete("new").status_code == 404


def test_no_key_is_shown_where_processes_and_logs_are_seen(cluster: Machines, front: Front) -> None:
    """The keys of nodes are in no argument, no variable of the environment and no log."""
    keys = cluster.keys()
    everything = [psutil.Process(front.process.pid), *psutil.Process(front.process.pid).children(recursive=True)]
    everything += [one for machine in cluster.nodes for one in machine.processes()]
    shown = [" ".join(one.cmdline()) + json.dumps(one.environ()) for one in everything]
    logs = [path.read_bytes() for path in cluster.logs().rglob("*") if path.is_file()]
    logs.append("".join(front.lines).encode())
    assert len(keys) == 3 and len(shown) > 9 and len(logs) > 3
    assert not [key for key in keys if any(key in text for text in shown) or any(key.encode() in log for log in logs)]
