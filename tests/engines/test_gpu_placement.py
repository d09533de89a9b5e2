"""Placement, end to end: NVIDIA's library and the GPUs of llama.cpp are stand-ins, everything else is real.

The planned bytes are compared with what llama.cpp reports of each device once it has loaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fsm.domain.devices import HOST, MIB
from fsm.sizing.footprint import DeviceBytes, bytes_by_device
from scheduler import DoesNotFit, RunnerStatus, Scheduler, Settings
from scheduler.engines.llama_sizing import estimate
from scheduler.models.gguf_metadata import read_metadata
from tests.support.engine_gpus import engine_gpus
from tests.support.nvml import Gpu, StandIn, beside_stand_in
from tests.support.own_server import chosen
from tests.support.tiny_models import write_tiny_model

LAYERS = 6  # of the models here; the output is one more
WIDTH = 384  # so that a layer has 4 MiB and is told from the rest
ONE = Gpu("GPU-11111111-aaaa", total=64 * MIB)  # takes a model whole: 36 MiB, and 9 MiB of headroom
TWO = Gpu("GPU-22222222-bbbb", total=36 * MIB)  # takes most of one
SMALL = {"num_ctx": 256, "num_parallel": 1}
pytestmark = pytest.mark.usefixtures("served_by")  # each by the wheel, and by a `llama-server`
ROUNDED = MIB // 50  # llama.cpp prints hundredths of a MiB of each buffer


@contextmanager
def a_scheduler(**settings: Any) -> Iterator[tuple[Scheduler, Path]]:
    """Yield a scheduler whose children find GPUs, and a model."""
    settings = {"cpu_threads": 1, "recovery_timeout": "0.3s", "llama_server": chosen(), **settings}
    with tempfile.TemporaryDirectory() as name, engine_gpus(), Scheduler(Settings(**settings)) as scheduler:
        yield scheduler, write_tiny_model(Path(name) / "m.gguf", layers=LAYERS, width=WIDTH)


def loaded(scheduler: Scheduler, path: Path, **asking: Any) -> RunnerStatus:
    """Load a model, have it answer, and return its runner's status, after a check of the planned bytes by device."""
    with scheduler.acquire(path, **{**SMALL, **asking}) as lease:
        assert lease.complete("a", temperature=0, max_tokens=3, ignore_eos=True)
        (runner,) = [each for each in scheduler.status().runners if each.model == path.stem and each.leases]
    info = read_metadata(str(path))
    planned = bytes_by_device(estimate(info, runner.options), tuple(runner.gpu_layers.items()))
    for device, part in planned.items():
        _compare(device, part, {kind: sizes.get(device, 0) for kind, sizes in runner.buffers_bytes.items()})
    assert {device for sizes in runner.buffers_bytes.values() for device in sizes} <= set(planned)
    return runner


def _compare(device: str, part: DeviceBytes, told: dict[str, int]) -> None:
    """Weights and caches are as planned but for padding, and buffers take no more than planned."""
    on_gpu = device != HOST
    assert abs(told["weights"] - part.weights_bytes) <= (ROUNDED if on_gpu else part.weights_bytes), (device, "weights")
    assert abs(told["cache"] - part.cache_bytes) <= ROUNDED, (device, "cache")
    assert told["compute"] <= part.compute_bytes + ROUNDED, (device, "compute")


def refusal(scheduler: Scheduler, path: Path, **asking: Any) -> DoesNotFit:
    """Request a model that is refused; return the refusal."""
    with pytest.raises(DoesNotFit) as caught:
        scheduler.acquire(path, **{**SMALL, **asking})
    return caught.value


@beside_stand_in()
def test_n04_one_gpu_takes_a_whole_model(nvml: StandIn) -> None:
    """N04: a model goes whole on the GPU with most free memory, and only its inputs are on the host."""
    nvml.say(TWO, ONE)
    with a_scheduler() as (scheduler, path):
        assert loaded(scheduler, path).gpu_layers == {ONE.id: LAYERS + 1}


@beside_stand_in()
def test_n04_what_fits_no_gpu_is_split_over_two(nvml: StandIn) -> None:
    """N04: a split model's GPUs take the layers that were planned, the last one the output."""
    nvml.say(ONE.but(free=38 * MIB), TWO)
    with a_scheduler() as (scheduler, path):
        assert loaded(scheduler, path).gpu_layers == {ONE.id: 4, TWO.id: 3}


@beside_stand_in()
def test_n04_spread_splits_what_one_gpu_would_take(nvml: StandIn) -> None:
    """N04: with `spread_over_gpus` a model is split over all GPUs by their free memory."""
    nvml.say(ONE, TWO.but(total=64 * MIB))
    with a_scheduler(spread_over_gpus=True) as (scheduler, path):
        assert sorted(loaded(scheduler, path).gpu_layers.values()) == [3, 4]


@beside_stand_in()
def test_s13_what_fits_no_gpus_is_offloaded_in_part(nvml: StandIn) -> None:
    """S13: a model in part offloads the output and the last layers, over both GPUs."""
    nvml.say(ONE.but(free=26 * MIB), TWO.but(free=14 * MIB))
    with a_scheduler() as (scheduler, path):
        layers = loaded(scheduler, path).gpu_layers
        assert list(layers) == [ONE.id, TWO.id] and 3 < sum(layers.values()) < LAYERS + 1


@beside_stand_in()
def test_a_number_of_layers_that_is_named_is_what_the_engine_offloads(nvml: StandIn) -> None:
    """A named number of layers is offloaded: one is the output alone, six are all but the first layer."""
    nvml.say(ONE)
    with a_scheduler() as (scheduler, path):
        for count in (1, 2, 6, 7):
            assert loaded(scheduler, path, num_gpu=count).gpu_layers == {ONE.id: count}


@beside_stand_in()
def test_what_no_gpu_has_room_for_goes_to_the_host(nvml: StandIn) -> None:
    """The child of a model on the host sees no GPU."""
    nvml.say(ONE.but(free=2 * MIB), TWO.but(free=0))
    with a_scheduler() as (scheduler, path):
        runner = loaded(scheduler, path)
        assert (runner.gpu_layers, runner.buffers_bytes["cache"].keys()) == ({}, {HOST})


@beside_stand_in()
def test_memory_that_others_take_in_between_sends_a_model_elsewhere(nvml: StandIn) -> None:
    """The devices are read before each load, so that memory of other programs moves a model elsewhere."""
    nvml.say(ONE, TWO.but(total=60 * MIB))
    with a_scheduler() as (scheduler, path):
        assert loaded(scheduler, path).gpu_layers == {ONE.id: LAYERS + 1}
        scheduler.expire(path)
        nvml.say(ONE.but(free=10 * MIB), TWO.but(total=60 * MIB))
        other = write_tiny_model(path.with_name("n.gguf"), layers=LAYERS, width=WIDTH, seed=1)
        assert loaded(scheduler, other).gpu_layers == {TWO.id: LAYERS + 1}


@beside_stand_in()
def test_a_required_gpu_that_has_no_room_is_a_refusal_with_the_numbers(nvml: StandIn) -> None:
    """A required GPU without room is refused with figures, and nothing is launched."""
    nvml.say(ONE.but(free=20 * MIB), TWO.but(free=14 * MIB))
    with a_scheduler(require_gpu=True) as (scheduler, path):
        refused = refusal(scheduler, path)
        assert refused.needed_bytes > 45 * MIB
        assert (refused.free_bytes[ONE.id], refused.free_bytes[TWO.id]) == (20 * MIB, 14 * MIB)
        assert scheduler.status().runners == ()
        nvml.say()
        assert "a GPU is required, and there is none" in str(refusal(scheduler, path))


@beside_stand_in()
def test_an_explicit_gpu_that_takes_a_model_goes_before_one_with_more_free(nvml: StandIn) -> None:
    """N04: `main_gpu` is counted as CUDA_VISIBLE_DEVICES does, and wins over a GPU with more free memory."""
    nvml.say(ONE, TWO.but(total=60 * MIB))
    with a_scheduler() as (scheduler, path):
        assert loaded(scheduler, path, main_gpu=1).gpu_layers == {TWO.id: LAYERS + 1}
