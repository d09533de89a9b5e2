"""Prompts that are kept: of which runners, and what they count for when a victim is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fsm.core import Core
from fsm.messages.commands import Stop
from fsm.messages.events import Configure
from scheduler.recording.codec import decode_event, decode_state, encode
from tests.support.pool import PoolUnderTest, a_pool, acquire, close, expire, loaded, memory, release, stopped

KEPT = Stop(1, keep_prompts=True)


def test_prompts_of_a_runner_that_is_evicted_are_kept_where_that_is_on() -> None:
    """An idle runner that goes for another model saves its prompts first, and by default it does not."""
    assert a_pool(keeps_prompts=True).idle("a").feed(acquire("b", request=1)) == [KEPT]
    assert a_pool().idle("a").feed(acquire("b", request=1)) == [Stop(1)]


def test_prompts_of_a_runner_whose_keep_alive_is_over_are_kept() -> None:
    """A runner that was not used for its keep-alive saves its prompts, as its conversation may go on."""
    assert a_pool(keeps_prompts=True, keep_alive_s=60.0).idle("a").advance("60s") == [KEPT]


def test_prompts_of_a_busy_victim_are_kept_once_it_has_drained() -> None:
    """A victim in use keeps its prompts as an idle one does, when its last lease is released."""
    pool = a_pool(keeps_prompts=True, max_wait_s=120.0).ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    pool.advance("120s")
    assert pool.feed(release(1)) == [KEPT]


def test_prompts_are_not_kept_where_the_user_unloads_the_model() -> None:
    """Nothing is kept after an `expire`, with a keep-alive of 0, and at the close: that is to forget."""
    assert a_pool(keeps_prompts=True).idle("a").feed(expire("a")) == [Stop(1)]
    assert a_pool(keeps_prompts=True).idle("a").feed(close()) == [Stop(1)]
    assert a_pool(keeps_prompts=True).ready("a", lease=1, keep_alive=0).feed(release(1)) == [Stop(1)]
    assert a_pool(keeps_prompts=True).idle("a").feed(Configure(keep_alive_s=0.0)) == [Stop(1)]


def test_prompts_of_a_draining_victim_are_not_kept_at_the_close() -> None:
    """A close ends a victim that drains without keeping its prompts."""
    pool = a_pool(keeps_prompts=True).ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    pool.advance("120s")
    pool.feed(close("30s"))
    assert pool.feed(release(1)) == [Stop(1)]


@pytest.mark.parametrize(("prompts_s", "victim"), [(0.0, 1), (60.0, 2)])
def test_the_time_to_have_prompts_again_counts_when_a_victim_is_chosen(prompts_s: float, victim: int) -> None:
    """Of two like runners the one goes whose prompts are had again sooner: that is part of what its load costs."""
    pool = _two_alike()
    pool.feed(replace(pool.sample(), prompts=((1, prompts_s),)))
    assert stopped(pool.feed(acquire("c", request=5))) == [victim]


def test_what_was_told_of_prompts_is_recorded_and_replays() -> None:
    """The event is encoded whole, and so is what it leaves in the state: a core of a recording decides the same."""
    pool = _two_alike()
    told = replace(pool.sample(), prompts=((1, 60.0),))
    assert decode_event(encode(told)) == told
    pool.feed(told)
    again = Core.restore(decode_state(encode(pool.core.checkpoint())), pool.core.policy)
    asked = memory(5, cpu="3GiB")
    assert again.step(pool.now, asked) == pool.feed(asked) == [Stop(2)]


def _two_alike() -> PoolUnderTest:
    """Return a full pool of two idle runners that took as long to load and were used alike, the first one earlier."""
    pool = a_pool(capacity="8GiB", sizes=dict.fromkeys("abc", "3GiB"), min_residency_s=0.0, idle_grace_part=0.0)
    for number, model in enumerate("ab", 1):
        pool.feed(acquire(model, request=number))
        pool.advance("5s")
        pool.feed(loaded(number), release(number))
    pool.advance("30s")
    return pool
