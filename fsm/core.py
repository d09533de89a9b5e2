"""The decision core: events and time in, commands out.

`Core.step` alone changes the state. The same state and the same inputs give the same outputs; `step` never raises for
late or duplicate input. This module says what each event means; the package `lifecycle` carries it out.

`Core` is also all that the shell sees of the state: queries that return values. The tables behind them are private.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self, assert_never

from fsm.domain.devices import HOST
from fsm.domain.options import Options
from fsm.eviction.policies import DEFAULT_POLICY, EvictionPolicy
from fsm.lifecycle import device_claims, failures, loads, measurements, memory_recovery, requests, runners
from fsm.lifecycle.apply_plan import apply_plan, stand_down
from fsm.lifecycle.step_context import StepContext
from fsm.machine.request import ModelId, Purpose, Request, RequestId, RequestState
from fsm.machine.runner import IDLE, LOADING, Runner, RunnerId
from fsm.messages.commands import Command, Finished
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
    FilesReplaced,
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
from fsm.messages.reasons import ClaimMissed, LoadStalled, Queued, RunnerReason, RunnerStep, WaitFor, WaitForRunners
from fsm.messages.refusals import (
    Cancelled,
    InvalidModelRefusal,
    LoadFailedRefusal,
    ModelNotFoundRefusal,
    QueueFullRefusal,
    SchedulerClosed,
    TimedOut,
)
from fsm.planning.deadline_admission import infeasible_deadline
from fsm.planning.deadlock import held_up, would_deadlock
from fsm.planning.explanations import tell_wait
from fsm.planning.plan import Plan
from fsm.planning.planner import make_plan
from fsm.planning.relocation import PLACES_LOOK_S, is_better_place_free, is_to_move, may_move
from fsm.state.core_config import CoreConfig
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord
from fsm.state.request_queue import RequestGroup
from fsm.state.runner_match import match
from fsm.state.snapshot import DeviceView, HeldView, RunnerView, Snapshot, WaitView, take_snapshot
from fsm.state.timers import Key

__all__ = ["Core", "CoreCheckpoint", "CoreConfig", "DeviceView", "HeldView", "RunnerView", "Snapshot", "WaitView"]


@dataclass(frozen=True, slots=True)
class CoreCheckpoint:
    """Everything that a core consists of, but for its eviction policy."""

    state: CoreState
    late: int
    finished: bool
    policy_failure: str
    claim_failure: ClaimMissed | None

    def models(self) -> tuple[ModelId, ...]:
        """Return every model that has a model record."""
        return tuple(self.state.models)


class Core:
    """The runners of one scheduler and the rules by which requests share them; not thread-safe, and free of threads."""

    def __init__(self, limits: CoreConfig | None = None, policy: EvictionPolicy | None = None) -> None:
        self._state = CoreState(limits or CoreConfig())
        self.policy = DEFAULT_POLICY if policy is None else policy
        self._context = StepContext(self._state)
        self.late = 0  # late or duplicate events that were ignored
        self.plans: list[Plan] | None = None  # every plan is appended to it; None (the default): plans are not kept
        self.policy_failure = ""  # the last exception that the eviction policy raised, in words
        self.finished = False  # the command Finished was returned

    def step(self, now: float, event: Event) -> list[Command]:
        """Return the commands that follow from an event, in order; `now` is in seconds and never goes back.

        The commands, and the entries of the decision log, belong to the step with the number `steps`.
        """
        state = self._state
        state.steps += 1
        state.now = now if now > state.now else state.now
        commands: list[Command] = []
        self._context.commands = commands
        self._handle(event)
        if self._context.replan:
            if state.config.plans_later and state.groups:
                self._plan_now_or_later(event)
            else:
                self._carry_out_plans()
        return commands

    def _plan_now_or_later(self, event: Event) -> None:
        """Leave a plan to the next Tick, unless this is one, or a request that does not wait: it has what is there."""
        if isinstance(event, Tick) or (isinstance(event, Acquire) and event.timeout_s == 0.0):
            self._carry_out_plans()
        else:
            self._state.plan_due, self._context.replan = True, False

    def undone(self) -> list[Command]:
        """Return the commands of a new plan at this moment: none if the last step has left nothing undone."""
        twin = self.copy()
        twin._carry_out_plans()
        return twin._context.commands

    @property
    def decision_log(self) -> list[Entry] | None:
        """Entries on what was decided and why are appended to it; None (the default): no entries are made."""
        return self._context.decision_log

    @decision_log.setter
    def decision_log(self, decision_log: list[Entry] | None) -> None:
        self._context.decision_log = decision_log

    @property
    def steps(self) -> int:
        """The number of steps: the number of the step under way, or of the last step. A step that raises counts."""
        return self._state.steps

    def deadline(self) -> float:
        """Return the time at which the next Tick is due, or a little before; infinite when no timer is set."""
        return self._state.now if self._state.plan_due else self._state.timers.deadline()

    @property
    def plan_due(self) -> bool:
        """Whether events wait for a plan, which the next Tick makes; it is due at once."""
        return self._state.plan_due

    def failures(self) -> tuple[str | ClaimMissed, ...]:
        """Return the failures around decisions that the core has worked round; a text is the policy's exception."""
        return tuple(filter(None, (self.policy_failure, self._context.claim_failure)))

    def snapshot(self) -> Snapshot:
        """Return what can be seen of the state from outside, immutable."""
        snapshot = take_snapshot(self._state)
        if not (models := held_up(self._state)):
            return snapshot
        waits = {request: WaitForRunners(names, RunnerStep.release) for request, names in models.items()}
        queue = tuple(replace(one, waits_for=waits.get(one.request, one.waits_for)) for one in snapshot.queue)
        return replace(snapshot, queue=queue)

    def held_up(self) -> dict[RequestId, tuple[ModelId, ...]]:
        """Return the requests that wait for leases whose holders wait themselves, and the models of these leases."""
        return held_up(self._state)

    def knows(self, model: ModelId) -> bool:
        """Tell whether a model has a model record."""
        return model in self._state.models

    def is_wanted(self, request: RequestId) -> bool:
        """Tell whether others wait for the memory of the runner that a request was granted, evicted for them or not."""
        state, granted = self._state, self._state.requests.get(request)
        runner = state.runners.get(RunnerId(granted.runner)) if granted is not None and granted.runner else None
        if runner is None or not state.groups:
            return False
        return runner.contended or any(runner.id in group.evicted for group in state.groups.values())

    def lives(self, runner: RunnerId) -> bool:
        """Tell whether a runner was launched and is not unloaded yet."""
        return runner in self._state.runners

    def options_asked_of(self, model: ModelId) -> tuple[Options, ...]:
        """Return the options that the requests which wait for a model name, each once."""
        return self._state.options_asked_of(model)

    def free_host_bytes(self) -> int:
        """Return the bytes of the host that can still be reserved; 0 before the devices were read."""
        ledger = self._state.ledger
        return ledger.free_bytes(HOST) if HOST in ledger.devices else 0

    def models_in_use(self) -> frozenset[ModelId]:
        """Return the models that are requested, inspected, pinned or have a runner."""
        return self._state.models_in_use()

    def checkpoint(self) -> CoreCheckpoint:
        """Return an independent copy of everything that the core consists of."""
        return CoreCheckpoint(
            self._state.copy(), self.late, self.finished, self.policy_failure, self._context.claim_failure
        )

    @classmethod
    def restore(cls, state: CoreCheckpoint, policy: EvictionPolicy | None = None) -> Self:
        """Return a core that goes on from `state`, and owns it from now on; without a decision log."""
        core = cls(state.state.config, policy)
        core._state = state.state
        core._context = StepContext(state.state)
        core._context.claim_failure = state.claim_failure
        core.late, core.finished, core.policy_failure = state.late, state.finished, state.policy_failure
        return core

    def copy(self) -> Self:
        """Return an independent core in the same state, without a decision log."""
        return self.restore(self.checkpoint(), self.policy)

    # -- events -------------------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        match event:
            case Acquire():
                self._acquire(event)
            case Release() | Cancel():
                self._leave(event)
            case Tick():
                self._context.replan = self._state.plan_due
                while (key := self._state.timers.take_due(self._state.now)) is not None:
                    self._time_is_up(key)
            case Sampled():
                self._sampled(event)
            case Inspected():
                self._inspected(event)
            case ClaimContended() | ClaimGranted():
                self.late += not device_claims.claim_answered(self._context, event)
            case Progress() | Loaded() | ContextFilled() | OutOfMemory() | FilesReplaced() | Unresponsive() | Exited():
                runner = self._state.runners.get(event.runner)
                if runner is None or not runner.process:
                    self.late += 1  # of a runner that has ended
                else:
                    self._runner_event(runner, event)
            case Expire():
                self.late += not runners.expire_model(self._context, event.model)
            case Pin():
                runners.pin(self._context, self._context.model(event.model), True)
            case Unpin() if event.model in self._state.models:
                runners.pin(self._context, self._state.models[event.model], False)
            case Unpin():
                self.late += 1  # the model was never pinned
            case Configure():
                runners.configure(self._context, event)
                if event.max_leases is not None:
                    self._serve_loaded()
            case Close():
                self._close(event.timeout_s)
            case _:
                assert_never(event)

    def _acquire(self, event: Acquire) -> None:
        """Answer a request, or queue it for the next plan:

        1. A request whose id is known is late.
        2. While the scheduler closes, the request is refused.
        3. A loaded runner that serves the request is granted at once, past the queue and its limit, unless it holds as
           many leases as it may. One that rests where a better place has been free for long is expired instead, and the
           request is queued.
        4. Where as many requests wait as may wait, the request is refused.
        5. Where its model is backed off after failures, the request is refused.
        6. Else the request is queued. If no load of its model can be over within its time limit, or if its own caller
           keeps what it waits for, it is refused at once.
        """
        state, spec = self._state, event.spec
        request = Request(event.request, spec, event.keep_alive_s, state.now, event.holds, event.keeps)
        if request.id in state.requests:  # 1
            self.late += 1
            return
        if state.closing:  # 2
            requests.reject(self._context, request, SchedulerClosed())
            return
        model = state.models.get(spec.model)
        runner = model.current if model is not None else None
        if model is not None and event.max_leases is not None:
            self._limit_leases(model, event.max_leases)
        warm = runner is not None and runner.state is not LOADING and spec.purpose is not Purpose.memory
        if model is not None and runner is not None and (state.config.max_leases or model.max_leases is not None):
            warm = warm and state.may_be_granted(runner, spec.purpose)
        if runner is not None and warm and match(runner, spec.options) and not self._moved(runner, event):  # 3
            if model is not None and spec.purpose is Purpose.lease and not runner.leases:
                model.record_arrival(state.now, state.idle_intervals)
            requests.grant(self._context, request, runner)
        elif state.queued >= state.config.max_queue:  # 4
            retry_after_s = requests.retry_after_s(self._context)
            requests.reject(self._context, request, QueueFullRefusal(state.config.max_queue, retry_after_s))
        else:
            self._queue(request, event)

    def _moved(self, runner: Runner, event: Acquire) -> bool:
        """Expire a runner at rest that is to move to a better place; else have places looked for now and then."""
        if runner.state is not IDLE or runner.fully_offloaded:
            return False
        if is_to_move(self._state, runner, event):
            runners.expire(self._context, runner, RunnerReason.better_place)
            return True
        if self._state.now - self._state.read_at >= PLACES_LOOK_S and may_move(self._state, runner):
            self._context.read_devices()
        return False

    def _limit_leases(self, model: ModelRecord, max_leases: int) -> None:
        """Take over the limit of leases that a request names; with a higher one, requests that waited go before it."""
        if max_leases == model.max_leases:
            return
        model.max_leases = max_leases
        if model.current is not None and model.current.state is not LOADING:
            requests.serve(self._context, model.current, self._state.groups_served_by(model.current))

    def _serve_loaded(self) -> None:
        """Serve the requests that wait for leases of loaded runners, after the limit of leases has changed."""
        state = self._state
        for runner in [one for one in state.runners.values() if one.current and one.state is not LOADING]:
            requests.serve(self._context, runner, state.groups_served_by(runner))

    def _queue(self, request: Request, event: Acquire) -> None:
        state, spec, timeout_s = self._state, request.spec, event.timeout_s
        if spec.purpose is not Purpose.memory:
            model = self._context.model(spec.model)
            if event.max_leases is not None:
                self._limit_leases(model, event.max_leases)
            if state.now < model.blocked_until and model.failure is not None:  # 5
                refusal = LoadFailedRefusal(model.id, model.failure, model.blocked_until - state.now)
                requests.reject(self._context, request, refusal)
                return
            if spec.purpose is Purpose.lease:
                model.record_arrival(state.now, state.idle_intervals)
            if model.id not in state.specs_by_model:  # an inspection, if any, was for a request that has left
                model.inspected_since_launch = False
        group = state.enqueue(request)
        if timeout_s is not None:
            state.timers.set(("request", request.id), state.now + timeout_s)
        self._context.decide("queued", spec.model, Queued(state.queued), request.id)
        self._refuse_hopeless([request])  # 6
        if request.state is RequestState.queued:
            self._find_next_step(group, timeout_s)

    def _find_next_step(self, group: RequestGroup, timeout_s: float | None) -> None:
        """Have a group planned that a request has just joined, unless a plan would find nothing to do:

        1. A request without a time limit does not change what is planned for the requests before it.
        2. For a model whose files have to be read first, nothing can be planned until they are.
        """
        spec = group.spec
        if spec.purpose is not Purpose.memory:
            model = self._state.models[spec.model]
            served = model.current is not None and match(model.current, spec.options)
            if len(group.requests) > 1 and timeout_s is None:  # 1
                return
            if len(group.requests) == 1 and not served and not model.is_read_for(spec.options):  # 2
                loads.inspect(self._context, model)
                group.wait(WaitFor.metadata)
                if self._context.decision_log is not None:
                    tell_wait(self._state, group, self._context.decision_log)
                return
        self._state.unevaluated[spec] = True
        self._context.replan = True

    def _leave(self, event: Release | Cancel) -> None:
        """End a request for its caller. A Cancel after the Grant releases: the caller never received the lease."""
        request = self._state.requests.get(event.request)
        if request is None:
            self.late += 1  # the request was released, lost or rejected before
        elif request.state is RequestState.granted:
            requests.release(self._context, request)
        elif isinstance(event, Cancel):
            requests.answer(self._context, request, RequestState.cancelled, Cancelled(request.spec.model))
            requests.abandon_load(self._context, request)
        else:
            self.late += 1  # a Release of a request that was never granted

    def _time_is_up(self, key: Key) -> None:
        state = self._state
        kind, id = key
        match kind:
            case "keep-alive":
                runners.expire(self._context, state.runners[RunnerId(id)], RunnerReason.keep_alive_over)
            case "load":
                runner = state.runners[RunnerId(id)]
                failures.load_failed(self._context, runner, LoadStalled(state.config.load_timeout_s))
                runners.stop(self._context, runner)
            case "memory":
                memory_recovery.await_memory(self._context, state.runners[RunnerId(id)])
            case "request":
                request = state.requests[RequestId(id)]
                group = state.groups[request.spec]
                timed_out = TimedOut(request.spec.model, state.now - request.queued_at, group.waits_for)
                requests.answer(self._context, request, RequestState.rejected, timed_out)
                requests.abandon_load(self._context, request)
            case "close":
                for runner in [runner for runner in state.runners.values() if runner.leases]:
                    runners.revoke_leases(self._context, runner, None)
                    runners.stop(self._context, runner)
            case "plan":
                self._context.replan = True
            case "claim":
                device_claims.claim_time_is_up(self._context, id)
            case _:
                assert_never(kind)

    def _sampled(self, event: Sampled) -> None:
        state, mapped = self._state, dict(event.mapped)
        before = state.ledger.view() if (awaited := state.is_memory_awaited()) else None
        for id, amounts in event.resident:
            runner = state.runners.get(id)
            if runner is None:
                continue
            grown = measurements.measure(self._context, runner, amounts, mapped.get(id, 0))
            if grown and runner.state is LOADING:  # the load is alive
                state.timers.set(("load", id), state.now + state.config.load_timeout_s)
        for id, prompts_s in event.prompts:
            if (runner := state.runners.get(id)) is not None:
                runner.prompts_s = prompts_s
        state.ledger.sample(event.devices)
        state.read_at = state.now
        for runner in state.runners.values():
            found = is_better_place_free(state, runner, runner.asked)
            runner.better_place_since = min(runner.better_place_since, state.now) if found else math.inf
        for runner in [runner for runner in state.runners.values() if not runner.process]:
            if event.number >= runner.last_sample and memory_recovery.memory_is_back(self._context, runner):
                memory_recovery.unload(self._context, runner, RunnerReason.memory_freed)
        if state.overfull() or (awaited and state.ledger.view() != before):
            self._context.replan = True

    def _inspected(self, event: Inspected) -> None:
        model = self._state.models.get(event.model)
        if model is None or not model.inspecting:
            self.late += 1
            return
        model.inspecting = False
        match event.outcome:
            case ModelNotFoundRefusal() | InvalidModelRefusal() as refusal:
                for group in self._state.groups_of_model(model.id):
                    if model.current is None or not match(model.current, group.spec.options):
                        requests.reject_group(self._context, group, refusal)
                lives = any(runner.model == model.id for runner in self._state.runners.values())
                if not (lives or model.pinned or model.failures or model.measured):
                    del self._state.models[model.id]  # a name without a model is not kept
            case profile:
                self._state.apply_inspection(model, profile, event.history)
                self._context.reevaluate(model)
                waiting = [
                    request for group in self._state.groups_of_model(model.id) for request in group.requests.values()
                ]
                self._refuse_hopeless(waiting)

    def _refuse_hopeless(self, waiting: Iterable[Request]) -> None:
        """Refuse the requests that would wait in vain for certain; no runner is evicted for them.

        Their time limit ends before their model can be loaded, or their own callers keep what they wait for.
        """
        for request in waiting:
            refusal = infeasible_deadline(self._state, request) or would_deadlock(self._state, request)
            if refusal is not None:
                requests.answer(self._context, request, RequestState.rejected, refusal)

    def _runner_event(
        self,
        runner: Runner,
        event: Progress | Loaded | ContextFilled | OutOfMemory | FilesReplaced | Unresponsive | Exited,
    ) -> None:
        match event:
            case Progress():
                if runner.state is LOADING:
                    self._state.timers.set(("load", runner.id), self._state.now + self._state.config.load_timeout_s)
                else:
                    self.late += 1  # the runner is loaded, or expiring
            case Loaded():
                if runner.state is LOADING:
                    loads.loaded(self._context, runner, event)
                else:
                    self.late += 1  # the load was cancelled meanwhile; the runner is being stopped
            case ContextFilled():
                if runner.loaded_at is None or not measurements.observe_peak(self._context, runner, event):
                    self.late += 1  # the runner has not loaded, or its peak was observed before
            case OutOfMemory():
                runner.out_of_memory = True
                if runner.loaded_at is not None:
                    failures.ran_out(self._context, runner)
            case FilesReplaced():
                self.late += not runners.replace_files(self._context, runner)
            case Unresponsive():
                failures.unresponsive(self._context, runner, event.reason)
            case Exited():
                failures.exited(self._context, runner, event)

    def _close(self, timeout_s: float) -> None:
        state = self._state
        state.closing = self._context.replan = True
        for group in list(state.groups.values()):
            requests.reject_group(self._context, group, SchedulerClosed())
        for runner in [runner for runner in state.runners.values() if runner.current]:
            runners.expire(self._context, runner, RunnerReason.closing)
        for request in [request for request in state.requests.values() if request.runner is None]:
            requests.release(self._context, request)
        state.timers.set(("close", 0), min(state.timers.at(("close", 0)), state.now + timeout_s))

    def _carry_out_plans(self) -> None:
        """Plan and carry the plans out, until another plan would find nothing more to do."""
        context, state = self._context, self._state
        state.plan_due = False
        while True:
            if not state.groups and not state.overfull():
                stand_down(context)
                break
            plan = make_plan(state, self.policy, explains=context.decision_log is not None)
            if self.plans is not None:
                self.plans.append(plan)
            self.policy_failure = plan.policy_failure or self.policy_failure
            if not apply_plan(context, plan):
                break
        context.replan = False
        if state.closing and not state.runners and not self.finished:
            self.finished = True
            context.commands.append(Finished())
