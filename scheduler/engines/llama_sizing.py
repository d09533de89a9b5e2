"""The memory estimate of llama.cpp: metadata and options in; bytes of layers, caches and buffers out. It is pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

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
PROCESS_BYTES = 35 * MIB  # Python, the engine's library and its server, once the server has answered
TOKEN_BYTES = 200  # of the tokenizer, for each token of the vocabulary
MERGE_BYTES = 240  # of the tokenizer, for each merge

PROMPT_CACHE_BYTES = 64 * MIB  # the most that a runner's prompt cache may take
PROMPT_CACHE_PART = 16  # the cache takes a sixteenth of all else at most: small models refill a context quickly

# Sliding and recurrent layers lose their state at earlier tokens, so the engine keeps copies of it: without copies each
# turn of a chat begins from the first token. The engine makes two copies a prompt, one before its end and one a pass
# earlier, and would keep 32 in each slot, which may be many times the cache.
CHECKPOINTS = 2  # copies in each slot


def work_bytes(info: ModelInfo, options: Options) -> int:
    """Return the bytes that the processor works in beside the engine's compute buffers, which do not count them."""
    return _work_bytes(info, options, shape_of(info, options))


def results_bytes(info: ModelInfo, options: Options) -> int:
    """Return the bytes of an embedder's results, taken with its first result; 0 where they are taken at the load."""
    return _results_bytes(info, shape_of(info, options)) if info.embedding else 0


def estimate(info: ModelInfo, options: Options) -> Footprint:
    """Return the footprint of a runner of this model with these resolved options, once it has filled a context.

    On the host the sum of all parts is the resident size of the child process, prompt cache included. docs/memory.md
    compares all parts with the reports of llama.cpp, and the sum with the resident size of real children.
    """
    footprint = _without_prompt_cache(info, options)
    return replace(footprint, prompt_cache_bytes=_prompt_cache_bytes(info, footprint))


def _prompt_cache_bytes(info: ModelInfo, rest: Footprint) -> int:
    rest_bytes = bytes_by_device(rest, ())[HOST].total_bytes
    return 0 if info.embedding else min(PROMPT_CACHE_BYTES, rest_bytes // PROMPT_CACHE_PART // MIB * MIB)


def _without_prompt_cache(info: ModelInfo, options: Options) -> Footprint:
    shape = shape_of(info, options)
    return Footprint(
        weights_bytes=info.layers_bytes,
        caches_bytes=_caches_bytes(info, options, shape),
        output_bytes=info.output_bytes + info.adapters_bytes,
        projectors_bytes=info.projectors_bytes,
        compute_bytes=_compute_bytes(info, options, shape),
        input_bytes=info.input_bytes,
        process_bytes=_process_bytes(info) + _results_bytes(info, shape) + _work_bytes(info, options, shape),
        checkpoints_bytes=_checkpoints_bytes(info, options, shape),
        repacked_bytes=_repacked_bytes(info, options),
        output_copy_bytes=info.input_bytes if info.tied else 0,
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
    return shape.micro_batch * (FLOAT_BYTES * floats + _mask_bytes(info, options, shape))


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
    return PROCESS_BYTES + info.vocabulary * TOKEN_BYTES + info.merges * MERGE_BYTES


def _results_bytes(info: ModelInfo, shape: Shape) -> int:
    """Return the bytes of the result buffer: logits by slot, or an embedder's logits and embeddings by token of a pass.

    The buffer has cleared room for logits even where none are computed, as in an encoder.
    """
    if not info.embedding:
        return FLOAT_BYTES * info.vocabulary * shape.parallel
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
    copied_bytes = info.input_bytes if info.tied and info.output_type in REPACKED else 0
    if not maps_file(info, options, on_host=True):
        return copied_bytes
    copied_bytes += 0 if info.tied or info.output_type not in REPACKED else info.output_bytes
    return copied_bytes + repacked_bytes(info)
