"""The options that a model is loaded with, and what bounds their values."""

from __future__ import annotations

from dataclasses import dataclass

MOST_SLOTS = 256  # of a runner
MOST_THREADS = 512  # of a runner
SLOTS = -1  # as a limit of leases: as many as the runner has slots


@dataclass(frozen=True, slots=True)
class Options:
    """Load-time options of a runner; None means automatic, or not named by the request."""

    num_ctx: int | None = None  # context of one slot, tokens
    num_batch: int | None = None  # tokens of a prompt that are computed at once
    num_gpu: int | None = None  # layers on GPUs; negative: automatic; 0: host only
    main_gpu: int | None = None  # index of the GPU to prefer
    num_thread: int | None = None
    num_parallel: int | None = None  # slots; each has a context of its own
    use_mmap: bool | None = None
    flash_attention: bool | None = None
    cache_type_k: str | None = None  # the name of a type of the engine
    cache_type_v: str | None = None
    draft_num_predict: int | None = None  # tokens that are guessed ahead of the model, at most; 0: none
    context_shift: bool | None = None  # a full context gives up its older half, and the answer goes on
    devices: tuple[str, ...] | None = None  # ids of the GPUs that layers may go to
    require_gpu: bool | None = None  # whole on GPUs or refused; a setting may demand it for all models


AUTOMATIC = Options()  # every option is left open
