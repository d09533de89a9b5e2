"""Reads GPUs through the management library of NVIDIA's driver. Any call may take long, or never return."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fsm.domain.devices import DeviceId
from scheduler.devices.gpus import CUDA, Gpu, Reading, pci_id

try:
    import pynvml
except Exception:  # whatever is wrong with the binding, the host is still there
    pynvml = None

PCI = Path("/sys/bus/pci/devices")  # on Linux
CARD = Path("/dev/nvidiactl")  # of the driver, also where a container hides the bus
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # vendor, and class of devices
RETRY_S = 60.0  # a driver that was missing, or lost a GPU, is started again at most this often

# GPUs that have no memory of their own, by compute capability: Tegra X1 and X2, Xavier, Orin, Thor (twice), GB10. Their
# drivers refuse to report memory; a driver that does report it means the host's.
_UNIFIED = frozenset({(5, 3), (6, 2), (7, 2), (8, 7), (10, 1), (11, 0), (12, 1)})


@dataclass(frozen=True, slots=True)
class Board:
    """A GPU as it sits in the machine."""

    id: str  # empty: it was lost before its id could be read
    name: str = ""
    instances: tuple[str, ...] | None = None  # of a divided GPU, which cannot be used whole; None: it is not divided
    pci: str = ""  # where it sits; empty: the driver does not tell


def visible_devices(boards: Sequence[Board], chosen: str | None) -> list[str]:
    """Return the ids of the devices that CUDA_VISIBLE_DEVICES leaves visible, in the order it gives them.

    `chosen` is its value, None if it is not set: then every GPU is visible, and every instance in place of a divided
    GPU. Entries are indices of `boards` or ids, also shortened if they stay unique. As in CUDA, the first entry that is
    neither ends the list, and an empty list hides every device. An entry for a divided GPU means its first instance.
    """
    devices = {board.id: (board.id,) if board.instances is None else board.instances for board in boards}
    if chosen is None:
        return [id for board in boards if board.id for id in devices[board.id]]
    instances = [id for board in boards for id in board.instances or ()]
    found: list[str] = []
    for entry in (part.strip() for part in chosen.split(",")):
        if entry.isascii() and entry.isdigit():
            meant = [board.id for board in boards[int(entry) : int(entry) + 1]]
        else:
            meant = [id for id in [*devices, *instances] if entry and id.startswith(entry)]
        if len(meant) != 1:
            break
        found += devices[meant[0]][:1] if meant[0] in devices else meant
    return list(filter(None, dict.fromkeys(found)))


def has_card() -> bool:
    """Return whether the machine shows a graphics processor of NVIDIA's, whether or not its driver is installed."""
    if CARD.exists():
        return True
    with suppress(OSError):
        return any(_is_card(place) for place in PCI.iterdir())
    return False


def _is_card(place: Path) -> bool:
    with suppress(OSError):  # the device has gone, or may not be read
        vendor, kind = (Path(place, name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
        return vendor == _NVIDIA and kind.startswith(_DISPLAY)
    return False


def _is_missing(error: Exception) -> bool:
    """Return whether a driver's library could not be started because there is none."""
    return pynvml is None or getattr(error, "value", None) == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND


class Nvml:
    """A session with the driver; to be used by one thread at a time.

    Nothing here raises because of a GPU or its driver: a GPU that cannot be read is left out and named in a `Reading`'s
    problems.
    """

    def __init__(self, environment: Mapping[str, str], clock: Callable[[], float] = time.monotonic) -> None:
        self._environment = environment
        self._clock = clock
        self._initialised = False  # the library is usable, and has to be shut down
        self._retry_at = -float("inf")  # the library is not initialised before this time
        self._failure = ""  # why the last initialisation failed, if it did
        self._missing = False  # it failed since there is no library, as where there is no GPU
        self._told = False  # that failure is a problem: there is a library, or a card that lacks one
        self._ailing = False  # a GPU could not be opened since the library was initialised
        self._boards: dict[int, Board] = {}  # by index, as of the last time that each could be opened

    def read(self) -> Reading:
        """Return every visible GPU with its memory and processes."""
        problems: list[str] = []
        gpus: list[Gpu] = []
        handles = self._open_all(problems)
        places = {id: board.pci for board in self._boards.values() for id in (board.id, *(board.instances or ()))}
        for id in self._visible(handles, problems):
            try:
                gpus.append(replace(_read_gpu(id, *handles[id], problems), pci=places[id]))
            except Exception as error:  # lost, fallen off the bus, not permitted: the GPU is left out
                problems.append(f"GPU {id} is left out: {error}")
        covers = {"NVIDIA"} if self._initialised or not self._missing else ()
        return Reading(tuple(gpus), tuple(problems), frozenset(covers))

    def close(self) -> None:
        """Shut the library down; a later `read` is allowed."""
        self._retry_at = -float("inf")
        if self._initialised:
            self._initialised = False
            try:
                pynvml.nvmlShutdown()
            except Exception:  # there is nothing left to shut down
                return

    def _open_all(self, problems: list[str]) -> dict[str, tuple[Any, bool]]:
        """Return the handle of every GPU and instance that can be opened, and whether it is an instance, by id."""
        handles: dict[str, tuple[Any, bool]] = {}
        try:
            self._start()
            count = pynvml.nvmlDeviceGetCount() if self._initialised else 0
        except Exception as error:  # NVMLError, or an error of ctypes for a broken library: start afresh later
            self.close()
            self._failure, self._missing = str(error), _is_missing(error)
            self._told = not self._missing or has_card()
            self._retry_at = self._clock() + RETRY_S
            count = 0
        if not self._initialised and self._told:
            problems.append(f"no GPU is used: {self._failure}")
        self._boards = {index: board for index, board in self._boards.items() if index < count}
        for index in range(count):
            try:
                board = self._boards[index] = _open(index, handles)
                if board.instances == ():
                    problems.append(f"GPU {board.id} is left out: it is to be divided, but into nothing yet")
            except Exception as error:
                self._ailing = True
                board = self._boards.setdefault(index, Board(""))
                problems.append(f"GPU {board.id or index} is left out: {error}")
        return handles

    def _start(self) -> None:
        """Initialise the library if it is not, or if that may bring a lost GPU back, and if a new try is due.

        Raises what the library raises, and RuntimeError where its module cannot be imported.
        """
        if self._clock() < self._retry_at:
            return
        if self._ailing:
            self.close()
        if pynvml is None:
            raise RuntimeError("the pynvml module cannot be imported")
        if not self._initialised:
            pynvml.nvmlInit()
            self._initialised, self._ailing = True, False
            self._retry_at = self._clock() + RETRY_S

    def _visible(self, handles: Mapping[str, tuple[Any, bool]], problems: list[str]) -> list[str]:
        """Return the ids of the visible devices that could be opened."""
        boards = [self._boards[index] for index in sorted(self._boards)]
        chosen = self._environment.get("CUDA_VISIBLE_DEVICES")
        differ = len({board.name for board in boards if board.id}) > 1
        by_index = any(part.strip().isdigit() for part in (chosen or "").split(","))
        if differ and by_index and self._environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            problems.append(
                "CUDA_VISIBLE_DEVICES names GPUs by index, which are counted in the order of the PCI bus here: CUDA "
                "counts the fastest first unless CUDA_DEVICE_ORDER is PCI_BUS_ID"
            )
        return [id for id in visible_devices(boards, chosen) if id in handles]


def _open(index: int, handles: dict[str, tuple[Any, bool]]) -> Board:
    """Add the handle of the GPU at this index to `handles`, or the handles of its instances where it is divided."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    id, name = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
    pci = _pci(handle)
    if not _is_divided(handle):
        handles[id] = handle, False
        return Board(id, name, pci=pci)
    instances: list[str] = []
    for place in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
        except pynvml.NVMLError_NotFound:  # there may be fewer instances than the GPU allows
            continue
        instances.append(pynvml.nvmlDeviceGetUUID(instance))
        handles[instances[-1]] = instance, True
    return Board(id, name, tuple(instances), pci)


def _pci(handle: Any) -> str:
    try:
        told = pynvml.nvmlDeviceGetPciInfo(handle).busId
    except pynvml.NVMLError:
        return ""
    return pci_id(told.decode() if isinstance(told, bytes) else told)


def _is_divided(handle: Any) -> bool:
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError:  # most GPUs cannot be divided
        return False
    return bool(current)


def _read_gpu(id: str, handle: Any, instance: bool, problems: list[str]) -> Gpu:
    name = pynvml.nvmlDeviceGetName(handle)
    unified = not instance and _compute_capability(handle) in _UNIFIED
    try:
        capacity, free = (0, 0) if unified else _memory(handle)
    except pynvml.NVMLError_NotSupported:
        capacity, free = 0, 0
    if not capacity and not unified:
        problems.append(f"GPU {id} does not report its memory: it counts as sharing the host's")
    processes: Mapping[int, int] | None = None
    try:
        processes = _processes(handle)
    except Exception as error:
        problems.append(f"GPU {id} does not report what each process holds, so the reserved bytes count: {error}")
    return Gpu(
        DeviceId(id), name, capacity, free, instance, processes,
        vendor="NVIDIA", library=CUDA, cuda_id=True, integrated=not capacity,
    )  # fmt: skip


def _compute_capability(handle: Any) -> tuple[int, int] | None:
    try:
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError:
        return None
    return major, minor


def _memory(handle: Any) -> tuple[int, int]:
    """Return the bytes that can be allocated at most and the bytes that are free."""
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


__all__ = ["Board", "Nvml", "visible_devices"]
