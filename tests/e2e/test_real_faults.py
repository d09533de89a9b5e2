"""What callers see when real child processes crash or hang, and when files are wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scheduler import (
    InvalidModel,
    Lease,
    LoadFailed,
    LoadTimeout,
    ModelNotFound,
    RunnerCrashed,
    Scheduler,
)
from tests.support.real import (
    LONG,
    ROOM_FOR_ONE,
    SHORT,
    begin_a_load,
    is_gone,
    quiet_end,
    send,
    settings,
    states,
    stopped_load,
    stopping_loads,
    write_models,
)
from tests.support.waiting import LIMIT_S, assert_soon

NOTICED_S = 5.0  # fifty times the 100 ms within which an exit is noticed, and half of what a probe may take to
ORPHANED_S = 10.0  # ten times the second within which no child of a killed host is left

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
    """Make two tiny models, a and b."""
    return write_models(tmp_path_factory.mktemp("models"), "ab")


@pytest.fixture
def model(folder: Path) -> Path:
    return folder / "a.gguf"


# -- children that crash -----------------------------------------------------------------------------------------------


def test_a_kill_while_it_loads_is_followed_by_another_load(scheduler: Scheduler, model: Path) -> None:
    """N07: a kill of a loading child may be for lack of memory, so the load is tried a second time."""
    waiting, pid = begin_a_load(scheduler, model)
    others = [scheduler.submit(model) for _ in range(3)]
    send(pid, signal.SIGKILL)
    leases = [future.result(LIMIT_S) for future in (waiting, *others)]
    assert {lease.pid for lease in leases} == {leases[0].pid} != {pid}
    for lease in leases:
        lease.release()


def test_a_second_kill_while_it_loads_is_the_answer(scheduler: Scheduler, model: Path) -> None:
    """N07: a second kill of a loading child fails the request, and the next request is refused at once."""
    waiting, pid = begin_a_load(scheduler, model)
    with stopping_loads():
        send(pid, signal.SIGKILL)
        send(stopped_load(scheduler, after=pid), signal.SIGKILL)
    with pytest.raises(LoadFailed, match="killed by SIGKILL while loading") as failed:
        waiting.result(LIMIT_S)
    assert failed.value.out_of_memory and failed.value.retry_after_s
    with pytest.raises(LoadFailed, match="killed by SIGKILL"):
        scheduler.acquire(model)
    assert_soon(lambda: scheduler.status().runners == () and scheduler.status().devices[0].held_bytes == 0)


def test_a_holder_learns_that_its_runner_died(
    scheduler: Scheduler, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A crash is told within a second: `lost`, the callback, and an error on every use."""
    told = threading.Event()
    lease, other = scheduler.acquire(model), scheduler.acquire(model)
    lease.on_lost(lambda: 1 / 0)
    lease.on_lost(told.set)
    send(lease.pid, signal.SIGKILL)
    assert told.wait(NOTICED_S)
    assert_soon(lambda: other.lost and "a callback of a lease failed" in caplog.text)
    caplog.clear()
    assert lease.lost and states(scheduler).get("a") != "ready"
    for use in (lambda: lease.chat("hello"), lambda: other.complete("hello"), lambda: other.stream("hello")):
        with pytest.raises(RunnerCrashed, match="killed by SIGKILL while serving") as crashed:
            use()
        assert crashed.value.runner == lease.runner
    with scheduler.acquire(model) as fresh:
        lease.release()
        other.release()
        assert fresh.runner != lease.runner and fresh.chat("hello", **SHORT)
        assert [runner.leases for runner in scheduler.status().runners] == [1]


def test_answers_under_way_break_off_with_the_crash(scheduler: Scheduler, model: Path) -> None:
    """Answers under way in threads, streams and tasks end with an error when their runner crashes."""

    async def read(lease: Lease) -> str:
        return "".join([piece async for piece in lease.astream("hello", **LONG)])

    with scheduler.acquire(model, num_parallel=4) as lease, ThreadPoolExecutor(3) as pool:
        stream = lease.stream("hello", **LONG)
        next(stream)
        talks = [pool.submit(lease.chat, "hello", **LONG), pool.submit(lease.complete, "hello", **LONG)]
        talks.append(pool.submit(lambda: asyncio.run(read(lease))))
        send(lease.pid, signal.SIGKILL)
        for talk in talks:
            assert isinstance(talk.exception(LIMIT_S), RunnerCrashed)
        with pytest.raises(RunnerCrashed):
            list(stream)
        assert list(stream) == []
    assert_soon(lambda: states(scheduler) == {})


def test_an_idle_runner_that_dies_is_not_listed(scheduler: Scheduler, model: Path) -> None:
    """An idle runner that crashes is gone from the status within a second, and the next request loads again."""
    with scheduler.acquire(model) as lease:
        runner, pid = lease.runner, lease.pid
    send(pid, signal.SIGKILL)
    assert_soon(lambda: scheduler.status().runners == (), NOTICED_S)
    assert scheduler.status().devices[0].held_bytes == 0
    with scheduler.acquire(model) as lease:
        assert lease.runner != runner and lease.chat("hello", **SHORT)


def test_a_runner_that_dies_while_it_drains_makes_room(folder: Path) -> None:
    """A draining runner that crashes is told to its lease holder, and the waiting request is served."""
    with Scheduler(settings(memory_limit=ROOM_FOR_ONE, max_wait=0, min_residency=0)) as scheduler:
        lease = scheduler.acquire(folder / "a.gguf")
        waiting = scheduler.submit(folder / "b.gguf")
        assert_soon(lambda: states(scheduler) == {"a": "expiring"})
        send(lease.pid, signal.SIGKILL)
        assert_soon(lambda: lease.lost, NOTICED_S)
        with waiting.result(LIMIT_S) as other:
            assert other.chat("hello", **SHORT)
        with pytest.raises(RunnerCrashed):
            lease.chat("hello")
        lease.release()


def test_a_model_that_crashes_twice_in_a_row_is_backed_off(scheduler: Scheduler, model: Path) -> None:
    """Rule 8: a model is loaded again after its first crash, and is in back-off after the second one in a row."""
    for _ in range(2):
        with scheduler.acquire(model) as lease:
            send(lease.pid, signal.SIGKILL)
            assert_soon(lambda lease=lease: lease.lost, NOTICED_S)  # type: ignore[misc]  # bound now
    with pytest.raises(LoadFailed, match="killed by SIGKILL while serving") as refused:
        scheduler.acquire(model)
    assert refused.value.retry_after_s is not None and 0 < refused.value.retry_after_s < 21
    assert not refused.value.out_of_memory


# -- children that hang ------------------------------------------------------------------------------------------------


def test_a_runner_that_answers_nothing_is_killed(model: Path) -> None:
    """A runner that answers nothing is found by its probe and killed, its streams fail, and the model loads again."""
    with Scheduler(settings(probe_interval="50ms", probe_timeout="500ms")) as scheduler:
        lease = scheduler.acquire(model)
        stream, pid = lease.stream("hello", **LONG), lease.pid
        next(stream)
        send(pid, signal.SIGSTOP)
        with pytest.raises(RunnerCrashed, match="did not answer within"):
            list(stream)
        assert_soon(lambda: lease.lost and is_gone(pid))
        lease.release()
        with scheduler.acquire(model) as lease:
            assert lease.pid != pid and lease.chat("hello", **SHORT)


def test_an_idle_runner_that_answers_nothing_is_killed(model: Path) -> None:
    """An idle runner that answers nothing is killed without a request for it."""
    with Scheduler(settings(probe_interval="50ms", probe_timeout="500ms")) as scheduler:
        with scheduler.acquire(model) as lease:
            pid = lease.pid
        send(pid, signal.SIGSTOP)
        assert_soon(lambda: scheduler.status().runners == () and is_gone(pid))


def test_n12_a_load_that_stands_still_is_stopped(model: Path) -> None:
    """N12: a load without progress is stopped, and its request is refused."""
    with Scheduler(settings(load_timeout="2s")) as scheduler:  # it has to be noticed before that
        waiting, pid = begin_a_load(scheduler, model)
        assert isinstance(waiting.exception(LIMIT_S), LoadTimeout)
        assert_soon(lambda: scheduler.status().runners == () and is_gone(pid))


def test_d06_d15_a_load_that_stands_still_holds_up_nobody_else(scheduler: Scheduler, folder: Path) -> None:
    """D06, D15: a load without progress delays no other load, unload or cancel, and can go on."""
    waiting, pid = begin_a_load(scheduler, folder / "a.gguf")
    cancelled = scheduler.submit(folder / "a.gguf")
    for _ in range(2):
        with scheduler.acquire(folder / "b.gguf") as lease:
            assert lease.chat("hello", **SHORT)
    scheduler.expire(folder / "b.gguf")
    assert cancelled.cancel()
    assert_soon(lambda: states(scheduler) == {"a": "loading"} and len(scheduler.status().queue) == 1)
    send(pid, signal.SIGCONT)
    with waiting.result(LIMIT_S) as lease:
        assert lease.pid == pid and lease.chat("hello", **SHORT)


# -- files -------------------------------------------------------------------------------------------------------------


WRONG: dict[str, tuple[Callable[[Path, bytes], object], str]] = {
    "cut short": (lambda path, good: path.write_bytes(good[:-1000]), "cut short: [0-9]+ of [0-9]+ bytes"),
    "corrupt": (
        lambda path, good: path.write_bytes(good[:8] + b"\xff" * 16 + good[24:]),
        "tensors, and no more than [0-9]+ are read at byte 8",
    ),
    "empty": (lambda path, _: path.touch(), "empty"),
    "text": (lambda path, _: path.write_text("hello" * 100), "no GGUF file"),
    "directory": (lambda path, _: path.mkdir(), "directory"),
    "fifo": (lambda path, _: os.mkfifo(path), "no regular file"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_s11_a_file_that_is_no_model_is_refused(scheduler: Scheduler, model: Path, tmp_path: Path, kind: str) -> None:
    """S11: a file that is no model is refused with file and reason, and without a back-off."""
    make, reason = WRONG[kind]
    path = tmp_path / "wrong.gguf"
    make(path, model.read_bytes())
    for _ in range(2):
        with pytest.raises(InvalidModel, match=reason) as refused:
            scheduler.acquire(path)
    assert refused.value.path == str(path) and states(scheduler) == {}


def test_s11_a_file_that_is_missing_is_served_once_it_is_there(
    scheduler: Scheduler, model: Path, tmp_path: Path
) -> None:
    """S11, S34: a missing file is refused with status 404, and is served once it exists."""
    path = tmp_path / "late.gguf"
    with pytest.raises(ModelNotFound) as refused:
        scheduler.acquire(path)
    assert (refused.value.path, refused.value.status) == (str(path), 404)
    path.write_bytes(model.read_bytes())
    scheduler.acquire(path).release()


def test_s25_an_engine_that_does_not_know_a_model_says_so(scheduler: Scheduler, model: Path, tmp_path: Path) -> None:
    """S25, S28, N13: a model that the engine does not know is refused with the engine's words, before a load."""
    path = tmp_path / "newer.gguf"
    path.write_bytes(model.read_bytes().replace(b"llama", b"lxama"))
    for _ in range(2):
        with pytest.raises(InvalidModel, match=r"unknown model architecture: 'lxama'.*upgrade"):
            scheduler.acquire(path)
    assert states(scheduler) == {}


def test_n13_what_the_engine_misses_is_told_in_its_words(scheduler: Scheduler, model: Path, tmp_path: Path) -> None:
    """N13: a file without its architecture's tensors is refused with the engine's words, up to a limit."""
    path = tmp_path / "renamed.gguf"
    path.write_bytes(model.read_bytes().replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_dp.weight"))
    with pytest.raises(InvalidModel, match=r"tensor 'blk\.0\.ffn_up\.weight' not found"):
        scheduler.acquire(path)


def test_a_file_that_is_cut_while_it_is_served_ends_that_runner_only(
    scheduler: Scheduler, folder: Path, tmp_path: Path
) -> None:
    """A file that is cut while it is served crashes its runner, and the next request is told what is wrong with it."""
    path = tmp_path / "cut.gguf"
    path.write_bytes((folder / "a.gguf").read_bytes())
    with scheduler.acquire(folder / "b.gguf") as other, scheduler.acquire(path, use_mmap=True) as lease:
        os.truncate(path, 20_000)
        with pytest.raises(RunnerCrashed):
            lease.chat("hello", **SHORT)
        assert_soon(lambda: lease.lost)
        with pytest.raises(InvalidModel, match="cut short"):
            scheduler.acquire(path)
        assert other.chat("hello", **SHORT)


def test_a_file_that_is_replaced_is_read_by_the_next_life(scheduler: Scheduler, folder: Path, tmp_path: Path) -> None:
    """A file that is replaced is loaded by the next runner, and the present one goes on with the old file."""
    path, new = tmp_path / "model.gguf", tmp_path / "new.gguf"
    path.write_bytes((folder / "a.gguf").read_bytes())
    new.write_bytes((folder / "b.gguf").read_bytes())
    with scheduler.acquire(path) as lease:
        before = lease.chat("hello", **SHORT)
        os.replace(new, path)
        assert lease.chat("hello", **SHORT) == before
    scheduler.expire(path)
    with scheduler.acquire(path) as lease:
        assert lease.chat("hello", **SHORT) != before
