"""The traffic that policies are judged by, the bound on what is possible, and the replay through the core."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import pytest

from fsm.eviction.policies import POLICIES
from tests.tools.policies import __main__ as command
from tests.tools.policies.bound import lower_bound_s, turns
from tests.tools.policies.workload import GB, KINDS, MODELS, Ask, Trace, draw_trace, read_trace
from tests.tools.policies.world import Foreknowing, replay

SIZES = {"a": 4 * GB, "b": 4 * GB, "c": 6 * GB}
LOADS_S = {"a": 3.0, "b": 2.0, "c": 5.0}


def a_trace(models: str, every_s: float = 100.0) -> Trace:
    """Return a trace in which models are requested in turn, each for a second."""
    return Trace("by hand", SIZES, LOADS_S, tuple(Ask(every_s * place, one, 1.0) for place, one in enumerate(models)))


def least_s(trace: Trace, capacity: int) -> float:
    """Return the least seconds of reloads, found by trying every choice of models to keep."""
    order = list(turns(trace, capacity))
    best = {frozenset[str](): 0.0}  # what is loaded after so many turns -> the least seconds so far
    for place, model in enumerate(order):
        after: dict[frozenset[str], float] = {}
        first = model not in order[:place]
        for loaded, cost_s in best.items():
            cost_s += 0.0 if model in loaded or first else trace.load_s[model]
            others = sorted(loaded - {model})
            for kept in product((False, True), repeat=len(others)):
                now = frozenset([model, *(other for other, keeps in zip(others, kept, strict=True) if keeps)])
                if sum(trace.bytes[one] for one in now) <= capacity:
                    after[now] = min(cost_s, after.get(now, math.inf))
        best = after
    return min(best.values())


@pytest.mark.parametrize("models", ["abcabc", "abacabcab", "acbcacbcaabbcc", "cabcacba"])
@pytest.mark.parametrize("capacity", [6 * GB, 8 * GB, 10 * GB, 14 * GB])
def test_no_way_to_keep_models_is_cheaper_than_the_bound(models: str, capacity: int) -> None:
    """The bound is at most the least of all choices, and 0 with room for all models."""
    trace = a_trace(models)
    bound_s = lower_bound_s(trace, capacity)
    assert bound_s <= least_s(trace, capacity) + 1e-6
    assert (bound_s == pytest.approx(0.0)) == (least_s(trace, capacity) == 0.0)


@pytest.mark.parametrize("models", ["abcabc", "abacabcab", "acbcacbcaabbcc"])
@pytest.mark.parametrize("policy", [*POLICIES, "foreknowing"])
def test_no_policy_does_better_than_is_possible(models: str, policy: str) -> None:
    """The core's reloads with any policy are at least the bound and the least of all choices."""
    trace = a_trace(models)
    result = replay(trace, 10 * GB, POLICIES.get(policy) or Foreknowing(trace))
    assert result.reload_s >= least_s(trace, 10 * GB) - 1e-9
    assert result.refused == 0


def test_a_replay_counts_reloads_and_waits() -> None:
    """Of two models that do not fit together, every load but the first of each is a reload."""
    result = replay(a_trace("acac"), 8 * GB, POLICIES["lru"])
    assert (result.reloads, result.reload_s) == (2, 3.0 + 5.0)
    assert result.longest_wait_s == pytest.approx(5.1)  # a stop, and the longest load


def test_a_model_that_is_larger_than_the_memory_is_refused() -> None:
    """A model that is larger than the memory counts neither for a policy nor for the bound."""
    trace = a_trace("acac")
    assert replay(trace, 5 * GB, POLICIES["lru"]).refused == 2
    assert lower_bound_s(trace, 5 * GB) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_trace_every_time(kind: str) -> None:
    """A seed gives the same trace each time, in order, of all models with a size and a load time."""
    trace = draw_trace(kind, 7)
    assert trace == draw_trace(kind, 7) != draw_trace(kind, 8)
    assert len(trace.bytes) == MODELS
    assert list(trace.asks) == sorted(trace.asks, key=lambda ask: (ask.at, ask.model))
    assert 2000 < len(trace.asks) < 20_000
    assert {ask.model for ask in trace.asks} <= trace.bytes.keys() == trace.load_s.keys()


def test_a_users_own_trace_is_read_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own trace is read by the names of its columns and judged, and report and chart are written."""
    monkeypatch.chdir(tmp_path)
    lines = ["at_s,model,bytes,load_s", *(f"{1000 + 60 * place},{one},6e9,4" for place, one in enumerate("abcabcabc"))]
    Path("own.csv").write_text("\n".join(lines) + "\n")
    trace = read_trace(Path("own.csv"))
    assert trace.asks[1] == Ask(60.0, "b", 1.0)
    assert trace.load_s["b"] == 4.0
    assert command.main(["--trace", "own.csv", "--capacity", "12"]) == 0
    rows = json.loads(Path("build/policies.json").read_text())
    assert {row["policy"] for row in rows} == {*POLICIES, "foreknowing"}
    assert all(row["reload_s"] >= row["bound_s"] > 0 for row in rows)
    assert Path("build/policies.svg").stat().st_size > 1000


@pytest.mark.parametrize("line", ["x,a,6e9", "1,a,", "1,a,-5", "inf,a,5"])
def test_a_line_that_is_wrong_is_named(tmp_path: Path, line: str) -> None:
    """A wrong line is named with its number and the reason."""
    path = tmp_path / "own.csv"
    path.write_text(f"at_s,model,bytes\n0,a,5\n{line}\n")
    with pytest.raises(ValueError, match="line 3"):
        read_trace(path)
