"""No request waits for longer than can be explained; and the simulation that compares orders of waiting."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsm.state.core_config import CoreConfig
from tests.tools.waiting_simulation import OURS, SHORT_S, WARM_FIRST, ratios, row_of, simulate
from tests.tools.waiting_world import CASES, ORDERS, Arrival, Case, Machine, Order, Outcome, draw_traffic

MANY = 10**6  # slots: no request waits inside an engine, so the wait for a grant is measured
PARALLEL, _, SERIAL = CASES


def longest_s(waits_s: list[list[float]]) -> float:
    return max((wait for model in waits_s for wait in model), default=0.0)


def explained_s(case: Case, order: Order, traffic: list[Arrival]) -> float:
    """Return how long a request may wait: the bound, and one turn for each model, with a reload's own end.

    The request groups before a request's own are of other models, and each is served once: later requests for them are
    younger. A turn is a load that has its residency, and then drains and stops. The bounds of all run at the same time.
    """
    limits, load_s = order.limits, max(case.loads_s)
    residency_s = max(limits.residency_s(load_s))
    drain_s = max(arrival.service_s for arrival in traffic)
    return limits.max_wait_s + len(case.loads_s) * (load_s + residency_s + drain_s + case.stop_s)


seconds = st.floats(0.0, 20.0)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Case, Order, list[Arrival]]:
    """Draw models, places, limits and traffic; most of the requests overlap others."""
    models = draw(st.integers(2, 5))
    loads_s = tuple(draw(st.lists(seconds, min_size=models, max_size=models)))
    case = Case("drawn", MANY, 0.0, loads_s, draw(st.floats(0.0, 5.0)), 0.0, places=draw(st.integers(1, 3)))
    limits = CoreConfig(
        max_wait_s=draw(st.sampled_from((1.0, 20.0, 120.0))),
        min_residency_s=draw(st.sampled_from((None, 0.0, 15.0))),
        max_runners=models,
    )
    gaps_and_requests = st.lists(
        st.tuples(st.floats(0.0, 8.0), st.integers(0, models - 1), seconds), min_size=1, max_size=60
    )
    drawn = draw(gaps_and_requests)
    times = accumulate(gap for gap, _, _ in drawn)
    traffic = [Arrival(at, model, hold_s) for at, (_, model, hold_s) in zip(times, drawn, strict=True)]
    return case, Order("drawn", limits), traffic


@given(worlds())
def test_nobody_waits_longer_than_the_bound_and_what_turns_explain(world: tuple[Case, Order, list[Arrival]]) -> None:
    """Under any traffic a wait is at most the bound, and for each model a load, a residency, a drain and a stop."""
    case, order, traffic = world
    outcome = Machine(case, order, traffic).run()
    assert longest_s(outcome.waits_s) <= explained_s(case, order, traffic) + 1e-6
    assert outcome.useless == 0


def test_without_the_bound_a_wait_is_not_explained() -> None:
    """Without the bound a wait is longer: requests that overlap for ever starve another one."""
    case = Case("overlapping", MANY, 0.0, (5.0, 5.0), 1.0, 0.0)
    traffic = [Arrival(at, 0, 2.0) for at in range(600)]
    traffic.insert(10, Arrival(9.5, 1, 2.0))
    explained = explained_s(case, ORDERS[OURS], traffic)
    assert longest_s(Machine(case, ORDERS[WARM_FIRST], traffic).run().waits_s) > 2 * explained
    assert longest_s(Machine(case, ORDERS[OURS], traffic).run().waits_s) <= explained


# -- the comparison ---------------------------------------------------------------------------------------------------


def test_a_seed_can_be_run_again() -> None:
    """A run with the same arguments has the same waits."""
    first, again = (simulate(SERIAL, 0.9, OURS, 3, SHORT_S) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("load", [0.6, 1.2])
def test_the_load_is_what_it_is_said_to_be(case: str, load: float) -> None:
    """The load is the answer seconds per second of a slot, without swaps."""
    traffic = draw_traffic(CASES[case], load, 1, SHORT_S)
    assert sum(arrival.service_s for arrival in traffic) == pytest.approx(load * CASES[case].slots * SHORT_S)
    assert max(arrival.at for arrival in traffic) < SHORT_S


def test_in_strict_order_answers_begin_in_the_order_of_the_requests() -> None:
    """In strict order answers begin in the order of the requests, whatever is loaded."""
    traffic = draw_traffic(CASES[SERIAL], 0.9, 1, SHORT_S)
    machine = Machine(CASES[SERIAL], ORDERS["strict order"], traffic)
    machine.run()
    assert machine.begun == sorted(machine.begun)


def test_warm_requests_overtake_cold_ones_in_any_other_order() -> None:
    """In the other orders warm requests overtake cold ones."""
    traffic = draw_traffic(CASES[SERIAL], 0.9, 1, SHORT_S)
    machine = Machine(CASES[SERIAL], ORDERS[WARM_FIRST], traffic)
    machine.run()
    assert machine.begun != sorted(machine.begun)


def test_no_slot_answers_two_at_once() -> None:
    """With one slot an answer begins when the one before it has ended, and never during a swap."""
    traffic = draw_traffic(CASES[SERIAL], 1.2, 1, SHORT_S)
    machine = Machine(CASES[SERIAL], ORDERS[OURS], traffic)
    outcome = machine.run()
    spans = sorted((begun, begun + one.service_s) for begun, one in zip(machine.begun, traffic, strict=True))
    assert all(end <= begin + 1e-6 for (_, end), (begin, _) in pairwise(spans))
    assert spans[-1][1] >= sum(one.service_s for one in traffic) + outcome.swapping_s - CASES[SERIAL].stop_s


@pytest.mark.slow
def test_where_warm_clients_overlap_the_bound_pays() -> None:
    """On one seed the mean is within 1.3 times that of warm first, and the longest wait at most half of it."""
    of = {order: [simulate(PARALLEL, 0.9, order, 1, 3600.0)] for order in (OURS, WARM_FIRST)}
    rows = {order: row_of(PARALLEL, 0.9, order, outcomes, 3600.0) for order, outcomes in of.items()}
    mean, most = ratios(rows[OURS], rows[WARM_FIRST])
    assert mean <= 1.3 and most <= 0.5


def test_a_livelock_is_told() -> None:
    """A livelock is reported, as of strict order with long loads, or without a residency."""
    case = replace(CASES[SERIAL], loads_s=(20.0, 20.0, 20.0))
    traffic = draw_traffic(case, 0.9, 1, SHORT_S)
    assert Machine(case, ORDERS["strict order"], traffic).run().livelocked
    assert not Machine(case, ORDERS[OURS], traffic).run().livelocked
    assert Outcome([], 1, 1.0, math.inf, 1).livelocked
