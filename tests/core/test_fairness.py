"""A younger request never makes an older one wait longer, and lease holders are told of requests that wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from fsm.domain.devices import MIB
from fsm.eviction.policies import Candidate
from fsm.machine.runner import RunnerState
from fsm.messages.commands import NotifyContention
from fsm.messages.reasons import RunnerStep, WaitFor, WaitForRunners
from fsm.planning.planning_context import GROUPS_AHEAD
from fsm.sizing.footprint import Footprint
from tests.support.models import a_model
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    cancel,
    exited,
    granted,
    launched,
    layered,
    loaded,
    memory,
    release,
    stopped,
)


def on_gpu(pool: PoolUnderTest, gpu: str = "gpu0", **sizes: str) -> PoolUnderTest:
    """Declare models that take memory of one GPU only."""
    for model, size in sizes.items():
        pool.declare(model, Footprint(fixed=((gpu, amount(size)),)))
    return pool


# -- an older one first -----------------------------------------------------------------------------------------------


def test_the_last_place_among_the_runners_is_kept_for_the_older_one() -> None:
    """A younger request does not take the last process slot from an older one that waits only for a load slot."""
    pool = on_gpu(a_pool(gpus=["16GiB", "16GiB"], max_runners=2), a="4GiB", b="4GiB")
    on_gpu(pool, "gpu1", c="4GiB").loading("a", request=1)
    assert launched(pool.feed(acquire("b", request=2), acquire("c", request=3))) == []
    assert pool.waits_for(2) == WaitFor.load_slot
    assert launched(pool.feed(loaded(1))) == ["b"]


@pytest.mark.parametrize("younger", [False, True])
def test_memory_that_is_waited_for_behind_other_memory_is_booked(younger: bool) -> None:
    """A younger model does not take 2 free GiB that two requests for 4 GiB of memory will need."""
    pool = a_pool(capacity="12GiB", sizes={"a": "6GiB", "b": "4GiB", "y": "2GiB"}).ready("a", lease=1).ready("b", 2)
    pool.feed(memory(10, cpu="4GiB"), memory(11, cpu="4GiB"))
    if younger:
        assert launched(pool.feed(acquire("y", request=12))) == []
    pool.feed(release(1))
    pool.settle()
    assert {10, 11} <= pool.answers.keys()


def test_memory_that_was_asked_for_later_is_not_booked_before_an_older_model() -> None:
    """A younger request for memory in an older group is reserved by its own age, after an older model's request."""
    pool = a_pool(capacity="12GiB", sizes={"a": "10GiB", "y": "6GiB"}).ready("a", lease=1)
    pool.feed(memory(10, cpu="5GiB"), acquire("y", request=11), memory(12, cpu="5GiB"), release(1))
    pool.settle()
    assert 10 in pool.answers and 12 not in pool.answers
    assert pool.state("y") is RunnerState.loading


@pytest.mark.parametrize("younger", [False, True])
def test_what_waits_for_a_load_with_other_options_is_booked(younger: bool) -> None:
    """What is free beside the next runner of a model is kept for the request that waits for other options of it."""
    pool = a_pool(max_wait_s=20.0).declare("y", "3GiB")
    pool.declare("m", a_model((400 * MIB,) * 4, context_trained=10**7))
    pool.feed(acquire("m", request=1, num_ctx=1024), acquire("m", request=2, num_ctx=2_000_000))
    if younger:
        assert launched(pool.feed(acquire("y", request=3))) == []
    pool.feed(loaded(1), release(1))
    pool.settle()
    assert [launch.model for launch in pool.launches.values()][:2] == ["m", "m"]


@pytest.mark.parametrize("draining", [False, True])
def test_a_drain_elsewhere_gives_no_place_among_the_loads_away(draining: bool) -> None:
    """A runner that drains elsewhere does not let a younger request load before an older one that waits for memory."""
    pool = a_pool(capacity="64GiB", gpus=["16GiB"], max_runners=8).declare("d", "1GiB")
    on_gpu(pool, s="12GiB", b="10GiB", y="1GiB")
    if draining:
        pool.expiring("d", lease=1)
    pool.expiring("s")
    assert launched(pool.feed(acquire("b", request=2), acquire("y", request=3))) == []
    assert pool.waits_for(2) == WaitFor.memory
    assert launched(pool.feed(exited(pool.runner("s")))) == ["b"]


def test_memory_of_the_programs_own_waits_for_no_process() -> None:
    """Memory of the program's own needs no process slot, however many requests wait for one."""
    pool = a_pool(capacity="64GiB", each="1GiB", max_runners=1).ready("a", lease=1)
    for number in range(17):
        pool.feed(acquire(f"m{number}", request=10 + number))
    assert granted(pool.feed(memory(99, cpu="1GiB"))) == [99]


def test_a_load_that_nobody_waits_for_goes_on_until_its_place_is_of_use() -> None:
    """A load that no request waits for goes on while the request that needs its slot waits for memory."""
    pool = on_gpu(a_pool(capacity="64GiB", gpus=["16GiB"], max_runners=8), d="12GiB", u="1GiB", w="10GiB")
    pool.expiring("d", lease=1).loading("u", request=2)
    pool.feed(cancel(2))
    assert stopped(pool.feed(acquire("w", request=3))) == []
    assert pool.waits_for(3) == WaitForRunners(("d",), RunnerStep.drain)


# -- telling lease holders --------------------------------------------------------------------------------------------


def test_holders_of_what_drains_at_once_are_asked() -> None:
    """Lease holders of a runner that drains at once are notified, because they may release early."""
    pool = a_pool(max_wait_s=0.0, min_residency_s=0.0).ready("a", lease=1)
    assert pool.feed(acquire("b", request=2)) == [NotifyContention(1, (1,))]
    assert pool.state("a") is RunnerState.expiring


def test_holders_that_come_later_are_asked_too() -> None:
    """New lease holders are notified as long as a request waits for the runner's memory."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    assert NotifyContention(1, (3,)) in pool.feed(acquire("a", request=3))
    pool.feed(cancel(2))
    assert NotifyContention(1, (4,)) not in pool.feed(acquire("a", request=4))


# -- the cheapest set of victims, on a machine with GPUs --------------------------------------------------------------


class Costs:
    """A policy that gives each model a cost."""

    name = "costs"

    def __init__(self, **costs: float) -> None:
        self.costs = costs

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        return [replace(one, cost_s=self.costs.get(one.model, 1.0)) for one in candidates]


def test_what_is_held_elsewhere_makes_no_set_cheaper() -> None:
    """The cost of a set of victims for room on the host is weighed by the bytes that it frees on the host."""
    held = {"m1": (194, 8007), "m2": (1566, 0), "m3": (4761, 0), "m4": (171, 7783)}
    policy = Costs(m1=6.0, m2=6.0, m3=3.0, m4=4.0)
    pool = a_pool(capacity="6692MiB", gpus=["16GiB"], max_runners=9, policy=policy)
    for model, (host, gpu) in held.items():
        sizes = (("cpu", host * MIB), ("gpu0", gpu * MIB))
        pool.declare(model, Footprint(fixed=sizes if gpu else sizes[:1])).idle(model)
    pool.advance("10s")
    pool.declare("new", "6420MiB").feed(acquire("new", request=5))
    assert {model for model in held if pool.state(model) is RunnerState.expiring} == {"m2", "m3", "m4"}


# -- what a request waits for -----------------------------------------------------------------------------------------


def test_the_first_in_order_waits_for_nobody_before_it() -> None:
    """The first request of the queue is shown the load that holds its memory, and no earlier requests."""
    pool = a_pool().loading("a", request=1)
    pool.feed(acquire("b", request=2, priority=1))
    assert pool.waits_for(2) == WaitForRunners(("a",), RunnerStep.load_then_idle)


def test_a_drain_that_takes_too_long_is_named() -> None:
    """A runner that drains for too long is no longer counted on, and is still shown as what a request waits for."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    pool.advance("240s")
    assert pool.waits_for(2) == WaitForRunners(("a",), RunnerStep.drain)


def test_what_is_to_load_alone_waits_for_the_loads_of_others() -> None:
    """A request whose load ran out of memory waits for the loads of others, so that its second try is alone."""
    pool = a_pool(capacity="16GiB", each="4GiB").loading("a", request=1).loading("b", request=2)
    pool.feed(exited(1, 1, "no memory", out_of_memory=True))
    assert pool.waits_for(1) == WaitForRunners(("b",), RunnerStep.load_then_idle)


def test_two_that_are_to_load_alone_begin_one_after_the_other() -> None:
    """Two loads that ran out of memory beside each other start one after the other, and a new request waits too."""
    pool = a_pool(capacity="16GiB", each="4GiB").loading("a", request=1).loading("b", request=2)
    pool.feed(exited(1, 1, "no memory", out_of_memory=True))
    assert launched(pool.feed(exited(2, 1, "no memory", out_of_memory=True))) == ["a"]
    assert launched(pool.feed(acquire("c", request=3))) == []
    pool.feed(loaded(3))
    assert pool.waits_for(2) == WaitForRunners(("a",), RunnerStep.idle)
    assert pool.state("a") is RunnerState.ready and pool.state("c") is RunnerState.unloaded
    assert launched(pool.feed(cancel(2))) == ["c"]


def test_nobody_begins_beside_a_load_that_is_to_be_alone() -> None:
    """No load starts beside a load that has to be alone, and a new request is shown that load."""
    pool = a_pool(capacity="16GiB", each="4GiB").loading("a", request=1)
    assert launched(pool.feed(exited(1, 1, "no memory", out_of_memory=True))) == ["a"]
    assert launched(pool.feed(acquire("c", request=3))) == []
    assert pool.waits_for(3) == WaitForRunners(("a",), RunnerStep.load_alone)
    assert launched(pool.feed(loaded(2))) == ["c"]


# -- behind many other requests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [GROUPS_AHEAD - 1, GROUPS_AHEAD, 2 * GROUPS_AHEAD])
def test_the_bound_on_a_wait_holds_behind_any_number_who_wait_for_another_gpu(ahead: int) -> None:
    """The bound on a request's wait holds however many requests before it wait for another GPU."""
    pool = a_pool("64GiB", gpus=["8GiB", "8GiB"], max_runners=100)
    on_gpu(pool, "gpu0", held="6GiB", **{f"other{number}": "6GiB" for number in range(ahead)})
    on_gpu(pool, "gpu1", warm="6GiB", late="6GiB").ready("held", lease=1).ready("warm", lease=2)
    pool.feed(*(acquire(f"other{number}", request=100 + number) for number in range(ahead)))
    pool.feed(acquire("late", request=500))
    pool.advance("119s")
    assert pool.state("warm") is RunnerState.ready
    pool.advance("2s")
    assert pool.state("warm") is RunnerState.expiring


def test_the_bound_on_a_wait_holds_on_the_host_behind_many_who_wait_for_gpus() -> None:
    """The bound on a wait for the host holds although each of the models before takes a little of the host too."""
    pool = a_pool("8GiB", gpus=["8GiB"], max_runners=100, sizes={"warm": "7GiB", "late": "7GiB"}, keep_alive_s=1e6)
    for number in range(GROUPS_AHEAD + 1):
        pool.declare(f"gpu model {number}", Footprint(fixed=(("gpu0", amount("6GiB")), ("cpu", MIB))))
    pool.ready("warm", lease=1).ready("gpu model 0", lease=2)
    pool.feed(*(acquire(f"gpu model {number}", request=100 + number) for number in range(1, GROUPS_AHEAD + 1)))
    pool.feed(acquire("late", request=500))
    pool.advance("121s")
    assert pool.state("warm") is RunnerState.expiring


def test_a_load_does_not_wait_for_a_place_on_one_gpu_while_another_takes_it() -> None:
    """A model is placed on a GPU that nothing loads on, rather than wait for a load slot of a better GPU."""
    pool = a_pool("64GiB", gpus=["80GiB", "24GiB"])
    pool.declare("a", layered(8, "1GiB")).declare("b", layered(8, "1GiB"))
    pool.feed(acquire("a", request=1), acquire("b", request=2))
    (gpu_of_a, _), (gpu_of_b, _) = (pool.launches[runner].placement.gpu_layers[0] for runner in (1, 2))
    assert {gpu_of_a, gpu_of_b} == {"gpu0", "gpu1"}


def test_a_load_waits_for_its_place_where_the_other_gpus_do_not_take_it() -> None:
    """A model waits for a load slot where other GPUs would take it only in part, because it would stay slow."""
    pool = a_pool("64GiB", gpus=["80GiB", "4GiB"])
    pool.declare("a", layered(8, "1GiB")).declare("b", layered(8, "1GiB"))
    assert launched(pool.feed(acquire("a", request=1), acquire("b", request=2))) == ["a"]
    assert pool.waits_for(2) == WaitFor.load_slot


def four_gpus(*sizes: str, **limits: int) -> PoolUnderTest:
    """Return a pool of GPUs of these sizes, the roomiest first, and models of which each takes 5 GiB of one."""
    pool = a_pool("64GiB", sizes, **limits)
    for model in "abcde":
        pool.declare(model, layered(4, "1GiB"))
    return pool


def test_u74_a_model_is_loaded_on_the_next_best_gpu_that_nothing_loads_on() -> None:
    """While models load on the two roomiest of four GPUs, others load on the other two, and a fifth model waits."""
    pool = four_gpus("16GiB", "14GiB", "12GiB", "10GiB")
    assert launched(pool.feed(*(acquire(model, number) for number, model in enumerate("abcde", 1)))) == list("abcd")
    gpus = [next(gpu for gpu, _ in launch.placement.gpu_layers) for launch in pool.launches.values()]
    assert gpus == ["gpu0", "gpu1", "gpu2", "gpu3"]
    assert pool.waits_for(5) == WaitFor.load_slot
    assert launched(pool.feed(loaded(3))) == ["e"]


def test_u74_a_model_is_split_over_the_gpus_that_nothing_loads_on() -> None:
    """A model that no free GPU takes alone is loaded over two of them, while the roomiest two have loads."""
    pool = four_gpus("32GiB", "31GiB", "12GiB", "12GiB").declare("large", layered(8, "2GiB"))
    assert launched(pool.feed(acquire("a", 1), acquire("b", 2), acquire("large", 3))) == ["a", "b", "large"]
    assert {gpu for gpu, _ in pool.launches[3].placement.gpu_layers} == {"gpu2", "gpu3"}


def test_u74_two_loads_a_gpu_fill_two_gpus_before_the_next() -> None:
    """Where two loads may run on a GPU, a fifth model goes to the third GPU."""
    pool = four_gpus("16GiB", "16GiB", "6GiB", max_loads_per_gpu=2)
    pool.feed(*(acquire(model, number) for number, model in enumerate("abcde", 1)))
    gpus = [next(gpu for gpu, _ in launch.placement.gpu_layers) for launch in pool.launches.values()]
    assert sorted(gpus) == ["gpu0", "gpu0", "gpu1", "gpu1", "gpu2"]


def test_u74_a_model_that_only_the_roomiest_gpus_take_waits_for_them() -> None:
    """Where the GPUs that nothing loads on do not take a model whole, it waits for a load slot."""
    pool = four_gpus("32GiB", "31GiB", "6GiB").declare("large", layered(10, "2GiB"))
    assert launched(pool.feed(acquire("a", 1), acquire("b", 2), acquire("large", 3))) == ["a", "b"]
    assert pool.waits_for(3) == WaitFor.load_slot
