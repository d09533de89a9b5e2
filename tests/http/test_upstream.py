"""The client's name for a model in answers of a runner, wherever the answer is cut into parts."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.http.upstream import Renaming

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
