"""A `llama-server` of the user's own: whether it can be used, its version, its devices, and the options that it knows.

It is asked once, by running it: with `--version`, `--list-devices` and `--help`, all at the same time; and where it has
GPUs, with a file that is no model, for their PCI ids.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from scheduler.concurrency.latch import Latch
from scheduler.devices.gpus import CUDA, Listed
from scheduler.engines.child_process import Child, Exit, Program
from scheduler.engines.llama_device_list import LIST, entries_of, no_model, places_of, question, with_places
from scheduler.engines.llama_server_options import known_options, missing
from scheduler.errors.exceptions import EngineMissing, EngineUnusable
from scheduler.errors.formatting import printable

if TYPE_CHECKING:
    from scheduler.engines.llama_server_child import Order
    from scheduler.engines.process_supervisor import ChildLauncher

CHILD: Final = Path(__file__).with_name("llama_server_child.py")
TIMEOUT_S: Final = 20.0  # a GPU's driver may have to wake it
ANSWER_BYTES: Final = 1 << 20
_QUESTIONS: Final = (("--version",), LIST, ("--help",))
_ENOUGH: Final = "get a llama-server from September 2025 or later (b6325), from https://github.com/ggml-org/llama.cpp"
_VERSION = re.compile(r"^version: (.+)$", re.MULTILINE)
_OTHER_MACHINE: Final = "Exec format error"

FileState = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server tells of itself."""

    version: str  # in its own words
    devices: tuple[Listed, ...]  # GPUs that it can use
    options: Mapping[str, tuple[str, ...]]  # as `known_options` returns them

    @property
    def backends(self) -> tuple[str, ...]:
        """The libraries through which it uses GPUs, as "CUDA"."""
        return tuple(sorted({device.library for device in self.devices}))


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

    def ask_list(self) -> Question | None:
        """Ask for the list of devices, and return at once; None where no process can be started now."""
        try:
            return Question(self._processes, self.program(LIST))
        except (RuntimeError, OSError):  # closed, in a fork, or no thread or descriptor is left
            return None

    def list_of(self, answered: Question) -> tuple[Listed, ...] | None:
        """Return the devices of an answer to `ask_list`, or None where it has no list; raises what `check` raises.

        Where these are other devices than at first, the server is asked for their PCI ids too.
        """
        entries, facts = entries_of(answered.text), self.facts()
        if entries is None or answered.code:
            return None
        known = {(device.name, device.description): device.pci for device in facts.devices}
        if all((entry.name, entry.description) in known for entry in entries):
            return with_places(entries, {name: pci for (name, _), pci in known.items()})
        return with_places(entries, self._places(entries, facts.options))

    def program(
        self,
        arguments: Iterable[str],
        key: str = "",
        *,
        variables: Mapping[str, str] | None = None,
        holds_back: bool = False,
    ) -> Program:
        """Return the program that runs the server with these arguments and variables; without a key it only answers.

        Without `variables` it sees the GPUs that this program does.
        """
        order: Order = {
            "parent": os.getpid(),
            "arguments": [self.path, *arguments],
            "key": key,
            "holds_back": holds_back,
            "guarded": bool(key),
        }
        environment = {**self._environment, **(variables or {})}
        return Program((sys.executable, "-I", "-S", str(CHILD)), environment, json.dumps(order).encode() + b"\n")

    def _ask(self) -> ServerFacts:
        version, devices, help = self._answers(*_QUESTIONS)
        if not (version.over and devices.over and help.over):
            raise EngineUnusable(self.path, f"it did not tell its version within {TIMEOUT_S:g} s; run it by hand")
        options = known_options(help.text)
        found = _VERSION.search(version.text)
        if found is None or not options:
            raise EngineUnusable(self.path, _why_unusable(version))
        if lacking := missing(options):
            said = f"{printable(found[1])} does not know {', '.join(lacking)}"
            raise EngineUnusable(self.path, f"its version {said}: {_ENOUGH}")
        entries = entries_of(devices.text) or ()
        return ServerFacts(printable(found[1].strip()), with_places(entries, self._places(entries, options)), options)

    def _places(self, entries: Iterable[Listed], options: Iterable[str]) -> Mapping[str, str]:
        """Return the PCI ids of GPUs by name, as far as the server tells them; it is not asked for CUDA's alone."""
        names = [entry.name for entry in entries]
        if all(name.startswith(CUDA) for name in names):
            return {}
        try:
            with tempfile.NamedTemporaryFile(prefix="loadmaster-", suffix=".gguf") as file:
                file.write(no_model())
                file.flush()
                (answer,) = self._answers(question(file.name, names, options))
        except OSError:  # no room, or no folder for it
            return {}
        return places_of(answer.text)

    def _answers(self, *questions: Iterable[str]) -> list[Question]:
        """Return the answers to questions, each by a process; what was not answered within `TIMEOUT_S` is not over."""
        asked: list[Question] = []
        try:
            asked.extend(Question(self._processes, self.program(arguments)) for arguments in questions)
            all(each.wait(TIMEOUT_S) for each in asked)
        finally:
            for each in asked:
                each.stop()
        return asked


def _why_unusable(answer: Question) -> str:
    """Return why a program that told no version cannot be used, in its own words where it has some."""
    if _OTHER_MACHINE in answer.failure:
        return f"it is no program for this machine ({answer.failure}): get a build for its processor and system"
    last = next((line.strip() for line in reversed(answer.text.splitlines()) if line.strip()), "")
    said = answer.failure or printable(last[-200:]) or f"status {answer.code}"
    return f"it did not tell its version ({said}): run it with --version by hand; {_ENOUGH}"


class Question:
    """A run of the server, and what it prints; its child calls the methods from `printed` on, on another thread."""

    def __init__(self, processes: ChildLauncher, program: Program) -> None:
        self.code: int | None = None
        self.failure = ""  # why it was not run
        self._over = Latch()
        self._printed = bytearray()
        self._child = Child(program, self)
        processes.start(self._child)

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self._over.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; return whether it has come within `timeout_s` seconds."""
        return self._over.wait(timeout_s)

    def stop(self) -> None:
        """End the run, if it goes on."""
        self._child.stop(0.0)

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
        self._over.set()
