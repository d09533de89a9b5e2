"""Options that a request leaves open and that the core derives from the devices: context, batch, and a required GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fsm.domain.devices import HOST, MIB
from fsm.domain.options import Options
from fsm.messages.refusals import DoesNotFitRefusal
from scheduler.engines.llama_options import DEFAULT_BATCH, resolve
from scheduler.engines.llama_profile import BATCHES, Batch
from scheduler.engines.llama_sizing import estimate
from scheduler.models.model_info import ModelInfo
from tests.support.models import a_model
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    exited,
    expire,
    granted,
    launched,
    loaded,
    out_of_memory,
    refused,
    release,
    stopped,
)

GIB = amount("1GiB")
LONG = replace(a_model((256 * MIB,) * 4, context_trained=1 << 20), heads_kv=(8,) * 4, key_length=128, value_length=128)


def with_gpus(*gpus: str, info: ModelInfo = LONG, **limits: object) -> PoolUnderTest:
    """Return a pool whose models "a" and "b" can have a context of a million tokens; 4096 take 64 MiB of cache."""
    return a_pool("256GiB", gpus, **limits).declare("a", info).declare("b", info)


def told(pool: PoolUnderTest, runner: int = 1) -> tuple[int | None, int | None]:
    """Return context and batch of a launch."""
    options = pool.launches[runner].options
    return options.num_ctx, options.num_batch


def whole_on_a_gpu(**how: object) -> int:
    """Return the bytes that "a" takes on a GPU with room for all of its layers."""
    return dict(with_gpus("80GiB").loading("a", request=1, **how).launches[1].placement.bytes)["gpu0"]


# -- the batch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("context", "batch"), [(4096, 512), (4097, 1024), (32768, 1024), (32769, 2048)])
def test_n05_a_batch_follows_from_the_context(context: int, batch: int) -> None:
    """N05: where a GPU has memory to spare, the batch follows from the context and the plan counts its buffers."""
    pool = with_gpus("80GiB").loading("a", request=1, num_ctx=context)
    assert told(pool) == (context, batch)
    planned = dict(pool.launches[1].placement.bytes)["gpu0"]
    footprint = estimate(LONG, resolve(LONG, Options(num_ctx=context, num_batch=batch)))
    assert planned == sum(footprint.offloaded_bytes) + footprint.compute_bytes


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_n05_a_batch_is_stepped_down_until_it_fits(batch: Batch) -> None:
    """N05: a batch of 1024 may take 75 % of the free memory and one of 2048 60 %; else the next smaller is used."""
    assert batch in BATCHES
    usual = whole_on_a_gpu(num_ctx=65536, num_batch=512)
    least = int((usual + batch.surcharge_bytes) / batch.part)
    enough, short = (with_gpus(f"{size}B").loading("a", 1, num_ctx=65536) for size in (least + MIB, least - MIB))
    smaller = {2048: 1024, 1024: DEFAULT_BATCH}
    tokens = batch.tokens
    assert (told(enough)[1], told(short)[1]) == (tokens, smaller[tokens])


def test_n05_nobody_goes_for_a_larger_batch() -> None:
    """N05: no runner is evicted for a larger batch, and on the host or in part a model has the usual batch."""
    usual = whole_on_a_gpu(num_ctx=8192, num_batch=512)
    pool = with_gpus(f"{int(2.6 * usual)}B").idle("a", num_ctx=8192, num_batch=512)
    assert launched(pool.feed(acquire("b", request=1, num_ctx=8192))) == ["b"]
    assert told(pool, 2) == (8192, 512)
    assert told(with_gpus().loading("a", 1, num_ctx=8192)) == (8192, 512)
    assert told(with_gpus(f"{usual}B").loading("a", 1, num_ctx=8192)) == (8192, 512)


def test_n05_a_batch_that_was_named_or_set_stays() -> None:
    """N05: a batch that the request or the setting names is used as it is."""
    assert told(with_gpus("80GiB").loading("a", 1, num_ctx=8192, num_batch=256)) == (8192, 256)
    assert told(with_gpus("80GiB", defaults=Options(num_batch=512)).loading("a", 1, num_ctx=8192)) == (8192, 512)


def test_n05_n07_what_ran_out_of_memory_is_loaded_with_the_usual_batch() -> None:
    """N05, N07: the second try of a load that ran out of memory uses the usual batch."""
    pool = with_gpus("80GiB").loading("a", request=1, num_ctx=8192)
    pool.feed(out_of_memory(1), exited(1, out_of_memory=True))
    assert (told(pool, 1)[1], told(pool, 2)[1]) == (1024, 512)


def test_n05_n09_a_larger_batch_never_causes_a_reload() -> None:
    """N05, N09: a runner serves requests that name no batch or context, and a larger named context is planned."""
    pool = with_gpus("80GiB").ready("a", 1, num_ctx=8192)
    assert granted(pool.feed(acquire("a", request=2, num_ctx=8192))) == [2]
    pool.strangers = {"gpu0": 70 * GIB}
    pool.feed(pool.sample(), acquire("a", request=3, num_ctx=2 << 20))  # more than the runner has: planned
    assert 3 not in pool.answers and pool.waiting() == [3]
    pool = with_gpus("80GiB", info=replace(LONG, context_trained=8192)).ready("a", 1, num_ctx=8192)
    pool.strangers = {"gpu0": 78 * GIB}
    pool.feed(pool.sample())
    assert granted(pool.feed(acquire("a", request=2, num_ctx=1 << 20))) == [2]
    assert granted(pool.feed(acquire("a", request=3, num_ctx=8192, num_batch=1024))) == [3]
    pool.feed(release(1), release(2), release(3))
    assert stopped(pool.feed(acquire("a", request=4, num_batch=512))) == [1]


# -- the context ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "context"),
    [
        (("80GiB",), 262144), (("47GiB",), 262144), (("46.9GiB",), 32768), (("24GiB", "24GiB"), 262144),
        (("23GiB",), 32768), (("22.9GiB",), 4096), ((), 4096),
    ],
)  # fmt: skip
def test_n06_a_context_follows_from_the_memory_of_all_gpus(gpus: tuple[str, ...], context: int) -> None:
    """N06: with the setting, the context follows from the memory of all GPUs; without it, the context is 4096."""
    assert told(with_gpus(*gpus, auto_context_from_vram=True).loading("a", request=1))[0] == context
    assert told(with_gpus(*gpus).loading("a", request=1))[0] == 4096


def test_n06_memory_that_gpus_share_with_the_host_counts_once() -> None:
    """N06: two integrated GPUs count the host's memory once."""
    pool = with_gpus("1GiB", "1GiB", auto_context_from_vram=True, integrated=True)
    pool.capacities[HOST] = 30 * GIB
    pool.loading("a", request=1)
    assert told(pool)[0] == 32768


def test_n06_a_context_is_no_larger_than_what_was_trained_or_named_or_set() -> None:
    """N06: the automatic context is at most the trained one, and a context of the request or the setting wins."""
    short = replace(LONG, context_trained=16384)
    assert told(with_gpus("80GiB", info=short, auto_context_from_vram=True).loading("a", 1))[0] == 16384
    assert told(with_gpus("80GiB", auto_context_from_vram=True).loading("a", 1, num_ctx=2048))[0] == 2048
    set_to = Options(num_ctx=8192)
    assert told(with_gpus("80GiB", auto_context_from_vram=True, defaults=set_to).loading("a", 1))[0] == 8192


def test_n06_a_context_is_stepped_down_rather_than_offloading_a_part() -> None:
    """N06: where a cache of 4 GiB for 262144 tokens leaves too little for the layers, the context is made smaller."""
    wide = replace(LONG, heads_kv=(128,) * 4)
    assert told(with_gpus("48GiB", info=wide, auto_context_from_vram=True).loading("a", 1))[0] == 32768


def test_n06_n07_a_context_that_ran_out_of_memory_is_stepped_down() -> None:
    """N06, N07: the second try of a load that ran out of memory has an automatic context of 32768."""
    pool = with_gpus("80GiB", auto_context_from_vram=True).loading("a", request=1)
    pool.feed(out_of_memory(1), exited(1, out_of_memory=True))
    assert told(pool, 2)[0] == 32768


def test_a_context_that_was_stepped_down_is_tried_again_after_a_life() -> None:
    """The smaller context of a load that ran out of memory holds until a runner that has loaded ends, and no longer."""
    pool = with_gpus("80GiB", auto_context_from_vram=True).loading("a", request=1)
    whole = told(pool, 1)[0]
    pool.feed(out_of_memory(1), exited(1, out_of_memory=True))
    pool.feed(loaded(2), release(1), expire("a"))
    pool.settle()
    pool.advance("24h")  # what ran out where is forgotten
    pool.loading("a", request=2)
    assert whole is not None and told(pool, 3)[0] == whole > 32768


def test_n06_n09_gpus_that_come_and_go_never_cause_a_reload() -> None:
    """N06, N09: a runner serves requests that name no context, whatever GPUs have come or gone since its load."""
    pool = with_gpus("80GiB", auto_context_from_vram=True).ready("a", 1)
    pool.capacities["gpu1"] = 80 * GIB
    assert granted(pool.feed(pool.sample(), acquire("a", request=2))) == [2]
    del pool.capacities["gpu1"]
    assert granted(pool.feed(pool.sample(), acquire("a", request=3, num_ctx=4096))) == [3]


EIGHT_BILLION = replace(
    a_model((131 * MIB,) * 32, context_trained=131072),
    embedding_length=4096, feed_forward_length=14336, vocabulary=128256, heads=32, heads_kv=(8,) * 32, key_length=128,
    value_length=128, input_bytes=281 * MIB, output_bytes=411 * MIB,
)  # fmt: skip


@pytest.mark.parametrize(
    ("gpu", "by_gpus", "models"),
    [
        ("24GiB", False, 4), ("24GiB", True, 2), ("48GiB", False, 9), ("48GiB", True, 2), ("80GiB", False, 15),
        ("80GiB", True, 3),
    ],
)  # fmt: skip
def test_n06_a_context_by_the_gpus_leaves_room_for_far_fewer_models(gpu: str, by_gpus: bool, models: int) -> None:
    """N06: the automatic context is off by default because far fewer models of 8 billion parameters fit together."""
    pool = a_pool("512GiB", (gpu,), auto_context_from_vram=by_gpus, max_runners=99)
    for count in range(1, 99):
        pool.declare(f"m{count}", EIGHT_BILLION).feed(acquire(f"m{count}", request=count))
        if len(pool.launches) < count:
            break
        pool.feed(loaded(count), release(count))
    assert len(pool.launches) == models


# -- a GPU is required ------------------------------------------------------------------------------------------------


def test_a_request_may_require_a_gpu() -> None:
    """A request that requires a GPU is refused with figures where its model does not fit whole on GPUs."""
    pool = with_gpus("1GiB")
    assert refused(pool.feed(acquire("a", request=1, require_gpu=True))) == {1: DoesNotFitRefusal}
    assert dict(pool.refusal(1).needed)["gpu0"] > GIB == dict(pool.refusal(1).available)["gpu0"]
    assert launched(pool.feed(acquire("a", request=2, require_gpu=False))) == ["a"]
    assert refused(with_gpus().feed(acquire("a", request=1, require_gpu=True))) == {1: DoesNotFitRefusal}


def test_a_runner_that_is_whole_on_gpus_serves_who_requires_one() -> None:
    """A runner that is whole on GPUs serves requests that require a GPU and requests that do not."""
    pool = with_gpus("8GiB").ready("a", 1).ready("b", 2, require_gpu=True)
    assert granted(pool.feed(acquire("a", request=3, require_gpu=True), acquire("b", request=4))) == [3, 4]
    assert not pool.stops


def test_who_requires_a_gpu_joins_a_load_that_goes_there() -> None:
    """A request that requires a GPU waits for a load that is already going to a GPU, and no second load starts."""
    pool = with_gpus("8GiB").loading("a", request=1)
    pool.feed(acquire("a", request=2, require_gpu=True))
    assert granted(pool.feed(loaded(1))) == [1, 2]


def test_a_runner_that_is_on_the_host_is_reloaded_for_who_requires_a_gpu() -> None:
    """A runner on the host is reloaded on a GPU if it fits there whole; else the request is refused."""
    pool = with_gpus("8GiB").idle("a", num_gpu=0)
    commands = pool.feed(acquire("a", request=1, require_gpu=True))
    assert (stopped(commands), launched(commands)) == ([1], ["a"])
    assert dict(pool.launches[2].placement.gpu_layers) == {"gpu0": 5}
    pool = with_gpus("1GiB").idle("a")
    assert refused(pool.feed(acquire("a", request=1, require_gpu=True))) == {1: DoesNotFitRefusal}
    assert not pool.stops


def test_what_was_measured_counts_whether_or_not_a_gpu_is_required() -> None:
    """A measurement is used for a request that requires a GPU, because the requirement is no load-time option."""
    pool = with_gpus("8GiB").idle("a")
    pool.feed(exited(1))
    pool.feed(acquire("a", request=1, require_gpu=True))
    assert pool.launches[2].placement.measured


def test_a_context_that_is_stepped_down_is_no_larger_than_without_gpus() -> None:
    """The next smaller automatic context is 4096, as without GPUs, where the GPUs do not take the model whole."""
    pool = with_gpus("48GiB", auto_context_from_vram=True)
    pool.feed(acquire("a", request=1))
    assert told(pool)[0] == 262144
    pool.strangers["gpu0"] = amount("46.4GiB")
    pool.feed(out_of_memory(1), exited(1, code=1))
    pool.advance("10s")
    assert told(pool, 2)[0] == 4096


# -- a context that grows ---------------------------------------------------------------------------------------------


def contexts_of(pool: PoolUnderTest, *asked: int) -> list[int | None]:
    """Have a model requested with one context after another, each in use for a while; return those of its launches."""
    for request, context in enumerate(asked, 1):
        pool.feed(acquire("m", request, num_ctx=context))
        while request not in pool.answers:
            pool.settle().advance("1s")
            if pool.state("m").name == "loading":
                pool.feed(loaded(pool.runner("m")))
        pool.feed(release(request))
        pool.advance("30s")
    return [launch.options.num_ctx for launch in pool.launches.values()]


def a_growing_model(capacity: str = "64GiB") -> PoolUnderTest:
    """Return a pool with a model that was trained with a context of 65536 tokens."""
    return a_pool(capacity).declare("m", a_model((amount("100MiB"),) * 8, context_trained=65536))


def test_u10_a_context_that_grew_twice_is_given_room_to_grow() -> None:
    """U10: the third of three growing contexts is rounded up to a power of two, and serves what follows."""
    assert contexts_of(a_growing_model(), 5000, 6000, 7000, 8000) == [5000, 6000, 8192]


def test_u10_a_power_of_two_is_room_for_nothing() -> None:
    """U10: a context that is a power of two itself is given twice as much."""
    assert contexts_of(a_growing_model(), 2048, 4096, 8192, 16384) == [2048, 4096, 16384]


def test_u10_there_is_no_more_room_than_the_model_was_trained_with() -> None:
    """U10: the room ends at the context that the model was trained with."""
    assert contexts_of(a_growing_model(), 20000, 40000, 65000) == [20000, 40000, 65536]
    assert contexts_of(a_growing_model(), 60000, 65000, 65536) == [60000, 65000, 65536]


def test_u10_contexts_that_shrink_and_grow_are_taken_as_they_are() -> None:
    """U10: a context that is larger than the last one, and not than the one before, has grown once."""
    pool = a_growing_model().declare("n", a_model())
    for request, context in enumerate((5000, 6000, 3000, 7000), 1):
        pool.feed(acquire("m", request, num_ctx=context, keep_alive=0))
        pool.feed(loaded(pool.runner("m")), release(request))
        pool.settle()
    assert [launch.options.num_ctx for launch in pool.launches.values()] == [5000, 6000, 3000, 7000]


def test_u10_nobody_leaves_for_room_to_grow() -> None:
    """U10: where memory suffices for the context that was named, and not for more, it is taken as it is."""
    pool = a_growing_model("2200MiB")
    assert contexts_of(pool, 20000, 30000, 40000)[-1] == 40000


def test_u10_after_memory_ran_out_there_is_no_room() -> None:
    """U10: the load after one with room that ran out of memory has the context that was named."""
    pool = a_growing_model()
    contexts_of(pool, 5000, 6000)
    pool.feed(acquire("m", 9, num_ctx=7000))
    pool.settle()
    pool.feed(exited(pool.runner("m"), 1, "out of memory", out_of_memory=True))
    pool.settle()
    assert [launch.options.num_ctx for launch in pool.launches.values()] == [5000, 6000, 8192, 7000]
