"""The ways to choose a node: this project's, and those that it is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

from fsm.cluster.choice import USUAL_ANSWER_S, Wanted
from fsm.cluster.digest import ContentId, NodeId
from fsm.cluster.router import Forwarded, Router
from tests.tools.cluster_simulation.nodes import Cluster, CoreNode, RayReplica

HOP_S = 0.001  # from a front to a node, or back
MOST_TRIES = 3  # nodes that may say that a request would wait there; the next one takes it
SLACK_S, SLACK_PART = 0.5, 0.25  # a node says no only where another promises clearly less


class Front(Protocol):
    """Takes requests, and sends each to a node."""

    def ask(self, request: int, model: str) -> None:
        """Send a new request to a node."""

    def ended(self, request: int, hold_s: float) -> None:
        """Take note of an answer's end."""


class Choosing:
    """A front as ours: the choice by digests, and a node that was wrong says no."""

    def __init__(self, cluster: Cluster, nodes: Sequence[CoreNode]) -> None:
        self.cluster, self.nodes = cluster, {node.name: node for node in nodes}
        self.router = Router()
        self.refusals = 0
        self._forwarded: dict[int, Forwarded] = {}

    def ask(self, request: int, model: str) -> None:
        """Send a new request to the node that is first, unless it says no."""
        self._try(request, ContentId(model), ())

    def ended(self, request: int, hold_s: float) -> None:
        """Count an answer's end and length."""
        self.router.answered(self._forwarded.pop(request), hold_s)

    def _try(self, request: int, content: ContentId, refused: tuple[NodeId, ...]) -> None:
        now, router = self.cluster.now, self.router
        for name, node in self.nodes.items():
            digest = node.digest()
            if name not in router.digests or digest.at > router.digests[name].at:
                router.heard(digest, digest.at)
        first, *others = router.choose(now, content, refused=refused)
        bound_s = math.inf
        if others and len(refused) < MOST_TRIES:
            promised_s = max(first.seconds, others[0].seconds + others[0].cost_s)
            bound_s = promised_s * (1 + SLACK_PART) + SLACK_S
        self._forwarded[request] = router.forward(now, first.node, content)
        wanted = Wanted(content, answer_s=router.answers_s.get(content, USUAL_ANSWER_S))
        self.cluster.after(HOP_S, lambda: self._arrive(request, wanted, first.node, bound_s, refused))

    def _arrive(self, request: int, wanted: Wanted, name: NodeId, bound_s: float, refused: tuple[NodeId, ...]) -> None:
        node, at = self.nodes[name], self.cluster.now
        fresh = node.judge(wanted, bound_s) if bound_s < math.inf else None
        if fresh is None:
            node.acquire(request, wanted.content)
            return

        def again() -> None:
            self.refusals += 1
            self.router.ended(self._forwarded.pop(request))
            self.router.heard(fresh, at)
            self._try(request, wanted.content, (*refused, name))

        self.cluster.after(HOP_S, again)


class Simple:
    """A front that looks at no model: it sends each request where `pick` says."""

    def __init__(
        self, cluster: Cluster, nodes: Sequence[CoreNode], pick: Callable[[Sequence[CoreNode]], CoreNode]
    ) -> None:
        self.cluster, self.nodes, self.pick = cluster, nodes, pick

    def ask(self, request: int, model: str) -> None:
        """Send a new request to a node."""
        node = self.pick(self.nodes)
        self.cluster.after(HOP_S, lambda: node.acquire(request, model))

    def ended(self, request: int, hold_s: float) -> None:
        """Take note of nothing."""


def round_robin() -> Callable[[Sequence[CoreNode]], CoreNode]:
    """Return a function that takes one node after the other."""
    turn = [0]

    def pick(nodes: Sequence[CoreNode]) -> CoreNode:
        turn[0] += 1
        return nodes[turn[0] % len(nodes)]

    return pick


def two_choices(draw: Random) -> Callable[[Sequence[CoreNode]], CoreNode]:
    """Return a function that takes, of two nodes at random, the one with fewer requests at this moment."""
    return lambda nodes: min(draw.sample(list(nodes), min(2, len(nodes))), key=lambda node: node.in_flight)


class Multiplexed:
    """A handle of Ray Serve: its router with `MultiplexMixin`, which learns here at once which replica has a model."""

    def __init__(self, cluster: Cluster, replicas: Sequence[RayReplica], draw: Random, most_ongoing: int) -> None:
        self.cluster, self.replicas, self.draw, self.most_ongoing = cluster, replicas, draw, most_ongoing

    def ask(self, request: int, model: str) -> None:
        """Send a new request to a replica."""
        self._try(request, model, 0, self.cluster.now + self.draw.uniform(1.0, 2.0))

    def ended(self, request: int, hold_s: float) -> None:
        """Take note of nothing."""

    def _try(self, request: int, model: str, tries: int, until: float) -> None:
        if self.cluster.now < until:
            candidates = [one for one in self.replicas if model in one.known_models()]
            if not candidates or tries:
                candidates = self._fewest()
        else:
            candidates = list(self.replicas)
        two = self.draw.sample(candidates, min(2, len(candidates)))
        chosen = min(two, key=lambda one: one.in_flight)
        if chosen.in_flight < self.most_ongoing:
            chosen.acquire(request, model)
        else:
            delay_s = min(0.5, 0.025 * 2**tries)
            self.cluster.after(delay_s, lambda: self._try(request, model, tries + 1, until))

    def _fewest(self) -> list[RayReplica]:
        counts = [len(one.known_models()) for one in self.replicas]
        return [one for one, count in zip(self.replicas, counts, strict=True) if count == min(counts)]
