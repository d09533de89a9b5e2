"""Ollama's API: its own client as the judge, and the engine alone as the measure of answers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import ollama
import psutil
import pytest

from scheduler import Scheduler
from scheduler.http import create_app
from scheduler.http.ollama import _cut_tokens
from scheduler.models.sources import OllamaStore
from tests.http.conftest import Serve, Served, eventually, running
from tests.support.stores import PARAMS, TEMPLATE, ollama_model
from tests.support.tiny_models import CALL, END, TEMPLATE_WITH_TOOLS, write_tiny_model
from tests.support.written_projector import write_projector

HELLO = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "seed": 1, "num_predict": 12}
TEMPLATE_THAT_THINKS = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
<think>
{% if enable_thinking is defined and enable_thinking is false %}
</think>

{% endif %}{% endif %}"""
TIDE = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "when the water is high",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Hull", "Lisbon"]}}, "required": ["city"]},
    },
}
SYSTEM = "application/vnd.ollama.image.system"


def png(side: int = 32) -> bytes:
    """Return a grey picture."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress((b"\0" + b"\x80" * 3 * side) * side)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models that differ in what they are capable of, and a store of Ollama's beside it."""
    place = tmp_path_factory.mktemp("place")
    folder = place / "models"
    (folder / "sees").mkdir(parents=True)
    write_tiny_model(folder / "m.gguf", context=1024, fills_gaps=True)
    write_tiny_model(folder / "calls.gguf", context=2048, template=TEMPLATE_WITH_TOOLS, biases={CALL: 40})
    write_tiny_model(folder / "thinks.gguf", template=TEMPLATE_THAT_THINKS)
    write_tiny_model(folder / "ranks.gguf", reranker=True)
    write_tiny_model(folder / "endless.gguf", context=32768, layers=8, width=256, biases={END: -40})
    write_tiny_model(folder / "sees" / "sees.gguf", context=1024, sees=True)
    write_projector(folder / "sees" / "mmproj.gguf", 64, image=256)
    ollama_model(
        place / "store", "registry.ollama.ai/library/mario:latest", (folder / "m.gguf").read_bytes(),
        (SYSTEM, b"You are Mario."), (PARAMS, json.dumps({"temperature": 0, "num_ctx": 256, "stop": ["~"]}).encode()),
        (TEMPLATE, b"{{ .System }} {{ .Prompt }}{{ .Suffix }}"),
    )  # fmt: skip
    return place


@pytest.fixture(scope="module")
def kept(place: Path) -> Iterator[Served]:
    """A server of these models."""
    with Scheduler(gpus=False, models=place / "models", keep_alive="1h") as scheduler:
        scheduler.catalog.add(OllamaStore(place / "store"))
        with running(create_app(scheduler)) as url:
            yield Served(url, scheduler)


@pytest.fixture(scope="module")
def client(kept: Served) -> Iterator[ollama.Client]:
    with ollama.Client(kept.url) as client:
        yield client


def alone(served: Served, model: str, messages: Any, **parameters: Any) -> str:
    """Return what the engine answers a lease."""
    with served.scheduler.acquire(model) as lease:
        return str(lease.chat(messages, temperature=0, seed=1, **parameters))


def loaded(client: ollama.Client) -> dict[str | None, Any]:
    return {each.model: each for each in client.ps().models}


def refused(call: Callable[[], object]) -> ollama.ResponseError:
    with pytest.raises(ollama.ResponseError) as error:
        call()
    return error.value


# -- chats and prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_a_chat_is_the_one_that_the_engine_gives_alone(client: ollama.Client, kept: Served, streamed: bool) -> None:
    """With the same seed the text is what a lease on the same runner gives, whole and in lines."""
    whole = alone(kept, "m", HELLO, max_tokens=12)
    if streamed:
        lines = list(client.chat("m", HELLO, options=GREEDY, stream=True))
        assert len(lines) > 3 and [line.done for line in lines] == [*[False] * (len(lines) - 1), True]
        assert lines[-1].message.content == "" and "".join(line.message.content or "" for line in lines) == whole
    else:
        lines = [client.chat("m", HELLO, options=GREEDY)]
        assert lines[0].message.content == whole
    last = lines[-1]
    assert (last.done_reason, last.prompt_eval_count, last.eval_count) == ("length", len("hello\n"), 12)
    assert {line.model for line in lines} == {"m"} and {line.message.role for line in lines} == {"assistant"}
    parts = (last.load_duration or 0) + (last.prompt_eval_duration or 0) + (last.eval_duration or 0)
    assert 0 < parts <= (last.total_duration or 0)
    assert datetime.fromisoformat(last.created_at or "").tzinfo is not None


def test_an_asynchronous_client_is_answered_too(kept: Served) -> None:
    async def texts() -> tuple[str, str]:
        async with ollama.AsyncClient(kept.url) as client:
            lines = await client.generate("m", "hi", options=GREEDY, stream=True)
            pieces = [line.response or "" async for line in lines]
            return "".join(pieces), (await client.generate("m", "hi", options=GREEDY)).response or ""

    pieces, whole = asyncio.run(texts())
    assert pieces == whole == alone(kept, "m", "hi", max_tokens=12)


def test_a_stream_is_what_a_body_without_the_field_asks_for(kept: Served) -> None:
    """Lines of JSON come unless `stream` is false; null counts as not named."""
    for body in ({"prompt": "a"}, {"prompt": "a", "stream": None}):
        answer = kept.post("/api/generate", {"model": "m", "options": {"num_predict": 2}, **body})
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert json.loads(answer.text.splitlines()[-1])["done"] is True
    answer = kept.post("/api/generate", {"model": "m", "prompt": "a", "stream": False})
    assert answer.headers["content-type"] == "application/json" and answer.json()["done"] is True


def test_a_prompt_is_a_chat_with_a_system_text(client: ollama.Client, kept: Served) -> None:
    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    answer = client.generate("m", "hello", system="be brief", options=GREEDY)
    assert answer.response == alone(kept, "m", said, max_tokens=12)
    assert answer.prompt_eval_count == len("be brief\nhello\n")


def test_a_raw_prompt_is_continued_as_it_is(client: ollama.Client, kept: Served) -> None:
    with kept.scheduler.acquire("m") as lease:
        whole = str(lease.complete("hello", temperature=0, seed=1, max_tokens=12))
    answer = client.generate("m", "hello", raw=True, options=GREEDY)
    assert (answer.response, answer.prompt_eval_count, answer.done_reason) == (whole, 5, "length")
    assert "raw" in refused(lambda: client.generate("m", "hello", raw=True, system="x")).error
    answer = client.generate("m", "hello", raw=True, options=GREEDY, format={"type": "array", "items": False})
    assert (answer.response or "").startswith("[")


def test_a_gap_is_filled_where_the_model_can(client: ollama.Client) -> None:
    """What stands before and behind a gap reaches the engine; a model without the tokens for it is refused."""
    answer = client.generate("m", "ab", suffix="cd", options=GREEDY)
    assert (answer.prompt_eval_count or 0) >= len("<ab|cd>") and answer.eval_count == 12
    error = refused(lambda: client.generate("thinks", "ab", suffix="cd"))
    assert error.status_code == 400 and "Infill is not supported" in error.error


def test_what_the_engine_is_not_asked_is_refused(client: ollama.Client) -> None:
    for body in ({"template": "{{ .Prompt }}"}, {"context": [1, 2]}):
        assert next(iter(body)) in refused(lambda body=body: client.generate("m", "hello", **body)).error


def test_options_of_sampling_reach_the_engine(client: ollama.Client, kept: Served) -> None:
    """The answer is the one that the engine gives with the same parameters by its own names."""
    named = {"top_k": 3, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "repeat_penalty": 1.5, "repeat_last_n": 9}
    named |= {"presence_penalty": 0.5, "frequency_penalty": 0.5, "temperature": 1.5, "seed": 7}
    with kept.scheduler.acquire("m") as lease:
        whole = str(lease.chat("hello", max_tokens=12, **named))
    odd = {"numa": True, "low_vram": True, "penalize_newline": True, "of_tomorrow": 1}  # without a counterpart
    assert client.chat("m", HELLO, options={**named, **odd, "num_predict": 12.0}).message.content == whole
    stop = next(letter for letter in whole if letter.isprintable() and letter != "\ufffd")
    answer = client.chat("m", HELLO, options={**named, "num_predict": 12, "stop": [stop]})
    assert answer.message.content == whole[: whole.index(stop)] and answer.done_reason == "stop"
    error = refused(lambda: client.chat("m", HELLO, options={"temperature": "hot"}))
    assert error.status_code == 400 and "options.temperature" in error.error


def test_options_of_the_load_reach_the_scheduler(client: ollama.Client, kept: Served) -> None:
    client.generate("thinks", keep_alive=0)
    eventually(lambda: "thinks:latest" not in loaded(client))
    client.generate("thinks", "a", options={"num_ctx": 256, "num_predict": 1})
    assert loaded(client)["thinks:latest"].context_length == 256
    before = kept.scheduler.status().runners
    client.generate("thinks", "a", options={"num_ctx": 256, "num_batch": 0, "num_thread": 0})  # automatic: no reload
    assert {one.id for one in kept.scheduler.status().runners} == {one.id for one in before}
    client.generate("thinks", "a", options={"num_ctx": 0, "num_predict": 1})
    assert loaded(client)["thinks:latest"].context_length == 512
    error = refused(lambda: client.generate("m", "a", options={"num_ctx": "big"}))
    assert error.status_code == 400 and "num_ctx" in error.error


@pytest.mark.parametrize(
    "wanted", ["json", {"type": "object", "properties": {"a": {"enum": ["b"]}}, "required": ["a"]}]
)
def test_an_answer_has_the_format_that_is_asked_for(client: ollama.Client, wanted: Any) -> None:
    answer = client.chat("m", HELLO, format=wanted, options={**GREEDY, "num_predict": 200})
    if wanted == "json":
        assert (answer.message.content or "").lstrip().startswith("{")
    else:
        assert json.loads(answer.message.content or "")["a"] == "b"


def test_log_probabilities_come_with_the_tokens(client: ollama.Client) -> None:
    for answer in (
        client.chat("m", HELLO, logprobs=True, top_logprobs=2, options=GREEDY),
        client.generate("m", "hello", logprobs=True, top_logprobs=2, raw=True, options=GREEDY),
    ):
        assert answer.logprobs is not None and len(answer.logprobs) > 5
        assert all(len(one.top_logprobs or ()) == 2 and one.logprob <= 0 for one in answer.logprobs)


# -- tools, thoughts, images -------------------------------------------------------------------------------------------


CALLING: dict[str, Any] = {"temperature": 1, "seed": 1, "num_predict": 600}


@pytest.mark.parametrize("streamed", [False, True])
def test_calls_of_tools_come_once_with_arguments_in_an_object(client: ollama.Client, streamed: bool) -> None:
    if streamed:
        lines = list(client.chat("calls", HELLO, tools=[TIDE], options=CALLING, stream=True))
    else:
        lines = [client.chat("calls", HELLO, tools=[TIDE], options=CALLING)]
    calls = [call for line in lines for call in line.message.tool_calls or ()]
    assert [call.function.name for call in calls] == ["tide"] and lines[-1].done_reason == "stop"
    assert calls[0].function.arguments["city"] in ("Hull", "Lisbon")


def test_a_call_that_is_cut_off_is_left_out(client: ollama.Client) -> None:
    answer = client.chat("calls", HELLO, tools=[TIDE], options={**GREEDY, "num_predict": 20})
    assert not answer.message.tool_calls and answer.done_reason == "length"


def test_calls_and_results_of_tools_reach_the_engine(client: ollama.Client, kept: Served) -> None:
    """A chat goes on behind a call and its result, which the engine reads as in OpenAI's form."""
    function = {"name": "tide", "arguments": {"city": "Hull"}}
    asked = {"role": "assistant", "tool_calls": [{"function": function}]}
    said = [*HELLO, asked, {"role": "tool", "tool_name": "tide", "content": "at 9"}]
    call = {"id": "c", "type": "function", "function": {"name": "tide", "arguments": json.dumps({"city": "Hull"})}}
    same: list[Any] = [
        *HELLO, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "at 9", "tool_call_id": "c", "name": "tide"},
    ]  # fmt: skip
    with kept.scheduler.acquire("calls") as lease:
        tokens = lease.chat(same, tools=[TIDE], max_tokens=1).usage["prompt_tokens"]
        less = lease.chat(HELLO, tools=[TIDE], max_tokens=1).usage["prompt_tokens"]  # type: ignore[arg-type]
    assert client.chat("calls", said, tools=[TIDE], options={"num_predict": 1}).prompt_eval_count == tokens > less


def test_thoughts_are_parted_from_the_answer(client: ollama.Client) -> None:
    """A model thinks unless it is told not to, and its template is told which."""
    for think in (None, True, "low"):
        answer = client.chat("thinks", HELLO, think=think, options=GREEDY)  # type: ignore[arg-type]
        assert answer.message.thinking and not answer.message.content
    lines = list(client.generate("thinks", "hello", think=True, options=GREEDY, stream=True))
    assert len([line for line in lines if line.thinking]) > 1 and not any(line.response for line in lines)
    answer = client.chat("thinks", HELLO, think=False, options=GREEDY)
    assert answer.message.content and not answer.message.thinking
    error = refused(lambda: client.chat("thinks", HELLO, think="a lot"))  # type: ignore[call-overload]
    assert error.status_code == 400 and "think" in error.error


def test_an_image_reaches_a_model_that_sees(client: ollama.Client) -> None:
    """Its tokens are part of the prompt, of a chat and of a prompt alone."""
    said = [{"role": "user", "content": "hello", "images": [png()]}]
    few = {**GREEDY, "num_predict": 2}
    seen = client.chat("sees/sees", said, options=few).prompt_eval_count or 0
    assert seen > len("hello\n") + 3
    assert client.generate("sees/sees", "hello", images=[png()], options=few).prompt_eval_count == seen


def test_what_a_model_cannot_is_refused_before_it_is_loaded(client: ollama.Client, kept: Served) -> None:
    kept.scheduler.expire("m")
    eventually(lambda: "m:latest" not in loaded(client))
    image = [{"role": "user", "content": "hello", "images": [png()]}]
    for need, call in (
        ("vision", lambda: client.chat("m", image)),
        ("tools", lambda: client.chat("m", HELLO, tools=[TIDE])),
        ("thinking", lambda: client.chat("m", HELLO, think=True)),
    ):
        error = refused(call)
        assert error.status_code == 400 and f"does not support {need}" in error.error
    assert "m:latest" not in loaded(client)
    assert client.chat("m", HELLO, think=False, options=GREEDY).message.content


def test_an_image_that_is_none_is_refused_and_nothing_is_fetched(client: ollama.Client, kept: Served) -> None:
    for image in ("http://127.0.0.1:1/a.png", "data:image/png;base64,AAAA", "", 5, "UklGRgAAAABXRUJQVlA4"):
        said = [{"role": "user", "content": "hello", "images": [image]}]
        answer = kept.post("/api/chat", {"model": "sees/sees", "messages": said})
        assert answer.status_code == 400 and "images" in answer.json()["error"], image


# -- loading and unloading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", ["chat", "generate"])
def test_n25_an_empty_request_loads_and_unloads(client: ollama.Client, kept: Served, ask: str) -> None:
    """N25: without messages or a prompt a model is loaded, or with a keep-alive of 0 unloaded, and nothing computed."""
    call = client.chat if ask == "chat" else client.generate
    assert call("m", keep_alive="5m").done_reason == "load"
    assert "m:latest" in loaded(client)
    for keep_alive in (0, "0s", "0"):
        assert call("m", keep_alive=keep_alive).done_reason == "unload"
        eventually(lambda: "m:latest" not in loaded(client))
    lines = list(call("m", stream=True))  # type: ignore[call-overload]
    assert [(line.done, line.done_reason) for line in lines] == [(True, "load")]


def test_n25_an_unload_waits_for_nothing(client: ollama.Client, kept: Served) -> None:
    """N25: neither a full queue nor a lease holds it up, and the model goes when the lease does."""
    client.generate("m", keep_alive=-1)
    with kept.scheduler.acquire("m"):
        assert client.generate("m", keep_alive=0).done_reason == "unload"
        assert "m:latest" in loaded(client)
    eventually(lambda: "m:latest" not in loaded(client))


def test_n25_an_unload_reaches_the_embedder_too(client: ollama.Client) -> None:
    """N25: one name may stand for two runners, since an embedder is loaded in another way."""
    client.embed("m", "a")
    client.generate("m", keep_alive="1h")
    assert [each.model for each in client.ps().models].count("m:latest") == 2
    client.generate("m", keep_alive=0)
    eventually(lambda: "m:latest" not in loaded(client))


def test_n25_a_keep_alive_is_a_number_of_seconds_or_a_text_with_units(client: ollama.Client, kept: Served) -> None:
    """N25: negative is for ever; a text without a unit is an error."""
    for keep_alive, stays in ((300, 300), ("1h30m", 5400), ("90s", 90), (7200.5, 7200.5)):
        client.generate("m", keep_alive=keep_alive)
        ends_in = loaded(client)["m:latest"].expires_at - datetime.now(UTC)
        assert timedelta(seconds=stays - 60) < ends_in <= timedelta(seconds=stays + 1)
    for keep_alive in (-1, "-1s", "-5m"):
        client.generate("m", keep_alive=keep_alive)
        assert loaded(client)["m:latest"].expires_at - datetime.now(UTC) > timedelta(days=36500)
    for wrong in ("-1", "5", "soon", "5 m", True, [5]):
        answer = httpx2.post(
            f"{client._client.base_url}/api/generate",
            json={"model": "m", "prompt": "", "keep_alive": wrong},
            timeout=60,
        )
        assert answer.status_code == 400 and "keep_alive" in answer.json()["error"], wrong


def test_a_keep_alive_of_0_unloads_behind_the_answer(client: ollama.Client) -> None:
    assert client.generate("m", "hello", keep_alive=0, options=GREEDY).response
    eventually(lambda: "m:latest" not in loaded(client))


def test_n25_ps_lists_the_models_that_stay_longest_first(client: ollama.Client, kept: Served) -> None:
    """N25: with sizes and contexts as they are, and, of a model in use, when it goes if it is used no more."""
    client.generate("m", keep_alive=0)
    eventually(lambda: "m:latest" not in loaded(client))
    client.generate("m", keep_alive="10m", options={"num_ctx": 512})
    client.generate("thinks", keep_alive="2h")
    client.generate("ranks", keep_alive=-1)
    listed = [each for each in client.ps().models if each.model in ("m:latest", "thinks:latest", "ranks:latest")]
    assert [each.model for each in listed] == ["ranks:latest", "thinks:latest", "m:latest"]
    held = {one.model: sum(one.held_bytes.values()) for one in kept.scheduler.status().runners}
    assert all(each.size == held[(each.model or "").removesuffix(":latest")] for each in listed)
    assert listed[-1].context_length == 512 and listed[-1].size_vram == 0
    assert listed[-1].details is not None and listed[-1].details.family == "llama"
    with kept.scheduler.acquire("m", num_ctx=512):
        ends_in = (loaded(client)["m:latest"].expires_at - datetime.now(UTC)).total_seconds()
        assert 300 < ends_in <= 601


def test_a_rule_holds_for_loads_and_unloads(serve: Serve) -> None:
    """A client that may not name the keep-alive unloads nothing, and is told so."""
    served = serve(rules={"*": {"keep_alive": {"lock": "1h"}, "num_ctx": {"max": 256}}})
    body = {"model": "m", "stream": False, "keep_alive": 0, "options": {"num_ctx": 2048}}
    for more in ({}, {"prompt": "a"}, {}):
        answer = served.post("/api/generate", {**body, **more})
        assert answer.status_code == 200 and answer.json().get("done_reason") != "unload"
        assert "keep_alive=0" in answer.headers["x-loadmaster-ignored"]
    (runner,) = served.scheduler.status().runners
    assert runner.state == "idle" and runner.keep_alive_s == 3600


# -- vectors -----------------------------------------------------------------------------------------------------------


def test_vectors_have_length_1_and_as_many_elements_as_asked_for(client: ollama.Client, kept: Served) -> None:
    with kept.scheduler.acquire("m", embedding=True) as lease:
        first, second = lease.embed(["hello", "b"])
    answer = client.embed("m", ["hello", "b"])
    assert answer.embeddings == [first, second] and answer.prompt_eval_count == 6
    assert client.embed("m", "hello").embeddings == [first]
    short = client.embed("m", "hello", dimensions=8).embeddings[0]
    assert len(short) == 8 and math.isclose(math.hypot(*short), 1, rel_tol=1e-6)
    assert math.isclose(short[0] / short[1], first[0] / first[1], rel_tol=1e-6)
    old = client.embeddings("m", "hello").embedding  # as the model gives it
    assert math.isclose(old[0] / old[1], first[0] / first[1], rel_tol=1e-4) and math.hypot(*old) > 2


def test_a_text_beyond_the_context_is_cut_unless_that_is_not_wanted(client: ollama.Client) -> None:
    options = {"num_ctx": 1024}
    cut = client.embed("calls", ["a" * 1100, "b"], options=options)
    assert cut.embeddings == client.embed("calls", ["a" * 1024, "b"], options=options).embeddings
    assert cut.prompt_eval_count == 1025
    error = refused(lambda: client.embed("calls", "a" * 1100, truncate=False, options=options))
    assert error.status_code == 400 and "too large" in error.error


def test_n25_no_text_loads_the_embedder(client: ollama.Client) -> None:
    """N25: an empty input preloads."""
    client.generate("m", keep_alive=0)
    eventually(lambda: "m:latest" not in loaded(client))
    assert client.embed("m", "").embeddings == []
    assert loaded(client)["m:latest"]
    assert client.embeddings("m", "").embedding == []
    assert client.embed("m", []).embeddings == []


@pytest.mark.parametrize("given", [5, ["a", 5], {"a": "b"}])
def test_an_input_that_is_no_text_is_refused(kept: Served, given: Any) -> None:
    answer = kept.post("/api/embed", {"model": "m", "input": given})
    assert answer.status_code == 400 and "input" in answer.json()["error"]


# -- models ------------------------------------------------------------------------------------------------------------


def test_models_are_listed_with_their_real_figures(client: ollama.Client, place: Path) -> None:
    """Size, age and digest are those of the files; Ollama's own models have the digest that Ollama shows."""
    path = place / "models" / "m.gguf"
    manifest = place / "store" / "manifests" / "registry.ollama.ai" / "library" / "mario" / "latest"
    digests = {"m:latest": path, "mario:latest": manifest}
    wanted = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in digests.items()}

    def known() -> bool:
        listed = {each.model: each for each in client.list().models}
        assert all(len(each.digest or "") == 64 for each in listed.values())
        assert listed["mario:latest"].digest == wanted["mario:latest"]
        return {name: listed[name].digest for name in wanted} == wanted

    eventually(known)
    listed = {each.model: each for each in client.list().models}
    names = ("m", "calls", "thinks", "ranks", "endless", "sees/sees", "mario")
    assert {*listed} == {f"{name}:latest" for name in names}
    one = listed["m:latest"]
    assert one.size == path.stat().st_size and one.modified_at is not None
    assert math.isclose(one.modified_at.timestamp(), path.stat().st_mtime, abs_tol=1e-3)
    assert one.details is not None and one.details.model_dump() == {
        "parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"], "parameter_size": "107K",
        "quantization_level": "F32",
    }  # fmt: skip
    beside = (place / "models" / "sees" / "mmproj.gguf").stat().st_size
    assert listed["sees/sees:latest"].size == beside + (place / "models" / "sees" / "sees.gguf").stat().st_size
    client.generate("m", keep_alive="1h")
    assert loaded(client)["m:latest"].digest == wanted["m:latest"]


def test_a_listed_name_serves_everywhere(client: ollama.Client, kept: Served) -> None:
    """Clients send the name that they have read, to other protocols too."""
    for each in client.list().models:
        assert client.show(each.model or "").modelinfo
    assert client.chat("m:latest", HELLO, options=GREEDY).model == "m:latest"
    body = {"model": "m:latest", "messages": HELLO, "max_tokens": 2}
    assert kept.post("/v1/chat/completions", body).json()["model"] == "m:latest"
    assert kept.post("/v1/chat/completions", {**body, "model": "m:later"}).status_code == 404


def test_a_model_is_shown_with_its_metadata_and_capabilities(client: ollama.Client, kept: Served) -> None:
    able = {
        "m": ["completion", "insert"],
        "calls": ["completion", "tools"],
        "thinks": ["completion", "thinking"],
        "ranks": ["rerank"],
        "sees/sees": ["completion", "vision"],
    }
    for name, capabilities in able.items():
        assert client.show(name).capabilities == capabilities
    shown = client.show("calls")
    info = dict(shown.modelinfo or {})
    assert next(key for key in info if key.endswith("context_length")) == "llama.context_length"
    assert (info["llama.context_length"], info["general.architecture"]) == (2048, "llama")
    assert info["general.parameter_count"] > 100_000 and "tokenizer.chat_template" not in info
    assert shown.template == TEMPLATE_WITH_TOOLS and shown.details is not None and shown.details.format == "gguf"
    assert kept.post("/api/show", {"name": "calls"}).json()["capabilities"] == ["completion", "tools"]  # the old field


def test_what_ollamas_store_says_of_a_model_is_shown_and_applied(client: ollama.Client, kept: Served) -> None:
    shown = kept.post("/api/show", {"model": "mario"}).json()
    assert shown["system"] == "You are Mario." and shown["template"] == "{{ .System }} {{ .Prompt }}{{ .Suffix }}"
    assert [line.split(maxsplit=1) for line in shown["parameters"].splitlines()] == [
        ["num_ctx", "256"], ["temperature", "0"], ["stop", '"~"'],
    ]  # fmt: skip
    assert "PARAMETER num_ctx 256" in shown["modelfile"] and 'SYSTEM """You are Mario."""' in shown["modelfile"]
    answer = client.chat("mario", HELLO, options={"num_predict": 3, "seed": 1})
    assert answer.prompt_eval_count == len("You are Mario.\nhello\n") and answer.eval_count == 3
    assert loaded(client)["mario:latest"].context_length == 256
    for path, body in (
        ("/v1/messages", {"messages": HELLO, "max_tokens": 2}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 2}),
    ):
        usage = kept.post(path, {"model": "mario", **body}).json()["usage"]
        tokens = usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)
        assert tokens == len("You are Mario.\nhello\n"), (path, usage)


def test_a_pull_succeeds_where_the_model_is_there(client: ollama.Client) -> None:
    assert client.pull("m").status == "success"
    assert [part.status for part in client.pull("m:latest", stream=True)] == ["success"]
    error = refused(lambda: list(client.pull("of/nobody", stream=True)))
    assert error.status_code == 404 and "ollama pull" in error.error


def test_what_changes_models_is_not_here(client: ollama.Client, kept: Served, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    for call in (
        lambda: client.push("m"), lambda: client.copy("m", "n"), lambda: client.delete("m"),
        lambda: client.create("n", from_="m"), lambda: client.create_blob(tmp_path / "a"),
    ):  # fmt: skip
        error = refused(call)
        assert error.status_code == 501
    assert (
        kept.post("/api/copy", {}).json()["error"]
        == "in a folder of models, a link to a model's file is a second name for it"
    )
    assert kept.get("/api/tags").status_code == 200 and client.show("m").modelinfo


def test_clients_find_out_that_ollama_runs(kept: Served) -> None:
    assert kept.get("/").text == "Ollama is running"
    assert httpx2.head(f"{kept.url}/", trust_env=False).status_code == 200
    version = kept.get("/api/version").json()["version"]
    assert [int(part) for part in version.split(".")] >= [0, 6, 4]


# -- prompts and answers that are longer than a context ----------------------------------------------------------------


TURNS: list[Any] = [
    {"role": "system", "content": "Be kind."},
    *({"role": ("user", "assistant")[place % 2], "content": f"turn {place} " * 20} for place in range(11)),
]
SHORT: dict[str, Any] = {"num_ctx": 1024, "temperature": 0, "seed": 1, "num_predict": 4}


def test_a_chat_that_is_too_long_loses_its_oldest_messages(kept: Served) -> None:
    """As few as it takes, and neither the system message nor the last one, unless the client wants an error."""

    def ask(messages: list[Any], **more: Any) -> httpx2.Response:
        return kept.post("/api/chat", {"model": "m", "messages": messages, "options": SHORT, "stream": False, **more})

    answer = ask(TURNS).json()
    same = [ask([TURNS[0], *TURNS[first:]], truncate=False) for first in range(1, len(TURNS))]
    first = next(place for place, one in enumerate(same) if one.status_code == 200)
    assert 0 < first < len(TURNS) - 2 and all(one.status_code == 400 for one in same[:first])
    assert answer["message"] == same[first].json()["message"]
    assert answer["prompt_eval_count"] == same[first].json()["prompt_eval_count"]
    assert "exceeds the available context size" in ask(TURNS, truncate=False).json()["error"]


@pytest.mark.parametrize("raw", [False, True])
def test_a_prompt_that_is_too_long_loses_its_beginning(kept: Served, raw: bool) -> None:
    """It fills the context but for the first token of the answer; of a raw prompt the first tokens may be kept."""

    def ask(prompt: str, truncate: bool, **options: Any) -> httpx2.Response:
        asked = {"model": "m", "prompt": prompt, "raw": raw, "truncate": truncate, "stream": False}
        return kept.post("/api/generate", {**asked, "options": {**SHORT, **options}})

    text = "".join(chr(ord("a") + place % 26) for place in range(1200))
    around = 0 if raw else ask("", True).json().get("prompt_eval_count", 0) or 1  # the template's own
    answer = ask(text, True).json()
    assert (answer["prompt_eval_count"], answer["eval_count"], answer["done_reason"]) == (1023, 1, "length")
    assert answer["response"] == ask(text[around - 1023 :], False).json()["response"]
    assert ask(text, False).status_code == 400
    if raw:
        kept_tokens = ask(text, True, num_keep=9).json()
        assert kept_tokens["response"] == ask(text[:9] + text[-1014:], False).json()["response"]


def test_a_client_says_whether_a_full_context_gives_up_its_older_half(kept: Served) -> None:
    """`shift` is a load-time option, and what is no truth value is refused."""
    asked = {"model": "thinks", "prompt": "Once", "raw": True, "stream": False, "options": SHORT}
    for shift in (True, False):
        assert kept.post("/api/generate", {**asked, "shift": shift}).status_code == 200
        runners = [one for one in kept.scheduler.status().runners if one.model == "thinks" and one.state != "expiring"]
        assert [one.options.context_shift for one in runners] == [shift]
    assert kept.post("/api/generate", {**asked, "shift": "no"}).status_code == 400


# -- errors, waits, and clients that leave -----------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_errors_are_told_in_ollamas_terms(client: ollama.Client, streamed: bool) -> None:
    """A status above 400 and a text, for a stream too."""

    def ask(**asked: Any) -> ollama.ResponseError:
        return refused(lambda: list(client.generate(**asked, stream=True)) if streamed else client.generate(**asked))

    error = ask(model="nm", prompt="hello")
    assert error.status_code == 404 and "there is no model 'nm'" in error.error
    error = ask(model="m", prompt="a", format={"type": "none that there is"})
    assert error.status_code == 400 and "schema" in error.error


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"{", "body"),
        (b"[]", "body"),
        (b"{}", "model"),
        (b'{"model": 5}', "model"),
        (b'{"model": "../m"}', "model"),
        (b'{"model": "m", "messages": "hello"}', "messages"),
        (b'{"model": "m", "messages": [{"content": "a"}]}', "messages"),
        (b'{"model": "m", "messages": [{"role": "user", "content": [1]}]}', "content"),
        (
            b'{"model": "m", "messages": [{"role": "a", "tool_calls": [{"function": {"arguments": "x"}}]}]}',
            "tool_calls",
        ),
        (b'{"model": "m", "messages": [{"role": "user"}], "format": 5}', "format"),
        (b'{"model": "m", "messages": [{"role": "user"}], "tools": 5}', "tools"),
        (b'{"model": "m", "messages": [{"role": "user"}], "options": 5}', "options"),
        (b'{"model": "m", "messages": [{"role": "user"}], "logprobs": true, "top_logprobs": 99}', "top_logprobs"),
        (b'{"model": "m", "messages": [{"role": "user"}], "format": {"a": 1e999}}', "body"),
    ],
)
def test_a_body_that_is_wrong_is_refused(kept: Served, body: bytes, named: str) -> None:
    answer = httpx2.post(f"{kept.url}/api/chat", content=body, timeout=60, trust_env=False)
    assert answer.status_code == 400 and named in answer.json()["error"]


def test_routes_that_are_not_there_are_told_in_ollamas_terms(kept: Served) -> None:
    assert (kept.get("/api/nothing").status_code, [*kept.get("/api/nothing").json()]) == (404, ["error"])
    assert (kept.get("/api/chat").status_code, [*kept.get("/api/chat").json()]) == (405, ["error"])


def test_a_stream_that_breaks_ends_with_an_error(client: ollama.Client, kept: Served) -> None:
    """The last line says what has happened; what came before it stays."""
    lines = iter(client.generate("endless", "hello", raw=True, options={"num_predict": 30000}, stream=True))
    assert next(lines).done is False
    (runner,) = [one for one in kept.scheduler.status().runners if one.leases]
    psutil.Process(runner.pid).kill()
    with pytest.raises(ollama.ResponseError, match="is gone"):
        list(lines)


def test_a_stream_begins_before_its_model_is_there_and_then_has_its_answer(serve: Serve) -> None:
    """Headers come while the request waits, and no line that a client would take for a part of the answer."""
    served = serve({"max_runners": 1}, sign_of_life="0.1s")
    body = {"model": "m", "prompt": "hello", "options": {"num_predict": 2}}
    lease = served.scheduler.acquire("other")
    with httpx2.stream("POST", f"{served.url}/api/generate", json=body, timeout=60, trust_env=False) as answer:
        assert answer.status_code == 200 and len(served.scheduler.status().queue) == 1
        lease.release()
        lines = [json.loads(line) for line in answer.iter_lines()]
    assert all(line["model"] == "m" for line in lines) and lines[-1]["done_reason"] == "length"
    assert lines[-1]["load_duration"] > 0.1 * 1e9


def test_a_refusal_behind_the_headers_is_the_last_line(serve: Serve) -> None:
    served = serve({"max_runners": 1}, sign_of_life="0.1s")
    with served.scheduler.acquire("other"):
        body = {"model": "m", "prompt": "hello", "timeout": "0.5s"}
        answer = served.post("/api/generate", body)
        assert answer.status_code == 200 and "within" in json.loads(answer.text.splitlines()[-1])["error"]
        assert served.post("/api/generate", {**body, "stream": False}).status_code == 504


def test_an_answer_that_is_not_streamed_is_waited_for_without_end(serve: Serve) -> None:
    """The setting `patience` is for other protocols; a client may name its own."""
    served = serve({"max_runners": 1}, patience="0.1s")
    body = {"model": "m", "prompt": "hello", "stream": False, "options": {"num_predict": 2}}
    lease = served.scheduler.acquire("other")
    for answer in (
        served.post("/v1/completions", {"model": "m", "prompt": "hello"}),
        served.post("/api/generate", body, **{"x-loadmaster-patience": "0.1s"}),
    ):
        assert answer.status_code == 503 and answer.headers["retry-after"] and "waiting" in answer.text
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.post, "/api/generate", body)
        time.sleep(0.5)
        assert not waiting.done()
        lease.release()
        assert waiting.result().json()["done_reason"] == "length"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/embed"])
def test_a_client_that_leaves_ends_its_request(kept: Served, path: str, streamed: bool) -> None:
    """The lease is back, and the engine computes no further."""
    body = {
        "model": "endless", "stream": streamed, "messages": HELLO, "prompt": "hello", "input": ["a" * 4000] * 40,
        "options": {"num_predict": 30000, "temperature": 0},
    }  # fmt: skip
    address = urlsplit(kept.url)
    with socket.create_connection((address.hostname, address.port), 10) as client:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        client.sendall(head.encode() + content)
        eventually(lambda: any(runner.leases for runner in kept.scheduler.status().runners))
        time.sleep(0.2)
    eventually(lambda: not any(runner.leases for runner in kept.scheduler.status().runners), 2.0)


def test_a_client_that_leaves_a_load_leaves_the_queue(serve: Serve) -> None:
    """Also one that asks for nothing but the load."""
    served = serve({"max_runners": 1}, sign_of_life="0.1s")
    address = urlsplit(served.url)
    with served.scheduler.acquire("other"):
        with socket.create_connection((address.hostname, address.port), 10) as client:
            content = b'{"model": "m"}'
            head = f"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
            client.sendall(head.encode() + content)
            eventually(lambda: len(served.scheduler.status().queue) == 1)
        eventually(lambda: not served.scheduler.status().queue, 2.0)


def test_a_page_of_another_origin_unloads_nothing(kept: Served, client: ollama.Client) -> None:
    """A browser sends such a request without asking, since its content type is a form's."""
    client.generate("m", keep_alive="1h")
    body = b'{"model": "m", "keep_alive": 0}'
    headers = {"origin": "https://example.org", "content-type": "text/plain"}
    answer = httpx2.post(f"{kept.url}/api/generate", content=body, headers=headers, trust_env=False)
    assert answer.status_code == 403 and [*answer.json()] == ["error"]
    assert "m:latest" in loaded(client)
    headers = {"content-type": "application/x-www-form-urlencoded"}  # as curl sends it
    answer = httpx2.post(f"{kept.url}/api/generate", content=body, headers=headers, timeout=60, trust_env=False)
    assert answer.status_code == 200


SIX = [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("last", "context", "kept_tokens"),
    [
        (0, 4, [1, 2, 3, 4]),
        (1, 4, [1, 2, 3, 6]),
        (2, 4, [1, 2, 5, 6]),
        (1, 6, [*range(1, 7)]),
        (1, None, [*range(1, 7)]),
    ],
)
def test_a_text_that_is_cut_keeps_the_tokens_that_end_each_text(
    last: int, context: int | None, kept_tokens: list[int]
) -> None:
    """Some embedders compute the vector from the last token, which is to be the sign for the end."""
    assert _cut_tokens(SIX, last, context) == kept_tokens
