"""Leases by themselves: who keeps one alive, and what is known of a runner once its holder was told of its end."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from scheduler import Lease, PythonModel, Scheduler, Settings
from tests.leaks import no_leaks
from tests.waiting import LIMIT_S, assert_soon

MODEL = PythonModel("a", load=object)


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    """One for objects."""
    with no_leaks(), Scheduler(Settings(gpus=False)) as scheduler:
        yield scheduler


def leases(scheduler: Scheduler) -> list[int]:
    """How many leases are held on each runner."""
    return [runner.leases for runner in scheduler.status().runners]


async def awaited(scheduler: Scheduler) -> Lease:
    """Await a lease."""
    return await scheduler.acquire_async(MODEL)


ASK: dict[str, Callable[[Scheduler], Any]] = {
    "acquire": lambda scheduler: scheduler.acquire(MODEL),
    "submit": lambda scheduler: scheduler.submit(MODEL).result(LIMIT_S),
    "a future": lambda scheduler: [future := scheduler.submit(MODEL), future.result(LIMIT_S)][0],
    "acquire_async": lambda scheduler: asyncio.run(awaited(scheduler)),
}


@pytest.mark.parametrize("ask", ASK)
def test_a_forgotten_lease_is_released_however_it_was_asked_for(scheduler: Scheduler, ask: str) -> None:
    """Nothing of the scheduler's own keeps it alive, and its holder is warned."""
    held = ASK[ask](scheduler)
    assert held and leases(scheduler) == [1]
    with pytest.warns(ResourceWarning, match="never released"):
        del held
        assert_soon(lambda: gc.collect() >= 0 and leases(scheduler) == [0])


def test_what_is_entered_cannot_be_entered_again(scheduler: Scheduler) -> None:
    """Its first lease would be lost; once it is left it asks anew."""
    acquiring = scheduler.acquire_async(MODEL)

    async def enter() -> None:
        async with acquiring:
            pass

    async def main() -> None:
        async with acquiring:
            with pytest.raises(RuntimeError, match="acquire_async again"):
                await enter()
        assert leases(scheduler) == [0]
        await enter()
        refused = await asyncio.gather(enter(), enter(), return_exceptions=True)
        assert [type(each) for each in refused] == [type(None), RuntimeError]

    asyncio.run(main())
    assert leases(scheduler) == [0]
