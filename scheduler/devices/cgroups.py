"""The limits of a process's control groups on the host's memory and on its processors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 1 << 60  # version 1 says "no limit" with the largest number of pages that is possible


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """The tightest memory limit of a process: the bytes that it may use in all, and the bytes that are still free."""

    limit_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class _Files:
    """The names of a group's files, which differ by version."""

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]  # in memory.stat: pages of files


# Above memory.high the kernel does not refuse memory, but slows a process down until it frees as much: a model that is
# loaded beyond it is of no use. What version 1 calls a soft limit holds only while the whole machine is short of
# memory.
_MEMORY = {
    1: _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: _Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
}


def cgroup_memory(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> CgroupMemory | None:
    """Return the memory limit of this process's control groups, versions 1 and 2, or None if there is none.

    Every group from the process's own up to `root` is read, since each may set a limit. A group's free bytes are its
    limit less its usage. Pages of files count as free, as they do in the machine's own figure, because the kernel frees
    them before it refuses memory: without this a container that has read one large file would look full. The ledger
    takes off the pages that runners have mapped. Swap is never counted, neither as a limit nor as room.
    """
    tightest: CgroupMemory | None = None
    for folder, version in _groups(root, membership, "memory"):
        files = _MEMORY[version]
        limits = [limit for name in files.limits if (limit := _read_number(folder / name)) is not None]
        limit = min(limits, default=_NO_LIMIT)
        usage = _read_number(folder / files.usage)
        if limit >= _NO_LIMIT or usage is None:
            continue
        free = min(limit, max(0, limit - usage + _read_statistics(folder / "memory.stat", files.cache)))
        if tightest is None:
            tightest = CgroupMemory(limit, free)
        else:
            tightest = CgroupMemory(min(tightest.limit_bytes, limit), min(tightest.free_bytes, free))
    return tightest


def cgroup_processors(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float | None:
    """Return how many processors this process's control groups let it keep busy, or None if there is no limit."""
    tightest: float | None = None
    for folder, version in _groups(root, membership, "cpu"):
        if version == 1:
            quota, period = (_read_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        else:
            quota, period = _read_pair(folder / "cpu.max")
        if quota is not None and period and quota > 0:  # version 1 says "no limit" with -1
            tightest = min(tightest or math.inf, quota / period)
    return tightest


def _groups(root: Path, membership: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Yield every group's folder and its version, the process's own first."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, separator, group = rest.partition(":")
        if not separator:
            continue
        if controllers == "":
            top, version = root, 2
        elif controller in controllers.split(","):
            top, version = root / controller, 1
        else:
            continue
        # In a container the path may be the host's, of which only the top is mounted here: folders that are missing are
        # skipped.
        folder = top / group.lstrip("/")
        while True:
            yield folder, version
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent


def _read_number(path: Path) -> int | None:
    """Return the number in a file, or None where there is no file, or no limit ("max")."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _read_pair(path: Path) -> tuple[int | None, int | None]:
    """Return the two numbers in a file; None and None where there is no file, or no limit ("max")."""
    try:
        first, second = path.read_text().split()
        return int(first), int(second)
    except (OSError, ValueError):
        return None, None


def _read_statistics(path: Path, names: tuple[str, ...]) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(tuple(f"{name} " for name in names)))


__all__ = ["CgroupMemory", "cgroup_memory", "cgroup_processors"]
