"""The queue: order, backfilling, load slots and process slots, and memory of the program's own."""

from __future__ import annotations

import pytest

from fsm.machine.runner import RunnerState
from fsm.messages.commands import Grant, Launch, NotifyContention, Stop
from fsm.messages.events import Acquire, Configure
from fsm.messages.reasons import Infeasible, WaitFor
from fsm.messages.refusals import DoesNotFitRefusal
from fsm.sizing.footprint import Footprint
from tests.support.pool import (
    a_pool,
    acquire,
    amount,
    cancel,
    exited,
    expire,
    granted,
    launched,
    layered,
    loaded,
    memory,
    pin,
    refused,
    release,
    stopped,
)

# -- order and backfilling --------------------------------------------------------------------------------------------


def test_a_later_request_that_fits_goes_ahead() -> None:
    """Rule 5: a younger request starts in memory that an older, waiting one does not need."""
    pool = a_pool(sizes={"a": "4GiB", "b": "6GiB", "c": "1GiB"}).ready("a", lease=1)
    assert launched(pool.feed(acquire("b", request=2), acquire("c", request=3))) == ["c"]


def test_a_later_request_never_takes_what_an_older_one_waits_for() -> None:
    """Rule 5: a younger request does not start in memory that an older one will need."""
    pool = a_pool(sizes={"a": "4GiB", "b": "6GiB", "c": "3GiB"}).ready("a", lease=1)
    assert launched(pool.feed(acquire("b", request=2), acquire("c", request=3))) == []
    assert pool.waits_for(3) == WaitFor.earlier_requests
    pool.feed(release(1))
    assert launched(pool.feed(exited(1))) == ["b"]


def test_warm_requests_never_wait_for_those_who_wait() -> None:
    """Rule 5: a warm request is granted while other requests load, evict and wait for memory."""
    pool = a_pool(sizes={"a": "1GiB", "b": "3GiB", "c": "2GiB", "d": "6GiB"})
    pool.ready("a", lease=1).expiring("b").loading("c", request=2)
    pool.feed(acquire("d", request=3))
    assert pool.feed(acquire("a", request=4)) == [Grant(4, 1), NotifyContention(1, (4,))]


def test_a_higher_priority_is_served_first() -> None:
    """Of two waiting requests, the one with the higher priority is served first."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2), acquire("c", request=3, priority=1))
    assert pool.waiting() == [3, 2]
    pool.feed(release(1))
    assert launched(pool.feed(exited(1))) == ["c"]


def test_waiting_long_enough_outweighs_any_priority() -> None:
    """A step of priority counts as 60 s of waiting, so that every request is served in time."""
    pool = a_pool(priority_s=60.0, max_wait_s=1000.0).ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    pool.advance("61s")
    pool.feed(acquire("c", request=3, priority=1))
    assert pool.waiting() == [2, 3]


def test_equals_are_served_in_the_order_in_which_they_asked() -> None:
    """Requests of one moment and one priority are served in the order of their ids."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(*(acquire(model, request) for model, request in (("d", 2), ("c", 3), ("b", 4))))
    assert pool.waiting() == [2, 3, 4]


# -- process slots and load slots -------------------------------------------------------------------------------------


def test_s10_as_many_processes_live_as_may_live() -> None:
    """S10: at the limit of runners an idle one is evicted, although the new model would fit beside it."""
    pool = a_pool(max_runners=2, each="1GiB").idle("a").idle("b")
    assert pool.feed(acquire("c", request=1)) == [Stop(1)]
    assert launched(pool.feed(exited(1))) == ["c"]


def test_a_process_counts_until_it_is_gone() -> None:
    """A runner that drains or stops holds its process slot until it exits, and not while memory recovers."""
    pool = a_pool(max_runners=1, each="1GiB", samples=False).expiring("a", lease=1)
    assert pool.feed(acquire("b", request=2)) == []
    assert pool.feed(release(1)) == [Stop(1)]
    assert launched(pool.feed(exited(1))) == ["b"]
    assert pool.state("a") is RunnerState.expiring


def test_one_place_among_the_processes_is_given_to_one() -> None:
    """Of two requests for one process slot, the older is launched and the younger waits."""
    pool = a_pool(max_runners=1, each="1GiB").ready("a", lease=1)
    pool.feed(acquire("b", request=2), acquire("c", request=3), release(1))
    assert launched(pool.feed(exited(1))) == ["b"]


def test_a_place_that_is_coming_is_counted_for_one_who_waits() -> None:
    """A process that is ending counts for the older request, so that the younger one evicts only one more."""
    pool = a_pool(max_runners=3, each="1GiB").expiring("a").idle("b").idle("c")
    assert stopped(pool.feed(acquire("d", request=1))) == []
    assert stopped(pool.feed(acquire("e", request=2))) == [2]
    assert stopped(pool.feed(acquire("d", request=3))) == []


def test_what_a_refused_request_would_have_taken_is_free_for_those_behind_it() -> None:
    """What a refused request would have taken goes to later requests in the same step."""
    pool = a_pool(sizes={"a": "4GiB", "b": "6GiB", "c": "3GiB", "d": "1GiB"}).ready("a", lease=1)
    assert launched(pool.feed(acquire("b", request=2), acquire("c", request=3), acquire("d", request=4))) == []
    commands = pool.feed(pin("a"))
    assert (refused(commands), launched(commands)) == ({2: DoesNotFitRefusal}, ["c", "d"])


@pytest.mark.parametrize("gpus", [(), ("1GiB",), ("1GiB",) * 4])
def test_u08_d16_without_a_limit_memory_alone_decides(gpus: tuple[str, ...]) -> None:
    """U08, S10, D16: no number of runners evicts one where none is set, whatever the devices are or were."""
    pool = a_pool(capacity="40GiB", gpus=gpus, each="1GiB")
    for number in range(20):
        pool.idle(f"m{number}")
    while len(pool.capacities) > 1:
        pool.capacities.popitem()
        pool.feed(pool.sample())
    assert launched(pool.feed(acquire("another", request=1))) == ["another"]
    assert pool.stops == set() and len(pool.core._state.runners) == 21


def test_u08_memory_is_what_evicts() -> None:
    """U08: five models in turns are loaded once each where there is memory for five, and evict where there is not."""
    for capacity, loads in (("5GiB", 5), ("3GiB", 15)):
        pool = a_pool(capacity=capacity, each="1GiB", min_residency_s=0)
        for model in 3 * "abcde":
            pool.advance("10s")
            request = pool.request_id()
            pool.feed(acquire(model, request))
            pool.settle()
            if request not in pool.answers:
                pool.feed(loaded(pool.runner(model)))
            pool.feed(release(request))
        assert len(pool.launches) == loads


def test_u08_a_limit_that_is_set_still_holds() -> None:
    """U08, S10: a number that is set evicts, and one that is taken away does so no more."""
    pool = a_pool(capacity="40GiB", each="1GiB", max_runners=2).idle("a").idle("b")
    assert stopped(pool.feed(acquire("c", request=1))) == [1]
    pool.feed(Configure(max_runners=0))
    assert launched(pool.feed(acquire("d", request=2))) == ["d"]


def test_a_limit_that_was_raised_lets_waiters_go_ahead() -> None:
    """A limit that is raised launches waiting requests, and other limits stay as they were."""
    pool = a_pool(max_runners=1, max_queue=7, each="1GiB").ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    assert launched(pool.feed(Configure(max_runners=2))) == ["b"]
    assert pool.core._state.config.max_queue == 7


def test_a_limit_that_was_lowered_stops_nobody_in_use() -> None:
    """A limit that is lowered stops no busy runner, and no other starts before enough have gone."""
    pool = a_pool(max_runners=2, each="1GiB").ready("a", lease=1).ready("b", lease=2)
    assert pool.feed(Configure(max_runners=1)) == []
    pool.feed(acquire("c", request=3), expire("a"), release(1))
    assert launched(pool.feed(exited(1))) == []


def test_s24_two_loads_at_a_time_on_the_host() -> None:
    """S24: two models load at once on the host."""
    pool = a_pool(each="1GiB")
    assert launched(pool.feed(*(acquire(model, request) for request, model in enumerate("abc", 1)))) == ["a", "b"]
    assert pool.waits_for(3) == WaitFor.load_slot
    assert launched(pool.feed(loaded(1))) == ["c"]


def test_s24_one_load_at_a_time_on_a_gpu() -> None:
    """S24: one model loads at once on each GPU, and a third model waits for a load slot."""
    pool = a_pool(capacity="64GiB", gpus=("8GiB", "8GiB"))
    for model in "abc":
        pool.declare(model, layered(4, "512MiB"))
    commands = pool.feed(*(acquire(model, request) for request, model in enumerate("abc", 1)))
    launches = [command for command in commands if isinstance(command, Launch)]
    assert [[gpu for gpu, _ in command.placement.gpu_layers] for command in launches] == [["gpu0"], ["gpu1"]]
    assert launched(pool.feed(loaded(1))) == ["c"]


def test_a_model_on_a_gpu_takes_no_place_among_the_hosts_loads() -> None:
    """A model on a GPU takes no load slot of the host, although a part of it stays there."""
    pool = a_pool(capacity="64GiB", gpus=("8GiB", "8GiB"), max_host_loads=1, each="1GiB")
    for model in "ab":
        pool.declare(model, layered(4, "512MiB", host="1GiB"))
    assert launched(pool.feed(acquire("a", 1), acquire("b", 2), acquire("c", 3), acquire("d", 4))) == ["a", "b", "c"]


def test_an_object_that_declares_gpu_memory_loads_on_that_gpu() -> None:
    """An object that declares memory of a GPU takes a load slot of that GPU."""
    pool = a_pool(capacity="64GiB", gpus=("8GiB",), each="1GiB", max_runners=4)
    for model in "ab":
        pool.declare(model, Footprint(fixed=(("gpu0", amount("1GiB")),)))
    assert launched(pool.feed(acquire("a", 1), acquire("b", 2))) == ["a"]
    assert launched(pool.feed(acquire("c", 3), acquire("d", 4))) == ["c", "d"]


def test_a_load_that_nobody_waits_for_gives_its_place_up() -> None:
    """Rule 4: a load that no request waits for is aborted when another request needs its load slot."""
    pool = a_pool(max_host_loads=1, each="1GiB").loading("a", request=1)
    pool.feed(cancel(1))
    commands = pool.feed(acquire("b", request=2))
    assert (stopped(commands), launched(commands)) == ([1], ["b"])


def test_a_load_on_another_device_gives_nothing_up() -> None:
    """A load on another device is not aborted for a load slot."""
    pool = a_pool(capacity="64GiB", gpus=("8GiB",), max_host_loads=1, each="1GiB").loading("a", request=1)
    pool.declare("b", layered(4, "512MiB")).declare("c", layered(4, "512MiB"))
    pool.loading("b", request=2)
    pool.feed(cancel(1))
    assert stopped(pool.feed(acquire("c", request=3))) == []
    assert stopped(pool.feed(cancel(2))) == [2]


# -- memory of the program's own --------------------------------------------------------------------------------------


def test_the_programs_memory_is_granted_where_there_is_room() -> None:
    """Memory of the program's own is reserved in the ledger until it is released."""
    pool = a_pool()
    assert pool.feed(memory(1, cpu="3GiB")) == [Grant(1, None)]
    assert pool.free() == amount("5GiB")
    pool.feed(release(1))
    assert pool.free() == amount("8GiB")


def test_the_programs_memory_evicts_like_a_model() -> None:
    """Idle runners are evicted for memory of the program's own, which is granted when theirs is back."""
    pool = a_pool().idle("a")
    assert pool.feed(memory(1, cpu="3GiB")) == [Stop(1)]
    assert pool.feed(exited(1)) == [Grant(1, None)]


def test_the_programs_memory_lets_waiters_go_ahead_when_it_is_given_back() -> None:
    """A release of the program's own memory plans waiting requests again."""
    pool = a_pool(each="4GiB").ready("a", lease=1)
    pool.feed(memory(2, cpu="2GiB"))
    assert launched(pool.feed(acquire("b", request=3))) == []
    assert launched(pool.feed(release(2))) == ["b"]


def test_the_programs_memory_is_not_evicted_for_a_model() -> None:
    """A request that does not fit beside the program's own memory is refused with that reason."""
    pool = a_pool()
    pool.feed(memory(1, cpu="3GiB"))
    assert refused(pool.feed(acquire("a", request=2))) == {2: DoesNotFitRefusal}
    assert pool.refusal(2).reason is Infeasible.held_elsewhere


def test_the_programs_memory_needs_no_process() -> None:
    """Memory of the program's own takes no process slot."""
    pool = a_pool(max_runners=1, each="1GiB").ready("a", lease=1)
    assert pool.feed(memory(2, cpu="3GiB")) == [Grant(2, None)]


def test_a_wish_for_memory_can_be_cancelled_before_and_after_its_grant() -> None:
    """A request for memory is refused by a cancel before its grant, and released by one after it."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(memory(2, cpu="3GiB"), memory(3, cpu="1GiB"))
    assert granted(pool.commands) == [1, 3]
    assert refused(pool.feed(cancel(2), cancel(3))).keys() == {2}
    assert pool.free() == amount("2GiB")


def test_of_two_wishes_for_memory_the_one_that_became_impossible_is_told_at_once() -> None:
    """Of two requests for memory, the second is refused when the first makes it impossible."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(memory(2, cpu="5GiB"), memory(3, cpu="5GiB"), release(1))
    commands = pool.feed(exited(1))
    assert (granted(commands), refused(commands)) == ([2], {3: DoesNotFitRefusal})


def test_several_wishes_for_the_same_memory_are_granted_together() -> None:
    """Several requests for the same memory are granted together as far as they fit."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(memory(2, cpu="3GiB"), memory(3, cpu="3GiB"), release(1))
    assert granted(pool.feed(exited(1))) == [2, 3]
    assert pool.free() == amount("2GiB")


def test_the_programs_memory_leaves_pins_alone() -> None:
    """A pinned runner is not evicted for memory of the program's own."""
    pool = a_pool().idle("a")
    pool.feed(pin("a"))
    assert refused(pool.feed(memory(1, cpu="3GiB"))) == {1: DoesNotFitRefusal}


def test_no_model_is_mistaken_for_memory() -> None:
    """A request for memory is never served by a runner, even by one whose model has an empty name."""
    pool = a_pool()
    wish = Acquire(7, memory(7, cpu="1GiB").spec)
    pool.ready("", lease=1)
    assert pool.feed(wish) == [Grant(7, None)]


# -- one model with several options -----------------------------------------------------------------------------------


def test_s07_an_incompatible_sibling_is_the_victim_of_a_reload() -> None:
    """S07: an idle runner with other options is stopped at once, and the next one has the new options."""
    pool = a_pool(capacity="32GiB").idle("a")
    commands = pool.feed(acquire("a", request=1, num_thread=3))
    assert stopped(commands) == [1]
    commands += pool.feed(exited(1))
    assert [command.options.num_thread for command in commands if isinstance(command, Launch)] == [3]


def test_s07_a_busy_sibling_drains_at_the_bound_and_the_next_life_starts_beside_it() -> None:
    """S07: a busy runner with other options drains at the bound, and the next one starts beside it if it fits."""
    pool = a_pool(capacity="32GiB", max_wait_s=120.0).ready("a", lease=1)
    pool.feed(acquire("a", request=2, num_thread=3))
    assert launched(pool.advance("119s")) == []
    assert launched(pool.advance("1s")) == ["a"]
    assert pool.core._state.runners[1].state is RunnerState.expiring
    assert pool.feed(loaded(2)) == [Grant(2, 2)]


def test_a_sibling_in_its_residency_is_not_reloaded_at_once() -> None:
    """A runner within its minimum residency is not reloaded at once with other options."""
    pool = a_pool(capacity="32GiB", min_residency_s=30.0).ready("a", lease=1)
    pool.feed(release(1))
    assert pool.feed(acquire("a", request=2, num_thread=3)) == []
    assert stopped(pool.advance("30s")) == [1]


def test_two_waiters_with_different_options_take_turns() -> None:
    """Two requests with different options of one model are served one after the other."""
    pool = a_pool(capacity="32GiB").loading("a", request=1)
    assert pool.feed(acquire("a", request=2, num_thread=3)) == []
    assert pool.waits_for(2) == WaitFor.other_load
    pool.feed(loaded(1))
    commands = pool.feed(release(1))
    assert (stopped(commands), launched(commands)) == ([1], ["a"])
