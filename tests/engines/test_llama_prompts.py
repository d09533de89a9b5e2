"""Prompts that outlive their runner, with the real engine: how they are saved and restored, and by whom."""

from __future__ import annotations

import logging
import signal
import socket
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from fsm.domain.options import Options
from scheduler.engines import llama_prompts
from scheduler.engines.interface import Endpoint
from scheduler.engines.llama import LlamaEngine, LlamaProcess
from scheduler.engines.llama_gate import checked
from scheduler.engines.llama_prompts import RunnerPrompts
from scheduler.engines.prompt_store import PromptStore
from scheduler.models.model_spec import ModelSpec
from tests.engines.test_llama_engine import ON_HOST, Told, ask, launch, start, wait_until
from tests.support.leaks import no_leaks
from tests.support.real import send
from tests.support.tiny_models import write_tiny_model
from tests.support.written_projector import write_projector

TWO_SLOTS = Options(num_ctx=512, num_parallel=2, num_thread=1)
KEY, ENGINE_KEY = b"the-client's", b"the-engine's"
STORY, OTHER_STORY = "Once upon a time there was a king. " * 8, "A recipe: take two eggs and some flour. " * 6


@pytest.fixture(autouse=True)
def _slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have prompts count as slow to compute: of a tiny model none takes long enough to be kept."""
    monkeypatch.setattr(llama_prompts, "LEAST_TOKENS", 1 << 30)
    monkeypatch.setattr(llama_prompts, "USUAL_TOKENS_PER_S", 20.0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf", context=1024)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PromptStore]:
    with no_leaks():
        store = PromptStore(tmp_path / "prompts", 1 << 30)
        yield store
        store.close(5.0)


@pytest.fixture
def engine(store: PromptStore) -> Iterator[LlamaEngine]:
    engine = LlamaEngine(prompts=store)
    yield engine
    engine.close()


def files(store: PromptStore) -> list[Path]:
    folder = store.folder()
    assert folder is not None
    return sorted(folder.iterdir())


def complete(endpoint: Endpoint, prompt: str) -> tuple[str, int]:
    """Return the engine's answer, and how many tokens of the prompt it had in its cache by its own count."""
    status, answer, _ = ask(endpoint, "/completion", {"prompt": prompt, "n_predict": 8, "temperature": 0})
    assert status == 200
    return answer["content"], answer["timings"]["cache_n"]


def prompts_of(process: LlamaProcess) -> RunnerPrompts:
    assert process.prompts is not None
    return process.prompts


def end(process: LlamaProcess, told: Told) -> None:
    process.stop(5.0)
    told.exit()


# -- saving and restoring ---------------------------------------------------------------------------------------------


def test_each_slot_goes_on_where_it_was_in_an_earlier_life(engine: LlamaEngine, store: PromptStore, file: Path) -> None:
    """The prompts of all slots are restored: what is asked then is computed from where the slots were, and no less."""
    process, told = launch(engine, file, TWO_SLOTS)
    endpoint = told.endpoint()
    before = [complete(endpoint, prompt) for prompt in (STORY, OTHER_STORY)]
    assert [cached for _, cached in before] == [0, 0]
    prompts_of(process).save()
    assert [stat.S_IMODE(path.stat().st_mode) for path in files(store)] == [0o600, 0o600]
    end(process, told)

    process, told = launch(engine, file, replace(TWO_SLOTS, num_thread=2))  # which makes no other cache
    endpoint = told.endpoint()
    assert prompts_of(process).restored_tokens >= len(STORY) + len(OTHER_STORY)
    wait_until(lambda: not files(store))  # given back, and removed
    after = [complete(endpoint, prompt) for prompt in (STORY, OTHER_STORY)]
    assert [answer for answer, _ in after] == [answer for answer, _ in before]
    assert [cached for _, cached in after] == [len(STORY) - 1, len(OTHER_STORY) - 1]  # the last is always computed
    assert complete(endpoint, "Something else altogether.")[1] == 0


def test_prompts_of_other_files_and_other_options_are_not_restored(
    engine: LlamaEngine, store: PromptStore, tmp_path: Path
) -> None:
    """A model's prompts are for the same file and the same options alone, as the engine could not read them."""
    path = write_tiny_model(tmp_path / "own.gguf", context=1024)
    process, told = launch(engine, path, TWO_SLOTS)
    complete(told.endpoint(), STORY)
    prompts_of(process).save()
    end(process, told)
    for change in ("options", "file"):
        if change == "file":
            write_tiny_model(path, context=1024, seed=1)
        process, told = launch(engine, path, replace(TWO_SLOTS, num_ctx=256 if change == "options" else 512))
        told.endpoint()
        assert prompts_of(process).restored_tokens == 0, change
        end(process, told)
    assert len(files(store)) == 1


def test_a_file_that_the_engine_cannot_read_is_told_and_computed_again(
    engine: LlamaEngine, store: PromptStore, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the engine did not restore is counted by the engine, said in a warning, and costs no answer."""
    process, told = launch(engine, file, TWO_SLOTS)
    before = complete(told.endpoint(), STORY)
    prompts_of(process).save()
    end(process, told)
    files(store)[0].write_bytes(b"no slot's state")
    process, told = launch(engine, file, TWO_SLOTS)
    assert complete(told.endpoint(), STORY) == before
    assert prompts_of(process).restored_tokens == 0
    (warning,) = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert warning.startswith("tiny: 0 of ")


def test_nothing_is_kept_that_is_sooner_computed_than_saved(
    engine: LlamaEngine, store: PromptStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that is computed in a moment is not written to the disk."""
    process, told = launch(engine, file, TWO_SLOTS)
    complete(told.endpoint(), STORY)
    monkeypatch.setattr(llama_prompts, "USUAL_TOKENS_PER_S", 1e6)
    prompts_of(process).save()
    assert not files(store)


def test_a_save_takes_no_longer_than_computing_and_leaves_nothing_then(
    engine: LlamaEngine, store: PromptStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that does not save in the time of computing is given up; a file that it writes later is removed."""
    process, told = launch(engine, file, TWO_SLOTS)
    complete(told.endpoint(), STORY)
    prompts = prompts_of(process)
    slots = prompts._slots(5.0)
    monkeypatch.setattr(prompts, "_slots", lambda timeout_s: slots)
    monkeypatch.setattr(llama_prompts, "LOOK_S", 0.1)
    monkeypatch.setattr(llama_prompts, "USUAL_TOKENS_PER_S", 10.0 * len(STORY))
    send(process.pid, signal.SIGSTOP)
    prompts.save()
    send(process.pid, signal.SIGCONT)
    (late,) = prompts._failed  # the engine goes on, and writes it or not
    (Path(prompts.request()["folder"]) / late).write_bytes(b"")
    end(process, told)
    wait_until(lambda: not files(store))


def test_the_last_used_slot_goes_first_where_not_all_have_room(
    engine: LlamaEngine, store: PromptStore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the bound, the slot that was used last is saved before the others."""
    process, told = launch(engine, file, TWO_SLOTS)
    endpoint = told.endpoint()
    complete(endpoint, OTHER_STORY)
    complete(endpoint, STORY)
    monkeypatch.setattr(store, "limit_bytes", 400 * 256)  # at 256 bytes for each token: less than both stories have
    prompts_of(process).save()
    end(process, told)
    process, told = launch(engine, file, TWO_SLOTS)
    endpoint = told.endpoint()
    assert complete(endpoint, STORY)[1] == len(STORY) - 1
    assert complete(endpoint, OTHER_STORY)[1] == 0


def test_a_look_tells_what_it_takes_to_have_the_prompts_again(engine: LlamaEngine, file: Path) -> None:
    """What takes long to compute counts as it is read again, and a runner that was asked for nothing costs nothing."""
    process, told = launch(engine, file, TWO_SLOTS)
    endpoint, prompts = told.endpoint(), prompts_of(process)
    prompts.look(5.0)
    assert prompts.again_s == 0.0
    complete(endpoint, STORY)
    prompts.look(5.0)
    assert 0.0 < prompts.again_s < len(STORY) / llama_prompts.USUAL_TOKENS_PER_S


def test_prompts_that_are_forgotten_while_they_are_saved_leave_nothing(
    engine: LlamaEngine, store: PromptStore, file: Path
) -> None:
    """A model that its user expires keeps nothing, whatever is under way."""
    process, told = launch(engine, file, TWO_SLOTS)
    complete(told.endpoint(), STORY)
    prompts_of(process).save()
    prompts_of(process).forget()
    prompts_of(process).save()
    wait_until(lambda: not files(store))


def test_a_model_with_a_file_beside_it_is_said_to_keep_none(
    engine: LlamaEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """llama.cpp saves no slot beside a projector, and nothing of adapters and drafts: that is said once."""
    model = write_tiny_model(tmp_path / "sees.gguf", sees=True, context=2048)
    spec = ModelSpec("sees", str(model), projectors=(str(write_projector(tmp_path / "projector.gguf", 64, 256)),))
    for _ in range(2):
        told = Told()
        process = start(engine, spec, Options(num_ctx=2048, num_parallel=1, num_thread=1), ON_HOST, told)
        end(process, told)
    assert engine._prompts_of(ModelSpec("adapted", str(model), adapters=("a.gguf",)), TWO_SLOTS) is None
    assert engine._prompts_of(ModelSpec("guessed", str(model), draft="a.gguf"), TWO_SLOTS) is None
    said = [each.getMessage() for each in caplog.records]
    ways = (("sees", "a projector"), ("adapted", "adapters"), ("guessed", "a draft model"))
    assert said == [
        f"{name}: its prompts are not kept, as llama.cpp cannot save them with {what}" for name, what in ways
    ]


# -- who may ask for it -----------------------------------------------------------------------------------------------


def raw(url: str, request: bytes) -> bytes:
    """Return all that a server answers to these bytes, until it closes the connection."""
    address = urlsplit(url)
    answer = b""
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=20.0) as connection:
        connection.sendall(request)
        while part := connection.recv(1 << 16):
            answer += part
    return answer


def test_slots_are_for_the_scheduler_alone(engine: LlamaEngine, store: PromptStore, file: Path) -> None:
    """A lease's key gets 403 for whatever could name a slot, and is no key of the engine; all else is passed on."""
    process, told = launch(engine, file, TWO_SLOTS)
    endpoint = told.endpoint()
    answer = complete(endpoint, STORY)
    paths = ["/slots/0?action=save", "/slots/0?action=restore", "/slots/0?action=erase", "/slots/1", "//slots/0"]
    paths += ["/%73lots/0?action=save", "/%u0073lots/0?action=save", "/./slots/0", "/v1/../slots/0", "/Slots/0"]
    for path in paths:
        status, refusal, _ = ask(endpoint, path, {"filename": "mine"})
        assert (status, refusal["error"]["type"]) == (403, "permission_error"), path
    assert ask(endpoint, "/slots")[0] == 403
    assert not files(store)
    assert complete(endpoint, STORY) == (answer[0], len(STORY) - 1)  # nothing was erased
    assert ask(endpoint, "/v1/models")[0] == 200
    assert ask(endpoint, "/metrics", key="another")[0] == 401
    engine_itself = Endpoint(prompts_of(process)._url, endpoint.key)
    assert ask(engine_itself, "/slots/0?action=save", {"filename": "mine"})[0] == 401


def test_no_second_request_comes_through_on_one_connection(engine: LlamaEngine, store: PromptStore, file: Path) -> None:
    """A connection is for one request: what comes behind it, or in its body, is never another one."""
    endpoint = launch(engine, file, TWO_SLOTS)[1].endpoint()
    behind = (
        b"POST /slots/0?action=save HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %s\r\nContent-Length: 16\r\n\r\n"
        b'{"filename":"a"}' % endpoint.key.encode()
    )
    for length in (b"", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n"):
        first = b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\n%s\r\n" % length
        assert raw(endpoint.url, first + behind).count(b"HTTP/1.1 ") <= 1
    assert not files(store)


HEADS = {
    "no path": b"GET http://a/slots HTTP/1.1",
    "no version": b"GET /health",
    "two lines in one": b"GET /health HTTP/1.1\r\nA: b\nGET /slots HTTP/1.1",
    "a folded line": b"GET /health HTTP/1.1\r\nA: b\r\n Connection: keep-alive",
    "no name": b"GET /health HTTP/1.1\r\n: b",
    "no colon": b"GET /health HTTP/1.1\r\nConnection",
    "a space in the path": b"GET /health /slots HTTP/1.1",
    "nothing": b"",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_a_head_that_could_be_read_in_two_ways_is_refused(head: bytes) -> None:
    """What an engine might read as another request than the gate does is not passed on."""
    assert checked(head, KEY, ENGINE_KEY) is None


@pytest.mark.parametrize(
    ("fields", "passed"),
    [
        (b"Authorization: Bearer the-client's", b"Authorization: Bearer the-engine's"),
        (b"x-api-key: the-client's", b"Authorization: Bearer the-engine's"),
        (b"Authorization: Bearer the-engine's", b""),
        (b"connection: keep-alive\r\nCONNECTION : upgrade", b""),
        (b"Accept: a/b", b"Accept: a/b"),
    ],
)
def test_a_client_has_its_own_key_and_no_say_in_the_connection(fields: bytes, passed: bytes) -> None:
    """The engine's key stands in for the client's, never beside it, and each connection ends with its answer."""
    asked = checked(b"GET /v1/models?a=%20 HTTP/1.1\r\n" + fields, KEY, ENGINE_KEY)
    assert asked is not None
    middle = passed + b"\r\n" if passed else b""
    assert asked.passed == b"GET /v1/models?a=%20 HTTP/1.1\r\n" + middle + b"Connection: close\r\n\r\n"


def test_a_stream_comes_piece_by_piece_and_ends_when_its_client_leaves(engine: LlamaEngine, file: Path) -> None:
    """The gate holds back no token, and the engine notices a client that goes."""
    process, told = launch(engine, file, TWO_SLOTS)
    endpoint = told.endpoint()
    address = urlsplit(endpoint.url)
    body = b'{"prompt": "a", "n_predict": 480, "stream": true, "ignore_eos": true}'
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=20.0) as connection:
        connection.sendall(
            b"POST /completion HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s"
            % (endpoint.key.encode(), len(body), body)
        )
        pieces = b""
        while pieces.count(b"data: ") < 2:
            pieces += connection.recv(64)
        assert b'"stop":true' not in pieces

    def at_work() -> Any:
        return any(slot["is_processing"] for slot in prompts_of(process)._ask("GET", "/slots", 5.0))

    wait_until(lambda: not at_work())
