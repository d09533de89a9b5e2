"""Which devices this program has to itself, among all that load models on the machine, from a plan until its model is
resident.

Free memory is read from the devices, so two programs that plan at the same moment would plan with the same bytes. What
one takes shows only when its model is resident. So a launch first claims every device that it takes memory on: all of
them or none, so that programs which want the same devices never hold one each. The figures that count are read after
the claim is had. It is given back when no more memory is to come: when the model is resident, or its process is gone;
of a process that ought to be gone it is given back anyway. Whoever waits for too long goes ahead without.

A claim belongs to one launch. Launches of the same program do not keep each other out: its ledger already tells them
apart, and what they claim both is the program's until both have given it back.
"""

from __future__ import annotations

from collections.abc import Sequence

from fsm.domain.devices import DeviceId, Placement
from fsm.domain.model_info import Options
from fsm.lifecycle import loads, runners
from fsm.lifecycle.step_context import StepContext
from fsm.messages.commands import (
    Claim,
    ReleaseClaim,
)
from fsm.messages.events import ClaimContended, ClaimGranted
from fsm.messages.reasons import (
    ClaimMissed,
    WaitFor,
)
from fsm.state.core_state import OpenClaim
from fsm.state.request_queue import RequestGroup

Planned = tuple[RequestGroup, Options, Placement]


def launch_all(step: StepContext, planned: Sequence[Planned]) -> None:
    """Launch what has its devices to itself, claim them for the rest, and give back what nothing is planned for."""
    state = step.state
    unused = dict(state.claims)
    wanted = [frozenset(device for device, amount in placement.bytes if amount) for _, _, placement in planned]
    matches = _match(unused, wanted)
    unclaimed: list[frozenset[DeviceId]] = []
    for (group, options, placement), devices, claim in zip(planned, wanted, matches, strict=True):
        if not state.config.claims or not devices:
            loads.launch(step, group, options, placement)
        elif claim is None:
            unclaimed.append(devices)
        elif claim.had:
            _launch_under(step, claim, group, options, placement)
        elif claim.contended:
            group.wait(WaitFor.other_program, claim.by)
    by = min([claim.by for claim in unused.values()], default=state.now + state.config.claim_timeout_s)
    for claim in unused.values():
        _give_up(step, claim)
    for devices in unclaimed:  # a plan that moved to other devices does not wait anew
        _claim(step, devices, by)


def claim_answered(step: StepContext, event: ClaimGranted | ClaimContended) -> bool:
    """Take in what became of a claim; return False where it has been given up."""
    claim = step.state.claims.get(event.number)
    if claim is None:
        return False
    claim.had = isinstance(event, ClaimGranted)
    claim.contended = not claim.had
    step.replan = True
    return True


def claim_time_is_up(step: StepContext, number: int) -> None:
    """The wait for a claim is over, or a runner that loaded under it was stopped and ought to be gone."""
    if (claim := step.state.claims.get(number)) is not None:
        claim.had = claim.missed = True
        step.replan = True
        return
    for runner in step.state.runners.values():
        if runner.claim == number:
            runners.release_claim(step, runner)


def _claim(step: StepContext, devices: frozenset[DeviceId], by: float) -> None:
    state = step.state
    claim = OpenClaim(state.next_claim, devices, by)
    state.next_claim += 1
    state.claims[claim.number] = claim
    state.timers.set(("claim", claim.number), by)
    step.commands.append(Claim(claim.number, tuple(sorted(devices))))


def _launch_under(
    step: StepContext, claim: OpenClaim, group: RequestGroup, options: Options, placement: Placement
) -> None:
    state = step.state
    step.claim_failure = None
    if claim.missed:
        step.claim_failure = ClaimMissed(tuple(sorted(claim.devices)), state.config.claim_timeout_s)
        step.decide("launched", group.spec.model, step.claim_failure, group.head.id)
        _give_up(step, claim)
    runner = loads.launch(step, group, options, placement)
    if not claim.missed:
        del state.claims[claim.number]
        state.timers.clear(("claim", claim.number))
        runner.claim = claim.number


def _give_up(step: StepContext, claim: OpenClaim) -> None:
    del step.state.claims[claim.number]
    step.state.timers.clear(("claim", claim.number))
    step.commands.append(ReleaseClaim(claim.number))


def _match(unused: dict[int, OpenClaim], wanted: Sequence[frozenset[DeviceId]]) -> list[OpenClaim | None]:
    """Take out of `unused` a claim for each launch that wants devices: just these, else these and others.

    A claim that was waited for too long serves any launch.
    """
    matches: list[OpenClaim | None] = [None] * len(wanted)
    for exactly in (True, False):
        for place, devices in enumerate(wanted):
            fitting = [
                claim
                for claim in unused.values()
                if (devices == claim.devices if exactly else devices <= claim.devices or claim.missed)
            ]
            if devices and matches[place] is None and fitting:
                best = min(fitting, key=lambda claim: (not claim.had, claim.number))
                matches[place] = unused.pop(best.number)
    return matches
