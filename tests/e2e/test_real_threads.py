"""The host's cores: from what the system reports to the threads of a real child."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from scheduler import Scheduler, Settings
from scheduler.devices import cpu_cores, device_reader
from scheduler.devices.cgroups import cgroup_processors
from tests.support.leaks import no_leaks
from tests.support.real import write_models


def threads(scheduler: Scheduler) -> list[int | None]:
    """Return the threads for answers of each runner, in the order of the loads."""
    return [runner.options.num_thread for runner in scheduler.status().runners]


def test_the_cores_are_dealt_to_real_runners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first runner has all cores, the second one half of them, and one that names a number has that."""
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(device_reader, "usable_cores", lambda: 6)
    folder = write_models(tmp_path, "abc")
    with no_leaks(), Scheduler(Settings(gpus=False)) as scheduler:
        with (
            scheduler.acquire(folder / "a.gguf"),
            scheduler.acquire(folder / "b.gguf"),
            scheduler.acquire(folder / "c.gguf", num_thread=1) as lease,
        ):
            assert threads(scheduler) == [6, 3, 1]
            assert lease.complete("ab", max_tokens=2, temperature=0, ignore_eos=True)
        assert [runner.state for runner in scheduler.status().runners] == ["idle"] * 3


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/a", {"a/cpu.max": "max 100000"}, None),
        ("0::/a", {}, None),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("4:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3.0),
        ("4:memory:/a", {"memory/a/cpu.max": "1 2"}, None),
    ],
)
def test_a_quota_of_processors_is_the_tightest_of_all_groups(
    tmp_path: Path, groups: str, files: dict[str, str], limit: float | None
) -> None:
    """A quota of processors is the smallest of all groups, in both versions of control groups."""
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    membership = tmp_path / "membership"
    membership.write_text(f"{groups}\n")
    assert cgroup_processors(tmp_path / "cgroup", membership) == limit


@pytest.mark.parametrize(("affinity", "quota", "usable"), [(64, None, 16), (3, None, 3), (64, 2.9, 2), (64, 0.2, 1)])
def test_the_usable_cores_are_the_least_of_what_limits_them(
    monkeypatch: pytest.MonkeyPatch, affinity: int, quota: float | None, usable: int
) -> None:
    """The usable cores are the least of physical cores, affinity and the quota's whole processors, and at least one."""
    replaced: dict[str, Any] = {"_physical_cores": lambda: 16, "cgroup_processors": lambda: quota}
    for name, value in replaced.items():
        monkeypatch.setattr(cpu_cores, name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(affinity)), raising=False)
    assert cpu_cores.usable_cores() == usable
