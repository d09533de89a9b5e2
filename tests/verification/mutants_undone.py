"""Mutants that leave something undone: something changed, and the requests that wait for it are not planned again."""

from __future__ import annotations

from collections.abc import Callable

from fsm.core import Core
from fsm.lifecycle import requests, runners
from fsm.lifecycle.step_context import StepContext
from fsm.machine.request import Request
from fsm.machine.runner import Runner, RunnerId
from fsm.messages.events import Acquire, Event, Pin
from fsm.messages.reasons import RunnerReason
from fsm.state.model_record import ModelRecord
from tests.verification.mutant import Patch, instead, mutant


@mutant("own-memory", most=2000)
def memory_that_is_given_back_wakes_nobody(patch: Patch) -> None:
    """A release of the program's own memory causes no plan."""

    @instead(patch, requests, "release")
    def release(original: Callable[..., None], step: StepContext, request: Request) -> None:
        replan = step.replan
        original(step, request)
        step.replan = replan if request.runner is None else step.replan


@mutant("three-requests", most=2000)
def a_rest_wakes_nobody(patch: Patch) -> None:
    """A runner that becomes idle causes no plan."""

    @instead(patch, runners, "rest")
    def rest(original: Callable[..., None], step: StepContext, runner: Runner, reason: RunnerReason) -> None:
        replan = step.replan
        original(step, runner, reason)
        step.replan = replan


@mutant("pins", most=2000)
def an_end_of_a_pin_wakes_nobody(patch: Patch) -> None:
    """An unpin causes no plan, and requests that wait for the model's memory do not get it."""

    @instead(patch, runners, "pin")
    def pin(original: Callable[..., None], step: StepContext, model: ModelRecord, pinned: bool) -> None:
        replan = step.replan
        original(step, model, pinned)
        step.replan = replan


@mutant("four-requests", most=2000)
def who_takes_what_is_to_go_is_not_asked(patch: Patch) -> None:
    """A new lease holder of an idle runner that is to be evicted is not notified of contention."""

    @instead(patch, runners, "notify_contention")
    def ask(original: Callable[..., None], step: StepContext, wanted: set[RunnerId]) -> None:
        original(step, {id for id in wanted if step.state.runners[id].leases})


@mutant("plans-later", most=2000)
def a_plan_that_is_due_is_forgotten(patch: Patch) -> None:
    """An event leaves its plan to the next Tick, which never comes to know of it."""

    @instead(patch, Core, "_plan_now_or_later")
    def plan(original: Callable[..., None], core: Core, event: Event) -> None:
        original(core, event)
        core._state.plan_due = False


@mutant("plans-later", most=2000)
def a_request_that_does_not_wait_is_planned_later(patch: Patch) -> None:
    """A request whose time limit is 0 is left to the next Tick, which refuses it before the plan."""

    @instead(patch, Core, "_plan_now_or_later")
    def plan(original: Callable[..., None], core: Core, event: Event) -> None:
        original(core, Pin(event.spec.model) if isinstance(event, Acquire) else event)
