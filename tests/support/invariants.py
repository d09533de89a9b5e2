"""A check for tests with real threads: the invariants of the core of a running scheduler."""

from __future__ import annotations

from fsm.core import Core
from fsm.verification.state_invariants import check_state
from scheduler import Scheduler


def check_scheduler(scheduler: Scheduler) -> None:
    """Raise Violated where a property of a state does not hold of a scheduler's core; after a close, too.

    A step that raised has ended in its middle: the state is not checked after it.
    """

    def check(core: Core) -> None:
        if scheduler._driver.broken is None:
            check_state(core)

    scheduler._broker.query(check)
