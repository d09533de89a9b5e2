"""The limit of leases of a runner, as programs set it: for all models, for one, and for objects of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_type

import pytest

from scheduler import (
    AcquireTimeout,
    InvalidSettings,
    Lease,
    ModelSpec,
    PythonModel,
    QueueFull,
    Scheduler,
    Settings,
)
from scheduler.testing import FakeMachine
from tests.support.leaks import no_leaks
from tests.support.waiting import LIMIT_S, assert_soon


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with no_leaks():
        yield


class NotForTwo:
    """An object that notices when two threads are in it."""

    def __init__(self) -> None:
        self.inside = self.most = 0

    def work(self) -> None:
        """Take a moment."""
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.01)
        self.inside -= 1


def most_at_once(scheduler: Scheduler, model: PythonModel[NotForTwo], threads: int = 6) -> int:
    """Return how many of some threads were in an object at once."""

    def use(_: int) -> None:
        with scheduler.acquire(model, timeout=LIMIT_S) as lease:
            lease.value.work()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(use, range(2 * threads)))
    with scheduler.acquire(model) as lease:
        return lease.value.most


def test_u53_an_object_is_used_by_one_thread_at_a_time_where_its_model_says_so() -> None:
    """With `max_leases=1` no two threads have the object at once, whoever asks for it."""
    with Scheduler(Settings(gpus=False)) as scheduler:
        assert most_at_once(scheduler, PythonModel("one", load=NotForTwo, max_leases=1)) == 1


def test_u53_the_setting_holds_for_objects_that_name_nothing() -> None:
    """The setting limits all models; 0 in a model lifts the limit for it."""
    with Scheduler(Settings(gpus=False, max_leases=1)) as scheduler:
        assert most_at_once(scheduler, PythonModel("one", load=NotForTwo)) == 1
        free = PythonModel("free", load=NotForTwo, max_leases=0)
        leases = [scheduler.acquire(free, timeout=LIMIT_S) for _ in range(3)]
        assert len({id(lease.value) for lease in leases}) == 1  # all of them have the same object
        for lease in leases:
            lease.release()


def test_u53_another_model_of_the_same_name_lifts_no_limit() -> None:
    """The limit belongs to the model, and a request by another description of it that names none keeps it."""
    one, other = PythonModel("one", load=object, max_leases=1), PythonModel("one", load=object)
    with Scheduler(Settings(gpus=False)) as scheduler, scheduler.acquire(one):
        error = scheduler.submit(other, timeout="50ms").exception(LIMIT_S)
    assert isinstance(error, AcquireTimeout) and error.waiting_for == "a lease on its model to be released"


@pytest.mark.parametrize("how", ["acquire", "submit", "acquire_async"])
def test_u42_requests_that_wait_for_a_lease_are_seen_and_refused_like_any_others(how: str) -> None:
    """Status shows them with their reason, `max_queue` refuses one more, and the next lease goes to the first."""
    model = PythonModel("one", load=object, max_leases=1)

    def ask(scheduler: Scheduler) -> Lease:
        match how:
            case "acquire":
                return scheduler.acquire(model)
            case "submit":
                return scheduler.submit(model).result(LIMIT_S)
            case _:

                async def awaited() -> Lease:
                    return await scheduler.acquire_async(model)

                return asyncio.run(awaited())

    with Scheduler(Settings(gpus=False, max_queue=2)) as scheduler, ThreadPoolExecutor(3) as pool:
        held = scheduler.acquire(model)
        waiting: list[Future[Lease]] = []
        for count in (1, 2):
            waiting.append(pool.submit(ask, scheduler))
            assert_soon(lambda count=count: len(scheduler.status().queue) == count)  # type: ignore[misc]  # binds now
        assert {each.waits_for for each in scheduler.status().queue} == {"a lease on its model to be released"}
        with pytest.raises(QueueFull):
            pool.submit(ask, scheduler).result(LIMIT_S)
        for future in waiting:
            held.release()
            held = future.result(LIMIT_S)
        held.release()
        assert scheduler.status().queue == ()


def test_u42_a_limit_is_changed_while_requests_wait() -> None:
    """A higher limit grants the requests that wait; a lower one ends no lease."""
    model = PythonModel("one", load=object)
    with Scheduler(Settings(gpus=False, max_leases=1)) as scheduler:
        leases = [scheduler.acquire(model)]
        futures = [scheduler.submit(model) for _ in range(2)]
        assert len(scheduler.status().queue) == 2
        scheduler.configure(max_leases=0)
        leases += [future.result(LIMIT_S) for future in futures]
        scheduler.configure(max_leases=1)
        assert scheduler.settings.max_leases == 1
        assert not any(lease.lost for lease in leases)
        for lease in leases:
            lease.release()


def test_u42_files_have_limits_of_their_own(tmp_path: Path) -> None:
    """`ModelSpec(max_leases=…)` limits one file, under each of its names, and no other file."""
    path = str(tmp_path / "chat")
    with FakeMachine(memory="8GiB", max_leases=2) as fake:
        fake.model("chat", size="1GiB").model("coder", size="1GiB")
        held = fake.scheduler.acquire(ModelSpec("chat", path, max_leases=1))
        second = fake.scheduler.submit(path, num_ctx=None)
        others = [fake.scheduler.submit("coder") for _ in range(3)]
        fake.advance("1s")
        granted = [future.result(LIMIT_S) for future in others[:2]]
        assert len({lease.runner for lease in granted}) == 1 and not second.done() and not others[2].done()
        assert [wait.model for wait in fake.scheduler.status().queue] == ["chat", "coder"]
        held.release()
        second.result(LIMIT_S).release()
        for future in others:
            future.result(LIMIT_S).release()


def test_u42_a_fit_says_that_a_lease_is_waited_for() -> None:
    """`fit` tells of a loaded model without a lease left that a request would wait for one."""
    with FakeMachine(max_leases=1) as fake:
        fake.model("chat", size="1GiB")
        with fake.scheduler.acquire("chat"):
            found = fake.scheduler.fit("chat")
            assert (found.verdict, found.reason) == ("waits", "a lease on its model to be released")
        assert fake.scheduler.fit("chat").verdict == "warm"


@pytest.mark.parametrize("most", [-1, 1.5, True, "1", [1]])
def test_u42_a_limit_that_is_none_is_refused(most: Any) -> None:
    """A limit of leases is a whole number of at least 0; settings take it as text too."""
    for make in (lambda: ModelSpec("m", "m.gguf", max_leases=most), lambda: PythonModel("o", object, max_leases=most)):
        with pytest.raises(InvalidSettings, match="max_leases"):
            make()
    if most != "1":
        with pytest.raises(InvalidSettings, match="max_leases"):
            Settings(max_leases=most)


def test_u53_the_value_of_a_lease_has_the_type_of_its_object() -> None:
    """Type checkers know what a lease on an object of one's own is on."""
    with Scheduler(Settings(gpus=False)) as scheduler:
        model = PythonModel("index", load=lambda: {"a": 1}, unload=dict.clear)
        with scheduler.acquire(model) as lease:
            assert_type(lease.value, dict[str, int])
            assert lease.value == {"a": 1}
        future = scheduler.submit(model)
        with future.result(LIMIT_S) as other:
            assert_type(other.value, dict[str, int])

        async def use() -> dict[str, int]:
            async with scheduler.acquire_async(model) as lease:
                return assert_type(lease.value, dict[str, int])

        assert asyncio.run(use()) == {"a": 1}
    if TYPE_CHECKING:
        assert_type(scheduler.acquire("a.gguf").value, Any)
