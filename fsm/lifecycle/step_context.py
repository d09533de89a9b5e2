"""What one step produces beside the changed state: commands, entries of the decision log, and whether to plan again."""

from __future__ import annotations

from fsm.machine.request import ModelId, RequestId
from fsm.machine.runner import PROCESS_TABLE, READY, RUNNER_TABLE, Runner, RunnerId
from fsm.machine.transition_table import IllegalTransition, State, Table
from fsm.messages.commands import Command, Sample
from fsm.messages.decision_log import Decision, DecisionKind, DecisionReason, Entry, Transition
from fsm.messages.reasons import ClaimMissed, TransitionReason
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord

TOLD = 5  # of a runner's last transitions, in the message of one that is illegal


class StepContext:
    """The argument of every verb of the lifecycle: the state to change, and what the step produces."""

    __slots__ = ("claim_failure", "commands", "decision_log", "replan", "state")

    def __init__(self, state: CoreState) -> None:
        self.state = state
        self.commands: list[Command] = []  # of this step, in order
        self.decision_log: list[Entry] | None = None
        self.replan = False  # something changed that may let a request group start
        self.claim_failure: ClaimMissed | None = None  # the claim that the last launch went ahead without

    def fire(self, runner: Runner, trigger: str, reason: TransitionReason) -> None:
        """Move a runner by a trigger of its table, and log why; nothing else changes a runner's state."""
        source, state = runner.state, self.state
        self._fire(RUNNER_TABLE, runner, trigger)
        if runner.on_host:
            state.busy_on_host += (runner.state is READY) - (source is READY)
            state.peak_busy_on_host = max(state.peak_busy_on_host, state.busy_on_host)
        if self.decision_log is not None:
            leases = len(runner.leases)
            entry = Transition(
                state.now, runner.id, runner.model, trigger, source, runner.state, reason, leases, state.steps
            )
            self.decision_log.append(entry)

    def fire_process(self, runner: Runner, trigger: str) -> None:
        """Move the process of a runner by a trigger of its table; nothing else changes its state."""
        self._fire(PROCESS_TABLE, runner, trigger)

    def _fire(self, table: Table[State], runner: Runner, trigger: str) -> None:
        try:
            table.fire(runner, trigger)
        except IllegalTransition as error:
            error.story = self._story(runner)
            raise

    def decide(
        self,
        what: DecisionKind,
        model: ModelId,
        why: DecisionReason,
        request: RequestId | None,
        runner: RunnerId | None = None,
    ) -> None:
        if self.decision_log is not None:
            entry = Decision(self.state.now, what, model, why, request, runner, step=self.state.steps)
            self.decision_log.append(entry)

    def reevaluate(self, model: ModelRecord) -> None:
        """Have the request groups of a model evaluated again: more is known of it, or it has a runner."""
        self.state.unevaluated.update((group.spec, True) for group in self.state.groups_of_model(model.id))
        self.replan = True

    def read_devices(self) -> None:
        """Have the devices read."""
        self.state.samples += 1
        self.state.read_at = self.state.now
        self.commands.append(Sample(self.state.samples))

    def model(self, id: ModelId) -> ModelRecord:
        return self.state.model(id)

    def _story(self, runner: Runner) -> str:
        """Return a runner's last transitions in words, where they are in the decision log, and else its own times."""
        state, entries = self.state, self.decision_log or ()
        transitions = [entry for entry in entries if isinstance(entry, Transition) and entry.runner == runner.id]
        told = [
            f"in step {entry.step}, at {entry.at:g} s: {entry.trigger}, {entry.destination.value} ({entry.why})"
            for entry in transitions[-TOLD:]
        ]
        if not told:
            times = {"launched": runner.launched_at, "loaded": runner.loaded_at, "last used": runner.used_at}
            told = [f"{what} at {at:g} s" for what, at in times.items() if at is not None]
        return f"step {state.steps}, at {state.now:g} s; runner {runner.id} before it: {'; '.join(told)}"
