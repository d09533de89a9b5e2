"""Requests of callers that hold leases while they wait: what can never be granted is refused, and nothing else is."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from scheduler import (
    AcquireTimeout,
    DoesNotFit,
    Lease,
    PythonModel,
    Scheduler,
    SchedulerClosed,
    Settings,
    UnsupportedOption,
    WouldDeadlock,
)
from tests.support.leaks import no_leaks
from tests.support.waiting import LIMIT_S, assert_soon

A, B, C, SMALL = (
    PythonModel(name, load=object, memory={"cpu": size})
    for name, size in (("a", "300MiB"), ("b", "300MiB"), ("c", "300MiB"), ("small", "100MiB"))
)
SOON_S = 30.0  # for what is granted once a lease is released


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    """Yield a scheduler with room for one of the large models and the small one."""
    with no_leaks(), Scheduler(Settings(gpus=False, memory_limit="500MiB", close_timeout="1s")) as scheduler:
        yield scheduler


# -- certain ----------------------------------------------------------------------------------------------------------


def nested(scheduler: Scheduler) -> None:
    """Ask for a model in the block of another, with no name for the lease."""
    with scheduler.acquire(A):
        scheduler.acquire(B, timeout=LIMIT_S)


def nested_with_a_name(scheduler: Scheduler) -> None:
    """The same with a name for the lease."""
    with scheduler.acquire(A) as lease:
        assert lease.value is not None
        scheduler.acquire(B, timeout=LIMIT_S)


def nested_deeper(scheduler: Scheduler) -> None:
    """Ask below two leases, of which one is in the way."""
    with scheduler.acquire(SMALL), scheduler.acquire(A):
        scheduler.acquire(B, timeout=LIMIT_S)


def on_a_stack(scheduler: Scheduler) -> None:
    """Ask while leases are on an exit stack."""
    with ExitStack() as stack:
        stack.enter_context(scheduler.acquire(A))
        stack.enter_context(scheduler.acquire(B, timeout=LIMIT_S))


def in_a_task(scheduler: Scheduler) -> None:
    """Ask in a task, in `async with`."""

    async def ask() -> None:
        async with scheduler.acquire_async(A):
            await scheduler.acquire_async(B, timeout=LIMIT_S)

    asyncio.run(ask())


def in_a_task_with_a_lease(scheduler: Scheduler) -> None:
    """Ask in a task, in the block of a lease that was awaited."""

    async def ask() -> None:
        with await scheduler.acquire_async(A) as lease:
            assert lease.value is not None
            async with scheduler.acquire_async(B, timeout=LIMIT_S):
                pass

    asyncio.run(ask())


def for_its_own_memory(scheduler: Scheduler) -> None:
    """Ask for memory of the program's own in the block of a model."""
    with scheduler.acquire(A):
        scheduler.reserve("cpu", "300MiB", timeout=LIMIT_S)


CERTAIN = [nested, nested_with_a_name, nested_deeper, on_a_stack, in_a_task, in_a_task_with_a_lease, for_its_own_memory]


@pytest.mark.parametrize("ask", CERTAIN)
def test_u40_a_caller_that_would_wait_for_itself_is_told(
    scheduler: Scheduler, ask: Callable[[Scheduler], None]
) -> None:
    """The request is refused at once, names whose lease is in the way, and the model is free for others after it."""
    with pytest.raises(WouldDeadlock, match="beside 'a'") as caught:
        ask(scheduler)
    assert caught.value.model == ("the program's own memory" if ask is for_its_own_memory else "b")
    assert caught.value.holders == ("a",)
    scheduler.acquire(B, timeout=LIMIT_S).release()


def test_u40_a_second_lease_on_a_model_with_one_is_told(scheduler: Scheduler) -> None:
    """A caller that keeps the only lease that a runner may have is told too."""
    one = PythonModel("one", load=object, max_leases=1)
    with scheduler.acquire(one), pytest.raises(WouldDeadlock, match="'one'"):
        scheduler.acquire(one, timeout=LIMIT_S)


# -- not certain ------------------------------------------------------------------------------------------------------


def test_u40_what_fits_beside_is_granted(scheduler: Scheduler) -> None:
    """A nested request that fits is granted, and so is one for which another runner leaves."""
    scheduler.preload(SMALL).result(LIMIT_S)
    with scheduler.acquire(A), scheduler.acquire(SMALL), scheduler.acquire(A):
        pass
    with scheduler.acquire(SMALL), scheduler.acquire(B, timeout=SOON_S):
        pass


def entered_here(scheduler: Scheduler, hand_on: Callable[[Lease], None]) -> None:
    """Hand a lease on from inside its block."""
    with scheduler.acquire(A) as lease:
        hand_on(lease)
        scheduler.acquire(B, timeout=SOON_S).release()


def never_entered(scheduler: Scheduler, hand_on: Callable[[Lease], None]) -> None:
    """Hand a lease on that was in no block."""
    hand_on(scheduler.acquire(A))
    scheduler.acquire(B, timeout=SOON_S).release()


@pytest.mark.parametrize("held", [entered_here, never_entered])
@pytest.mark.parametrize("how", ["argument", "closure", "bound", "callback"])
def test_u40_a_lease_that_was_handed_to_another_thread_is_no_deadlock(
    scheduler: Scheduler, held: Callable[[Scheduler, Callable[[Lease], None]], None], how: str
) -> None:
    """A lease that another thread releases is waited for, however that thread came by it."""

    def when_somebody_waits(release: Callable[[], None]) -> None:
        assert_soon(lambda: scheduler.status().queue)
        release()

    with ThreadPoolExecutor(1) as pool:

        def hand_on(lease: Lease) -> None:
            match how:
                case "argument":
                    pool.submit(lambda one: when_somebody_waits(one.release), lease)
                case "closure":
                    pool.submit(lambda: when_somebody_waits(lambda: lease.release()))
                case "bound":
                    pool.submit(when_somebody_waits, lease.release)
                case "callback":
                    lease.on_wanted(lease.release)

        held(scheduler, hand_on)


def test_u40_a_name_that_an_inner_function_sees_is_no_deadlock(scheduler: Scheduler) -> None:
    """A lease that a function of another thread can name may be released there, so that the request waits."""
    with ThreadPoolExecutor(1) as pool:
        entered = threading.Event()

        def release_later() -> None:
            entered.wait(LIMIT_S)
            assert_soon(lambda: scheduler.status().queue)
            lease.release()

        later = pool.submit(release_later)
        with scheduler.acquire(A) as lease:
            entered.set()
            scheduler.acquire(B, timeout=SOON_S).release()
        later.result(LIMIT_S)


def test_u40_a_block_of_another_thread_is_no_deadlock(scheduler: Scheduler) -> None:
    """A lease belongs to the thread that entered it, and not to the one that it was granted in."""
    entered = threading.Event()

    def use(lease: Lease) -> None:
        with lease:
            entered.set()
            assert_soon(lambda: scheduler.status().queue)

    lease = scheduler.acquire(A)
    thread = threading.Thread(target=use, args=(lease,))
    thread.start()
    assert entered.wait(LIMIT_S)
    scheduler.acquire(B, timeout=SOON_S).release()
    thread.join(LIMIT_S)


def test_u40_memory_that_a_lease_elsewhere_makes_room_for_is_no_deadlock(scheduler: Scheduler) -> None:
    """A reservation waits where another thread can release the lease that is in its way."""
    with ThreadPoolExecutor(1) as pool, scheduler.acquire(A) as lease:
        pool.submit(lambda: (assert_soon(lambda: scheduler.status().queue), lease.release()))
        scheduler.reserve("cpu", "300MiB", timeout=SOON_S).release()


def waits(scheduler: Scheduler) -> list[str]:
    """Return what each request waits for."""
    return [each.waits_for for each in scheduler.status().queue]


@pytest.mark.parametrize("what", ["submit", "preload"])
def test_u40_a_future_of_a_caller_that_goes_on_is_no_deadlock(
    scheduler: Scheduler, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A caller that holds a lease and asks for a future does not wait: it is neither refused nor warned of."""
    with caplog.at_level(logging.WARNING, "loadmaster"), scheduler.acquire(A):
        future = getattr(scheduler, what)(B)
        assert_soon(lambda: waits(scheduler) == ["a to become idle"])
        scheduler._broker.look_round()
    granted = future.result(LIMIT_S)
    assert not caplog.records
    if granted is not None:
        granted.release()


def test_u40_a_future_waits_for_the_leases_of_others(scheduler: Scheduler) -> None:
    """A future waits for no caller where its model fits beside the leases of its caller, or others hold the room."""
    with scheduler.acquire(SMALL):
        scheduler.submit(B).result(SOON_S).release()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(scheduler.acquire, A).result(LIMIT_S)
        with scheduler.acquire(SMALL):
            future = scheduler.submit(B)
            assert_soon(lambda: scheduler.status().queue)
            assert all("callers that wait" not in each for each in waits(scheduler))
            other.release()
            future.result(SOON_S).release()


def test_u40_another_task_is_another_caller(scheduler: Scheduler) -> None:
    """A task that holds a lease is not told of a deadlock where another task of its loop asks."""

    async def main() -> None:
        async with scheduler.acquire_async(A):
            other = asyncio.create_task(ask())
            while not scheduler.status().queue:
                await asyncio.sleep(0.01)
        await other

    async def ask() -> None:
        async with scheduler.acquire_async(B, timeout=SOON_S):
            pass

    asyncio.run(main())


def test_u40_a_cycle_of_callers_is_told_of_once(scheduler: Scheduler, caplog: pytest.LogCaptureFixture) -> None:
    """Callers that wait for one another are warned of, once each, with the holders' names; and status says so."""
    two = [PythonModel(name, load=object, memory={"cpu": "200MiB"}) for name in ("first", "second")]
    both = threading.Barrier(2)

    def ask(mine: PythonModel[object], other: PythonModel[object]) -> type[BaseException] | None:
        with scheduler.acquire(mine):
            both.wait(LIMIT_S)
            try:
                scheduler.acquire(other, timeout=6).release()
            except Exception as error:
                return type(error)
        return None

    wanted = [PythonModel(name, load=object, memory={"cpu": "200MiB"}) for name in ("third", "fourth")]
    with caplog.at_level(logging.WARNING, "loadmaster"), ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(ask, mine, other) for mine, other in zip(two, wanted, strict=True)]
        assert_soon(
            lambda: (
                all("callers that wait" in each.waits_for for each in scheduler.status().queue)
                and len(scheduler.status().queue) == 2
            )
        )
        assert_soon(lambda: len([one for one in caplog.records if "waits for ever" in one.getMessage()]) == 2)
        assert all(future.result(LIMIT_S) is not WouldDeadlock for future in futures)
    said = [one.getMessage() for one in caplog.records if "waits for ever" in one.getMessage()]
    assert len(said) == 2 and all("first" in one and "second" in one for one in said)
    assert_soon(lambda: not scheduler._broker._warned)  # nothing is kept of requests that have left


# -- several at once --------------------------------------------------------------------------------------------------


def test_u40_several_models_are_acquired_at_once(scheduler: Scheduler) -> None:
    """Callers that ask for the same models in different orders are all served; a block releases all of them."""

    def use(models: list[PythonModel[object]]) -> list[str]:
        with scheduler.acquire_all(models, timeout=LIMIT_S) as leases:
            return [lease.model for lease in leases]

    pair, tiny = [A, SMALL], PythonModel("tiny", load=object, memory={"cpu": "100MiB"})
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(use, [pair, pair[::-1], [B, tiny], [tiny, B], [C, SMALL], pair]))
    assert found == [["a", "small"], ["small", "a"], ["b", "tiny"], ["tiny", "b"], ["c", "small"], ["a", "small"]]
    assert all(runner.leases == 0 for runner in scheduler.status().runners)


def test_u40_models_that_do_not_fit_together_are_refused(scheduler: Scheduler) -> None:
    """Nothing is granted, and the error names what the model does not fit beside."""
    with pytest.raises(DoesNotFit, match="no room for it beside 'a', with which it was asked for"):
        scheduler.acquire_all([A, B], timeout=LIMIT_S)
    assert all(runner.leases == 0 for runner in scheduler.status().runners)
    assert list(scheduler.acquire_all([])) == []


def test_u40_a_turn_that_does_not_come_in_time_is_an_acquire_timeout(scheduler: Scheduler) -> None:
    """The time limit of a call for several models holds while an earlier call waits for its leases."""
    lease = scheduler.acquire(A)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(scheduler.acquire_all, [SMALL, B])
        assert_soon(lambda: scheduler.status().queue)
        with pytest.raises(AcquireTimeout, match="earlier callers of acquire_all"):
            scheduler.acquire_all([SMALL], timeout=0.2)
        with pytest.raises(AcquireTimeout, match="earlier callers of acquire_all"):
            asyncio.run(granted_to_a_task(scheduler, [SMALL], timeout=0.2))
        lease.release()
        first.result(LIMIT_S).release()
    scheduler.acquire_all([SMALL, A], timeout=SOON_S).release()


# -- several at once, in tasks ----------------------------------------------------------------------------------------


async def granted_to_a_task(scheduler: Scheduler, models: list[PythonModel[object]], **asking: Any) -> list[str]:
    """Acquire models together in a task; return their names in the order of the leases."""
    async with scheduler.acquire_all_async(models, **asking) as leases:
        await asyncio.sleep(0)
        return [lease.model for lease in leases]


def test_u40_tasks_acquire_several_models_at_once(scheduler: Scheduler) -> None:
    """Tasks and threads that ask for the same models in different orders are all served, and all leases end."""
    pair, tiny = [A, SMALL], PythonModel("tiny", load=object, memory={"cpu": "100MiB"})
    orders = [pair, pair[::-1], [B, tiny], [tiny, B], [C, SMALL], pair]

    async def all_of_them() -> list[list[str]]:
        return await asyncio.gather(*(granted_to_a_task(scheduler, order, timeout=LIMIT_S) for order in orders))

    def in_a_thread(models: list[PythonModel[object]]) -> list[str]:
        with scheduler.acquire_all(models, timeout=LIMIT_S) as leases:
            return [lease.model for lease in leases]

    with ThreadPoolExecutor(4) as pool:
        loops = [pool.submit(lambda: asyncio.run(all_of_them())) for _ in range(2)]
        threads = [pool.submit(in_a_thread, order) for order in orders]
        names = [[model.name for model in order] for order in orders]
        assert [each.result(LIMIT_S) for each in threads] == names
        assert [each.result(LIMIT_S) for each in loops] == [names, names]
    assert all(runner.leases == 0 for runner in scheduler.status().runners)


def test_u40_leases_of_several_models_are_awaited(scheduler: Scheduler) -> None:
    """Awaited leases are the program's to release, each await makes new requests, and no models are none."""

    async def main() -> None:
        asked = scheduler.acquire_all_async([A, SMALL])
        with await asked as leases, await asked as more:
            assert [lease.model for lease in (*leases, *more)] == ["a", "small"] * 2
            assert [runner.leases for runner in scheduler.status().runners] == [2, 2]
        async with asked:
            with pytest.raises(RuntimeError, match="entered already"):
                await asked.__aenter__()
        assert list(await scheduler.acquire_all_async([])) == []

    asyncio.run(main())
    assert all(runner.leases == 0 for runner in scheduler.status().runners)


def test_u40_models_of_a_task_that_do_not_fit_together_are_refused(scheduler: Scheduler) -> None:
    """A task has the error of a thread: nothing is granted, and the turn passes on."""
    with pytest.raises(DoesNotFit, match="no room for it beside 'a', with which it was asked for"):
        asyncio.run(granted_to_a_task(scheduler, [A, B]))
    assert asyncio.run(granted_to_a_task(scheduler, [B, SMALL], timeout=SOON_S)) == ["b", "small"]
    with pytest.raises(UnsupportedOption):
        scheduler.acquire_all_async([A], num_ctx=-1)


def test_u40_a_task_that_is_cancelled_leaves_its_turn_and_its_leases(scheduler: Scheduler) -> None:
    """A task that waits with a lease granted, and one that waits for its turn, leave nothing behind."""

    async def main() -> None:
        async with scheduler.acquire_async(A):
            first = asyncio.create_task(granted_to_a_task(scheduler, [SMALL, B]))
            second = asyncio.create_task(granted_to_a_task(scheduler, [SMALL]))
            while not scheduler.status().queue:
                await asyncio.sleep(0.01)
            second.cancel()
            first.cancel()
            await asyncio.wait([first, second])
            assert first.cancelled() and second.cancelled()
            assert sum(runner.leases for runner in scheduler.status().runners) == 1
        assert await granted_to_a_task(scheduler, [B, SMALL], timeout=SOON_S) == ["b", "small"]

    asyncio.run(main())


def test_u40_a_close_refuses_tasks_that_wait_for_several_models() -> None:
    """The task that waits for a lease, and the task that waits for its turn, are told that the scheduler is closed."""

    async def main() -> None:
        async with Scheduler(gpus=False, memory_limit="500MiB", close_timeout="1s") as scheduler:
            held = await scheduler.acquire_async(A)
            tasks = [asyncio.create_task(granted_to_a_task(scheduler, [SMALL, B])) for _ in range(2)]
            while not scheduler.status().queue:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0)
            closing = asyncio.create_task(scheduler.aclose())
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(one) for one in found] == [SchedulerClosed] * 2
            held.release()
            await closing

    with no_leaks():
        asyncio.run(main())
