"""What a model would take: metadata and options in, bytes per layer, cache and buffers out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from fsm.footprint import Footprint, parts
from fsm.model import HOST, MIB, ModelInfo, Options
from fsm.options import WITHOUT_CACHE, Shape, computes_every_logit, padded, shape_of

CACHE_BLOCK_ELEMENTS = 32  # the same for every cache type
CACHE_BLOCK_BYTES: Mapping[str, int] = MappingProxyType(
    {"f32": 128, "f16": 64, "bf16": 64, "q8_0": 34, "q5_1": 24, "q5_0": 22, "q4_1": 20, "q4_0": 18, "iq4_nl": 18}
)  # ggml's block sizes, by llama.cpp's names; these are the cache types there are

# Of this many layers in a row, all but the last see a sliding window only. Other architectures that slide are
# counted with full attention, which is more than they take.
SLIDING_PERIOD: Mapping[str, int] = MappingProxyType({"cohere2": 4, "gemma2": 2, "gemma3": 6, "gpt-oss": 2})

# Measured on x86-64 with the xllamacpp wheel of October 2026, as resident bytes of the child.
PROCESS_BYTES = 35 * MIB  # Python, the engine's library and its server, once it has answered
TOKEN_BYTES = 400  # of the tokenizer, per token of the vocabulary: 200 without merges, 460 with as many merges

PROMPT_CACHE_BYTES = 64 * MIB  # most that a runner's prompt cache may take
PROMPT_CACHE_PART = 16  # and no more than this part of everything else: small models refill a context quickly


def prompt_cache_bytes(info: ModelInfo, options: Options) -> int:
    """The limit to give to the engine's prompt cache, which `estimate` counts: whole MiB, 0 to switch it off."""
    return _prompt_cache_bytes(info, _without_prompt_cache(info, options))


def estimate(info: ModelInfo, options: Options) -> Footprint:
    """What a runner of this model takes with these resolved options, once it has filled a context.

    On the host the sum of all parts is the resident size of the child process, prompt cache included. Formulas
    were fitted to what llama.cpp reports for its buffers, and checked against the resident size of real children.
    """
    footprint = _without_prompt_cache(info, options)
    return replace(footprint, prompt_cache_bytes=_prompt_cache_bytes(info, footprint))


def _prompt_cache_bytes(info: ModelInfo, rest: Footprint) -> int:
    rest_bytes = parts(rest, ())[HOST].total_bytes
    return 0 if info.embedding else min(PROMPT_CACHE_BYTES, rest_bytes // PROMPT_CACHE_PART // MIB * MIB)


def _without_prompt_cache(info: ModelInfo, options: Options) -> Footprint:
    shape = shape_of(info, options)
    return Footprint(
        weights_bytes=info.layers_bytes,
        caches_bytes=tuple(_caches_bytes(info, options, shape)),
        output_bytes=info.output_bytes + info.adapters_bytes,
        projectors_bytes=info.projectors_bytes,
        compute_bytes=_compute_bytes(info, options, shape),
        input_bytes=info.input_bytes,
        process_bytes=PROCESS_BYTES + info.vocabulary * TOKEN_BYTES + _results_bytes(info, shape),
        repacked_bytes=_repacked_bytes(info, options),
        output_copy_bytes=info.input_bytes if info.tied else 0,
    )


def _caches_bytes(info: ModelInfo, options: Options, shape: Shape) -> list[int]:
    """Keys and values of all slots by layer; the whole of a cache is cleared, and so resident, from the start.

    A sliding layer keeps its window and a pass (llama.cpp: llama_kv_cache_iswa).
    """
    caches_bytes = [0] * len(info.layers_bytes)
    if info.architecture in WITHOUT_CACHE:
        return caches_bytes
    period = SLIDING_PERIOD.get(info.architecture, 1) if info.sliding_window else 1
    window = min(shape.cells, padded(info.sliding_window + shape.micro_batch))
    for layer, heads in enumerate(info.heads_kv[: len(caches_bytes)]):
        cells = shape.cells if layer % period == period - 1 else window
        token_bytes = _row_bytes(heads * info.key_length, options.cache_type_k)
        token_bytes += _row_bytes(heads * info.value_length, options.cache_type_v)
        caches_bytes[layer] = cells * shape.parallel * token_bytes
    return caches_bytes


def _row_bytes(elements: int, cache_type: str | None) -> int:
    """One token's keys or values in a layer; a type that is not known counts as the largest."""
    block_bytes = CACHE_BLOCK_BYTES.get(cache_type or "f16", CACHE_BLOCK_BYTES["f32"])
    return -(-elements * block_bytes // CACHE_BLOCK_ELEMENTS)


def _compute_bytes(info: ModelInfo, options: Options, shape: Shape) -> int:
    """The engine's compute buffer, as fitted to what llama.cpp reports over 40 models and settings of the llama family.

    In 4-byte floats per token of a pass, the largest of: feed-forward (three of its width and five of the model's),
    attention (five of the model's width, queries twice, keys, values; without flash attention also every head's
    scores), and for an embedder the logits. Beside it the mask: context by pass, 2 bytes, or 4 without flash attention.
    """
    tokens = shape.micro_batch
    widths = 5 * info.embedding_length
    heads_kv = max(info.heads_kv, default=0)
    attention = 2 * info.heads * info.key_length + heads_kv * (info.key_length + info.value_length)
    cells = tokens if info.architecture in WITHOUT_CACHE else shape.cells
    mask_bytes = cells * tokens * 2
    if options.flash_attention is False:
        attention += info.heads * cells
        mask_bytes *= 2
    logits = info.vocabulary if computes_every_logit(info) else 0
    return tokens * 4 * (widths + max(3 * info.feed_forward_length, attention, logits)) + mask_bytes


def _results_bytes(info: ModelInfo, shape: Shape) -> int:
    """The buffer that results are copied to: a slot's logits, or all tokens' logits and embeddings of an embedder."""
    if not info.embedding:
        return 4 * info.vocabulary * shape.parallel
    logits = info.vocabulary if computes_every_logit(info) else 0
    return 4 * (logits + info.embedding_length) * shape.micro_batch


def _repacked_bytes(info: ModelInfo, options: Options) -> int:
    """Weights that a host-only runner holds twice: 4-bit ones are copied and reordered beside the mapped file.

    Types are not known here, so they are told by the bits that a dense layer's weights take on average: 4.5 where all
    are 4-bit (Q4_0, Q4_K, IQ4_NL), a little more where 6-bit ones are mixed in (Q4_K_M), 5.0 for Q4_1, which stays.
    """
    if options.use_mmap is False:
        return 0
    weights = _dense_weights(info)
    bits = 8 * sum(info.layers_bytes) / weights if weights else 0.0
    if not 4.25 <= bits < 4.95:
        return 0
    six_bit_part = max(0.0, (bits - 4.5) / (6.5625 - 4.5))
    return int(weights * (1 - six_bit_part) * 4.5 / 8)


def _dense_weights(info: ModelInfo) -> int:
    """Elements of all layers' matrices, if attention and a gated feed-forward are all there is."""
    keys_values = sum(info.heads_kv) * (info.key_length + info.value_length)
    queries = len(info.layers_bytes) * info.heads * (info.key_length + info.value_length)
    feed_forward = 3 * len(info.layers_bytes) * info.feed_forward_length
    return info.embedding_length * (keys_values + queries + feed_forward)
