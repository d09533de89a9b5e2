"""What watches the server: figures for Prometheus, spans of OpenTelemetry, the status and the events."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from fsm.machine.runner import READY
from scheduler import Gap, ModelSpec
from scheduler.errors.kinds import WAIT_KINDS
from scheduler.http import create_app, tracing
from scheduler.http.exchange import Exchange
from scheduler.http.observer import Observer
from scheduler.http.service import note_counts
from scheduler.testing import FakeMachine
from tests.http.conftest import Serve, Served, eventually
from tests.support.real import ROOM_FOR_ONE
from tests.support.running import running

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def chat(served: Served, model: str, **more: Any) -> httpx2.Response:
    return served.post("/v1/chat/completions", {"model": model, "messages": HELLO, "max_tokens": 4, **more})


def figures(served: Served, **headers: str) -> dict[tuple[str, frozenset[str]], float]:
    """Return every figure by its name and the values of its labels."""
    answer = served.get("/metrics", **headers)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name.removeprefix("loadmaster_"), frozenset(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def value(told: dict[tuple[str, frozenset[str]], float], name: str, *labels: str) -> float:
    return told[name, frozenset(labels)]


def test_requests_are_counted_by_model_and_outcome(serve: Serve) -> None:
    """A model has one label under all its names; answers, tokens, waits and loads are counted with it."""
    served = serve()
    for name in ("m", "m.gguf", "m"):
        assert chat(served, name).status_code == 200
    told = figures(served)
    assert value(told, "requests_total", "m", "ok") == 3
    assert value(told, "tokens_out_total", "m") == 12
    assert value(told, "tokens_in_total", "m") > 3
    assert value(told, "wait_seconds_count", "m") == value(told, "answer_seconds_count", "m") == 3
    assert value(told, "load_seconds_count", "m") == 1
    assert value(told, "answer_seconds_sum", "m") > 0 < value(told, "load_seconds_sum", "m")
    assert value(told, "load_seconds_sum", "m") <= value(told, "wait_seconds_sum", "m")


def test_tokens_are_counted_in_every_protocol(serve: Serve) -> None:
    """Those of prompts count also where the engine still had them, and those of streams that tell no usage."""
    served, prompt = serve(), "hello " * 60
    said = [{"role": "user", "content": prompt}]
    for path, body in (
        ("/v1/chat/completions", {"messages": said, "max_tokens": 3}),
        ("/v1/completions", {"prompt": f"{prompt}\n", "max_tokens": 3}),
        ("/v1/responses", {"input": prompt, "max_output_tokens": 3}),
        ("/api/chat", {"messages": said, "options": {"num_predict": 3}}),
    ):
        for stream in (False, True):
            for _ in range(2):
                before = figures(served)
                assert served.post(path, {"model": "m", "stream": stream, **body}).status_code == 200
                told = figures(served)
                new = [
                    value(told, name, "m") - before.get((name, frozenset({"m"})), 0)
                    for name in ("tokens_in_total", "tokens_out_total")
                ]
                assert new == [len(prompt) + 1, 3], (path, stream)


def test_tokens_of_messages_are_those_that_were_read_and_those_that_the_engine_had() -> None:
    """Anthropic's Messages part the tokens of a prompt, which a stream tells in its first event."""
    exchange = Exchange({"type": "http", "method": "POST", "headers": []}, never, never)  # type: ignore[arg-type]
    note_counts(
        exchange,
        b'data: {"usage":{"cache_read_input_tokens":360,"input_tokens":1,"output_tokens":0}}\n\n'
        b'data: {"delta":{"text":"\\"input_tokens\\":5"}}\n\ndata: {"usage":{"output_tokens":3}}\n\n',
    )
    assert exchange.notes == {"tokens_in": 361, "tokens_out": 3}


def never(*_: object) -> None:
    """Neither receive nor send anything."""
    raise AssertionError


def test_names_of_strangers_become_no_labels(serve: Serve) -> None:
    """Refused requests are counted by the error's code; a name that leads nowhere is in no figure."""
    served = serve()
    for number in range(5):
        assert chat(served, f"stranger-{number}").status_code == 404
    assert served.post("/v1/chat/completions", {"messages": HELLO}).status_code == 400
    assert served.get("/nowhere-at-all").status_code == 404
    told = figures(served)
    assert value(told, "requests_total", "", "model_not_found") == 5
    assert value(told, "requests_total", "", "unsupported_option") == 1
    assert not [labels for _, labels in told if any("stranger" in label or "nowhere" in label for label in labels)]


def test_a_resolver_that_takes_many_names_adds_one_label(serve: Serve, model_folder: Path) -> None:
    """However a client writes the name of a model, its label is the first that was used."""

    class AnyCase:
        location = "here"

        def find(self, name: str) -> ModelSpec | None:
            return ModelSpec(name, str(model_folder / "m.gguf")) if name.lower() == "anycase" else None

        def names(self) -> list[str]:
            return ["anycase"]

    served = serve()
    served.scheduler.catalog.add(AnyCase())
    for name in ("anyCase", "ANYCASE", "anycase"):
        assert chat(served, name).status_code == 200
    told = figures(served)
    assert value(told, "requests_total", "anyCase", "ok") == 3
    assert not [labels for _, labels in told if labels & {"ANYCASE", "anycase"}]


def test_evictions_are_counted_by_cause(serve: Serve) -> None:
    """What a caller unloads, what its keep-alive ends, and what has to go for another model are told apart."""
    served = serve({"memory_limit": ROOM_FOR_ONE, "keep_alive": "1h"})
    chat(served, "m")
    chat(served, "other", keep_alive=0)
    chat(served, "m")
    served.scheduler.expire(str(served.scheduler.catalog.find("m").path))
    eventually(lambda: not served.scheduler.status().runners)
    told = figures(served)
    assert value(told, "evictions_total", "m", "needed_for") == 1
    assert value(told, "evictions_total", "other", "no_keep_alive") == 1
    assert value(told, "evictions_total", "m", "asked") == 1
    assert value(told, "load_seconds_count", "m") == 2


def test_crashes_are_counted_by_cause(serve: Serve) -> None:
    """A runner whose process is killed is no eviction."""
    served = serve()
    chat(served, "m")
    (runner,) = served.scheduler.status().runners
    subprocess.run(["kill", "-9", str(runner.pid)], check=True)
    eventually(lambda: ("crashes_total", frozenset({"m", "process_exited"})) in figures(served))
    assert value(figures(served), "crashes_total", "m", "process_exited") == 1
    assert not [name for name, labels in figures(served) if name == "evictions_total"]


def test_memory_is_told_by_device_and_by_runner(serve: Serve) -> None:
    """The gauges are the figures of the status, and go with their runners."""
    served = serve({"keep_alive": "1h"})
    chat(served, "m")
    status, told = served.scheduler.status(), figures(served)
    (runner,) = status.runners
    assert value(told, "runner_held_bytes", str(runner.id), "m", "cpu") == runner.held_bytes["cpu"]
    assert value(told, "runner_resident_bytes", str(runner.id), "m", "cpu") > 0
    assert value(told, "runners", "idle") == 1 and value(told, "runners", "ready") == 0
    assert value(told, "runner_leases", str(runner.id), "m") == 0
    host = status.devices[0]
    assert value(told, "device_capacity_bytes", "cpu") == host.capacity_bytes
    assert value(told, "device_held_bytes", "cpu") == host.held_bytes == runner.held_bytes["cpu"]
    served.scheduler.expire(served.scheduler.catalog.find("m").path)
    eventually(lambda: not served.scheduler.status().runners)
    assert not [name for name, _ in figures(served) if name.startswith("runner_")]


def test_the_queue_is_told_by_kinds_of_reasons(serve: Serve) -> None:
    """Each kind has its gauge, whether or not a request waits for it, and there is no other."""
    served = serve({"memory_limit": ROOM_FOR_ONE, "max_wait": "1h"})
    lease = served.scheduler.submit("m").result(20)  # of another caller: one of its own is waited for otherwise
    waiting = served.scheduler.submit("other")
    eventually(lambda: [one.waits_for_kind for one in served.scheduler.status().queue] == ["runners_idle"])
    told = {next(iter(labels)): figure for (name, labels), figure in figures(served).items() if name == "queue"}
    assert told == {kind: float(kind == "runners_idle") for kind in WAIT_KINDS}
    waiting.cancel()
    lease.release()


def test_clients_that_leave_have_an_outcome_of_their_own(serve: Serve) -> None:
    """A request whose client leaves in the middle of the answer is counted as left."""
    served = serve()
    body = {"model": "slow", "messages": HELLO, "max_tokens": 4000, "stream": True, "ignore_eos": True}
    with httpx2.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=60, trust_env=False) as answer:
        next(answer.iter_raw())
    key = ("requests_total", frozenset({"slow", "left"}))
    eventually(lambda: key in figures(served))
    assert figures(served)[key] == 1


def test_events_that_came_too_fast_are_told(serve: Serve) -> None:
    """Where nothing looked for long, the events that were dropped are counted as such."""
    served = serve({"event_buffer": 4})
    for _ in range(5):
        served.scheduler.acquire("m").release()
    assert value(figures(served), "events_missed_total") > 4


@pytest.mark.parametrize("path", ["/metrics", "/status", "/events", "/ready"])
def test_nothing_is_watched_without_the_key(serve: Serve, path: str) -> None:
    """Once there is a key, everything asks for it but whether the server lives."""
    served = serve(api_key="secret-key")
    assert served.get(path).status_code == 401
    assert served.get("/health").status_code == 200
    with httpx2.stream(
        "GET", f"{served.url}{path}", headers={"authorization": "Bearer secret-key"}, trust_env=False
    ) as answer:
        assert answer.status_code == 200
    told = figures(served, **{"x-api-key": "secret-key"})
    assert value(told, "requests_total", "", "invalid_api_key") == 1


def test_the_status_is_json(served: Served) -> None:
    """What the status has is told as JSON."""
    answer = served.get("/status")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json().keys() == served.scheduler.status().to_json().keys()


# -- events ------------------------------------------------------------------------------------------------------------


@contextmanager
def following(served: Served, **headers: str) -> Iterator[Iterator[tuple[str, Any]]]:
    """Yield the server-sent events as kinds and values."""

    def events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
        kind = ""
        for line in lines:
            name, _, text = line.partition(": ")
            if name == "event":
                kind = text
            elif name == "data":
                yield kind, json.loads(text)

    with httpx2.stream("GET", f"{served.url}/events", headers=headers, timeout=20, trust_env=False) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield events(answer.iter_lines())


def test_events_begin_with_the_past_and_go_on_until_the_close(serve: Serve) -> None:
    """A follower gets what has been, the status at once, each event as it comes, and the end with the scheduler's."""
    served = serve({"keep_alive": "1h"})
    chat(served, "m")
    with following(served) as events:
        kind, past = next(events)
        assert kind == "past" and [one["model"] for one in past["runners"]] == ["m"]
        assert [state for _, state in past["runners"][0]["changes"]][:2] == ["loading", "ready"]
        placed = next(one for one in past["decisions"] if one["what"] == "placed")
        assert placed["model"] == "m" and placed["devices"][0]["device"] == "cpu"
        assert not {"queued", "granted"} & {one["what"] for one in past["decisions"]}
        kind, status = next(events)
        assert kind == "status" and [one["model"] for one in status["runners"]] == ["m"]
        chat(served, "other")
        seen = []
        for kind, told in events:
            seen.append((kind, told.get("model"), told.get("trigger")))
            if kind == "status" and len(told["runners"]) == 2:
                assert told["at"] >= status["at"]
                break
        assert ("transition", "other", "launch") in seen
        served.scheduler.close(0)
        rest = [kind for kind, _ in islice(events, 30)]
        assert rest[-1] == "status" and len(rest) < 30  # and then it ends


def test_the_head_of_the_events_is_whole(served: Served) -> None:
    """A client that asks for the headers alone may go on with its connection."""
    address = urlsplit(served.url)
    with closing(socket.create_connection((address.hostname, address.port), 10)) as client:
        client.sendall(
            b"".join(b"%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % each for each in (b"HEAD /events", b"GET /health"))
        )
        answer = b""
        while not answer.endswith(b'{"status":"ok"}'):
            part = client.recv(4096)
            assert part
            answer += part
    assert answer.count(b"HTTP/1.1 200 OK") == 2 and b"text/event-stream" in answer


def test_a_follower_that_leaves_is_forgotten(serve: Serve) -> None:
    """The connections of followers count among those that are under way, and no longer than they last."""
    served = serve(max_connections=1)
    with following(served) as events:
        next(events)
        assert served.get("/status").status_code == 503
    eventually(lambda: served.get("/status").status_code == 200)


def test_followers_find_a_gap_where_events_are_not_kept() -> None:
    """The number of the events that one has decides what comes; what is not kept any more is a gap."""
    with FakeMachine(memory="8GiB", keep_alive=-1) as fake:
        heard: list[Any] = []
        observer = Observer(fake.scheduler, heard.append)
        fake.model("a", size="1GiB")
        fake.scheduler.acquire("a").release()
        observer.catch_up()
        first = observer.count
        assert observer.since(0) == heard and observer.since(first) == []
        while observer.count - first <= 2000:
            fake.scheduler.acquire("a").release()
            observer.catch_up()
        gap, *kept = observer.since(first)
        assert isinstance(gap, Gap) and gap.missed + len(kept) == observer.count - first
        assert kept == heard[-2000:]


def test_a_runner_that_rests_for_a_moment_counts_as_ready() -> None:
    """The past of a busy runner is one long use; rests that last are kept."""
    with FakeMachine(memory="8GiB", keep_alive=-1) as fake:
        observer = Observer(fake.scheduler, lambda event: None)
        fake.model("a", size="1GiB", load="1s")
        for _ in range(5):
            fake.scheduler.acquire("a").release()
        fake.advance("10s")
        fake.scheduler.acquire("a").release()
        fake.scheduler.status()  # behind the release
        observer.catch_up()
        (life,) = observer.lives.values()
        assert [state.value for _, state in life.changes] == ["loading", "ready", "idle", "ready", "idle"]
        began, ended = life.load or (0.0, 0.0)
        assert ended - began == pytest.approx(1.0)
        assert [at for at, state in life.changes if state is READY] == pytest.approx([ended, ended + 10])


def test_an_application_of_a_closed_scheduler_tells_so() -> None:
    """Its figures and its status are there, and events end at once."""
    fake = FakeMachine()
    fake.close()
    with running(create_app(fake.scheduler)) as url:
        assert httpx2.get(f"{url}/metrics", trust_env=False).status_code == 200
        assert httpx2.get(f"{url}/status", trust_env=False).json()["closing"] is True
        assert "event: status" in httpx2.get(f"{url}/events", trust_env=False).text


# -- spans -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """Where the spans of this process go from now on."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


def spans_of(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    found: dict[str, ReadableSpan] = {}

    def all_there() -> bool:
        found.update({span.name: span for span in exporter.get_finished_spans()})
        return "acquire" in found  # the last that ends

    eventually(all_there)
    exporter.clear()
    return found


def test_a_cold_request_has_spans_of_its_parts(serve: Serve, exporter: InMemorySpanExporter) -> None:
    """The wait, the load and the answer follow one another within the lease, in the trace that the client names."""
    served, trace_id = serve({"keep_alive": "1h"}), "0af7651916cd43dd8448eb211c80319c"
    body = {"model": "m", "messages": HELLO, "max_tokens": 4}
    served.post("/v1/chat/completions", body, traceparent=f"00-{trace_id}-b7ad6b7169203331-01")
    spans = spans_of(exporter)
    whole, *parts = (spans[name] for name in ("acquire", "wait", "load", "answer"))
    ends = [whole.start_time, *(part.end_time for part in parts)]
    assert [part.start_time for part in parts] == ends[:-1] and ends == sorted(ends)  # type: ignore[type-var]
    assert {part.parent.span_id for part in parts if part.parent} == {whole.context.span_id}
    assert f"{whole.context.trace_id:032x}" == trace_id and whole.parent is not None
    assert whole.attributes and whole.attributes["gen_ai.request.model"] == "m"
    assert whole.attributes["gen_ai.usage.output_tokens"] == 4 and whole.status.is_ok is True


def test_a_warm_request_waits_for_no_load(serve: Serve, exporter: InMemorySpanExporter) -> None:
    """A load that was over before is no part of a request."""
    served = serve({"keep_alive": "1h"})
    chat(served, "m")
    spans_of(exporter)
    chat(served, "m")
    assert spans_of(exporter).keys() == {"acquire", "wait", "answer"}


@pytest.mark.parametrize(
    ("granted_at", "load", "parts"),
    [
        (None, None, ["wait 12"]),
        (10.0, None, ["wait 10", "answer 12"]),
        (10.0, (1.0, 4.0), ["wait 10", "answer 12"]),
        (10.0, (3.0, 9.0), ["wait 5", "load 10", "answer 12"]),
        (10.0, (7.0, 9.0), ["wait 7", "load 10", "answer 12"]),
    ],
)
def test_a_request_that_joins_a_load_waits_for_what_is_left_of_it(
    granted_at: float | None, load: tuple[float, float] | None, parts: list[str]
) -> None:
    """A request of second 5 that ends at 12: where the load began before it, its own part of the load is told."""
    assert [f"{name} {end:g}" for name, end in tracing._parts(5.0, granted_at, 12.0, lambda: load)] == parts


def test_a_refused_request_has_a_span_that_tells_the_error(serve: Serve, exporter: InMemorySpanExporter) -> None:
    """What was not granted has waited, and has no answer."""
    served = serve()
    exporter.clear()
    assert chat(served, "m", options={"num_parallel": 10_000}).status_code == 400
    spans = spans_of(exporter)
    assert spans.keys() == {"acquire", "wait"} and not spans["acquire"].status.is_ok
    assert spans["acquire"].attributes and spans["acquire"].attributes["error.type"] == "UnsupportedOption"


def test_without_its_api_nothing_is_traced() -> None:
    """The server runs where OpenTelemetry is not installed."""
    code = """
import sys
sys.modules["opentelemetry"] = None
from scheduler.http import create_app, tracing
assert tracing.start is None
tracing.write_spans({}, {}, 0.0, None, lambda: 1 / 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
