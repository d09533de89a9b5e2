"""What a request leaves open and the devices decide: context, batch, and whether anything but a GPU will do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fsm.domain.devices import HOST, MIB
from fsm.domain.model_info import ModelInfo, Options
from fsm.messages.refusals import DoesNotFitRefusal
from fsm.planning.automatic_options import BATCHES, Batch
from fsm.sizing.load_options import DEFAULT_BATCH, resolve
from fsm.sizing.memory_estimate import estimate
from tests.support.models import a_model
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    exited,
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
    """Return the bytes of "a" on a GPU that takes all of it."""
    return dict(with_gpus("80GiB").loading("a", request=1, **how).launches[1].placement.bytes)["gpu0"]


# -- the batch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("context", "batch"), [(4096, 512), (4097, 1024), (32768, 1024), (32769, 2048)])
def test_n05_a_batch_follows_from_the_context(context: int, batch: int) -> None:
    """N05: where there is room to spare; it is computed in one pass."""
    pool = with_gpus("80GiB").loading("a", request=1, num_ctx=context)
    assert told(pool) == (context, batch)
    planned = dict(pool.launches[1].placement.bytes)["gpu0"]
    footprint = estimate(LONG, resolve(LONG, Options(num_ctx=context, num_batch=batch)))
    assert planned == sum(footprint.offloaded_bytes) + footprint.compute_bytes


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_n05_a_batch_is_stepped_down_until_it_fits(batch: Batch) -> None:
    """N05: 1024 want 75 % of what is free, 2048 want 60 %, with 768 MiB and 2 GiB beside the model."""
    assert batch in BATCHES
    usual = whole_on_a_gpu(num_ctx=65536, num_batch=512)
    least = int((usual + batch.surcharge_bytes) / batch.part)
    enough, short = (with_gpus(f"{size}B").loading("a", 1, num_ctx=65536) for size in (least + MIB, least - MIB))
    smaller = {2048: 1024, 1024: DEFAULT_BATCH}
    tokens = batch.tokens
    assert (told(enough)[1], told(short)[1]) == (tokens, smaller[tokens])


def test_n05_nobody_goes_for_a_larger_batch() -> None:
    """N05: what fits with the usual batch starts, and who is there stays; on the host and in part it is the usual."""
    usual = whole_on_a_gpu(num_ctx=8192, num_batch=512)
    pool = with_gpus(f"{int(2.6 * usual)}B").idle("a", num_ctx=8192, num_batch=512)
    assert launched(pool.feed(acquire("b", request=1, num_ctx=8192))) == ["b"]
    assert told(pool, 2) == (8192, 512)
    assert told(with_gpus().loading("a", 1, num_ctx=8192)) == (8192, 512)
    assert told(with_gpus(f"{usual}B").loading("a", 1, num_ctx=8192)) == (8192, 512)


def test_n05_a_batch_that_was_named_or_set_stays() -> None:
    """N05: by its request, or by the setting."""
    assert told(with_gpus("80GiB").loading("a", 1, num_ctx=8192, num_batch=256)) == (8192, 256)
    assert told(with_gpus("80GiB", defaults=Options(num_batch=512)).loading("a", 1, num_ctx=8192)) == (8192, 512)


def test_n05_n07_what_ran_out_of_memory_is_loaded_with_the_usual_batch() -> None:
    """N05, N07: the second try is the careful one."""
    pool = with_gpus("80GiB").loading("a", request=1, num_ctx=8192)
    pool.feed(out_of_memory(1), exited(1, out_of_memory=True))
    assert (told(pool, 1)[1], told(pool, 2)[1]) == (1024, 512)


def test_n05_n09_a_larger_batch_never_causes_a_reload() -> None:
    """N05, N09: whatever would be chosen now, a runner serves who names none; who names one gets it."""
    pool = with_gpus("80GiB").ready("a", 1, num_ctx=8192)
    assert granted(pool.feed(acquire("a", request=2, num_ctx=8192))) == [2]
    pool.strangers = {"gpu0": 70 * GIB}
    pool.feed(pool.sample(), acquire("a", request=3, num_ctx=2 << 20))  # beyond what it can have, so it is planned
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
    """N06: where that is asked for; otherwise it is 4096 whatever there is."""
    assert told(with_gpus(*gpus, auto_context_from_vram=True).loading("a", request=1))[0] == context
    assert told(with_gpus(*gpus).loading("a", request=1))[0] == 4096


def test_n06_memory_that_gpus_share_with_the_host_counts_once() -> None:
    """N06: two integrated GPUs have the host's."""
    pool = with_gpus("1GiB", "1GiB", auto_context_from_vram=True, integrated=True)
    pool.capacities[HOST] = 30 * GIB
    pool.loading("a", request=1)
    assert told(pool)[0] == 32768


def test_n06_a_context_is_no_larger_than_what_was_trained_or_named_or_set() -> None:
    """N06: it is automatic only where nobody has said."""
    short = replace(LONG, context_trained=16384)
    assert told(with_gpus("80GiB", info=short, auto_context_from_vram=True).loading("a", 1))[0] == 16384
    assert told(with_gpus("80GiB", auto_context_from_vram=True).loading("a", 1, num_ctx=2048))[0] == 2048
    set_to = Options(num_ctx=8192)
    assert told(with_gpus("80GiB", auto_context_from_vram=True, defaults=set_to).loading("a", 1))[0] == 8192


def test_n06_a_context_is_stepped_down_rather_than_offloading_a_part() -> None:
    """N06: 262144 tokens are 4 GiB of cache here; where they leave no place for the model, fewer will do."""
    wide = replace(LONG, heads_kv=(128,) * 4)
    assert told(with_gpus("48GiB", info=wide, auto_context_from_vram=True).loading("a", 1))[0] == 32768


def test_n06_n07_a_context_that_ran_out_of_memory_is_stepped_down() -> None:
    """N06, N07: to 32768 at the second try."""
    pool = with_gpus("80GiB", auto_context_from_vram=True).loading("a", request=1)
    pool.feed(out_of_memory(1), exited(1, out_of_memory=True))
    assert told(pool, 2)[0] == 32768


def test_n06_n09_gpus_that_come_and_go_never_cause_a_reload() -> None:
    """N06, N09: the context that a model was loaded with serves who names none."""
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
    """N06: why it has to be asked for: so many models of 8 billion parameters stay beside each other."""
    pool = a_pool("512GiB", (gpu,), auto_context_from_vram=by_gpus, max_runners=99)
    for count in range(1, 99):
        pool.declare(f"m{count}", EIGHT_BILLION).feed(acquire(f"m{count}", request=count))
        if len(pool.launches) < count:
            break
        pool.feed(loaded(count), release(count))
    assert len(pool.launches) == models


# -- a GPU, or nothing ------------------------------------------------------------------------------------------------


def test_a_request_may_require_a_gpu() -> None:
    """It is refused with the numbers where the model is not whole on GPUs; others may have it in part."""
    pool = with_gpus("1GiB")
    assert refused(pool.feed(acquire("a", request=1, require_gpu=True))) == {1: DoesNotFitRefusal}
    assert dict(pool.refusal(1).needed)["gpu0"] > GIB == dict(pool.refusal(1).available)["gpu0"]
    assert launched(pool.feed(acquire("a", request=2, require_gpu=False))) == ["a"]
    assert refused(with_gpus().feed(acquire("a", request=1, require_gpu=True))) == {1: DoesNotFitRefusal}


def test_a_runner_that_is_whole_on_gpus_serves_who_requires_one() -> None:
    """However it was asked for; and one that was loaded for such a request serves all others."""
    pool = with_gpus("8GiB").ready("a", 1).ready("b", 2, require_gpu=True)
    assert granted(pool.feed(acquire("a", request=3, require_gpu=True), acquire("b", request=4))) == [3, 4]
    assert not pool.stops


def test_who_requires_a_gpu_joins_a_load_that_goes_there() -> None:
    """There is no second load."""
    pool = with_gpus("8GiB").loading("a", request=1)
    pool.feed(acquire("a", request=2, require_gpu=True))
    assert granted(pool.feed(loaded(1))) == [1, 2]


def test_a_runner_that_is_on_the_host_is_reloaded_for_who_requires_a_gpu() -> None:
    """If it can be whole there; else the request is refused and the runner stays."""
    pool = with_gpus("8GiB").idle("a", num_gpu=0)
    commands = pool.feed(acquire("a", request=1, require_gpu=True))
    assert (stopped(commands), launched(commands)) == ([1], ["a"])
    assert dict(pool.launches[2].placement.gpu_layers) == {"gpu0": 5}
    pool = with_gpus("1GiB").idle("a")
    assert refused(pool.feed(acquire("a", request=1, require_gpu=True))) == {1: DoesNotFitRefusal}
    assert not pool.stops


def test_what_was_measured_counts_whether_or_not_a_gpu_is_required() -> None:
    """It is a matter of where a runner goes, and no option of what is loaded."""
    pool = with_gpus("8GiB").idle("a")
    pool.feed(exited(1))
    pool.feed(acquire("a", request=1, require_gpu=True))
    assert pool.launches[2].placement.measured


def test_a_context_that_is_stepped_down_is_no_larger_than_without_gpus() -> None:
    """It is an upper bound of what is automatic: what the GPUs do not take whole is the usual one."""
    pool = with_gpus("48GiB", auto_context_from_vram=True)
    pool.feed(acquire("a", request=1))
    assert told(pool)[0] == 262144
    pool.strangers["gpu0"] = amount("46.4GiB")
    pool.feed(out_of_memory(1), exited(1, code=1))
    pool.advance("10s")
    assert told(pool, 2)[0] == 4096
