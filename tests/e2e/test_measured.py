"""What real runners take: measurements by kind, in place of predictions, and memory of other programs."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fsm.domain.devices import HOST, DeviceId, DeviceSample
from fsm.messages.decision_log import Decision
from fsm.messages.events import Event, Sampled
from scheduler import DoesNotFit, Lease, PythonModel, Scheduler
from scheduler.api.status import RunnerStatus
from scheduler.concurrency.thread_pool import ThreadPool
from scheduler.devices.device_reader import DeviceReader
from scheduler.engines.interface import Buffer, Memory
from scheduler.engines.llama import LlamaProcess
from scheduler.engines.llama_protocol import BUFFERS_LIMIT, BYTES_LIMIT, buffers_of, loaded_of
from scheduler.runtime.memory_sampler import MemorySampler
from tests.engines.test_llama_engine import Told
from tests.support.real import SHORT, is_gone, quiet_end, send, settings
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import LIMIT_S, assert_soon

MIB = 2**20
FULL: dict[str, Any] = {"temperature": 0, "max_tokens": 2000, "ignore_eos": True}  # until the context is full
GPUS = (DeviceId("GPU-b"), DeviceId("GPU-a"))
NAMED = {"CUDA0": GPUS[0], "CUDA1": GPUS[1]}


@pytest.fixture(autouse=True)
def _quiet_end(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with quiet_end(caplog):
        yield


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    """Yield a scheduler whose runners are sampled when a lease has ended, and never otherwise."""
    with Scheduler(settings(probe_interval="1h")) as scheduler:
        yield scheduler


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model whose 8 MiB of weights show in what it takes."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "a.gguf", layers=4, width=512, context=1024)


def the_runner(scheduler: Scheduler) -> RunnerStatus:
    return scheduler.status().runners[0]


def fill(lease: Lease, **parameters: Any) -> None:
    """Fill a context as a user's own client does, with the lease's address and key only."""
    headers = {"Authorization": f"Bearer {lease.api_key}"}
    body = {"prompt": "hello", **FULL, **parameters}
    answer = httpx2.post(f"{lease.url}/v1/completions", headers=headers, json=body, timeout=LIMIT_S)
    assert answer.status_code == 200, answer.text


def has_been_looked_at(scheduler: Scheduler, lease: Lease) -> bool:
    life = scheduler._executor.runner_handles[lease.runner]
    return not (life.lease_ended or life.looked_at)


# -- by kind ----------------------------------------------------------------------------------------------------------


def test_n14_private_and_shared_memory_are_told_apart(scheduler: Scheduler, model: Path) -> None:
    """N14: mapped weights are page cache, and weights that are read into memory are the runner's own."""
    with scheduler.acquire(model, num_ctx=256, use_mmap=True):
        mapped = the_runner(scheduler)
    scheduler.expire(model)
    assert_soon(lambda: not scheduler.status().runners)
    with scheduler.acquire(model, num_ctx=256, use_mmap=False):
        read = the_runner(scheduler)
    for runner in (mapped, read):
        assert runner.private_bytes + runner.shared_bytes == runner.resident_bytes["cpu"]
        assert runner.private_bytes > MIB and runner.shared_bytes > MIB
    weights_bytes = model.stat().st_size
    assert mapped.shared_bytes - read.shared_bytes > 0.8 * weights_bytes
    assert read.private_bytes - mapped.private_bytes > 0.8 * weights_bytes


def test_n14_what_the_engine_says_of_its_buffers_is_shown(scheduler: Scheduler, model: Path) -> None:
    """N14: the status has the engine's buffers by kind and device, and weights of about the file's size."""
    with scheduler.acquire(model, num_ctx=256):
        buffers_bytes = the_runner(scheduler).buffers_bytes
    assert buffers_bytes.keys() >= {"weights", "cache", "compute"}
    assert {device for sizes in buffers_bytes.values() for device in sizes} == {"cpu"}
    assert buffers_bytes["weights"]["cpu"] == pytest.approx(model.stat().st_size, rel=0.05)


# -- in place of predictions ------------------------------------------------------------------------------------------


def test_n14_a_context_that_a_users_own_client_fills_is_noticed(scheduler: Scheduler, model: Path) -> None:
    """N14: a context that a user's own client fills is noticed after its lease, and the measurement counts."""
    with scheduler.events() as events:
        with scheduler.acquire(model, num_ctx=256) as lease:
            before = the_runner(scheduler)
            fill(lease)
        assert_soon(lambda: the_runner(scheduler).settled)
        after = the_runner(scheduler)
        told = []
        while (entry := events.take(0.1)) is not None:
            told += [entry] if isinstance(entry, Decision) and entry.what == "measured" else []
    assert not before.settled
    assert before.held_bytes == before.promised_bytes == after.promised_bytes
    assert after.peak_bytes["cpu"] <= after.held_bytes["cpu"] <= max(before.held_bytes["cpu"], after.peak_bytes["cpu"])
    assert [entry.runner for entry in told] == [before.id]
    assert "predicted" in told[0].reason and "measured" in told[0].reason


def test_n14_a_filled_context_is_told_after_a_reading(
    scheduler: Scheduler, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N14: as long as the memory cannot be read, no measurement replaces the prediction of a full context."""
    read, polled = threading.Event(), threading.Semaphore(0)
    sample, poll = DeviceReader.sample, LlamaProcess.context_filled

    def waiting(devices: DeviceReader) -> tuple[DeviceSample, ...]:
        read.wait(3 * LIMIT_S)
        return sample(devices)

    def counting(process: LlamaProcess, timeout_s: float) -> Mapping[DeviceId, int] | None:
        polled.release()
        return poll(process, timeout_s)

    with scheduler.acquire(model, num_ctx=256) as lease:
        fill(lease)
        monkeypatch.setattr(DeviceReader, "sample", waiting)
        monkeypatch.setattr(LlamaProcess, "context_filled", counting)
    try:
        assert all(polled.acquire(timeout=LIMIT_S) for _ in range(2))  # the first poll has given up its reading
        assert not the_runner(scheduler).settled
    finally:
        read.set()
    assert_soon(lambda: the_runner(scheduler).settled)


def test_n14_a_runner_that_stays_leased_is_looked_at_with_each_probe(model: Path) -> None:
    """N14: a runner that stays leased is sampled with each probe."""
    with Scheduler(settings(probe_interval="0.2s")) as scheduler, scheduler.acquire(model, num_ctx=256) as lease:
        fill(lease)
        assert_soon(lambda: the_runner(scheduler).settled)


def test_n14_a_runner_that_leaves_with_its_lease_is_looked_at_before(scheduler: Scheduler, model: Path) -> None:
    """N14: a runner that is stopped with its last lease is sampled before."""
    with scheduler.acquire(model, num_ctx=256, keep_alive=0) as lease:
        predicted = the_runner(scheduler).promised_bytes["cpu"]
        fill(lease)
    assert_soon(lambda: not scheduler.status().runners)
    with scheduler.acquire(model, num_ctx=256):
        assert the_runner(scheduler).promised_bytes["cpu"] != predicted  # what was measured


def test_n14_short_answers_do_not_show_what_a_runner_takes(scheduler: Scheduler, model: Path) -> None:
    """N14: a runner with short answers only keeps its predicted reservation."""
    with scheduler.acquire(model, num_ctx=1024) as lease:
        lease.chat("hello", **SHORT)
    assert_soon(lambda: has_been_looked_at(scheduler, lease))
    with scheduler.acquire(model):
        lease.release()
    assert_soon(lambda: has_been_looked_at(scheduler, lease))
    runner = the_runner(scheduler)
    assert (runner.settled, runner.held_bytes) == (False, runner.promised_bytes)


def test_n14_an_embedder_has_shown_all_with_a_text_as_long_as_its_context(scheduler: Scheduler, model: Path) -> None:
    """N14: an embedder has filled its context with one text of that length."""
    with scheduler.acquire(model, embedding=True, num_ctx=256) as lease:
        lease.embed("a" * 255)
    assert_soon(lambda: the_runner(scheduler).settled)


def test_n14_a_runner_that_hangs_is_released_at_once(
    scheduler: Scheduler, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N14: a lease of a runner that hangs is released at once, and the runner is sampled on another thread."""
    monkeypatch.setattr("scheduler.runtime.executor._LOOK_S", 10 * LIMIT_S)
    lease = scheduler.acquire(model, num_ctx=256)
    send(lease.pid, signal.SIGSTOP)
    begin = time.monotonic()
    lease.release()
    assert the_runner(scheduler).state == "idle"
    assert time.monotonic() - begin < LIMIT_S
    send(lease.pid, signal.SIGCONT)


def test_n14_a_runner_that_hangs_is_stopped_all_the_same(model: Path) -> None:
    """N14: a runner that hangs is stopped after a short attempt to sample it."""
    with Scheduler(settings(probe_interval="1h", stop_grace="0.1s")) as scheduler:
        lease = scheduler.acquire(model, num_ctx=256, keep_alive=0)
        send(lease.pid, signal.SIGSTOP)
        lease.release()
        assert_soon(lambda: not scheduler.status().runners)
        assert is_gone(lease.pid)


# -- the engine's own figures, where a driver has none ----------------------------------------------------------------


def a_loaded_process(*buffers: object) -> tuple[LlamaProcess, Told]:
    """Return the handle of a child that reports these buffers, without a process."""
    told = Told()
    process = LlamaProcess(told, "key", gpus=NAMED)
    line = {"event": "loaded", "url": "http://127.0.0.1:1", "num_ctx": 256, "buffers": list(buffers)}
    process.printed(json.dumps(line))
    return process, told


def test_n14_the_engines_gpus_are_those_of_the_placement() -> None:
    """N14: the engine's GPUs are those of the placement in order, and the host's buffers are not taken as resident."""
    process, told = a_loaded_process(
        ["CUDA0", "weights", 5],
        ["CUDA1", "weights", 7],
        ["CUDA1", "cache", 1],
        ["CPU", "weights", 9],
        ["CUDA0", "weights", 2],
    )
    assert told.loads[0][2] == process.memory().resident == {"GPU-b": 7, "GPU-a": 8}
    assert Buffer(DeviceId("GPU-b"), "weights", 7) in process.buffers
    assert Buffer(HOST, "weights", 9) in process.buffers


@pytest.mark.parametrize(
    "told",
    [
        None, "CPU", 7, {}, {"CPU": ["weights", 1]}, [None], [[]], [["CPU", "weights"]], [["CPU", "weights", 1, 1]],
        [["CPU", "dreams", 1]], [["CPU", 3, 1]], [[1, "weights", 1]], [["CPU", "weights", "1"]],
        [["CPU", "weights", 1.5]], [["CPU", "weights", -1]], [["CPU", "weights", 0]],
        [["CPU", "weights", BYTES_LIMIT + 1]],
        [["CUDA2", "weights", 1]], [["CUDA-1", "weights", 1]], [["CUDA", "weights", 1]], [["Vulkan0", "weights", 1]],
        [["CUDA0", ["weights"], 1]], [["CPU", "weights", None]],
    ],
)  # fmt: skip
def test_what_makes_no_sense_in_a_childs_report_is_left_out(told: object) -> None:
    """A value without a meaning in a child's report is left out, because the report is not trusted."""
    assert buffers_of(told, NAMED) == ()
    good = [["CPU", "weights", 1]]
    assert buffers_of(good + told if isinstance(told, list) else good, NAMED) == (Buffer(HOST, "weights", 1),)


def test_a_childs_report_is_bounded() -> None:
    """A child's report is read up to a limit."""
    assert buffers_of([["CPU", "weights", 1]] * (10 * BUFFERS_LIMIT), NAMED) == (
        Buffer(HOST, "weights", BUFFERS_LIMIT),
    )


@pytest.mark.parametrize(
    "url",
    [None, 7, "", "http://evil.example", "http://127.0.0.1:80@evil.example", "https://127.0.0.1:1", "http://127.0.0.1"],
)
def test_a_child_that_names_another_address_does_not_serve(url: object) -> None:
    """A child that reports another address does not serve."""
    told = Told()
    LlamaProcess(told, "key").printed(json.dumps({"event": "loaded", "url": url, "num_ctx": 256, "buffers": []}))
    assert not told.loads


@pytest.mark.parametrize(
    ("said", "taken"), [(256, 256), (None, None), ("256", None), (True, None), (0, None), (-5, None)]
)
def test_a_context_that_makes_no_sense_is_not_known(said: object, taken: int | None) -> None:
    """A context without a meaning in a report is unknown, so the requested one counts."""
    loaded = loaded_of({"url": "http://127.0.0.1:1", "num_ctx": said}, {})
    assert loaded is not None and (loaded.num_ctx, loaded.buffers) == (taken, ())


class GpuOfAnotherMachine(DeviceReader):
    """A device reader with two stand-in GPUs, for whose processes the test gives the driver's figures."""

    def __init__(self, held: Mapping[DeviceId, Mapping[int, int]]) -> None:
        super().__init__(gpus=False)
        self.held = held

    def sample(self) -> tuple[DeviceSample, ...]:
        gpus = [DeviceSample(id, "gpu", id, 100, 100) for id in GPUS]
        return (*super().sample(), *gpus)

    def gpu_processes(self) -> Mapping[DeviceId, Mapping[int, int]]:
        return self.held


class Occupant:
    """A runner's process that reports what it occupies."""

    pid = 77
    buffers = ()

    def stop(self, grace_s: float) -> None:
        raise AssertionError("the runner was stopped")

    def memory(self) -> Memory:
        return Memory({HOST: 50, GPUS[0]: 30, GPUS[1]: 20}, 10)

    def settled(self, timeout_s: float) -> None:
        return None

    def healthy(self, timeout_s: float) -> bool:
        return True


def reading(held: Mapping[DeviceId, Mapping[int, int]]) -> Sampled:
    """Return the sample that is posted where the driver reports these figures."""
    posted: list[Event] = []
    workers = ThreadPool("test", 1)
    sampler = MemorySampler(GpuOfAnotherMachine(held), workers, lambda: [(1, Occupant())], posted.append)
    assert sampler.refresh(LIMIT_S)
    assert workers.close(LIMIT_S) == []
    assert isinstance(posted[0], Sampled)
    return posted[0]


def test_n14_the_drivers_figure_counts_where_it_tells_one() -> None:
    """N14: the driver's figure of a process counts where there is one, because it includes the driver's part."""
    sampled = reading({GPUS[0]: {77: 35, 78: 99}, GPUS[1]: {77: 25}})
    assert sampled.resident == ((1, ((GPUS[1], 25), (GPUS[0], 35), (HOST, 50))),)
    assert sampled.mapped == ((1, 10),)


def test_n14_the_engines_account_counts_where_the_driver_tells_none() -> None:
    """N14: the engine's figure counts where the driver has none, as inside a container with other process ids."""
    assert reading({}).resident == ((1, ((GPUS[1], 20), (GPUS[0], 30), (HOST, 50))),)
    assert reading({GPUS[0]: {}, GPUS[1]: {77: 3}}).resident == ((1, ((GPUS[1], 20), (GPUS[0], 30), (HOST, 50))),)


# -- memory of other programs -----------------------------------------------------------------------------------------


def test_n14_memory_that_another_program_takes_is_seen_by_the_next_plan(scheduler: Scheduler) -> None:
    """N14: memory of another program is read before each load, refuses a model, and is free again afterwards."""
    sample, others_bytes = scheduler._devices.sample, 0
    reported_bytes = scheduler.status().devices[0].reported_free_bytes

    def read() -> tuple[DeviceSample, ...]:
        host, *gpus = sample()
        return (replace(host, free_bytes=reported_bytes - others_bytes), *gpus)

    scheduler._devices.sample = read  # type: ignore[method-assign]  # else whatever runs here would have a say
    assert scheduler._executor.refresh(LIMIT_S)
    before = scheduler.status().devices[0]
    held_bytes = before.free_bytes // 4
    large = PythonModel("large", load=object, memory={"cpu": before.free_bytes - held_bytes // 2})
    others_bytes = held_bytes
    with pytest.raises(DoesNotFit, match="other programs"):
        scheduler.acquire(large)
    assert scheduler.status().devices[0].missing_bytes == before.missing_bytes + held_bytes
    others_bytes = 0
    with scheduler.acquire(large):
        assert the_runner(scheduler).state == "ready"


def test_n14_what_a_runner_maps_is_not_given_away_where_the_machine_is_short(scheduler: Scheduler, model: Path) -> None:
    """N14: pages that a runner maps are not free in the ledger, although the machine counts them so."""
    with scheduler.acquire(model, num_ctx=256, use_mmap=True):
        assert_soon(lambda: the_runner(scheduler).shared_bytes > 0)
        device, runner = scheduler.status().devices[0], the_runner(scheduler)
        unclaimed_bytes = device.reported_free_bytes - device.free_bytes
        assert unclaimed_bytes >= runner.held_bytes["cpu"] - runner.private_bytes
