"""One step of a core as the properties of a transition see it: state before, event, commands, state after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fsm.core import Core
from fsm.machine.request import RequestId
from fsm.machine.runner import Runner
from fsm.messages.commands import Command
from fsm.messages.events import Cancel, Event, Release
from fsm.verification.environment import IdHighWater
from fsm.verification.property import Checks, Kind


@dataclass(frozen=True, slots=True)
class Expiry:
    """A runner that was loading, ready or idle before the step, and is not any more."""

    runner: Runner  # in its state before the step
    victim: bool  # a plan of the step has evicted it
    in_use: bool  # it held a lease that the step's event did not give back


@dataclass(frozen=True, slots=True)
class EndedLease:
    """A lease that a runner held before the step, and does not hold any more."""

    lease: RequestId
    runner: Runner  # in its state before the step
    given_back: bool  # by the step's event


class CoreStep:
    """A step that was taken; `after.plans` are the plans of the step."""

    __slots__ = ("after", "before", "causes", "commands", "event", "now", "past", "was")

    def __init__(self, before: Core, event: Event, commands: Sequence[Command], after: Core, past: IdHighWater) -> None:
        self.before, self.event, self.commands, self.after = before, event, commands, after
        self.past = past  # the highest numbers that were in use before the step
        self.was, self.now = before._state, after._state
        self.causes: list[object] = [event, *commands]  # for each of them its checks are asked
        for runner in self.was.runners.values():
            same = self.now.runners.get(runner.id)
            if same is None or same.current != runner.current or not runner.leases <= same.leases:
                self._runner_has_changed(runner, same)

    def _runner_has_changed(self, runner: Runner, same: Runner | None) -> None:
        """Add the causes that lie in a runner: its expiry, and the end of its leases."""
        event = self.event
        given = event.request if isinstance(event, Release | Cancel) else None
        if runner.current and (same is None or not same.current):
            victim = any(runner.id in plan.victims for plan in self.after.plans or ())
            self.causes.append(Expiry(runner, victim, any(lease != given for lease in runner.leases)))
        for lease in runner.leases - (same.leases if same is not None else set()):
            self.causes.append(EndedLease(lease, runner, lease == given))


@dataclass(slots=True)
class StepOutcome:
    """A step without the state before it."""

    commands: Sequence[Command]
    after: Core


of_step = Checks[CoreStep](Kind.transition, "search", "core tests")
of_outcome = Checks[StepOutcome](Kind.transition, "search", "simulation", "core tests")
