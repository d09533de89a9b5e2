"""Measurements replace predictions: when, by how much, and which request gets the memory."""

from __future__ import annotations

import pytest

from fsm.domain.devices import HOST, DeviceId, DeviceSample
from fsm.domain.options import Options
from fsm.machine.runner import RunnerState
from fsm.messages.commands import Grant
from fsm.messages.decision_log import Decision, DecisionReason, Entry
from fsm.messages.events import Loaded, Sampled
from fsm.messages.reasons import Measured
from fsm.messages.refusals import DoesNotFitRefusal
from fsm.sizing.load_history import MOST_KINDS
from fsm.state.memory_ledger import Account, Ledger
from fsm.state.model_record import MOST_DEMANDS
from fsm.state.snapshot import RunnerView
from tests.support.models import a_model
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    cancel,
    exited,
    expire,
    filled,
    launched,
    layered,
    loaded,
    pin,
    release,
    stopped,
)

GPU = "gpu0"
GIB = amount("1GiB")


def seen(pool: PoolUnderTest, runner: int, **sizes: str) -> None:
    """Set what a runner's process occupies, and read the devices."""
    pool.occupied[runner] = {DeviceId(device): amount(size) for device, size in sizes.items()}
    pool.feed(pool.sample())


def view(pool: PoolUnderTest, model: str = "a") -> RunnerView:
    return next(one for one in pool.core.snapshot().runners if one.model == model)


def held(pool: PoolUnderTest, device: str = HOST) -> int:
    return pool.core._state.ledger.held_bytes(device)


def a_small_runner(**how: object) -> PoolUnderTest:
    """Return a pool of 8 GiB with a leased runner that was predicted to take 6 GiB and takes 4; the lease is 1."""
    pool = a_pool(**how).loading("a", request=1)
    pool.feed(Loaded(1, None, ((HOST, 4 * GIB),)))
    return pool


# -- when a reservation is lowered ------------------------------------------------------------------------------------


def test_n14_a_runner_that_takes_less_keeps_what_was_predicted_until_a_context_is_full() -> None:
    """N14: until its first full context a runner that takes less keeps its predicted reservation."""
    pool = a_small_runner()
    pool.advance("1h")
    assert (held(pool), view(pool).settled) == (6 * GIB, False)


def test_n14_what_was_measured_counts_once_a_context_was_filled() -> None:
    """N14: after a full context the reservation is the peak that was seen."""
    pool = a_small_runner()
    assert pool.feed(filled(1)) == []
    assert (held(pool), pool.free(), view(pool).settled) == (4 * GIB, 4 * GIB, True)


def test_n14_the_peak_counts_and_not_what_it_takes_at_the_moment() -> None:
    """N14: the peak counts, and not what the runner takes at the moment."""
    pool = a_small_runner()
    seen(pool, 1, cpu="3GiB")
    pool.feed(filled(1))
    assert (held(pool), pool.free()) == (4 * GIB, 4 * GIB)


def test_n14_what_is_still_to_come_is_kept_beside_the_peak() -> None:
    """N14: bytes still to come are kept beside the peak, up to what was predicted."""
    pool = a_small_runner()
    pool.feed(filled(1, cpu="1GiB"))
    assert held(pool) == 5 * GIB
    seen(pool, 1, cpu="5GiB")
    assert held(pool) == 5 * GIB
    pool = a_small_runner()
    pool.feed(filled(1, cpu="3GiB"))
    assert held(pool) == 6 * GIB


def test_n14_a_settled_runner_that_grows_all_the_same_counts_as_it_is_seen() -> None:
    """N14: a settled runner that grows all the same is counted by what is measured."""
    pool = a_small_runner()
    pool.feed(filled(1))
    seen(pool, 1, cpu="7GiB")
    assert held(pool) == 7 * GIB


def test_n14_more_than_was_predicted_counts_at_once() -> None:
    """N14: a runner that takes more than predicted is counted by what is measured, before any context is full."""
    pool = a_pool().ready("a", lease=1)
    seen(pool, 1, cpu="7GiB")
    assert (held(pool), view(pool).settled) == (7 * GIB, False)


def test_n14_each_device_is_lowered_by_what_was_measured_there() -> None:
    """N14: each device is lowered by its own measurement, and a device without one keeps its prediction."""
    pool = a_pool("64GiB", gpus=("8GiB",)).declare("a", layered(4, "1GiB", host="2GiB")).ready("a", lease=1)
    pool.feed(Sampled(pool.sample().devices, ((1, ((HOST, GIB),)),)))
    account = pool.core._state.ledger.accounts["runner", 1]
    account.peak = {HOST: GIB}  # the driver has reported nothing of the GPU
    pool.feed(filled(1))
    assert (held(pool), held(pool, GPU)) == (GIB, 4 * GIB)


def test_n14_a_device_that_is_measured_late_is_lowered_when_it_is() -> None:
    """N14: a device that is measured after the full context is lowered then."""
    account = Account({HOST: 10, GPU: 10}, loaded=True)
    account.measure({HOST: 5})
    account.observe_peak({})
    assert (account.held_bytes(HOST), account.held_bytes(GPU)) == (5, 10)
    account.measure({GPU: 6})
    assert account.held_bytes(GPU) == 6


def test_n14_a_load_has_filled_nothing() -> None:
    """N14: a filled context of a load or of an unknown runner is late."""
    pool = a_pool().loading("a", request=1)
    pool.feed(filled(1), filled(7))
    assert (pool.core.late, held(pool)) == (2, 6 * GIB)


def test_n14_a_context_is_filled_once() -> None:
    """N14: a second full context of a runner is late."""
    pool = a_small_runner()
    pool.feed(filled(1), filled(1))
    assert pool.core.late == 1


def test_n14_a_draining_runner_settles_too() -> None:
    """N14: a draining runner settles too, and a waiting request gets the memory at once."""
    pool = a_small_runner().declare("b", "4GiB")
    pool.feed(expire("a"), acquire("b", request=2))
    assert (pool.state("a"), pool.waiting()) == (RunnerState.expiring, [2])
    assert launched(pool.feed(filled(1))) == ["b"]


# -- which request gets the memory ------------------------------------------------------------------------------------


def test_n14_the_room_that_is_freed_goes_to_those_who_wait() -> None:
    """N14: memory that a full context frees goes to a waiting request without an eviction."""
    pool = a_small_runner().declare("b", "4GiB")
    assert launched(pool.feed(acquire("b", request=2))) == []
    assert launched(pool.feed(filled(1))) == ["b"]
    assert pool.feed(loaded(2)) == [Grant(2, 2)]
    assert pool.stops == set()


def test_n14_no_more_is_expected_of_a_victim_than_it_really_holds() -> None:
    """N14: a settled victim counts for what it holds, and not for what was predicted."""
    pool = a_small_runner(capacity="12GiB").idle("b").declare("c", "7GiB")
    pool.feed(filled(1), release(1), pin("b"), acquire("c", request=2))
    assert isinstance(pool.refusal(2), DoesNotFitRefusal)
    assert dict(pool.refusal(2).available) == {HOST: 6 * GIB}
    assert pool.stops == set()


def test_n14_what_was_measured_on_the_devices_own_reading_is_free_for_others() -> None:
    """N14: where other programs hold memory, what a settled runner did not take of its reservation becomes free."""
    pool = a_small_runner(capacity="16GiB")
    pool.strangers = {HOST: 6 * GIB}
    pool.feed(pool.sample())
    assert pool.free() == 4 * GIB
    pool.feed(filled(1))
    assert pool.free() == 6 * GIB


def test_promises_stay_within_the_capacity_after_one_was_lowered() -> None:
    """Later growth of a settled runner shows as an overdrawn device, because its memory was given away."""
    pool = a_small_runner().declare("b", "4GiB")
    pool.feed(filled(1))
    pool.ready("b", lease=2)
    seen(pool, 1, cpu="5GiB")
    assert pool.free() == -GIB


# -- what is remembered -----------------------------------------------------------------------------------------------


def lived(took: int, *, settles: bool) -> tuple[PoolUnderTest, int]:
    """Return a pool with a runner of "a" that takes so much less than predicted, and the prediction."""
    pool = a_pool("8GiB").declare("a", a_model()).loading("a", request=1)
    predicted = dict(pool.launches[1].placement.bytes)[HOST]
    pool.feed(Loaded(1, None, ((HOST, predicted - took),)))
    if settles:
        pool.feed(filled(1))
    return pool, predicted


def next_launch(pool: PoolUnderTest) -> dict[str, int]:
    pool.feed(release(1), expire("a"), exited(1))
    pool.loading("a", request=2)
    return dict(pool.launches[2].placement.bytes)


def test_n14_what_a_settled_runner_took_is_what_the_next_is_promised() -> None:
    """N14: the next runner of a model is reserved what a settled one took."""
    pool, predicted = lived(5, settles=True)
    assert next_launch(pool) == {HOST: predicted - 5}
    assert pool.launches[2].placement.measured


def test_n14_what_a_runner_took_that_never_filled_a_context_is_not_all_it_may_take() -> None:
    """N14: what a runner took that never filled a context does not lower the next reservation."""
    pool, predicted = lived(5, settles=False)
    assert next_launch(pool) == {HOST: predicted}


def test_n14_a_life_without_a_full_context_does_not_spoil_what_an_earlier_one_has_shown() -> None:
    """N14: a runner without a full context leaves an earlier measurement as it is."""
    pool, predicted = lived(5, settles=True)
    next_launch(pool)
    pool.feed(Loaded(2, None, ((HOST, predicted - 50),)), release(2), expire("a"), exited(2))
    pool.loading("a", request=3)
    assert dict(pool.launches[3].placement.bytes) == {HOST: predicted - 5}


def test_n14_the_figures_are_known_as_soon_as_a_context_was_filled() -> None:
    """N14: a measurement is used as soon as a context was filled, while its runner still drains."""
    pool, predicted = lived(5, settles=True)
    pool.feed(expire("a"))
    pool.loading("a", request=2)
    assert dict(pool.launches[2].placement.bytes) == {HOST: predicted - 5}


def test_n14_what_was_measured_of_an_older_file_is_not_remembered_for_the_new_one() -> None:
    """N14: a runner of a replaced file leaves no measurement for the new file."""
    pool, _ = lived(5, settles=False)
    other = a_model(layers_bytes=(3 * 2**20,) * 2)
    pool.declare("a", other).feed(acquire("a", request=2, num_thread=3))
    pool.feed(filled(1), release(1), exited(1))
    assert not pool.launches[2].placement.measured
    pool.feed(loaded(2), release(2), acquire("a", request=3, num_ctx=1024), exited(2))
    assert pool.core._state.models["a"].measured.keys() == {(pool.launches[2].options, ())}


# -- page cache -------------------------------------------------------------------------------------------------------


def test_n14_mapped_weights_are_not_free_though_the_host_says_so() -> None:
    """N14: mapped weights are not free, though the host says so, as they would be read again for each token."""
    pool = a_pool("16GiB")
    pool.strangers = {HOST: 6 * GIB}
    pool.ready("a", lease=1)
    pool.mapped[1] = 4 * GIB
    pool.feed(pool.sample())
    assert pool.core.snapshot().devices[0].reported_free_bytes == 8 * GIB
    assert pool.free() == 4 * GIB


def test_n14_private_and_shared_memory_are_told_apart() -> None:
    """N14: mapped bytes are shown apart from resident bytes, as of the last reading."""
    pool = a_pool("16GiB").ready("a", lease=1)
    pool.mapped[1] = 4 * GIB
    pool.feed(pool.sample())
    assert (view(pool).resident, view(pool).mapped_bytes) == (((HOST, 6 * GIB),), 4 * GIB)
    pool.mapped.clear()
    pool.feed(pool.sample())
    assert view(pool).mapped_bytes == 0


def test_pages_that_were_mapped_since_the_reading_are_counted_once() -> None:
    """Mapped pages count as free only as far as they were occupied at the last reading."""
    account = Account({HOST: 10})
    account.mapped_bytes = 8
    assert account.reserved_not_touched(HOST) == 10
    account.measure({HOST: 10})
    account.count([HOST])
    assert (account.reserved_not_touched(HOST), account.reserved_not_touched(GPU)) == (8, 0)


# -- memory of other programs -----------------------------------------------------------------------------------------


def test_n14_memory_that_others_take_is_missed_in_the_next_plan() -> None:
    """N14: memory that other programs take on the host is missing in the next plan."""
    pool = a_pool(each="4GiB").idle("a")
    pool.strangers = {HOST: 3 * GIB}
    assert stopped(pool.feed(acquire("b", request=1))) == [1]
    device = pool.core.snapshot().devices[0]
    assert (device.free_bytes, device.missing_bytes) == (GIB, 3 * GIB)


def test_n14_memory_that_others_give_back_is_there_with_the_next_reading() -> None:
    """N14: memory that other programs give back is used for waiting requests with the next reading."""
    pool = a_pool(each="4GiB").ready("a", lease=1)
    pool.strangers = {HOST: 3 * GIB}
    pool.feed(acquire("b", request=2))
    assert pool.waiting() == [2]
    pool.strangers = {}
    assert launched(pool.feed(pool.sample())) == ["b"]
    assert pool.core.snapshot().devices[0].missing_bytes == 0


def test_nothing_is_missing_where_there_is_enough_for_all_of_us() -> None:
    """No memory counts as held by others where the program's own limit is lower than what the machine has."""
    ledger = Ledger({HOST: DeviceSample(HOST, "cpu", "host", 100, 500)})
    ledger.reserve(("runner", 1), [(HOST, 60)])
    assert (ledger.held_by_others(HOST), ledger.free_bytes(HOST)) == (0, 40)


def test_n03_what_is_measured_on_an_integrated_gpu_is_the_hosts() -> None:
    """N03, N14: what a process holds on an integrated GPU is added to what it holds of the host."""
    pool = a_pool("16GiB", gpus=("16GiB",), integrated=True).declare("a", layered(4, "1GiB")).loading("a", request=1)
    pool.feed(Loaded(1, None, ((HOST, GIB), (GPU, 5 * GIB))))
    assert view(pool).resident == ((HOST, 6 * GIB),)
    assert held(pool) == 6 * GIB


# -- what is logged ---------------------------------------------------------------------------------------------------


def measured(log: list[Entry]) -> list[DecisionReason | None]:
    return [entry.why for entry in log if isinstance(entry, Decision) and entry.what == "measured"]


def test_n14_it_is_told_when_a_prediction_is_replaced() -> None:
    """N14: the log has the predicted, the measured and the reserved bytes once, when a prediction is replaced."""
    pool = a_small_runner()
    log: list[Entry] = []
    pool.core.decision_log = log
    pool.feed(filled(1, cpu="1GiB"), filled(1))
    seen(pool, 1, cpu="7GiB")
    assert measured(log) == [Measured(((HOST, 6 * GIB, 4 * GIB, 5 * GIB),), known=False, filled=True)]
    assert [entry.runner for entry in log] == [1]


def test_n14_it_is_told_when_a_prediction_was_too_small() -> None:
    """N14: the log has a prediction that was too small once, when it first shows."""
    pool = a_pool().ready("a", lease=1)
    log: list[Entry] = []
    pool.core.decision_log = log
    seen(pool, 1, cpu="7GiB")
    seen(pool, 1, cpu="8GiB")
    assert measured(log) == [Measured(((HOST, 6 * GIB, 7 * GIB, 7 * GIB),), known=False, filled=False)]


def test_n14_figures_that_come_from_an_earlier_life_are_told_as_such() -> None:
    """N14: the log marks figures that come from an earlier runner."""
    pool, _ = lived(0, settles=True)
    next_launch(pool)
    log: list[Entry] = []
    pool.core.decision_log = log
    pool.feed(loaded(2), filled(2))
    (why,) = measured(log)
    assert isinstance(why, Measured) and why.known


def test_a_copied_account_is_independent() -> None:
    """A copy of an account is equal and shares nothing."""
    account = Account({HOST: 10})
    account.measure({HOST: 5})
    account.mapped_bytes = 2
    account.observe_peak({HOST: 1})
    other = account.copy()
    assert other == account
    other.measure({HOST: 9})
    other.expected_growth[HOST] = 3
    assert (account.held_bytes(HOST), account.expected_growth) == (6, {HOST: 1})


# -- how much is remembered -------------------------------------------------------------------------------------------


def test_a_program_that_asks_for_ever_new_options_is_not_remembered_for_ever() -> None:
    """A model record keeps a bounded number of measurements by options, and the newest are kept."""
    pool = a_pool()
    for num_ctx in range(1, MOST_KINDS + 10):
        pool.expiring("a", num_ctx=num_ctx).settle()
    model = pool.core._state.models["a"]
    assert len(model.measured) == len(model.shortest_load) == MOST_KINDS
    assert (Options(num_ctx=MOST_KINDS + 9), ()) in model.measured


@pytest.mark.slow
def test_ever_new_options_that_are_asked_for_at_once_are_not_remembered_for_ever() -> None:
    """A model record keeps a bounded number of requirements by options."""
    pool = a_pool().ready("a", lease=1)
    for request in range(2, MOST_DEMANDS + 10):
        pool.feed(acquire("a", request, num_ctx=request), cancel(request))
    assert len(pool.core._state.models["a"].demands) <= MOST_DEMANDS
