"""The search for a placement: whole on GPUs, in part, or on the host, within given free bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from fsm.domain.devices import HOST, Amounts, DeviceId, Placement
from fsm.placement.layer_split import LayerSplitter
from fsm.sizing.footprint import Footprint, bytes_by_device

PREDICTED_HEADROOM = 0.25  # a prediction fits if it takes at most 80 % of the free bytes, as in the reference
MEASURED_HEADROOM = 0.03

Free = Mapping[DeviceId, int]


class Offload(Enum):
    """How much of a model goes to GPUs."""

    whole = "whole"
    partial = "part"
    none = "none"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that layers may go to."""

    id: DeviceId
    memory: DeviceId  # the device whose account holds its bytes: itself, or the host if it is integrated
    instance: bool = False  # of a divided GPU: CUDA lets a process see one instance, so no model is split over several
    library: str = "CUDA"  # through which the engine uses it: no model is split over GPUs of two libraries


@dataclass(frozen=True, slots=True)
class PlacementDemand:
    """What a runner needs, and what its request says about its placement."""

    footprint: Footprint
    num_gpu: int | None = None  # layers; None or negative: automatic
    main_gpu: int | None = None
    known: Mapping[Amounts, Amounts] = field(default_factory=dict)  # layers by GPU -> bytes measured with that split
    spread: bool = False  # over all GPUs, even where one GPU takes the model
    require_gpu: bool = False  # whole on GPUs or not at all, also where its request names fewer layers

    @property
    def layers(self) -> int:
        """Layers that can be offloaded."""
        return self.footprint.layers

    def offload_modes(self, gpus: Sequence[Gpu]) -> tuple[Offload, ...]:
        """Return the possible offloads, the best first: no model goes in part that fits whole after evictions."""
        if self.footprint.fixed:
            return (Offload.none,)
        if self.require_gpu:
            return (Offload.whole,)
        if self.num_gpu is None or self.num_gpu < 0:
            return (Offload.whole, Offload.partial, Offload.none) if gpus else (Offload.none,)
        if self.num_gpu == 0:
            return (Offload.none,)
        return (Offload.whole,) if self.num_gpu >= self.layers else (Offload.partial,)


def needed(placement: Placement, *, exact: bool) -> Amounts:
    """Return the bytes by device that must be free for a placement: its own, and the headroom unless they are exact."""
    headroom = 0.0 if exact else MEASURED_HEADROOM if placement.measured else PREDICTED_HEADROOM
    return tuple((device, int(amount * (1 + headroom))) for device, amount in placement.bytes)


def find_placement(demand: PlacementDemand, offload: Offload, free: Free, gpus: Sequence[Gpu]) -> Placement | None:
    """Return a placement that fits within `free`, headroom included; None where there is none.

    As many layers as possible go to GPUs, the output first and then the last layers, as llama.cpp offloads them. They
    go to one GPU, the best that takes them (the explicit `main_gpu`, else a discrete GPU before an integrated one, else
    the GPU with most free bytes), or else to as few GPUs of one library as possible, or with `spread` to all of them.
    """
    if demand.footprint.fixed:
        return _within(Placement(_by_memory(dict(demand.footprint.fixed), gpus)), free, exact=True)
    if offload is Offload.none:
        return _within(_layout(demand, (), gpus), free)
    order = sorted(
        gpus, key=lambda gpu: (gpus.index(gpu) != demand.main_gpu, gpu.memory == HOST, -free.get(gpu.memory, 0), gpu.id)
    )
    table = SplitEnumerator(demand, free, order)
    for layers in _layer_counts(demand, offload):
        for split in table.splits(layers):
            placement = _layout(demand, split, gpus)
            lacking = _lacking(placement, free)
            if not lacking:
                return placement
            only_host = lacking == {HOST} and not demand.known and all(gpu.memory != HOST for gpu in gpus)
            if only_host and offload is Offload.partial:
                return None  # with fewer layers on GPUs the host would lack more
    return None


def _layer_counts(demand: PlacementDemand, offload: Offload) -> Sequence[int]:
    if offload is Offload.whole:
        return (demand.layers,)
    if demand.num_gpu is not None and demand.num_gpu > 0:
        return (demand.num_gpu,)
    return range(demand.layers - 1, 0, -1)


class SplitEnumerator:
    """The splits that are worth trying, by the number of layers on GPUs."""

    def __init__(self, demand: PlacementDemand, free: Free, order: Sequence[Gpu]) -> None:
        self.demand = demand
        self.order = order
        self.layers_bytes = demand.footprint.offloaded_bytes
        self.rooms = {gpu.id: _room(free.get(gpu.memory, 0)) - demand.footprint.compute_bytes for gpu in order}
        self.teams = _teams(order)

    def splits(self, layers: int) -> Iterator[Amounts]:
        """Yield the splits of so many layers over GPUs that may fit, the best first; no split that cannot fit."""
        offloaded = self.layers_bytes[len(self.layers_bytes) - layers :]
        first_bytes = self.demand.footprint.first_bytes(layers)
        over_all = [split for team in self.teams for split in self._spread_over(team, offloaded, first_bytes)]
        yield from over_all
        needs_bytes = sum(offloaded) + first_bytes
        for gpu in self.order:
            split = ((gpu.id, layers),)
            if split in self.demand.known or needs_bytes <= self.rooms[gpu.id]:
                yield split
        for team in self.teams:
            if dealt := self._deal(team, offloaded, first_bytes).fewest():
                yield _split_of(dealt, team)
        if self.demand.known:
            yield from self._measured(layers)
            for team in self.teams:  # a split above may have been measured, and be larger than predicted
                yield from self._other_splits(team, offloaded, first_bytes)

    def _spread_over(self, team: Sequence[Gpu], offloaded: Sequence[int], first_bytes: int) -> Iterator[Amounts]:
        if self.demand.spread:
            deal = self._deal(team, offloaded, first_bytes)
            for size in range(len(team), 1, -1):
                if dealt := deal.proportional(size) or deal.first_fit(range(size)):
                    yield _split_of(dealt, team)

    def _other_splits(self, team: Sequence[Gpu], offloaded: Sequence[int], first_bytes: int) -> Iterator[Amounts]:
        deal = self._deal(team, offloaded, first_bytes)
        for size in range(2, len(team) + 1):
            for dealt in (deal.first_fit(range(size)), deal.proportional(size)):
                if dealt:
                    yield _split_of(dealt, team)

    def _deal(self, team: Sequence[Gpu], offloaded: Sequence[int], first_bytes: int) -> LayerSplitter:
        several = [(gpu.id, 0) for gpu in team[1:]]
        copies_bytes = self.demand.footprint.copies_bytes(((team[0].id, len(offloaded)), *several))
        return LayerSplitter(offloaded, first_bytes, [self.rooms[gpu.id] - copies_bytes for gpu in team])

    def _measured(self, layers: int) -> Iterator[Amounts]:
        """Yield the measured splits over several GPUs: their bytes may be fewer than predicted."""
        for split in sorted(self.demand.known, key=lambda split: (len(split), split)):
            gpus = {gpu for gpu, _ in split}
            together = any(gpus <= {gpu.id for gpu in team} for team in self.teams)
            if len(split) > 1 and together and sum(count for _, count in split) == layers:
                yield split


def _teams(order: Sequence[Gpu]) -> list[list[Gpu]]:
    """Return the teams of GPUs that a model may be split over: two or more discrete GPUs of one library, no instances.

    llama.cpp leaves integrated GPUs out where there is a discrete GPU, and several integrated GPUs share one memory.
    """
    teams: dict[str, list[Gpu]] = {}
    for gpu in order:
        if not gpu.instance and gpu.memory != HOST:
            teams.setdefault(gpu.library, []).append(gpu)
    return [team for team in teams.values() if len(team) > 1]


def _split_of(dealt: Sequence[tuple[int, int]], team: Sequence[Gpu]) -> Amounts:
    return tuple((team[place].id, layers) for place, layers in dealt)


def _room(free_bytes: int) -> int:
    """Return the most bytes that fit into `free_bytes` with the headroom of a prediction, as `needed` rounds it."""
    over, under = (1 + PREDICTED_HEADROOM).as_integer_ratio()
    return (under * (free_bytes + 1) - 1) // over


def _lacking(placement: Placement, free: Free, *, exact: bool = False) -> set[DeviceId]:
    return {device for device, amount in needed(placement, exact=exact) if amount > free.get(device, 0)}


def _within(placement: Placement, free: Free, *, exact: bool = False) -> Placement | None:
    return None if _lacking(placement, free, exact=exact) else placement


def _by_memory(amounts: Mapping[DeviceId, int], gpus: Sequence[Gpu]) -> Amounts:
    """Return amounts by the memory that they are taken from: an integrated GPU's are the host's."""
    memory = {gpu.id: gpu.memory for gpu in gpus}
    found: dict[DeviceId, int] = {}
    for device, amount in amounts.items():
        where = memory.get(device, device)
        found[where] = found.get(where, 0) + amount
    return tuple(found.items())


def _layout(demand: PlacementDemand, split: Amounts, gpus: Sequence[Gpu]) -> Placement:
    """Return the placement of a split: with its measured bytes by device where it was measured, else predicted ones."""
    if (measured := demand.known.get(split)) is not None:
        return Placement(measured, split, measured=True)
    amounts = {device: part.total_bytes for device, part in bytes_by_device(demand.footprint, split).items()}
    return Placement(_by_memory(amounts, gpus), split)
