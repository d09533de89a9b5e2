"""GGUF models, each in a child process of its own that serves it with llama.cpp's server."""

from __future__ import annotations

import http.client
import importlib.util
import json
import logging
import os
import re
import secrets
import signal
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlsplit

import psutil

from fsm.estimate import prompt_cache_bytes
from fsm.model import HOST, MIB, DeviceId, ModelInfo, Options
from fsm.options import micro_batch, resolve
from scheduler.engines import Endpoint
from scheduler.errors import EngineMissing
from scheduler.header import read_header
from scheduler.metadata import read_metadata
from scheduler.processes import CLOSE_TIMEOUT_S, Child, Exit, Processes, Program

if TYPE_CHECKING:
    from fsm.ledger import Placement
    from scheduler.engines import Report
    from scheduler.engines.llama_child import Request
    from scheduler.spec import ModelSpec

log = logging.getLogger("loadmaster")

CHILD: Final = Path(__file__).with_name("llama_child.py")
DETAIL_BYTES = 8 << 10  # of an exit's description
KEY_BYTES = 32
BUSY_PART = 0.05  # of a probe's time on a CPU: a server that works this much is not dead, only slow to answer
BUSY_S = 0.05  # and at least this much: CPU time is counted in ticks of 10 ms

# What a child may see of our environment: no tokens, no LLAMA_ARG_*, nothing that Python or the loader act upon but
# the library path, which GPU libraries need.
_KEPT = frozenset({"HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "PATH", "SYSTEMROOT", "TMPDIR", "TZ"})
_KEPT_PREFIXES = ("CUDA_", "LC_", "NVIDIA_")
# By default threads that wait for each other spin. Two runners with two threads each on two cores: 100 tokens took each
# 25 to 70 s with spinning, 2.8 s without; a single runner is as fast either way.
_WAITING: Mapping[str, str] = {"OMP_WAIT_POLICY": "passive"}

_STAMP = re.compile(r"^[\d.]+ ([A-Z]) +")  # of llama.cpp's log: time, and level (E: error)
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
_LAST_LINES = 5  # shown where no line looks like an error

Value = TypeVar("Value")


class LlamaProcess:
    """The handle of one runner; the methods from `printed` on are its child's listener, on the watcher's thread."""

    def __init__(self, report: Report, key: str) -> None:
        self.child: Child | None = None  # set before anything is heard of it
        self._report = report
        self._key = key
        self._url = ""  # set once it serves
        self._failure = ""  # why it does not serve, in the child's own words
        self._gone = False
        self._touched = (0, 0)  # memory and input of a load, when it was last looked at

    @property
    def pid(self) -> int | None:
        """The child's process; None before it has started."""
        return None if self.child is None else self.child.pid

    def stop(self, grace_s: float) -> None:
        """Terminate it, kill it after `grace_s`; before its start this calls it off. Returns at once."""
        if self.child is not None:
            self.child.stop(grace_s)

    def resident(self) -> Mapping[DeviceId, int]:
        """Return what it and its children occupy of the host's memory; GPUs are measured elsewhere, by pid."""
        if self._gone or self.pid is None:
            return {}
        total_bytes = 0
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            total_bytes = process.memory_info().rss
            for child in process.children(recursive=True):
                with suppress(psutil.Error):
                    total_bytes += child.memory_info().rss
        return {HOST: total_bytes} if total_bytes else {}

    def healthy(self, timeout_s: float) -> bool:
        """Return whether it answers, or is hard at work: its connections may all be taken by long answers.

        True while it loads, when it cannot be asked.
        """
        if self._gone or not self._url:
            return not self._gone
        worked_s = self._worked_s()
        address = urlsplit(self._url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=timeout_s)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except TimeoutError:
            return self._worked_s() - worked_s > max(BUSY_S, BUSY_PART * timeout_s)
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def printed(self, line: str) -> None:
        """Take in a line of the child's protocol; what is none is ignored."""
        try:
            message = json.loads(line)
            event = message["event"]
        except (ValueError, TypeError, LookupError):
            return
        match event:
            case "loaded":
                self._url = message["url"]
                context = message["num_ctx"]
                self._report.loaded(Endpoint(self._url, self._key), context, self.resident())
            case "failed":
                self._failure = message["reason"]
            case _:
                self._report.progressed()

    def logged(self) -> None:
        """The child wrote to its log: a load is alive."""
        if not self._url:
            self._report.progressed()

    def pulse(self) -> bool:
        """Look whether a load goes on; llama.cpp says nothing while it reads a large file."""
        if self._url:
            return False
        touched = self._touches()
        if touched != self._touched:
            self._touched = touched
            self._report.progressed()
        return True

    def ended(self, exit: Exit) -> None:
        """Tell how it ended."""
        self._gone = True
        loading = not self._url
        output = f"{exit.tail}\n{self._failure}".replace(self._key, "(key)")
        killed = loading and exit.code == -signal.SIGKILL and not exit.reason  # as the kernel does when memory runs out
        out_of_memory = not exit.asked and (killed or _OUT_OF_MEMORY.search(output) is not None)
        self._report.exited(exit.code, describe(exit, output, loading=loading), out_of_memory)

    def _touches(self) -> tuple[int, int]:
        """What grows while a model is loaded: bytes resident, and bytes read."""
        with suppress(psutil.Error, AttributeError):  # AttributeError: no counters on this system
            process = psutil.Process(self.pid)
            return process.memory_info().rss, process.io_counters().read_chars
        return self._touched

    def _worked_s(self) -> float:
        """Seconds of CPU that it has used so far."""
        with suppress(psutil.Error):
            times = psutil.Process(self.pid).cpu_times()
            return times.user + times.system
        return 0.0


class LlamaEngine:
    """Runs `ModelSpec`s; its threads begin with the first launch.

    `cpu_threads` is for runners whose options name no number of threads; None: as many as there are cores to use.
    """

    def __init__(self, *, cpu_threads: int | None = None) -> None:
        self._cpu_threads = cpu_threads
        self._processes = Processes()

    def require(self) -> None:
        """Raise `EngineMissing` if the library is not installed."""
        if find_library() is None:
            raise EngineMissing("llama", "pip install 'loadmaster[llama]'")

    def inspect(self, model: ModelSpec) -> ModelInfo:
        """Return what the model's files say; raises `ModelNotFound` or `InvalidModel`."""
        return read_metadata(
            model.path, adapters=model.adapters, projectors=model.projectors, embedding=model.embedding
        )

    def launch(self, model: ModelSpec, options: Options, placement: Placement, report: Report) -> LlamaProcess:
        """Start a child that loads the model, and return at once.

        Raises `ModelNotFound` or `InvalidModel` for what became of the file since it was inspected, and RuntimeError
        once closed and in a fork.
        """
        key = secrets.token_urlsafe(KEY_BYTES)
        request = self._request(model, options, placement, key)
        program = Program(
            arguments=(sys.executable, "-I", "-S", str(CHILD)),  # neither the user's start-up code nor other packages'
            environment=child_environment(os.environ, [device for device, _ in placement.gpu_layers]),
            input=json.dumps(request).encode() + b"\n",
        )
        process = LlamaProcess(report, key)
        process.child = Child(program, process)
        self._processes.start(process.child)
        return process

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Kill every child that is left, reap it, and end the threads; in a fork this does nothing."""
        if not self._processes.close(timeout_s):
            log.warning("a child process could not be ended within %g s", timeout_s)

    def _request(self, model: ModelSpec, options: Options, placement: Placement, key: str) -> Request:
        """Return what the child is told."""
        info = self.inspect(model)
        explicit = resolve(info, options)
        return {
            "parent": os.getpid(),
            "library": find_library(),
            "key": key,
            "name": model.name,
            "model": model.path,
            "adapters": list(model.adapters),
            "projector": model.projectors[0] if model.projectors else None,
            "embedding": model.embedding,
            "pooling": pooling_to_set(model.path, info),
            "num_ctx": _there(explicit.num_ctx),
            "num_parallel": _there(explicit.num_parallel),
            "num_batch": _there(explicit.num_batch),
            "num_micro_batch": micro_batch(info, explicit),
            "prompt_cache_mib": prompt_cache_bytes(info, explicit) // MIB,
            "num_thread": explicit.num_thread or self._cpu_threads or usable_cores(),
            "use_mmap": explicit.use_mmap,
            "flash_attention": explicit.flash_attention,
            "cache_type_k": _there(explicit.cache_type_k),
            "cache_type_v": _there(explicit.cache_type_v),
            "gpu_layers": [layers for _, layers in placement.gpu_layers],
        }


def find_library() -> str | None:
    """Return the folder that holds the xllamacpp package, without importing it; None if it is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent.parent)


def pooling_to_set(path: str, info: ModelInfo) -> str | None:
    """Return the pooling for an embedder whose file names none, where llama.cpp would refuse to embed; else None."""
    named = read_header(path).values.get(f"{info.architecture}.pooling_type")
    return "mean" if info.embedding and not named else None  # 0 is no pooling


def child_environment(environment: Mapping[str, str], gpus: Iterable[DeviceId]) -> dict[str, str]:
    """Return what a child sees of `environment`, and of the GPUs: those that its layers are on, in that order."""
    kept = {name: value for name, value in environment.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    return {**kept, **_WAITING, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def usable_cores() -> int:
    """Return how many physical cores this process may keep busy: affinity and a container's quota count."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def describe(exit: Exit, output: str, *, loading: bool) -> str:
    """Return in words how a child ended, and the lines of its output that look like errors, else the last ones."""
    text = f"{_status(exit)} while {'loading' if loading else 'serving'}" if exit.code is not None else exit.reason
    if exit.asked or exit.code is None:
        return text
    lines = [line for line in output.splitlines() if line.strip()]
    shown = [_STAMP.sub("", line).strip() for line in list(filter(_is_error, lines)) or lines[-_LAST_LINES:]]
    reason = [exit.reason] if exit.reason else []
    detail = "\n".join([text, *reason, *dict.fromkeys(shown)])  # each once
    return detail.encode()[:DETAIL_BYTES].decode(errors="ignore")


def _is_error(line: str) -> bool:
    stamp = _STAMP.match(line)
    return (stamp is not None and stamp[1] == "E") or any(each.search(line) for each in (_ERROR, _OUT_OF_MEMORY))


def _status(exit: Exit) -> str:
    if exit.asked:
        return "stopped"
    if exit.code is None or exit.code >= 0:
        return f"exited with status {exit.code}"
    try:
        return f"killed by {signal.Signals(-exit.code).name}"
    except ValueError:
        return f"killed by signal {-exit.code}"


def _there(value: Value | None) -> Value:
    """Return an option that has been made explicit."""
    if value is None:
        raise ValueError("an option is not resolved")
    return value
