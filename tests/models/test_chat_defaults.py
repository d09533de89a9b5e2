"""What a model's chats begin with: as Ollama's store has it, and as the methods of a lease apply it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fsm.domain.options import Options
from scheduler import ChatDefaults, InvalidModel, InvalidSettings, Lease, ModelSpec, Scheduler, UnsupportedOption
from scheduler.engines.runner_client import RunnerClient
from scheduler.models.sources import OllamaStore
from tests.support.leaks import no_leaks
from tests.support.real import settings
from tests.support.stores import PARAMS, TEMPLATE, ollama_model
from tests.support.tiny_models import write_tiny_model

KIND = "application/vnd.ollama.image."
SYSTEM, MESSAGES, DRAFT = (KIND + kind for kind in ("system", "messages", "draft"))
HI = {"role": "user", "content": "hi"}


def store_of(folder: Path, *layers: tuple[str, bytes]) -> OllamaStore:
    ollama_model(folder, "registry.ollama.ai/library/mario:latest", b"model", *layers)
    return OllamaStore(folder)


def chat_of(folder: Path, *layers: tuple[str, bytes]) -> ChatDefaults:
    spec = store_of(folder, *layers).find("mario")
    assert spec is not None
    return spec.chat


def parameters(**named: Any) -> tuple[str, bytes]:
    return PARAMS, json.dumps(named).encode()


# -- what Ollama's store has -------------------------------------------------------------------------------------------


def test_u34_system_messages_and_sampling_come_with_ollamas_models(tmp_path: Path) -> None:
    """U34: what a Modelfile says of chats comes along, under the engine's names; load-time options stay options."""
    spec = store_of(
        tmp_path,
        (SYSTEM, b"You are Mario."),
        (MESSAGES, json.dumps([HI, {"role": "assistant", "content": "it's-a me"}]).encode()),
        parameters(temperature=0, num_predict=-2, num_keep=4, stop=["</s>"], top_k=5.0, num_ctx=1024, seed=7),
    ).find("mario")
    assert spec is not None
    assert spec.options == Options(num_ctx=1024)
    assert spec.chat == ChatDefaults(
        "You are Mario.",
        (HI, {"role": "assistant", "content": "it's-a me"}),
        {"temperature": 0, "max_tokens": -1, "n_keep": 4, "stop": ["</s>"], "top_k": 5, "seed": 7},
    )


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        ((TEMPLATE, b"<s>{{ .System }} {{ .Prompt }}"), "template"),
        ((DRAFT, b"GGUF"), "draft"),
        ((f"{KIND}novelty", b""), "novelty"),
        (parameters(tfs_z=1.0), "tfs_z"),
        (parameters(temperature="hot"), "temperature"),
        (parameters(top_k=0.5), "top_k"),
        (parameters(stop=[1]), "stop"),
    ],
)
def test_u34_what_has_no_effect_is_named(tmp_path: Path, layer: tuple[str, bytes], word: str) -> None:
    """U34: a template, a draft model, and what is unknown, is kept in words; the rest of the model is usable."""
    (said,) = chat_of(tmp_path, layer).unapplied
    assert word in said
    if layer[0] == TEMPLATE:
        assert "sha256-" in said


def test_u34_what_everybody_has_is_not_named(tmp_path: Path) -> None:
    """U34: a licence, and the template of a model without one, are nothing to tell."""
    assert chat_of(tmp_path) == ChatDefaults()


@pytest.mark.parametrize("layer", [(MESSAGES, b"{}"), (MESSAGES, b"[1]"), (MESSAGES, b"["), (SYSTEM, b"\xff")])
def test_u34_layers_that_cannot_be_read_are_refused(tmp_path: Path, layer: tuple[str, bytes]) -> None:
    """U34: a layer that is damaged makes the model an invalid one, as damaged parameters do."""
    with pytest.raises(InvalidModel):
        chat_of(tmp_path, layer)


# -- how it is applied -------------------------------------------------------------------------------------------------


class Server:
    """A runner's server that keeps what it is sent."""

    def __init__(self) -> None:
        self.body: Mapping[str, Any] = {}

    def client(self) -> RunnerClient:
        return RunnerClient("http://127.0.0.1:1", "key", transport=httpx2.MockTransport(self._answer))

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        self.body = json.loads(request.content)
        choice = {"index": 0, "text": "yes", "message": {"content": "yes"}, "delta": {"content": "yes"}}
        if self.body.get("stream"):
            return httpx2.Response(
                200,
                text=f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n",
                headers={"content-type": "text/event-stream"},
            )
        return httpx2.Response(200, json={"choices": [choice], "data": [{"index": 0, "embedding": [1.0]}]})


MARIO = ChatDefaults("You are Mario.", (HI,), {"temperature": 0, "max_tokens": 9})
LUIGI = {"role": "system", "content": "You are Luigi."}
MARIOS = [{"role": "system", "content": "You are Mario."}, HI]


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.mark.parametrize(
    ("said", "sent"),
    [
        ("go", [*MARIOS, {"role": "user", "content": "go"}]),
        ([HI, HI], [*MARIOS, HI, HI]),
        ([LUIGI, HI], [HI, LUIGI, HI]),
    ],
)
def test_u34_a_chat_begins_as_its_model_says(server: Server, said: Any, sent: list[Any]) -> None:
    """U34: the system message is for chats without one of their own, and the messages come before the chat's."""
    client = server.client()
    assert client.answer(client.chat_call(said, MARIO)) == "yes" and server.body["messages"] == sent
    server.body = {}
    assert "".join(client.pieces(client.chat_call(said, MARIO))) == "yes" and server.body["messages"] == sent
    client.close()


def test_u34_chats_in_an_event_loop_begin_so_too(server: Server) -> None:
    """U34: the methods for event loops apply the same defaults."""

    async def talk() -> None:
        client = server.client()
        await client.aanswer(client.chat_call("go", MARIO))
        client.close()

    asyncio.run(talk())
    assert server.body["messages"][:2] == MARIOS and server.body["temperature"] == 0


@pytest.mark.parametrize(
    ("named", "temperature", "limits"),
    [
        ({}, 0, {"max_tokens": 9}),
        ({"temperature": 1.5}, 1.5, {"max_tokens": 9}),
        ({"max_tokens": 3}, 0, {"max_tokens": 3}),
        ({"n_predict": 3}, 0, {"n_predict": 3}),
        ({"max_completion_tokens": 3}, 0, {"max_completion_tokens": 3}),
    ],
)
def test_u34_what_a_caller_names_counts(
    server: Server, named: dict[str, Any], temperature: float, limits: dict[str, int]
) -> None:
    """U34: parameters hold where a caller names none, by whatever name the same is said, for completions too."""
    client = server.client()
    for call in (client.chat_call, client.completion_call):
        client.answer(call("go", MARIO, **named))
        sent = {name: server.body[name] for name in server.body if name in ("max_tokens", "n_predict", *limits)}
        assert sent == limits and server.body["temperature"] == temperature
    assert server.body["prompt"] == "go" and "messages" not in server.body
    client.close()


def test_u34_defaults_that_chats_alone_have_are_for_chats_alone(server: Server) -> None:
    """U34: a default that only chats know keeps no text from being completed."""
    client, defaults = server.client(), ChatDefaults(parameters={"reasoning_effort": "low", "temperature": 0})
    client.answer(client.completion_call("go", defaults))
    assert "reasoning_effort" not in server.body and server.body["temperature"] == 0
    client.answer(client.chat_call("go", defaults))
    assert server.body["reasoning_effort"] == "low"
    client.close()


FETCHED = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}


@pytest.mark.parametrize(
    ("defaults", "match"),
    [
        (ChatDefaults(parameters={"temprature": 0}), "temperature"),
        (ChatDefaults(parameters={"stream": False}), "stream"),
        (ChatDefaults(messages=({"role": "user", "content": [FETCHED]},)), "fetch"),
    ],
)
def test_u34_defaults_are_refused_as_what_a_caller_says(server: Server, defaults: ChatDefaults, match: str) -> None:
    """U34: a parameter that the engine does not know, and an address to fetch, are refused from a model too."""
    client = server.client()
    with pytest.raises(UnsupportedOption, match=match):
        client.chat_call("go", defaults)
    client.close()


def test_chat_defaults_are_checked() -> None:
    """A specification takes nothing else for what its chats begin with."""
    with pytest.raises(InvalidSettings, match="ChatDefaults"):
        ModelSpec("m", "m.gguf", chat="You are Mario.")  # type: ignore[arg-type]


# -- with real children ------------------------------------------------------------------------------------------------


def answers(lease: Lease, count: int = 3) -> set[str]:
    return {lease.chat("Hi", max_tokens=8) for _ in range(count)}


def test_u34_two_names_of_one_file_share_a_runner_and_not_their_chats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """U34: defaults belong to a name; what has no effect is told once, with the first request."""
    file = write_tiny_model(tmp_path / "m.gguf", context=2048)
    store, template = tmp_path / "ollama", b"{{ .System }}: {{ .Prompt }}"
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    for name, system in (("mario", b"You are Mario."), ("luigi", b"You are Luigi, and afraid of ghosts.")):
        layers = (SYSTEM, system), (TEMPLATE, template), parameters(temperature=0)
        ollama_model(store, f"registry.ollama.ai/library/{name}:latest", file.read_bytes(), *layers)
    with no_leaks(), Scheduler(settings(num_ctx=512)) as scheduler:
        with scheduler.acquire("mario", timeout=60) as mario, scheduler.acquire("luigi", timeout=60) as luigi:
            assert mario.runner == luigi.runner
            assert len(answers(mario)) == len(answers(luigi)) == 1
            assert answers(mario, 1) != answers(luigi, 1)
        scheduler.acquire("mario", timeout=60, num_ctx=256).release()
    said = [each.getMessage() for each in caplog.records if "not applied" in each.getMessage()]
    assert [text.split()[0] for text in said] == ["mario", "luigi"] and "sha256-" in said[0]
