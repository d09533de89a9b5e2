"""Models whose files are replaced while a runner of the former files is loaded."""

from __future__ import annotations

from fsm.messages.commands import Stop
from fsm.messages.events import FilesReplaced
from tests.support.pool import a_pool, acquire, loaded, pin, preload, release


def test_u38_an_idle_runner_of_replaced_files_leaves_at_once() -> None:
    """U38: an idle runner is stopped, pinned or not, and does not serve the next request."""
    pool = a_pool(capacity="8GiB").idle("a")
    pool.feed(pin("a"))
    assert pool.feed(FilesReplaced(1)) == [Stop(runner=1)]
    assert pool.feed(acquire("a", request=9)) == []
    assert pool.state("a").value == "expiring"


def test_u38_a_runner_in_use_serves_until_its_next_rest() -> None:
    """U38: a runner in use finishes its leases and grants new ones; once it holds none it leaves."""
    pool = a_pool(capacity="8GiB").ready("a", lease=1)
    assert pool.feed(FilesReplaced(1)) == []
    pool.feed(acquire("a", request=2))
    assert pool.feed(release(lease=1)) == []
    assert pool.state("a").value == "ready"
    assert pool.feed(release(lease=2)) == [Stop(runner=1)]


def test_u38_a_load_of_replaced_files_serves_those_who_wait_and_leaves() -> None:
    """U38: files that are replaced during a load are told once it is over: first its requests are served."""
    pool = a_pool(capacity="8GiB").loading("a", 1)
    pool.feed(FilesReplaced(1))
    pool.feed(loaded(1))
    assert pool.state("a").value == "ready"
    assert Stop(runner=1) in pool.feed(release(lease=1))


def test_u38_a_load_for_no_lease_leaves_when_it_is_over() -> None:
    """U38: a model that was loaded ahead from files that were replaced meanwhile is answered, and leaves."""
    pool = a_pool(capacity="8GiB")
    pool.feed(preload("a", 1))
    pool.feed(FilesReplaced(1))
    assert Stop(runner=1) in pool.feed(loaded(1))


def test_u38_what_was_told_before_is_late() -> None:
    """U38: a second report, and one about a runner that leaves anyway, change nothing."""
    pool = a_pool(capacity="8GiB").ready("a", lease=1)
    pool.feed(FilesReplaced(1))
    late = pool.core.late
    for runner in (1, 7):
        assert pool.feed(FilesReplaced(runner)) == []
    pool.feed(release(lease=1))
    assert pool.feed(FilesReplaced(1)) == []
    assert pool.core.late == late + 3
