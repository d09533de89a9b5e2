"""Requests: what a caller asks for, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import NewType

from fsm.domain.devices import DeviceId
from fsm.domain.options import Options
from fsm.domain.record import Record

ModelId = NewType("ModelId", str)
RequestId = NewType("RequestId", int)


class RequestState(Enum):
    """The five states of a request; `MEANING` says what is true while a request is in each.

    The core alone writes the state. It is a plain enum, since two more triggers a lease would triple the warm path.
    """

    queued = "queued"
    granted = "granted"
    released = "released"
    rejected = "rejected"
    cancelled = "cancelled"


MEANING: Mapping[RequestState, str] = MappingProxyType(
    {
        RequestState.queued: "The request waits in exactly one request group and is not answered.",
        RequestState.granted: "The request is answered: it holds a lease, or memory of its own.",
        RequestState.released: "Final: the request holds nothing; its lease or memory is released, or was lost with "
        "its runner.",
        RequestState.rejected: "Final: the request is answered with a refusal.",
        RequestState.cancelled: "Final: the caller left before the answer, and is told so.",
    }
)


class Purpose(Enum):
    """What a request asks for."""

    lease = "lease"
    preload = "preload"  # its model is loaded and idle; nothing is to be released
    memory = "memory"  # for the program's own use, reserved in the ledger while it is held

    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """What a request asks for; requests with the same specification are planned as one group and served together."""

    model: ModelId
    options: Options
    purpose: Purpose
    priority: int
    memory: tuple[tuple[DeviceId, int], ...] = ()  # bytes by device; only for Purpose.memory


@dataclass(slots=True, eq=False)
class Request(Record):
    """One call of one caller, answered exactly once."""

    id: RequestId
    spec: RequestSpec
    keep_alive_s: float | None  # None: the runner keeps its own
    queued_at: float
    holds: tuple[RequestId, ...] = ()  # leases that its caller holds while it waits
    keeps: tuple[RequestId, ...] = ()  # of these: leases that are released by its caller alone, and after the answer
    state: RequestState = RequestState.queued
    survived: bool = False  # one load ran out of memory while the request waited; the next failure is its answer
    asked: bool = False  # its caller was told that other requests wait for the memory of its runner
    runner: int | None = None  # the runner of its lease; None unless it was granted a lease
