"""What a GGUF model says of itself, as placement needs it: files in, ModelInfo out, in milliseconds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fsm.model import ModelInfo
from scheduler.errors import InvalidModel
from scheduler.header import Header, Tensor, read_header

LARGEST_NUMBER = (1 << 32) - 1  # of a count or length in the metadata; llama.cpp keeps them in 32 bits

_BLOCK = re.compile(r"(?:enc\.|dec\.)?blk\.(\d+)\.")
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def read_metadata(
    path: str, *, adapters: Sequence[str] = (), projectors: Sequence[str] = (), embedding: bool = False
) -> ModelInfo:
    """Return what placement needs to know of the model at `path`, with its adapters and projectors.

    Raises ModelNotFound for a file that is not there, and InvalidModel, with the file, the reason and where known the
    offset, for one that is not complete and sound; a split model is given by its first part. Only headers are read:
    milliseconds, or tens of them for a large vocabulary. May be called from any thread.
    """
    parts = _read_parts(path)
    beside = [read_header(name) for name in (*adapters, *projectors)]
    vision = any(_sees(projector) for projector in beside[len(adapters) :])
    info = _model_info(parts, embedding=embedding, vision=vision)
    sizes = [each.file_bytes for each in beside]
    return replace(info, adapters_bytes=sum(sizes[: len(adapters)]), projectors_bytes=sum(sizes[len(adapters) :]))


def _read_parts(path: str) -> list[Header]:
    """Return the headers of all parts of a split model, or of the one file that it is."""
    first = read_header(path)
    count = _number(first, "split.count", default=1)
    if count <= 1:
        return [first]
    named = _PART.search(path)
    if named is None or int(named[1]) != 1 or int(named[2]) != count:
        raise InvalidModel(path, f"it is one of {count} parts: name the first, which ends in -00001-of-{count:05}.gguf")
    stem = path[: named.start()]
    return [first, *(read_header(f"{stem}-{part:05}-of-{count:05}.gguf") for part in range(2, count + 1))]


def _sees(projector: Header) -> bool:
    """Whether a projector is for images; one that says nothing is, as the first ones were."""
    sound_only = _number(projector, "clip.has_audio_encoder", default=0) > 0
    return _number(projector, "clip.has_vision_encoder", default=0 if sound_only else 1) > 0


def _model_info(parts: Sequence[Header], *, embedding: bool, vision: bool) -> ModelInfo:
    """Put the figures together; what the metadata leave out is taken as llama.cpp takes it."""
    header = parts[0]
    tensors = [tensor for part in parts for tensor in part.tensors]
    architecture = _architecture(header)
    blocks = _number(header, f"{architecture}.block_count")
    if blocks > len(tensors):
        raise _wrong(header, f"{architecture}.block_count", f"is {blocks}, with {len(tensors)} tensors")
    width = _number(header, f"{architecture}.embedding_length")
    heads = _by_layer(header, f"{architecture}.attention.head_count", blocks, default=(0,) * blocks)
    most_heads = max(heads, default=0)
    head_size = width // most_heads if most_heads else 0
    layers_bytes, input_bytes, output_bytes = _weigh(tensors, blocks)
    return ModelInfo(
        architecture=architecture,
        context_trained=_number(header, f"{architecture}.context_length"),
        embedding_length=width,
        feed_forward_length=_feed_forward(header, architecture),
        vocabulary=_number(header, f"{architecture}.vocab_size", header.lengths.get("tokenizer.ggml.tokens", 0)),
        heads=most_heads,
        heads_kv=_by_layer(header, f"{architecture}.attention.head_count_kv", blocks, default=heads),
        key_length=_number(header, f"{architecture}.attention.key_length", head_size),
        value_length=_number(header, f"{architecture}.attention.value_length", head_size),
        sliding_window=_number(header, f"{architecture}.attention.sliding_window", 0),
        layers_bytes=layers_bytes,
        input_bytes=input_bytes,
        output_bytes=output_bytes,
        file_bytes=sum(part.file_bytes for part in parts),
        embedding=embedding,
        vision=vision or _number(header, f"{architecture}.vision.block_count", 0) > 0,
    )


def _architecture(header: Header) -> str:
    architecture = header.values.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise _wrong(header, "general.architecture", "is missing or no text")
    if architecture == "clip" or header.values.get("general.type") == "mmproj":
        raise InvalidModel(header.path, "it is a projector, not a model: give it beside the model that it is for")
    if header.values.get("general.type") == "adapter":
        raise InvalidModel(header.path, "it is an adapter, not a model: give it beside the model that it is for")
    return architecture


def _wrong(header: Header, key: str, what: str) -> InvalidModel:
    return InvalidModel(header.path, f"the key {key[:80]!r} {what}", header.offsets.get(key))


def _number(header: Header, key: str, default: int | None = None) -> int:
    """Return a count or length; of an array by layer the largest; without a default the key must be there."""
    match header.values.get(key, default):
        case int(number) if 0 <= number <= LARGEST_NUMBER:
            return number
        case tuple(numbers) if numbers and min(numbers) >= 0 and max(numbers) <= LARGEST_NUMBER:
            return max(numbers)
        case None if key not in header.values:
            raise _wrong(header, key, "is missing")
        case _:
            raise _wrong(header, key, "has no usable value")


def _by_layer(header: Header, key: str, blocks: int, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return one number for each layer, from one for all or from an array; a short array goes on with its last."""
    if key not in header.values:
        return default
    largest = _number(header, key)  # checks them all
    numbers = header.values[key]
    if not isinstance(numbers, tuple):
        return (largest,) * blocks
    return numbers[:blocks] + numbers[-1:] * (blocks - len(numbers))


def _feed_forward(header: Header, architecture: str) -> int:
    """Return the width of what is computed at once: the dense layers', or that of all experts in use."""
    dense = _number(header, f"{architecture}.feed_forward_length", 0)
    used = _number(header, f"{architecture}.expert_used_count", 0)
    expert = _number(header, f"{architecture}.expert_feed_forward_length", dense)
    return max(dense, min(used * expert, LARGEST_NUMBER))


def _weigh(tensors: Iterable[Tensor], blocks: int) -> tuple[tuple[int, ...], int, int]:
    """Return the bytes of each layer, of what stays on the host, and of the output."""
    layers_bytes = [0] * blocks
    input_bytes = output_bytes = 0
    for tensor in tensors:
        block = _BLOCK.match(tensor.name)
        if block and int(block[1]) < blocks:
            layers_bytes[int(block[1])] += tensor.bytes
        elif tensor.name.startswith("output"):
            output_bytes += tensor.bytes
        else:
            input_bytes += tensor.bytes
    return tuple(layers_bytes), input_bytes, output_bytes
