"""From when on a runner may be given up for somebody who waits."""

from __future__ import annotations

from fsm.machine.runner import IDLE, Runner
from fsm.state.core_state import Pool


def may_go_at(pool: Pool, runner: Runner, bound: float) -> float:
    """Return when `runner` may go for somebody who waits for others' convenience until `bound`; now at the least.

    A busy one goes at the bound, and not within its minimum residency. An idle one goes once it has rested for a small
    part of what its load took: users that ask again at once find it there, and its memory is not turned over between
    two requests of theirs. That ends an automatic residency early too, since it is there for the users, and a runner
    that rests while others wait has none left; one that was set holds to its end.
    """
    if runner.leases:
        return max(pool.now, runner.in_use_until, bound)
    resident_until = runner.resident_until if pool.limits.min_residency_s is not None else pool.now
    kept_until = min(runner.kept_until, bound) if runner.state is IDLE else pool.now
    return max(pool.now, resident_until, kept_until)
