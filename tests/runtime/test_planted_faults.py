"""Faults that are small and easily made in the shell: a late wake-up, a pool without a thread, a stale reading."""

from __future__ import annotations

import threading
from pathlib import Path
from unittest.mock import Mock

import pytest

from fsm.core import Core
from fsm.domain.devices import DeviceId
from fsm.domain.options import Options
from fsm.machine.request import ModelId, Purpose, RequestId, RequestSpec
from fsm.messages.decision_log import Decision
from fsm.messages.events import Acquire
from fsm.messages.reasons import Queued
from scheduler import Gap, LoadFailed, PythonModel, Scheduler, Settings
from scheduler.concurrency.thread_pool import ThreadPool
from scheduler.engines.process_supervisor import ChildSupervisor
from scheduler.runtime.device_locks import DeviceLocks
from scheduler.runtime.driver import Driver
from scheduler.runtime.event_stream import EventStream
from scheduler.runtime.memory_sampler import MemorySampler
from tests.support.leaks import no_leaks
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import LIMIT_S, assert_soon


@pytest.mark.parametrize("earlier_s", [0.001, 0.5, 30.0])
def test_a_deadline_that_is_little_earlier_wakes_the_thread_that_keeps_the_time(earlier_s: float) -> None:
    """A deadline shortly before the one that is slept for is kept, and not told together with that one."""
    core = Core()
    driver = Driver(core, lambda: 0.0, Mock(), Mock(return_value=False), Mock())
    driver._asleep_until = 100.0  # as its thread would have it, which is not started here

    def post(request: int, timeout_s: float) -> None:
        spec = RequestSpec(ModelId("a"), Options(), Purpose.lease, 0)
        event = Acquire(RequestId(request), spec, None, timeout_s)
        thread = threading.Thread(target=driver.post, args=(event,))
        thread.start()
        thread.join(LIMIT_S)

    post(1, 100.0)
    assert driver._wake.empty(), "nothing is due before what is slept for"
    post(2, 100.0 - earlier_s)
    assert driver._wake.get_nowait()


def test_a_pool_has_a_thread_for_a_job_that_comes_while_the_only_one_is_busy() -> None:
    """A thread that takes a job sees to it that another waits for the next, although no job is queued yet."""
    pool, gate, begun, ran = ThreadPool("test", 2), threading.Event(), threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        gate.wait(LIMIT_S)

    try:
        pool.put(block)
        assert begun.wait(LIMIT_S)
        assert_soon(lambda: len(pool._threads) == 2)
        pool.put(ran.set)
        assert ran.wait(LIMIT_S), "the job waits for a thread that is busy"
    finally:
        gate.set()
        assert pool.close(LIMIT_S) == []


def test_a_stop_waits_for_no_job_but_stops() -> None:
    """A runner is stopped and unloaded while every thread for probes, loads, inspections and callbacks is busy."""
    gate, begun = threading.Event(), threading.Semaphore(0)

    def block() -> None:
        begun.release()
        gate.wait(3 * LIMIT_S)

    with no_leaks(), Scheduler(Settings(gpus=False, measurement_file=None)) as scheduler:
        scheduler.acquire(model := PythonModel("a", load=object)).release()
        executor = scheduler._executor
        pools = executor.worker_pool, executor.launch_pool, executor.inspections._pool, executor.callback_pool
        try:
            for pool in pools:
                for _ in range(pool._limit):
                    pool.put(block)
                    assert begun.acquire(timeout=LIMIT_S)
            scheduler.expire(model)
            assert_soon(lambda: not scheduler.status().runners)
        finally:
            gate.set()


def test_a_reading_under_way_does_not_answer_a_thread_that_asks_during_it() -> None:
    """A thread that asks while the devices are read gets a reading that begins after it has asked."""
    begun, gate = threading.Semaphore(0), threading.Semaphore(0)
    posted: list[object] = []

    def read() -> tuple[()]:
        begun.release()
        assert gate.acquire(timeout=LIMIT_S)
        return ()

    pool = ThreadPool("test", 1)
    sampler = MemorySampler(Mock(sample=read), pool, lambda: (), posted.append)
    answers: list[bool] = []
    try:
        sampler.request()
        assert begun.acquire(timeout=LIMIT_S)
        asking = threading.Thread(target=lambda: answers.append(sampler.refresh(LIMIT_S)))
        asking.start()
        assert_soon(lambda: len(sampler._asked) == 1)
        gate.release()  # the first reading ends
        assert begun.acquire(timeout=LIMIT_S), "no second reading begins"
        assert len(posted) == 1 and not answers
        gate.release()
        asking.join(LIMIT_S)
        assert answers == [True] and len(posted) == 2
    finally:
        gate.release()
        assert pool.close(LIMIT_S) == []


@pytest.mark.parametrize("dropped", [1, 2, 7])
def test_a_gap_counts_each_entry_that_was_dropped(dropped: int) -> None:
    """A listener that counts gaps and entries misses none, also in the second gap of a stream."""
    stream, limit = EventStream(3, str), 3
    entries = [Decision(float(number), "queued", ModelId("a"), Queued(number)) for number in range(limit + dropped)]
    for _ in range(2):
        stream.offer(entries[:-1])
        stream.offer(entries[-1:])
        assert stream.take(0) == Gap(dropped)
        told = [stream.take(0) for _ in range(limit)]
        assert [getattr(each, "at", None) for each in told] == [float(dropped + number) for number in range(limit)]
        assert stream.take(0) is None


def test_every_thread_that_reads_a_stream_is_woken() -> None:
    """Threads that wait at one stream have an entry each where so many come at once, and all end with the stream."""
    stream, told = EventStream(9, str), list[object]()
    readers = [threading.Thread(target=lambda: told.extend(stream), daemon=True) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        stream.offer([Decision(float(number), "queued", ModelId("a"), Queued(1)) for number in range(3)])
        assert_soon(lambda: len(told) == 3)
    finally:
        stream.close()
    for reader in readers:
        reader.join(LIMIT_S)
    assert not any(reader.is_alive() for reader in readers)


def test_locks_that_were_taken_before_one_that_is_contended_are_not_held(tmp_path: Path) -> None:
    """A claim of two devices that waits for the second holds neither, and both once the second is free."""
    first, second = DeviceId("a"), DeviceId("b")
    one, other = (DeviceLocks(tmp_path / "locks", Mock(), Mock()) for _ in range(2))
    third = DeviceLocks(tmp_path / "locks", Mock(), Mock())
    try:
        one.claim(1, [second])
        assert_soon(lambda: one.held == {second})
        other.claim(1, [first, second])
        assert_soon(lambda: other._contended.called)  # type: ignore[attr-defined]  # it is a mock
        assert other.held == frozenset()
        third.claim(1, [first])
        assert_soon(lambda: third.held == {first})
        third.give_back(1)
        one.give_back(1)
        assert_soon(lambda: other.held == {first, second})
    finally:
        assert [name for each in (one, other, third) for name in each.close(LIMIT_S)] == []


def test_the_executor_keeps_nothing_of_a_model_that_is_forgotten(tmp_path: Path) -> None:
    """What was noted of a model's files, and of a load that failed, goes with the model."""
    file = write_tiny_model(tmp_path / "a.gguf", context=1024)
    with no_leaks(), Scheduler(Settings(gpus=False, measurement_file=None, cpu_threads=1)) as scheduler:
        scheduler.acquire(file, num_ctx=256).release()
        with pytest.raises(LoadFailed):
            scheduler.acquire(PythonModel("b", load=lambda: 1 / 0))
        executor = scheduler._executor
        by_model = [each for each in vars(executor).values() if isinstance(each, dict)]
        models = {key for each in by_model for key in each if isinstance(key, str)}
        assert len(models) == 2
        for model in models:
            executor.forget_model(ModelId(model))
        assert not [key for each in by_model for key in each if isinstance(key, str)]


@pytest.mark.parametrize("graces_s", [(5.0, 60.0), (60.0, 5.0)])
def test_of_two_stops_of_a_child_that_is_being_started_the_shorter_grace_counts(graces_s: tuple[float, float]) -> None:
    """A child that is stopped twice during its start has the shorter grace, in whichever order the stops come."""
    supervisor, child = ChildSupervisor.__new__(ChildSupervisor), Mock()
    supervisor._runs, supervisor._stops, supervisor._children = {}, {}, {child}
    child.settle.return_value = False
    for grace_s in graces_s:
        supervisor.stop(child, grace_s)
    assert supervisor._stops[child] == min(graces_s)
