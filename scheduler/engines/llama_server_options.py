"""The arguments of a `llama-server`: what llama.cpp's child is told by parameters, told in words of the command line.

Which of its options a server knows is read from what it tells with `--help`, since they have changed over the years.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from scheduler.engines.llama_child import LOOKED_FOR, MOST_CONTEXTS

if TYPE_CHECKING:
    from scheduler.engines.llama_child import Request

# Without these a server cannot be had as a runner is: they came, one after the other, until September 2025.
NEEDED: Final = (
    "--alias", "--api-key-file", "--batch-size", "--cache-type-k", "--cache-type-v", "--ctx-size", "--device",
    "--embeddings", "--flash-attn", "--gpu-layers", "--host", "--log-prefix", "--log-timestamps", "--lora", "--metrics",
    "--mmproj", "--model", "--no-slots", "--offline", "--parallel", "--pooling", "--port", "--tensor-split",
    "--threads", "--threads-batch", "--threads-http", "--ubatch-size", "--verbosity",
)  # fmt: skip
HTTP_THREADS: Final = 32
DETAILS: Final = 4  # level of the log at which sizes of buffers are told
# what a server does that a runner must not, and how it is told, by what it knows; older ones do not do it
_PREVENTED: Final = (
    ("--fit", ("off",)),  # the placement is decided already
    ("--no-kv-unified", ()),  # each slot has cells of its own
    ("--cors-origins", ("localhost",)),
    ("--no-cors-credentials", ()),
)
_COLUMN: Final = 40  # of the help's text in which what is told of an option begins
_OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")
_CHOICES = re.compile(r"\{([\w,]+)\}|\[(\w+(?:\|\w+)+)\]|allowed values: ([\w, ]+)")


def known_options(help: str) -> Mapping[str, tuple[str, ...]]:
    """Return the options that a server tells of with `--help`, each with the values that it takes; none: any."""
    found: dict[str, tuple[str, ...]] = {}
    for entry in re.split(r"\n(?=-)", help):
        first, *more = entry.splitlines() or [""]
        head = first[:_COLUMN] if first[_COLUMN - 1 : _COLUMN] == " " else first
        if not head.startswith("-"):
            continue
        choices = _CHOICES.search(" ".join([head, first[len(head) :], *(line.strip() for line in more)]))
        values = next(filter(None, choices.groups())) if choices is not None else ""
        found |= dict.fromkeys(_OPTION.findall(head), tuple(re.findall(r"\w+", values)))
    return found


def missing(known: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the options without which a server is too old; flash attention was a mere switch once."""
    return [name for name in NEEDED if name not in known or (name == "--flash-attn" and "auto" not in known[name])]


def arguments(request: Request, known: Mapping[str, tuple[str, ...]], gpus: Sequence[str] = ()) -> list[str]:
    """Return a server's arguments for a request, but for its key; `gpus` are the server's names for its GPUs.

    Raises ValueError for a value that the server does not know, or that it would take for several.
    """
    return [
        *_sizes(request, known), *_files(request, known), *_guesses(request, known, gpus),
        *_place(request, known, gpus), *_locked_down(known),
    ]  # fmt: skip


def _sizes(request: Request, known: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Yield what a runner's memory depends on, and how it computes."""
    slots = request["num_parallel"]
    yield from ("--parallel", str(slots), "--ctx-size", str(request["num_ctx"] * slots))
    yield from ("--batch-size", str(request["num_batch"]), "--ubatch-size", str(request["num_micro_batch"]))
    yield from ("--threads", str(request["num_thread"]), "--threads-batch", str(request["num_thread_prompt"]))
    for option in ("--cache-type-k", "--cache-type-v"):
        value = request["cache_type_k"] if option == "--cache-type-k" else request["cache_type_v"]
        yield from _chosen(option, value, known)
    used = request["flash_attention"]
    yield from ("--flash-attn", "auto" if used is None else "on" if used else "off")
    if request["context_shift"]:
        yield from ("--context-shift", "--n-predict", str(MOST_CONTEXTS * request["num_ctx"]))
    if "--cache-ram" in known:
        yield from ("--cache-ram", str(request["prompt_cache_mib"]))
    checkpoints = next((name for name in ("--ctx-checkpoints", "--swa-checkpoints") if name in known), None)
    if checkpoints is not None:
        yield from (checkpoints, str(request["num_checkpoints"]))
    if request["embedding"]:
        yield "--embeddings"
        if request["pooling"] is not None:
            yield from _chosen("--pooling", request["pooling"], known)


def _files(request: Request, known: Mapping[str, object]) -> Iterator[str]:
    """Yield the files, and how the model's own is read."""
    yield from ("--model", request["model"], "--alias", request["name"].replace(",", "_"))  # else it has several names
    for path, _ in request["adapters"]:
        if "," in path:
            raise ValueError(f"llama-server takes a name with a comma for several: rename {path}")
        yield from ("--lora", path)
    if request["projector"] is not None:
        yield from ("--mmproj", request["projector"])
        if not request["projector_on_gpu"]:
            yield "--no-mmproj-offload"
    use_mmap = request["use_mmap"]
    if use_mmap is not None and "--load-mode" in known:
        yield from ("--load-mode", "mmap" if use_mmap else "none")
    elif use_mmap is False:
        yield "--no-mmap"


def _guesses(request: Request, known: Mapping[str, object], gpus: Sequence[str]) -> Iterator[str]:
    """Yield how tokens are guessed ahead; raises ValueError for a server that is too old for it."""
    if not (most := request["draft_num_predict"]):
        return
    if "--spec-type" not in known:
        raise ValueError("this llama-server is too old to guess tokens ahead: leave draft_num_predict out")
    if request["draft"] is None:
        yield from ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-m", str(most))
        yield from ("--spec-ngram-simple-size-n", str(min(most, LOOKED_FOR)))
        return
    on_gpu = bool(request["gpu_layers"]) and request["projector_on_gpu"]
    yield from ("--spec-type", "draft-simple", "--spec-draft-model", request["draft"], "--spec-draft-n-max", str(most))
    yield from ("--spec-draft-device", gpus[0] if on_gpu else "none", "--spec-draft-ngl", "all" if on_gpu else "0")


def _place(request: Request, known: Mapping[str, object], gpus: Sequence[str]) -> Iterator[str]:
    """Yield where the layers go: on these GPUs, in their order, or on the host where there are none."""
    layers = request["gpu_layers"]
    if not layers:
        yield from ("--device", "none")
        if "--no-warmup" in known:
            yield "--no-warmup"  # on the host it would only delay the first token
        return
    yield from ("--device", ",".join(gpus))
    yield from ("--gpu-layers", str(sum(layers)), "--tensor-split", ",".join(map(str, layers)))


def _locked_down(known: Mapping[str, object]) -> Iterator[str]:
    """Yield what has it serve this machine only, fetch nothing, and show no client what others have asked."""
    yield from ("--host", "127.0.0.1", "--port", "0")  # the kernel picks a port, and the server logs it
    yield from ("--offline", "--no-slots", "--metrics", "--threads-http", str(HTTP_THREADS))
    yield from ("--log-prefix", "--log-timestamps", "--verbosity", str(DETAILS))
    yield next(name for name in ("--no-ui", "--no-webui") if name in known or name == "--no-webui")
    if "--jinja" in known:
        yield "--jinja"
    for option, values in _PREVENTED:
        if option in known:
            yield from (option, *values)


def _chosen(option: str, value: str, known: Mapping[str, tuple[str, ...]]) -> tuple[str, str]:
    """Return an option with its value; raises ValueError where the server tells other values."""
    if known.get(option) and value not in known[option]:
        raise ValueError(
            f"{value!r} is not one of what this llama-server knows as {option}: {', '.join(known[option])}"
        )
    return option, value
