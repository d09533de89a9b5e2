"""How many models load on each device, where no more may, and where the next one may."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fsm.domain.devices import HOST, DeviceId, Placement
from fsm.placement.search import Gpu, Offload, PlacementDemand, find_placement
from fsm.state.core_config import CoreConfig


def loads_on(placement: Placement) -> list[DeviceId]:
    """Return the devices whose places among the loads a placement takes: its GPUs, else the host."""
    return [device for device, amount in placement.bytes if device != HOST and amount] or [HOST]


class LoadSlots:
    """The loads by device: those under way, and those that are planned."""

    def __init__(self, limits: CoreConfig, placements: Iterable[Placement]) -> None:
        self.limits = limits
        self.counts: dict[DeviceId, int] = {}
        for placement in placements:
            self.add(placement)

    def add(self, placement: Placement) -> None:
        """Count one more."""
        for device in loads_on(placement):
            self.counts[device] = self.counts.get(device, 0) + 1

    def find_placement(
        self, demand: PlacementDemand, offload: Offload, free: Mapping[DeviceId, int], gpus: Sequence[Gpu]
    ) -> Placement | None:
        """Return where one more may begin: where it fits best, or else beside the GPUs on which as many load as may."""
        best = find_placement(demand, offload, free, gpus)
        if best is None or not (full := self.full(best)):
            return best
        if demand.spread or demand.main_gpu is not None:  # which names one of all of them
            return None
        other = find_placement(demand, offload, free, [gpu for gpu in gpus if gpu.id not in full])
        as_good = other is not None and not self.full(other) and other.offloaded >= best.offloaded
        return other if as_good else None

    def full(self, placement: Placement) -> set[DeviceId]:
        """Return the devices on which as many load as may, of those that it loads on."""
        limits = self.limits
        return {
            device
            for device in loads_on(placement)
            if self.counts.get(device, 0) >= (limits.max_host_loads if device == HOST else limits.max_loads_per_gpu)
        }
