"""What the files of a model tell of it, for a client or a person to read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scheduler.models.gguf_constants import gguf_constants
from scheduler.models.gguf_header import Tensor, Value, read_header, read_text
from scheduler.models.gguf_metadata import read_metadata, read_parts, sees
from scheduler.models.model_spec import ModelSpec

TEMPLATE = "tokenizer.chat_template"
FILE_TYPE = "general.file_type"

# What a chat template does not do without these words. llama.cpp finds out by rendering it, after the load.
_TOOLS = re.compile(r"\btools\b")
_THINKS = re.compile(r"enable_thinking|reasoning_effort|\bthinking\b|<think>|\[THINK\]")
_FILLS_IN = ("fim_pre_token_id", "prefix_token_id")  # keys of the tokens around a gap, the second being the older one


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the files of a model tell of it."""

    architecture: str
    parameters: int  # elements of all tensors of a type that the gguf package knows
    quantisation: str  # as in the names of files: Q4_K_M
    template: str  # of its chats, in Jinja; empty: the file has none
    values: Mapping[str, Value]  # of the model's first file, by key; None: a long text or array
    # some of completion, tools, thinking, insert, vision, audio, embedding and rerank, in this order
    capabilities: tuple[str, ...]
    file_bytes: int  # of all its files


def read_card(spec: ModelSpec) -> ModelCard:
    """Return what the files of a model tell of it; raises `ModelNotFound` or `InvalidModel`.

    Headers are read, and the chat template, in milliseconds.
    """
    info = read_metadata(
        spec.path, adapters=spec.all_adapters, projectors=spec.projectors, embedding=spec.embedding
    )  # checks them all
    parts = read_parts(spec.path)
    values, template = parts[0].values, read_text(spec.path, TEMPLATE)
    projectors = [read_header(path) for path in spec.projectors]
    embeds = info.pooling is not None or not info.causal
    able = {
        "completion": not embeds,
        "tools": not embeds and bool(_TOOLS.search(template)),
        "thinking": not embeds and bool(_THINKS.search(template)),
        "insert": any(f"tokenizer.ggml.{key}" in values for key in _FILLS_IN),
        "vision": info.vision or any(map(sees, projectors)),
        "audio": any(each.values.get("clip.has_audio_encoder") for each in projectors),
        "embedding": embeds and info.pooling != "rank",
        "rerank": info.pooling == "rank",
    }
    return ModelCard(
        architecture=info.architecture,
        parameters=_elements(tensor for part in parts for tensor in part.tensors),
        quantisation=_quantisation(values.get(FILE_TYPE)) or info.quantisation,
        template=template,
        values=values,
        capabilities=tuple(name for name, there in able.items() if there),
        file_bytes=info.file_bytes + info.adapters_bytes + info.projectors_bytes,
    )


def _elements(tensors: Iterable[Tensor]) -> int:
    blocks = {kind.name: sizes for kind, sizes in gguf_constants().GGML_QUANT_SIZES.items()}
    known = [tensor for tensor in tensors if tensor.type in blocks]
    return sum(tensor.bytes // blocks[tensor.type][1] * blocks[tensor.type][0] for tensor in known)


def _quantisation(file_type: Value) -> str:
    """Return the name of a file's type, which its largest tensors have; empty where it is not known."""
    kinds = gguf_constants().LlamaFileType
    names = {kind.value: kind.name for kind in kinds if kind is not kinds.GUESSED}
    name = names.get(file_type, "") if isinstance(file_type, int) else ""
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


def shown_count(count: int) -> str:
    """Return a number of parameters as Ollama shows it: "7.6B", "494.03M"."""
    for unit, name, digits in ((1e9, "B", 1), (1e6, "M", 2), (1e3, "K", 0)):
        if count >= unit:
            number = count / unit
            return f"{number:.{0 if number == math.floor(number) else digits}f}{name}"
    return str(count)
