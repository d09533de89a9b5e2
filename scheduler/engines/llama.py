"""GGUF models, each in a child process of its own that serves it with llama.cpp's server."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeVar

from fsm.domain.devices import HOST, DeviceId, Placement, Threads
from fsm.domain.options import AUTOMATIC, Options
from fsm.machine.request import ModelId
from fsm.sizing.model_profile import EngineSettings, ModelProfile
from scheduler.concurrency.latch import Latch
from scheduler.devices.cpu_cores import usable_cores
from scheduler.engines.child_process import Child, Exit, Program
from scheduler.engines.child_runner import VISIBLE_GPUS, ChildRunner, kept_environment, without_stamp
from scheduler.engines.engine_log import EngineLog
from scheduler.engines.interface import Endpoint, Engine, Memory
from scheduler.engines.llama_dry_run import DryRuns
from scheduler.engines.llama_gpus import QUESTION, Backends, GpuBackends
from scheduler.engines.llama_options import only_embeds
from scheduler.engines.llama_profile import (
    NOTHING_TOLD,
    RANKS,
    LlamaSettings,
    Told,
    loads_of,
    profile_of,
    sized_options,
    without_place,
)
from scheduler.engines.llama_prompts import RunnerPrompts
from scheduler.engines.llama_protocol import largest_sequence, loaded_of
from scheduler.engines.llama_sizing import holds
from scheduler.engines.llama_spare import Spares
from scheduler.engines.process_supervisor import CLOSE_TIMEOUT_S, ChildLauncher
from scheduler.errors.exceptions import EngineMissing, InvalidModel, ModelNotFound
from scheduler.errors.formatting import printable
from scheduler.models.gguf_metadata import read_metadata
from scheduler.models.measurements import identity_of, installed_version
from scheduler.models.model_info import ModelInfo

if TYPE_CHECKING:
    from scheduler.devices.gpu_sources import EngineList
    from scheduler.devices.gpus import Gpu
    from scheduler.engines.engine_log import RunnerLog
    from scheduler.engines.interface import RunnerListener
    from scheduler.engines.llama_child import Request
    from scheduler.engines.llama_dry_run_child import DryRun
    from scheduler.engines.prompt_store import PromptStore
    from scheduler.models.model_spec import ModelSpec

log = logging.getLogger("loadmaster")

ENGINE: Final = "xllamacpp"  # the distribution that llama.cpp comes in
CLIENT: Final = "scheduler.engines.runner_client"
BEGIN_S: Final = 1.0  # how long the first child may take until it has its request
CHILD: Final = Path(__file__).with_name("llama_child.py")
DRY_RUN_CHILD: Final = Path(__file__).with_name("llama_dry_run_child.py")
ENCODER_TENSORS = ("v.", "mm.", "a.", "s.")  # beginnings of the names that encoders' tensors have in Ollama's files
KEY_BYTES = 32
MOST_OTHER_TOKENS = 128  # of a draft model's vocabulary, as llama.cpp has it
MOST_MISPLACED = 16  # models that are named
MOST_CUTS = 1024  # contexts that are remembered as logged

# How threads wait for each other, some hundred times in each token. The wheel is built with OpenMP (so llama.cpp's own
# level of polling is without effect), and libgomp spins 300,000 times before it sleeps: that is fastest for a runner
# alone, but with more threads than cores each thread spins through the time of the others. To sleep at once is slowest
# for a runner alone: it takes longer to wake a thread than to compute. With 300 spins, some 8 µs, a thread waits awake
# for a running thread and asleep for a waiting one: a seventh slower alone than the best, and a third slower than one
# thread each where several runners answer at once (`make bench` compares them). "passive" is for an OpenMP that does
# not know spins; libgomp goes by their number where it is given both.
_WAITING: Mapping[str, str] = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "300"}
# where a debugger is installed, an abort would take seconds, and its backtrace would push the reason out of the output
_ABORTING: Mapping[str, str] = {"GGML_NO_BACKTRACE": "1"}

# Lines that may be told of a runner that has served. In other lines llama.cpp quotes requests, some over several lines;
# in these lines only numbers and names of llama.cpp's own vary.
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
SHARE: Final = "/proc/{}/autogroup"  # share of the processors; a child writes there that it holds back while it loads

Value = TypeVar("Value")


class LlamaProcess(ChildRunner):
    """The engine's handle of one runner."""

    def __init__(
        self,
        report: RunnerListener,
        key: str,
        *,
        gpus: Mapping[str, DeviceId] = MappingProxyType({}),
        kept_bytes: int = 0,
        results_bytes: int = 0,
        misplaced: Callable[[bool], None] = lambda found: None,
        ranks: bool = False,
        log: RunnerLog | None = None,
        holds_back: bool = False,
        prompts: RunnerPrompts | None = None,
        engine_key: str | None = None,
        slots: int = 1,
    ) -> None:
        super().__init__(report, log=log)
        self._key = key
        self._engine_key = engine_key  # of the engine itself, where clients have a gate; None: they have none
        self._prompts = prompts  # None: they are not kept
        self._slots = slots
        self._gpus = gpus  # the GPUs that its layers are on, by the child's names for them
        self._kept_bytes = kept_bytes  # most of the host's memory for kept prompts and for computing
        self._misplaced = (
            misplaced  # told whether its weights are all on the host, although it was to have layers on GPUs
        )
        self._results_bytes = results_bytes  # what an embedder allocates for its results with its first request
        self._holds_back = holds_back  # until the first tick
        self._ranks = ranks  # whether it scores documents, and has no vectors of texts
        self._num_ctx: int | None = None  # context of a slot, once it serves and if it reports it
        self._most_bytes = 0  # most of the host that it can come to hold, without mapped pages; 0: unknown
        self.begun = Latch()  # set when the child has its request, or has ended

    def context_filled(self, timeout_s: float) -> Mapping[DeviceId, int] | None:
        """Return the bytes of the host that may still come once a request has filled a slot's context.

        None before that.

        Two things grow by use after a load. The compute buffers are touched when they are first needed, all of them by
        a long prompt but few by a long answer. Earlier prompts are kept up to a limit. The sizes of both are known. The
        size of the buffer for an embedder's results is not known, but there a text as long as the context shows the
        whole growth at once.
        """
        if self._gone or self._num_ctx is None or not self._most_bytes:
            return None
        largest = largest_sequence(self._url, self._key, timeout_s)
        if largest is None or largest < self._num_ctx - 1:  # the last token is answered with, and not computed
            return None
        return {HOST: max(0, self._most_bytes - self.memory().private_bytes)}

    @property
    def prompts(self) -> RunnerPrompts | None:
        """The prompts of a runner that serves, where they are kept for the next runner; None else."""
        return self._prompts if self._serves and not self._gone else None

    def printed(self, line: str) -> None:
        """Take in a line of the child's protocol; a line that is not of the protocol is ignored."""
        try:
            message = json.loads(line)
            event = message["event"]
        except (ValueError, TypeError, LookupError):
            return
        self.begun.set()
        match event:
            case "loaded":
                if (loaded := loaded_of(message, self._gpus)) is None:
                    return
                self.buffers, self._num_ctx, self._url = loaded.buffers, loaded.num_ctx, loaded.url
                self._serves = True
                weights = {each.device for each in self.buffers if each.kind == "weights"}
                self._misplaced(bool(self._gpus) and weights == {HOST})
                memory = self.memory()
                self._most_bytes = self._most(memory)
                if self._prompts is not None:
                    cells = self._slots * (self._num_ctx or 0)
                    self._prompts.loaded(loaded.engine_url, loaded.restored, self.buffers, cells)
                memory = replace(memory, to_come=self._to_come(memory))
                endpoint = Endpoint(self._url, self._key, self._ranks)
                self._report.loaded(endpoint, self._num_ctx, memory, loaded.flash_attention)
            case "failed":
                self._failure = str(message.get("reason", ""))
            case _:
                self._report.progressed()

    def _most(self, memory: Memory) -> int:
        """Return the most bytes of the host that a runner just loaded can come to hold, without mapped pages.

        0: unknown.
        """
        compute_bytes = sum(each.bytes for each in self.buffers if (each.device, each.kind) == (HOST, "compute"))
        known = self.buffers and memory.private_bytes
        return memory.private_bytes + compute_bytes + self._kept_bytes if known else 0

    def _to_come(self, memory: Memory) -> Mapping[DeviceId, int]:
        """Return the bytes of the host that a loaded runner may still grow by; empty where that is unknown.

        The compute buffers count whole, although a part of them was touched, and so do mapped pages that were not read
        yet. GPUs are left out: their libraries allocate for themselves when they are first used.
        """
        if not self._most_bytes:
            return {}
        filled = [each.bytes for each in self.buffers if each.device == HOST and each.kind != "compute"]
        unread_bytes = max(0, sum(filled) - memory.resident[HOST])
        return {HOST: self._most_bytes - memory.private_bytes + self._results_bytes + unread_bytes}

    def on_tick(self) -> bool:
        """Report progress of a load, and end the holding back of a child that has loaded."""
        self.end_holding_back()
        return super().on_tick() or self._holds_back

    def end_holding_back(self) -> None:
        """Give the child the usual share of the processors, if it has a small one."""
        if self._holds_back:
            with suppress(OSError):  # no such file here, or too many changes at this moment: the next tick tries again
                Path(SHARE.format(self.pid)).write_text("0", encoding="ascii")
                self._holds_back = False

    def ended(self, exit: Exit) -> None:
        """Report how the child ended."""
        self.begun.set()
        if self._prompts is not None:
            self._prompts.ended()
        super().ended(exit)

    def _tellable(self, output: str) -> str:
        for key in (self._key, *([self._engine_key] if self._engine_key is not None else [])):
            output = output.replace(key, "(key)")
        return without_requests(output) if self._serves else output


class LlamaEngine(Engine):
    """Runs the models of `ModelSpec`s; its threads start with the first launch."""

    process_class = LlamaProcess
    has_gate = True  # between clients and an engine that does more than clients may ask for
    gpu_list: EngineList | None = None  # the list of a program that can use GPUs of other makers than NVIDIA

    def __init__(
        self,
        defaults: Options = AUTOMATIC,
        *,
        larger_contexts: bool = False,
        gpus: Callable[[], Sequence[Gpu]] = tuple,
        log_file: Path | None = None,
        prompts: PromptStore | None = None,
        prestart: bool = False,
    ) -> None:
        self._defaults = defaults  # of options that requests leave open
        self._larger_contexts = larger_contexts  # whether an automatic context follows from the GPUs' memory
        self._log = EngineLog(log_file) if log_file is not None else None
        self._prompts = prompts  # None: the prompts of runners end with them
        self._without_prompts: dict[str, None] = {}  # names of models that were logged so
        self._processes = ChildLauncher()
        self._spares = Spares(self._processes, enabled=prestart)
        self._version = installed_version(ENGINE)  # empty where it is not installed
        self._cuts: dict[tuple[str, int], None] = {}  # contexts that were logged as cut, by the model's path
        self._dry_runs = DryRuns(self._processes, _dry_run_program)
        self._misplaced: dict[str, None] = {}  # names of models, each until it is loaded where it was to go
        self._backends: Backends = GpuBackends(self._processes, _backends_program, gpus)
        self._gpus = gpus  # returns those of the last reading

    @property
    def problems(self) -> tuple[str, ...]:
        """That llama.cpp cannot use the GPUs, the models whose memory it did not tell, and why its log is not kept."""
        kept = (self._log.problem,) if self._log is not None and self._log.problem else ()
        misplaced = (
            f"llama.cpp has put no layer of {printable(name)} on the GPUs that were chosen for it: all are on the host"
            for name in tuple(self._misplaced)
        )
        if self._prompts is not None and self._prompts.problem:
            kept = (*kept, self._prompts.problem)
        return (*self._backends.problems, *misplaced, *self._dry_runs.problems, *kept)

    def require(self) -> None:
        """Raise `EngineMissing` if the library is not installed."""
        with suppress(OSError):  # where the library cannot be looked for, its import reports why
            if find_library() is None:
                raise EngineMissing("llama", "pip install 'loadmaster[llama]'")

    def inspect(self, model: ModelSpec, asked: Iterable[Options]) -> ModelProfile:
        """Return what the model's files say, and how it is loaded for these options.

        Where the formulas are not known to hold for the model's architecture in the installed version of llama.cpp, a
        dry run is made: blocks for a quarter of a second, and for some seconds at most. Raises `ModelNotFound` or
        `InvalidModel`.
        """
        if self._spares.untried and not self._gpus():  # else the environment of the load depends on its placement
            self._spares.expect(_program(CHILD, None), find_library())
        info = read_metadata(
            model.path, adapters=model.all_adapters, projectors=model.projectors, embedding=model.embedding
        )
        if model.named_adapters:
            if model.embedding or only_embeds(info):
                raise InvalidModel(model.path, "llama.cpp does not switch the adapters of an embedder: leave them out")
            if not self.has_gate:
                raise InvalidModel(model.path, f"its adapters can be switched by {ENGINE} alone: name them as adapters")
            info = replace(info, switched=True)
        info = _with_draft(info, model)
        asked, usable = tuple(asked), self._backends.usable()
        self._tell_of_cuts(model, info, asked)
        profile = replace(self.profile(info, asked), gpu_libraries=usable)
        if holds(info, self._version) or find_library() is None:
            return profile
        key = secrets.token_urlsafe(KEY_BYTES)  # of no server, but every request names one
        loads = {}
        for load in loads_of(profile):
            sized, settings = sized_options(load.options), LlamaSettings.decoded(load.settings)
            loads[sized] = self._request(model, sized, settings, Placement(()), key)
        told = self._dry_runs.sizes(model.name, profile.fingerprint, loads)
        if reason := self._dry_runs.why_unusable(profile.fingerprint):
            raise InvalidModel(model.path, f"llama.cpp refuses it: {reason}{_way_out(info)}")
        return replace(self.profile(info, asked, told), gpu_libraries=usable)

    def _tell_of_cuts(self, model: ModelSpec, info: ModelInfo, asked: Iterable[Options]) -> None:
        """Log, once each, the contexts that are asked for and that are cut to what the model was trained with."""
        for num_ctx in {options.num_ctx or 0 for options in asked}:
            if 0 < info.context_trained < num_ctx and (cut := (model.path, num_ctx)) not in self._cuts:
                self._cuts[cut] = None
                if len(self._cuts) > MOST_CUTS:
                    del self._cuts[next(iter(self._cuts))]
                log.warning(
                    "%s was trained with %d tokens: a num_ctx of %d is cut to that",
                    model.name, info.context_trained, num_ctx,
                )  # fmt: skip

    def profile(self, info: ModelInfo, asked: Iterable[Options], told: Told = NOTHING_TOLD) -> ModelProfile:
        """Return how a model of this metadata is loaded for these options, without a dry run.

        A model that can do nothing but embed is an embedder, whether or not it was asked for as one.
        """
        if only_embeds(info):
            info = replace(info, embedding=True)
        if not told and holds(info, self._version):
            return profile_of(info, asked, self._defaults, larger_contexts=self._larger_contexts)
        return profile_of(info, asked, self._defaults, larger_contexts=self._larger_contexts, told=told)

    def launch(
        self, model: ModelSpec, options: Options, settings: EngineSettings, placement: Placement, report: RunnerListener
    ) -> LlamaProcess:
        """Start a child that loads the model, and return at once; a program's first launch imports the HTTP client.

        Raises `ModelNotFound` if the file was removed since its inspection, and RuntimeError once the engine is closed
        and in a fork.
        """
        if not os.path.exists(model.path):
            raise ModelNotFound(model.path)
        key, resolved = secrets.token_urlsafe(KEY_BYTES), LlamaSettings.decoded(settings)
        if resolved.embedding and not model.embedding:
            model = replace(model, embedding=True)
        request = self._request(model, options, resolved, placement, key)
        prompts = self._prompts_of(model, options)
        request["prompts"] = None if prompts is None else prompts.request()
        request["engine_key"] = engine_key = self._engine_key(model, prompts)
        gpus = [device for device, _ in placement.gpu_layers]
        names, variables = self._backends.names(gpus)
        process = self.process_class(
            report,
            key,
            gpus=dict(zip(names, gpus, strict=True)),
            kept_bytes=resolved.kept_bytes + (0 if _has_projector_on_gpu(placement) else resolved.projector_work_bytes),
            results_bytes=resolved.results_bytes,
            misplaced=lambda found: self._note_misplaced(model.name, found),
            ranks=model.embedding and resolved.pooling == RANKS,
            log=self._log.of_runner(model.name, engine_key or key) if self._log is not None else None,
            prompts=prompts,
            engine_key=engine_key,
            slots=_there(options.num_parallel),
            holds_back=placement.holds_back,
        )
        process.child = self._start(model, request, names, variables, process)
        import_client(process.begun)
        return process

    def _start(
        self,
        model: ModelSpec,
        request: Request,
        gpus: Sequence[str],
        variables: Mapping[str, str],
        process: LlamaProcess,
    ) -> Child:
        return self._spares.start(_program(CHILD, request, variables), request["library"], process)

    def _engine_key(self, model: ModelSpec, prompts: RunnerPrompts | None) -> str | None:
        """Return the key of an engine behind a gate; None where clients may ask the engine for whatever it does."""
        if prompts is not None:
            return prompts.key
        return secrets.token_urlsafe(KEY_BYTES) if model.all_adapters and self.has_gate else None

    def _prompts_of(self, model: ModelSpec, options: Options) -> RunnerPrompts | None:
        """Return the prompts of a runner that is launched; None where none are kept of it.

        llama.cpp saves none beside a projector. Of adapters it does not save with which scale, which each request may
        choose, a prompt was computed: with another scale it would be a wrong one.
        """
        if self._prompts is None or model.embedding:
            return None
        reasons = {"a projector": model.projectors, "adapters": model.all_adapters, "a draft model": model.draft}
        if reason := next((reason for reason, there in reasons.items() if there), ""):
            if model.name not in self._without_prompts and len(self._without_prompts) < MOST_MISPLACED:
                self._without_prompts[model.name] = None
                log.warning("%s: its prompts are not kept, as llama.cpp cannot save them with %s", model.name, reason)
            return None
        folder, identity = self._prompts.folder(), identity_of(model)
        if folder is None or identity is None:
            return None
        return RunnerPrompts(self._prompts, str(folder), model.name, (model.id, identity, without_place(options)))

    def forget_prompts(self, model: ModelId) -> None:
        """Remove what is kept of the prompts of a model."""
        if self._prompts is not None:
            self._prompts.forget(model)

    def _note_misplaced(self, name: str, found: bool) -> None:
        if not found:
            self._misplaced.pop(name, None)
        elif len(self._misplaced) < MOST_MISPLACED:
            self._misplaced[name] = None

    def look_round(self, room: Callable[[], int]) -> None:
        """Keep a child ready for the next load, if that was wanted and while the host has room for it."""
        self._spares.look_round(room)

    def spare_bytes(self) -> int:
        """Return the bytes of the host that the child holds which is kept ready; 0 where there is none."""
        return self._spares.held_bytes()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Kill every child that is left, reap it, and end the threads; in a fork this does nothing."""
        if not self._processes.close(timeout_s):
            log.warning("a child process could not be ended within %g s", timeout_s)
        if self._log is not None and not self._log.close(timeout_s):
            log.warning("the engine log could not be written within %g s", timeout_s)
        if self._prompts is not None and not self._prompts.close(timeout_s):
            log.warning("kept prompts could not be removed within %g s", timeout_s)

    def _request(
        self, model: ModelSpec, explicit: Options, settings: LlamaSettings, placement: Placement, key: str
    ) -> Request:
        """Return the request that the child is sent."""
        cores = explicit.num_thread or usable_cores()
        threads = placement.threads or Threads(cores, cores)  # not allocated where the engine is used by itself
        named = model.named_adapters.values()
        return {
            "parent": os.getpid(),
            "library": find_library(),
            "key": key,
            "name": model.name,
            "model": model.path,
            "adapters": [*((file, 1.0) for file in model.adapters), *((file, 0.0) for file in named)],
            "projector": model.projectors[0] if model.projectors else None,
            "projector_on_gpu": _has_projector_on_gpu(placement),
            "draft": model.draft or None,
            "draft_num_predict": explicit.draft_num_predict or 0,
            "context_shift": bool(explicit.context_shift),
            "embedding": settings.embedding,
            "pooling": settings.pooling,
            "num_ctx": _there(explicit.num_ctx),
            "num_parallel": _there(explicit.num_parallel),
            "num_batch": _there(explicit.num_batch),
            "num_micro_batch": settings.num_micro_batch,
            "prompt_cache_mib": settings.prompt_cache_mib,
            "num_checkpoints": settings.num_checkpoints,
            "num_thread": threads.answers,
            "num_thread_prompt": threads.prompts,
            "use_mmap": settings.use_mmap if placement.gpu_layers else settings.use_mmap_on_host,
            "flash_attention": explicit.flash_attention,
            "cache_type_k": _there(explicit.cache_type_k),
            "cache_type_v": _there(explicit.cache_type_v),
            "holds_back": placement.holds_back,
            "gpu_layers": [layers for _, layers in placement.gpu_layers],
            "prompts": None,
            "engine_key": None,
        }


def import_client(begun: Latch) -> None:
    """Import what the first answer of a program needs, while the first child loads its model.

    Waits until the child has begun: the threads that hand it the request would get the interpreter's lock only every
    5 ms, and lose some 30 ms.
    """
    if CLIENT not in sys.modules:
        begun.wait(BEGIN_S)
        importlib.import_module(CLIENT)


def _with_draft(info: ModelInfo, model: ModelSpec) -> ModelInfo:
    """Return what is known of a model, with its draft model; raises `InvalidModel` where they have other tokens."""
    if not model.draft:
        return info
    draft = read_metadata(model.draft)
    if draft.tokenizer != info.tokenizer or abs(draft.vocabulary - info.vocabulary) > MOST_OTHER_TOKENS:
        raise InvalidModel(model.draft, f"it has other tokens than {model.path}, so it cannot guess its answers")
    return replace(info, draft=draft)


def _has_projector_on_gpu(placement: Placement) -> bool:
    return bool(placement.gpu_layers) and not placement.projector_on_host


def _way_out(info: ModelInfo) -> str:
    """Return what to do about a model that llama.cpp refuses, where it is known."""
    if any(name.startswith(ENCODER_TENSORS) for name in info.unknown):
        return (
            ". It has an encoder and a language model in one file, as Ollama's own engine reads them: take the GGUF "
            "files for llama.cpp, a model and a projector (mmproj)"
        )
    return ". Take another conversion of it, or upgrade loadmaster[llama] if the file is newer"


def _program(
    child: Path, question: Request | DryRun | None, variables: Mapping[str, str] = MappingProxyType({})
) -> Program:
    """Return a program of ours with these variables, without the user's start-up code and other packages' code.

    Unless a variable says so, it sees no GPU.
    """
    return Program(
        arguments=(sys.executable, "-I", "-S", str(child)),
        environment={**child_environment(os.environ), VISIBLE_GPUS: "", **variables},
        input=json.dumps(question).encode() + b"\n",
    )


def _dry_run_program(loads: Sequence[Request]) -> Program:
    base = loads[0]
    others = [{name: value for name, value in load.items() if value != base.get(name)} for load in loads]
    return _program(DRY_RUN_CHILD, {"parent": os.getpid(), "library": find_library(), "base": base, "loads": others})


def _backends_program() -> Program | None:
    """Return the program that asks llama.cpp for its backends, and sees the GPUs that this program does."""
    if (library := find_library()) is None:
        return None
    return Program((sys.executable, "-I", "-S", "-c", QUESTION, library), child_environment(os.environ))


def find_library() -> str | None:
    """Return the folder that holds the xllamacpp package, without importing it; None if it is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent.parent)


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the part of `environment` that a child gets; it sees the GPUs that this program does."""
    return {**kept_environment(environment), **_WAITING, **_ABORTING}


def without_requests(output: str) -> str:
    """Return the lines of a server's output that cannot quote a request: where the server failed, and why."""
    found = (_OF_ITSELF.fullmatch(without_stamp(line)) for line in output.splitlines())
    return "\n".join(match[match.lastindex or 0] for match in found if match is not None)


def _there(value: Value | None) -> Value:
    """Return an option that has been resolved; raises ValueError where it has not."""
    if value is None:
        raise ValueError("an option is not resolved")
    return value
