"""What becomes of requests and runners: every change of the pool, and the commands that go with it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import replace

from fsm.domain.devices import Amounts, DeviceId, Placement
from fsm.domain.model_info import Options
from fsm.machine.request import ModelId, Purpose, Request, RequestId, RequestSpec, RequestState
from fsm.machine.runner import EXPIRING, IDLE, LOADING, READY, RUNNER_TABLE, Runner, RunnerId
from fsm.machine.transition_table import IllegalTransition
from fsm.messages.commands import (
    Command,
    Grant,
    Launch,
    NotifyContention,
    PersistMeasurement,
    Reject,
    RevokeLease,
    Stop,
)
from fsm.messages.decision_log import Decision, DecisionReason, Entry, Transition
from fsm.messages.events import Configure, ContextFilled, Loaded
from fsm.messages.reasons import (
    AskedBy,
    ExpireReason,
    FailureReason,
    Measured,
    RunnerReason,
    TransitionReason,
    Waited,
    WaitFor,
)
from fsm.messages.refusals import Refusal
from fsm.planning.deadline_admission import LOAD_TIME_TTL_S, is_fastest_placement
from fsm.planning.explanations import devices_refused, runners_refused
from fsm.planning.thread_allocation import threads_for
from fsm.sizing.load_history import note_bounded
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord
from fsm.state.request_queue import RequestGroup
from fsm.state.runner_match import runner_serves

TOLD = 5  # of a runner's transitions, where the next one is illegal


class Actions:
    """The verbs of the core. Each leaves the pool's invariants true and appends what the shell has to do for it."""

    __slots__ = ("commands", "decision_log", "replan", "state", "unevaluated")

    def __init__(self, state: CoreState) -> None:
        self.state = state
        self.commands: list[Command] = []  # of this step, in order
        self.decision_log: list[Entry] | None = None
        self.replan = False  # something changed that those who wait may care about
        self.unevaluated: dict[
            RequestSpec, None
        ] = {}  # lines to be judged by the next plan, however far back; empty after it

    # -- requests -----------------------------------------------------------------------------------------------------

    def grant(self, request: Request, runner: Runner) -> None:
        """Answer with a runner; the lease is booked in the same step, so nobody is handed one that is being stopped."""
        state = self.state
        runner.used_at = state.now
        if request.keep_alive_s is not None:
            runner.keep_alive_s, runner.uses_default_keep_alive = request.keep_alive_s, False
        if request.spec.purpose is Purpose.preload:
            request.state = RequestState.released
            if runner.state is IDLE:
                self.start_keep_alive(runner)
        else:
            request.state = RequestState.granted
            request.runner = runner.id
            state.requests[request.id] = request
            runner.leases.add(request.id)
            if runner.state is not READY:
                state.timers.clear(("keep-alive", runner.id))
                self.replan = self.replan or runner.contended  # it was to go in a moment; who asks its users plans anew
                self.fire(runner, "serve", RunnerReason.granted)
        self.commands.append(Grant(request.id, runner.id))
        if runner.contended and state.groups and request.runner is not None and not self.replan:
            request.asked = True
            self.commands.append(NotifyContention(runner.id, (request.id,)))  # the others were told before
        if self.decision_log is not None:
            self.decide("granted", runner.model, Waited(state.now - request.queued_at), request.id, runner.id)

    def release(self, request: Request) -> None:
        """Take back what a request was granted; the last lease lets its runner rest, expire or stop."""
        state = self.state
        request.state = RequestState.released
        del state.requests[request.id]
        if request.runner is None:
            state.ledger.release(("memory", request.id))
            self.replan = True
            return
        runner = state.runners[RunnerId(request.runner)]
        runner.leases.discard(request.id)
        runner.used_at = state.now
        if runner.leases:
            return
        if runner.state is EXPIRING:
            model = state.models[runner.model]
            if model.current is None:  # it rests from now on, and not since it was given up
                model.rested_at = max(model.rested_at, state.now)
            self.stop(runner)
            self.replan = True  # it is known by when it is gone
        elif runner.keep_alive_s <= 0 and not state.models[runner.model].pinned:
            self.expire(runner, RunnerReason.no_keep_alive)
        else:
            load_s = (runner.loaded_at or 0.0) - runner.launched_at
            runner.idle_grace_until = state.now + min(
                state.config.idle_grace_limit_s, state.config.idle_grace_part * load_s
            )
            self.rest(runner, RunnerReason.released)

    def reject(self, request: Request, refusal: Refusal) -> None:
        """Refuse a request that stands in no line, or no more."""
        request.state = RequestState.rejected
        self.commands.append(Reject(request.id, refusal))
        if self.decision_log is not None:
            entry = Decision(
                self.state.now, "rejected", request.spec.model, refusal, request.id,
                runners=runners_refused(self.state, refusal), devices=devices_refused(refusal), step=self.state.steps,
            )  # fmt: skip
            self.decision_log.append(entry)

    def answer(self, request: Request, state: RequestState, refusal: Refusal) -> None:
        """Take a request out of its line and refuse it; its place is free at once."""
        self.state.dequeue(request)
        del self.state.requests[request.id]
        if request.spec.model in self.state.models and request.spec.model not in self.state.specs_by_model:
            self.state.models[request.spec.model].load_exclusively = False  # that was for those who waited
        self.reject(request, refusal)
        request.state = state
        self.replan = True

    def reject_line(self, group: RequestGroup, refusal: Refusal) -> None:
        for request in list(group.requests.values()):
            self.answer(request, RequestState.rejected, refusal)

    def abandon_load(self, request: Request) -> None:
        """A load that nobody waits for goes on, unless its keep-alive is 0."""
        model = self.state.models.get(request.spec.model)
        runner = model.current if model is not None else None
        if model is None or runner is None or runner.state is not LOADING or self.state.groups_served_by(runner):
            return
        if not runner_serves(runner, request.spec):  # it was never waited for by this one
            return
        kept = model.pinned or (runner.keep_alive_s > 0 and request.keep_alive_s != 0)
        if runner.expire_when_served or not kept:
            self.expire(runner, RunnerReason.abandoned)

    def retry_after_s(self) -> float:
        """Estimate when a place in the queue is free: the loads that are waited for, one after another."""
        known = [model.load_s for model in self.state.models.values() if model.load_s is not None]
        return max(1.0, len(self.state.groups) * (sum(known) / len(known) if known else 1.0))

    # -- runners ------------------------------------------------------------------------------------------------------

    def grant_memory(self, request: Request) -> None:
        self.state.dequeue(request)
        request.state = RequestState.granted
        self.state.ledger.reserve(("memory", request.id), self.state.ledger.by_memory(request.spec.memory).items())
        self.commands.append(Grant(request.id, None))
        self.decide("granted", request.spec.model, Waited(self.state.now - request.queued_at), request.id)

    def launch(self, group: RequestGroup, options: Options, placement: Placement) -> Runner:
        """Begin a runner's life for those in a line; its memory is booked from here on."""
        state = self.state
        model = state.models[group.spec.model]
        keep_alive_s = group.head.keep_alive_s
        if keep_alive_s is None:
            keep_alive_s = state.config.keep_alive_s
        if (threads := threads_for(state, model, options, placement)) is not None:
            placement = replace(placement, threads=threads)
        runner = Runner(RunnerId(state.next_runner), model.id, options, placement, keep_alive_s, state.now)
        if threads is not None:
            runner.effective_options = replace(
                options, num_thread=threads.answers
            )  # who asks for as many is served by it
        runner.equivalent_requests.add(group.spec.options)
        runner.uses_default_keep_alive = group.head.keep_alive_s is None
        runner.fully_offloaded = placement.offloaded == model.demand(options, state.config)[1].layers
        state.next_runner += 1
        state.processes += 1
        state.runners[runner.id] = model.current = runner
        state.ledger.reserve(("runner", runner.id), placement.bytes)
        state.timers.set(("load", runner.id), state.now + state.config.load_timeout_s)
        group.wait(WaitFor.load, state.expected_at(runner))
        model.inspected_since_launch = False
        self.commands.append(Launch(runner.id, model.id, options, placement))
        if self.decision_log is not None:
            why = AskedBy(group.head.id)
            entry = Transition(state.now, runner.id, model.id, "launch", None, LOADING, why, 0, state.steps)
            self.decision_log.append(entry)
        return runner

    def loaded(self, runner: Runner, event: Loaded) -> None:
        """A load succeeded: everybody who waits for it is granted, or it rests."""
        state, model = self.state, self.state.models[runner.model]
        state.timers.clear(("load", runner.id))
        runner.loaded_at = runner.used_at = state.now
        load_s = state.now - runner.launched_at
        if runner.id >= model.first_runner_of_file and is_fastest_placement(state, runner):
            shortest_s, measured_at, count = model.shortest_load.get(runner.launch_options, (math.inf, -math.inf, 0))
            if state.now - measured_at > LOAD_TIME_TTL_S:
                shortest_s, count = math.inf, 0
            note_bounded(model.shortest_load, runner.launch_options, (min(load_s, shortest_s), state.now, count + 1))
        model.load_exclusively = False
        if event.num_ctx is not None and runner.effective_options.num_ctx is not None:
            runner.effective_options = replace(runner.effective_options, num_ctx=event.num_ctx)
        state.ledger.accounts["runner", runner.id].loaded = True
        self.measure(runner, event.resident, event.mapped_bytes)
        self.expect(runner, event)
        self.record_measurement(runner, load_s)
        self.serve(runner, state.groups_served_by(runner))
        if runner.leases:
            idle_s, in_use_s = state.config.residency_s(load_s)
            runner.resident_until, runner.drain_protected_until = state.now + idle_s, state.now + in_use_s
        elif runner.state is LOADING:
            self.rest(runner, RunnerReason.loaded)
        if runner.expire_when_served and runner.current:
            self.expire(runner, RunnerReason.asked_while_awaited)
        self.reevaluate(model)

    def measure(self, runner: Runner, amounts: Amounts, mapped_bytes: int) -> bool:
        """Book what a runner was seen to occupy, even beyond its promise; return whether it has grown."""
        account = self.state.ledger.accounts["runner", runner.id]
        account.mapped_bytes = mapped_bytes
        within = [device for device, promised in account.reserved.items() if account.peak.get(device, 0) <= promised]
        grown = account.measure(self.state.ledger.by_memory(amounts))
        beyond = [device for device in within if account.peak.get(device, 0) > account.reserved[device]]
        if beyond and self.decision_log is not None and not account.peak_observed:
            self.decide("measured", runner.model, self._figures(runner, beyond, filled=False), None, runner.id)
        return grown

    def observe_peak(self, runner: Runner, event: ContextFilled) -> bool:
        """Hold what was measured of a runner, where more was predicted too; False where that is done already."""
        account = self.state.ledger.accounts["runner", runner.id]
        if account.peak_observed:
            return False
        account.observe_peak(dict(event.expected_growth))
        self.record_measurement(runner)
        if self.decision_log is not None:
            self.decide("measured", runner.model, self._figures(runner, account.peak, filled=True), None, runner.id)
        self.replan = True  # there may be room for those who wait
        return True

    def expect(self, runner: Runner, event: Loaded) -> None:
        """Note the most that a runner will take, where its engine can tell that as soon as it has loaded.

        What was measured before is more exact: an earlier life may have filled a context.
        """
        account = self.state.ledger.accounts["runner", runner.id]
        for device, to_come in event.expected_growth if not runner.placement.measured else ():
            if device in account.peak:
                account.projected_peak[device] = account.peak[device] + to_come

    def record_measurement(self, runner: Runner, load_s: float | None = None) -> None:
        """Have the next runner like this one promised what this one took, or may yet take, where that was measured.

        What was neither settled nor said by the engine is as much as was predicted. `load_s` is told once a life.
        """
        model, account = self.state.models[runner.model], self.state.ledger.accounts["runner", runner.id]
        if runner.loaded_at is None or runner.id < model.first_runner_of_file:
            return
        key = runner.launch_options, runner.placement.gpu_layers
        took = before = model.measured.get(key, ())
        unseen = [device for device, size in account.reserved.items() if size and device not in account.peak]
        if not unseen and (
            load_s is None or account.projected_peak
        ):  # later there is more to go by, if the engine said nothing
            took = tuple((device, account.expected_bytes(device)) for device in sorted(account.reserved))
        if took != before:
            note_bounded(model.measured, key, took)
            model.demands.clear()
        if load_s is not None:
            model.note_load(runner.placement.gpu_layers, load_s)
        if self.state.config.persists_measurements and (took != before or load_s is not None):
            self.commands.append(PersistMeasurement(runner.id, took, load_s))

    def _figures(self, runner: Runner, devices: Iterable[DeviceId], *, filled: bool) -> Measured:
        account, predicted = self.state.ledger.accounts["runner", runner.id], dict(runner.placement.bytes)
        figures = (
            (device, predicted.get(device, 0), account.peak[device], account.held_bytes(device))
            for device in sorted(devices)
        )
        return Measured(tuple(figures), runner.placement.measured, filled)

    def serve(self, runner: Runner, groups: list[RequestGroup]) -> None:
        """Grant a loaded runner to everybody who waits for it, in order; those who want no lease come last."""
        requests = sorted((r for group in groups for r in group.requests.values()), key=lambda request: request.id)
        for request in requests:
            self.state.dequeue(request)
            del self.state.requests[request.id]
        for request in requests:
            if request.spec.purpose is Purpose.lease:
                self.grant(request, runner)
        for request in requests:
            if request.spec.purpose is Purpose.preload:
                if runner.state is LOADING:
                    runner.keep_alive_s = runner.keep_alive_s if request.keep_alive_s is None else request.keep_alive_s
                    self.rest(runner, RunnerReason.preloaded)
                self.grant(request, runner)

    def rest(self, runner: Runner, reason: RunnerReason) -> None:
        self.fire(runner, "rest", reason)
        self.start_keep_alive(runner)
        self.replan = True

    def start_keep_alive(self, runner: Runner) -> None:
        pinned = self.state.models[runner.model].pinned
        self.state.timers.set(("keep-alive", runner.id), math.inf if pinned else self.state.now + runner.keep_alive_s)

    def configure(self, event: Configure) -> None:
        """Take over changed limits; a keep-alive holds for the runners too for which no request has named one."""
        state = self.state
        changes = {name: value for name in event.__slots__ if (value := getattr(event, name)) is not None}
        state.config = replace(state.config, **changes)
        self.replan = True
        if event.keep_alive_s is None:
            return
        for runner in [runner for runner in state.runners.values() if runner.uses_default_keep_alive]:
            expires_at = state.timers.at(("keep-alive", runner.id))
            rests_since = expires_at - runner.keep_alive_s if expires_at < math.inf else runner.used_at
            runner.keep_alive_s = event.keep_alive_s
            if runner.state is not IDLE or state.models[runner.model].pinned:
                continue
            if rests_since + runner.keep_alive_s > state.now:
                state.timers.set(("keep-alive", runner.id), rests_since + runner.keep_alive_s)
            else:
                self.expire(runner, RunnerReason.keep_alive_over)

    def pin(self, model: ModelRecord, pinned: bool) -> None:
        model.pinned = pinned
        if model.current is not None and model.current.state is IDLE:
            self.start_keep_alive(model.current)
        self.replan = True

    def expire_model(self, id: ModelId) -> bool:
        """Return False where there is nothing to expire."""
        model = self.state.models.get(id)
        runner = model.current if model is not None else None
        if runner is None:
            return False
        if runner.state is LOADING and self.state.groups_served_by(runner):
            runner.expire_when_served = True
        else:
            self.expire(runner, RunnerReason.asked)
        return True

    def expire(self, runner: Runner, reason: ExpireReason) -> None:
        """Give a runner up, for good: it drains if it must, then stops."""
        self.fire(runner, "expire", reason)
        if runner.loaded_at is not None:
            self.state.models[runner.model].failures = 0  # it served, and ends in order
        self.forget_current(runner)
        if not runner.leases:
            self.stop(runner)
        else:
            limits = self.state.config
            runner.stop_deadline = self.state.now + max(limits.max_wait_s, limits.stop_timeout_s)

    def forget_current(self, runner: Runner) -> None:
        """Let its model have another runner: this one serves nobody new."""
        model = self.state.models[runner.model]
        model.current = None
        if runner.loaded_at is not None:
            model.rested_at = runner.used_at
        self.state.timers.clear(("keep-alive", runner.id))
        self.state.timers.clear(("load", runner.id))
        self.replan = True

    def notify_contention(self, wanted: Collection[RunnerId]) -> None:
        """Tell the holders of busy runners, once, that others wait for their memory; of all others nobody does."""
        for runner in self.state.runners.values():
            runner.contended = runner.id in wanted
            held = [self.state.requests[lease] for lease in sorted(runner.leases)]
            if unasked := [request for request in held if runner.contended and not request.asked]:
                self.commands.append(NotifyContention(runner.id, tuple(request.id for request in unasked)))
                for request in unasked:
                    request.asked = True

    def stop(self, runner: Runner) -> None:
        if runner.process and not runner.stopping:
            runner.stopping = True
            runner.stop_deadline = self.state.now + self.state.config.stop_timeout_s
            self.commands.append(Stop(runner.id))

    def revoke_leases(self, runner: Runner, reason: FailureReason | None) -> None:
        for lease in sorted(runner.leases):
            self.state.requests.pop(lease).state = RequestState.released
            self.commands.append(RevokeLease(lease, reason))
        runner.leases.clear()

    def crash(self, runner: Runner, reason: FailureReason) -> None:
        self.revoke_leases(runner, reason)
        self.fire(runner, "crash", reason)
        self.forget_current(runner)

    def model(self, id: ModelId) -> ModelRecord:
        return self.state.models.setdefault(id, ModelRecord(id))

    def reevaluate(self, model: ModelRecord) -> None:
        """Have everybody who waits for a model judged anew: more is known of it, or it has a runner."""
        self.unevaluated.update((group.spec, None) for group in self.state.groups_of_model(model.id))
        self.replan = True

    def fire(self, runner: Runner, trigger: str, reason: TransitionReason) -> None:
        """Move a runner by a trigger of its table, and note why; nothing else changes its state."""
        source, state = runner.state, self.state
        try:
            RUNNER_TABLE.fire(runner, trigger)
        except IllegalTransition as error:
            error.story = self._story(runner)
            raise
        if runner.on_host:
            state.busy_on_host += (runner.state is READY) - (source is READY)
            state.peak_busy_on_host = max(state.peak_busy_on_host, state.busy_on_host)
        if self.decision_log is not None:
            entry = Transition(
                state.now,
                runner.id,
                runner.model,
                trigger,
                source,
                runner.state,
                reason,
                len(runner.leases),
                state.steps,
            )
            self.decision_log.append(entry)

    def _story(self, runner: Runner) -> str:
        """Return what a runner has been through: its last transitions, where they are noted, and else its own times."""
        state, entries = self.state, self.decision_log or ()
        life = [entry for entry in entries if isinstance(entry, Transition) and entry.runner == runner.id]
        told = [
            f"in step {entry.step}, at {entry.at:g} s: {entry.trigger}, {entry.destination.value} ({entry.why})"
            for entry in life[-TOLD:]
        ]
        if not told:
            times = {"launched": runner.launched_at, "loaded": runner.loaded_at, "last used": runner.used_at}
            told = [f"{what} at {at:g} s" for what, at in times.items() if at is not None]
        return f"step {state.steps}, at {state.now:g} s; runner {runner.id} before it: {'; '.join(told)}"

    def decide(
        self, what: str, model: ModelId, why: DecisionReason, request: RequestId | None, runner: RunnerId | None = None
    ) -> None:
        if self.decision_log is not None:
            entry = Decision(self.state.now, what, model, why, request, runner, step=self.state.steps)
            self.decision_log.append(entry)
