"""Python objects in processes of their own: their runners, and the engine that has them."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
from dataclasses import replace
from multiprocessing import process as multiprocessing_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fsm.domain.devices import HOST
from scheduler.engines.child_process import Child, Exit, Program
from scheduler.engines.child_runner import EXIT_S, TreeRunner, shown
from scheduler.engines.engine_log import EngineLog
from scheduler.engines.object_calls import ObjectCalls
from scheduler.engines.object_protocol import pickled, send
from scheduler.engines.process_supervisor import CLOSE_TIMEOUT_S, ChildLauncher
from scheduler.errors.exceptions import ObjectError

if TYPE_CHECKING:
    from scheduler.engines.engine_log import RunnerLog
    from scheduler.engines.interface import RunnerListener
    from scheduler.engines.python import PythonModel

log = logging.getLogger("loadmaster")

CHILD: Final = Path(__file__).with_name("object_child.py")


class ObjectProcess(TreeRunner):
    """The handle of one object in a process of its own."""

    def __init__(
        self, model: PythonModel, report: RunnerListener, launcher: ChildLauncher, log: RunnerLog | None
    ) -> None:
        super().__init__(report, log=log)
        self.model = model
        self._launcher = launcher
        ours, self._theirs = socket.socketpair()
        self._calls = ObjectCalls(model.name, ours)
        self._ours = ours
        self._unloading = False
        self._wrong = ""  # why it is ended, where no one has ordered it
        self._reader = threading.Thread(target=self._read, name=f"loadmaster-object-{model.name}", daemon=True)
        program = (sys.executable, str(CHILD), str(self._theirs.fileno()))
        environment = os.environ | shown(gpu for gpu, _ in model.declared if gpu != HOST)
        self.child = Child(Program(program, environment, passed=(self._theirs.fileno(),)), self)

    def begin(self) -> None:
        """Start the process; raises RuntimeError where none can be started, or no thread."""
        try:
            self._launcher.require()
            self._reader.start()
            assert self.child is not None
            self._launcher.start(self.child)
        except RuntimeError:
            self._calls.cut()
            self._calls.end("not started")
            self._theirs.close()
            raise

    def stop(self, grace_s: float) -> None:
        """Have the object unloaded, and its process killed after `grace_s` seconds; at once where it loads."""
        if self.model.unload is None or self._unloading or not self._serves or grace_s <= 0:
            super().stop(grace_s)
            return
        assert self.child is not None
        self._unloading = True
        self._launcher.send(self.child, b"\n")
        threading.Thread(target=self._end_after, args=(grace_s,), name="loadmaster-unload", daemon=True).start()

    def printed(self, line: str) -> None:
        """Take in a line of the child's protocol."""
        try:
            message = json.loads(line)
            event = message["event"]
        except (ValueError, TypeError, LookupError):
            return
        match event:
            case "loading":
                self._theirs.close()  # the child has its own
                self._report.progressed()
            case "loaded":
                self._serves = True
                self._report.loaded(self._calls, None, self.memory())
            case "failed":
                told = [str(message.get(name, "")) for name in ("kind", "message", "trace")]
                of_memory = "out of memory: " if message.get("of_memory") else ""
                self._failure = f"error: {of_memory}load() raised {told[0]}: {told[1]}"
                self._report.failed(ObjectError(self.model.name, *told))

    def ended(self, exit: Exit) -> None:
        """Report how the process ended, and let the calls under way fail."""
        self._theirs.close()
        if self._wrong:
            exit = replace(exit, asked=False, reason=self._wrong)
        super().ended(replace(exit, asked=exit.asked or self._unloading))
        self._calls.end("its process has ended")

    def _answers(self, timeout_s: float | None) -> bool:
        return self._calls.answers(timeout_s)

    def _tellable(self, output: str) -> str:
        return "" if self._serves else self._failure or output  # it may quote what it was called with

    def _end_after(self, grace_s: float) -> None:
        if not self._told.wait(grace_s):
            super().stop(0.0)

    def _read(self) -> None:
        """Send what the child loads, and take in its answers; a child that sends no answers is killed."""
        try:
            for parts in (pickled(_preparation(self.model)), pickled((self.model.load, self.model.unload))):
                send(self._ours, parts)
            self._calls.read()
        except (EOFError, OSError):  # the child ends, most likely, and its exit says why
            wait_s = EXIT_S
        except Exception:
            log.warning("the process of %r is ended, as calls to it went wrong", self.model.name, exc_info=True)
            self._wrong = "error: its process sent what is no answer" if self._serves else ""
            wait_s = 0.0
        if not self._told.wait(wait_s) and not self._unloading:
            super().stop(0.0)


def _preparation(model: PythonModel) -> dict[str, Any]:
    """Return what makes the child's interpreter like this one, as `multiprocessing` does it.

    The program's own file is run there only where `load` or `unload` is defined in it.
    """
    found = {"parent": os.getpid(), "sys_path": sys.path, "sys_argv": sys.argv, "dir": os.getcwd()}
    main = sys.modules["__main__"]
    if main.__name__ in [getattr(call, "__module__", None) for call in model.calls]:
        if main.__spec__ is not None:
            found["init_main_from_name"] = main.__spec__.name
        else:
            found["init_main_from_path"] = os.path.abspath(str(main.__file__))
    return found


class ObjectEngine:
    """Runs objects in processes of their own, for the engine of Python objects; its threads start with the first."""

    def __init__(self, log_file: Path | None) -> None:
        self.log = EngineLog(log_file) if log_file is not None else None
        self._children = ChildLauncher()

    def launch(self, model: PythonModel, report: RunnerListener) -> ObjectProcess:
        """Start a process that loads an object; raises RuntimeError once this is closed."""
        if getattr(multiprocessing_process.current_process(), "_inheriting", False):
            raise RuntimeError("the program's file is run for an object: have it act only if __name__ is '__main__'")
        runner_log = self.log.of_runner(model.name) if self.log is not None else None
        process = ObjectProcess(model, report, self._children, runner_log)
        process.begin()
        return process

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Kill every process that is left, and end the threads."""
        if not self._children.close(timeout_s):
            log.warning("a child process could not be ended within %g s", timeout_s)
        if self.log is not None and not self.log.close(timeout_s):
            log.warning("the engine log could not be written within %g s", timeout_s)
