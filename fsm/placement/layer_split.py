"""The layer split: how consecutive layers are dealt to as few GPUs as possible, in any order of the GPUs.

GPUs have an order of preference. The first few GPUs in that order are tried first, each with as many layers as it
takes, which is the best split in a given order. Where they do not take all layers, other GPUs or another order may:
with layers or GPUs of unequal size the order of the GPUs matters. So every set of GPUs is tried then, each in the order
in which it takes most layers, which is exact for up to eight GPUs of different room and bounded for more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

MOST_SETS = 70  # sets of GPUs of one size that are tried: eight GPUs have no more


class LayerSplitter:
    """Layers to be dealt to GPUs that have `rooms` bytes for them, the preferred GPU first.

    The first GPU that has layers takes `first_bytes` besides. Answers are (GPU, layers) in the order of the layers, a
    GPU being its index in `rooms`; each GPU has at least one layer.
    """

    def __init__(self, layers_bytes: Sequence[int], first_bytes: int, rooms: Sequence[int]) -> None:
        self._ends = list(accumulate(layers_bytes, initial=0))  # bytes of the first 0, 1, 2, … layers
        self._first_bytes = first_bytes
        self._rooms = rooms
        self._count = len(layers_bytes)

    def fewest(self) -> list[tuple[int, int]]:
        """Return a split of all layers over as few GPUs as possible; empty where all GPUs together do not take them."""
        least = self._least()
        for size in range(least, len(self._rooms) + 1):
            if dealt := self.first_fit(range(size)):
                return dealt if size == least else self.best_over_subsets(size - 1) or dealt
        return self.best_over_subsets(len(self._rooms)) if least <= len(self._rooms) else []

    def first_fit(self, order: Sequence[int]) -> list[tuple[int, int]]:
        """Return a split over GPUs in this order, each with as many layers as it takes; empty where layers are left."""
        dealt: list[tuple[int, int]] = []
        at = 0
        for gpu in order:
            end = self._reach(at, gpu)
            if end > at:
                dealt.append((gpu, end - at))
            at = end
            if at == self._count:
                return dealt
        return []

    def proportional(self, size: int) -> list[tuple[int, int]]:
        """Return a split over the first `size` GPUs, by their shares of the room; empty where layers are left."""
        rooms = self._rooms[:size]
        total_bytes = self._ends[-1] + self._first_bytes
        part = min(1.0, total_bytes / max(1, sum(rooms)))
        dealt: list[tuple[int, int]] = []
        at = 0
        for place in range(size):
            end = self._reach(at, place, part if place < size - 1 else 1.0)
            if end > at:
                dealt.append((place, end - at))
            at = end
        return dealt if at == self._count else []

    def _reach(self, at: int, gpu: int, part: float = 1.0) -> int:
        """Return the index behind the last layer of a GPU whose layers begin at index `at`."""
        room = self._rooms[gpu] - (0 if at else self._first_bytes)
        share = room if part == 1.0 else int(room * part)
        return at if share < 0 else max(at, bisect_right(self._ends, self._ends[at] + share) - 1)

    def _least(self) -> int:
        """Return the least number of GPUs that have enough room together; one more than there are where none do."""
        missing = self._ends[-1] + self._first_bytes
        for size, room in enumerate(sorted(self._rooms, reverse=True), 1):
            missing -= max(0, room)
            if missing <= 0:
                return size
        return len(self._rooms) + 1

    def best_over_subsets(self, most: int) -> list[tuple[int, int]]:
        """Return a split of all layers over at most `most` GPUs, in any order; empty where there is none.

        For each set of GPUs only the order counts in which it takes most layers: the GPUs that follow take no fewer.
        """
        reached: dict[frozenset[int], tuple[int, tuple[int, ...]]] = {frozenset(): (0, ())}
        for _ in range(most):
            larger: dict[frozenset[int], tuple[int, tuple[int, ...]]] = {}
            for chosen, (at, order) in reached.items():
                rooms: set[int] = set()  # of two GPUs with the same room the preferred one will do
                for gpu, room in enumerate(self._rooms):
                    if gpu in chosen or room in rooms:
                        continue
                    rooms.add(room)
                    end, together = self._reach(at, gpu), chosen | {gpu}
                    if end > at and end > larger.get(together, (0, ()))[0]:
                        larger[together] = end, (*order, gpu)
            whole = [(sorted(chosen), order) for chosen, (end, order) in larger.items() if end == self._count]
            if whole:
                return self.first_fit(min(whole)[1])
            kept = sorted(larger.items(), key=lambda item: (-item[1][0], sorted(item[0])))[:MOST_SETS]
            reached = dict(kept)
        return []
