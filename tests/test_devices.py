"""Devices: the host under limits, and GPUs through a stand-in for NVIDIA's library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fsm.model import HOST
from scheduler.devices import CgroupMemory, Devices, cgroup_memory, visible_devices

Tree = Callable[[str, dict[str, dict[str, object]]], CgroupMemory | None]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Write a folder that stands in for /sys/fs/cgroup and read the limits of a process that is where `groups` says."""

    def read(groups: str, folders: dict[str, dict[str, object]]) -> CgroupMemory | None:
        for folder, files in folders.items():
            (tmp_path / "cgroup" / folder).mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (tmp_path / "cgroup" / folder / name).write_text(f"{content}\n")
        membership = tmp_path / "self"
        membership.write_text(groups + "\n")
        return cgroup_memory(tmp_path / "cgroup", membership)

    return read


def test_n15_version_2_leaves_limit_minus_current(tree: Tree) -> None:
    """N15: what the group may still use, not what the machine has."""
    assert tree("0::/job", {"job": {"memory.max": 1000, "memory.current": 300}}) == CgroupMemory(1000, 700)


def test_n15_version_1_leaves_limit_minus_usage(tree: Tree) -> None:
    """N15: the older files, below the controller's own folder."""
    files: dict[str, object] = {"memory.limit_in_bytes": 1000, "memory.usage_in_bytes": 300}
    assert tree("5:cpu:/\n4:memory:/job", {"memory/job": files}) == CgroupMemory(1000, 700)


def test_n15_every_group_above_counts(tree: Tree) -> None:
    """N15: the smallest limit and the least free memory may belong to different groups."""
    folders: dict[str, dict[str, object]] = {
        "a": {"memory.max": 2000, "memory.current": 1900},
        "a/b": {"memory.max": "max", "memory.current": 500},
        "a/b/c": {"memory.max": 1000, "memory.current": 300},
    }
    assert tree("0::/a/b/c", folders) == CgroupMemory(1000, 100)


def test_a_container_sees_only_the_top_of_the_tree(tree: Tree) -> None:
    """Its path is the host's and does not exist here; the limits at the top are its own."""
    assert tree("0::/docker/1234", {"": {"memory.max": 1000, "memory.current": 300}}) == CgroupMemory(1000, 700)


def test_unused_file_pages_count_as_free(tree: Tree) -> None:
    """The kernel drops them before it refuses memory."""
    files: dict[str, object] = {
        "memory.max": 1000,
        "memory.current": 900,
        "memory.stat": "anon 400\ninactive_file 450\nactive_file 50",
    }
    assert tree("0::/job", {"job": files}) == CgroupMemory(1000, 550)


def test_a_group_over_its_limit_has_nothing_free(tree: Tree) -> None:
    """A limit lowered below the usage leaves nothing, not less than nothing."""
    assert tree("0::/job", {"job": {"memory.max": 100, "memory.current": 300}}) == CgroupMemory(100, 0)


@pytest.mark.parametrize("groups", ["0::/job", "4:memory:/job", "", "0::/../elsewhere"])
def test_no_limit_is_none(tree: Tree, groups: str) -> None:
    """Missing files, other controllers and "max" set no limit."""
    assert tree(groups, {"job": {"memory.max": "max", "memory.current": 300}, "memory/job": {}}) is None


def test_the_largest_number_of_version_1_is_no_limit(tree: Tree) -> None:
    """It is how version 1 says that there is none."""
    files: dict[str, object] = {"memory.limit_in_bytes": 9223372036854771712, "memory.usage_in_bytes": 300}
    assert tree("4:memory:/", {"memory": files}) is None


def test_a_system_without_cgroups_has_no_limit(tmp_path: Path) -> None:
    """Nothing is there to read."""
    assert cgroup_memory(tmp_path / "cgroup", tmp_path / "self") is None


def test_the_host_is_always_there() -> None:
    """Without GPUs the host is the only device, with no more than the machine has."""
    (host,) = Devices(gpus=False).sample()
    assert (host.id, host.kind, host.integrated) == (HOST, "cpu", False)
    assert 0 < host.free_bytes <= host.capacity_bytes <= psutil.virtual_memory().total


def test_the_memory_limit_caps_the_hosts_capacity_only() -> None:
    """What is reported free is the machine's; the limit is on what we take."""
    (host,) = Devices(gpus=False, memory_limit_bytes=1 << 20).sample()
    assert (host.capacity_bytes, host.free_bytes > 1 << 20) == (1 << 20, True)


def test_a_memory_limit_above_the_machines_memory_changes_nothing() -> None:
    """There is no more than there is."""
    (host,) = Devices(gpus=False, memory_limit_bytes=1 << 60).sample()
    assert host.capacity_bytes <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("chosen", "places"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("1,1", [1]),
        ("0,7,1", [0]),
        ("GPU-bb", [1]),
        ("GPU-aa2,GPU-aa1", [2, 0]),
        ("GPU-aa", []),
        ("0,GPU-cc,1", [0]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(chosen: str | None, places: list[int]) -> None:
    """Indices or UUIDs, also shortened if they stay unique, in their order, up to the first that is neither."""
    assert visible_devices(["GPU-aa1", "GPU-bb1", "GPU-aa2"], chosen) == places


STAND_IN = r"""
/* Reads a state file at every call. First line: what initialising returns. Then a line for each GPU: what its memory
   query returns, total, reserved and free bytes, pid and bytes of the one process on it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef unsigned long long u64;
struct gpu { int error; u64 total, reserved, free, pid, used; } gpus[8];
static int start, count;
static void look(void) {
    FILE *file = fopen(getenv("STAND_IN_STATE"), "r");
    if (!file || fscanf(file, "%d", &start) != 1) abort();
    for (count = 0; count < 8; count++) {
        struct gpu *g = &gpus[count];
        if (fscanf(file, "%d %llu %llu %llu %llu %llu", &g->error, &g->total, &g->reserved, &g->free, &g->pid, &g->used)
            != 6) break;
    }
    fclose(file);
}
int nvmlInitWithFlags(unsigned flags) { look(); return start; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 15 ? "GPU is lost" : code == 9 ? "Driver Not Loaded" : "error"; }
int nvmlDeviceGetCount_v2(unsigned *n) { look(); *n = count; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **handle) { *handle = &gpus[i]; return gpus[i].error == 2 ? 15 : 0; }
static int name(void *handle, const char *prefix, char *out, unsigned size) {
    snprintf(out, size, "%s%d", prefix, (int)((struct gpu *)handle - gpus));
    return 0;
}
int nvmlDeviceGetName(void *handle, char *out, unsigned size) { return name(handle, "Stand-in ", out, size); }
int nvmlDeviceGetUUID(void *handle, char *out, unsigned size) { return name(handle, "GPU-", out, size); }
int nvmlDeviceGetMigMode(void *handle, unsigned *now, unsigned *next) { return 3; }
int nvmlDeviceGetMemoryInfo(void *handle, u64 *out) {
    struct gpu *g = handle;
    out[0] = g->total; out[1] = g->free; out[2] = g->total - g->free;
    return g->error;
}
struct memory_v2 { unsigned version; u64 total, reserved, free, used; };
struct process { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; };
#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(void *handle, struct memory_v2 *out) {
    struct gpu *g = handle;
    if (out->version != 0x02000028) return 25;
    out->total = g->total; out->reserved = g->reserved; out->free = g->free; out->used = g->total - g->free;
    return g->error;
}
int nvmlDeviceGetComputeRunningProcesses_v3
#else
int nvmlDeviceGetComputeRunningProcesses_v2
#endif
(void *handle, unsigned *n, struct process *out) {
    struct gpu *g = handle;
    unsigned room = *n;
    *n = g->pid != 0;
    if (*n > room) return 7;
    if (*n) { out->pid = g->pid; out->used = g->used; }
    return g->error;
}
"""

READ_ONCE = """
import json
from scheduler.devices import Devices
devices = Devices()
gpus = {each.id: [each.name, each.capacity_bytes, each.free_bytes, each.integrated] for each in devices.sample()[1:]}
print(json.dumps([gpus, devices.gpu_processes(), devices.problems]))
"""

Observe = Callable[..., Any]


@pytest.fixture
def observe(tmp_path: Path) -> Observe:
    """Run a script, which prints JSON, where NVIDIA's library is the stand-in; `state` is what that says."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the stand-in for NVIDIA's library needs Linux and a C compiler, and there is none")

    def run(state: str, *, script: str = READ_ONCE, flags: tuple[str, ...] = (), visible: str | None = None) -> Any:
        (tmp_path / "stand_in.c").write_text(STAND_IN)
        library = tmp_path / "libnvidia-ml.so.1"
        command = [compiler, "-shared", "-fPIC", *flags, "-o", str(library), str(tmp_path / "stand_in.c")]
        subprocess.run(command, check=True, capture_output=True)
        (tmp_path / "state").write_text(state)
        environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "STAND_IN_STATE": str(tmp_path / "state")}
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        if visible is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


TWO_GPUS = "0\n0 1000 50 800 77 150\n0 2000 100 1900 0 0\n"


def test_gpus_have_their_memory_and_processes(observe: Observe) -> None:
    """The driver's own reserve is no capacity; processes come by pid."""
    gpus, processes, problems = observe(TWO_GPUS)
    assert gpus == {"GPU-0": ["Stand-in 0", 950, 800, False], "GPU-1": ["Stand-in 1", 1900, 1900, False]}
    assert (processes, problems) == ({"GPU-0": {"77": 150}, "GPU-1": {}}, [])


def test_an_old_driver_is_asked_in_its_own_way(observe: Observe) -> None:
    """Without the second version of the memory query the first does."""
    gpus, processes, _ = observe(TWO_GPUS, flags=("-DOLD_DRIVER",))
    assert (gpus["GPU-0"], processes["GPU-0"]) == (["Stand-in 0", 1000, 800, False], {"77": 150})


def test_hidden_gpus_are_not_there(observe: Observe) -> None:
    """CUDA_VISIBLE_DEVICES holds for us as it does for CUDA."""
    gpus, processes, _ = observe(TWO_GPUS, visible="GPU-1")
    assert (list(gpus), list(processes)) == (["GPU-1"], ["GPU-1"])


def test_a_lost_gpu_is_left_out_and_named(observe: Observe) -> None:
    """The others go on being used, the host too."""
    gpus, processes, problems = observe("0\n15 1000 0 800 0 0\n0 2000 0 1900 0 0\n")
    assert (list(gpus), list(processes)) == (["GPU-1"], ["GPU-1"])
    assert problems == ["GPU GPU-0 is left out: GPU is lost"]


def test_indices_stay_when_a_gpu_before_them_is_lost(observe: Observe) -> None:
    """What CUDA_VISIBLE_DEVICES calls 1 is not renumbered because 0 cannot be opened."""
    gpus, _, problems = observe("0\n2 0 0 0 0 0\n0 2000 0 1900 0 0\n0 3000 0 2900 0 0\n", visible="1")
    assert (list(gpus), problems) == (["GPU-1"], ["GPU 0 is left out: GPU is lost"])


def test_s27_a_gpu_without_memory_of_its_own_is_integrated(observe: Observe) -> None:
    """S27, N03: not supported means that it shares the host's memory, which is what it then has."""
    gpus, _, problems = observe("0\n3 0 0 0 0 0\n")
    name, capacity, free, integrated = gpus["GPU-0"]
    assert (name, integrated, problems) == ("Stand-in 0", True, [])
    assert 0 < free <= capacity <= psutil.virtual_memory().total


def test_a_driver_that_does_not_start_leaves_the_host(observe: Observe) -> None:
    """Sampling does not raise, and says why there is no GPU."""
    assert observe("9\n0 1000 0 800 0 0\n") == [{}, {}, ["no GPU is used: Driver Not Loaded"]]


RETRY = """
import json, os
from pathlib import Path
from scheduler.devices import Devices
now = 0.0
devices = Devices(clock=lambda: now)
counts = [len(devices.sample()) - 1]
Path(os.environ["STAND_IN_STATE"]).write_text("0\\n0 1000 0 800 0 0\\n")
for now in (59.0, 60.0):
    counts.append(len(devices.sample()) - 1)
devices.close()
counts.append(len(devices.sample()) - 1)
print(json.dumps(counts))
"""


def test_a_driver_is_asked_again_after_a_minute(observe: Observe) -> None:
    """A driver that comes late is found, but not asked at every look; after close sampling starts afresh."""
    assert observe("9\n", script=RETRY) == [0, 0, 1, 1]


def test_a_machine_without_the_library_has_no_gpus(observe: Observe, tmp_path: Path) -> None:
    """The library is not there at all, or is not a library: the host is still a device."""
    script = f"open({str(tmp_path / 'libnvidia-ml.so.1')!r}, 'w').write('nonsense')\n" + READ_ONCE
    gpus, processes, problems = observe("0\n", script=script)
    assert (gpus, processes, len(problems)) == ({}, {}, 1)
