"""Reads the header of a GGUF file in milliseconds and without trust: bounded, buffered, never mapped."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from types import ModuleType

from scheduler.errors.exceptions import OUT_OF_FILES, InvalidModel, ModelNotFound, is_out_of_files
from scheduler.models.bounded_reader import Window
from scheduler.models.gguf_constants import gguf_constants

Value = int | float | str | tuple[int, ...] | None

MOST_ELEMENTS = 1 << 30  # llama.cpp's own limits
MOST_DIMENSIONS = 4
MOST_NAME_BYTES = 64  # the terminating zero included
MOST_KEYS = 1 << 11  # not llama.cpp's limit, like all that follow: far above any real model
MOST_KEY_BYTES = 1 << 10
MOST_TENSORS = 1 << 13
KEPT_TEXT_BYTES = 256  # longer texts (chat templates) are skipped
LONGEST_TEXT_BYTES = 1 << 20  # that is read by itself
LARGEST_ALIGNMENT = 1 << 20
MOST_TYPES = 1 << 8  # of tensors, known or not; ggml has some forty
LARGEST_ELEMENT_BYTES = 8  # of any type
CACHED_HEADERS = 64

_OPEN_FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"):  # not every system has all of them
    _OPEN_FLAGS |= getattr(os, _name, 0)


@dataclass(frozen=True, slots=True)
class Tensor:
    """The entry of one tensor."""

    name: str
    bytes: int  # in the file and in memory
    type: str  # the gguf package's name: F32, Q4_0 ...; the number of a type that it does not know
    dimensions: int  # number of dimensions: 2 of a matrix; at most MOST_DIMENSIONS

    @property
    def known_type(self) -> bool:
        """Whether the gguf package knows its type."""
        return not self.type.isdigit()


@dataclass(slots=True)
class Header:
    """A parsed header, not to be changed: numbers, short texts and short arrays of integers by key, and the tensors."""

    path: str
    file_bytes: int
    values: dict[str, Value] = field(default_factory=dict)  # None: an array or text that was skipped
    offsets: dict[str, int] = field(default_factory=dict)  # where in the file the pair of a key begins
    lengths: dict[str, int] = field(default_factory=dict)  # elements, of arrays only
    tensors: tuple[Tensor, ...] = ()


def read_header(path: str) -> Header:
    """Return the header of one GGUF file, from memory if the file has not changed since it was last read.

    Raises `ModelNotFound` or `InvalidModel`.
    """
    try:
        _check_kind(path, os.stat(path))  # before it is opened, since opening changes some devices
        descriptor = os.open(path, _OPEN_FLAGS)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFound(path) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise InvalidModel(path, _because(error)) from None
    try:
        status = os.fstat(descriptor)
        _check_kind(path, status)
        if (header := _cache.get(key := _identity(path, status))) is None:
            header = _parse(Window(path, descriptor, status.st_size))
            if _identity(path, os.fstat(descriptor)) != key:
                raise InvalidModel(path, "it was changed while it was read")
            _cache.put(key, header)
        return header
    except OSError as error:
        raise InvalidModel(path, _because(error)) from None
    finally:
        os.close(descriptor)


def read_text(path: str, key: str) -> str:
    """Return the text under a key of a GGUF file, also a long one; empty where there is none, or one over 1 MiB.

    Raises `ModelNotFound` or `InvalidModel`.
    """
    header = read_header(path)
    if not isinstance(value := header.values.get(key, 0), str | None):
        return ""
    if value is not None or key in header.lengths:  # a short text, or an array
        return value or ""
    try:
        with open(os.open(path, _OPEN_FLAGS), "rb") as file:
            file.seek(header.offsets[key] + _U64.size + len(key.encode()) + _U32.size)
            (count,) = _U64.unpack(file.read(_U64.size))
            return file.read(count).decode(errors="replace") if count <= LONGEST_TEXT_BYTES else ""
    except (OSError, struct.error) as error:  # it was changed, or is gone, since its header was read
        raise InvalidModel(path, f"it cannot be read ({error})") from None


def forget_headers() -> None:
    """Forget all headers, so that every file is read again when it is next used."""
    _cache.clear()


def _check_kind(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InvalidModel(path, "it is a directory" if stat.S_ISDIR(status.st_mode) else "it is no regular file")


def _because(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.errno == errno.EACCES:
        return "it may not be read: check its permissions"
    if is_out_of_files(error):
        return f"it cannot be read: {OUT_OF_FILES}"
    if isinstance(error, ValueError):
        return f"its path cannot be used ({error})"
    return f"it cannot be read ({error.strerror or error})"


_Identity = tuple[str, int, int, int, int]


def _identity(path: str, status: os.stat_result) -> _Identity:
    """Return a value that tells a file from any other file, and from its own state before a change."""
    return path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _Cache:
    """The headers read last, by the identity of their files.

    Without a lock: a fork of the program would inherit it as it is, and for good where another thread holds it. Each
    step is one operation of a dictionary; where two threads meet, a header may be read once more.
    """

    def __init__(self) -> None:
        self._headers: dict[_Identity, Header] = {}  # the least recently used header first

    def clear(self) -> None:
        self._headers = {}

    def get(self, key: _Identity) -> Header | None:
        if (header := self._headers.pop(key, None)) is not None:
            self._headers[key] = header  # at the end
        return header

    def put(self, key: _Identity, header: Header) -> None:
        headers = self._headers
        headers[key] = header
        while len(headers) > CACHED_HEADERS:
            with suppress(StopIteration, RuntimeError):  # another thread has changed it
                headers.pop(next(iter(headers)), None)


_cache = _Cache()


@dataclass(frozen=True, slots=True)
class _Format:
    """The gguf package's tables of the format."""

    magic: int
    version: int
    alignment: int
    scalars: Mapping[int, struct.Struct]  # by the number of the type
    u32: int
    string: int
    array: int
    quantisations: Mapping[int, tuple[str, int, int]]  # by the number of the type: name, elements and bytes of a block


@cache
def _format() -> _Format:
    constants = gguf_constants()
    return _Format(
        magic=constants.GGUF_MAGIC,
        version=constants.GGUF_VERSION,
        alignment=constants.GGUF_DEFAULT_ALIGNMENT,
        scalars=_scalars(constants),
        u32=int(constants.GGUFValueType.UINT32),
        string=int(constants.GGUFValueType.STRING),
        array=int(constants.GGUFValueType.ARRAY),
        quantisations={int(kind): (kind.name, *sizes) for kind, sizes in constants.GGML_QUANT_SIZES.items()},
    )


def _scalars(constants: ModuleType) -> dict[int, struct.Struct]:
    codes = {"UINT8": "B", "INT8": "b", "UINT16": "H", "INT16": "h", "UINT32": "I", "INT32": "i", "FLOAT32": "f"}
    codes |= {"BOOL": "B", "UINT64": "Q", "INT64": "q", "FLOAT64": "d"}
    return {int(constants.GGUFValueType[name]): struct.Struct("<" + code) for name, code in codes.items()}


_LEAST_PAIR_BYTES, _LEAST_ENTRY_BYTES = 13, 24  # that a key with its value, and the entry of a tensor, take
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_PLACES = [struct.Struct(f"<{dimensions}QIQ") for dimensions in range(MOST_DIMENSIONS + 1)]  # sizes, type, offset


def _parse(window: Window) -> Header:
    """Read a whole header; every count and length is checked before it is used."""
    _check_version(window)
    tensor_count, key_count = window.number(_U64), window.number(_U64)
    if tensor_count > MOST_TENSORS:
        raise window.fail(f"it says that it has {tensor_count} tensors, and no more than {MOST_TENSORS} are read", 8)
    if key_count > MOST_KEYS:
        raise window.fail(f"it says that it has {key_count} keys, and no more than {MOST_KEYS} are read", 16)
    least_bytes = window.offset + key_count * _LEAST_PAIR_BYTES + tensor_count * _LEAST_ENTRY_BYTES
    if least_bytes > window.file_bytes:
        raise window.cut_short(least_bytes, 8)
    header = Header(window.path, window.file_bytes)
    for _ in range(key_count):
        _read_pair(window, header)
    header.tensors = _read_tensors(window, tensor_count, _alignment(window, header))
    return header


def _check_version(window: Window) -> None:
    known = _format()
    if window.file_bytes < 24:
        raise window.fail("it is empty" if window.file_bytes == 0 else "it is too short for a GGUF file")
    if window.number(_U32) != known.magic:
        raise window.fail("it is no GGUF file", 0)
    version = window.number(_U32)
    if version & 0xFFFF == 0:
        raise window.fail("it is a big-endian GGUF file, or damaged: convert it for little-endian machines", 4)
    if version > known.version:
        raise window.fail(
            f"it has version {version} of the format and the installed gguf package knows {known.version} at most: "
            "upgrade the gguf package and the engine",
            4,
        )
    if version < 2:
        raise window.fail("it has version 1 of the format, which engines no longer read: convert it again", 4)


def _alignment(window: Window, header: Header) -> int:
    alignment = header.values.get("general.alignment", _format().alignment)
    if not isinstance(alignment, int) or not 0 < alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
        reason = f"general.alignment is {alignment}, which is no power of two up to {LARGEST_ALIGNMENT}"
        raise window.fail(reason, header.offsets["general.alignment"])
    return alignment


def _read_pair(window: Window, header: Header) -> None:
    begin = window.offset
    key = window.name(MOST_KEY_BYTES, utf8=False)  # llama.cpp takes any bytes
    if key in header.values:
        raise window.fail(f"the key {key[:80]!r} is there twice", begin)
    header.offsets[key] = begin
    kind, known = window.number(_U32), _format()
    if key == "general.alignment" and kind != known.u32:
        raise window.fail("general.alignment is no 32-bit number", begin)
    if kind == known.array:
        header.values[key] = _read_array(window, key, header)
    elif kind == known.string:
        count = window.length()
        if count <= KEPT_TEXT_BYTES:
            header.values[key] = window.take(count).decode(errors="replace")
        else:
            header.values[key] = None
            window.skip(count)
    elif (scalar := known.scalars.get(kind)) is not None:
        header.values[key] = window.unpack(scalar)[0]
    else:
        raise window.fail(_unknown_kind(f"the key {key[:80]!r}", kind), window.offset - 4)


def _unknown_kind(what: str, kind: int) -> str:
    return f"{what} has type {kind}, which the installed gguf package does not know: upgrade it and the engine"


def _read_array(window: Window, key: str, header: Header) -> Value:
    kind, known = window.number(_U32), _format()
    count = window.number(_U64)
    if kind == known.array:
        raise window.fail(f"the key {key[:80]!r} is an array of arrays", window.offset - 12)
    if count > MOST_ELEMENTS:
        raise window.fail(f"the key {key[:80]!r} is an array of {count} elements", window.offset - 8)
    header.lengths[key] = count
    if kind == known.string:
        window.skip_texts(count)
        return None
    if (scalar := known.scalars.get(kind)) is None:
        raise window.fail(_unknown_kind(f"the key {key[:80]!r}", kind), window.offset - 12)
    return window.numbers(scalar, count)


def _read_tensors(window: Window, count: int, alignment: int) -> tuple[Tensor, ...]:
    """Read all entries.

    Each tensor's data must begin where the data before end, as ggml demands, and be in the file. The engine may know
    types that the gguf package does not: data of such a type end where the next data begin.
    """
    tensors: dict[str, Tensor] = {}
    begin = start = end = 0  # of the last entry in the file, and of its data in the data
    open_ended: Tensor | None = None  # the last tensor, where its data's end is not known yet
    for _ in range(count):
        begin = window.offset
        name = window.name(MOST_NAME_BYTES - 1)
        if name in tensors:
            raise window.fail(f"the tensor {name!r} is there twice", begin)
        before = start
        tensors[name], start = _read_tensor(window, name)
        expected = _aligned(end, alignment)
        if open_ended is not None and expected <= start <= _aligned(before + open_ended.bytes, alignment):
            tensors[open_ended.name] = replace(open_ended, bytes=start - before)
            expected = _aligned(start, alignment)
        if start != expected:
            reason = f"the data of the tensor {name!r} are said to begin at {start}, and those before end at {expected}"
            raise window.fail(reason, window.offset - 8)
        open_ended = None if tensors[name].known_type else tensors[name]
        end = start + (1 if open_ended else tensors[name].bytes)
    rest = window.file_bytes - _aligned(window.offset, alignment) - end
    if tensors and rest < 0:
        raise window.cut_short(window.file_bytes - rest, begin, exact=open_ended is None)
    if open_ended is not None:
        tensors[open_ended.name] = replace(open_ended, bytes=min(open_ended.bytes, rest + 1))
    return tuple(tensors.values())


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _read_tensor(window: Window, name: str) -> tuple[Tensor, int]:
    """Return a tensor with its size from its dimensions and type, and the offset of its data.

    Of a type that the gguf package does not know the size is the most that it can be.
    """
    begin = window.offset
    if (dimensions := window.number(_U32)) > MOST_DIMENSIONS:
        raise window.fail(f"the tensor {name!r} has {dimensions} dimensions", begin)
    *sizes, kind, start = window.unpack(_PLACES[dimensions])
    known = _format().quantisations
    if kind >= MOST_TYPES:
        raise window.fail(_unknown_kind(f"the tensor {name!r}", kind), window.offset - 12)
    if kind not in known and kind < max(known):
        raise window.fail(f"the tensor {name!r} has type {kind}, which is no longer read: convert it again", begin)
    kind_name, block_elements, block_bytes = known.get(kind, (str(kind), 1, LARGEST_ELEMENT_BYTES))
    if (elements := prod(sizes)) == 0:
        raise window.fail(f"the tensor {name!r} has no elements", begin)
    if elements % block_elements or (sizes and sizes[0] % block_elements):
        raise window.fail(f"the tensor {name!r} has no whole number of blocks", begin)
    return Tensor(name, elements // block_elements * block_bytes, kind_name, dimensions), start
