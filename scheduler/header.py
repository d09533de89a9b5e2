"""The header of a GGUF file, read in milliseconds and without trust: bounded, buffered, never mapped."""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

from scheduler.errors import InvalidModel, ModelNotFound

Value = int | float | str | tuple[int, ...] | None

WINDOW_BYTES = 1024 * 1024
MOST_STRING_BYTES = 1 << 30  # llama.cpp's own limits
MOST_ELEMENTS = 1 << 30
MOST_DIMENSIONS = 4
MOST_NAME_BYTES = 64  # the terminating zero included
# Ours: far above any real model, so that a hostile header, in a sparse file of any size, costs seconds at most.
MOST_READ_BYTES = 256 * WINDOW_BYTES
MOST_KEYS = 1 << 12
MOST_KEY_BYTES = 1 << 10
MOST_TENSORS = 1 << 16
MOST_TEXTS = 1 << 23  # in all arrays together
KEPT_TEXT_BYTES = 256  # longer texts (chat templates) are skipped
KEPT_ELEMENTS = 1024  # longer arrays (tokens, scores) are skipped, their length is kept
LARGEST_ALIGNMENT = 1 << 20
CACHED_HEADERS = 64

_OPEN_FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"):  # not every system has all of them
    _OPEN_FLAGS |= getattr(os, _name, 0)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor's entry: `bytes` is what it takes in the file and in memory."""

    name: str
    bytes: int


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
    """Return the header of one GGUF file, from memory if the file has not changed since it was last read."""
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFound(path) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise InvalidModel(path, _because(error)) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidModel(path, "it is a directory" if stat.S_ISDIR(status.st_mode) else "it is no regular file")
        key = (path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if (header := _cache.get(key)) is None:
            header = _parse(path, _Reader(path, descriptor, status.st_size))
            _cache.put(key, header)
        return header
    except OSError as error:
        raise InvalidModel(path, _because(error)) from None
    finally:
        os.close(descriptor)


def _because(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.errno == errno.EACCES:
        return "it may not be read: check its permissions"
    return f"it cannot be read ({error.strerror or error})" if isinstance(error, OSError) else f"its path has {error}"


_CacheKey = tuple[str, int, int, int, int]


class _Cache:
    """The headers read last, by the identity of their files."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._headers: OrderedDict[_CacheKey, Header] = OrderedDict()  # the one used longest ago first

    def get(self, key: _CacheKey) -> Header | None:
        with self._lock:
            if (header := self._headers.get(key)) is not None:
                self._headers.move_to_end(key)
            return header

    def put(self, key: _CacheKey, header: Header) -> None:
        with self._lock:
            self._headers[key] = header
            while len(self._headers) > CACHED_HEADERS:
                self._headers.popitem(last=False)


_cache = _Cache()


@dataclass(frozen=True, slots=True)
class _Format:
    """What the gguf package knows of the format."""

    magic: int
    version: int
    alignment: int
    scalars: Mapping[int, struct.Struct]  # by the number of the type
    string: int
    array: int
    quantisations: Mapping[int, tuple[int, int]]  # by the number of the type: elements and bytes of a block


@cache
def _format() -> _Format:
    """Import the package when the first file is read: it takes numpy and 0.14 s with it."""
    from gguf import constants

    return _Format(
        magic=constants.GGUF_MAGIC,
        version=constants.GGUF_VERSION,
        alignment=constants.GGUF_DEFAULT_ALIGNMENT,
        scalars=_scalars(constants),
        string=int(constants.GGUFValueType.STRING),
        array=int(constants.GGUFValueType.ARRAY),
        quantisations={int(kind): sizes for kind, sizes in constants.GGML_QUANT_SIZES.items()},
    )


def _scalars(constants: ModuleType) -> dict[int, struct.Struct]:
    codes = {"UINT8": "B", "INT8": "b", "UINT16": "H", "INT16": "h", "UINT32": "I", "INT32": "i", "FLOAT32": "f"}
    codes |= {"BOOL": "B", "UINT64": "Q", "INT64": "q", "FLOAT64": "d"}
    return {int(constants.GGUFValueType[name]): struct.Struct("<" + code) for name, code in codes.items()}


_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class _Reader:
    """A position in a file, read through a window of at most 1 MiB; whatever goes wrong is an InvalidModel."""

    def __init__(self, path: str, descriptor: int, file_bytes: int) -> None:
        self.path = path
        self.file_bytes = file_bytes
        self._descriptor = descriptor
        self._window = b""
        self._start = 0  # offset of the window in the file
        self._at = 0  # position in the window; may lie behind its end after a skip
        self._texts_left = MOST_TEXTS
        self._reading_left = MOST_READ_BYTES

    @property
    def offset(self) -> int:
        return self._start + self._at

    @property
    def left(self) -> int:
        return self.file_bytes - self.offset

    def fail(self, reason: str, offset: int | None = None) -> InvalidModel:
        """Return the error for what was found at `offset`, or here."""
        return InvalidModel(self.path, reason, self.offset if offset is None else offset)

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes; at most a window of them."""
        self._need(count)
        taken = self._window[self._at : self._at + count]
        self._at += count
        return taken

    def scalar(self, kind: struct.Struct) -> int | float:
        """Return the next number, of any type."""
        self._need(kind.size)
        value: int | float = kind.unpack_from(self._window, self._at)[0]
        self._at += kind.size
        return value

    def number(self, kind: struct.Struct) -> int:
        """Return the next whole number."""
        return int(self.scalar(kind))

    def skip(self, count: int) -> None:
        """Go on behind the next `count` bytes without reading them."""
        if count > self.left:
            raise self.fail("the file ends too early: it is truncated or damaged")
        self._at += count

    def length(self) -> int:
        """Return the length of a text, which is known to lie inside the file."""
        count = self.number(_U64)
        if count > min(MOST_STRING_BYTES, self.left):
            raise self.fail(f"a text of {count} bytes is longer than the rest of the file", self.offset - _U64.size)
        return count

    def text(self, most_bytes: int) -> str:
        """Return the next text; it is an error if it is longer than `most_bytes`."""
        begin = self.offset
        if (count := self.length()) > most_bytes:
            raise self.fail(f"a name of {count} bytes is too long (at most {most_bytes})", begin)
        try:
            return self.take(count).decode()
        except UnicodeDecodeError:
            raise self.fail("a name is not UTF-8", begin) from None

    def skip_texts(self, count: int) -> None:
        """Walk over `count` texts, by their lengths only: a vocabulary takes tens of milliseconds."""
        self._texts_left -= count
        if self._texts_left < 0 or count * _U64.size > self.left:
            raise self.fail(f"an array of {count} texts is too long", self.offset - _U64.size)
        unpack = _U64.unpack_from
        while count:
            self._need(_U64.size)
            window, at, last = self._window, self._at, len(self._window) - _U64.size
            while count and at <= last:
                at += _U64.size + unpack(window, at)[0]
                count -= 1
            self._at = at
            if self.left < 0:
                raise self.fail("a text is longer than the rest of the file", self.file_bytes)

    def _need(self, count: int) -> None:
        """Have the next `count` bytes in the window."""
        if self._at + count <= len(self._window):
            return
        if count > self.left:
            raise self.fail("the file ends too early: it is truncated or damaged")
        self._start, self._at = self.offset, 0
        os.lseek(self._descriptor, self._start, os.SEEK_SET)
        wanted = min(WINDOW_BYTES, self.left)  # `count` never exceeds a window
        self._reading_left -= wanted
        if self._reading_left < 0:
            raise self.fail(f"its header is spread over more than {MOST_READ_BYTES} bytes")
        chunks: list[bytes] = []
        while wanted and (chunk := os.read(self._descriptor, wanted)):
            chunks.append(chunk)
            wanted -= len(chunk)
        self._window = b"".join(chunks)
        if count > len(self._window):
            raise self.fail("the file became shorter while it was read")


def _parse(path: str, reader: _Reader) -> Header:
    """Read a whole header; every count and length is checked before it is used."""
    _check_version(reader)
    tensor_count, key_count = reader.number(_U64), reader.number(_U64)
    if tensor_count > min(MOST_TENSORS, reader.left // 24):  # the least that an entry takes
        raise reader.fail(f"{tensor_count} tensors cannot be", 8)
    if key_count > min(MOST_KEYS, reader.left // 13):
        raise reader.fail(f"{key_count} keys cannot be", 16)
    header = Header(path, reader.file_bytes)
    for _ in range(key_count):
        _read_pair(reader, header)
    header.tensors = _read_tensors(reader, tensor_count, _alignment(reader, header))
    return header


def _check_version(reader: _Reader) -> None:
    known = _format()
    if reader.file_bytes < 24:
        raise reader.fail("it is empty" if reader.file_bytes == 0 else "it is too short for a GGUF file")
    if reader.number(_U32) != known.magic:
        raise reader.fail("it is no GGUF file", 0)
    version = reader.number(_U32)
    if version & 0xFFFF == 0:
        raise reader.fail("it is a big-endian GGUF file, or damaged: convert it for little-endian machines", 4)
    if version > known.version:
        raise reader.fail(
            f"it has version {version} of the format and the installed gguf package knows {known.version} at most: "
            "upgrade the gguf package and the engine",
            4,
        )
    if version < 2:
        raise reader.fail("it has version 1 of the format, which engines no longer read: convert it again", 4)


def _alignment(reader: _Reader, header: Header) -> int:
    alignment = header.values.get("general.alignment", _format().alignment)
    if not isinstance(alignment, int) or not 0 < alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
        reason = f"general.alignment is {alignment!r}, which is no power of two"
        raise reader.fail(reason, header.offsets["general.alignment"])
    return alignment


def _read_pair(reader: _Reader, header: Header) -> None:
    begin = reader.offset
    key = reader.text(MOST_KEY_BYTES)
    if key in header.values:
        raise reader.fail(f"the key {key[:80]!r} is there twice", begin)
    header.offsets[key] = begin
    kind, known = reader.number(_U32), _format()
    if kind == known.array:
        header.values[key] = _read_array(reader, key, header)
    elif kind == known.string:
        count = reader.length()
        if count <= KEPT_TEXT_BYTES:
            header.values[key] = reader.take(count).decode(errors="replace")
        else:
            header.values[key] = None
            reader.skip(count)
    elif (scalar := known.scalars.get(kind)) is not None:
        header.values[key] = reader.scalar(scalar)
    else:
        raise reader.fail(_unknown_kind(f"the key {key[:80]!r}", kind), reader.offset - 4)


def _unknown_kind(what: str, kind: int) -> str:
    return f"{what} has type {kind}, which the installed gguf package does not know: upgrade it and the engine"


def _read_array(reader: _Reader, key: str, header: Header) -> Value:
    """Read an array's length, and its elements if they are few integers."""
    kind, known = reader.number(_U32), _format()
    count = reader.number(_U64)
    if kind == known.array:
        raise reader.fail(f"the key {key[:80]!r} is an array of arrays", reader.offset - 12)
    if count > MOST_ELEMENTS:
        raise reader.fail(f"the key {key[:80]!r} is an array of {count} elements", reader.offset - 8)
    header.lengths[key] = count
    if kind == known.string:
        reader.skip_texts(count)
        return None
    if (scalar := known.scalars.get(kind)) is None:
        raise reader.fail(_unknown_kind(f"the key {key[:80]!r}", kind), reader.offset - 12)
    if count > KEPT_ELEMENTS or scalar.format[-1] in "fd":
        reader.skip(count * scalar.size)
        return None
    return struct.unpack(f"<{count}{scalar.format[-1]}", reader.take(count * scalar.size))


def _read_tensors(reader: _Reader, count: int, alignment: int) -> tuple[Tensor, ...]:
    tensors: dict[str, int] = {}
    end, end_at = 0, 0  # of the data, relative to its start, and where that was said
    for _ in range(count):
        begin = reader.offset
        name = reader.text(MOST_NAME_BYTES - 1)
        if name in tensors:
            raise reader.fail(f"the tensor {name!r} is there twice", begin)
        tensors[name] = size = _read_size(reader, name)
        start = reader.number(_U64)
        if start % alignment:
            raise reader.fail(f"the tensor {name!r} is not aligned to {alignment} bytes", reader.offset - 8)
        if start + size > end:
            end, end_at = start + size, begin
    data = -(-reader.offset // alignment) * alignment
    if tensors and data + end > reader.file_bytes:
        missing = data + end - reader.file_bytes
        raise reader.fail(f"its tensors end {missing} bytes behind the end of the file: it is truncated", end_at)
    if sum(tensors.values()) > reader.file_bytes:
        raise reader.fail("its tensors overlap")
    return tuple(Tensor(name, size) for name, size in tensors.items())


def _read_size(reader: _Reader, name: str) -> int:
    """Return the bytes of a tensor from its dimensions and its type."""
    begin = reader.offset
    if (dimensions := reader.number(_U32)) > MOST_DIMENSIONS:
        raise reader.fail(f"the tensor {name!r} has {dimensions} dimensions", begin)
    sizes = [reader.number(_U64) for _ in range(dimensions)]
    kind = reader.number(_U32)
    if kind not in (known := _format().quantisations):
        if kind > max(known):
            raise reader.fail(_unknown_kind(f"the tensor {name!r}", kind), reader.offset - 4)
        raise reader.fail(f"the tensor {name!r} has type {kind}, which is no longer read: convert it again")
    block_elements, block_bytes = known[kind]
    elements = 1
    for size in sizes:
        elements *= size
    if elements % block_elements or (sizes and sizes[0] % block_elements):
        raise reader.fail(f"the tensor {name!r} has no whole number of blocks", begin)
    return elements // block_elements * block_bytes
