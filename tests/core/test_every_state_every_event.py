"""Every state of a runner with every event that may meet it: each cell names its outcome, or is late."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fsm.machine.request import Purpose
from fsm.machine.runner import RUNNER_TABLE, RunnerId, RunnerState
from fsm.messages.decision_log import Entry, Transition
from fsm.messages.events import ClaimContended, ClaimGranted, Configure, Event, FilesReplaced, Tick
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    cancel,
    close,
    exited,
    expire,
    filled,
    loaded,
    memory,
    out_of_memory,
    pin,
    preload,
    progress,
    release,
    unpin,
    unresponsive,
)

KEEP_ALIVE_S = 60.0
LEASE = 1  # the request that holds, or waits for, the runner's lease
NEXT = 2  # the request of the event


def new_pool() -> PoolUnderTest:
    return a_pool(
        "64GiB", each="1GiB", samples=False, keep_alive_s=KEEP_ALIVE_S, max_runners=2, recovery_timeout_s=100.0
    )


def gone(pool: PoolUnderTest) -> PoolUnderTest:
    pool.expiring("a").feed(exited(1))
    return pool


def unloaded(pool: PoolUnderTest) -> PoolUnderTest:
    gone(pool).feed(pool.sample())
    return pool


def unwanted(pool: PoolUnderTest) -> PoolUnderTest:
    pool.loading("a", LEASE).feed(cancel(LEASE))
    return pool


# Each way to reach a state that makes a difference; the runner is always 1 and its model "a".
STATES: dict[str, Callable[[PoolUnderTest], PoolUnderTest]] = {
    "loading": lambda pool: pool.loading("a", LEASE),
    "loading, unwanted": unwanted,
    "ready": lambda pool: pool.ready("a", LEASE),
    "idle": lambda pool: pool.idle("a"),
    "expiring, draining": lambda pool: pool.expiring("a", LEASE),
    "expiring, stopping": lambda pool: pool.expiring("a"),
    "expiring, gone": gone,
    "unloaded": unloaded,
}

EVENTS: dict[str, Callable[[PoolUnderTest], Event | None]] = {
    "Loaded": lambda pool: loaded(1),
    "Filled": lambda pool: filled(1),
    "Progress": lambda pool: progress(1),
    "OutOfMemory": lambda pool: out_of_memory(1),
    "FilesReplaced": lambda pool: FilesReplaced(1),
    "Unresponsive": lambda pool: unresponsive(1),
    "Exited": lambda pool: exited(1, code=1),
    "Exited, out of memory": lambda pool: exited(1, code=-9, out_of_memory=True),
    "Expire": lambda pool: expire("a"),
    "Acquire": lambda pool: acquire("a", NEXT),
    "Acquire, other options": lambda pool: acquire("a", NEXT, num_thread=3),
    "Acquire, another model": lambda pool: acquire("b", NEXT),
    "Acquire, too large": lambda pool: acquire("giant", NEXT),
    "Preload": lambda pool: preload("a", NEXT),
    "memory": lambda pool: memory(NEXT, cpu="1GiB"),
    "Release": lambda pool: release(LEASE),
    "Cancel": lambda pool: cancel(LEASE),
    "Pin": lambda pool: pin("a"),
    "Unpin": lambda pool: unpin("a"),
    "Inspected": lambda pool: pool.inspection("a"),
    "Sampled": lambda pool: pool.sample(),
    "Contended": lambda pool: ClaimContended(1),
    "Claimed": lambda pool: ClaimGranted(1),
    "Configure": lambda pool: Configure(keep_alive_s=1.0),
    "Close": lambda pool: close(),
    "keep-alive over": lambda pool: None,  # time passes instead
}

# The runner's state afterwards and the commands, in order. "late": the event is ignored and counted.
OUTCOMES: dict[str, dict[str, str]] = {
    "loading": {
        "Loaded": "ready: Grant",
        "Filled": "late",
        "Progress": "loading",
        "OutOfMemory": "loading",  # the exit that follows is judged by this event
        "FilesReplaced": "loading",
        "Unresponsive": "expiring: Reject Stop",
        "Exited": "expiring: Reject Sample",
        "Exited, out of memory": "expiring: Sample",  # the waiting request survives one lack of memory
        "Expire": "loading",  # the waiting requests are served first
        "Acquire": "loading",
        "Acquire, other options": "loading",
        "Acquire, another model": "loading: Launch",
        "Acquire, too large": "loading: Reject",
        "Preload": "loading",
        "memory": "loading: Grant",
        "Release": "late",
        "Cancel": "loading: Reject",
        "Pin": "loading",
        "Unpin": "loading",
        "Inspected": "late",
        "Sampled": "loading",
        "Contended": "late",
        "Claimed": "late",
        "Configure": "loading",
        "Close": "expiring: Reject Stop",
        "keep-alive over": "loading",
    },
    "loading, unwanted": {
        "Loaded": "idle",
        "Filled": "late",
        "Progress": "loading",
        "OutOfMemory": "loading",
        "FilesReplaced": "loading",
        "Unresponsive": "expiring: Stop",
        "Exited": "expiring: Sample",
        "Exited, out of memory": "expiring: Sample",
        "Expire": "expiring: Stop",
        "Acquire": "loading",
        "Acquire, other options": "expiring: Stop Launch",
        "Acquire, another model": "loading: Launch",
        "Acquire, too large": "loading: Reject",
        "Preload": "loading",
        "memory": "loading: Grant",
        "Release": "late",
        "Cancel": "late",
        "Pin": "loading",
        "Unpin": "loading",
        "Inspected": "late",
        "Sampled": "loading",
        "Contended": "late",
        "Claimed": "late",
        "Configure": "loading",
        "Close": "expiring: Stop",
        "keep-alive over": "loading",
    },
    "ready": {
        "Loaded": "late",
        "Filled": "ready",
        "Progress": "late",
        "OutOfMemory": "expiring",  # the runner drains
        "FilesReplaced": "ready",
        "Unresponsive": "expiring: RevokeLease Stop",
        "Exited": "expiring: RevokeLease Sample",
        "Exited, out of memory": "expiring: RevokeLease Sample",
        "Expire": "expiring",
        "Acquire": "ready: Grant",
        "Acquire, other options": "ready: NotifyContention",
        "Acquire, another model": "ready: Launch",
        "Acquire, too large": "ready: Reject",
        "Preload": "ready: Grant",
        "memory": "ready: Grant",
        "Release": "idle",
        "Cancel": "idle",
        "Pin": "ready",
        "Unpin": "ready",
        "Inspected": "late",
        "Sampled": "ready",
        "Contended": "late",
        "Claimed": "late",
        "Configure": "ready",
        "Close": "expiring",
        "keep-alive over": "ready",
    },
    "idle": {
        "Loaded": "late",
        "Filled": "idle",
        "Progress": "late",
        "OutOfMemory": "expiring: Stop",
        "FilesReplaced": "expiring: Stop",
        "Unresponsive": "expiring: Stop",
        "Exited": "expiring: Sample",
        "Exited, out of memory": "expiring: Sample",
        "Expire": "expiring: Stop",
        "Acquire": "ready: Grant",
        "Acquire, other options": "expiring: Stop Launch",
        "Acquire, another model": "idle: Launch",
        "Acquire, too large": "idle: Reject",
        "Preload": "idle: Grant",
        "memory": "idle: Grant",
        "Release": "late",
        "Cancel": "late",
        "Pin": "idle",
        "Unpin": "idle",
        "Inspected": "late",
        "Sampled": "idle",
        "Contended": "late",
        "Claimed": "late",
        "Configure": "idle",
        "Close": "expiring: Stop",
        "keep-alive over": "expiring: Stop",
    },
    "expiring, draining": {
        "Loaded": "late",
        "Filled": "expiring",
        "Progress": "late",
        "OutOfMemory": "expiring",
        "FilesReplaced": "late",
        "Unresponsive": "expiring: RevokeLease Stop",
        "Exited": "expiring: RevokeLease Sample",
        "Exited, out of memory": "expiring: RevokeLease Sample",
        "Expire": "late",
        "Acquire": "expiring: Launch",  # the next runner of the model
        "Acquire, other options": "expiring: Launch",
        "Acquire, another model": "expiring: Launch",
        "Acquire, too large": "expiring: Reject",
        "Preload": "expiring: Launch",
        "memory": "expiring: Grant",
        "Release": "expiring: Stop",
        "Cancel": "expiring: Stop",
        "Pin": "expiring",
        "Unpin": "expiring",
        "Inspected": "late",
        "Sampled": "expiring",
        "Contended": "late",
        "Claimed": "late",
        "Configure": "expiring",
        "Close": "expiring",
        "keep-alive over": "expiring",
    },
    "expiring, stopping": {
        "Loaded": "late",
        "Filled": "expiring",
        "Progress": "late",
        "OutOfMemory": "expiring",
        "FilesReplaced": "late",
        "Unresponsive": "expiring",
        "Exited": "expiring: Sample",
        "Exited, out of memory": "expiring: Sample",
        "Expire": "late",
        "Acquire": "expiring: Launch",
        "Acquire, other options": "expiring: Launch",
        "Acquire, another model": "expiring: Launch",
        "Acquire, too large": "expiring: Reject",
        "Preload": "expiring: Launch",
        "memory": "expiring: Grant",
        "Release": "late",
        "Cancel": "late",
        "Pin": "expiring",
        "Unpin": "expiring",
        "Inspected": "late",
        "Sampled": "expiring",
        "Contended": "late",
        "Claimed": "late",
        "Configure": "expiring",
        "Close": "expiring",
        "keep-alive over": "expiring",
    },
    "expiring, gone": {
        "Loaded": "late",
        "Filled": "late",
        "Progress": "late",
        "OutOfMemory": "late",
        "FilesReplaced": "late",
        "Unresponsive": "late",
        "Exited": "late",
        "Exited, out of memory": "late",
        "Expire": "late",
        "Acquire": "expiring: Launch",
        "Acquire, other options": "expiring: Launch",
        "Acquire, another model": "expiring: Launch",
        "Acquire, too large": "expiring: Reject",
        "Preload": "expiring: Launch",
        "memory": "expiring: Grant",
        "Release": "late",
        "Cancel": "late",
        "Pin": "expiring",
        "Unpin": "expiring",
        "Inspected": "late",
        "Sampled": "unloaded",
        "Contended": "late",
        "Claimed": "late",
        "Configure": "expiring",
        "Close": "expiring",
        "keep-alive over": "expiring",
    },
    "unloaded": {
        "Loaded": "late",
        "Filled": "late",
        "Progress": "late",
        "OutOfMemory": "late",
        "FilesReplaced": "late",
        "Unresponsive": "late",
        "Exited": "late",
        "Exited, out of memory": "late",
        "Expire": "late",
        "Acquire": "unloaded: Launch",
        "Acquire, other options": "unloaded: Launch",
        "Acquire, another model": "unloaded: Launch",
        "Acquire, too large": "unloaded: Reject",
        "Preload": "unloaded: Launch",
        "memory": "unloaded: Grant",
        "Release": "late",
        "Cancel": "late",
        "Pin": "unloaded",
        "Unpin": "unloaded",
        "Inspected": "late",
        "Sampled": "unloaded",
        "Contended": "late",
        "Claimed": "late",
        "Configure": "unloaded",
        "Close": "unloaded: Finished",
        "keep-alive over": "unloaded",
    },
}
CELLS = [(state, event) for state in STATES for event in EVENTS]


def walk(state: str, event: str) -> tuple[str, list[Transition]]:
    """Feed an event to a runner in a state; return the outcome, and the rows of the runner's table that were fired."""
    pool = STATES[state](new_pool())
    pool.declare("giant", "65GiB")
    log: list[Entry] = []
    pool.core.decision_log, pool.core.late = log, 0
    before = pool.core.snapshot()
    what = EVENTS[event](pool)
    commands = pool.advance(KEEP_ALIVE_S) if what is None else pool.feed(what)
    runner = pool.core._state.runners.get(RunnerId(1))
    after = runner.state if runner else RunnerState.unloaded
    fired = [entry for entry in log if isinstance(entry, Transition) and entry.runner == 1]
    if pool.core.late:
        assert (commands, fired, pool.core.snapshot()) == ([], [], before), "the event was late, but something changed"
        return "late", fired
    kinds = " ".join(type(command).__name__ for command in commands)
    return f"{after.name}: {kinds}" if kinds else after.name, fired


@pytest.mark.parametrize(("state", "event"), CELLS, ids=[f"{state}-{event}" for state, event in CELLS])
def test_each_cell_is_as_it_is_named(state: str, event: str) -> None:
    """Each cell gives the state and the commands that it names, or is late: counted, with nothing changed."""
    assert walk(state, event)[0] == OUTCOMES[state][event]


def test_every_cell_is_named() -> None:
    """The table names every state and every event, and events of every type are fed."""
    assert {(state, event) for state, row in OUTCOMES.items() for event in row} == set(CELLS)
    pool = new_pool()
    fed = {type(event(pool)) for event in EVENTS.values()} - {type(None)}
    assert fed == set(Event.__args__) - {Tick}
    assert pool.core._state.queued == 0
    assert Purpose.preload in {event.spec.purpose for event in (preload("a", 1), memory(1, cpu="1GiB"))}


def test_every_row_of_the_table_is_fired_by_some_cell() -> None:
    """The cells fire every row of the transition table and no transition beyond it."""
    fired = {(entry.trigger, entry.source, entry.destination) for cell in CELLS for entry in walk(*cell)[1]}
    assert fired == {(row.trigger, row.source, row.destination) for row in RUNNER_TABLE.rows}
