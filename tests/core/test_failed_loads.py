"""What failed loads teach: where a model goes next, whose fault it was, and which defaults it is loaded without."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fsm.domain.devices import HOST, DeviceId
from fsm.domain.options import Options
from fsm.machine.request import ModelId
from fsm.messages.commands import Grant
from fsm.messages.refusals import LoadFailedRefusal
from tests.support.models import a_model
from tests.support.pool import PoolUnderTest, a_pool, acquire, amount, cancel, exited, granted, loaded, release

GPU = DeviceId("gpu0")
LAYERS = 33
Q8 = Options(cache_type_k="q8_0", cache_type_v="q8_0")


def a_pool_of_gpus(*gpus: str, models: str = "m") -> PoolUnderTest:
    """Return a pool with GPUs, and models of 33 layers, 6.3 GiB each."""
    pool = a_pool("64GiB", gpus)
    for model in models:
        pool.declare(model, a_model((amount("180MiB"),) * (LAYERS - 1)))
    return pool


def fails(
    pool: PoolUnderTest, request: int, model: str = "m", *, memory: bool = False, **how: object
) -> dict[str, int]:
    """Have the load for a request fail; return its layers by GPU. The back-off is over then."""
    pool.feed(acquire(model, request, **how))
    runner = pool.runner(model)
    pool.feed(exited(runner, 1, "it failed", out_of_memory=memory))
    if request not in pool.answers:
        pool.feed(cancel(request))
    pool.settle()
    pool.advance(max(0.0, pool.core._state.models[ModelId(model)].blocked_until - pool.now))
    return dict(pool.launches[runner].placement.gpu_layers)


def goes_to(pool: PoolUnderTest, request: int, model: str = "m", **how: object) -> dict[str, int]:
    """Have a request served, and its runner expire; return its layers by GPU."""
    pool.feed(acquire(model, request, keep_alive=0, **how))
    runner = pool.runner(model)
    pool.feed(loaded(runner), release(request), exited(runner))
    pool.settle()
    return dict(pool.launches[runner].placement.gpu_layers)


# -- where ------------------------------------------------------------------------------------------------------------


def test_u02_after_memory_ran_out_fewer_layers_go_to_the_gpu() -> None:
    """U02: each load that runs out of memory leaves fewer layers for the next, down to none."""
    pool = a_pool_of_gpus("8GiB")
    layers = [sum(fails(pool, request, memory=True).values()) for request in range(1, 20)]
    assert layers[0] == LAYERS
    assert layers[-1] == 0
    assert layers == sorted(layers, reverse=True)


def test_u02_after_memory_ran_out_another_gpu_takes_the_model() -> None:
    """U02: a model that ran out of memory on the roomiest GPU goes to another one whole."""
    pool = a_pool_of_gpus("8200MiB", "8GiB")
    assert fails(pool, 1, memory=True) == {"gpu0": LAYERS}
    pool.capacities["gpu0"] -= amount("500MiB")
    pool.feed(pool.sample())
    assert goes_to(pool, 2) == {"gpu1": LAYERS}


def test_u26_n22_after_memory_ran_out_the_projector_goes_to_the_host() -> None:
    """U26, N22: a vision model whose load ran out of memory is tried with all its layers, its projector on the host."""
    model = replace(a_model((amount("180MiB"),) * (LAYERS - 1), vision=True), projectors_bytes=amount("600MiB"))
    pool = a_pool("64GiB", ["8GiB"]).declare("m", model)
    assert fails(pool, 1, memory=True) == {"gpu0": LAYERS}
    assert goes_to(pool, 2) == {"gpu0": LAYERS}
    first, second = (pool.launches[runner].placement for runner in (1, 2))
    assert (first.projector_on_host, second.projector_on_host) == (False, True)
    moved = dict(first.bytes)[GPU] - dict(second.bytes)[GPU], dict(second.bytes)[HOST] - dict(first.bytes)[HOST]
    assert moved[0] >= amount("600MiB") and moved[1] >= amount("600MiB")


def test_u26_after_memory_ran_out_again_fewer_layers_go_to_the_gpu() -> None:
    """U26: a load that runs out of memory with its projector on the host is followed by one with fewer layers."""
    model = replace(a_model((amount("180MiB"),) * (LAYERS - 1), vision=True), projectors_bytes=amount("600MiB"))
    pool = a_pool("64GiB", ["8GiB"]).declare("m", model)
    layers = [sum(fails(pool, request, memory=True).values()) for request in (1, 2, 3)]
    assert layers[:2] == [LAYERS, LAYERS] and layers[2] < LAYERS


def test_u26_a_model_without_layers_on_gpus_has_its_projector_on_the_host_anyway() -> None:
    """U26: memory that runs out on the host says nothing of a projector."""
    model = replace(a_model(vision=True), projectors_bytes=amount("600MiB"))
    pool = a_pool("64GiB").declare("m", model)
    fails(pool, 1, memory=True)
    goes_to(pool, 2)
    assert not pool.launches[2].placement.projector_on_host


def test_u02_what_ran_out_half_an_hour_ago_is_forgotten() -> None:
    """U02: half an hour after memory ran out, the prediction counts again."""
    pool = a_pool_of_gpus("8GiB")
    for request in (1, 2, 3):
        fails(pool, request, memory=True)
    assert sum(goes_to(pool, 4).values()) < LAYERS
    pool.advance("31m")
    assert goes_to(pool, 5) == {"gpu0": LAYERS}


def test_u02_a_request_that_names_its_layers_gets_them_again() -> None:
    """U02: a request that names all layers has them tried again after memory ran out."""
    pool = a_pool_of_gpus("8GiB")
    assert [fails(pool, request, memory=True, num_gpu=LAYERS) for request in (1, 2)] == [{"gpu0": LAYERS}] * 2


def test_u02_a_gpu_on_which_a_load_failed_goes_last() -> None:
    """U02: a load that failed on one GPU is tried on the other, and then on the host; later on the first again."""
    pool = a_pool_of_gpus("24GiB", "16GiB")
    tried = [fails(pool, request) for request in (1, 2, 3)]
    assert tried == [{"gpu0": LAYERS}, {"gpu1": LAYERS}, {}]
    pool.advance("30m")
    assert goes_to(pool, 4) == {"gpu0": LAYERS}


def test_u02_a_gpu_on_which_two_models_failed_goes_last_for_a_third() -> None:
    """U02: a card on which the loads of two models failed is not chosen for a third; with a runner on it, it is."""
    pool = a_pool_of_gpus("24GiB", "16GiB", models="abcd")
    fails(pool, 1, "a")
    assert goes_to(pool, 2, "c") == {"gpu0": LAYERS}
    fails(pool, 3, "b")
    assert goes_to(pool, 4, "c") == {"gpu1": LAYERS}
    pool.feed(acquire("d", 5, main_gpu=0))
    pool.feed(loaded(pool.runner("d")))
    assert goes_to(pool, 6, "c") == {"gpu0": LAYERS}


def test_u02_where_there_is_no_other_place_a_gpu_is_tried_again() -> None:
    """U02: a request that requires a GPU is given the only one, although its load failed there."""
    pool = a_pool_of_gpus("24GiB")
    assert [fails(pool, request, require_gpu=True) for request in (1, 2)] == [{"gpu0": LAYERS}] * 2


def test_u02_a_load_that_succeeds_there_clears_a_gpu() -> None:
    """U02: after a load on a GPU by a request that names it, the GPU is chosen again."""
    pool = a_pool_of_gpus("24GiB", "16GiB")
    fails(pool, 1)
    assert goes_to(pool, 2, main_gpu=0) == {"gpu0": LAYERS}
    assert goes_to(pool, 3) == {"gpu0": LAYERS}


# -- whose fault ------------------------------------------------------------------------------------------------------


def a_pool_whose_model_has_loaded() -> PoolUnderTest:
    """Return a pool whose model "m" has loaded with the usual options, and has been released."""
    pool = a_pool("64GiB").declare("m", a_model())
    pool.feed(acquire("m", 1), loaded(1), release(1))
    return pool


def fails_with(pool: PoolUnderTest, request: int, **named: object) -> None:
    """Have the load of a model with other options fail."""
    pool.feed(acquire("m", request, **named))
    pool.settle()
    pool.feed(exited(pool.runner("m"), 1, "it failed"))
    pool.settle()


def test_u11_an_option_that_cannot_be_loaded_is_refused_to_its_asker_alone() -> None:
    """U11: after a load with somebody's option has failed, requests without it are loaded at once."""
    pool = a_pool_whose_model_has_loaded()
    fails_with(pool, 2, cache_type_k="bf16")
    assert isinstance(pool.refusal(2), LoadFailedRefusal)
    pool.feed(acquire("m", 3))
    assert granted(pool.feed(loaded(pool.runner("m")))) == [3]


def test_u11_the_option_is_backed_off_for_longer_each_time() -> None:
    """U11: requests with the option that failed are refused for 10 s, and after a second failure for 20 s."""
    pool = a_pool_whose_model_has_loaded()
    for number, wait_s in ((2, 10.0), (4, 20.0)):
        fails_with(pool, number, cache_type_k="bf16")
        assert pool.refusal(number).retry_after_s == pytest.approx(wait_s)
        pool.advance(wait_s - 1.0)
        pool.feed(acquire("m", number + 1, cache_type_k="bf16"))
        assert pool.refusal(number + 1).retry_after_s == pytest.approx(1.0)
        pool.advance("1s")


def test_u11_a_request_that_joined_the_load_is_loaded_by_itself() -> None:
    """U11: a request without the option, which waited for the load that failed, is served by a load of its own."""
    pool = a_pool_whose_model_has_loaded()
    pool.feed(acquire("m", 2, num_ctx=8192, cache_type_k="bf16"))
    pool.settle()
    pool.feed(acquire("m", 3), exited(pool.runner("m"), 1, "it failed"))
    pool.settle()
    assert (2 in pool.answers, 3 in pool.answers) == (True, False)
    assert granted(pool.feed(loaded(pool.runner("m")))) == [3]


def test_u11_a_model_that_has_never_loaded_is_backed_off_for_all() -> None:
    """U11: where a file has never loaded, its failure is every request's."""
    pool = a_pool("64GiB").declare("m", a_model())
    pool.feed(acquire("m", 1, cache_type_k="bf16"), acquire("m", 2), exited(1, 1, "it failed"))
    pool.feed(acquire("m", 3, num_ctx=512))
    assert [type(pool.refusal(request)) for request in (1, 2, 3)] == [LoadFailedRefusal] * 3


def test_u11_a_model_that_fails_with_everything_is_backed_off_for_all() -> None:
    """U11: after three failures with different options, the model is backed off, whatever a request names."""
    pool = a_pool_whose_model_has_loaded()
    for request, context in ((2, 512), (3, 1024), (4, 2048)):
        fails_with(pool, request, num_ctx=context, cache_type_k="bf16")
    pool.feed(acquire("m", 5))
    assert isinstance(pool.refusal(5), LoadFailedRefusal)


def test_u11_an_option_that_fails_again_is_backed_off_for_longer_than_its_model() -> None:
    """U11: where the model is backed off for 10 s, an option that failed before is for 20 s, as it would be alone."""
    pool = a_pool_whose_model_has_loaded()
    fails_with(pool, 2, num_ctx=512, cache_type_k="bf16")
    pool.advance("11s")
    for request, context in ((3, 1024), (4, 2048)):
        fails_with(pool, request, num_ctx=context, cache_type_k="bf16")
    fails_with(pool, 5, num_ctx=512, cache_type_k="bf16")  # too many fail by now to say that the option is to blame
    assert pool.refusal(5).retry_after_s == pytest.approx(20.0)
    pool.feed(acquire("m", 6))
    assert pool.refusal(6).retry_after_s == pytest.approx(10.0)
    pool.advance("10s")
    pool.feed(acquire("m", 7, num_ctx=512, cache_type_k="bf16"), acquire("m", 8))
    pool.settle()
    assert pool.refusal(7).retry_after_s == pytest.approx(10.0)
    assert granted(pool.feed(loaded(pool.runner("m")))) == [8]


def test_u11_an_option_that_loads_after_all_is_no_longer_backed_off() -> None:
    """U11: the failures of an option are forgotten once a load with it has succeeded."""
    pool = a_pool_whose_model_has_loaded()
    fails_with(pool, 2, cache_type_k="bf16")
    pool.advance("10s")
    pool.feed(acquire("m", 3, cache_type_k="bf16", keep_alive=0))
    pool.feed(loaded(pool.runner("m")), release(3))
    pool.settle()
    fails_with(pool, 4, cache_type_k="bf16")
    assert pool.refusal(4).retry_after_s == pytest.approx(10.0)


# -- defaults ---------------------------------------------------------------------------------------------------------


def test_u12_a_load_that_fails_with_a_default_is_tried_once_without() -> None:
    """U12: after a load with the default cache type failed, the next is without, and serves the same request."""
    pool = a_pool("64GiB", defaults=Q8).declare("m", a_model(head_length=32))
    pool.feed(acquire("m", 1), exited(1, 1, "it failed"))
    pool.settle()
    assert [pool.launches[runner].options.cache_type_v for runner in (1, 2)] == ["q8_0", "f16"]
    assert granted(pool.feed(loaded(2))) == [1]


def test_u12_the_model_is_loaded_without_the_default_from_then_on() -> None:
    """U12: later runners of the model are launched without the default, and requests that name none match them."""
    pool = a_pool("64GiB", defaults=Q8).declare("m", a_model(head_length=32))
    pool.feed(acquire("m", 1), exited(1, 1, "it failed"))
    pool.settle()
    pool.feed(loaded(2))
    assert [type(one) for one in pool.feed(acquire("m", 2))] == [Grant]
    pool.feed(release(1), release(2))
    pool.advance("1h")
    pool.settle()
    pool.feed(acquire("m", 3))
    assert pool.launches[3].options.cache_type_v == "f16"


def test_u12_a_model_that_fails_without_the_default_too_is_backed_off() -> None:
    """U12: where the load without the default fails as well, the request is refused, and the default counts again."""
    pool = a_pool("64GiB", defaults=Q8).declare("m", a_model(head_length=32))
    pool.feed(acquire("m", 1), exited(1, 1, "it failed"))
    pool.settle()
    pool.feed(exited(2, 1, "it failed"))
    assert isinstance(pool.refusal(1), LoadFailedRefusal)
    pool.settle().advance("10s")
    pool.feed(acquire("m", 2))
    assert pool.launches[3].options.cache_type_v == "q8_0"


def test_u12_what_a_request_names_itself_is_no_default() -> None:
    """U12: a request that names the cache type is refused after the load failed, and not served without it."""
    pool = a_pool("64GiB", defaults=Q8).declare("m", a_model(head_length=32))
    pool.feed(acquire("m", 1, cache_type_k="q8_0", cache_type_v="q8_0"), exited(1, 1, "it failed"))
    assert isinstance(pool.refusal(1), LoadFailedRefusal)


def test_u12_flash_attention_is_a_default_too() -> None:
    """U12: a model whose load failed with flash attention by default is loaded without that wish."""
    pool = a_pool("64GiB", defaults=Options(flash_attention=True)).declare("m", a_model())
    pool.feed(acquire("m", 1), exited(1, 1, "it failed"))
    pool.settle()
    assert [pool.launches[runner].options.flash_attention for runner in (1, 2)] == [True, None]
