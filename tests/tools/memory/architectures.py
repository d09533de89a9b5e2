"""Every architecture that llama.cpp knows: what is predicted of a small model, beside what a real child reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fsm.domain.devices import MIB
from fsm.domain.options import Options
from scheduler.engines.llama import ENGINE
from scheduler.engines.llama_options import ENCODERS
from scheduler.engines.llama_sizing import holds
from scheduler.models.gguf_metadata import read_metadata
from scheduler.models.measurements import installed_version
from scheduler.models.model_spec import ModelSpec
from tests.support.engine_models import Unwritable, write
from tests.support.own_server import an_engine
from tests.tools.memory.measure import running

MOST_PART = 0.05  # by which caches or compute buffers may be wrong
LEAST_BYTES = 2 * MIB  # by which they may be wrong however small they are
ROUNDED = 0.01  # MiB, to which llama.cpp prints each part of a buffer

OPTIONS = (
    Options(num_ctx=2048, num_batch=512, num_parallel=1),
    Options(num_ctx=1024, num_batch=64, num_parallel=4, cache_type_k="q8_0", cache_type_v="q8_0"),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """One size, predicted and reported, in bytes."""

    predicted: int
    reported: int

    @property
    def holds(self) -> bool:
        """Whether the prediction is within its bounds."""
        return abs(self.predicted - self.reported) <= max(LEAST_BYTES, MOST_PART * self.reported)

    def __str__(self) -> str:
        return f"{self.predicted / MIB:.1f} / {self.reported / MIB:.1f}"


@dataclass(frozen=True, slots=True)
class Compared:
    """An architecture, with caches and compute buffers for each of `OPTIONS`."""

    architecture: str
    by_formula: bool  # without a dry run
    pairs: tuple[Pair, ...] = ()
    untried: str = ""  # why there is no comparison

    @property
    def holds(self) -> bool:
        """Whether all predictions are within their bounds."""
        return all(pair.holds for pair in self.pairs)


def compare(folder: Path, architecture: str) -> Compared:
    """Write a model, load it for real, and compare; a model that llama.cpp cannot serve is said to be untried."""
    try:
        path = write(folder, architecture)
    except Unwritable as error:
        return Compared(architecture, False, untried=f"not written: {_short(error)}")
    embedding = architecture in ENCODERS
    by_formula = holds(read_metadata(str(path), embedding=embedding), installed_version(ENGINE))
    found: list[Pair] = []
    try:
        for options in OPTIONS[: 1 if embedding else len(OPTIONS)]:
            found += pairs(ModelSpec(architecture, str(path), embedding=embedding), options)
    except AssertionError as error:
        return Compared(architecture, by_formula, untried=f"not served: {_short(error)}")
    return Compared(architecture, by_formula, tuple(found))


def pairs(model: ModelSpec, options: Options) -> list[Pair]:
    """Return the caches and the compute buffers of a load: what is predicted of it, and what its child reports."""
    engine = an_engine()
    try:
        footprint = engine.inspect(model, [options]).resolutions[0].loads[0].footprint
        assert not engine.problems, engine.problems[0]
    finally:
        engine.close()
    with running(model, options) as (process, _, _):
        kinds = {each.kind: each.bytes for each in process.buffers}
    return [
        Pair(sum(footprint.caches_bytes), kinds.get("cache", 0)),
        Pair(footprint.compute_bytes, kinds.get("compute", 0)),
    ]


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[-120:]
