"""Pins, and models that can never fit: requests are refused at once with figures, and nothing is evicted."""

from __future__ import annotations

from fsm.machine.runner import RunnerState
from fsm.messages.commands import Stop
from fsm.messages.reasons import Infeasible, MemoryHeld, RunnerLimit
from fsm.messages.refusals import DoesNotFitRefusal
from tests.support.pool import a_pool, acquire, amount, cancel, expire, launched, pin, refused, release, unpin


def test_what_never_fits_is_refused_at_once_and_evicts_nobody() -> None:
    """Rule 6: a request that can never fit is refused with figures and evicts no runner."""
    pool = a_pool(sizes={"c": "9GiB"}).idle("a")
    assert refused(pool.feed(acquire("c", request=1))) == {1: DoesNotFitRefusal}
    assert pool.refusal(1).needed == (("cpu", amount("9GiB")),)
    assert pool.refusal(1).available == (("cpu", amount("8GiB")),)
    assert pool.refusal(1).reason is Infeasible.too_large
    assert pool.state("a") is RunnerState.idle


def test_s08_what_never_fits_is_refused_before_a_victim_is_picked_for_its_process() -> None:
    """S08: at the limit of runners, a request that can never fit is refused before a victim is chosen."""
    pool = a_pool(max_runners=1, each="1GiB", sizes={"c": "9GiB"}).idle("a")
    assert refused(pool.feed(acquire("c", request=1))) == {1: DoesNotFitRefusal}
    assert pool.state("a") is RunnerState.idle


def test_what_never_fits_is_told_so_while_a_load_of_its_model_is_waited_for() -> None:
    """Rule 6: a request that can never fit is refused although it would wait for a load of its model first."""
    pool = a_pool(each="4GiB").loading("a", request=1)
    pool.declare("a", "9GiB")
    assert refused(pool.feed(acquire("a", request=2, num_thread=3))) == {2: DoesNotFitRefusal}


def test_a_pin_is_never_moved_for_others() -> None:
    """A request that fits only in place of a pinned runner is refused, and the refusal names that runner."""
    pool = a_pool().idle("a")
    pool.feed(pin("a"))
    assert refused(pool.feed(acquire("b", request=1))) == {1: DoesNotFitRefusal}
    assert pool.refusal(1).reason == MemoryHeld(("a",), pinned=True)
    assert pool.state("a") is RunnerState.idle


def test_a_pin_is_not_reloaded_with_other_options_for_others() -> None:
    """A pinned runner is not reloaded with other options for a request."""
    pool = a_pool(capacity="64GiB").idle("a")
    pool.feed(pin("a"))
    assert refused(pool.feed(acquire("a", request=1, num_thread=3))) == {1: DoesNotFitRefusal}
    assert pool.refusal(1).reason == MemoryHeld(("a",), pinned=True)


def test_pins_that_take_every_place_leave_none_for_others() -> None:
    """With as many pinned runners as may run, a request for another model is refused."""
    pool = a_pool(max_runners=1, each="1GiB").idle("a")
    pool.feed(pin("a"))
    assert refused(pool.feed(acquire("b", request=1))) == {1: DoesNotFitRefusal}


def test_a_pin_does_not_expire_by_its_keep_alive() -> None:
    """A pinned runner expires neither by its keep-alive nor at its last release."""
    pool = a_pool(capacity="16GiB").idle("a", keep_alive="10s").ready("b", lease=1, keep_alive=0)
    pool.feed(pin("a"), pin("b"))
    assert pool.feed(release(1)) == []
    assert pool.advance("1h") == []


def test_after_an_unpin_the_keep_alive_clock_starts_anew() -> None:
    """An unpin starts the runner's keep-alive anew."""
    pool = a_pool().idle("a", keep_alive="10s")
    pool.feed(pin("a"))
    pool.advance("1h")
    pool.feed(unpin("a"))
    assert pool.advance("9s") == []
    assert pool.advance("1s") == [Stop(1)]


def test_an_unpin_lets_those_who_wait_for_its_memory_go_ahead() -> None:
    """An unpin plans the requests that wait for another runner's memory again."""
    pool = a_pool(each="4GiB", sizes={"c": "4GiB"}).idle("a").ready("b", lease=1)
    pool.feed(pin("a"), acquire("c", request=2))
    assert pool.feed(unpin("a")) == [Stop(1)]


def test_a_pin_refuses_those_who_wait_for_its_memory() -> None:
    """A pin refuses requests that wait for the pinned runner's memory."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    assert refused(pool.feed(pin("a"))) == {2: DoesNotFitRefusal}


def test_a_pinned_load_that_nobody_waits_for_goes_on() -> None:
    """A pinned load goes on without a request, even if another request needs its load slot."""
    pool = a_pool(max_host_loads=1, each="1GiB").loading("a", request=1)
    pool.feed(pin("a"), cancel(1))
    assert pool.feed(acquire("b", request=2)) == []
    assert pool.state("a") is RunnerState.loading


def test_whoever_asks_for_it_expires_a_pin_all_the_same() -> None:
    """S32: an expire by name stops a pinned runner."""
    pool = a_pool().idle("a")
    pool.feed(pin("a"))
    assert pool.feed(expire("a")) == [Stop(1)]


def test_what_is_pinned_does_not_count_where_no_number_of_runners_is_set() -> None:
    """Pinned runners do not count towards an automatic limit of runners."""
    pool = a_pool("64GiB", each="1GiB")
    for model in ("a", "b", "c"):
        pool.feed(pin(model))
        pool.idle(model)
    assert launched(pool.feed(acquire("d", request=1))) == ["d"]


def test_where_a_number_of_runners_is_set_and_all_are_pinned_that_is_the_reason() -> None:
    """A refusal names the limit of runners where all of them are pinned and memory is free."""
    pool = a_pool("64GiB", each="1GiB", max_runners=2)
    for model in ("a", "b"):
        pool.feed(pin(model))
        pool.idle(model)
    pool.feed(acquire("d", request=1))
    assert pool.refusal(1).reason == RunnerLimit(2, ("a", "b"))
