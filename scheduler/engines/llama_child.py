"""The program of a runner's process: serves one model with llama.cpp's server until its parent stops it or is gone.

The program is run by its path and imports nothing of this project, since every import is time to the first token. Its
parent writes one JSON object on a line of standard input (`Request` defines it) and keeps that stream open: the end of
the stream is the order to leave. A child that is given the library's folder as an argument imports the library before
it reads. On standard output the child answers with JSON objects, one a line, each with an "event":

    importing                  the process runs
    loading                    the library is imported, the model is being loaded
    loaded   url, num_ctx,     the child serves; num_ctx is the context of one slot, in tokens; the last line
             buffers, flash_attention, engine_url, restored
    failed   reason            the child does not serve; its process ends with status 1; the last line

`buffers` is the memory that llama.cpp reports as allocated or mapped: a list of [device, kind, bytes]. The device has
llama.cpp's name ("CPU", "CUDA0"; memory of the host that a GPU reaches counts as "CPU"), and the kind is "weights",
"cache" (of keys and values, or recurrent state), "compute", "output" or "projector"; llama.cpp prints hundredths of a
MiB. A pair of device and kind may come more than once, for example for weights that are mapped and repacked. The list
is empty where the log cannot be read.

`flash_attention` tells whether llama.cpp uses it for the model, where it could choose; null: not known.

Where prompts are kept or there are adapters, `url` is the address of a gate (`llama_gate`), `engine_url` that of the
engine, which has a key of its own, and `restored` a list of slots with the tokens that each got back; else null and
empty.

Everything that llama.cpp prints goes to standard error: details of the load, but of requests no more than warnings.
While the model loads no Python code runs in the child (the library holds the interpreter's lock), so the signal that
stops it keeps its default action and the kernel watches the parent.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any, Never, TypedDict

HTTP_THREADS = 32  # each answer occupies one, and while all are occupied, probes and further requests wait
WARNINGS, DETAILS = 2, 4  # of llama.cpp's levels of verbosity; sizes of buffers are details, as is much of a request
ANSWER_LIMIT_BYTES = 1 << 20
ANSWER_TIMEOUT_S = 30.0
PARENT_CHECK_S = 1.0
LOG_PAUSE_S = 0.2  # for the last lines of the log, where it cannot be flushed
OOM_SCORE = 300  # of 1000: under memory pressure the kernel kills a runner rather than its host
LINUX_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
SHARE = "/proc/self/autogroup"  # share of the processors, where Linux divides them among sessions
LOADING_NICE = 19  # a seventieth of the time of other sessions where cores are scarce; 0 is what every session has
SHARE_PAUSE_S, SHARE_TRIES = 0.1, 100  # the kernel accepts ten changes a second from the whole machine
MIB = 1 << 20
ALL_LAYERS = 1 << 10
MOST_CONTEXTS = 10  # of an answer without a limit of its own, where a context never ends: some models would not either
LOOKED_FOR = 12  # last tokens that are looked for in the text, at most, to guess those that followed there
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446  # system calls, the same on all architectures
LANDLOCK_CONNECT_TCP = 1 << 1
LINUX_NO_NEW_PRIVILEGES = 38  # PR_SET_NO_NEW_PRIVS

# The log's line of a buffer; of a projector the log says where it computes, and then how large its file is.
BUFFER = re.compile(
    r"^\S+ I (?P<function>\w+): +"
    r"(?:(?P<name>\S+) +(?:DSV4 \w+ )?(?P<what>model|LoRA|KV|RS|state|compute|output) +buffer size =|model size:) +"
    r"(?P<mib>[\d.]+) MiB$",
    re.MULTILINE,
)
PROJECTOR = re.compile(r"\bCLIP using (\S+) backend$", re.MULTILINE)
PROJECTOR_COMPUTES = "reserve_compute_meta"
KINDS = {"model": "weights", "LoRA": "weights"} | dict.fromkeys(("KV", "RS", "state"), "cache")
KINDS |= {"compute": "compute", "output": "output"}
HOST_BUFFER = re.compile(r"(CPU|AMX)(_|$)|.*_Host$")  # CPU_Mapped, CPU_REPACK, CUDA_Host ...
FLASH_ATTENTION = re.compile(r"\bresolve_fused_ops: Flash Attention (enabled|not supported)\b")


class Prompts(TypedDict):
    """How the prompts of slots are kept from one runner to the next."""

    folder: str
    restores: list[tuple[int, str, float]]  # slots, files in the folder, and how long each may take, in seconds


class Request(TypedDict):
    """The parent's request; tokens, threads and layers are counts, paths are absolute."""

    parent: int  # the process whose end ends this child
    library: str | None  # the folder that holds the xllamacpp package; None: Python's own search path
    key: str  # the key of every request to the server
    name: str  # the model's name at the server
    model: str
    adapters: list[tuple[str, float]]  # files, and by how much each is applied where a request chooses none
    draft: str | None  # a small model that guesses tokens; where there is none, the text itself is looked through
    draft_num_predict: int  # tokens that are guessed at once; 0: none, and the draft model is not loaded
    context_shift: bool
    projector: str | None
    projector_on_gpu: bool
    embedding: bool
    pooling: str | None  # None: the pooling that the model's file names
    num_ctx: int  # context of one slot
    num_parallel: int
    num_batch: int
    num_micro_batch: int  # tokens computed in one pass; the size of the compute buffers grows with it
    prompt_cache_mib: int  # memory for prompts that llama.cpp keeps on the host; its own limit is 8 GiB
    num_checkpoints: int  # copies of a slot's states and windows that llama.cpp keeps on the host; its own limit is 32
    num_thread: int  # threads that compute an answer
    num_thread_prompt: int
    use_mmap: bool | None
    flash_attention: bool | None
    cache_type_k: str
    cache_type_v: str
    holds_back: bool  # other runners are in use: the load begins with a small share of the processors
    gpu_layers: list[int]  # for each visible GPU; empty: host only
    prompts: Prompts | None  # None: not kept
    engine_key: str | None  # of the engine behind a gate, which clients do not have; None: there is no gate


def settle() -> None:
    """Prepare the process: how it ends on signals, and that it leaves no core file."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the host decides what Ctrl-C means
    if sys.platform == "win32":  # untested
        return
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    import resource

    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    # A core file would hold prompts. On Linux a limit of 0 does not hold for a program that takes core files through a
    # pipe, a limit of 1 byte does.
    limit = 1 if sys.platform == "linux" and hard != 0 else 0
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(LINUX_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
        with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(OOM_SCORE))  # not allowed everywhere, and nothing depends on it


def take_over_output() -> int:
    """Return a descriptor of what was standard output; later prints to standard output go to standard error."""
    protocol = os.dup(1)
    os.dup2(2, 1)
    return protocol


def read_line() -> bytes:
    """Return the line that the parent writes, or nothing if the parent is gone."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            return b""
        line += part
    return line


def read_request() -> Request | None:
    """Return what the parent requests, or None if the parent is gone."""
    if not (line := read_line()):
        return None
    request: Request = json.loads(line)
    return request if request["parent"] == os.getppid() else None


def tell(protocol: int, event: str, **fields: object) -> None:
    """Write one line of the protocol; if the parent is gone, another thread ends this process."""
    with suppress(BrokenPipeError):
        os.write(protocol, json.dumps({"event": event, **fields}).encode() + b"\n")


def parameters(library: Any, request: Request, verbosity: int) -> Any:
    """Return llama.cpp's parameters for a request; raises ValueError for a name that llama.cpp does not know."""
    params = library.CommonParams()
    params.model.path = request["model"]
    params.model_alias = {request["name"]}
    params.offline = True
    params.fit_params = False  # the placement is decided already
    params.verbosity = verbosity
    # on GPUs the first token allocates; on the host a warm-up would only delay it
    params.warmup = bool(request["gpu_layers"])
    params.n_parallel = request["num_parallel"]
    params.n_ctx = request["num_ctx"] * request["num_parallel"]
    params.n_batch = request["num_batch"]
    params.n_ubatch = request["num_micro_batch"]
    params.cache_ram_mib = request["prompt_cache_mib"]
    params.n_ctx_checkpoints = request["num_checkpoints"]
    if request["context_shift"]:
        params.ctx_shift = True
        params.n_predict = MOST_CONTEXTS * request["num_ctx"]
    params.kv_unified = False  # each slot has cells of its own: its context does not depend on the other slots
    params.load_mode = load_mode(library, request["use_mmap"])
    params.flash_attn_type = flash_attention(library, request["flash_attention"])
    params.cache_type_k = named(library.ggml_type, "GGML_TYPE_", request["cache_type_k"])
    params.cache_type_v = named(library.ggml_type, "GGML_TYPE_", request["cache_type_v"])
    params.cpuparams.n_threads = request["num_thread"]
    params.cpuparams_batch.n_threads = request["num_thread_prompt"]
    if request["embedding"]:
        params.embedding = True
        if request["pooling"] is not None:
            params.pooling_type = named(library.llama_pooling_type, "LLAMA_POOLING_TYPE_", request["pooling"])
    add_files(library, params, request)
    guess(library, params.speculative, request)
    place(params, request["gpu_layers"])
    lock_down(params, request)
    return params


def add_files(library: Any, params: Any, request: Request) -> None:
    """Add the files beside the model's own file: adapters and projectors."""
    adapters = []
    for path, scale in request["adapters"]:
        adapter = library.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = path, scale
        adapters.append(adapter)
    params.lora_adapters = adapters
    if any(scale == 0.0 for _, scale in request["adapters"]):
        params.cache_prompt = False  # unless a request says with which adapters, as the gate has it say
    if request["projector"] is not None:
        params.mmproj.path = request["projector"]
        params.mmproj_use_gpu = request["projector_on_gpu"]


def guess(library: Any, params: Any, request: Request) -> None:
    """Have tokens guessed ahead, by a draft model or by what followed the same words before; most cost no pass then."""
    if not (most := request["draft_num_predict"]):
        return
    if request["draft"] is None:
        params.types = [library.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
        params.ngram_simple.size_m = most
        params.ngram_simple.size_n = min(most, LOOKED_FOR)  # llama.cpp guesses no fewer tokens than it looks for
        return
    params.types = [library.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    params.draft.mparams.path = request["draft"]
    params.draft.n_max = most
    on_gpu = bool(request["gpu_layers"]) and request["projector_on_gpu"]
    params.draft.n_gpu_layers = ALL_LAYERS if on_gpu else 0
    if on_gpu:
        params.draft.devices = "CUDA0"


def place(params: Any, gpu_layers: list[int]) -> None:
    """Put layers on the GPUs that this process sees, in their order; all other layers stay on the host."""
    params.n_gpu_layers = sum(gpu_layers)
    params.main_gpu = 0
    shares = [float(layers) for layers in gpu_layers]
    params.tensor_split = shares + [0.0] * (len(params.tensor_split) - len(shares))


def lock_down(params: Any, request: Request) -> None:
    """Serve this machine only, clients with the key only, and no page that shows other clients' requests.

    An engine behind a gate serves the scheduler and the gate alone.
    """
    params.hostnames = ["127.0.0.1"]
    params.port = 0  # the kernel picks a port, and the server reports it
    params.api_keys = [request["engine_key"] or request["key"]]
    params.cors_origins = "localhost"
    params.cors_credentials = False
    params.endpoint_slots = False
    params.endpoint_props = False
    params.endpoint_metrics = True  # counts of tokens and requests
    params.ui = False
    params.n_threads_http = HTTP_THREADS
    if (prompts := request["prompts"]) is not None:
        params.slot_save_path = os.path.join(prompts["folder"], "")
        params.endpoint_slots = True  # says how many tokens each slot holds


def named(kinds: Any, prefix: str, name: str) -> Any:
    """Return a member of one of llama.cpp's enumerations by its short name; raises ValueError for another name."""
    try:
        return getattr(kinds, prefix + name.upper())
    except AttributeError:
        allowed = sorted(kind.name.removeprefix(prefix).lower() for kind in kinds)
        raise ValueError(f"{name!r} is not one of {', '.join(allowed)}") from None


def load_mode(library: Any, use_mmap: bool | None) -> Any:
    """Return llama.cpp's mode for whether the file is mapped into memory; None leaves the choice to llama.cpp."""
    name = "AUTO" if use_mmap is None else "MMAP" if use_mmap else "NONE"
    return named(library.llama_load_mode, "LLAMA_LOAD_MODE_", name)


def flash_attention(library: Any, wanted: bool | None) -> Any:
    """Return llama.cpp's value for whether flash attention is used; None leaves the choice to llama.cpp."""
    name = "AUTO" if wanted is None else "ENABLED" if wanted else "DISABLED"
    return named(library.llama_flash_attn_type, "LLAMA_FLASH_ATTN_TYPE_", name)


def context_of_a_slot(url: str, key: str) -> int | None:
    """Return the context that each slot really got, in tokens, as the server reports it.

    None if it does not report it.
    """
    host, _, port = url.removeprefix("http://").rpartition(":")
    question = f"GET /v1/models HTTP/1.0\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n\r\n"
    answer = b""
    try:
        with socket.socket() as connection:  # `create_connection` would import the codec of international names
            connection.settimeout(ANSWER_TIMEOUT_S)
            connection.connect((host, int(port)))
            connection.sendall(question.encode())
            while len(answer) < ANSWER_LIMIT_BYTES and (part := connection.recv(1 << 16)):
                answer += part
        context = json.loads(answer.partition(b"\r\n\r\n")[2])["data"][0]["meta"]["n_ctx"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return context if isinstance(context, int) else None


def connect_to_nothing() -> None:
    """Have the kernel refuse all connections of this thread and of the threads that it starts, such as the server's.

    A request may name the address of an image, and llama.cpp would fetch it from inside the user's network. On Linux
    from 6.7 on; elsewhere nothing is changed, and only the parent refuses such requests. Programs that this process
    starts afterwards get no rights beyond its own.
    """
    if sys.platform != "linux":
        return
    import ctypes

    system = ctypes.CDLL(None)
    attributes = (ctypes.c_uint64 * 2)(0, LANDLOCK_CONNECT_TCP)  # what is restricted of files, and of the network
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    rules = system.syscall(LANDLOCK_CREATE_RULESET, attributes, size, 0)
    if rules >= 0:
        system.prctl(LINUX_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        system.syscall(LANDLOCK_RESTRICT_SELF, rules, 0)
        os.close(rules)


class ContextQuestion:
    """Asks the server for the context of a slot from a thread of its own, begun while it may still connect."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._url: str | None = None
        self._served = threading.Event()
        self._context: int | None = None
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        self._served.wait()
        if self._url is not None:
            self._context = context_of_a_slot(self._url, self._key)

    def answer(self, url: str) -> int | None:
        """Return the context that each slot really got, in tokens; None if the server does not report it."""
        self._url = url
        self._served.set()
        self._thread.join()
        return self._context


def gate_of(request: Request) -> Any:
    """Return the gate between clients and an engine that can do more than they may; None where there is none."""
    if request["engine_key"] is None:
        return None
    os.umask(0o077)  # the engine writes prompts to files
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from llama_gate import Gate

    restores = request["prompts"]["restores"] if request["prompts"] is not None else []
    return Gate(request["key"], request["engine_key"], restores, [scale for _, scale in request["adapters"]])


def share(nice: int) -> bool:
    """Set the share of the processors that this session gets beside others; return whether the kernel took it.

    Every runner is a session of its own. A Linux that groups processes by session goes by the niceness of the session,
    which may be raised again without any rights. Elsewhere nothing is changed. During the load the parent raises it
    again.
    """
    try:
        if os.getsid(0) == os.getpid():
            with open(SHARE, "w", encoding="ascii") as file:
                file.write(str(nice))
            return True
    except (OSError, AttributeError):  # AttributeError: there are no sessions on this system
        pass
    return False


def wait_for_the_end(parent: int) -> None:
    """Return when the parent has closed standard input or is gone."""
    if sys.platform == "linux":  # the kernel ends this process with its parent
        while os.read(0, 1 << 16):
            pass
        return
    import select  # a copy of the parent may keep the stream open here

    while os.getppid() == parent:
        if select.select([0], [], [], PARENT_CHECK_S)[0] and not os.read(0, 1 << 16):
            return


class Log:
    """llama.cpp's log, which llama.cpp writes on a thread of its own; warnings only where the log cannot be copied."""

    def __init__(self, library: Any) -> None:
        import ctypes

        self.verbosity = WARNINGS  # of the log during the load
        self._copy: int | None = None  # a file in memory
        self._main: Any = None
        with suppress(AttributeError, OSError):  # C++ functions, by the names that GCC and Clang give them
            functions = ctypes.CDLL(library.xllamacpp.__file__)
            self._flush = functions._Z16common_log_flushP10common_log
            self._set_file = functions._Z19common_log_set_fileP10common_logPKc
            self._set_verbosity = functions._Z30common_log_set_verbosity_tholdi
            functions._Z15common_log_mainv.restype = ctypes.c_void_p
            self._main = ctypes.c_void_p(functions._Z15common_log_mainv())
            self._copy = os.memfd_create("log")  # on Linux only
            self._set_file(self._main, f"/proc/self/fd/{self._copy}".encode())
            self.verbosity = DETAILS

    def flush(self) -> None:
        """Have the last lines written: they say why a load failed."""
        if self._main is None:
            time.sleep(LOG_PAUSE_S)
        else:
            self._flush(self._main)

    def finish(self) -> str:
        """Return the log of the load, empty where it cannot be copied; later only warnings are written."""
        if self._copy is None:
            return ""
        self._set_verbosity(WARNINGS)
        self._flush(self._main)
        self._set_file(self._main, None)
        with open(self._copy, encoding="utf-8", errors="replace") as file:
            file.seek(0)
            return file.read()


def buffers(log: str) -> list[tuple[str, str, int]]:
    """Return device, kind and bytes of each buffer that llama.cpp's log names."""
    projector = PROJECTOR.search(log)
    found = []
    for line in BUFFER.finditer(log):
        name, what = line["name"] or (projector[1] if projector else "CPU"), line["what"]
        device = "CPU" if HOST_BUFFER.match(name) else name.partition("_")[0]
        kind = "projector" if what is None or line["function"] == PROJECTOR_COMPUTES else KINDS[what]
        found.append((device, kind, round(float(line["mib"]) * MIB)))
    return found


def uses_flash_attention(log: str) -> bool | None:
    """Tell whether llama.cpp has chosen flash attention for the model, by its log; None where that says nothing."""
    chosen = FLASH_ATTENTION.search(log)
    return None if chosen is None else chosen[1] == "enabled"


def loaded(url: str, log: Log, question: ContextQuestion, gate: Any) -> dict[str, object]:
    """Return what the parent is told of an engine that serves at this address, behind a gate or without one."""
    for_clients = url if gate is None else gate.open(url)
    told = log.finish()
    return {
        "url": for_clients,
        "num_ctx": question.answer(for_clients),
        "buffers": buffers(told),
        "flash_attention": uses_flash_attention(told),
        "engine_url": None if gate is None else url,
        "restored": [] if gate is None else gate.restored,
    }


def serve(protocol: int, request: Request) -> Never:
    """Load the model and serve it; never returns, the process ends in here."""
    held_back = request["holds_back"] and share(LOADING_NICE)  # the runners that answer meanwhile go on evenly
    tell(protocol, "importing")
    if request["library"] is not None:
        sys.path.append(request["library"])
    try:
        import xllamacpp
    except ImportError as error:
        reason = f"llama.cpp is not installed for {sys.executable} ({error}): pip install 'loadmaster[llama]'"
        tell(protocol, "failed", reason=reason)
        os._exit(1)
    log = Log(xllamacpp)
    question = ContextQuestion(request["key"])
    gate = gate_of(request)
    try:
        if request["gpu_layers"]:
            xllamacpp.get_device_info()  # a driver that starts a helper with rights of its own does it here
        connect_to_nothing()
        params = parameters(xllamacpp, request, log.verbosity)
        tell(protocol, "loading")
        server = xllamacpp.Server(params)
        held_back = held_back and not share(0)
    except Exception as error:  # whatever the error is, the parent gets it in one line, and standard error has the rest
        tell(protocol, "failed", reason=f"{type(error).__name__}: {error}")
        log.flush()
        os._exit(1)
    tell(protocol, "loaded", **loaded(server.listening_address, log, question, gate))
    for _ in range(SHARE_TRIES if held_back else 0):
        time.sleep(SHARE_PAUSE_S)
        if share(0):
            break
    wait_for_the_end(request["parent"])
    os._exit(0)  # without the server's clean-up, which waits for answers under way


def import_ahead(library: str) -> None:
    """Import llama.cpp while no request has come; a failure is reported by the import that follows the request."""
    sys.path.append(library)
    with suppress(Exception):
        import xllamacpp  # noqa: F401


def main() -> None:
    """Run as the program of a runner's process."""
    protocol = take_over_output()
    settle()
    for library in sys.argv[1:]:
        import_ahead(library)
    request = read_request()
    if request is not None:
        serve(protocol, request)


if __name__ == "__main__":
    main()
