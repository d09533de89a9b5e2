"""Dry runs: llama.cpp itself is asked which memory loads would take, where the formulas are not known to hold."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fsm.domain.options import Options
from scheduler.concurrency.latch import Latch
from scheduler.engines.child_process import Child, Exit, Program
from scheduler.engines.llama_protocol import sizes_of
from scheduler.engines.llama_sizing import EngineSizes

if TYPE_CHECKING:
    from scheduler.engines.llama_child import Request
    from scheduler.engines.process_supervisor import ChildLauncher

log = logging.getLogger("loadmaster")

TIMEOUT_S = 5.0  # a dry run takes a quarter of a second; no request waits long for a better estimate
MOST_LOADS = 24  # of one dry run: they have to find room in a pipe
MOST_TOLD = 1024  # loads that are remembered
MOST_PROBLEMS = 16


class DryRuns:
    """Asks llama.cpp, and remembers what it tells; any thread may use it."""

    def __init__(self, processes: ChildLauncher, program: Callable[[Sequence[Request]], Program]) -> None:
        self._processes = processes
        self._program = program  # of a dry run of these loads
        self._lock = threading.Lock()  # guards all below
        self._told: dict[tuple[str, Options], EngineSizes] = {}
        self._problems: dict[str, str] = {}  # by model

    @property
    def problems(self) -> tuple[str, ...]:
        """The models whose memory llama.cpp did not tell when it was last asked, and why, in sentences."""
        with self._lock:
            return tuple(self._problems.values())

    def sizes(self, model: str, fingerprint: str, loads: Mapping[Options, Request]) -> dict[Options, EngineSizes]:
        """Return what the loads of a model take, without those that llama.cpp does not tell.

        `model` is the name to show, and `fingerprint` tells files apart. Blocks for a quarter of a second where
        something is not remembered, and for at most `TIMEOUT_S` seconds for each `MOST_LOADS` loads.
        """
        with self._lock:
            found = {each: told for each in loads if (told := self._told.get((fingerprint, each))) is not None}
        unknown = [each for each in loads if each not in found]
        reason = ""
        for first in range(0, len(unknown), MOST_LOADS):
            some = unknown[first : first + MOST_LOADS]
            answers, failure = self._ask([loads[each] for each in some])
            found |= {each: sizes for each, sizes in zip(some, answers, strict=True) if sizes is not None}
            reason = failure if None in answers else reason
        if unknown:
            self._remember(model, fingerprint, found, reason)
        return found

    def _ask(self, loads: Sequence[Request]) -> tuple[Sequence[EngineSizes | None], str]:
        """Return what each load takes, None where llama.cpp does not tell, and why it does not."""
        answers = _Answers(len(loads))
        try:
            self._processes.start(child := Child(self._program(loads), answers))
        except (RuntimeError, OSError) as error:  # closed, in a fork, or no thread or descriptor is left
            return answers.told, str(error)
        if not answers.over.wait(TIMEOUT_S):
            child.stop(0.0)
            return tuple(answers.told), f"no answer within {TIMEOUT_S:g} s"
        return answers.told, answers.reason

    def _remember(self, model: str, fingerprint: str, found: Mapping[Options, EngineSizes], reason: str) -> None:
        with self._lock:
            self._told |= {(fingerprint, each): sizes for each, sizes in found.items()}
            self._problems.pop(model, None)
            if reason:
                why = f"llama.cpp did not tell which memory {model} takes ({reason}): it is estimated"
                self._problems[model] = why
                log.info("%s", why)
            _keep_newest(self._told, MOST_TOLD)
            _keep_newest(self._problems, MOST_PROBLEMS)


def _keep_newest(kept: dict[Any, Any], most: int) -> None:
    while len(kept) > most:
        del kept[next(iter(kept))]


class _Answers:
    """What one dry run tells; its child calls the methods, on the supervisor's thread."""

    def __init__(self, loads: int) -> None:
        self.told: list[EngineSizes | None] = [None] * loads
        self.over = Latch()
        self.reason = ""  # why a load has no answer

    def printed(self, line: str) -> None:
        """Take in a line of the child's protocol; a line that is not of the protocol is ignored."""
        try:
            message: Any = json.loads(line)
            if message["event"] == "sized":
                self.told[message["load"]] = sizes_of(message)
            else:
                self.reason = str(message["reason"])
        except (ValueError, TypeError, LookupError):
            return

    def logged(self) -> None:
        """Nothing follows from what the child writes to its log."""

    def on_tick(self) -> bool:
        """Nothing is due while it runs."""
        return False

    def ended(self, exit: Exit) -> None:
        """Let the thread go on that waits for the answers."""
        last = exit.tail.strip().splitlines()[-1:]
        self.reason = self.reason or exit.reason or " ".join([f"status {exit.code}", *last])
        self.over.set()
