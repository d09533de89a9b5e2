"""Where GPUs are known from: NVIDIA's driver, AMD's, and the list of an engine that can use others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from scheduler.devices.amdgpu import AmdGpus
from scheduler.devices.gpus import Listed, Reading, joined, without_list
from scheduler.devices.nvml import Nvml


class EngineList(Protocol):
    """The GPUs that an engine lists; one thread at a time reads it."""

    def want(self) -> None:
        """Note that the next reading should have figures of that moment; any thread may call this."""

    def read(self, *, figures: bool) -> tuple[tuple[Listed, ...] | None, bool]:
        """Return the entries, None where the engine tells none, and whether they were told for this reading.

        `figures` tells whether the entries' figures matter, since no driver has them.
        """


class GpuSources:
    """Reads all sources, and joins what they tell; to be used by one thread at a time."""

    def __init__(
        self,
        environment: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
        *,
        integrated: bool = False,
    ) -> None:
        self._nvml = Nvml(environment, clock)
        self._amd = AmdGpus(clock=clock)
        self._integrated = integrated  # whether integrated GPUs count through any library
        self.engine: EngineList | None = None  # None: no engine has a list
        self._figures = False  # whether a GPU of the last reading has its figures from the list alone

    def read(self) -> Reading:
        """Return every GPU once."""
        nvml, amd = self._nvml.read(), self._amd.read()
        known = (*nvml.gpus, *amd)
        entries, fresh = (None, False) if self.engine is None else self.engine.read(figures=self._figures)
        if entries is None:
            return replace(nvml, gpus=without_list(known))
        covers = nvml.covers | {gpu.vendor for gpu in amd}
        found = joined(known, entries, covers, integrated=self._integrated, fresh=fresh)
        self._figures = not {gpu.id for gpu in found.gpus} <= {gpu.id for gpu in known}
        return Reading(found.gpus, (*nvml.problems, *found.problems))

    def close(self) -> None:
        """Shut the drivers' libraries down; a later `read` is allowed."""
        self._nvml.close()


__all__ = ["EngineList", "GpuSources"]
