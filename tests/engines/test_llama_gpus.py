"""The GPUs that llama.cpp, as it is installed, can use: those of the driver alone are none."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fsm.domain.devices import DeviceId
from scheduler import DoesNotFit, PythonModel, Scheduler, Settings
from scheduler.devices import gpus as devices
from scheduler.engines.child_process import Program
from scheduler.engines.llama import _backends_program
from scheduler.engines.llama_gpus import GpuBackends
from scheduler.engines.process_supervisor import ChildLauncher
from tests.support.nvml import Gpu, StandIn, beside_stand_in
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import assert_soon

GIB = 2**30
ONE = devices.Gpu(DeviceId("GPU-a"), "card", 8 * GIB, 8 * GIB, cuda_id=True)
CARD_OF_AMD = devices.Gpu(DeviceId("PCI-0000:03:00.0"), "card", 8 * GIB, 8 * GIB, library="ROCm")


@contextmanager
def a_tiny_model() -> Iterator[Path]:
    """Yield a tiny model in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        yield write_tiny_model(Path(folder) / "tiny.gguf")


def quiet() -> Settings:
    return Settings(cpu_threads=1, measurement_file=None, lock_folder=None)


@beside_stand_in(ASKS_LLAMA="1")
def test_u05_a_gpu_that_llama_cannot_use_is_none(nvml: StandIn) -> None:
    """U05: beside a driver, a build of llama.cpp for CPUs has its models on the host, and the status says why."""
    nvml.say(Gpu("GPU-a", total=8 * GIB))
    with a_tiny_model() as model, Scheduler(quiet()) as scheduler:
        with scheduler.acquire(model, num_ctx=256):
            status = scheduler.status()
        assert dict(status.runners[0].gpu_layers) == {}
        assert any("no CUDA backend" in problem for problem in status.problems)


@beside_stand_in(ASKS_LLAMA="1")
def test_u05_a_gpu_that_llama_cannot_use_is_refused_where_one_is_required(nvml: StandIn) -> None:
    """U05: a request that requires a GPU is refused, since llama.cpp can use none."""
    nvml.say(Gpu("GPU-a", total=8 * GIB))
    with a_tiny_model() as model, Scheduler(quiet()) as scheduler, pytest.raises(DoesNotFit):
        scheduler.acquire(model, num_ctx=256, require_gpu=True)


@beside_stand_in(ASKS_LLAMA="1")
def test_u05_an_object_may_use_a_gpu_that_llama_cannot(nvml: StandIn) -> None:
    """U05: what llama.cpp can use says nothing of an object, which has its memory on the GPU."""
    nvml.say(Gpu("GPU-a", total=8 * GIB))
    with Scheduler(quiet()) as scheduler, scheduler.acquire(PythonModel("a", object, memory={"GPU-a": GIB})):
        assert scheduler.status().runners[0].held_bytes["GPU-a"] == GIB


@beside_stand_in()
def test_u05_layers_that_are_not_where_they_were_to_go_are_told(nvml: StandIn) -> None:
    """U05: where llama.cpp reports all weights on the host, although layers were to go to a GPU, the status says so."""
    nvml.say(Gpu("GPU-a", total=8 * GIB))
    with a_tiny_model() as model, Scheduler(quiet()) as scheduler, scheduler.acquire(model, num_ctx=256):
        assert_soon(lambda: any("put no layer of" in problem for problem in scheduler.status().problems))


def test_u05_llama_is_asked_once() -> None:
    """U05: this build has no backend for GPUs, by its own account, which is asked for once."""
    asked = []

    def program() -> Program | None:
        asked.append(True)
        return _backends_program()

    processes = ChildLauncher()
    try:
        backends = GpuBackends(processes, program, lambda: [ONE])
        assert [backends.usable(), backends.usable()] == [(), ()]
        assert len(asked) == 1
    finally:
        processes.close(5.0)


def test_u05_without_gpus_llama_is_not_asked() -> None:
    """U05: where the driver shows no GPU, nothing is asked."""
    backends = GpuBackends(ChildLauncher(), lambda: pytest.fail("it was asked"), tuple)
    assert (backends.usable(), backends.problems) == (None, ())


def test_u05_gpus_of_other_makers_are_not_the_wheels() -> None:
    """U05: a GPU that only another program can be told to use gets no layers of the wheel's, which is not asked."""
    backends = GpuBackends(ChildLauncher(), lambda: pytest.fail("it was asked"), lambda: [CARD_OF_AMD])
    assert backends.usable() == ()
    assert backends.problems == (
        "llama.cpp, as it is installed, is not told to use PCI-0000:03:00.0: name a llama-server that was built for "
        "these GPUs, by the setting llama_server",
    )


def test_u05_where_llama_does_not_tell_cuda_is_believed() -> None:
    """U05: a question without an answer changes nothing: the plan goes by what NVIDIA's driver shows."""
    processes = ChildLauncher()
    try:
        backends = GpuBackends(processes, lambda: Program(("/bin/false",), {}), lambda: [ONE])
        assert (backends.usable(), backends.problems) == (("CUDA",), ())
    finally:
        processes.close(5.0)
