"""Devices: their names, what was read from them, and where a runner goes on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NewType

DeviceId = NewType("DeviceId", str)

HOST = DeviceId("cpu")
MIB = 1024 * 1024

Amounts = tuple[tuple[DeviceId, int], ...]  # bytes, or layers, by device


@dataclass(frozen=True, slots=True)
class Threads:
    """How many threads of the host a runner computes with."""

    answers: int  # a token after another: its threads wait for each other many times in each
    prompts: int  # many tokens at once
    on_host: bool = True  # layers are computed there; else its GPUs do it all


@dataclass(frozen=True, slots=True)
class DeviceSample:
    """What was read from one device at one moment."""

    id: DeviceId
    kind: Literal["cpu", "gpu"]
    name: str
    capacity_bytes: int  # what loadmaster may use: the device's memory, or the limit set on it
    free_bytes: int  # as the device reports it, strangers' use taken off
    integrated: bool = False  # shares the host's memory
    instance: bool = False  # of a divided GPU: a process can use one of these, and nothing beside it
    fresh: bool = True  # read now; else the figures are of an earlier sample, for the device does not answer
    library: str = "CUDA"  # of a GPU: that it is used through
    cores: int = 0  # of the host, that this program may keep busy; 0: unknown, or a GPU

    @property
    def memory(self) -> DeviceId:
        """Where bytes on it are booked: it has a memory of its own, or shares the host's."""
        return HOST if self.integrated else self.id


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one runner goes: bytes by device, layers by GPU in llama.cpp's terms, and its part of the host's cores."""

    bytes: tuple[tuple[DeviceId, int], ...]
    gpu_layers: tuple[tuple[DeviceId, int], ...] = ()  # empty: host only
    measured: bool = False  # the bytes were measured on an earlier runner placed the same way
    threads: Threads | None = None  # dealt when it is launched; None: of an object, or the engine decides

    @property
    def total_bytes(self) -> int:
        """Bytes over all devices."""
        return sum(amount for _, amount in self.bytes)

    @property
    def offloaded(self) -> int:
        """Layers on GPUs, over all of them."""
        return sum(layers for _, layers in self.gpu_layers)
