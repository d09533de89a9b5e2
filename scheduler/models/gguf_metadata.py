"""The metadata of a GGUF model that placement needs: files in, `ModelInfo` out, in milliseconds."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import MappingProxyType

from scheduler.errors.exceptions import InvalidModel, ModelNotFound
from scheduler.models.gguf_constants import gguf_constants
from scheduler.models.gguf_header import Header, Tensor, read_header
from scheduler.models.model_info import ModelInfo, Recurrence
from scheduler.models.model_spec import MOST_PARTS

LARGEST_NUMBER = (1 << 32) - 1  # of a count or length in the metadata; llama.cpp keeps them in 32 bits

# Of this many layers in a row one has full attention, the last or else the first, and the others see the sliding window
# only, as llama.cpp's loaders have it; the file may name another number, or give it layer by layer. Other architectures
# with sliding windows are counted with full attention, which is more than they take.
SLIDING_PERIOD: Mapping[str, int] = MappingProxyType(
    {
        "afmoe": 4,
        "cohere2": 4,
        "cohere2moe": 4,
        "exaone-moe": 4,
        "exaone4": 4,
        "gemma-embedding": 6,
        "gemma2": 2,
        "gemma3": 6,
        "gemma3n": 5,
        "gpt-oss": 2,
        "olmo2": 4,
        "plamo3": 8,
        "smallthinker": 4,
    }
)
FULL_ATTENTION_FIRST = frozenset({"cohere2moe", "smallthinker"})

# Tensors that llama.cpp leaves on the host, where they are looked up in; all others that are of no layer go with the
# output, as far as it does.
_LOOKED_UP = ("token_embd", "position_embd", "token_types", "per_layer_token_embd")

_BLOCK = re.compile(r"(?:enc\.|dec\.)?blk\.(\d+)\.")
_BID = re.compile(r"\.\d+\.")
_STATE = re.compile(r"\.(?:ssm_|shortconv\.|time_mix_)")  # tensors of layers that keep a state
_KEYS = re.compile(r"\.attn_k(?:_b|v_a_mqa)?\.")  # tensors of layers that have keys
_DENSE = re.compile(r"\.(?:ffn_up|channel_mix_key)\.weight$")
_GATED = re.compile(r"\.ffn_(?:gate|up)(?:_exps)?\.weight$")
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def read_metadata(
    path: str, *, adapters: Sequence[str] = (), projectors: Sequence[str] = (), embedding: bool = False
) -> ModelInfo:
    """Return what placement needs to know of the model at `path`, with its adapters and projectors.

    Raises ModelNotFound for a file that does not exist, and InvalidModel, with the file, the reason and where known the
    offset, for a file that is not complete and sound. A split model is given by its first part. Only headers are read,
    in milliseconds, or tens of milliseconds for a large vocabulary. Any thread may call this.
    """
    parts = read_parts(path)
    beside = [*(_read_adapter(name, parts[0]) for name in adapters), *(_read_projector(name) for name in projectors)]
    seeing = [projector for projector in beside[len(adapters) :] if sees(projector)]
    info = _model_info(parts, embedding=embedding, vision=bool(seeing))
    sizes = [each.file_bytes for each in beside]
    return replace(
        info,
        adapters_bytes=sum(sizes[: len(adapters)]),
        projectors_bytes=sum(sizes[len(adapters) :]),
        digest=_digest([*parts, *beside]),
        unknown=_unknown(parts),
        image_bytes=max((12 * _number(each, "clip.vision.image_size", 0) ** 2 for each in seeing), default=0),
    )


def read_parts(path: str) -> list[Header]:
    """Return the headers of all parts of a split model, or of the model's only file."""
    first = read_header(path)
    count = _number(first, "split.count", default=1)
    if count <= 1:
        return [first]
    named = _PART.search(path)
    if named is None or int(named[1]) != 1 or int(named[2]) != count:
        raise InvalidModel(path, f"it is one of {count} parts: name the first, which ends in -00001-of-{count:05}.gguf")
    if count > MOST_PARTS:
        raise InvalidModel(path, f"it is one of {count:,} parts, and there may be at most {MOST_PARTS:,}")
    stem = path[: named.start()]
    parts: list[Header] = []
    seen: set[str] = set()  # names of tensors
    for place in range(count):  # each part is checked before the next is read, as llama.cpp does
        part = first if place == 0 else read_header(f"{stem}-{place + 1:05}-of-{count:05}.gguf")
        if (_number(part, "split.no"), _number(part, "split.count")) != (place, count):
            raise _wrong(part, "split.no", f"or split.count is not that of part {place + 1} of {count}")
        names = {tensor.name for tensor in part.tensors}
        if names & seen:
            raise InvalidModel(part.path, f"its tensor {min(names & seen)!r} is also in a part before it")
        seen |= names
        parts.append(part)
    if (expected := _number(first, "split.tensors.count")) != len(seen):
        raise _wrong(first, "split.tensors.count", f"is {expected}, and there are {len(seen)} in the {count} parts")
    return parts


def _unknown(parts: Sequence[Header]) -> tuple[str, ...]:
    """Return the tensors that the gguf package does not know, of a model of this architecture or by their type.

    An architecture that the package does not know has none.
    """
    names = _tensor_names().get(_architecture(parts[0]))
    return tuple(
        tensor.name
        for part in parts
        for tensor in part.tensors
        if not tensor.known_type or (names is not None and not _is_known(tensor.name, names))
    )


def _is_known(name: str, names: frozenset[str]) -> bool:
    name = _BID.sub(".{bid}.", name)
    return name in names or name.rpartition(".")[0] in names


@cache
def _tensor_names() -> Mapping[str, frozenset[str]]:
    """Return the names of tensors by architecture, without their endings, as the gguf package has them."""
    constants = gguf_constants()
    return {
        constants.MODEL_ARCH_NAMES[architecture]: frozenset(constants.TENSOR_NAMES[tensor] for tensor in tensors)
        for architecture, tensors in constants.MODEL_TENSORS.items()
    }


def _read_adapter(path: str, model: Header) -> Header:
    """Return the header of an adapter; raises `InvalidModel` where it is none, or for another kind of model."""
    header = read_header(path)
    if header.values.get("general.type") != "adapter":
        raise _wrong(header, "general.type", "does not say that it is an adapter, which it was given as")
    if (architecture := header.values.get("general.architecture")) != model.values.get("general.architecture"):
        raise _wrong(header, "general.architecture", f"is {architecture!r}, which is not that of the model")
    return header


def _read_projector(path: str) -> Header:
    """Return the header of a projector; raises `InvalidModel` where it is none."""
    if not _is_projector(header := read_header(path)):
        raise _wrong(header, "general.architecture", "does not say that it is a projector, which it was given as")
    return header


def _is_projector(header: Header) -> bool:
    return header.values.get("general.architecture") == "clip" or header.values.get("general.type") == "mmproj"


def is_projector_for(path: str, model: str) -> bool:
    """Return whether a file is a projector that ends in the width of a model, as far as the two files tell.

    The first projectors did not say into what they project. A file that cannot be read is none.
    """
    try:
        projector, header = read_header(path), read_header(model)
        if not _is_projector(projector):
            return False
        wide = _number(header, f"{_architecture(header)}.embedding_length")
    except (InvalidModel, ModelNotFound):
        return False
    widths = {projector.values.get(f"clip.{what}projection_dim") for what in ("", "vision.", "audio.")} - {None}
    return not widths or wide in widths or projector.values.get("general.type") != "mmproj"


def sees(projector: Header) -> bool:
    """Return whether a projector is for images, as a projector is that does not say: the first ones did not."""
    sound_only = _number(projector, "clip.has_audio_encoder", default=0) > 0
    return _number(projector, "clip.has_vision_encoder", default=0 if sound_only else 1) > 0


def _model_info(parts: Sequence[Header], *, embedding: bool, vision: bool) -> ModelInfo:
    """Return the figures of a model; what the metadata leave out is taken as llama.cpp takes it."""
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
    layers, others = _layers(tensors, blocks)
    for layer in range(blocks - _predicting(header, architecture, blocks), blocks):
        layers[layer] = []
    input_bytes = sum(tensor.bytes for tensor in others if tensor.name.startswith(_LOOKED_UP))
    info = ModelInfo(
        architecture=architecture,
        context_trained=_number(header, f"{architecture}.context_length"),
        embedding_length=width,
        feed_forward_length=_feed_forward(header, architecture, layers),
        vocabulary=_vocabulary(header, architecture),
        heads=most_heads,
        heads_kv=_by_layer(header, f"{architecture}.attention.head_count_kv", blocks, default=heads),
        key_length=_number(header, f"{architecture}.attention.key_length", head_size),
        value_length=_value_length(header, architecture, head_size),
        sliding_window=_number(header, f"{architecture}.attention.sliding_window", 0),
        layers_bytes=tuple(sum(tensor.bytes for tensor in layer) for layer in layers),
        input_bytes=input_bytes,
        output_bytes=sum(tensor.bytes for tensor in others) - input_bytes,
        file_bytes=sum(part.file_bytes for part in parts),
        embedding=embedding,
        vision=vision or _number(header, f"{architecture}.vision.block_count", 0) > 0,
    )
    return _with_details(info, header, layers, others)


def _with_details(
    info: ModelInfo, header: Header, layers: Sequence[Sequence[Tensor]], others: Sequence[Tensor]
) -> ModelInfo:
    """Add the figures that differ from layer to layer, and from one kind of model to another."""
    architecture = info.architecture
    recurrent = tuple(any(_STATE.search(tensor.name) for tensor in layer) for layer in layers)
    types_bytes = _types_bytes(layers)
    return replace(
        info,
        heads_kv=tuple(map(_heads_that_attend, info.heads_kv, recurrent, layers)),
        tied=not any(tensor.name == "output.weight" for tensor in others),
        token_embd_bytes=sum(tensor.bytes for tensor in others if tensor.name == "token_embd.weight"),
        sliding_layers=_sliding_layers(header, architecture, len(layers)),
        recurrent_layers=recurrent if any(recurrent) else (),
        recurrence=_recurrence(header, architecture),
        experts=_number(header, f"{architecture}.expert_count", 0),
        experts_used=_number(header, f"{architecture}.expert_used_count", 0),
        expert_length=_expert_length(header, architecture),
        gated=_gated(layers),
        step_bytes=max(map(_step_bytes, layers), default=0),
        tokenizer=_tokenizer(header),
        merges=header.lengths.get("tokenizer.ggml.merges", 0),
        types_bytes=types_bytes,
        output_type=_output_type(others),
        quantisation=max(types_bytes, key=lambda each: each[1])[0] if types_bytes else "",
        pooling=_pooling(header, architecture),
        causal=header.values.get(f"{architecture}.attention.causal") not in (False, 0),
    )


def _predicting(header: Header, architecture: str, blocks: int) -> int:
    """Return how many of the last blocks predict further tokens.

    llama.cpp counts such blocks as layers where it deals layers to GPUs, but loads nothing of them.
    """
    count = _number(header, f"{architecture}.nextn_predict_layers", 0)
    return count if count < blocks else 0


def _digest(headers: Iterable[Header]) -> str:
    """Return a short text that differs for files with other keys or tensors, as far as keys were kept."""
    parts = [(sorted(each.values.items()), sorted(each.lengths.items()), each.tensors) for each in headers]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _layers(tensors: Iterable[Tensor], blocks: int) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Return each layer's tensors, and all others."""
    layers: list[list[Tensor]] = [[] for _ in range(blocks)]
    others: list[Tensor] = []
    for tensor in tensors:
        block = _BLOCK.match(tensor.name)
        (layers[int(block[1])] if block and int(block[1]) < blocks else others).append(tensor)
    return layers, others


def _heads_that_attend(heads: int, recurrent: bool, layer: Sequence[Tensor]) -> int:
    """Return a layer's heads; a recurrent layer has none, except heads that attend beside its state.

    A layer that is not loaded has none.
    """
    return 0 if not layer or (recurrent and not any(_KEYS.search(tensor.name) for tensor in layer)) else heads


def _value_length(header: Header, architecture: str, head_size: int) -> int:
    """Return the size of one head's value in the cache: 0 where keys hold the values too (latent attention)."""
    if _number(header, f"{architecture}.attention.key_length_mla", 0):
        return 0
    return _number(header, f"{architecture}.attention.value_length", head_size)


def _sliding_layers(header: Header, architecture: str, blocks: int) -> tuple[bool, ...]:
    """Return which layers see a sliding window only: as the file says, else as its architecture has it."""
    key = f"{architecture}.attention.sliding_window_pattern"
    if not _number(header, f"{architecture}.attention.sliding_window", 0):
        return ()
    if isinstance(header.values.get(key), tuple):
        return tuple(map(bool, _by_layer(header, key, blocks, default=())))
    period = _number(header, key, SLIDING_PERIOD.get(architecture, 1))
    full = 0 if architecture in FULL_ATTENTION_FIRST else period - 1
    return tuple(period == 0 or layer % period != full for layer in range(blocks))


def _recurrence(header: Header, architecture: str) -> Recurrence:
    """Return the sizes of recurrent layers' states."""
    names = {
        "conv": "ssm.conv_kernel",
        "inner": "ssm.inner_size",
        "state": "ssm.state_size",
        "groups": "ssm.group_count",
        "rank": "ssm.time_step_rank",
        "short_conv": "shortconv.l_cache",
        "head": "wkv.head_size",
    }
    sizes = {field: _number(header, f"{architecture}.{name}", 0) for field, name in names.items()}
    shifts = _number(header, f"{architecture}.token_shift_count", 2 if sizes["head"] else 0)
    return Recurrence(shifts=shifts, **sizes)


def _types_bytes(layers: Iterable[Iterable[Tensor]]) -> tuple[tuple[str, int], ...]:
    """Return the bytes of the layers' matrices by their type, in the order of the types' names."""
    types: Counter[str] = Counter()
    for layer in layers:
        for tensor in layer:
            if tensor.dimensions > 1:
                types[tensor.type] += tensor.bytes
    return tuple(sorted(types.items()))


def _output_type(others: Iterable[Tensor]) -> str:
    """Return the type of the output matrix; the token embeddings serve as one where there is no other."""
    types = {tensor.name: tensor.type for tensor in others}
    return types.get("output.weight", types.get("token_embd.weight", ""))


def _gated(layers: Iterable[Iterable[Tensor]]) -> bool:
    """Return whether feed-forwards multiply two projections, in two tensors or in one that is twice as wide."""
    for layer in layers:
        names_bytes = {tensor.name.rpartition(".ffn_")[2]: tensor.bytes for tensor in layer}
        if "up.weight" in names_bytes:
            return "gate.weight" in names_bytes or names_bytes["up.weight"] >= 1.5 * names_bytes.get("down.weight", 0)
    return True  # experts are


def _step_bytes(layer: Sequence[Tensor]) -> int:
    """Return the most bytes of a layer's weights that one step needs: two projections that are multiplied, or one."""
    gated = sum(tensor.bytes for tensor in layer if _GATED.search(tensor.name))
    return max(gated, max((tensor.bytes for tensor in layer), default=0))


def _tokenizer(header: Header) -> str:
    kind = header.values.get("tokenizer.ggml.model")
    return kind if isinstance(kind, str) else ""


def _pooling(header: Header, architecture: str) -> str | None:
    """Return llama.cpp's name of the pooling that the file names, or None if it names none."""
    names = {1: "mean", 2: "cls", 3: "last", 4: "rank"}
    return names.get(_number(header, f"{architecture}.pooling_type", 0))


def _architecture(header: Header) -> str:
    architecture = header.values.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise _wrong(header, "general.architecture", "is missing or no text")
    if _is_projector(header):
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
    """Return one number for each layer, from one for all or from an array.

    The last value of a short array is repeated.
    """
    if key not in header.values:
        return default
    largest = _number(header, key)  # checks all of them
    numbers = header.values[key]
    if not isinstance(numbers, tuple):
        return (largest,) * blocks
    return numbers[:blocks] + numbers[-1:] * (blocks - len(numbers))


def _vocabulary(header: Header, architecture: str) -> int:
    """Return the number of tokens; as in llama.cpp, the key counts only where the file has no list of tokens."""
    return header.lengths.get("tokenizer.ggml.tokens") or _number(header, f"{architecture}.vocab_size", 0)


def _feed_forward(header: Header, architecture: str, layers: Iterable[Iterable[Tensor]]) -> int:
    """Return the width of what is computed at once: of dense layers, if there are any, or of all experts in use."""
    dense = any(_DENSE.search(tensor.name) for layer in layers for tensor in layer)
    dense_length = _number(header, f"{architecture}.feed_forward_length", 0) if dense else 0
    shared_length = _number(header, f"{architecture}.expert_shared_feed_forward_length", 0)
    used_length = _number(header, f"{architecture}.expert_used_count", 0) * _expert_length(header, architecture)
    return max(dense_length, shared_length, min(used_length, LARGEST_NUMBER))


def _expert_length(header: Header, architecture: str) -> int:
    """Return the width of one expert, which is the layer's where the file names no other; 0 without experts."""
    if not _number(header, f"{architecture}.expert_used_count", 0):
        return 0
    dense_length = _number(header, f"{architecture}.feed_forward_length", 0)
    return _number(header, f"{architecture}.expert_feed_forward_length", dense_length)
