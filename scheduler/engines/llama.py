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
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlsplit

import psutil

from fsm.domain.devices import HOST, MIB, DeviceId, Threads
from fsm.domain.model_info import ModelInfo, Options
from fsm.sizing.load_options import maps_file, micro_batch, resolve
from fsm.sizing.memory_estimate import CHECKPOINTS, kept_bytes, prompt_cache_bytes, results_bytes, work_bytes
from scheduler.concurrency.latch import Latch
from scheduler.config.quantities import wait_limit
from scheduler.devices.cpu_cores import usable_cores
from scheduler.engines.child_process import Child, Exit, Program
from scheduler.engines.interface import Buffer, Endpoint, Memory
from scheduler.engines.llama_protocol import largest_sequence, loaded_of
from scheduler.engines.process_supervisor import CLOSE_TIMEOUT_S, ChildLauncher
from scheduler.errors.exceptions import EngineMissing, is_out_of_files
from scheduler.models.gguf_header import read_header
from scheduler.models.gguf_metadata import read_metadata

if TYPE_CHECKING:
    from fsm.domain.devices import Placement
    from scheduler.engines.interface import RunnerListener
    from scheduler.engines.llama_child import Request
    from scheduler.models.model_spec import ModelSpec

log = logging.getLogger("loadmaster")

CHILD: Final = Path(__file__).with_name("llama_child.py")
DETAIL_BYTES = 8 << 10  # of an exit's description
KEY_BYTES = 32
BUSY_PART = 0.05  # of a probe's time on a CPU: a server that works this much is not dead, only slow to answer
BUSY_S = 0.05  # and at least this much: CPU time is counted in ticks of 10 ms
EXIT_S = 1.0  # how far the news of an exit may be behind the end of its connections

# What a child may see of our environment: no tokens, no LLAMA_ARG_*, nothing that Python or the loader act upon but
# the library path, which GPU libraries need.
_KEPT = frozenset({"HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "PATH", "SYSTEMROOT", "TMPDIR", "TZ"})
_KEPT_PREFIXES = ("CUDA_", "LC_", "NVIDIA_")
# How threads wait for each other, some hundred times in each token. The wheel is built with OpenMP (so llama.cpp's own
# level of polling is without effect), and libgomp spins 300,000 times before it sleeps: alone that is fastest, but once
# there are more threads than cores each waits out others' turns. To sleep at once is slowest alone: it takes longer to
# wake a thread than to compute. With 300 spins, some 8 µs, one that runs is waited for awake, one that does not
# asleep: a seventh slower alone than the best, and a third slower than one thread each where several answer at once
# (`make bench` compares them). "passive" is for an OpenMP that does not know of spins; libgomp goes by
# their number where it is given both.
_WAITING: Mapping[str, str] = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "300"}

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
# What is told of a runner that has served. In other lines llama.cpp quotes requests, some over several lines; of these
# all that varies is numbers and names of its own.
_OF_ITSELF = re.compile(
    r"(?:\S*/)?((?:ggml|llama)[\w.-]*:\d+: (?:GGML_ASSERT|fatal error|\w+ error))\b.*"
    r"|((?:CUDA|ROCm|MUSA) error: (?:out of memory|an illegal memory access was encountered|unspecified launch failure|"
    r"misaligned address))"
    r"|(terminate called after throwing an instance of '[\w:]+')"
    r"|([\w:]+: failed to allocate buffer of size \d+)"
    r"|([\w:]+: allocating [\d.]+ MiB on device \d+: \w+ failed: out of memory)"
    r"|(\w+: Device memory allocation failed: [\w:]+: ErrorOutOf(?:Device|Host)Memory)"
    r"|(error: Insufficient Memory \(\d+:\w+\))"
)
SHARE: Final = "/proc/{}/autogroup"  # of the processors; a child says there that it holds back while it loads
_LAST_LINES = 5  # shown where no line looks like an error

Value = TypeVar("Value")


class LlamaProcess:
    """The handle of one runner; the methods from `printed` on are its child's listener, on the watcher's thread."""

    def __init__(
        self,
        report: RunnerListener,
        key: str,
        *,
        gpus: Sequence[DeviceId] = (),
        kept_bytes: int = 0,
        results_bytes: int = 0,
    ) -> None:
        self.child: Child | None = None  # set before anything is heard of it
        self.buffers: tuple[Buffer, ...] = ()  # by its own account, once it serves
        self._report = report
        self._key = key
        self._gpus = gpus  # that it sees, in its order
        self._kept_bytes = kept_bytes  # most of the host that it may come to keep of earlier prompts, and to work in
        self._results_bytes = results_bytes  # that an embedder allocates with its first request
        self._url = ""  # set once it serves
        self._num_ctx: int | None = None  # of a slot, once it serves and if it says so
        self._most_bytes = 0  # that it can come to hold of the host for itself; 0: unknown
        self._failure = ""  # why it does not serve, in the child's own words
        self._gone = False
        self._told = Latch()  # that it is gone was reported
        self._touched = (0, 0)  # the most memory and input that was seen of a load

    @property
    def pid(self) -> int | None:
        """The child's process; None before it has started."""
        return None if self.child is None else self.child.pid

    def stop(self, grace_s: float) -> None:
        """Terminate it, kill it after `grace_s`; before its start this calls it off. Returns at once."""
        if self.child is not None:
            self.child.stop(grace_s)

    def memory(self) -> Memory:
        """Return what it occupies of the host, and what its buffers take of GPUs, as it says."""
        if self._gone:
            return Memory()
        resident_bytes = mapped_bytes = 0
        if self.pid is not None:
            with suppress(psutil.Error, OSError):  # OSError: too many open files
                memory = psutil.Process(self.pid).memory_info()
                resident_bytes, mapped_bytes = memory.rss, getattr(memory, "shared", 0)  # shared: on Linux only
        resident: dict[DeviceId, int] = {HOST: resident_bytes} if resident_bytes else {}
        for buffer in self.buffers:
            if buffer.device != HOST:
                resident[buffer.device] = resident.get(buffer.device, 0) + buffer.bytes
        return Memory(resident, mapped_bytes)

    def context_filled(self, timeout_s: float) -> Mapping[DeviceId, int] | None:
        """Tell whether a request has filled a slot's context, and how much may come after that.

        Two things grow by use after a load: the buffers it computes in are touched when first needed, all of them by a
        long prompt but few by a long answer, and earlier prompts are kept up to a limit. Their sizes are known. What an
        embedder puts its results in is not, but there a text as long as the context shows everything at once.
        """
        if self._gone or self._num_ctx is None or not self._most_bytes:
            return None
        largest = largest_sequence(self._url, self._key, timeout_s)
        if largest is None or largest < self._num_ctx - 1:  # its last token is answered with, and not computed
            return None
        return {HOST: max(0, self._most_bytes - self.memory().private_bytes)}

    def healthy(self, timeout_s: float) -> bool:
        """Return whether it answers, or is hard at work: its connections may all be taken by long answers.

        True while it loads, when it cannot be asked.
        """
        if self._gone or not self._url:
            return not self._gone
        worked_s = self._worked_s()
        address = urlsplit(self._url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=wait_limit(timeout_s))
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except TimeoutError:
            return self._worked_s() - worked_s > max(BUSY_S, BUSY_PART * timeout_s)
        except (OSError, http.client.HTTPException) as error:
            if is_out_of_files(error):  # nothing is known of it
                return True
            self._told.wait(min(timeout_s, EXIT_S))  # most likely it ends just now: that says more than our False
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
                if (loaded := loaded_of(message, self._gpus)) is None:
                    return
                self.buffers, self._num_ctx, self._url = loaded.buffers, loaded.num_ctx, loaded.url
                memory = self.memory()
                self._most_bytes = self._most(memory)
                memory = replace(memory, to_come=self._to_come(memory))
                self._report.loaded(Endpoint(self._url, self._key), self._num_ctx, memory)
            case "failed":
                self._failure = str(message.get("reason", ""))
            case _:
                self._report.progressed()

    def _most(self, memory: Memory) -> int:
        """What it can come to hold of the host for itself, as it has just been loaded; 0 where that is not known."""
        compute_bytes = sum(each.bytes for each in self.buffers if (each.device, each.kind) == (HOST, "compute"))
        known = self.buffers and memory.private_bytes
        return memory.private_bytes + compute_bytes + self._kept_bytes if known else 0

    def _to_come(self, memory: Memory) -> Mapping[DeviceId, int]:
        """What it may come to take of the host beside what it takes now, loaded; nothing where that is not known.

        What it computes in is counted whole, though a part was touched; so is what it maps and has not read yet.
        Of GPUs nothing is said: their libraries allocate for themselves when they are first used.
        """
        if not self._most_bytes:
            return {}
        filled = [each.bytes for each in self.buffers if each.device == HOST and each.kind != "compute"]
        unread_bytes = max(0, sum(filled) - memory.resident[HOST])
        return {HOST: self._most_bytes - memory.private_bytes + self._results_bytes + unread_bytes}

    def logged(self) -> None:
        """The child wrote to its log: a load is alive."""
        if not self._url:
            self._report.progressed()

    def on_tick(self) -> bool:
        """Look whether a load goes on; llama.cpp says nothing while it reads a large file. It has held back enough."""
        if self._url:
            return False
        with suppress(OSError):  # no such file here, or too many changes at this moment: the next pulse tries again
            Path(SHARE.format(self.pid)).write_text("0", encoding="ascii")
        resident_bytes, read_bytes = self._touches()
        most_bytes, read_before = self._touched
        if resident_bytes > most_bytes or read_bytes > read_before:  # pages that come and go are no progress
            self._touched = (max(resident_bytes, most_bytes), read_bytes)
            self._report.progressed()
        return True

    def ended(self, exit: Exit) -> None:
        """Tell how it ended."""
        self._gone = True
        loading = not self._url
        output = f"{exit.tail}\n{self._failure}".replace(self._key, "(key)")
        if not loading:
            output = without_requests(output)
        killed = loading and exit.code == -signal.SIGKILL and not exit.reason  # as the kernel does when memory runs out
        out_of_memory = not exit.asked and (killed or _OUT_OF_MEMORY.search(output) is not None)
        self._report.exited(exit.code, describe(exit, output, loading=loading), out_of_memory)
        self._told.set()

    def _touches(self) -> tuple[int, int]:
        """What grows while a model is loaded: bytes resident, and bytes read."""
        with suppress(psutil.Error, OSError, AttributeError):  # AttributeError: no counters on this system
            process = psutil.Process(self.pid)
            return process.memory_info().rss, process.io_counters().read_chars
        return self._touched

    def _worked_s(self) -> float:
        """Seconds of CPU that it has used so far."""
        with suppress(psutil.Error, OSError):
            times = psutil.Process(self.pid).cpu_times()
            return times.user + times.system
        return 0.0


class LlamaEngine:
    """Runs `ModelSpec`s; its threads begin with the first launch."""

    def __init__(self) -> None:
        self._processes = ChildLauncher()

    def require(self) -> None:
        """Raise `EngineMissing` if the library is not installed."""
        with suppress(OSError):  # where it cannot be looked for, whoever needs it finds out why
            if find_library() is None:
                raise EngineMissing("llama", "pip install 'loadmaster[llama]'")

    def inspect(self, model: ModelSpec) -> ModelInfo:
        """Return what the model's files say; raises `ModelNotFound` or `InvalidModel`."""
        return read_metadata(
            model.path, adapters=model.adapters, projectors=model.projectors, embedding=model.embedding
        )

    def launch(self, model: ModelSpec, options: Options, placement: Placement, report: RunnerListener) -> LlamaProcess:
        """Start a child that loads the model, and return at once.

        Raises `ModelNotFound` or `InvalidModel` for what became of the file since it was inspected, and RuntimeError
        once closed and in a fork.
        """
        key = secrets.token_urlsafe(KEY_BYTES)
        info = self.inspect(model)
        explicit = resolve(info, options)
        request = self._request(model, info, explicit, placement, key)
        gpus = tuple(device for device, _ in placement.gpu_layers)
        program = Program(
            arguments=(sys.executable, "-I", "-S", str(CHILD)),  # neither the user's start-up code nor other packages'
            environment=child_environment(os.environ, gpus),
            input=json.dumps(request).encode() + b"\n",
        )
        process = LlamaProcess(
            report,
            key,
            gpus=gpus,
            kept_bytes=kept_bytes(info, explicit) + work_bytes(info, explicit),
            results_bytes=results_bytes(info, explicit),
        )
        process.child = Child(program, process)
        self._processes.start(process.child)
        return process

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Kill every child that is left, reap it, and end the threads; in a fork this does nothing."""
        if not self._processes.close(timeout_s):
            log.warning("a child process could not be ended within %g s", timeout_s)

    def _request(self, model: ModelSpec, info: ModelInfo, explicit: Options, placement: Placement, key: str) -> Request:
        """Return what the child is told."""
        cores = explicit.num_thread or usable_cores()
        threads = placement.threads or Threads(cores, cores)  # not dealt where the engine is used by itself
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
            "num_checkpoints": CHECKPOINTS,
            "num_thread": threads.answers,
            "num_thread_prompt": threads.prompts,
            "use_mmap": maps_file(info, explicit, on_host=not placement.gpu_layers),
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


def without_requests(output: str) -> str:
    """Return those lines of a server's output that cannot hold what was asked of it: where it failed, and of what."""
    found = (_OF_ITSELF.fullmatch(_STAMP.sub("", line).strip()) for line in output.splitlines())
    return "\n".join(match[match.lastindex or 0] for match in found if match is not None)


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
    if stamp is not None and stamp[1] in "EI":  # what it says of a load that goes well may have any word in it
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


def _there(value: Value | None) -> Value:
    """Return an option that has been made explicit."""
    if value is None:
        raise ValueError("an option is not resolved")
    return value
