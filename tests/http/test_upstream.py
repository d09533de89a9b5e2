"""The client's name for a model in answers of a runner, wherever the answer is cut into parts."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import Scheduler
from scheduler.http import anthropic, create_app
from scheduler.http.upstream import Renaming
from tests.support.running import running
from tests.support.tiny_models import byte_tokens, write_tiny_model

SAYS = json.dumps({"content": 'a "model":"m" inside'}, separators=(",", ":")).encode()
STREAM = b"".join(
    b'data: {"choices":[' + SAYS + b'],"model":"m","n":%d}\n\n' % number for number in range(3)
) + b"data: [DONE]\n\n"  # fmt: skip


@given(st.lists(st.integers(0, len(STREAM)), max_size=20), st.sampled_from(["m", "m:latest", 'q"\\ü', "mm"]))
def test_every_byte_of_a_stream_comes_once_and_in_order(cuts: list[int], name: str) -> None:
    """The field alone is renamed, in each event, and what the answer says of it stays; nothing is lost at a cut."""
    places, told = [0, *sorted(cuts), len(STREAM)], json.dumps(name, ensure_ascii=False).encode()
    renaming = Renaming(told)
    sent = [renaming.feed(STREAM[begin:end]) for begin, end in pairwise(places)]
    assert b"".join([*sent, renaming.rest()]) == STREAM.replace(b'],"model":"m"', b'],"model":' + told)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"object":"list","data":[]}', b"no JSON"])
def test_an_answer_without_a_model_stays_as_it_is(content: bytes) -> None:
    assert Renaming(b'"m"').whole(content) == content
    renaming = Renaming(b'"m"')
    assert renaming.feed(content) + renaming.rest() == content


def test_a_stream_of_messages_has_a_beginning(tmp_path: Path) -> None:
    """llama.cpp sends none where the first character takes several tokens, and clients of Anthropic's break then."""
    lead = byte_tokens()[0xC3]  # the first byte of a letter, and nothing else for ever
    write_tiny_model(tmp_path / "m.gguf", biases={lead: 40})
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "stream": True}
    with Scheduler(gpus=False, models=tmp_path) as scheduler, running(create_app(scheduler)) as url:
        answer = httpx2.post(f"{url}/v1/messages", json=body, timeout=60, trust_env=False)
    lines = [line for line in answer.text.splitlines() if line.startswith("event: ")]
    events = [line.removeprefix("event: ") for line in lines if line != "event: ping"]  # while the model loads
    assert events[0] == "message_start" and events.count("message_start") == 1 and events[-1] == "message_stop"


@pytest.mark.parametrize(
    ("lines", "begins"),
    [
        (b": a comment\n\n", None),
        (b"event: message_start\ndata: {}\n\nevent: content_block_start\n", b""),
        (b"event: error\ndata: {}\n\n", b""),
        (b"event: message_delta\ndata: {}\n\n", b"event: message_start\n"),
    ],
)
def test_only_a_message_without_a_beginning_is_given_one(lines: bytes, begins: bytes | None) -> None:
    missing = anthropic.PROTOCOL.missing(lines, "m")
    assert missing == begins or (begins and missing and missing.startswith(begins) and b'"model":"m"' in missing)
