"""How a plan is carried out: answers first, then inspections, evictions, grants of memory, launches and prefetches."""

from __future__ import annotations

from fsm.lifecycle import device_claims, requests, runners
from fsm.lifecycle.loads import inspect
from fsm.lifecycle.prefetch import read_ahead
from fsm.lifecycle.step_context import StepContext
from fsm.machine.runner import LOADING, RunnerId
from fsm.planning.explanations import tell_placed, tell_victims, tell_waits
from fsm.planning.plan import Plan
from fsm.sizing.load_history import MOST_KINDS


def stand_down(step: StepContext) -> None:
    """End the device claims and prefetches that were for request groups, now that no request group is left."""
    step.state.unevaluated.clear()
    if step.state.claims:
        device_claims.launch_all(step, ())
    if step.state.prefetching:
        read_ahead(step, None)


def apply_plan(step: StepContext, plan: Plan) -> bool:
    """Carry a plan out; return whether another plan may find more to do."""
    state, log = step.state, step.decision_log
    if plan.matches or plan.refusals:
        _answer_at_once(step, plan)
        return True  # memory that was planned for these groups is free for the groups behind them
    step.state.unevaluated.clear()
    for spec, wait in plan.waits.items():
        state.groups[spec].wait(*wait)
    for model in plan.inspections:
        inspect(step, model)
    if log is not None:
        tell_victims(state, plan, log)
    runners.notify_contention(step, plan.contended.union(id for id in plan.victims if state.runners[id].leases))
    for spec, evicted in plan.evicted.items():
        group = state.groups[spec]
        group.evicted = (*(id for id in group.evicted if id in state.runners), *evicted)
    for id, reason in plan.victims.items():
        runners.expire(step, state.runners[id], reason)
    for request in plan.memory:
        requests.grant_memory(step, request)
    since = RunnerId(state.next_runner)
    device_claims.launch_all(step, plan.launches)
    if log is not None:
        tell_placed(state, plan, since, log)
        tell_waits(state, plan, log)
    state.timers.set(("plan", 0), plan.replan_at)
    if plan.victims or plan.memory or state.next_runner > since:
        return True  # another plan may find more to do, or files to read ahead
    read_ahead(step, plan)
    return False


def _answer_at_once(step: StepContext, plan: Plan) -> None:
    """Answer the groups that need no load: a runner serves them after all, or they can never be served."""
    for group, runner in plan.matches:
        granted = runner.state is not LOADING and step.state.may_be_granted(runner, group.spec.purpose)
        if len(runner.equivalent_requests) >= MOST_KINDS and granted:
            runner.equivalent_requests.clear()  # requests with these options are evaluated again
        runner.equivalent_requests.add(group.spec.options)
        if granted:
            requests.serve(step, runner, [group])
    for group, refusal in plan.refusals:
        requests.reject_group(step, group, refusal)
