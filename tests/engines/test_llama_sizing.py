"""Predicted memory of a runner: resolved options, which requests a runner serves, and bytes as llama.cpp reports."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsm.domain.devices import HOST, MIB, DeviceId
from fsm.domain.options import Options
from fsm.sizing.footprint import Footprint, bytes_by_device
from fsm.state.runner_match import serves
from scheduler.config.value_parsers import CACHE_TYPES
from scheduler.engines.llama_options import micro_batch, resolve
from scheduler.engines.llama_sizing import CACHE_BLOCK_BYTES, PROMPT_CACHE_BYTES, estimate
from scheduler.models.model_info import ModelInfo, Recurrence

A_MODEL = ModelInfo(
    architecture="llama",
    context_trained=8192,
    embedding_length=576,
    feed_forward_length=1536,
    vocabulary=49152,
    heads=9,
    heads_kv=(3,) * 30,
    key_length=64,
    value_length=64,
    sliding_window=0,
    layers_bytes=(2_216_448,) * 30,
    input_bytes=30_081_024,
    output_bytes=2304,
    file_bytes=98_362_432,
    embedding=False,
    vision=False,
)
EMBEDDER = replace(A_MODEL, embedding=True)
VISION = replace(A_MODEL, vision=True)
AUTOMATIC = Options()
EIGHT_BIT = Options(cache_type_k="q8_0", cache_type_v="q8_0")

CHANGES = {
    "num_batch": 256,
    "num_gpu": 3,
    "main_gpu": 1,
    "num_thread": 2,
    "use_mmap": False,
    "flash_attention": False,
    "cache_type_k": "q8_0",
    "cache_type_v": "q8_0",
    "draft_num_predict": 4,
    "context_shift": True,
}

some_options = st.builds(
    Options,
    num_ctx=st.none() | st.integers(-1, 20_000),
    num_batch=st.none() | st.integers(0, 20_000),
    num_gpu=st.none() | st.integers(-1, 40),
    main_gpu=st.none() | st.integers(0, 1),
    num_thread=st.none() | st.integers(1, 8),
    num_parallel=st.none() | st.integers(0, 8),
    use_mmap=st.none() | st.booleans(),
    flash_attention=st.none() | st.booleans(),
    cache_type_k=st.none() | st.sampled_from(sorted(CACHE_BLOCK_BYTES)),
    cache_type_v=st.none() | st.sampled_from(sorted(CACHE_BLOCK_BYTES)),
    draft_num_predict=st.none() | st.integers(0, 64),
    context_shift=st.none() | st.booleans(),
)
UNSHARED = replace(A_MODEL, architecture="qwen3next", context_trained=0)
some_models = st.sampled_from([A_MODEL, EMBEDDER, VISION, UNSHARED])


def total(footprint: Footprint) -> int:
    """Return the bytes of a runner that is wholly on the host."""
    return bytes_by_device(footprint, ())[HOST].total_bytes


def cost(info: ModelInfo = A_MODEL, options: Options = AUTOMATIC) -> Footprint:
    return estimate(info, resolve(info, options))


def cache(footprint: Footprint) -> int:
    """Return the bytes of the KV cache."""
    return sum(footprint.caches_bytes)


# resolve


def test_what_is_not_named_gets_the_defaults() -> None:
    """Options that are not named get context 4096, batch 512, one slot, f16 and no drafts; GPU options stay open."""
    expected = Options(num_ctx=4096, num_batch=512, num_parallel=1, cache_type_k="f16", cache_type_v="f16")
    assert resolve(A_MODEL, Options()) == replace(expected, draft_num_predict=0, context_shift=False)


@given(some_models, some_options)
def test_resolving_twice_changes_nothing(info: ModelInfo, options: Options) -> None:
    """Resolving resolved options again changes nothing, whatever was asked for."""
    assert resolve(info, resolve(info, options)) == resolve(info, options)


@pytest.mark.parametrize("num_ctx", [-1, 0, 3, 4])
def test_s01_a_context_below_4_becomes_4(num_ctx: int) -> None:
    """S01: a context below 4 tokens becomes 4."""
    assert resolve(A_MODEL, Options(num_ctx=num_ctx)).num_ctx == 4


def test_s01_a_vision_model_gets_at_least_2048() -> None:
    """S01: a vision model has a context of at least 2048, because an image takes hundreds of tokens."""
    assert resolve(VISION, Options(num_ctx=512)).num_ctx == 2048
    assert resolve(VISION, Options(num_ctx=3000)).num_ctx == 3000


@pytest.mark.parametrize("asked", [None, 2048, 4096, 100_000])
def test_a_context_is_never_larger_than_trained(asked: int | None) -> None:
    """A context is at most the trained one, and is not limited where the trained one is not known."""
    assert resolve(replace(A_MODEL, context_trained=1024), Options(num_ctx=asked)).num_ctx == 1024
    assert resolve(replace(A_MODEL, context_trained=0), Options(num_ctx=asked)).num_ctx == (asked or 4096)


@pytest.mark.parametrize("asked", [None, -2, 0, 1])
def test_s22_there_is_at_least_one_slot(asked: int | None) -> None:
    """S22: a runner has at least one slot, whatever was asked for."""
    assert resolve(A_MODEL, Options(num_parallel=asked)).num_parallel == 1


def test_s22_an_embedder_has_one_slot() -> None:
    """S22: an embedder has one slot, and the same model as many as asked for when it generates."""
    assert resolve(EMBEDDER, Options(num_parallel=4)).num_parallel == 1
    assert resolve(A_MODEL, Options(num_parallel=4)).num_parallel == 4


@pytest.mark.parametrize("family", ["qwen3vl", "qwen35", "qwen3next", "lfm2moe", "nemotron_h", "mamba2"])
def test_u28_a_family_with_states_has_as_many_slots_as_are_named(family: str) -> None:
    """U28: a model that keeps states, or sees, has the slots that its request names: llama.cpp has them too."""
    assert resolve(replace(A_MODEL, architecture=family), Options(num_parallel=4)).num_parallel == 4


def test_a_batch_is_never_larger_than_all_contexts() -> None:
    """A batch is at most the contexts of all slots together."""
    assert resolve(A_MODEL, Options(num_ctx=100, num_parallel=3)).num_batch == 300
    assert resolve(A_MODEL, Options(num_batch=9999)).num_batch == 4096


LAST = replace(EMBEDDER, pooling="last")


def test_u27_an_embedder_that_pools_the_last_token_computes_in_passes() -> None:
    """U27: the last token needs no pass as long as the context: a batch is the usual one, and so is the context."""
    options = resolve(LAST, Options())
    assert (options.num_ctx, options.num_batch, micro_batch(LAST, options)) == (4096, 512, 512)
    assert resolve(LAST, Options(num_ctx=8192)).num_batch == 512


def test_u27_the_memory_of_passes_does_not_grow_with_the_context() -> None:
    """U27: what is computed, and the results, take the same for a context of 4,096 tokens and for one of 8,192."""
    short, long = cost(LAST, Options(num_ctx=4096)), cost(LAST, Options(num_ctx=8192))
    masks_bytes = 512 * 4096 * 2
    assert long.compute_bytes - short.compute_bytes <= masks_bytes
    assert long.process_bytes == short.process_bytes


@pytest.mark.parametrize(("named", "batch"), [(64, 64), (1, 2), (100_000, 1024)])
def test_u27_a_batch_that_is_named_for_passes_holds(named: int, batch: int) -> None:
    """U27: an embedder that computes in passes takes the batch that is named, within its context."""
    assert resolve(LAST, Options(num_ctx=1024, num_batch=named)).num_batch == batch


@pytest.mark.parametrize("pooling", ["mean", "cls", "rank", None])
def test_u27_other_poolings_take_one_pass(pooling: str | None) -> None:
    """U27: an embedder that pools all tokens, and one that is told to do so, computes a whole text at once."""
    info = replace(EMBEDDER, pooling=pooling)
    assert resolve(info, Options(num_ctx=2048)).num_batch == 2048


def test_u27_an_encoder_takes_one_pass_whatever_it_pools() -> None:
    """U27: without a cache nothing is kept of an earlier pass."""
    assert resolve(replace(LAST, architecture="bert"), Options(num_ctx=2048)).num_batch == 2048


@pytest.mark.parametrize("asked", [None, 64, 9999])
def test_an_embedder_takes_a_whole_context_in_one_pass(asked: int | None) -> None:
    """An embedder's batch is its context, because llama.cpp refuses a pooled input longer than a pass."""
    options = resolve(EMBEDDER, Options(num_ctx=1000, num_batch=asked))
    assert (options.num_batch, micro_batch(EMBEDDER, options)) == (1000, 1000)


@pytest.mark.parametrize(("asked", "tokens"), [(None, 512), (64, 64), (2048, 2048), (4096, 2048)])
def test_a_generating_model_computes_its_batch_in_a_pass(asked: int | None, tokens: int) -> None:
    """A generating model computes its batch in one pass of up to 2048 tokens."""
    assert micro_batch(A_MODEL, resolve(A_MODEL, Options(num_batch=asked))) == tokens


# serves


@given(some_models, some_options)
def test_s30_a_runner_serves_what_it_was_loaded_for(info: ModelInfo, asked: Options) -> None:
    """S30: a runner serves the options that it was loaded for, even where they exceed what the model can have."""
    assert serves(resolve(info, asked), resolve(info, asked))


@given(some_models, some_options)
def test_s30_a_runner_serves_who_names_nothing(info: ModelInfo, options: Options) -> None:
    """S30: a runner serves a request that names no options."""
    assert serves(resolve(info, options), Options())


@pytest.mark.parametrize("name", ["num_ctx", "num_parallel"])
def test_s30_a_larger_runner_serves_a_smaller_wish(name: str) -> None:
    """S30: a runner with a larger context or more slots serves a smaller request, and not the other way round."""
    small = Options(num_ctx=1024, num_parallel=2)
    large = replace(small, **{name: 2048})
    assert serves(resolve(A_MODEL, large), small)
    assert not serves(resolve(A_MODEL, small), large)


@pytest.mark.parametrize(("name", "value"), CHANGES.items())
def test_s30_any_other_difference_needs_a_reload(name: str, value: object) -> None:
    """S30: any other option that differs needs a reload."""
    asked = Options(**{name: value})
    assert not serves(resolve(A_MODEL, Options()), asked)
    assert serves(resolve(A_MODEL, asked), asked)


def test_s30_every_option_is_compared() -> None:
    """S30: every field of the options is compared."""
    assert {each.name for each in fields(Options)} == {*CHANGES, "num_ctx", "num_parallel", "devices", "require_gpu"}


def test_s30_a_negative_num_gpu_matches_any() -> None:
    """S30: a negative num_gpu is automatic and matches any number of layers."""
    assert serves(resolve(A_MODEL, Options(num_gpu=7)), Options(num_gpu=-1))
    assert not serves(resolve(A_MODEL, Options(num_gpu=-1)), Options(num_gpu=7))


def test_s30_a_larger_embedder_serves_a_smaller_wish() -> None:
    """S30: an embedder with a larger context serves a request for a smaller one, although their batches differ."""
    assert serves(resolve(EMBEDDER, Options()), resolve(EMBEDDER, Options(num_ctx=512, num_parallel=4)))


# estimate


def test_the_cache_is_what_the_engine_reports() -> None:
    """The cache is what llama.cpp prints: 45 MiB for SmolLM2 in f16, and 51 MiB for a wider model in q8_0."""
    assert cache(cost(options=Options(num_ctx=2048))) == 45 * MIB
    wide = replace(A_MODEL, heads=8, heads_kv=(4,) * 12, layers_bytes=(5_000_000,) * 12)
    options = replace(EIGHT_BIT, num_ctx=2048, num_parallel=4)
    assert cache(cost(wide, options)) == 51 * MIB


@pytest.mark.parametrize("cache_type", sorted(CACHE_BLOCK_BYTES))
def test_the_cache_goes_with_its_type(cache_type: str) -> None:
    """The cache of keys and of values follows ggml's block size of its own type."""
    plain = cache(cost())
    keys = cache(cost(options=Options(cache_type_k=cache_type)))
    both = cache(cost(options=Options(cache_type_k=cache_type, cache_type_v=cache_type)))
    assert both == plain * CACHE_BLOCK_BYTES[cache_type] // CACHE_BLOCK_BYTES["f16"]
    assert keys - plain == (both - plain) // 2


def test_a_slot_s_cache_is_rounded_up_to_256_tokens() -> None:
    """The cache of a slot is rounded up to 256 tokens, as llama.cpp pads it."""
    small, padded = (cost(options=Options(num_ctx=size, num_parallel=3)) for size in (100, 256))
    assert cache(small) == cache(padded) > 0


def test_sliding_layers_cache_their_window_only() -> None:
    """Sliding layers of gemma3 cache their window and one pass, as llama.cpp prints it."""
    sliding = (*(True,) * 5, False) * 2
    gemma = replace(A_MODEL, sliding_window=512, heads_kv=(2,) * 12, layers_bytes=(0,) * 12, sliding_layers=sliding)
    layers = cost(gemma).layers_bytes
    assert layers == (1024 * 2 * 128 * 2,) * 5 + (4096 * 2 * 128 * 2,) + (1024 * 2 * 128 * 2,) * 5 + layers[5:6]


def test_layers_without_attention_and_encoders_have_no_cache() -> None:
    """Layers without attention and encoders have no cache."""
    mixed = replace(A_MODEL, heads_kv=(0, 3, *A_MODEL.heads_kv[2:]))
    assert cost(mixed).layers_bytes[0] == mixed.layers_bytes[0] < cost(mixed).layers_bytes[1]
    assert cache(cost(replace(EMBEDDER, architecture="nomic-bert"))) == 0


@pytest.mark.parametrize(
    ("info", "options", "expected_mib"),
    [
        (A_MODEL, Options(num_ctx=512), 15.14),
        (A_MODEL, Options(num_ctx=8192), 22.64),
        (A_MODEL, Options(num_ctx=2048, flash_attention=False), 47.51),
        (EMBEDDER, Options(num_ctx=512), 102.15),
    ],
)
def test_the_compute_buffer_is_what_the_engine_reports(info: ModelInfo, options: Options, expected_mib: float) -> None:
    """The compute buffer of SmolLM2 is what llama.cpp prints, and an embedder computes the logits of all its tokens."""
    assert cost(info, options).compute_bytes / MIB == pytest.approx(expected_mib, rel=0.05)


def test_what_lies_beside_the_model_goes_with_its_output() -> None:
    """Adapters and projectors are counted with the output layer."""
    assert cost(replace(A_MODEL, adapters_bytes=5 * MIB)).output_bytes - cost().output_bytes == 5 * MIB


def test_every_cache_type_that_may_be_named_has_a_size() -> None:
    """The types that settings and requests may name are those of which the size of a block is known."""
    assert set(CACHE_TYPES) == set(CACHE_BLOCK_BYTES)


def test_the_prompt_cache_is_counted_as_the_engine_is_told() -> None:
    """The prompt cache is a sixteenth of the rest in whole MiB and at most 64 MiB, and an embedder has none."""
    options = resolve(A_MODEL, Options())
    told = estimate(A_MODEL, options).prompt_cache_bytes
    assert told % MIB == 0 and told == (total(estimate(A_MODEL, options)) - told) // 16 // MIB * MIB
    large = replace(A_MODEL, layers_bytes=(MIB * 1024,) * 30)
    assert estimate(large, options).prompt_cache_bytes == PROMPT_CACHE_BYTES
    assert cost(EMBEDDER).prompt_cache_bytes == 0


def test_reordered_weights_count_twice_where_the_file_is_mapped() -> None:
    """Weights of reordered types count twice where the file is mapped and the host alone computes."""
    four_bit = replace(A_MODEL, types_bytes=(("Q4_0", 60 * MIB), ("Q6_K", 4 * MIB)), output_type="Q6_K")
    read, mapped = (cost(four_bit, Options(num_gpu=0, use_mmap=use_mmap)) for use_mmap in (False, True))
    assert (read.repacked_bytes, mapped.repacked_bytes) == (0, 60 * MIB)
    assert total(mapped) - total(read) == pytest.approx(60 * MIB, rel=0.1)  # the prompt cache grows with the rest
    stays = replace(A_MODEL, types_bytes=(("Q4_1", 64 * MIB),), output_type="Q8_0")
    assert cost(stays, Options(num_gpu=0, use_mmap=True)).repacked_bytes == 0


def test_an_output_matrix_is_reordered_too() -> None:
    """An output matrix is reordered too, and tied embeddings are copied even where the file is read."""
    untied = replace(A_MODEL, types_bytes=(("Q4_K", 60 * MIB),), output_type="Q4_K", output_bytes=9 * MIB)
    assert cost(untied, Options(use_mmap=True)).repacked_bytes == 69 * MIB
    tied = replace(untied, tied=True, input_bytes=9 * MIB, token_embd_bytes=7 * MIB)
    assert cost(tied, Options(use_mmap=True)).repacked_bytes == 67 * MIB
    assert cost(tied, Options(use_mmap=False)).repacked_bytes == 7 * MIB


UNIGRAM = replace(A_MODEL, tokenizer="t5")


def test_u23_a_tokenizer_that_scores_takes_more_for_each_token() -> None:
    """U23: a tokenizer of T5's kind takes three times what others do."""
    more_bytes = cost(UNIGRAM).process_bytes - cost(A_MODEL).process_bytes
    assert more_bytes == A_MODEL.vocabulary * 380


STEPS = replace(A_MODEL, step_bytes=64 * MIB)


@pytest.mark.parametrize(("layers", "copied"), [(0, 0), (1, 64), (30, 64), (31, 0)])
def test_u25_a_gpu_is_given_copies_of_the_host_s_weights(layers: int, copied: int) -> None:
    """U25: while a layer is on the host, the first GPU has room for the weights of a step: it computes long batches."""
    footprint = cost(STEPS)
    split = ((DeviceId("gpu"), layers),) if layers else ()
    found = bytes_by_device(footprint, split)
    device = found[DeviceId("gpu")] if layers else found[HOST]
    assert device.compute_bytes - footprint.compute_bytes == copied * MIB


def test_u25_only_the_first_gpu_is_given_copies() -> None:
    """U25: of several GPUs the first computes what is on the host."""
    footprint = cost(STEPS)
    found = bytes_by_device(footprint, ((DeviceId("a"), 10), (DeviceId("b"), 10)))
    assert found[DeviceId("a")].compute_bytes - found[DeviceId("b")].compute_bytes == 64 * MIB


@pytest.mark.parametrize(("batch", "copied"), [(31, 0), (32, 64)])
def test_u25_short_batches_are_computed_where_the_weights_are(batch: int, copied: int) -> None:
    """U25: nothing is copied for batches of less than 32 tokens."""
    assert cost(STEPS, Options(num_batch=batch)).step_bytes == copied * MIB


@pytest.mark.parametrize("slots", [1, 4])
def test_the_logits_of_each_slot_count(slots: int) -> None:
    """A large vocabulary takes the most of a small batch: a row of logits for each slot."""
    large = replace(A_MODEL, vocabulary=262_144)
    assert cost(large, Options(num_batch=4, num_parallel=slots)).compute_bytes >= 4 * 262_144 * slots


def test_u26_images_take_memory_of_the_host() -> None:
    """U26: an image is there several times while it is read, wherever its projector is."""
    seeing = replace(VISION, image_bytes=9 * MIB)
    assert cost(seeing).process_bytes - cost(VISION).process_bytes == 45 * MIB


def test_a_recurrent_layer_keeps_a_state_for_each_slot() -> None:
    """A recurrent layer keeps a state for each slot, whatever the context and the cache type."""
    sizes = Recurrence(conv=4, inner=1024, state=128, groups=1, rank=16)
    state_bytes = 4 * (3 * (1024 + 2 * 128) + 128 * 1024)
    hybrid = replace(
        A_MODEL,
        recurrence=sizes,
        recurrent_layers=(True, False) * 15,
        heads_kv=(0, 3) * 15,
        architecture="granitehybrid",
    )
    small, large = (cost(hybrid, replace(EIGHT_BIT, num_ctx=context, num_parallel=4)) for context in (512, 4096))
    assert small.caches_bytes[0] == large.caches_bytes[0] == 4 * state_bytes
    assert large.caches_bytes[1] == 8 * small.caches_bytes[1] > 0


def test_checkpoints_are_counted_for_each_slot() -> None:
    """Two checkpoints of the sliding layers are counted for each slot, and none for embedders or full attention."""
    gemma = replace(A_MODEL, architecture="gemma3", sliding_window=512, sliding_layers=(True, False) * 15)
    options = Options(num_ctx=2048, num_parallel=3)
    assert cost(gemma, options).checkpoints_bytes == 2 * 3 * 15 * 512 * 3 * (64 + 64) * 2
    assert (
        cost(replace(gemma, embedding=True), options).checkpoints_bytes == cost(A_MODEL, options).checkpoints_bytes == 0
    )


@given(some_models, some_options, some_options)
def test_asking_for_more_never_takes_less(info: ModelInfo, some: Options, other: Options) -> None:
    """A larger context or more slots never take less memory, and no part is negative."""
    less = replace(some, num_ctx=min(some.num_ctx or 0, other.num_ctx or 0), num_parallel=some.num_parallel or 1)
    more = replace(some, num_ctx=max(some.num_ctx or 0, other.num_ctx or 0), num_parallel=(some.num_parallel or 1) + 1)
    assert 0 < total(cost(info, less)) <= total(cost(info, more))
