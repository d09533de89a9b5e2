"""GGUF models, each served by a `llama-server` of the user's own, which may have backends that the wheel has not.

What is known of models, options and memory is the same as where the wheel serves them (`llama`). Only the process is
another one: its options are arguments, and what it has to report is read from its log.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fsm.domain.options import AUTOMATIC, Options
from scheduler.engines.llama import LlamaEngine, LlamaProcess, child_environment
from scheduler.engines.llama_child import buffers, uses_flash_attention
from scheduler.engines.llama_server_binary import ServerBinary
from scheduler.engines.llama_server_gpus import ServerGpus, ServerList
from scheduler.engines.llama_server_options import arguments
from scheduler.engines.llama_sizing import VERIFIED_VERSION
from scheduler.errors.exceptions import InvalidModel
from scheduler.errors.formatting import printable

if TYPE_CHECKING:
    from fsm.sizing.model_profile import ModelProfile
    from scheduler.devices.gpus import Gpu
    from scheduler.engines.child_process import Child
    from scheduler.engines.llama_child import Request
    from scheduler.engines.llama_prompts import RunnerPrompts
    from scheduler.models.model_spec import ModelSpec

log = logging.getLogger("loadmaster")

LOG_BYTES: Final = 4 << 20  # of a load's log that are kept
_SERVES = re.compile(rb"\blistening on (http://127\.0\.0\.1:\d{1,5})(?=\s)")
_CONTEXT = re.compile(r"\b(?:n_ctx_slot|new slot,? n_ctx) = (\d+)")
# variables that ROCm, SYCL, Vulkan and llama.cpp's own backends act upon, beside those that every child gets
_KEPT_PREFIXES: Final = (
    "GGML_", "GPU_", "HIP_", "HSA_", "MESA_", "ONEAPI_", "RADV_", "ROCM_", "ROCR_", "SYCL_", "UR_", "VK_", "ZES_",
    "ZE_",
)  # fmt: skip


class ServerProcess(LlamaProcess):
    """The handle of one runner, whose process is the user's `llama-server`."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._load_log: bytearray | None = bytearray()  # None: the load is over

    def logged(self, chunk: bytes) -> None:
        """Pass on what the server wrote, and find in it where it serves, and what it took."""
        super().logged(chunk)
        if self._load_log is None:
            return
        looked_at = max(0, self._load_log.rfind(b"\n"))
        self._load_log += chunk
        if (serves := _SERVES.search(self._load_log, looked_at)) is None:
            del self._load_log[:-LOG_BYTES]
            return
        text, self._load_log = self._load_log.decode(errors="replace"), None
        context = _CONTEXT.search(text)
        told = {
            "event": "loaded",
            "url": serves[1].decode(),
            "num_ctx": None if context is None else int(context[1]),
            "buffers": buffers(text),
            "flash_attention": uses_flash_attention(text),
        }
        self.end_holding_back()
        self.printed(json.dumps(told))


class LlamaServerEngine(LlamaEngine):
    """Runs the models of `ModelSpec`s with one `llama-server`.

    `gpus` returns the GPUs of the last reading of the devices, which has this server's names for them where it `lists`.
    """

    process_class = ServerProcess
    has_gate = False

    def __init__(
        self,
        path: Path,
        defaults: Options = AUTOMATIC,
        *,
        larger_contexts: bool = False,
        gpus: Callable[[], Sequence[Gpu]] = tuple,
        lists: bool = False,
        log_file: Path | None = None,
        keeps_prompts: bool = False,
    ) -> None:
        super().__init__(defaults, larger_contexts=larger_contexts, gpus=gpus, log_file=log_file)
        more = {name: value for name, value in os.environ.items() if name.startswith(_KEPT_PREFIXES)}
        self.binary = ServerBinary(path, self._processes, more | child_environment(os.environ))
        self.gpu_list = ServerList(self.binary)
        self._backends = ServerGpus(self.binary, gpus, lists=lists)
        self._version = VERIFIED_VERSION  # llama.cpp's buffers seldom change; what it takes is measured, by its version
        self._keeps_prompts = keeps_prompts  # whether that was wanted

    @property
    def problems(self) -> tuple[str, ...]:
        """What the server cannot do of what was asked for, and what it did not tell."""
        kept = (f"{printable(self.binary.path)}: {_NO_PROMPTS}",) if self._keeps_prompts else ()
        return (*super().problems, *kept)

    def version(self, model: ModelSpec) -> str:
        """Return what tells this server from others: its own words, and the state of its file."""
        state = self.binary.check()
        return f"{self.binary.facts().version} {state[2:]}"

    def require(self) -> None:
        """Raise `EngineMissing` where there is no such program, or it is known that it cannot be used."""
        self.binary.check()

    def inspect(self, model: ModelSpec, asked: Iterable[Options]) -> ModelProfile:
        """Return what the model's files say, and how it is loaded for these options; raises `EngineMissing` too.

        The server is asked for its version when it is first needed. Where the formulas are not known to hold, the wheel
        is asked, where it is installed.
        """
        self.binary.facts()
        return super().inspect(model, asked)

    def _prompts_of(self, model: ModelSpec, options: Options) -> RunnerPrompts | None:
        """Return None: a client with the runner's key could read, write and erase the slots of others."""
        return None

    def _start(
        self,
        model: ModelSpec,
        request: Request,
        gpus: Sequence[str],
        variables: Mapping[str, str],
        process: LlamaProcess,
    ) -> Child:
        """Start the server; raises `InvalidModel` for a value that this server does not take."""
        try:
            told = arguments(request, self.binary.facts().options, gpus)
        except ValueError as error:
            raise InvalidModel(model.path, str(error)) from None
        program = self.binary.program(told, request["key"], variables=variables, holds_back=request["holds_back"])
        return self._spares.start(program, None, process)


_NO_PROMPTS: Final = (
    "its prompts are not kept (keep_prompts), as it opens the slots to every client that has its runner's key"
)
