"""A soak of a few seconds: the long one is `make soak`."""

from __future__ import annotations

from pathlib import Path

from tests.tools.soak.measure import Memory, Waits
from tests.tools.soak.run import soak


def test_a_short_soak_leaves_nothing_behind(tmp_path: Path) -> None:
    """A short soak with threads, children and every trouble gives each client a turn and leaves nothing behind."""
    found = soak(3.0, 7, tmp_path, lambda line: None)
    assert found["passed"], (found["violations"], found["unexpected"])
    assert found["leases"] >= 100
    assert not found["idle_clients"]
    assert found["faults"]
    assert all(counts["injected"] == counts["survived"] for counts in found["faults"].values())


def test_waits_are_told_to_a_sixteenth() -> None:
    """A percentile is at least what was measured, and at most a sixteenth above it."""
    waits = Waits()
    for wait_ns in (5, 1_000, 20_000, 3_000_000_000):
        waits.add(wait_ns)
    for percent, wait_ns in ((25, 5), (50, 1_000), (75, 20_000), (100, 3_000_000_000)):
        assert wait_ns <= waits.percentile_us(percent) * 1000 <= wait_ns * 17 / 16 + 1
    assert Waits.of([waits, waits]).percentile_us(75) == waits.percentile_us(75)
    assert Waits().percentile_us(99) == 0


def test_memory_that_grows_is_noticed() -> None:
    """Memory that grows by more than a tenth and a random part fails the soak."""
    first = Memory(1000 * 2**20, 1_000_000)
    assert not first.growth(Memory(1090 * 2**20, 1_090_000))["grown"]
    assert first.growth(Memory(1110 * 2**20, 1_000_000))["grown"]
    assert first.growth(Memory(1000 * 2**20, 1_110_000))["grown"]
