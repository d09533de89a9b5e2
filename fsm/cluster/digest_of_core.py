"""The digest of a node, made of its core; nothing in the core changes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fsm.cluster.digest import (
    USUAL_SLOTS,
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
from fsm.machine.request import ModelId
from fsm.machine.runner import IDLE, LOADING, Runner
from fsm.sizing.footprint import Footprint
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord

KEPT_S = 300.0  # a model that has been idle for so long is as likely to be asked for within the time as not


def digest_of(now: float, core: Core, node: NodeId, offers: Mapping[ModelId, Offer]) -> NodeDigest:
    """Return the digest of a node at `now` with the models that it offers, by their identities in its core.

    Takes about as long as a snapshot: some microseconds for each runner and each model. Of equal contents under several
    identities the first one that is loaded counts, or else the first.
    """
    state = core._state
    models: dict[ContentId, ModelDigest] = {}
    for id, offer in offers.items():
        digest = _model(now, state, state.models.get(id), offer)
        if offer.content not in models or (models[offer.content].copy is None and digest.copy is not None):
            models[offer.content] = digest
    idle = [runner for runner in state.runners.values() if runner.state is IDLE and not state.pinned(runner)]
    loading = sum(runner.state is LOADING for runner in state.runners.values())
    gpus = sum(sample.kind == "gpu" for sample in state.ledger.devices.values())
    return NodeDigest(
        node, now, _devices(state, idle), models, _evictable(now, state, idle, offers), _awaited(state), loading,
        gpus * state.config.max_loads_per_gpu or state.config.max_host_loads, state.closing,
    )  # fmt: skip


def _model(now: float, state: CoreState, record: ModelRecord | None, offer: Offer) -> ModelDigest:
    if record is None:
        limit = state.config.max_leases
        return ModelDigest(offer.names, limit if limit > 0 else USUAL_SLOTS, 0, offer.load_s, (), offer.file_bytes)
    load_s, runner = record.load_s, record.current
    return ModelDigest(
        offer.names,
        _slots(state, record, runner),
        sum(len(group.requests) for group in state.groups_of_model(record.id)) if state.groups else 0,
        offer.load_s if load_s is None else load_s,
        _bytes(state, record),
        offer.file_bytes,
        max(0.0, record.blocked_until - now),
        None if runner is None else _copy(now, state, record, runner),
    )


def _copy(now: float, state: CoreState, record: ModelRecord, runner: Runner) -> Copy:
    ready_in_s = None
    if runner.state is LOADING:
        expected_at = state.expected_at(runner)
        ready_in_s = max(0.0, expected_at - now) if expected_at < math.inf else 0.0
    held = _held(state, runner)
    return Copy(len(runner.leases), ready_in_s, runner.effective_options, held, record.pinned)


def _slots(state: CoreState, record: ModelRecord, runner: Runner | None) -> int:
    """Return how many requests a runner of a model answers at once: its limit of leases, or else its slots."""
    limit = state.config.max_leases if record.max_leases is None else record.max_leases
    slots = (runner.effective_options.num_parallel if runner is not None else None) or USUAL_SLOTS
    return slots if limit in (0, SLOTS) else limit


def _bytes(state: CoreState, record: ModelRecord) -> KindBytes:
    """Return what a runner of a model takes: what it holds, or else what was measured or declared."""
    if record.current is not None:
        return _held(state, record.current)
    amounts: Amounts = next(reversed(record.measured.values()), ())
    if not amounts and isinstance(record.profile, Footprint):
        amounts = record.profile.fixed
    return _by_kind(state, dict(amounts))


def _held(state: CoreState, runner: Runner) -> KindBytes:
    account = state.ledger.accounts["runner", runner.id]
    return _by_kind(state, {device: account.held_bytes(device) for device in (*account.reserved, *account.peak)})


def _by_kind(state: CoreState, amounts: Mapping[DeviceId, int]) -> KindBytes:
    found: dict[DeviceKind, int] = {}
    for memory, amount in state.ledger.by_memory(amounts.items()).items():
        kind: DeviceKind = "cpu" if memory == HOST else "gpu"
        found[kind] = found.get(kind, 0) + amount
    return tuple(sorted(found.items()))


def _devices(state: CoreState, idle: list[Runner]) -> tuple[DeviceDigest, ...]:
    """Return the devices; an integrated GPU is left out, since its memory is the host's."""
    ledger = state.ledger
    accounts = [ledger.accounts["runner", runner.id] for runner in idle]
    return tuple(
        DeviceDigest(
            id, sample.kind, sample.capacity_bytes, ledger.free_bytes(id), sum(one.held_bytes(id) for one in accounts)
        )
        for id, sample in ledger.devices.items()
        if not sample.integrated
    )


def _evictable(
    now: float, state: CoreState, idle: list[Runner], offers: Mapping[ModelId, Offer]
) -> tuple[Evictable, ...]:
    """Return the idle runners, those first whose eviction costs least by the byte."""
    found = []
    for runner in idle:
        load_s = state.models[runner.model].load_s or 0.0
        idle_s = max(0.0, now - runner.used_at)
        offer = offers.get(runner.model)
        one = Evictable(
            _held(state, runner), load_s * KEPT_S / (KEPT_S + idle_s), offer.content if offer is not None else None
        )
        found.append((one.cost_s / max(1, sum(amount for _, amount in one.bytes)), runner.id, one))
    return tuple(one for _, _, one in sorted(found, key=lambda each: each[:2]))


def _awaited(state: CoreState) -> KindBytes:
    """Return what the models take that requests wait for and that have no runner."""
    found: dict[DeviceKind, int] = {}
    for id in state.specs_by_model:
        record = state.models.get(id)
        if record is not None and record.current is None:
            for kind, amount in _bytes(state, record):
                found[kind] = found.get(kind, 0) + amount
    return tuple(sorted(found.items()))
