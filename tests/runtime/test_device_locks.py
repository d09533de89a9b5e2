"""Device locks: real files, taken by several holders in one process, and what goes wrong with files."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fsm.domain.devices import DeviceId
from scheduler import PythonModel, Scheduler, Settings
from scheduler.config.paths import shared_lock_folder
from scheduler.runtime.device_locks import DeviceLocks
from tests.support.leaks import no_leaks
from tests.support.waiting import assert_soon

CPU, GPU = DeviceId("cpu"), DeviceId("GPU-0")


class Holder:
    """The locks of one scheduler, and the answers to its claims."""

    def __init__(self, folder: Path) -> None:
        self.had: list[int] = []
        self.contended: list[int] = []
        self.locks = DeviceLocks(folder, self.had.append, self.contended.append)

    def takes(self, number: int, *devices: DeviceId) -> None:
        """Claim devices that are granted."""
        self.locks.claim(number, devices)
        assert_soon(lambda: number in self.had)

    def waits(self, number: int, *devices: DeviceId) -> None:
        """Claim devices of which another holder has one."""
        self.locks.claim(number, devices)
        assert_soon(lambda: number in self.contended)
        assert number not in self.had


Hold = Callable[[], Holder]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Yield a function that makes holders with one folder, of which nothing is left at the end."""
    with no_leaks(), ExitStack() as ends:

        def make() -> Holder:
            holder = Holder(tmp_path / "locks")
            ends.callback(lambda: holder.locks.close(10.0))
            return holder

        yield make


def test_two_holders_have_a_device_in_turns(hold: Hold) -> None:
    """The second holder has a device once the first has released it, and is told once that it waits."""
    one, other = hold(), hold()
    one.takes(1, CPU)
    other.waits(1, CPU)
    one.locks.give_back(1)
    assert_soon(lambda: other.had == [1])
    assert other.contended == [1]


def test_different_devices_are_had_at_the_same_time(hold: Hold) -> None:
    """Different devices are held at the same time, because each has a lock of its own."""
    one, other = hold(), hold()
    one.takes(1, CPU)
    other.takes(1, GPU)
    assert not one.contended + other.contended


def test_whoever_waits_for_one_device_keeps_nobody_from_another(hold: Hold) -> None:
    """A claim that waits for one device holds none, so that two programs never hold one each of the same two."""
    one, waiting, third = hold(), hold(), hold()
    one.takes(1, CPU)
    waiting.waits(1, CPU, GPU)
    third.takes(1, GPU)
    one.locks.give_back(1)
    third.locks.give_back(1)
    assert_soon(lambda: waiting.had == [1])


def test_claims_of_one_holder_share_a_device_until_both_are_given_back(hold: Hold) -> None:
    """A device that two claims of one holder share is released with the last one."""
    one, other = hold(), hold()
    one.takes(1, CPU, GPU)
    one.takes(2, CPU)
    one.locks.give_back(1)
    other.takes(1, GPU)
    other.waits(2, CPU)
    one.locks.give_back(2)
    assert_soon(lambda: 2 in other.had)


def test_a_claim_that_is_given_up_while_it_waits_is_never_had(hold: Hold) -> None:
    """A claim that is released while it waits is never granted, and leaves the files free."""
    one, other = hold(), hold()
    one.takes(1, CPU)
    other.waits(1, CPU)
    other.locks.give_back(1)
    other.takes(2, GPU)  # jobs are done in order, so the first claim has been released
    one.locks.give_back(1)
    one.takes(2, CPU)
    assert other.had == [2]


def test_closing_gives_everything_back(hold: Hold) -> None:
    """A close releases everything, and later claims are not granted and hold nothing."""
    one, other = hold(), hold()
    one.takes(1, CPU)
    other.waits(1, CPU)
    assert one.locks.close(10.0) == []
    assert_soon(lambda: other.had == [1])
    one.locks.claim(2, (GPU,))
    other.takes(2, GPU)
    assert one.had == [1]


def test_a_fork_neither_keeps_a_device_nor_gives_it_back(hold: Hold) -> None:
    """A fork closes its copy of the open file, which neither keeps nor releases the lock."""
    one, other = hold(), hold()
    one.takes(1, CPU)
    hear, say = os.pipe()
    if (child := os.fork()) == 0:
        os.read(hear, 1)
        os._exit(0)
    try:
        other.waits(1, CPU)
        one.locks.give_back(1)
        assert_soon(lambda: other.had == [1])
    finally:
        os.write(say, b"!")
        os.waitpid(child, 0)
        os.close(hear)
        os.close(say)


def test_a_devices_name_is_never_a_path(hold: Hold, tmp_path: Path) -> None:
    """A device's id never leads out of the folder, whatever characters it has."""
    hold().takes(1, DeviceId("MIG-GPU-1/2/../3"))
    assert [path.name for path in (tmp_path / "locks").iterdir()] == ["MIG-GPU-1%2F2%2F..%2F3.lock"]


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of this user's locks, which does not exist yet."""
    folder = tmp_path / "own"
    monkeypatch.setattr("scheduler.runtime.device_locks.shared_lock_folder", lambda: folder)
    return folder


def problem_with(folder: Path) -> str:
    """Return the problem with a folder; the claim is granted all the same."""
    holder = Holder(folder)
    holder.takes(1, CPU)
    holder.locks.close(10.0)
    return holder.locks.problem


def test_the_own_folder_does_not_depend_on_where_temporary_files_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder does not depend on where temporary files go, because a service and a login differ in that."""
    before = shared_lock_folder()
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    assert shared_lock_folder() == before
    assert str(os.getuid()) in before.name


def test_the_own_folder_is_for_its_user_alone(own: Path) -> None:
    """The user's own folder may be entered by that user only."""
    assert problem_with(own) == ""
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert stat.S_IMODE((own / "cpu.lock").stat().st_mode) == 0o600


def test_a_folder_that_was_named_may_be_shared_by_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lock files in a folder that was named may be opened by every user who can enter the folder."""
    monkeypatch.setattr("scheduler.runtime.device_locks.shared_lock_folder", lambda: tmp_path / "own")
    before = os.umask(0o077)
    try:
        assert problem_with(tmp_path / "shared") == ""
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "shared" / "cpu.lock").stat().st_mode) == 0o666


def test_a_link_in_place_of_the_own_folder_is_not_followed(own: Path, tmp_path: Path) -> None:
    """A link in place of the user's own folder is not followed, because another user may have made it."""
    (tmp_path / "elsewhere").mkdir()
    own.symlink_to(tmp_path / "elsewhere")
    assert "not a folder that this user alone may write to" in problem_with(own)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_an_own_folder_that_others_may_write_to_is_not_used(own: Path) -> None:
    """A folder that other users may write to is not used, because they could replace lock files."""
    own.mkdir()
    own.chmod(0o777)
    assert "not a folder that this user alone may write to" in problem_with(own)


def test_a_link_in_place_of_a_lock_is_not_followed(own: Path, tmp_path: Path) -> None:
    """A link in place of a lock file is not followed."""
    own.mkdir(mode=0o700)
    (own / "cpu.lock").symlink_to(tmp_path / "target")
    assert "are not locked" in problem_with(own)
    assert not (tmp_path / "target").exists()


def test_what_is_wrong_with_a_folder_is_over_when_it_is_put_right(own: Path) -> None:
    """A folder is tried anew with each claim, so that a problem is over when it is put right."""
    own.write_text("a file")
    holder = Holder(own)
    holder.takes(1, CPU)
    assert "are not locked" in holder.locks.problem
    own.unlink()
    holder.takes(2, CPU)
    assert holder.locks.problem == ""
    holder.locks.close(10.0)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder in which not even root makes files")
def test_a_folder_in_which_no_file_can_be_made_is_no_other_program(caplog: pytest.LogCaptureFixture) -> None:
    """Where no file can be made, no other program is waited for, and one line of the log says so."""
    with no_leaks():
        holder = Holder(Path("/proc"))
        holder.takes(1, CPU)
        holder.locks.close(10.0)
    assert holder.contended == [] and holder.locks.problem.endswith("no file can be made in /proc")
    assert [(each.getMessage(), each.exc_info) for each in caplog.records] == [(holder.locks.problem, None)]


# -- schedulers --------------------------------------------------------------------------------------------------------

MODEL = PythonModel("model", object, memory={"cpu": "1MiB"})


def waited_for(scheduler: Scheduler) -> list[str]:
    """Return what the waiting requests wait for."""
    return [wait.waits_for for wait in scheduler.status().queue]


def test_two_schedulers_in_one_program_load_in_turns(tmp_path: Path) -> None:
    """Two schedulers in one program load one after the other, and each plans with what is free."""
    go_on = threading.Event()
    settings = Settings(gpus=False, lock_folder=tmp_path)
    with no_leaks(), Scheduler(settings) as one, Scheduler(settings) as other:
        slow = one.submit(PythonModel("slow", go_on.wait, memory={"cpu": "1MiB"}))
        assert_soon(lambda: one.status().runners)
        quick = other.submit(PythonModel("quick", object, memory={"cpu": "1MiB"}))
        assert_soon(lambda: waited_for(other) == ["another program that loads a model"])
        assert other.status().runners == ()
        go_on.set()
        for future in (slow, quick):
            future.result(timeout=20.0).release()


def test_a_broken_folder_prevents_no_work(tmp_path: Path) -> None:
    """A broken folder prevents no load, and the status says that the device was not locked."""
    (tmp_path / "file").write_text("not a folder")
    settings = Settings(gpus=False, lock_folder=tmp_path / "file")
    with no_leaks(), Scheduler(settings) as scheduler, scheduler.acquire(MODEL):
        (problem,) = scheduler.status().problems
    assert problem.startswith("devices are not locked against other programs: ")


def test_without_a_folder_nothing_is_locked() -> None:
    """Without a folder nothing is locked, there is no thread, and the status has no problem."""
    with Scheduler(Settings(gpus=False, lock_folder="none")) as scheduler, scheduler.acquire(MODEL):
        assert "loadmaster-locks" not in [thread.name for thread in threading.enumerate()]
        assert scheduler.status().problems == ()


def test_close_does_not_wait_for_another_program(tmp_path: Path) -> None:
    """A close refuses a request that waits for another program, and leaves nothing of it."""
    holder = Holder(tmp_path)
    holder.takes(1, CPU)
    with no_leaks():
        with Scheduler(Settings(gpus=False, lock_folder=tmp_path)) as scheduler:
            future = scheduler.submit(MODEL)
            assert_soon(lambda: waited_for(scheduler) == ["another program that loads a model"])
        assert future.exception(timeout=20.0) is not None
    assert holder.locks.close(10.0) == []
