"""The simulation of a cluster: one small case of it, and that it is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tools.cluster_simulation import __main__ as command
from tests.tools.cluster_simulation.report import Row, table
from tests.tools.cluster_simulation.workload import CLUSTER_KINDS, draw_cluster_trace
from tests.tools.cluster_simulation.world import BIG, OURS, ROUTES, TWO_CHOICES, Outcome, Setup, World
from tests.tools.policies.workload import GB, Ask, Trace

SAFE = "Ray multiplexed, safe count"


def run(trace: Trace, route: str, *, nodes: int = 4, gb: int = 48, digest_s: float = 1.0) -> Outcome:
    return World(trace, Setup(route, nodes, gb * GB, digest_s=digest_s)).run()


def a_trace(asks: str, *, gap_s: float = 60.0, hold_s: float = 1.0, gb: int = 6) -> Trace:
    """Return a trace in which models of one size, called by letters, are asked for one after the other."""
    told = tuple(Ask(gap_s * place, model, hold_s) for place, model in enumerate(asks, 1))
    return Trace("told", dict.fromkeys(asks, gb * GB), dict.fromkeys(asks, 4.0), told)


def test_the_choice_is_near_one_big_node_and_far_from_two_choices() -> None:
    """On one hour of agents on four nodes: reload seconds at most 1.3 of one big node, p99 at most half of two choices.

    The digests are a second apart, and two fronts know nothing of one another.
    """
    trace = draw_cluster_trace("agents", 1, 4, 1.0)
    ours, big, two = (run(trace, route) for route in (OURS, BIG, TWO_CHOICES))
    assert ours.reload_s <= 1.3 * big.reload_s
    assert ours.percentile_s(99) <= 0.5 * two.percentile_s(99)
    assert ours.mean_s < 0.2 * two.mean_s


@pytest.mark.parametrize("digest_s", [0.1, 10.0])
def test_requests_at_one_moment_cause_one_load(digest_s: float) -> None:
    """Three requests for a cold model at once, by two fronts, cause one load, whatever the age of the digests."""
    assert run(a_trace("aaa", gap_s=0.0), OURS, digest_s=digest_s).loads == 1


def test_a_hot_model_gets_further_copies_and_loses_them() -> None:
    """A queue that is longer than a load gets a second copy; with few requests the model goes to one node alone."""
    hot = a_trace("a" * 120, gap_s=0.2, hold_s=6.0)  # thirty at once
    world = World(hot, Setup(OURS, 4, 48 * GB))
    assert 2 <= world.run().loads <= 4
    calm = a_trace("a" * 40, gap_s=2.0, hold_s=1.0)
    assert run(calm, OURS).loads == 1


def test_models_settle() -> None:
    """Models that fit on the cluster are loaded once each, by whichever front they are asked for."""
    assert run(a_trace("abcdefgh" * 5), OURS, gb=16).loads == 8


def test_a_replica_of_ray_counts_models_and_unloads_those_in_use() -> None:
    """Ray's replicas hold a number of models, load one at a time, and unload the least recently used one in use."""
    held = run(a_trace("abab", hold_s=500.0, gb=20), SAFE, nodes=1, gb=24)
    assert (held.loads, held.broken) == (4, 3)
    both = run(a_trace("ab", gap_s=0.0, gb=2), SAFE, nodes=1, gb=24)
    assert both.waits_s == pytest.approx((4.0, 8.0))


def test_a_seed_gives_the_same_outcome_every_time() -> None:
    """All traffic and chance follow from the seed."""
    trace = draw_cluster_trace("agents", 2, 2, 0.25)
    assert run(trace, OURS, nodes=2) == run(draw_cluster_trace("agents", 2, 2, 0.25), OURS, nodes=2)


@pytest.mark.parametrize("kind", CLUSTER_KINDS)
def test_traffic_is_for_all_the_models_of_the_cluster(kind: str) -> None:
    """There are 24 models for each two nodes, and requests in order of time."""
    trace = draw_cluster_trace(kind, 1, 4, 1.0)
    assert len(trace.bytes) == 48 and {ask.model for ask in trace.asks} <= trace.bytes.keys() == trace.load_s.keys()
    assert list(trace.asks) == sorted(trace.asks, key=lambda ask: (ask.at, ask.model))
    assert trace.asks[-1].at < 3600.0


def test_the_command_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traffic is run with every route, and reported with its ratios."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "CLUSTER_KINDS", ("agents",))
    assert command.main(["--seeds", "1", "--nodes", "2", "--hours", "0.02"]) == 0
    assert {row["route"] for row in json.loads(Path("build/cluster.json").read_text())} == ROUTES.keys()
    assert Path("build/cluster.md").read_text().count("\n") == 2 + len(ROUTES) + 2


def test_ratios_are_of_means_over_seeds() -> None:
    """A line of the table has the ratio of reload seconds to one big node's, and of the p99 to two choices'."""

    def row(route: str, seed: int, p99_s: float, reload_s: float) -> Row:
        return Row(4, "agents", seed, route, 1.0 if route == OURS else 0.0, 0.1, 1.0, p99_s, 9, reload_s, 0, 0)

    rows = [row(OURS, 1, 2.0, 12.0), row(OURS, 2, 4.0, 14.0), row(BIG, 1, 1.0, 10.0), row(TWO_CHOICES, 1, 12.0, 99.0)]
    line = next(line for line in table(rows) if OURS in line)
    assert line.endswith("| 9 | 13 | 1.30 | 0.25 |")
