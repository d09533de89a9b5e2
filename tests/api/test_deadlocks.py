"""Requests of callers that hold leases while they wait: what can never be granted is refused, and nothing else is."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from scheduler import DoesNotFit, Lease, PythonModel, Scheduler, Settings, WouldDeadlock
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


CERTAIN = [nested, nested_with_a_name, nested_deeper, on_a_stack, in_a_task, in_a_task_with_a_lease]


@pytest.mark.parametrize("ask", CERTAIN)
def test_u40_a_caller_that_would_wait_for_itself_is_told(
    scheduler: Scheduler, ask: Callable[[Scheduler], None]
) -> None:
    """The request is refused at once, names whose lease is in the way, and the model is free for others after it."""
    with pytest.raises(WouldDeadlock, match="beside 'a'") as caught:
        ask(scheduler)
    assert (caught.value.model, caught.value.holders) == ("b", ("a",))
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
