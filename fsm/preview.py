"""What would happen if somebody asked now, told by the core itself: a copy of it is asked, and nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum

from fsm.core import Core
from fsm.domain.devices import HOST, Amounts, DeviceId
from fsm.domain.model_info import ModelInfo, Options
from fsm.eviction.policies import Candidate
from fsm.machine.request import Purpose, RequestId, RequestSpec
from fsm.machine.runner import Runner
from fsm.messages.commands import Grant, Reject
from fsm.messages.events import Acquire, Inspected, Tick
from fsm.messages.reasons import WaitReason
from fsm.messages.refusals import DoesNotFitRefusal, Refusal
from fsm.placement.search import PlacementDemand, needed
from fsm.planning.plan import Plan
from fsm.sizing.footprint import DeviceBytes, Footprint, bytes_by_device
from fsm.sizing.load_history import NOTHING, LoadHistory
from fsm.state.core_state import CoreState
from fsm.state.runner_match import match


class Outcome(Enum):
    """What becomes of a request."""

    warm = "warm"  # a runner that is loaded serves it
    fits = "fits"  # it is loaded at once
    evicts = "evicts"  # others leave first
    waits = "waits"  # for what is under way: a load, memory that comes back, those before it
    refused = "refused"  # at this moment, whatever its size: the queue is full, its loads failed, the end has come
    never = "never"  # there is no room for it, whoever leaves


@dataclass(frozen=True, slots=True)
class Share:
    """What one device gives, in bytes."""

    device: DeviceId  # an integrated GPU's share is the host's
    part: DeviceBytes  # as predicted, by kind
    takes_bytes: int  # the sum of it, or what was measured
    needed_bytes: int  # what must be free for it: headroom included
    free_bytes: int  # what it is judged by: what is free, and what the victims leave


@dataclass(frozen=True, slots=True)
class Preview:
    """What becomes of a request, where its runner goes, and who leaves for it."""

    outcome: Outcome
    options: Options  # explicit, as far as is known
    shares: tuple[Share, ...] = ()  # the host's first; empty where nothing is planned for it yet
    gpu_layers: Amounts = ()
    layers: int = 0  # that can go to GPUs, the output among them; 0: there are none, or no GPUs
    measured: bool = False  # what it takes was measured on a runner placed the same way, or on the one that serves
    victims: tuple[Candidate, ...] = ()  # non-empty iff it evicts
    waits_for: WaitReason | None = None  # not None iff it waits
    refusal: Refusal | None = None  # DoesNotFit if never, another kind if it is refused

    @property
    def in_part(self) -> bool:
        """Whether it is left to the core how many layers go to GPUs, and not all do."""
        automatic = self.options.num_gpu is None or self.options.num_gpu < 0
        return automatic and sum(count for _, count in self.gpu_layers) < self.layers


def preview(
    now: float, core: Core, spec: RequestSpec, info: ModelInfo | Footprint, known: LoadHistory = NOTHING
) -> Preview:
    """Return what would become of `want`, asked `now`, if an inspection found `info` and `known`; `core` stays.

    What is due by now is taken to have happened. `want` is for a lease or a preload.
    """
    assert spec.purpose is not Purpose.memory, "memory has no model"
    scratch = core.copy()
    state, scratch.plans = scratch._state, []
    state.config = replace(state.config, claims=False)  # what other programs do at this moment is no part of the answer
    scratch.step(now, Tick())
    scratch.plans.clear()
    request = RequestId(max(state.requests, default=0) + 1)
    commands = scratch.step(now, Acquire(request, spec))
    if (model := state.models.get(spec.model)) is not None and model.inspecting:
        commands += scratch.step(now, Inspected(spec.model, info, known))
    for command in commands:
        match command:
            case Grant(answered, runner) if answered == request and runner is not None:
                return _served(state, spec, state.runners[runner], Outcome.warm)
            case Reject(answered, DoesNotFitRefusal() as refusal) if answered == request:
                return replace(_planned(state, spec, scratch.plans, Outcome.never), refusal=refusal)
            case Reject(answered, refusal) if answered == request:
                return Preview(Outcome.refused, spec.options, refusal=refusal)
            case _:
                pass
    if any(group.spec == spec for plan in scratch.plans for group, *_ in plan.launches):
        return _planned(state, spec, scratch.plans, Outcome.fits)
    carried_out = [plan for plan in scratch.plans if not (plan.matches or plan.refusals)]  # else it was made anew
    found = _planned(state, spec, carried_out, Outcome.waits)
    current = state.models[spec.model].current
    if current is not None and match(current, spec.options):
        found = _served(state, spec, current, Outcome.waits)
    return found if found.victims else replace(found, waits_for=state.groups[spec].waits_for)


def _planned(state: CoreState, spec: RequestSpec, plans: Sequence[Plan], outcome: Outcome) -> Preview:
    """Return what was planned for a line: the first plan with victims counts, since the next has them gone already."""
    model = state.models[spec.model]
    rooms = [(plan.placements[spec], plan.options[spec]) for plan in plans if spec in plan.placements]
    if not rooms:
        return Preview(outcome, spec.options)
    room, asked = next((found for found in rooms if found[0].victims), rooms[-1])
    if room.victims:
        outcome = Outcome.evicts
    options, demand = model.demand(asked, state.config)
    exact = bool(demand.footprint.fixed)
    needs, placement = dict(needed(room.placement, exact=exact)), room.placement
    shares = _shares(state, demand.footprint, placement.gpu_layers, dict(placement.bytes), needs, dict(room.free))
    layers = _layers(state, demand)
    return Preview(outcome, options, shares, placement.gpu_layers, layers, placement.measured, room.victims)


def _served(state: CoreState, spec: RequestSpec, runner: Runner, outcome: Outcome) -> Preview:
    """Return what the runner takes that serves the request, or will."""
    model, ledger, split = state.models[spec.model], state.ledger, runner.placement.gpu_layers
    account = ledger.accounts["runner", runner.id]
    _, demand = model.demand(runner.launch_options, state.config)
    takes = {device: account.held_bytes(device) for device in account.reserved}
    free = {device: ledger.free_bytes(device) for device in ledger.devices}
    shares = _shares(state, demand.footprint, split, takes, {}, free)
    layers = _layers(state, demand)
    measured = runner.placement.measured or account.peak_observed
    return Preview(outcome, runner.effective_options, shares, split, layers, measured)


def _layers(state: CoreState, demand: PlacementDemand) -> int:
    gpus = any(sample.kind == "gpu" for sample in state.ledger.devices.values())
    return demand.layers if gpus and not demand.footprint.fixed else 0


def _shares(
    state: CoreState,
    footprint: Footprint,
    split: Amounts,
    takes: Mapping[DeviceId, int],
    needs: Mapping[DeviceId, int],
    free: Mapping[DeviceId, int],
) -> tuple[Share, ...]:
    """Return what each memory gives: an integrated GPU's part is the host's."""
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
