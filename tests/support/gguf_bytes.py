"""GGUF files put together byte by byte, so that each byte can be wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence

U8, U32, I32, BOOL, TEXT, ARRAY, U64, F64 = 0, 4, 5, 7, 8, 9, 10, 12  # types of values
F32, Q4_0 = 0, 2  # types of tensors


def text(content: str | bytes) -> bytes:
    """Return a text after its length."""
    raw = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(raw)) + raw


def number(key: str, value: int) -> bytes:
    """Return a key with a 32-bit number."""
    return text(key) + struct.pack("<II", U32, value)


def long_number(key: str, value: int) -> bytes:
    """Return a key with a 64-bit number."""
    return text(key) + struct.pack("<IQ", U64, value)


def words(key: str, value: str) -> bytes:
    """Return a key with a text."""
    return text(key) + struct.pack("<I", TEXT) + text(value)


def array(key: str, kind: int, count: int, content: bytes = b"") -> bytes:
    """Return a key with an array that claims to have `count` elements."""
    return text(key) + struct.pack("<IIQ", ARRAY, kind, count) + content


def tensor(name: str | bytes, sizes: Sequence[int] = (8,), kind: int = F32, offset: int = 0) -> bytes:
    """Return the entry of a tensor whose data begin at `offset` in the data."""
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def a_file(
    pairs: Sequence[bytes],
    tensors: Sequence[bytes] = (),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: bytes = bytes(256),
    alignment: int = 32,
) -> bytes:
    """Return a file of these pairs and tensors; `counts` are the numbers of tensors and pairs that the file claims."""
    tensor_count, key_count = counts or (len(tensors), len(pairs))
    header = struct.pack("<4sIQQ", b"GGUF", version, tensor_count, key_count) + b"".join([*pairs, *tensors])
    return header + bytes(-len(header) % alignment) + data


def a_model(
    *more: bytes,
    architecture: str = "llama",
    blocks: int = 1,
    tensors: Sequence[bytes] = (tensor("blk.0.attn_q.weight"),),
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: bytes = bytes(256),
) -> bytes:
    """Return a small model, with four keys of its own and `more`."""
    pairs = [words("general.architecture", architecture), number(f"{architecture}.block_count", blocks)]
    pairs += [number(f"{architecture}.embedding_length", 32), number(f"{architecture}.context_length", 64), *more]
    return a_file(pairs, tensors, version=version, counts=counts, data=data)
