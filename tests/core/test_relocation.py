"""Better places: a runner that rests with fewer layers on GPUs than it could have is loaded anew for its next use."""

from __future__ import annotations

import pytest

from fsm.domain.devices import DeviceId
from fsm.machine.runner import EXPIRING, IDLE, READY
from fsm.messages.commands import Grant, Sample
from fsm.messages.decision_log import Entry, Transition
from fsm.messages.reasons import RunnerReason
from tests.support.models import a_model
from tests.support.pool import PoolUnderTest, a_pool, acquire, amount, layered, loaded, pin, release

GPU = DeviceId("gpu0")
LAYERS = 33
LOAD = "5s"


def a_pool_without_its_gpu(**how: object) -> PoolUnderTest:
    """Return a pool whose model "m" rests on the host, loaded in 5 s, since the readings so far lacked the GPU."""
    pool = a_pool("64GiB", ["24GiB"], **how).declare("m", a_model((amount("180MiB"),) * 32))
    gpu = pool.capacities.pop(GPU)
    pool.feed(pool.sample(), acquire("m", 1))
    pool.advance(LOAD)
    pool.feed(loaded(1), release(1))
    pool.capacities[GPU] = gpu
    return pool


def a_pool_with_its_gpu_back(**how: object) -> PoolUnderTest:
    """Return the same pool, whose GPU has been seen again for as long as the model takes to load."""
    pool = a_pool_without_its_gpu(**how)
    pool.feed(pool.sample())
    pool.advance(LOAD)
    return pool


def on_gpus(pool: PoolUnderTest, model: str = "m") -> int:
    """Return the layers on GPUs of a model's current runner."""
    return pool.life(model).placement.offloaded


def served(pool: PoolUnderTest, request: int, **how: object) -> int:
    """Request the model, have it loaded where it must be, release it; return its layers on GPUs."""
    pool.feed(acquire("m", request, **how))
    while request not in pool.answers:
        pool.settle().advance("1s")
        if pool.state("m").name == "loading":
            pool.advance(LOAD)
            pool.feed(loaded(pool.runner("m")))
    pool.feed(release(request))
    return on_gpus(pool)


def test_u03_a_model_moves_to_a_gpu_that_is_back() -> None:
    """U03: a model that rests on the host is loaded on its GPU, which was seen again for as long as its load takes."""
    pool = a_pool_with_its_gpu_back()
    assert on_gpus(pool) == 0
    assert served(pool, 2) == LAYERS


def test_u03_the_devices_are_read_for_requests_of_a_model_that_could_move() -> None:
    """U03: a request for a model on the host has the devices read, and at most one in ten seconds."""
    pool = a_pool_without_its_gpu()
    del pool.capacities[GPU]
    for request in range(2, 32):
        pool.advance("1s")
        pool.feed(acquire("m", request), release(request))
    assert len([one for one in pool.commands if isinstance(one, Sample)]) == 3


def test_u03_a_model_whole_on_gpus_has_no_device_read() -> None:
    """U03: a request for a model whose layers are all on GPUs costs no reading."""
    pool = a_pool_with_its_gpu_back()
    assert served(pool, 2) == LAYERS
    begun = len(pool.commands)
    pool.advance("1m")
    pool.feed(acquire("m", 3))
    assert not [one for one in pool.commands[begun:] if isinstance(one, Sample)]


def test_u03_what_one_request_named_is_not_for_the_others() -> None:
    """U03: after a request for no layers on GPUs, a request that names none is served from the GPU."""
    pool = a_pool("64GiB", ["24GiB"]).declare("m", a_model((amount("180MiB"),) * 32))
    assert served(pool, 1, num_gpu=0) == 0
    pool.feed(pool.sample())
    pool.advance("10s")
    assert served(pool, 2) == LAYERS


@pytest.mark.parametrize("named", [0, 4])
def test_u03_a_request_that_names_what_the_runner_has_stays(named: int) -> None:
    """U03: a request for the number of layers that the runner has is served where it is."""
    pool = a_pool("64GiB", ["24GiB"]).declare("m", a_model((amount("180MiB"),) * 32))
    assert served(pool, 1, num_gpu=named) == named
    pool.feed(pool.sample())
    pool.advance("1m")
    assert served(pool, 2, num_gpu=named) == named
    assert len(pool.launches) == 1


def test_u03_a_part_becomes_the_whole_once_the_other_model_has_left() -> None:
    """U03: a model that went in part, beside a runner in use, goes whole once that one has left."""
    pool = a_pool("64GiB", ["24GiB"], max_wait_s=3600.0).declare("m", a_model((amount("500MiB"),) * 32))
    pool.declare("other", layered(8, "1GiB")).ready("other", lease=1)
    part = served(pool, 2, num_gpu=8)
    assert 0 < part < LAYERS
    pool.feed(release(1))
    pool.advance("2h").__len__()
    pool.settle()
    pool.feed(pool.sample())
    pool.advance("10s")
    assert served(pool, 3) == LAYERS


def test_u03_the_place_must_have_been_free_for_as_long_as_the_load_takes() -> None:
    """U03: a GPU that was seen a moment ago is left alone, so one that comes and goes costs half the time at most."""
    pool = a_pool_without_its_gpu()
    pool.feed(pool.sample())
    pool.advance("4s")
    assert [type(one) for one in pool.feed(acquire("m", 2))] == [Grant]
    pool.feed(release(2))
    del pool.capacities[GPU]
    pool.feed(pool.sample())
    pool.advance("1m")
    assert served(pool, 3) == 0


def test_u03_a_runner_in_use_stays() -> None:
    """U03: a runner moves at rest; while it holds a lease, further requests are served where it is."""
    pool = a_pool_without_its_gpu()
    pool.feed(acquire("m", 2), pool.sample())
    pool.advance("1m")
    pool.feed(acquire("m", 3))
    assert (pool.state("m"), on_gpus(pool)) == (READY, 0)


def test_u03_a_pinned_model_stays() -> None:
    """U03: a pinned model is not moved."""
    pool = a_pool_with_its_gpu_back()
    pool.feed(pin("m"), pool.sample())
    pool.advance("1m")
    assert served(pool, 2) == 0


def test_u03_a_request_that_cannot_wait_for_a_load_is_served_where_the_model_is() -> None:
    """U03: a request whose time limit a load could exceed is served at once; the next one moves the model."""
    pool = a_pool_with_its_gpu_back()
    assert served(pool, 2, timeout="6s") == 0
    assert served(pool, 3, timeout="1m") == LAYERS


def test_u03_nobody_leaves_for_a_better_place() -> None:
    """U03: where an idle model holds the GPU, a model on the host stays, and so does the other."""
    pool = a_pool_without_its_gpu().declare("other", layered(20, "1GiB"))
    pool.feed(pool.sample())
    pool.idle("other")
    pool.feed(pool.sample())
    pool.advance("30s")
    assert served(pool, 9) == 0
    assert pool.state("other") is IDLE


def test_u03_a_few_more_layers_are_no_better_place() -> None:
    """U03: a tenth more of a model's layers is not worth a load."""
    pool = a_pool("64GiB", ["8GiB"]).declare("m", a_model((amount("250MiB"),) * 40))
    most = served(pool, 1)
    assert served(pool, 2, num_gpu=most - 1) == most - 1
    pool.feed(pool.sample())
    pool.advance("1m")
    assert served(pool, 3) == most - 1


def test_u03_why_a_model_was_loaded_again_is_in_the_decision_log() -> None:
    """U03: the decision log says that the runner expired for a better place."""
    pool = a_pool_with_its_gpu_back()
    log: list[Entry] = []
    pool.core.decision_log = log
    pool.feed(acquire("m", 2))
    entries = [one for one in log if isinstance(one, Transition) and one.destination is EXPIRING]
    assert [one.why for one in entries] == [RunnerReason.better_place]
