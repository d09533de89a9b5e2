"""The memory ledger: what is free, what is reserved, and when memory counts as given back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fsm.domain.devices import HOST, DeviceSample
from fsm.machine.runner import RunnerState
from fsm.messages.commands import Grant, Sample, Stop
from fsm.messages.events import Event, Expire, Loaded, Sampled, Tick
from fsm.messages.reasons import Infeasible, WaitFor
from fsm.sizing.footprint import Footprint
from fsm.state.memory_ledger import Account, Ledger
from tests.support.models import a_model
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    cancel,
    exited,
    expire,
    launched,
    layered,
    loaded,
    release,
    stopped,
)

GPU = "gpu0"
OTHER = "gpu1"
GIB = amount("1GiB")


def a_ledger(capacity: int, free: int) -> Ledger:
    return Ledger({HOST: DeviceSample(HOST, "cpu", "host", capacity, free)})


# -- what is free -----------------------------------------------------------------------------------------------------


def test_s12_free_is_what_is_not_promised() -> None:
    """S12: without other programs, the reservations decide what is free."""
    ledger = a_ledger(capacity=100, free=100)
    ledger.reserve(("runner", 1), [(HOST, 60)])
    assert ledger.free_bytes(HOST) == 40


def test_s12_free_is_what_the_device_reports() -> None:
    """S12: what other programs hold is not free."""
    assert a_ledger(capacity=100, free=30).free_bytes(HOST) == 30


def test_s12_what_a_load_has_not_touched_yet_is_not_free() -> None:
    """S12: what a load has not touched is not free, although the device reports it so."""
    ledger = a_ledger(capacity=100, free=70)
    ledger.reserve(("runner", 1), [(HOST, 60)])
    assert ledger.free_bytes(HOST) == 10


def test_s12_what_a_runner_occupies_is_counted_once() -> None:
    """S12: bytes that a runner occupied at the last reading are counted once."""
    ledger = a_ledger(capacity=100, free=70)
    ledger.reserve(("runner", 1), [(HOST, 60)])
    ledger.accounts["runner", 1].measure({HOST: 50})
    ledger.sample([DeviceSample(HOST, "cpu", "host", 100, 20)])
    assert ledger.free_bytes(HOST) == 10


def test_s12_what_is_occupied_since_the_device_was_read_is_still_not_free() -> None:
    """S12: bytes that a runner occupied after the last reading are not free."""
    pool = a_pool(capacity="16GiB", samples=False)
    pool.strangers = {"cpu": 6 * GIB}
    pool.ready("a", lease=1)
    assert pool.free() == 4 * GIB
    pool.feed(pool.sample())
    assert pool.free() == 4 * GIB


def test_memory_that_cannot_be_measured_is_counted_once_too() -> None:
    """A loaded runner whose memory cannot be measured occupies what was reserved for it."""
    pool = a_pool(capacity="64GiB", gpus=("8GiB",)).declare("a", layered(4, "1GiB")).ready("a", lease=1)
    reading = pool.sample()
    pool.feed(Sampled(reading.devices, (), reading.number))
    assert pool.free(GPU) == 4 * GIB


def test_a_runner_that_grew_beyond_its_promise_counts_as_it_was_seen() -> None:
    """A runner that grew beyond its reservation is counted by its peak."""
    ledger = a_ledger(capacity=100, free=100)
    ledger.reserve(("runner", 1), [(HOST, 60)])
    account = ledger.accounts["runner", 1]
    assert account.measure({HOST: 80})
    account.measure({HOST: 10})
    assert ledger.held_bytes(HOST) == 80


def test_free_may_be_negative() -> None:
    """A device that is overdrawn has negative free memory."""
    ledger = a_ledger(capacity=100, free=100)
    ledger.reserve(("runner", 1), [(HOST, 60)])
    ledger.accounts["runner", 1].measure({HOST: 130})
    assert ledger.free_bytes(HOST) == -30


def test_an_owner_is_promised_memory_once() -> None:
    """A second reservation of the same owner is an error of the core."""
    ledger = a_ledger(capacity=100, free=100)
    ledger.reserve(("runner", 1), [(HOST, 60)])
    with pytest.raises(AssertionError):
        ledger.reserve(("runner", 1), [(HOST, 1)])


def test_a_copied_ledger_is_independent() -> None:
    """A copy of the ledger shares neither accounts nor devices."""
    ledger = a_ledger(capacity=100, free=100)
    ledger.reserve(("runner", 1), [(HOST, 60)])
    other = ledger.copy()
    other.accounts["runner", 1].measure({HOST: 90})
    other.sample([])
    assert (ledger.held_bytes(HOST), list(ledger.devices)) == (60, [HOST])


def test_an_account_knows_nothing_of_other_devices() -> None:
    """An account has 0 bytes on a device where nothing was reserved or seen."""
    assert Account({HOST: 1}).held_bytes(GPU) == 0


def test_a_device_that_is_lost_takes_nobody_with_it() -> None:
    """The reservation on a lost device stays until its runner has gone."""
    pool = a_pool(capacity="64GiB", gpus=("8GiB",)).declare("a", layered(4, "1GiB")).ready("a", lease=1)
    del pool.capacities[GPU]
    pool.occupied.clear()
    pool.feed(pool.sample())
    assert pool.state("a") is RunnerState.ready
    pool.feed(release(1), expire("a"), exited(1))
    assert pool.state("a") is RunnerState.unloaded
    pool.loading("a", request=2)
    assert pool.launches[2].placement.gpu_layers == ()


def test_a_reading_that_shows_a_runner_that_is_gone_is_taken_in_without_it() -> None:
    """A reading that began before a runner was unloaded still updates the devices' figures."""
    pool = a_pool().idle("a")
    reading = pool.sample(number=9)
    pool.feed(expire("a"), exited(1), reading)
    assert pool.core.snapshot().devices[0].reported_free_bytes == 2 * GIB


def test_strangers_that_hold_memory_make_a_request_wait_or_fail_by_what_is_there() -> None:
    """Idle runners are evicted before a request is refused for memory that other programs hold."""
    pool = a_pool(each="4GiB").idle("a")
    pool.strangers = {"cpu": 2 * GIB}
    assert stopped(pool.feed(acquire("b", request=1))) == [1]
    pool.strangers = {"cpu": 5 * GIB}
    pool.feed(exited(1))
    assert pool.refusal(1).reason is Infeasible.held_elsewhere


# -- accounts and lost devices ----------------------------------------------------------------------------------------


def test_a_measurement_of_one_device_leaves_those_of_others() -> None:
    """A measurement of one device leaves the measurements of others."""
    account = Account({HOST: 10, "gpu0": 20})
    account.measure({"gpu0": 15})
    account.measure({HOST: 5})
    assert account.resident == {HOST: 5, "gpu0": 15}


def test_what_is_not_measured_is_occupied_once_it_is_loaded() -> None:
    """Without a measurement, an account occupies nothing before its load and its reservation afterwards."""
    account = Account({HOST: 10})
    assert account.occupied_bytes(HOST) == 0
    account.loaded = True
    assert (account.occupied_bytes(HOST), account.occupied_bytes("gpu0")) == (10, 0)
    account.resident = {HOST: 7}
    assert account.occupied_bytes(HOST) == 7


def test_what_is_counted_on_one_device_stays_counted_when_another_is_read() -> None:
    """Bytes counted at the reading of one device stay counted when another is read."""
    account = Account({HOST: 10}, resident={"gpu0": 5}, loaded=True)
    account.count([HOST])
    account.count(["gpu0", "gpu1"])
    assert account.resident_at_last_sample == {HOST: 10, "gpu0": 5}


def test_what_the_next_life_is_promised_is_known_by_device() -> None:
    """The expected bytes of the next runner are the settled ones where settled, and the reserved ones elsewhere."""
    account = Account({HOST: 10, "gpu0": 20})
    account.measure({HOST: 12, "gpu0": 15})
    account.observe_peak({HOST: 3})
    assert (account.expected_bytes(HOST), account.expected_bytes("gpu0")) == (15, 15)
    assert (account.expected_bytes("gpu1"), Account({}).expected_bytes(HOST)) == (0, 0)


def test_mapped_pages_are_page_cache_on_the_host_alone() -> None:
    """Mapped bytes lower the untouched bytes of the host and not of a GPU."""
    account = Account({HOST: 10, "gpu0": 10}, resident_at_last_sample={HOST: 10, "gpu0": 10}, mapped_bytes=4)
    assert (account.reserved_not_touched(HOST), account.reserved_not_touched("gpu0")) == (4, 0)


def test_a_device_that_shrank_to_what_is_held_has_shrunk_no_more() -> None:
    """A device is not overcommitted once its capacity equals what is held on it."""
    ledger = Ledger()
    ledger.sample([DeviceSample(HOST, "cpu", HOST, 100, 100)])
    ledger.reserve(("runner", 1), ((HOST, 50),))
    ledger.sample([DeviceSample(HOST, "cpu", HOST, 49, 49)])
    assert ledger.overcommitted == {HOST}
    ledger.sample([DeviceSample(HOST, "cpu", HOST, 50, 50)])
    assert ledger.overcommitted == set()


def test_a_device_that_is_gone_counts_as_shrunk_while_a_byte_is_promised_on_it() -> None:
    """A device that has gone is overcommitted while a byte is reserved on it."""
    ledger = Ledger()
    ledger.sample([DeviceSample("gpu0", "gpu", "gpu0", 100, 100)])
    ledger.reserve(("runner", 1), (("gpu0", 1),))
    ledger.sample([])
    assert ledger.overcommitted == {"gpu0"}


def test_what_is_not_known_is_booked_where_it_was_asked_for() -> None:
    """Bytes on an unknown device are counted under its own name."""
    ledger = Ledger()
    ledger.reserve(("runner", 1), ((HOST, 10),))
    assert ledger.by_memory([("gpu7", 5), ("gpu7", 1)]) == {"gpu7": 6}
    assert ledger.held_bytes("gpu7") == 0


def test_a_reading_of_a_runner_that_is_gone_hides_no_others() -> None:
    """An old reading with a runner that has gone still updates the runners that live."""
    pool = a_pool(each="2GiB").idle("a").idle("b")
    gone, kept = pool.runner("a"), pool.runner("b")
    reading = pool.sample()
    pool.feed(expire("a"), exited(gone), pool.sample())
    grown = tuple((runner, ((HOST, 2**31 + runner),)) for runner in (gone, kept))
    pool.core.step(pool.now, replace(reading, resident=grown))
    assert pool.core._state.ledger.accounts["runner", kept].resident == {HOST: 2**31 + kept}


# -- memory recovery --------------------------------------------------------------------------------------------------


def a_gpu_pool(**how: object) -> PoolUnderTest:
    """Return a pool of two GPUs of 8 GiB that are read only when a test says so; each model takes 4 GiB of one."""
    pool = a_pool(capacity="64GiB", gpus=("8GiB", "8GiB"), samples=False, **how)
    for model in "abcd":
        pool.declare(model, Footprint((GIB,) * 4, (0,) * 4))
    return pool


def a_runner_that_left(**how: object) -> PoolUnderTest:
    """Return a pool whose runner on the first GPU has just exited, with none of its 4 GiB free yet."""
    pool = a_gpu_pool(**how).idle("a")
    pool.feed(pool.sample(), expire("a"))
    pool.strangers = {GPU: 4 * GIB}
    pool.feed(exited(1))
    return pool


def test_s21_s31_memory_is_looked_for_when_the_process_has_gone() -> None:
    """S21, S31: devices are read at once after an exit, and then every 250 ms."""
    pool = a_gpu_pool().idle("a")
    assert pool.feed(expire("a")) == [Stop(1)]
    assert pool.feed(exited(1)) == [Sample(1)]
    assert pool.advance("249ms") == []
    assert pool.advance("1ms") == [Sample(2)]


def test_s31_memory_is_back_when_three_quarters_of_it_are() -> None:
    """S31: memory is back when three quarters of what the runner was measured to hold are free on its device."""
    pool = a_runner_that_left()
    pool.strangers = {GPU: GIB + 1}
    pool.feed(pool.sample())
    assert pool.state("a") is RunnerState.expiring
    pool.strangers = {GPU: GIB}
    pool.feed(pool.sample())
    assert pool.state("a") is RunnerState.unloaded


def test_s31_memory_is_waited_for_five_seconds_and_no_longer() -> None:
    """S31: memory recovery ends after five seconds, although the driver never shows the memory as free."""
    pool = a_runner_that_left()
    pool.advance("4.9s")
    assert pool.state("a") is RunnerState.expiring
    pool.advance("0.1s")
    assert pool.state("a") is RunnerState.unloaded


def stopping_on_one_gpu(*models: str, desktop: str = "1GiB") -> PoolUnderTest:
    """Return a pool whose models are loaded on one GPU of 16 GiB, of which a desktop holds some, and read."""
    pool = a_pool(capacity="64GiB", gpus=("16GiB",), samples=False)
    pool.strangers = {GPU: amount(desktop)}
    for model in models:
        pool.declare(model, Footprint((GIB,) * 4, (0,) * 4)).idle(model)
    pool.feed(pool.sample())
    return pool


def has_returned(pool: PoolUnderTest, model: str) -> None:
    """Read the GPU once more, with the memory of a model's process free, which has not exited."""
    pool.strangers = {GPU: pool.strangers[GPU] - 4 * GIB}
    pool.feed(pool.sample(number=0))
    assert pool.life(model).process


def exits(pool: PoolUnderTest, model: str) -> None:
    """Tell the exit of a model's process, whose memory was free before."""
    pool.strangers = {GPU: pool.strangers[GPU] + 4 * GIB}
    pool.feed(exited(pool.runner(model)))


def test_u60_memory_that_was_back_before_the_exit_is_not_waited_for() -> None:
    """What was seen back since the process was stopped counts: the first reading after the exit ends the recovery."""
    pool = stopping_on_one_gpu("a")
    pool.feed(expire("a"))
    has_returned(pool, "a")
    has_returned_again = pool.sample(number=0)
    pool.feed(has_returned_again)
    exits(pool, "a")
    assert pool.state("a") is RunnerState.expiring
    pool.feed(pool.sample())
    assert pool.state("a") is RunnerState.unloaded


def test_u60_memory_of_a_process_that_died_is_back_before_its_exit_is_told() -> None:
    """A reading between a crash and the news of it shows the memory as free already; a desktop holds some as before."""
    pool = stopping_on_one_gpu("a")
    has_returned(pool, "a")
    exits(pool, "a")
    pool.feed(pool.sample())
    assert pool.state("a") is RunnerState.unloaded


def test_u60_memory_that_came_back_in_part_before_the_exit_counts() -> None:
    """Half of the memory was back before the exit: the recovery goes on, and ends with another quarter."""
    pool = stopping_on_one_gpu("a")
    pool.feed(expire("a"))
    pool.strangers = {GPU: -GIB}
    pool.feed(pool.sample(number=0))
    pool.strangers = {GPU: 3 * GIB}
    pool.feed(exited(1))
    pool.feed(pool.sample())
    assert pool.state("a") is RunnerState.expiring
    pool.strangers = {GPU: 2 * GIB}
    pool.feed(pool.sample())
    assert pool.state("a") is RunnerState.unloaded


def test_u60_what_came_back_of_one_runner_does_not_come_back_again_for_another() -> None:
    """The memory of one runner is back when another is stopped: neither is waited for once all is free."""
    pool = stopping_on_one_gpu("a", "b")
    pool.feed(expire("a"))
    has_returned(pool, "a")
    pool.feed(expire("b"))
    has_returned(pool, "b")
    exits(pool, "a")
    exits(pool, "b")
    pool.feed(pool.sample())
    assert (pool.state("a"), pool.state("b")) == (RunnerState.unloaded, RunnerState.unloaded)


def test_u60_a_runner_is_not_waited_for_since_the_memory_of_another_was_overdue() -> None:
    """The memory of one runner does not come back in time; that of a second, which was stopped later, does."""
    pool = stopping_on_one_gpu("a", "b")
    pool.feed(expire("a"), expire("b"))
    pool.strangers = {GPU: 5 * GIB}
    pool.feed(exited(1))
    pool.advance("5s")
    assert pool.state("a") is RunnerState.unloaded
    pool.feed(exited(2))
    pool.feed(pool.sample())
    assert pool.state("b") is RunnerState.unloaded


def test_s31_a_reading_from_before_the_exit_says_nothing() -> None:
    """S31: a reading that began before the exit shows nothing about memory recovery."""
    pool = a_runner_that_left()
    pool.strangers = {}
    pool.feed(pool.sample(number=0))
    assert pool.state("a") is RunnerState.expiring
    pool.feed(pool.sample(number=1))
    assert pool.state("a") is RunnerState.unloaded


def test_s31_a_further_look_keeps_the_reading_that_counts() -> None:
    """S31: the reading that was asked for at the exit shows the memory, although later looks have asked for others."""
    pool = a_runner_that_left()
    assert pool.advance("250ms") == [Sample(2)]
    pool.strangers = {}
    pool.feed(pool.sample(number=0))
    assert pool.state("a") is RunnerState.expiring
    pool.feed(pool.sample(number=1))
    assert pool.state("a") is RunnerState.unloaded


def test_the_time_that_a_stop_may_take_ends_with_the_exit() -> None:
    """After the exit a runner is due when its memory is, so that requests are told when to expect it."""
    pool = a_gpu_pool().declare("b", Footprint(fixed=((GPU, 7 * GIB),))).idle("a")
    pool.feed(pool.sample(), acquire("b", request=2))
    limits = pool.core._state.config
    pool.advance(limits.stop_timeout_s - 1.0)
    pool.strangers = {GPU: 4 * GIB}
    pool.feed(exited(1))
    due_at = pool.now + limits.recovery_timeout_s
    pool.advance(2.0)  # beyond the time in which the process had to end
    snapshot = pool.core.snapshot()
    assert [(view.process, view.due_at) for view in snapshot.runners] == [(False, due_at)]
    assert [wait.until for wait in snapshot.queue] == [due_at]


def test_d10_memory_that_falls_is_not_memory_that_comes_back() -> None:
    """D10: free memory that falls is no memory that comes back."""
    pool = a_runner_that_left()
    pool.strangers = {GPU: 8 * GIB}
    pool.feed(pool.sample())
    assert pool.state("a") is RunnerState.expiring


def test_d10_what_comes_back_elsewhere_is_not_its_own() -> None:
    """D10: changes on other devices neither end nor disturb a memory recovery."""
    pool = a_runner_that_left()
    pool.strangers[OTHER] = 8 * GIB
    pool.feed(pool.sample())
    pool.strangers[OTHER] = 0
    pool.feed(pool.sample())
    assert pool.state("a") is RunnerState.expiring
    pool.strangers = {OTHER: 8 * GIB}
    pool.feed(pool.sample())
    assert pool.state("a") is RunnerState.unloaded


def test_s31_what_the_device_showed_before_the_load_is_not_what_it_showed_before_the_exit() -> None:
    """S31: a runner that lived between two readings has its memory back when the device is as free as before."""
    pool = a_gpu_pool().idle("a")
    pool.feed(expire("a"), exited(1))
    pool.feed(pool.sample())
    assert pool.state("a") is RunnerState.unloaded


def test_s31_a_load_that_failed_before_it_took_anything_is_not_waited_for() -> None:
    """S31: memory that a failed load never took is not waited for."""
    pool = a_gpu_pool().loading("a", request=1)
    pool.feed(exited(1, code=1))
    pool.feed(pool.sample())
    assert pool.state("a") is RunnerState.unloaded


def test_s31_an_object_on_a_gpu_is_waited_for_there() -> None:
    """S31: the memory of an object on a GPU is waited for like that of layers."""
    pool = a_gpu_pool().declare("a", Footprint(fixed=((GPU, 4 * GIB),))).idle("a")
    pool.feed(pool.sample(), expire("a"))
    pool.strangers = {GPU: 4 * GIB}
    pool.feed(exited(1))
    pool.feed(pool.sample())
    assert pool.state("a") is RunnerState.expiring


def test_s31_without_a_gpu_nothing_is_waited_for() -> None:
    """S31: memory on the host is back with the exit, after one reading."""
    pool = a_pool(samples=False).idle("a")
    pool.feed(expire("a"))
    pool.strangers = {"cpu": 8 * GIB}
    assert pool.feed(exited(1)) == [Sample(1)]
    pool.feed(pool.sample())
    assert pool.state("a") is RunnerState.unloaded


def test_s31_an_integrated_gpu_is_not_waited_for() -> None:
    """S31: memory on an integrated GPU is not waited for."""
    pool = a_runner_that_left(integrated=True)
    pool.feed(pool.sample())
    assert pool.state("a") is RunnerState.unloaded


def test_s31_nobody_else_waits_for_it() -> None:
    """S31, rule 10: other requests are granted and loaded during a memory recovery where there is room."""
    pool = a_runner_that_left()
    assert launched(pool.feed(acquire("b", request=1))) == ["b"]
    assert pool.launches[2].placement.gpu_layers == ((OTHER, 5),)
    assert pool.feed(loaded(2)) == [Grant(1, 2)]


def test_two_loads_go_on_beside_a_device_whose_memory_is_awaited() -> None:
    """Rule 10: while one of three GPUs recovers memory, models load on the other two at the same time."""
    pool = a_pool("64GiB", ("8GiB", "8GiB", "8GiB")).declare("x", layered(4, "1500MiB"))
    for model in "bcd":
        pool.declare(model, layered(4, "1500MiB"))
    pool.ready("x", lease=1)
    gone = pool.launches[1].placement.gpu_layers[0][0]
    pool.samples = False
    pool.feed(pool.sample(), release(1), Expire("x"))
    pool.strangers = {gone: 6 * GIB}
    pool.feed(exited(1))
    commands = pool.feed(*(acquire(model, request) for request, model in enumerate("bcd", 2)))
    assert launched(commands) == ["b", "c"]
    assert {device for id in (2, 3) for device, _ in pool.launches[id].placement.gpu_layers} == {
        f"gpu{number}" for number in range(3)
    } - {gone}
    assert pool.waits_for(4) == WaitFor.memory
    pool.feed(loaded(2), loaded(3))
    pool.strangers = {}
    assert launched(pool.feed(pool.sample())) == ["d"]


def test_two_gpus_whose_memory_is_awaited_are_loaded_on_in_the_order_in_which_it_comes_back() -> None:
    """A younger request loads on its GPU when that GPU's memory is back, although an older one still waits."""
    pool = a_gpu_pool().idle("a").idle("b")
    pool.declare("c", Footprint(fixed=((GPU, 6 * GIB),))).declare("d", Footprint(fixed=((OTHER, 6 * GIB),)))
    pool.feed(pool.sample(), expire("a"), expire("b"))
    pool.strangers = {GPU: 4 * GIB, OTHER: 4 * GIB}
    pool.feed(exited(1), exited(2))
    assert launched(pool.feed(acquire("c", request=1), acquire("d", request=2))) == []
    pool.strangers = {GPU: 4 * GIB}
    assert launched(pool.feed(pool.sample())) == ["d"]
    pool.strangers = {}
    assert launched(pool.feed(pool.sample())) == ["c"]
    assert (pool.state("c"), pool.state("d")) == (RunnerState.loading, RunnerState.loading)


def test_d12_each_device_is_waited_for_by_itself() -> None:
    """D12: two runners on two devices are each unloaded when their own memory is back."""
    pool = a_gpu_pool().idle("a").idle("b")
    pool.feed(pool.sample(), expire("a"), expire("b"))
    pool.strangers = {GPU: 4 * GIB, OTHER: 4 * GIB}
    pool.feed(exited(1), exited(2))
    pool.strangers = {GPU: 4 * GIB}
    pool.feed(pool.sample())
    assert (pool.state("a"), pool.state("b")) == (RunnerState.expiring, RunnerState.unloaded)


def test_a_load_that_was_never_wanted_gives_its_promise_back() -> None:
    """A load that was stopped before its launch gives its reservation back with its exit."""
    pool = a_pool().loading("a", request=1, keep_alive=0)
    pool.feed(cancel(1), exited(1, code=None, reason="stopped before it began"))
    assert pool.free() == 8 * GIB


# -- measurements -----------------------------------------------------------------------------------------------------


def test_what_was_measured_is_known_for_the_next_load() -> None:
    """A measurement of a runner is used for the next load of the model with the same options."""
    pool = a_pool(capacity="8GiB").declare("a", a_model())
    pool.loading("a", request=1)
    predicted = dict(pool.launches[1].placement.bytes)[HOST]
    pool.feed(Loaded(1, None, ((HOST, predicted + 5),)), release(1), expire("a"), exited(1))
    pool.loading("a", request=2)
    assert pool.launches[2].placement.measured
    assert dict(pool.launches[2].placement.bytes) == {HOST: predicted + 5}


def test_what_a_load_took_that_failed_is_not_taken_for_what_it_needs() -> None:
    """A failed load leaves no measurement."""
    pool = a_pool(capacity="8GiB").declare("a", a_model()).loading("a", request=1)
    pool.occupied[1] = {HOST: 7}
    pool.feed(pool.sample(), exited(1, code=1))
    pool.advance("10s")
    pool.loading("a", request=2)
    assert not pool.launches[2].placement.measured


def test_what_was_measured_of_another_file_is_forgotten() -> None:
    """A replaced file has no measurement."""
    pool = a_pool(capacity="8GiB").declare("a", a_model()).idle("a")
    pool.feed(expire("a"), exited(1))
    pool.declare("a", a_model(layers_bytes=(3 * 2**20,) * 2)).loading("a", request=2)
    assert not pool.launches[2].placement.measured


def test_s31_memory_is_back_although_another_load_of_ours_takes_of_it() -> None:
    """S31: memory is back although another load takes of it, because both amounts are known."""
    pool = a_pool("64GiB", gpus=["16GiB"])
    for model, size in (("a", "6GiB"), ("c", "5GiB"), ("b", "8GiB")):
        pool.declare(model, Footprint(fixed=((GPU, amount(size)),)))
    pool.idle("a").feed(acquire("c", request=1), acquire("b", request=2))
    pool.samples = False
    pool.feed(exited(1), loaded(pool.runner("c")))  # before the first reading
    pool.samples = True
    pool.feed(pool.sample())
    assert pool.state("b") is RunnerState.loading


@pytest.mark.parametrize("first", [Tick(), acquire("y", request=7)])
def test_whoever_comes_as_the_wait_for_memory_ends_costs_nobody_an_answer(first: Event) -> None:
    """An event at the end of a memory recovery loses no request, because a runner that exited is always unloaded."""
    pool = a_pool("64GiB", gpus=["8GiB"])
    for model, size in (("a", "6GiB"), ("b", "4GiB")):
        pool.declare(model, Footprint(fixed=((GPU, amount(size)),)))
    pool.idle("a").feed(acquire("b", request=2))
    pool.samples = False
    pool.strangers[GPU] = 2 * GIB  # another program holds it, so the memory does not all come back
    pool.feed(exited(1))
    pool.feed(pool.sample())
    pool.advance("4.9s")
    pool.feed(pool.sample())
    pool.now += 0.101  # the timer is late
    pool.feed(first, Tick())
    assert pool.state("b") is RunnerState.loading
