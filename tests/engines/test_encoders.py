"""Models that can do nothing but embed: they are embedders, whether or not they were asked for as such."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fsm.domain.options import Options
from scheduler import EngineError, Scheduler
from scheduler.engines.llama import LlamaEngine
from scheduler.engines.llama_options import only_embeds
from scheduler.engines.llama_profile import LlamaSettings
from scheduler.models.gguf_metadata import read_metadata
from scheduler.models.model_spec import ModelSpec
from tests.support.engine_models import write
from tests.support.gguf_bytes import BOOL, text
from tests.support.gguf_bytes import a_model as a_file
from tests.support.leaks import no_leaks
from tests.support.models import a_model
from tests.support.real import settings
from tests.support.tiny_models import write_tiny_model
from tests.support.written_models import Design, write_model

BERT = Design("bert", layers=2, width=64, heads=2, head_size=32, feed_forward=128, vocabulary=400, context=512)


@pytest.fixture
def scheduler(served_by: str) -> Iterator[Scheduler]:
    pytest.importorskip("xllamacpp")
    with no_leaks(), Scheduler(settings()) as scheduler:
        yield scheduler


@pytest.mark.parametrize("embedding", [None, False, True])
def test_u54_an_encoder_embeds_however_it_was_asked_for(
    scheduler: Scheduler, tmp_path: Path, embedding: bool | None
) -> None:
    """U54: an encoder that was not asked for as an embedder has the same vectors, and says that it cannot chat."""
    file = write_model(tmp_path / "bert.gguf", BERT)
    with scheduler.acquire(file, timeout=60, embedding=True) as lease:
        right = lease.embed("a cat")
    with scheduler.acquire(file, timeout=60, embedding=embedding) as lease:
        assert lease.embed("a cat") == pytest.approx(right)
        assert scheduler.fit(file).verdict in ("warm", "fits")
        with pytest.raises(EngineError):
            lease.chat("Hello", max_tokens=1)


@pytest.mark.parametrize("architecture", ["modern-bert", "t5encoder", "llama-embed"])
def test_u54_encoders_of_any_kind_embed(scheduler: Scheduler, tmp_path: Path, architecture: str) -> None:
    """U54: what holds for BERT holds for every kind of encoder."""
    with scheduler.acquire(write(tmp_path, architecture), timeout=60, num_ctx=256) as lease:
        assert len(lease.embed("a")) > 1


def test_u54_a_decoder_is_what_it_was_asked_for(scheduler: Scheduler, tmp_path: Path) -> None:
    """U54: a model that can go on with a text does so, unless it is asked for as an embedder."""
    file = write_tiny_model(tmp_path / "m.gguf")
    with scheduler.acquire(file, timeout=60, num_ctx=256) as lease:
        assert lease.complete("a", max_tokens=1) is not None
        with pytest.raises(EngineError, match="embedding=True"):
            lease.embed("a")


@pytest.mark.parametrize(("value", "embeds"), [(b"\0", True), (b"\1", False)])
def test_u54_a_new_encoder_is_known_by_its_file(tmp_path: Path, value: bytes, embeds: bool) -> None:
    """U54: of an architecture that nobody has seen, the file says whether tokens see those behind them."""
    key = text("never-seen.attention.causal") + BOOL.to_bytes(4, "little") + value
    file = tmp_path / "m.gguf"
    file.write_bytes(a_file(key, architecture="never-seen"))
    assert only_embeds(read_metadata(str(file))) is embeds


def test_u54_the_launch_says_what_the_inspection_found() -> None:
    """U54: what is embedded goes with the settings of each load, and decides its batch and its slots."""
    engine = LlamaEngine()
    for info, embeds in ((a_model(), False), (replace(a_model(), architecture="bert"), True)):
        load = engine.profile(info, [Options(num_parallel=4)]).resolutions[0].loads[0]
        assert LlamaSettings.decoded(load.settings).embedding is embeds
        assert load.options.num_parallel == (1 if embeds else 4)
    engine.close()
    assert ModelSpec("m", "/m.gguf").id != ModelSpec("m", "/m.gguf", embedding=True).id
