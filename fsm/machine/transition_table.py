"""A state machine as one table, checked when it is built; the library `transitions` fires its rows.

This is the only module that imports `transitions`. One shared machine without models serves every record that has its
state in a field: a record costs no memory for it, and none of the library's ways to fail late (a mistyped destination
fails only when it is fired, a mistyped source never) reaches the rest of the code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Generic, TypeVar

import transitions

State = TypeVar("State", bound=Enum)

# Under an application's DEBUG logging, `transitions` formats eight messages a trigger: ten times slower.
logging.getLogger("transitions").setLevel(logging.WARNING)


class _State(transitions.State):
    """A state of the library's that has its name at hand: the library asks for names sixteen times a trigger."""

    @cached_property
    def name(self) -> str:
        """The name of the state."""
        return super().name


class _Machine(transitions.Machine):
    state_cls = _State

    def get_state(self, state: str | Enum) -> transitions.State:
        """Return a state by its name, or by ours, whose public name takes long to ask for."""
        return self.states[state._name_ if isinstance(state, Enum) else state]


class TableError(ValueError):
    """The table itself is wrong: duplicate, unknown, unreachable or dead-end rows."""


class IllegalTransition(RuntimeError):
    """A trigger was fired that is forbidden in this state: a bug of the core, never of the program that uses it."""

    story = ""  # the subject's earlier transitions, where they are known; they end the message

    def __init__(self, table: str, trigger: str, state: Enum, subject: object) -> None:
        super().__init__(f"{table}: {trigger!r} is not allowed while {state.name}: {subject!r}")
        self.trigger = trigger
        self.state = state

    def __str__(self) -> str:
        return f"{super().__str__()}; {self.story}" if self.story else super().__str__()


@dataclass(frozen=True, slots=True)
class Row(Generic[State]):
    """One allowed transition; `guard` names a method of the subject, and is there only where it is an invariant."""

    trigger: str
    source: State
    destination: State
    when: str = ""  # in words, for readers of the table and of its diagram
    guard: str | None = None


class Table(Generic[State]):
    """The transitions of one kind of record, whose state is in the field `field`, which `fire` alone writes.

    Raises `TableError` when built from rows that repeat a (trigger, source), name a state that is not one of `states`,
    leave a state unreachable from `initial`, or leave a state that is not `final` without a way to it.
    """

    def __init__(
        self,
        name: str,
        states: type[State],
        rows: Iterable[Row[State]],
        *,
        initial: State,
        final: State,
        field: str = "state",
    ) -> None:
        self.name = name
        self.field = field
        self.states = tuple(states)
        self.rows = tuple(rows)
        self.initial = initial
        self.final = final
        self._check()
        self._destinations = {(row.trigger, row.source): row.destination for row in self.rows}
        machine = _Machine(
            model=None, states=states, initial=None, auto_transitions=False, send_event=False, model_attribute=field
        )
        for row in self.rows:
            machine.add_transition(row.trigger, row.source, row.destination, conditions=row.guard)
        self._triggers: Mapping[str, Callable[[object], bool]] = {
            trigger: event.trigger for trigger, event in machine.events.items()
        }

    def destination(self, trigger: str, source: State) -> State | None:
        """Return the state to which `trigger` leads from `source`, guards apart; None where it is not allowed."""
        return self._destinations.get((trigger, source))

    def fire(self, subject: object, trigger: str) -> None:
        """Move `subject` by `trigger`; raises `IllegalTransition` where the table or the row's guard forbids it."""
        source: State = getattr(subject, self.field)
        if (trigger, source) not in self._destinations or not self._triggers[trigger](subject):
            raise IllegalTransition(self.name, trigger, source, subject)

    def _check(self) -> None:
        seen: set[tuple[str, State]] = set()
        for row in self.rows:
            if (row.trigger, row.source) in seen:
                raise TableError(f"{self.name}: duplicate row {row.trigger!r} from {row.source!r}")
            seen.add((row.trigger, row.source))
        for state in (self.initial, self.final, *(s for row in self.rows for s in (row.source, row.destination))):
            if state not in self.states:
                raise TableError(f"{self.name}: unknown state {state!r}")
        forward = {state: {row.destination for row in self.rows if row.source is state} for state in self.states}
        backward = {state: {row.source for row in self.rows if row.destination is state} for state in self.states}
        if forward[self.final]:
            raise TableError(f"{self.name}: {self.final!r} is final but has a way out")
        if unreachable := set(self.states) - _closure(self.initial, forward):
            raise TableError(f"{self.name}: unreachable {sorted(state.name for state in unreachable)}")
        if dead_ends := set(self.states) - _closure(self.final, backward):
            raise TableError(f"{self.name}: dead end {sorted(state.name for state in dead_ends)}")


def _closure(start: State, edges: Mapping[State, set[State]]) -> set[State]:
    reached, frontier = {start}, [start]
    while frontier:
        for state in edges[frontier.pop()] - reached:
            reached.add(state)
            frontier.append(state)
    return reached
