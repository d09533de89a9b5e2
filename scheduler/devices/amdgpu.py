"""Reads AMD's GPUs from the files of Linux's driver amdgpu, which tell memory without any library of AMD's."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fsm.domain.devices import DeviceId
from scheduler.devices.gpus import Gpu, pci_id

CARDS: Final = Path("/sys/class/drm")
LOOK_S: Final = 60.0  # how often new GPUs are looked for
_AMD: Final = "0x1002"
_METRICS_OF_APUS: Final = 2  # from this format on the driver's metrics are those of a GPU within a processor


@dataclass(frozen=True, slots=True)
class _Card:
    """A GPU, and what of it stays as it is."""

    folder: Path
    pci: str
    name: str
    vram_bytes: int
    integrated: bool
    shares_host: bool  # its memory is the host's, but for a part that the firmware keeps for the screen


class AmdGpus:
    """The GPUs that the driver shows; nothing here raises, and no file is read where there is none."""

    def __init__(self, cards: Path = CARDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._cards = cards
        self._clock = clock
        self._look_at = -float("inf")  # when GPUs are looked for again
        self._found: list[_Card] = []

    def read(self) -> tuple[Gpu, ...]:
        """Return every GPU with its memory, in the order of their PCI ids."""
        if self._clock() >= self._look_at:
            self._look_at = self._clock() + LOOK_S
            found: dict[str, _Card] = {}
            with suppress(OSError):  # no graphics, or a container that hides them
                cards = map(_card, self._cards.glob("card[0-9]*"))
                found = {card.pci: card for card in cards if card is not None}
            self._found = [found[pci] for pci in sorted(found)]
        return tuple(gpu for card in self._found if (gpu := _gpu(card)) is not None)


def _gpu(card: _Card) -> Gpu | None:
    """Return a GPU as it is now; None where the driver does not tell, as while the GPU is reset or has gone."""
    used_bytes = _number(card.folder / "mem_info_vram_used")
    if used_bytes is None:
        return None
    capacity_bytes = 0 if card.shares_host else card.vram_bytes
    return Gpu(
        DeviceId(f"PCI-{card.pci}"),
        card.name,
        capacity_bytes,
        max(0, capacity_bytes - used_bytes),
        pci=card.pci,
        vendor="AMD",
        library="ROCm",
        integrated=card.integrated,
    )


def _card(place: Path) -> _Card | None:
    """Return the GPU at a place, which may be an output of one; None where it is none of this driver's."""
    folder = (place / "device").resolve()
    pci, vram_bytes = pci_id(folder.name), _number(folder / "mem_info_vram_total")
    if not pci or not vram_bytes or _text(folder / "vendor") != _AMD:
        return None
    integrated = _is_apu(folder)
    # some firmware keeps most of the memory for the GPU: that part is not the host's, and counts as the GPU's own
    shares_host = integrated and vram_bytes < (_number(folder / "mem_info_gtt_total") or 0)
    return _Card(folder, pci, _text(folder / "product_name"), vram_bytes, integrated, shares_host)


def _is_apu(folder: Path) -> bool:
    """Tell whether a GPU is within a processor, by the format of the driver's metrics."""
    with suppress(OSError), (folder / "gpu_metrics").open("rb") as file:
        header = file.read(4)  # size, and revisions of format and content
        return len(header) == 4 and header[2] >= _METRICS_OF_APUS
    return False


def _text(path: Path) -> str:
    with suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8").strip()
    return ""


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None


__all__ = ["AmdGpus"]
