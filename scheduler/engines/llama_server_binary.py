"""A `llama-server` of the user's own: whether it can be used, its version, its devices, and the options that it knows.

It is asked once, by running it: with `--version`, `--list-devices` and `--help`, all at the same time.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from scheduler.concurrency.latch import Latch
from scheduler.engines.child_process import Child, Exit, Program
from scheduler.engines.llama_server_options import known_options, missing
from scheduler.errors.exceptions import EngineMissing, EngineUnusable
from scheduler.errors.formatting import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.engines.llama_server_child import Order
    from scheduler.engines.process_supervisor import ChildLauncher

CHILD: Final = Path(__file__).with_name("llama_server_child.py")
TIMEOUT_S: Final = 20.0  # a GPU's driver may have to wake it
ANSWER_BYTES: Final = 1 << 20
_QUESTIONS: Final = ("--version", "--list-devices", "--help")
_ENOUGH: Final = "get a llama-server from September 2025 or later (b6325), from https://github.com/ggml-org/llama.cpp"
_VERSION = re.compile(r"^version: (.+)$", re.MULTILINE)
_DEVICE = re.compile(r"^ +([A-Za-z]+)\d+: ", re.MULTILINE)  # a backend, and the number of one of its devices
_OTHER_MACHINE: Final = "Exec format error"

FileState = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server tells of itself."""

    version: str  # in its own words
    backends: tuple[str, ...]  # through which it uses GPUs, as in "CUDA"
    options: Mapping[str, tuple[str, ...]]  # as `known_options` returns them


class ServerBinary:
    """One file; any thread may use it. Asking it blocks, for a small part of a second, and `TIMEOUT_S` at most."""

    def __init__(self, path: Path, processes: ChildLauncher, environment: Mapping[str, str]) -> None:
        self.path = str(path)
        self._processes = processes
        self._environment = environment
        self._asking = threading.Lock()
        self._told: tuple[FileState, ServerFacts | EngineMissing] | None = None  # as of the file's last change

    def check(self) -> FileState:
        """Return what tells the file from others under its path, without running it.

        Raises `EngineMissing` where there is none, and `EngineUnusable` where it is known that it cannot be used.
        """
        try:
            found = os.stat(self.path)
        except OSError as error:
            how = f"{error.strerror}; name the file of a llama-server by the setting llama_server"
            raise EngineMissing(self.path, how) from None
        if not os.path.isfile(self.path):
            raise EngineUnusable(self.path, "it is no file; name the program itself, and not its folder")
        if not os.access(self.path, os.X_OK):
            raise EngineUnusable(self.path, "it is not executable; have it so with chmod +x")
        state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if (told := self._told) is not None and told[0] == state and isinstance(told[1], EngineMissing):
            raise replace(told[1])  # one that was raised holds what its frames hold
        return state

    def facts(self) -> ServerFacts:
        """Return what the server tells of itself, asked once; raises what `check` raises."""
        state = self.check()
        with self._asking:
            if self._told is None or self._told[0] != state:
                try:
                    self._told = state, self._ask()
                except EngineUnusable as error:
                    self._told = state, error
            facts = self._told[1]
        if isinstance(facts, EngineMissing):
            raise replace(facts)
        return facts

    def program(self, arguments: Sequence[str], key: str = "", *, gpus: str = "", holds_back: bool = False) -> Program:
        """Return the program that runs the server with these arguments, on these GPUs; without a key it only answers.

        One that only answers sees the GPUs that this program does.
        """
        order: Order = {
            "parent": os.getpid(),
            "arguments": [self.path, *arguments],
            "key": key,
            "holds_back": holds_back,
            "guarded": bool(key),
        }
        environment = {**self._environment}
        if key:
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        return Program((sys.executable, "-I", "-S", str(CHILD)), environment, json.dumps(order).encode() + b"\n")

    def _ask(self) -> ServerFacts:
        answers = [_Answer() for _ in _QUESTIONS]
        children = [Child(self.program([option]), answer) for option, answer in zip(_QUESTIONS, answers, strict=True)]
        try:
            for child in children:
                self._processes.start(child)
            answered = all(answer.over.wait(TIMEOUT_S) for answer in answers)
        finally:
            for child in children:
                child.stop(0.0)
        if not answered:
            raise EngineUnusable(self.path, f"it did not tell its version within {TIMEOUT_S:g} s; run it by hand")
        version, devices, help = (answer.text for answer in answers)
        options = known_options(help)
        found = _VERSION.search(version)
        if found is None or not options:
            raise EngineUnusable(self.path, _why_unusable(answers[0]))
        if lacking := missing(options):
            said = f"{printable(found[1])} does not know {', '.join(lacking)}"
            raise EngineUnusable(self.path, f"its version {said}: {_ENOUGH}")
        backends = tuple(sorted(set(_DEVICE.findall(devices))))
        return ServerFacts(printable(found[1].strip()), backends, options)


def _why_unusable(answer: _Answer) -> str:
    """Return why a program that told no version cannot be used, in its own words where it has some."""
    if _OTHER_MACHINE in answer.failure:
        return f"it is no program for this machine ({answer.failure}): get a build for its processor and system"
    last = next((line.strip() for line in reversed(answer.text.splitlines()) if line.strip()), "")
    said = answer.failure or printable(last[-200:]) or f"status {answer.code}"
    return f"it did not tell its version ({said}): run it with --version by hand; {_ENOUGH}"


class _Answer:
    """What a run of the server prints; its child calls the methods, on the supervisor's thread."""

    def __init__(self) -> None:
        self.over = Latch()
        self.code: int | None = None
        self.failure = ""  # why it was not run
        self._printed = bytearray()

    @property
    def text(self) -> str:
        """All that it printed."""
        return self._printed.decode(errors="replace")

    def printed(self, line: str) -> None:
        """Take in a line of the protocol, which ends where the server begins."""
        try:
            message = json.loads(line)
            self.failure = str(message["reason"]) if message["event"] == "failed" else self.failure
        except (ValueError, TypeError, LookupError):
            return

    def logged(self, chunk: bytes) -> None:
        """Take in what the server prints."""
        if len(self._printed) < ANSWER_BYTES:
            self._printed += chunk

    def on_tick(self) -> bool:
        """Nothing is due while it runs."""
        return False

    def ended(self, exit: Exit) -> None:
        """Let the thread go on that waits."""
        self.code, self.failure = exit.code, self.failure or exit.reason
        self.over.set()
