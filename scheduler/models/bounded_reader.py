"""Reads a file's bytes in order through a bounded buffer; a fault of the file is an `InvalidModel`."""

from __future__ import annotations

import os
import struct
from typing import Any

from scheduler.errors.exceptions import InvalidModel

LARGEST_FILE_BYTES = 1 << 50  # far above any real model
WINDOW_BYTES = 256 * 1024
MOST_STRING_BYTES = 1 << 30  # llama.cpp's own limit
# Not llama.cpp's limit: far above any real model, so that a hostile file of any size costs tens of milliseconds.
MOST_READ_BYTES = 128 * WINDOW_BYTES
MOST_TEXTS = 1 << 21  # in all arrays together

KEPT_ELEMENTS = 1 << 10  # longer arrays of numbers (token types, scores) are skipped
MOST_KEPT_ELEMENTS = 1 << 17  # in all arrays together; arrays beyond it are skipped as well

_U64 = struct.Struct("<Q")


class Window:
    """A position in a file, and the piece of at most 256 KiB around it that has been read."""

    def __init__(self, path: str, descriptor: int, file_bytes: int) -> None:
        self.path = path
        self.file_bytes = file_bytes
        self._descriptor = descriptor
        self._bytes = b""
        self._start = 0  # offset of the window in the file
        self._at = 0  # position in the window; may lie behind its end after a skip
        self._elements_left = MOST_KEPT_ELEMENTS
        self._texts_left = MOST_TEXTS
        self._reading_left = MOST_READ_BYTES

    @property
    def offset(self) -> int:
        return self._start + self._at

    @property
    def left(self) -> int:
        return self.file_bytes - self.offset

    def fail(self, reason: str, offset: int | None = None) -> InvalidModel:
        """Return the error for a fault at `offset`, or at the present position."""
        return InvalidModel(self.path, reason, self.offset if offset is None else offset)

    def cut_short(self, least_bytes: int, offset: int | None = None, *, exact: bool = False) -> InvalidModel:
        """Return the error for a file that should have `least_bytes` bytes at least, as after a stopped download."""
        if least_bytes > LARGEST_FILE_BYTES:
            return self.fail(f"it is damaged: by what it says, it would have at least {least_bytes} bytes", offset)
        least = "" if exact else "at least "
        return self.fail(f"it is cut short: {self.file_bytes} of {least}{least_bytes} bytes", offset)

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes; at most a window of them."""
        if self._at + count > len(self._bytes):
            self._read(count)
        taken = self._bytes[self._at : self._at + count]
        self._at += count
        return taken

    def unpack(self, kinds: struct.Struct) -> tuple[Any, ...]:
        """Return the next numbers, of the types that `kinds` names."""
        if self._at + kinds.size > len(self._bytes):
            self._read(kinds.size)
        found = kinds.unpack_from(self._bytes, self._at)
        self._at += kinds.size
        return found

    def number(self, kind: struct.Struct) -> int:
        """Return the next whole number."""
        found: int = self.unpack(kind)[0]
        return found

    def numbers(self, kind: struct.Struct, count: int) -> tuple[int, ...] | None:
        """Return the next `count` numbers, or None where they are too many to keep or not whole numbers."""
        code = kind.format[-1]
        if code in "fd" or count > min(KEPT_ELEMENTS, self._elements_left):
            self.skip(count * kind.size)
            return None
        self._elements_left -= count
        return self.unpack(struct.Struct(f"<{count}{code}"))

    def skip(self, count: int) -> None:
        """Go on behind the next `count` bytes without reading them.

        Raises `InvalidModel` where the file ends before.
        """
        if count > self.left:
            raise self.cut_short(self.offset + count)
        self._at += count

    def length(self) -> int:
        """Return the length of a text; raises `InvalidModel` where the text would not lie inside the file."""
        count: int = self.unpack(_U64)[0]
        if count > self.left or count > MOST_STRING_BYTES:
            if count > MOST_STRING_BYTES:
                raise self.fail(f"a text of {count} bytes is longer than a text may be", self.offset - _U64.size)
            raise self.cut_short(self.offset + count, self.offset - _U64.size)
        return count

    def name(self, most_bytes: int, *, utf8: bool = True) -> str:
        """Return the next name; raises `InvalidModel` if it is empty or longer than `most_bytes`.

        Where it need not be UTF-8, bytes that are not are written as `\\xff`.
        """
        if not 0 < (count := self.length()) <= most_bytes:
            raise self.fail(f"a name has {count} bytes, and may have 1 to {most_bytes}", self.offset - _U64.size)
        try:
            return self.take(count).decode(errors="strict" if utf8 else "backslashreplace")
        except UnicodeDecodeError:
            raise self.fail("a name is not UTF-8", self.offset - count - _U64.size) from None

    def skip_texts(self, count: int) -> None:
        """Go on behind the next `count` texts, by their lengths: a vocabulary takes milliseconds."""
        begin = self.offset - _U64.size
        self._texts_left -= count
        if self._texts_left < 0:
            raise self.fail(f"an array of {count} texts is too long", begin)
        if (least := count * _U64.size) > self.left:
            raise self.cut_short(self.offset + least, begin)
        while count:
            if self._at + _U64.size > len(self._bytes):
                self._read(_U64.size)
            count -= self._walk(count)

    def _walk(self, most: int) -> int:
        """Walk over up to `most` texts, as long as they begin in the window; return how many.

        Numpy would find all texts of a window in a third of the time, and takes longer to import than most vocabularies
        take to walk over.
        """
        unpack, window, last = _U64.unpack_from, self._bytes, len(self._bytes) - _U64.size
        here = at = self._at
        count = 0
        while count < most and at <= last:
            here, at = at, at + _U64.size + unpack(window, at)[0]
            count += 1
        self._at = at
        if self.left < 0:
            raise self.cut_short(self.offset, self._start + here)
        return count

    def _read(self, count: int) -> None:
        """Begin a new window here, with the next `count` bytes in it."""
        if count > self.left:
            raise self.cut_short(self.offset + count)
        self._start, self._at = self.offset, 0
        os.lseek(self._descriptor, self._start, os.SEEK_SET)
        wanted = min(WINDOW_BYTES, self.left)  # `count` never exceeds a window
        self._reading_left -= wanted
        if self._reading_left < 0:
            raise self.fail(f"its header is spread over more than {MOST_READ_BYTES} bytes")
        pieces: list[bytes] = []
        while wanted and (piece := os.read(self._descriptor, wanted)):
            pieces.append(piece)
            wanted -= len(piece)
        self._bytes = b"".join(pieces)
        if count > len(self._bytes):
            raise self.fail("the file became shorter while it was read")
