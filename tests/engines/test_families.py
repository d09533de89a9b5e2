"""Families of models that no list of ours names: what llama.cpp says of their caches, states, windows and inputs.

The sizes that are expected follow from the shapes of the small models, and real runners are asked for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from fsm.domain.devices import MIB
from fsm.domain.options import Options
from fsm.sizing.footprint import Footprint
from scheduler import Scheduler
from scheduler.engines.llama import LlamaEngine
from scheduler.models.model_spec import ModelSpec
from tests.support import engine_models
from tests.support.engine_models import SMALL, write
from tests.support.leaks import no_leaks
from tests.support.real import SHORT, settings
from tests.support.written_models import Design, write_model
from tests.tools.memory.architectures import pairs

pytest.importorskip("xllamacpp")

PASS = 512  # tokens that are computed at once, for which a window has room besides
KEYS_BYTES = 2 * 2 * SMALL["heads_kv"] * SMALL["head"]  # of a token in one layer, with its values
PRINTED_BYTES = 0.02 * MIB  # by which two figures differ that llama.cpp prints in hundredths of a MiB


Write = Callable[..., Path]  # of an architecture, and of a vocabulary


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Return what writes a small model, each once."""
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda architecture, vocabulary=8192: write(folder, architecture, SMALL, vocabulary))


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    """Yield an engine that remembers what it was told."""
    engine = LlamaEngine()
    yield engine
    assert engine.problems == ()
    engine.close()


def footprints(engine: LlamaEngine, path: Path, *asked: Options, embedding: bool = False) -> list[Footprint]:
    """Return what a model takes with each of some options."""
    found = engine.inspect(ModelSpec(path.stem, str(path), embedding=embedding), asked)
    return [resolution.loads[0].footprint for resolution in found.resolutions]


def contexts(*tokens: int) -> Sequence[Options]:
    """Return options that name these contexts."""
    return [Options(num_ctx=each) for each in tokens]


# -- lists of architectures that end where they were measured ----------------------------------------------------------


@pytest.mark.parametrize("architecture", ["dream", "llada", "llada-moe", "rnd1"])
def test_u22_a_model_that_unmasks_a_whole_text_has_no_cache(
    engine: LlamaEngine, model: Write, architecture: str
) -> None:
    """Diffusion models generate and keep nothing of a token, however long the context is."""
    short, long = footprints(engine, model(architecture), *contexts(1024, 8192))
    assert sum(short.caches_bytes) == sum(long.caches_bytes) == 0
    assert short.compute_bytes == long.compute_bytes


@pytest.mark.parametrize(("architecture", "window", "sliding"), [("gemma2", 4096, (0, 2)), ("llama4", 8192, (0, 1, 2))])
def test_u22_a_window_that_only_llama_cpp_knows_bounds_its_layers(
    engine: LlamaEngine, model: Write, architecture: str, window: int, sliding: tuple[int, ...]
) -> None:
    """The window of Gemma 2 and the chunks of Llama 4 are in the loader, and no key of the file tells of them."""
    path = model(architecture)
    assert b"sliding_window" not in path.read_bytes()
    for tokens, found in zip((1024, 32768), footprints(engine, path, *contexts(1024, 32768)), strict=True):
        cells = [min(tokens, window + PASS) if layer in sliding else tokens for layer in range(SMALL["layers"])]
        assert found.caches_bytes == pytest.approx([KEYS_BYTES * each for each in cells], abs=PRINTED_BYTES)


@pytest.mark.parametrize("architecture", ["eurobert", "gemma-embedding", "llama-embed"])
def test_u22_an_embedder_computes_no_logits(engine: LlamaEngine, model: Write, architecture: str) -> None:
    """A vocabulary that is eight times as large costs an embedder's passes nothing, whatever it is derived from."""
    small, large = (
        footprints(engine, model(architecture, vocabulary), *contexts(1024), embedding=True)[0]
        for vocabulary in (8192, 65536)
    )
    assert small.compute_bytes == large.compute_bytes


# -- too little --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "slots"), [("deepseek32", 1), ("glm-dsa", 4)])
def test_u23_an_indexer_keeps_keys_beside_those_of_its_layer(
    engine: LlamaEngine, model: Write, architecture: str, slots: int
) -> None:
    """A layer with an indexer keeps what one of DeepSeek 2 keeps of a token, and a key of 64 numbers."""
    asked = Options(num_ctx=4096, num_parallel=slots)
    plain, indexed = (footprints(engine, model(each), asked)[0] for each in ("deepseek2", architecture))
    more_bytes = sum(indexed.caches_bytes) - sum(plain.caches_bytes)
    assert more_bytes == pytest.approx(SMALL["layers"] * slots * 4096 * 2 * 64, abs=PRINTED_BYTES)
    assert indexed.compute_bytes > plain.compute_bytes


# Bytes of one slot's states in one layer of a small model: 32-bit numbers.
STATES: Mapping[str, tuple[tuple[int, ...], int]] = {
    "rwkv7": ((0, 1, 2, 3), 4 * (512 * 64 + 2 * 512)),
    "falcon-h1": ((0, 1, 2, 3), 4 * (1024 * 64 + 3 * (1024 + 2 * 64))),
    "kimi-linear": ((0, 2), 4 * (8 * 64 * 64 + 3 * 3 * 8 * 64)),
    "qwen35": ((0, 1, 2), 4 * (1024 * 64 + 3 * (1024 + 2 * 64))),
    "nemotron_h": ((0, 3), 4 * (1024 * 64 + 3 * (1024 + 2 * 64))),
}


@pytest.mark.parametrize("architecture", STATES)
def test_u23_states_count_for_each_slot_and_for_no_token(engine: LlamaEngine, model: Write, architecture: str) -> None:
    """Layers with states have all of them in each slot, beside keys and values or in place of them."""
    layers, state_bytes = STATES[architecture]
    asked = [Options(num_ctx=tokens, num_parallel=slots) for tokens, slots in ((1024, 1), (2048, 1), (1024, 4))]
    one, longer, four = (found.caches_bytes for found in footprints(engine, model(architecture), *asked))
    for layer in range(SMALL["layers"]):
        of_tokens = longer[layer] - one[layer]
        assert one[layer] - of_tokens == pytest.approx(state_bytes * (layer in layers), abs=PRINTED_BYTES)
        assert four[layer] == pytest.approx(4 * one[layer], abs=4 * PRINTED_BYTES)


@pytest.mark.parametrize("batch", [512, 2048])
def test_u23_further_inputs_of_a_pass_are_computed_with(
    engine: LlamaEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """A model that sees takes three further inputs for each token, as wide as the model itself, in all its layers."""
    asked = Options(num_ctx=4096, num_batch=batch)
    monkeypatch.setattr(engine_models, "OF_ARCHITECTURE", {"qwen3vl": {"n_deepstack_layers": 3}})
    (deep,) = footprints(engine, write(tmp_path, "qwen3vl"), asked)
    (plain,) = footprints(engine, write(tmp_path, "qwen3"), asked)
    assert deep.compute_bytes - plain.compute_bytes >= 3 * batch * SMALL["width"] * 4


LONG = Options(num_ctx=8192, num_batch=2048, num_parallel=2)
LEVEL = Options(num_ctx=512, num_batch=256, num_parallel=3, flash_attention=False)


@pytest.mark.parametrize(("architecture", "asked"), [("falcon-h1", LEVEL), ("glm-dsa", LONG), ("nemotron_h", LONG)])
def test_u23_a_real_runner_takes_no_more_than_was_told(model: Write, architecture: str, asked: Options) -> None:
    """What a child reports of long contexts, large batches and several slots is what the dry run has told of them."""
    assert all(pair.holds for pair in pairs(ModelSpec(architecture, str(model(architecture))), asked))


# -- too much ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 4])
def test_u24_compressed_keys_grow_by_their_ratios(engine: LlamaEngine, model: Write, slots: int) -> None:
    """DeepSeek 4 keeps one key of four tokens, with an indexer's, or one of 128; the other layers slide."""
    asked = [Options(num_ctx=tokens, num_parallel=slots) for tokens in (4096, 16384)]
    few, more = (found.caches_bytes for found in footprints(engine, model("deepseek4"), *asked))
    assert few[0] == more[0] == few[3] == more[3]
    in_four = 2 * (512 + 128) // 4
    assert more[1] - few[1] == pytest.approx(slots * (16384 - 4096) * in_four, abs=PRINTED_BYTES)
    least_cells = 256  # llama.cpp rounds up to as many, which are those of 32,768 tokens
    assert few[2] == more[2]
    states_bytes = 2 * 128 * 512 * 4  # of keys and of their scores, for the 128 tokens that become one
    window_bytes = few[0] // slots
    assert few[2] == pytest.approx(slots * (window_bytes + least_cells * 2 * 512 + states_bytes), abs=PRINTED_BYTES)


@pytest.mark.parametrize(("architecture", "asked"), [("kimi-linear", LONG), ("qwen35", LEVEL), ("qwen3next", LONG)])
def test_u24_a_delta_net_is_promised_no_more_than_a_real_runner_takes(
    model: Write, architecture: str, asked: Options
) -> None:
    """The passes of gated delta nets take what a child reports of them, whatever the batch and the slots."""
    assert all(pair.holds for pair in pairs(ModelSpec(architecture, str(model(architecture))), asked))


@pytest.mark.parametrize("architecture", ["modern-bert", "nomic-bert-moe", "t5encoder"])
def test_u24_an_encoder_is_promised_no_more_than_a_real_runner_takes(model: Write, architecture: str) -> None:
    """Encoders beyond BERT compute their texts in one pass, experts and relative positions included."""
    encoder = ModelSpec(architecture, str(model(architecture)), embedding=True)
    assert all(pair.holds for pair in pairs(encoder, Options(num_ctx=1024)))


# -- slots -------------------------------------------------------------------------------------------------------------

TINY: Mapping[str, int] = {"layers": 4, "width": 128, "heads": 2, "heads_kv": 1, "feed_forward": 256,
                           "vocabulary": 300, "inner": 256, "recurrent_heads": 4}  # fmt: skip


@pytest.mark.parametrize("architecture", ["granitehybrid", "lfm2", "mamba2"])
def test_u28_four_slots_answer_as_one_does(served_by: str, tmp_path: Path, architecture: str) -> None:
    """A runner with states answers four requests at once in its four slots, with the tokens of one after the other."""
    path, prompts = (
        write_model(tmp_path / "model.gguf", Design(architecture, **TINY)),
        ["abc", "the quick brown", "x y z", "0123456789"],
    )
    with no_leaks(), Scheduler(settings()) as scheduler:
        with scheduler.acquire(path, num_ctx=256, num_parallel=1, timeout=60) as lease:
            alone = [lease.complete(prompt, **SHORT) for prompt in prompts]
        with scheduler.acquire(path, num_ctx=256, num_parallel=4, timeout=60) as lease, ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda prompt: lease.complete(prompt, **SHORT), prompts))
            (runner,) = [one for one in scheduler.status().runners if one.state == "ready"]
            assert runner.options.num_parallel == 4
        assert together == alone and len(set(alone)) > 1
