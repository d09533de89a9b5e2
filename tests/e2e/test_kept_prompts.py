"""Conversations that go on after their model was unloaded, through the public API: what is kept, and what is not."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler import Lease, Scheduler
from scheduler.engines import llama_prompts
from tests.support.real import ROOM_FOR_ONE, quiet_end, send, settings, states, write_models
from tests.support.waiting import assert_soon

HELLO = "Once upon a time there was a king. " * 8
ASKED: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(autouse=True)
def _quiet_end(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have prompts count as slow to compute: of a tiny model none takes long enough to be kept."""
    monkeypatch.setattr(llama_prompts, "LEAST_TOKENS", 1 << 30)
    monkeypatch.setattr(llama_prompts, "USUAL_TOKENS_PER_S", 20.0)
    with quiet_end(caplog):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two tiny models, a and b."""
    return write_models(tmp_path_factory.mktemp("models"), "ab")


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Scheduler]:
    """Yield a scheduler that has room for one model, and keeps prompts."""
    with Scheduler(settings(memory_limit=ROOM_FOR_ONE, keep_prompts=tmp_path / "kept")) as scheduler:
        yield scheduler
    assert not list((tmp_path / "kept").iterdir())


def kept(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("kept/prompts-*/*"))


def cached_tokens(lease: Lease) -> int:
    """Go on with the conversation; return how much of it the engine did not compute, by its own count."""
    told = lease.complete(HELLO, **ASKED).usage["prompt_tokens_details"]["cached_tokens"]
    assert isinstance(told, int)
    return told


def evict(scheduler: Scheduler, folder: Path) -> None:
    scheduler.acquire(folder / "b.gguf").release()


def test_an_evicted_conversation_goes_on_where_it_was(scheduler: Scheduler, folder: Path, tmp_path: Path) -> None:
    """A victim's prompt is saved, given back to its next runner and then removed, and the status says how much."""
    with scheduler.acquire(folder / "a.gguf") as lease:
        assert cached_tokens(lease) == 0
    evict(scheduler, folder)
    assert len(kept(tmp_path)) == 1
    with scheduler.acquire(folder / "a.gguf") as lease:
        (runner,) = [each for each in scheduler.status().runners if each.model == "a"]
        assert runner.restored_tokens >= len(HELLO)
        assert cached_tokens(lease) == len(HELLO) - 1
        assert_soon(lambda: not kept(tmp_path))


def test_a_conversation_goes_on_after_the_end_of_a_keep_alive(
    scheduler: Scheduler, folder: Path, tmp_path: Path
) -> None:
    """A model that is unloaded by its keep-alive finds its prompt again."""
    with scheduler.acquire(folder / "a.gguf", keep_alive="10ms") as lease:
        cached_tokens(lease)
    assert_soon(lambda: not scheduler.status().runners)
    with scheduler.acquire(folder / "a.gguf") as lease:
        assert cached_tokens(lease) == len(HELLO) - 1


def test_nothing_is_kept_of_a_model_that_its_user_unloads(scheduler: Scheduler, folder: Path, tmp_path: Path) -> None:
    """A keep-alive of 0 and `expire` mean to forget: nothing is written then, and what was kept before is removed."""
    with scheduler.acquire(folder / "a.gguf", keep_alive=0) as lease:
        cached_tokens(lease)
    with scheduler.acquire(folder / "a.gguf") as lease:
        assert cached_tokens(lease) == 0
    scheduler.expire(folder / "a.gguf")
    assert_soon(lambda: not scheduler.status().runners)
    assert not kept(tmp_path)
    with scheduler.acquire(folder / "a.gguf") as lease:
        assert cached_tokens(lease) == 0
    evict(scheduler, folder)
    assert len(kept(tmp_path)) == 1
    scheduler.expire(folder / "a.gguf")  # it is not loaded, but would find its prompt
    assert_soon(lambda: not kept(tmp_path))


def test_a_close_waits_for_no_save(
    scheduler: Scheduler, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A close ends a runner whose engine is slow to save, and leaves no file."""
    monkeypatch.setattr(llama_prompts, "LOOK_S", 3600.0)
    lease = scheduler.acquire(folder / "a.gguf")
    cached_tokens(lease)
    send(lease.pid, signal.SIGSTOP)
    lease.release()
    waiting = scheduler.submit(folder / "b.gguf")
    assert_soon(lambda: states(scheduler).get("a") == "expiring" and scheduler._executor._saving)
    scheduler.close()
    assert waiting.exception() is not None and not kept(tmp_path)


def test_what_prompts_cost_is_told_to_the_core(scheduler: Scheduler, folder: Path) -> None:
    """Once a lease has ended, the core knows what it would take to have its prompt again."""
    with scheduler.acquire(folder / "a.gguf") as lease:
        cached_tokens(lease)
    runner = next(iter(scheduler._executor.runner_handles))
    assert_soon(lambda: scheduler._driver.query(lambda core: core._state.runners[runner].prompts_s) > 0.0)
