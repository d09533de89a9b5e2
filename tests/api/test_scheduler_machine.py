"""The public API in any order that Hypothesis draws, on several threads, against an independent model.

Rules start calls on threads of their own, or make them at once where they cannot block. The model counts in the objects
themselves: which objects are loaded, and which leases use them. At the end every call must have ended.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from scheduler import (
    AcquireTimeout,
    DoesNotFit,
    Lease,
    LeaseReleased,
    LoadFailed,
    PythonModel,
    QueueFull,
    RunnerCrashed,
    Scheduler,
    SchedulerClosed,
    Settings,
)
from tests.support.invariants import check_scheduler
from tests.support.leaks import no_leaks
from tests.support.waiting import LIMIT_S, assert_soon

MIB = 2**20
LIMIT_BYTES = 100 * MIB
MOST_RUNNERS = 3
SIZES = {"a": 30, "b": 40, "c": 60, "small": 5, "slow": 30, "failing": 20, "greedy": 20, "clinging": 10, "huge": 101}
LOADABLE = st.sampled_from(sorted(SIZES.keys() - {"huge", "failing", "greedy"}))
MODELS = st.sampled_from(sorted(SIZES))
TIMEOUTS = st.sampled_from([None, None, 0, 0.02])
KEEP_ALIVES = st.sampled_from([None, None, 0, 0.01, -1])
REFUSALS = (AcquireTimeout, LoadFailed, DoesNotFit, QueueFull, SchedulerClosed, RunnerCrashed)  # the last at a close
SLOW_S = 0.01


class Thing:
    """An object in memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.loaded = True
        self.users = 0


class Engine:
    """What the objects of all models do, counted."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards the fields below
        self.allocated: list[str] = []  # a name for each object, from the begin of its load to the end of its unload
        self.wrong: list[str] = []
        self.closing = False  # leases may be revoked
        self.models = {name: self.model(name) for name in SIZES}

    def model(self, name: str) -> PythonModel:
        def load() -> Thing:
            self.begin(name)
            time.sleep(SLOW_S if name == "slow" else 0)
            if name in ("failing", "greedy"):
                self.end(name)
                raise MemoryError if name == "greedy" else RuntimeError("no such layer")
            return Thing(name)

        def unload(thing: Thing) -> None:
            with self.lock:
                thing.loaded = False
                if thing.users and not self.closing:
                    self.wrong.append(f"{name} was unloaded in use")
            time.sleep(SLOW_S if name == "slow" else 0)
            self.end(name)
            if name == "clinging":
                raise RuntimeError("it does not let go")

        return PythonModel(name, load, unload, {"cpu": SIZES[name] * MIB})

    def begin(self, name: str) -> None:
        with self.lock:
            self.allocated.append(name)
            if sum(SIZES[each] for each in self.allocated) * MIB > LIMIT_BYTES or len(self.allocated) > MOST_RUNNERS:
                self.wrong.append(f"too much is loaded: {self.allocated}")

    def end(self, name: str) -> None:
        with self.lock:
            self.allocated.remove(name)

    def begin_to_use(self, lease: Lease) -> Thing:
        """Return what is leased; the object stays loaded until `cease_to_use`."""
        thing: Thing = lease.value
        with self.lock:
            if thing.name != lease.model or not (thing.loaded or self.closing):
                self.wrong.append(f"a lease on {lease.model} gave {thing.name}, loaded: {thing.loaded}")
            thing.users += 1
        return thing

    def cease_to_use(self, thing: Thing) -> None:
        with self.lock:
            thing.users -= 1


class Slot:
    """A place for a lease that is always drawn, so that what Hypothesis draws does not depend on time."""

    def __init__(self) -> None:
        self.lease: Lease | None = None
        self.thing: Thing | None = None


class SchedulerMachine(RuleBasedStateMachine):
    """Threads make requests, leases are held across rules, and invariants are checked between any two rules."""

    leases = Bundle("leases")
    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.leaks = no_leaks()
        self.leaks.__enter__()
        self.engine = Engine()
        self.scheduler = Scheduler(
            Settings(
                gpus=False, memory_limit=LIMIT_BYTES, max_runners=MOST_RUNNERS, max_queue=8, max_wait=0.05,
                min_residency=0, keep_alive=60, close_timeout=0,
            )
        )  # fmt: skip
        self.futures: list[Future[Any]] = []  # every request that was made
        self.slots: list[Slot] = []  # every slot; those with a thing hold a lease
        self.reader = self.scheduler.events()
        self.closed = False

    def start(self, action: Callable[[], object]) -> None:
        """Make a call on a thread of its own; the call must end, with a result or with a refusal."""
        future: Future[Any] = Future()
        self.futures.append(future)

        def run() -> None:
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()

    def slot(self, lease: Lease | None) -> Slot:
        """Hold a lease, where there is one."""
        slot = Slot()
        self.slots.append(slot)
        try:
            slot.lease, slot.thing = lease, self.engine.begin_to_use(lease) if lease is not None else None
        except RunnerCrashed:
            assert self.closed, "the lease was revoked before the close"
        return slot

    def drop(self, slot: Slot) -> None:
        """Stop using what is held."""
        if slot.thing is not None:
            self.engine.cease_to_use(slot.thing)
            slot.thing = None

    # -- requesting ---------------------------------------------------------------------------------------------------

    @rule(target=leases, model=LOADABLE, timeout=st.sampled_from([0, 0.02, 0.1]), keep=KEEP_ALIVES)
    def acquire(self, model: str, timeout: float, keep: float | None) -> Slot:
        """Request and wait; a granted lease is held until another rule releases it.

        Beside pinned models and reservations there may be no room for the largest model.
        """
        try:
            return self.slot(self.scheduler.acquire(self.engine.models[model], timeout=timeout, keep_alive=keep))
        except (AcquireTimeout, DoesNotFit, QueueFull, SchedulerClosed):
            return self.slot(None)

    @rule(target=requests, model=MODELS, priority=st.integers(0, 2), keep=KEEP_ALIVES, timeout=TIMEOUTS)
    def submit(self, model: str, priority: int, keep: float | None, timeout: float | None) -> Future[Lease]:
        asking = {"priority": priority, "keep_alive": keep, "timeout": timeout}
        future = self.scheduler.submit(self.engine.models[model], **asking)
        self.futures.append(future)
        return future

    @rule(model=MODELS, timeout=TIMEOUTS)
    def use_on_a_thread(self, model: str, timeout: float | None) -> None:
        def use() -> None:
            with self.scheduler.acquire(self.engine.models[model], timeout=timeout) as lease:
                thing = self.engine.begin_to_use(lease)
                time.sleep(0.002)
                self.engine.cease_to_use(thing)

        self.start(use)

    @rule(models=st.lists(MODELS, min_size=1, max_size=4), cancelled=st.integers(0, 4))
    def use_in_a_loop(self, models: list[str], cancelled: int) -> None:
        """Run tasks of an event loop, the first of which are cancelled while they wait or hold a lease."""

        async def use(model: str) -> None:
            async with self.scheduler.acquire_async(self.engine.models[model]) as lease:
                thing = self.engine.begin_to_use(lease)
                try:
                    await asyncio.sleep(0.001)
                finally:
                    self.engine.cease_to_use(thing)

        async def run() -> None:
            tasks = [asyncio.create_task(use(model)) for model in models]
            await asyncio.sleep(0.001)
            for task in tasks[:cancelled]:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if not isinstance(outcome, (type(None), asyncio.CancelledError, *REFUSALS)):
                    raise outcome

        self.start(lambda: asyncio.run(run()))

    @rule(model=MODELS)
    def preload(self, model: str) -> None:
        self.futures.append(self.scheduler.preload(self.engine.models[model]))

    @rule(size=st.sampled_from([1, 40, 200]))
    def reserve(self, size: int) -> None:
        self.start(lambda: self.scheduler.reserve("cpu", size * MIB, timeout=0.05).release())

    # -- releasing ----------------------------------------------------------------------------------------------------

    @rule(slot=consumes(leases))
    def release(self, slot: Slot) -> None:
        self.drop(slot)
        if slot.lease is not None:
            slot.lease.release()
            with pytest.raises((LeaseReleased, RunnerCrashed)):
                _ = slot.lease.value

    @rule(slot=leases)
    def release_twice(self, slot: Slot) -> None:
        """Release a lease twice, and again by rules that draw the same lease."""
        self.drop(slot)
        if slot.lease is not None:
            self.start(slot.lease.release)
            slot.lease.release()

    @rule(target=leases, request=consumes(requests))
    def take_or_cancel(self, request: Future[Lease]) -> Slot:
        """Hold what a future has brought; cancel a future that is not done."""
        if request.cancel() or request.exception(LIMIT_S) is not None:
            return self.slot(None)
        return self.slot(request.result())

    # -- other calls --------------------------------------------------------------------------------------------------

    @rule(model=MODELS, word=st.sampled_from(["expire", "expire", "unpin"]))
    def say(self, model: str, word: str) -> None:
        getattr(self.scheduler, word)(self.engine.models[model])

    @rule(model=st.sampled_from(["a", "small"]))
    def pin_the_small(self, model: str) -> None:
        """Pin small models, which leave room for all others but c, whose requests time out or are cancelled."""
        self.scheduler.pin(self.engine.models[model])

    @rule(max_queue=st.sampled_from([1, 8]), keep=st.sampled_from([0, 0.01, 60]))
    def configure(self, max_queue: int, keep: float) -> None:
        with suppress(SchedulerClosed):
            self.scheduler.configure(max_queue=max_queue, keep_alive=keep)

    @rule()
    def look(self) -> None:
        status = self.scheduler.status()
        assert len(status.runners) <= MOST_RUNNERS
        assert all(device.held_bytes <= device.capacity_bytes for device in status.devices)
        self.start(lambda: list(iter(lambda: self.reader.take(0.0), None)))

    @precondition(lambda self: len(self.slots) > 8)
    @rule()
    def close(self) -> None:
        """Close at once, which revokes leases."""
        self.closed = self.engine.closing = True
        self.start(self.scheduler.close)

    # -- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def the_objects_saw_nothing_wrong(self) -> None:
        assert self.engine.wrong == []

    @invariant()
    def what_is_held_is_loaded(self) -> None:
        assert self.closed or all(slot.thing.loaded for slot in self.slots if slot.thing is not None)

    @invariant()
    def the_account_is_right(self) -> None:
        check_scheduler(self.scheduler)

    def teardown(self) -> None:
        try:
            for slot in self.slots:
                self.drop(slot)
                if slot.lease is not None:
                    slot.lease.release()
            self.let_everything_end()
        finally:
            self.scheduler.close()
            self.reader.close()
        for future in self.futures:
            if not future.cancelled() and isinstance(future.exception(0), BaseException):
                assert isinstance(future.exception(0), REFUSALS), repr(future.exception(0))
        self.the_objects_saw_nothing_wrong()
        assert self.engine.allocated == [], "objects are loaded after the close"
        assert not self.scheduler.debug_state().requests
        self.futures.clear()
        self.leaks.__exit__(None, None, None)

    def let_everything_end(self) -> None:
        """Every request is answered in time once leases are released and nothing is pinned."""
        for model in ("a", "small"):
            self.scheduler.unpin(self.engine.models[model])
        end = time.monotonic() + LIMIT_S
        while waiting := [future for future in self.futures if not future.done()]:
            assert time.monotonic() < end, f"{len(waiting)} requests never ended: {self.scheduler.status()}"
            self.give_back_what_came()
            wait_for(waiting, 0.01)
        self.give_back_what_came()
        if not self.closed:
            assert_soon(lambda: not any(runner.leases for runner in self.scheduler.status().runners))

    def give_back_what_came(self) -> None:
        for future in self.futures:
            if future.done() and not future.cancelled() and isinstance(future.exception(), type(None)):
                result = future.result()
                if isinstance(result, Lease):
                    result.release()


# Threads take their own time, so that a failure cannot be made smaller and may not come again. Each example is an order
# of calls, of which threads make many orders.
SchedulerMachine.TestCase.settings = settings(
    settings.default,
    max_examples=max(1, settings.default.max_examples // 5),
    phases=(Phase.generate,),
    database=None,
)
TestScheduler = SchedulerMachine.TestCase
