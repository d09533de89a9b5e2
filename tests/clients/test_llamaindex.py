"""LlamaIndex's clients of Ollama's and of OpenAI's API."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.ollama import Ollama
from llama_index.llms.openai_like import OpenAILike

from scheduler import Scheduler
from scheduler.http import create_app
from tests.http.conftest import Served
from tests.support.running import running
from tests.support.tiny_models import write_tiny_model

HELLO = [ChatMessage("hello")]


def client(kind: str, served: Served, model: str) -> Any:
    """Return a client of one of the two APIs, which answers with the same text each time."""
    if kind == "ollama":
        more = {"seed": 1, "num_predict": 24 if model == "m" else 200}
        return Ollama(model, base_url=served.url, temperature=0.0, context_window=8192, additional_kwargs=more)
    return OpenAILike(
        model, api_base=f"{served.url}/v1", api_key="none", temperature=0.0, max_retries=0, is_chat_model=True,
        is_function_calling_model=True, max_tokens=24 if model == "m" else 200, additional_kwargs={"seed": 1},
    )  # fmt: skip


def tide(city: str) -> str:
    """Tell when the water is high."""
    return "at 9"


@pytest.mark.parametrize("kind", ["ollama", "openai"])
def test_a_chat_is_the_one_that_the_engine_gives_alone(served: Served, kind: str) -> None:
    """Whole, in pieces, and in an event loop."""
    asked = client(kind, served, "m")
    with served.scheduler.acquire("m", num_ctx=8192) as lease:
        alone = str(lease.chat("hello", temperature=0, seed=1, max_tokens=24))
    assert asked.chat(HELLO).message.content == alone
    assert "".join(piece.delta or "" for piece in asked.stream_chat(HELLO)) == alone
    assert asyncio.run(asked.achat(HELLO)).message.content == alone
    assert len(alone) > 2


@pytest.mark.parametrize("kind", ["ollama", "openai"])
def test_a_tool_is_called(served: Served, kind: str) -> None:
    asked, tool = client(kind, served, "calls"), FunctionTool.from_defaults(tide)
    answer = asked.chat_with_tools([tool], "when?")
    (call,) = asked.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("tide", {"city": ""})
    assert asked.predict_and_call([tool], "when?").response == "at 9"


def test_a_context_that_a_client_takes_from_the_file_is_limited(tmp_path: Path) -> None:
    """LlamaIndex asks for the whole context of the model's training in each request; a rule holds it back."""
    write_tiny_model(tmp_path / "long.gguf", context=131072)
    rules = {"*": {"num_ctx": {"max": 4096}}}
    with Scheduler(gpus=False, models=tmp_path) as scheduler, running(create_app(scheduler, rules=rules)) as url:
        asked = Ollama("long", base_url=url, additional_kwargs={"num_predict": 4})
        assert asked.metadata.context_window == 131072
        with scheduler.acquire("long") as lease:
            before = lease.runner
        assert asked.chat(HELLO).raw["done"] and asked.chat(HELLO).raw["done"]
        (runner,) = scheduler.status().runners
    assert runner.id == before and runner.options.num_ctx is not None and runner.options.num_ctx <= 4096
