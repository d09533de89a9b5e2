"""Which files are read into the page cache: files of models that wait for memory, as far as memory is to spare.

A load that finds its file in the page cache does not wait for the disk. But page cache is memory too: files that are
read ahead must never push out pages that runners have mapped, nor take memory that is reserved and not touched yet. So
a new prefetch fills at most half of the bytes that the host reports as free beyond them, and a prefetch that has begun
is cut short when less is left.

The bytes to read of a model are decided once in a wait and then only fall, so that a file is read once, and no command
is repeated because figures vary a little. A model that has a runner has its file in memory, or had it lately.
"""

from __future__ import annotations

from collections.abc import Iterator

from fsm.domain.devices import HOST
from fsm.lifecycle.step_context import StepContext
from fsm.machine.request import ModelId, Purpose
from fsm.messages.commands import Prefetch
from fsm.messages.reasons import Prefetched
from fsm.planning.plan import Plan
from fsm.sizing.model_profile import ModelProfile
from fsm.state.core_state import CoreState
from fsm.state.memory_ledger import Ledger
from fsm.state.request_queue import RequestGroup

_PART = 2  # a new prefetch fills at most this part (a half) of the spare bytes


def read_ahead(step: StepContext, plan: Plan | None) -> None:
    """Order the files to be read ahead, where they have changed; `plan` is None where no request group waits."""
    state = step.state
    before = dict(state.prefetching)
    left = spare = spare_bytes(state.ledger)
    files: dict[ModelId, int] = {}
    for group, files_bytes in _waiting(state, plan) if plan is not None else ():
        if sum(map(bool, files.values())) >= state.config.prefetches:
            break
        model = group.spec.model
        begun = model in before
        new = min(files_bytes, max(0, left - (spare - spare // _PART)))
        amount = min(before[model], left) if begun else new
        if begun or amount:
            files[model] = amount
            left -= amount
        if amount and not begun:
            step.decide("prefetched", model, Prefetched(amount), group.head.id)
    if (ordered := tuple(files.items())) != state.prefetching:
        state.prefetching = ordered
        step.commands.append(Prefetch(ordered))


def spare_bytes(ledger: Ledger) -> int:
    """Return the host's bytes that are reported as free, less the bytes reserved and not touched, or mapped."""
    if HOST not in ledger.devices:
        return 0
    untouched = sum(account.reserved_not_touched(HOST) for account in ledger.accounts.values())
    return max(0, ledger.devices[HOST].free_bytes - untouched)


def _waiting(state: CoreState, plan: Plan) -> Iterator[tuple[RequestGroup, int]]:
    """Yield the request groups that wait for memory, in order, with the bytes of the files of their models.

    A group whose launch is planned is among them only if its file is being read already: its device claim may not be
    granted yet.
    """
    living = {runner.model for runner in state.runners.values()}
    begun = {model for model, _ in state.prefetching}
    starting = {group.spec.model for group, _, _ in plan.launches} - begun
    for spec in plan.placements:
        group = state.groups.get(spec)
        if group is None or spec.purpose is Purpose.memory or spec.model in living or spec.model in starting:
            continue
        profile = state.models[spec.model].profile
        if isinstance(profile, ModelProfile):
            yield group, profile.files_bytes
