"""The program of a dry run: llama.cpp tells which memory it would take for a model, and takes next to none.

The program is run by its path, like a runner's, and speaks the same kind of protocol: its parent writes one JSON object
on a line of standard input (`DryRun` defines it) and keeps that stream open. llama.cpp loads the model without its
weights, and then makes a context for each load that is asked about, without its cache and its buffers. The child
answers with JSON objects, one a line:

    sized    load, caches,     a load would take these bytes; `load` is its place in the list of loads
             compute,
             projector
    refused  load, reason      llama.cpp would not make this context; the reason in its words
    unusable reason            llama.cpp refuses the model's file, whatever the load; the reason in its words; the last
                               line
    failed   reason            llama.cpp cannot tell, or is not as it is known here; the last line

`caches` is a list of [kind, layers, cells, bytes]. The kind is "full" for keys and values of a whole context, "window"
for those of a sliding window, and "state" for recurrent state and all else that keeps its size; cells are tokens of one
slot, and the bytes are those of all slots. `projector` counts its weights and its compute buffers. llama.cpp prints
hundredths of a MiB. The process ends when all loads were answered; where it ends before, the other loads have no
answer.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from typing import Any, Never, TypedDict, cast

sys.path.append(os.path.dirname(os.path.abspath(__file__)))

from llama_child import DETAILS, MIB, Request, load_mode, parameters, settle, take_over_output, tell

LONGEST_STRUCTURE = 1024  # bytes; llama.cpp passes its parameters by value, and both structures are far smaller
WRAPPED_AT = object.__basicsize__  # where the engine's parameters begin in the object that wraps them
# of address space for data, of which llama.cpp touches a tenth, and recurrent states: weights would not find room
MOST_BYTES = 4 << 30
USES_GPU_AT, FLASH_ATTENTION_AT = 0, 40  # bytes, in the parameters of a projector
AUTOMATIC = -1  # as llama.cpp has flash attention by itself
VALUE_AT = 40  # bytes, in a node of a map: behind four pointers and the key

LAYER = re.compile(r"\blayer +(\d+): dev = ")
CACHE = re.compile(r"^(\w+): (?!.*buffer size)(?:.*, )?size = +([\d.]+) MiB(?: \( *(\d+) cells)?")
WINDOW = re.compile(r"creating +SWA KV cache")
FULL = re.compile(r"creating (?!SWA).* KV cache")
COMPUTE = re.compile(r"compute buffer size = +([\d.]+) MiB")
STATES = re.compile(r"recurrent|state")
ERROR_LEVEL = 4  # of a line of the log
OF_THE_MACHINE = re.compile(r"alloc|memory|failed to open|open files", re.IGNORECASE)  # and no error of a file's

Cache = tuple[str, list[int], int, int]  # kind, layers, cells of a slot, bytes of all slots


class DryRun(TypedDict):
    """The parent's question."""

    parent: int  # the process whose end ends this child
    library: str | None  # as in `Request`
    base: Request
    loads: list[dict[str, Any]]  # of the model of `base`, by what they have other than it


class Parameters(ctypes.Structure):
    """One of llama.cpp's structures of parameters, unread: the engine fills it, and takes it back."""

    _fields_ = [("bytes", ctypes.c_ubyte * LONGEST_STRUCTURE)]


class Map(ctypes.Structure):
    """A map of C++ from a device to the bytes on it, as GCC and Clang lay it out: a tree, its root the only node."""

    _fields_ = [
        ("order", ctypes.c_void_p),
        ("colour", ctypes.c_void_p),
        ("root", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("last", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
    ]


class Engine:
    """The C functions of the library in the wheel, and its log."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._functions = functions = ctypes.CDLL(library.xllamacpp.__file__)
        self._lines: list[str] = []
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._errors: list[str] = []
        self._log = kind(self._take_in)
        functions.llama_log_set(self._log, None)
        functions.llama_backend_init()
        # C++ functions, by the names that GCC and Clang give them: what the server itself makes of its parameters
        self._of_model = functions._Z28common_model_params_to_llamaR13common_params
        self._of_context = functions._Z30common_context_params_to_llamaRK13common_params
        for translate in (self._of_model, self._of_context):
            translate.restype, translate.argtypes = Parameters, [ctypes.c_void_p]
        self._load, self._context = functions.llama_model_load_from_file, functions.llama_init_from_model
        self._load.restype, self._load.argtypes = ctypes.c_void_p, [ctypes.c_char_p, Parameters]
        self._context.restype, self._context.argtypes = ctypes.c_void_p, [ctypes.c_void_p, Parameters]
        functions.llama_free.argtypes = [ctypes.c_void_p]
        self._of_projector = functions.mtmd_context_params_default
        self._of_projector.restype = Parameters
        self._projector = functions._Z21mtmd_get_memory_usagePKc19mtmd_context_params
        self._projector.restype, self._projector.argtypes = Map, [ctypes.c_char_p, Parameters]

    def _take_in(self, level: int, text: bytes, data: int | None) -> None:
        self._lines.append(text.decode(errors="replace"))
        if level == ERROR_LEVEL:
            self._errors.append(self._lines[-1].strip())

    def load(self, request: Request) -> int | None:
        """Load the model without its weights, and return its address; None where llama.cpp cannot load it.

        Raises RuntimeError where llama.cpp has understood other sizes than were named.
        """
        params = self._parameters(request)
        self._explicit(params)
        self._errors.clear()  # of the beginning: there are no GPUs here, which a build for them tells as an error
        address: int | None = self._load(request["model"].encode(), self._of_model(id(params) + WRAPPED_AT))
        return address

    def context(self, model: int, request: Request) -> str | None:
        """Make a context without its memory, and return the log of it; None where llama.cpp refuses to make it."""
        params = self._parameters(request)
        explicit = self._explicit(params)
        self._lines.clear()
        context = self._context(model, explicit)
        if context is None:
            return None
        self._functions.llama_free(context)
        return "".join(self._lines)

    def projector_bytes(self, request: Request) -> int:
        """Return the bytes of a projector's weights and compute buffers; 0 where there is none.

        Raises RuntimeError where llama.cpp does not tell, or its parameters are not where they are known to be.
        """
        if request["projector"] is None:
            return 0
        params = self._of_projector()
        params.bytes[USES_GPU_AT] = 0
        flash_attention = ctypes.c_int32.from_buffer(params, FLASH_ATTENTION_AT)
        if flash_attention.value != AUTOMATIC:
            raise RuntimeError("the parameters of this llama.cpp's projectors are laid out in another way")
        if request["flash_attention"] is not None:
            flash_attention.value = int(request["flash_attention"])
        found = self._projector(request["projector"].encode(), params)
        if found.count != 1:
            raise RuntimeError("llama.cpp does not tell what the projector takes")
        return int(ctypes.c_size_t.from_address(found.root + VALUE_AT).value)

    def reason(self) -> str:
        """Return the last line of the log that tells of an error, or else the last one."""
        lines = [line for line in "".join(self._lines).splitlines() if line.strip()]
        return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "")

    def fault(self) -> str:
        """Return what llama.cpp said first against a file that it did not load; empty where the machine may lack."""
        errors = [*filter(None, self._errors)]
        return "" if any(map(OF_THE_MACHINE.search, errors)) else next(iter(errors), "")

    def _explicit(self, params: Any) -> Parameters:
        """Return the parameters of a context as llama.cpp has understood them; raises RuntimeError where it has not."""
        explicit: Parameters = self._of_context(id(params) + WRAPPED_AT)
        sizes = [params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel]
        if list((ctypes.c_uint32 * len(sizes)).from_buffer(explicit)) != sizes:
            raise RuntimeError("the parameters of this llama.cpp are laid out in another way")
        return explicit

    def _parameters(self, request: Request) -> Any:
        params = parameters(self._library, request, DETAILS)
        params.no_alloc = True
        params.load_mode = load_mode(self._library, False)  # llama.cpp cannot map a file and leave the weights out
        # as the server sets them when it begins
        params.n_outputs_max = params.n_batch if request["embedding"] else params.n_parallel
        params.n_outputs_max_per_seq = 1
        return params


def caches(log: str) -> list[Cache]:
    """Return what a context keeps of tokens, by kind and layers, as the log of its making tells."""
    found: list[Cache] = []
    layers: list[int] = []
    kind = "full"
    for line in log.splitlines():
        if layer := LAYER.search(line):
            layers.append(int(layer[1]))
        elif WINDOW.search(line):
            kind = "window"
        elif FULL.search(line):
            kind = "full"
        elif cache := CACHE.match(line):
            of_state = STATES.search(cache[1]) is not None
            cells = int(cache[3] or 0)
            found.append(("state" if of_state else kind, layers, cells, round(float(cache[2]) * MIB)))
            layers = []
    return found


def compute_bytes(log: str) -> int:
    """Return the bytes of a context's compute buffers, as the log of its making tells."""
    return sum(round(float(mib) * MIB) for mib in COMPUTE.findall(log))


def answer(protocol: int, dry_run: DryRun) -> None:
    """Answer the loads, one after the other; raises RuntimeError where llama.cpp cannot tell of any further load."""
    import xllamacpp

    engine = Engine(xllamacpp)
    requests = [cast(Request, {**dry_run["base"], **load}) for load in dry_run["loads"]]
    model = engine.load(requests[0])
    if model is None:
        if not (fault := engine.fault()):
            raise RuntimeError(engine.reason())
        tell(protocol, "unusable", reason=fault)
        return
    projectors: dict[bool | None, int] = {}  # by flash attention
    for place, request in enumerate(requests):
        log = engine.context(model, request)
        if log is None:
            tell(protocol, "refused", load=place, reason=engine.reason())
            continue
        flash_attention = request["flash_attention"]
        if flash_attention not in projectors:
            projectors[flash_attention] = engine.projector_bytes(request)
        sizes = {"caches": caches(log), "compute": compute_bytes(log), "projector": projectors[flash_attention]}
        tell(protocol, "sized", load=place, **sizes)


def limit_memory() -> None:
    """Have the system refuse memory beyond `MOST_BYTES`, so that a dry run never takes what a load would."""
    if sys.platform == "win32":  # untested
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = MOST_BYTES if hard == resource.RLIM_INFINITY else min(MOST_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def main() -> Never:
    """Run as the program of a dry run."""
    protocol = take_over_output()
    settle()
    limit_memory()
    dry_run: DryRun = json.loads(sys.stdin.buffer.readline() or b'{"parent": 0}')
    if dry_run["parent"] == os.getppid():
        if dry_run["library"] is not None:
            sys.path.append(dry_run["library"])
        try:
            answer(protocol, dry_run)
        except (RuntimeError, ImportError, AttributeError) as error:  # AttributeError: a function is not there
            tell(protocol, "failed", reason=str(error))
    os._exit(0)


if __name__ == "__main__":
    main()
