"""The client of a runner, against llama.cpp's own server and against a server that misbehaves."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import select
import socket
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from scheduler.engines.runner_client import RunnerClient
from scheduler.errors.exceptions import EngineError, UnsupportedOption
from tests.support.tiny_models import write_tiny_model

SERVER = """
import sys
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.n_parallel, parameters.n_threads_http = 512, 2, 4
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
parameters.fit_params = parameters.warmup = False
parameters.api_keys, parameters.port, parameters.cache_ram_mib = ["key"], 0, 0
if sys.argv[2] == "embedding":
    parameters.embedding, parameters.pooling_type = True, 1
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
LETTERS: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "grammar": "root ::= [a-z]+"}
SILENCE_S = 10.0  # far more than any answer here takes: the bound for a test that hangs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model of a few hundred kilobytes."""
    pytest.importorskip("xllamacpp", reason="llama.cpp's server comes with the extra called llama")
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")


def serving(model: Path, kind: str) -> Iterator[str]:
    """Run llama.cpp's server in a process of its own; yield its address."""
    command, pipe = [sys.executable, "-c", SERVER, str(model), kind], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate(timeout=SILENCE_S)  # closes its input, which ends it


@pytest.fixture(scope="module")
def chat_url(model: Path) -> Iterator[str]:
    """Yield the address of a real server of a chat model."""
    yield from serving(model, "chat")


@pytest.fixture(scope="module")
def embedding_url(model: Path) -> Iterator[str]:
    """Yield the address of a real server of an embedder."""
    yield from serving(model, "embedding")


ClientOf = Callable[..., RunnerClient]


@pytest.fixture
def client_of() -> Iterator[ClientOf]:
    """Yield a function that makes clients, which are closed at the end of the test."""
    with ExitStack() as clients:

        def make(url: str, key: str = "key") -> RunnerClient:
            return clients.enter_context(closing(RunnerClient(url, key)))

        yield make


@pytest.fixture
def chat(chat_url: str, client_of: ClientOf) -> RunnerClient:
    """Return a client of the chat model."""
    return client_of(chat_url)


@pytest.fixture
def embedder(embedding_url: str, client_of: ClientOf) -> RunnerClient:
    """Return a client of the embedder."""
    return client_of(embedding_url)


def test_a_chat_is_answered_with_text(chat: RunnerClient) -> None:
    """A chat's parameters reach the engine: the grammar allows letters only, and the limit twelve tokens."""
    answer = chat.chat([{"role": "user", "content": "hello"}], **LETTERS)
    assert (len(answer), answer.isalpha()) == (12, True)


def test_a_string_is_what_the_user_says(chat: RunnerClient) -> None:
    """A text in place of messages is one message of the user."""
    assert chat.chat("hello", **LETTERS) == chat.chat([{"role": "user", "content": "hello"}], **LETTERS)


def test_the_pieces_of_a_stream_make_up_the_answer(chat: RunnerClient) -> None:
    """The pieces of a streamed answer make up the text of the answer without streaming."""
    pieces = list(chat.stream("hello", **LETTERS))
    assert (len(pieces) > 1, "".join(pieces)) == (True, chat.chat("hello", **LETTERS))


def test_a_prompt_is_completed(chat: RunnerClient) -> None:
    """A prompt is completed without a chat template."""
    assert len(chat.complete("once upon", **LETTERS)) == 12


def test_one_string_has_one_vector(embedder: RunnerClient) -> None:
    """The vector of one text is as long as the model is wide."""
    assert len(embedder.embed("hello")) == 64


def test_several_strings_have_their_vectors_in_order(embedder: RunnerClient) -> None:
    """Each of several texts has the vector that it has alone, in order."""
    alone = [embedder.embed(text) for text in ("one", "two")]
    together = embedder.embed(["one", "two"])
    assert [pytest.approx(vector, abs=1e-4) for vector in alone] == together


def test_a_text_that_is_too_long_to_embed_is_the_callers_mistake(embedder: RunnerClient) -> None:
    """A text that is too long to embed is the caller's error, although llama.cpp answers with status 500."""
    with pytest.raises(EngineError, match=r"1000 tokens.* shorten it, or acquire .* a larger num_ctx") as told:
        embedder.embed("a" * 1000)
    assert (told.value.status_code, told.value.status) == (400, 400)


def test_the_async_twins_answer_the_same(chat: RunnerClient, embedder: RunnerClient) -> None:
    """The asynchronous methods return the same as the others."""

    async def ask() -> tuple[str, str, str, list[float]]:
        pieces = [piece async for piece in chat.astream("hello", **LETTERS)]
        answers = await asyncio.gather(
            chat.achat("hello", **LETTERS), chat.acomplete("once", **LETTERS), embedder.aembed("hello")
        )
        return "".join(pieces), *answers

    streamed, answer, text, vector = asyncio.run(ask())
    whole = chat.chat("hello", **LETTERS)
    assert (streamed, answer, text) == (whole, whole, chat.complete("once", **LETTERS))
    assert vector == pytest.approx(embedder.embed("hello"), abs=1e-4)


def test_one_client_serves_one_event_loop_after_another(chat: RunnerClient) -> None:
    """One client serves one event loop after another."""
    answers = [asyncio.run(chat.achat("hello", **LETTERS)) for _ in range(2)]
    assert answers[0] == answers[1]


def test_the_servers_limit_of_requests_for_each_connection_goes_unnoticed(embedder: RunnerClient) -> None:
    """The client goes on after llama.cpp closes a connection after 100 requests."""
    assert len({tuple(embedder.embed("hello")) for _ in range(250)}) <= 2


def test_s34_a_prompt_that_is_too_long_is_the_callers_error(chat: RunnerClient) -> None:
    """S34: a prompt that is too long is an error with the engine's words and status, from a stream too."""
    for ask in (lambda: chat.chat("x" * 1000), lambda: list(chat.stream("x" * 1000))):
        with pytest.raises(EngineError, match="exceeds the available context") as caught:
            ask()
        assert (caught.value.status_code, caught.value.status) == (400, 400)


def test_s34_what_the_runner_was_not_loaded_for_is_the_callers_error(chat: RunnerClient) -> None:
    """S34: an embedding of a chat model is refused with advice in our words."""
    with pytest.raises(EngineError, match=r"does not support embeddings\. Acquire .* embedding=True$") as caught:
        chat.embed("hello")
    assert (caught.value.status_code, caught.value.status) == (501, 400)


def test_a_wrong_key_is_refused(chat_url: str, client_of: ClientOf) -> None:
    """A wrong key is an error of the scheduler and not of the caller."""
    with pytest.raises(EngineError) as caught:
        client_of(chat_url, "wrong").chat("hello")
    assert (caught.value.status_code, caught.value.status) == (401, 500)


def test_proxies_are_not_asked(chat_url: str, client_of: ClientOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies of the environment are not used for a runner, which is on this machine."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert len(client_of(chat_url).complete("once", **LETTERS)) == 12


Act = Callable[[socket.socket], None]


class Misbehaving:
    """A server that does with each connection what it was told, one after the other, and then accepts no more."""

    def __init__(self, *acts: Act) -> None:
        self.accepted = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(SILENCE_S)
        self._thread = threading.Thread(target=self._serve, args=acts, daemon=True)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _serve(self, *acts: Act) -> None:
        for act in acts:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(SILENCE_S)
                self.accepted += 1
                act(connection)
        self._listener.close()

    def __enter__(self) -> Misbehaving:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(SILENCE_S)
        assert not self._thread.is_alive(), "the client made too few connections"


def receive(connection: socket.socket) -> None:
    """Read one request, head and body."""
    body = b""
    while b"\r\n\r\n" not in body:
        body += connection.recv(65536)
    head, _, body = body.partition(b"\r\n\r\n")
    (length,) = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
    while len(body) < int(length):
        body += connection.recv(65536)


def reply(body: bytes, *, status: str = "200 OK") -> Act:
    """Answer one request with `body`, and keep the connection."""

    def act(connection: socket.socket) -> None:
        receive(connection)
        connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    return act


answer = reply(b'{"choices": [{"text": "fine"}]}')
VECTOR = b'{"data": [{"index": 0, "embedding": [1.0]}]}'
vector = reply(VECTOR)


def answer_then_close(connection: socket.socket) -> None:
    """Return the vector of one text, and close the connection at the second request."""
    vector(connection)
    receive(connection)


def stream(body: bytes, *, size: int = 1 << 16) -> Act:
    """Answer with a stream of `body`, `size` bytes at a time, and close the connection."""

    def act(connection: socket.socket) -> None:
        receive(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for start in range(0, len(body), size):
            connection.sendall(body[start : start + size])

    return act


def event(text: str | None) -> bytes:
    """Return one event of a streamed answer."""
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def test_a_stale_connection_is_replaced_once(client_of: ClientOf) -> None:
    """A request on a kept connection that the server closes is sent again on a new one."""
    with Misbehaving(answer_then_close, vector) as server:
        client = client_of(server.url)
        assert [client.embed("one"), client.embed("two")] == [[1.0], [1.0]]


def test_a_stale_connection_is_never_replaced_by_another_that_was_kept(client_of: ClientOf) -> None:
    """A request on a kept connection that the server closes has a new one next, although there is another kept one."""
    kept: list[socket.socket] = []

    def keep(connection: socket.socket) -> None:
        receive(connection)
        kept.append(connection.dup())

    def answer_both_then_close_one(connection: socket.socket) -> None:
        keep(connection)
        for each in kept:
            each.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(VECTOR), VECTOR))
        (asked, *_), _, _ = select.select(kept, [], [], SILENCE_S)
        receive(asked)
        asked.close()

    with Misbehaving(keep, answer_both_then_close_one, vector) as server:
        client = client_of(server.url)
        with ThreadPoolExecutor(2) as both:
            assert list(both.map(client.embed, ("one", "two"))) == [[1.0], [1.0]]
        assert client.embed("three", timeout_s=SILENCE_S / 2) == [1.0]
    for each in kept:
        each.close()


def test_a_connection_is_not_replaced_twice(client_of: ClientOf) -> None:
    """A request whose new connection is closed too fails."""
    gone = pytest.raises(ConnectionError, match="cannot be reached")
    with Misbehaving(receive, receive) as server, gone:
        client_of(server.url).embed("one")
    assert server.accepted == 2


def test_an_answer_is_asked_for_once(client_of: ClientOf) -> None:
    """A request for an answer has a connection of its own, which cannot be stale, and is sent once."""
    with Misbehaving(receive) as server, pytest.raises(ConnectionError, match="cannot be reached"):
        client_of(server.url).complete("one")
    assert server.accepted == 1


def test_a_runner_that_is_gone_is_a_connection_error(client_of: ClientOf) -> None:
    """A runner that has gone is a ConnectionError, of which the lease makes its own error."""
    with Misbehaving() as server:
        pass
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1"):
        client_of(server.url).complete("one")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1"):
        asyncio.run(client_of(server.url).acomplete("one"))


def test_a_program_that_is_out_of_files_is_told_so_and_the_runner_goes_on(
    client_of: ClientOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program without free file descriptors gets an error that says so, and the runner is not probed."""

    def fail(*_: object, **__: object) -> object:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("socket.create_connection", fail)
    monkeypatch.setattr("asyncio.BaseEventLoop.create_connection", fail)
    client = client_of("http://127.0.0.1:1")
    for ask in (lambda: client.chat("hello"), lambda: asyncio.run(client.achat("hello"))):
        with pytest.raises(EngineError, match=r"too many open files; close some, or raise .*ulimit -n"):
            ask()


def test_a_stream_that_has_begun_is_never_sent_again(client_of: ClientOf) -> None:
    """A stream that has begun is not requested again, and its loss is an error."""
    with Misbehaving(stream(event("a"))) as server:
        pieces = client_of(server.url).stream("hello")
        assert next(pieces) == "a"
        with pytest.raises(ConnectionError, match="broke off"):
            next(pieces)
    assert server.accepted == 1


def test_an_answer_cut_in_two_is_never_sent_again(client_of: ClientOf) -> None:
    """An answer that is cut off after its head is not requested again, and its loss is an error."""

    def cut(connection: socket.socket) -> None:
        receive(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")

    with Misbehaving(cut) as server, pytest.raises(ConnectionError):
        client_of(server.url).complete("one")
    assert server.accepted == 1


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
def test_events_may_arrive_in_chunks_of_any_size(size: int, client_of: ClientOf) -> None:
    """A streamed answer is read in chunks of any size, with line separators, carriage returns and comments in it."""
    body = event(None) + event("gr\u00fc\u2028n") + b": still here\r\n\r\n"
    body += event("\U0001f600\u0085").replace(b"\n", b"\r\n")
    body += b'data: {"choices": []}\n\n' + DONE
    with Misbehaving(stream(body, size=size)) as server:
        assert list(client_of(server.url).stream("hello")) == ["gr\u00fc\u2028n", "\U0001f600\u0085"]


@pytest.mark.parametrize(
    "line", [b'data: {"error": {"code": 500, "message": "no slot"}}\n\n', b'error: {"message": "no slot"}\n\n']
)
def test_an_error_inside_a_stream_is_raised(line: bytes, client_of: ClientOf) -> None:
    """An error inside a stream is raised after the pieces before it, in both forms of the server."""
    with Misbehaving(stream(event("a") + line)) as server:
        pieces = client_of(server.url).stream("hello")
        assert next(pieces) == "a"
        with pytest.raises(EngineError, match="no slot"):
            next(pieces)


def test_a_stream_that_is_closed_early_closes_its_connection(client_of: ClientOf) -> None:
    """A stream that is closed early closes its connection, so that the server stops the answer."""
    ended = threading.Event()

    def act(connection: socket.socket) -> None:
        stream(event("a"))(connection)
        if connection.recv(1) == b"":
            ended.set()

    with Misbehaving(act) as server:
        pieces = client_of(server.url).stream("hello")
        assert next(pieces) == "a"
        pieces.close()
        assert ended.wait(SILENCE_S)


def test_a_call_that_is_cut_before_its_connection_is_open_asks_nothing(client_of: ClientOf) -> None:
    """A connection that is cut before it opens is cut as it opens, with and without an event loop."""
    heard: list[bytes] = []

    def act(connection: socket.socket) -> None:
        heard.append(connection.recv(1))

    with Misbehaving(act, act) as server:
        client = client_of(server.url)
        calls = [client.chat_call("hello") for _ in range(2)]
        for call in calls:
            call.connection.cut()
        with pytest.raises(ConnectionError):
            client.answer(calls[0])
        with pytest.raises(ConnectionError):
            asyncio.run(client.aanswer(calls[1]))
    assert heard == [b"", b""]


def test_a_loop_that_ends_closes_an_open_stream_quietly(
    chat_url: str, client_of: ClientOf, caplog: pytest.LogCaptureFixture
) -> None:
    """An event loop that ends closes an open stream without a warning."""

    async def begin() -> object:
        pieces = client_of(chat_url).astream("hello", temperature=0, max_tokens=400, ignore_eos=True)
        assert await anext(pieces)
        return pieces  # held until the loop has ended

    assert asyncio.run(begin())
    assert not caplog.records


@pytest.mark.parametrize("parameters", [{"n": 2}, {"n_cmpl": 3}])
def test_several_answers_at_once_are_refused(parameters: dict[str, Any], client_of: ClientOf) -> None:
    """A request for several answers is refused with what to do instead."""
    client = client_of("http://127.0.0.1:1")
    asks: list[Callable[[], object]] = [
        lambda: client.chat("hello", **parameters),
        lambda: client.complete("hello", **parameters),
        lambda: list(client.stream("hello", **parameters)),
        lambda: asyncio.run(client.achat("hello", **parameters)),
    ]
    for ask in asks:
        with pytest.raises(UnsupportedOption, match="one answer is returned: ask once for each"):
            ask()


def test_one_answer_may_be_asked_for_by_number(client_of: ClientOf) -> None:
    """A request for one answer is allowed."""
    with Misbehaving(answer) as server:
        assert client_of(server.url).complete("one", n=1) == "fine"


@pytest.mark.parametrize("prompt", [["one", "two"], None, 5, b"one"])
def test_a_prompt_is_one_text(prompt: Any, client_of: ClientOf) -> None:
    """A prompt that is no text is refused, because only the first continuation would be returned."""
    with pytest.raises(UnsupportedOption, match="one text: ask once for each"):
        client_of("http://127.0.0.1:1").complete(prompt)


def test_other_answers_in_a_stream_are_left_out(client_of: ClientOf) -> None:
    """Further answers in a stream are left out."""
    other = event("b").replace(b'{"delta"', b'{"index": 1, "delta"')
    with Misbehaving(stream(event("a") + other + event("c") + DONE)) as server:
        assert list(client_of(server.url).stream("hello")) == ["a", "c"]


def test_a_loop_that_has_ended_is_let_go_of(client_of: ClientOf) -> None:
    """An event loop that has ended is dropped with its connections at the next request."""

    async def begin() -> weakref.ref[asyncio.AbstractEventLoop]:
        async for _ in client.astream("hello"):
            break
        return weakref.ref(asyncio.get_running_loop())

    with Misbehaving(stream(event("a")), answer) as server:
        client = client_of(server.url)
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # its transport was left open
            ended = asyncio.run(begin())
            assert asyncio.run(client.acomplete("one")) == "fine"
            gc.collect()
    assert ended() is None


def test_silence_beyond_the_time_out_is_a_timeout_error(client_of: ClientOf) -> None:
    """A silence beyond the time limit is a TimeoutError, and the request is not sent again."""

    def stay_silent(connection: socket.socket) -> None:
        receive(connection)
        connection.recv(1)  # until the client closes

    with Misbehaving(stay_silent) as server, pytest.raises(TimeoutError, match="200ms"):
        client_of(server.url).complete("one", timeout_s=0.2)
    assert server.accepted == 1


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [null]}'])
def test_an_answer_of_another_shape_is_an_engine_error(body: bytes, client_of: ClientOf) -> None:
    """An answer of an unexpected shape is an EngineError that shows what came."""
    with Misbehaving(reply(body)) as server, pytest.raises(EngineError) as caught:
        client_of(server.url).chat("hello")
    assert body.decode() in str(caught.value)


@pytest.mark.parametrize("body", [b"overloaded", b'{"error": "overloaded"}', b'{"error": {"message": "overloaded"}}'])
def test_an_error_of_another_shape_still_has_its_status(body: bytes, client_of: ClientOf) -> None:
    """An error of an unexpected shape keeps its status."""
    with Misbehaving(reply(body, status="503 Service Unavailable")) as server, pytest.raises(EngineError) as caught:
        client_of(server.url).chat("hello")
    assert (caught.value.status_code, caught.value.message) == (503, "overloaded")


def test_a_closed_client_connects_no_more(chat_url: str, client_of: ClientOf) -> None:
    """A closed client opens no connection, with or without an event loop, and may be closed twice."""
    client = client_of(chat_url)
    client.close()
    client.close()
    with pytest.raises(ConnectionError, match="closed"):
        client.chat("hello")
    with pytest.raises(ConnectionError, match="closed"):
        asyncio.run(client.achat("hello"))


def test_a_client_is_closed_from_an_event_loop_too(chat_url: str, client_of: ClientOf) -> None:
    """A client that an event loop closes connects no more, with or without the loop."""

    async def use_and_close() -> None:
        client = client_of(chat_url)
        await client.achat("hello", **LETTERS)
        client.close()
        with pytest.raises(ConnectionError, match="closed"):
            client.chat("hello")
        with pytest.raises(ConnectionError, match="closed"):
            await client.achat("hello")

    asyncio.run(use_and_close())
