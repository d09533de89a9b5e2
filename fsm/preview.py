"""What would become of a request if it came now: a copy of the core is asked, and nothing changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum

from fsm.core import Core
from fsm.domain.devices import HOST, Amounts, DeviceId
from fsm.domain.options import Options
from fsm.eviction.policies import Candidate
from fsm.machine.request import Purpose, RequestId, RequestSpec
from fsm.machine.runner import Runner
from fsm.messages.commands import Grant, Reject
from fsm.messages.events import Acquire, Inspected, Tick
from fsm.messages.reasons import WaitReason
from fsm.messages.refusals import DoesNotFitRefusal, InvalidModelRefusal, ModelNotFoundRefusal, Refusal
from fsm.planning.plan import Plan
from fsm.sizing.footprint import DeviceBytes, Footprint, bytes_by_device
from fsm.sizing.load_history import NOTHING, LoadHistory
from fsm.sizing.model_profile import ModelProfile
from fsm.state.core_state import CoreState
from fsm.state.runner_match import match

Found = ModelProfile | Footprint | ModelNotFoundRefusal | InvalidModelRefusal  # by an inspection


class Outcome(Enum):
    """What becomes of a request."""

    warm = "warm"  # a loaded runner serves it
    fits = "fits"  # its model is loaded at once
    evicts = "evicts"  # victims leave first
    waits = "waits"  # for a load, for memory that is being freed, or for earlier requests
    refused = "refused"  # at this moment, whatever its size: the queue is full, its loads failed, the scheduler closes
    never = "never"  # its model fits nowhere, whichever runners leave


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a runner on one device, in bytes."""

    device: DeviceId  # an integrated GPU's share is the host's
    part: DeviceBytes  # as predicted, by kind
    takes_bytes: int  # the sum of the prediction, or the measurement
    needed_bytes: int  # that must be free for it, headroom included
    free_bytes: int  # that the placement is judged by: free memory, and the memory that the victims leave


@dataclass(frozen=True, slots=True)
class Preview:
    """What becomes of a request, where its runner goes, and which runners are evicted for it."""

    outcome: Outcome
    options: Options  # explicit, as far as is known
    shares: tuple[Share, ...] = ()  # the host's first; empty where nothing is planned for the request yet
    gpu_layers: Amounts = ()
    layers: int = 0  # that can go to GPUs, the output among them; 0: the model has none, or there are no GPUs
    measured: bool = False  # the bytes were measured on a runner placed the same way, or on the runner that serves
    victims: tuple[Candidate, ...] = ()  # non-empty iff the outcome is `evicts`
    waits_for: WaitReason | None = None  # not None iff the outcome is `waits`
    refusal: Refusal | None = None  # a DoesNotFitRefusal if the outcome is `never`, another kind if it is `refused`

    @property
    def in_part(self) -> bool:
        """Whether the core chose how many layers go to GPUs, and not all layers do."""
        automatic = self.options.num_gpu is None or self.options.num_gpu < 0
        return automatic and sum(count for _, count in self.gpu_layers) < self.layers


def preview(now: float, core: Core, spec: RequestSpec, profile: Found, known: LoadHistory = NOTHING) -> Preview:
    """Return what would become of a request with `spec` at `now`, if an inspection found `profile` and `known`.

    `profile` has resolutions for the options of `spec`, and of the requests that wait for the model already; or it is
    why the model cannot be used.

    `core` does not change. Timers that are due by now are taken to have fired. `spec` is for a lease or a preload.
    """
    assert spec.purpose is not Purpose.memory, "memory has no model"
    scratch = core.copy()
    state, scratch.plans = scratch._state, []
    # the claims of other programs are no part of the answer, which is all of what follows from the request
    state.config = replace(state.config, claims=False, plans_later=False)
    scratch.step(now, Tick())
    scratch.plans.clear()
    request = RequestId(max(state.requests, default=0) + 1)
    commands = scratch.step(now, Acquire(request, spec))
    if (model := state.models.get(spec.model)) is not None and model.inspecting:
        commands += scratch.step(now, Inspected(spec.model, profile, known))
    for command in commands:
        match command:
            case Grant(answered, runner) if answered == request and runner is not None:
                return _served(state, state.runners[runner], Outcome.warm)
            case Reject(answered, DoesNotFitRefusal() as refusal) if answered == request:
                return replace(_planned(state, spec, scratch.plans, Outcome.never), refusal=refusal)
            case Reject(answered, refusal) if answered == request:
                return Preview(Outcome.refused, spec.options, refusal=refusal)
            case _:
                pass
    if any(group.spec == spec for plan in scratch.plans for group, *_ in plan.launches):
        return _planned(state, spec, scratch.plans, Outcome.fits)
    # a plan with matches or refusals is replaced by another plan before it is carried out
    carried_out = [plan for plan in scratch.plans if not (plan.matches or plan.refusals)]
    found = _planned(state, spec, carried_out, Outcome.waits)
    current = state.models[spec.model].current
    if current is not None and match(current, spec.options):
        found = _served(state, current, Outcome.waits)
    return found if found.victims else replace(found, waits_for=state.groups[spec].waits_for)


def _planned(state: CoreState, spec: RequestSpec, plans: Sequence[Plan], outcome: Outcome) -> Preview:
    """Return what was planned for a request group by the first plan with victims, or else by the last plan.

    The plan after a plan with victims finds them gone already.
    """
    placements = [(plan.placements[spec], plan.loads[spec]) for plan in plans if spec in plan.placements]
    if not placements:
        return Preview(outcome, spec.options)
    planned, load = next((found for found in placements if found[0].victims), placements[-1])
    if planned.victims:
        outcome = Outcome.evicts
    needs, placement = dict(planned.needed), planned.placement
    shares = _shares(state, load.footprint, placement.gpu_layers, dict(placement.bytes), needs, dict(planned.free))
    layers = _layers(state, load.footprint)
    return Preview(outcome, load.options, shares, placement.gpu_layers, layers, placement.measured, planned.victims)


def _served(state: CoreState, runner: Runner, outcome: Outcome) -> Preview:
    """Return the preview of a request that a runner serves, or will serve once loaded, with the bytes of the runner."""
    ledger, split = state.ledger, runner.placement.gpu_layers
    account = ledger.accounts["runner", runner.id]
    footprint = account.predicted
    takes = {device: account.held_bytes(device) for device in account.reserved}
    free = {device: ledger.free_bytes(device) for device in ledger.devices}
    shares = _shares(state, footprint, split, takes, {}, free)
    layers = _layers(state, footprint)
    measured = runner.placement.measured or account.peak_observed
    return Preview(outcome, runner.effective_options, shares, split, layers, measured)


def _layers(state: CoreState, footprint: Footprint) -> int:
    gpus = any(sample.kind == "gpu" for sample in state.ledger.devices.values())
    return footprint.layers if gpus and not footprint.fixed else 0


def _shares(
    state: CoreState,
    footprint: Footprint,
    split: Amounts,
    takes: Mapping[DeviceId, int],
    needs: Mapping[DeviceId, int],
    free: Mapping[DeviceId, int],
) -> tuple[Share, ...]:
    """Return the share of each memory; an integrated GPU's part belongs to the host's share."""
    found: dict[DeviceId, DeviceBytes] = {}
    for device, part in bytes_by_device(footprint, split).items():
        memory = state.ledger.devices[device].memory if device in state.ledger.devices else device
        found[memory] = _sum(found.get(memory, DeviceBytes()), part)
    return tuple(
        Share(device, found.get(device, DeviceBytes()), takes.get(device, 0), needs.get(device, 0), free.get(device, 0))
        for device in sorted(found.keys() | takes.keys(), key=lambda device: (device != HOST, device))
    )


def _sum(one: DeviceBytes, other: DeviceBytes) -> DeviceBytes:
    return DeviceBytes(*(getattr(one, each.name) + getattr(other, each.name) for each in fields(DeviceBytes)))
