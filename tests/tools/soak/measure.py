"""The measurements of a soak: waits in a bounded number of buckets, and the program's own memory."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psutil

_FINE = 4  # bits below the highest one that a bucket tells apart, so that its width is 1/16 of its value
MOST_GROWTH = 0.10  # of resident memory and of allocated blocks, from the first rest to the last one,
LEAST_GROWTH_BYTES = 24 * 2**20  # but so many bytes are always allowed,
LEAST_GROWTH_BLOCKS = 40_000  # and so many blocks


class Waits:
    """How long many million waits took, in a few kilobytes."""

    def __init__(self) -> None:
        self.counts = [0] * (64 << _FINE)

    def add(self, wait_ns: int) -> None:
        """Note one wait."""
        shift = max(0, wait_ns.bit_length() - 1 - _FINE)
        self.counts[(shift << _FINE) + (wait_ns >> shift)] += 1

    def percentile_us(self, percent: float) -> float:
        """Return what `percent` of the waits do not exceed, rounded up to the end of its bucket."""
        wanted = sum(self.counts) * percent / 100
        for place, count in enumerate(self.counts):
            wanted -= count
            if count and wanted <= 0:
                shift = max(0, (place >> _FINE) - 1)
                return ((place - (shift << _FINE) + 1) << shift) / 1000
        return 0.0

    @classmethod
    def of(cls, several: Iterable[Waits]) -> Waits:
        """Return several `Waits` as one."""
        every = cls()
        every.counts = [sum(counts) for counts in zip(*(waits.counts for waits in several), strict=True)]
        return every


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory that the program holds while nothing is under way."""

    resident_bytes: int
    blocks: int  # allocated by Python, of any size

    def growth(self, later: Memory) -> dict[str, Any]:
        """Return by how much the memory has grown since, and whether that is too much."""
        resident, blocks = later.resident_bytes - self.resident_bytes, later.blocks - self.blocks
        most_resident = max(LEAST_GROWTH_BYTES, MOST_GROWTH * self.resident_bytes)
        most_blocks = max(LEAST_GROWTH_BLOCKS, MOST_GROWTH * self.blocks)
        return {
            "resident_bytes_first": self.resident_bytes,
            "resident_bytes_last": later.resident_bytes,
            "resident_bytes_allowed": int(most_resident),
            "blocks_first": self.blocks,
            "blocks_last": later.blocks,
            "blocks_allowed": int(most_blocks),
            "grown": resident > most_resident or blocks > most_blocks,
        }


def memory() -> Memory:
    """Return what is held now, after a collection."""
    gc.collect()
    return Memory(psutil.Process().memory_info().rss, sys.getallocatedblocks())
