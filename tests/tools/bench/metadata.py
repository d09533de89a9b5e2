"""Reading a model's metadata, beside the gguf package's own reader: one real file, in one run."""

from __future__ import annotations

import statistics
import time
from typing import Any

import gguf

from scheduler.models.gguf_header import forget_headers, read_header
from scheduler.models.gguf_metadata import read_metadata
from tests.tools.bench.cold import model_path
from tests.tools.bench.measure import microseconds

ROUNDS = 15
PACKAGE_ROUNDS = 2
LEAST_RATIO = 100  # what the documentation promises


def cold_s(path: str) -> float:
    """Return the seconds of the best of several reads of a file whose header is not in memory."""
    taken = []
    read_metadata(path)  # all modules are imported, for both
    for _ in range(ROUNDS):
        forget_headers()
        begin = time.perf_counter()
        read_metadata(path)
        taken.append(time.perf_counter() - begin)
    return min(taken)


def package_s(path: str) -> float:
    """Return the seconds of the better of two reads by the package."""
    taken = []
    for _ in range(PACKAGE_ROUNDS):
        begin = time.perf_counter()
        gguf.GGUFReader(path)
        taken.append(time.perf_counter() - begin)
    return min(taken)


def run() -> dict[str, Any]:
    """Return the times and their ratio, and print them."""
    path = str(model_path())
    cold, package = cold_s(path), package_s(path)
    warm = statistics.median(microseconds(lambda: read_metadata(path), 200)) / 1e6
    tokens = read_header(path).lengths["tokenizer.ggml.tokens"]
    print(
        f"metadata of a file with {tokens:,} tokens: gguf.GGUFReader {package:.2f} s, here {cold * 1000:.1f} ms "
        f"({package / cold:.0f} times as fast; at least {LEAST_RATIO} is promised), "
        f"and {warm * 1000:.2f} ms when it has not changed"
    )
    assert package / cold >= LEAST_RATIO, "reading metadata has become too slow"
    return {
        "tokens": tokens,
        "package_s": round(package, 4),
        "cold_s": round(cold, 6),
        "warm_s": round(warm, 6),
        "ratio": round(package / cold, 1),
    }
