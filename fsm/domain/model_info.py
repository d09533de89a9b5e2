"""What is known of a model before it runs: its metadata, and the options it is loaded with."""

from __future__ import annotations

from dataclasses import dataclass


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
    require_gpu: bool | None = None  # whole on GPUs or refused; the limits may say so for all


@dataclass(frozen=True, slots=True)
class Recurrence:
    """The sizes of what recurrent layers keep instead of a cache, in elements; 0 where an architecture has none."""

    conv: int = 0  # ssm.conv_kernel
    inner: int = 0  # ssm.inner_size
    state: int = 0  # ssm.state_size
    groups: int = 0  # ssm.group_count
    rank: int = 0  # ssm.time_step_rank
    short_conv: int = 0  # shortconv.l_cache
    head: int = 0  # wkv.head_size
    shifts: int = 0  # token_shift_count


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What placement needs to know of a GGUF model."""

    architecture: str
    context_trained: int
    embedding_length: int
    feed_forward_length: int  # of what is computed at once: of a dense layer, or of all the experts that are used
    vocabulary: int
    heads: int
    heads_kv: tuple[int, ...]  # per layer; 0 where it does not attend
    key_length: int  # size of one head's key
    value_length: int
    sliding_window: int  # tokens; 0: full attention
    layers_bytes: tuple[int, ...]  # tensor bytes of each repeating layer
    input_bytes: int  # token embeddings and whatever else stays on the host
    output_bytes: int  # output and its norm; without the matrix where that is tied to the input
    file_bytes: int
    embedding: bool  # asked for as an embedder
    vision: bool
    adapters_bytes: int = 0  # sizes of the files beside the model's own
    projectors_bytes: int = 0
    tied: bool = False  # the token embeddings are the output matrix too
    sliding_layers: tuple[bool, ...] = ()  # per layer, whether it sees the window only; empty: none does
    recurrent_layers: tuple[bool, ...] = ()  # per layer, whether it keeps a state; empty: none does
    recurrence: Recurrence = Recurrence()
    experts: int = 0  # in each layer; 0: a dense model
    experts_used: int = 0
    expert_length: int = 0  # feed-forward width of one expert
    gated: bool = True  # the feed-forward multiplies two projections
    merges: int = 0  # of the tokenizer
    types_bytes: tuple[tuple[str, int], ...] = ()  # bytes of the layers' matrices by gguf's name of their type
    output_type: str = ""  # of the output matrix, tied or not; empty: there is none
    quantisation: str = ""  # gguf's name of the type that most of its bytes have
    pooling: str | None = None  # llama.cpp's name; None: the file names none
