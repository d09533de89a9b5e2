"""Paths that are no file, or a file that does not belong to its model's other files, each with its refusal."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from scheduler.models.bounded_reader import MOST_READ_BYTES, WINDOW_BYTES
from tests.support.gguf_bytes import TEXT, U32, a_file, a_model, array, number, tensor, text, words
from tests.support.hostile_files import SOMEWHERE, SOUND, Expected

FIRST, SECOND = "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"
TENSORS = (tensor("blk.0.a"), tensor("output.weight", offset=32))


def missing(path: Path) -> Expected:
    """Return a path that does not exist."""
    return Expected(str(path), str(path), "", missing=True)


def no_file(path: Path, reason: str = "no regular file") -> Expected:
    """Return a path that is not a file."""
    return Expected(str(path), str(path), reason)


def a_node(folder: Path, kind: int) -> Expected:
    """Make a FIFO or a socket without a process at its other end."""
    os.mknod(folder / "node", kind | stat.S_IRUSR | stat.S_IWUSR)
    return no_file(folder / "node")


def a_link(folder: Path, target: str | Path) -> Path:
    """Make a symbolic link."""
    os.symlink(target, folder / "link.gguf")
    return folder / "link.gguf"


def below_a_file(folder: Path) -> Expected:
    """Make a path below a file, as if the file were a folder."""
    (folder / "file").touch()
    return missing(folder / "file" / "m.gguf")


def far_apart(folder: Path) -> Expected:
    """Make a file of holes with a few texts far apart, so that reading their lengths reads all of it."""
    count = MOST_READ_BYTES // WINDOW_BYTES + 1
    few = text("abc") * 40 + struct.pack("<Q", WINDOW_BYTES)
    with open(folder / "m.gguf", "wb") as file:
        file.write(a_model(array("far", TEXT, 41 * count), tensors=(), data=b"").rstrip(b"\0"))
        begin = file.seek(a_model().index(tensor("blk.0.attn_q.weight")) + len(array("far", TEXT, 0)))
        for place in range(count):
            file.seek(begin + place * (len(few) + WINDOW_BYTES))
            file.write(few)
        file.truncate(file.tell() + WINDOW_BYTES)
    return Expected(str(folder / "m.gguf"), str(folder / "m.gguf"), "spread over more than", SOMEWHERE)


def locked(folder: Path) -> Expected:
    """Make a file that may not be read."""
    (folder / "m.gguf").write_bytes(SOUND)
    (folder / "m.gguf").chmod(0)
    return no_file(folder / "m.gguf", "permissions")


PLACES: dict[str, Callable[[Path], Expected]] = {
    "nothing": lambda folder: missing(folder / "no.gguf"),
    "a link to nothing": lambda folder: missing(a_link(folder, "no.gguf")),
    "a file below a file": below_a_file,
    "a folder": lambda folder: no_file(folder, "directory"),
    "a link to a folder": lambda folder: no_file(a_link(folder, folder), "directory"),
    "a link to itself": lambda folder: no_file(a_link(folder, "link.gguf"), "cannot be read"),
    "a FIFO": lambda folder: a_node(folder, stat.S_IFIFO),
    "a socket": lambda folder: a_node(folder, stat.S_IFSOCK),
    "a device": lambda folder: no_file(Path("/dev/zero")),
    "a link to a device": lambda folder: no_file(a_link(folder, "/dev/zero")),
    "a file of holes": far_apart,
    "a name of 300 letters": lambda folder: no_file(folder / ("n" * 300), "cannot be read"),
    "a name with a zero byte": lambda folder: no_file(folder / "zero\0byte", "its path cannot be used"),
    "a name that is no text": lambda folder: no_file(folder / "\ud800", "encode"),
}
if os.geteuid():  # root may read everything
    PLACES["a file that may not be read"] = locked


# Models with files beside them


def beside(kind: str, content: bytes | None, reason: str = "", at: bytes | None = None) -> Callable[[Path], Expected]:
    """Return a function that makes a sound model with an adapter or a projector that is not sound."""

    def make(folder: Path) -> Expected:
        (folder / "m.gguf").write_bytes(SOUND)
        path = str(folder / "beside.gguf")
        if content is not None:
            Path(path).write_bytes(content)
        offset = None if at is None or content is None else content.index(at)
        adapters, projectors = ((path,), ()) if kind == "adapter" else ((), (path,))
        return Expected(str(folder / "m.gguf"), path, reason, offset, adapters, projectors, missing=content is None)

    return make


def of(architecture: str) -> bytes:
    """Return the length and the text of an architecture."""
    return words("general.architecture", architecture)


BESIDE = {
    "no adapter": beside("adapter", None),
    "no projector": beside("projector", None),
    "a model as an adapter": beside("adapter", SOUND, "does not say that it is an adapter"),
    "a projector as an adapter": beside("adapter", a_model(architecture="clip"), "does not say that it is an adapter"),
    "a list as an adapter's type": beside(
        "adapter",
        a_model(array("general.type", U32, 0)),
        "not say that it is an adapter",
        array("general.type", U32, 0),
    ),
    "an adapter of another architecture": beside(
        "adapter", a_file([of("gemma3"), words("general.type", "adapter")]), "is 'gemma3', which is not", of("gemma3")
    ),
    "an empty adapter": beside("adapter", b"GGUF", "too short", b"GGUF"),
    "a model as a projector": beside("projector", SOUND, "does not say that it is a projector", of("llama")),
    "an adapter as a projector": beside(
        "projector", a_model(words("general.type", "adapter")), "does not say that it is a projector", of("llama")
    ),
    "ears in words": beside(
        "projector",
        a_model(words("clip.has_audio_encoder", "yes"), architecture="clip"),
        "no usable value",
        words("clip.has_audio_encoder", "yes"),
    ),
    "a projector that is cut": beside(
        "projector", a_model(architecture="clip")[:-240], "cut short", tensor("blk.0.attn_q.weight")
    ),
}


# Models in several files


def part(place: int | None, tensors: Sequence[bytes], *, count: int = 2, all_tensors: int = 3) -> bytes:
    """Return one part of a split model; without a `place` the part does not say which it is."""
    pairs = [number("split.count", count), number("split.tensors.count", all_tensors)]
    pairs += [] if place is None else [number("split.no", place)]
    return a_model(*pairs, tensors=tensors)


def split(
    first: bytes, second: bytes | None, wrong: str, reason: str, at: bytes | None = None, given: str = FIRST
) -> Callable[[Path], Expected]:
    """Return a function that makes a model in two files: `given` is read, and the refusal names `wrong`."""

    def make(folder: Path) -> Expected:
        (folder / FIRST).write_bytes(first)
        if second is not None:
            (folder / SECOND).write_bytes(second)
        if given not in (FIRST, SECOND):
            (folder / FIRST).rename(folder / given)
        content = first if wrong != SECOND else second or b""
        offset = None if at is None else content.index(at)
        return Expected(str(folder / given), str(folder / wrong), reason, offset, missing=second is None)

    return make


ONE = part(0, TENSORS)
TWO = part(1, [tensor("blk.0.b")])
TOLD = number("split.tensors.count", 3)
NUMBER = number("split.no", 0)[:-4]  # the pair without its number
PARTS = {
    "a missing part": split(ONE, None, SECOND, ""),
    "the second part": split(ONE, TWO, SECOND, "name the first, which ends in -00001-of-00002", given=SECOND),
    "a first part of another name": split(ONE, TWO, "m.gguf", "name the first", given="m.gguf"),
    "more parts than the name says": split(part(0, TENSORS, count=3), TWO, FIRST, "name the first"),
    "2^32 - 1 parts": split(part(0, TENSORS, count=(1 << 32) - 1), TWO, FIRST, "one of 4294967295 parts"),
    "a first part that is the second": split(TWO, TWO, FIRST, "not that of part 1 of 2", NUMBER),
    "the same part twice": split(ONE, ONE, SECOND, "not that of part 2 of 2", NUMBER),
    "a part that does not say which": split(ONE, part(None, [tensor("b")]), SECOND, "split.no.* is missing"),
    "a part of a model in three": split(
        ONE, part(1, [tensor("b")], count=3), SECOND, "not that of part 2 of 2", NUMBER
    ),
    "a model as a part": split(ONE, SOUND, SECOND, "split.no.* is missing"),
    "a part that is cut": split(ONE, TWO[:-240], SECOND, "cut short", tensor("blk.0.b")),
    "an empty part": split(ONE, b"", SECOND, "empty", b""),
    "a part with another's tensor": split(ONE, part(1, [tensor("blk.0.a")]), SECOND, "is also in a part before it"),
    "a part of another model": split(
        ONE, part(1, [tensor("blk.0.b"), tensor("c", offset=32)]), FIRST, "is 3, and there are 4", TOLD
    ),
    "a part without tensors": split(ONE, part(1, ()), FIRST, "is 3, and there are 2", TOLD),
}
MAKERS = {
    f"{subject}: {name}": make
    for subject, makers in {"place": PLACES, "beside": BESIDE, "parts": PARTS}.items()
    for name, make in makers.items()
}
