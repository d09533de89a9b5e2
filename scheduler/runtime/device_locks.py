"""Locks by which the programs on one machine take turns to load on a device: one lock file for each device.

The operating system holds a lock for an open file and drops the lock when the program ends, however the program ends.
Neither a runner nor a fork inherits a lock (`filelock` sees to both), so a runner that outlives its program for a
moment keeps no other program from loading. Two schedulers in one program exclude each other like two programs.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import stat
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import quote

import filelock

from fsm.domain.devices import DeviceId
from scheduler.config.paths import shared_lock_folder

log = logging.getLogger("loadmaster")

_FIRST_PAUSE_S = 0.002  # between two tries for a lock that another program holds; the pause grows
_LONGEST_PAUSE_S = 0.1  # a lock that another program released is found free at most this late

Job = tuple[int, tuple[DeviceId, ...]]


class DeviceLocks:
    """Takes the locks of device claims, all locks of a claim or none, and releases them, on a thread of its own.

    The claims of one scheduler share a device. `had` is called once for each claim that is not released before it is
    granted, even where files cannot be locked; `problem` gives the reason then. `contended` is called before `had`
    where another program holds a device. Both are called on the thread of the locks, also while the claim is being
    released, and must not block.
    """

    problem: str  # why devices are not locked, in a sentence; empty where they are locked

    def __init__(self, folder: Path, had: Callable[[int], None], contended: Callable[[int], None]) -> None:
        self.problem = ""
        self._folder = folder
        self._private = folder == shared_lock_folder()
        self._had = had
        self._contended = contended
        # a job without devices releases its claim; None ends the thread
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None  # None: the system allowed no more threads
        self._closed = False
        # Only the thread uses the attributes below.
        self._locks: dict[DeviceId, filelock.BaseFileLock] = {}  # the locks that are held
        self._claims: dict[int, tuple[DeviceId, ...]] = {}  # claims that were granted and not released
        self._waiting: dict[int, tuple[DeviceId, ...]] = {}
        self._pause_s = _FIRST_PAUSE_S
        self._try_at = 0.0  # when the waiting claims are tried again
        self.ensure_threads()

    def ensure_threads(self) -> None:
        """Start the thread where it does not run; not in `claim`, which is called under the driver's lock."""
        if self._thread is not None or self._closed:
            return
        thread = threading.Thread(target=self._run, name="loadmaster-locks", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system allows no more threads now
            self.problem = f"devices are not locked against other programs: {error}"
            return
        self._thread, self.problem = thread, ""

    def claim(self, number: int, devices: Iterable[DeviceId]) -> None:
        """Order the locks of a claim and return at once; a number is used for one claim only."""
        if self._thread is None:
            self._had(number)
            return
        self._jobs.put((number, tuple(sorted(devices))))

    def give_back(self, number: int) -> None:
        """Release a claim, granted or waiting, and return at once."""
        self._jobs.put((number, ()))

    @property
    def held(self) -> frozenset[DeviceId]:
        """The devices that are locked at this moment."""
        return frozenset(self._locks)

    def close(self, timeout_s: float) -> list[str]:
        """Release every lock and end the thread; return the thread's name if it hangs."""
        self._closed = True
        if (thread := self._thread) is None:
            return []
        self._jobs.put(None)
        thread.join(timeout_s)
        return [thread.name] if thread.is_alive() else []

    def _run(self) -> None:
        while True:
            try:
                wait_s = max(0.0, self._try_at - time.monotonic()) if self._waiting else None
                job = self._jobs.get(timeout=wait_s)
            except queue.Empty:
                self._try_again()
                continue
            match job:
                case None:
                    self._claims.clear()
                    self._release_unclaimed()
                    return
                case number, ():
                    self._waiting.pop(number, None)
                    if self._claims.pop(number, None):
                        self._release_unclaimed()
                case number, devices:
                    if not self._take(number, devices):
                        self._waiting[number] = devices
                        self._pause_s = _FIRST_PAUSE_S
                        self._try_at = time.monotonic() + self._pause_s
                        self._contended(number)

    def _try_again(self) -> None:
        self._waiting = {
            number: devices for number, devices in self._waiting.items() if not self._take(number, devices)
        }
        self._pause_s = min(_LONGEST_PAUSE_S, self._pause_s * 1.5)
        self._try_at = time.monotonic() + self._pause_s * random.uniform(0.5, 1.0)  # not in step with other programs

    def _take(self, number: int, devices: tuple[DeviceId, ...]) -> bool:
        """Take the locks of a claim that are not held yet, in order; return False, with none, if one is not free."""
        taken: dict[DeviceId, filelock.BaseFileLock] = {}
        try:
            self._prepare()
            for device in devices:
                if device not in self._locks:
                    taken[device] = self._lock(device)
            self.problem = ""
        except filelock.Timeout:
            for lock in taken.values():
                lock.release()
            return False
        except Exception as error:  # the folder is not writable, or its file system is full or cannot lock
            if not self.problem:
                log.warning("devices are not locked against other programs: %s", error)
            self.problem = f"devices are not locked against other programs: {error}"
        self._locks |= taken
        self._claims[number] = devices
        self._had(number)
        return True

    def _prepare(self) -> None:
        """Make the folder where it is missing; raises OSError where the private folder is a link or another user's."""
        self._folder.mkdir(mode=0o700, parents=not self._private, exist_ok=True)
        if self._private and hasattr(os, "getuid"):
            found = self._folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
                raise PermissionError(f"{self._folder} is not a folder that this user alone may write to")

    def _lock(self, device: DeviceId) -> filelock.BaseFileLock:
        """Lock a device's file; raises `filelock.Timeout` where another program holds it, OSError where that fails."""
        path = self._folder / f"{quote(device, safe='')}.lock"
        mode = 0o600 if self._private else 0o666
        lock = filelock.FileLock(path, mode=mode, thread_local=False, blocking=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            # also raised where the file cannot be made; a file that another program holds exists, and stays
            if not os.path.lexists(path):
                raise FileNotFoundError(f"no file can be made in {self._folder}") from None
            raise
        return lock

    def _release_unclaimed(self) -> None:
        claimed = {device for devices in self._claims.values() for device in devices}
        for device in [device for device in self._locks if device not in claimed]:
            try:
                self._locks.pop(device).release()
            except OSError:  # the file system is gone, and the lock with it
                log.warning("the lock of %s could not be released", device, exc_info=True)
