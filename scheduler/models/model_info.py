"""The metadata of a GGUF model that its placement depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Recurrence:
    """The sizes of the states that recurrent layers keep instead of a cache, in elements; 0 for a missing state."""

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
    """The metadata of a GGUF model that its placement depends on."""

    architecture: str
    context_trained: int
    embedding_length: int
    feed_forward_length: int  # width that is computed at once: of a dense layer, or of all experts that are used
    vocabulary: int
    heads: int
    heads_kv: tuple[int, ...]  # per layer; 0 for a layer without attention
    key_length: int  # size of one head's key
    value_length: int
    sliding_window: int  # tokens; 0: full attention
    layers_bytes: tuple[int, ...]  # tensor bytes of each repeating layer
    input_bytes: int  # token embeddings and all other tensors that are only looked up in, and stay on the host
    output_bytes: int  # output, its norm, and all else that is of no layer; without the matrix where it is tied
    file_bytes: int
    embedding: bool  # used for embeddings
    vision: bool
    adapters_bytes: int = 0  # sizes of the files beside the model's own
    switched: bool = False  # requests choose among its adapters
    projectors_bytes: int = 0
    draft: Self | None = None  # of a small model that guesses tokens ahead of this one
    image_bytes: int = 0  # of the largest image that a projector takes at once, as 32-bit floats; 0: unknown
    tied: bool = False  # the token embeddings are the output matrix too
    token_embd_bytes: int = 0
    sliding_layers: tuple[bool, ...] = ()  # per layer, whether it sees the window only; empty: no layer does
    recurrent_layers: tuple[bool, ...] = ()  # per layer, whether it keeps a state; empty: no layer does
    recurrence: Recurrence = Recurrence()
    experts: int = 0  # in each layer; 0: a dense model
    experts_used: int = 0
    expert_length: int = 0  # feed-forward width of one expert
    gated: bool = True  # the feed-forward multiplies two projections
    step_bytes: int = 0  # the most weights of one layer that are computed with at once
    tokenizer: str = ""  # llama.cpp's name of its kind
    merges: int = 0  # of the tokenizer
    types_bytes: tuple[tuple[str, int], ...] = ()  # bytes of the layers' matrices by gguf's name of their type
    output_type: str = ""  # of the output matrix, tied or not; empty: the model has no output matrix
    quantisation: str = ""  # gguf's name of the type that most of its bytes have
    pooling: str | None = None  # llama.cpp's name; None: the file names none
    digest: str = ""  # of all keys and tensors of the files: the engine may go by others than those above
    causal: bool = True  # a token sees the tokens before it only, so that the model can go on with a text
    unknown: tuple[str, ...] = ()  # tensors that the gguf package does not know: the engine may, or may refuse the file
