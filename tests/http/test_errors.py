"""Errors over HTTP: each kind has one status, one code and one body per protocol, and says whether to try again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from scheduler import Scheduler
from scheduler.errors.exceptions import (
    AcquireTimeout,
    DoesNotFit,
    EngineError,
    LeaseReleased,
    LoadFailed,
    QueueFull,
    RunnerCrashed,
    SchedulerClosed,
    SchedulerError,
    UnsupportedOption,
)
from scheduler.http import create_app
from scheduler.http.anthropic import PROTOCOL as ANTHROPIC
from scheduler.http.errors import answer_to, error_table
from scheduler.http.ollama import PROTOCOL as OLLAMA
from scheduler.http.openai import PROTOCOL as OPENAI
from scheduler.http.openai import RESPONSES
from scheduler.http.settings import server_table
from tests.api.test_errors import EXAMPLES
from tests.http.conftest import Serve, Served
from tests.support.running import running

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
KINDS = {type(error): error for error, _, _ in EXAMPLES}
DOCS = Path(__file__).resolve().parents[2] / "docs" / "server.md"


@pytest.mark.parametrize("error", KINDS.values(), ids=lambda error: type(error).__name__)
def test_each_kind_has_one_status_and_body_in_each_protocol(error: SchedulerError) -> None:
    """The body is JSON with the message, in the shape of each protocol, and a stream may end with it."""
    answer = answer_to(error)
    assert 400 <= answer.status < 600 and answer.message and answer.code
    assert f"| `{type(error).__name__}` |" in error_table() and f"`{answer.code}`" in error_table()
    told = json.loads(json.dumps(OPENAI.error(answer)))["error"]
    assert (told["message"], told["code"]) == (answer.message, answer.code) and told["type"]
    told = json.loads(json.dumps(ANTHROPIC.error(answer)))
    assert told["type"] == "error" and told["error"]["message"] == answer.message and told["error"]["type"]
    *_, data, done, end = OPENAI.error_event(answer).decode().split("\n\n")
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == answer.code
    assert (done, end) == ("data: [DONE]", "")
    event, data = RESPONSES.error_event(answer).decode().strip().split("\n")
    told = json.loads(data.removeprefix("data: "))
    assert (event, told["type"], told["code"], told["message"]) == (
        "event: error",
        "error",
        answer.code,
        answer.message,
    )
    assert told["error"] and RESPONSES.error(answer) == OPENAI.error(answer)  # official clients raise by the field
    event, data = ANTHROPIC.error_event(answer).decode().strip().split("\n")
    assert event == "event: error" and json.loads(data.removeprefix("data: "))["type"] == "error"
    assert json.loads(OLLAMA.error_event(answer)) == {**OLLAMA.error(answer)}
    assert OLLAMA.error(answer)["error"] == answer.message and OLLAMA.error_event(answer).count(b"\n") == 1


def test_the_tables_of_the_page_are_those_that_are_generated() -> None:
    """The page has the errors and the settings of the code."""
    page = DOCS.read_text(encoding="utf-8")
    assert error_table() in page and server_table() in page


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (QueueFull(3, 2.5), 503, {"Retry-After": "3"}),
        (LoadFailed("a", "no", 10.0), 503, {"Retry-After": "10"}),
        (LoadFailed("a", "no"), 503, {}),
        (SchedulerClosed(), 503, {"Retry-After": "5"}),
        (RunnerCrashed("a", 1, "killed"), 502, {}),
        (RunnerCrashed("a", 1, "the scheduler was closed", closed=True), 503, {"Retry-After": "5"}),
        (AcquireTimeout("a", 1.0, "memory"), 504, {}),
        (DoesNotFit("a", 9, {"cpu": 1}, "too big"), 507, {"x-should-retry": "false"}),
        (UnsupportedOption("num_ctx", 0, "less"), 400, {"x-should-retry": "false"}),
        (EngineError(400, "too long"), 400, {"x-should-retry": "false"}),
        (EngineError(500, "broken"), 500, {}),
    ],
)
def test_a_client_is_told_whether_and_when_to_try_again(
    error: SchedulerError, status: int, headers: dict[str, str]
) -> None:
    answer = answer_to(error)
    assert (answer.status, answer.headers()) == (status, headers)


@pytest.mark.parametrize("error", [SchedulerClosed(), RunnerCrashed("a", 1, "killed"), LeaseReleased("a")])
def test_a_client_is_given_advice_that_it_can_follow(error: SchedulerError) -> None:
    """A client of the server makes no scheduler and acquires nothing: it asks."""
    message = answer_to(error).message
    assert "ask again" in message and "acquire" not in message and "make a new" not in message


def test_figures_and_advice_come_with_a_model_that_does_not_fit() -> None:
    told = OPENAI.error(answer_to(DoesNotFit("a", 9, {"cpu": 1}, "too big", "a smaller context")))["error"]
    assert (told["needed_bytes"], told["free_bytes"], told["advice"]) == (9, {"cpu": 1}, "a smaller context")


def test_no_folder_of_this_machine_is_told() -> None:
    """Of a path in a message its last part is told; other words with slashes stay."""
    told = answer_to(LoadFailed("a", "cannot open '/home/me/secret/a.gguf': 3/4 of https://x/y read")).message
    assert "/home" not in told and "a.gguf" in told and "3/4" in told and "https://x/y" in told


@pytest.mark.parametrize("path", ["/v1/models", "/api/tags", "/api/chat"])
def test_the_servers_own_paths_are_told(path: str) -> None:
    """Advice that names a route names all of it."""
    assert f"GET {path} has" in answer_to(UnsupportedOption("model", None, f"GET {path} has them")).message


@pytest.fixture
def counted(serve: Serve, model_folder: Path) -> Iterator[Callable[..., tuple[str, list[int]]]]:
    """Return a function that starts a server whose requests are counted."""
    contexts: list[Any] = []

    def start(scheduler: Scheduler) -> tuple[str, list[int]]:
        app, calls = create_app(scheduler), [0]

        async def counting(scope: Any, receive: Any, send: Any) -> None:
            calls[0] += scope["type"] == "http"
            await app(scope, receive, send)

        contexts.append(running(counting))
        return contexts[-1].__enter__(), calls

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("settings", "model", "calls"),
    [
        ({}, "nope", 1),
        ({"memory_limit": "1MiB"}, "m", 1),  # does not fit: 507
        ({"closed": True}, "m", 3),  # 503: it may be had later
    ],
)
def test_official_clients_repeat_only_what_may_help(
    counted: Callable[..., tuple[str, list[int]]], model_folder: Path, settings: dict[str, Any], model: str, calls: int
) -> None:
    """The client of the package openai asks once where a retry cannot help, though it repeats errors of the server."""
    closed = settings.pop("closed", False)
    with Scheduler(gpus=False, models=model_folder, **settings) as scheduler:
        url, seen = counted(scheduler)
        if closed:
            scheduler.close()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=2)
        # the wait before a retry is not what is tested
        client._calculate_retry_timeout = lambda *_: 0.0  # type: ignore[method-assign]
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(model=model, messages=HELLO)
        assert seen[0] == calls


def test_an_engines_refusal_is_the_clients_error(served: Served) -> None:
    """A prompt over the context, an overlong text to embed, a model that cannot rerank: 400, with a way out."""
    long = "x" * 5000
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}], "stream": True}),
        ("/v1/messages", {"messages": [{"role": "user", "content": long}], "max_tokens": 3}),
        ("/v1/embeddings", {"input": long}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("/infill", {"input_prefix": "a", "input_suffix": "b"}),
    ):
        answer = served.post(path, {"model": "m", **body})
        assert answer.status_code == 400, (path, answer.text)
        assert answer.json()["error"]["message"] and answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/nothing", 404),
        ("GET", "/v1/", 404),
        ("POST", "/slots/0?action=save", 404),
    ],
)
def test_what_there_is_not_is_told_in_json(served: Served, method: str, path: str, status: int) -> None:
    import httpx2

    answer = httpx2.request(method, f"{served.url}{path}")
    assert answer.status_code == status and answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": 5, "content": "a"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": 5}]}),
        ("/v1/chat/completions", {"messages": HELLO, "tools": [{}]}),
        ("/v1/chat/completions", {"messages": HELLO, "reasoning_format": "$"}),
        ("/v1/messages", {}),
        ("/detokenize", {"tokens": [999_999]}),
        ("/detokenize", {"tokens": [-1]}),
    ],
)
def test_what_is_wrong_with_a_request_is_its_own_fault(served: Served, path: str, body: dict[str, Any]) -> None:
    """The engine answers some requests that are wrong with 500, as if another try could help."""
    answer = served.post(path, {"model": "m", **body})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (400, "false"), answer.text
