"""What a model would take: metadata and options in, bytes per layer, cache and buffers out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NewType

DeviceId = NewType("DeviceId", str)

HOST = DeviceId("cpu")


@dataclass(frozen=True, slots=True)
class Options:
    """Load-time options of a runner; None means automatic, or not named by the request."""

    num_ctx: int | None = None  # context of one slot, tokens
    num_batch: int | None = None  # tokens of a prompt that are worked on at once
    num_gpu: int | None = None  # layers on GPUs; negative: automatic; 0: host only
    main_gpu: int | None = None  # index of the GPU to prefer
    num_thread: int | None = None
    num_parallel: int | None = None  # slots; each has a context of its own
    use_mmap: bool | None = None
    flash_attention: bool | None = None
    cache_type_k: str | None = None  # llama.cpp's names: f16, q8_0, q4_0, …
    cache_type_v: str | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What placement needs to know of a GGUF model."""

    architecture: str
    context_trained: int
    embedding_length: int
    feed_forward_length: int
    vocabulary: int
    heads: int
    heads_kv: tuple[int, ...]  # per layer
    key_length: int  # size of one head's key
    value_length: int
    sliding_window: int  # tokens; 0: full attention
    layers_bytes: tuple[int, ...]  # tensor bytes of each repeating layer
    input_bytes: int  # token embeddings and whatever else stays on the host
    output_bytes: int  # output and its norm; 0 where tied to the input
    file_bytes: int
    extra_bytes: int  # adapters and projectors beside the file
    embedding: bool  # asked for as an embedder
    vision: bool


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one runner would take, before it is placed."""

    layers_bytes: tuple[int, ...] = ()  # each repeating layer: weights and its KV cache
    output_bytes: int = 0  # moves to a GPU with the last layer
    host_bytes: int = 0  # stays on the host whatever is offloaded
    compute_bytes: int = 0  # compute buffers, once per device that computes
    fixed: tuple[tuple[DeviceId, int], ...] = ()  # declared bytes of what has no layers; then all else is 0


MIB = 1024 * 1024

DEFAULT_CONTEXT = 4096  # tokens of one slot, where a request names none
DEFAULT_EMBEDDER_CONTEXT = 512  # of a decoder that embeds: it computes and keeps the logits of every token
LEAST_CONTEXT = 4
LEAST_VISION_CONTEXT = 2048  # an image alone takes hundreds of tokens
DEFAULT_BATCH = 512
LARGEST_MICRO_BATCH = 512  # tokens per pass of a generating model, whatever its batch

ONE_AT_A_TIME = frozenset(
    {
        "lfm2",
        "lfm2moe",
        "mllama",
        "nemotron_h",
        "nemotron_h_moe",
        "nemotron_h_omni",
        "qwen35",
        "qwen35moe",
        "qwen3next",
        "qwen3vl",
        "qwen3vlmoe",
    }
)  # families whose state the engine cannot keep for several slots

CACHE_BLOCK_ELEMENTS = 32  # the same for every cache type
CACHE_BLOCK_BYTES: Mapping[str, int] = MappingProxyType(
    {"f32": 128, "f16": 64, "bf16": 64, "q8_0": 34, "q5_1": 24, "q5_0": 22, "q4_1": 20, "q4_0": 18, "iq4_nl": 18}
)  # ggml's block sizes, by llama.cpp's names; these are the cache types there are

# Encoders: llama.cpp gives them no cache, and they compute no logits.
WITHOUT_CACHE = frozenset(
    {
        "bert",
        "eurobert",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
    }
)
# Of this many layers in a row, all but the last see a sliding window only. Other architectures that slide are
# counted with full attention, which is more than they take.
SLIDING_PERIOD: Mapping[str, int] = MappingProxyType({"cohere2": 4, "gemma2": 2, "gemma3": 6, "gpt-oss": 2})

CACHE_CELLS = 256  # llama.cpp rounds the cache of a slot up to a multiple of this, tokens

# Measured on x86-64 with the xllamacpp wheel of October 2026, as resident bytes of the child.
PROCESS_BYTES = 35 * MIB  # Python, the engine's library and its server, once it has answered
TOKEN_BYTES = 400  # of the tokenizer, per token of the vocabulary: 200 without merges, 460 with as many merges

PROMPT_CACHE_BYTES = 64 * MIB  # most that a runner's prompt cache may take
PROMPT_CACHE_PART = 16  # and no more than this part of everything else: small models refill a context quickly

_AUTOMATIC = Options()


@dataclass(frozen=True, slots=True)
class _Shape:
    """The sizes that everything else follows from, all explicit."""

    context: int  # tokens of one slot
    parallel: int
    batch: int  # tokens of a prompt that are worked on at once
    micro_batch: int  # tokens of one pass
    cells: int  # tokens that one slot's cache has room for


def resolve(info: ModelInfo, options: Options) -> Options:
    """Make explicit what the engine would otherwise choose: context, batch, slots and cache types.

    The context is at least 4 tokens (2048 for a vision model) and at most what the model was trained with; one slot
    for embedders and for families that cannot share; an embedder's batch holds its whole context, since llama.cpp
    refuses a pooled input that takes more than one pass. `num_gpu`, `main_gpu`, `num_thread`, `use_mmap` and
    `flash_attention` stay as they are. Resolving twice changes nothing.
    """
    shape = _shape(info, options)
    return replace(
        options,
        num_ctx=shape.context,
        num_batch=shape.batch,
        num_parallel=shape.parallel,
        cache_type_k=options.cache_type_k or "f16",
        cache_type_v=options.cache_type_v or "f16",
    )


def serves(loaded: Options, asked: Options, info: ModelInfo | None = None) -> bool:
    """Whether a runner loaded with the resolved `loaded` may serve a request for the unresolved `asked`.

    What is not named matches, as does a negative `num_gpu`; a larger context or more slots serve a smaller wish;
    all else that is named must be equal. With the model's `info` a wish is first limited to what the model can
    have, so that a runner resolved from a wish always serves it: without, one beyond the limits is never served.
    """
    if asked == _AUTOMATIC or _covers(loaded, asked):
        return True
    return info is not None and _covers(loaded, _limited(info, asked))


def micro_batch(info: ModelInfo, options: Options) -> int:
    """Tokens that the engine computes in one pass (its n_ubatch): an embedder's whole input, else at most 512."""
    return _shape(info, options).micro_batch


def prompt_cache_bytes(info: ModelInfo, options: Options) -> int:
    """The limit to give to the engine's prompt cache, which `estimate` counts: whole MiB, 0 to switch it off."""
    return _prompt_cache_bytes(info, _without_prompt_cache(info, options))


def estimate(info: ModelInfo, options: Options) -> Footprint:
    """What a runner of this model takes with these resolved options, once it has filled a context.

    On the host the sum of all parts is the resident size of the child process, prompt cache included. Formulas
    were fitted to what llama.cpp reports for its buffers, and checked against the resident size of real children.
    """
    footprint = _without_prompt_cache(info, options)
    return replace(footprint, host_bytes=footprint.host_bytes + _prompt_cache_bytes(info, footprint))


def _shape(info: ModelInfo, options: Options) -> _Shape:
    automatic = DEFAULT_EMBEDDER_CONTEXT if _computes_every_logit(info) else DEFAULT_CONTEXT
    context = automatic if options.num_ctx is None else options.num_ctx
    if info.vision:
        context = max(context, LEAST_VISION_CONTEXT)
    if info.context_trained > 0:
        context = min(context, info.context_trained)
    context = max(context, LEAST_CONTEXT)
    one_at_a_time = info.embedding or info.architecture in ONE_AT_A_TIME
    parallel = 1 if one_at_a_time else max(1, options.num_parallel or 1)
    batch = DEFAULT_BATCH if options.num_batch is None else options.num_batch
    batch = context if info.embedding else max(1, min(batch, context * parallel))
    micro_batch = batch if info.embedding else min(batch, LARGEST_MICRO_BATCH)
    return _Shape(context, parallel, batch, micro_batch, _padded(context))


def _limited(info: ModelInfo, asked: Options) -> Options:
    """`asked` with what it names cut down to what `resolve` would allow; what it does not name stays so."""
    shape = _shape(info, asked)
    return replace(
        asked,
        num_ctx=None if asked.num_ctx is None else shape.context,
        num_batch=None if asked.num_batch is None or info.embedding else shape.batch,
        num_parallel=None if asked.num_parallel is None else shape.parallel,
    )


def _covers(loaded: Options, asked: Options) -> bool:
    return (
        _within(asked.num_ctx, loaded.num_ctx)
        and _within(asked.num_parallel, loaded.num_parallel)
        and (asked.num_gpu is None or asked.num_gpu < 0 or asked.num_gpu == loaded.num_gpu)
        and asked.num_batch in (None, loaded.num_batch)
        and asked.main_gpu in (None, loaded.main_gpu)
        and asked.num_thread in (None, loaded.num_thread)
        and asked.use_mmap in (None, loaded.use_mmap)
        and asked.flash_attention in (None, loaded.flash_attention)
        and asked.cache_type_k in (None, loaded.cache_type_k)
        and asked.cache_type_v in (None, loaded.cache_type_v)
    )


def _within(asked: int | None, loaded: int | None) -> bool:
    return asked is None or (loaded is not None and asked <= loaded)


def _prompt_cache_bytes(info: ModelInfo, rest: Footprint) -> int:
    rest_bytes = sum(rest.layers_bytes) + rest.output_bytes + rest.host_bytes + rest.compute_bytes
    return 0 if info.embedding else min(PROMPT_CACHE_BYTES, rest_bytes // PROMPT_CACHE_PART // MIB * MIB)


def _without_prompt_cache(info: ModelInfo, options: Options) -> Footprint:
    shape = _shape(info, options)
    host_bytes = PROCESS_BYTES + info.vocabulary * TOKEN_BYTES + info.input_bytes + _results_bytes(info, shape)
    layers = zip(info.layers_bytes, _caches_bytes(info, options, shape), strict=True)
    return Footprint(
        layers_bytes=tuple(weights_bytes + cache_bytes for weights_bytes, cache_bytes in layers),
        output_bytes=info.output_bytes + info.extra_bytes,
        host_bytes=host_bytes + _repacked_bytes(info, options),
        compute_bytes=_compute_bytes(info, options, shape),
    )


def _padded(tokens: int) -> int:
    return -(-tokens // CACHE_CELLS) * CACHE_CELLS


def _caches_bytes(info: ModelInfo, options: Options, shape: _Shape) -> list[int]:
    """Keys and values of all slots by layer; the whole of a cache is cleared, and so resident, from the start.

    A sliding layer keeps its window and a pass (llama.cpp: llama_kv_cache_iswa).
    """
    caches_bytes = [0] * len(info.layers_bytes)
    if info.architecture in WITHOUT_CACHE:
        return caches_bytes
    period = SLIDING_PERIOD.get(info.architecture, 1) if info.sliding_window else 1
    window = min(shape.cells, _padded(info.sliding_window + shape.micro_batch))
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


def _compute_bytes(info: ModelInfo, options: Options, shape: _Shape) -> int:
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
    logits = info.vocabulary if _computes_every_logit(info) else 0
    return tokens * 4 * (widths + max(3 * info.feed_forward_length, attention, logits)) + mask_bytes


def _results_bytes(info: ModelInfo, shape: _Shape) -> int:
    """The buffer that results are copied to: a slot's logits, or all tokens' logits and embeddings of an embedder."""
    if not info.embedding:
        return 4 * info.vocabulary * shape.parallel
    logits = info.vocabulary if _computes_every_logit(info) else 0
    return 4 * (logits + info.embedding_length) * shape.micro_batch


def _computes_every_logit(info: ModelInfo) -> bool:
    """With pooling every token is an output: a decoder computes and keeps the logits of each, though none is read."""
    return info.embedding and info.architecture not in WITHOUT_CACHE


def _repacked_bytes(info: ModelInfo, options: Options) -> int:
    """Weights that a host-only runner holds twice: 4-bit ones are copied and reordered beside the mapped file.

    Types are not known here, so they are told by the bits that a dense layer's weights take on average: 4.5 where all
    are 4-bit (Q4_0, Q4_K, IQ4_NL), a little more where 6-bit ones are mixed in (Q4_K_M), 5.0 for Q4_1, which stays.
    """
    if options.num_gpu != 0 or options.use_mmap is False:
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
