"""Devices of all kinds: integrated GPUs, instances of divided GPUs, and devices whose figures are old."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fsm.domain.devices import HOST, DeviceId, DeviceSample
from fsm.messages.events import Sampled
from fsm.messages.reasons import WaitFor
from fsm.messages.refusals import DoesNotFitRefusal
from fsm.placement.search import Gpu, Offload, PlacementDemand, find_placement
from fsm.state.memory_ledger import Account, Ledger
from fsm.state.snapshot import DeviceView
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
    refused,
    release,
    stopped,
)

GIB = amount("1GiB")
FOUR_LAYERS = layered(4, "1GiB")  # with the headroom for a prediction: 5 GiB
READ = a_model(layers_bytes=(GIB,) * 4)  # the same as a file with options: 0.2 GiB more, mostly on the host

Change = Callable[[DeviceSample, DeviceSample], DeviceSample]


def changing(pool: PoolUnderTest, change: Change) -> PoolUnderTest:
    """Have every GPU read as `change` makes of its sample and of the host's, from now on."""
    read = pool.sample

    def sample(number: int | None = None) -> Sampled:
        event = read(number)
        host = event.devices[0]
        return replace(event, devices=tuple(one if one is host else change(one, host) for one in event.devices))

    pool.sample = sample  # type: ignore[method-assign]
    pool.feed(sample())
    return pool


def sharing(capacity: str, gpus: tuple[str, ...], *integrated: str, **how: object) -> PoolUnderTest:
    """Return a pool with models "a" to "d" of four layers, some of whose GPUs share the host's memory."""

    def share(gpu: DeviceSample, host: DeviceSample) -> DeviceSample:
        shared = replace(gpu, capacity_bytes=host.capacity_bytes, free_bytes=host.free_bytes, integrated=True)
        return shared if gpu.id in integrated else gpu

    pool = changing(a_pool(capacity, gpus, **how), share)
    for model in "abcd":
        pool.declare(model, FOUR_LAYERS)
    return pool


def view(pool: PoolUnderTest, device: str) -> DeviceView:
    """Return the snapshot's view of a device."""
    return next(each for each in pool.core.snapshot().devices if each.id == device)


# -- integrated GPUs --------------------------------------------------------------------------------------------------


def test_n03_what_goes_on_an_integrated_gpu_is_booked_on_the_host() -> None:
    """N03: layers on an integrated GPU are counted there, and their bytes are reserved on the host."""
    pool = sharing("16GiB", ("0B",), "gpu0").loading("a", request=1)
    assert pool.launches[1].placement.gpu_layers == (("gpu0", 5),)
    assert dict(pool.launches[1].placement.bytes) == {HOST: 4 * GIB}


def test_n03_an_integrated_gpu_and_the_host_are_never_promised_more_than_there_is() -> None:
    """N03: a model on the host does not fit beside a model on an integrated GPU that takes the host's memory."""
    pool = sharing("8GiB", ("0B",), "gpu0").declare("b", READ).loading("a", request=1)
    assert launched(pool.feed(acquire("b", request=2, num_gpu=0))) == []
    assert pool.core._state.ledger.held_bytes(HOST) == 4 * GIB
    pool.feed(loaded(1), release(1))
    assert pool.stops == {1}, "the second model fits only in place of the first"
    assert launched(pool.feed(exited(1))) == ["b"]
    assert pool.launches[2].placement.gpu_layers == ()
    assert 4 * GIB < pool.core._state.ledger.held_bytes(HOST) < 5 * GIB


def test_u74_a_load_on_an_integrated_gpu_takes_the_host_s_load_slot() -> None:
    """U74: an integrated GPU loads into the host's memory, so its loads and those of the host take turns."""
    pool = sharing("32GiB", ("0B",), "gpu0", max_host_loads=1)
    assert launched(pool.feed(acquire("a", request=1, num_gpu=0))) == ["a"]
    assert launched(pool.feed(acquire("b", request=2))) == []
    assert pool.core.snapshot().queue[-1].waits_for is WaitFor.load_slot
    assert launched(pool.feed(loaded(1))) == ["b"]
    assert pool.launches[2].placement.gpu_layers == (("gpu0", 5),)


def test_n03_an_integrated_gpu_has_no_more_free_than_the_host() -> None:
    """N03: memory of the host that other programs hold is not free on an integrated GPU either."""
    pool = sharing("8GiB", ("0B",), "gpu0")
    pool.strangers = {HOST: 4 * GIB}
    assert refused(pool.feed(acquire("a", request=1))) == {1: DoesNotFitRefusal}


def test_n04_a_discrete_gpu_goes_before_an_integrated_one() -> None:
    """N04: a discrete GPU is used before an integrated one, even if the integrated one has more free memory."""
    pool = sharing("64GiB", ("0B", "6GiB"), "gpu0").loading("a", request=1)
    assert pool.launches[1].placement.gpu_layers == (("gpu1", 5),)
    pool.loading("b", request=2)
    assert pool.launches[2].placement.gpu_layers == (("gpu0", 5),)


def test_n03_what_a_process_holds_on_an_integrated_gpu_is_held_of_the_host_once() -> None:
    """N03: a process's bytes on an integrated GPU and on the host add up and are counted once."""
    pool = sharing("16GiB", ("0B",), "gpu0").ready("a", lease=1)
    pool.occupied.clear()
    pool.strangers = {HOST: 4 * GIB}  # the runner itself, as the host's free memory shows it
    pool.feed(replace(pool.sample(), resident=((1, ((HOST, 1 * GIB), ("gpu0", 3 * GIB))),)))
    account = pool.core._state.ledger.accounts["runner", 1]
    assert account.resident == {HOST: 4 * GIB}
    assert pool.free() == 12 * GIB


def test_n03_memory_of_the_programs_own_on_an_integrated_gpu_is_the_hosts() -> None:
    """N03: memory of the program's own on an integrated GPU is reserved on the host and given back there."""
    pool = sharing("8GiB", ("0B",), "gpu0")
    commands = pool.feed(memory(1, gpu0="3GiB"), memory(2, gpu0="3GiB"), memory(3, gpu0="3GiB"))
    assert (granted(commands), refused(commands)) == ([1, 2], {3: DoesNotFitRefusal})
    assert pool.free() == 2 * GIB
    pool.feed(release(1))
    assert pool.free() == 5 * GIB


def test_n03_several_that_waited_for_an_integrated_gpus_memory_are_never_given_more_than_there_is() -> None:
    """N03: each grant of memory on an integrated GPU reduces what the next request in the same step can have."""
    pool = sharing("8GiB", ("0B",), "gpu0", each="7GiB").declare("o", "7GiB").ready("o", lease=1)
    pool.feed(memory(2, gpu0="3GiB"), memory(3, gpu0="3GiB"), memory(4, gpu0="3GiB"))
    assert pool.waiting() == [2, 3, 4]
    pool.advance("120s")
    assert granted(pool.feed(release(1)) + pool.feed(exited(1))) == [2, 3]
    assert pool.free() == 2 * GIB


def test_n03_an_object_declared_on_an_integrated_gpu_takes_the_hosts_memory() -> None:
    """N03: an object that declares memory on the host and on an integrated GPU takes the sum from the host."""
    pool = sharing("8GiB", ("0B",), "gpu0")
    pool.declare("o", layered(0, "0B"))
    pool.outcomes["o"] = replace(pool.outcomes["o"], fixed=((HOST, 2 * GIB), ("gpu0", 3 * GIB)))
    pool.ready("o", lease=1)
    assert dict(pool.launches[1].placement.bytes) == {HOST: 5 * GIB}
    pool.feed(pool.sample())
    assert pool.free() == 3 * GIB


def test_an_integrated_gpu_is_shown_with_the_hosts_figures() -> None:
    """An integrated GPU is shown with the host's figures and marked as integrated."""
    pool = sharing("16GiB", ("0B", "8GiB"), "gpu0")
    pool.feed(memory(1, cpu="1GiB"))
    host, shared = view(pool, HOST), view(pool, "gpu0")
    assert shared.integrated and not host.integrated and not view(pool, "gpu1").integrated
    assert (shared.capacity_bytes, shared.held_bytes, shared.free_bytes) == (16 * GIB, 1 * GIB, 15 * GIB)
    assert (host.capacity_bytes, host.held_bytes, host.free_bytes) == (16 * GIB, 1 * GIB, 15 * GIB)


def test_a_refusal_counts_shared_memory_once() -> None:
    """A refusal gives available memory by memory and not by device."""
    pool = sharing("4GiB", ("0B", "1GiB"), "gpu0")
    pool.feed(acquire("a", request=1))
    assert dict(pool.refusal(1).available) == {HOST: 4 * GIB, "gpu1": GIB}


# -- which GPU is which -----------------------------------------------------------------------------------------------


def test_main_gpu_counts_in_the_order_in_which_the_devices_are_read() -> None:
    """`main_gpu` counts GPUs in the order in which they are read, which is the order of CUDA_VISIBLE_DEVICES."""
    pool = sharing("64GiB", ("8GiB", "6GiB")).declare("a", READ)
    turned = pool.sample()
    pool.sample = lambda number=None: replace(turned, devices=turned.devices[:1] + turned.devices[:0:-1])  # type: ignore
    pool.loading("a", request=1, main_gpu=0)
    assert pool.launches[1].placement.gpu_layers == (("gpu1", 5),)
    assert [device.id for device in pool.core.snapshot().devices] == [HOST, "gpu1", "gpu0"]


INSTANCES = (Gpu("mig0", "mig0", instance=True), Gpu("mig1", "mig1", instance=True))
WHOLE = (Gpu("gpu0", "gpu0"), Gpu("gpu1", "gpu1"))


def placed(gpus: tuple[Gpu, ...], each: int, **how: Any) -> dict[DeviceId, int] | None:
    """Return the layers by GPU of a model of four, with so many GiB free on each, or None if it does not fit whole."""
    free = {HOST: 64 * GIB} | {gpu.id: each * GIB for gpu in gpus}
    placement = find_placement(PlacementDemand(FOUR_LAYERS, **how), Offload.whole, free, gpus)
    return None if placement is None else dict(placement.gpu_layers)


def test_a_model_goes_on_an_instance_that_takes_it_whole() -> None:
    """A model goes on one instance of a divided GPU that takes it whole, also with `spread`."""
    assert placed(INSTANCES, 5) == {"mig0": 5}
    assert placed(INSTANCES, 5, spread=True) == {"mig0": 5}
    assert placed(INSTANCES, 5, main_gpu=1) == {"mig1": 5}


def test_nothing_is_split_over_instances() -> None:
    """A model is split over whole GPUs and never over instances, because CUDA shows a process only one instance."""
    assert placed(INSTANCES, 4) is None
    assert placed((*INSTANCES, WHOLE[0]), 4) is None
    assert placed((*INSTANCES, *WHOLE), 4) == {"gpu0": 3, "gpu1": 2}
    assert set(placed((*INSTANCES, *WHOLE), 8, spread=True) or ()) == {"gpu0", "gpu1"}


def test_a_model_is_offloaded_in_part_to_one_instance() -> None:
    """A model that no instance takes whole is offloaded in part to one instance, and the rest stays on the host."""
    pool = changing(a_pool("64GiB", ("3GiB", "3GiB")), lambda gpu, host: replace(gpu, instance=True))
    pool.declare("a", FOUR_LAYERS).loading("a", request=1)
    assert pool.launches[1].placement.gpu_layers == (("gpu0", 3),)


# -- figures that are old ---------------------------------------------------------------------------------------------


def test_what_was_taken_since_a_gpu_was_read_is_not_free_while_it_is_not_read_again() -> None:
    """Memory that was taken after the last fresh reading of a GPU is not free while the GPU is not read again."""
    ledger = Ledger()
    gpu = DeviceSample("gpu0", "gpu", "gpu0", 8 * GIB, 8 * GIB)
    ledger.sample([gpu])
    ledger.accounts["runner", 1] = Account({"gpu0": 5 * GIB}, {"gpu0": 5 * GIB})
    ledger.sample([replace(gpu, fresh=False)])
    assert (ledger.free_bytes("gpu0"), ledger.total_available("gpu0")) == (3 * GIB, 8 * GIB)
    ledger.sample([replace(gpu, free_bytes=2 * GIB)])  # other programs took memory as well
    assert (ledger.free_bytes("gpu0"), ledger.total_available("gpu0")) == (2 * GIB, 7 * GIB)


def a_stalled_gpu(**limits: float) -> PoolUnderTest:
    """Return a pool whose one GPU was read before "a" was loaded on it and is not read again."""
    pool = sharing("64GiB", ("8GiB",), **limits).ready("a", lease=1)
    before = replace(pool.sample().devices[1], free_bytes=8 * GIB, fresh=False)
    return changing(pool, lambda gpu, host: before)


def test_figures_from_before_do_not_show_that_memory_is_back() -> None:
    """Old figures do not show that memory is back, so the runner is waited for until the recovery timeout."""
    pool = a_stalled_gpu()
    pool.feed(release(1), acquire("b", request=2))
    assert stopped(pool.commands) == [1]
    pool.feed(exited(1))
    pool.advance("4.9s")
    assert (pool.state("a").value, pool.waiting()) == ("expiring", [2])
    assert launched(pool.advance("0.2s")) == ["b"]


def test_loads_go_on_beside_a_gpu_that_is_not_read() -> None:
    """Loads go on while a GPU is not read: on the host as usual, and on the GPU within its last known figures."""
    pool = a_stalled_gpu().declare("b", READ)
    assert launched(pool.feed(acquire("b", request=2, num_gpu=0))) == ["b"]
    pool.declare("c", layered(1, "1GiB"))
    assert launched(pool.feed(acquire("c", request=3))) == ["c"]
    assert pool.launches[3].placement.gpu_layers == (("gpu0", 2),)


@pytest.mark.parametrize(("require_gpu", "where"), [(True, None), (False, ())])
def test_without_gpus_a_model_is_refused_or_goes_to_the_host(require_gpu: bool, where: tuple[()] | None) -> None:
    """When a driver loses its GPUs, a model is refused or goes to the host, as `require_gpu` says."""
    pool = sharing("64GiB", ("8GiB",), require_gpu=require_gpu)
    del pool.capacities["gpu0"]
    commands = pool.feed(acquire("a", request=1))
    assert refused(commands) == ({1: DoesNotFitRefusal} if where is None else {})
    assert [launch.placement.gpu_layers for launch in pool.launches.values()] == ([] if where is None else [where])
