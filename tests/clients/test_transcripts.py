"""What programs that are no Python packages send, in the order in which they send it, and read of answers."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

import httpx2
import pytest

from tests.clients.conftest import TIDE
from tests.http.conftest import Serve, Served, eventually

HELLO = [{"role": "user", "content": "hello"}]


def lines(answer: httpx2.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def events(answer: httpx2.Response) -> list[dict[str, Any]]:
    """Return the events of a stream, which ends as OpenAI's do."""
    assert answer.status_code == 200, answer.text
    told = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert told[-1] == "[DONE]"
    return [json.loads(each) for each in told[:-1]]


def test_open_webui(serve: Serve) -> None:
    """It lists models by `model`, adds `:latest`, reads times by `fromisoformat`, and unloads by an empty prompt."""
    served = serve()
    assert re.fullmatch(r"\d+\.\d+\.\d+", served.get("/api/version").json()["version"])
    models = {each["model"]: each for each in served.get("/api/tags").json()["models"]}
    assert {"m:latest", "calls:latest"} <= {*models}
    for each in models.values():
        assert each["name"] == each["model"] and each["size"] > 0 and datetime.fromisoformat(each["modified_at"])
        assert {"format", "family", "parameter_size", "quantization_level"} <= {*each["details"]}
    shown = served.post("/api/show", {"model": "m:latest"}).json()
    assert shown["model_info"] and "completion" in shown["capabilities"]
    options = {"num_predict": 8, "temperature": 0}
    body = {"model": "m:latest", "messages": HELLO, "stream": True, "options": options, "keep_alive": "5m"}
    told = lines(served.post("/api/chat", body))
    assert told[-1]["done"] and told[-1]["eval_count"] == 8 and all(each["model"] == "m:latest" for each in told)
    assert "".join(each["message"]["content"] for each in told)
    (runner,) = served.get("/api/ps").json()["models"]
    left_s = (datetime.fromisoformat(runner["expires_at"]) - datetime.now().astimezone()).total_seconds()
    assert runner["model"] == "m:latest" and 240 < left_s <= 300
    done = served.post("/api/generate", {"model": "m:latest", "keep_alive": 0, "prompt": "", "stream": False}).json()
    assert done["done_reason"] == "unload"
    eventually(lambda: served.get("/api/ps").json()["models"] == [])
    vectors = served.post("/api/embed", {"model": "m:latest", "input": ["a", "b"]}).json()["embeddings"]
    assert len(vectors) == 2 and sum(value**2 for value in vectors[0]) == pytest.approx(1, abs=1e-3)
    assert served.post("/api/pull", {"model": "m:latest"}).text.splitlines()[-1] == '{"status":"success"}'


def test_open_webui_by_openais_api(served: Served) -> None:
    """As a connection of OpenAI's kind it lists models, and streams chats with usage."""
    assert "m" in {each["id"] for each in served.get("/v1/models", Authorization="Bearer none").json()["data"]}
    body: dict[str, Any] = {"model": "m", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    body |= {"max_tokens": 5, "temperature": 0}
    told = events(served.post("/v1/chat/completions", body, Authorization="Bearer none"))
    assert [each["usage"]["completion_tokens"] for each in told if each.get("usage")] == [5]


def test_copilot(served: Served) -> None:
    """It looks at version, list and abilities in Ollama's API, and then chats by OpenAI's on the same port."""
    version = served.get("/api/version").json()["version"]
    assert tuple(map(int, version.split("."))) >= (0, 6, 4)
    able = []
    for each in served.get("/api/tags").json()["models"]:
        shown = served.post("/api/show", {"model": each["model"]}).json()
        architecture = shown["model_info"]["general.architecture"]
        assert shown["model_info"][f"{architecture}.context_length"] > 0
        if {"tools", "completion"} <= {*shown["capabilities"]}:
            able.append(each["model"])
    assert able == ["calls:latest"]
    body = {
        "model": "calls:latest", "messages": [{"role": "system", "content": "short"}, *HELLO], "stream": True,
        "tools": [{"type": "function", "function": TIDE}], "tool_choice": "auto", "temperature": 0, "top_p": 1,
        "n": 1, "max_tokens": 200, "stream_options": {"include_usage": True},
    }  # fmt: skip
    told = events(served.post("/v1/chat/completions", body))
    deltas = [each["choices"][0]["delta"] for each in told if each["choices"]]
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls") or ()]
    assert calls[0]["name"] == "tide"
    assert json.loads("".join(call.get("arguments") or "" for call in calls))["city"] in ("Hull", "Lisbon")
    assert {each["choices"][0]["finish_reason"] for each in told if each["choices"]} == {None, "tool_calls"}


def test_continue(served: Served) -> None:
    """It names the model by the old field, and continues a text as it is."""
    shown = served.post("/api/show", {"name": "m"}).json()
    assert isinstance(shown["template"], str) and isinstance(shown.get("parameters", ""), str)
    body = {
        "model": "m",
        "prompt": "hello",
        "raw": True,
        "keep_alive": 1800,
        "options": {"num_predict": 4, "stop": ["~"]},
    }
    told = lines(served.post("/api/generate", body))
    assert told[-1]["done_reason"] == "length" and "".join(each["response"] for each in told)


def test_claude_code(served: Served) -> None:
    """It streams messages with blocks of system text that are marked for a cache, and counts tokens before."""
    system = [{"type": "text", "text": "short", "cache_control": {"type": "ephemeral"}}]
    tools = [{"name": "tide", "description": "d", "input_schema": TIDE["parameters"]}]
    body = {"model": "calls", "system": system, "messages": HELLO, "tools": tools, "max_tokens": 200, "stream": True}
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "x", "x-api-key": "none"}
    count = served.post("/v1/messages/count_tokens", {**body, "stream": False}, **headers)
    assert count.json()["input_tokens"] > 0
    answer = served.post("/v1/messages?beta=true", {**body, "metadata": {"user_id": "u"}, "temperature": 0}, **headers)
    names = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
    assert (names[0], names[-1]) == ("message_start", "message_stop") and '"name":"tide"' in answer.text


def test_codex(served: Served) -> None:
    """It streams responses, with instructions, and nothing stored."""
    said = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}]
    body = {
        "model": "calls", "instructions": "short", "input": said, "stream": True, "store": False, "tools": [],
        "tool_choice": "auto", "parallel_tool_calls": False, "include": [], "max_output_tokens": 5, "temperature": 0,
    }  # fmt: skip
    answer = served.post("/v1/responses", body)
    names = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
    assert answer.status_code == 200 and (names[0], names[-1]) == ("response.created", "response.completed")
