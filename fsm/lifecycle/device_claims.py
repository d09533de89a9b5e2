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
from fsm.lifecycle.failures import Endings
from fsm.machine.runner import Runner
from fsm.messages.commands import Claim, ReleaseClaim
from fsm.messages.events import ClaimContended, ClaimGranted, Exited, Loaded
from fsm.messages.reasons import ClaimMissed, WaitFor
from fsm.state.core_state import CoreState, OpenClaim
from fsm.state.request_queue import RequestGroup

Planned = tuple[RequestGroup, Options, Placement]


class Claims(Endings):
    """The verbs of claims. Every Claim is ended by one Unclaim, whatever becomes of the launch that it was for."""

    __slots__ = ("claim_failure",)

    def __init__(self, state: CoreState) -> None:
        super().__init__(state)
        self.claim_failure: ClaimMissed | None = None  # of the last launch; None: it had what it claimed

    def launch_all(self, planned: Sequence[Planned]) -> None:
        """Launch what has its devices to itself, claim them for the rest, and give back what nothing is planned for."""
        state = self.state
        unused = dict(state.claims)
        wanted = [frozenset(device for device, amount in placement.bytes if amount) for _, _, placement in planned]
        matches = _match(unused, wanted)
        unclaimed: list[frozenset[DeviceId]] = []
        for (group, options, placement), devices, claim in zip(planned, wanted, matches, strict=True):
            if not state.config.claims or not devices:
                self.launch(group, options, placement)
            elif claim is None:
                unclaimed.append(devices)
            elif claim.had:
                self._launch_under(claim, group, options, placement)
            elif claim.contended:
                group.wait(WaitFor.other_program, claim.by)
        by = min([claim.by for claim in unused.values()], default=state.now + state.config.claim_timeout_s)
        for claim in unused.values():
            self._give_up(claim)
        for devices in unclaimed:  # a plan that moved to other devices does not wait anew
            self._claim(devices, by)

    def claim_answered(self, event: ClaimGranted | ClaimContended) -> bool:
        """Take in what became of a claim; return False where it has been given up."""
        claim = self.state.claims.get(event.number)
        if claim is None:
            return False
        claim.had = isinstance(event, ClaimGranted)
        claim.contended = not claim.had
        self.replan = True
        return True

    def claim_time_is_up(self, number: int) -> None:
        """The wait for a claim is over, or a runner that loaded under it was stopped and ought to be gone."""
        if (claim := self.state.claims.get(number)) is not None:
            claim.had = claim.missed = True
            self.replan = True
            return
        for runner in self.state.runners.values():
            if runner.claim == number:
                self._give_back(runner)

    def loaded(self, runner: Runner, event: Loaded) -> None:
        super().loaded(runner, event)
        self._give_back(runner)

    def exited(self, runner: Runner, event: Exited) -> None:
        super().exited(runner, event)
        self._give_back(runner)

    def stop(self, runner: Runner) -> None:
        super().stop(runner)
        if runner.claim:
            self.state.timers.set(("claim", runner.claim), runner.stop_deadline)

    def _claim(self, devices: frozenset[DeviceId], by: float) -> None:
        state = self.state
        claim = OpenClaim(state.next_claim, devices, by)
        state.next_claim += 1
        state.claims[claim.number] = claim
        state.timers.set(("claim", claim.number), by)
        self.commands.append(Claim(claim.number, tuple(sorted(devices))))

    def _launch_under(self, claim: OpenClaim, group: RequestGroup, options: Options, placement: Placement) -> None:
        state = self.state
        self.claim_failure = None
        if claim.missed:
            self.claim_failure = ClaimMissed(tuple(sorted(claim.devices)), state.config.claim_timeout_s)
            self.decide("launched", group.spec.model, self.claim_failure, group.head.id)
            self._give_up(claim)
        runner = self.launch(group, options, placement)
        if not claim.missed:
            del state.claims[claim.number]
            state.timers.clear(("claim", claim.number))
            runner.claim = claim.number

    def _give_up(self, claim: OpenClaim) -> None:
        del self.state.claims[claim.number]
        self.state.timers.clear(("claim", claim.number))
        self.commands.append(ReleaseClaim(claim.number))

    def _give_back(self, runner: Runner) -> None:
        if runner.claim:
            self.state.timers.clear(("claim", runner.claim))
            self.commands.append(ReleaseClaim(runner.claim))
            runner.claim = 0


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
