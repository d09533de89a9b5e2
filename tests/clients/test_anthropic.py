"""Anthropic's own client: what it is told by the server is what the engine alone tells it."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Callable
from typing import Any

import anthropic
import pytest

from tests.clients.conftest import TIDE
from tests.http.conftest import Serve, Served, eventually
from tests.http.test_ollama import png

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"max_tokens": 24, "extra_body": {"temperature": 0, "seed": 1}}
TOOLS: Any = [{"name": "tide", "description": TIDE["description"], "input_schema": TIDE["parameters"]}]


@pytest.fixture(scope="module")
def client(served: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)


def alone(served: Served, model: str, ask: Callable[[anthropic.Anthropic], Any]) -> Any:
    """Return what the runner of a lease answers without the server."""
    with served.scheduler.acquire(model) as lease:
        return ask(anthropic.Anthropic(base_url=lease.url, api_key=lease.api_key, max_retries=0))


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def tokens_of(usage: anthropic.types.Usage) -> int:
    """Return the tokens of the question, with those that the engine still had."""
    return usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_message_is_the_one_that_the_engine_gives_alone(client: anthropic.Anthropic, served: Served) -> None:
    def ask(of: anthropic.Anthropic) -> anthropic.types.Message:
        return of.messages.create(model="m", messages=HELLO, system="short", **GREEDY)

    ours, engines = ask(client), alone(served, "m", ask)
    assert text_of(ours) == text_of(engines) != ""
    assert (ours.model, ours.stop_reason) == ("m", engines.stop_reason)
    assert ours.usage.output_tokens == engines.usage.output_tokens == 24


def test_a_stream_is_the_one_that_the_engine_gives_alone(client: anthropic.Anthropic, served: Served) -> None:
    """In a stream come the same events, in the same order, and the same text."""

    def ask(of: anthropic.Anthropic) -> tuple[list[str], str]:
        with of.messages.stream(model="m", messages=HELLO, **GREEDY) as stream:
            kinds = [event.type for event in stream]
            return kinds, stream.get_final_text()

    assert ask(client) == alone(served, "m", ask)
    assert ask(client)[0][0] == "message_start"


def test_a_client_of_an_event_loop_is_answered(served: Served, client: anthropic.Anthropic) -> None:
    """Several at once, whole and in pieces, are answered with the same text."""

    async def main() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=served.url, api_key="none", max_retries=0) as client:

            async def whole() -> str:
                return text_of(await client.messages.create(model="m", messages=HELLO, **GREEDY))

            async def pieces() -> str:
                async with client.messages.stream(model="m", messages=HELLO, **GREEDY) as stream:
                    return "".join([text async for text in stream.text_stream])

            return list(await asyncio.gather(whole(), pieces(), whole(), pieces()))

    assert {*asyncio.run(main())} == {text_of(client.messages.create(model="m", messages=HELLO, **GREEDY))}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("choice", ["auto", "any"])
def test_a_tool_is_called_and_its_result_read(
    client: anthropic.Anthropic, served: Served, streamed: bool, choice: str
) -> None:
    """A call has its arguments as an object; a chat with its result goes on."""
    asking: Any = {"model": "calls", "tools": TOOLS, "tool_choice": {"type": choice}, "max_tokens": 200}
    asking |= {"messages": HELLO, "extra_body": {"temperature": 0}}

    def ask(of: anthropic.Anthropic) -> anthropic.types.Message:
        if not streamed:
            return of.messages.create(**asking)
        with of.messages.stream(**asking) as stream:
            return stream.get_final_message()

    message = ask(client)
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert (message.stop_reason, call.name) == ("tool_use", "tide") and call.input["city"] in ("Hull", "Lisbon")
    (engines,) = [block for block in alone(served, "calls", ask).content if block.type == "tool_use"]
    assert (engines.name, engines.input) == (call.name, call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "at 9"}
    said = [*HELLO, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(**{**asking, "messages": said, "max_tokens": 4})
    assert answer.usage.output_tokens > 0 and tokens_of(answer.usage) > tokens_of(message.usage)


def test_an_image_is_read(client: anthropic.Anthropic, served: Served) -> None:
    """A model with a projector is given the picture, which takes tokens; one without refuses it."""
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png()).decode()}
    said: list[Any] = [
        {"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "?"}]}
    ]

    def ask(of: anthropic.Anthropic) -> tuple[int, str]:
        message = of.messages.create(model="sees/sees", messages=said, **{**GREEDY, "max_tokens": 8})
        return tokens_of(message.usage), text_of(message)

    ours = ask(client)
    assert ours[0] > 50 and ours == alone(served, "sees/sees", ask)
    with pytest.raises(anthropic.APIStatusError):
        client.messages.create(model="m", messages=said, **GREEDY)


def test_tokens_are_counted_as_they_are_used(client: anthropic.Anthropic) -> None:
    asked: Any = {"model": "calls", "messages": HELLO, "tools": TOOLS, "system": "short"}
    counted = client.messages.count_tokens(**asked).input_tokens
    usage = client.messages.create(**asked, max_tokens=1).usage
    assert counted == tokens_of(usage) > 100


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        ({"model": "n"}, anthropic.NotFoundError, "there is no model 'n'"),
        ({"messages": [{"role": "user", "content": "a" * 9000}]}, anthropic.BadRequestError, "context"),
        ({"extra_body": {"options": {"num_ctx": -1}}}, anthropic.BadRequestError, "num_ctx"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_errors_are_those_of_the_client(
    served: Served, wrong: dict[str, Any], kind: type[anthropic.APIStatusError], words: str, streamed: bool
) -> None:
    """Each error is raised as the kind that it has in Anthropic's terms, and no request is made twice."""
    calls: list[str] = []
    inner = anthropic.DefaultHttpxClient(event_hooks={"request": [lambda request: calls.append(str(request.url))]})
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=2, http_client=inner) as client:
        asked = {"model": "m", "messages": HELLO, "max_tokens": 4, "stream": streamed, **wrong}
        with pytest.raises(kind, match=words) as refused:
            client.messages.create(**asked)
    assert isinstance(refused.value.body, dict) and refused.value.body["type"] == "error"
    assert len(calls) == 1


def test_a_stream_shows_life_while_its_model_waits_for_room(serve: Serve) -> None:
    """Pings come before the first event of the message; the client passes over them, and the answer is whole."""
    full = serve({"max_runners": 1, "keep_alive": "1h"}, sign_of_life="0.1s")

    def wait_for_room(other: str) -> None:
        threading.Timer(1.5, full.scheduler.acquire(other).release).start()

    with anthropic.Anthropic(base_url=full.url, api_key="none", max_retries=0) as client:
        wait_for_room("calls")
        raw = client.messages.with_streaming_response
        with raw.create(model="m", messages=HELLO, stream=True, **GREEDY) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith(("event:", ":"))]
        assert "event: ping" in lines[: lines.index("event: message_start")] and "waiting at position 1" in lines[0]
        wait_for_room("calls")
        with client.messages.stream(model="m", messages=HELLO, **GREEDY) as stream:
            kinds = [event.type for event in stream]
            text = stream.get_final_text()
        assert (kinds[0], text) == (
            "message_start",
            text_of(client.messages.create(model="m", messages=HELLO, **GREEDY)),
        )


def test_an_error_after_signs_of_life_is_raised(serve: Serve) -> None:
    full = serve({"max_runners": 1, "keep_alive": "1h"}, sign_of_life="0.1s")
    asked: Any = {"model": "m", "messages": HELLO, "max_tokens": 4, "extra_body": {"timeout": "0.5s"}}
    with (
        full.scheduler.acquire("calls"),
        anthropic.Anthropic(base_url=full.url, api_key="none", max_retries=0) as client,
        pytest.raises(anthropic.APIStatusError, match="timeout_error"),
        client.messages.stream(**asked) as stream,
    ):
        stream.get_final_message()


def test_a_client_that_leaves_ends_its_answer(served: Served) -> None:
    """A stream that is closed, and a task that is cancelled, leave no lease behind."""

    async def main() -> None:
        async with anthropic.AsyncAnthropic(base_url=served.url, api_key="none", max_retries=0) as client:
            asked: Any = {"model": "slow", "messages": HELLO, "max_tokens": 20_000}
            async with client.messages.stream(**asked) as stream:
                await anext(aiter(stream.text_stream))
            waiting = asyncio.create_task(client.messages.create(**asked, timeout=600))
            await asyncio.to_thread(eventually, lambda: leases(served) > 0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(main())
    eventually(lambda: leases(served) == 0)


def leases(served: Served) -> int:
    return sum(runner.leases for runner in served.scheduler.status().runners)
