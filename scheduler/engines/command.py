"""Any program that serves over HTTP, in a process of its own that a guard starts and ends (`command_child`)."""

from __future__ import annotations

import functools
import http.client
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from fsm.domain.devices import HOST, DeviceId, Placement
from fsm.domain.options import Options
from fsm.sizing.footprint import Footprint
from fsm.sizing.model_profile import EngineSettings, ModelProfile, Resolution, ResolvedLoad
from scheduler.engines.child_process import Child, Program
from scheduler.engines.child_runner import TreeRunner, get, kept_environment
from scheduler.engines.command_model import ANY_GPU, CommandModel, filled
from scheduler.engines.engine_log import EngineLog
from scheduler.engines.interface import Endpoint, Engine, Memory
from scheduler.engines.process_supervisor import CLOSE_TIMEOUT_S, ChildLauncher
from scheduler.errors.exceptions import EngineMissing, EngineUnusable
from scheduler.errors.formatting import printable

if TYPE_CHECKING:
    from scheduler.engines.child_process import Exit
    from scheduler.engines.command_child import Order
    from scheduler.engines.engine_log import RunnerLog
    from scheduler.engines.interface import RunnerListener

log = logging.getLogger("loadmaster")

GUARD: Final = Path(__file__).with_name("command_child.py")
KEY_BYTES: Final = 32
STOP_COMMAND_S: Final = 15.0  # least grace of a program that a command stops
PORT_S: Final = 5.0  # how long a launch waits for a port to be free again
_PROBE_S: Final = 5.0  # how long a server that is being awaited may take to answer a probe
_PAUSES_S: Final = (0.05, 0.5)  # between two probes of it: at first, and at most
_GUARD_S: Final = 0.5  # what a guard has for killing what is left, after the grace of a stop
_ECHO_S: Final = 0.2  # how long after its answer to a probe a program may write of it
_STEP_BYTES: Final = 1 << 20  # least growth that is progress: probes are read, and answered with some memory
_LOCAL: Final = ("127.0.0.1", "::1")


class CommandProcess(TreeRunner):
    """The handle of one runner: a guard, the program, and all that it started."""

    def __init__(
        self, model: CommandModel, report: RunnerListener, port: int, key: str, *, log: RunnerLog | None = None
    ) -> None:
        super().__init__(report, log=log)
        self.model = model
        self._key = key if model.api_key_env else ""
        self._url = f"http://127.0.0.1:{port}"
        self._port = port
        self._addresses: set[str] = set()  # that it listens at, as far as is known
        self._echo_until = 0.0  # of the monotonic clock: until then it writes of a probe, most likely
        self._waiter = threading.Thread(target=self._await, name=f"loadmaster-command-{model.name}", daemon=True)

    def begin(self) -> None:
        """Have the program awaited, once it is started; raises RuntimeError if the system allows no more threads."""
        self._waiter.start()

    def give_up(self) -> None:
        """End the waiting: the program cannot be started."""
        self._gone = True
        self._told.set()

    def stop(self, grace_s: float) -> None:
        """End the program, and kill it after `grace_s` seconds; a command that stops it has more time.

        Its guard kills it, as the guard alone knows all that it has started, and is killed only if it does not.
        """
        grace_s = max(grace_s, STOP_COMMAND_S) if self.model.runs_elsewhere else grace_s
        if self.child is not None and (watcher := self.child.watcher) is not None:
            watcher.post(functools.partial(watcher.send, self.child, f"{grace_s}\n".encode()))
        super().stop(grace_s + _GUARD_S)

    def wait(self, timeout_s: float) -> None:
        """Wait for the report of its exit."""
        self._told.wait(timeout_s)

    def memory(self) -> Memory:
        """Return the memory of its processes; what it is declared to take, where it runs elsewhere."""
        if self.model.runs_elsewhere and self._serves and not self._gone:
            return Memory({device: amount for device, amount in self.model.declared.items() if device != ANY_GPU})
        return super().memory()

    def logged(self, chunk: bytes) -> None:
        """Keep what the program wrote, and report progress, unless it wrote of a probe."""
        if self._log is not None:
            self._log.write(self.pid, chunk)
        if not self._serves and time.monotonic() > self._echo_until:
            self._report.progressed()

    def printed(self, line: str) -> None:
        """Take in why the program cannot be run."""
        with suppress(ValueError, TypeError, LookupError):
            self._failure = str(json.loads(line)["reason"])

    def ended(self, exit: Exit) -> None:
        """Report how it ended; a program that goes on in the background is told what to do."""
        if exit.code == 0 and not exit.asked and not self._serves and not self._failure:
            self._failure = "error: it has ended, and has to stay in the foreground: see its options"
        super().ended(exit)

    def _await(self) -> None:
        """Report the program as loaded once it serves; each load has a thread that does this."""
        pause_s, longest_s = _PAUSES_S
        while not self._told.wait(pause_s):
            pause_s = min(1.5 * pause_s, longest_s)
            with suppress(OSError, http.client.HTTPException):
                self._connect(_PROBE_S)
                if self._is_ours() and self._answers(_PROBE_S):
                    assert self.child is not None
                    assert self.child.watcher is not None
                    self.child.watcher.post(self._loaded)
                    return

    def _loaded(self) -> None:
        """Report it, on the supervisor's thread, so that no exit can come in between."""
        if self._gone:
            return
        if open_to_all := self._addresses.difference(_LOCAL):
            log.warning(
                "%s listens at %s, and not at this machine's own address alone: other machines may reach it",
                printable(self.model.name), ", ".join(sorted(open_to_all)),
            )  # fmt: skip
        self._serves = True
        self._report.loaded(Endpoint(self._url, self._key), None, self.memory())

    def _connect(self, timeout_s: float | None) -> None:
        socket.create_connection(("127.0.0.1", self._port), timeout_s).close()

    def _answers(self, timeout_s: float | None) -> bool:
        if self.model.health is None:
            self._connect(timeout_s)
            return True
        self._echo_until = time.monotonic() + (timeout_s or _PROBE_S)
        try:
            status = get(self._url, self.model.health, timeout_s, self._key)
            self._echo_until = time.monotonic() + _ECHO_S
        except (OSError, http.client.HTTPException):
            self._echo_until = 0.0
            raise
        return http.client.OK <= status < http.client.MULTIPLE_CHOICES

    def _is_ours(self) -> bool:
        """Return whether the program is what listens at its port, as far as that can be seen."""
        if self.model.runs_elsewhere:
            return True
        unseen = False
        for process in self._processes():
            try:
                found = process.net_connections("tcp")
            except (psutil.Error, OSError):
                unseen = True
                continue
            listening = [one for one in found if one.status == psutil.CONN_LISTEN and one.laddr.port == self._port]
            self._addresses |= {one.laddr.ip for one in listening}
        found_it = unseen or bool(self._addresses)
        self._failure = "" if found_it else f"it cannot serve: another program listens at port {self._port}"
        return found_it

    def _touches(self) -> tuple[int, int]:
        resident_bytes, read_bytes = super()._touches()
        return resident_bytes // _STEP_BYTES, read_bytes // _STEP_BYTES

    def _tellable(self, output: str) -> str:
        return "" if self._serves else output.replace(self._key or "\0", "(key)")  # it may quote requests


class CommandEngine(Engine):
    """Runs `CommandModel`s; its threads start with the first launch."""

    def __init__(self, *, log_file: Path | None = None) -> None:
        self._log = EngineLog(log_file) if log_file is not None else None
        self._children = ChildLauncher()
        self._lock = threading.Lock()  # guards `_running`
        self._running: list[CommandProcess] = []  # and some that have ended

    @property
    def problems(self) -> tuple[str, ...]:
        """Why its log is not kept."""
        return (self._log.problem,) if self._log is not None and self._log.problem else ()

    def inspect(self, model: CommandModel, asked: Sequence[Options]) -> ModelProfile | Footprint:
        """Return the bytes that were declared; raises `EngineMissing` where there is no such program.

        Bytes of any GPU are one layer, which goes to one GPU or nowhere.
        """
        _program_of(model)
        declared = model.declared
        if (gpu_bytes := declared.pop(ANY_GPU, None)) is None:
            return Footprint(fixed=tuple(declared.items()))
        footprint = Footprint(output_bytes=gpu_bytes, process_bytes=declared.get(HOST, 0))
        load = ResolvedLoad(Options(), footprint)
        return ModelProfile(model.id, 0, tuple(Resolution(one, (load,)) for one in asked))

    def launch(
        self,
        model: CommandModel,
        options: Options,
        settings: EngineSettings,
        placement: Placement,
        report: RunnerListener,
    ) -> CommandProcess:
        """Start the program; raises `EngineMissing` where it is gone, and RuntimeError once the engine is closed."""
        self._children.require()
        program, port, key = _program_of(model), _port_of(model), secrets.token_urlsafe(KEY_BYTES)
        log_of_runner = self._log.of_runner(model.name, key) if self._log is not None else None
        process = CommandProcess(model, report, port, key, log=log_of_runner)
        gpus = tuple(device for device, _ in placement.gpu_layers) or model.gpus
        process.child = Child(_guarded(model, program, port, key, gpus), process)
        process.begin()
        try:
            self._children.start(process.child)
        except RuntimeError:
            process.give_up()
            raise
        with self._lock:
            self._running = [*(one for one in self._running if not one._gone), process]
        return process

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """End every program that is left, by force where no command stops it, and the threads.

        Commands that stop programs have their time, also where that is longer than `timeout_s`.
        """
        began = time.monotonic()
        end = began + timeout_s
        for process in self._running:
            process.stop(0.0)
        for process in self._running:
            limit_s = STOP_COMMAND_S + _GUARD_S if process.model.runs_elsewhere else min(timeout_s, 2 * _GUARD_S)
            process.wait(began + limit_s - time.monotonic())
        if not self._children.close(max(0.5, end - time.monotonic())):
            log.warning("a child process could not be ended within %g s", timeout_s)
        if self._log is not None and not self._log.close(timeout_s):
            log.warning("the engine log could not be written within %g s", timeout_s)


def _guarded(model: CommandModel, program: str, port: int, key: str, gpus: Sequence[DeviceId]) -> Program:
    """Return the guard that runs the program; its environment and its key go through standard input."""
    name = f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', model.name).strip('-.')}-{secrets.token_hex(4)}"
    values = {"port": str(port), "name": name}
    environment = kept_environment(os.environ, gpus)
    environment |= {each: os.environ[each] for each in model.pass_env if each in os.environ}
    environment |= {each: filled(text, values) for each, text in model.env.items()}
    if model.api_key_env:
        environment[model.api_key_env] = key
    stop: list[str] | int
    if isinstance(model.stop, str):
        stop = signal.Signals[model.stop]
    else:
        stop = [_found(model.stop[0]), *(filled(part, values) for part in model.stop[1:])]
    arguments = [program, *(filled(part, values) for part in model.command[1:])]
    order: Order = {"parent": os.getpid(), "arguments": arguments, "environment": environment, "stop": stop}
    input = json.dumps(order).encode() + b"\n"
    return Program((sys.executable, "-I", "-S", str(GUARD)), kept_environment(os.environ, ()), input)


def _program_of(model: CommandModel) -> str:
    """Return the path of a model's program; raises `EngineMissing` where it, or what stops it, cannot be run."""
    if model.runs_elsewhere:
        _found(model.stop[0])
    return _found(model.command[0])


def _found(program: str) -> str:
    """Return the absolute path of a program; raises `EngineMissing` or `EngineUnusable`."""
    path = program if os.sep in program else shutil.which(program)
    if path is None or not os.path.exists(path):
        how = "there is no such program; install it, or name it by its absolute path"
        raise EngineMissing(printable(program), how)
    if not os.path.isfile(path):
        raise EngineUnusable(printable(program), "it is no file; name the program itself, and not its folder")
    if not os.access(path, os.X_OK):
        raise EngineUnusable(printable(program), "it is not executable; have it so with chmod +x")
    return os.path.abspath(path)


def _port_of(model: CommandModel) -> int:
    """Return a port that is free, or the model's own; raises RuntimeError where that one stays in use."""
    if model.port is None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return int(server.getsockname()[1])
    end = time.monotonic() + PORT_S
    while not _is_free(model.port):  # an earlier runner may be about to end
        if time.monotonic() >= end:
            raise RuntimeError(f"port {model.port} is in use: end what listens there, or have {{port}} in the command")
        time.sleep(_PAUSES_S[0])
    return model.port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(_PROBE_S)
        return probe.connect_ex(("127.0.0.1", port)) != 0  # to listen there may take rights that the program alone has
