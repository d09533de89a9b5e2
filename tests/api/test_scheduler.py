"""The public API, with objects as models: grants, waits, errors, events, and what is left after a close."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import wait as wait_for
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fsm.core import Core
from fsm.domain.devices import HOST
from fsm.machine.request import ModelId, RequestId
from fsm.messages.decision_log import Decision, Transition
from fsm.messages.events import Release
from fsm.sizing.footprint import Footprint
from fsm.sizing.model_profile import ModelProfile
from fsm.verification.property import Violated
from scheduler import (
    AcquireTimeout,
    DoesNotFit,
    Gap,
    InvalidModel,
    InvalidSettings,
    Lease,
    LeaseReleased,
    LoadFailed,
    ModelNotFound,
    ModelSpec,
    PythonModel,
    QueueFull,
    Scheduler,
    SchedulerBroken,
    SchedulerClosed,
    SchedulerForked,
    Settings,
    UnsupportedOption,
)
from scheduler.api import scheduler as scheduler_module
from scheduler.engines.python import PythonEngine
from scheduler.models.measurement_store import Identity
from scheduler.runtime.executor import _WORKERS
from tests.support.invariants import check_scheduler
from tests.support.leaks import no_leaks
from tests.support.waiting import LIMIT_S, assert_soon


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with no_leaks():
        yield


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    """Yield a scheduler with room for two objects of 400 MiB, the least recently used of which is evicted first."""
    with Scheduler(Settings(memory_limit="1000MiB", eviction="lru", close_timeout="5s")) as scheduler:
        yield scheduler


class Gate:
    """A load or unload that returns when the gate is opened."""

    def __init__(self, value: object = "value") -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        self.value = value

    def __call__(self, *_: object) -> object:
        self.entered.set()
        assert self.open.wait(LIMIT_S)
        return self.value


def a_model(name: str, size: str = "400MiB", **fields: Any) -> PythonModel:
    """Return an object that loads at once."""
    return PythonModel(name, memory={"cpu": size}, **{"load": lambda: f"<{name}>", **fields})


def states(scheduler: Scheduler) -> dict[str, str]:
    """Return the state of each model's newest runner."""
    return {runner.model: runner.state for runner in scheduler.status().runners}


def off_main(action: Callable[[], Any]) -> Any:
    """Run `action` on another thread and return what it returns, or raise what it raises."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        return future.result(LIMIT_S)
    finally:
        thread.join(LIMIT_S)


# -- leases ------------------------------------------------------------------------------------------------------------


def test_a_lease_gives_the_object_and_its_release_lets_it_rest(scheduler: Scheduler) -> None:
    """S02, S17, S18: a lease gives the object, and after its release the runner is idle and keeps it loaded."""
    with scheduler.acquire(a_model("a")) as lease:
        assert lease.value == "<a>"
        assert states(scheduler) == {"a": "ready"}
    assert states(scheduler) == {"a": "idle"}
    with scheduler.acquire(a_model("a")) as again:
        assert again.runner == lease.runner


def test_two_leases_share_one_runner(scheduler: Scheduler) -> None:
    """S06: two leases of a model share one runner."""
    with scheduler.acquire(a_model("a")) as first, scheduler.acquire(a_model("a")) as second:
        assert first.runner == second.runner
        assert [runner.leases for runner in scheduler.status().runners] == [2]


def test_releasing_twice_is_harmless(scheduler: Scheduler) -> None:
    """D05: a second release of a lease does not release another one."""
    first, second = scheduler.acquire(a_model("a")), scheduler.acquire(a_model("a"))
    first.release()
    first.release()
    assert [runner.leases for runner in scheduler.status().runners] == [1]
    second.release()
    with pytest.raises(LeaseReleased):
        assert second.value


def test_a_lost_lease_is_released_with_a_warning(scheduler: Scheduler) -> None:
    """S02, D17: a lease that its holder forgets is released by the garbage collector with a warning."""
    lease = scheduler.acquire(a_model("a"))
    with pytest.warns(ResourceWarning, match="never released"):
        del lease
        gc.collect()
    assert_soon(lambda: states(scheduler) == {"a": "idle"})


def test_an_exception_inside_the_with_block_releases_the_lease(scheduler: Scheduler) -> None:
    """An exception inside a with block is raised, and the lease is released."""
    with pytest.raises(ZeroDivisionError), scheduler.acquire(a_model("a")):
        raise ZeroDivisionError
    assert_soon(lambda: states(scheduler) == {"a": "idle"})


def test_keep_alive_zero_unloads_at_the_last_release(scheduler: Scheduler) -> None:
    """S18, S23: a keep-alive of 0 unloads the model at the last release."""
    scheduler.acquire(a_model("a"), keep_alive=0).release()
    assert_soon(lambda: states(scheduler) == {})


def test_a_keep_alive_runs_out(scheduler: Scheduler) -> None:
    """S18, S23: a keep-alive ends in real time, by the driver."""
    scheduler.acquire(a_model("a"), keep_alive="50ms").release()
    assert_soon(lambda: states(scheduler) == {})


def test_a_load_that_raises_is_the_error_of_those_who_waited(scheduler: Scheduler) -> None:
    """S28: a load that raises is the error of the waiting requests, with its text and a back-off."""

    def fail() -> object:
        raise RuntimeError("no such layer")

    broken = a_model("a", load=fail)
    with pytest.raises(LoadFailed, match="no such layer"):
        scheduler.acquire(broken)
    with pytest.raises(LoadFailed, match="no such layer") as refused:
        scheduler.acquire(broken)
    assert refused.value.retry_after_s is not None and 0 < refused.value.retry_after_s < 11


# -- waiting, cancelling, limits ---------------------------------------------------------------------------------------


def test_many_waiters_share_one_load(scheduler: Scheduler) -> None:
    """Requests that wait for one model share one load."""
    loads: list[int] = []
    gate = Gate()
    model = a_model("a", load=lambda: (loads.append(1), gate())[1])
    futures = [scheduler.submit(model) for _ in range(20)]
    assert gate.entered.wait(LIMIT_S)
    gate.open.set()
    for future in futures:
        future.result(LIMIT_S).release()
    assert loads == [1]


def test_a_slow_load_holds_up_nobody_else(scheduler: Scheduler) -> None:
    """D06, D15, rule 5: while a load hangs, warm requests, other loads, cancels and statuses are answered."""
    scheduler.acquire(a_model("warm")).release()
    gate = Gate()
    slow = scheduler.submit(a_model("slow", load=gate))
    assert gate.entered.wait(LIMIT_S)
    scheduler.acquire(a_model("warm")).release()
    scheduler.acquire(a_model("small", "10MiB")).release()
    assert states(scheduler) == {"warm": "idle", "slow": "loading", "small": "idle"}
    assert slow.cancel()
    assert_soon(lambda: scheduler.status().queue == ())
    gate.open.set()
    assert_soon(lambda: states(scheduler)["slow"] == "idle")


def test_inspections_that_wait_for_a_reading_do_not_stand_in_its_way(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inspections that wait for a reading of the devices do not keep the reading from being made."""
    monkeypatch.setattr("scheduler.runtime.executor._FRESH_S", 10 * LIMIT_S)
    gate = Gate(Footprint(fixed=((HOST, 2000 << 20),)))  # a model that never fits is answered after its inspection
    monkeypatch.setattr(PythonEngine, "inspect", lambda *_: gate())
    futures = [scheduler.submit(a_model(f"m{number}")) for number in range(3 * _WORKERS)]
    assert len(scheduler.status().queue) == len(futures)  # all of them have been submitted for inspection
    gate.open.set()
    assert {type(future.exception(LIMIT_S)) for future in futures} == {DoesNotFit}


def test_as_many_load_at_once_as_may_and_the_next_when_one_is_done() -> None:
    """S24: two cold requests that fit are loaded at the same time, and the next when one is loaded."""
    gates = {name: Gate() for name in "abc"}
    with Scheduler(Settings(max_host_loads=2)) as scheduler:
        models = {name: a_model(name, "10MiB", load=gate) for name, gate in gates.items()}
        waiting = {name: scheduler.submit(models[name]) for name in "ab"}
        assert gates["a"].entered.wait(LIMIT_S) and gates["b"].entered.wait(LIMIT_S)
        waiting["c"] = scheduler.submit(models["c"])  # submitted later, so that it is not inspected first
        assert_soon(lambda: [wait.waits_for for wait in scheduler.status().queue][2:] == ["a load slot"])
        assert not gates["c"].entered.is_set()
        gates["b"].open.set()
        waiting["b"].result(LIMIT_S).release()
        assert gates["c"].entered.wait(LIMIT_S)
        assert states(scheduler) == {"a": "loading", "b": "idle", "c": "loading"}
        for name in "ac":
            gates[name].open.set()
            waiting[name].result(LIMIT_S).release()


def test_a_slow_unload_holds_up_nobody_else() -> None:
    """While an unload hangs, warm requests are granted, and a request for its memory waits."""
    gate = Gate()
    with Scheduler(Settings(memory_limit="1000MiB", eviction="lru", max_wait=0)) as scheduler:  # none has a grace
        scheduler.acquire(a_model("leaving", unload=gate)).release()
        scheduler.acquire(a_model("warm")).release()
        scheduler.acquire(a_model("warm")).release()  # used later, so the other one is the victim
        waiting = scheduler.submit(a_model("new"))
        assert gate.entered.wait(LIMIT_S)
        scheduler.acquire(a_model("warm")).release()
        assert not waiting.done()
        gate.open.set()
        waiting.result(LIMIT_S).release()


def test_a_waiter_gives_up_at_its_own_time_limit(scheduler: Scheduler) -> None:
    """A request ends at its own time limit, and the error has what it waited for."""
    gate = Gate()
    slow = a_model("slow", load=gate)
    first = scheduler.submit(slow)
    assert_soon(lambda: [runner.state for runner in scheduler.status().runners] == ["loading"])
    with pytest.raises(AcquireTimeout, match="its model to load") as refused:
        scheduler.acquire(slow, timeout="50ms")
    assert refused.value.timeout_s >= 0.05
    gate.open.set()
    first.result(LIMIT_S).release()


def test_a_full_queue_refuses_at_once_and_a_cancelled_waiter_gives_its_place_back() -> None:
    """S04, S05, D07, D13: a full queue of one refuses at once, and a cancel makes room."""
    gate = Gate()
    with Scheduler(Settings(max_queue=1)) as scheduler:
        waiting = scheduler.submit(a_model("a", load=gate))
        with pytest.raises(QueueFull) as refused:
            scheduler.acquire(a_model("b"))
        assert refused.value.limit == 1 and refused.value.status == 503
        assert waiting.cancel()
        scheduler.acquire(a_model("b")).release()
        gate.open.set()


def test_what_can_never_fit_is_refused_at_once_and_evicts_nobody(scheduler: Scheduler) -> None:
    """Rule 6, S26: a request that can never fit is refused at once with figures, and nothing is evicted."""
    scheduler.acquire(a_model("a")).release()
    with pytest.raises(DoesNotFit) as refused:
        scheduler.acquire(a_model("huge", "2GiB"))
    assert refused.value.needed_bytes == 2 * 2**30 and refused.value.free_bytes == {"cpu": 1000 * 2**20}
    assert states(scheduler) == {"a": "idle"}


def test_ctrl_c_in_acquire_cancels_the_request(scheduler: Scheduler) -> None:
    """Ctrl-C in `acquire` cancels the request, and a lease that was granted meanwhile is released."""
    gate = Gate()

    def interrupt() -> None:
        assert gate.entered.wait(LIMIT_S)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # as the terminal does

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        scheduler.acquire(a_model("a", load=gate))
    thread.join()
    assert_soon(lambda: scheduler.status().queue == ())
    gate.open.set()
    assert_soon(lambda: states(scheduler) == {"a": "idle"})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # alarms in finalisers
def test_ctrl_c_at_any_moment_leaves_no_lease_and_no_broken_core(scheduler: Scheduler) -> None:
    """Hundreds of alarms while the main thread acquires and releases lose no lease and break no step."""
    scheduler.acquire(a_model("a")).release()
    model, seen, interrupted = a_model("a"), 0, 0
    rung: list[int] = []

    def ring(number: int, frame: object) -> None:
        rung.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ring)
    warnings.simplefilter("ignore", ResourceWarning)
    try:
        while interrupted < 300:
            try:
                rung.clear()
                signal.setitimer(signal.ITIMER_REAL, 0.0002 + (interrupted % 37) * 1e-5)
                while True:  # with a condition Python 3.13 leaves the jump back out of the `try`
                    with scheduler.acquire(model):
                        seen += 1
                    if rung:  # an alarm in a finaliser is dropped
                        break
            except KeyboardInterrupt:
                pass
            interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    gc.collect()
    assert_soon(lambda: states(scheduler) == {"a": "idle"})
    state = scheduler.debug_state()
    assert seen and state.error is None and not state.requests
    check_scheduler(scheduler)


# -- futures and event loops -------------------------------------------------------------------------------------------


def test_a_future_that_was_cancelled_after_the_grant_keeps_its_lease_or_gives_it_back(scheduler: Scheduler) -> None:
    """S02, S05: a cancel of a future comes in time, or the lease is there and is not lost."""
    for _ in range(50):
        future = scheduler.submit(a_model("a"))
        if future.cancel():
            with pytest.raises(CancelledError):
                future.result(LIMIT_S)
        else:
            future.result(LIMIT_S).release()
    assert_soon(lambda: states(scheduler) in ({}, {"a": "idle"}))


def test_a_callback_of_a_future_may_acquire(scheduler: Scheduler) -> None:
    """A callback of a future may acquire, because no user code runs under the lock or on a needed thread."""
    got: Future[str] = Future()

    def then(future: Future[Lease]) -> None:
        with future.result(), scheduler.acquire(a_model("b")) as other:
            got.set_result(other.value)

    scheduler.submit(a_model("a")).add_done_callback(then)
    assert got.result(LIMIT_S) == "<b>"
    assert_soon(lambda: set(states(scheduler).values()) == {"idle"})


def test_a_callback_that_raises_harms_nobody(scheduler: Scheduler) -> None:
    """A callback that raises is logged, and the next request is served."""
    scheduler.submit(a_model("a")).add_done_callback(lambda future: future.result().release() or 1 / 0)
    assert_soon(lambda: states(scheduler) == {"a": "idle"})
    scheduler.acquire(a_model("a")).release()


def test_async_with_holds_a_lease(scheduler: Scheduler) -> None:
    """`async with` holds a lease, and a load does not block the event loop."""

    async def main() -> str:
        gate = Gate("slow")
        async with asyncio.timeout(LIMIT_S):
            waiting = asyncio.ensure_future(_value(scheduler, a_model("slow", load=gate)))
            async with scheduler.acquire_async(a_model("a")) as lease:
                assert lease.value == "<a>"
            gate.open.set()
            return await waiting

    assert asyncio.run(main()) == "slow"
    assert set(states(scheduler).values()) == {"idle"}


async def _value(scheduler: Scheduler, model: PythonModel) -> Any:
    async with scheduler.acquire_async(model) as lease:
        return lease.value


def test_a_task_that_is_cancelled_while_it_waits_leaves_the_queue(scheduler: Scheduler) -> None:
    """S02, S05: a task that is cancelled while it waits cancels its request."""
    gate = Gate()

    async def main() -> None:
        task = asyncio.ensure_future(_value(scheduler, a_model("a", load=gate)))
        await asyncio.to_thread(gate.entered.wait, LIMIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert_soon(lambda: scheduler.status().queue == ())
    gate.open.set()


def test_a_lease_granted_to_a_loop_that_is_gone_releases_itself(scheduler: Scheduler) -> None:
    """A lease that is granted to an event loop that has ended is released."""
    gate = Gate()
    loop = asyncio.new_event_loop()
    kept: list[object] = []

    async def begin() -> None:
        kept.append(asyncio.ensure_future(_value(scheduler, a_model("a", load=gate))))
        await asyncio.to_thread(gate.entered.wait, LIMIT_S)

    loop.run_until_complete(begin())
    loop._default_executor.shutdown()  # type: ignore[attr-defined]  # the thread of to_thread
    loop.close()
    gate.open.set()
    assert_soon(lambda: states(scheduler) == {"a": "idle"})


def test_callbacks_that_block_on_the_scheduler_do_not_block_each_other(scheduler: Scheduler) -> None:
    """A dozen callbacks that each wait for another future are all served, and so are other requests."""
    done: list[str] = []

    def then(_: Future[Lease]) -> None:
        with scheduler.submit(a_model("a")).result(LIMIT_S) as lease:
            done.append(lease.value)

    for _ in range(12):
        future = scheduler.submit(a_model("a"))
        future.add_done_callback(then)
        future.add_done_callback(lambda granted: granted.result().release())
    assert_soon(lambda: len(done) == 12)


def test_an_object_is_let_go_of_when_it_is_unloaded(scheduler: Scheduler) -> None:
    """An unloaded object is dropped, because its memory counts as free."""

    class Large:
        pass

    alive: list[weakref.ref[Large]] = []

    def load() -> Large:
        large = Large()
        alive.append(weakref.ref(large))
        return large

    scheduler.acquire(a_model("a", load=load), keep_alive=0).release()
    assert_soon(lambda: states(scheduler) == {} and gc.collect() >= 0 and alive[0]() is None)


class Work:
    """What the load of an object refers to."""

    def __call__(self) -> str:
        return "done"


def ask_and_release(scheduler: Scheduler, model: PythonModel) -> None:
    """Load, use and unload an object."""
    scheduler.acquire(model, keep_alive=0).release()


def be_refused(scheduler: Scheduler, model: PythonModel) -> None:
    """Request an object that can never fit."""
    with pytest.raises(DoesNotFit):
        scheduler.acquire(replace(model, memory={"cpu": "2GiB"}))


def cancel(scheduler: Scheduler, model: PythonModel) -> None:
    """Cancel a request while it waits."""
    with scheduler.acquire(a_model("holder", "900MiB"), keep_alive=0):
        waiting = scheduler.submit(model)
        assert_soon(lambda: ["holder" in each.waits_for for each in scheduler.status().queue] == [True])
        assert waiting.cancel()


def never_await(scheduler: Scheduler, model: PythonModel) -> None:
    """Make an awaitable that is never awaited."""
    scheduler.acquire_async(model)


def fail_to_submit(scheduler: Scheduler, model: PythonModel) -> None:
    """Parse a request that is interrupted before it is submitted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler._broker, "new_request", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scheduler.acquire(model)


def plan(scheduler: Scheduler, model: PythonModel) -> None:
    """Ask what would become of an object, and of its expiry."""
    assert scheduler.fit(model).fits
    scheduler.expire(model)


USES = [ask_and_release, be_refused, cancel, never_await, fail_to_submit, plan]


@pytest.mark.parametrize("use", USES, ids=lambda use: f"u69-{use.__name__}")
def test_what_the_load_of_an_object_refers_to_is_let_go_of(
    scheduler: Scheduler, use: Callable[[Scheduler, PythonModel], None]
) -> None:
    """What an object's load refers to is dropped once the object is neither loaded nor requested."""
    work = Work()
    alive = weakref.ref(work)
    use(scheduler, a_model("job", load=work))
    del work
    assert_soon(lambda: gc.collect() >= 0 and alive() is None)
    with scheduler.acquire(a_model("job")) as lease:
        assert lease.value == "<job>"
    assert "job" in {scheduler.name(id) for id in scheduler.debug_state().named_models}


def test_what_looks_at_runners_now_and_then_keeps_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The periodic look at runners keeps no object alive, even where no other runner follows."""
    monkeypatch.setattr("scheduler.runtime.health_monitor._SAMPLE_INTERVAL_S", 0.01)
    work = Work()
    alive = weakref.ref(work)
    with Scheduler(Settings(gpus=False)) as scheduler:
        with scheduler.acquire(a_model("job", load=work), keep_alive=0):
            looks = Mock(side_effect=scheduler._executor.ensure_threads)
            monkeypatch.setattr(scheduler._executor, "ensure_threads", looks)  # each look begins with it
            assert_soon(lambda: looks.call_count > 1)
        del work
        assert_soon(lambda: gc.collect() >= 0 and alive() is None)


def test_an_object_that_is_in_use_or_pinned_stays_known(scheduler: Scheduler) -> None:
    """Objects that are leased, idle or pinned stay known, and nothing is kept of another object."""
    scheduler.acquire(a_model("gone"), keep_alive=0).release()
    scheduler.pin(a_model("pinned"))
    scheduler.acquire(a_model("pinned")).release()
    scheduler.expire(a_model("pinned"))
    scheduler.preload(a_model("rests", "100MiB")).result(LIMIT_S)
    with scheduler.acquire(a_model("held", "100MiB")):
        assert_soon(lambda: states(scheduler).keys() == {"rests", "held"})
        scheduler._broker.drop_unused_objects()
        assert scheduler.debug_state().named_models == {"python:pinned", "python:rests", "python:held"}
        assert "python:gone" not in scheduler._executor._identities


def test_an_object_that_is_let_go_of_as_its_request_is_withdrawn_harms_nobody(scheduler: Scheduler) -> None:
    """An object whose request is withdrawn may be dropped before its inspection is decided."""
    cancel(scheduler, a_model("a"))
    with scheduler._driver._lock:  # the driver is in the middle of a step
        assert scheduler.submit(a_model("a")).cancel()
        scheduler._registry.unregister(a_model("a").id)
    assert_soon(lambda: states(scheduler) == {})
    scheduler.acquire(a_model("b")).release()
    assert scheduler.debug_state().error is None


def test_what_does_not_stop_is_shown_as_stuck(scheduler: Scheduler) -> None:
    """A runner that does not stop is shown as stuck, and its memory stays reserved."""
    gate = Gate()
    read = scheduler._driver.query
    read(lambda core: setattr(core._state, "config", replace(core._state.config, stop_timeout_s=0.01)))
    scheduler.acquire(a_model("a", unload=gate), keep_alive=0).release()
    assert gate.entered.wait(LIMIT_S)
    assert_soon(lambda: [runner.stuck for runner in scheduler.status().runners] == [True])
    gate.open.set()
    assert_soon(lambda: states(scheduler) == {})


# -- names without a model ---------------------------------------------------------------------------------------------


def known(scheduler: Scheduler) -> set[str]:
    """Return the id of every model of which anything is kept, besides the bounded caches of requests and names."""
    state = scheduler.debug_state()
    return {*state.named_models, *state.models, *scheduler._executor._identities}


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Make every inspection fail to find its model; yield the models that were looked for, in order."""
    found: list[str] = []

    def inspect(_: PythonEngine, model: PythonModel, asked: object) -> Footprint:
        found.append(model.name)
        raise ModelNotFound(model.name)

    monkeypatch.setattr(PythonEngine, "inspect", inspect)
    yield found


def test_a_name_that_means_nothing_is_forgotten(scheduler: Scheduler, refused: list[str]) -> None:
    """A name without a model is forgotten after its requests, unless it is pinned."""
    scheduler.pin(a_model("pinned"))
    for name in ("a", "b", "pinned", "a"):
        with pytest.raises(ModelNotFound):
            scheduler.acquire(a_model(name))
    scheduler.submit(a_model("left")).cancel()
    assert_soon(lambda: sorted(refused) == ["a", "a", "b", "left", "pinned"] and known(scheduler) == {"python:pinned"})


def test_an_engine_that_resolves_too_little_is_found(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is refused whose options the engine leaves unresolved, and the model is not inspected for ever."""
    for told, reason in ((ModelProfile("file", 1), "its engine has not resolved"), (None, "is no profile")):
        monkeypatch.setattr(PythonEngine, "inspect", lambda *_, told=told: told)
        for ask in (scheduler.acquire, scheduler.fit):
            with pytest.raises(InvalidModel, match=reason):
                ask(a_model("a"))


def test_the_last_names_that_were_forgotten_can_still_be_told(
    scheduler: Scheduler, refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last few names that were forgotten can still be told, because events and recordings are read later."""
    monkeypatch.setattr("scheduler.runtime.model_registry._PAST_NAMES", 2)
    for name in ("a", "b", "c"):
        with pytest.raises(ModelNotFound):
            scheduler.acquire(a_model(name))
        assert_soon(lambda: known(scheduler) == set())
    assert [scheduler.name(a_model(name).id) for name in ("a", "b", "c")] == ["python:a", "b", "c"]


def test_an_inspection_that_fails_for_another_reason_does_not_blame_the_file(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An inspection that fails for another reason than the file says so, and does not advise to download it again."""
    monkeypatch.setattr(PythonEngine, "inspect", Mock(side_effect=ImportError("failed to map segment")))
    with pytest.raises(InvalidModel, match=r"ImportError: failed to map segment; .*ulimit -a") as told:
        scheduler.acquire(a_model("a"))
    assert "download" not in str(told.value)


def test_u65_files_that_the_core_has_forgotten_are_forgotten(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Beyond a number of files, those that no request waits for and no runner serves are let go."""
    monkeypatch.setattr("scheduler.runtime.request_broker._MOST_MODELS", 4)
    registry, broker = scheduler._registry, scheduler._broker
    for number in range(10):
        spec = ModelSpec(f"m{number}", str(tmp_path / f"m{number}.gguf"))
        registry.register(spec.id, spec)
        if number < 2:
            scheduler.pin(spec)
    broker.drop_unused_objects()
    assert sorted(map(registry.name, registry.known())) == ["m0", "m1"]


def test_a_name_that_a_full_queue_refuses_is_forgotten() -> None:
    """A name that a full queue refuses is forgotten, because the core never had it."""
    gate = Gate()
    with Scheduler(Settings(gpus=False, max_queue=1)) as scheduler:
        waiting = scheduler.submit(a_model("a", load=gate))
        assert gate.entered.wait(LIMIT_S)
        for name in ("a", "b", "c"):
            with pytest.raises(QueueFull):
                scheduler.acquire(a_model(name))
        assert known(scheduler) == {"python:a"}
        gate.open.set()
        waiting.result(LIMIT_S).release()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_name_that_is_asked_for_while_it_is_forgotten_is_inspected_again(
    moment: str, scheduler: Scheduler, refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is requested while it is forgotten is inspected again."""
    forget = scheduler._registry.unregister
    asked: list[Future[Lease]] = []

    def ask() -> None:
        if not asked:
            asked.append(off_main(lambda: scheduler.submit(a_model("a"))))

    def forget_meanwhile(model: ModelId) -> object:
        if moment == "before":
            ask()
        forgotten = forget(model)
        ask()
        return forgotten

    monkeypatch.setattr(scheduler._registry, "unregister", forget_meanwhile)
    with pytest.raises(ModelNotFound):
        scheduler.acquire(a_model("a"))
    assert_soon(lambda: asked)
    assert isinstance(asked[0].exception(LIMIT_S), ModelNotFound)
    assert refused == ["a", "a"]
    assert_soon(lambda: known(scheduler) == set())


def test_a_name_is_forgotten_while_the_request_of_one_who_left_is_on_its_way(
    scheduler: Scheduler, refused: list[str]
) -> None:
    """A name is forgotten while a withdrawn request for it waits for its inspection, and a new one is answered."""
    with scheduler._driver._lock:  # the driver is in the middle of a step
        assert scheduler.submit(a_model("a")).cancel()
        scheduler._broker._forget(a_model("a").id)
    assert_soon(lambda: known(scheduler) == set())
    assert refused == []
    with pytest.raises(ModelNotFound):
        scheduler.acquire(a_model("a"))
    assert refused == ["a"]


# -- the other verbs ---------------------------------------------------------------------------------------------------


def test_preload_loads_without_a_lease(scheduler: Scheduler) -> None:
    """S28: a preload leaves a model idle and ready for the first request."""
    scheduler.preload(a_model("a")).result(LIMIT_S)
    assert states(scheduler) == {"a": "idle"}


def test_expire_unloads_an_idle_model_and_drains_a_busy_one(scheduler: Scheduler) -> None:
    """S32: `expire` stops an idle runner and drains a busy one, and an unknown model is ignored."""
    model = a_model("a")
    scheduler.expire(model)
    with scheduler.acquire(model) as lease:
        scheduler.expire(model)
        assert_soon(lambda: states(scheduler) == {"a": "expiring"})
        assert lease.value == "<a>"
    assert_soon(lambda: states(scheduler) == {})


def test_a_pinned_model_is_not_moved_for_others(scheduler: Scheduler) -> None:
    """A request that fits only in place of a pinned runner is refused, and is served after the unpin."""
    scheduler.acquire(a_model("a", pin=True)).release()
    with pytest.raises(DoesNotFit, match="pinned models: a;"):
        scheduler.acquire(a_model("big", "900MiB"))
    scheduler.unpin(a_model("a"))
    scheduler.acquire(a_model("big", "900MiB")).release()
    assert "a" not in states(scheduler)


def test_memory_of_the_program_is_out_of_the_account_while_it_is_held(scheduler: Scheduler) -> None:
    """`reserve` evicts idle runners, and a model that does not fit beside the reservation is refused."""
    scheduler.acquire(a_model("a")).release()
    with scheduler.reserve("cpu", "700MiB"):
        assert states(scheduler) == {}
        with pytest.raises(DoesNotFit, match="reservations"):
            scheduler.acquire(a_model("a"))
    scheduler.acquire(a_model("a")).release()


def test_a_holder_is_told_that_others_want_its_memory(scheduler: Scheduler) -> None:
    """A lease holder is notified by `wanted` and its callback, and the waiting request gets the memory it releases."""
    told = threading.Event()
    with scheduler.acquire(a_model("a", "900MiB")) as lease:
        lease.on_wanted(told.set)
        waiting = scheduler.submit(a_model("b", "900MiB"))
        assert told.wait(LIMIT_S) and lease.wanted and not waiting.done()
    waiting.result(LIMIT_S).release()


def test_the_debug_state_tells_what_is_held_inside(scheduler: Scheduler) -> None:
    """The debug state has open requests, models, runners and late events by ids, and is empty after a close."""
    with scheduler.acquire(a_model("a")):
        scheduler._driver.post(Release(RequestId(77)))  # a release of no lease
        state = scheduler.debug_state()
        assert [held.request for held in state.snapshot.held] == list(state.requests)
        assert [runner.model for runner in state.snapshot.runners] == ["python:a"]
        assert state.models == state.named_models == {"python:a"}
        assert (state.late_events, state.listening, state.ended, state.error) == (1, False, False, None)
        assert state.snapshot.limits.max_queue == scheduler.settings.max_queue
        events = scheduler.events()
        assert scheduler.debug_state().listening
        events.close()
    scheduler.close()
    state = scheduler.debug_state()
    assert state.ended and not state.requests and not state.locked and not state.snapshot.runners


def test_a_scheduler_whose_state_breaks_an_invariant_is_found(scheduler: Scheduler) -> None:
    """The check that tests make of a running scheduler names the property."""
    scheduler._driver.query(lambda core: setattr(core._state, "queued", 1))
    with pytest.raises(Violated, match="queued requests are counted"):
        check_scheduler(scheduler)
    scheduler._driver.query(lambda core: setattr(core._state, "queued", 0))
    check_scheduler(scheduler)


def test_events_tell_every_transition_with_its_reason(scheduler: Scheduler) -> None:
    """Events have every transition with its reason, in order and once."""
    events = scheduler.events()
    scheduler.acquire(a_model("a")).release()
    scheduler.expire(a_model("a"))
    assert_soon(lambda: states(scheduler) == {})
    entries = []
    while (entry := events.take(0)) is not None:
        entries.append(entry)
    triggers = [entry.trigger for entry in entries if isinstance(entry, Transition)]
    assert triggers == ["launch", "serve", "rest", "expire", "unload"]
    assert all(entry.reason for entry in entries if isinstance(entry, Transition | Decision))
    events.close()


def test_a_listener_that_was_forgotten_costs_nothing_more(scheduler: Scheduler) -> None:
    """A stream of events that is dropped without a close costs nothing any more."""
    scheduler.events()
    gc.collect()
    scheduler.acquire(a_model("a")).release()
    scheduler.acquire(a_model("a")).release()
    assert not scheduler.debug_state().listening


def test_a_slow_reader_finds_a_gap_marked() -> None:
    """A slow reader of events loses the oldest ones, and is told how many."""
    with Scheduler(Settings(event_buffer=5)) as scheduler:
        events = scheduler.events()
        for _ in range(10):
            scheduler.acquire(a_model("a", "1MiB")).release()
    entries = list(events)
    assert isinstance(entries[0], Gap) and entries[0].missed > 5
    assert len(entries) == 6


@pytest.mark.parametrize(
    ("keywords", "word"),
    [
        ({"num_ctxx": 1}, "no such option"),
        ({"num_ctx": 512}, "no load-time options"),
        ({"embedding": True}, "no such part"),
    ],
)
def test_a_keyword_that_means_nothing_is_refused(scheduler: Scheduler, keywords: dict[str, Any], word: str) -> None:
    """A keyword argument without a meaning is refused before anything is requested."""
    with pytest.raises(UnsupportedOption, match=word):
        scheduler.acquire(a_model("a"), **keywords)
    with pytest.raises(InvalidSettings, match="keep_alive"):
        scheduler.acquire(a_model("a"), keep_alive="soon")


# -- the end -----------------------------------------------------------------------------------------------------------


def test_close_answers_those_who_wait_and_refuses_those_who_come(scheduler: Scheduler) -> None:
    """S33, D20: a close answers waiting requests and refuses later ones."""
    gate = Gate()
    waiting = [scheduler.submit(a_model("a", load=gate)) for _ in range(5)]
    assert gate.entered.wait(LIMIT_S)
    threading.Timer(0.05, gate.open.set).start()
    scheduler.close(timeout=1)
    for future in waiting:
        assert isinstance(future.exception(LIMIT_S), SchedulerClosed)
    for ask in (lambda: scheduler.acquire(a_model("a")), lambda: off_main(lambda: scheduler.acquire(a_model("a")))):
        with pytest.raises(SchedulerClosed):
            ask()


def test_close_lets_leases_finish(scheduler: Scheduler) -> None:
    """A lease that is released in the close's time limit is not revoked."""
    lease = scheduler.acquire(a_model("a"))
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    assert_soon(lambda: states(scheduler) == {"a": "expiring"})
    assert lease.value == "<a>" and not lease.lost
    lease.release()
    closing.join(LIMIT_S)
    assert not closing.is_alive() and states(scheduler) == {}


def test_close_breaks_leases_after_its_time_limit(scheduler: Scheduler) -> None:
    """A close revokes leases after its time limit, tells their holders, and returns."""
    told = threading.Event()
    lease = scheduler.acquire(a_model("a"))
    lease.on_lost(told.set)
    scheduler.close(timeout="50ms")
    assert told.wait(LIMIT_S) and lease.lost
    lease.release()


def test_close_returns_although_an_unload_hangs(caplog: pytest.LogCaptureFixture) -> None:
    """A close returns although an unload hangs, and logs the runner, whose memory stays reserved."""
    gate = Gate()
    scheduler = Scheduler(Settings(stop_grace="50ms"))
    scheduler.acquire(a_model("stubborn", unload=gate)).release()
    begin = time.monotonic()
    scheduler.close(timeout="50ms")
    assert time.monotonic() - begin < LIMIT_S + 5
    assert "stubborn" in caplog.text
    gate.open.set()


def test_close_returns_although_a_reading_hangs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A close returns although a reading hangs, and logs the thread that reads."""
    monkeypatch.setattr("scheduler.runtime.executor._FRESH_S", 10 * LIMIT_S)
    gate = Gate(())
    scheduler = Scheduler(Settings(gpus=False))
    monkeypatch.setattr(scheduler._devices, "sample", gate)
    waiting = scheduler.submit(a_model("a"))
    assert gate.entered.wait(LIMIT_S)
    scheduler.close()
    assert isinstance(waiting.exception(LIMIT_S), SchedulerClosed)
    gate.open.set()
    refused, told = caplog.records
    assert refused.getMessage().startswith("request 1 for a is refused: the scheduler is closed")
    assert told.getMessage().startswith("closed, but these did not end: loadmaster-sampler-0")


def test_close_names_the_callback_that_hangs_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    """A close that waited for a callback that hangs logs that callback and no other thread."""
    gate = Gate()
    scheduler = Scheduler(Settings(gpus=False))
    footprints = scheduler._executor.measurements
    assert footprints is not None and not footprints.recall(Identity("files", "state")).sizes  # its thread is there
    scheduler.preload(a_model("a")).add_done_callback(gate)
    assert gate.entered.wait(LIMIT_S)
    scheduler.close()
    gate.open.set()
    assert [each.getMessage() for each in caplog.records] == ["closed, but these did not end: loadmaster-caller-0"]


def test_closing_from_several_threads_is_harmless(scheduler: Scheduler) -> None:
    """D09, D19: closes from several threads during a load all return."""
    gate = Gate()
    scheduler.submit(a_model("a", load=gate))
    assert gate.entered.wait(LIMIT_S)
    threads = [threading.Thread(target=scheduler.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    gate.open.set()
    for thread in threads:
        thread.join(LIMIT_S)
    assert not any(thread.is_alive() for thread in threads)


def test_a_bug_in_a_decision_is_told_to_everybody(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in a decision fails waiting and later requests, and a close still returns."""
    gate = Gate()
    waiting = scheduler.submit(a_model("a", load=gate))
    assert gate.entered.wait(LIMIT_S)
    monkeypatch.setattr(Core, "_handle", lambda self, event: 1 / 0)
    for ask in (lambda: scheduler.acquire(a_model("a")), lambda: off_main(lambda: scheduler.acquire(a_model("a")))):
        with pytest.raises(SchedulerBroken, match="ZeroDivisionError"):
            ask()
    assert isinstance(waiting.exception(LIMIT_S), SchedulerBroken)
    gate.open.set()


def test_whoever_a_bug_was_to_answer_is_told_too_and_it_is_logged_once(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A request whose refusal cannot be put into words is failed too, and the exception is logged once."""
    monkeypatch.setattr("scheduler.runtime.request_broker.error_of", lambda refusal, names: 1 / 0)
    refused = scheduler.submit(a_model("huge", "2GiB"))
    assert isinstance(refused.exception(LIMIT_S), SchedulerBroken)
    step, trace = scheduler.debug_state().step, traceback_length(scheduler)
    for _ in range(3):
        with pytest.raises(SchedulerBroken, match="ZeroDivisionError"):
            scheduler.acquire(a_model("a"))
    scheduler.close()
    errors = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
    assert errors == [f"step {step} failed; the scheduler has stopped"]
    assert traceback_length(scheduler) == trace


def traceback_length(scheduler: Scheduler) -> int:
    """Return the length of the traceback of the exception that broke a scheduler, which grows if it is raised again."""
    error = scheduler.debug_state().error
    assert error is not None
    return len(traceback.extract_tb(error.__traceback__))


def test_a_fork_refuses_to_use_what_it_inherited(scheduler: Scheduler) -> None:
    """A forked child neither uses nor ends what belongs to its parent."""
    scheduler.acquire(a_model("a")).release()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            scheduler.acquire(a_model("a"))
        except SchedulerForked:
            scheduler.close()
            os._exit(42)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 42
    scheduler.acquire(a_model("a")).release()


def test_a_fork_hears_no_event_of_its_parents(scheduler: Scheduler) -> None:
    """A forked child hears no event of its parent's, neither an earlier nor a later one."""
    with scheduler.events() as events:
        scheduler.acquire(a_model("a")).release()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            signal.alarm(int(LIMIT_S))  # ends the child if it hangs
            try:
                events.take(0)
            except SchedulerForked:
                with pytest.raises(SchedulerForked):
                    next(events)
                os._exit(42)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 42
        assert events.take(LIMIT_S) is not None


CALLS: dict[str, Callable[[Scheduler, Lease], object]] = {
    "status": lambda scheduler, _: scheduler.status(),
    "events": lambda scheduler, _: scheduler.events(),
    "fit": lambda scheduler, _: scheduler.fit(a_model("a")),
    "reserve": lambda scheduler, _: scheduler.reserve("cpu", 1),
    "configure": lambda scheduler, _: scheduler.configure(memory_limit=1 << 20),
    "acquire": lambda scheduler, _: scheduler.acquire(a_model("a")),
    "pin": lambda scheduler, _: scheduler.pin(a_model("a")),
    "on_lost": lambda _, lease: lease.on_lost(print),
    "chat": lambda _, lease: lease.chat("hello"),
    "complete": lambda _, lease: lease.complete("hello"),
    "stream": lambda _, lease: next(lease.stream("hello")),
    "embed": lambda _, lease: lease.embed("hello"),
    "achat": lambda _, lease: asyncio.run(lease.achat("hello")),
    "acomplete": lambda _, lease: asyncio.run(lease.acomplete("hello")),
    "astream": lambda _, lease: lease.astream("hello"),
    "aembed": lambda _, lease: asyncio.run(lease.aembed("hello")),
    "url": lambda _, lease: lease.url,
    "api_key": lambda _, lease: lease.api_key,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_fork_in_the_middle_of_a_step_is_told_so_at_once(scheduler: Scheduler, call: str) -> None:
    """A forked child is told so at once, although a lock was held by another thread at the fork."""
    with scheduler.acquire(a_model("a")) as lease, scheduler._driver._lock:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            signal.alarm(10)
            scheduler._executor.refresh = lambda timeout_s: os._exit(2)  # type: ignore[method-assign]
            try:
                CALLS[call](scheduler, lease)
            except SchedulerForked:
                os._exit(42)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 42


@pytest.mark.parametrize(
    "moment",
    ["scheduler.runtime.memory_sampler.MemorySampler.refresh", "scheduler.runtime.health_monitor.HealthMonitor.start"],
)
def test_ctrl_c_while_a_scheduler_is_made_leaves_nothing(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a scheduler is made closes its recording and leaves no thread."""
    monkeypatch.setattr(moment, Mock(side_effect=KeyboardInterrupt))
    with no_leaks(), pytest.raises(KeyboardInterrupt):
        Scheduler(Settings(gpus=False, recording_file=tmp_path / "incident.jsonl"))
    assert not any(each.settings.recording_file for each in scheduler_module._open_schedulers)


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "scheduler.close(0); scheduler.close()"])
def test_the_interpreter_exits_without_close(end: str) -> None:
    """The interpreter exits without a close, whether or not a lease is held."""
    program = f"""
        from scheduler import PythonModel, Scheduler
        scheduler = Scheduler()
        lease = scheduler.acquire(PythonModel("a", load=object))
        print("over", flush=True)
        {end}
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")


def test_ten_thousand_waiters_cancelled_at_once_are_each_answered_once() -> None:
    """Ten thousand requests that are cancelled at once are each answered once, and nothing of them is left."""
    gate = Gate()
    with Scheduler(Settings(max_queue=10_000)) as scheduler:
        futures = [scheduler.submit(a_model("a", load=gate)) for _ in range(10_000)]
        assert all(future.cancel() for future in futures)
        assert not wait_for(futures, LIMIT_S).not_done
        assert_soon(lambda: scheduler.status().queue == () and not scheduler.debug_state().requests)
        gate.open.set()
