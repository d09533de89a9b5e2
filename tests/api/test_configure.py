"""Limits that a program changes while it runs, and how settings reach the core."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from fsm.domain.options import Options
from fsm.messages.decision_log import Transition
from fsm.messages.reasons import WaitFor
from fsm.state.core_config import CoreConfig
from scheduler import (
    InvalidSettings,
    Lease,
    PythonModel,
    QueueFull,
    Scheduler,
    SchedulerClosed,
    SchedulerForked,
    Settings,
)
from scheduler.api.environment import llama_engine
from scheduler.api.scheduler import limits_of
from scheduler.devices.device_reader import DeviceReader
from tests.support.leaks import no_leaks
from tests.support.models import a_model
from tests.support.nvml import Gpu, StandIn, beside_stand_in
from tests.support.pool import a_pool, acquire, exited, expire, launched
from tests.support.real import settings, write_models
from tests.support.waiting import LIMIT_S, assert_soon


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with no_leaks():
        yield


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    """Yield a scheduler with room for two objects of 400 MiB, the least recently used of which is evicted first."""
    with Scheduler(Settings(memory_limit="1000MiB", gpus=False, eviction="lru", close_timeout="5s")) as scheduler:
        yield scheduler


def an_object(name: str, size: str = "400MiB", **how: Any) -> PythonModel:
    """Return an object that loads at once."""
    return PythonModel(name, load=lambda: f"<{name}>", memory={"cpu": size}, **how)


def states(scheduler: Scheduler) -> dict[str, str]:
    return {runner.model: runner.state for runner in scheduler.status().runners}


def preload(scheduler: Scheduler, *names: str, **how: Any) -> None:
    for name in names:
        scheduler.preload(an_object(name), **how).result(LIMIT_S)


# -- each limit -------------------------------------------------------------------------------------------------------


def test_a_lower_memory_limit_holds_when_configure_returns(scheduler: Scheduler) -> None:
    """After `configure` with a lower memory limit, the status has the limit, and idle runners are being evicted."""
    preload(scheduler, "a", "b")
    scheduler.configure(memory_limit="500MiB")
    assert scheduler.status().devices[0].capacity_bytes == scheduler.settings.memory_limit == 500 << 20
    assert_soon(lambda: states(scheduler) == {"b": "idle"})


def test_a_higher_memory_limit_lets_those_who_wait_start(scheduler: Scheduler) -> None:
    """A higher memory limit starts waiting requests at once, and None is all memory there is."""
    with scheduler.acquire(an_object("a")), scheduler.acquire(an_object("b")):
        waiting = scheduler.submit(an_object("c"))
        assert_soon(lambda: len(scheduler.status().queue) == 1)
        scheduler.configure(memory_limit=None)
        assert scheduler.settings.memory_limit is None
        waiting.result(LIMIT_S).release()


def test_a_busy_model_leaves_a_lower_memory_limit_after_its_last_lease(scheduler: Scheduler) -> None:
    """A busy runner beyond a lower memory limit is stopped after its last release, and its lease is not revoked."""
    with scheduler.acquire(an_object("a")) as lease:
        scheduler.configure(memory_limit="100MiB")
        assert (lease.value, states(scheduler)) == ("<a>", {"a": "ready"})
    assert_soon(lambda: states(scheduler) == {})


def test_a_lower_number_of_runners_holds_for_idle_ones_at_once(scheduler: Scheduler) -> None:
    """A lower number of runners stops idle ones at once and busy ones when they become idle, as the events say."""
    with scheduler.events() as events, scheduler.acquire(an_object("b")) as lease:
        preload(scheduler, "a")
        scheduler.configure(max_runners=1)
        assert_soon(lambda: states(scheduler) == {"b": "ready"})
        lease.release()
        assert states(scheduler) == {"b": "idle"}
        scheduler.close()
        reasons = [entry.reason for entry in events if isinstance(entry, Transition) and entry.trigger == "expire"]
    assert reasons[0] == "no more than 1 runner may be alive"


def test_a_shorter_queue_refuses_who_comes_next(scheduler: Scheduler) -> None:
    """A shorter queue refuses the next request and keeps the requests that wait."""
    with scheduler.acquire(an_object("a", "900MiB")) as lease:
        waiting = [scheduler.submit(an_object(name, "800MiB")) for name in "bc"]
        assert_soon(lambda: len(scheduler.status().queue) == 2)
        scheduler.configure(max_queue=1)
        with pytest.raises(QueueFull) as caught:
            scheduler.acquire(an_object("d", "800MiB"))
        assert caught.value.limit == 1
        lease.release()
        for future in waiting:
            future.result(LIMIT_S).release()


def test_s23_a_changed_keep_alive_holds_for_loaded_models_but_where_one_was_named(scheduler: Scheduler) -> None:
    """S23: a changed keep-alive holds for runners that have the setting's, and "forever" is shown as infinite."""
    preload(scheduler, "a")
    preload(scheduler, "b", keep_alive="1h")
    scheduler.configure(keep_alive=0)
    assert_soon(lambda: states(scheduler) == {"b": "idle"})
    scheduler.configure(keep_alive="forever")
    assert scheduler.settings.keep_alive == math.inf
    preload(scheduler, "c")
    left = {runner.model: runner.expires_in_s for runner in scheduler.status().runners}
    assert 3500 < left["b"] < 3601 and left["c"] == math.inf


# -- all of them or none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"max_queue": 0}, "max_queue"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"max_wait": "1s"}, "max_wait"),
        ({"max_qeueu": 3}, "max_qeueu"),
    ],
)
def test_a_wrong_limit_leaves_all_of_them_as_they_were(scheduler: Scheduler, wrong: Any, name: str) -> None:
    """A wrong limit in a call leaves all limits as they were."""
    preload(scheduler, "a", "b")
    before = scheduler.settings
    with pytest.raises(InvalidSettings) as caught:
        scheduler.configure(memory_limit="500MiB", max_runners=1, **wrong)
    assert caught.value.name == name
    assert scheduler.settings == before
    assert states(scheduler) == {"a": "idle", "b": "idle"}
    assert scheduler.status().devices[0].capacity_bytes == 1000 << 20


def test_what_is_not_named_keeps_its_value(scheduler: Scheduler) -> None:
    """A limit that a call does not name keeps its value."""
    before = scheduler.settings
    scheduler.configure(max_queue=7)
    scheduler.configure(max_runners=3, keep_alive="1m")
    scheduler.configure()
    assert scheduler.settings == replace(before, max_queue=7, max_runners=3, keep_alive=60)


# -- from anywhere ----------------------------------------------------------------------------------------------------


def work_by(scheduler: Scheduler) -> tuple[int, int, float]:
    """Return the limits that the core uses."""
    limits = scheduler.debug_state().snapshot.limits
    return limits.max_queue, limits.max_runners, limits.keep_alive_s


def shown(scheduler: Scheduler) -> tuple[int, int, float]:
    """Return the same limits as the settings show them."""
    return scheduler.settings.max_queue, scheduler.settings.max_runners, scheduler.settings.keep_alive


def test_many_threads_may_change_limits_at_once(scheduler: Scheduler) -> None:
    """Limits that many threads change at once are the same in the settings and in the core."""

    def change(number: int) -> None:
        limits: list[Any] = [{"max_queue": 100 + number}, {"max_runners": 100 + number}, {"keep_alive": 100 + number}]
        scheduler.configure(**limits[number % 3])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(change, range(60)))
    assert shown(scheduler) == work_by(scheduler)
    assert all(value >= 100 for value in shown(scheduler))


def test_a_signal_handler_may_change_limits_in_the_middle_of_a_change(scheduler: Scheduler) -> None:
    """A signal handler may change limits while its thread is changing some, and both changes hold."""
    told: list[int] = []

    def change(*_: object) -> None:
        told.append(1000 + len(told))
        scheduler.configure(max_runners=told[-1])

    old = signal.signal(signal.SIGUSR1, change)
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(0.0005):
            os.kill(os.getpid(), signal.SIGUSR1)

    teller = threading.Thread(target=tell)
    try:
        teller.start()
        number = 0
        while number < 200 or len(told) < 20:
            number += 1
            scheduler.configure(max_queue=number)
    finally:
        ended.set()
        teller.join(LIMIT_S)
        signal.signal(signal.SIGUSR1, old)
    assert scheduler.settings.max_queue == number
    assert scheduler.settings.max_runners >= 1000
    assert shown(scheduler) == work_by(scheduler)


def test_a_callback_may_change_limits(scheduler: Scheduler) -> None:
    """A callback may change limits, as it runs on a thread of its own."""
    done: Future[None] = Future()

    def change(future: Future[Lease]) -> None:
        future.result().release()
        scheduler.configure(memory_limit="100MiB", keep_alive=0)
        done.set_result(None)

    scheduler.submit(an_object("a")).add_done_callback(change)
    done.result(LIMIT_S)
    assert_soon(lambda: states(scheduler) == {})


def test_an_event_loop_may_change_limits(scheduler: Scheduler) -> None:
    """An event loop may change limits, which waits for a reading of the devices at most."""

    async def main() -> None:
        async with scheduler.acquire_async(an_object("a")):
            scheduler.configure(max_runners=1, memory_limit="600MiB")

    asyncio.run(main())
    assert states(scheduler) == {"a": "idle"}


def test_after_the_close_there_is_nothing_to_change(scheduler: Scheduler) -> None:
    """A change of limits after the close raises SchedulerClosed."""
    scheduler.close()
    with pytest.raises(SchedulerClosed):
        scheduler.configure(max_queue=3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_changes_nothing(scheduler: Scheduler) -> None:
    """A forked child cannot change limits, even if another thread was changing some at the fork."""
    entered, leave = threading.Event(), threading.Event()

    def change() -> None:
        with scheduler._configuring:
            entered.set()
            leave.wait(LIMIT_S)

    changer = threading.Thread(target=change)
    changer.start()
    entered.wait(LIMIT_S)
    if (pid := os.fork()) == 0:
        signal.alarm(int(LIMIT_S))  # ends the child if it hangs
        try:
            scheduler.configure(max_queue=9)
        except SchedulerForked:
            os._exit(7)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    leave.set()
    changer.join(LIMIT_S)
    assert os.waitstatus_to_exitcode(status) == 7


# -- where settings go ------------------------------------------------------------------------------------------------


def test_every_setting_that_the_core_works_by_reaches_it() -> None:
    """Every setting of the core reaches the core's configuration under its own name."""
    limits = limits_of(
        Settings(
            max_queue=3, max_runners=4, keep_alive=5, max_wait=6, min_residency=7, load_timeout=8, recovery_timeout=9,
            max_loads_per_gpu=10, max_host_loads=11, prefetch=False, cpu_threads=15, spread_over_gpus=True,
            require_gpu=True, lock_folder=None, measurement_file=None, stop_grace=16, max_leases=17,
        )
    )  # fmt: skip
    assert limits == CoreConfig(
        max_queue=3, max_runners=4, keep_alive_s=5.0, max_wait_s=6.0, min_residency_s=7.0, load_timeout_s=8.0,
        recovery_timeout_s=9.0, max_loads_per_gpu=10, max_host_loads=11, prefetches=0, cpu_threads=15,
        spread_over_gpus=True, require_gpu=True, stop_timeout_s=26.0, max_leases=17,
    )  # fmt: skip


def test_every_option_that_the_settings_name_reaches_the_engine() -> None:
    """A setting of an option decides what is left open, and larger contexts are offered only where a setting asks."""
    settings = Settings(num_ctx=12, num_batch=14, num_parallel=13, flash_attention=True, cache_type="q8_0")
    info = replace(a_model(), key_length=32, value_length=32)
    (load,) = llama_engine(settings).profile(info, [Options()]).resolutions[0].loads
    assert load.options == Options(
        12, 14, num_parallel=13, flash_attention=True, cache_type_k="q8_0", cache_type_v="q8_0", draft_num_predict=0,
        context_shift=False,
    )  # fmt: skip
    for larger in (False, True):
        engine = llama_engine(Settings(auto_context_from_vram=larger))
        loads = engine.profile(replace(info, context_trained=10**6), [Options()]).resolutions[0].loads
        assert [load.options.num_ctx for load in loads] == ([262144, 32768, 4096] if larger else [4096])


def test_without_settings_the_core_works_by_its_own_defaults() -> None:
    """The defaults of the settings are the defaults of the core."""
    given, own = limits_of(Settings(lock_folder=None, measurement_file=None)), CoreConfig()
    assert {each.name: getattr(given, each.name) for each in fields(CoreConfig)} == {
        each.name: getattr(own, each.name) for each in fields(CoreConfig)
    }


@pytest.mark.parametrize(("stop_grace", "late"), [("2s", "14s"), ("60s", "65s"), ("forever", "1000h")])
def test_who_needs_the_memory_of_what_was_stopped_waits_for_as_long_as_it_may_take_to_end(
    stop_grace: str, late: str
) -> None:
    """A request for the memory of a stopped runner waits for as long as the setting allows the stop to take."""
    stop_timeout_s = limits_of(Settings(stop_grace=stop_grace)).stop_timeout_s
    pool = a_pool(capacity="5GiB", sizes={"a": "3GiB", "b": "4GiB"}, stop_timeout_s=stop_timeout_s).idle("a")
    pool.feed(expire("a"), acquire("b", request=9))
    pool.advance(late)
    assert pool.waits_for(9) == WaitFor.memory
    assert launched(pool.feed(exited(pool.runner("a"))))


@beside_stand_in()
def test_a_reserve_is_kept_free_on_each_gpu_with_memory_of_its_own(nvml: StandIn) -> None:
    """A reserve is subtracted from capacity and free memory of each GPU with memory of its own."""
    nvml.say(Gpu("GPU-a", total=1000, free=800), Gpu("GPU-b", total=1000, free=100), Gpu("GPU-c", memory_code=3))
    devices = DeviceReader(gpu_reserve_bytes=(("", 300),))
    host, first, second, integrated = devices.sample()
    assert (first.capacity_bytes, first.free_bytes) == (700, 500)
    assert (second.capacity_bytes, second.free_bytes) == (700, -200)
    assert (integrated.integrated, integrated.capacity_bytes) == (True, host.capacity_bytes)
    devices.close()


def test_settings_decide_what_real_models_are_loaded_with(tmp_path: Path) -> None:
    """A model whose heads are too small for the quantised cache of the settings loads with the usual cache."""
    pytest.importorskip("xllamacpp")
    path = write_models(tmp_path, "a") / "a.gguf"
    with Scheduler(settings(num_ctx=256, num_parallel=2, cache_type="q8_0")) as scheduler:
        with scheduler.acquire(path) as lease:
            assert lease.complete("x", max_tokens=4)
        (runner,) = scheduler.status().runners
    assert (runner.options.num_ctx, runner.options.num_parallel) == (256, 2)
    assert (runner.options.cache_type_k, runner.options.cache_type_v) == ("f16", "f16")


def test_a_scheduler_takes_the_references_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler without settings takes the reference's variables from the environment."""
    for name, text in {"OLLAMA_MAX_QUEUE": "7", "OLLAMA_CONTEXT_LENGTH": "1024", "LOADMASTER_GPUS": "no"}.items():
        monkeypatch.setenv(name, text)
    with Scheduler() as scheduler:
        assert (scheduler.settings.max_queue, scheduler.settings.num_ctx) == (7, 1024)
