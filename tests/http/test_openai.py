"""OpenAI's API: its own client as the judge, and the engine alone as the measure of answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from starlette.datastructures import Headers

from scheduler.http import anthropic
from scheduler.http import openai as protocol
from scheduler.http.errors import error_table
from scheduler.http.runner_routes import Call, RunnerRoute
from scheduler.models.chat_defaults import ChatDefaults
from scheduler.models.model_spec import ModelSpec
from tests.http.conftest import Serve, Served, eventually
from tests.support.tiny_models import write_adapter

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "seed": 1, "max_tokens": 24}


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_chat_is_the_one_that_the_engine_gives_alone(client: openai.OpenAI, served: Served, streamed: bool) -> None:
    """With the same seed the text is what a lease on the same runner gives, whole and in pieces."""
    with served.scheduler.acquire("m") as lease:
        alone = lease.chat(HELLO, **GREEDY)
    if streamed:
        pieces = list(client.chat.completions.create(model="m", messages=HELLO, stream=True, **GREEDY))
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert len(pieces) > 2
    else:
        text = client.chat.completions.create(model="m", messages=HELLO, **GREEDY).choices[0].message.content or ""
    assert text == str(alone)


@pytest.mark.parametrize("name", ["m", "m.gguf"])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_names_the_model_as_the_client_does(client: openai.OpenAI, name: str, streamed: bool) -> None:
    """One runner serves several names, and each client sees the name that it has sent."""
    if streamed:
        pieces = client.chat.completions.create(model=name, messages=HELLO, stream=True, max_tokens=4)
        assert {piece.model for piece in pieces} == {name}
    else:
        assert client.chat.completions.create(model=name, messages=HELLO, max_tokens=4).model == name


def test_other_routes_answer_too(client: openai.OpenAI, served: Served) -> None:
    """Completions, responses, vectors, tokens: the runner answers each of them."""
    assert client.completions.create(model="m", prompt="hello", max_tokens=3).usage.completion_tokens == 3  # type: ignore[union-attr]
    assert client.responses.create(model="m", input="hello", max_output_tokens=3).status
    vectors = client.embeddings.create(model="m", input=["a", "b"]).data
    assert len(vectors) == 2 and len(vectors[0].embedding) == 64
    assert served.post("/tokenize", {"model": "m", "content": "abc"}).json()["tokens"]
    tokens = served.post("/tokenize", {"model": "m", "content": "abc"}).json()["tokens"]
    assert served.post("/detokenize", {"model": "m", "tokens": tokens}).json() == {"content": "abc"}


def test_models_are_listed_by_the_names_that_requests_take(client: openai.OpenAI) -> None:
    """Every name of the catalogue is listed, names with slashes can be asked for, and unknown ones are not found."""
    assert {model.id for model in client.models.list()} == {"m", "other", "deep/er", "slow"}
    assert client.models.retrieve("deep/er").id == "deep/er"
    with pytest.raises(openai.NotFoundError, match="there is no model 'othr': did you mean 'other'"):
        client.models.retrieve("othr")


@pytest.mark.parametrize("name", ["/etc/hostname", "../m", "~/m", "./m.gguf", "", "-m", None, 3, ["m"]])
def test_no_name_leads_to_a_path(served: Served, name: object) -> None:
    """A model's name is looked up in the catalogue, and is nothing else."""
    answer = served.post("/v1/chat/completions", {"model": name, "messages": HELLO})
    assert answer.status_code in (400, 404)
    assert answer.headers["x-should-retry"] == "false"


def test_a_request_may_say_how_its_model_is_loaded(serve: Serve) -> None:
    """Fields of the body and headers name options and times; headers count more."""
    served = serve()
    body = {"model": "m", "messages": HELLO, "max_tokens": 2, "options": {"num_ctx": 512}, "keep_alive": "1h"}
    assert served.post("/v1/chat/completions", body).status_code == 200
    eventually(lambda: served.scheduler.status().runners[0].state == "idle")
    (runner,) = served.scheduler.status().runners
    assert runner.options.num_ctx == 512 and 3000 < runner.expires_in_s <= 3600
    headers = {"x-loadmaster-num-ctx": "1024", "x-loadmaster-keep-alive": "30m"}
    assert served.post("/v1/chat/completions", body, **headers).status_code == 200
    eventually(lambda: any(one.state == "idle" for one in served.scheduler.status().runners))
    (runner,) = [one for one in served.scheduler.status().runners if one.state == "idle"]
    assert runner.options.num_ctx == 1024 and 1000 < runner.expires_in_s <= 1800
    body |= {"keep_alive": 0, "ttl": 60}
    assert served.post("/v1/chat/completions", body).status_code == 200
    eventually(lambda: all(one.state == "expiring" for one in served.scheduler.status().runners))


@pytest.mark.parametrize(
    "wrong",
    [
        {"options": {"num_ctx": 0}}, {"options": {"num_ctx": "many"}}, {"options": {"nmu_ctx": 1}}, {"options": 3},
        {"keep_alive": "soon"}, {"priority": "high"}, {"timeout": []}, {"options": {"devices": ["0"]}},
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_a_sentence(served: Served, wrong: dict[str, object]) -> None:
    """An option that does not exist, or has no such value, is a 400 that names it."""
    answer = served.post("/v1/chat/completions", {"model": "m", "messages": HELLO, **wrong})
    assert answer.status_code == 400
    assert any(name in answer.json()["error"]["message"] for name in ("num_ctx", "nmu_ctx", "devices", *wrong))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "m"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "m", "temperature": NaN}',
        b'{"model": "m", "temperature": 1e999}',
    ],
)
def test_a_body_that_is_no_object_is_refused(served: Served, content: bytes) -> None:
    answer = httpx2.post(f"{served.url}/v1/chat/completions", content=content)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "rest"),
    [
        ("/v1/completions", b'"prompt": "\\ud800"'),
        ("/v1/chat/completions", b'"messages": [{"role": "user", "content": "\\udfff"}]'),
        ("/v1/messages", b'"max_tokens": 1, "messages": [{"role": "user", "content": "\\ud800\\ud800"}]'),
        ("/v1/embeddings", b'"input": ["a", "\\ud800"]'),
        ("/tokenize", b'"content": "\\ud800"'),
        ("/api/embed", b'"input": "\\ud800"'),
        (
            "/api/chat",
            b'"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {"a": "\\ud800"}}}]}]',
        ),
    ],
)
def test_a_body_with_half_a_character_is_refused(served: Served, path: str, rest: bytes) -> None:
    """JSON may name half of a surrogate pair, which no text has: that is the client's fault, in every route."""
    answer = httpx2.post(f"{served.url}{path}", content=b'{"model": "m", ' + rest + b"}", timeout=60)
    assert answer.status_code == 400 and "surrogates" in answer.text and answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("field", ["previous_response_id", "conversation"])
def test_a_response_that_goes_on_from_another_is_refused(served: Served, field: str) -> None:
    """Nothing is kept between requests: an answer without what was said before would be a wrong one."""
    answer = served.post("/v1/responses", {"model": "m", "input": "a", "max_output_tokens": 1, field: "id_1"})
    assert answer.status_code == 400 and field in answer.json()["error"]["message"]
    assert (
        served.post("/v1/responses", {"model": "m", "input": "a", "max_output_tokens": 1, field: None}).status_code
        == 200
    )


def sent(route: RunnerRoute, body: dict[str, object]) -> dict[str, Any]:
    """Return what the runner is sent."""
    call: Call = route.call(json.dumps(body).encode(), Headers({}))
    content: dict[str, Any] = json.loads(call.content(ModelSpec("m", "/m.gguf")))
    return content


@pytest.mark.parametrize("route", protocol.ROUTES, ids=lambda route: route.paths[0])
def test_what_reaches_beyond_a_request_does_not_reach_the_runner(route: RunnerRoute) -> None:
    """No request touches another's slot, an adapter, or what only the server may say; unknown fields go too."""
    reaching = {"id_slot": 1, "slot_id": 1, "lora": [{"id": 0}], "n_cache_reuse": 1, "cache_prompt": True}
    unknown = {"user": "u", "store": True, "keep_alive": 5, "options": {}, "priority": 1, "ttl": 5, "timeout": 9}
    told = sent(route, {"model": "m", "prompt": "p", "messages": HELLO, "input": "i", **reaching, **unknown})
    assert not set(told) & {"id_slot", "slot_id", "lora", *unknown}


DEFAULTS = ChatDefaults(
    "be kind",
    ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}),
    {"temperature": 0, "stop": ["~"], "max_tokens": 9},
)
BE_KIND = {"role": "system", "content": "be kind"}
BEFORE: list[Any] = [*DEFAULTS.messages]
SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]}


@pytest.mark.parametrize(
    ("path", "body", "wanted"),
    [
        ("/v1/chat/completions", {"messages": HELLO}, {"messages": [BE_KIND, *BEFORE, *HELLO]}),
        ("/v1/chat/completions", {"messages": [], "stop": ["x"]}, {"stop": ["x"], "temperature": 0}),
        ("/v1/completions", {"prompt": "p"}, {"prompt": "p", "stop": ["~"], "max_tokens": 9}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 2},
         {"system": "be kind", "messages": [*BEFORE, *HELLO], "stop_sequences": ["~"], "temperature": 0}),
        ("/v1/messages", {"messages": HELLO, "stop_sequences": ["x"], "system": "s"},
         {"stop_sequences": ["x"], "system": "s"}),
        ("/v1/responses", {"input": "hello"},
         {"instructions": "be kind", "input": [BEFORE[0], SAID, {"role": "user", "content": "hello"}], "stop": ["~"]}),
        ("/v1/responses", {"input": HELLO, "instructions": "s", "max_output_tokens": 2},
         {"instructions": "s", "input": [BEFORE[0], SAID, *HELLO], "temperature": 0, "max_output_tokens": 2}),
        ("/v1/responses", {"input": [{"role": "developer", "content": "d"}]}, {"instructions": None}),
        ("/v1/responses", {"input": 5}, {"input": 5}),
    ],
)  # fmt: skip
def test_every_route_asks_as_the_model_is_asked(path: str, body: dict[str, Any], wanted: dict[str, Any]) -> None:
    """What a model comes with is asked in each protocol's own fields, where the client names nothing else."""
    route = next(each for each in (*protocol.ROUTES, *anthropic.ROUTES) if path in each.paths)
    call = route.call(json.dumps({"model": "m", **body}).encode(), Headers({}))
    told = json.loads(call.content(ModelSpec("m", "/m.gguf", chat=DEFAULTS)))
    assert {name: told.get(name) for name in wanted} == wanted
    assert "max_tokens" not in told or "max_output_tokens" not in told
    assert "stop" not in told or "stop_sequences" not in told


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/x", "https://a/b.png", "file:///etc/passwd", "HTTP://x/y"])
def test_no_address_in_a_message_is_fetched(served: Served, address: str) -> None:
    """An image by its address is refused in every protocol; words that hold an address are words."""
    image = {"type": "image_url", "image_url": {"url": address}}
    chat = [{"role": "user", "content": [{"type": "text", "text": address}, image]}]
    anthropics = {"type": "image", "source": {"type": "url", "url": address}}
    results = {"type": "tool_result", "tool_use_id": "1", "content": [anthropics]}
    for path, body in (
        ("/v1/chat/completions", {"messages": chat}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": address}]}]}),
        ("/v1/messages", {"max_tokens": 3, "messages": [{"role": "user", "content": [anthropics]}]}),
        ("/v1/messages", {"max_tokens": 3, "messages": [{"role": "user", "content": [results]}]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": [results]}]}),
    ):
        answer = served.post(path, {"model": "m", **body})
        assert answer.status_code == 400 and "fetch" in answer.json()["error"]["message"], path


def test_calls_and_words_may_hold_addresses(served: Served) -> None:
    """What a tool was called with, and what it answered as text, is not taken for an address to fetch."""
    used = {"type": "tool_use", "id": "1", "name": "get", "input": {"url": "https://example.org"}}
    told = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "https://example.org"}]}
    messages = [
        {"role": "user", "content": "https://example.org"},
        {"role": "assistant", "content": [used]},
        {"role": "user", "content": [told]},
    ]
    answer = served.post("/v1/messages", {"model": "m", "max_tokens": 2, "messages": messages})
    assert answer.status_code == 200, answer.text


def test_speech_is_passed_on_as_a_form(served: Served) -> None:
    """The form reaches the runner with the fields that it takes; one without a file, and no form, are refused."""
    url = f"{served.url}/v1/audio/transcriptions"
    answer = httpx2.post(url, data={"model": "m", "id_slot": "1"}, files={"file": ("a.wav", b"RIFF")}, timeout=60)
    assert answer.status_code == 400 and "audio" in answer.json()["error"]["message"].lower()
    answer = httpx2.post(url, data={"model": "m", "keep_alive": "soon"}, files={"file": ("a.wav", b"RIFF")})
    assert answer.status_code == 400 and "keep_alive cannot be 'soon'" in answer.json()["error"]["message"]
    fields = {"model": "m", "keep_alive": "9", "priority": "1", "ttl": "8"}
    assert httpx2.post(url, data=fields, files={"file": ("a.wav", b"RIFF")}).status_code == 400  # only of the sound
    assert 9 in [runner.keep_alive_s for runner in served.scheduler.status().runners if runner.model == "m"]
    for wrong in (
        {"data": {"model": "m"}, "files": {"other": ("a", b"b")}},
        {"content": b"x"},
        {"json": {"model": "m"}},
    ):
        assert httpx2.post(url, **wrong).status_code == 400  # type: ignore[arg-type]
    files = {"file": ("a.wav", b"RIFF")}
    assert httpx2.post(url, data={"model": "../m"}, files=files).status_code == 400
    assert httpx2.post(url, data={"model": "nope"}, files=files).status_code == 404


def test_the_description_names_every_route(served: Served) -> None:
    """The OpenAPI description is made from the routes, and each operation in it says what it does."""
    told = served.get("/openapi.json").json()
    assert told["openapi"].startswith("3.") and {"/v1/messages", "/v1/models/{id}", "/health"} <= {*told["paths"]}
    operations = [each for methods in told["paths"].values() for each in methods.values()]
    assert all(each["summary"] for each in operations)


def test_the_description_has_fields_and_errors(served: Served) -> None:
    """It says what a body must hold, also of forms and in other protocols, and each status that an error may have."""
    paths = served.get("/openapi.json").json()["paths"]
    required = {
        path: content["schema"]["required"]
        for path, methods in paths.items()
        for content in methods.get("post", {}).get("requestBody", {"content": {}})["content"].values()
    }
    assert required["/v1/chat/completions"] == ["model", "messages"] and required["/api/chat"] == ["model"]
    assert required["/v1/audio/transcriptions"] == ["model", "file"]
    statuses = {*re.findall(r"\b[45]\d\d\b", error_table())}
    for path, shape in (("/api/chat", "string"), ("/v1/messages", "object"), ("/v1/embeddings", "object")):
        answers = paths[path]["post"]["responses"]
        assert statuses <= {*answers}
        assert answers["404"]["content"]["application/json"]["schema"]["properties"]["error"]["type"] == shape


class Adapted:
    """Two names of one model, of which one has a choice of its own."""

    location = "here"

    def __init__(self, folder: Path, model: Path) -> None:
        named = {name: str(write_adapter(folder / f"{name}.gguf", seed)) for seed, name in enumerate(("sql", "tone"))}
        self.models = {
            name: ModelSpec(name, str(model), named_adapters=named, adapter=adapter)
            for name, adapter in (("plain", {}), ("as-sql", "sql"))
        }

    def find(self, name: str) -> ModelSpec | None:
        return self.models.get(name)

    def names(self) -> list[str]:
        return [*self.models]


def test_the_name_of_a_model_or_a_field_says_which_adapter_is_applied(
    serve: Serve, model_folder: Path, tmp_path: Path
) -> None:
    """One runner serves all of them, in each protocol, as a lease on that adapter is served."""
    served = serve()
    served.scheduler.catalog.add(Adapted(tmp_path, model_folder / "m.gguf"))
    greedy = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 6, "logprobs": 1}

    def of_openai(model: str, **more: Any) -> Any:
        (choice,) = served.post("/v1/completions", {"model": model, **greedy, **more}).json()["choices"]
        return choice["logprobs"]["content"]

    def of_ollama(model: str, **more: Any) -> Any:
        options = {"temperature": 0, "num_predict": 6}
        asked = {"model": model, "prompt": greedy["prompt"], "raw": True, "stream": False, "options": options, **more}
        return served.post("/api/generate", asked).json()["response"]

    for ask in (of_openai, of_ollama):
        plain, sql, tone = ask("plain"), ask("as-sql"), ask("plain", adapter="tone")
        assert plain != sql != tone != plain
        assert ask("plain", adapter={"sql": 1.0}) == sql
        assert ask("as-sql", adapter={"sql": 0}) == plain
    assert len(served.scheduler.status().runners) == 1
    refused = served.post("/v1/completions", {"model": "plain", **greedy, "adapter": "none"})
    assert refused.status_code == 400 and "it has sql, tone" in refused.json()["error"]["message"]
