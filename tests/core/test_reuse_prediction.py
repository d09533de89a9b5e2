"""How soon a model is expected to be asked for again, and what of that the core keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import pytest

from fsm.core import Core
from fsm.eviction.policies import Candidate, ExpectedReloadCost
from fsm.eviction.reuse_prediction import BINS, LONG_S, IdleTimeStatistics, bin_of, count_interval
from scheduler.recording.codec import decode_state, encode
from tests.support.pool import PoolUnderTest, a_pool, acquire, exited, expire, preload, release


def asked_within(outlooks: Iterable[tuple[float, float]], seconds: float) -> float:
    """Return the probability of the longest stay in which less than `seconds` are rested."""
    return max((asked for asked, rest_s in outlooks if rest_s <= seconds), default=0.0)


def histogram(*rests_s: float) -> dict[int, int]:
    found: dict[int, int] = {}
    for rest_s in rests_s:
        count_interval(rest_s, found, {})
    return found


# -- statistics -------------------------------------------------------------------------------------------------------


def test_bins_are_half_octaves() -> None:
    """Each begins at 2^(n/2) seconds; what is shorter or longer is in the first or the last."""
    for place in range(BINS):
        edge_s = 2.0 ** (place / 2)
        assert bin_of(edge_s * 1.0001) == place
        assert bin_of(edge_s * 1.4) == place
    assert (bin_of(0.0), bin_of(0.5), bin_of(1e12)) == (0, 0, BINS - 1)


def test_a_rest_counts_for_its_model_and_for_all() -> None:
    """One that is shorter than a second tells nothing of when a model may go."""
    own: dict[int, int] = {}
    common = {bin_of(10.0): 3}
    for rest_s in (10.0, 0.9, 10.0):
        count_interval(rest_s, own, common)
    assert (own, common) == ({bin_of(10.0): 2}, {bin_of(10.0): 5})


def test_an_outlook_grows_with_the_stay() -> None:
    """Staying longer, it is asked for more probably and rests longer."""
    outlooks = IdleTimeStatistics(histogram(3.0, 30.0, 300.0, 3000.0)).forecast(histogram(5.0, 50.0), 4.0)
    for (asked, rest_s), (more_asked, more_rest_s) in pairwise(outlooks):
        assert 0.0 <= asked <= more_asked <= 1.0
        assert 0.0 < rest_s < more_rest_s


def test_who_came_back_every_minute_is_expected_within_the_next() -> None:
    """A model's own rests decide, where it has shown enough."""
    common = histogram(*[60.0] * 50, *[3600.0] * 50)
    often, seldom = histogram(*[60.0] * 50), histogram(*[3600.0] * 50)
    experience = IdleTimeStatistics(common)
    assert asked_within(experience.forecast(often, 40.0), 120.0) > 0.9
    assert asked_within(experience.forecast(seldom, 40.0), 120.0) < 0.1


def test_who_has_rested_longer_than_ever_before_is_expected_less() -> None:
    """A pause within a session is over soon or never: an hour after the last of many short ones, it will stay away."""
    own = histogram(*[20.0] * 100)
    experience = IdleTimeStatistics(histogram(*[20.0] * 400, *[20000.0] * 20))
    soon = asked_within(experience.forecast(own, 10.0), 60.0)
    late = asked_within(experience.forecast(own, 3600.0), 60.0)
    assert soon > 0.9 > 0.1 > late


def test_of_the_unknown_what_all_have_done_is_expected() -> None:
    """A model that was never asked for twice is like the others."""
    experience = IdleTimeStatistics(histogram(*[60.0] * 100))
    assert asked_within(experience.forecast({}, 50.0), 100.0) > 0.5


def test_of_two_that_have_rested_long_the_one_that_comes_back_oftener_is_expected_sooner() -> None:
    """Beyond a pause the number of returns counts, although neither has rested just as long before."""
    common = histogram(*[2 * LONG_S] * 20, *[8 * LONG_S] * 20, *[40 * LONG_S] * 20)
    experience = IdleTimeStatistics(common)
    often, seldom = histogram(*[2 * LONG_S] * 20), histogram(40 * LONG_S)
    rest_s = 10 * LONG_S
    assert asked_within(experience.forecast(often, rest_s), rest_s) > asked_within(
        experience.forecast(seldom, rest_s), rest_s
    )


@pytest.mark.parametrize("rest_s", [0.0, 1.0, 1e4, 1e9, math.inf])
def test_nothing_known_is_no_error(rest_s: float) -> None:
    """At the beginning, or after any rest, there is an outlook, or none; never a failure."""
    for asked, stay_s in IdleTimeStatistics({}).forecast({}, min(rest_s, 1e300)):
        assert 0.0 <= asked <= 1.0
        assert stay_s > 0.0


# -- what the core notes ----------------------------------------------------------------------------------------------


def rests(pool: PoolUnderTest, model: str) -> dict[int, int]:
    return pool.core._state.models[model].idle_intervals


def test_a_warm_request_ends_a_rest() -> None:
    """The rest lasts from the last release to the next request for a lease."""
    pool = a_pool().ready("a", lease=1)
    pool.advance("100s")
    pool.feed(release(1))
    pool.advance("30s")
    pool.feed(acquire("a", request=2), acquire("a", request=3))  # the second finds it in use
    assert rests(pool, "a") == {bin_of(30.0): 1} == pool.core._state.idle_intervals


def test_a_cold_request_ends_a_rest_that_its_last_runner_began() -> None:
    """Having been given up meanwhile does not make it shorter; others who ask while it loads end none."""
    pool = a_pool().idle("a")
    pool.advance("10s")
    pool.feed(expire("a"), exited(1))
    pool.advance("90s")
    pool.feed(acquire("a", request=2))
    pool.advance("0.5s")
    pool.feed(acquire("a", request=3))
    assert rests(pool, "a") == {bin_of(100.0): 1}


def test_a_rest_begins_when_a_runner_that_was_given_up_in_use_is_given_back() -> None:
    """It was used to the end of its last lease."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(expire("a"))
    pool.advance("600s")
    pool.feed(release(1), exited(1))
    pool.advance("1s")
    pool.feed(acquire("a", request=2))
    assert rests(pool, "a") == {bin_of(1.0): 1}


def test_a_first_request_ends_no_rest() -> None:
    """There was nothing before it."""
    pool = a_pool().idle("a")
    assert rests(pool, "a") == {}


def test_a_preload_ends_no_rest() -> None:
    """Somebody expects the model to be asked for; that is not being asked for."""
    pool = a_pool().idle("a")
    pool.advance("10s")
    pool.feed(preload("a", request=2))
    assert rests(pool, "a") == {}


def test_what_was_noted_is_copied_and_recorded() -> None:
    """A copy goes on by itself; a recording begins with all of it."""
    pool = a_pool().idle("a")
    pool.advance("50s")
    pool.feed(acquire("a", request=2))
    twin = pool.core.copy()
    again = Core.restore(decode_state(encode(pool.core.checkpoint())))
    pool.feed(release(2))
    pool.advance("50s")
    pool.feed(acquire("a", request=3))
    for core in (twin, again):
        assert core._state.idle_intervals == core._state.models["a"].idle_intervals == {bin_of(50.0): 1}
    assert rests(pool, "a") == {bin_of(50.0): 2}


# -- what giving a runner up costs ------------------------------------------------------------------------------------


def a_candidate(model: str, held_bytes: int, load_s: float | None, *outlooks: tuple[float, float]) -> Candidate:
    return Candidate(1, model, held_bytes, 300.0, 0.0, load_s, 0, 0.0, lambda: outlooks)


def costs(*candidates: Candidate) -> dict[str, float | None]:
    return {one.model: one.cost_s for one in ExpectedReloadCost().order(0.0, candidates)}


# Their rates are 10 x 0.5 / 5 = 1, 6 x 0.1 / 10 = 0.06 and 2 x 0.2 / 4 = 0.1 seconds of loading a second.
OFTEN, SELDOM, CHEAP = ((0.5, 5.0), (0.8, 20.0)), ((0.1, 10.0), (0.5, 100.0)), ((0.2, 4.0),)


def costs_of_three(a_bytes: int, b_bytes: int, c_bytes: int) -> dict[str, float | None]:
    """Return what they cost who come often, seldom, and often but cheap."""
    return costs(
        a_candidate("a", a_bytes, 10.0, *OFTEN),
        a_candidate("b", b_bytes, 6.0, *SELDOM),
        a_candidate("c", c_bytes, 2.0, *CHEAP),
    )


def test_a_cost_is_what_staying_is_worth_and_a_part_of_the_rate() -> None:
    """The rarest holds just the priced part: a byte costs half of 0.06 / 35 a second."""
    found = costs_of_three(40, 35, 25)
    price = 0.5 * 0.06 / 35
    assert found == {
        "a": pytest.approx(10 * 0.8 - price * 40 * 20 + 10 * 1.0),
        "b": pytest.approx(6 * 0.1 - price * 35 * 10 + 10 * 0.06),
        "c": pytest.approx(2 * 0.2 - price * 25 * 4 + 10 * 0.1),
    }
    assert list(found) == ["b", "c", "a"], "the cheapest first"


def test_the_price_is_of_as_many_as_hold_the_part_together() -> None:
    """Here two: what both save, by what both hold."""
    found = costs_of_three(55, 20, 25)
    price = 0.5 * (0.06 + 0.1) / (20 + 25)
    assert found["a"] == pytest.approx(10 * 0.8 - price * 55 * 20 + 10 * 1.0)
    assert found["c"] == pytest.approx(2 * 0.2 - price * 25 * 4 + 10 * 0.1)


def test_a_byte_alone_has_the_whole_price() -> None:
    """A runner that holds next to nothing, or nothing, has a cost as well."""
    price = 0.5 * 1.0
    assert costs(a_candidate("a", 1, 10.0, *OFTEN)) == {"a": pytest.approx(10 * 0.5 - price * 5 + 10 * 1.0)}
    assert costs(a_candidate("a", 0, 10.0, *OFTEN)) == {"a": pytest.approx(10 * 0.8 + 10 * 1.0)}


def test_what_is_not_worth_its_memory_costs_its_rate_alone() -> None:
    """Never less than nothing; a load that nobody waits for, and what is never asked for, cost nothing."""
    found = costs(a_candidate("often", 1, 10.0, *OFTEN), a_candidate("large", 10**6, 6.0, (0.1, 10.0), (0.11, 1000.0)))
    assert found["large"] == pytest.approx(6 * 0.1 - 0.5 * 0.06 * 10 + 10 * 0.06)
    assert costs(a_candidate("loading", 5, None, *OFTEN)) == {"loading": 0.0}
    assert costs(a_candidate("never", 5, 10.0)) == {"never": 0.0}
