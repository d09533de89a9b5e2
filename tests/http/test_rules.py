"""Rules that clients cannot override: locked values, floors and ceilings, for all models or one."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from scheduler.errors.exceptions import InvalidSettings
from scheduler.http.rules import apply_rules, parse_rules
from tests.http.conftest import Serve, eventually

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("rules", "asked", "counts", "ignored"),
    [
        ({}, {"num_ctx": 131072}, {"num_ctx": 131072}, ()),
        ({"*": {"num_ctx": {"max": 8192}}}, {"num_ctx": 131072}, {}, ("num_ctx=131072 (at most 8192)",)),
        ({"*": {"num_ctx": {"max": 8192}}}, {"num_ctx": 8192}, {"num_ctx": 8192}, ()),
        ({"*": {"num_ctx": {"min": 9, "max": 99}}}, {"num_ctx": 1}, {}, ("num_ctx=1 (at least 9 and at most 99)",)),
        ({"*": {"num_gpu": {"lock": None}}}, {"num_gpu": 999}, {}, ("num_gpu=999 (it is locked)",)),
        ({"*": {"num_gpu": {"lock": "none"}}}, {"num_gpu": 9}, {}, ("num_gpu=9 (it is locked)",)),  # as in a file
        ({"*": {"num_gpu": {"lock": 5}}}, {}, {"num_gpu": 5}, ()),
        ({"*": {"num_gpu": {"lock": 5}}}, {"num_gpu": 5}, {"num_gpu": 5}, ()),
        ({"*": {"keep_alive": {"max": "1h"}}}, {"keep_alive": -1}, {}, ("keep_alive=-1 (at most 1h)",)),
        ({"*": {"keep_alive": {"max": "1h"}}}, {"keep_alive": "30m"}, {"keep_alive": "30m"}, ()),
        ({"*": {"keep_alive": {"max": "1h"}}}, {"keep_alive": "soon"}, {"keep_alive": "soon"}, ()),
        ({"*": {"priority": {"max": 0}}}, {"priority": 10}, {}, ("priority=10 (at most 0)",)),
        ({"*": {"num_ctx": {"max": 1}}, "m": {"num_ctx": {"max": 9}}}, {"num_ctx": 9}, {"num_ctx": 9}, ()),
        ({"other": {"num_ctx": {"max": 1}}}, {"num_ctx": 9}, {"num_ctx": 9}, ()),
    ],
)  # fmt: skip
def test_what_a_client_names_beyond_a_rule_counts_as_not_named(
    rules: dict[str, Any], asked: Any, counts: dict[str, Any], ignored: tuple[str, ...]
) -> None:
    """A rule of the model goes before that of all models; what is no value is left for the scheduler to refuse."""
    assert apply_rules(parse_rules("rules", rules), ("m",), asked) == (counts, ignored)


@pytest.mark.parametrize(
    "wrong",
    [3, {"*": 3}, {"*": {"nmu_ctx": {"max": 1}}}, {"*": {"num_ctx": 8192}}, {"*": {"num_ctx": {}}},
     {"*": {"num_ctx": {"most": 1}}}, {"*": {"num_ctx": {"max": "many"}}}, {"*": {"keep_alive": {"lock": "soon"}}},
     {"*": {"num_ctx": {"lock": 1, "max": 2}}}, {"*": {"adapters": {"lock": None}}},
     {"*": {"num_ctx": {"lock": "big"}}}, {"*": {"num_ctx": {"lock": 0}}}, {"*": {"priority": {"lock": "high"}}},
     {"*": {"use_mmap": {"lock": 1}}}, {"*": {"use_mmap": {"max": 1}}}, {"*": {"cache_type_k": {"lock": "f17"}}},
     {"*": {"num_ctx": {"min": 9, "max": 8}}}, {"*": {"keep_alive": {"min": "1h", "max": "1m"}}}],
)  # fmt: skip
def test_a_rule_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidSettings, match="rules"):
        parse_rules("rules", wrong)


def test_a_large_context_that_every_request_names_reloads_nothing(serve: Serve) -> None:
    """The runner stays, whatever context and layers clients name, and a header says what was not taken."""
    served = serve(rules={"*": {"num_ctx": {"max": 2048}, "num_gpu": {"lock": None}}})
    body = {"model": "m", "messages": HELLO, "max_tokens": 1}
    assert served.post("/v1/chat/completions", body).status_code == 200
    for options in ({"num_ctx": 131072}, {"num_gpu": 999}, {"num_ctx": 4096, "num_gpu": 0}):
        answer = served.post("/v1/chat/completions", {**body, "options": options})
        assert answer.status_code == 200
        assert all(f"{name}={value}" in answer.headers["x-loadmaster-ignored"] for name, value in options.items())
    assert [runner.id for runner in served.scheduler.status().runners] == [1]


@pytest.mark.parametrize(("ruled", "called"), [("m", "m.gguf"), ("m:latest", "m"), ("m.gguf", "m:latest")])
def test_a_rule_holds_for_every_name_of_its_model(serve: Serve, ruled: str, called: str) -> None:
    """A client evades no rule by another name that leads to the same model; a rule for the name itself counts more."""
    rules: dict[str, Any] = {ruled: {"keep_alive": {"lock": "1h"}}, "other": {"keep_alive": {"lock": "1m"}}, "gone": {}}
    served = serve(rules=rules)
    body = {"model": called, "messages": HELLO, "max_tokens": 1, "keep_alive": 0}
    assert "keep_alive=0" in served.post("/v1/chat/completions", body).headers["x-loadmaster-ignored"]
    assert (
        served.post("/api/generate", {"model": called, "keep_alive": 0, "stream": False}).json()["done_reason"]
        == "load"
    )
    assert served.scheduler.status().runners[0].keep_alive_s == 3600


def test_what_is_said_to_be_ignored_is_one_header(serve: Serve) -> None:
    """A value with line breaks ends no header, and makes none."""
    served = serve(rules={"*": {"keep_alive": {"lock": "1h"}}})
    body = {"model": "m", "messages": HELLO, "max_tokens": 1, "keep_alive": "5m\r\nx-evil: 1\0ü\ud800"}
    answer = httpx2.post(f"{served.url}/v1/chat/completions", content=json.dumps(body), timeout=60)
    assert answer.status_code == 200 and "x-evil" not in answer.headers
    assert answer.headers["x-loadmaster-ignored"].startswith("keep_alive=5m")


def test_a_locked_keep_alive_holds(serve: Serve) -> None:
    """A client that asks for an unload after its answer does not have it where the keep-alive is locked."""
    served = serve(rules={"m": {"keep_alive": {"lock": "1h"}}})
    body = {"model": "m", "messages": HELLO, "max_tokens": 1, "keep_alive": 0}
    assert "keep_alive=0" in served.post("/v1/chat/completions", body).headers["x-loadmaster-ignored"]
    eventually(lambda: [runner.state for runner in served.scheduler.status().runners] == ["idle"])
    assert served.scheduler.status().runners[0].expires_in_s > 3000
