"""Reading GGUF headers: the values of sound models, and one clear error for everything else."""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import gguf
import pytest

from scheduler.errors import InvalidModel, ModelNotFound
from scheduler.header import CACHED_HEADERS, MOST_TEXTS, read_header
from scheduler.metadata import read_metadata
from tests.tiny_models import write_tiny_model

U32, U64, TEXT, ARRAY, U8 = 4, 10, 8, 9, 0
F32, Q4_0 = 0, 2
QUICK_S = 5.0  # each takes milliseconds


def text(content: str | bytes) -> bytes:
    raw = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(raw)) + raw


def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", U32, value)


def words(key: str, value: str) -> bytes:
    return text(key) + struct.pack("<I", TEXT) + text(value)


def array(key: str, kind: int, count: int, content: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", ARRAY, kind, count) + content


def tensor(name: str, sizes: Sequence[int] = (8,), kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def a_model(
    *more: bytes,
    architecture: str = "llama",
    blocks: int = 1,
    tensors: Sequence[bytes] = (tensor("blk.0.attn_q.weight"),),
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: bytes = bytes(256),
) -> bytes:
    """The bytes of a small model, with `more` keys."""
    pairs = [words("general.architecture", architecture), number(f"{architecture}.block_count", blocks)]
    pairs += [number(f"{architecture}.embedding_length", 32), number(f"{architecture}.context_length", 64), *more]
    tensor_count, key_count = counts or (len(tensors), len(pairs))
    header = struct.pack("<4sIQQ", b"GGUF", version, tensor_count, key_count) + b"".join([*pairs, *tensors])
    return header + bytes(-len(header) % 32) + data


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A small model that llama.cpp loads."""
    return write_tiny_model(tmp_path / "tiny.gguf", layers=3)


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


# Sound files


def test_the_values_are_those_of_the_gguf_package(tiny: Path) -> None:
    """Numbers by key, array lengths and tensor sizes are what GGUFReader finds."""
    header, reader = read_header(str(tiny)), gguf.GGUFReader(tiny)
    assert {each.name: each.bytes for each in header.tensors} == {t.name: int(t.n_bytes) for t in reader.tensors}
    expected = {key: found for key, found in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.values.keys() == expected.keys()
    for key, value in header.values.items():
        if isinstance(value, int | float):
            assert value == pytest.approx(float(expected[key].parts[-1][0])), key
    assert header.lengths["tokenizer.ggml.tokens"] == len(expected["tokenizer.ggml.tokens"].data) == 257


def test_the_model_is_described_by_its_metadata_and_tensors(tiny: Path) -> None:
    """Every field of ModelInfo, for a model whose numbers are known."""
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
    """The same file serves as both."""
    assert read_metadata(str(tiny), embedding=True).embedding


def test_adapters_and_projectors_add_their_size(tmp_path: Path, tiny: Path) -> None:
    """A projector makes a vision model; an adapter does not."""
    adapter = write(tmp_path / "adapter.gguf", a_model(words("general.type", "adapter")))
    projector = write(tmp_path / "projector.gguf", a_model(architecture="clip"))
    assert read_metadata(str(tiny), adapters=[adapter]).adapters_bytes == os.path.getsize(adapter)
    both = read_metadata(str(tiny), adapters=[adapter], projectors=[projector])
    assert (both.adapters_bytes, both.projectors_bytes) == (os.path.getsize(adapter), os.path.getsize(projector))
    assert both.vision and not read_metadata(str(tiny), adapters=[adapter]).vision


def test_a_projector_for_sound_makes_no_vision_model(tmp_path: Path, tiny: Path) -> None:
    """Only images need the larger context."""
    content = a_model(number("clip.has_audio_encoder", 1), architecture="clip")
    assert not read_metadata(str(tiny), projectors=[write(tmp_path / "sound.gguf", content)]).vision


def test_what_is_left_out_is_taken_as_llama_cpp_takes_it(tmp_path: Path) -> None:
    """Without head_count_kv all heads count; without key_length the width is shared among the heads."""
    path = write(tmp_path / "m.gguf", a_model(number("llama.attention.head_count", 4)))
    info = read_metadata(path)
    assert (info.heads, info.heads_kv, info.key_length, info.value_length) == (4, (4,), 8, 8)


def test_heads_may_differ_by_layer(tmp_path: Path) -> None:
    """A layer without attention has no heads, and no cache."""
    heads = array("llama.attention.head_count_kv", U32, 3, struct.pack("<3I", 2, 0, 1))
    tensors = [tensor(f"blk.{layer}.ffn_up.weight", offset=32 * layer) for layer in range(3)]
    content = a_model(heads, number("llama.attention.head_count", 4), blocks=3, tensors=tensors)
    path = write(tmp_path / "m.gguf", content)
    assert read_metadata(path).heads_kv == (2, 0, 1)


def test_experts_in_use_count_together(tmp_path: Path) -> None:
    """What is computed at once is as wide as all experts in use."""
    keys = number("llama.expert_used_count", 8), number("llama.expert_feed_forward_length", 96)
    path = write(tmp_path / "m.gguf", a_model(*keys, number("llama.feed_forward_length", 128)))
    assert read_metadata(path).feed_forward_length == 768


@pytest.mark.parametrize("architecture", ["bert", "nomic-bert", "mamba"])
def test_architectures_without_heads_or_cache_are_read(tmp_path: Path, architecture: str) -> None:
    """An encoder has no key-value heads of its own, a state-space model no heads at all."""
    info = read_metadata(write(tmp_path / "m.gguf", a_model(architecture=architecture)), embedding=True)
    assert (info.architecture, info.heads, info.heads_kv, info.key_length) == (architecture, 0, (0,), 0)


def test_version_2_is_read(tmp_path: Path) -> None:
    """It is laid out as version 3 is."""
    assert read_metadata(write(tmp_path / "m.gguf", a_model(version=2))).context_trained == 64


def test_the_parts_of_a_split_model_count_together(tmp_path: Path) -> None:
    """The metadata are in the first part, the tensors in all."""
    first = a_model(number("split.count", 2), blocks=2, tensors=[tensor("blk.0.w"), tensor("output.weight", offset=32)])
    second = a_model(tensors=[tensor("blk.1.w", sizes=(16,))])
    path = write(tmp_path / "m-00001-of-00002.gguf", first)
    with pytest.raises(ModelNotFound, match="m-00002-of-00002"):
        read_metadata(path)
    write(tmp_path / "m-00002-of-00002.gguf", second)
    info = read_metadata(path)
    assert (info.layers_bytes, info.output_bytes, info.file_bytes) == ((32, 64), 32, len(first) + len(second))


def test_a_file_that_has_not_changed_is_not_read_again(tiny: Path) -> None:
    """One that has is."""
    before = read_header(str(tiny))
    assert read_header(str(tiny)) is before
    write_tiny_model(tiny, layers=1)
    assert len(read_header(str(tiny)).tensors) < len(before.tensors)


def test_only_the_headers_used_last_are_kept(tmp_path: Path) -> None:
    """The memory that they take is bounded."""
    paths = [write(tmp_path / f"{index}.gguf", a_model()) for index in range(CACHED_HEADERS + 1)]
    headers = [read_header(path) for path in paths]
    assert read_header(paths[-1]) is headers[-1]
    assert read_header(paths[0]) is not headers[0]


def test_a_large_vocabulary_is_walked_by_its_lengths(tmp_path: Path) -> None:
    """A quarter of a million tokens: seconds with a view for each, tens of milliseconds without."""
    tokens = array("tokenizer.ggml.tokens", TEXT, 1 << 18, text("token") * (1 << 18))
    path = write(tmp_path / "m.gguf", a_model(tokens))
    read_header(write(tmp_path / "other.gguf", a_model()))  # the package is imported once
    begin = time.monotonic()
    assert read_metadata(path).vocabulary == 1 << 18
    assert time.monotonic() - begin < 1.5


# Files that are none


def test_s11_a_missing_file_is_not_found(tmp_path: Path) -> None:
    """S11: it is named."""
    with pytest.raises(ModelNotFound) as caught:
        read_metadata(str(tmp_path / "no.gguf"))
    assert caught.value.path == str(tmp_path / "no.gguf")


def test_s11_a_missing_adapter_is_named(tmp_path: Path, tiny: Path) -> None:
    """S11: the file that is missing, not the model."""
    with pytest.raises(ModelNotFound, match=r"no\.gguf"):
        read_metadata(str(tiny), adapters=[str(tmp_path / "no.gguf")])


def test_s11_the_error_names_file_reason_and_offset(tmp_path: Path, tiny: Path) -> None:
    """S11: where the text begins that leads out of the file."""
    content = bytearray(tiny.read_bytes())
    content[24:32] = struct.pack("<Q", 1 << 29)  # the length of the first key
    with pytest.raises(InvalidModel) as caught:
        read_metadata(write(tmp_path / "m.gguf", bytes(content)))
    assert (caught.value.path, caught.value.offset) == (str(tmp_path / "m.gguf"), 24)
    assert "longer than the rest of the file" in caught.value.reason


NOTHING = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)  # no tensors, and one key to come
HOSTILE = {
    "empty": (b"", "empty"),
    "short": (b"GGUF", "too short"),
    "not GGUF": (b"GGML" + a_model()[4:], "no GGUF file"),
    "version 1": (a_model(version=1), "version 1"),
    "big-endian": (a_model(version=3 << 24), "big-endian"),
    "cut in the keys": (a_model()[:80], "too early|longer than the rest"),
    "cut in the tensors": (a_model()[:-240], "bytes behind the end of the file"),
    "2^63 tensors": (a_model(counts=(1 << 63, 4)), "tensors cannot be"),
    "2^63 keys": (a_model(counts=(1, 1 << 63)), "keys cannot be"),
    "more keys than there are": (a_model(counts=(1, 9)), "UTF-8|type|too long|twice|longer"),
    "text of 2^63 bytes": (a_model(text("k") + struct.pack("<IQ", TEXT, 1 << 63)), "longer than the rest"),
    "array of 2^40": (a_model(array("a", U8, 1 << 40)), "array of 1099511627776 elements"),
    "array beyond the end": (a_model(array("a", U8, 1 << 20)), "too early"),
    "2^29 texts": (a_model(array("a", TEXT, 1 << 29)), "texts is too long"),
    "texts beyond the end": (a_model(array("a", TEXT, 2, struct.pack("<QQ", 1 << 63, 0))), "longer than the rest"),
    "array of arrays": (a_model(array("a", ARRAY, 1)), "array of arrays"),
    "array of an unknown type": (a_model(array("a", 77, 1)), "type 77"),
    "key of an unknown type": (a_model(text("k") + struct.pack("<I", 77)), "type 77"),
    "key twice": (a_model(number("llama.block_count", 1)), "twice"),
    "key that is no text": (a_model(text(b"\xff\xfe") + struct.pack("<II", U32, 1)), "UTF-8"),
    "alignment 3": (a_model(number("general.alignment", 3)), "power of two"),
    "alignment 0": (a_model(number("general.alignment", 0)), "power of two"),
    "9 dimensions": (a_model(tensors=[tensor("t", sizes=[1] * 9)]), "9 dimensions"),
    "long tensor name": (a_model(tensors=[tensor("n" * 64)]), "too long"),
    "tensor twice": (a_model(tensors=[tensor("t"), tensor("t", offset=32)]), "twice"),
    "tensor beyond the end": (a_model(tensors=[tensor("t", offset=1 << 20)]), "behind the end"),
    "tensor at 2^64 - 32": (a_model(tensors=[tensor("t", offset=(1 << 64) - 32)]), "behind the end"),
    "tensor of 2^126 elements": (a_model(tensors=[tensor("t", sizes=[1 << 63, 1 << 63])]), "behind the end"),
    "tensor not aligned": (a_model(tensors=[tensor("t", offset=8)]), "not aligned"),
    "tensor of half a block": (a_model(tensors=[tensor("t", sizes=[48], kind=Q4_0)]), "whole number of blocks"),
    "tensor of a removed type": (a_model(tensors=[tensor("t", kind=4)]), "no longer read"),
    "tensors that overlap": (a_model(tensors=[tensor(f"t{i}", sizes=[64]) for i in range(9)]), "overlap"),
    "no architecture": (a_model().replace(b"architecture", b"arkhitecture"), "general.architecture"),
    "architecture that is no text": (NOTHING + number("general.architecture", 1), "no text"),
    "no context": (a_model().replace(b"context_length", b"kontext_length"), "context_length"),
    "2^32 - 1 blocks": (a_model(blocks=(1 << 32) - 1), "with 1 tensors"),
    "blocks in words": (a_model(words("x.block_count", "1"), architecture="x"), "twice"),
    "heads in words": (a_model(words("llama.attention.head_count", "4")), "no usable value"),
    "2^40 heads": (a_model(text("llama.attention.head_count") + struct.pack("<IQ", U64, 1 << 40)), "no usable value"),
    "no heads in an array": (a_model(array("llama.attention.head_count_kv", U32, 0)), "no usable value"),
    "projector": (a_model(architecture="clip"), "projector"),
    "adapter": (a_model(words("general.type", "adapter")), "adapter"),
    "one of several parts": (a_model(number("split.count", 3)), "00001-of-00003"),
}


@pytest.mark.parametrize(("content", "reason"), HOSTILE.values(), ids=HOSTILE.keys())
def test_s11_what_is_no_model_is_refused_at_once(tmp_path: Path, content: bytes, reason: str) -> None:
    """S11: one error type, with the reason."""
    path = write(tmp_path / "m.gguf", content)
    begin = time.monotonic()
    with pytest.raises(InvalidModel, match=reason) as caught:
        read_metadata(path)
    assert time.monotonic() - begin < QUICK_S
    assert caught.value.path == path


def test_s11_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    """S11: a directory, a device, a FIFO that nobody writes to and a socket do not hang, and are never read."""
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket"))  # relative, since such a path may not be long
        begin = time.monotonic()
        for path in (tmp_path, tmp_path / "fifo", tmp_path / "socket", Path("/dev/zero"), Path("zero\0byte")):
            with pytest.raises(InvalidModel):
                read_metadata(str(path))
        assert time.monotonic() - begin < QUICK_S


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_s11_a_file_that_may_not_be_read_says_so(tiny: Path) -> None:
    """S11: the reason is the permission, not the content."""
    tiny.chmod(0)
    with pytest.raises(InvalidModel, match="permissions"):
        read_metadata(str(tiny))


def test_the_work_on_a_huge_sparse_file_is_bounded(tmp_path: Path) -> None:
    """Millions of empty texts, which cost nothing to have in a file, are walked in seconds; more are refused."""
    begin = time.monotonic()
    for count in (MOST_TEXTS, (1 << 30) - 1):
        path = write(tmp_path / f"{count}.gguf", a_model(array("a", TEXT, count), counts=(1, 1 << 12)))
        os.truncate(path, 1 << 40)
        with pytest.raises(InvalidModel):
            read_metadata(path)
    assert time.monotonic() - begin < 60


def test_no_mutant_of_a_model_does_anything_but_load_or_be_refused(tmp_path: Path) -> None:
    """600 mutants, from one seed: bytes changed, numbers made extreme, pieces cut out or repeated, ends cut off."""
    original = write_tiny_model(tmp_path / "tiny.gguf", layers=1, width=8).read_bytes()
    draw, refused = random.Random(1), 0
    for index in range(600):
        mutant = bytearray(original)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(min(len(mutant), 1500) if draw.random() < 0.7 else len(mutant))
            match draw.randrange(5):
                case 0:
                    mutant[at] ^= 1 << draw.randrange(8)
                case 1:
                    mutant[at : at + 4] = draw.choice([bytes(4), b"\xff" * 4])
                case 2:
                    mutant[at : at + 8] = struct.pack("<Q", 1 << draw.randrange(64))
                case 3:
                    del mutant[at : at + draw.randint(1, 64)]
                case _:
                    mutant[at:at] = mutant[at : at + draw.randint(1, 64)]
        path = write(tmp_path / f"{index}.gguf", bytes(mutant if draw.random() < 0.9 else mutant[: len(mutant) // 2]))
        try:
            read_metadata(path)
        except InvalidModel as error:
            refused += 1
            assert error.path == path and error.reason
        os.unlink(path)
    assert refused > 300


# What is newer than this installation


def test_s25_a_newer_format_says_what_to_upgrade(tmp_path: Path) -> None:
    """S25: the file's version, the one that is known, and what to do; at the offset of the version."""
    with pytest.raises(InvalidModel, match=r"version 4 .* knows 3 at most: upgrade") as caught:
        read_metadata(write(tmp_path / "m.gguf", a_model(version=4)))
    assert caught.value.offset == 4


def test_s25_a_newer_tensor_type_says_what_to_upgrade(tmp_path: Path) -> None:
    """S25: the tensor and its type are named."""
    content = a_model(tensors=[tensor("blk.0.attn_q.weight", kind=999)])
    with pytest.raises(InvalidModel, match=r"blk\.0\.attn_q\.weight.* type 999, .*upgrade it and the engine"):
        read_metadata(write(tmp_path / "m.gguf", content))


def test_s25_a_newer_kind_of_value_says_what_to_upgrade(tmp_path: Path) -> None:
    """S25: the key and its type are named."""
    content = a_model(text("general.new") + struct.pack("<II", 77, 0))
    with pytest.raises(InvalidModel, match=r"general\.new.* type 77, .*upgrade it and the engine"):
        read_metadata(write(tmp_path / "m.gguf", content))
