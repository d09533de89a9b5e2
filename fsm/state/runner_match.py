"""The one predicate that tells which runner serves which request."""

from __future__ import annotations

from fsm.domain.model_info import Options
from fsm.machine.runner import Runner
from fsm.sizing.load_options import as_named, serves


def match(runner: Runner, asked: Options, explicit: Options | None = None) -> bool:
    """Tell whether a runner serves a request that names the options `asked`.

    An option that a request leaves open matches any value, so an automatic value is never a reason for a reload.
    `explicit` is `asked` with every automatic value made explicit, where the model's metadata is known: a request for
    more than the model can have is served by a runner that has all that is possible.
    """
    if asked in runner.equivalent_requests:
        return True
    if asked.require_gpu and not runner.fully_offloaded:
        return False
    if explicit is None:
        return serves(runner.effective_options, asked)
    return explicit == runner.launch_options or serves(runner.effective_options, as_named(explicit, asked))
