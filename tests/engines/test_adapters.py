"""Adapters of one model that requests choose among: one runner, with the tokens of a runner for each, and no say in
what others get.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler import InvalidModel, Lease, ModelSpec, Scheduler, UnsupportedOption
from scheduler.engines.interface import Endpoint, with_scales
from scheduler.engines.llama_server import LlamaServerEngine
from tests.engines.test_llama_engine import ask
from tests.support.leaks import no_leaks
from tests.support.real import settings
from tests.support.tiny_models import byte_tokens, write_adapter, write_tiny_model

STORY = "Once upon a time there was a king who had three sons. "
OTHERS = ("A recipe: take two eggs and some flour. ", "It rains in the valley, and nothing else is known. ")
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
# What is chosen, and what it is in a runner of its own; the engine's answers are compared as letters, a token each.
CHOICES: dict[str, Any] = {"none": None, "sql": "sql", "both": {"chat": 1.0, "sql": 1.0}}
OWN = {"none": (), "sql": ("sql",), "both": ("chat", "sql")}
LETTERS_ONLY = {token: -40.0 for token in byte_tokens() if not ("a" <= token <= "z")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapted")
    found = {"sql": write_adapter(folder / "sql.gguf", 1), "chat": write_adapter(folder / "chat.gguf", 2)}
    found["base"] = write_tiny_model(folder / "base.gguf", context=1024, biases=LETTERS_ONLY)
    return {name: str(path) for name, path in found.items()}


@pytest.fixture
def base(files: dict[str, str]) -> ModelSpec:
    return ModelSpec("m", files["base"], named_adapters={"sql": files["sql"], "chat": files["chat"]})


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    with no_leaks(), Scheduler(settings()) as scheduler:
        yield scheduler


def raw(lease: Lease, path: str, **body: Any) -> tuple[int, Any]:
    """Ask a runner's own server, as another client does."""
    return ask(Endpoint(lease.url, lease.api_key), path, body)[:2]


def complete(lease: Lease) -> str:
    return str(lease.complete(STORY, **GREEDY))


def complete_in_a_loop(lease: Lease) -> str:
    async def awaited() -> str:
        return str(await lease.acomplete(STORY, **GREEDY))

    return asyncio.run(awaited())


def complete_by_openai(lease: Lease) -> str:
    with lease.openai() as client:
        told = client.completions.create(
            model="m", prompt=STORY, temperature=0, max_tokens=8, extra_body={"ignore_eos": True}
        )
    return told.choices[0].text


def complete_by_address(lease: Lease) -> str:
    content = raw(lease, "/completion", prompt=STORY, **GREEDY)[1]["content"]
    assert isinstance(content, str)
    return content


def test_each_request_has_the_tokens_of_a_runner_of_its_own(
    scheduler: Scheduler, base: ModelSpec, files: dict[str, str]
) -> None:
    """One runner, in any order, by every way to ask, also where a slot or more had the prompt with other adapters."""
    alone = {}
    for choice, names in OWN.items():
        spec = ModelSpec("m", files["base"], adapters=tuple(files[name] for name in names))
        with scheduler.acquire(spec, num_ctx=512, keep_alive=0) as lease:
            alone[choice] = complete(lease)
    assert len({*alone.values()}) == len(OWN)

    runners = set()
    for way in (complete, complete_in_a_loop, complete_by_openai, complete_by_address):
        for choice in (*CHOICES, *reversed(CHOICES), *CHOICES):
            with scheduler.acquire(base, num_ctx=512, num_parallel=2, adapter=CHOICES[choice]) as lease:
                runners.add(lease.runner)
                if way is complete:  # the story gives way to other prompts, which llama.cpp might keep it beside
                    for other in OTHERS:
                        lease.complete(other, **GREEDY)
                assert way(lease) == alone[choice], (way.__name__, choice)

    async def one(choice: str) -> str:
        async with scheduler.acquire_async(base, num_ctx=512, adapter=CHOICES[choice]) as lease:
            runners.add(lease.runner)
            return str(await lease.acomplete(STORY, **GREEDY))

    async def at_once(choices: list[str]) -> list[str]:
        return await asyncio.gather(*map(one, choices))

    assert asyncio.run(at_once([*CHOICES] * 3)) == [alone[choice] for choice in [*CHOICES] * 3]
    sql = ModelSpec("sql", files["base"], named_adapters=base.named_adapters, adapter="sql")
    for scale, same in ((None, "sql"), (0, "none"), (1, "sql"), (0.25, "")):
        with scheduler.acquire(sql, num_ctx=512, adapter=None if scale is None else {"sql": scale}) as lease:
            runners.add(lease.runner)
            assert complete(lease) == alone[same] if same else complete(lease) not in alone.values()
    assert len(runners) == 1


def test_no_holder_changes_what_another_one_gets(scheduler: Scheduler, base: ModelSpec) -> None:
    """The scales of the load cannot be changed, nor does a field of a request's own count.

    Where the engine passes over adapters, 403 is right and an answer would be a wrong one.
    """
    messages = [{"role": "user", "content": STORY}]
    with (
        scheduler.acquire(base, num_ctx=512) as plain,
        scheduler.acquire(base, num_ctx=512, adapter="sql") as sql,
    ):
        without, chosen = complete(plain), complete(sql)
        assert without != chosen
        lora = [{"id": id, "scale": 1.0} for id in (0, 1)]
        for path in ("/lora-adapters", "/LORA-adapters", "/lora%2dadapters", "//lora-adapters"):
            assert ask(Endpoint(sql.url, sql.api_key), path, lora)[0] in (403, 404), path
        more: dict[str, Any]
        for more in ({"lora": lora}, {"lora": []}, {"cache_prompt": False}, {"cache_prompt": True}):
            assert raw(sql, "/completion", prompt=STORY, **GREEDY, **more)[1]["content"] == chosen, more
            assert raw(plain, "/v1/messages", messages=messages, max_tokens=8, **more)[0] == 200
            assert raw(plain, "/completion", prompt=STORY, **GREEDY, **more)[1]["content"] == without, more
        with pytest.raises(UnsupportedOption, match="lora"):
            plain.complete(STORY, lora=lora)
        with sql.stream(STORY, **GREEDY) as pieces:
            streamed = "".join(pieces)
        assert streamed == sql.chat(STORY, **GREEDY) != plain.chat(STORY, **GREEDY)

        assert raw(sql, "/v1/messages", messages=messages, max_tokens=4)[0] == 403
        assert raw(sql, "/v1/messages/count_tokens", messages=messages)[0] == 200
        assert raw(sql, "/tokenize", content="Hello")[0] == 200
        for body in (None, [], "text"):
            assert ask(Endpoint(sql.url, sql.api_key), "/completion", body or [])[0] == 403
        assert ask(Endpoint(sql.url, with_scales("no key", (1.0, 1.0))), "/completion", {"prompt": "a"})[0] == 401
        assert ask(Endpoint(sql.url, with_scales(plain.api_key, (1.0,))), "/completion", {"prompt": "a"})[0] == 403


def test_adapters_that_are_always_applied_cannot_be_changed(scheduler: Scheduler, files: dict[str, str]) -> None:
    """Neither for others nor for one's own requests: a prompt that was kept would be a wrong one."""
    with scheduler.acquire(ModelSpec("m", files["base"], adapters=(files["sql"],)), num_ctx=512) as lease:
        before = complete(lease)
        assert raw(lease, "/lora-adapters")[0] == 403
        assert ask(Endpoint(lease.url, lease.api_key), "/lora-adapters")[1][0]["path"] == files["sql"]
        told = raw(lease, "/completion", prompt=STORY, **GREEDY, lora=[{"id": 0, "scale": 0.0}])
        assert told[1]["content"] == before
        key = with_scales(lease.api_key, (0.5,))
        assert ask(Endpoint(lease.url, key), "/completion", {"prompt": STORY, **GREEDY})[0] == 403


@pytest.mark.parametrize("adapter", ["sq", {"sql": "much"}, {"sql": float("nan")}, {"sql": True}, 3, ["sql"]])
def test_what_is_no_adapter_of_the_model_is_refused(scheduler: Scheduler, base: ModelSpec, adapter: Any) -> None:
    """A name that the model has not, and a scale that is no number."""
    with pytest.raises(UnsupportedOption, match="adapter"):
        scheduler.acquire(base, adapter=adapter)
    with pytest.raises(UnsupportedOption, match="its ModelSpec has no named_adapters"):
        scheduler.acquire(ModelSpec("m", base.path), adapter="sql")


def test_what_cannot_switch_adapters_refuses_them(
    scheduler: Scheduler, base: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedder's answers would be those of the model alone, and a `llama-server` has no gate."""
    with pytest.raises(InvalidModel, match="of an embedder"):
        scheduler.acquire(base, embedding=True)
    engine = LlamaServerEngine(tmp_path / "llama-server")
    monkeypatch.setattr(engine.binary, "facts", lambda: None)
    with pytest.raises(InvalidModel, match="by xllamacpp alone"):
        engine.inspect(base, [])
    engine.close()


def test_the_identity_is_of_files_and_names(files: dict[str, str]) -> None:
    """Which adapter is chosen is no part of it, nor the order in which they are named."""

    def id_of(adapter: Any = {}, **named: str) -> str:  # noqa: B006 - it is not changed
        return ModelSpec("m", files["base"], named_adapters=named, adapter=adapter).id

    sql, chat = files["sql"], files["chat"]
    assert id_of(sql=sql, chat=chat) == id_of(chat=chat, sql=sql) == id_of({"chat": 0.5}, sql=sql, chat=chat)
    always = ModelSpec("m", files["base"], adapters=(sql,)).id
    assert (
        len({id_of(), always, id_of(sql=sql), id_of(a=sql), id_of(sql=chat, chat=sql), id_of(sql=sql, chat=chat)}) == 6
    )
