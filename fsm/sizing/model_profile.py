"""The profile of a model: what its engine tells of it, as a value that a plan needs no engine for.

An engine makes it, off the core: the files are read, the options of the requests that wait are made explicit, and the
memory of every load that may follow is predicted. The core knows nothing of file formats and of engines' buffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fsm.domain.options import AUTOMATIC, Options
from fsm.sizing.footprint import Footprint

EngineSettings = tuple[tuple[str, int | bool | str | None], ...]  # by name


class UnsupportedReason(Enum):
    """Why an engine would refuse an option for a model."""

    too_many_slots = "too_many_slots"
    too_many_threads = "too_many_threads"
    partial_blocks = "partial_blocks"  # a quantised cache needs heads of whole blocks
    needs_flash_attention = "needs_flash_attention"  # quantised values need it
    no_such_gpu = "no_such_gpu"  # none of the GPUs that are named is there
    needs_all_layers = "needs_all_layers"  # fewer layers on GPUs than `require_gpu` demands


@dataclass(frozen=True, slots=True)
class ResolvedLoad:
    """One way to load a model: explicit options, the memory that they take, and what the engine is told besides."""

    options: Options
    footprint: Footprint
    settings: EngineSettings = ()  # beside the options; the core passes them on with the launch
    least_gpu_bytes: int = 0  # of all GPUs, for a load that is taken only where the model goes whole on GPUs; else 0
    batches: tuple[LargerBatch, ...] = ()  # that may be taken instead, the largest first


@dataclass(frozen=True, slots=True)
class LargerBatch:
    """A load with a larger batch, and the memory that it must leave on the GPUs of a model that is whole on them."""

    load: ResolvedLoad
    part: float  # of the free memory of each GPU that the model may take with this batch
    surcharge_bytes: int  # on each GPU, over the usual batch; the predicted difference counts if it is more


@dataclass(frozen=True, slots=True)
class Resolution:
    """How an engine would load a model for a request: one load, or several where the request names no context.

    The first load is preferred, and later loads have smaller contexts. Raises ValueError where the last one cannot be
    taken on any machine, and where a load has no footprint.
    """

    asked: Options  # as the request names them
    loads: tuple[ResolvedLoad, ...]
    unsupported: tuple[str, int | bool | str, UnsupportedReason] | None = None  # an option that is refused: name, value
    plain_loads: tuple[
        ResolvedLoad, ...
    ] = ()  # without the defaults of settings that may make a load fail; empty: none

    def __post_init__(self) -> None:
        if not self.loads or self.loads[-1].least_gpu_bytes:
            raise ValueError(f"no load of {self.asked} can be taken on any machine")
        loads = [*self.loads, *self.plain_loads, *(batch.load for load in self.loads for batch in load.batches)]
        if not all(isinstance(load.footprint, Footprint) for load in loads):
            raise ValueError(f"a load of {self.asked} has no footprint")


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """What an engine tells of a model's files, with the resolutions that it was asked for."""

    fingerprint: str  # of the files: as long as it stays the same, resolutions and measurements hold
    files_bytes: int  # the sizes of the model's files, which may be read ahead
    resolutions: tuple[Resolution, ...] = ()
    embedding: bool = False  # used for embeddings
    usual: Options = AUTOMATIC  # context and slots of a load for a request that names none
    gpu_libraries: tuple[str, ...] | None = None  # through which the engine can use GPUs; None: all that there are
