"""The verbs of loads: the launch of a runner, and what follows once it has loaded."""

from __future__ import annotations

import math
from dataclasses import replace

from fsm.domain.devices import Placement
from fsm.domain.options import AUTOMATIC, Options
from fsm.lifecycle import measurements, requests, runners
from fsm.lifecycle.step_context import StepContext
from fsm.machine.runner import IDLE, LOADING, Runner, RunnerId
from fsm.messages.commands import Inspect, Launch
from fsm.messages.decision_log import Transition
from fsm.messages.events import Loaded
from fsm.messages.reasons import AskedBy, RunnerReason, WaitFor
from fsm.planning.deadline_admission import LOAD_TIME_TTL_S, is_fastest_placement
from fsm.planning.failed_loads import note_load
from fsm.planning.thread_allocation import threads_for
from fsm.sizing.footprint import Footprint
from fsm.sizing.load_history import note_bounded
from fsm.sizing.model_profile import ModelProfile, ResolvedLoad
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord
from fsm.state.request_queue import RequestGroup


def inspect(step: StepContext, model: ModelRecord) -> None:
    """Have a model's files read, unless they are being read, for all options that waiting requests name."""
    if model.inspecting:
        return
    model.inspecting = True
    asked = step.state.options_asked_of(model.id)
    roomier = [options for options in map(model.with_room, asked) if options is not None]
    unresolved = [options for options in dict.fromkeys((*asked, *roomier)) if model.resolution(options) is None]
    step.commands.append(Inspect(model.id, tuple(unresolved)))


def launch(step: StepContext, group: RequestGroup, load: ResolvedLoad, placement: Placement) -> Runner:
    """Launch a runner for a request group, and return it; its memory is reserved from here on."""
    state = step.state
    model = state.models[group.spec.model]
    keep_alive_s = group.head.keep_alive_s
    if keep_alive_s is None:
        keep_alive_s = state.config.keep_alive_s
    if (threads := threads_for(state, model, load, placement)) is not None:
        in_use = any(other.leases for other in state.runners.values())
        placement = replace(placement, threads=threads, holds_back=in_use)
    if model.projector_on_host and placement.gpu_layers:
        placement = replace(placement, projector_on_host=True)
    runner = Runner(RunnerId(state.next_runner), model.id, load.options, placement, keep_alive_s, state.now)
    if threads is not None:
        # a request that names these threads matches
        runner.effective_options = replace(load.options, num_thread=threads.answers)
    runner.chosen_options = _chosen(state, load.footprint, placement)
    runner.usual_options = _usual(model, group.spec.options)
    runner.asked = group.spec.options
    model.context_growths, model.last_context = model.growths(runner.asked), runner.asked.num_ctx or 0
    runner.equivalent_requests.add(runner.asked)
    runner.uses_default_keep_alive = group.head.keep_alive_s is None
    runner.fully_offloaded = placement.offloaded == load.footprint.layers
    state.next_runner += 1
    state.processes += 1
    state.runners[runner.id] = model.current = runner
    state.ledger.reserve(("runner", runner.id), placement.bytes, load.footprint)
    state.timers.set(("load", runner.id), state.now + state.config.load_timeout_s)
    group.wait(WaitFor.load, state.expected_at(runner))
    model.inspected_since_launch = False
    step.commands.append(Launch(runner.id, model.id, load.options, placement, load.settings))
    if step.decision_log is not None:
        why = AskedBy(group.head.id)
        entry = Transition(state.now, runner.id, model.id, "launch", None, LOADING, why, 0, state.steps)
        step.decision_log.append(entry)
    return runner


def _chosen(state: CoreState, footprint: Footprint, placement: Placement) -> Options:
    """Return what a plan has chosen for a runner: a request that names it matches."""
    if footprint.fixed:
        return AUTOMATIC
    first = next((gpu for gpu, _ in placement.gpu_layers), None)
    gpus = [device.id for device in state.ledger.devices.values() if device.kind == "gpu"]
    return Options(
        num_gpu=placement.offloaded,
        main_gpu=gpus.index(first) if first in gpus else None,
        use_mmap=footprint.mapped if placement.gpu_layers else footprint.mapped_on_host,
    )


def _usual(model: ModelRecord, asked: Options) -> Options:
    """Return the context and slots that requests which name none have to have at least of a runner loaded for `asked`.

    What a request named is not for the others. Where it named none, the others have no more to expect.
    """
    if not isinstance(model.profile, ModelProfile):
        return AUTOMATIC
    usual = model.profile.usual
    return Options(
        num_ctx=usual.num_ctx if asked.num_ctx is not None else None,
        num_parallel=usual.num_parallel if asked.num_parallel is not None else None,
    )


def loaded(step: StepContext, runner: Runner, event: Loaded) -> None:
    """Take in that a load succeeded: the requests that wait for it are granted, or its runner becomes idle."""
    state, model = step.state, step.state.models[runner.model]
    state.timers.clear(("load", runner.id))
    runner.loaded_at = runner.used_at = state.now
    load_s = state.now - runner.launched_at
    if runner.id >= model.first_runner_of_file and is_fastest_placement(state, runner):
        shortest_s, measured_at, count = model.shortest_load.get(runner.launch_options, (math.inf, -math.inf, 0))
        if state.now - measured_at > LOAD_TIME_TTL_S:
            shortest_s, count = math.inf, 0
        note_bounded(model.shortest_load, runner.launch_options, (min(load_s, shortest_s), state.now, count + 1))
    note_load(state, runner)
    model.back_offs.pop(model.load_of(runner)[0], None)
    model.load_exclusively = False
    if event.num_ctx is not None and runner.effective_options.num_ctx is not None:
        runner.effective_options = replace(runner.effective_options, num_ctx=event.num_ctx)
    if event.flash_attention is not None:
        runner.chosen_options = replace(runner.chosen_options, flash_attention=event.flash_attention)
    state.ledger.accounts["runner", runner.id].loaded = True
    measurements.measure(step, runner, event.resident, event.mapped_bytes)
    measurements.expect(step, runner, event)
    measurements.record_measurement(step, runner, load_s)
    requests.serve(step, runner, state.groups_served_by(runner))
    if runner.leases:
        idle_s, in_use_s = state.config.residency_s(load_s)
        runner.resident_until, runner.drain_protected_until = state.now + idle_s, state.now + in_use_s
    elif runner.state is LOADING:
        runners.rest(step, runner, RunnerReason.loaded)
    if runner.expire_when_served and runner.current:
        runners.expire(step, runner, RunnerReason.asked_while_awaited)
    elif runner.files_replaced and runner.state is IDLE:
        runners.expire(step, runner, RunnerReason.files_replaced)
    step.reevaluate(model)
    runners.release_claim(step, runner)
