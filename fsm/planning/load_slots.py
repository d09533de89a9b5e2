"""Load slots: how many models load on each device, and where the next load may begin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fsm.domain.devices import HOST, DeviceId, Placement
from fsm.placement.search import Free, Gpu, Offload, PlacementDemand, find_placement
from fsm.state.core_config import CoreConfig


def loads_on(placement: Placement) -> list[DeviceId]:
    """Return the devices on which a placement takes a load slot: its GPUs, or the host where it has none.

    An integrated GPU has the host's memory, and so the host's load slots.
    """
    return [device for device, amount in placement.bytes if device != HOST and amount] or [HOST]


class LoadSlots:
    """The number of loads by device: the loads under way, and the planned ones."""

    def __init__(self, limits: CoreConfig, placements: Iterable[Placement]) -> None:
        self.limits = limits
        self.counts: dict[DeviceId, int] = {}
        for placement in placements:
            self.add(placement)

    def add(self, placement: Placement) -> None:
        """Take the load slots of a placement."""
        for device in loads_on(placement):
            self.counts[device] = self.counts.get(device, 0) + 1

    def find_placement(
        self, demand: PlacementDemand, offload: Offload, free: Free, gpus: Sequence[Gpu], potential: Free | None
    ) -> Placement | None:
        """Return where one more load may begin: its best placement, or else the best on GPUs that have a load slot.

        None where it does not fit, or where it would have to wait for a load slot. The other placement is taken only if
        it has as many layers on GPUs.
        """
        best = find_placement(demand, offload, free, gpus, potential)
        if best is None or not self.full(best):
            return best
        if demand.spread or demand.main_gpu is not None:  # the demand refers to all GPUs, or to an index among them
            return None
        others = [gpu for gpu in gpus if not self._is_full(gpu.id)]
        other = find_placement(demand, offload, free, others, potential)
        as_good = other is not None and not self.full(other) and other.offloaded >= best.offloaded
        return other if as_good else None

    def full(self, placement: Placement) -> set[DeviceId]:
        """Return the devices of a placement that have no load slot left."""
        return set(filter(self._is_full, loads_on(placement)))

    def _is_full(self, device: DeviceId) -> bool:
        limit = self.limits.max_host_loads if device == HOST else self.limits.max_loads_per_gpu
        return self.counts.get(device, 0) >= limit
