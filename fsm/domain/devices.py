"""Devices: their names, their readings, and the placements of runners on them."""

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

    answers: int  # computed token by token: the threads wait for each other many times in each
    prompts: int  # computed many tokens at once
    on_host: bool = True  # the host computes layers; False: the GPUs compute all of them


@dataclass(frozen=True, slots=True)
class DeviceSample:
    """The reading of one device at one moment."""

    id: DeviceId
    kind: Literal["cpu", "gpu"]
    name: str
    capacity_bytes: int  # that loadmaster may use: the device's memory, or the limit set on it
    free_bytes: int  # as the device reports it, less what other programs use
    integrated: bool = False  # a GPU that shares the host's memory
    instance: bool = False  # an instance of a divided GPU: a process can use one instance, and no GPU beside it
    fresh: bool = True  # read now; False: the device does not answer, and the figures are of an earlier reading
    library: str = "CUDA"  # through which the engine uses the GPU
    cores: int = 0  # of the host, that this program may keep busy; 0: unknown, or a GPU

    @property
    def memory(self) -> DeviceId:
        """The device whose account holds its bytes: the host for an integrated GPU, else itself."""
        return HOST if self.integrated else self.id


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one runner goes: bytes by device, layers by GPU in llama.cpp's terms, and its threads on the host."""

    bytes: tuple[tuple[DeviceId, int], ...]
    gpu_layers: tuple[tuple[DeviceId, int], ...] = ()  # empty: host only
    measured: bool = False  # the bytes were measured on an earlier runner placed the same way
    without_pages: bool = False  # pages of its mapped file are not among the bytes of the host: not all find room there
    projector_on_host: bool = False  # although layers are on GPUs: a load with it there ran out of memory
    threads: Threads | None = None  # chosen at the launch; None: the model is an object, or the engine decides
    holds_back: bool = False  # others were in use at the launch: it begins to load with what they leave of the cores

    @property
    def total_bytes(self) -> int:
        """Bytes over all devices."""
        return sum(amount for _, amount in self.bytes)

    @property
    def offloaded(self) -> int:
        """Layers on GPUs, over all of them."""
        return sum(layers for _, layers in self.gpu_layers)
