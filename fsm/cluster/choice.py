"""Which node serves a request soonest, by what each node has told, and by what was sent to it since.

For each node that has the model, the seconds until the first token are estimated:

1. *ready*: a runner of the model has a free slot: none, but for the age of the digest.
2. *busy*: all its slots are taken: the answers that come first, divided by the slots.
3. *loading*: the rest of the load, and the answers that come first.
4. *fits*: a load. There is free memory for it.
5. *evicts*: a load, once idle runners have left. Its cost to others is the loading that the evictions cause later.
6. *waits*: a load, once busy runners have become idle or drained.
7. *refused*, *never*: its loads fail there, or it is larger than the node. Such a node comes last: it says why itself.

Nodes are ordered by their seconds and costs, in steps of about a sixteenth. Nodes that are level are ordered by
rendezvous hashing of the model, so that all fronts agree on where a cold model goes, and that a model keeps its node.
So a hot model gets a further copy when its queue would cost more than a load elsewhere; when the queue is gone, all its
requests go to one copy again, and the others become idle and leave for other models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from hashlib import blake2b
from types import MappingProxyType

from fsm.cluster.digest import ContentId, Copy, DeviceKind, Evictable, ModelDigest, NodeDigest, NodeId
from fsm.domain.options import AUTOMATIC, Options
from fsm.state.runner_match import match

USUAL_ANSWER_S = 5.0  # of a model whose answers have not been seen
START_S = 1.0  # of a load of which nothing is known, beside reading the file
READ_BYTES_S = 1e9  # how fast the file is read then
LEAST_LOAD_S = 0.5  # a ready runner with a free slot is better than any load, whatever was measured
STOP_S = 0.2  # until the memory of an idle runner is free
BUSY_S = 30.0  # until busy runners have become idle, or drain: at most the setting `max_wait`, 120 s
AGE_PART = 0.02  # of a digest's age is added to the seconds of its node
AGE_LIMIT_S = 0.4  # and no more than this, which is less than any load
SILENT_S = 30.0  # a node whose digest is older comes after all others: it may be gone


class Way(Enum):
    """How a node would serve a request."""

    ready = "ready"
    busy = "busy"
    loading = "loading"
    fits = "fits"
    evicts = "evicts"
    waits = "waits"
    refused = "refused"
    never = "never"


@dataclass(frozen=True, slots=True)
class Sent:
    """What a front has sent to a node for one model since the node's digest was taken."""

    count: int  # requests, less those of the front that have ended since; may be negative
    first_at: float  # when the first of them was sent


NOTHING_SENT: Mapping[ContentId, Sent] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks for, as far as the choice depends on it."""

    content: ContentId
    options: Options = AUTOMATIC  # load-time options that it names
    answer_s: float = USUAL_ANSWER_S  # how long an answer of this model usually takes


@dataclass(frozen=True, slots=True)
class Choice:
    """A node, and what is expected there."""

    node: NodeId
    seconds: float  # until the first token
    way: Way
    cost_s: float = 0.0  # seconds of loading that it costs other models later


def choose(
    digests: Iterable[NodeDigest],
    sent_since: Mapping[NodeId, Mapping[ContentId, Sent]],
    request: Wanted,
    now: float,
) -> list[Choice]:
    """Return the nodes that have the model, the best first; empty where none has it, or all of them close.

    `now` is of the clock of the digests. The first node is to be asked first. The next one is asked only where the
    first does not answer, or says that the request would wait there for longer (`would_wait_longer`).
    """
    able = [one for one in digests if request.content in one.models and not one.closing]
    load_s = _load_s_elsewhere(request.content, able)
    found = []
    for digest in able:
        view = _View(digest, sent_since.get(digest.node, NOTHING_SENT), request, now, load_s)
        choice = view.choice()
        rank = (view.silent, _step(choice.seconds + choice.cost_s), _rendezvous(digest.node, request.content))
        found.append((rank, choice))
    return [choice for _, choice in sorted(found, key=lambda one: one[0])]


def would_wait_longer(digest: NodeDigest, request: Wanted, bound_s: float) -> bool:
    """Tell whether a request would wait longer than `bound_s` on a node, by a digest that the node has taken now.

    A node that was chosen by an old digest asks this before it queues the request, and says no where it is so. Nothing
    is loaded for the request then.
    """
    if request.content not in digest.models or digest.closing:
        return True
    load_s = _load_s_elsewhere(request.content, [digest])
    return _View(digest, NOTHING_SENT, request, digest.at, load_s).choice().seconds > bound_s


@dataclass(frozen=True, slots=True)
class _View:
    """One node, as a front sees it for one request."""

    digest: NodeDigest
    sent: Mapping[ContentId, Sent]
    request: Wanted
    now: float
    load_elsewhere_s: float  # where the node does not know how long a load takes

    @property
    def model(self) -> ModelDigest:
        return self.digest.models[self.request.content]

    @property
    def age_s(self) -> float:
        return max(0.0, self.now - self.digest.at)

    @property
    def silent(self) -> bool:
        return self.age_s > SILENT_S

    @property
    def load_s(self) -> float:
        return max(LEAST_LOAD_S, self.load_elsewhere_s if self.model.load_s is None else self.model.load_s)

    def choice(self) -> Choice:
        """Return what is expected on the node."""
        seconds, way, cost_s = self._expected()
        doubt_s = min(AGE_PART * self.age_s, AGE_LIMIT_S)
        return Choice(self.digest.node, seconds + doubt_s, way, cost_s)

    def _expected(self) -> tuple[float, Way, float]:
        model, copy = self.model, self.model.copy
        sent = self.sent.get(self.request.content)
        if model.refused_for_s > self.age_s:
            return math.inf, Way.refused, 0.0
        if copy is not None and match(copy.loaded_as, self.request.options):
            ready_in_s = None if copy.ready_in_s is None else max(0.0, copy.ready_in_s - self.age_s)
            return self._served(copy.leases, ready_in_s)
        if copy is None and sent is not None and sent.count > 0:  # the first of them has begun a load
            return self._served(0, max(0.0, self.load_s - (self.now - sent.first_at)))
        return self._loaded(copy)

    def _served(self, leases: int, ready_in_s: float | None) -> tuple[float, Way, float]:
        """Return what is expected of a runner that is loaded, or will be in `ready_in_s`."""
        model, sent = self.model, self.sent.get(self.request.content)
        slots = max(1, model.slots)
        ahead = max(0, leases + model.queued + (sent.count if sent is not None else 0))
        wait_s = max(0, ahead - slots + 1) * self.request.answer_s / slots
        if ready_in_s is not None:
            return ready_in_s + wait_s, Way.loading, 0.0
        return wait_s, Way.busy if ahead >= slots else Way.ready, 0.0

    def _loaded(self, own: Copy | None) -> tuple[float, Way, float]:
        """Return what is expected where the model has to be loaded, in the place of its own copy if it has one."""
        digest, need = self.digest, self._need(self.model)
        if any(amount > digest.capacity_bytes(kind) for kind, amount in need.items()):
            return math.inf, Way.never, 0.0
        load_s = self.load_s + self._load_slot_s()
        if own is not None and (own.leases or own.ready_in_s is not None or own.pinned):
            return load_s + STOP_S + BUSY_S, Way.waits, 0.0
        missing = {kind: amount - digest.free_bytes(kind) for kind, amount in need.items()}
        _add(missing, digest.awaited_bytes)
        for content in self._launched():
            _add(missing, self._need(digest.models[content]).items())
        if own is None and _fits(missing):
            return load_s, Way.fits, 0.0
        if own is not None:
            _add(missing, own.bytes, -1)
        own_s = self.load_s if own is not None else 0.0  # the requests that the copy serves need it again
        cost_s = _eviction_cost_s(missing, [one for one in digest.evictable if not self._in_use(one.content)])
        if cost_s is None:
            return load_s + STOP_S + BUSY_S, Way.waits, own_s + sum([one.cost_s for one in digest.evictable])
        return load_s + STOP_S, Way.evicts, own_s + cost_s

    def _need(self, model: ModelDigest) -> dict[DeviceKind, int]:
        """Return the bytes that a runner takes, by kind of device; those of a file go to GPUs if they hold it."""
        if model.bytes:
            return dict(model.bytes)
        on_gpu = model.file_bytes and self.digest.capacity_bytes("gpu") >= model.file_bytes
        return {"gpu" if on_gpu else "cpu": model.file_bytes}

    def _launched(self) -> list[ContentId]:
        """Return the other models whose loads this front has caused there since, by what the digest says."""
        models = self.digest.models
        return [
            content
            for content, sent in self.sent.items()
            if sent.count > 0 and content != self.request.content and content in models and models[content].copy is None
        ]

    def _load_slot_s(self) -> float:
        """Return how long the load is expected to wait for others that are under way."""
        loads = self.digest.loading + len(self._launched())
        ahead = max(0, loads - self.digest.loads_at_once + 1)
        return ahead * self.load_s / 2 / max(1, self.digest.loads_at_once)

    def _in_use(self, content: ContentId | None) -> bool:
        """Tell whether a runner that was idle serves what was sent since, or is the model's own."""
        if content is None:
            return False
        sent = self.sent.get(content)
        return content == self.request.content or (sent is not None and sent.count > 0)


def _load_s_elsewhere(content: ContentId, digests: Sequence[NodeDigest]) -> float:
    """Return how long a load of a model takes on a node that has not measured it: the median of the others."""
    known = sorted([load_s for one in digests if (load_s := one.models[content].load_s) is not None])
    if known:
        return known[len(known) // 2]
    return START_S + max([one.models[content].file_bytes for one in digests], default=0) / READ_BYTES_S


def _add(missing: dict[DeviceKind, int], amounts: Iterable[tuple[DeviceKind, int]], sign: int = 1) -> None:
    for kind, amount in amounts:
        if kind in missing:
            missing[kind] += sign * amount


def _fits(missing: Mapping[DeviceKind, int]) -> bool:
    return all(amount <= 0 for amount in missing.values())


def _eviction_cost_s(missing: Mapping[DeviceKind, int], idle: Sequence[Evictable]) -> float | None:
    """Return the cost of idle runners that make room together, as cheap as the core would; None where all do not.

    It is the better of two greedy sets, which take the cheapest first, or the cheapest by the byte, and then keep each
    runner that turned out not to be needed.
    """
    costs = []
    for order in (idle, sorted(idle, key=lambda one: one.cost_s)):
        left, taken = dict(missing), list[Evictable]()
        for one in order:
            if _fits(left):
                break
            if any(left.get(kind, 0) > 0 for kind, _ in one.bytes):
                _add(left, one.bytes, -1)
                taken.append(one)
        if not _fits(left):
            return None
        cost_s = 0.0
        for one in taken:
            without = dict(left)
            _add(without, one.bytes)
            left, cost_s = (without, cost_s) if _fits(without) else (left, cost_s + one.cost_s)
        costs.append(cost_s)
    return min(costs)


def _step(seconds: float) -> float:
    """Return the place of a time on a scale whose steps are about a sixteenth, from a quarter of a second on."""
    return seconds if seconds == math.inf else float(int(16.0 * math.log1p(4.0 * seconds)))


@lru_cache(maxsize=1 << 16)
def _rendezvous(node: NodeId, content: ContentId) -> bytes:
    """Return the place of a node in the order of a model (D. G. Thaler and C. V. Ravishankar 1998)."""
    return blake2b(f"{node}\0{content}".encode(), digest_size=8).digest()
