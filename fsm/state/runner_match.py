"""Which runner serves which request."""

from __future__ import annotations

from fsm.machine.request import RequestSpec
from fsm.machine.runner import Runner
from fsm.sizing.load_options import serves


def runner_serves(runner: Runner, spec: RequestSpec) -> bool:
    """Tell whether a runner's options, and where it is, satisfy what is wanted."""
    if spec.options in runner.equivalent_requests:
        return True
    return serves(runner.effective_options, spec.options) and (runner.fully_offloaded or not spec.options.require_gpu)
