"""llama.cpp as the judge of every estimate: formulas against dry runs, and both against what real runners report.

A part of the architectures is tried here; `make memory` tries all of them, and docs/memory.md has the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from fsm.domain.options import Options
from scheduler.engines import llama
from scheduler.engines.llama import ENGINE, LlamaEngine
from scheduler.engines.llama_options import ENCODERS
from scheduler.engines.llama_sizing import VERIFIED, VERIFIED_VERSION
from scheduler.models.gguf_metadata import read_metadata
from scheduler.models.measurements import installed_version
from scheduler.models.model_spec import ModelSpec
from tests.support.engine_models import LARGE, SMALL, architectures, write
from tests.tools.memory.architectures import LEAST_BYTES, MOST_PART, compare

pytest.importorskip("xllamacpp")

BY_FORMULA = ("bert", "gemma3", "gpt-oss", "lfm2", "llama", "phi3", "qwen3", "qwen3moe")
ASKED = ("deepseek4", "gemma-embedding", "gemma3n", "gemma4", "kimi-linear", "llama4", "mamba2", "qwen3next", "rwkv7")
MATRIX = tuple(
    Options(num_ctx=2048, num_parallel=slots, num_batch=batch, flash_attention=flash, cache_type_k=kind,
            cache_type_v=kind)
    for slots, batch, flash, kind in product((1, 4), (64, 512, 2048), (None, False), ("f16", "q8_0"))
    if flash is None or kind == "f16"
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder in which each model is written once."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> Iterator[LlamaEngine]:
    """Yield an engine that asks llama.cpp about every model."""
    monkeypatch.setattr(llama, "holds", lambda info, version: False)
    engine = LlamaEngine()
    yield engine
    engine.close()


def test_the_formulas_are_for_architectures_that_llama_cpp_knows() -> None:
    """Architectures with formulas exist, and these tests try both kinds."""
    assert set(architectures()) >= VERIFIED >= set(BY_FORMULA)
    assert not VERIFIED & set(ASKED)


@pytest.mark.parametrize(("architecture", "sizes"), [*product(BY_FORMULA, (SMALL, LARGE))])
def test_u20_u24_a_formula_tells_what_llama_cpp_does(
    asking: LlamaEngine, folder: Path, architecture: str, sizes: dict[str, int]
) -> None:
    """Caches and compute buffers are within 5 % or 2 MiB, whatever the slots, cache types, batches and attention."""
    path = write(folder, architecture, sizes)
    embedding = architecture in ENCODERS
    info = read_metadata(str(path), embedding=embedding)
    formulas = asking.profile(info, MATRIX)
    told = asking.inspect(ModelSpec(architecture, str(path), embedding=embedding), MATRIX)
    assert asking.problems == ()
    for ours, theirs in zip(formulas.resolutions, told.resolutions, strict=True):
        mine, real = ours.loads[0].footprint, theirs.loads[0].footprint
        for predicted, bytes_ in (
            (sum(mine.caches_bytes), sum(real.caches_bytes)),
            (mine.compute_bytes, real.compute_bytes),
        ):
            assert abs(predicted - bytes_) <= max(LEAST_BYTES, MOST_PART * bytes_), (ours.asked, predicted, bytes_)


@pytest.mark.parametrize("architecture", [*ASKED, "llama"])
def test_u20_u24_a_prediction_is_what_a_real_runner_reports(served_by: str, folder: Path, architecture: str) -> None:
    """The caches and buffers that are predicted before a load are those that its child reports after it."""
    compared = compare(folder, architecture)
    assert not compared.untried, compared.untried
    assert compared.by_formula is (architecture in VERIFIED and installed_version(ENGINE) == VERIFIED_VERSION)
    assert compared.holds, compared


def test_u22_an_encoder_has_no_cache_and_a_context_as_long_as_its_texts(folder: Path) -> None:
    """U22: an encoder that llama.cpp gives no cache takes none here, and its default context is not cut short."""
    path = write(folder, "gemma-embedding")
    engine = LlamaEngine()
    (resolution,) = engine.inspect(ModelSpec("m", str(path), embedding=True), [Options()]).resolutions
    engine.close()
    load = resolution.loads[0]
    assert (sum(load.footprint.caches_bytes), load.options.num_ctx) == (0, 4096)
    assert load.footprint.compute_bytes < 4096 * 4 * 8192 * 2  # as many logits would take twice that
