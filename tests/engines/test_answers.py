"""Answers as they come: what a runner tells with them, how long a caller waits, and what is never sent to a runner."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from itertools import accumulate
from typing import Any

import httpx2
import pytest

from scheduler import Answer, AnswerTimeout, EngineError, UnsupportedOption
from scheduler.engines.answer import PartialAnswer
from scheduler.engines.answer_requests import (
    BATCH_CHARACTERS,
    BATCH_TEXTS,
    CHAT_PARAMETERS,
    COMPLETION_PARAMETERS,
)
from scheduler.engines.runner_client import EVENTS, Limits, RunnerClient
from tests.engines.test_runner_client import DONE, LETTERS, Misbehaving, event, receive, serving, stream
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import LIMIT_S

Ask = Callable[..., Any]
ASKS: dict[str, Ask] = {
    "chat": lambda client, **asked: client.chat("hello", **asked),
    "complete": lambda client, **asked: client.complete("hello", **asked),
    "stream": lambda client, **asked: "".join(client.stream("hello", **asked)),
    "achat": lambda client, **asked: asyncio.run(client.achat("hello", **asked)),
    "acomplete": lambda client, **asked: asyncio.run(client.acomplete("hello", **asked)),
    "astream": lambda client, **asked: asyncio.run(joined(client, **asked)),
}
EMBEDS: dict[str, Ask] = {
    "embed": lambda client, texts, **asked: client.embed(texts, **asked),
    "aembed": lambda client, texts, **asked: asyncio.run(client.aembed(texts, **asked)),
}


async def joined(client: RunnerClient, **asked: Any) -> str:
    """Return a streamed answer in one text."""
    return "".join([piece async for piece in client.astream("hello", **asked)])


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a real server of a chat model."""
    pytest.importorskip("xllamacpp", reason="llama.cpp's server comes with the extra called llama")
    yield from serving(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf"), "chat")


@pytest.fixture
def client(url: str) -> Iterator[RunnerClient]:
    """Yield a client of the real server."""
    with closing(RunnerClient(url, "key")) as client:
        yield client


def unreached(request: httpx2.Request) -> httpx2.Response:
    """Fail: nothing may be sent."""
    raise AssertionError(f"{request.url} was asked")


@pytest.fixture
def mute() -> Iterator[RunnerClient]:
    """Yield a client of a server that must not be asked."""
    with closing(RunnerClient("http://127.0.0.1:1", "key", transport=httpx2.MockTransport(unreached))) as client:
        yield client


# -- what comes with an answer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", ["chat", "complete", "achat", "acomplete"])
def test_u48_an_answer_is_a_text_with_all_that_was_told(client: RunnerClient, ask: str) -> None:
    """U48: an answer tells why it ended and what it took, and is a text in every other way."""
    answer = ASKS[ask](client, **LETTERS)
    assert isinstance(answer, Answer) and isinstance(answer, str) and answer.upper() == str(answer).upper()
    assert answer.finish_reason == "length"  # the mark of an answer that was cut off
    assert (answer.usage["completion_tokens"], answer.usage["prompt_tokens"] > 0) == (12, True)
    assert (answer.reasoning, answer.tool_calls, answer.raw["choices"][0]["index"]) == ("", [], 0)


def test_u48_an_answer_that_is_whole_says_so(client: RunnerClient) -> None:
    """U48: an answer that ends by itself has another reason than one that was cut off."""
    answer = client.chat("hello", max_tokens=12, grammar='root ::= "ab"')
    assert (answer, answer.finish_reason) == ("ab", "stop")


def test_u48_the_probabilities_of_tokens_are_in_the_answer(client: RunnerClient) -> None:
    """U48: what was asked for beside the text is in the whole answer."""
    answer = client.chat("hello", logprobs=True, top_logprobs=2, **LETTERS)
    told = answer.raw["choices"][0]["logprobs"]["content"]
    assert len(told) > 5 and all(len(each["top_logprobs"]) == 2 for each in told)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda answer: pickle.loads(pickle.dumps(answer))])
def test_u48_an_answer_is_copied_with_all_that_was_told(client: RunnerClient, copied: Callable[[Any], Any]) -> None:
    """U48: a copy of an answer, also in another process, tells what the answer tells."""
    answer = client.chat("hello", **LETTERS)
    assert (copied(answer), copied(answer).raw, copied(answer).finish_reason) == (answer, answer.raw, "length")


def told(**delta: Any) -> bytes:
    """Return one event with a part of a message."""
    return b"data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": None}]}).encode() + b"\n\n"


def test_u48_reasoning_and_calls_of_tools_come_in_parts() -> None:
    """U48: what a model thinks, and the tools that it calls, are put together from parts, several calls too."""
    call = {"index": 0, "id": "1", "type": "function", "function": {"name": "look", "arguments": '{"way"'}}
    other = {"index": 1, "id": "2", "type": "function", "function": {"name": "wait", "arguments": "{}"}}
    end = b'data: {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}\n\n'
    body = told(role="assistant", content=None) + told(reasoning_content="hm") + told(reasoning_content=", up?")
    body += told(tool_calls=[call]) + told(tool_calls=[other])
    body += told(tool_calls=[{"index": 0, "function": {"arguments": ': "up"}'}}]) + end + DONE
    with Misbehaving(stream(body)) as server, closing(RunnerClient(server.url, "key")) as client:
        answer = client.chat("hello", tools=[{"type": "function", "function": {"name": "look"}}])
    assert (answer, answer.reasoning, answer.finish_reason) == ("", "hm, up?", "tool_calls")
    assert [each["function"] for each in answer.tool_calls] == [
        {"name": "look", "arguments": '{"way": "up"}'},
        {"name": "wait", "arguments": "{}"},
    ]
    assert [each["id"] for each in answer.tool_calls] == ["1", "2"]


def test_u48_an_answer_that_has_begun_has_no_end_yet() -> None:
    """U48: what has come of an answer can be read at any time, and has no reason for its end before that."""
    partial = PartialAnswer(chat=True)
    assert (partial.answer(), partial.answer().finish_reason) == ("", None)
    assert partial.feed({"choices": [{"delta": {"content": "a"}, "finish_reason": None}]}) == "a"
    assert (partial.answer(), partial.answer().finish_reason, partial.answer().usage) == ("a", None, {})


# -- parameters -------------------------------------------------------------------------------------------------------

MISTYPED = {
    "max_token": "max_tokens",
    "temprature": "temperature",
    "top-p": "top_p",
    "Seed": "seed",
    "logit_biases": "logit_bias",
    "response_fromat": "response_format",
}


@pytest.mark.parametrize("name", MISTYPED)
@pytest.mark.parametrize("ask", ["chat", "stream", "achat", "astream"])
def test_u48_an_unknown_parameter_is_refused_with_the_closest(mute: RunnerClient, ask: str, name: str) -> None:
    """U48: a parameter of no such name is refused with the closest that there is, before anything is sent."""
    with pytest.raises(UnsupportedOption, match=rf"did you mean {MISTYPED[name]}\?") as refused:
        ASKS[ask](mute, **{name: 1})
    assert (refused.value.name, refused.value.status) == (name, 400)


@pytest.mark.parametrize("ask", ["complete", "acomplete", *EMBEDS])
def test_u48_no_method_takes_a_parameter_that_has_no_effect(mute: RunnerClient, ask: str) -> None:
    """U48: prompts and texts to embed refuse what has no effect on them, such as tools."""
    for name in ("zzzz", "tools", "model", "stream"):
        with pytest.raises(UnsupportedOption) as refused:
            EMBEDS[ask](mute, "a", **{name: 1}) if ask in EMBEDS else ASKS[ask](mute, **{name: 1})
        assert refused.value.name == name


@pytest.mark.parametrize(
    ("name", "advice"), [("model", "acquire another"), ("stream", "call stream"), ("stream_options", "ends with its")]
)
def test_u48_what_the_lease_says_is_refused_with_what_to_do(mute: RunnerClient, name: str, advice: str) -> None:
    """U48: parameters that a lease decides are refused, with what to do instead."""
    with pytest.raises(UnsupportedOption, match=advice):
        mute.chat("hello", **{name: True})


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan"), "\udcff", [object()]])
def test_u48_a_value_that_cannot_be_sent_is_refused_by_its_name(mute: RunnerClient, value: Any) -> None:
    """U48: a value that JSON does not have is refused by the parameter's name."""
    with pytest.raises(UnsupportedOption, match="cannot be written as JSON") as refused:
        mute.chat("hello", seed=1, stop=value)
    assert refused.value.name == "stop"


@pytest.mark.parametrize("messages", [{"role": "user", "content": "hello"}, None, 5, b"hello"])
def test_u48_messages_are_a_text_or_a_list(mute: RunnerClient, messages: Any) -> None:
    """U48: one message that is no list is refused, because its keys would be sent."""
    with pytest.raises(UnsupportedOption, match="one text, or a list of messages"):
        mute.chat(messages)


NOT_REFUSED = {  # the server passes over a value of a wrong type
    *("add_generation_prompt", "chat_template_kwargs", "grammar_lazy", "grammar_triggers", "id_slot", "json_schema"),
    *("logit_bias", "parallel_tool_calls", "parse_tool_calls", "preserved_tokens", "reasoning_budget_message"),
    *("reasoning_effort", "response_format", "samplers", "stop", "thinking_budget_tokens"),
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_u48_what_is_let_through_is_what_the_server_takes(url: str, path: str) -> None:
    """U48: the server acts upon each parameter that is let through: it refuses a value of a wrong type."""
    chat = "chat" in path
    told: Mapping[str, Any] = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    passed_over = set()
    for name in (CHAT_PARAMETERS if chat else COMPLETION_PARAMETERS) - NOT_REFUSED:
        short = {} if name.startswith("max_") else {"n_predict": 1}  # it would go before the others
        answers = [
            httpx2.post(url + path, headers={"Authorization": "Bearer key"}, json={**told, **short, name: value})
            for value in ({"x": 1}, "x", 5)
        ]
        if all(answer.status_code == 200 for answer in answers):
            passed_over.add(name)
    assert passed_over == set()


# -- addresses in messages --------------------------------------------------------------------------------------------


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize(
    "part",
    [
        image("http://169.254.169.254/latest/meta-data"),
        image("https://example.org/a.png"),
        image("HTTP://localhost/a.png"),
        image(" http://localhost/a.png"),
        image("file:///etc/passwd"),
        image("ftp://localhost/a.png"),
        {"type": "image_url", "image_url": "http://localhost/a.png"},
        {"type": "input_audio", "input_audio": {"data": "http://localhost/a.wav", "format": "wav"}},
        {"type": "input_audio", "input_audio": {"url": "http://localhost/a.wav"}},
        {"type": "input_video", "input_video": {"data": "https://localhost/a.mp4"}},
        {"type": "video_url", "video_url": {"url": "http://localhost/a.mp4"}},
    ],
)
@pytest.mark.parametrize("ask", ["chat", "stream", "achat", "astream"])
def test_u36_an_address_in_a_message_is_refused_before_it_is_sent(mute: RunnerClient, ask: str, part: Any) -> None:
    """U36: a runner fetches no address for who writes a message: the message is refused, and never sent."""
    said = [{"role": "system", "content": "look"}, {"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    asks: dict[str, Callable[[], object]] = {
        "chat": lambda: mute.chat(said),
        "stream": lambda: list(mute.stream(said)),
        "achat": lambda: asyncio.run(mute.achat(said)),
        "astream": lambda: mute.astream(said),
    }
    with pytest.raises(UnsupportedOption, match="the runner would fetch it: pass what it holds, as data:") as refused:
        asks[ask]()
    assert (refused.value.name, refused.value.status) == (part["type"], 400)


@pytest.mark.parametrize(
    "content",
    [
        "see http://localhost/a.png",
        [{"type": "text", "text": "http://localhost/a.png"}],
        [image("data:image/png;base64,aGVsbG8=")],
        [{"type": "input_audio", "input_audio": {"data": "aGVsbG8=", "format": "wav"}}],
    ],
)
def test_u36_addresses_in_texts_and_what_is_held_in_a_message_are_sent(content: Any) -> None:
    """U36: a text may name an address, and a message may hold an image or a sound itself."""
    sent = []

    def reply(request: httpx2.Request) -> httpx2.Response:
        sent.append(json.loads(request.content)["messages"])
        return httpx2.Response(200, content=event("fine") + DONE, headers={"Content-Type": EVENTS})

    with closing(RunnerClient("http://127.0.0.1:1", "key", transport=httpx2.MockTransport(reply))) as client:
        assert client.chat([{"role": "user", "content": content}]) == "fine"
    assert sent == [[{"role": "user", "content": content}]]


# -- how long a caller waits ------------------------------------------------------------------------------------------


def slowly(pieces: int, pause_s: float, *, whole: bool = True) -> Callable[[socket.socket], None]:
    """Send pieces of an answer with pauses between them; stop early where the client has gone."""

    def act(connection: socket.socket) -> None:
        receive(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        try:
            for _ in range(pieces):
                threading.Event().wait(pause_s)
                part = event("a").replace(b'{"delta"', b'{"text": "a", "delta"')
                connection.sendall(part)
            connection.sendall(DONE)
        except OSError:
            assert not whole

    return act


def silent(connection: socket.socket) -> None:
    """Take a request, and say nothing until the client has gone."""
    receive(connection)
    connection.recv(1)


@pytest.mark.slow
@pytest.mark.parametrize("ask", ASKS)
def test_u49_a_whole_answer_may_take_longer_than_its_silences(ask: str) -> None:
    """U49: the limit is on silence, of a whole answer as of a stream."""
    with Misbehaving(slowly(9, 0.5)) as server, closing(RunnerClient(server.url, "key")) as client:
        assert ASKS[ask](client, timeout_s=4.0) == "a" * 9


@pytest.mark.parametrize("ask", ASKS)
def test_u49_an_answer_that_goes_on_for_too_long_is_ended(ask: str) -> None:
    """U49: the limit on the whole answer ends one that is never silent, and the connection with it."""
    with (
        Misbehaving(slowly(10000, 0.02, whole=False)) as server,
        closing(RunnerClient(server.url, "key")) as client,
        pytest.raises(AnswerTimeout, match="not complete within 500ms") as passed,
    ):
        ASKS[ask](client, timeout_s=LIMIT_S, total_timeout_s=0.5)
    assert (passed.value.whole, passed.value.status, isinstance(passed.value, TimeoutError)) == (True, 504, True)


@pytest.mark.parametrize("ask", ASKS)
def test_u49_the_error_names_the_limit_that_passed_on_a_busy_machine(ask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """U49: a thread that is held up before it begins to count does not take the whole answer's limit for a silence."""
    begin = Limits.begin

    def held_up(limits: Limits) -> None:
        threading.Event().wait(0.3)
        begin(limits)

    monkeypatch.setattr(Limits, "begin", held_up)
    with (
        Misbehaving(slowly(10000, 0.02, whole=False)) as server,
        closing(RunnerClient(server.url, "key")) as client,
        pytest.raises(AnswerTimeout, match="not complete within 500ms"),
    ):
        ASKS[ask](client, timeout_s=LIMIT_S, total_timeout_s=0.5)


@pytest.mark.parametrize("limits", [{"timeout_s": 0.3}, {"total_timeout_s": 0.3}])
@pytest.mark.parametrize("ask", [*ASKS, *EMBEDS])
def test_u49_both_limits_hold_before_an_answer_begins(ask: str, limits: dict[str, float]) -> None:
    """U49: an answer that does not begin is ended by either limit, and the error says by which, in one traceback."""
    with (
        Misbehaving(silent) as server,
        closing(RunnerClient(server.url, "key")) as client,
        pytest.raises(AnswerTimeout, match="300ms") as passed,
    ):
        EMBEDS[ask](client, "a", **limits) if ask in EMBEDS else ASKS[ask](client, **limits)
    assert passed.value.whole == ("total_timeout_s" in limits)
    assert "httpcore" not in "".join(traceback.format_exception(passed.value))


def embedder(seen: list[list[str]], pause_s: float = 0.0) -> RunnerClient:
    """Return a client of a server whose vector of a text is the text's own number."""

    def reply(request: httpx2.Request) -> httpx2.Response:
        threading.Event().wait(pause_s)
        seen.append(json.loads(request.content)["input"])
        data = [{"index": index, "embedding": [float(text.split()[0])]} for index, text in enumerate(seen[-1])]
        return httpx2.Response(200, json={"data": data[::-1]})

    return RunnerClient("http://127.0.0.1:1", "key", transport=httpx2.MockTransport(reply))


@pytest.mark.parametrize("embed", EMBEDS)
@pytest.mark.parametrize("length", [1, 500, 100000])
def test_u49_many_texts_are_embedded_a_few_at_a_time(embed: str, length: int) -> None:
    """U49: no request has many texts or a lot of text, and the vectors are in the texts' order."""
    seen: list[list[str]] = []
    with closing(embedder(seen)) as client:
        texts, told = [f"{number} {'x' * length}" for number in range(50)], list[tuple[int, int]]()
        vectors = EMBEDS[embed](client, texts, progress=lambda done, total: told.append((done, total)))
        assert vectors == [[float(number)] for number in range(50)]
    assert told == [(done, 50) for done in accumulate(map(len, seen))]
    assert [text for batch in seen for text in batch] == texts and len(seen) > 1
    assert all(len(batch) <= BATCH_TEXTS for batch in seen)
    assert all(len(batch) == 1 or sum(map(len, batch)) <= BATCH_CHARACTERS for batch in seen)


@pytest.mark.parametrize("embed", EMBEDS)
def test_u49_the_limit_on_the_whole_is_one_for_all_texts(embed: str) -> None:
    """U49: texts that are embedded a few at a time have one limit together."""
    seen: list[list[str]] = []
    with closing(embedder(seen, pause_s=0.1)) as client, pytest.raises(AnswerTimeout) as passed:
        EMBEDS[embed](client, [f"{number}" for number in range(2000)], timeout_s=LIMIT_S, total_timeout_s=0.5)
    assert passed.value.whole and 0 < len(seen) < 2000 / BATCH_TEXTS


@pytest.mark.parametrize("texts", [[], ()])
def test_u49_no_texts_have_no_vectors(mute: RunnerClient, texts: Any) -> None:
    """U49: an empty list of texts is no request."""
    assert mute.embed(texts) == []


@pytest.mark.parametrize("texts", [[1, 2], [["a"]], 5, None, [b"a"]])
def test_u49_what_is_embedded_is_text(mute: RunnerClient, texts: Any) -> None:
    """U49: anything but texts is refused before it is sent."""
    with pytest.raises((UnsupportedOption, TypeError)):
        mute.embed(texts)


# -- a client that is closed under its callers ------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [RuntimeError("closed"), OSError(9, "bad"), AttributeError("x"), KeyError(1)])
@pytest.mark.parametrize("ask", [*ASKS, *EMBEDS])
def test_u71_whatever_breaks_by_a_close_is_a_broken_connection(
    ask: str, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """U71: a client that is closed while it is used raises ConnectionError, whatever its library raises."""
    with closing(RunnerClient("http://127.0.0.1:1", "key")) as client:

        def send(*_: Any, **__: Any) -> Any:
            client.close()
            raise failure

        async def asend(*_: Any, **__: Any) -> Any:
            send()

        monkeypatch.setattr(httpx2.Client, "send", send)
        monkeypatch.setattr(httpx2.AsyncClient, "send", asend)
        with pytest.raises(ConnectionError, match="is closed") as told:
            EMBEDS[ask](client, "a") if ask in EMBEDS else ASKS[ask](client)
    assert told.value.__cause__ is None and told.value.__suppress_context__


def test_u71_what_breaks_by_itself_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """U71: a failure of a client that is open stays what it is."""

    def send(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(httpx2.Client, "send", send)
    with closing(RunnerClient("http://127.0.0.1:1", "key")) as client, pytest.raises(RuntimeError, match="a defect"):
        client.chat("hello")


# -- rerankers and tokens ---------------------------------------------------------------------------------------------


def test_u48_the_tokens_of_a_text_are_those_of_the_model(client: RunnerClient) -> None:
    """U48: a text's tokens can be had; of this model they are its bytes."""
    assert client.tokenize("abc") == [97, 98, 99] == asyncio.run(client.atokenize("abc"))
    assert client.tokenize("") == []


def test_u35_a_model_that_ranks_nothing_says_what_to_load(client: RunnerClient) -> None:
    """U35: documents for a model that is no reranker are refused with advice in our words."""
    with pytest.raises(EngineError, match="Acquire a reranker, with embedding=True") as told:
        client.rerank("a", ["b"])
    assert told.value.status == 400


def test_u35_scores_are_in_the_order_of_the_documents() -> None:
    """U35: many documents are scored a few at a time, and the scores are in the documents' order."""
    seen = []

    def reply(request: httpx2.Request) -> httpx2.Response:
        asked = json.loads(request.content)
        seen.append(len(asked["documents"]))
        results = [{"index": at, "relevance_score": float(text)} for at, text in enumerate(asked["documents"])]
        return httpx2.Response(200, json={"results": sorted(results, key=lambda each: -each["relevance_score"])})

    with closing(RunnerClient("http://127.0.0.1:1", "key", transport=httpx2.MockTransport(reply))) as client:
        told: list[tuple[int, int]] = []
        scores = client.rerank("a", [str(number) for number in range(40)], progress=lambda *done: told.append(done))
        assert scores == [float(number) for number in range(40)]
        assert told[-1] == (40, 40) and told == sorted(set(told)) and len(told) > 1
        assert asyncio.run(client.arerank("a", ["5", "7", "6"])) == [5.0, 7.0, 6.0]
    assert max(seen) <= BATCH_TEXTS


@pytest.mark.parametrize(("query", "documents"), [(5, ["a"]), ("a", "b"), ("a", [5]), (None, ["a"])])
def test_u35_a_query_is_a_text_and_documents_are_texts(mute: RunnerClient, query: Any, documents: Any) -> None:
    """U35: anything else is refused before it is sent."""
    with pytest.raises(UnsupportedOption):
        mute.rerank(query, documents)
