"""Where a model goes: whole on GPUs, partly, or on the host, on a scratch account of what is free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from fsm.footprint import Footprint, parts
from fsm.ledger import Placement
from fsm.model import HOST, Amounts, DeviceId

PREDICTED_HEADROOM = 0.25  # a prediction fits if it takes at most 80 % of what is free, as in the reference
MEASURED_HEADROOM = 0.03

Free = Mapping[DeviceId, int]


class Offload(Enum):
    """How much of a model goes to GPUs."""

    whole = "whole"
    part = "part"
    none = "none"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that layers may go to."""

    id: DeviceId
    memory: DeviceId  # where its bytes are booked: its own, or the host's if it is integrated
    instance: bool = False  # of a divided GPU: CUDA lets a process see one of these, so nothing is split over it


@dataclass(frozen=True, slots=True)
class Demand:
    """What a runner needs, and what its request says about where."""

    footprint: Footprint
    num_gpu: int | None = None  # layers; None or negative: automatic
    main_gpu: int | None = None
    known: Mapping[Amounts, Amounts] = field(default_factory=dict)  # layers by GPU -> bytes measured with that split
    spread: bool = False  # over all GPUs, even where one takes it
    require_gpu: bool = False  # whole on GPUs, whatever its request says, or not at all

    @property
    def layers(self) -> int:
        """Layers that can be offloaded; the output counts as one more."""
        return len(self.footprint.weights_bytes) + 1

    def offloads(self, gpus: Sequence[Gpu]) -> tuple[Offload, ...]:
        """Return the ways to place it, the best first: what fits whole, once room is made, is not offloaded in part."""
        if self.footprint.fixed:
            return (Offload.none,)
        if self.require_gpu:
            return (Offload.whole,)
        if self.num_gpu is None or self.num_gpu < 0:
            return (Offload.whole, Offload.part, Offload.none) if gpus else (Offload.none,)
        if self.num_gpu == 0:
            return (Offload.none,)
        return (Offload.whole,) if self.num_gpu >= self.layers else (Offload.part,)


def needed(placement: Placement, *, exact: bool) -> Amounts:
    """Return the bytes that must be free for it: what it takes and the headroom over what is not exactly known."""
    headroom = 0.0 if exact else MEASURED_HEADROOM if placement.measured else PREDICTED_HEADROOM
    return tuple((device, int(amount * (1 + headroom))) for device, amount in placement.bytes)


def place(demand: Demand, offload: Offload, free: Free, gpus: Sequence[Gpu]) -> Placement | None:
    """Return where it fits within `free`, headroom included; None where it does not.

    The best single GPU goes first (the explicit `main_gpu`, else a discrete one before an integrated one, else the one
    with most free), then a split over as few as possible, or over all with `spread`; layers are taken from the last to
    the first, as llama.cpp offloads them.
    """
    if demand.footprint.fixed:
        return _within(Placement(_booked(dict(demand.footprint.fixed), gpus)), free, exact=True)
    if offload is Offload.none:
        return _within(_layout(demand, (), gpus), free)
    order = sorted(
        gpus, key=lambda gpu: (gpus.index(gpu) != demand.main_gpu, gpu.memory == HOST, -free.get(gpu.memory, 0), gpu.id)
    )
    team = [gpu for gpu in order if not gpu.instance]
    for layers in _layer_counts(demand, offload):
        for size in range(max(1, len(team)) if demand.spread else 1, max(1, len(team)) + 1):
            groups = [(gpu,) for gpu in order] if size == 1 else [tuple(team[:size])]
            for group in groups:
                split = _split(demand, layers, group, free)
                if split and (placement := _within(_layout(demand, split, gpus), free)):
                    return placement
    return None


def _layer_counts(demand: Demand, offload: Offload) -> Sequence[int]:
    if offload is Offload.whole:
        return (demand.layers,)
    if demand.num_gpu is not None and demand.num_gpu > 0:
        return (demand.num_gpu,)
    return range(demand.layers - 1, 0, -1)


def _within(placement: Placement, free: Free, *, exact: bool = False) -> Placement | None:
    fits = all(amount <= free.get(device, 0) for device, amount in needed(placement, exact=exact))
    return placement if fits else None


def _booked(amounts: Mapping[DeviceId, int], gpus: Sequence[Gpu]) -> Amounts:
    """Return amounts by the memory that they are taken from: an integrated GPU's are the host's."""
    memory = {gpu.id: gpu.memory for gpu in gpus}
    booked: dict[DeviceId, int] = {}
    for device, amount in amounts.items():
        where = memory.get(device, device)
        booked[where] = booked.get(where, 0) + amount
    return tuple(booked.items())


def _offloaded_bytes(footprint: Footprint, layers: int) -> list[int]:
    """Return the bytes of each offloaded layer in llama.cpp's order, the output last where it is among them."""
    blocks = list(footprint.layers_bytes)
    if layers > len(blocks):
        return [*blocks, footprint.output_bytes + footprint.output_copy_bytes]
    return blocks[len(blocks) - layers :]


def _split(demand: Demand, layers: int, group: Sequence[Gpu], free: Free) -> Amounts:
    """Deal the layers to the GPUs of a group in order, each as many as it takes; empty where they do not all go.

    With `spread`, each takes its share of the group's free memory, as far as layers can be shared.
    """
    left = _offloaded_bytes(demand.footprint, layers)
    room = {gpu.memory: free.get(gpu.memory, 0) / (1 + PREDICTED_HEADROOM) for gpu in group}
    part = min(1.0, sum(left) / max(1.0, sum(room.values()))) if demand.spread else 1.0
    split: list[tuple[DeviceId, int]] = []
    extra_bytes = demand.footprint.projectors_bytes  # on the first
    for place_in_group, gpu in enumerate(group):
        last = place_in_group == len(group) - 1
        most_bytes = room[gpu.memory] - demand.footprint.compute_bytes - extra_bytes
        share_bytes = most_bytes if last else most_bytes * part
        count = len(left) if len(group) == 1 else 0
        while count < len(left) and sum(left[: count + 1]) <= share_bytes:
            count += 1
        if count:
            split.append((gpu.id, count))
            room[gpu.memory] -= sum(left[:count]) + demand.footprint.compute_bytes + extra_bytes
            extra_bytes = 0
        left = left[count:]
    return () if left else tuple(split)


def _layout(demand: Demand, split: Amounts, gpus: Sequence[Gpu]) -> Placement:
    """Return the bytes by device of a split, measured ones where that split was measured."""
    if (measured := demand.known.get(split)) is not None:
        return Placement(measured, split, measured=True)
    amounts = {device: part.total_bytes for device, part in parts(demand.footprint, split).items()}
    return Placement(_booked(amounts, gpus), split)
