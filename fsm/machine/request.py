"""A request: what somebody waits for, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import NewType

from fsm.domain.devices import DeviceId
from fsm.domain.model_info import Options
from fsm.domain.record import Record

ModelId = NewType("ModelId", str)
RequestId = NewType("RequestId", int)


class RequestState(Enum):
    """The core alone writes it; a plain enum, since two more triggers a lease would triple the warm path.

    `MEANING` says what is true while in each.
    """

    queued = "queued"
    granted = "granted"
    released = "released"
    rejected = "rejected"
    cancelled = "cancelled"


MEANING: Mapping[RequestState, str] = MappingProxyType(
    {
        RequestState.queued: "It waits in exactly one line and is not answered.",
        RequestState.granted: "It is answered: it holds a lease, or memory of its own.",
        RequestState.released: "Final: it holds nothing; what it held is given back, or was lost with its runner.",
        RequestState.rejected: "Final: it is answered with a refusal.",
        RequestState.cancelled: "Final: the asker left before the answer, and is told so.",
    }
)


class Purpose(Enum):
    """What a request is to be given."""

    lease = "lease"
    preload = "preload"  # the model is loaded and rests; nothing to release
    memory = "memory"  # the program's own memory, out of the ledger while held

    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """What a line of requests has in common: those who want the same are planned as one and served together."""

    model: ModelId
    options: Options
    purpose: Purpose
    priority: int
    memory: tuple[tuple[DeviceId, int], ...] = ()  # bytes by device; only for Purpose.memory


@dataclass(slots=True, eq=False)
class Request(Record):
    """One question of one asker, answered exactly once."""

    id: RequestId
    spec: RequestSpec
    keep_alive_s: float | None  # None: the runner keeps its own
    queued_at: float
    state: RequestState = RequestState.queued
    survived: bool = False  # one load failed for lack of memory while it waited; the next failure is its answer
    asked: bool = False  # it was told that others wait for what it holds
    runner: int | None = None  # the runner its lease is on; None unless granted a lease
