"""How runners end that nobody asked to, and how the memory of all of them comes back."""

from __future__ import annotations

import math

from fsm.domain.devices import DeviceId
from fsm.lifecycle.actions import Actions
from fsm.machine.request import RequestState
from fsm.machine.runner import LOADING, Runner
from fsm.messages.commands import Sample
from fsm.messages.events import Exited
from fsm.messages.reasons import FailureReason, LoadStalled, ProcessExited, RanOutOfMemory, RunnerReason
from fsm.messages.refusals import LoadFailedRefusal, LoadTimeoutRefusal
from fsm.state.model_record import ModelRecord

MOST_MODELS = 1024  # that are remembered; more only where somebody uses them


class Endings(Actions):
    """The verbs of failed loads, crashes, back-off and memory recovery."""

    __slots__ = ()

    def exited(self, runner: Runner, event: Exited) -> None:
        """A process is gone, asked for or not: what that means depends on the state, and its memory is awaited."""
        reason = ProcessExited(event.code, event.reason, runner.loaded_at is not None)
        if runner.state is LOADING:
            self.load_failed(runner, reason, out_of_memory=event.out_of_memory or runner.out_of_memory)
        elif runner.current:
            self.crash(runner, reason)
            self.count_crash(runner, reason)
        else:
            self.revoke_leases(runner, reason)  # it died while it drained
        if event.out_of_memory and runner.loaded_at is not None:
            self.ran_out(runner)
        runner.process = False
        self.state.processes -= 1
        self.replan = True  # its place among the processes is free
        runner.recovery_targets = self.memory_to_come(runner)
        runner.recovery_deadline = runner.stop_deadline = self.state.now + self.state.config.recovery_timeout_s
        self.await_memory(runner)

    def unresponsive(self, runner: Runner, reason: FailureReason) -> None:
        """A process lives but is of no use: its leases are void, and it is stopped."""
        if runner.state is LOADING:
            self.load_failed(runner, reason)
        elif runner.current:
            self.crash(runner, reason)
            self.count_crash(runner, reason)
        else:
            self.revoke_leases(runner, reason)
        self.stop(runner)

    def ran_out(self, runner: Runner) -> None:
        """Memory ran out while a runner served: everybody is given up, since nobody knows who took it."""
        for other in [other for other in self.state.runners.values() if other.current]:
            self.expire(other, RanOutOfMemory(runner.model))

    def load_failed(self, runner: Runner, reason: FailureReason, *, out_of_memory: bool = False) -> None:
        """Answer those who waited for a load. After out of memory each survives one.

        The next load has a smaller context, where that was automatic and large, or else all others out of the way. With
        them out of the way it may fail once for those who came later, and not again: they would come for ever.
        """
        model = self.state.models[runner.model]
        waiting = [request for group in self.state.groups_served_by(runner) for request in group.requests.values()]
        self.crash(runner, reason)
        again = out_of_memory and not (model.load_exclusively and model.failures)
        survivors = [request for request in waiting if again and not request.survived]
        if survivors:
            model.failure = reason
            model.failures += model.load_exclusively
            model.load_exclusively = not model.step_down(runner)
            for request in survivors:  # a smaller context is no other try for who named one
                request.survived = model.load_exclusively or request.spec.options.num_ctx is None
        else:
            self.back_off(model, reason)
            model.load_exclusively = False
        stalled = LoadTimeoutRefusal(model.id, reason.timeout_s) if isinstance(reason, LoadStalled) else None
        failure = stalled or self.load_failure(model, out_of_memory=out_of_memory)
        if not survivors:  # the model is backed off for all
            waiting = [request for group in self.state.groups_of_model(model.id) for request in group.requests.values()]
        for request in waiting:
            if request not in survivors:
                self.answer(request, RequestState.rejected, failure)

    def count_crash(self, runner: Runner, reason: FailureReason) -> None:
        """Back a model off from its second crash in a row on; the first is followed by a new load."""
        model = self.state.models[runner.model]
        if runner.loaded_at is not None and self.state.now - runner.loaded_at >= self.state.config.good_life_s:
            model.failures = 0
        if model.failures:
            self.back_off(model, reason)
            for group in self.state.groups_of_model(model.id):
                self.reject_line(group, self.load_failure(model, out_of_memory=False))
        else:
            model.failures, model.failure = 1, reason

    def back_off(self, model: ModelRecord, reason: FailureReason) -> None:
        limits = self.state.config
        model.failure = reason
        model.blocked_until = self.state.now + min(
            limits.back_off_limit_s, limits.back_off_s * 2.0 ** min(model.failures, 16)
        )
        model.failures += 1

    def load_failure(self, model: ModelRecord, *, out_of_memory: bool) -> LoadFailedRefusal:
        assert model.failure is not None, f"{model.id} has not failed"
        retry_after_s = max(0.0, model.blocked_until - self.state.now)
        return LoadFailedRefusal(model.id, model.failure, retry_after_s, out_of_memory)

    def memory_to_come(self, runner: Runner) -> dict[DeviceId, int]:
        """Return what a GPU will have for us, by GPU, once a runner's memory is back: most of what it occupied."""
        ledger, account = self.state.ledger, self.state.ledger.accounts["runner", runner.id]
        samples = [ledger.devices[device] for device, _ in runner.placement.bytes if device in ledger.devices]
        gpus = [sample.id for sample in samples if sample.kind == "gpu" and not sample.integrated]
        part = self.state.config.recovery_fraction
        return {gpu: ledger.total_available(gpu) + int(part * account.occupied_bytes(gpu)) for gpu in gpus}

    def await_memory(self, runner: Runner) -> None:
        """Its process has gone: look until its memory is back, or the wait is over."""
        state = self.state
        if state.now >= runner.recovery_deadline:
            self.unload(runner, RunnerReason.memory_overdue)
            return
        state.samples += 1
        runner.last_sample = runner.last_sample or state.samples
        self.commands.append(Sample(state.samples))
        wait_s = state.config.recovery_interval_s if runner.recovery_targets else math.inf
        state.timers.set(("memory", runner.id), min(runner.recovery_deadline, state.now + wait_s))

    def memory_is_back(self, runner: Runner) -> bool:
        """Judge device by device with signed arithmetic; the host's memory is back when the process has gone."""
        ledger = self.state.ledger
        awaited = [(gpu, expected) for gpu, expected in runner.recovery_targets.items() if gpu in ledger.devices]
        return all(ledger.devices[gpu].fresh and ledger.total_available(gpu) >= expected for gpu, expected in awaited)

    def unload(self, runner: Runner, reason: RunnerReason) -> None:
        """End a runner's life: its reservation ends, and what it took is remembered for the next."""
        state, model = self.state, self.state.models[runner.model]
        self.record_measurement(runner)
        if runner.loaded_at is not None and model.context_limit is not None:  # the next may have more room
            model.context_limit = None
            model.demands.clear()
        state.timers.clear(("memory", runner.id))
        state.ledger.release(("runner", runner.id))
        self.fire(runner, "unload", reason)
        del state.runners[runner.id]
        if len(state.models) > MOST_MODELS:
            self.forget_models()
        self.replan = True

    def forget_models(self) -> None:
        """Forget of those models that are of no use to anybody now the ones that rested longest, many at a time."""
        state = self.state
        kept = state.models_in_use().union(id for id, one in state.models.items() if one.failures)
        rested = sorted((one.rested_at, id) for id, one in state.models.items() if id not in kept)
        for _, id in rested[: len(state.models) - MOST_MODELS // 2]:
            del state.models[id]
