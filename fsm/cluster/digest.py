"""What a node tells of itself: frozen values that are small, cross processes, and need no scheduler to be read.

Durations count from the moment when the digest was taken, since the clocks of two machines differ. `at` is of the clock
of the program that reads the digest: a front sets it to the moment at which it asked for the digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NewType

from fsm.domain.devices import DeviceId
from fsm.state.runner_match import LoadedAs

NodeId = NewType("NodeId", str)
ContentId = NewType("ContentId", str)  # of a model's files and use: equal on all nodes that have the same files

DeviceKind = Literal["cpu", "gpu"]
KindBytes = tuple[tuple[DeviceKind, int], ...]  # bytes by kind of device


@dataclass(frozen=True, slots=True)
class Offer:
    """A model in the catalogue of a node, and what is known of it although it may never have been loaded there."""

    content: ContentId
    names: tuple[str, ...] = ()
    file_bytes: int = 0  # 0: not known
    load_s: float | None = None  # measured by an earlier program; None: not known


@dataclass(frozen=True, slots=True)
class Copy:
    """A model's one runner on a node that is loading, ready or idle."""

    leases: int = 0  # 0: it is idle, or loading
    ready_in_s: float | None = None  # until its load is expected to be over; None: it is loaded
    loaded_as: LoadedAs = field(default=LoadedAs())  # what requests are matched with
    bytes: KindBytes = ()  # that it holds
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class ModelDigest:
    """A model that a node has the files of."""

    names: tuple[str, ...] = ()  # in the node's catalogue
    slots: int = 1  # requests that a runner of it answers at once
    queued: int = 0  # requests that wait on the node
    load_s: float | None = None  # that a load of it usually takes; None: not known
    bytes: KindBytes = ()  # that a runner of it takes; empty: not known
    file_bytes: int = 0  # 0: not known
    refused_for_s: float = 0.0  # after failed loads its requests are refused for so long
    copy: Copy | None = None  # None: the model is not loaded


@dataclass(frozen=True, slots=True)
class DeviceDigest:
    """The memory of one device of a node."""

    id: DeviceId
    kind: DeviceKind
    capacity_bytes: int
    free_bytes: int  # that can be reserved at once; negative where it is overdrawn


@dataclass(frozen=True, slots=True)
class Evictable:
    """An idle runner that may be evicted for other models."""

    bytes: KindBytes
    cost_s: float  # seconds of loading that its eviction is expected to cost later
    content: ContentId | None = None  # None: no model of the catalogue


@dataclass(frozen=True, slots=True)
class NodeDigest:
    """One node at one moment."""

    node: NodeId
    at: float = 0.0  # when it was taken, in seconds of the reader's clock
    devices: tuple[DeviceDigest, ...] = ()
    models: Mapping[ContentId, ModelDigest] = field(default_factory=dict)
    evictable: tuple[Evictable, ...] = ()  # those first whose eviction costs least by the byte
    awaited_bytes: KindBytes = ()  # that models will take which wait for memory, or are to be launched
    loading: int = 0  # loads under way
    loads_at_once: int = 1  # that may be under way
    closing: bool = False  # it takes no new request

    def capacity_bytes(self, kind: DeviceKind) -> int:
        """Return the bytes of all its devices of a kind."""
        return sum([device.capacity_bytes for device in self.devices if device.kind == kind])

    def free_bytes(self, kind: DeviceKind) -> int:
        """Return the bytes that can be reserved at once, of all its devices of a kind."""
        return sum([device.free_bytes for device in self.devices if device.kind == kind])
