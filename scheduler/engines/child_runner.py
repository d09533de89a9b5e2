"""A runner that is a child process, whatever its program is: its memory, its probes, its log, and its end in words."""

from __future__ import annotations

import http.client
import re
import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import psutil

from fsm.domain.devices import HOST, DeviceId
from scheduler.concurrency.latch import Latch
from scheduler.config.quantities import wait_limit
from scheduler.engines.interface import Buffer, Memory
from scheduler.errors.exceptions import is_out_of_files

if TYPE_CHECKING:
    from scheduler.engines.child_process import Child, Exit
    from scheduler.engines.engine_log import RunnerLog
    from scheduler.engines.interface import RunnerListener

VISIBLE_GPUS: Final = "CUDA_VISIBLE_DEVICES"
_CUDA_IDS: Final = ("GPU-", "MIG-")
DETAIL_BYTES = 8 << 10  # longest description of an exit
BUSY_PART = 0.05  # share of a probe's time on a CPU: a server that works this much is only slow to answer, and not dead
BUSY_S = 0.05  # and at least this much: CPU time is counted in ticks of 10 ms
EXIT_S = 1.0  # how long the report of an exit may come after the end of its connections

# Variables that a child gets from this program's environment: no tokens, no LLAMA_ARG_*, no variable that Python or the
# loader acts upon except the library path, which GPU libraries need.
_KEPT = frozenset({"HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "PATH", "SYSTEMROOT", "TMPDIR", "TZ"})
_KEPT_PREFIXES = ("CUDA_", "LC_", "NVIDIA_")

_STAMP = re.compile(r"^[\d.]+ ([A-Z]) +")  # prefix of llama.cpp's log: time, and level (E: error)
_OUT_OF_MEMORY = re.compile(
    r"out of (device |host )?memory|(failed|unable|cannot|could not) (to )?allocate|bad_alloc|OutOfDeviceMemory"
    r"|(insufficient|not enough|no more) (free |device |host )?memory|cudaMalloc failed",
    re.IGNORECASE,
)
_ERROR = re.compile(
    r"\b(errors?|failed|failure|fatal|abort(ed|ing)?|assert(ion)?|exception|cannot|could not|unable|invalid|illegal"
    r"|corrupt(ed)?|segmentation|traceback)\b|[a-z]Error\b|_ASSERT\b",
    re.IGNORECASE,
)
_LAST_LINES = 5  # lines shown where no line looks like an error


class ChildRunner:
    """The engine's handle of one runner; its child calls `logged`, `on_tick` and `ended`, on the supervisor's thread.

    An engine derives its own from it, with `printed`, which takes in what its program tells.
    """

    def __init__(self, report: RunnerListener, *, log: RunnerLog | None = None) -> None:
        self.child: Child | None = None  # set before its first call as a listener
        self.buffers: tuple[Buffer, ...] = ()  # as reported by the child once it serves
        self._report = report
        self._log = log  # None: what the child writes is not kept
        self._serves = False  # it was reported as loaded
        self._url = ""  # of its server, once it serves
        self._failure = ""  # why it does not serve, in the child's own words
        self._gone = False
        self._told = Latch()  # set when the exit was reported
        self._touched = (0, 0)  # the most memory and input that was seen of a load

    @property
    def pid(self) -> int | None:
        """The id of the child's process; None before its start."""
        return None if self.child is None else self.child.pid

    @property
    def loads(self) -> bool:
        """Whether its model is still being loaded."""
        return not self._serves and not self._gone

    def stop(self, grace_s: float) -> None:
        """Terminate the child, and kill it after `grace_s` seconds.

        Before its start, call the start off. Returns at once.
        """
        if self.child is not None:
            self.child.stop(grace_s)

    def memory(self) -> Memory:
        """Return the memory that the runner occupies: of the host as measured, of GPUs as its buffers report."""
        if self._gone:
            return Memory()
        own_bytes = shared_bytes = 0
        for process in self._processes():
            with suppress(psutil.Error, OSError):  # OSError: too many open files
                memory = process.memory_info()
                shared = getattr(memory, "shared", 0)  # on Linux only
                own_bytes += memory.rss - shared
                shared_bytes = max(shared_bytes, shared)  # processes of one runner share the same pages, mostly
        resident: dict[DeviceId, int] = {HOST: own_bytes + shared_bytes} if own_bytes + shared_bytes else {}
        for buffer in self.buffers:
            if buffer.device != HOST:
                resident[buffer.device] = resident.get(buffer.device, 0) + buffer.bytes
        return Memory(resident, shared_bytes)

    def context_filled(self, timeout_s: float) -> Mapping[DeviceId, int] | None:
        """Return None: how much more it may take is not known."""
        return None

    def healthy(self, timeout_s: float) -> bool:
        """Return whether the runner answers or is hard at work: long answers may occupy all its connections.

        Returns True during the load, when the runner cannot be probed. Blocks for at most `timeout_s` seconds.
        """
        if self._gone or not self._serves:
            return not self._gone
        worked_s = self._worked_s()
        try:
            return self._answers(wait_limit(timeout_s))
        except TimeoutError:
            return self._worked_s() - worked_s > max(BUSY_S, BUSY_PART * timeout_s)
        except (OSError, http.client.HTTPException) as error:
            if is_out_of_files(error):  # then the probe says nothing about the runner
                return True
            # most likely the runner is just ending: its exit says more than False does
            self._told.wait(min(timeout_s, EXIT_S))
            return False

    def logged(self, chunk: bytes) -> None:
        """Report progress: the child wrote to its log, so its load is alive; pass what it wrote to the engine log."""
        if self._log is not None:
            self._log.write(self.pid, chunk)
        if not self._serves:
            self._report.progressed()

    def on_tick(self) -> bool:
        """Report progress where a load goes on: llama.cpp writes no log while it reads a large file."""
        if self._serves:
            return False
        resident_bytes, read_bytes = self._touches()
        most_bytes, read_before = self._touched
        if resident_bytes > most_bytes or read_bytes > read_before:  # pages that come and go are no progress
            self._touched = (max(resident_bytes, most_bytes), max(read_bytes, read_before))
            self._report.progressed()
        return True

    def ended(self, exit: Exit) -> None:
        """Report how the child ended."""
        self._gone = True
        if self._log is not None:
            self._log.end(self.pid)
        loading = not self._serves
        output = self._tellable(f"{exit.tail}\n{self._failure}")
        killed = loading and exit.code == -signal.SIGKILL and not exit.reason  # as the kernel does when memory runs out
        out_of_memory = not exit.asked and (killed or _OUT_OF_MEMORY.search(output) is not None)
        self._report.exited(exit.code, describe(exit, output, loading=loading), out_of_memory)
        self._told.set()

    # -- what engines replace -----------------------------------------------------------------------------------------

    def _answers(self, timeout_s: float | None) -> bool:
        """Return whether the server answers a probe that it is well; raises OSError where it cannot be asked."""
        return get(self._url, "/health", timeout_s) == http.client.OK

    def _processes(self) -> list[psutil.Process]:
        """Return the processes whose memory and work are the runner's."""
        with suppress(psutil.Error, OSError):
            return [psutil.Process(self.pid)] if self.pid is not None else []
        return []

    def _tellable(self, output: str) -> str:
        """Return what may be told of what the child wrote: no keys, and nothing of requests."""
        return output

    # -- what is seen of its processes --------------------------------------------------------------------------------

    def _touches(self) -> tuple[int, int]:
        """Return what grows while a model is loaded: bytes resident, and bytes read."""
        resident_bytes = read_bytes = 0
        for process in self._processes():
            with suppress(psutil.Error, OSError, AttributeError):  # AttributeError: no counters on this system
                resident_bytes += process.memory_info().rss
                read_bytes += process.io_counters().read_chars
        return resident_bytes, read_bytes

    def _worked_s(self) -> float:
        """Return the seconds of CPU time that the runner has used so far."""
        worked_s = 0.0
        for process in self._processes():
            with suppress(psutil.Error, OSError):
                times = process.cpu_times()
                worked_s += times.user + times.system
        return worked_s


class TreeRunner(ChildRunner):
    """A runner whose process may start others: all of them are its memory and its work, and end with it."""

    def __init__(self, report: RunnerListener, *, log: RunnerLog | None = None) -> None:
        super().__init__(report, log=log)
        self._family: list[psutil.Process] = []  # as they were last looked at, the child first

    @property
    def pids(self) -> tuple[int, ...]:
        """Its processes, as they were last looked at."""
        return tuple(process.pid for process in self._family)

    def stop(self, grace_s: float) -> None:
        """Terminate the child, and kill it after `grace_s` seconds; what it has started ends with it."""
        self._processes()  # so that what has left its group is known when it ends
        super().stop(grace_s)

    def ended(self, exit: Exit) -> None:
        """Kill what has left the child's group, and report how the child ended."""
        for process in self._family[1:]:
            with suppress(psutil.Error, OSError):
                process.kill()  # only if it is still the same process
        super().ended(exit)

    def _processes(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        if self.pid is not None and not self._gone:
            with suppress(psutil.Error, OSError):
                child = psutil.Process(self.pid)
                found = self._family = [child, *child.children(recursive=True)]
        return found


def get(url: str, path: str, timeout_s: float | None, key: str = "") -> int:
    """Return the status of a server's answer; raises OSError or HTTPException where there is none."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        return connection.getresponse().status
    finally:
        connection.close()


def kept_environment(environment: Mapping[str, str], gpus: Iterable[DeviceId] | None = None) -> dict[str, str]:
    """Return the part of `environment` that a child gets, and the GPUs that it sees, in their order.

    None: those that this program sees.
    """
    kept = {name: value for name, value in environment.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    return kept if gpus is None else kept | shown(gpus)


def shown(gpus: Iterable[DeviceId]) -> dict[str, str]:
    """Return the variable with which a child sees these GPUs alone.

    Only CUDA knows GPUs by their ids: where one of these is not NVIDIA's, there is no such variable, and the child sees
    the GPUs that this program does.
    """
    ids = [*gpus]
    return {VISIBLE_GPUS: ",".join(ids)} if all(id.startswith(_CUDA_IDS) for id in ids) else {}


def describe(exit: Exit, output: str, *, loading: bool) -> str:
    """Return in words how a child ended, with the lines of its output that look like errors, else its last lines."""
    text = f"{_status(exit)} while {'loading' if loading else 'serving'}" if exit.code is not None else exit.reason
    if exit.asked or exit.code is None:
        return text
    lines = [line for line in output.splitlines() if line.strip()]
    shown = [without_stamp(line) for line in list(filter(_is_error, lines)) or lines[-_LAST_LINES:]]
    reason = [exit.reason] if exit.reason else []
    detail = "\n".join([text, *reason, *dict.fromkeys(shown)])  # each line once
    return detail.encode()[:DETAIL_BYTES].decode(errors="ignore")


def without_stamp(line: str) -> str:
    """Return a line without the stamp that llama.cpp puts before it."""
    return _STAMP.sub("", line).strip()


def _is_error(line: str) -> bool:
    stamp = _STAMP.match(line)
    if stamp is not None and stamp[1] in "EI":  # llama.cpp's lines about a load that goes well may contain any word
        return stamp[1] == "E"
    return any(each.search(line) for each in (_ERROR, _OUT_OF_MEMORY))


def _status(exit: Exit) -> str:
    if exit.asked:
        return "stopped"
    if exit.code is None or exit.code >= 0:
        return f"exited with status {exit.code}"
    try:
        return f"killed by {signal.Signals(-exit.code).name}"
    except ValueError:
        return f"killed by signal {-exit.code}"
