"""What memory there is: the host through psutil and its cgroups, NVIDIA GPUs through NVML."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fsm.ledger import DeviceSample
from fsm.model import HOST, DeviceId

try:
    import pynvml
except Exception:  # whatever is wrong with the binding, there is still the host
    pynvml = None

_NO_LIMIT = 1 << 60  # version 1 says "no limit" with the largest number of pages there can be
RETRY_S = 60.0  # a driver that was not there is asked for again so often at most


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """The tightest limit above a process: what it may use in all, and what it may use more than now."""

    limit_bytes: int
    free_bytes: int


def cgroup_memory(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> CgroupMemory | None:
    """Return the memory limit of this process's control groups, versions 1 and 2, or None if there is none.

    Every group from the process's own up to `root` is looked at, since each may set a limit. A group's free bytes are
    its limit less what it uses; file pages that have not been used lately count as free, because the kernel gives them
    up before it refuses memory: without this a container that has read one large file would look full.
    """
    tightest: CgroupMemory | None = None
    for folder, limit_name, usage_name, cache_name in _groups(root, membership):
        limit = _read_number(folder / limit_name)
        usage = _read_number(folder / usage_name)
        if limit is None or limit >= _NO_LIMIT or usage is None:
            continue
        free = min(limit, max(0, limit - usage + _read_statistic(folder / "memory.stat", cache_name)))
        if tightest is None:
            tightest = CgroupMemory(limit, free)
        else:
            tightest = CgroupMemory(min(tightest.limit_bytes, limit), min(tightest.free_bytes, free))
    return tightest


def _groups(root: Path, membership: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Yield every group's folder, the process's own first, with the names of its limit, usage and file cache."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, separator, group = rest.partition(":")
        if not separator:
            continue
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's, of which only the top is mounted here: what is missing is skipped.
        folder = top / group.lstrip("/")
        while True:
            yield (folder, *names)
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent


def _read_number(path: Path) -> int | None:
    """Return the number in a file, or None where there is no file, or no limit ("max")."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _read_statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def visible_devices(ids: Sequence[str], chosen: str | None) -> list[int]:
    """Return the places in `ids` that CUDA_VISIBLE_DEVICES leaves visible, in the order it gives them.

    `chosen` is its value, None if it is not set. Entries are indices in PCI order or UUIDs, also shortened; as in CUDA,
    the first entry that is neither ends the list, and an empty list hides every device.
    """
    if chosen is None:
        return list(range(len(ids)))
    places: list[int] = []
    for entry in (part.strip() for part in chosen.split(",")):
        if entry.isascii() and entry.isdigit():
            found = [int(entry)] if int(entry) < len(ids) else []
        else:
            found = [place for place, id in enumerate(ids) if entry and id.startswith(entry)]
        if len(found) != 1:
            break
        places.extend(place for place in found if place not in places)
    return places


@dataclass(frozen=True, slots=True)
class _Gpu:
    """A GPU of this moment; the handle is valid until NVML is shut down."""

    id: DeviceId
    handle: Any


class Devices:
    """Reads the devices; safe to call from several threads, one of which reads at a time.

    `memory_limit_bytes` caps the host's capacity, not what it reports as free. Nothing here raises because of a GPU or
    its driver: what cannot be read is left out and named in `problems`.
    """

    problems: tuple[str, ...]  # what could not be read at the last look, in sentences

    def __init__(
        self,
        *,
        memory_limit_bytes: int | None = None,
        gpus: bool = True,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.problems = ()
        self._memory_limit_bytes = memory_limit_bytes
        self._gpus = gpus
        self._environment = environment
        self._clock = clock
        self._lock = threading.Lock()  # guards everything below
        self._initialised = False  # NVML is usable, and has to be shut down
        self._retry_at = -float("inf")  # not before this is NVML initialised again
        self._failure = ""  # why it was not, if it was tried

    def sample(self) -> tuple[DeviceSample, ...]:
        """Return the host and then each visible GPU, as they are now."""
        with self._lock:
            problems: list[str] = []
            host = self._sample_host()
            samples = [host]
            for gpu in self._list_gpus(problems):
                try:
                    samples.append(_sample_gpu(gpu, host))
                except Exception as error:  # lost, fallen off the bus, not permitted: it is not there for us
                    problems.append(f"GPU {gpu.id} is left out: {error}")
            self.problems = tuple(problems)
            return tuple(samples)

    def gpu_processes(self) -> Mapping[DeviceId, Mapping[int, int]]:
        """Return the bytes each process holds on each visible GPU, by pid.

        A GPU that does not tell is missing, and so is a process whose bytes are not known. Inside a container that has
        pids of its own the driver usually tells nothing.
        """
        with self._lock:
            found: dict[DeviceId, Mapping[int, int]] = {}
            for gpu in self._list_gpus([]):
                try:
                    found[gpu.id] = _processes(gpu.handle)
                except Exception:  # not supported here, or the GPU is lost, which `sample` reports
                    continue
            return found

    def close(self) -> None:
        """Let go of the driver; sampling again later is allowed."""
        with self._lock:
            self._shut_down()

    def _sample_host(self) -> DeviceSample:
        memory = psutil.virtual_memory()
        capacity, free = memory.total, memory.available
        limits = cgroup_memory()
        if limits is not None:
            capacity, free = min(capacity, limits.limit_bytes), min(free, limits.free_bytes)
        if self._memory_limit_bytes is not None:
            capacity = min(capacity, self._memory_limit_bytes)
        return DeviceSample(HOST, "cpu", "host", capacity, free, False)

    def _list_gpus(self, problems: list[str]) -> list[_Gpu]:
        """Return the visible GPUs, initialising NVML if it is time to; call with the lock held."""
        if not self._gpus or pynvml is None:
            return []
        if not self._initialised and not self._initialise():
            problems.append(f"no GPU is used: {self._failure}")
            return []
        try:
            count = pynvml.nvmlDeviceGetCount()
        except Exception as error:  # the driver went away: start afresh later
            self._shut_down()
            self._postpone(error)
            problems.append(f"no GPU is used: {self._failure}")
            return []
        gpus: dict[int, _Gpu] = {}
        for index in range(count):
            try:
                gpus[index] = _open(index)
            except Exception as error:
                problems.append(f"GPU {index} is left out: {error}")
        ids = [gpus[index].id if index in gpus else "" for index in range(count)]  # a lost one keeps its index
        chosen = self._environment.get("CUDA_VISIBLE_DEVICES")
        return [gpus[index] for index in visible_devices(ids, chosen) if index in gpus]

    def _initialise(self) -> bool:
        if self._clock() < self._retry_at:
            return False
        try:
            pynvml.nvmlInit()
        except Exception as error:  # NVMLError, or what ctypes raises for a broken library
            self._postpone(error)
            return False
        self._initialised = True
        return True

    def _postpone(self, error: Exception) -> None:
        self._failure = str(error)
        self._retry_at = self._clock() + RETRY_S

    def _shut_down(self) -> None:
        if self._initialised:
            self._initialised = False
            try:
                pynvml.nvmlShutdown()
            except Exception:  # there is nothing left to let go of
                return


def _open(index: int) -> _Gpu:
    """Return the GPU at this index, or its first instance where it is divided, which is what CUDA would use."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    if _is_divided(handle):
        handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, 0)
    return _Gpu(DeviceId(_text(pynvml.nvmlDeviceGetUUID(handle))), handle)


def _is_divided(handle: Any) -> bool:
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError:  # most GPUs cannot be divided
        return False
    return bool(current)


def _sample_gpu(gpu: _Gpu, host: DeviceSample) -> DeviceSample:
    """Read one GPU; one without memory of its own is integrated, and what it has is the host's."""
    name = _text(pynvml.nvmlDeviceGetName(gpu.handle))
    try:
        capacity, free = _gpu_memory(gpu.handle)
    except pynvml.NVMLError_NotSupported:
        capacity = free = 0
    if capacity == 0:
        return DeviceSample(gpu.id, "gpu", name, host.capacity_bytes, host.free_bytes, True)
    return DeviceSample(gpu.id, "gpu", name, capacity, free, False)


def _gpu_memory(handle: Any) -> tuple[int, int]:
    """Return what can be allocated at most and what is free, in bytes."""
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except pynvml.NVMLError:  # an older driver, which counts its own reserve as usable
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return int(memory.total), int(memory.free)
    return int(memory.total) - int(memory.reserved), int(memory.free)


def _processes(handle: Any) -> Mapping[int, int]:
    try:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
    except pynvml.NVMLError_FunctionNotFound:  # a driver older than version 510
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses_v2(handle)
    return {int(each.pid): int(each.usedGpuMemory) for each in processes if each.usedGpuMemory is not None}


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")


__all__ = ["CgroupMemory", "Devices", "cgroup_memory", "visible_devices"]
