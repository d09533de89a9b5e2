"""Contents of files that are no sound models, each with what its refusal says."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scheduler.models.bounded_reader import MOST_TEXTS
from scheduler.models.gguf_header import LARGEST_ALIGNMENT, MOST_KEY_BYTES, MOST_KEYS, MOST_TENSORS
from tests.support.gguf_bytes import (  # fmt: skip
    ARRAY,
    BOOL,
    F64,
    I32,
    Q4_0,
    TEXT,
    U8,
    U32,
    U64,
    a_file,
    a_model,
    array,
    long_number,
    number,
    tensor,
    text,
    words,
)

ALIGNMENT = "general.alignment"
HEADS = "llama.attention.head_count"
TIB = 1 << 40
SOMEWHERE = -1


@dataclass(frozen=True, slots=True)
class Expected:
    """What is read, and what the refusal says."""

    path: str  # the path that is given as the model
    wrong: str  # the file that the refusal names
    reason: str  # a pattern
    at: int | None = None  # an offset, or SOMEWHERE in the file
    adapters: tuple[str, ...] = ()
    projectors: tuple[str, ...] = ()
    missing: bool = False  # ModelNotFound instead of InvalidModel


@dataclass(frozen=True, slots=True)
class Content:
    """One file, and what its refusal says."""

    write: Callable[[], bytes]  # called when the file is needed, since some are large
    reason: str  # a pattern
    at: bytes | int | None  # the offset that the refusal names, or the bytes that are there, or SOMEWHERE
    file_bytes: int | None = None  # the file is made this long by a hole at its end

    def into(self, folder: Path) -> Expected:
        """Write the file and return what its refusal says."""
        path = folder / "m.gguf"
        content = self.write()
        path.write_bytes(content)
        if self.file_bytes is not None:
            os.truncate(path, self.file_bytes)
        at = content.index(self.at) if isinstance(self.at, bytes) else self.at
        return Expected(str(path), str(path), self.reason, at)


def bad(reason: str, at: bytes | int | None, *more: bytes) -> Content:
    """Return a model with pairs that it should not have."""
    return Content(lambda: a_model(*more), reason, at)


def bad_tensor(reason: str, *tensors: bytes, at: bytes | int, data: int = 256) -> Content:
    """Return a model with these tensors."""
    return Content(lambda: a_model(tensors=tensors, data=bytes(data)), reason, at)


def of_kind(key: str, kind: int, content: bytes) -> bytes:
    """Return a pair whose value has any type."""
    return text(key) + struct.pack("<I", kind) + content


def cut(content: bytes, count: int) -> Content:
    """Return the first `count` bytes of a file, cut in its entries or behind them."""
    return Content(
        lambda: content[:count], "it is cut short: [0-9]+ of (at least )?[0-9]+ bytes|too short|is empty", SOMEWHERE
    )


def without(key: bytes) -> Callable[[], bytes]:
    """Return a function that makes a model in which a key has another name."""
    return lambda: a_model().replace(key, key[:-1] + b"X")


def many_keys() -> bytes:
    """Return as many keys as a file may have, each with an array that is short enough to be kept."""
    pairs = [array(f"k{place}", U64, 1 << 10, MOST * (1 << 10)) for place in range(MOST_KEYS - 4)]
    return a_model(*pairs, tensors=[tensor("t" * 64)])


def many_tensors() -> bytes:
    """Return as many tensors as a file may have, of which the last has the offset of the one before it."""
    tensors = [tensor(f"t{place}", offset=32 * place) for place in range(MOST_TENSORS - 1)]
    return a_model(tensors=[*tensors, tensor("last", offset=32 * (MOST_TENSORS - 2))], data=bytes(32 * MOST_TENSORS))


SOUND = a_model(number("general.quantization_version", 2), words("general.name", "n" * 40))
HUGE = struct.pack("<Q", 1 << 63)
LONG = struct.pack("<Q", 200)
MOST = struct.pack("<Q", (1 << 64) - 1)

FRAMES = {
    "an empty file": Content(bytes, "empty", 0),
    "four bytes": Content(lambda: b"GGUF", "too short", 0),
    "half of the counts": Content(lambda: SOUND[:23], "too short", 0),
    "another magic": Content(lambda: b"GGML" + SOUND[4:], "no GGUF file", 0),
    "zeros": Content(lambda: bytes(4096), "no GGUF file", 0),
    "a terabyte of nothing": Content(bytes, "no GGUF file", 0, TIB),
    "version 0": Content(lambda: a_model(version=0), "damaged", 4),
    "version 1": Content(lambda: a_model(version=1), "version 1", 4),
    "version 2^32 - 1": Content(lambda: a_model(version=(1 << 32) - 1), "version 4294967295", 4),
    "big-endian": Content(lambda: struct.pack(">4sIQQ", b"GGUF", 3, 1, 4) + SOUND[24:], "big-endian", 4),
    "2^63 tensors": Content(lambda: a_model(counts=(1 << 63, 4)), "tensors, and no more than", 8),
    "2^64 - 1 tensors": Content(lambda: a_model(counts=((1 << 64) - 1, 4)), "tensors, and no more than", 8),
    "more tensors than any model has": Content(
        lambda: a_model(counts=(MOST_TENSORS + 1, 4)), "tensors, and no more than", 8, TIB
    ),
    "2^63 keys": Content(lambda: a_model(counts=(1, 1 << 63)), "keys, and no more than", 16),
    "2^64 - 1 keys": Content(lambda: a_model(counts=(1, (1 << 64) - 1)), "keys, and no more than", 16),
    "more keys than any model has": Content(
        lambda: a_model(counts=(1, MOST_KEYS + 1)), "keys, and no more than", 16, TIB
    ),
    "a key more than there is": Content(lambda: a_model(counts=(1, 5)), "a name has 0 bytes", SOMEWHERE),
    "a key less than there is": Content(lambda: a_model(counts=(1, 3)), "type 134217728", SOMEWHERE),
    "a tensor more than there is": Content(lambda: a_model(counts=(2, 4)), "a name has 0 bytes", SOMEWHERE),
    "no keys at all": Content(lambda: a_file(()), "general.architecture.* is missing", None),
}
CUTS = {
    where: cut(SOUND, count)
    for where, count in {
        "the length of the first key": 28,
        "the first key": 40,
        "the type of a value": SOUND.index(b"llama.block_count") + 19,
        "a number": SOUND.index(b"llama.block_count") + 23,
        "the length of a text": SOUND.index(b"general.name") + 20,
        "a text": SOUND.index(b"nnn") + 20,
        "the name of a tensor": SOUND.index(b"blk.0") + 5,
        "the dimensions": SOUND.index(b"blk.0") + 18 + 2,
        "a size": SOUND.index(b"blk.0") + 18 + 8,
        "the type of a tensor": SOUND.index(b"blk.0") + 18 + 14,
        "an offset": SOUND.index(b"blk.0") + 18 + 20,
        "the padding": SOUND.index(b"blk.0") + 18 + 24 + 1,
        "the data": len(SOUND) - 225,
    }.items()
}
VALUES = {
    "a key of 2^63 bytes": bad("longer than a text may be|cut short|is damaged", HUGE, HUGE),
    "a key of 2^64 - 1 bytes": bad("longer than a text may be|cut short|is damaged", MOST, MOST),
    "a key without a letter": bad("a name has 0 bytes", SOMEWHERE, number("", 1)),
    "a key of a kilobyte and one": bad(
        "may have 1 to", text(b"k" * (MOST_KEY_BYTES + 1)), number("k" * (MOST_KEY_BYTES + 1), 1)
    ),
    "a key twice": bad("twice", number("k", 2), number("k", 1), number("k", 2)),
    "a value of type 2^32 - 1": bad("type 4294967295", b"\xff" * 4, of_kind("k", (1 << 32) - 1, bytes(8))),
    "a text of 2^63 bytes": bad("longer than a text may be|cut short|is damaged", HUGE, of_kind("k", TEXT, HUGE)),
    "a text of 2^64 - 1 bytes": bad("longer than a text may be|cut short|is damaged", MOST, of_kind("k", TEXT, MOST)),
    "a text of a gibibyte and one": Content(
        lambda: a_model(of_kind("k", TEXT, struct.pack("<Q", (1 << 30) + 1))),
        "longer than a text may be",
        struct.pack("<Q", (1 << 30) + 1),
        TIB,
    ),
    "an array of 2^40 bytes": bad("array of 1099511627776", struct.pack("<Q", TIB), array("k", U8, TIB)),
    "an array of 2^63 bytes": bad("array of 9223372036854775808 ", HUGE, array("k", U8, 1 << 63)),
    "an array of 2^64 - 1 numbers": bad("array of 18446744073709551615 ", MOST, array("k", U64, (1 << 64) - 1)),
    "an array that leaves the file": bad("cut short", SOMEWHERE, array("k", U8, 1 << 20)),
    "a short array that leaves the file": bad("cut short", SOMEWHERE, array("k", U64, 1000)),
    "an array of arrays": bad("array of arrays", struct.pack("<IQ", ARRAY, 1), array("k", ARRAY, 1)),
    "an array of type 77": bad("type 77", struct.pack("<IQ", 77, 1), array("k", 77, 1)),
    "an array of 2^29 texts": bad("texts is too long", struct.pack("<Q", 1 << 29), array("k", TEXT, 1 << 29)),
    "an array of 2^64 - 1 texts": bad("array of 18446744073709551615 ", MOST, array("k", TEXT, (1 << 64) - 1)),
    "texts that leave the file": bad(
        "longer than a text may be|cut short|is damaged", HUGE, array("k", TEXT, 2, text("") + HUGE)
    ),
    "2^64 - 1 bytes behind many texts": bad(
        "longer than a text may be|cut short|is damaged", MOST, array("k", TEXT, 99, text("abc") * 98 + MOST)
    ),
    "a last text that leaves the file": Content(
        lambda: a_model(array("k", TEXT, 120, text("abc") * 119 + LONG), data=b""),
        "longer than a text may be|cut short|is damaged",
        LONG,
    ),
    "2^21 empty texts in a terabyte": Content(
        lambda: a_model(array("k", TEXT, MOST_TEXTS)), "a name has 0 bytes", SOMEWHERE, TIB
    ),
    "2^30 empty texts in a terabyte": Content(
        lambda: a_model(array("k", TEXT, 1 << 30)), "texts is too long", 193, TIB
    ),
    "an alignment of 0": bad("power of two", text(ALIGNMENT), number(ALIGNMENT, 0)),
    "an alignment of 3": bad("power of two", text(ALIGNMENT), number(ALIGNMENT, 3)),
    "an alignment of 2^31": bad("power of two", text(ALIGNMENT), number(ALIGNMENT, 1 << 31)),
    "an alignment of more than a mebibyte": bad(
        "power of two", text(ALIGNMENT), number(ALIGNMENT, 2 * LARGEST_ALIGNMENT)
    ),
    "an alignment in 64 bits": bad("no 32-bit number", text(ALIGNMENT), long_number(ALIGNMENT, 32)),
    "an alignment in words": bad("no 32-bit number", text(ALIGNMENT), words(ALIGNMENT, "32")),
    "an alignment that is a list": bad("no 32-bit number", text(ALIGNMENT), array(ALIGNMENT, U32, 1, bytes(4))),
    "an alignment that is true": bad("no 32-bit number", text(ALIGNMENT), of_kind(ALIGNMENT, BOOL, b"\1")),
    "as many keys and numbers as there may be": Content(many_keys, "may have 1 to", text("t" * 64)),
}

TENSORS = {
    "5 dimensions": bad_tensor("5 dimensions", tensor("t", sizes=[1] * 5), at=struct.pack("<I5Q", 5, *[1] * 5)),
    "9 dimensions": bad_tensor("9 dimensions", tensor("t", sizes=[1] * 9), at=struct.pack("<I9Q", 9, *[1] * 9)),
    "2^32 - 1 dimensions": bad_tensor("4294967295 dimensions", text("t") + b"\xff" * 64, at=b"\xff" * 64),
    "a size of 0": bad_tensor("no elements", tensor("t", sizes=[0]), at=struct.pack("<IQ", 1, 0)),
    "sizes of 0 and 2^63": bad_tensor(
        "no elements", tensor("t", sizes=[0, 1 << 63]), at=struct.pack("<IQQ", 2, 0, 1 << 63)
    ),
    "a size of -1": bad_tensor("cut short|is damaged", tensor("t", sizes=[(1 << 64) - 1]), at=text("t")),
    "sizes whose product is 2^64": bad_tensor(
        "cut short|is damaged", tensor("t", sizes=[1 << 32, 1 << 32]), at=text("t")
    ),
    "sizes whose product is 2^64 + 8": bad_tensor(  # the product is a multiple of 8 in 64 bits
        "cut short|is damaged", tensor("t", sizes=[8, (1 << 61) + 1]), at=text("t")
    ),
    "sizes whose product is 2^252": bad_tensor("cut short|is damaged", tensor("t", sizes=[1 << 63] * 4), at=text("t")),
    "bytes that overflow": bad_tensor("cut short|is damaged", tensor("t", sizes=[1 << 62]), at=text("t")),
    "half a block": bad_tensor(
        "whole number of blocks", tensor("t", sizes=[48], kind=Q4_0), at=struct.pack("<IQ", 1, 48)
    ),
    "blocks across rows": bad_tensor(
        "whole number of blocks", tensor("t", sizes=[16, 2], kind=Q4_0), at=struct.pack("<IQQ", 2, 16, 2)
    ),
    "a removed type": bad_tensor("type 4, .* no longer read", tensor("t", kind=4), at=struct.pack("<IQ", 1, 8)),
    "type 2^32 - 1": bad_tensor("type 4294967295", tensor("t", kind=(1 << 32) - 1), at=b"\xff" * 4),
    "a name without a letter": bad_tensor("a name has 0 bytes", tensor(""), at=tensor("")),
    "a name of 64 bytes": bad_tensor("may have 1 to", tensor("n" * 64), at=text("n" * 64)),
    "a name of 2^63 bytes": bad_tensor("longer than a text may be|cut short|is damaged", HUGE, at=HUGE),
    "a name that is not UTF-8": bad_tensor("UTF-8", tensor(b"\xc3\x28"), at=text(b"\xc3\x28")),
    "a name twice": bad_tensor("twice", tensor("t"), tensor("t", offset=32), at=tensor("t", offset=32)),
    "an offset behind the file": bad_tensor(
        "begin at 1048576", tensor("t", offset=1 << 20), at=struct.pack("<Q", 1 << 20)
    ),
    "an offset of 2^63": bad_tensor("begin at 9223372036854775808", tensor("t", offset=1 << 63), at=HUGE),
    "an offset of 2^64 - 32": bad_tensor(
        "begin at 18446744073709551584", tensor("t", offset=(1 << 64) - 32), at=struct.pack("<Q", (1 << 64) - 32)
    ),
    "an offset that is not aligned": bad_tensor(
        "begin at 40, and those before end at 0", tensor("t", offset=40), at=struct.pack("<Q", 40)
    ),
    "an offset that another alignment forbids": Content(
        lambda: a_model(number(ALIGNMENT, 64), tensors=[tensor("s"), tensor("t", offset=32)]),
        "begin at 32, and those before end at 64",
        SOMEWHERE,
    ),
    "data that overlap": bad_tensor(
        "begin at 32, and those before end at 64",
        tensor("a", sizes=[16]),
        tensor("b", sizes=[16], offset=32),
        at=struct.pack("<Q", 32),
    ),
    "data in the same place": bad_tensor(
        "begin at 0, and those before end at 32", tensor("a"), tensor("b", sizes=[9]), at=SOMEWHERE
    ),
    "data with a gap": bad_tensor(
        "begin at 64, and those before end at 32", tensor("a"), tensor("b", offset=64), at=struct.pack("<Q", 64)
    ),
    "data that end a byte too late": bad_tensor("cut short: 255 of 256 bytes", tensor("t"), at=text("t"), data=31),
    "as many as there may be": Content(many_tensors, "begin at 262080, and those before end at 262112", SOMEWHERE),
}
MEANINGS = {
    "no architecture": Content(without(b"general.architecture"), "general.architecture.* is missing", None),
    "an architecture that is a number": Content(lambda: a_file([number("general.architecture", 1)]), "no text", 24),
    "an architecture without a letter": Content(lambda: a_file([words("general.architecture", "")]), "no text", 24),
    "an architecture too long to keep": Content(
        lambda: a_file([words("general.architecture", "x" * 300)]), "no text", 24
    ),
    "no block_count": Content(without(b"llama.block_count"), "block_count.* is missing", None),
    "no context_length": Content(without(b"llama.context_length"), "context_length.* is missing", None),
    "no embedding_length": Content(without(b"llama.embedding_length"), "embedding_length.* is missing", None),
    "2^32 - 1 blocks": Content(
        lambda: a_model(blocks=(1 << 32) - 1), "is 4294967295, with 1 tensors", text("llama.block_count")
    ),
    "-1 blocks": Content(
        lambda: a_model().replace(number("llama.block_count", 1), of_kind("llama.block_count", I32, b"\xff" * 4)),
        "no usable value",
        text("llama.block_count"),
    ),
    "a fraction of a block": Content(
        lambda: a_model().replace(number("llama.block_count", 1), of_kind("llama.block_count", F64, bytes(8))),
        "no usable value",
        text("llama.block_count"),
    ),
    "heads in words": bad("no usable value", text(HEADS), words(HEADS, "4")),
    "2^40 heads": bad("no usable value", text(HEADS), long_number(HEADS, TIB)),
    "-2 heads in one layer": bad("no usable value", text(HEADS), array(HEADS, I32, 2, struct.pack("<ii", 4, -2))),
    "no heads in a list": bad("no usable value", text(HEADS), array(HEADS, U32, 0)),
    "a list of heads too long to keep": bad("no usable value", text(HEADS), array(HEADS, U32, 1025, bytes(4100))),
    "a projector": Content(lambda: a_model(architecture="clip"), "projector", None),
    "a projector by its type": bad("projector", None, words("general.type", "mmproj")),
    "an adapter": bad("adapter", None, words("general.type", "adapter")),
    "one of several parts": bad("00001-of-00003", None, number("split.count", 3)),
    "-1 parts": bad("no usable value", text("split.count"), of_kind("split.count", I32, b"\xff" * 4)),
}

CONTENTS = {
    f"{subject}: {name}": content
    for subject, contents in {
        "frame": FRAMES,
        "cut": CUTS,
        "value": VALUES,
        "tensor": TENSORS,
        "meaning": MEANINGS,
    }.items()
    for name, content in contents.items()
}
