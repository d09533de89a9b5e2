"""The availability profile by which request groups are planned: memory and process slots at each horizon."""

from __future__ import annotations

from collections import deque

from fsm.domain.devices import HOST, DeviceId, DeviceSample, Placement
from fsm.domain.options import Options
from fsm.machine.request import ModelId, RequestId
from fsm.machine.runner import Runner, RunnerId
from fsm.placement.search import Gpu, Offload, PlacementDemand
from fsm.planning.availability import (
    AFTER_DRAINS,
    AFTER_EVICTIONS,
    AFTER_STOPS,
    HORIZONS,
    NOW,
    AvailabilityProfile,
    Requirement,
)
from fsm.sizing.footprint import Footprint
from fsm.state.memory_ledger import Ledger
from tests.support.pool import amount

GPUS = (DeviceId("gpu0"), DeviceId("gpu1"))
MODEL = ModelId("a")


def a_supply(host: int = 100, gpus: tuple[int, ...] = (), places: int = 9, held: int = 0) -> AvailabilityProfile:
    """Return a profile of so many bytes, of which one runner with one process holds `held` bytes of the host."""
    sizes = [(HOST, "cpu", host), *((id, "gpu", size) for id, size in zip(GPUS, gpus, strict=False))]
    ledger = Ledger({id: DeviceSample(id, kind, id, size, size) for id, kind, size in sizes})
    if held:
        ledger.reserve(("runner", 1), ((HOST, held),))
    return AvailabilityProfile(
        ledger, [Gpu(id, id) for id, kind, _ in sizes if kind == "gpu"], places, [runner(held)] if held else []
    )


def runner(held: int) -> Runner:
    return Runner(RunnerId(1), MODEL, Options(), Placement(((HOST, held),)), 0.0, 0.0)


def of_host(size: int, *, process: bool = True) -> Requirement:
    """Return the requirement of a request that names so many bytes of the host."""
    return Requirement(PlacementDemand(Footprint(fixed=((HOST, size),))), Offload.none, process)


def host(supply: AvailabilityProfile) -> list[int]:
    """Return the free bytes of the host's memory, by horizon."""
    return [there[HOST] for there in supply.bytes]


def test_what_a_runner_holds_is_there_from_its_horizon_on() -> None:
    """The memory and the process slot of a runner count from the horizon at which the runner has gone."""
    supply = a_supply(100, places=2, held=30)
    assert (host(supply), supply.potential[HOST]) == ([70, 70, 70, 70], 100)
    supply.add(AFTER_DRAINS, [runner(30)])
    assert (host(supply), supply.process_slots) == ([70, 70, 100, 100], [2, 2, 3, 3])
    assert supply.left_to_next(runner(30)) == {HOST: 30}
    assert supply.left_to_next(None) == {}


def test_what_is_booked_is_missing_from_then_on_and_is_the_most_that_is_left_before() -> None:
    """A reservation at a horizon reduces it and later ones, and caps earlier ones at what is left at that horizon."""
    supply = a_supply(100, places=2, held=30)
    supply.add(AFTER_STOPS, [runner(30)])
    supply.reserve(AFTER_STOPS, ((HOST, 80),), 1)
    assert (host(supply), supply.process_slots) == ([20, 20, 20, 20], [2, 2, 2, 2])
    supply.reserve(AFTER_EVICTIONS, ((HOST, 25),), 2)
    assert (host(supply), supply.process_slots) == ([-5, -5, -5, -5], [0, 0, 0, 0])


def test_what_is_taken_now_is_missing_at_every_horizon() -> None:
    """A reservation at the first horizon reduces the availability at every horizon."""
    supply = a_supply(100, held=30)
    supply.add(AFTER_EVICTIONS, [runner(30)])
    supply.reserve(NOW, ((HOST, 50),), 1)
    assert (host(supply), supply.process_slots) == ([20, 20, 20, 50], [8, 8, 8, 9])


def test_somebody_goes_where_there_is_room_first() -> None:
    """The earliest fit is the first horizon with enough bytes and process slots, or the last one if none has."""
    supply = a_supply(100, places=0, held=30)
    supply.add(AFTER_DRAINS, [runner(30)])
    assert supply.earliest_fit(of_host(60, process=False)) == (Placement(((HOST, 60),)), AFTER_STOPS)
    assert supply.earliest_fit(of_host(60)) == (Placement(((HOST, 60),)), AFTER_DRAINS)
    assert supply.earliest_fit(of_host(60), AFTER_EVICTIONS) == (Placement(((HOST, 60),)), AFTER_EVICTIONS)
    supply.reserve(AFTER_EVICTIONS, ((HOST, 90),), 0)
    assert supply.earliest_fit(of_host(60)) == (Placement(((HOST, 60),)), AFTER_EVICTIONS)


def test_the_next_runner_of_a_model_takes_what_the_one_before_it_leaves_and_the_rest() -> None:
    """The next runner of a model reserves only what it needs beyond its predecessor, and no process slot of its own."""
    supply = a_supply(100)
    supply.reserve(NOW, ((HOST, 40),), 1)
    supply.reserved_by_model[MODEL] = {HOST: 40}
    left = []
    for size in (50, 30, 55):
        supply.reserve_successor(MODEL, of_host(size))
        left.append(supply.bytes[AFTER_EVICTIONS][HOST])
    assert (left, supply.reserved_by_model[MODEL]) == ([50, 50, 45], {HOST: 55})
    assert (host(supply), supply.process_slots) == ([45] * 4, [8] * 4)


def test_the_next_runner_of_a_model_goes_where_the_one_before_it_was() -> None:
    """The memory that a runner leaves on a GPU is counted there for the next runner of its model."""
    supply = a_supply(1000, (70, 60))
    supply.reserve(NOW, ((GPUS[0], 40),), 1)
    supply.reserved_by_model[MODEL] = {GPUS[0]: 40}
    layers = Requirement(PlacementDemand(Footprint((20, 20), (0, 0), 10, 0, 0)), Offload.whole)  # 62 with the headroom
    supply.reserve_successor(MODEL, layers)
    assert (supply.bytes[AFTER_EVICTIONS][GPUS[0]], supply.bytes[AFTER_EVICTIONS][GPUS[1]]) == (70 - 62, 60)
    assert supply.reserved_by_model[MODEL][GPUS[0]] == 62


def test_what_one_model_holds_elsewhere_is_not_forgotten_where_the_next_goes() -> None:
    """A model's reservation on another GPU stays in the profile when its next runner goes elsewhere."""
    supply = a_supply(1000, (150, 60))
    supply.reserved_by_model[MODEL] = {GPUS[1]: 40}
    supply.reserve_successor(MODEL, Requirement(PlacementDemand(Footprint((20, 20), (0, 0), 10, 0, 0)), Offload.whole))
    assert supply.reserved_by_model[MODEL][GPUS[1]] == 40


def test_who_is_not_first_in_a_line_has_a_booking_once_it_is_their_turn() -> None:
    """Queued members of request groups get their reservations in the order of the queue, and none before its turn."""
    supply = a_supply(100)
    supply.queued_members = [
        (of_host(10, process=False), deque([(1.0, 1)])), (of_host(20, process=False), deque([(3.0, 3)]))
    ]  # fmt: skip
    supply.reserve_earlier((2.0, 2))
    assert (host(supply), [len(members) for _, members in supply.queued_members]) == ([90] * 4, [0, 1])
    supply.reserve_earlier((4.0, 4))
    assert (host(supply), any(members for _, members in supply.queued_members)) == ([70] * 4, False)
    assert supply.process_slots == [9] * 4


def test_u66_many_equal_reservations_are_made_at_once_at_the_horizons_where_each_fits_first() -> None:
    """Of four requests that wait, two fit once stopped runners have gone, one after drains, and one after that."""
    supply = a_supply(0)
    for horizon, left in zip(HORIZONS, (0, 25, 35, 35), strict=True):
        supply.bytes[horizon][HOST] = left
    supply.queued_members = [(of_host(10, process=False), deque((float(one), RequestId(one)) for one in range(5)))]
    supply.reserve_earlier((4.0, 4))
    assert host(supply) == [-5, -5, -5, -5]
    assert len(supply.queued_members[0][1]) == 1


def test_somebody_lacks_memory_where_they_may_go() -> None:
    """A declared requirement names its devices, and a requirement on the host alone names no GPU."""
    supply = a_supply(100, (50, 50))
    demand = PlacementDemand(Footprint((amount("1GiB"),), (0,)))
    assert supply.memories(of_host(10)) == [HOST]
    assert supply.memories(Requirement(demand, Offload.none)) == [HOST]
    assert supply.memories(Requirement(demand, Offload.partial)) == [HOST, *GPUS]
