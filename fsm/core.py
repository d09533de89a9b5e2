"""The decision core: events and time in, commands out.

`Core.step` is the only thing that changes the pool. The same state and the same inputs give the same outputs; it never
raises for late or duplicate input. This module says what each event means; `actions` carries it out.

It is also all that the shell sees of the core's state: queries that return values. The tables behind them are private.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self, assert_never

from fsm.eviction.policies import DEFAULT_POLICY, EvictionPolicy
from fsm.lifecycle.device_claims import Claims
from fsm.lifecycle.prefetch import read_ahead
from fsm.machine.request import ModelId, Purpose, Request, RequestId, RequestState
from fsm.machine.runner import LOADING, Runner, RunnerId
from fsm.messages.commands import Command, Finished, Inspect
from fsm.messages.decision_log import Entry
from fsm.messages.events import (
    Acquire,
    Cancel,
    ClaimContended,
    ClaimGranted,
    Close,
    Configure,
    ContextFilled,
    Event,
    Exited,
    Expire,
    Inspected,
    Loaded,
    OutOfMemory,
    Pin,
    Progress,
    Release,
    Sampled,
    Tick,
    Unpin,
    Unresponsive,
)
from fsm.messages.reasons import ClaimMissed, LoadStalled, Queued, RunnerReason
from fsm.messages.refusals import (
    Cancelled,
    InvalidModelRefusal,
    ModelNotFoundRefusal,
    QueueFullRefusal,
    SchedulerClosed,
    TimedOut,
)
from fsm.planning.deadline_admission import infeasible_deadline
from fsm.planning.explanations import tell_placed, tell_victims, tell_waits
from fsm.planning.plan import Plan
from fsm.planning.planner import make_plan
from fsm.sizing.load_history import MOST_KINDS
from fsm.state.core_config import CoreConfig
from fsm.state.core_state import CoreState
from fsm.state.runner_match import runner_serves
from fsm.state.snapshot import DeviceView, HeldView, RunnerView, Snapshot, WaitView, take_snapshot
from fsm.state.timers import Key

__all__ = ["Core", "CoreCheckpoint", "CoreConfig", "DeviceView", "HeldView", "RunnerView", "Snapshot", "WaitView"]


@dataclass(frozen=True, slots=True)
class CoreCheckpoint:
    """Everything that a core is made of, but for its policy."""

    state: CoreState
    late: int
    finished: bool
    policy_failure: str
    claim_failure: ClaimMissed | None

    def models(self) -> tuple[ModelId, ...]:
        """Return every model that anything is known of."""
        return tuple(self.state.models)


class Core:
    """One pool of runners and the rules by which they are shared; not thread-safe, and in need of no thread."""

    def __init__(self, limits: CoreConfig | None = None, policy: EvictionPolicy | None = None) -> None:
        self._state = CoreState(limits or CoreConfig())
        self.policy = DEFAULT_POLICY if policy is None else policy
        self._lifecycle = Claims(self._state)
        self.late = 0  # late or duplicate events that were ignored
        self.plans: list[Plan] | None = None  # every plan is appended to it; None (the default): to nothing
        self.policy_failure = ""  # the last exception that the eviction policy raised, in words
        self.finished = False  # Finish was said

    def step(self, now: float, event: Event) -> list[Command]:
        """Take in what happened and return what to do, in order; `now` is in seconds and never goes back.

        What is returned, and what is noted in the journal, is of the step that `steps` numbers until the next one.
        """
        state = self._state
        state.steps += 1
        state.now = now if now > state.now else state.now
        commands: list[Command] = []
        self._lifecycle.commands = commands
        self._handle(event)
        if self._lifecycle.replan:
            self._carry_out_plans()
        return commands

    def undone(self) -> list[Command]:
        """Return what planning anew at this moment would say: nothing, if the last step has left nothing undone."""
        twin = self.copy()
        twin._carry_out_plans()
        return twin._lifecycle.commands

    @property
    def decision_log(self) -> list[Entry] | None:
        """What was decided and why is appended to it; None (the default): nothing is noted."""
        return self._lifecycle.decision_log

    @decision_log.setter
    def decision_log(self, journal: list[Entry] | None) -> None:
        self._lifecycle.decision_log = journal

    @property
    def steps(self) -> int:
        """How many steps there were: the number of the one under way, or of the last one. A step that raises counts."""
        return self._state.steps

    def deadline(self) -> float:
        """Return when the next Tick is due, or a little before; infinite when nothing is."""
        return self._state.timers.deadline()

    def check(self) -> None:
        """Raise AssertionError where an invariant does not hold."""
        self._state.check()

    def failures(self) -> tuple[str | ClaimMissed, ...]:
        """Return what went wrong around decisions and was worked round; a text is what the eviction policy raised."""
        return tuple(filter(None, (self.policy_failure, self._lifecycle.claim_failure)))

    def snapshot(self) -> Snapshot:
        """Return what can be seen from outside, immutable."""
        return take_snapshot(self._state)

    def knows(self, model: ModelId) -> bool:
        """Tell whether anything is known of a model."""
        return model in self._state.models

    def lives(self, runner: RunnerId) -> bool:
        """Tell whether a runner was launched and is not unloaded yet."""
        return runner in self._state.runners

    def models_in_use(self) -> frozenset[ModelId]:
        """Return the models that are asked for, read, pinned or have a runner."""
        return self._state.models_in_use()

    def checkpoint(self) -> CoreCheckpoint:
        """Return everything that it is made of, independent of what becomes of it."""
        return CoreCheckpoint(
            self._state.copy(), self.late, self.finished, self.policy_failure, self._lifecycle.claim_failure
        )

    @classmethod
    def restore(cls, state: CoreCheckpoint, policy: EvictionPolicy | None = None) -> Self:
        """Return a core that goes on from `state`, and owns it from now on; without a journal."""
        core = cls(state.state.config, policy)
        core._state = state.state
        core._lifecycle = Claims(state.state)
        core._lifecycle.claim_failure = state.claim_failure
        core.late, core.finished, core.policy_failure = state.late, state.finished, state.policy_failure
        return core

    def copy(self) -> Self:
        """Return an independent core in the same state, without a journal."""
        return self.restore(self.checkpoint(), self.policy)

    # -- events -------------------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        match event:
            case Acquire():
                self._acquire(event)
            case Release() | Cancel():
                self._leave(event)
            case Tick():
                while (key := self._state.timers.take_due(self._state.now)) is not None:
                    self._time_is_up(key)
            case Sampled():
                self._sampled(event)
            case Inspected():
                self._inspected(event)
            case ClaimContended() | ClaimGranted():
                self.late += not self._lifecycle.claim_answered(event)
            case Progress() | Loaded() | ContextFilled() | OutOfMemory() | Unresponsive() | Exited():
                runner = self._state.runners.get(event.runner)
                if runner is None or not runner.process:
                    self.late += 1  # of an earlier life
                else:
                    self._runner_event(runner, event)
            case Expire():
                self.late += not self._lifecycle.expire_model(event.model)
            case Pin():
                self._lifecycle.pin(self._lifecycle.model(event.model), True)
            case Unpin() if event.model in self._state.models:
                self._lifecycle.pin(self._state.models[event.model], False)
            case Unpin():
                self.late += 1  # it was never pinned
            case Configure():
                self._lifecycle.configure(event)
            case Close():
                self._close(event.timeout_s)
            case _:
                assert_never(event)

    def _acquire(self, event: Acquire) -> None:
        state, spec = self._state, event.spec
        request = Request(event.request, spec, event.keep_alive_s, state.now)
        if request.id in state.requests:
            self.late += 1  # a duplicate
            return
        if state.closing:
            self._lifecycle.reject(request, SchedulerClosed())
            return
        model = state.models.get(spec.model)
        runner = model.current if model is not None else None
        warm = runner is not None and runner.state is not LOADING and spec.purpose is not Purpose.memory
        if runner is not None and warm and runner_serves(runner, spec):
            if model is not None and spec.purpose is Purpose.lease and not runner.leases:
                model.record_arrival(state.now, state.idle_intervals)
            self._lifecycle.grant(request, runner)
            return
        if state.queued >= state.config.max_queue:
            self._lifecycle.reject(request, QueueFullRefusal(state.config.max_queue, self._lifecycle.retry_after_s()))
            return
        if spec.purpose is not Purpose.memory:
            model = model or self._lifecycle.model(spec.model)
            if state.now < model.blocked_until:
                self._lifecycle.reject(request, self._lifecycle.load_failure(model, out_of_memory=False))
                return
            if spec.purpose is Purpose.lease:
                model.record_arrival(state.now, state.idle_intervals)
            model.inspected_since_launch = (
                model.inspected_since_launch and model.id in state.specs_by_model
            )  # else it was read for somebody who left
        if len(state.enqueue(request).requests) == 1:
            self._lifecycle.unevaluated[spec] = None
        if event.timeout_s is not None:
            state.timers.set(("request", request.id), state.now + event.timeout_s)
        self._lifecycle.decide("queued", spec.model, Queued(state.queued), request.id)
        self._lifecycle.replan = True
        self._refuse_in_time([request])

    def _leave(self, event: Release | Cancel) -> None:
        """End a request from the asker's side. A Cancel after the Grant releases: the lease was never received."""
        request = self._state.requests.get(event.request)
        if request is None:
            self.late += 1  # released, lost or rejected before
        elif request.state is RequestState.granted:
            self._lifecycle.release(request)
        elif isinstance(event, Cancel):
            self._lifecycle.answer(request, RequestState.cancelled, Cancelled(request.spec.model))
            self._lifecycle.abandon_load(request)
        else:
            self.late += 1  # a Release of what was never granted

    def _time_is_up(self, key: Key) -> None:
        state = self._state
        kind, id = key
        match kind:
            case "keep-alive":
                self._lifecycle.expire(state.runners[RunnerId(id)], RunnerReason.keep_alive_over)
            case "load":
                runner = state.runners[RunnerId(id)]
                self._lifecycle.load_failed(runner, LoadStalled(state.config.load_timeout_s))
                self._lifecycle.stop(runner)
            case "memory":
                self._lifecycle.await_memory(state.runners[RunnerId(id)])
            case "request":
                request = state.requests[RequestId(id)]
                group = state.groups[request.spec]
                timed_out = TimedOut(request.spec.model, state.now - request.queued_at, group.waits_for)
                self._lifecycle.answer(request, RequestState.rejected, timed_out)
                self._lifecycle.abandon_load(request)
            case "close":
                for runner in [runner for runner in state.runners.values() if runner.leases]:
                    self._lifecycle.revoke_leases(runner, None)
                    self._lifecycle.stop(runner)
            case "plan":
                self._lifecycle.replan = True
            case "claim":
                self._lifecycle.claim_time_is_up(id)
            case _:
                assert_never(kind)

    def _sampled(self, event: Sampled) -> None:
        state, mapped = self._state, dict(event.mapped)
        for id, amounts in event.resident:
            runner = state.runners.get(id)
            if runner is None:
                continue
            grown = self._lifecycle.measure(runner, amounts, mapped.get(id, 0))
            if grown and runner.state is LOADING:  # the load is alive
                state.timers.set(("load", id), state.now + state.config.load_timeout_s)
        state.ledger.sample(event.devices)
        for runner in [runner for runner in state.runners.values() if not runner.process]:
            if event.number >= runner.last_sample and self._lifecycle.memory_is_back(runner):
                self._lifecycle.unload(runner, RunnerReason.memory_freed)
        self._lifecycle.replan = True

    def _inspected(self, event: Inspected) -> None:
        model = self._state.models.get(event.model)
        if model is None or not model.inspecting:
            self.late += 1
            return
        model.inspecting = False
        match event.outcome:
            case ModelNotFoundRefusal() | InvalidModelRefusal() as refusal:
                for group in self._state.groups_of_model(model.id):
                    if model.current is None or not runner_serves(model.current, group.spec):
                        self._lifecycle.reject_line(group, refusal)
                lives = any(runner.model == model.id for runner in self._state.runners.values())
                if not (lives or model.pinned or model.failures or model.measured):
                    del self._state.models[model.id]  # a name that means nothing is not kept
            case info:
                model.apply_inspection(info, self._state.next_runner, event.history)
                self._lifecycle.reevaluate(model)
                waiting = [
                    request for group in self._state.groups_of_model(model.id) for request in group.requests.values()
                ]
                self._refuse_in_time(waiting)

    def _refuse_in_time(self, requests: Iterable[Request]) -> None:
        """Tell those at once whose own time limit ends before their model can be there; they evict nobody."""
        for request in requests:
            if (refusal := infeasible_deadline(self._state, request)) is not None:
                self._lifecycle.answer(request, RequestState.rejected, refusal)

    def _runner_event(
        self, runner: Runner, event: Progress | Loaded | ContextFilled | OutOfMemory | Unresponsive | Exited
    ) -> None:
        match event:
            case Progress():
                if runner.state is LOADING:
                    self._state.timers.set(("load", runner.id), self._state.now + self._state.config.load_timeout_s)
                else:
                    self.late += 1  # it is loaded, or given up
            case Loaded():
                if runner.state is LOADING:
                    self._lifecycle.loaded(runner, event)
                else:
                    self.late += 1  # cancelled meanwhile; it is being stopped
            case ContextFilled():
                if runner.loaded_at is None or not self._lifecycle.observe_peak(runner, event):
                    self.late += 1  # it has served nobody, or has settled before
            case OutOfMemory():
                runner.out_of_memory = True
                if runner.loaded_at is not None:
                    self._lifecycle.ran_out(runner)
            case Unresponsive():
                self._lifecycle.unresponsive(runner, event.reason)
            case Exited():
                self._lifecycle.exited(runner, event)

    def _close(self, timeout_s: float) -> None:
        state = self._state
        state.closing = self._lifecycle.replan = True
        for group in list(state.groups.values()):
            self._lifecycle.reject_line(group, SchedulerClosed())
        for runner in [runner for runner in state.runners.values() if runner.current]:
            self._lifecycle.expire(runner, RunnerReason.closing)
        for request in [request for request in state.requests.values() if request.runner is None]:
            self._lifecycle.release(request)
        state.timers.set(("close", 0), min(state.timers.at(("close", 0)), state.now + timeout_s))

    def _carry_out_plans(self) -> None:
        while self._carry_out_plan():
            pass
        self._lifecycle.replan = False
        if self._state.closing and not self._state.runners and not self.finished:
            self.finished = True
            self._lifecycle.commands.append(Finished())

    def _carry_out_plan(self) -> bool:
        """Make a plan and do what it says; return whether another one may find more to do."""
        state = self._state
        if not state.groups and not state.overfull():
            self._lifecycle.unevaluated.clear()
            if state.claims:  # whoever they were for has left
                self._lifecycle.launch_all(())
            if state.prefetching:
                read_ahead(self._lifecycle, None)
            return False
        plan = make_plan(state, self.policy, self._lifecycle.unevaluated)
        if self.plans is not None:
            self.plans.append(plan)
        self.policy_failure = plan.policy_failure or self.policy_failure
        if plan.matches or plan.refusals:
            self._answer_at_once(plan)
            return True  # what they would have taken is free for those behind them
        self._lifecycle.unevaluated.clear()
        for model in plan.inspections:
            if not model.inspecting:
                model.inspecting = True
                self._lifecycle.commands.append(Inspect(model.id))
        if self.decision_log is not None:
            tell_victims(state, plan, self.decision_log)
        self._lifecycle.notify_contention(plan.contended.union(id for id in plan.victims if state.runners[id].leases))
        for id, reason in plan.victims.items():
            self._lifecycle.expire(state.runners[id], reason)
        for request in plan.memory:
            self._lifecycle.grant_memory(request)
        since = RunnerId(state.next_runner)
        self._lifecycle.launch_all(plan.launches)
        if self.decision_log is not None:
            tell_placed(state, plan, since, self.decision_log)
            tell_waits(state, plan, self.decision_log)
        state.timers.set(("plan", 0), plan.replan_at)
        if plan.victims or plan.memory or state.next_runner > since:
            return True  # there may be more to do, or to read, beside these
        read_ahead(self._lifecycle, plan)
        return False

    def _answer_at_once(self, plan: Plan) -> None:
        """Answer those for whom nothing has to be loaded: what they want is there after all, or can never be."""
        for group, runner in plan.matches:
            if len(runner.equivalent_requests) >= MOST_KINDS and runner.state is not LOADING:
                runner.equivalent_requests.clear()  # whoever asks for them again is judged again
            runner.equivalent_requests.add(group.spec.options)
            if runner.state is not LOADING:
                self._lifecycle.serve(runner, [group])
        for group, refusal in plan.refusals:
            self._lifecycle.reject_line(group, refusal)
