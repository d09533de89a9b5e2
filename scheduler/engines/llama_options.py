"""The load-time options of llama.cpp: automatic values made explicit, and the options that it would refuse."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from fsm.domain.options import AUTOMATIC, MOST_SLOTS, MOST_THREADS, Options
from fsm.sizing.model_profile import UnsupportedReason
from scheduler.models.model_info import ModelInfo

DEFAULT_CONTEXT = 4096  # tokens of one slot, where a request names none
# of a decoder whose embeddings take a whole text in one pass: it computes and keeps the logits of every token
DEFAULT_EMBEDDER_CONTEXT = 512
LEAST_CONTEXT = 4
LEAST_VISION_CONTEXT = 2048  # an image alone takes hundreds of tokens
DEFAULT_BATCH = 512
LEAST_BATCH = 2  # tokens; the engine also computes a token of each slot in one batch, and aborts where it cannot
LARGEST_MICRO_BATCH = 2048  # tokens per pass of a generating model, however large its batch

# Encoders compute no logits, and llama.cpp gives most of them no cache.
WITHOUT_CACHE = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
    }
)
ENCODERS = WITHOUT_CACHE | {"llama-embed", "t5encoder"}
WITHOUT_LOGITS = ENCODERS | {"lfm2"}  # and decoders that compute no logits for embeddings
EMBEDDERS = ENCODERS | {"gemma-embedding2"}  # although their files do not say that tokens see those behind them
CACHE_BLOCK = 32  # elements of a block, the same for every cache type; heads are whole blocks of quantised types
UNQUANTISED = frozenset({"f32", "f16", "bf16"})  # cache types that every model can have
# Types whose matrices llama.cpp reorders on x86-64 as it loads them, by gguf's names; all other types stay as they are.
REPACKED = frozenset({"IQ4_NL", "MXFP4", "Q4_0", "Q4_K"})
WITHOUT_SHIFT = ("deepseek", "step35")  # beginnings of architectures
USUAL_DRAFT = 4  # tokens that a draft model guesses at once, unless a request says otherwise
CACHE_CELLS = 256  # llama.cpp rounds the cache of a slot up to a multiple of this, tokens


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that all other sizes follow from, all explicit."""

    context: int  # tokens of one slot
    parallel: int  # slots
    batch: int  # tokens of a prompt that are computed at once
    micro_batch: int  # tokens of one pass
    cells: int  # tokens that one slot's cache can hold
    outputs: int  # tokens of a pass whose logits are read: of each slot the last, and those that are guessed


def resolve(info: ModelInfo, options: Options, defaults: Options = AUTOMATIC) -> Options:
    """Return options with explicit values where the engine would choose.

    The context is at least 4 tokens (2048 for a vision model) and at most the context that the model was trained with.
    A batch is at least 2 tokens, and as many as there are slots. An embedder has one slot, and its batch holds a whole
    context, since llama.cpp refuses an input that is pooled in more than one pass, unless its last token alone counts.
    `num_gpu`, `main_gpu`, `num_thread`, `use_mmap`, `flash_attention`, `devices` and `require_gpu` stay as they are. An
    option that is not named is first taken from `defaults`, where the model can have it. Resolving options twice
    changes nothing.
    """
    if defaults != AUTOMATIC:
        options = _with_defaults(info, options, defaults)
    shape = shape_of(info, options)
    return replace(
        options,
        num_ctx=shape.context,
        num_batch=shape.batch,
        num_parallel=shape.parallel,
        cache_type_k=options.cache_type_k or "f16",
        cache_type_v=options.cache_type_v or "f16",
        draft_num_predict=_drafted(info, options),
        context_shift=bool(options.context_shift) and can_shift(info),
    )


def can_shift(info: ModelInfo) -> bool:
    """Tell whether llama.cpp can move what is behind a part of a context that it gives up.

    It can where every layer keeps each token by one position: not with windows, states, images or latent attention.
    """
    if info.embedding or info.vision or info.projectors_bytes or any(info.sliding_layers) or any(info.recurrent_layers):
        return False
    if info.draft is not None and not can_shift(info.draft):
        return False
    return not info.architecture.startswith(WITHOUT_SHIFT) and "vl" not in info.architecture


def _drafted(info: ModelInfo, options: Options) -> int:
    """Return how many tokens are guessed ahead: by default `USUAL_DRAFT` where there is a model for it, else none.

    A model that sees has none, since llama.cpp guesses none behind images.
    """
    if info.embedding or info.projectors_bytes:
        return 0
    named = options.draft_num_predict
    return named if named is not None else USUAL_DRAFT if info.draft is not None else 0


def _with_defaults(info: ModelInfo, options: Options, defaults: Options) -> Options:
    """Return options with defaults where none is named, unless a load would fail or take memory beyond reason."""
    named = {each.name: getattr(options, each.name) for each in fields(options)}
    chosen = replace(defaults, **{name: value for name, value in named.items() if value is not None})
    if computes_every_logit(info) and pools_in_one_pass(info):
        chosen = replace(chosen, num_ctx=options.num_ctx)
    if info.key_length % CACHE_BLOCK and chosen.cache_type_k not in UNQUANTISED:
        chosen = replace(chosen, cache_type_k=options.cache_type_k)
    if (info.value_length % CACHE_BLOCK or chosen.flash_attention is False) and chosen.cache_type_v not in UNQUANTISED:
        chosen = replace(chosen, cache_type_v=options.cache_type_v)
    return chosen


def without_doubtful(defaults: Options) -> Options:
    """Return defaults without those that llama.cpp refuses for some models, as no metadata tell."""
    return replace(defaults, flash_attention=None, cache_type_k=None, cache_type_v=None)


def impossible(info: ModelInfo, options: Options) -> tuple[str, int | bool | str, UnsupportedReason] | None:
    """Return the name of the first resolved option that llama.cpp would refuse for this model, its value, and why.

    A load that must fail would evict other runners for nothing, and back the model off for all its requests.
    """
    slots, threads = options.num_parallel or 1, options.num_thread or 1
    if slots > MOST_SLOTS:
        return "num_parallel", slots, UnsupportedReason.too_many_slots
    if threads > MOST_THREADS:
        return "num_thread", threads, UnsupportedReason.too_many_threads
    if info.architecture in WITHOUT_CACHE:
        return None
    caches = (
        ("cache_type_k", options.cache_type_k, info.key_length),
        ("cache_type_v", options.cache_type_v, info.value_length),
    )
    for name, cache_type, length in caches:
        if cache_type is not None and cache_type not in UNQUANTISED and length % CACHE_BLOCK:
            return name, cache_type, UnsupportedReason.partial_blocks
    value_type = options.cache_type_v
    if value_type is not None and value_type not in UNQUANTISED and options.flash_attention is False:
        return "cache_type_v", value_type, UnsupportedReason.needs_flash_attention
    return None


def maps_file(info: ModelInfo, options: Options, on_host: bool) -> bool:
    """Tell whether a runner maps its model's file or reads it; `on_host`: the runner has no layers on GPUs.

    A mapped file loads faster, all processes that map it share its pages, and the system takes them back when it must.
    So the file is mapped unless the request says otherwise, or most of it would be in memory twice: the host computes
    with reordered copies of 4-bit weights. docs/memory.md has the figures.
    """
    if options.use_mmap is not None:
        return options.use_mmap
    return not on_host or 2 * repacked_bytes(info) <= sum(info.layers_bytes)


def repacked_bytes(info: ModelInfo) -> int:
    """Return the bytes of the layers' matrices that are reordered where the host computes alone."""
    return sum(type_bytes for type_name, type_bytes in info.types_bytes if type_name in REPACKED)


def micro_batch(info: ModelInfo, options: Options) -> int:
    """Return the tokens that the engine computes in a pass (n_ubatch): an embedder's input, else a batch up to 2048."""
    return shape_of(info, options).micro_batch


def shape_of(info: ModelInfo, options: Options) -> Shape:
    """Return the sizes that follow from the named options, and from the defaults else, as far as the model allows."""
    whole = computes_every_logit(info) and pools_in_one_pass(info)
    automatic = DEFAULT_EMBEDDER_CONTEXT if whole else DEFAULT_CONTEXT
    context = automatic if options.num_ctx is None else options.num_ctx
    if info.vision:
        context = max(context, LEAST_VISION_CONTEXT)
    if info.context_trained > 0:
        context = min(context, info.context_trained)
    context = max(context, LEAST_CONTEXT)
    parallel = 1 if info.embedding else max(1, options.num_parallel or 1)
    batch = DEFAULT_BATCH if options.num_batch is None else options.num_batch
    if pools_in_one_pass(info):
        batch = context
    else:
        batch = min(batch, context * parallel, LARGEST_MICRO_BATCH if info.embedding else batch)
    batch = max(LEAST_BATCH, parallel, batch)
    micro_batch = batch if info.embedding else min(batch, LARGEST_MICRO_BATCH)
    outputs = min(batch, parallel * (1 + _drafted(info, options)))
    return Shape(context, parallel, batch, micro_batch, padded(context), outputs)


def padded(tokens: int) -> int:
    return -(-tokens // CACHE_CELLS) * CACHE_CELLS


def computes_every_logit(info: ModelInfo) -> bool:
    """Tell whether a model keeps the logits of every token: a decoder with pooling does, although none are read."""
    return info.embedding and info.architecture not in WITHOUT_LOGITS


def only_embeds(info: ModelInfo) -> bool:
    """Tell whether a model cannot go on with a text, since its tokens see those behind them: it has vectors only."""
    return info.architecture in EMBEDDERS or not info.causal


def pools_in_one_pass(info: ModelInfo) -> bool:
    """Tell whether an embedder must compute a whole text at once; the last token needs only what was kept before it."""
    return info.embedding and (info.pooling != "last" or info.architecture in ENCODERS)
