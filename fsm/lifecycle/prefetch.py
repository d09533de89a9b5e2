"""Whose files are read into the page cache meanwhile: of models that wait for memory, as far as memory is to spare.

A load that finds its file there does not wait for the disk. But page cache is memory too: what is read ahead must never
push out pages that running models have mapped, nor take what is promised and not touched yet. So to begin with at most
half of what the host reports as free beyond that is filled, and what was begun is cut short when less is left.

An amount is decided once in a wait and then only falls, so that a file is read once, and nothing is said again and
again because figures tremble. A model that lives already has its file in memory, or had it lately.
"""

from __future__ import annotations

from collections.abc import Iterator

from fsm.domain.devices import HOST
from fsm.domain.model_info import ModelInfo
from fsm.lifecycle.step_context import StepContext
from fsm.machine.request import ModelId, Purpose
from fsm.messages.commands import Prefetch
from fsm.messages.reasons import Prefetched
from fsm.planning.plan import Plan
from fsm.state.core_state import CoreState
from fsm.state.memory_ledger import Ledger
from fsm.state.request_queue import RequestGroup

_PART = 2  # one in so many of the bytes to spare is filled at most to begin with


def read_ahead(step: StepContext, plan: Plan | None) -> None:
    """Say which files are to be read ahead, where that has changed; None: nobody waits."""
    state = step.state
    before = dict(state.prefetching)
    left = spare = spare_bytes(state.ledger)
    files: dict[ModelId, int] = {}
    for group, info in _waiting(state, plan) if plan is not None else ():
        if sum(map(bool, files.values())) >= state.config.prefetches:
            break
        model = group.spec.model
        begun = model in before
        if begun:
            amount = min(before[model], left)
        else:
            wanted = info.file_bytes + info.adapters_bytes + info.projectors_bytes
            amount = min(wanted, max(0, left - (spare - spare // _PART)))
        if begun or amount:
            files[model] = amount
            left -= amount
        if amount and not begun:
            step.decide("prefetched", model, Prefetched(amount), group.head.id)
    if (said := tuple(files.items())) != state.prefetching:
        state.prefetching = said
        step.commands.append(Prefetch(said))


def spare_bytes(ledger: Ledger) -> int:
    """Return what the host reports as free beyond what is promised and not touched, and what runners have mapped."""
    if HOST not in ledger.devices:
        return 0
    untouched = sum(account.reserved_not_touched(HOST) for account in ledger.accounts.values())
    return max(0, ledger.devices[HOST].free_bytes - untouched)


def _waiting(state: CoreState, plan: Plan) -> Iterator[tuple[RequestGroup, ModelInfo]]:
    """Yield the lines that wait for memory, in order, with what their models are made of.

    A line that is about to start is one of them only if its file is being read already: its devices may not be its own
    yet.
    """
    living = {runner.model for runner in state.runners.values()}
    begun = {model for model, _ in state.prefetching}
    starting = {group.spec.model for group, _, _ in plan.launches} - begun
    for spec in plan.placements:
        group = state.groups.get(spec)
        if group is None or spec.purpose is Purpose.memory or spec.model in living or spec.model in starting:
            continue
        info = state.models[spec.model].info
        if isinstance(info, ModelInfo):
            yield group, info
