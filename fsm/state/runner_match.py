"""Which runner serves which request."""

from __future__ import annotations

from fsm.machine.request import Want
from fsm.machine.runner import Runner
from fsm.sizing.load_options import serves


def runner_serves(runner: Runner, want: Want) -> bool:
    """Tell whether a runner's options, and where it is, satisfy what is wanted."""
    if want.options in runner.accepted:
        return True
    return serves(runner.options, want.options) and (runner.whole or not want.options.require_gpu)
