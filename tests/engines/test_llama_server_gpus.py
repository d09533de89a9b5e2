"""The GPUs that a `llama-server` lists: as devices, by which names layers go to them, and a list that is asked anew.

Most tests have a script in a server's place; the last one has a real server that sees a Vulkan device in software.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fsm.domain.devices import MIB, DeviceId
from fsm.domain.options import Options
from scheduler import LoadFailed, ModelSpec, Scheduler
from scheduler.devices.gpus import Gpu, joined
from scheduler.engines import llama_server_gpus
from scheduler.engines.llama_server import LlamaServerEngine
from scheduler.engines.llama_server_gpus import AGAIN_S, NAMES_S, ServerList
from tests.engines.test_llama_server import a_server
from tests.support.leaks import no_leaks
from tests.support.nvml import Clock
from tests.support.own_server import the_server
from tests.support.real import settings
from tests.support.recorded_lists import LISTS, PLACES
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import LIMIT_S, assert_soon

GEFORCE = Gpu(
    DeviceId("GPU-a"), "NVIDIA GeForce RTX 4090", 24080 * MIB, 20000 * MIB,
    pci="0000:01:00.0", vendor="NVIDIA", cuda_id=True,
)  # fmt: skip
COMPILING_S = 300.0  # a device in software compiles its programs when they are first needed
RADEON = DeviceId("PCI-0000:03:00.0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tiny model of six layers and an output."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "a.gguf", layers=6)


def of(folder: Path, name: str) -> Path:
    """Write a server that prints a recorded list, and the places of its devices."""
    return a_server(folder, devices=LISTS[name], places=PLACES.get(name, ""))


def asked(path: Path) -> list[str]:
    """Return what a server was asked, with `--model` for a load."""
    lines = path.with_name("llama-server.asked").read_text().splitlines()
    return sorted("--model" if "--model" in line else line.split()[-1] for line in lines)


def test_devices_have_their_places(tmp_path: Path) -> None:
    """A server with GPUs is asked for their PCI ids by a file that is no model, and one with CUDA alone is not."""
    engine = LlamaServerEngine(path := of(tmp_path, "vulkan"))
    places = {device.name: device.pci for device in engine.binary.facts().devices}
    assert places == {"Vulkan0": "0000:03:00.0", "Vulkan1": "0000:01:00.0"}
    assert asked(path) == ["--help", "--list-devices", "--model", "--version"]
    probe = path.with_name("llama-server.probe").read_text()
    assert "--device Vulkan0,Vulkan1 --gpu-layers 1" in probe and not Path(probe.split()[-1]).exists()
    engine.close()


def test_u05_a_server_is_told_of_gpus_by_its_own_names(tmp_path: Path) -> None:
    """Layers go to a GPU by the server's name, to NVIDIA's through CUDA by its id, and on the host no GPU is shown."""
    engine = LlamaServerEngine(of(tmp_path, "vulkan"))
    gpus = joined([GEFORCE], engine.binary.facts().devices).gpus
    engine.close()
    by_vulkan = LlamaServerEngine(of(tmp_path, "vulkan"), gpus=lambda: gpus, lists=True)._backends
    assert by_vulkan.usable() == ("Vulkan",) and by_vulkan.problems == ()
    assert by_vulkan.names([RADEON, GEFORCE.id]) == (["Vulkan0", "Vulkan1"], {"MTMD_BACKEND_DEVICE": "Vulkan0"})
    assert by_vulkan.names([]) == ([], {"CUDA_VISIBLE_DEVICES": "", "GGML_VK_VISIBLE_DEVICES": ""})
    by_cuda = LlamaServerEngine(of(tmp_path, "cuda+vulkan"), gpus=lambda: joined([GEFORCE], ()).gpus)._backends
    assert by_cuda.names([GEFORCE.id]) == (["CUDA0"], {"CUDA_VISIBLE_DEVICES": "GPU-a"})
    with pytest.raises(RuntimeError, match="does not list"):
        by_cuda.names([RADEON])


def test_u05_a_model_with_a_server_of_its_own_goes_to_what_that_one_can_use(tmp_path: Path, model: Path) -> None:
    """U05: another server has other names, and GPUs that it does not list get no layers of its models."""
    listing = LlamaServerEngine(of(tmp_path, "vulkan"))
    gpus = joined([GEFORCE], listing.binary.facts().devices).gpus
    listing.close()
    for name, usable, lacking in (("vulkan", ("Vulkan",), ""), ("rocm", (), "GPU-a"), ("none", (), "GPU-a")):
        folder = tmp_path / name
        folder.mkdir()
        engine = LlamaServerEngine(of(folder, name), gpus=lambda: gpus)
        assert engine.inspect(ModelSpec("a", str(model)), [Options()]).gpu_libraries == usable
        assert bool(lacking) == any(f"cannot use {lacking}" in problem for problem in engine.problems)
        if name == "rocm":
            assert engine._backends.names([RADEON]) == (["ROCm0"], {"MTMD_BACKEND_DEVICE": "ROCm0"})
            with pytest.raises(RuntimeError, match="does not list all of GPU-a any more"):
                engine._backends.names([GEFORCE.id])
        engine.close()


def test_n23_a_list_is_asked_anew_and_one_that_fails_keeps_the_last(tmp_path: Path) -> None:
    """N23: free bytes are those of the last list, which is asked for anew only where wanted, and not too often."""
    clock, path = Clock(), of(tmp_path, "sycl")
    engine = LlamaServerEngine(path)
    told = ServerList(engine.binary, clock)
    first, fresh = told.read(figures=True)
    assert first is not None and fresh and first[0].free_bytes == 15000 * MIB
    path.with_name("llama-server.devices").write_text(LISTS["sycl"].replace("15000", "9000"))
    for wanted, later_s, free, new in (
        (False, 2 * AGAIN_S, 15000, False),  # nothing is decided by it
        (True, 0.0, 9000, True),
        (True, 0.0, 9000, False),  # too soon
        (False, 2 * AGAIN_S, 9000, True),
        (False, 2 * AGAIN_S, 9000, False),
    ):
        clock.now += later_s
        if wanted:
            told.want()
        entries, fresh = told.read(figures=True)
        assert entries is not None and (entries[0].free_bytes, fresh) == (free * MIB, new)
    path.with_name("llama-server.devices").write_text("ggml_sycl: no device is available\n")
    clock.now += NAMES_S
    told.want()
    assert told.read(figures=True) == (entries, False)
    clock.now += 2 * NAMES_S
    path.with_name("llama-server.devices").write_text(LISTS["vulkan"])
    path.with_name("llama-server.places").write_text(PLACES["vulkan"])
    told.want()
    assert_soon(lambda: told.read(figures=False)[0] != entries)  # names are not waited for
    other, _ = told.read(figures=False)
    assert other is not None and [entry.pci for entry in other] == ["0000:03:00.0", "0000:01:00.0"]
    engine.close()
    clock.now += 2 * NAMES_S
    told.want()
    assert told.read(figures=True) == (other, False)  # the engine is closed


def test_a_list_that_does_not_come_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that hangs holds up one reading for a moment, and is ended at last; its last list stays."""
    monkeypatch.setattr(llama_server_gpus, "WAIT_S", 0.05)
    clock, path = Clock(), of(tmp_path, "sycl")
    engine = LlamaServerEngine(path)
    told = ServerList(engine.binary, clock)
    entries, _ = told.read(figures=True)
    path.with_name("llama-server.devices").unlink()
    os.mkfifo(path.with_name("llama-server.devices"))  # which has no writer
    with no_leaks():
        told.want()
        clock.now += AGAIN_S
        assert told.read(figures=True) == told.read(figures=True) == (entries, False)
        question = told._question
        assert question is not None and not question.over
        clock.now += llama_server_gpus.TIMEOUT_S
        assert told.read(figures=True) == (entries, False) and question.wait(LIMIT_S)
    engine.close()


def test_layers_go_to_what_the_server_lists(tmp_path: Path, model: Path) -> None:
    """With a server for Vulkan the scheduler has its GPU, plans with it, and names it to the server."""
    path = of(tmp_path, "vulkan")
    with no_leaks(), Scheduler(settings(llama_server=path, gpus=True)) as scheduler:
        with pytest.raises(LoadFailed):  # it is a script, and serves nothing
            scheduler.acquire(model, num_ctx=256, devices=[RADEON], require_gpu=True, timeout=LIMIT_S)
        devices = {device.id: device for device in scheduler.status().devices}
        assert devices[RADEON].capacity_bytes == 16368 * MIB
        assert " --device Vulkan0 --gpu-layers 7 --tensor-split 7 " in path.with_name("llama-server.probe").read_text()


def test_without_gpus_a_server_is_not_asked_for_a_list(tmp_path: Path) -> None:
    """With the setting gpus=False nothing is asked before the first request."""
    path = of(tmp_path, "vulkan")
    with Scheduler(settings(llama_server=path)) as scheduler:
        assert [device.id for device in scheduler.status().devices] == ["cpu"]
    assert not path.with_name("llama-server.asked").exists()


@pytest.fixture
def vulkan(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a real server that sees a Vulkan device; skips where there is none."""
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "0")  # else a device in software is none
    server = the_server()
    told = subprocess.run([server, "--list-devices"], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    if "Vulkan0" not in told.stdout:
        pytest.skip("this llama-server sees no Vulkan device")
    return server


def test_a_real_server_computes_on_its_vulkan_device(vulkan: Path, model: Path) -> None:
    """A model is whole on the device, where the server's own account has its layers, and says what the host says."""
    said = []
    with no_leaks(), Scheduler(settings(llama_server=vulkan, gpus=True)) as scheduler:
        _, gpu = scheduler.status().devices
        for where in ({"num_gpu": 0}, {"require_gpu": True}):
            with scheduler.acquire(model, num_ctx=256, timeout=COMPILING_S, **where) as lease:
                said.append(lease.complete("hello", temperature=0, max_tokens=8, ignore_eos=True))
                (runner,) = scheduler.status().runners
        assert runner.gpu_layers == {gpu.id: 7} and runner.buffers_bytes["weights"][gpu.id] > 0
        assert said[0] == said[1] and scheduler.status().problems == ()
