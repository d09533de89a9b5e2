"""How soon a model is expected to be requested again, and the statistics that the core keeps for it."""

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
    """Return the probability of a request within the longest stay whose expected idle time is below `seconds`."""
    return max((asked for asked, rest_s in outlooks if rest_s <= seconds), default=0.0)


def histogram(*rests_s: float) -> dict[int, int]:
    found: dict[int, int] = {}
    for rest_s in rests_s:
        count_interval(rest_s, found, {})
    return found


# -- statistics -------------------------------------------------------------------------------------------------------


def test_bins_are_half_octaves() -> None:
    """Each bin begins at 2^(n/2) seconds, and shorter or longer idle times are in the first or the last bin."""
    for place in range(BINS):
        edge_s = 2.0 ** (place / 2)
        assert bin_of(edge_s * 1.0001) == place
        assert bin_of(edge_s * 1.4) == place
    assert (bin_of(0.0), bin_of(0.5), bin_of(1e12)) == (0, 0, BINS - 1)


def test_a_rest_counts_for_its_model_and_for_all() -> None:
    """An idle time counts for its model and for all models, unless it is shorter than a second."""
    own: dict[int, int] = {}
    common = {bin_of(10.0): 3}
    for rest_s in (10.0, 0.9, 10.0):
        count_interval(rest_s, own, common)
    assert (own, common) == ({bin_of(10.0): 2}, {bin_of(10.0): 5})


def test_an_outlook_grows_with_the_stay() -> None:
    """A longer stay has a higher probability of a request and a longer expected idle time."""
    outlooks = IdleTimeStatistics(histogram(3.0, 30.0, 300.0, 3000.0)).forecast(histogram(5.0, 50.0), 4.0)
    for (asked, rest_s), (more_asked, more_rest_s) in pairwise(outlooks):
        assert 0.0 <= asked <= more_asked <= 1.0
        assert 0.0 < rest_s < more_rest_s


def test_who_came_back_every_minute_is_expected_within_the_next() -> None:
    """The forecast of a model with enough idle times follows these."""
    common = histogram(*[60.0] * 50, *[3600.0] * 50)
    often, seldom = histogram(*[60.0] * 50), histogram(*[3600.0] * 50)
    experience = IdleTimeStatistics(common)
    assert asked_within(experience.forecast(often, 40.0), 120.0) > 0.9
    assert asked_within(experience.forecast(seldom, 40.0), 120.0) < 0.1


def test_who_has_rested_longer_than_ever_before_is_expected_less() -> None:
    """A model that is idle for longer than ever before is expected later than one within its usual idle time."""
    own = histogram(*[20.0] * 100)
    experience = IdleTimeStatistics(histogram(*[20.0] * 400, *[20000.0] * 20))
    soon = asked_within(experience.forecast(own, 10.0), 60.0)
    late = asked_within(experience.forecast(own, 3600.0), 60.0)
    assert soon > 0.9 > 0.1 > late


def test_of_the_unknown_what_all_have_done_is_expected() -> None:
    """The forecast of a model without idle times follows those of all models."""
    experience = IdleTimeStatistics(histogram(*[60.0] * 100))
    assert asked_within(experience.forecast({}, 50.0), 100.0) > 0.5


def test_of_two_that_have_rested_long_the_one_that_comes_back_oftener_is_expected_sooner() -> None:
    """Of two models with a long idle time, the one that was requested again more often is expected sooner."""
    common = histogram(*[2 * LONG_S] * 20, *[8 * LONG_S] * 20, *[40 * LONG_S] * 20)
    experience = IdleTimeStatistics(common)
    often, seldom = histogram(*[2 * LONG_S] * 20), histogram(40 * LONG_S)
    rest_s = 10 * LONG_S
    assert asked_within(experience.forecast(often, rest_s), rest_s) > asked_within(
        experience.forecast(seldom, rest_s), rest_s
    )


@pytest.mark.parametrize("rest_s", [0.0, 1.0, 1e4, 1e9, math.inf])
def test_nothing_known_is_no_error(rest_s: float) -> None:
    """Without any statistics a forecast is valid, and never an error."""
    for asked, stay_s in IdleTimeStatistics({}).forecast({}, min(rest_s, 1e300)):
        assert 0.0 <= asked <= 1.0
        assert stay_s > 0.0


# -- what the core counts ---------------------------------------------------------------------------------------------


def rests(pool: PoolUnderTest, model: str) -> dict[int, int]:
    return pool.core._state.models[model].idle_intervals


def test_a_warm_request_ends_a_rest() -> None:
    """An idle time lasts from the last release to the next request for a lease."""
    pool = a_pool().ready("a", lease=1)
    pool.advance("100s")
    pool.feed(release(1))
    pool.advance("30s")
    pool.feed(acquire("a", request=2), acquire("a", request=3))  # the second one finds the runner busy
    assert rests(pool, "a") == {bin_of(30.0): 1} == pool.core._state.idle_intervals


def test_a_cold_request_ends_a_rest_that_its_last_runner_began() -> None:
    """An idle time goes on after the runner was stopped, and a second request during the load ends none."""
    pool = a_pool().idle("a")
    pool.advance("10s")
    pool.feed(expire("a"), exited(1))
    pool.advance("90s")
    pool.feed(acquire("a", request=2))
    pool.advance("0.5s")
    pool.feed(acquire("a", request=3))
    assert rests(pool, "a") == {bin_of(100.0): 1}


def test_a_rest_begins_when_a_runner_that_was_given_up_in_use_is_given_back() -> None:
    """The idle time of a runner that was expired in use begins with its last release."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(expire("a"))
    pool.advance("600s")
    pool.feed(release(1), exited(1))
    pool.advance("1s")
    pool.feed(acquire("a", request=2))
    assert rests(pool, "a") == {bin_of(1.0): 1}


def test_a_first_request_ends_no_rest() -> None:
    """The first request of a model ends no idle time."""
    pool = a_pool().idle("a")
    assert rests(pool, "a") == {}


def test_a_preload_ends_no_rest() -> None:
    """A preload ends no idle time."""
    pool = a_pool().idle("a")
    pool.advance("10s")
    pool.feed(preload("a", request=2))
    assert rests(pool, "a") == {}


def test_what_was_noted_is_copied_and_recorded() -> None:
    """A copy of the core has its own statistics, and a recorded state has all of them."""
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


# -- what evicting a runner costs -------------------------------------------------------------------------------------


def a_candidate(model: str, held_bytes: int, load_s: float | None, *outlooks: tuple[float, float]) -> Candidate:
    return Candidate(1, model, held_bytes, 300.0, 0.0, load_s, 0, 0.0, lambda: outlooks)


def costs(*candidates: Candidate) -> dict[str, float | None]:
    return {one.model: one.cost_s for one in ExpectedReloadCost().order(0.0, candidates)}


# Their rates are 10 x 0.5 / 5 = 1, 6 x 0.1 / 10 = 0.06 and 2 x 0.2 / 4 = 0.1 seconds of loading a second.
OFTEN, SELDOM, CHEAP = ((0.5, 5.0), (0.8, 20.0)), ((0.1, 10.0), (0.5, 100.0)), ((0.2, 4.0),)


def costs_of_three(a_bytes: int, b_bytes: int, c_bytes: int) -> dict[str, float | None]:
    """Return the costs of a model used often, one used seldom, and one used often that loads fast."""
    return costs(
        a_candidate("a", a_bytes, 10.0, *OFTEN),
        a_candidate("b", b_bytes, 6.0, *SELDOM),
        a_candidate("c", c_bytes, 2.0, *CHEAP),
    )


def test_a_cost_is_what_staying_is_worth_and_a_part_of_the_rate() -> None:
    """The price of a byte is half the load rate by bytes of the models that fill the priced part."""
    found = costs_of_three(40, 35, 25)
    price = 0.5 * 0.06 / 35
    assert found == {
        "a": pytest.approx(10 * 0.8 - price * 40 * 20 + 10 * 1.0),
        "b": pytest.approx(6 * 0.1 - price * 35 * 10 + 10 * 0.06),
        "c": pytest.approx(2 * 0.2 - price * 25 * 4 + 10 * 0.1),
    }
    assert list(found) == ["b", "c", "a"], "the order begins with the cheapest"


def test_the_price_is_of_as_many_as_hold_the_part_together() -> None:
    """The price of a byte comes from as many models as together fill the priced part."""
    found = costs_of_three(55, 20, 25)
    price = 0.5 * (0.06 + 0.1) / (20 + 25)
    assert found["a"] == pytest.approx(10 * 0.8 - price * 55 * 20 + 10 * 1.0)
    assert found["c"] == pytest.approx(2 * 0.2 - price * 25 * 4 + 10 * 0.1)


def test_a_byte_alone_has_the_whole_price() -> None:
    """A runner that holds one byte or none has a cost as well."""
    price = 0.5 * 1.0
    assert costs(a_candidate("a", 1, 10.0, *OFTEN)) == {"a": pytest.approx(10 * 0.5 - price * 5 + 10 * 1.0)}
    assert costs(a_candidate("a", 0, 10.0, *OFTEN)) == {"a": pytest.approx(10 * 0.8 + 10 * 1.0)}


def test_what_is_not_worth_its_memory_costs_its_rate_alone() -> None:
    """A cost is at least the model's rate, and 0 for a load without requests or a model never requested."""
    found = costs(a_candidate("often", 1, 10.0, *OFTEN), a_candidate("large", 10**6, 6.0, (0.1, 10.0), (0.11, 1000.0)))
    assert found["large"] == pytest.approx(6 * 0.1 - 0.5 * 0.06 * 10 + 10 * 0.06)
    assert costs(a_candidate("loading", 5, None, *OFTEN)) == {"loading": 0.0}
    assert costs(a_candidate("never", 5, 10.0)) == {"never": 0.0}
