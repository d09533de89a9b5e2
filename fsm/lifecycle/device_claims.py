"""Device claims: the right of one launch to load on its devices while no other program on the machine loads on them.

Free memory is read from the devices, so two programs that plan at the same moment would plan with the same bytes: the
memory that a load takes shows only when its model is resident. So a launch first claims every device that it takes
memory on. A claim is for all of its devices or none, so that two programs which need the same devices never hold one
device each. The devices are read again once the claim is granted, and the launch is planned with these figures. A claim
is released when its runner takes no more memory: when the model is resident, or its process is gone, or the process was
stopped and is overdue. A launch whose claim is not granted in time goes ahead without it.

A claim belongs to one launch. Launches of the same program do not exclude each other: the ledger of the program already
tells them apart, and a device that two of its launches claim is the program's until both claims are released.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fsm.domain.devices import DeviceId, Placement
from fsm.lifecycle import loads, runners
from fsm.lifecycle.step_context import StepContext
from fsm.messages.commands import Claim, ReleaseClaim
from fsm.messages.events import ClaimContended, ClaimGranted
from fsm.messages.reasons import ClaimMissed, WaitFor
from fsm.sizing.model_profile import ResolvedLoad
from fsm.state.core_state import OpenClaim
from fsm.state.request_queue import RequestGroup

Planned = tuple[RequestGroup, ResolvedLoad, Placement]


def launch_all(step: StepContext, planned: Sequence[Planned]) -> None:
    """Launch the planned runners whose claims are granted, claim devices for the others, and release unused claims."""
    state = step.state
    unused = dict(state.claims)
    needed = [frozenset(device for device, amount in placement.bytes if amount) for _, _, placement in planned]
    matches = _match(unused, needed)  # what is left is unused
    by = min([claim.by for claim in unused.values()], default=state.now + state.config.claim_timeout_s)
    by = max(by, math.nextafter(state.now, math.inf))  # where the time is up already: as soon as this step is over
    unclaimed: list[frozenset[DeviceId]] = []
    for (group, load, placement), devices, claim in zip(planned, needed, matches, strict=True):
        if not state.config.claims or not devices:
            loads.launch(step, group, load, placement)
        elif claim is None:
            unclaimed.append(devices)
            group.wait(WaitFor.claim, by)
        elif claim.had:
            _launch_under(step, claim, group, load, placement)
        else:
            group.wait(WaitFor.other_program if claim.contended else WaitFor.claim, claim.by)
    for claim in unused.values():
        _release(step, claim)
    for devices in unclaimed:  # a plan that moved to other devices keeps the deadline of its unused claim
        _claim(step, devices, by)


def claim_answered(step: StepContext, event: ClaimGranted | ClaimContended) -> bool:
    """Take in whether a claim was granted; return False where it has been released."""
    claim = step.state.claims.get(event.number)
    if claim is None:
        return False
    claim.had = isinstance(event, ClaimGranted)
    claim.contended = not claim.had
    step.replan = True
    return True


def claim_time_is_up(step: StepContext, number: int) -> None:
    """End the wait for a claim, or release the claim of a runner that was stopped and is overdue."""
    if (claim := step.state.claims.get(number)) is not None:
        claim.had, claim.missed = True, not claim.had
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
    step: StepContext, claim: OpenClaim, group: RequestGroup, load: ResolvedLoad, placement: Placement
) -> None:
    state = step.state
    step.claim_failure = None
    if claim.missed:
        step.claim_failure = ClaimMissed(tuple(sorted(claim.devices)), state.config.claim_timeout_s)
        step.decide("launched", group.spec.model, step.claim_failure, group.head.id)
        _release(step, claim)
    runner = loads.launch(step, group, load, placement)
    if not claim.missed:
        del state.claims[claim.number]
        state.timers.clear(("claim", claim.number))
        runner.claim = claim.number


def _release(step: StepContext, claim: OpenClaim) -> None:
    del step.state.claims[claim.number]
    step.state.timers.clear(("claim", claim.number))
    step.commands.append(ReleaseClaim(claim.number))


def _match(unused: dict[int, OpenClaim], needed: Sequence[frozenset[DeviceId]]) -> list[OpenClaim | None]:
    """Take a claim out of `unused` for each launch, by the devices it needs; None for a launch without one.

    A claim of exactly these devices comes first, then a claim of these and others. A claim that was not granted in time
    serves any launch.
    """
    matches: list[OpenClaim | None] = [None] * len(needed)
    for exactly in (True, False):
        for place, devices in enumerate(needed):
            fitting = [
                claim
                for claim in unused.values()
                if (devices == claim.devices if exactly else devices <= claim.devices or claim.missed)
            ]
            if devices and matches[place] is None and fitting:
                best = min(fitting, key=lambda claim: (not claim.had, claim.number))
                matches[place] = unused.pop(best.number)
    return matches
