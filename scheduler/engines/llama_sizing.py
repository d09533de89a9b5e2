"""The memory estimate of llama.cpp: metadata and options in; bytes of layers, caches and buffers out. It is pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from fsm.domain.devices import HOST, MIB
from fsm.domain.options import Options
from fsm.sizing.footprint import Footprint, bytes_by_device
from scheduler.engines.llama_options import (
    CACHE_BLOCK,
    REPACKED,
    WITHOUT_CACHE,
    Shape,
    computes_every_logit,
    maps_file,
    padded,
    repacked_bytes,
    shape_of,
)
from scheduler.models.model_info import ModelInfo

CACHE_BLOCK_BYTES: Mapping[str, int] = MappingProxyType(
    {"f32": 128, "f16": 64, "bf16": 64, "q8_0": 34, "q5_1": 24, "q5_0": 22, "q4_1": 20, "q4_0": 18, "iq4_nl": 18}
)  # ggml's block sizes, by llama.cpp's names of all cache types
FLOAT_BYTES = 4

# Measured on x86-64 with the xllamacpp wheel of October 2026, as resident bytes of the child.
PROCESS_BYTES = 36 * MIB  # Python, the engine's library and its server, once the server has answered
TOKEN_BYTES = 200  # of the tokenizer, for each token of the vocabulary
UNIGRAM_TOKEN_BYTES = 580  # of a tokenizer that scores ways through a text (llama.cpp calls it t5)
MERGE_BYTES = 240  # of the tokenizer, for each merge

COPIED_BATCH = 32  # tokens of a pass from which on a GPU computes the host's layers too (ggml: op offload)
IMAGE_COPIES = 5  # of an image, while it is read and computed

PROMPT_CACHE_BYTES = 64 * MIB  # the most that a runner's prompt cache may take
PROMPT_CACHE_PART = 16  # the cache takes a sixteenth of all else at most: small models refill a context quickly

# Sliding and recurrent layers lose their state at earlier tokens, so the engine keeps copies of it: without copies each
# turn of a chat begins from the first token. The engine makes two copies a prompt, one before its end and one a pass
# earlier, and would keep 32 in each slot, which may be many times the cache.
CHECKPOINTS = 2  # copies in each slot


VERIFIED_VERSION = "2026.10.11549"
VERIFIED = frozenset(
    {
        "bailingmoe2",
        "bert",
        "ernie4_5",
        "ernie4_5-moe",
        "exaone4",
        "gemma3",
        "glm4",
        "glm4moe",
        "gpt-oss",
        "hunyuan-dense",
        "jina-bert-v3",
        "lfm2",
        "llama",
        "minicpm3",
        "mistral3",
        "nomic-bert",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3moe",
        "seed_oss",
        "smollm3",
    }
)


def holds(info: ModelInfo, version: str) -> bool:
    """Return whether the formulas are known to hold for a model in this version of the engine, as to its architecture.

    There is none for projectors, and none for a file with tensors that are not the architecture's.
    """
    verified = version == VERIFIED_VERSION and info.architecture in VERIFIED
    return verified and not info.projectors_bytes and not info.unknown


# Slots that llama.cpp is asked about: a dry run takes the states of all of them. More slots take as much for each.
MOST_TOLD_SLOTS = 4

CacheKind = Literal["full", "window", "state"]


@dataclass(frozen=True, slots=True)
class EngineCache:
    """What llama.cpp would keep of tokens in some layers, as it tells itself."""

    kind: CacheKind  # keys and values of a whole context, or of a window, or what keeps its size
    layers: tuple[int, ...]  # that have a part of it
    cells: int  # tokens of one slot; 0: unknown
    bytes: int  # of all slots and layers


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """What llama.cpp would take for one load, as it tells itself."""

    caches: tuple[EngineCache, ...]
    compute_bytes: int  # compute buffers, where the host computes all layers
    projector_bytes: int = 0  # weights and compute buffers of a projector


def work_bytes(info: ModelInfo, options: Options) -> int:
    """Return the bytes that the processor works in beside the engine's compute buffers, which do not count them."""
    return _work_bytes(info, options, shape_of(info, options))


def images_bytes(info: ModelInfo) -> int:
    """Return the bytes of the host that an image takes before the projector has it."""
    return IMAGE_COPIES * info.image_bytes


def results_bytes(info: ModelInfo, options: Options) -> int:
    """Return the bytes of an embedder's results, taken with its first result; 0 where they are taken at the load."""
    return _results_bytes(info, shape_of(info, options)) if info.embedding else 0


def estimate(info: ModelInfo, options: Options, told: EngineSizes | None = None) -> Footprint:
    """Return the footprint of a runner of this model with these resolved options, once it has filled a context.

    What the engine itself has `told` of this load takes the place of the formulas. On the host the sum of all parts is
    the resident size of the child process, prompt cache included. docs/memory.md compares all parts with the reports of
    llama.cpp, and the sum with the resident size of real children.
    """
    footprint = _without_prompt_cache(info, options)
    if told is not None:
        told = _of_all_slots(info, options, told)
        footprint = replace(
            footprint,
            caches_bytes=_told_caches_bytes(info, told),
            checkpoints_bytes=_told_checkpoints_bytes(info, told),
            compute_bytes=told.compute_bytes,
            projectors_bytes=max(info.projectors_bytes, told.projector_bytes) + draft_bytes(info, options),
        )
    return replace(footprint, prompt_cache_bytes=_prompt_cache_bytes(info, footprint))


def _of_all_slots(info: ModelInfo, options: Options, told: EngineSizes) -> EngineSizes:
    """Return what is told of `MOST_TOLD_SLOTS` slots for all of them: slots share no cache."""
    slots = options.num_parallel or 1
    if slots <= MOST_TOLD_SLOTS:
        return told
    few = replace(options, num_parallel=MOST_TOLD_SLOTS)
    more, less = (_compute_bytes(info, each, shape_of(info, each)) for each in (options, few))
    caches = tuple(replace(cache, bytes=cache.bytes * slots // MOST_TOLD_SLOTS) for cache in told.caches)
    return replace(told, caches=caches, compute_bytes=told.compute_bytes + max(0, more - less))


def _told_caches_bytes(info: ModelInfo, told: EngineSizes) -> tuple[int, ...]:
    """Return the bytes of all caches by layer; layers share a cache by their heads, where all of them have some."""
    caches_bytes = [0] * len(info.layers_bytes)
    for cache in told.caches:
        layers = [layer for layer in cache.layers if layer < len(caches_bytes)] or [*range(len(caches_bytes))]
        heads = [info.heads_kv[layer] if layer < len(info.heads_kv) else 0 for layer in layers]
        parts = heads if all(heads) else [1] * len(layers)
        for layer, part in zip(layers, parts, strict=True):
            caches_bytes[layer] += -(-cache.bytes * part // sum(parts))
    return tuple(caches_bytes)


def _told_checkpoints_bytes(info: ModelInfo, told: EngineSizes) -> int:
    """Return the bytes of the copies of all slots' states and windows; a window is copied without the last pass."""
    if info.embedding:
        return 0
    copy_bytes = 0
    for cache in told.caches:
        tokens = min(cache.cells, info.sliding_window or cache.cells)
        if cache.kind == "window" and cache.cells:
            copy_bytes += cache.bytes * tokens // cache.cells
        elif cache.kind == "state":
            copy_bytes += cache.bytes
    return CHECKPOINTS * copy_bytes


def draft_bytes(info: ModelInfo, options: Options) -> int:
    """Return the bytes that a draft model takes where it computes: weights, a cache of all slots, compute buffers.

    Its cache has as many cells as the model's own, and 16-bit values; llama.cpp computes it in the same passes.
    """
    if (draft := info.draft) is None or not options.draft_num_predict:
        return 0
    options, shape = replace(options, cache_type_k="f16", cache_type_v="f16"), _draft_shape(info, options)
    weights_bytes = sum(draft.layers_bytes) + draft.input_bytes + draft.output_bytes
    caches_bytes = sum(_caches_bytes(draft, options, shape)) + _checkpoints_bytes(draft, options, shape)
    return weights_bytes + caches_bytes + _compute_bytes(draft, options, shape)


def _draft_process_bytes(info: ModelInfo, options: Options) -> int:
    """Return the bytes of a draft model's tokenizer and of its results, on the host."""
    if (draft := info.draft) is None or not options.draft_num_predict:
        return 0
    return _process_bytes(draft) - PROCESS_BYTES + _results_bytes(draft, _draft_shape(info, options))


def _draft_shape(info: ModelInfo, options: Options) -> Shape:
    """Return the sizes of a draft model: those of its model, but that of each slot one token is read."""
    shape = shape_of(info, options)
    return replace(shape, outputs=shape.parallel)


def _draft_repacked_bytes(info: ModelInfo, options: Options) -> int:
    return 0 if info.draft is None or not options.draft_num_predict else _repacked_bytes(info.draft, options)


def _prompt_cache_bytes(info: ModelInfo, rest: Footprint) -> int:
    if info.embedding or info.switched:  # llama.cpp would take a prompt that was computed with other adapters
        return 0
    rest_bytes = bytes_by_device(rest, ())[HOST].total_bytes
    return min(PROMPT_CACHE_BYTES, rest_bytes // PROMPT_CACHE_PART // MIB * MIB)


def _without_prompt_cache(info: ModelInfo, options: Options) -> Footprint:
    shape = shape_of(info, options)
    return Footprint(
        weights_bytes=info.layers_bytes,
        caches_bytes=_caches_bytes(info, options, shape),
        output_bytes=info.output_bytes + info.adapters_bytes,
        projectors_bytes=info.projectors_bytes + draft_bytes(info, options),
        compute_bytes=_compute_bytes(info, options, shape),
        input_bytes=info.input_bytes,
        process_bytes=_process_bytes(info)
        + _results_bytes(info, shape)
        + _work_bytes(info, options, shape)
        + images_bytes(info)
        + _draft_process_bytes(info, options),
        step_bytes=info.step_bytes if shape.micro_batch >= COPIED_BATCH else 0,
        checkpoints_bytes=_checkpoints_bytes(info, options, shape),
        repacked_bytes=_repacked_bytes(info, options) + _draft_repacked_bytes(info, options),
        output_copy_bytes=info.token_embd_bytes if info.tied else 0,
        inputs_bytes=_inputs_bytes(info, options, shape),
    )


def _caches_bytes(info: ModelInfo, options: Options, shape: Shape) -> tuple[int, ...]:
    """Return the bytes of keys and values, or states, of all slots by layer.

    All of them are cleared at the load, and so resident from the start. A slot has its own cells (the child leaves
    kv_unified off). A sliding layer keeps its window and a pass (llama.cpp: llama_kv_cache_iswa).
    """
    if info.architecture in WITHOUT_CACHE:
        return (0,) * len(info.layers_bytes)
    window = _window_cells(info, shape)
    caches_bytes = []
    for layer in range(len(info.layers_bytes)):
        cells = window if _has(info.sliding_layers, layer) else shape.cells
        state_bytes = _state_bytes(info) if _has(info.recurrent_layers, layer) else 0
        caches_bytes.append((cells * _token_bytes(info, options, layer) + state_bytes) * shape.parallel)
    return tuple(caches_bytes)


def _window_cells(info: ModelInfo, shape: Shape) -> int:
    return min(shape.cells, padded(info.sliding_window + shape.micro_batch))


def _has(layers: tuple[bool, ...], layer: int) -> bool:
    return layer < len(layers) and layers[layer]


def _token_bytes(info: ModelInfo, options: Options, layer: int) -> int:
    """Return the bytes of one token's keys and values in a layer."""
    heads = info.heads_kv[layer] if layer < len(info.heads_kv) else 0
    keys_bytes = _row_bytes(heads * info.key_length, options.cache_type_k)
    return keys_bytes + _row_bytes(heads * info.value_length, options.cache_type_v)


def _row_bytes(elements: int, cache_type: str | None) -> int:
    """Return the bytes of a row of a cache; an unknown type counts as the largest."""
    block_bytes = CACHE_BLOCK_BYTES.get(cache_type or "f16", CACHE_BLOCK_BYTES["f32"])
    return -(-elements * block_bytes // CACHE_BLOCK)


def _state_bytes(info: ModelInfo) -> int:
    """Return the bytes of a recurrent layer's state in a slot, floats for any cache type (llama.cpp: n_embd_r, _s)."""
    sizes, width = info.recurrence, info.embedding_length
    if sizes.head:
        return FLOAT_BYTES * width * (sizes.shifts + sizes.head)
    if sizes.short_conv:
        return FLOAT_BYTES * width * (sizes.short_conv - 1)
    mixed = sizes.inner + 2 * sizes.groups * sizes.state
    return FLOAT_BYTES * (max(0, sizes.conv - 1) * mixed + sizes.state * sizes.inner)


def _checkpoints_bytes(info: ModelInfo, options: Options, shape: Shape) -> int:
    """Return the bytes of the copies of states and windows of all slots."""
    if info.embedding or info.architecture in WITHOUT_CACHE:
        return 0
    tokens = min(shape.cells, info.sliding_window)
    copy_bytes = 0
    for layer in range(len(info.layers_bytes)):
        if _has(info.sliding_layers, layer):
            copy_bytes += tokens * _token_bytes(info, options, layer)
        if _has(info.recurrent_layers, layer):
            copy_bytes += _state_bytes(info)
    return CHECKPOINTS * shape.parallel * copy_bytes


def _compute_bytes(info: ModelInfo, options: Options, shape: Shape) -> int:
    """Return the bytes of the engine's compute buffer: floats for each token of a pass, and masks of visible cells.

    The largest step of a layer decides; formulas were fitted to the reports of llama.cpp for 400 models and settings.
    """
    floats = max(
        _attention_floats(info, options, shape),
        _feed_forward_floats(info),
        _recurrent_floats(info, shape),
        5 * info.embedding_length + info.vocabulary if computes_every_logit(info) else 0,
    )
    logits_bytes = FLOAT_BYTES * shape.outputs * info.vocabulary
    widest_bytes = max(shape.micro_batch * FLOAT_BYTES * floats, logits_bytes)
    return widest_bytes + shape.micro_batch * _mask_bytes(info, options, shape)


def _inputs_bytes(info: ModelInfo, options: Options, shape: Shape) -> int:
    """Return the bytes of a pass's input and results: its masks, and four times its tokens' states.

    llama.cpp reports these bytes for the host where all layers are on GPUs.
    """
    states_bytes = 4 * FLOAT_BYTES * info.embedding_length
    return shape.micro_batch * (states_bytes + _mask_bytes(info, options, shape))


def _mask_bytes(info: ModelInfo, options: Options, shape: Shape) -> int:
    """Return the bytes of a token's masks: 2 a cell, or 4 without flash attention; sliding layers have another mask."""
    if not any(info.heads_kv):
        return 0
    cells = shape.micro_batch if info.architecture in WITHOUT_CACHE else shape.cells
    cells += _window_cells(info, shape) if any(info.sliding_layers) else 0
    return cells * (4 if options.flash_attention is False else 2)


def _attention_floats(info: ModelInfo, options: Options, shape: Shape) -> int:
    """Return a token's floats in attention: its states, and its queries twice.

    Without flash attention its keys, values and all scores count too.
    """
    if not any(info.heads_kv):
        return 0
    queries, width = info.heads * info.key_length, info.embedding_length
    keys_values = max(info.heads_kv, default=0) * (info.key_length + info.value_length)
    floats = 2 * queries + (4 if queries <= width else 5) * width
    encoder = info.architecture in WITHOUT_CACHE
    if options.flash_attention is not False:
        return floats + (keys_values // 4 if encoder else 0)
    cells = shape.micro_batch if encoder else shape.cells
    return floats + info.heads * cells + (keys_values // 2 if encoder else keys_values)


def _feed_forward_floats(info: ModelInfo) -> int:
    """Return a token's floats in the feed-forward step: its states, and the width that is computed at once.

    The width counts three times where the step is gated. Experts' results lie side by side; results of narrow experts
    need a place of their own.
    """
    width = info.embedding_length
    together = info.experts_used * info.expert_length
    dense = info.feed_forward_length
    floats = max(width, dense * (3 if info.gated else 1) if dense > max(width, together) else 0)
    results = info.experts_used * width
    if together <= width:
        floats = max(floats, results)
    else:
        floats = max(floats, 3 * together + (results if 2 * info.expert_length < width else 0))
    return 5 * width + floats


def _recurrent_floats(info: ModelInfo, shape: Shape) -> int:
    """Return a token's floats in a recurrent layer: its states, the projection, four times the mixed width, and more.

    The layer's own states count by three quarters.
    """
    sizes, width = info.recurrence, info.embedding_length
    if sizes.short_conv:
        return 9 * width
    mixed = sizes.inner + 2 * sizes.groups * sizes.state
    states = 3 * sizes.state * sizes.inner * shape.parallel // (4 * shape.micro_batch)
    beside = (3 if any(info.heads_kv) else 2) * width
    return beside + sizes.inner + mixed + sizes.rank + 4 * mixed + states if sizes.inner else 0


def _process_bytes(info: ModelInfo) -> int:
    token_bytes = UNIGRAM_TOKEN_BYTES if info.tokenizer == "t5" else TOKEN_BYTES
    return PROCESS_BYTES + info.vocabulary * token_bytes + info.merges * MERGE_BYTES


def _results_bytes(info: ModelInfo, shape: Shape) -> int:
    """Return the bytes of the result buffer: logits that are read, or an embedder's logits and embeddings by token.

    The buffer has cleared room for logits even where none are computed, as in an encoder.
    """
    if not info.embedding:
        return FLOAT_BYTES * info.vocabulary * shape.outputs
    return FLOAT_BYTES * (info.vocabulary + info.embedding_length) * shape.micro_batch


def _work_bytes(info: ModelInfo, options: Options, shape: Shape) -> int:
    """Return the bytes that the processor works in beside the compute buffer.

    Without flash attention these are the scores again, at half size. With flash attention they are some hundred
    kilobytes, which the bytes of the process include.
    """
    if options.flash_attention is not False or not any(info.heads_kv):
        return 0
    cells = shape.micro_batch if info.architecture in WITHOUT_CACHE else shape.cells
    return FLOAT_BYTES // 2 * info.heads * cells * shape.micro_batch


def _repacked_bytes(info: ModelInfo, options: Options) -> int:
    """Return the bytes of weights that a runner on the host holds twice: reordered copies beside the mapped file.

    Without a mapping only the reordered weights are kept, but for embeddings that are the output matrix too.
    """
    copied_bytes = info.token_embd_bytes if info.tied and info.output_type in REPACKED else 0
    if not maps_file(info, options, on_host=True):
        return copied_bytes
    copied_bytes += 0 if info.tied or info.output_type not in REPACKED else info.output_bytes
    return copied_bytes + repacked_bytes(info)
