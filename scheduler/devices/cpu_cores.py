"""The number of the machine's cores that this program may keep busy."""

from __future__ import annotations

import os
from functools import cache

import psutil

from scheduler.devices.cgroups import cgroup_processors


def usable_cores() -> int:
    """Return how many physical cores this process may keep busy: affinity and a container's quota count.

    Two threads of one core share its arithmetic units, and a thread with less than a whole core would be stopped in the
    middle of each wait: so neither hardware threads nor parts of cores count.
    """
    cores = _physical_cores()
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    if (quota := cgroup_processors()) is not None:
        cores = min(cores, int(quota))
    return max(1, cores)


@cache  # on a large machine the system takes milliseconds to answer
def _physical_cores() -> int:
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


__all__ = ["usable_cores"]
