"""GPUs as drivers and engines tell of them, and which of these are one card."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from fsm.domain.devices import DeviceId

CUDA: Final = "CUDA"
# Libraries that an engine may use GPUs through, by the names that llama.cpp gives their devices. Of one card that
# several of them show, the first is used.
LIBRARIES: Final = ("CUDA", "ROCm", "MUSA", "CANN", "MTL", "Metal", "SYCL", "GPUOpenCL", "Vulkan")
WELL: Final = frozenset({"CUDA", "ROCm", "MTL", "Metal"})  # libraries that do well on integrated GPUs
_VENDORS: Mapping[str, re.Pattern[str]] = {
    "NVIDIA": re.compile(r"nvidia|geforce|quadro|tesla", re.IGNORECASE),
    "AMD": re.compile(r"\bamd\b|radeon|\bgfx\d", re.IGNORECASE),
    "Intel": re.compile(r"intel", re.IGNORECASE),
    "Apple": re.compile(r"apple", re.IGNORECASE),
}
_INTEL_CARD: Final = re.compile(r"\b[AB]\d{2,3}M?\b|Data Center|\bMAX\b|\bDG1\b")  # its other GPUs are integrated
_UNIFIED: Final = re.compile(
    r"\b(Tegra|Xavier|Orin|Thor|GB10)\b", re.IGNORECASE
)  # NVIDIA's without memory of their own
_ALIKE_PART: Final = 8  # sizes of one card, as two libraries tell them, differ by less than this part


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one instance of a divided GPU, as its driver or an engine describes it."""

    id: DeviceId
    name: str
    capacity_bytes: int  # the most that can be allocated; 0: the GPU shares the host's memory
    free_bytes: int
    instance: bool = False  # of a divided GPU
    processes: Mapping[int, int] | None = None  # bytes by pid, where they are known; None: they are not reported
    pci: str = ""  # where it sits, as "0000:01:00.0"; empty: not known
    vendor: str = ""  # empty: not known
    library: str = CUDA  # through which the engine of model files uses it; empty: the engine cannot use it
    listed: str = ""  # the engine's name for it; empty: it has none, or CUDA is told by id which GPUs to show
    cuda_id: bool = False  # its id is one that CUDA_VISIBLE_DEVICES takes
    integrated: bool = False  # a part of the processor, or of the processor's package
    fresh: bool = True  # read now; False: the figures are of an earlier reading
    reach_bytes: int = 0  # of the host's memory that can be used while the GPU uses it; 0: all of it


@dataclass(frozen=True, slots=True)
class Reading:
    """The result of one reading."""

    gpus: tuple[Gpu, ...] = ()  # the visible ones, in the order that CUDA_VISIBLE_DEVICES gives them
    problems: tuple[str, ...] = ()  # what could not be read, in sentences
    covers: frozenset[str] = frozenset()  # makers of which all GPUs that may be used are here


@dataclass(frozen=True, slots=True)
class Listed:
    """One GPU in the list that an engine gives of its devices."""

    name: str  # as in "Vulkan1"
    description: str
    capacity_bytes: int
    free_bytes: int
    pci: str = ""  # empty: not told
    told_integrated: bool | None = None  # None: not told

    @property
    def library(self) -> str:
        """The library through which the engine uses it."""
        return self.name.rstrip("0123456789")

    @property
    def vendor(self) -> str:
        """The maker of the GPU, by its library or description; empty where these do not tell."""
        if self.library == CUDA:
            return "NVIDIA"
        return next((vendor for vendor, words in _VENDORS.items() if words.search(self.description)), "")

    @property
    def integrated(self) -> bool:
        """Whether it shares the host's memory, as told, or else by its description."""
        if self.told_integrated is not None:
            return self.told_integrated
        if self.vendor == "Intel":
            return _INTEL_CARD.search(self.description) is None
        return self.vendor == "Apple" or _UNIFIED.search(self.description) is not None


def pci_id(text: str) -> str:
    """Return a PCI id in the form of Linux, as "0000:01:00.0"; empty where the text is none."""
    found = re.fullmatch(r"(?:0000)?([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", text.strip().lower())
    return found[1] if found is not None else ""


def without_list(known: Iterable[Gpu]) -> tuple[Gpu, ...]:
    """Return the GPUs that count where no engine has told which ones it can use."""
    return tuple(gpu for gpu in known if not gpu.integrated or gpu.cuda_id)


def joined(
    known: Sequence[Gpu],
    listed: Sequence[Listed],
    covers: Collection[str] = (),
    *,
    integrated: bool = False,
    fresh: bool = True,
) -> Reading:
    """Return each GPU of the machine once: those of drivers, `known`, and those that only an engine's list shows.

    A GPU that the engine can use has the engine's name for it and the library; the figures are the driver's where there
    are any. The rules, for the entries of the list in the order of `LIBRARIES`:

    1. What CUDA shows are the GPUs of NVIDIA's driver: a process is told these by their ids, so no entry is needed.
    2. An entry with the PCI id of a GPU is that GPU, seen by one more library if it has a library already.
    3. An entry that cannot be any of the GPUs is a GPU of its own, unless drivers tell of all that its maker has here
       (`covers`): then it is hidden from this program, or lost.
    4. An entry that can only be one GPU, and that alone can be this GPU, is this GPU.
    5. Any other entry is left out, rather than that memory counts twice.

    An integrated GPU counts only through a library that does well on it, or where `integrated` ones are wanted (N23).
    """
    join = _Join(known, listed, covers, integrated=integrated, fresh=fresh)
    for entry in sorted(join.entries, key=lambda entry: LIBRARIES.index(entry.library)):
        join.add(entry)
    return join.reading()


class _Join:
    """The GPUs that were found so far."""

    def __init__(
        self, known: Sequence[Gpu], listed: Sequence[Listed], covers: Collection[str], *, integrated: bool, fresh: bool
    ) -> None:
        self._covers, self._wants_integrated, self._fresh = covers, integrated, fresh
        self._problems: list[str] = []
        self._unused: list[str] = []  # integrated GPUs, in words
        through_driver = any(entry.library == CUDA for entry in listed) and any(gpu.cuda_id for gpu in known)
        self._gpus = {
            gpu.id: replace(gpu, library=CUDA if through_driver and gpu.cuda_id else "", listed="") for gpu in known
        }
        self.entries = [
            entry
            for entry in listed
            if entry.library in LIBRARIES and entry.capacity_bytes and not (through_driver and entry.library == CUDA)
        ]

    def add(self, entry: Listed) -> None:
        same = [gpu for gpu in self._gpus.values() if entry.pci and gpu.pci == entry.pci]
        others = (gpu for gpu in self._gpus.values() if gpu.library != entry.library)  # it shows no card twice
        possible = same or [gpu for gpu in others if _may_be(gpu, entry)]
        if not possible:
            self._add_new(entry)
        elif len(possible) == 1 and (same or self._is_alone(possible[0], entry)):
            self._name(possible[0], entry)
        elif not same and not all(gpu.library for gpu in possible):
            ids = ", ".join(gpu.id for gpu in possible)
            self._problems.append(
                f"{entry.name} ({entry.description}) is not used: it may be any of {ids}, and the engine does not "
                "tell its PCI id"
            )

    def _is_alone(self, gpu: Gpu, entry: Listed) -> bool:
        """Tell whether no other entry of the library may be the GPU."""
        return [each for each in self.entries if each.library == entry.library and _may_be(gpu, each)] == [entry]

    def _counts(self, entry: Listed, gpu: Gpu | None = None) -> bool:
        if not (entry.integrated or (gpu is not None and gpu.integrated)):
            return True
        if entry.library in WELL or self._wants_integrated:
            return True
        self._unused.append(f"{entry.name} ({entry.description})")
        return False

    def _add_new(self, entry: Listed) -> None:
        if entry.vendor in self._covers or not self._counts(entry):
            return
        id = DeviceId(f"PCI-{entry.pci}" if entry.pci else entry.name)
        shares, metal = entry.integrated, entry.library in ("MTL", "Metal")
        self._gpus[id] = Gpu(
            id,
            entry.description,
            0 if shares else entry.capacity_bytes,
            0 if shares else entry.free_bytes,
            pci=entry.pci,
            vendor=entry.vendor,
            library=entry.library,
            listed=entry.name,
            integrated=shares,
            fresh=self._fresh,
            reach_bytes=entry.capacity_bytes if shares and metal else 0,
        )

    def _name(self, gpu: Gpu, entry: Listed) -> None:
        """Enter the engine's name for a GPU, unless a better library has one, or it is only a part of the entry."""
        if not gpu.library and not gpu.instance and self._counts(entry, gpu):
            name = gpu.name or entry.description
            self._gpus[gpu.id] = replace(gpu, name=name, library=entry.library, listed=entry.name)

    def reading(self) -> Reading:
        """Return the GPUs that count: those that the engine can use first, since `main_gpu` counts them (N21)."""
        gpus = [gpu for gpu in self._gpus.values() if gpu.library or gpu.cuda_id or not gpu.integrated]
        gpus.sort(key=lambda gpu: not gpu.library)
        unused = (
            f"no GPU is used: {', '.join(self._unused)} has no memory of its own, where its library seldom does well; "
            "to use it nevertheless, set integrated_gpus",
        )
        return Reading(tuple(gpus), (*self._problems, *(unused if self._unused and not gpus else ())))


def _may_be(gpu: Gpu, entry: Listed) -> bool:
    """Tell whether an entry and a GPU may be one card, as far as makers, places and sizes tell."""
    if gpu.vendor and entry.vendor and gpu.vendor != entry.vendor:
        return False
    if gpu.pci and entry.pci:
        return gpu.pci == entry.pci
    if gpu.instance or (gpu.integrated and entry.told_integrated is not False):
        return True
    if entry.integrated:
        return gpu.integrated
    difference = abs(gpu.capacity_bytes - entry.capacity_bytes)
    return difference * _ALIKE_PART <= max(gpu.capacity_bytes, entry.capacity_bytes)


__all__ = ["CUDA", "LIBRARIES", "WELL", "Gpu", "Listed", "Reading", "joined", "pci_id", "without_list"]
