"""The search for a placement: whole on GPUs, in part, or on the host, within given free bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from fsm.domain.devices import HOST, MIB, Amounts, DeviceId, Placement
from fsm.placement.layer_split import LayerSplitter
from fsm.sizing.footprint import Footprint, bytes_by_device

# Over a prediction, as in the reference; others leave before a runner starts with less. What cannot be made free is
# wanted by no placement: on a device that others do not use, a small margin suffices.
PREDICTED_HEADROOM = 0.25
MEASURED_HEADROOM = 0.03
MARGIN_PART = 20  # a twentieth of a prediction
GPU_MARGIN_BYTES = 512 * MIB  # at least, since libraries and the desktop take memory of a GPU too

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
    require_gpu: bool = False  # whole on GPUs or not at all
    shown: Mapping[DeviceId, float] = field(default_factory=dict)  # how much more than predicted runners took of GPUs
    most: Free = field(default_factory=dict)  # memory -> bytes that the runner may take of it: it ran out with more
    devices: frozenset[DeviceId] | None = None  # the GPUs that layers may go to; None: any
    libraries: tuple[str, ...] | None = None  # through which its engine can use GPUs; None: any
    excluded: frozenset[DeviceId] = frozenset()  # GPUs that none may go to
    least_layers: int = 1  # on GPUs, where a model goes in part and its request names no number

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
            return (Offload.whole, Offload.partial, Offload.none) if any(map(self.may_use, gpus)) else (Offload.none,)
        if self.num_gpu == 0:
            return (Offload.none,)
        return (Offload.whole,) if self.num_gpu >= self.layers else (Offload.partial,)

    @property
    def names_too_few_layers(self) -> bool:
        """Whether the request names fewer layers on GPUs than a setting, or the request itself, requires: all."""
        named = self.num_gpu is not None and 0 <= self.num_gpu < self.layers
        return self.require_gpu and named and not self.footprint.fixed

    def may_use(self, gpu: Gpu) -> bool:
        """Tell whether layers may go to a GPU."""
        if self.libraries is not None and gpu.library not in self.libraries:
            return False
        return gpu.id not in self.excluded and (self.devices is None or gpu.id in self.devices)

    @property
    def is_explicit(self) -> bool:
        """Whether the request says itself where the layers go."""
        return self.require_gpu or (self.num_gpu is not None and self.num_gpu >= 0)

    def least_bytes(self, device: DeviceId, amount: int) -> int:
        """Return the bytes that must be free for predicted ones, whatever can be made free.

        These bytes alone where the request says where the layers go. Else a margin over them, and over what they were
        with other splits if that was more.
        """
        if self.footprint.rough:
            return int(amount * (1 + PREDICTED_HEADROOM))
        if self.is_explicit or not amount:
            return amount
        expected = int(amount * self.shown.get(device, 1.0))
        return expected + max(expected // MARGIN_PART, GPU_MARGIN_BYTES if device != HOST else 0)

    def most_bytes(self, device: DeviceId, free_bytes: int) -> int:
        """Return the most bytes for which `least_bytes` are within `free_bytes`."""
        if self.footprint.rough:
            return _most_with_headroom(free_bytes)
        if self.is_explicit:
            return free_bytes
        parts, rest = divmod(free_bytes, MARGIN_PART + 1)
        most = MARGIN_PART * parts + min(rest, MARGIN_PART - 1)
        most = min(most, free_bytes - GPU_MARGIN_BYTES) if device != HOST else most
        return int(most / self.shown.get(device, 1.0))


def shown_parts(footprint: Footprint, known: Mapping[Amounts, Amounts]) -> dict[DeviceId, float]:
    """Return how much more than predicted runners took of each GPU, as a factor: the largest of all splits.

    `known` are bytes by device that were measured, by split. A small prediction says nothing of a large one. No factor
    is larger than the headroom of a prediction. The host's bytes are left out, since pages of files are among them, and
    so are those of an integrated GPU, which cannot be told from the host's.
    """
    shown: dict[DeviceId, float] = {}
    for split, measured in known.items():
        predicted = bytes_by_device(footprint, split)
        for device, amount in measured:
            expected = predicted[device].total_bytes if device in predicted and device != HOST else 0
            if expected > GPU_MARGIN_BYTES and amount > expected:
                shown[device] = max(shown.get(device, 1.0), min(amount / expected, 1 + PREDICTED_HEADROOM))
    return shown


def needed(demand: PlacementDemand, placement: Placement, potential: Free | None = None) -> Amounts:
    """Return the bytes by device that must be free for a placement.

    1. Of a model without layers, what it declares.
    2. Else its bytes and a headroom, where `potential` allows for that: the bytes by device that can be made free.
    3. Else all that can be made free, where its bytes and a margin fit.
    4. Else what the system cannot take back: its bytes without the pages of a mapped file, with headroom or margin.
    """
    if demand.footprint.fixed:  # 1
        return placement.bytes
    headroom = MEASURED_HEADROOM if placement.measured else PREDICTED_HEADROOM
    amounts = []
    for device, amount in placement.bytes:
        need = int(amount * (1 + headroom))  # 2
        there = need if potential is None else potential.get(device, 0)
        if need > there:
            need = there  # 3
            if _least(demand, placement, device, amount) > there:  # 4
                own = _without_pages(demand, placement, device, amount)
                least = _least(demand, placement, device, own)
                need = min(int(own * (1 + headroom)), max(least, there)) if own < amount else least
        amounts.append((device, need))
    return tuple(amounts)


def _least(demand: PlacementDemand, placement: Placement, device: DeviceId, amount: int) -> int:
    return amount if placement.measured else demand.least_bytes(device, amount)


def _without_pages(demand: PlacementDemand, placement: Placement, device: DeviceId, amount: int) -> int:
    """Return the part of a device's bytes that the system cannot take back; a measurement does not tell which it is."""
    pages = demand.footprint.mapped_bytes(placement.gpu_layers) if device == HOST else 0
    if not pages:
        return amount
    predicted = sum(
        part.total_bytes
        for memory, part in bytes_by_device(demand.footprint, placement.gpu_layers).items()
        if memory == HOST or memory not in dict(placement.bytes)  # an integrated GPU's bytes are the host's
    )
    return min(amount, max(amount, predicted) - pages)


def find_placement(
    demand: PlacementDemand, offload: Offload, free: Free, gpus: Sequence[Gpu], potential: Free | None = None
) -> Placement | None:
    """Return a placement that fits within `free`, with the headroom that `needed` says; None where there is none.

    As many layers as possible go to GPUs, the output first and then the last layers, as llama.cpp offloads them. They
    go to one GPU, the best that takes them (the explicit `main_gpu`, else a discrete GPU before an integrated one, else
    the GPU with most free bytes), or else to as few GPUs of one library as possible, or with `spread` to all of them.
    """
    if demand.footprint.fixed:
        return _within(demand, Placement(_by_memory(dict(demand.footprint.fixed), gpus)), free, None)
    if offload is Offload.none:
        return _within(demand, _layout(demand, (), gpus), free, potential)
    order = sorted(
        filter(demand.may_use, gpus),
        key=lambda gpu: (gpus.index(gpu) != demand.main_gpu, gpu.memory == HOST, -free.get(gpu.memory, 0), gpu.id),
    )
    table = SplitEnumerator(demand, free, order, potential)
    for layers in _layer_counts(demand, offload):
        for split in table.splits(layers):
            placement = _layout(demand, split, gpus)
            lacking = _lacking(demand, placement, free, potential)
            if not lacking:
                return _reserved(demand, placement, free)
            only_host = lacking == {HOST} and not demand.known and all(gpu.memory != HOST for gpu in gpus)
            if only_host and offload is Offload.partial:
                return None  # with fewer layers on GPUs the host would lack more
    return None


def _layer_counts(demand: PlacementDemand, offload: Offload) -> Sequence[int]:
    if offload is Offload.whole:
        return (demand.layers,)
    if demand.num_gpu is not None and demand.num_gpu > 0:
        return (demand.num_gpu,)
    return range(demand.layers - 1, demand.least_layers - 1, -1)


class SplitEnumerator:
    """The splits that are worth trying, by the number of layers on GPUs."""

    def __init__(self, demand: PlacementDemand, free: Free, order: Sequence[Gpu], potential: Free | None) -> None:
        self.demand = demand
        self.order = order
        self.layers_bytes = demand.footprint.offloaded_bytes
        self.rooms = {gpu.id: self._room(gpu, free, potential) - demand.footprint.compute_bytes for gpu in order}
        self.teams = _teams(order)

    def _room(self, gpu: Gpu, free: Free, potential: Free | None) -> int:
        """Return the most predicted bytes that fit on a GPU, its headroom included."""
        free_bytes = free.get(gpu.memory, 0)
        room = _most_with_headroom(free_bytes)
        if potential is not None and free_bytes >= potential.get(gpu.memory, 0):
            room = max(room, self.demand.most_bytes(gpu.memory, free_bytes))
        return min(room, self.demand.most.get(gpu.memory, room))

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


def _most_with_headroom(free_bytes: int) -> int:
    """Return the most bytes that fit into `free_bytes` with the headroom of a prediction, as `needed` rounds it."""
    over, under = (1 + PREDICTED_HEADROOM).as_integer_ratio()
    return (under * (free_bytes + 1) - 1) // over


def _lacking(demand: PlacementDemand, placement: Placement, free: Free, potential: Free | None) -> set[DeviceId]:
    amounts = needed(demand, placement, potential)  # no bytes are there even where a device is overdrawn
    lacking = {device for device, amount in amounts if amount > max(0, free.get(device, 0))}
    if demand.most:
        lacking |= {device for device, amount in placement.bytes if amount > demand.most.get(device, amount)}
    return lacking


def _within(demand: PlacementDemand, placement: Placement, free: Free, potential: Free | None) -> Placement | None:
    return None if _lacking(demand, placement, free, potential) else _reserved(demand, placement, free)


def _reserved(demand: PlacementDemand, placement: Placement, free: Free) -> Placement:
    """Return a placement that fits as it is reserved: without the pages of a mapped file where not all find room."""
    if all(amount <= free.get(device, 0) for device, amount in placement.bytes):
        return placement
    own = ((device, _without_pages(demand, placement, device, amount)) for device, amount in placement.bytes)
    return replace(placement, bytes=tuple(own), without_pages=True)


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
