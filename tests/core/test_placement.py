"""Placement: one GPU, several GPUs, in part, or the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fsm.domain.devices import HOST, DeviceId, Placement
from fsm.domain.options import Options
from fsm.machine.runner import RunnerState
from fsm.messages.commands import Grant
from fsm.messages.reasons import Infeasible, WaitFor
from fsm.messages.refusals import DoesNotFitRefusal, UnsupportedOption
from fsm.placement.search import Gpu, Offload, PlacementDemand, find_placement, needed
from fsm.sizing.footprint import Footprint
from scheduler.engines.llama_options import resolve
from scheduler.engines.llama_sizing import estimate
from tests.support.models import a_model
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    exited,
    granted,
    launched,
    layered,
    loaded,
    memory,
    pin,
    refused,
    release,
    stopped,
)

GIB = amount("1GiB")
FOUR_LAYERS = layered(4, "1GiB")  # with the headroom for a prediction: 5 GiB
BOTH = (Gpu("gpu0", "gpu0"), Gpu("gpu1", "gpu1"))


def placed(
    free: dict[str, int], footprint: Footprint = FOUR_LAYERS, offload: Offload = Offload.whole, **how: Any
) -> Any:
    """Return the placement of `footprint` with so many GiB free, or None."""
    free_bytes = {DeviceId(device): size * GIB for device, size in free.items()}
    gpus = [Gpu(device, device) for device in free_bytes if device != HOST]
    return find_placement(PlacementDemand(footprint, **how), offload, free_bytes, gpus)


# -- placing one model ------------------------------------------------------------------------------------------------


def test_n04_the_gpu_with_most_free_memory_takes_a_whole_model() -> None:
    """N04: a model goes whole on the GPU with most free memory, rather than on several."""
    assert placed({HOST: 64, "gpu0": 6, "gpu1": 9}).gpu_layers == (("gpu1", 5),)


def test_n04_a_prediction_may_fill_four_fifths_of_what_is_free() -> None:
    """N04: a model with a predicted size of 4 GiB needs 5 GiB free."""
    assert placed({HOST: 64, "gpu0": 5}) is not None
    assert placed({HOST: 64, "gpu0": 4.9}) is None


def test_what_was_measured_needs_less_headroom() -> None:
    """A measurement of the same split needs 3 % headroom."""
    split = (("gpu0", 5),)
    known = {split: (("gpu0", 4 * GIB), (HOST, 0))}
    placement = placed({HOST: 64, "gpu0": 4.2}, known=known)
    assert (placement.measured, placement.gpu_layers) == (True, split)
    assert placed({HOST: 64, "gpu0": 4.1}, known=known) is None


def test_what_is_declared_needs_no_headroom() -> None:
    """Declared memory needs no headroom."""
    declared = Footprint(fixed=((HOST, 4 * GIB),))
    assert placed({HOST: 4}, declared, Offload.none) == Placement(((HOST, 4 * GIB),))
    assert needed(PlacementDemand(declared), Placement(((HOST, 100),))) == ((HOST, 100),)
    assert needed(PlacementDemand(FOUR_LAYERS), Placement(((HOST, 100),))) == ((HOST, 125),)


def test_n04_an_explicit_main_gpu_goes_first() -> None:
    """N04: the named main GPU is used even if another has more free memory, unless the model does not fit there."""
    assert placed({HOST: 64, "gpu0": 6, "gpu1": 9}, main_gpu=0).gpu_layers == (("gpu0", 5),)
    assert placed({HOST: 64, "gpu0": 2, "gpu1": 9}, main_gpu=0).gpu_layers == (("gpu1", 5),)


def test_n04_what_fits_on_no_single_gpu_is_split() -> None:
    """N04: a model that fits on no single GPU is split over as few as possible, the one with most free memory first."""
    assert placed({HOST: 64, "gpu0": 3, "gpu1": 4, "gpu2": 1}).gpu_layers == (("gpu1", 3), ("gpu0", 2))


def test_n04_a_discrete_gpu_goes_before_an_integrated_one() -> None:
    """N04: a discrete GPU is used before an integrated one, even if it has less free memory."""
    gpus = (Gpu("small", "small"), Gpu("shared", HOST))
    free = {HOST: 64 * GIB, "small": 6 * GIB}
    assert find_placement(PlacementDemand(FOUR_LAYERS), Offload.whole, free, gpus) == Placement(
        (("small", 4 * GIB), (HOST, 0)), (("small", 5),)
    )
    free["small"] = 4 * GIB
    assert find_placement(PlacementDemand(FOUR_LAYERS), Offload.whole, free, gpus) == Placement(
        ((HOST, 4 * GIB),), (("shared", 5),)
    )


def test_n04_spread_deals_a_model_over_all_gpus_by_what_they_have_free() -> None:
    """N04: `spread` splits a model over all GPUs by their free memory."""
    assert placed({HOST: 64, "gpu0": 10, "gpu1": 10}, spread=True).gpu_layers == (("gpu0", 2), ("gpu1", 3))
    assert placed({HOST: 64, "gpu0": 20, "gpu1": 5}, spread=True).gpu_layers == (("gpu0", 3), ("gpu1", 2))
    assert placed({HOST: 64, "gpu0": 3, "gpu1": 1}, spread=True) is None


def test_a_split_leaves_the_headroom_on_each_gpu() -> None:
    """A split leaves the headroom on each GPU, and a model that does not fit so is not placed."""
    assert placed({HOST: 64, "gpu0": 3, "gpu1": 3}).gpu_layers == (("gpu0", 2), ("gpu1", 3))
    assert placed({HOST: 64, "gpu0": 2, "gpu1": 3}) is None


def test_a_split_counts_every_layer_once() -> None:
    """The bytes of a split add up: each layer once, the output with the last, and compute buffers on each GPU."""
    footprint = layered(4, "1GiB", output="512MiB", host="256MiB", compute="128MiB")
    placement = placed({HOST: 64, "gpu0": 4, "gpu1": 4}, footprint)
    amounts = dict(placement.bytes)
    assert sum(layers for _, layers in placement.gpu_layers) == 5
    assert amounts["gpu0"] + amounts["gpu1"] == 4 * GIB + GIB // 2 + 2 * (GIB // 8)
    assert amounts[HOST] == GIB // 4
    assert placement.total_bytes == sum(amounts.values())


def test_a_part_is_as_many_layers_as_fit_and_the_rest_stays_on_the_host() -> None:
    """In part, the output and the last layers go to the GPU, as llama.cpp offloads them."""
    footprint = layered(4, "1GiB", output="512MiB", host="256MiB", compute="128MiB")
    placement = placed({HOST: 64, "gpu0": 3}, footprint, Offload.partial)
    assert placement.gpu_layers == (("gpu0", 2),)
    amounts = dict(placement.bytes)
    assert amounts["gpu0"] == GIB + GIB // 2 + GIB // 8
    assert amounts[HOST] == 3 * GIB + GIB // 4 + GIB // 8


def test_on_the_host_alone_everything_stays_there() -> None:
    """On the host alone, all layers, the output and one compute buffer are there."""
    footprint = layered(4, "1GiB", output="512MiB", host="256MiB", compute="128MiB")
    placement = placed({HOST: 64, "gpu0": 64}, footprint, Offload.none)
    assert placement == Placement(((HOST, 4 * GIB + GIB // 2 + GIB // 4 + GIB // 8),))


def test_the_output_is_the_first_to_be_offloaded() -> None:
    """The output is the first layer to be offloaded, as in llama.cpp."""
    footprint = layered(4, "1GiB", output="512MiB")
    one, four = (placed({HOST: 64, "gpu0": 64}, footprint, Offload.partial, num_gpu=layers) for layers in (1, 4))
    assert dict(one.bytes) == {"gpu0": GIB // 2, HOST: 4 * GIB}
    assert dict(four.bytes) == {"gpu0": 3 * GIB + GIB // 2, HOST: GIB}


def test_a_number_of_layers_that_is_named_is_kept_to() -> None:
    """A named number of layers is neither raised where more fit nor lowered where it does not fit."""
    assert placed({HOST: 64, "gpu0": 64}, offload=Offload.partial, num_gpu=2).gpu_layers == (("gpu0", 2),)
    assert placed({HOST: 64, "gpu0": 2}, offload=Offload.partial, num_gpu=3) is None


@pytest.mark.parametrize(
    ("num_gpu", "ways"),
    [
        (None, (Offload.whole, Offload.partial, Offload.none)),
        (-1, (Offload.whole, Offload.partial, Offload.none)),
        (0, (Offload.none,)),
        (3, (Offload.partial,)),
        (5, (Offload.whole,)),
        (99, (Offload.whole,)),
    ],
)
def test_the_ways_to_place_a_model_by_what_its_request_says(num_gpu: int | None, ways: tuple[Offload, ...]) -> None:
    """S09: automatic offload tries whole, in part and the host; a named number allows only itself, and 0 the host."""
    assert PlacementDemand(FOUR_LAYERS, num_gpu).offload_modes(BOTH) == ways


def test_without_a_gpu_and_without_layers_there_is_one_way() -> None:
    """Without GPUs, or for a declared object, the only placement is the host or what was declared."""
    assert PlacementDemand(FOUR_LAYERS).offload_modes(()) == (Offload.none,)
    assert PlacementDemand(Footprint(fixed=(("gpu0", 1),))).offload_modes(BOTH) == (Offload.none,)


# -- placing beside other models --------------------------------------------------------------------------------------


def a_gpu_pool(*gpus: str, **how: object) -> PoolUnderTest:
    """Return a pool with GPUs, whose models "a" to "d" have four layers of 1 GiB."""
    pool = a_pool(capacity="64GiB", gpus=gpus, **how)
    for model in "abcd":
        pool.declare(model, FOUR_LAYERS)
    return pool


def test_s13_a_model_that_fits_no_gpu_whole_is_offloaded_in_part() -> None:
    """S13: with nothing else loaded, a model that fits no GPU whole is offloaded in part."""
    pool = a_gpu_pool("4GiB").loading("a", request=1)
    assert pool.launches[1].placement.gpu_layers == (("gpu0", 4),)


def test_s13_a_model_that_would_fit_whole_without_others_evicts_them() -> None:
    """S13: a model that would fit whole without another runner evicts it."""
    pool = a_gpu_pool("8GiB").idle("a")
    assert stopped(pool.feed(acquire("b", request=1))) == [1]
    pool.feed(exited(1))
    assert pool.launches[2].placement.gpu_layers == (("gpu0", 5),)


def test_s13_a_model_is_split_over_gpus_before_anybody_is_evicted() -> None:
    """S13: a model is split over GPUs before another runner is evicted."""
    pool = a_gpu_pool("8GiB", "4GiB").idle("a")
    assert launched(pool.feed(acquire("b", request=1))) == ["b"]
    assert sum(layers for _, layers in pool.launches[2].placement.gpu_layers) == 5


def test_s13_only_what_is_pinned_makes_a_part_the_best_there_is() -> None:
    """S13: a model is offloaded in part beside a pinned runner."""
    pool = a_gpu_pool("8GiB").idle("a")
    pool.feed(pin("a"))
    assert launched(pool.feed(acquire("b", request=1))) == ["b"]
    assert pool.launches[2].placement.gpu_layers == (("gpu0", 4),)


def test_a_model_goes_to_the_host_where_no_layer_fits_a_gpu() -> None:
    """A model goes to the host where no layer fits on a GPU."""
    pool = a_gpu_pool("1GiB").declare("a", layered(4, "1GiB", output="1GiB")).loading("a", request=1)
    assert pool.launches[1].placement.gpu_layers == ()


def test_s09_num_gpu_0_considers_no_gpu() -> None:
    """S09: with num_gpu 0 everything stays on the host."""
    pool = a_gpu_pool("8GiB", "8GiB").declare("a", a_model()).loading("a", request=1, num_gpu=0)
    assert pool.launches[1].placement.gpu_layers == ()


def test_s09_gpus_are_looked_at_anew_for_each_load() -> None:
    """S09: each load is placed by the GPUs as they are then, new ones and those of other programs' memory included."""
    pool = a_gpu_pool("8GiB")
    pool.feed(memory(9, cpu="1GiB"))
    pool.strangers = {"gpu0": 8 * GIB}
    pool.capacities["gpu1"] = 8 * GIB
    pool.loading("a", request=1)
    assert pool.launches[1].placement.gpu_layers == (("gpu1", 5),)


def test_n02_what_takes_more_than_four_fifths_of_what_is_free_evicts_before_anything_is_started() -> None:
    """N02: a model that needs more than four fifths of the free memory evicts before its process starts."""
    pool = a_gpu_pool("8.5GiB").idle("a")
    commands = pool.feed(acquire("b", request=1))
    assert (stopped(commands), launched(commands)) == ([1], [])
    assert launched(pool.feed(exited(1))) == ["b"]


def test_n02_a_prediction_covers_all_slots_and_no_more_than_was_trained() -> None:
    """N02: a prediction counts the lesser of the asked and the trained context, times the slots."""
    info = a_model(context_trained=2048)
    one, four = (estimate(info, resolve(info, Options(num_ctx=8192, num_parallel=slots))) for slots in (1, 4))
    assert sum(four.caches_bytes) == 4 * sum(one.caches_bytes) == 4 * 2 * 2 * 2 * 16 * 4 * 2048


def test_a_gpu_may_be_required() -> None:
    """With `require_gpu` a model is refused rather than placed on the host, and the refusal says if there is no GPU."""
    pool = a_gpu_pool("3.9GiB", require_gpu=True)
    assert refused(pool.feed(acquire("a", request=1))) == {1: DoesNotFitRefusal}
    pool = a_gpu_pool(require_gpu=True)
    assert refused(pool.feed(acquire("a", request=1))) == {1: DoesNotFitRefusal}
    assert pool.refusal(1).reason is Infeasible.no_required_gpu


@pytest.mark.parametrize("layers", [0, 2, 8])
@pytest.mark.parametrize("where", ["setting", "request", "without GPUs"])
def test_u09_fewer_layers_than_are_required_are_refused_by_name(layers: int, where: str) -> None:
    """U09: where all layers are required on GPUs, fewer are neither passed over nor a reason to reload."""
    sizes = () if where == "without GPUs" else ("24GiB",)
    pool = a_gpu_pool(*sizes, require_gpu=where != "request").declare("a", a_model(layers_bytes=(GIB,) * 8))
    required = {"require_gpu": True} if where == "request" else {}
    assert refused(pool.feed(acquire("a", request=1, num_gpu=layers, **required))) == {1: UnsupportedOption}
    assert (pool.refusal(1).option, pool.refusal(1).value) == ("num_gpu", layers)
    assert not pool.launches


@pytest.mark.parametrize("layers", [-1, 9, 99])
def test_u09_all_layers_may_be_named_where_they_are_required(layers: int) -> None:
    """U09: a request that names all layers, or leaves them to the scheduler, has the model whole on GPUs."""
    pool = a_gpu_pool("24GiB", require_gpu=True).declare("a", a_model(layers_bytes=(GIB,) * 8))
    pool.idle("a", num_gpu=layers)
    assert dict(pool.launches[1].placement.gpu_layers) == {"gpu0": 9}
    assert pool.feed(acquire("a", request=1)) == [Grant(1, 1)]
    assert refused(pool.feed(acquire("a", request=2, num_gpu=0))) == {2: UnsupportedOption}
    assert len(pool.launches) == 1


def test_all_layers_on_gpus_or_nothing() -> None:
    """A request for all layers on GPUs is refused at once where they never fit."""
    pool = a_gpu_pool("8GiB").declare("a", a_model(layers_bytes=(GIB,) * 8))
    assert refused(pool.feed(acquire("a", request=1, num_gpu=99))) == {1: DoesNotFitRefusal}
    needs = dict(pool.refusal(1).needed)
    assert needs["gpu0"] > 8 * GIB
    assert pool.refusal(1).reason is Infeasible.too_large


def test_s26_a_model_that_fits_nowhere_is_refused_with_the_numbers() -> None:
    """S26: with nothing loaded, a model that fits nowhere is refused with figures."""
    pool = a_pool(capacity="2GiB", gpus=("1GiB",)).declare("a", FOUR_LAYERS)
    assert refused(pool.feed(acquire("a", request=1))) == {1: DoesNotFitRefusal}
    assert dict(pool.refusal(1).needed) == {HOST: 4 * GIB * 21 // 20}
    assert dict(pool.refusal(1).available) == {HOST: 2 * GIB, "gpu0": GIB}


def test_a_lease_on_one_gpu_does_not_hold_up_a_load_on_another() -> None:
    """Rule 5: a lease on one GPU does not delay a load on another."""
    pool = a_gpu_pool("8GiB", "8GiB").ready("a", lease=1)
    assert launched(pool.feed(acquire("b", request=2))) == ["b"]
    assert pool.waiting() == [2]


def test_what_is_offloaded_in_part_waits_for_a_load_rather_than_to_stay_on_the_smaller_gpu() -> None:
    """A model that would go in part on a smaller GPU waits for a load on the larger one, because it is never moved."""
    pool = a_pool("64GiB", ["24GiB", "4GiB"]).declare("small", layered(10, "100MiB"))
    pool.declare("large", layered(32, "1GiB", compute="100MiB", host="100MiB"))
    pool.feed(acquire("small", request=1))
    assert launched(pool.feed(acquire("large", request=2))) == []
    assert pool.waits_for(2) == WaitFor.load_slot
    assert launched(pool.feed(loaded(1))) == ["large"]
    assert dict(pool.life("large").placement.gpu_layers).keys() == {"gpu0", "gpu1"}


# -- to the byte ------------------------------------------------------------------------------------------------------


LAYERS = Footprint((100,) * 4, (0,) * 4, output_bytes=100)  # with the output: five of 100 bytes


def layers(
    free: dict[str, int], footprint: Footprint = LAYERS, offload: Offload = Offload.whole, **how: Any
) -> dict[DeviceId, int] | None:
    """Return the layers by GPU, or None where the model is not placed."""
    placement = find_placement(PlacementDemand(footprint, **how), offload, {HOST: 10**6, **free}, BOTH)
    return None if placement is None else dict(placement.gpu_layers)


def test_in_part_goes_all_but_one_at_most_and_one_at_least() -> None:
    """In part, as many layers go to the GPU as fit with headroom: at least one, and all but one at most."""
    assert layers({"gpu0": 10_000}, offload=Offload.partial) == {"gpu0": 4}
    assert layers({"gpu0": 250}, offload=Offload.partial) == {"gpu0": 2}
    assert layers({"gpu0": 125}, offload=Offload.partial) == {"gpu0": 1}
    assert layers({"gpu0": 124}, offload=Offload.partial) is None


def test_one_layer_is_one_layer() -> None:
    """A request for one layer on GPUs gets one layer."""
    assert layers({"gpu0": 10_000}, offload=Offload.partial, num_gpu=1) == {"gpu0": 1}


def test_a_gpu_of_which_nothing_is_known_has_no_room() -> None:
    """A GPU or a host without known free memory has no room."""
    assert layers({}) is None
    assert layers({"gpu1": 625}) == {"gpu1": 5}
    tiny = Footprint(fixed=(("gpu0", 1),))
    assert find_placement(PlacementDemand(tiny), Offload.none, {}, BOTH) is None
    assert layers({}, Footprint((0,) * 4, (0,) * 4, output_bytes=1), spread=False) is None


def test_the_output_and_its_copy_both_want_room() -> None:
    """An output matrix that is also the input embeddings takes its room twice."""
    copied = replace(LAYERS, output_copy_bytes=100)
    assert layers({"gpu0": 750}, copied) == {"gpu0": 5}
    assert layers({"gpu0": 400, "gpu1": 374}, copied) is None
    assert layers({"gpu0": 375, "gpu1": 375}, copied) == {"gpu0": 3, "gpu1": 2}


def test_compute_buffers_and_projectors_take_their_part_of_a_split() -> None:
    """Compute buffers on each GPU and projectors on the first one leave less room for layers."""
    buffered = replace(LAYERS, compute_bytes=100)
    assert layers({"gpu0": 500, "gpu1": 375}, buffered) == {"gpu0": 3, "gpu1": 2}
    assert layers({"gpu0": 499, "gpu1": 375}, buffered) is None
    seeing = replace(LAYERS, projectors_bytes=100)
    assert layers({"gpu0": 500, "gpu1": 250}, seeing) == {"gpu0": 3, "gpu1": 2}
    assert layers({"gpu0": 499, "gpu1": 250}, seeing) is None


# -- named GPUs -------------------------------------------------------------------------------------------------------


def a_pool_of_two_gpus() -> PoolUnderTest:
    """Return a pool with a roomy GPU and a small one, and a model of 33 layers that either takes."""
    return a_pool("64GiB", ["24GiB", "16GiB"]).declare("m", a_model((amount("180MiB"),) * 32))


def test_u13_layers_go_to_the_gpus_that_are_named() -> None:
    """U13: a model whose GPUs are named goes to these, although another one has more memory."""
    pool = a_pool_of_two_gpus().loading("m", devices=("gpu1",))
    assert dict(pool.launches[1].placement.gpu_layers) == {"gpu1": 33}


def test_u13_a_model_goes_in_part_rather_than_to_another_gpu() -> None:
    """U13: what does not fit on the named GPU stays on the host."""
    pool = a_pool("64GiB", ["24GiB", "4GiB"]).declare("m", a_model((amount("180MiB"),) * 32))
    pool.loading("m", devices=("gpu1",))
    ((gpu, layers),) = pool.launches[1].placement.gpu_layers
    assert gpu == "gpu1" and 0 < layers < 33


def test_u13_a_runner_on_a_named_gpu_serves() -> None:
    """U13: a request is served by a runner whose GPUs it names, and one on another GPU is loaded anew."""
    pool = a_pool_of_two_gpus().idle("m")
    assert granted(pool.feed(acquire("m", 2, devices=("gpu0", "gpu1")), release(2))) == [2]
    assert granted(pool.feed(acquire("m", 3, devices=("gpu1",)))) == []
    pool.settle()
    assert dict(pool.launches[2].placement.gpu_layers) == {"gpu1": 33}


def test_u13_a_gpu_that_is_not_there_is_refused_by_name() -> None:
    """U13: a request that names only GPUs that are not there is refused, and says which."""
    pool = a_pool_of_two_gpus()
    pool.feed(acquire("m", 1, devices=("gpu7",)))
    assert (pool.refusal(1).option, pool.refusal(1).value) == ("devices", "gpu7")


def test_u13_what_is_required_is_required_of_the_named_gpus() -> None:
    """U13: a model that must be whole on GPUs, and does not fit on the named one, is refused."""
    pool = a_pool("64GiB", ["24GiB", "4GiB"]).declare("m", a_model((amount("180MiB"),) * 32))
    assert refused(pool.feed(acquire("m", 1, devices=("gpu1",), require_gpu=True))) == {1: DoesNotFitRefusal}


@pytest.mark.parametrize("index", [2, 99, -1])
def test_n21_a_gpu_to_prefer_that_is_not_there_is_refused_by_name(index: int) -> None:
    """N21: an index of a GPU that there is not is refused; the same model is loaded for a request without it."""
    pool = a_pool_of_two_gpus()
    pool.feed(acquire("m", 1, main_gpu=index))
    assert (pool.refusal(1).option, pool.refusal(1).value) == ("main_gpu", index)
    assert launched(pool.feed(acquire("m", 2, main_gpu=1))) == ["m"]


def test_n21_without_gpus_there_is_none_to_prefer() -> None:
    """N21: on a machine without GPUs, a GPU to prefer means nothing."""
    pool = a_pool("64GiB").declare("m", a_model())
    assert launched(pool.feed(acquire("m", 1, main_gpu=3))) == ["m"]


# -- nothing is needed ------------------------------------------------------------------------------------------------


def an_overdrawn_host() -> PoolUnderTest:
    """Return a pool whose host has shrunk below what a runner holds that is in use."""
    pool = a_pool("8GiB", sizes={"none": 0}).declare("nothing", Footprint()).ready("a", lease=1)
    pool.capacities[HOST] = amount("5GiB")
    pool.feed(pool.sample())
    assert pool.free() < 0
    return pool


@pytest.mark.parametrize("model", ["nothing", "none"])
@pytest.mark.parametrize("gpus", [(), ("8GiB",)], ids=["no GPU", "a GPU"])
def test_u61_a_model_that_declares_no_memory_starts_under_require_gpu(model: str, gpus: tuple[str, ...]) -> None:
    """A model that declares nothing, or no bytes of the host, has no layers that could be required on a GPU."""
    pool = a_pool(gpus=gpus, require_gpu=True, sizes={"none": 0}).declare("nothing", Footprint())
    assert launched(pool.feed(acquire(model, 1))) == [model]
    assert pool.launches[1].placement.gpu_layers == ()


@pytest.mark.parametrize("model", ["nothing", "none"])
def test_u61_no_bytes_are_there_where_the_host_is_overdrawn(model: str) -> None:
    """A model that needs no memory starts beside a runner that holds more than there is, which stays in use."""
    pool = an_overdrawn_host()
    assert launched(pool.feed(acquire(model, 2))) == [model]
    pool.feed(loaded(2))
    pool.advance("10m")
    assert pool.state("a") is RunnerState.ready and not pool.stops


def test_u61_a_reservation_of_no_bytes_is_granted_where_the_host_is_overdrawn() -> None:
    """The program's own memory, of no bytes: nothing has to be made free for it."""
    assert granted(an_overdrawn_host().feed(memory(2, cpu="0B"))) == [2]


def test_u61_memory_that_is_needed_elsewhere_is_not_looked_for_on_an_overdrawn_host() -> None:
    """An object that takes a GPU, and no bytes of the host, starts where the host is overdrawn."""
    pool = a_pool("8GiB", ["8GiB"]).declare("on the GPU", Footprint(fixed=((HOST, 0), (DeviceId("gpu0"), 4 * GIB))))
    pool.ready("a", lease=1)
    pool.capacities[HOST] = amount("5GiB")
    pool.feed(pool.sample())
    assert launched(pool.feed(acquire("on the GPU", 2))) == ["on the GPU"]
