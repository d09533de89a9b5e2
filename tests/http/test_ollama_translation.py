"""Ollama's terms and the engine's, as values."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from scheduler.errors.exceptions import EngineError, UnsupportedOption
from scheduler.http.ollama_translation import (
    Reply,
    chat_question,
    events_of,
    generate_question,
    keep_alive_of,
    options_of,
)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None), (0, 0), (1.5, 1.5), (-1, -1), (-0.5, -1), ("0", 0), ("1h30m", 5400), ("1.5h", 5400), (".5s", 0.5),
        ("+5m", 300), ("250ms", 0.25), ("1us", 1e-6), ("1µs", 1e-6), ("1ns", 1e-9), ("-1m", -1), ("-0s", 0),
        (10**30, 1 << 62),
    ],
)  # fmt: skip
def test_n25_keep_alives_in_ollamas_grammar(value: object, seconds: float | None) -> None:
    """N25: a number is seconds, negative is for ever, and a text has units."""
    assert keep_alive_of({"keep_alive": value}) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "-1", "5", "5 m", "m", "1h 30m", "5M", "1d", "٥m", "1e3s", True, [], {}])
def test_n25_what_is_no_keep_alive(value: object) -> None:
    with pytest.raises(UnsupportedOption, match="keep_alive"):
        keep_alive_of({"keep_alive": value})


def test_options_are_parted_into_those_of_the_load_and_those_of_sampling() -> None:
    """A count of 0, and null, are as if they were not named; what has no counterpart has no effect."""
    options = {
        "num_ctx": 4096.0, "num_batch": 0, "num_gpu": -1, "main_gpu": 0, "use_mmap": False, "num_thread": None,
        "num_predict": -2, "temperature": 0, "stop": "x", "num_keep": 4, "seed": None, "numa": True, "f16_kv": True,
    }  # fmt: skip
    assert options_of({"options": options}) == (
        {"num_ctx": 4096, "num_gpu": -1, "main_gpu": 0, "use_mmap": False},
        {"max_tokens": -1, "temperature": 0, "stop": ["x"], "n_keep": 4},
    )
    assert options_of({}) == options_of({"options": None}) == ({}, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_ctx", "4096"), ("num_ctx", 1.5), ("use_mmap", 1), ("num_gpu", True), ("top_k", "many"), ("top_k", 1.5),
        ("temperature", True), ("temperature", float("inf")), ("stop", [1]), ("num_predict", "all"),
    ],
)  # fmt: skip
def test_a_value_that_an_option_cannot_have_is_refused(name: str, value: object) -> None:
    with pytest.raises(UnsupportedOption, match=name):
        options_of({"options": {name: value}})


def test_results_of_tools_find_their_calls() -> None:
    """By the name of the tool, then in order; an id that the client has sent stays."""
    calls = [{"function": {"name": name, "arguments": {"n": 1}}} for name in ("a", "b", "a")]
    calls.append({"id": "mine", "function": {"name": "c"}})
    said = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_name": "b", "content": "2"},
        {"role": "tool", "tool_name": "a", "content": "1"},
        {"role": "tool", "content": "3"},
        {"role": "tool", "name": "c", "content": "4"},
        {"role": "tool", "content": "5", "tool_call_id": "elsewhere"},
    ]
    messages = chat_question({"messages": said}, {}).body["messages"]
    ids = [call["id"] for call in messages[1]["tool_calls"]]
    assert len({*ids}) == 4 and ids[3] == "mine"
    assert [json.loads(call["function"]["arguments"]) for call in messages[1]["tool_calls"]] == [*[{"n": 1}] * 3, {}]
    assert [message.get("tool_call_id") for message in messages[2:]] == [ids[1], ids[0], ids[2], "mine", "elsewhere"]


def test_thoughts_go_back_to_the_engine() -> None:
    said = [{"role": "assistant", "content": "4", "thinking": "2 and 2"}]
    (message,) = chat_question({"messages": said}, {}).body["messages"]
    assert message == {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}


@pytest.mark.parametrize(
    ("begin", "kind", "need"),
    [
        (b"\x89PNG\r\n\x1a\n", "image_url", "vision"),
        (b"\xff\xd8\xff\xe0", "image_url", "vision"),
        (b"RIFF\0\0\0\0WAVE", "input_audio", "audio"),
        (b"ID3\x04", "input_audio", "audio"),
    ],
)
def test_pictures_and_sounds_are_told_by_their_first_bytes(begin: bytes, kind: str, need: str) -> None:
    image = base64.b64encode(begin + bytes(40)).decode()
    question = generate_question({"prompt": "what?", "images": [image]}, {})
    text, part = question.body["messages"][0]["content"]
    assert text == {"type": "text", "text": "what?"} and part["type"] == kind and image in json.dumps(part)
    assert question.needs == {need}


def events(*values: Mapping[str, Any], cuts: int = 7) -> list[bytes]:
    """Return a runner's stream in chunks that end anywhere."""
    content = b"".join(b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n" for value in values)
    content = b": a comment\n\n" + content + b"data: [DONE]\n\n"
    return [content[at : at + cuts] for at in range(0, len(content), cuts)]


async def chunks_of(chunks: list[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def read(chunks: list[bytes]) -> list[Mapping[str, Any]]:
    async def gathered() -> list[Mapping[str, Any]]:
        return [event async for event in events_of(chunks_of(chunks))]

    return asyncio.run(gathered())


@pytest.mark.parametrize("cuts", [1, 7, 10_000])
def test_events_are_read_from_chunks_of_any_size(cuts: int) -> None:
    """Also with line separators of Unicode inside, which end no line here."""
    values = [{"a": "\u2028 \u0085 é"}, {"b": 1}]
    assert read(events(*values, cuts=cuts)) == values


@pytest.mark.parametrize(
    "line", [b'error: {"code": 500, "message": "out of luck"}\n', b'data: {"error": {"message": "out of luck"}}\n']
)
def test_an_error_among_the_events_is_raised(line: bytes) -> None:
    with pytest.raises(EngineError, match="out of luck"):
        read([b'data: {"a": 1}\n\n', line])


def test_calls_of_tools_are_put_together_from_pieces() -> None:
    """They come with the last line, and their arguments as objects; one that is not whole is left out."""

    def delta(**part: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": part, "finish_reason": None}]}

    reply = Reply("chat", "m", 0.0, 0.0)
    lines = [
        reply.feed(delta(content="so")),
        reply.feed(delta(tool_calls=[{"index": 0, "id": "x", "function": {"name": "tide", "arguments": '{"ci'}}])),
        reply.feed(delta(tool_calls=[{"index": 0, "function": {"arguments": 'ty": "Hull"}'}}])),
        reply.feed(delta(tool_calls=[{"index": 1, "id": "y", "function": {"name": "tide", "arguments": '{"ci'}}])),
        reply.feed({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}], "timings": {"prompt_n": 3}}),
    ]
    assert [line is not None for line in lines] == [True, False, False, False, False]
    last = reply.last()
    assert last["message"]["tool_calls"] == [
        {"id": "x", "function": {"index": 0, "name": "tide", "arguments": {"city": "Hull"}}}
    ]
    assert (last["done_reason"], last["prompt_eval_count"], last["message"]["content"]) == ("stop", 3, "")
    assert reply.last(whole=True)["message"]["content"] == "so"
