"""Where a model goes: whole on GPUs, partly, or on the host, on a scratch account of what is free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from fsm.commands import Amounts
from fsm.estimate import HOST, DeviceId, Footprint
from fsm.ledger import Placement

PREDICTED_HEADROOM = 0.25  # a prediction fits if it takes at most 80 % of what is free, as in the reference
MEASURED_HEADROOM = 0.03

Free = Mapping[DeviceId, int]


class Offload(Enum):
    """How much of a model goes to GPUs."""

    whole = "whole"
    part = "part"
    none = "none"


@dataclass(frozen=True, slots=True)
class Demand:
    """What a runner needs, and what its request says about where."""

    footprint: Footprint
    num_gpu: int | None = None  # layers; None or negative: automatic
    main_gpu: int | None = None
    known: Mapping[Amounts, Amounts] = field(default_factory=dict)  # layers by GPU -> bytes measured with that split

    @property
    def layers(self) -> int:
        """Layers that can be offloaded; the output counts as one more."""
        return len(self.footprint.layers_bytes) + 1

    def offloads(self, gpus: Sequence[DeviceId]) -> tuple[Offload, ...]:
        """Return the ways to place it, the best first: what fits whole, once room is made, is not offloaded in part."""
        if self.footprint.fixed or not gpus or self.num_gpu == 0:
            return (Offload.none,)
        if self.num_gpu is None or self.num_gpu < 0:
            return (Offload.whole, Offload.part, Offload.none)
        return (Offload.whole,) if self.num_gpu >= self.layers else (Offload.part,)


def needed(placement: Placement, *, exact: bool) -> Amounts:
    """Return the bytes that must be free for it: what it takes and the headroom over what is not exactly known."""
    headroom = 0.0 if exact else MEASURED_HEADROOM if placement.measured else PREDICTED_HEADROOM
    return tuple((device, int(amount * (1 + headroom))) for device, amount in placement.bytes)


def place(demand: Demand, offload: Offload, free: Free, gpus: Sequence[DeviceId]) -> Placement | None:
    """Return where it fits within `free`, headroom included; None where it does not.

    The best single GPU goes first (the explicit `main_gpu`, else the one with most free), then a split over as few as
    possible; layers are taken from the last to the first, as llama.cpp offloads them.
    """
    if demand.footprint.fixed:
        return _within(Placement(demand.footprint.fixed), free, exact=True)
    if offload is Offload.none:
        return _within(_layout(demand, ()), free)
    order = sorted(gpus, key=lambda gpu: (gpus.index(gpu) != demand.main_gpu, -free.get(gpu, 0), gpu))
    for layers in _layer_counts(demand, offload):
        for size in range(1, len(order) + 1):
            groups = [(gpu,) for gpu in order] if size == 1 else [tuple(order[:size])]
            for group in groups:
                split = _split(demand, layers, group, free)
                if split and (placement := _within(_layout(demand, split), free)):
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


def _offloaded_bytes(footprint: Footprint, layers: int) -> list[int]:
    """Return the bytes of each offloaded layer in llama.cpp's order, the output last where it is among them."""
    blocks = footprint.layers_bytes
    if layers > len(blocks):
        return [*blocks, footprint.output_bytes]
    return list(blocks[len(blocks) - layers :])


def _split(demand: Demand, layers: int, group: Sequence[DeviceId], free: Free) -> Amounts:
    """Deal the layers to the GPUs of a group in order, each as many as it takes; empty where they do not all go."""
    left = _offloaded_bytes(demand.footprint, layers)
    split: list[tuple[DeviceId, int]] = []
    for gpu in group:
        room = free.get(gpu, 0) / (1 + PREDICTED_HEADROOM) - demand.footprint.compute_bytes
        count = 0
        if len(group) == 1:
            count = len(left)
        else:
            while count < len(left) and (room := room - left[count]) >= 0:
                count += 1
        if count:
            split.append((gpu, count))
        left = left[count:]
    return () if left else tuple(split)


def _layout(demand: Demand, split: Amounts) -> Placement:
    """Return the bytes by device of a split, measured ones where that split was measured."""
    if (measured := demand.known.get(split)) is not None:
        return Placement(measured, split, measured=True)
    footprint = demand.footprint
    offloaded = sum(count for _, count in split)
    amounts: dict[DeviceId, int] = {}
    layers = iter(_offloaded_bytes(footprint, offloaded) if split else ())
    for gpu, count in split:
        amounts[gpu] = footprint.compute_bytes + sum(next(layers) for _ in range(count))
    kept = footprint.layers_bytes[: max(0, len(footprint.layers_bytes) - offloaded)]
    output = 0 if offloaded > len(footprint.layers_bytes) else footprint.output_bytes
    compute = footprint.compute_bytes if kept or not split else 0
    amounts[HOST] = footprint.host_bytes + sum(kept) + output + compute
    return Placement(tuple(amounts.items()), split)
