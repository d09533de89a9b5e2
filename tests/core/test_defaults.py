"""Defaults from the settings for what requests leave open: used where the model can, and never a reason to reload."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fsm.domain.options import Options
from fsm.messages.commands import Grant
from fsm.messages.refusals import DoesNotFitRefusal
from scheduler.engines.llama_options import resolve
from scheduler.models.model_info import ModelInfo
from tests.support.models import a_model
from tests.support.pool import a_pool, acquire, amount, launched, layered, refused

WIDE = replace(a_model(), key_length=64, value_length=64)  # heads that may have quantised caches


def told(info: ModelInfo, defaults: Options, **asked: object) -> Options:
    """Return the options that a runner is launched with."""
    return resolve(info, Options(**asked), defaults)


def test_what_a_request_leaves_open_is_taken_from_the_settings() -> None:
    """Options that a request leaves open come from the settings: context, slots, flash attention and cache types."""
    defaults = Options(num_ctx=2048, num_parallel=2, flash_attention=True, cache_type_k="q8_0", cache_type_v="q4_0")
    pool = a_pool(defaults=defaults).declare("a", WIDE).loading("a", request=1)
    assert pool.launches[1].options == replace(defaults, num_batch=512, draft_num_predict=0, context_shift=False)


def test_what_a_request_names_wins_over_the_settings() -> None:
    """An option that a request names wins over the setting, and the other settings still hold."""
    defaults = Options(num_ctx=2048, num_parallel=2)
    assert told(WIDE, defaults, num_ctx=1024) == replace(told(WIDE, defaults), num_ctx=1024)


def test_n09_values_from_the_settings_are_automatic_and_never_cause_a_reload() -> None:
    """N09: a request that names no options is served by a runner that was loaded with others than the settings."""
    pool = a_pool(defaults=Options(num_ctx=4096, num_parallel=4, cache_type_k="q8_0")).declare("a", WIDE)
    pool.idle("a", num_ctx=8192, num_parallel=4, num_batch=64, cache_type_k="f16")
    assert pool.feed(acquire("a", request=1)) == [Grant(1, 1)]


@pytest.mark.parametrize("named", [{"num_ctx": 512}, {"num_parallel": 1}, {"num_ctx": 4096, "num_parallel": 2}])
def test_u07_what_is_not_named_is_what_the_settings_say_at_least(named: dict[str, int]) -> None:
    """U07: after a request for less than the settings say, one that names nothing is loaded with them."""
    pool = a_pool(defaults=Options(num_ctx=4096, num_parallel=4)).declare("a", WIDE).idle("a", **named)
    pool.feed(acquire("a", request=1))
    pool.settle()
    launch = pool.launches[2].options
    assert (launch.num_ctx, launch.num_parallel) == (4096, 4)


def test_s22_slots_from_the_settings_are_one_for_models_that_take_one_at_a_time() -> None:
    """S22: a model of a family with one slot has one slot, whatever the setting says."""
    assert told(a_model(embedding=True), Options(num_parallel=4)).num_parallel == 1


def test_a_context_from_the_settings_is_at_most_what_a_model_was_trained_with() -> None:
    """A context from the settings is at most the context that the model was trained with."""
    assert told(a_model(context_trained=1024), Options(num_ctx=32768)).num_ctx == 1024


def test_a_context_from_the_settings_is_not_for_embedders_that_compute_every_logit() -> None:
    """An embedder that computes every logit takes no context from the settings, but takes one that a request names."""
    embedder = a_model(embedding=True)
    assert told(embedder, Options(num_ctx=8192)).num_ctx == 512
    assert told(embedder, Options(num_ctx=8192), num_ctx=2048).num_ctx == 2048


@pytest.mark.parametrize(
    ("key_length", "value_length", "expected"),
    [(64, 64, ("q8_0", "q8_0")), (80, 64, ("f16", "q8_0")), (64, 80, ("q8_0", "f16")), (16, 16, ("f16", "f16"))],
)
def test_a_cache_type_from_the_settings_is_only_for_heads_that_can_have_it(
    key_length: int, value_length: int, expected: tuple[str, str]
) -> None:
    """A quantised cache type from the settings is not used for heads that are no whole number of its blocks."""
    info = replace(a_model(), key_length=key_length, value_length=value_length)
    options = told(info, Options(cache_type_k="q8_0", cache_type_v="q8_0"))
    assert (options.cache_type_k, options.cache_type_v) == expected


def test_a_cache_type_that_is_not_quantised_is_for_all_heads() -> None:
    """A cache type that is not quantised is used for heads of every size."""
    options = told(replace(a_model(), key_length=80), Options(cache_type_k="f32", cache_type_v="bf16"))
    assert (options.cache_type_k, options.cache_type_v) == ("f32", "bf16")


@pytest.mark.parametrize("where", ["request", "settings"])
def test_a_quantised_cache_from_the_settings_needs_flash_attention_for_values(where: str) -> None:
    """A quantised cache type for values is not used without flash attention, and one for keys is."""
    defaults = Options(cache_type_k="q8_0", cache_type_v="q8_0", flash_attention=False if where == "settings" else None)
    options = told(WIDE, defaults, **({"flash_attention": False} if where == "request" else {}))
    assert (options.cache_type_k, options.cache_type_v, options.flash_attention) == ("q8_0", "f16", False)


def test_a_cache_type_that_is_named_is_not_doubted() -> None:
    """A cache type that a request names is passed on, and the engine reports what is wrong with it."""
    options = told(a_model(), Options(cache_type_k="q4_0"), cache_type_k="q8_0", cache_type_v="q8_0")
    assert (options.cache_type_k, options.cache_type_v) == ("q8_0", "q8_0")


def test_resolving_twice_with_settings_changes_nothing() -> None:
    """Resolving resolved options again changes nothing."""
    defaults = Options(num_ctx=8192, num_parallel=2, flash_attention=True, cache_type_k="q8_0", cache_type_v="q8_0")
    for info in (WIDE, a_model(), a_model(embedding=True), a_model(vision=True)):
        once = resolve(info, Options(), defaults)
        assert resolve(info, once, defaults) == once


def test_with_a_gpu_required_what_does_not_fit_on_gpus_is_refused() -> None:
    """With `require_gpu`, a model that does not fit on GPUs is refused, and objects load where they declare."""
    pool = a_pool(capacity="64GiB", gpus=("4GiB",), require_gpu=True).declare("large", layered(8, "1GiB"))
    pool.declare("small", layered(2, "1GiB")).declare("object", amount("1GiB"))
    assert refused(pool.feed(acquire("large", request=1))) == {1: DoesNotFitRefusal}
    assert launched(pool.feed(acquire("small", request=2), acquire("object", request=3))) == ["small", "object"]


def test_with_spread_a_model_goes_on_all_gpus() -> None:
    """With `spread_over_gpus`, a model takes all GPUs; without it, one GPU where that is enough."""
    used = []
    for spread in (False, True):
        pool = a_pool(capacity="64GiB", gpus=("8GiB", "8GiB"), spread_over_gpus=spread)
        pool.declare("a", a_model((2**28,) * 8)).loading("a", request=1)
        used.append(len(pool.launches[1].placement.gpu_layers))
    assert used == [1, 2]
