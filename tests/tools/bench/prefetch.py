"""What prefetching is worth: a model waits for memory that another holds, and its file is not in the page cache.

Each turn holds the memory for a while and then releases it; the seconds from the release to the first token count. The
turns are: nothing of the file cached and nothing prefetched; nothing cached, and prefetched; all of the file cached.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scheduler import PythonModel, Scheduler, Settings
from tests.support.written_models import Design, write_model
from tests.tools.bench.cold import model_path

ROUNDS = 5
HOLD_S = 2.0
LIMIT = "4GiB"
BUSY = PythonModel("busy", load=object, memory={"cpu": "4090MiB"})
MESSAGES = [{"role": "user", "content": "a"}]
# As many bytes as a small model in use today, with little to compute for a token.
LARGE = Design(
    "llama", layers=8, width=2048, heads=16, heads_kv=16, head_size=128, feed_forward=8192, vocabulary=512,
    context=2048, quantisation="F16",
)  # fmt: skip
TURNS: Mapping[str, tuple[bool, bool]] = {  # whether the file is cached, and whether it is prefetched
    "on the disk": (False, False), "read ahead": (False, True), "cached": (True, False),
}  # fmt: skip


def forget(path: Path) -> None:
    """Drop a file that no process has mapped from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_token_s(scheduler: Scheduler, path: Path, *, cached: bool) -> float:
    """Return the seconds from the release of the memory to the first token of the waiting request."""
    lease = scheduler.acquire(BUSY)
    if cached:
        path.read_bytes()
    else:
        forget(path)
    waiting = scheduler.submit(str(path), keep_alive=0, num_ctx=512, num_parallel=1)
    time.sleep(HOLD_S)
    begin = time.monotonic()
    lease.release()
    with waiting.result() as granted, granted.stream(MESSAGES, max_tokens=1) as pieces:
        next(pieces, None)  # a model of random weights may answer nothing
        taken = time.monotonic() - begin
    while any(runner.model != BUSY.name for runner in scheduler.status().runners):
        time.sleep(0.01)
    return taken


def compare(path: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the seconds of every turn and the ratios of their medians, and print them."""
    taken: dict[str, list[float]] = {turn: [] for turn in TURNS}
    ahead = []
    with (
        Scheduler(
            Settings(memory_limit=LIMIT, gpus=False, cpu_threads=1, measurement_file=None, prefetch=True)
        ) as reads,
        Scheduler(
            Settings(memory_limit=LIMIT, gpus=False, cpu_threads=1, measurement_file=None, prefetch=False)
        ) as waits,
    ):
        for scheduler in (reads, waits):
            first_token_s(scheduler, path, cached=True)  # all modules are imported, for both
        for _ in range(rounds):
            before = reads.debug_state().read_ahead_bytes
            for turn, (cached, prefetch) in TURNS.items():
                taken[turn].append(first_token_s(reads if prefetch else waits, path, cached=cached))
            ahead.append(reads.debug_state().read_ahead_bytes - before)
    size = path.stat().st_size
    medians = {turn: statistics.median(seconds) for turn, seconds in taken.items()}
    ratio = medians["read ahead"] / medians["on the disk"]
    print(
        f"to the first token of {size / 2**20:.0f} MiB that waited {HOLD_S:g} s for memory, "
        f"median of {rounds} in turns: "
        + ", ".join(f"{turn} {medians[turn]:.3f} s ({min(each):.3f}–{max(each):.3f})" for turn, each in taken.items())
        + f"; read ahead ÷ on the disk {ratio:.2f}, cached ÷ on the disk "
        f"{medians['cached'] / medians['on the disk']:.2f}; {statistics.median(ahead) / size:.0%} was read ahead"
    )
    return {"file_bytes": size, "seconds": taken, "read_ahead_bytes": ahead, "ratio": round(ratio, 3)}


def run() -> dict[str, Any]:
    """Return the figures of a small file and of a large one."""
    with TemporaryDirectory() as folder:
        small = Path(folder) / "small.gguf"  # a copy that no other program has mapped
        shutil.copyfile(model_path(), small)
        large = write_model(Path(folder) / "large.gguf", LARGE)
        return {"small": compare(small), "large": compare(large)}
