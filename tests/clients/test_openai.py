"""OpenAI's client, in the version that other packages bring: answers are those of the engine alone."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.clients.conftest import TIDE
from tests.http.conftest import Served
from tests.http.test_ollama import png

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "seed": 1, "max_tokens": 24}
TOOLS: Any = [{"type": "function", "function": TIDE}]


class Weather(BaseModel):
    """What the answer to a question is to look like."""

    degrees: int
    place: str


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def alone(served: Served, model: str, ask: Callable[[openai.OpenAI], Any]) -> Any:
    """Return what the runner of a lease answers without the server."""
    with served.scheduler.acquire(model) as lease:
        return ask(openai.OpenAI(base_url=f"{lease.url}/v1", api_key=lease.api_key, max_retries=0))


def test_a_client_of_an_event_loop_is_answered(client: openai.OpenAI, served: Served) -> None:
    """Several at once, whole and in pieces, have the text of the engine alone."""

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def whole() -> str:
                answer = await client.chat.completions.create(model="m", messages=HELLO, **GREEDY)
                return answer.choices[0].message.content or ""

            async def pieces() -> str:
                stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True, **GREEDY)
                return "".join([each.choices[0].delta.content or "" async for each in stream if each.choices])

            return list(await asyncio.gather(whole(), pieces(), whole(), pieces()))

    def ask(of: openai.OpenAI) -> str:
        return of.chat.completions.create(model="m", messages=HELLO, **GREEDY).choices[0].message.content or ""

    assert {*asyncio.run(main())} == {alone(served, "m", ask)} != {""}


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "tide"}}])
def test_a_tool_is_called_in_pieces_and_whole(client: openai.OpenAI, served: Served, choice: Any) -> None:
    asking: Any = {"model": "calls", "messages": HELLO, "tools": TOOLS, "tool_choice": choice}
    asking |= {**GREEDY, "max_tokens": 200}

    def ask(of: openai.OpenAI) -> tuple[str, Any]:
        (call,) = of.chat.completions.create(**asking).choices[0].message.tool_calls or ()
        return call.function.name, json.loads(call.function.arguments)

    name, arguments = ask(client)
    assert (name, arguments) == alone(served, "calls", ask) and arguments["city"] in ("Hull", "Lisbon")
    with client.chat.completions.stream(**asking) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert (call.function.name, json.loads(call.function.arguments)) == (name, arguments)


def test_an_answer_has_the_form_of_a_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model="calls", messages=HELLO, response_format=Weather, temperature=0)
    assert answer.choices[0].message.parsed == Weather(degrees=3, place="")


def test_an_image_is_read(client: openai.OpenAI, served: Served) -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png()).decode()}"}}
    said: Any = [{"role": "user", "content": [image, {"type": "text", "text": "?"}]}]

    def ask(of: openai.OpenAI) -> tuple[int, str | None]:
        answer = of.chat.completions.create(model="sees/sees", messages=said, **GREEDY)
        return answer.usage.prompt_tokens, answer.choices[0].message.content  # type: ignore[union-attr]

    assert ask(client) == alone(served, "sees/sees", ask) and ask(client)[0] > 50


def test_responses_come_in_events(client: openai.OpenAI, served: Served) -> None:
    asking: Any = {"model": "m", "input": "hello", "temperature": 0, "max_output_tokens": 24, "extra_body": {"seed": 1}}

    def ask(of: openai.OpenAI) -> tuple[list[str], str]:
        events = list(of.responses.create(stream=True, **asking))
        return [event.type for event in events], events[-1].response.output_text

    kinds, text = ask(client)
    assert (kinds, text) == alone(served, "m", ask) and (kinds[0], kinds[-1]) == (
        "response.created",
        "response.completed",
    )
    assert client.responses.create(**asking).output_text == text != ""
