"""Every placement of a small model, found by trying them all; the code shares nothing with the code that it checks.

Layers are units in llama.cpp's order, the output last. The offloaded layers are the last ones; they go to GPUs in
consecutive ranges, in any order of any GPUs that a model may be split over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations

from fsm.domain.devices import HOST, DeviceId
from fsm.placement.search import Gpu
from fsm.sizing.footprint import Footprint


@dataclass(frozen=True)
class Way:
    """One placement of a model."""

    split: tuple[tuple[str, int], ...]  # layers by GPU
    takes: Mapping[str, int]  # bytes by memory

    @property
    def layers(self) -> int:
        return sum(layers for _, layers in self.split)


def ways(footprint: Footprint, gpus: Sequence[Gpu], free: Mapping[str, int], *, alone: bool = False) -> list[Way]:
    """Return all placements that fit into `free` with a quarter over; `alone`: or with a margin, as nothing else is."""
    units = len(footprint.weights_bytes) + 1
    found = [Way((), takes_of(footprint, (), gpus))]
    for group in groups(gpus):
        for layers in range(len(group), units + 1):
            for ranges in cut(layers, len(group)):
                split = tuple((gpu.id, size) for gpu, size in zip(group, ranges, strict=True))
                found.append(Way(split, takes_of(footprint, split, gpus)))
    return [way for way in found if fits(way, free, alone=alone)]


def fits(way: Way, free: Mapping[str, int], *, alone: bool = False) -> bool:
    """Return whether a prediction takes at most four fifths of each memory, rounded in its favour.

    With `alone`, a margin of a twentieth will do, and of half a GiB at least on a GPU.
    """
    for memory, amount in way.takes.items():
        margin = max(amount // 20, 2**29 if memory != HOST else 0)
        if min(5 * amount // 4, amount + margin if alone else 2**70) > free.get(memory, 0):
            return False
    return True


def groups(gpus: Sequence[Gpu]) -> Iterator[tuple[Gpu, ...]]:
    """Yield what one process can compute on: one GPU, or several discrete GPUs of one library, in every order."""
    for gpu in gpus:
        yield (gpu,)
    for size in range(2, len(gpus) + 1):
        for group in permutations(gpus, size):
            alike = len({gpu.library for gpu in group}) == 1
            if alike and not any(gpu.instance or gpu.memory == HOST for gpu in group):
                yield group


def cut(layers: int, pieces: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to cut so many layers into so many ranges, none of them empty."""
    for ends in combinations(range(1, layers), pieces - 1):
        edges = (0, *ends, layers)
        yield tuple(after - before for before, after in pairwise(edges))


def takes_of(footprint: Footprint, split: Sequence[tuple[DeviceId, int]], gpus: Sequence[Gpu]) -> dict[DeviceId, int]:
    """Return the bytes of each memory, added up kind by kind."""
    blocks = len(footprint.weights_bytes)
    memory = {gpu.id: gpu.memory for gpu in gpus}
    home: list[DeviceId] = [HOST] * (blocks + 1)  # where each layer is, the output last
    place = blocks + 1 - sum(layers for _, layers in split)
    for gpu, layers in split:
        home[place : place + layers] = [gpu] * layers
        place += layers
    takes = dict.fromkeys((HOST, *(memory[gpu] for gpu, _ in split)), 0)
    for layer in range(blocks):
        takes[memory.get(home[layer], HOST)] += footprint.weights_bytes[layer] + footprint.caches_bytes[layer]
    takes[memory.get(home[blocks], HOST)] += footprint.output_bytes
    if split:
        takes[memory[home[blocks]]] += footprint.output_copy_bytes
        takes[memory[split[0][0]]] += footprint.projectors_bytes
        takes[memory[split[0][0]]] += footprint.step_bytes if home[0] == HOST and blocks else 0
        for gpu, _ in split:
            takes[memory[gpu]] += footprint.compute_bytes
    else:
        takes[HOST] += footprint.projectors_bytes + footprint.repacked_bytes
    if HOST in home:
        takes[HOST] += footprint.compute_bytes
    else:
        takes[HOST] += footprint.inputs_bytes
        if len(split) > 1:  # passes overlap
            for device in (HOST, *(memory[gpu] for gpu, _ in split)):
                takes[device] += 3 * footprint.inputs_bytes
    takes[HOST] += footprint.input_bytes + footprint.process_bytes + footprint.prompt_cache_bytes
    takes[HOST] += footprint.checkpoints_bytes
    return takes
