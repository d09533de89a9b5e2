"""The client of a runner, against llama.cpp's own server and against a server that misbehaves."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import socket
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
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
SILENCE_S = 10.0  # far more than any answer here takes: a bound for a test that hangs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few hundred kilobytes."""
    pytest.importorskip("xllamacpp", reason="llama.cpp's server comes with the extra called llama")
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")


def serving(model: Path, kind: str) -> Iterator[str]:
    """Run llama.cpp's server in a process of its own and give its address."""
    command, pipe = [sys.executable, "-c", SERVER, str(model), kind], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate(timeout=SILENCE_S)  # closes its input, which ends it


@pytest.fixture(scope="module")
def chat_url(model: Path) -> Iterator[str]:
    """The address of a real server of a chat model."""
    yield from serving(model, "chat")


@pytest.fixture(scope="module")
def embedding_url(model: Path) -> Iterator[str]:
    """The address of a real server of an embedder."""
    yield from serving(model, "embedding")


ClientOf = Callable[..., RunnerClient]


@pytest.fixture
def client_of() -> Iterator[ClientOf]:
    """Make clients that are closed when the test is over."""
    with ExitStack() as clients:

        def make(url: str, key: str = "key") -> RunnerClient:
            return clients.enter_context(closing(RunnerClient(url, key)))

        yield make


@pytest.fixture
def chat(chat_url: str, client_of: ClientOf) -> RunnerClient:
    """A client of the chat model."""
    return client_of(chat_url)


@pytest.fixture
def embedder(embedding_url: str, client_of: ClientOf) -> RunnerClient:
    """A client of the embedder."""
    return client_of(embedding_url)


def test_a_chat_is_answered_with_text(chat: RunnerClient) -> None:
    """The parameters go to the engine: the grammar allows letters only, and the limit twelve of them."""
    answer = chat.chat([{"role": "user", "content": "hello"}], **LETTERS)
    assert (len(answer), answer.isalpha()) == (12, True)


def test_a_string_is_what_the_user_says(chat: RunnerClient) -> None:
    """It is short for the list of one message."""
    assert chat.chat("hello", **LETTERS) == chat.chat([{"role": "user", "content": "hello"}], **LETTERS)


def test_the_pieces_of_a_stream_make_up_the_answer(chat: RunnerClient) -> None:
    """Streamed or not, the text is the same."""
    pieces = list(chat.stream("hello", **LETTERS))
    assert (len(pieces) > 1, "".join(pieces)) == (True, chat.chat("hello", **LETTERS))


def test_a_prompt_is_completed(chat: RunnerClient) -> None:
    """Without a chat template."""
    assert len(chat.complete("once upon", **LETTERS)) == 12


def test_one_string_has_one_vector(embedder: RunnerClient) -> None:
    """As long as the model is wide."""
    assert len(embedder.embed("hello")) == 64


def test_several_strings_have_their_vectors_in_order(embedder: RunnerClient) -> None:
    """Each is the vector that its string has alone."""
    alone = [embedder.embed(text) for text in ("one", "two")]
    together = embedder.embed(["one", "two"])
    assert [pytest.approx(vector, abs=1e-4) for vector in alone] == together


def test_a_text_that_is_too_long_to_embed_is_the_callers_mistake(embedder: RunnerClient) -> None:
    """llama.cpp blames itself (status 500), and advises what nobody can do here."""
    with pytest.raises(EngineError, match=r"1000 tokens.* shorten it, or acquire .* a larger num_ctx") as told:
        embedder.embed("a" * 1000)
    assert (told.value.status_code, told.value.status) == (400, 400)


def test_the_async_twins_answer_the_same(chat: RunnerClient, embedder: RunnerClient) -> None:
    """With an event loop or without one."""

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
    """Nothing of the first loop is left over for the second."""
    answers = [asyncio.run(chat.achat("hello", **LETTERS)) for _ in range(2)]
    assert answers[0] == answers[1]


def test_the_servers_limit_of_requests_for_each_connection_goes_unnoticed(embedder: RunnerClient) -> None:
    """llama.cpp closes a connection after 100 requests."""
    assert len({tuple(embedder.embed("hello")) for _ in range(250)}) <= 2


def test_s34_a_prompt_that_is_too_long_is_the_callers_error(chat: RunnerClient) -> None:
    """S34: the engine's own words and status arrive, from a stream as well."""
    for ask in (lambda: chat.chat("x" * 1000), lambda: list(chat.stream("x" * 1000))):
        with pytest.raises(EngineError, match="exceeds the available context") as caught:
            ask()
        assert (caught.value.status_code, caught.value.status) == (400, 400)


def test_s34_what_the_runner_was_not_loaded_for_is_the_callers_error(chat: RunnerClient) -> None:
    """S34: a chat model does not embed; what to do about it is said in our words, not for llama.cpp's command line."""
    with pytest.raises(EngineError, match=r"does not support embeddings\. Acquire .* embedding=True$") as caught:
        chat.embed("hello")
    assert (caught.value.status_code, caught.value.status) == (501, 400)


def test_a_wrong_key_is_refused(chat_url: str, client_of: ClientOf) -> None:
    """It is our mistake, not the caller's."""
    with pytest.raises(EngineError) as caught:
        client_of(chat_url, "wrong").chat("hello")
    assert (caught.value.status_code, caught.value.status) == (401, 500)


def test_proxies_are_not_asked(chat_url: str, client_of: ClientOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner is on this machine, whatever the environment says about the world outside."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert len(client_of(chat_url).complete("once", **LETTERS)) == 12


Act = Callable[[socket.socket], None]


class Misbehaving:
    """Accepts one connection after the other and does with each what it was told; then it accepts no more."""

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
        assert not self._thread.is_alive(), "not every connection was made"


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


def answer_then_close(connection: socket.socket) -> None:
    """Answer one completion, and close the connection when a second one is asked for."""
    answer(connection)
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
    """One event of a streamed answer."""
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def test_a_stale_connection_is_replaced_once(client_of: ClientOf) -> None:
    """The server closed the kept connection just as it was used again; the caller does not notice."""
    with Misbehaving(answer_then_close, answer) as server:
        client = client_of(server.url)
        assert [client.complete("one"), client.complete("two")] == ["fine", "fine"]


def test_a_connection_is_not_replaced_twice(client_of: ClientOf) -> None:
    """A server that closes the new connection too is not one that can be talked to."""
    gone = pytest.raises(ConnectionError, match="cannot be reached")
    with Misbehaving(receive, receive) as server, gone:
        client_of(server.url).complete("one")
    assert server.accepted == 2


def test_a_runner_that_is_gone_is_a_connection_error(client_of: ClientOf) -> None:
    """Whoever holds the lease knows which runner it was, and says so."""
    with Misbehaving() as server:
        pass
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1"):
        client_of(server.url).complete("one")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1"):
        asyncio.run(client_of(server.url).acomplete("one"))


def test_a_program_that_is_out_of_files_is_told_so_and_the_runner_goes_on(
    client_of: ClientOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no fault of the runner's, which is not looked at."""

    def fail(*_: object, **__: object) -> object:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("socket.create_connection", fail)
    monkeypatch.setattr("anyio.connect_tcp", fail)
    client = client_of("http://127.0.0.1:1")
    for ask in (lambda: client.chat("hello"), lambda: asyncio.run(client.achat("hello"))):
        with pytest.raises(EngineError, match=r"too many open files; close some, or raise .*ulimit -n"):
            ask()


def test_a_stream_that_has_begun_is_never_sent_again(client_of: ClientOf) -> None:
    """The caller has seen its first piece: what is lost is lost, and is not passed over in silence."""
    with Misbehaving(stream(event("a"))) as server:
        pieces = client_of(server.url).stream("hello")
        assert next(pieces) == "a"
        with pytest.raises(ConnectionError, match="broke off"):
            next(pieces)
    assert server.accepted == 1


def test_an_answer_cut_in_two_is_never_sent_again(client_of: ClientOf) -> None:
    """The same without streaming: its head had come."""

    def cut(connection: socket.socket) -> None:
        receive(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")

    with Misbehaving(cut) as server, pytest.raises(ConnectionError):
        client_of(server.url).complete("one")
    assert server.accepted == 1


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
def test_events_may_arrive_in_chunks_of_any_size(size: int, client_of: ClientOf) -> None:
    """Bytes of one character, a line separator inside a text, carriage returns and comments do not matter."""
    body = event(None) + event("gr\u00fc\u2028n") + b": still here\r\n\r\n"
    body += event("\U0001f600\u0085").replace(b"\n", b"\r\n")
    body += b'data: {"choices": []}\n\n' + DONE
    with Misbehaving(stream(body, size=size)) as server:
        assert list(client_of(server.url).stream("hello")) == ["gr\u00fc\u2028n", "\U0001f600\u0085"]


@pytest.mark.parametrize(
    "line", [b'data: {"error": {"code": 500, "message": "no slot"}}\n\n', b'error: {"message": "no slot"}\n\n']
)
def test_an_error_inside_a_stream_is_raised(line: bytes, client_of: ClientOf) -> None:
    """After the pieces before it, in either of the forms that the server has had."""
    with Misbehaving(stream(event("a") + line)) as server:
        pieces = client_of(server.url).stream("hello")
        assert next(pieces) == "a"
        with pytest.raises(EngineError, match="no slot"):
            next(pieces)


def test_a_stream_that_is_closed_early_closes_its_connection(client_of: ClientOf) -> None:
    """That is how the server learns that it can stop."""
    ended = threading.Event()

    def act(connection: socket.socket) -> None:
        stream(event("a"))(connection)
        if connection.recv(1) == b"":
            ended.set()

    with Misbehaving(act) as server:
        pieces = client_of(server.url).stream("hello")
        assert next(pieces) == "a"
        pieces.close()  # type: ignore[attr-defined]  # a generator
        assert ended.wait(SILENCE_S)


def test_a_loop_that_ends_closes_an_open_stream_quietly(
    chat_url: str, client_of: ClientOf, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a loop closes every asynchronous generator at once, each by itself."""

    async def begin() -> object:
        pieces = client_of(chat_url).astream("hello", temperature=0, max_tokens=400, ignore_eos=True)
        assert await anext(pieces)
        return pieces  # held until the loop is over

    assert asyncio.run(begin())
    assert not caplog.records


@pytest.mark.parametrize(
    ("parameters", "advice"),
    [
        ({"n": 2}, "one answer is returned: ask once for each"),
        ({"tools": [{"type": "function"}]}, "url, with its api_key"),
        ({"functions": [{}]}, "url, with its api_key"),
    ],
)
def test_what_would_be_answered_with_more_than_a_text_is_refused(
    parameters: dict[str, Any], advice: str, client_of: ClientOf
) -> None:
    """Of several answers only one could be returned, and nothing of a call; it says what to do instead."""
    client = client_of("http://127.0.0.1:1")
    asks: list[Callable[[], object]] = [
        lambda: client.chat("hello", **parameters),
        lambda: client.complete("hello", **parameters),
        lambda: list(client.stream("hello", **parameters)),
        lambda: asyncio.run(client.achat("hello", **parameters)),
    ]
    for ask in asks:
        with pytest.raises(UnsupportedOption, match=advice):
            ask()


def test_one_answer_may_be_asked_for_by_number(client_of: ClientOf) -> None:
    """As is what stands for no tools."""
    with Misbehaving(answer) as server:
        assert client_of(server.url).complete("one", n=1, tools=None) == "fine"


@pytest.mark.parametrize("prompt", [["one", "two"], None, 5, b"one"])
def test_a_prompt_is_one_text(prompt: Any, client_of: ClientOf) -> None:
    """Of several only the first one's continuation would be returned."""
    with pytest.raises(UnsupportedOption, match="one text: ask once for each"):
        client_of("http://127.0.0.1:1").complete(prompt)


def test_other_answers_in_a_stream_are_left_out(client_of: ClientOf) -> None:
    """They would be mixed with the first."""
    other = event("b").replace(b'{"delta"', b'{"index": 1, "delta"')
    with Misbehaving(stream(event("a") + other + event("c") + DONE)) as server:
        assert list(client_of(server.url).stream("hello")) == ["a", "c"]


def test_a_loop_that_has_ended_is_let_go_of(client_of: ClientOf) -> None:
    """With what it left open, once another one asks."""

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
    """The request may be under way, so it is not sent again."""

    def stay_silent(connection: socket.socket) -> None:
        receive(connection)
        connection.recv(1)  # until the client has had enough

    with Misbehaving(stay_silent) as server, pytest.raises(TimeoutError, match="200ms"):
        client_of(server.url).complete("one", timeout_s=0.2)
    assert server.accepted == 1


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [null]}'])
def test_an_answer_of_another_shape_is_an_engine_error(body: bytes, client_of: ClientOf) -> None:
    """What came is shown, and nothing else escapes."""
    with Misbehaving(reply(body)) as server, pytest.raises(EngineError) as caught:
        client_of(server.url).chat("hello")
    assert body.decode() in str(caught.value)


@pytest.mark.parametrize("body", [b"overloaded", b'{"error": "overloaded"}', b'{"error": {"message": "overloaded"}}'])
def test_an_error_of_another_shape_still_has_its_status(body: bytes, client_of: ClientOf) -> None:
    """Not everything that answers is llama.cpp."""
    with Misbehaving(reply(body, status="503 Service Unavailable")) as server, pytest.raises(EngineError) as caught:
        client_of(server.url).chat("hello")
    assert (caught.value.status_code, caught.value.message) == (503, "overloaded")


def test_a_closed_client_connects_no_more(chat_url: str, client_of: ClientOf) -> None:
    """Neither for callers without an event loop nor for those with one; closing twice is harmless."""
    client = client_of(chat_url)
    client.close()
    client.close()
    with pytest.raises(ConnectionError, match="closed"):
        client.chat("hello")
    with pytest.raises(ConnectionError, match="closed"):
        asyncio.run(client.achat("hello"))


def test_closing_from_an_event_loop_closes_everything(chat_url: str, client_of: ClientOf) -> None:
    """The loop's own connections and the others."""

    async def use_and_close() -> None:
        client = client_of(chat_url)
        await client.achat("hello", **LETTERS)
        await client.aclose()
        with pytest.raises(ConnectionError, match="closed"):
            client.chat("hello")

    asyncio.run(use_and_close())
