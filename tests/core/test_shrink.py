"""Memory that shrinks while it is held: which runners are evicted at once, which later, and which never."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from fsm.domain.devices import HOST
from fsm.eviction.policies import LeastRecentlyUsed
from fsm.machine.runner import RunnerState
from fsm.messages.commands import Stop
from fsm.messages.decision_log import Entry, Transition
from fsm.messages.events import Configure
from fsm.messages.reasons import DeviceShrunk
from fsm.messages.refusals import DoesNotFitRefusal
from tests.core import test_machine
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    exited,
    launched,
    layered,
    memory,
    pin,
    refused,
    release,
    stopped,
    unpin,
)

GIB = amount("1GiB")


def shrink(pool: PoolUnderTest, size: str, device: str = HOST) -> list[object]:
    """Set the capacity of a device, and read it."""
    pool.capacities |= {device: amount(size)}
    return list(pool.feed(pool.sample()))


def test_as_few_idle_runners_go_as_lower_memory_asks_for() -> None:
    """As few idle runners as needed are evicted, the least recently used first."""
    pool = a_pool(capacity="8GiB", sizes={"a": "1GiB", "b": "4GiB", "c": "2GiB"}, policy=LeastRecentlyUsed())
    for model in "abc":
        pool.idle(model).advance("1s")
    assert shrink(pool, "7GiB") == []
    assert shrink(pool, "3GiB") == [Stop(2)]
    assert shrink(pool, "2GiB") == [Stop(1)]
    pool.settle()
    assert pool.free() == 0


def test_a_limit_that_cannot_be_met_takes_no_runner_that_would_not_help() -> None:
    """Where only a busy runner holds too much of a device, another limit evicts no more runners than it asks for."""
    pool = a_pool("64GiB", ["8GiB"], each="1GiB", max_runners=9).declare("busy", layered(4, "512MiB"))
    pool.ready("busy", lease=1)
    for model in "bcde":
        pool.idle(model).advance("1s")
    assert shrink(pool, "1GiB", "gpu0") == []
    assert len(stopped(pool.feed(Configure(max_runners=4)))) == 1


def test_a_device_that_cannot_be_freed_takes_no_runner_of_another_device() -> None:
    """Where one device stays too full, as few runners of another device go as free what is too much on that."""
    pool = a_pool("64GiB", ["8GiB", "8GiB"], max_runners=9).declare("busy", layered(5, "1GiB")).ready("busy", lease=1)
    for model in "xyz":
        pool.declare(model, layered(2, "512MiB")).idle(model, main_gpu=1).advance("1s")
    pool.capacities |= {"gpu0": amount("2GiB"), "gpu1": amount("2500MiB")}
    assert len(stopped(pool.feed(pool.sample()))) == 1


def test_all_idle_runners_go_where_they_are_not_enough_and_busy_ones_when_they_rest() -> None:
    """All idle runners are evicted where they do not free enough, and a busy one when it becomes idle."""
    pool = a_pool(capacity="8GiB", sizes={"a": "1GiB", "b": "4GiB"}).idle("a").ready("b", lease=1)
    assert shrink(pool, "2GiB") == [Stop(1)]
    pool.settle()
    assert pool.free() == -2 * GIB
    assert pool.feed(release(1)) == [Stop(2)]


def test_a_busy_runner_that_fits_again_by_the_time_it_rests_stays() -> None:
    """A busy runner stays if the memory suffices by the time it becomes idle."""
    pool = a_pool(capacity="8GiB", sizes={"a": "4GiB", "b": "4GiB"}).ready("a", lease=1).ready("b", lease=2)
    assert shrink(pool, "4GiB") == []
    pool.feed(release(1), exited(1))
    assert pool.feed(release(2)) == []
    assert pool.state("b") is RunnerState.idle


def test_a_pinned_runner_stays_in_memory_that_was_lowered() -> None:
    """A pinned runner stays in memory that shrank, until it is unpinned."""
    pool = a_pool(sizes={"a": "4GiB"}).idle("a")
    pool.feed(pin("a"))
    assert shrink(pool, "2GiB") == []
    assert refused(pool.feed(acquire("b", request=1))) == {1: DoesNotFitRefusal}
    assert pool.feed(unpin("a")) == [Stop(1)]


def test_who_asks_while_memory_is_overdrawn_waits_or_is_refused() -> None:
    """A request that fits once a busy runner has gone waits for it, and one that never fits is refused at once."""
    pool = a_pool(sizes={"a": "6GiB", "b": "2GiB", "c": "6GiB"}).ready("a", lease=1)
    shrink(pool, "4GiB")
    commands = pool.feed(acquire("b", request=2), acquire("c", request=3))
    assert (refused(commands), launched(commands), pool.waiting()) == ({3: DoesNotFitRefusal}, [], [2])
    assert stopped(pool.feed(release(1))) == [1]
    assert launched(pool.feed(exited(1))) == ["b"]


def test_memory_that_was_raised_again_saves_who_has_not_gone_yet() -> None:
    """A busy runner stays if the memory is raised again before it becomes idle."""
    pool = a_pool(sizes={"a": "6GiB"}).ready("a", lease=1)
    shrink(pool, "4GiB")
    shrink(pool, "8GiB")
    assert pool.feed(release(1)) == []


def test_only_runners_on_the_device_that_has_less_go() -> None:
    """Only runners on the device that shrank are evicted."""
    pool = a_pool(capacity="64GiB", gpus=("8GiB", "8GiB"), each="1GiB")
    pool.declare("a", layered(4, "512MiB")).declare("b", layered(4, "512MiB"))
    pool.idle("host").advance("1s")
    pool.idle("a").idle("b")
    assert shrink(pool, "1GiB", "gpu1") == [Stop(3)]


def test_a_device_that_is_not_read_any_more_takes_nobody_with_it() -> None:
    """A device that is no longer read evicts no runner."""
    pool = a_pool(capacity="64GiB", gpus=("8GiB",)).declare("a", layered(4, "512MiB")).idle("a")
    del pool.capacities["gpu0"]
    pool.occupied.clear()
    assert pool.feed(pool.sample()) == []
    assert shrink(pool, "8GiB", "gpu0") == []
    assert shrink(pool, "1GiB", "gpu0") == [Stop(1)]


def test_a_device_that_comes_back_smaller_counts_as_lowered() -> None:
    """A device that returns with less memory than before counts as shrunk."""
    pool = a_pool(capacity="64GiB", gpus=("8GiB",)).declare("a", layered(4, "512MiB")).idle("a")
    del pool.capacities["gpu0"]
    pool.occupied.clear()
    pool.feed(pool.sample())
    assert shrink(pool, "1GiB", "gpu0") == [Stop(1)]


def test_a_runner_that_grew_beyond_its_promise_is_not_given_up_for_it() -> None:
    """A runner that grew beyond its reservation is not evicted for that, because no device shrank."""
    pool = a_pool(capacity="8GiB").idle("a")
    pool.occupied[1] = {HOST: 9 * GIB}
    assert pool.feed(pool.sample()) == []
    assert shrink(pool, "7GiB") == [Stop(1)]


def test_memory_that_was_lowered_and_suffices_is_like_any_other() -> None:
    """Growth after memory shrank and sufficed evicts no runner."""
    pool = a_pool(capacity="8GiB").idle("a")
    assert shrink(pool, "7GiB") == []
    pool.occupied[1] = {HOST: 9 * GIB}
    assert pool.feed(pool.sample()) == []


def test_a_runner_that_grew_on_one_device_is_left_alone_when_another_has_less() -> None:
    """A runner that grew on one device stays when another device shrinks."""
    pool = a_pool(capacity="64GiB", gpus=("8GiB",)).declare("a", layered(4, "512MiB")).idle("a")
    pool.ready("b", lease=1)
    pool.occupied[1] = {"gpu0": 9 * GIB}
    assert pool.feed(pool.sample()) == []
    assert shrink(pool, "4GiB") == []


def test_an_idle_runner_is_not_given_up_for_a_device_that_only_busy_ones_hold() -> None:
    """An idle runner is not evicted for a device on which it holds nothing."""
    pool = a_pool(capacity="64GiB", gpus=("8GiB",), each="1GiB").declare("a", layered(4, "512MiB"))
    pool.ready("a", lease=1).idle("b")
    assert shrink(pool, "1GiB", "gpu0") == []


def test_what_goes_anyway_serves_who_waits() -> None:
    """A runner that is evicted for less memory frees it for a waiting request, and no other runner is evicted."""
    sizes = {"loading": "1GiB", "old": "4GiB", "young": "2GiB", "next": "1GiB"}
    pool = a_pool(capacity="9GiB", sizes=sizes, max_host_loads=1, max_runners=9).idle("old")
    pool.advance("1s")
    pool.idle("young").loading("loading", request=1)
    assert pool.feed(acquire("next", request=2)) == []
    assert shrink(pool, "6GiB") == [Stop(1)]


def test_memory_of_the_programs_own_is_part_of_what_is_too_much() -> None:
    """A runner is evicted where memory of the program's own and the runner exceed the memory."""
    pool = a_pool(sizes={"a": "2GiB"}).idle("a")
    pool.feed(memory(1, cpu="4GiB"))
    assert shrink(pool, "5GiB") == [Stop(1)]


def test_who_goes_for_one_device_counts_for_the_other() -> None:
    """A model that is split over two devices and evicted for one of them counts for the other."""
    pool = a_pool(capacity="64GiB", gpus=("8GiB", "9GiB"))
    pool.declare("small", layered(2, "512MiB")).declare("split", layered(8, "1GiB"))
    pool.idle("small").advance("1s")
    pool.idle("split")
    assert dict(pool.launches[2].placement.bytes) == {"gpu0": 7 * GIB, "gpu1": GIB, HOST: 0}
    pool.capacities |= {"gpu0": 4 * GIB, "gpu1": GIB}
    assert pool.feed(pool.sample()) == [Stop(2)]


def test_why_a_runner_went_for_less_memory_is_noted() -> None:
    """The log of the transition names the device that shrank."""
    pool = a_pool().idle("a")
    pool.core.decision_log = list[Entry]()
    shrink(pool, "1GiB")
    (entry,) = pool.core.decision_log
    assert isinstance(entry, Transition)
    assert (entry.trigger, entry.why) == ("expire", DeviceShrunk(HOST))


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    busy=st.integers(0, 63),
    capacity=st.integers(1, 24),
    limit=st.integers(0, 4),
)
def test_limits_hold_again_when_everything_has_rested(sizes: list[int], busy: int, capacity: int, limit: int) -> None:
    """Once all runners are idle the limits hold, and no runner was evicted needlessly."""
    models = [f"m{index}" for index in range(len(sizes))]
    pool = a_pool(
        capacity="24GiB", sizes={m: f"{size}GiB" for m, size in zip(models, sizes, strict=True)}, max_runners=9
    )
    for index, model in enumerate(models):
        pool.ready(model, lease=index + 1) if busy >> index & 1 else pool.idle(model)
    pool.feed(Configure(max_runners=limit))
    shrink(pool, f"{capacity}GiB")
    for index in range(len(models)):
        pool.feed(release(index + 1))
    pool.settle()
    left = [size for model, size in zip(models, sizes, strict=True) if pool.state(model) is RunnerState.idle]
    assert sum(left) <= capacity
    assert len(left) <= (limit or 9)
    assert left == sizes or sum(sizes) > capacity or len(sizes) > (limit or 9)


# -- all events together ----------------------------------------------------------------------------------------------


class ShrinkingMachine(test_machine.CoreMachine):
    """The random core, on devices that shrink and grow, under limits that change.

    More may be reserved than a device has, since busy runners stay; but then no idle runner stays on the device.
    """

    @rule(host=st.integers(2, 10), gpu=st.integers(1, 8))
    def resize(self, host: int, gpu: int) -> None:
        sizes = {device: host if device == HOST else gpu for device in self.pool.capacities}
        self.pool.capacities = {device: size * GIB for device, size in sizes.items()}
        self.feed(self.pool.sample())

    @rule(keep_alive_s=st.sampled_from([0.0, 1.0, 60.0, math.inf]))
    def keep(self, keep_alive_s: float) -> None:
        self.feed(Configure(keep_alive_s=keep_alive_s))


ShrinkingMachine.TestCase.settings = settings(
    settings.default, max_examples=max(10, settings().max_examples // 4), stateful_step_count=60
)
TestLimits = ShrinkingMachine.TestCase
