"""Faults of GPUs and drivers, on the real scheduler beside a stand-in for NVIDIA's library: nothing is left over.

What an absent, failing or stalled driver, a lost GPU, or a GPU without memory figures means for one reading is shown in
`test_devices.py` and `test_stalled_driver.py`, and for grants and loads in `test_gpu_scheduling.py`.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from fsm.domain.devices import HOST
from scheduler import AcquireTimeout, DoesNotFit, PythonModel, Scheduler, Settings
from scheduler.devices import device_reader
from tests.support.leaks import no_leaks
from tests.support.nvml import LOST, NO_DRIVER, Gpu, StandIn, beside_stand_in
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import LIMIT_S, assert_soon

GIB = 1 << 30
ONE = Gpu("GPU-11111111-aaaa", total=8 * GIB)
TWO = Gpu("GPU-22222222-bbbb", total=4 * GIB)
RECOVERY_S = 0.3


@contextmanager
def a_scheduler(**settings: Any) -> Iterator[Scheduler]:
    """Yield a scheduler with a short recovery timeout, which leaves nothing behind."""
    with no_leaks(), Scheduler(Settings(**{"cpu_threads": 1, "recovery_timeout": RECOVERY_S, **settings})) as scheduler:
        yield scheduler


@contextmanager
def a_model() -> Iterator[Path]:
    """Yield a model's file."""
    with tempfile.TemporaryDirectory() as folder:
        yield write_tiny_model(Path(folder) / "tiny.gguf", context=256)


def on_gpu(name: str, gpu: Gpu, size: str) -> PythonModel:
    return PythonModel(name, object, memory={gpu.id: size})


# -- a required GPU ----------------------------------------------------------------------------------------------------


@beside_stand_in(library=None)
def test_where_a_gpu_is_required_and_there_is_no_driver_nothing_falls_back(nvml: StandIn) -> None:
    """A required GPU without a driver is a refusal with the reason; without the requirement the host serves."""
    with a_model() as path:
        with a_scheduler(require_gpu=True) as scheduler:
            with pytest.raises(DoesNotFit, match="and there is none"):
                scheduler.acquire(path)
            assert scheduler.status().runners == ()
        with a_scheduler() as scheduler, scheduler.acquire(path) as lease:
            assert lease.chat("hello", max_tokens=2) is not None
            assert [device.id for device in scheduler.status().devices] == [HOST]


@beside_stand_in()
def test_a_required_gpu_that_is_lost_refuses_until_it_is_back(nvml: StandIn) -> None:
    """A required GPU that is lost refuses requests with the problem until it is back."""
    nvml.say(ONE)
    with a_model() as path, a_scheduler(require_gpu=True) as scheduler:
        nvml.say(ONE.but(memory_code=LOST))
        with pytest.raises(DoesNotFit, match="and there is none"):
            scheduler.acquire(path)
        assert scheduler.status().problems == (f"GPU {ONE.id} is left out: GPU is lost",)
        nvml.say(ONE)
        scheduler.acquire(path, num_parallel=1).release()
        assert [list(runner.gpu_layers) for runner in scheduler.status().runners] == [[ONE.id]]


@beside_stand_in()
def test_a_driver_that_fails_is_told_of_and_the_host_is_used(nvml: StandIn) -> None:
    """A driver that fails is reported, and models load on the host."""
    nvml.say(init=NO_DRIVER)
    with a_model() as path, a_scheduler() as scheduler, scheduler.acquire(path) as lease:
        assert lease.chat("hello", max_tokens=2) is not None
        assert len(scheduler.status().problems) == 1 and "driver" in scheduler.status().problems[0].lower()


# -- memory of other programs ------------------------------------------------------------------------------------------


@beside_stand_in()
def test_memory_that_never_comes_back_is_waited_for_so_long_and_no_longer(nvml: StandIn) -> None:
    """Memory that never comes back is waited for until the recovery timeout, and then the plan is without it."""
    nvml.say(ONE)
    with a_scheduler() as scheduler:
        scheduler.acquire(on_gpu("a", ONE, "6GiB")).release()
        nvml.say(ONE.but(free=2 * GIB))
        scheduler._executor.refresh(LIMIT_S)
        begin = time.monotonic()
        scheduler.expire(on_gpu("a", ONE, "6GiB"))
        assert_soon(lambda: scheduler.status().runners == ())
        assert RECOVERY_S <= time.monotonic() - begin < LIMIT_S
        with pytest.raises(DoesNotFit) as refused:
            scheduler.acquire(on_gpu("b", ONE, "6GiB"))
        assert refused.value.free_bytes[ONE.id] == 2 * GIB
        scheduler.acquire(on_gpu("c", ONE, "1GiB")).release()


@beside_stand_in()
def test_memory_that_others_take_while_a_runner_leaves_is_not_counted_on(nvml: StandIn) -> None:
    """A request does not start in memory that another program took during an eviction, and starts when it is back."""
    nvml.say(ONE)
    with a_scheduler(min_residency=0) as scheduler:
        leaving = threading.Event()
        model = PythonModel("a", object, lambda _: leaving.wait(LIMIT_S), memory={ONE.id: "6GiB"})
        scheduler.acquire(model).release()
        nvml.say(ONE.but(free=2 * GIB))
        scheduler._executor.refresh(LIMIT_S)
        waiting = scheduler.submit(on_gpu("b", ONE, "6GiB"))
        assert_soon(lambda: [runner.state for runner in scheduler.status().runners] == ["expiring"])
        nvml.say(ONE.but(free=3 * GIB))
        leaving.set()
        error = waiting.exception(LIMIT_S)
        assert isinstance(error, DoesNotFit) and error.free_bytes[ONE.id] == 3 * GIB
        nvml.say(ONE)
        scheduler.acquire(on_gpu("b", ONE, "6GiB")).release()


@beside_stand_in()
def test_what_lived_on_a_gpu_that_is_lost_can_leave(nvml: StandIn) -> None:
    """A runner on a lost GPU can be stopped: its memory is waited for until the timeout and its reservation ends."""
    nvml.say(ONE, TWO)
    with a_scheduler() as scheduler:
        lease = scheduler.acquire(on_gpu("a", TWO, "3GiB"))
        nvml.say(ONE, TWO.but(memory_code=LOST))
        scheduler._executor.refresh(LIMIT_S)
        assert [device.id for device in scheduler.status().devices] == [HOST, ONE.id]
        lease.release()
        scheduler.expire(on_gpu("a", TWO, "3GiB"))
        assert_soon(lambda: scheduler.status().runners == ())
        nvml.say(ONE, TWO)
        scheduler.acquire(on_gpu("b", TWO, "3GiB")).release()


@beside_stand_in()
def test_a_real_child_that_is_killed_gives_its_gpu_back(nvml: StandIn) -> None:
    """A killed child's GPU memory is free by the driver's figures, and a waiting request is served by a new child."""
    nvml.say(TWO)
    with a_model() as path, a_scheduler() as scheduler:
        with scheduler.acquire(path, num_parallel=1) as lease:
            assert [list(runner.gpu_layers) for runner in scheduler.status().runners] == [[TWO.id]]
            psutil.Process(lease.pid).kill()
            assert_soon(lambda: lease.lost, 1.0)
        with scheduler.acquire(path, num_parallel=1) as lease:
            assert lease.chat("hello", max_tokens=2) is not None


# -- the end -----------------------------------------------------------------------------------------------------------


@beside_stand_in()
def test_close_while_memory_is_waited_for_returns(nvml: StandIn) -> None:
    """A close during a memory recovery returns in its time, and waiting requests are answered."""
    nvml.say(ONE)
    with a_scheduler(recovery_timeout=600, stop_grace="100ms") as scheduler:
        scheduler.acquire(on_gpu("a", ONE, "6GiB")).release()
        nvml.say(ONE.but(free=2 * GIB))
        scheduler._executor.refresh(LIMIT_S)
        scheduler.expire(on_gpu("a", ONE, "6GiB"))
        with pytest.raises(AcquireTimeout, match="memory"):
            scheduler.acquire(on_gpu("b", ONE, "6GiB"), timeout="100ms")
        waiting = scheduler.submit(on_gpu("b", ONE, "6GiB"))
        begin = time.monotonic()
        scheduler.close(0)
        assert time.monotonic() - begin < LIMIT_S
        assert waiting.exception(LIMIT_S) is not None


@beside_stand_in()
def test_close_while_the_driver_is_stuck_leaves_only_the_thread_in_its_hands(nvml: StandIn) -> None:
    """A close beside a stalled driver leaves one thread, which ends when the driver returns."""
    nvml.say(ONE)
    device_reader.ANSWER_S = 0.5
    with no_leaks():
        with Scheduler(Settings(recovery_timeout=RECOVERY_S)) as scheduler:
            scheduler.acquire(on_gpu("a", ONE, "1GiB")).release()
            nvml.say(ONE, stall="nvmlDeviceGetMemoryInfo_v2")
            waiting = scheduler.submit(on_gpu("b", ONE, "1GiB"))
            assert_soon(lambda: any("has not answered" in problem for problem in scheduler.status().problems))
            scheduler.close(0)
            assert waiting.done()
        nvml.say(ONE)
