"""U01: a quarter of headroom decides who leaves first, and never what is possible at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsm.domain.devices import HOST, Amounts, DeviceId
from fsm.messages.commands import Launch
from fsm.messages.events import Configure
from fsm.placement.search import Gpu, Offload, PlacementDemand, find_placement, needed, shown_parts
from fsm.sizing.footprint import Footprint, bytes_by_device
from tests.support.models import a_model
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    expire,
    filled,
    launched,
    layered,
    loaded,
    pin,
    refused,
    release,
    stopped,
)

GIB = amount("1GiB")
GPU0, GPU1 = DeviceId("gpu0"), DeviceId("gpu1")
CARD = (Gpu(GPU0, GPU0),)
LARGE = layered(20, "1GiB", output="1GiB", host="512MiB")  # 21 GiB on a GPU, and a quarter more is 26.25 GiB


def gpu_layers(pool: PoolUnderTest, request: int = 1, **options: Any) -> int:
    """Return how many layers of "a" are launched on GPUs at once; -1 where the request is refused."""
    commands = pool.feed(acquire("a", request=request, **options))
    if refused(commands):
        return -1
    (launch,) = [one for one in commands if isinstance(one, Launch)]
    return launch.placement.offloaded


# -- on a device that nothing else uses -------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "layers"), [("26.25GiB", 21), ("23GiB", 21), ("22.05GiB", 21), ("22GiB", 20)])
def test_u01_all_layers_go_that_fit_with_a_margin(free: str, layers: int) -> None:
    """A twentieth over a prediction is enough on an empty GPU."""
    pool = a_pool("64GiB", gpus=(free,)).declare("a", LARGE)
    assert gpu_layers(pool) == layers


@pytest.mark.parametrize(("free", "layers"), [("2.5GiB", 3), ("2.4GiB", 2)])
def test_u01_a_margin_is_half_a_gib_at_least(free: str, layers: int) -> None:
    """A small model leaves half a GiB of an empty GPU, unless a quarter over is less."""
    pool = a_pool("64GiB", gpus=(free,)).declare("a", layered(2, "1GiB", output="0B"))
    assert gpu_layers(pool) == layers


@pytest.mark.parametrize("wish", [{"num_gpu": 21}, {"num_gpu": 99}, {"require_gpu": True}])
@pytest.mark.parametrize(("free", "layers"), [("21GiB", 21), ("20.9GiB", -1)])
def test_u01_an_explicit_wish_needs_the_bytes_alone(wish: dict[str, Any], free: str, layers: int) -> None:
    """A request that names all layers, or requires a GPU, is refused only where the bytes do not fit."""
    there = {HOST: 64 * GIB, GPU0: amount(free)}
    placement = find_placement(PlacementDemand(LARGE, **wish), Offload.whole, there, CARD, there)
    assert (placement.offloaded if placement is not None else -1) == layers


def test_u01_a_split_has_a_margin_on_each_gpu() -> None:
    """A model that fills two empty GPUs but for a margin is split over them."""
    pool = a_pool("64GiB", gpus=("11.6GiB", "11.6GiB")).declare("a", LARGE)
    assert gpu_layers(pool) == 21


def test_u01_the_host_has_a_margin_too() -> None:
    """On the host a twentieth over a prediction is enough."""
    assert launched(a_pool("4.2GiB").declare("a", layered(4, "1GiB")).feed(acquire("a", request=1))) == ["a"]
    assert refused(a_pool("4.19GiB").declare("a", layered(4, "1GiB")).feed(acquire("a", request=1)))


@pytest.mark.parametrize(("free", "layers"), [("26.25GiB", 21), ("26.2GiB", 20)])
def test_u01_what_is_only_estimated_roughly_has_the_whole_headroom(free: str, layers: int) -> None:
    """A quarter stays where neither the formulas were verified nor the engine has told."""
    pool = a_pool("64GiB", gpus=(free,)).declare("a", replace(LARGE, rough=True))
    assert gpu_layers(pool) == layers


# -- beside others ----------------------------------------------------------------------------------------------------


def test_u01_others_leave_before_a_runner_starts_with_less_than_its_headroom() -> None:
    """An idle runner leaves where the bytes and a margin would fit beside it, and not where the headroom does."""
    pool = a_pool("64GiB", gpus=("24GiB",)).declare("b", layered(2, "512MiB")).declare("a", LARGE)
    pool.idle("b")  # 1 GiB: with it 23 GiB are free
    assert stopped(pool.feed(acquire("a", request=2))) == [1]
    roomy = a_pool("64GiB", gpus=("27.5GiB",)).declare("b", layered(2, "512MiB")).declare("a", LARGE)
    roomy.idle("b")
    assert launched(roomy.feed(acquire("a", request=2))) == ["a"]


def test_u01_no_request_waits_for_a_runner_that_may_not_leave() -> None:
    """Beside a pinned runner a margin is enough, as nothing more can be made free."""
    pool = a_pool("64GiB", gpus=("24GiB",)).declare("b", layered(2, "512MiB")).declare("a", LARGE).idle("b")
    pool.feed(pin("b"))
    assert launched(pool.feed(acquire("a", request=2))) == ["a"]
    assert dict(pool.launches[2].placement.bytes)[GPU0] == 21 * GIB


def test_u01_what_other_programs_hold_cannot_be_made_free() -> None:
    """Beside another program's memory a margin is enough too."""
    pool = a_pool("64GiB", gpus=("40GiB",)).declare("a", LARGE)
    pool.strangers = {GPU0: 17 * GIB}
    pool.feed(pool.sample())
    assert gpu_layers(pool) == 21


# -- what earlier lives have shown ------------------------------------------------------------------------------------


def measured(footprint: Footprint, split: Amounts, part: float) -> dict[Amounts, Amounts]:
    """Return a measurement of a split, as a part of what is predicted."""
    predicted = bytes_by_device(footprint, split)
    return {split: tuple((device, int(size.total_bytes * part)) for device, size in predicted.items())}


@pytest.mark.parametrize(("part", "layers"), [(1.0, 21), (1.1, 19), (0.9, 21), (9.0, 18)])
def test_u01_what_one_split_took_corrects_the_others(part: float, layers: int) -> None:
    """What ten layers took beyond their prediction is expected of any number of layers, up to a quarter."""
    known = measured(LARGE, ((GPU0, 10),), part)
    demand = PlacementDemand(LARGE, known=known, shown=shown_parts(LARGE, known))
    free = {HOST: 64 * GIB, GPU0: int(22.5 * GIB)}
    found = [find_placement(demand, offload, free, CARD, free) for offload in (Offload.whole, Offload.partial)]
    placement = next(filter(None, found))
    assert placement.offloaded == layers and not placement.measured
    assert dict(placement.bytes)[GPU0] == layers * GIB  # what is reserved is the prediction


def test_u01_a_correction_is_for_the_gpu_that_showed_it() -> None:
    """What a GPU showed says nothing of another GPU, nor of the host, where pages of files are among the bytes."""
    known = measured(LARGE, ((GPU0, 10),), 1.2)
    assert shown_parts(LARGE, known) == {GPU0: pytest.approx(1.2)}
    assert shown_parts(LARGE, {((GPU0, 10),): ((HOST, 30 * GIB),)}) == {}


def test_u01_a_small_prediction_corrects_no_large_one() -> None:
    """Some MiB that a library takes are no factor for gigabytes, and an explicit wish needs its bytes alone."""
    small = layered(20, "10MiB", output="10MiB")
    assert shown_parts(small, measured(small, ((GPU0, 1),), 30.0)) == {}
    known = measured(LARGE, ((GPU0, 10),), 1.25)
    demand = PlacementDemand(LARGE, 21, known=known, shown=shown_parts(LARGE, known))
    free = {HOST: 64 * GIB, GPU0: 21 * GIB}
    assert find_placement(demand, Offload.whole, free, CARD, free) is not None


def test_u01_lives_that_took_more_than_predicted_correct_where_the_next_goes() -> None:
    """A runner with a few layers that filled its context and took more leaves fewer layers for the next one."""
    info = replace(a_model((GIB,) * 12), heads_kv=(0,) * 12)
    pool = a_pool("64GiB", gpus=("10GiB",)).declare("a", info)
    usual = gpu_layers(a_pool("64GiB", gpus=("10GiB",)).declare("a", info))
    pool.feed(acquire("a", request=1, num_gpu=4), loaded(1))
    predicted = dict(pool.launches[1].placement.bytes)
    pool.occupied[1] = {device: size + size // 5 for device, size in predicted.items()}
    pool.advance("2s")
    pool.feed(pool.sample(), filled(1), release(1))
    pool.feed(expire("a"))
    pool.settle().advance("10s")
    pool.feed(acquire("a", request=2))
    assert 4 < pool.launches[2].placement.offloaded < usual


# -- pages of mapped files --------------------------------------------------------------------------------------------

MAPPED = replace(layered(8, "4GiB", host="2GiB"), mapped=True, mapped_on_host=True, process_bytes=GIB)  # 34 GiB


def test_u01_pages_of_a_mapped_file_need_no_room() -> None:
    """A mapped model larger than the host is loaded, and reserves what the system cannot take back."""
    pool = a_pool("16GiB").declare("a", MAPPED)
    assert launched(pool.feed(acquire("a", request=1))) == ["a"]
    assert (pool.launches[1].placement.without_pages, pool.launches[1].placement.bytes) == (True, ((HOST, GIB),))


def a_pool_with_pages() -> PoolUnderTest:
    """Return a pool in which a mapped model larger than the host is idle, and its pages fill the host."""
    pool = a_pool("16GiB", gpus=["8GiB"]).declare("a", replace(MAPPED, mapped=False)).declare("b", layered(2, "1GiB"))
    pool.feed(acquire("a", request=1, num_gpu=0))
    pool.occupied[1] = {HOST: 14 * GIB}
    pool.mapped[1] = 13 * GIB
    pool.feed(loaded(1), release(1))
    pool.advance("2s")
    pool.feed(pool.sample())
    return pool


def test_u01_pages_shut_no_other_model_out() -> None:
    """Beside a pinned model whose pages fill the host another model is loaded: the system takes pages back."""
    pool = a_pool_with_pages()
    pool.feed(pin("a"))
    assert pool.free() == 15 * GIB
    assert launched(pool.feed(acquire("b", request=2))) == ["b"]


def test_u01_pages_overdraw_no_memory() -> None:
    """Pages beyond the reservation are no reason to evict a runner where the memory shrinks a little."""
    pool = a_pool_with_pages()
    pool.capacities[HOST] -= 2**20
    assert stopped(pool.feed(pool.sample())) == []


def test_u01_what_was_placed_without_pages_is_no_measurement() -> None:
    """The next runner is placed by predictions, so other runners leave for its pages where all of them find room."""
    pool = a_pool_with_pages()
    pool.feed(acquire("a", request=2, num_gpu=0), filled(1), release(2))
    assert pool.core._state.models["a"].measured == {}


def test_u01_what_the_system_cannot_take_back_is_kept_after_a_measurement() -> None:
    """A measurement with few resident pages says nothing of the rest: what a runner takes beside its file must fit."""
    known: dict[Amounts, Amounts] = {(): ((HOST, 12 * GIB),)}
    demand = PlacementDemand(replace(MAPPED, process_bytes=8 * GIB), known=known)
    for free, fits in ((1, False), (8, True)):
        there = {HOST: free * GIB}
        assert (find_placement(demand, Offload.none, there, (), there) is not None) is fits


def test_u01_a_part_on_a_gpu_and_the_rest_mapped() -> None:
    """A mapped model larger than GPU and host together has its layers on the GPU, and its other pages on the host."""
    pool = a_pool("8GiB", gpus=("12GiB",)).declare("a", MAPPED)
    assert gpu_layers(pool) == 3


@pytest.mark.parametrize("change", [{"mapped_on_host": False}, {"process_bytes": 17 * GIB}])
def test_u01_what_the_system_cannot_take_back_needs_room(change: dict[str, Any]) -> None:
    """A file that is read, and what a runner takes beside its file, must fit."""
    pool = a_pool("16GiB").declare("a", replace(MAPPED, **change))
    assert refused(pool.feed(acquire("a", request=1)))


def test_u01_others_leave_before_pages_do() -> None:
    """While an idle runner could leave, a mapped model does not start with fewer pages than it has."""
    pool = a_pool("40GiB").declare("a", MAPPED).declare("b", layered(2, "4GiB")).idle("b")
    assert stopped(pool.feed(acquire("a", request=2))) == [1]


def test_u01_a_limit_counts_pages_too() -> None:
    """A limit that is set on the host's memory holds for the pages of files, from when it is set until it is not."""
    pool = a_pool("16GiB", memory_limited=True).declare("a", MAPPED)
    assert refused(pool.feed(acquire("a", request=1)))
    pool.feed(Configure(memory_limited=False))
    assert launched(pool.feed(acquire("a", request=2))) == ["a"]


def test_u01_a_measurement_of_a_mapped_model_needs_no_more_room() -> None:
    """What a runner with a mapped file was measured to hold are pages for the most part, and is no reason to refuse."""
    known: dict[Amounts, Amounts] = {(): ((HOST, 20 * GIB),)}
    demand = PlacementDemand(MAPPED, known=known)
    free = {HOST: 16 * GIB}
    placement = find_placement(demand, Offload.none, free, (), free)
    assert placement is not None and (placement.measured, placement.bytes) == (True, ((HOST, GIB),))


@pytest.mark.parametrize(("potential", "expected"), [(None, 125), (1000, 125), (110, 110), (50, 105)])
def test_u01_what_must_be_free_is_never_more_than_can_be(potential: int | None, expected: int) -> None:
    """A placement needs its headroom, or else all that can be made free, and its bytes and a margin at least."""
    demand = PlacementDemand(layered(1, "100B"))
    placement = find_placement(demand, Offload.none, {HOST: 1000}, ())
    assert placement is not None
    free = None if potential is None else {HOST: potential}
    assert dict(needed(demand, placement, free)) == {HOST: expected}


# -- in part beside others (U04) --------------------------------------------------------------------------------------

PARTLY = layered(60, "500MiB", output="900MiB", host="1GiB", compute="400MiB")  # 30 GiB: a part of it fits on a card


def a_card(**sizes: Footprint) -> PoolUnderTest:
    """Return a pool with a card of 24 GiB, on which "large" goes in part, and other models."""
    pool = a_pool("128GiB", gpus=["24GiB"]).declare("large", PARTLY)
    for model, footprint in sizes.items():
        pool.declare(model, footprint)
    return pool


def layers_of_large(pool: PoolUnderTest) -> int:
    """Return how many layers "large" has on the card once it is launched."""
    pool.feed(acquire("large", request=99))
    pool.settle().advance("1s")
    return pool.launches[pool.runner("large")].placement.offloaded


def test_u04_an_idle_runner_leaves_for_notably_more_layers() -> None:
    """A model that goes in part has as many layers beside an idle runner as on an empty card, since that one leaves."""
    pool = a_card(small=layered(40, "380MiB", output="600MiB", host="1GiB", compute="300MiB")).idle("small")
    assert layers_of_large(pool) == layers_of_large(a_card())


def test_u04_an_idle_runner_stays_where_it_makes_little_difference() -> None:
    """For a tenth of the layers no runner leaves."""
    rough = replace(PARTLY, rough=True)  # so that the headroom is the same beside others
    pool = a_card(large=rough, tiny=layered(4, "128MiB")).idle("tiny")
    alone = layers_of_large(a_card(large=rough))
    assert alone * 9 // 10 <= layers_of_large(pool) < alone
    assert pool.state("tiny").name == "idle"


@pytest.mark.parametrize("how", ["busy", "pinned"])
def test_u04_what_may_not_leave_is_not_waited_for(how: str) -> None:
    """Beside a runner in use, or a pinned one, a model goes with the layers that fit."""
    pool = a_card(small=layered(40, "380MiB", output="600MiB", host="1GiB", compute="300MiB"))
    if how == "busy":
        pool.ready("small", lease=1)
    else:
        pool.idle("small").feed(pin("small"))
    assert 0 < layers_of_large(pool) < layers_of_large(a_card()) // 2


def test_u04_a_number_of_layers_that_is_named_is_not_raised() -> None:
    """A request that names a number of layers gets this number, and no idle runner leaves for more."""
    info = a_model((500 * 2**20,) * 60)
    pool = a_pool("128GiB", gpus=["24GiB"]).declare("large", info).declare("tiny", layered(4, "128MiB")).idle("tiny")
    pool.feed(acquire("large", request=99, num_gpu=8))
    assert pool.launches[pool.runner("large")].placement.offloaded == 8
    assert pool.state("tiny").name == "idle"


@given(
    card=st.integers(6, 24),
    residents=st.lists(st.integers(1, 8), max_size=3),
    layers=st.integers(10, 40),
)
def test_u04_only_idle_runners_in_the_way_make_no_difference(card: int, residents: list[int], layers: int) -> None:
    """Whenever only idle runners are in the way, a model has the layers of an empty card, or a tenth less."""

    def a_machine() -> PoolUnderTest:
        pool = a_pool("256GiB", gpus=[f"{card}GiB"], max_runners=99)
        pool.declare("large", layered(layers, "1GiB", output="512MiB"))
        for number, size in enumerate(residents):
            pool.declare(f"m{number}", layered(1, f"{size}GiB"))
        return pool

    beside = a_machine()
    for number in range(len(residents)):
        beside.feed(acquire(f"m{number}", request=number + 1))  # idle runners may have to leave for it
        beside.settle().feed(loaded(beside.runner(f"m{number}")), release(number + 1))
    alone = layers_of_large(a_machine())
    assert layers_of_large(beside) >= alone - alone // 10
