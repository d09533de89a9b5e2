"""Threads of a runner: the host's cores, divided among the runners that are likely to compute at once."""

from __future__ import annotations

import pytest

from fsm.core import Core
from fsm.domain.devices import Threads
from fsm.domain.options import Options
from fsm.messages.commands import Grant, Launch
from fsm.verification.state_invariants import check_state
from scheduler.recording.codec import decode_state, encode
from tests.support.models import MIB, a_model
from tests.support.pool import PoolUnderTest, a_pool, acquire, exited, expire, loaded, preload, release

MODELS = "abcdefgh"
SMALL = a_model((32 * MIB,) * 4)  # takes 182 MiB in all


def a_host(cores: int, capacity: str = "16GiB", **how: object) -> PoolUnderTest:
    """Return a pool whose host has so many cores, and whose models are small and compute there."""
    pool = a_pool(capacity=capacity, **how)
    pool.cores = cores
    for model in MODELS:
        pool.declare(model, SMALL)
    pool.feed(pool.sample())
    return pool


def answers(pool: PoolUnderTest, runner: int) -> int:
    """Return the threads for answers that a runner was launched with."""
    threads = pool.launches[runner].placement.threads
    assert threads is not None
    return threads.answers


def test_a_runner_alone_gets_every_core() -> None:
    """A runner alone has a thread for every core."""
    pool = a_host(8).loading("a", request=1)
    assert pool.launches[1].placement.threads == Threads(8, 8)


def test_beside_one_that_is_in_use_it_gets_half_of_them() -> None:
    """A runner that is launched beside a busy one has half of the cores for answers and all for prompts."""
    pool = a_host(8).ready("a", lease=1).loading("b", request=2)
    assert pool.launches[2].placement.threads == Threads(4, 8)


def test_a_load_holds_back_only_beside_runners_that_are_in_use() -> None:
    """A load holds back beside a runner with leases, also while that runner drains, and not beside one that is idle."""
    beside_idle = a_host(8).idle("a").loading("b", request=1)
    beside_busy = a_host(8).ready("a", lease=1).loading("b", request=2)
    beside_draining = a_host(8).ready("a", lease=1)
    beside_draining.feed(expire("a"))
    beside_draining.loading("b", request=2)
    held_back = [pool.launches[2].placement.holds_back for pool in (beside_idle, beside_busy, beside_draining)]
    assert held_back == [False, True, True]


def test_three_at_once_get_a_third_each_rounded_down() -> None:
    """Of three runners at once the third has a third of the cores, rounded down."""
    pool = a_host(16, max_runners=8).ready("a", lease=1).ready("b", lease=2).loading("c", request=3)
    assert answers(pool, 3) == 5


def test_there_is_always_one_thread() -> None:
    """A runner has at least one thread, however many others are busy."""
    pool = a_host(2, max_runners=8)
    for request, model in enumerate("abcd", 1):
        pool.ready(model, lease=request)
    assert [answers(pool, runner) for runner in (1, 2, 3, 4)] == [2, 1, 1, 1]


def test_those_that_wait_count_where_there_is_room_for_them() -> None:
    """Two models that are requested together have half of the cores each."""
    pool = a_host(8, inspects=False)
    pool.feed(acquire("a", request=1), acquire("b", request=2))
    pool.feed(pool.inspection("a"), pool.inspection("b"))
    assert (answers(pool, 1), answers(pool, 2)) == (4, 4)


def test_those_that_will_take_its_place_do_not_count() -> None:
    """A waiting model that will take the place of this one does not count."""
    for how in ({"capacity": "300MiB"}, {"max_runners": 1}):
        pool = a_host(8, inspects=False, **how)
        pool.feed(acquire("a", request=1), acquire("b", request=2))
        pool.feed(pool.inspection("a"))
        assert answers(pool, 1) == 8


def test_those_that_rest_do_not_count_where_models_are_used_in_turns() -> None:
    """Idle runners do not count where models were used one after the other."""
    pool = a_host(8, max_runners=8)
    for request, model in enumerate("abc", 1):
        pool.ready(model, lease=request).feed(release(lease=request))
    assert [answers(pool, runner) for runner in (1, 2, 3)] == [8, 8, 8]


def test_those_that_rest_count_as_far_as_so_many_have_worked_at_once() -> None:
    """Idle runners count as far as so many were busy at once before."""
    pool = a_host(12, max_runners=8).ready("a", lease=1).ready("b", lease=2).ready("c", lease=3)
    pool.feed(release(lease=1), release(lease=2), release(lease=3))
    pool.loading("d", request=4)
    assert answers(pool, 4) == 4


def test_one_that_is_on_its_way_out_does_not_count() -> None:
    """A runner that expires does not count."""
    pool = a_host(8).ready("a", lease=1)
    pool.feed(expire("a"))
    pool.loading("b", request=2)
    assert answers(pool, 2) == 8


def test_a_reload_is_not_divided_with_its_own_earlier_life() -> None:
    """A reload does not count the model's earlier runner."""
    pool = a_host(8).idle("a")
    pool.feed(acquire("a", request=1, num_ctx=8192), exited(1))
    assert answers(pool, 2) == 8


def test_a_number_that_a_request_names_wins() -> None:
    """A number of threads that a request names wins over the setting and the cores."""
    pool = a_host(8, cpu_threads=3).ready("a", lease=1).loading("b", request=2, num_thread=5)
    assert pool.launches[2].placement.threads == Threads(5, 5)


def test_a_number_that_is_set_holds_for_all_others() -> None:
    """A number of threads that is set holds for all other runners, whatever the cores."""
    assert [answers(a_host(cores, cpu_threads=3).loading("a", request=1), 1) for cores in (0, 2, 64)] == [3, 3, 3]


def test_where_the_cores_are_unknown_the_engine_decides() -> None:
    """Without a known number of cores the engine decides."""
    assert a_host(0).loading("a", request=1).launches[1].placement.threads is None


def test_an_object_is_given_no_threads_and_takes_no_cores_of_others() -> None:
    """An object has no threads and takes no cores of other runners."""
    pool = a_host(8).declare("o", "1GiB").ready("o", lease=1).loading("a", request=2)
    assert pool.launches[1].placement.threads is None
    assert answers(pool, 2) == 8


def test_what_is_dealt_never_costs_a_reload() -> None:
    """N09: a runner keeps its threads and serves requests that name none or the same number."""
    pool = a_host(8).ready("a", lease=1).ready("b", lease=2)
    pool.feed(release(lease=1))
    assert pool.feed(acquire("b", request=3), acquire("b", request=4, num_thread=4)) == [Grant(3, 2), Grant(4, 2)]
    assert pool.feed(acquire("a", request=5), acquire("a", request=6, num_thread=8)) == [Grant(5, 1), Grant(6, 1)]


def test_another_number_than_was_dealt_is_a_reload() -> None:
    """A request that names another number of threads reloads the model."""
    pool = a_host(8).idle("a")
    pool.feed(acquire("a", request=1, num_thread=3), exited(1))
    assert answers(pool, 2) == 3


def test_a_model_whole_on_gpus_gets_one_thread_and_leaves_the_cores_to_others() -> None:
    """A model whole on GPUs has one thread and leaves the cores to other runners."""
    pool = a_host(8, gpus=("8GiB",)).ready("a", lease=1)
    assert pool.launches[1].placement.threads == Threads(1, 1, on_host=False)
    pool.loading("b", request=2, num_gpu=0)
    assert answers(pool, 2) == 8


def test_a_model_partly_on_gpus_takes_its_part_of_the_cores() -> None:
    """A model in part on GPUs counts for the cores of the host."""
    pool = a_host(8, gpus=("8GiB",)).ready("a", lease=1, num_gpu=2).loading("b", request=2, num_gpu=0)
    assert (answers(pool, 1), answers(pool, 2)) == (8, 4)


def test_preloads_that_are_asked_for_together_share_the_cores() -> None:
    """Preloads that are requested together share the cores."""
    pool = a_host(8, inspects=False)
    pool.feed(preload("a", request=1), preload("b", request=2))
    pool.feed(pool.inspection("a"), pool.inspection("b"))
    assert (answers(pool, 1), answers(pool, 2)) == (4, 4)


@pytest.mark.parametrize("at", ["loading", "ready"])
def test_what_is_dealt_survives_a_copy_and_a_recording(at: str) -> None:
    """A copied and a restored core serve the same requests with the threads that were given."""
    pool = a_host(8)
    pool.loading("a", request=1)
    if at == "ready":
        pool.feed(loaded(1))
    for core in (pool.core.copy(), Core.restore(decode_state(encode(pool.core.checkpoint())))):
        if at == "loading":
            core.step(pool.now, loaded(1))
        commands = core.step(pool.now, acquire("a", request=2, num_thread=8))
        assert commands == [Grant(2, 1)]
        core.step(pool.now, acquire("b", request=3))
        launched = core.step(pool.now, pool.inspection("b", [Options()]))
        assert [c.placement.threads for c in launched if isinstance(c, Launch)] == [Threads(4, 8)]
        check_state(core)
