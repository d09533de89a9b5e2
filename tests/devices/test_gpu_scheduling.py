"""The scheduler over GPUs, with real threads and processes, beside a stand-in for NVIDIA's library."""

from __future__ import annotations

import functools
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from fsm.domain.devices import HOST
from scheduler import DoesNotFit, PythonModel, Scheduler, Settings, WouldDeadlock
from scheduler.devices import device_reader
from scheduler.runtime import executor
from tests.support.nvml import LOST, NOT_SUPPORTED, Gpu, StandIn, beside_stand_in
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import assert_soon

GIB = 1 << 30
ONE = Gpu("GPU-11111111-aaaa", total=8 * GIB)
TWO = Gpu("GPU-22222222-bbbb", total=4 * GIB)


def an_object(name: str, **memory: str) -> PythonModel:
    """Return a model that loads at once; `memory` is by device, "cpu" or the stand-in's GPUs."""
    return PythonModel(name, lambda: name, memory=memory or {"cpu": "1MiB"})


def on_gpu(name: str, gpu: Gpu, size: str) -> PythonModel:
    return an_object(name, **{gpu.id: size})


def a_scheduler(**settings: Any) -> Scheduler:
    """Return a scheduler with a short recovery timeout, since the stand-in's memory never changes."""
    return Scheduler(Settings(**{"cpu_threads": 1, "recovery_timeout": "0.3s", **settings}))


def loaded(scheduler: Scheduler) -> set[str]:
    """Return the names of the models that are in memory."""
    return {runner.model for runner in scheduler.status().runners if runner.state in ("ready", "idle")}


# -- a driver that does not answer ------------------------------------------------------------------------------------


@beside_stand_in()
def test_d15_a_stalled_driver_holds_up_no_grant_and_no_load(nvml: StandIn) -> None:
    """D15: beside a stalled driver warm requests are granted at once, and a load on the host waits once."""
    nvml.say(ONE)
    with a_scheduler() as scheduler:
        scheduler.acquire(an_object("warm")).release()
        nvml.say(ONE, stall="nvmlDeviceGetMemoryInfo_v2")
        cold = scheduler.submit(an_object("cold"))
        began = time.monotonic()
        grants = 0
        while not cold.done():
            scheduler.acquire(an_object("warm")).release()
            assert time.monotonic() - began < 20.0, "the load on the host waited for the driver"
            grants += 1
        assert grants > 10, "warm requests waited for the driver"
        cold.result().release()
        answer_s, device_reader.ANSWER_S, executor._FRESH_S = (
            device_reader.ANSWER_S,
            60.0,
            60.0,
        )  # as long as one more wait would take
        began = time.monotonic()
        scheduler.acquire(an_object("next")).release()
        assert time.monotonic() - began < 10.0, "the next load waited once more"
        device_reader.ANSWER_S = answer_s
        assert_soon(lambda: any("has not answered" in problem for problem in scheduler.status().problems))
    nvml.say(ONE)


@beside_stand_in()
def test_a_scheduler_starts_beside_a_driver_that_does_not_answer(nvml: StandIn) -> None:
    """A scheduler starts beside a stalled driver with the host, reports the problem, and finds the GPUs later."""
    device_reader.FIRST_ANSWER_S = 0.5
    nvml.say(ONE, stall="nvmlInitWithFlags")
    with a_scheduler() as scheduler:
        scheduler.acquire(an_object("a")).release()
        assert [device.id for device in scheduler.status().devices] == [HOST]
        assert_soon(lambda: any("has not answered" in problem for problem in scheduler.status().problems))
        nvml.say(ONE)
        assert_soon(lambda: not scheduler.status().problems)
        scheduler.acquire(on_gpu("b", ONE, "1GiB")).release()
        assert [device.id for device in scheduler.status().devices] == [HOST, ONE.id]


@beside_stand_in()
def test_d17_closing_beside_a_stalled_driver_returns(nvml: StandIn) -> None:
    """D17: a close beside a stalled driver leaves one thread, which ends when the driver returns."""
    nvml.say(ONE)
    scheduler = a_scheduler()
    scheduler.acquire(an_object("a")).release()
    nvml.say(ONE, stall="nvmlDeviceGetCount_v2")
    scheduler.submit(an_object("b")).result(20.0).release()
    began = time.monotonic()
    scheduler.close()
    assert time.monotonic() - began < 10.0
    assert [each.name for each in threading.enumerate() if each.name.startswith("loadmaster")] == ["loadmaster-gpus"]
    nvml.say(ONE)
    assert_soon(lambda: not [each for each in threading.enumerate() if each.name.startswith("loadmaster")])


@beside_stand_in()
def test_a_runner_that_leaves_a_gpu_whose_driver_stalls_is_waited_for_in_vain_but_not_for_ever(nvml: StandIn) -> None:
    """A runner that leaves a GPU with a stalled driver is waited for until the recovery timeout."""
    nvml.say(ONE)
    with a_scheduler(recovery_timeout="1s", max_runners=1) as scheduler:
        scheduler.acquire(on_gpu("a", ONE, "6GiB")).release()
        nvml.say(ONE, stall="nvmlDeviceGetMemoryInfo_v2")
        with scheduler.acquire(on_gpu("b", ONE, "6GiB"), timeout="20s"):
            assert loaded(scheduler) == {"b"}
    nvml.say(ONE)


# -- several at once --------------------------------------------------------------------------------------------------


@beside_stand_in()
def test_two_gpus_load_at_once_and_each_waits_for_its_own_memory(nvml: StandIn) -> None:
    """D12, S24: a request for one GPU waits for its memory while a request for the other is loaded."""
    nvml.say(ONE, TWO)
    entered = {name: threading.Event() for name in "bcd"}
    go_on = threading.Event()

    def load(name: str) -> str:
        entered[name].set()
        assert go_on.wait(20.0)
        return name

    def a_slow_object(name: str, gpu: Gpu, size: str) -> PythonModel:
        return PythonModel(name, functools.partial(load, name), memory={gpu.id: size})

    with a_scheduler(recovery_timeout="600s") as scheduler:
        both = [scheduler.submit(a_slow_object("b", TWO, "1GiB")), scheduler.submit(a_slow_object("c", ONE, "6GiB"))]
        assert entered["b"].wait(20.0) and entered["c"].wait(20.0), "one GPU's load waited for the other's"
        nvml.say(ONE.but(free=2 * GIB), TWO)  # the memory of the second load, which stays taken
        go_on.set()
        for future in both:
            future.result(20.0).release()
        assert_soon(lambda: {each.id: each.free_bytes for each in scheduler.status().devices}[ONE.id] == 2 * GIB)
        scheduler.expire(a_slow_object("c", ONE, "6GiB"))
        waiting = scheduler.submit(a_slow_object("d", ONE, "6GiB"))
        assert_soon(lambda: any("being freed" in wait.waits_for for wait in scheduler.status().queue))
        scheduler.acquire(on_gpu("e", TWO, "1GiB"), timeout="20s").release()
        assert not entered["d"].is_set()
        nvml.say(ONE, TWO)
        waiting.result(20.0).release()


# -- memory and GPUs that come and go ---------------------------------------------------------------------------------


@beside_stand_in()
def test_memory_that_another_program_takes_is_not_promised(nvml: StandIn) -> None:
    """A model that does not fit beside another program's memory is refused, and loads when the memory is back."""
    nvml.say(ONE.but(free=1 * GIB))
    with a_scheduler() as scheduler:
        with pytest.raises(DoesNotFit) as refused:
            scheduler.acquire(on_gpu("a", ONE, "6GiB"))
        assert refused.value.free_bytes[ONE.id] == GIB
        nvml.say(ONE)
        scheduler.acquire(on_gpu("a", ONE, "6GiB")).release()


@beside_stand_in()
def test_a_lost_gpu_takes_no_more_models_and_the_others_do(nvml: StandIn) -> None:
    """A lost GPU takes no more models and is reported, and takes models again when it is back."""
    nvml.say(ONE, TWO)
    with a_scheduler() as scheduler:
        scheduler.acquire(on_gpu("a", TWO, "1GiB")).release()
        nvml.say(ONE.but(memory_code=LOST), TWO)
        scheduler.acquire(on_gpu("b", TWO, "1GiB")).release()
        assert [device.id for device in scheduler.status().devices] == [HOST, TWO.id]
        assert scheduler.status().problems == (f"GPU {ONE.id} is left out: GPU is lost",)
        with pytest.raises(DoesNotFit):
            scheduler.acquire(on_gpu("c", ONE, "1GiB"))
        nvml.say(ONE, TWO)
        scheduler.acquire(on_gpu("c", ONE, "1GiB")).release()
        assert loaded(scheduler) == {"a", "b", "c"}


@beside_stand_in()
def test_u08_d16_gpus_that_come_and_go_change_no_number_of_runners(nvml: StandIn) -> None:
    """U08, S10, D16: memory alone decides how many run, with GPUs and without them."""
    nvml.say()
    with a_scheduler(eviction="lru", max_wait=0) as scheduler:
        for gpus, names in (((), "abcd"), ((ONE, TWO), "efgh"), ((), "ijkl")):
            nvml.say(*gpus)
            for name in names:
                scheduler.acquire(an_object(name)).release()
        assert loaded(scheduler) == set("abcdefghijkl")


@beside_stand_in()
def test_n03_an_integrated_gpu_is_shown_with_the_hosts_figures(nvml: StandIn) -> None:
    """N03: what an object holds on an integrated GPU is held of the host's memory, once."""
    nvml.say(Gpu("GPU-i", memory_code=NOT_SUPPORTED, capability=(8, 7)))
    with a_scheduler(memory_limit="512MiB") as scheduler:
        with scheduler.acquire(an_object("a", **{"GPU-i": "300MiB"})):
            host, gpu = scheduler.status().devices
            assert (gpu.integrated, gpu.capacity_bytes, gpu.held_bytes) == (True, 512 << 20, 300 << 20)
            assert (host.held_bytes, host.free_bytes) == (gpu.held_bytes, gpu.free_bytes)
            with pytest.raises(WouldDeadlock):  # there is room for one of them at a time
                scheduler.reserve("GPU-i", "400MiB", timeout="0.1s")
        with scheduler.reserve("GPU-i", "200MiB"):
            host, gpu = scheduler.status().devices
            assert host.held_bytes == gpu.held_bytes >= 200 << 20


# -- what children see ------------------------------------------------------------------------------------------------


def seen_by_child(scheduler: Scheduler, folder: Path, name: str, **asking: Any) -> tuple[list[str], dict[str, str]]:
    """Load a model in a child; return the GPUs of its placement, and the child's environment."""
    with scheduler.acquire(write_tiny_model(folder / f"{name}.gguf"), num_ctx=256, num_parallel=1, **asking):
        (runner,) = [each for each in scheduler.status().runners if each.model == name]
        return list(runner.gpu_layers), psutil.Process(runner.pid).environ()


@beside_stand_in(CUDA_VISIBLE_DEVICES="1,GPU-1111", CUDA_DEVICE_ORDER="PCI_BUS_ID")
def test_a_child_sees_exactly_the_gpus_of_its_placement(nvml: StandIn) -> None:
    """A child sees the GPUs of its placement by their ids, in the order of its layers."""
    nvml.say(ONE, TWO, Gpu("GPU-33333333-cccc", total=16 * GIB))
    with tempfile.TemporaryDirectory() as name, a_scheduler() as scheduler:
        folder = Path(name)
        gpus, environment = seen_by_child(scheduler, folder, "most")
        assert (gpus, environment["CUDA_VISIBLE_DEVICES"]) == ([ONE.id], ONE.id)
        gpus, environment = seen_by_child(scheduler, folder, "first", main_gpu=0)
        assert (gpus, environment["CUDA_VISIBLE_DEVICES"]) == ([TWO.id], TWO.id)
        gpus, environment = seen_by_child(scheduler, folder, "none", num_gpu=0)
        assert (gpus, environment["CUDA_VISIBLE_DEVICES"]) == ([], "")


@beside_stand_in(CUDA_VISIBLE_DEVICES="1,0")
def test_a_child_of_a_split_model_sees_its_gpus_in_the_order_of_its_layers(nvml: StandIn) -> None:
    """The shares that llama.cpp gets are in the order of the layers."""
    nvml.say(ONE, TWO)
    with tempfile.TemporaryDirectory() as name, a_scheduler(spread_over_gpus=True) as scheduler:
        gpus, environment = seen_by_child(scheduler, Path(name), "split")
        assert sorted(gpus) == sorted([ONE.id, TWO.id])
        assert environment["CUDA_VISIBLE_DEVICES"] == ",".join(gpus)


@beside_stand_in()
def test_a_child_on_an_instance_sees_that_instance_and_nothing_else(nvml: StandIn) -> None:
    """A child on an instance sees that instance alone, and nothing is split over instances."""
    instances = [Gpu("MIG-aaaa", total=2 * GIB), Gpu("MIG-bbbb", total=3 * GIB)]
    nvml.say(Gpu("GPU-d", instances=instances))
    with tempfile.TemporaryDirectory() as name, a_scheduler(spread_over_gpus=True) as scheduler:
        gpus, environment = seen_by_child(scheduler, Path(name), "small")
        assert (gpus, environment["CUDA_VISIBLE_DEVICES"]) == (["MIG-bbbb"], "MIG-bbbb")
