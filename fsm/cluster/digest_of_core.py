"""The digest of a node, made of its core; nothing in the core changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

from fsm.cluster.digest import (
    ContentId,
    Copy,
    DeviceDigest,
    DeviceKind,
    Evictable,
    KindBytes,
    ModelDigest,
    NodeDigest,
    NodeId,
    Offer,
)
from fsm.core import Core
from fsm.domain.devices import HOST, Amounts, DeviceId
from fsm.domain.options import SLOTS
from fsm.eviction.reuse_prediction import IdleTimeStatistics, request_rate
from fsm.machine.request import ModelId
from fsm.machine.runner import IDLE, LOADING, Runner, RunnerId
from fsm.sizing.footprint import Footprint
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord
from fsm.state.runner_match import loaded_as

STAY_S = 600.0  # for how long a runner would stay, whose eviction is priced


def digest_of(now: float, core: Core, node: NodeId, offers: Mapping[ModelId, Offer], slots: int = 1) -> NodeDigest:
    """Return the digest of a node at `now` with the models that it offers, by their identities in its core.

    `slots` is how many a runner has where no request names a number. Takes some microseconds for each runner and each
    model. Of equal contents under several identities the first one that is loaded counts, or else the first.
    """
    state = core._state
    held = {runner.id: _held(state, runner) for runner in state.runners.values()}
    models: dict[ContentId, ModelDigest] = {}
    unloaded = slots if state.config.max_leases in (0, SLOTS) else state.config.max_leases
    for id, offer in offers.items():
        record = state.models.get(id)
        digest = _offered(offer, unloaded) if record is None else _model(now, state, record, offer, held, slots)
        if offer.content not in models or (models[offer.content].copy is None and digest.copy is not None):
            models[offer.content] = digest
    idle = [runner for runner in state.runners.values() if runner.state is IDLE and not state.pinned(runner)]
    loading = sum([runner.state is LOADING for runner in state.runners.values()])
    gpus = sum([sample.kind == "gpu" for sample in state.ledger.devices.values()])
    return NodeDigest(
        node, now, _devices(state), models, _evictable(now, state, idle, offers, held), _awaited(state), loading,
        gpus * state.config.max_loads_per_gpu or state.config.max_host_loads, state.closing,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _offered(offer: Offer, slots: int) -> ModelDigest:
    """Return what is told of a model that the core does not know."""
    return ModelDigest(offer.names, slots, 0, offer.load_s, (), offer.file_bytes)


def _model(
    now: float, state: CoreState, record: ModelRecord, offer: Offer, held: Mapping[RunnerId, KindBytes], slots: int
) -> ModelDigest:
    load_s, runner = record.load_s, record.current
    return ModelDigest(
        offer.names,
        _slots(state, record, runner, slots),
        sum([len(group.requests) for group in state.groups_of_model(record.id)]) if state.groups else 0,
        offer.load_s if load_s is None else load_s,
        _usual_bytes(state, record) if runner is None else held[runner.id],
        offer.file_bytes,
        max(0.0, record.blocked_until - now),
        None if runner is None else _copy(now, state, record, runner, held[runner.id]),
    )


def _copy(now: float, state: CoreState, record: ModelRecord, runner: Runner, held: KindBytes) -> Copy:
    ready_in_s = None
    if runner.state is LOADING:
        expected_at = state.expected_at(runner)
        ready_in_s = max(0.0, expected_at - now) if expected_at < math.inf else 0.0
    return Copy(len(runner.leases), ready_in_s, loaded_as(runner), held, record.pinned)


def _slots(state: CoreState, record: ModelRecord, runner: Runner | None, usual: int) -> int:
    """Return how many requests a runner of a model answers at once: its limit of leases, or else its slots."""
    limit = state.config.max_leases if record.max_leases is None else record.max_leases
    if limit not in (0, SLOTS):
        return limit
    return (runner.effective_options.num_parallel if runner is not None else None) or usual


def _usual_bytes(state: CoreState, record: ModelRecord) -> KindBytes:
    """Return what a runner of a model is known to take: what was measured, or else what is declared."""
    amounts: Amounts = next(reversed(record.measured.values()), ())
    if not amounts and isinstance(record.profile, Footprint):
        amounts = record.profile.fixed
    return _by_kind(state, dict(amounts))


def _held(state: CoreState, runner: Runner) -> KindBytes:
    return _by_kind(state, state.ledger.accounts["runner", runner.id].held)


def _by_kind(state: CoreState, amounts: Mapping[DeviceId, int]) -> KindBytes:
    if len(amounts) == 1 and HOST in amounts:
        return (("cpu", amounts[HOST]),)
    found: dict[DeviceKind, int] = {}
    for memory, amount in state.ledger.by_memory(amounts.items()).items():
        kind: DeviceKind = "cpu" if memory == HOST else "gpu"
        found[kind] = found.get(kind, 0) + amount
    return tuple(sorted(found.items()))


def _devices(state: CoreState) -> tuple[DeviceDigest, ...]:
    """Return the devices; an integrated GPU is left out, since its memory is the host's."""
    ledger = state.ledger
    return tuple(
        DeviceDigest(id, sample.kind, sample.capacity_bytes, ledger.free_bytes(id))
        for id, sample in ledger.devices.items()
        if not sample.integrated
    )


def _evictable(
    now: float,
    state: CoreState,
    idle: list[Runner],
    offers: Mapping[ModelId, Offer],
    held: Mapping[RunnerId, KindBytes],
) -> tuple[Evictable, ...]:
    """Return the idle runners, those first whose eviction costs least by the byte.

    The cost is what the policy `reuse` orders runners by, the loading that a runner saves in a second, over `STAY_S`:
    what evictions on two nodes cost can be compared, which the price of memory on one node would hide.
    """
    statistics, found = IdleTimeStatistics(state.idle_intervals), []
    for runner in idle:
        model = state.models[runner.model]
        forecast = statistics.forecast(model.idle_intervals, max(0.0, now - runner.used_at))
        load_s = (model.usual_load_s(runner.placement.gpu_layers) or 0.0) + runner.prompts_s
        cost_s = STAY_S * load_s * request_rate(forecast)
        offer = offers.get(runner.model)
        one = Evictable(held[runner.id], cost_s, offer.content if offer is not None else None)
        found.append((cost_s / max(1, sum([amount for _, amount in one.bytes])), runner.id, one))
    return tuple([one for _, _, one in sorted(found, key=lambda each: each[:2])])


def _awaited(state: CoreState) -> KindBytes:
    """Return what the models take that requests wait for and that have no runner."""
    found: dict[DeviceKind, int] = {}
    for id in state.specs_by_model:
        record = state.models.get(id)
        if record is not None and record.current is None:
            for kind, amount in _usual_bytes(state, record):
                found[kind] = found.get(kind, 0) + amount
    return tuple(sorted(found.items()))
