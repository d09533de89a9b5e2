"""A recording: every event that the core was told, with its time and commands, as lines of JSON in a bounded file.

Each file begins with a header that holds the core's whole state, so that the file can be replayed by itself. After the
header comes a line for each step. The choices of an eviction policy of the user's own are among the lines, since they
are inputs. Leases, prompts, answers, endpoints and keys are not recorded: no event holds any. Paths of models are
recorded, and the last words of processes that failed.

The core never waits for the disk. A step only appends to a queue, and a thread writes. Where the thread falls too far
behind, or cannot write, steps are left out, and a new header follows as soon as it can. So every part of a file can be
replayed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from fsm.core import Core, CoreCheckpoint
from fsm.eviction.policies import POLICIES, Candidate, EvictionPolicy
from fsm.eviction.victim_selection import NO_COST, in_words
from fsm.machine.request import ModelId
from fsm.messages.commands import Command
from fsm.messages.events import Acquire, Event
from scheduler.errors.formatting import without_addresses
from scheduler.recording.codec import encode, schema

log = logging.getLogger("loadmaster")

KIND, FORMAT = "loadmaster recording", 1
LONGEST_LINE = 16 * 1024 * 1024  # bytes; a longer line is neither written nor read

_encode_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode

_MOST_WAITING = 20_000  # steps that are not written yet
_GATHER_S = 0.05  # how long steps are gathered before they are written
_RETRY_S = 5.0  # after a file could not be written
_DUE_PART = 0.75  # of the bytes that a file may have: beyond it the next file is due
_BATCH = 500  # steps that are written at once

# Runners in a policy's order, [runner, seconds] where the policy named a cost; or the exception that it raised, in
# words.
Choice = list[int | list[int | float]] | str
# The step's number and time, and last what the step raised, in words.
_Step = tuple[int, float, Event, Sequence[Command], Sequence[Choice], str]


@dataclass(frozen=True, slots=True)
class _Beginning:
    """A header that is due before the steps that follow."""

    state: CoreCheckpoint
    step: int  # number of the next step
    missing: int  # steps left out right before


class PolicyRaised(Exception):
    """Raised in place of the exception of a user's own eviction policy, in words that do not change."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __repr__(self) -> str:
        return self.text


class _Choosing:
    """A user's own policy during one step, with its choices."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self.name = "own"
        self.choices: list[Choice] = []

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the candidates among what the policy returns; costs of any kind become floats.

        Raises `PolicyRaised` where the policy raises.
        """
        known = {one.runner: one for one in candidates}
        try:
            chosen = [
                replace(known[one.runner], cost_s=None if one.cost_s is None else float(one.cost_s))
                for one in self._policy.order(now, candidates)
                if one.runner in known
            ]
            if not all(one.cost_s is None or math.isfinite(one.cost_s) for one in chosen):
                raise ValueError(NO_COST)
        except BaseException as error:  # also what would end a program
            text = without_addresses(in_words(error))
            self.choices.append(text)
            raise PolicyRaised(text) from error
        self.choices.append([one.runner if one.cost_s is None else [one.runner, one.cost_s] for one in chosen])
        return chosen


class Recorder:
    """Steps a core and has every step recorded; one thread at a time calls `step` and `begin`."""

    def __init__(self, path: Path, limit_bytes: int, core: Core, name: Callable[[ModelId], str]) -> None:
        self._path = path
        self._part_bytes = limit_bytes // 2  # of the limit; the file before has the other half
        self._core = core
        self._name = name
        self._own = not any(core.policy is policy for policy in POLICIES.values())
        self._policy = _name_of(core.policy)
        self._queue: deque[_Step | _Beginning] = deque()
        self._room = _MOST_WAITING  # steps that may wait when the next header is due
        self._header_due = True  # set by either thread; steps are left out until a header can be queued
        self._retry_at = 0.0  # no header before, in the clock of `time.monotonic`
        self._missing = 0  # steps left out since the last header
        self._lost = 0  # steps that came too fast
        self._failure = ""  # why nothing can be written at the moment, in words
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._asleep = False  # the thread waits to be woken
        self._closing = False
        self._file = -1  # its descriptor; only the writing thread uses this and the attributes below
        self._size = 0  # bytes of the file that are whole lines
        self._header_size = 0
        self._skipping = True  # until the next header
        self._skipped = 0  # steps left out by the thread since the last header
        self._late = 0  # steps that the thread left out because the file was full
        self._asked = False  # a header was requested since the last one
        self._named: set[ModelId] = set()  # models whose names are in the file
        self._thread = threading.Thread(target=self._run, name="loadmaster-recorder", daemon=True)
        self._thread.start()

    def step(self, now: float, event: Event) -> Sequence[Command]:
        """Step the core, and have the step recorded; returns the core's commands and raises what the core raises."""
        number = self._core.steps + 1
        ready = not self._closing and self._ready(number)
        if not self._own:
            choices: Sequence[Choice] = ()
        else:
            policy, choosing = self._core.policy, _Choosing(self._core.policy)
            self._core.policy, choices = choosing, choosing.choices
        try:
            commands = self._core.step(now, event)
        except BaseException as error:
            if ready:
                self._put((number, now, event, (), choices, in_words(error)))
            raise
        finally:
            if self._own:
                self._core.policy = policy  # a copy of the core made between two steps is not recorded
        if ready:
            self._put((number, now, event, commands, choices, ""))
        return commands

    @property
    def waiting(self) -> int:
        """The number of steps that are not written yet."""
        return len(self._queue)

    @property
    def problems(self) -> tuple[str, ...]:
        """The problems of the recording, in sentences."""
        count = self._lost + self._late
        lost = f"{count} steps came faster than they could be written to {self._path}: they are missing there"
        return tuple(text for text in (self._failure, count and lost) if text)

    def close(self, timeout_s: float) -> bool:
        """Write what is left and end the thread; return whether it ended in time. Later steps are not recorded."""
        self._closing = True
        self._wake.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- in the thread that steps -------------------------------------------------------------------------------------

    def _ready(self, number: int) -> bool:
        """Return whether a step is recorded; queues a new header where that is due and possible."""
        waiting = len(self._queue)
        if not self._header_due and waiting < _MOST_WAITING:
            return True
        if not self._header_due:
            self._header_due, self._room = True, _MOST_WAITING // 2
        if waiting >= self._room or time.monotonic() < self._retry_at:
            self._missing += 1
            if not self._failure:
                self._lost += 1
            return False
        self._header_due, self._room = False, _MOST_WAITING
        self._put(_Beginning(self._core.checkpoint(), number, self._missing))
        self._missing = 0
        return True

    def _put(self, item: _Step | _Beginning) -> None:
        self._queue.append(item)
        if self._asleep:
            self._asleep = False
            self._wake.put(None)

    # -- in the thread that writes ------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._queue or not self._closing:
            self._asleep = True
            if not self._queue and not self._closing:
                self._wake.get()
            self._asleep = False
            if not self._closing:
                with suppress(queue.Empty):
                    self._wake.get(timeout=_GATHER_S)
            self._write_all()
        if self._file >= 0:
            os.close(self._file)

    def _write_all(self) -> None:
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
            lines = bytearray()
            held = done = 0  # steps that are in `lines`; items of the batch that are done
            try:
                if not self._skipping and not self._is_there():
                    raise OSError(None, "it was moved, deleted or changed; does another scheduler write to it?")
                for item in batch:
                    if isinstance(item, _Beginning):
                        self._flush(lines)
                        held = 0
                        self._begin(item)
                    elif self._skipping:
                        self._leave_out()
                    elif self._size + len(lines) + len(line := self._line(item)) > self._most():
                        self._skipping = True
                        self._leave_out()
                    else:
                        lines += line
                        held += 1
                    done += 1
                self._flush(lines)
            except (OSError, ValueError, TypeError, RecursionError, MemoryError) as error:
                with suppress(OSError, MemoryError):  # what was before it is kept
                    self._flush(lines)
                    held = 0
                self._skipped += held + sum(one.missing if isinstance(one, _Beginning) else 1 for one in batch[done:])
                self._fail(error)

    def _begin(self, beginning: _Beginning) -> None:
        """Write a header, at the beginning of a new file where the present file has grown enough."""
        models = beginning.state.models()
        self._named = set(models)
        header = {
            "kind": KIND,
            "format": FORMAT,
            "schema": schema(),
            "version": _version(),
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "policy": self._policy,
            "own_policy": self._own,
            "step": beginning.step,
            "missing": beginning.missing + self._skipped,
            "names": [[model, self._name(model)] for model in models],
            "state": encode(beginning.state),
        }
        line = _as_line(header)
        self._header_size = len(line)
        if not self._is_there() or self._is_due() or self._size + len(line) > self._most():
            self._open()
        self._write(line)
        self._skipping, self._skipped, self._asked = False, 0, False
        self._failure = ""

    def _line(self, step: _Step) -> bytes:
        number, now, event, commands, choices, raised = step
        line: dict[str, object] = {"step": number, "at": now, "event": encode(event)}
        if commands:
            line["commands"] = [encode(command) for command in commands]
        if choices:
            line["choices"] = choices
        if raised:
            line["raised"] = raised
        if isinstance(event, Acquire) and event.spec.model not in self._named:
            self._named.add(event.spec.model)
            line["names"] = [[event.spec.model, self._name(event.spec.model)]]
        return _as_line(line)

    def _open(self) -> None:
        """Begin a new file, readable by this user alone; the file before stays as FILE.1."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(self._path).st_mode):
                raise OSError(None, "it is not a regular file")
            os.replace(self._path, f"{self._path}.1")
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0)
        self._file = os.open(self._path, flags, 0o600)
        self._size = 0

    def _is_there(self) -> bool:
        """Return whether the file is as it was left, and under its name: else its lines could not be found."""
        with suppress(OSError):  # also where no file is open
            mine = os.fstat(self._file)
            return os.path.samestat(mine, os.stat(self._path)) and mine.st_size == self._size
        return False

    def _flush(self, lines: bytearray) -> None:
        """Write lines and empty them; requests a header where the file has grown enough."""
        if lines:
            self._write(lines)
            lines.clear()
            if self._is_due() and not self._asked:
                self._asked = self._header_due = True

    def _most(self) -> int:
        """Return the bytes that the file may have: after a large header as many again."""
        return max(self._part_bytes, 2 * self._header_size)

    def _is_due(self) -> bool:
        """Return whether the next file is due: before this file is full, for the steps that come until then."""
        return self._size >= _DUE_PART * self._most()

    def _leave_out(self) -> None:
        """Leave a step out: the file is full, or cannot be written, and no header has come since."""
        self._skipped += 1
        if not self._failure:
            self._late += 1
            if not self._asked:
                self._asked = self._header_due = True

    def _write(self, lines: bytes | bytearray) -> None:
        """Write whole lines, or none of them; raises OSError."""
        try:
            at = 0
            while at < len(lines):
                at += os.write(self._file, lines[at:])
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
                os.lseek(self._file, self._size, os.SEEK_SET)
            raise
        self._size += len(lines)

    def _fail(self, error: BaseException) -> None:
        """Leave steps out until a header could be written."""
        self._skipping = True
        reason = error.strerror or str(error) if isinstance(error, OSError) else in_words(error)
        if not self._failure:
            log.warning("nothing is recorded to %s: %s", self._path, reason)
        self._failure = f"nothing is recorded to {self._path}: {reason}"
        self._retry_at = time.monotonic() + _RETRY_S
        self._header_due = True


def _as_line(value: object) -> bytes:
    line = _encode_json(value).encode("ascii") + b"\n"
    if len(line) > LONGEST_LINE:
        raise ValueError(f"a line of {len(line)} bytes is too long")
    return line


def _name_of(policy: EvictionPolicy) -> str:
    try:
        return str(policy.name)[:100]
    except Exception:  # it may be the user's own
        return type(policy).__name__


def _version() -> str:
    try:
        return metadata.version("loadmaster")
    except metadata.PackageNotFoundError:  # the program runs from its source
        return "unknown"
