"""Prefetching model files: for which requests, how many bytes, when it begins and when it ends."""

from __future__ import annotations

from dataclasses import replace

from fsm.domain.devices import HOST
from fsm.messages.commands import Claim, Command, Launch, NotifyContention, Prefetch, Stop
from fsm.messages.decision_log import Decision
from fsm.messages.events import Cancel, ClaimContended, ClaimGranted
from fsm.messages.reasons import Prefetched, RunnerStep, WaitFor, WaitForRunners
from tests.support.models import a_model
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    cancel,
    close,
    exited,
    launched,
    layered,
    memory,
    release,
)

GIB = amount("1GiB")
A_FILE = a_model((GIB,) * 4)
SIZE = A_FILE.file_bytes


def a_busy_gpu(capacity: str = "64GiB", gpus: tuple[str, ...] = ("8GiB",), **how: object) -> PoolUnderTest:
    """Return a pool whose GPU a runner "x" holds in use, and for which "b", "c" and "d" are files."""
    pool = a_pool(capacity, gpus, **how).declare("x", layered(4, "1500MiB")).ready("x", lease=1)
    for model in "bcd":
        pool.declare(model, A_FILE)
    return pool


def prefetches(commands: list[Command]) -> list[dict[str, int]]:
    """Return the files and bytes of every Prefetch, in order."""
    return [dict(command.files) for command in commands if isinstance(command, Prefetch)]


# -- when prefetching begins ------------------------------------------------------------------------------------------


def test_who_waits_for_memory_has_the_models_file_read_meanwhile() -> None:
    """The whole file of a model that waits for memory is prefetched where memory is free."""
    pool = a_busy_gpu()
    assert pool.feed(acquire("b", request=2)) == [NotifyContention(1, (1,)), Prefetch((("b", SIZE),))]
    assert pool.waits_for(2) == WaitForRunners(("x",), RunnerStep.idle)


def test_files_beside_the_models_own_are_read_too() -> None:
    """Adapters and projectors are prefetched with the model's file."""
    pool = a_busy_gpu().declare("b", replace(A_FILE, adapters_bytes=3, projectors_bytes=5))
    assert prefetches(pool.feed(acquire("b", request=2))) == [{"b": SIZE + 8}]


def test_while_an_idle_victim_stops_its_successors_file_is_read() -> None:
    """The file is prefetched also while an idle victim stops."""
    pool = a_busy_gpu()
    pool.feed(release(1))
    assert pool.feed(acquire("b", request=2)) == [Stop(1), Prefetch((("b", SIZE),))]


def test_what_starts_at_once_is_not_read_ahead() -> None:
    """A model that is launched at once is not prefetched."""
    pool = a_busy_gpu(gpus=("8GiB", "8GiB"))
    assert launched(commands := pool.feed(acquire("b", request=2))) == ["b"]
    assert prefetches(commands) == []


def test_who_waits_for_metadata_or_for_a_load_has_nothing_read_ahead() -> None:
    """Nothing is prefetched for a request that waits for an inspection or for a load."""
    pool = a_busy_gpu()
    pool.inspects = False
    pool.feed(acquire("b", request=2))
    assert pool.waits_for(2) == WaitFor.metadata
    other = a_pool("64GiB", ("8GiB",)).declare("b", A_FILE).loading("b", request=1)
    other.feed(acquire("b", request=2))
    assert prefetches([*pool.commands, *other.commands]) == []


def test_an_object_and_memory_have_no_file() -> None:
    """Nothing is prefetched for an object or for memory of the program's own."""
    pool = a_pool().ready("a", lease=1)
    pool.feed(acquire("b", request=2), memory(3, cpu="4GiB"))
    assert prefetches(pool.commands) == []


def test_a_model_that_lives_is_not_read_ahead() -> None:
    """Nothing is prefetched for a request that waits for a reload of a model that is loaded."""
    pool = a_pool("64GiB", ("8GiB",)).declare("b", A_FILE).ready("b", lease=1)
    pool.feed(acquire("b", request=2, num_ctx=8192, num_parallel=4))
    assert pool.waits_for(2) == WaitForRunners(("b",), RunnerStep.idle)
    assert prefetches(pool.commands) == []


def test_it_can_be_switched_off() -> None:
    """With prefetching switched off, no Prefetch is sent."""
    pool = a_busy_gpu(prefetches=0)
    assert pool.feed(acquire("b", request=2)) == [NotifyContention(1, (1,))]


# -- when prefetching ends --------------------------------------------------------------------------------------------


def test_it_ends_when_the_load_begins() -> None:
    """Prefetching ends when the load begins."""
    pool = a_busy_gpu()
    pool.feed(acquire("b", request=2), release(1))
    commands = pool.feed(exited(1), pool.sample())
    assert launched(commands) == ["b"]
    assert prefetches(commands) == [{}]


def test_it_ends_when_who_waited_leaves() -> None:
    """Prefetching ends when the last request that waits for the model leaves."""
    pool = a_busy_gpu()
    pool.feed(acquire("b", request=2), acquire("b", request=3))
    assert prefetches(pool.feed(cancel(2))) == []
    assert prefetches(pool.feed(cancel(3))) == [{}]


def test_it_ends_with_a_time_out_and_with_a_close() -> None:
    """Prefetching ends with a timeout and with a close."""
    pool = a_busy_gpu()
    pool.feed(acquire("b", request=2, timeout="1s"))
    assert prefetches(pool.advance("1s")) == [{}]
    pool.feed(acquire("b", request=3))
    assert prefetches(pool.feed(close())) == [{}]


def test_it_goes_on_while_another_program_loads_on_the_device() -> None:
    """Prefetching goes on while another program holds the device, and ends with the launch."""
    pool = a_busy_gpu(claims=True)
    pool.shares = False
    pool.feed(acquire("b", request=2), release(1))
    commands = pool.feed(exited(1), pool.sample())
    assert [type(command) for command in commands if not isinstance(command, Stop)] == [Claim]
    assert prefetches(pool.feed(ClaimContended(2))) == []
    commands = pool.feed(ClaimGranted(2))
    assert [type(command) for command in commands] == [Launch, Prefetch]
    other = a_pool("64GiB", ("8GiB",), claims=True, shares=False).declare("b", A_FILE)
    other.feed(acquire("b", request=2), ClaimContended(1))
    assert prefetches(other.commands) == []


def test_another_wait_begins_anew() -> None:
    """A new wait prefetches the file again."""
    pool = a_busy_gpu()
    pool.feed(acquire("b", request=2), cancel(2))
    assert prefetches(pool.feed(acquire("b", request=3))) == [{"b": SIZE}]


# -- which files, and how much ----------------------------------------------------------------------------------------


def test_those_who_waited_longest_come_first_and_there_are_two_of_them() -> None:
    """The files of the two oldest request groups are prefetched, and the next one follows when the first is loaded."""
    pool = a_busy_gpu()
    pool.feed(acquire("b", request=2), acquire("c", request=3), acquire("d", request=4))
    assert prefetches(pool.commands) == [{"b": SIZE}, {"b": SIZE, "c": SIZE}]
    pool.feed(release(1))
    commands = pool.feed(exited(1), pool.sample())
    assert launched(commands) == ["b"]
    assert [list(files) for files in prefetches(commands)] == [["c", "d"]]


def test_a_request_that_comes_later_and_matters_more_is_read_first() -> None:
    """Files are prefetched in the order in which request groups are planned, priority included."""
    pool = a_busy_gpu()
    pool.feed(acquire("b", request=2), acquire("c", request=3, priority=1))
    assert [list(files) for files in prefetches(pool.commands)] == [["b"], ["c", "b"]]


def test_at_most_half_of_the_memory_to_spare_is_filled() -> None:
    """Prefetched files fill at most half of the free memory, together."""
    pool = a_busy_gpu()
    pool.strangers = {HOST: 52 * GIB}
    pool.feed(pool.sample())
    free = pool.core._state.ledger.devices[HOST].free_bytes
    pool.feed(acquire("b", request=2), acquire("c", request=3))
    assert prefetches(pool.commands)[-1] == {"b": SIZE, "c": free // 2 - SIZE}


def test_what_is_promised_and_not_touched_is_not_to_spare() -> None:
    """Reserved memory that a load has not touched is not filled with prefetched files."""
    pool = a_busy_gpu("16GiB", each="12GiB").loading("object", request=5)
    pool.feed(acquire("b", request=2))
    assert prefetches(pool.commands) == [{"b": 2 * GIB}]


def test_pages_that_running_models_have_mapped_are_not_to_spare() -> None:
    """Mapped pages of runners are not filled, because they would be read again for each token."""
    pool = a_busy_gpu("16GiB", each="12GiB").ready("object", lease=5)
    pool.mapped[2] = 11 * GIB
    pool.feed(pool.sample(), acquire("b", request=2))
    assert pool.core._state.ledger.devices[HOST].free_bytes == 15 * GIB
    assert prefetches(pool.commands) == [{"b": 2 * GIB}]


def test_nothing_is_read_ahead_where_no_memory_is_to_spare() -> None:
    """Prefetching begins when memory becomes free."""
    pool = a_busy_gpu("16GiB", each="15GiB").ready("object", lease=5)
    pool.mapped[2] = 15 * GIB
    pool.strangers = {HOST: GIB}
    pool.feed(pool.sample())
    assert prefetches(pool.feed(acquire("b", request=2))) == []
    pool.strangers = {}
    assert prefetches(pool.feed(pool.sample())) == [{"b": GIB // 2}]
    pool.strangers = {HOST: GIB}
    assert prefetches(pool.feed(pool.sample())) == [{"b": 0}]
    pool.strangers = {}
    assert prefetches(pool.feed(pool.sample())) == []


def test_what_was_begun_is_cut_short_when_memory_gets_short_and_never_grows_again() -> None:
    """Prefetching is cut when memory becomes short, and is not extended again during the same wait."""
    pool = a_busy_gpu()
    pool.feed(acquire("b", request=2))
    for strangers, said in ((58, []), (62, [{"b": 2 * GIB}]), (63, [{"b": GIB}]), (0, [])):
        pool.strangers = {HOST: strangers * GIB}
        assert prefetches(pool.feed(pool.sample())) == said


def test_what_was_cut_to_nothing_leaves_its_place_to_the_next() -> None:
    """A prefetch that was cut to nothing gives its place to the next file."""
    pool = a_busy_gpu()
    pool.feed(acquire("b", request=2), acquire("c", request=3), acquire("d", request=4))
    pool.strangers = {HOST: 63 * GIB}
    assert prefetches(pool.feed(pool.sample())) == [{"b": GIB, "c": 0}]
    pool.strangers = {}
    assert prefetches(pool.feed(pool.sample())) == [{"b": GIB, "c": 0, "d": SIZE}]


def test_it_is_said_once() -> None:
    """A Prefetch is sent only when the files change."""
    pool = a_busy_gpu()
    pool.feed(acquire("b", request=2))
    assert prefetches([*pool.feed(pool.sample(), acquire("b", request=3)), *pool.advance("60s")]) == []


def test_a_copy_of_the_core_goes_on_from_what_was_said() -> None:
    """A copy of the core continues from what was prefetched."""
    pool = a_busy_gpu()
    pool.feed(acquire("b", request=2))
    copy = pool.core.copy()
    assert copy.step(pool.now, Cancel(2)) == pool.core.step(pool.now, Cancel(2))


def test_the_journal_says_whose_files_are_read() -> None:
    """The decision log has each prefetched model once in a wait, with the bytes."""
    pool = a_busy_gpu()
    pool.core.decision_log = []
    pool.feed(acquire("b", request=2), pool.sample())
    decisions = [entry for entry in pool.core.decision_log if isinstance(entry, Decision)]
    assert [(entry.model, entry.why) for entry in decisions if entry.what == "prefetched"] == [
        ("b", Prefetched(amount("4098MiB")))
    ]
