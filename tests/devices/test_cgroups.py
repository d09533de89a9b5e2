"""Memory limits of control groups: from a folder that stands in for theirs, and from real groups where allowed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.devices.cgroups import CgroupMemory, cgroup_memory
from tests.support.waiting import assert_soon

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
Tree = Callable[[str, dict[str, dict[str, object]]], CgroupMemory | None]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Write a folder that stands in for /sys/fs/cgroup; read the limits of a process in the groups of `groups`."""

    def read(groups: str, folders: dict[str, dict[str, object]]) -> CgroupMemory | None:
        for folder, files in folders.items():
            (tmp_path / "cgroup" / folder).mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (tmp_path / "cgroup" / folder / name).write_text(f"{content}\n")
        membership = tmp_path / "self"
        membership.write_text(groups + "\n")
        return cgroup_memory(tmp_path / "cgroup", membership)

    return read


def test_n15_version_2_leaves_limit_minus_current(tree: Tree) -> None:
    """N15: version 2 leaves the group's limit less its current use."""
    assert tree("0::/job", {"job": {"memory.max": 1000, "memory.current": 300}}) == CgroupMemory(1000, 700)


def test_n15_version_1_leaves_limit_minus_usage(tree: Tree) -> None:
    """N15: version 1 leaves the limit less the usage, in the controller's own folder."""
    files: dict[str, object] = {"memory.limit_in_bytes": 1000, "memory.usage_in_bytes": 300}
    assert tree("5:cpu:/\n4:memory:/job", {"memory/job": files}) == CgroupMemory(1000, 700)


def test_n15_every_group_above_counts(tree: Tree) -> None:
    """N15: the smallest limit and the least free memory may be of different groups above."""
    folders: dict[str, dict[str, object]] = {
        "a": {"memory.max": 2000, "memory.current": 1900},
        "a/b": {"memory.max": "max", "memory.current": 500},
        "a/b/c": {"memory.max": 1000, "memory.current": 300},
    }
    assert tree("0::/a/b/c", folders) == CgroupMemory(1000, 100)


def test_a_container_sees_only_the_top_of_the_tree(tree: Tree) -> None:
    """A container's limits are at the top of the tree, where its own path does not exist."""
    assert tree("0::/docker/1234", {"": {"memory.max": 1000, "memory.current": 300}}) == CgroupMemory(1000, 700)


def test_pages_of_files_count_as_free(tree: Tree) -> None:
    """Pages of files count as free, because the kernel drops them, and pages of memory files do not."""
    files: dict[str, object] = {
        "memory.max": 1000,
        "memory.current": 900,
        "memory.stat": "anon 400\nshmem 50\ninactive_file 400\nactive_file 50\nworkingset_refault_file 7",
    }
    assert tree("0::/job", {"job": files}) == CgroupMemory(1000, 550)


def test_a_group_over_its_limit_has_nothing_free(tree: Tree) -> None:
    """A group over its limit has nothing free, and not less than nothing."""
    assert tree("0::/job", {"job": {"memory.max": 100, "memory.current": 300}}) == CgroupMemory(100, 0)


@pytest.mark.parametrize("groups", ["0::/job", "4:memory:/job", "", "0::/../elsewhere"])
def test_no_limit_is_none(tree: Tree, groups: str) -> None:
    """Missing files, other controllers and "max" set no limit."""
    assert tree(groups, {"job": {"memory.max": "max", "memory.current": 300}, "memory/job": {}}) is None


def test_the_largest_number_of_version_1_is_no_limit(tree: Tree) -> None:
    """The largest number of version 1 means that there is no limit."""
    files: dict[str, object] = {"memory.limit_in_bytes": 9223372036854771712, "memory.usage_in_bytes": 300}
    assert tree("4:memory:/", {"memory": files}) is None


def test_a_system_without_cgroups_has_no_limit(tmp_path: Path) -> None:
    """A system without control groups has no limit."""
    assert cgroup_memory(tmp_path / "cgroup", tmp_path / "self") is None


@pytest.mark.parametrize(("most", "high", "left"), [(1000, 600, 200), (1000, "max", 600), ("max", 600, 200)])
def test_beyond_memory_high_there_is_nothing_to_use(tree: Tree, most: object, high: object, left: int) -> None:
    """Memory beyond memory.high is not free, because the kernel slows the process down there."""
    files = {"memory.max": most, "memory.high": high, "memory.current": 400}
    assert tree("0::/job", {"job": files}) == CgroupMemory(left + 400, left)


def test_swap_is_neither_a_limit_nor_room(tree: Tree) -> None:
    """Swap counts neither as a limit nor as free memory, in both versions."""
    version_2: dict[str, object] = {"memory.max": 1000, "memory.current": 300}
    assert tree("0::/a", {"a": version_2 | {"memory.swap.max": 5000, "memory.swap.current": 700}}) == CgroupMemory(
        1000, 700
    )
    version_1: dict[str, object] = {"memory.limit_in_bytes": 1000, "memory.usage_in_bytes": 300}
    more = {"memory.memsw.limit_in_bytes": 6000, "memory.memsw.usage_in_bytes": 900}
    assert tree("4:memory:/b", {"memory/b": version_1 | more}) == CgroupMemory(1000, 700)


# -- real groups ------------------------------------------------------------------------------------------------------


class Group:
    """A control group of the machine, version 1 or 2."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.version = 2 if (folder / "memory.max").exists() else 1

    def limit(self, bytes: int | str) -> None:
        """Set the limit; "max" is no limit."""
        if self.version == 2:
            (self.folder / "memory.max").write_text(str(bytes))
        else:
            (self.folder / "memory.limit_in_bytes").write_text("-1" if bytes == "max" else str(bytes))

    def read(self, before: str = "") -> Any:
        """Return None, or the limit and the free bytes of a process in the group, which runs `before` first."""
        program = (
            f"open({str(self.folder / 'cgroup.procs')!r}, 'w').write('0')\n{before}\n"
            "import json; from scheduler.devices.cgroups import cgroup_memory; found = cgroup_memory()\n"
            "print(json.dumps(found and [found.limit_bytes, found.free_bytes]))"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def remove(self) -> None:
        """Remove the group, once the kernel is done with its process."""

        def gone() -> bool:
            try:
                self.folder.rmdir()
            except OSError:
                return False
            return True

        assert_soon(gone)


@pytest.fixture
def group() -> Iterator[Group]:
    """Yield a new group below the group of the tests."""
    if not Path("/proc/self/cgroup").exists():
        pytest.skip("there are no control groups on this system")
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    tops = {"": Path("/sys/fs/cgroup"), "memory": Path("/sys/fs/cgroup/memory")}
    own = {controllers: tops[controllers] / path.lstrip("/") for _, controllers, path in lines if controllers in tops}
    folder = own.get("memory", own.get("", Path("/sys/fs/cgroup")))
    try:
        group = Group(folder / f"loadmaster-test-{os.getpid()}")
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if not (group.folder / "memory.stat").exists():
            pytest.skip("a group below the tests' own has no memory limit here: that group has processes of its own")
        yield group
    finally:
        group.remove()


def test_n15_the_limit_of_a_real_group_counts(group: Group) -> None:
    """N15: a process in a real group of 256 MiB has no more, less what it uses itself."""
    group.limit(256 * MIB)
    limit, free = group.read()
    assert limit == 256 * MIB
    assert limit - 128 * MIB < free < limit


def test_what_a_process_in_a_real_group_holds_is_not_free(group: Group) -> None:
    """What a process in a real group holds is not free, by the group's own figures."""
    group.limit(512 * MIB)
    _, before = group.read()
    _, after = group.read("held = b'x' * (128 << 20)")
    assert 96 * MIB < before - after < 160 * MIB


def test_what_a_process_in_a_real_group_has_read_is_free(group: Group, tmp_path: Path) -> None:
    """Pages of a file that a process in a real group has read are free."""
    (tmp_path / "file").write_bytes(b"x" * (128 * MIB))
    read_it = f"import os; file = os.open({str(tmp_path / 'file')!r}, os.O_RDONLY)\n"
    drop = "os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)\n"  # so that this group reads the pages and is charged
    group.limit(512 * MIB)
    _, before = group.read()
    _, after = group.read(f"{read_it}os.fsync(file); {drop}while os.read(file, 1 << 20): pass")
    assert abs(before - after) < 64 * MIB


def test_the_limit_of_a_real_group_above_counts(group: Group) -> None:
    """The limit of a real group above holds where the inner group allows more or sets none."""
    group.limit(256 * MIB)
    inner = Group(group.folder / "inner") if group.version == 1 else None
    if inner is None:
        pytest.skip("a group of version 2 cannot hand its limits down while the tests' own has processes")
    try:
        inner.limit(512 * MIB)
        nested = inner.read()
        inner.limit("max")
        unlimited = inner.read()
    finally:
        inner.remove()
    assert (nested[0], unlimited[0]) == (256 * MIB, 256 * MIB)
    assert max(nested[1], unlimited[1]) < 256 * MIB


def test_a_real_group_without_a_limit_sets_none(group: Group) -> None:
    """A real group without a limit sets none beside those above it."""
    group.limit("max")
    above = cgroup_memory()
    found = group.read()
    assert (found and found[0]) == (above and above.limit_bytes)
