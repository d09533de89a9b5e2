"""What a client sees while its request waits: a sign of life in a stream, or an answer when its patience ends."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx2
import pytest

from scheduler import Decision
from tests.http.conftest import Serve, Served, eventually

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 3, "temperature": 0},
    "/v1/completions": {"prompt": "a", "max_tokens": 3, "temperature": 0},
    "/v1/messages": {"messages": HELLO, "max_tokens": 3, "temperature": 0},
    "/v1/responses": {"input": "a", "max_output_tokens": 3},
}


@pytest.fixture
def full(serve: Serve) -> Served:
    """A server that has room for one runner at a time."""
    return serve({"max_runners": 1, "keep_alive": "1h"}, sign_of_life="0.1s")


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_shows_signs_of_life_before_its_answer(full: Served, path: str) -> None:
    """Comments, or pings, say what the request waits for; the answer follows when the lease before it is released."""
    held = full.scheduler.acquire("other")
    threading.Timer(1.5, held.release).start()
    body = {"model": "m", "stream": True, **STREAMS[path]}
    with httpx2.stream("POST", f"{full.url}{path}", json=body, timeout=60) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    signs = [line for line in lines if line.startswith(": ")]
    assert any("waiting at position 1, for other to become idle" in sign for sign in signs), signs
    assert ("event: ping" in lines) == (path == "/v1/messages")
    assert lines[0] == signs[0] and any('"model":"m"' in line for line in lines), lines


def test_what_is_known_at_once_has_its_status(full: Served) -> None:
    """An error that is known before the sign of life is due is no stream that breaks."""
    for body, status in (({"model": "nope"}, 404), ({"model": "m", "options": {"num_ctx": 0}}, 400)):
        answer = full.post("/v1/chat/completions", {"messages": HELLO, "stream": True, **body})
        assert answer.status_code == status


def test_a_stream_that_has_begun_ends_with_an_error_in_its_protocol(full: Served) -> None:
    """A request whose time limit passes while it shows signs of life ends with an error, and not with a cut."""
    with full.scheduler.acquire("other"):
        for path, mark in (("/v1/chat/completions", '"code":"acquire_timeout"'), ("/v1/messages", "timeout_error")):
            answer = full.post(path, {"model": "m", "stream": True, "timeout": "0.5s", **STREAMS[path]})
            assert answer.status_code == 200 and mark in answer.text
    assert answer.text.rstrip().endswith("}}")


def test_a_request_that_is_not_streamed_waits_as_long_as_its_client_has_patience(full: Served) -> None:
    """Then it is told what it waited for, and the load goes on, so that the retry is warm."""
    body, patience = {"model": "m", "messages": HELLO, "max_tokens": 2}, {"x-loadmaster-patience": "300ms"}
    with full.scheduler.acquire("other"):
        answer = full.post("/v1/chat/completions", body, **patience)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        loading = answer.json()["error"]["loading"]
        assert loading["state"] == "queued" and loading["position"] == 0
    eventually(lambda: [one.model for one in full.scheduler.status().runners if one.state == "idle"] == ["m"])
    assert full.post("/v1/chat/completions", body, **patience).status_code == 200


def test_a_load_that_goes_on_stays_for_the_retry(full: Served) -> None:
    """Also where the client wants the model unloaded behind its answer: there was no answer yet."""
    body, patience = (
        {"model": "m", "messages": HELLO, "max_tokens": 2, "keep_alive": 0},
        {"x-loadmaster-patience": "300ms"},
    )
    with full.scheduler.acquire("other"):
        assert full.post("/v1/chat/completions", body, **patience).status_code == 503
    eventually(lambda: [one.model for one in full.scheduler.status().runners if one.state == "idle"] == ["m"])
    time.sleep(0.3)
    assert full.post("/v1/chat/completions", body, **patience).status_code == 200


@pytest.mark.parametrize("patience", ["0", "soon", "-", ""])
def test_a_patience_that_is_none_is_refused(full: Served, patience: str) -> None:
    answer = full.post("/v1/completions", {"model": "m", "prompt": "a"}, **{"x-loadmaster-patience": patience})
    assert answer.status_code == 400 and "patience" in answer.json()["error"]["message"]


def test_u42_requests_beyond_the_slots_wait_in_the_schedulers_queue(serve: Serve) -> None:
    """A runner takes one lease for each slot: the others are seen in the queue, which may be full."""
    served = serve({"num_parallel": 1, "max_queue": 2})
    answers: list[int] = []

    def ask() -> None:
        body = {"model": "slow", "prompt": "a", "max_tokens": 300, "ignore_eos": True}
        answers.append(served.post("/v1/completions", body).status_code)

    with served.scheduler.acquire("slow"):
        pass
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(served.scheduler.status().queue) == 2)
    assert [runner.leases for runner in served.scheduler.status().runners] == [1]
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200, 200, 200, 503]


def test_u42_a_request_of_higher_priority_goes_first(serve: Serve) -> None:
    """Behind a slot that is taken, requests go by their priority and not by their age."""
    served = serve({"num_parallel": 1})
    held, events = served.scheduler.acquire("m"), served.scheduler.events()
    requests: list[int] = []
    threads = []
    for priority in (0, 5):
        body = {"model": "m", "prompt": "a", "max_tokens": 1, "priority": priority}
        threads.append(threading.Thread(target=served.post, args=("/v1/completions", body)))
        threads[-1].start()
        eventually(lambda: len(served.scheduler.status().queue) == len(threads))
        requests += [wait.id for wait in served.scheduler.status().queue if wait.id not in requests]
    held.release()
    for thread in threads:
        thread.join()
    told = list(iter(lambda: events.take(0), None))
    granted = [each.request for each in told if isinstance(each, Decision) and each.what == "granted"]
    assert granted == requests[::-1]
