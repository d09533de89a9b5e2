"""Dry runs: llama.cpp itself is asked which memory loads would take, where the formulas are not known to hold."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fsm.domain.options import Options
from scheduler.concurrency.latch import Latch
from scheduler.engines.child_process import Child, Exit, Program
from scheduler.engines.llama_protocol import sizes_of
from scheduler.engines.llama_sizing import EngineSizes
from scheduler.errors.formatting import printable

if TYPE_CHECKING:
    from scheduler.engines.llama_child import Request
    from scheduler.engines.process_supervisor import ChildLauncher

log = logging.getLogger("loadmaster")

TIMEOUT_S = 4.0  # a dry run takes a quarter of a second; no request waits long for a better estimate
SILENCE_S = 60.0  # before a load that llama.cpp did not tell is asked about again
MOST_LOADS = 24  # of one dry run: they have to find room in a pipe
MOST_TOLD = 1024  # loads that are remembered
MOST_SILENT = 16  # models of which something was not told that are remembered
REASON_CHARACTERS = 300


@dataclass(slots=True)
class _Silence:
    """What llama.cpp did not tell of one model."""

    model: str  # the name to show
    reason: str = ""
    untold: dict[Options, float] = field(default_factory=dict)  # and when it was asked


class DryRuns:
    """Asks llama.cpp, and remembers what it tells; any thread may use it.

    One dry run is made at a time: it takes memory that no request has reserved.
    """

    def __init__(self, processes: ChildLauncher, program: Callable[[Sequence[Request]], Program]) -> None:
        self._processes = processes
        self._program = program  # of a dry run of these loads
        self._asking = threading.Lock()
        self._lock = threading.Lock()  # guards all below
        self._told: dict[tuple[str, Options], EngineSizes] = {}
        self._silent: dict[str, _Silence] = {}  # by fingerprint
        self._unusable: dict[str, str] = {}  # by fingerprint, of models that llama.cpp refuses, and why

    @property
    def problems(self) -> tuple[str, ...]:
        """The models of whose memory llama.cpp did not tell all when it was last asked, and why, in sentences."""
        with self._lock:
            return tuple(
                f"llama.cpp did not tell which memory {each.model} takes ({each.reason}): it is estimated"
                for each in self._silent.values()
            )

    def sizes(self, model: str, fingerprint: str, loads: Mapping[Options, Request]) -> dict[Options, EngineSizes]:
        """Return what the loads of a model take, without those that llama.cpp does not tell.

        `model` is the name to show, and `fingerprint` tells files apart. Blocks for a quarter of a second where
        something is not remembered, and for at most twice `TIMEOUT_S` seconds.
        """
        if self._unknown(fingerprint, loads):
            if self._asking.acquire(timeout=TIMEOUT_S):
                try:
                    self._ask_for(model, fingerprint, loads)
                finally:
                    self._asking.release()
            else:
                self._note(model, fingerprint, {}, self._unknown(fingerprint, loads), "it tells of other models")
        with self._lock:
            return {each: told for each in loads if (told := self._told.get((fingerprint, each))) is not None}

    def why_unusable(self, fingerprint: str) -> str:
        """Return why llama.cpp refuses a model, in its words; empty where it does not, or was not asked about it."""
        with self._lock:
            return self._unusable.get(fingerprint, "")

    def _unknown(self, fingerprint: str, loads: Iterable[Options]) -> list[Options]:
        """Return the loads that are neither remembered nor were asked about a moment ago."""
        since = time.monotonic() - SILENCE_S
        with self._lock:
            silence = self._silent.get(fingerprint)
            silent = {each for each, at in silence.untold.items() if at > since} if silence is not None else ()
            if fingerprint in self._unusable:
                return []
            return [each for each in loads if (fingerprint, each) not in self._told and each not in silent]

    def _ask_for(self, model: str, fingerprint: str, loads: Mapping[Options, Request]) -> None:
        """Ask about the loads that are unknown, until the time is over."""
        end = time.monotonic() + TIMEOUT_S
        unknown = self._unknown(fingerprint, loads)  # another thread may have asked meanwhile
        found: dict[Options, EngineSizes] = {}
        reason = ""
        for first in range(0, len(unknown), MOST_LOADS):
            some = unknown[first : first + MOST_LOADS]
            answers, failure, unusable = self._ask([loads[each] for each in some], end - time.monotonic())
            if unusable:
                self._note_unusable(fingerprint, failure)
                return
            found |= {each: sizes for each, sizes in zip(some, answers, strict=True) if sizes is not None}
            reason = reason or (failure if None in answers else "")
            if time.monotonic() >= end:
                break
        self._note(model, fingerprint, found, unknown, reason or f"no answer within {TIMEOUT_S:g} s")

    def _ask(self, loads: Sequence[Request], timeout_s: float) -> tuple[Sequence[EngineSizes | None], str, bool]:
        """Return what each load takes, None where llama.cpp does not tell; why it does not; whether for any load."""
        answers = _Answers(len(loads))
        try:
            child = Child(self._program(loads), answers)
            self._processes.start(child)
        except (RuntimeError, OSError) as error:  # closed, in a fork, or no thread or descriptor is left
            return answers.told, str(error), False
        answered = False
        try:
            answered = answers.over.wait(timeout_s)
        finally:
            if not answered:  # it hangs, or this thread is interrupted
                child.stop(0.0)
        if not answered:
            return tuple(answers.told), f"no answer within {TIMEOUT_S:g} s", False
        return tuple(answers.told), answers.reason, answers.unusable

    def _note_unusable(self, fingerprint: str, reason: str) -> None:
        with self._lock:
            self._silent.pop(fingerprint, None)
            self._unusable[fingerprint] = printable(" ".join(reason.split()))[-REASON_CHARACTERS:]
            _keep_newest(self._unusable, MOST_SILENT)

    def _note(
        self,
        model: str,
        fingerprint: str,
        found: Mapping[Options, EngineSizes],
        asked: Iterable[Options],
        reason: str,
    ) -> None:
        """Remember what was told, and what was not."""
        now, untold = time.monotonic(), [each for each in asked if each not in found]
        with self._lock:
            self._told |= {(fingerprint, each): sizes for each, sizes in found.items()}
            silence = self._silent.pop(fingerprint, _Silence(model))
            silence.untold = {each: at for each, at in silence.untold.items() if each not in found}
            silence.untold |= dict.fromkeys(untold, now)
            if untold:
                silence.reason = printable(" ".join(reason.split()))[-REASON_CHARACTERS:]
                log.info("llama.cpp did not tell which memory %s takes: %s", printable(model), silence.reason)
            if silence.untold:
                self._silent[fingerprint] = silence
                _keep_newest(silence.untold, MOST_TOLD)
            _keep_newest(self._told, MOST_TOLD)
            _keep_newest(self._silent, MOST_SILENT)


def _keep_newest(kept: dict[Any, Any], most: int) -> None:
    while len(kept) > most:
        del kept[next(iter(kept))]


class _Answers:
    """What one dry run tells; its child calls the methods, on the supervisor's thread."""

    def __init__(self, loads: int) -> None:
        self.told: list[EngineSizes | None] = [None] * loads
        self.over = Latch()
        self.reason = ""  # why a load has no answer
        self.unusable = False  # whether llama.cpp refuses the model, whatever the load

    def printed(self, line: str) -> None:
        """Take in a line of the child's protocol; a line that is not of the protocol is ignored."""
        try:
            message: Any = json.loads(line)
            if message["event"] == "sized":
                self.told[message["load"]] = sizes_of(message)
            else:
                self.reason = str(message["reason"])
                self.unusable = message["event"] == "unusable"
        except (ValueError, TypeError, LookupError):
            return

    def logged(self, chunk: bytes) -> None:
        """Nothing follows from what the child writes to its log."""

    def on_tick(self) -> bool:
        """Nothing is due while it runs."""
        return False

    def ended(self, exit: Exit) -> None:
        """Let the thread go on that waits for the answers."""
        last = exit.tail.strip().splitlines()[-1:]
        self.reason = self.reason or exit.reason or " ".join([f"status {exit.code}", *last])
        self.over.set()
