"""A cluster on virtual time: a trace, nodes, and the fronts that choose among them."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from fsm.verification.state_invariants import check_state
from tests.tools.cluster_simulation.fronts import Choosing, Front, Multiplexed, Simple, round_robin, two_choices
from tests.tools.cluster_simulation.nodes import CoreNode, Node, RayReplica
from tests.tools.policies.workload import Trace

HOST_LOADS = 2  # at once on a node
OURS, TWO_CHOICES, BIG = "loadmaster", "two choices", "one big node"


@dataclass(frozen=True, slots=True)
class Setup:
    """A cluster, and how its nodes are chosen."""

    route: str  # one of `ROUTES`
    nodes: int
    node_bytes: int
    slots: int = 4
    fronts: int = 2
    digest_s: float = 1.0  # between two digests of a node


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a trace."""

    waits_s: tuple[float, ...]  # sorted
    loads: int
    reload_s: float  # seconds of loads, without the first of each model in the cluster
    refusals: int  # by nodes that a request would have waited at
    broken: int  # answers whose model was unloaded under them

    @property
    def mean_s(self) -> float:
        """The mean wait."""
        return sum(self.waits_s) / max(1, len(self.waits_s))

    def percentile_s(self, percent: float) -> float:
        """The wait that so many of a hundred requests do not exceed."""
        return self.waits_s[min(len(self.waits_s) - 1, int(len(self.waits_s) * percent / 100))] if self.waits_s else 0.0


class World:
    """One run."""

    def __init__(self, trace: Trace, setup: Setup, seed: int = 1) -> None:
        self.now, self.trace, self.setup, self.slots = 0.0, trace, setup, setup.slots
        self._ahead: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count(1)
        self._begun: dict[int, float] = {}
        self._waits: list[float] = []
        self._loaded: set[str] = set()
        self._loads, self._reload_s = 0, 0.0
        self._holds: dict[int, float] = {}
        self._front_of: dict[int, Front] = {}
        self._draw = Random(f"{trace.name} {setup.route} {seed}")
        self.nodes, self.fronts = ROUTES[setup.route](self, setup, self._draw)

    def run(self) -> Outcome:
        """Run every event to the end."""
        for number, ask in enumerate(self.trace.asks, 1):
            self._pass_until(ask.at)
            self._begun[number], self._holds[number] = self.now, ask.hold_s
            front = self._front_of[number] = self._draw.choice(self.fronts)
            front.ask(number, ask.model)
        self._pass_until(self.now + 1e6)
        assert not self._begun, "a request was never answered"
        for node in self.nodes:
            if isinstance(node, CoreNode):
                check_state(node.core)
        refusals = sum(front.refusals for front in self.fronts if isinstance(front, Choosing))
        broken = sum(node.broken for node in self.nodes if isinstance(node, RayReplica))
        return Outcome(tuple(sorted(self._waits)), self._loads, self._reload_s, refusals, broken)

    def _pass_until(self, until: float) -> None:
        while self._ahead and self._ahead[0][0] <= until:
            self.now, _, call = heapq.heappop(self._ahead)
            call()
        self.now = until

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Have something happen later."""
        heapq.heappush(self._ahead, (self.now + delay_s, next(self._numbers), call))

    def launched(self, model: str) -> None:
        """Count a load."""
        self._loads += 1
        if model in self._loaded:
            self._reload_s += self.trace.load_s[model]
        self._loaded.add(model)

    def granted(self, request: int, node: Node) -> None:
        """Let an answer begin, and end later."""
        self._waits.append(self.now - self._begun.pop(request))
        hold_s = self._holds.pop(request)

        def end() -> None:
            node.release(request)
            self._front_of.pop(request).ended(request, hold_s)

        self.after(hold_s, end)


Built = tuple[Sequence[Node], Sequence[Front]]


def _cores(world: World, setup: Setup, draw: Random) -> list[CoreNode]:
    return [
        CoreNode(f"node-{number}", world, setup.node_bytes, HOST_LOADS, setup.digest_s, draw.random() * setup.digest_s)
        for number in range(setup.nodes)
    ]


def _choosing(world: World, setup: Setup, draw: Random) -> Built:
    nodes = _cores(world, setup, draw)
    return nodes, [Choosing(world, nodes) for _ in range(setup.fronts)]


def _round_robin(world: World, setup: Setup, draw: Random) -> Built:
    nodes = _cores(world, setup, draw)
    return nodes, [Simple(world, nodes, round_robin()) for _ in range(setup.fronts)]


def _two_choices(world: World, setup: Setup, draw: Random) -> Built:
    nodes = _cores(world, setup, draw)
    return nodes, [Simple(world, nodes, two_choices(draw)) for _ in range(setup.fronts)]


def _multiplexed(world: World, setup: Setup, draw: Random) -> Built:
    """As many models as fit on average: where large ones meet, a real node would be out of memory."""
    return _replicas(
        world, setup, draw, int(setup.node_bytes * len(world.trace.bytes) / sum(world.trace.bytes.values()))
    )


def _multiplexed_safe(world: World, setup: Setup, draw: Random) -> Built:
    """As many models as fit whichever they are."""
    sizes = accumulate(sorted(world.trace.bytes.values(), reverse=True))
    return _replicas(world, setup, draw, sum(size <= setup.node_bytes for size in sizes))


def _replicas(world: World, setup: Setup, draw: Random, most: int) -> Built:
    most = max(1, most)
    replicas = [RayReplica(f"node-{number}", world, most) for number in range(setup.nodes)]
    return replicas, [Multiplexed(world, replicas, draw, most * setup.slots) for _ in range(setup.fronts)]


def _one_node(world: World, setup: Setup, draw: Random) -> Built:
    node = CoreNode("all", world, setup.nodes * setup.node_bytes, setup.nodes * HOST_LOADS, 1.0, 0.0)
    return [node], [Simple(world, [node], round_robin())]


ROUTES: Mapping[str, Callable[[World, Setup, Random], Built]] = {
    OURS: _choosing,
    "round robin": _round_robin,
    TWO_CHOICES: _two_choices,
    "Ray multiplexed, mean count": _multiplexed,
    "Ray multiplexed, safe count": _multiplexed_safe,
    BIG: _one_node,
}
