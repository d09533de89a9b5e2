"""Options that the engine would refuse: the request is refused at once, and no runner is evicted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fsm.domain.devices import HOST
from fsm.domain.options import Options
from fsm.messages.reasons import Infeasible
from fsm.messages.refusals import DoesNotFitRefusal, UnsupportedOption
from fsm.placement.search import Gpu, Offload, PlacementDemand
from fsm.sizing.model_profile import UnsupportedReason
from scheduler.engines.llama_options import impossible, resolve
from tests.support.models import a_model
from tests.support.pool import a_pool, acquire, amount, granted, launched, layered, refused, stopped

WHOLE_BLOCKS = replace(a_model(), key_length=64, value_length=64)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("num_parallel", Options(num_parallel=257), UnsupportedReason.too_many_slots),
        ("num_thread", Options(num_thread=513), UnsupportedReason.too_many_threads),
        (
            "cache_type_v",
            Options(cache_type_v="q8_0", flash_attention=False),
            UnsupportedReason.needs_flash_attention,
        ),
    ],
)
def test_what_the_engine_refuses_for_every_model_is_known(
    name: str, options: Options, reason: UnsupportedReason
) -> None:
    """The refused option is named with the reason, and values at the limit are accepted."""
    found = impossible(WHOLE_BLOCKS, resolve(WHOLE_BLOCKS, options))
    assert found is not None and (found[0], found[2]) == (name, reason)
    assert impossible(WHOLE_BLOCKS, resolve(WHOLE_BLOCKS, Options(num_parallel=256, num_thread=512))) is None
    assert impossible(WHOLE_BLOCKS, resolve(WHOLE_BLOCKS, Options(cache_type_k="q8_0", cache_type_v="q8_0"))) is None


def test_heads_that_are_no_whole_blocks_take_no_quantised_cache() -> None:
    """Heads that are no whole number of blocks refuse quantised keys or values, and encoders accept them."""
    odd = replace(WHOLE_BLOCKS, key_length=16)
    found = impossible(odd, resolve(odd, Options(cache_type_k="q8_0")))
    assert found is not None and found == ("cache_type_k", "q8_0", UnsupportedReason.partial_blocks)
    assert impossible(odd, resolve(odd, Options(cache_type_v="q8_0"))) is None
    encoder = replace(odd, architecture="bert")
    assert impossible(encoder, resolve(encoder, Options(cache_type_k="q8_0"))) is None


def test_an_option_that_cannot_be_costs_nobody_a_runner() -> None:
    """A request with an impossible option costs the model neither its runner nor a back-off."""
    pool = a_pool().declare("a", WHOLE_BLOCKS).idle("a")
    commands = pool.feed(acquire("a", request=1, num_parallel=300))
    assert (refused(commands), stopped(commands)) == ({1: UnsupportedOption}, [])
    assert pool.refusal(1).option == "num_parallel"
    assert granted(pool.feed(acquire("a", request=2))) == [2]


def test_layers_for_gpus_that_are_not_there_are_refused() -> None:
    """A request that names a number of layers is refused where there is no GPU, and is not placed on the host."""
    pool = a_pool(capacity="64GiB").declare("a", WHOLE_BLOCKS)
    assert refused(pool.feed(acquire("a", request=1, num_gpu=99))) == {1: DoesNotFitRefusal}
    assert pool.refusal(1).reason is Infeasible.no_gpu
    assert launched(pool.feed(acquire("a", request=2, num_gpu=-1))) == ["a"]


def test_a_required_gpu_is_no_matter_of_the_request() -> None:
    """A required GPU allows only a whole placement, whatever number of layers the request names."""
    gpus = (Gpu("gpu0", "gpu0"),)
    for num_gpu in (None, -1, 0, 2):
        assert PlacementDemand(layered(4, "1GiB"), num_gpu, require_gpu=True).offload_modes(gpus) == (Offload.whole,)


def test_a_refusal_tells_the_way_that_lacks_least() -> None:
    """The refusal has the figures of the placement that lacks least memory."""
    pool = a_pool(capacity="1GiB", gpus=("8GiB",)).declare("a", layered(4, "1GiB", host="1GiB"))
    assert refused(pool.feed(acquire("a", request=1))) == {1: DoesNotFitRefusal}
    assert dict(pool.refusal(1).needed) == {"gpu0": amount("5GiB"), HOST: amount("1GiB") * 21 // 20}
