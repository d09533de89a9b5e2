"""`python -m tests.tools.fuzz_metadata [--mutations N] [--seed S]`: damage sound files at random, and read them.

A file that is read must be sound, and any other must be refused with InvalidModel or ModelNotFound. Anything else
ends the run with status 1: the file is saved, and the command that makes it again is printed.
"""

from __future__ import annotations

import argparse
import os
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from scheduler.errors.exceptions import InvalidModel, ModelNotFound
from scheduler.models.gguf_header import forget_headers
from scheduler.models.gguf_metadata import read_metadata
from scheduler.models.model_info import ModelInfo
from tests.support.gguf_bytes import (
    F64,
    I32,
    TEXT,
    U8,
    U32,
    a_file,
    a_model,
    array,
    long_number,
    number,
    tensor,
    text,
    words,
)
from tests.support.tiny_models import write_tiny_model

SAVED = Path("build/fuzz")
HUGE_BYTES = 1 << 40  # of files that are made long by a hole at their end

INTERESTING = sorted(
    {0, 1, 2, 7, 8, 9, 13, 31, 32, 33, 64, 255, 256, 1 << 16, 1 << 20, 1 << 40, 1 << 62}
    | {(1 << bits) + change for bits in (30, 31, 32, 63) for change in (-1, 0, 1)}
    | {(1 << 64) - change for change in (1, 8, 32)}
)


@dataclass(frozen=True, slots=True)
class Sound:
    """A file that is read without an error in a `role`: a model, a first or second part of one, or beside one."""

    name: str
    role: str
    content: bytes


@dataclass(slots=True)
class Result:
    """The outcomes of the mutated files."""

    accepted: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    slowest: int = 0  # the number of the slowest one
    failures: list[str] = field(default_factory=list)


class Unsound(Exception):
    """The metadata cannot be, or the refusal does not have what it should."""


def sound_files() -> list[Sound]:
    """Return the files that are damaged: each type of entry is in one of them."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = write_tiny_model(Path(folder) / "tiny.gguf", layers=1, width=8).read_bytes()
    heads = "llama.attention.head_count"
    by_layer = [array(heads, U32, 2, struct.pack("<2I", 4, 2)), array(f"{heads}_kv", I32, 2, struct.pack("<2i", 2, 0))]
    tokens = array("tokenizer.ggml.tokens", TEXT, 64, b"".join(text("t" * count) for count in range(64)))
    others = [array("bytes", U8, 9, bytes(9)), array("numbers", F64, 2, bytes(16)), long_number("long", 1 << 40)]
    tensors = [tensor("blk.0.a", (32, 2), kind=2), tensor("blk.1.b", (4, 2, 2, 2), offset=64), tensor("c", offset=192)]
    rich = a_model(number("general.alignment", 64), *by_layer, tokens, *others, blocks=2, tensors=tensors)
    split = number("split.count", 2), number("split.tensors.count", 2)
    sees = number("clip.has_vision_encoder", 1), words("general.type", "mmproj")
    return [
        Sound("tiny", "model", tiny),
        Sound("rich", "model", rich),
        Sound("first", "first", a_model(*split, number("split.no", 0))),
        Sound("second", "second", a_file([*split, number("split.no", 1)], [tensor("output.weight")])),
        Sound("adapter", "adapter", a_model(words("general.type", "adapter"))),
        Sound("projector", "projector", a_model(*sees, architecture="clip")),
    ]


# One mutated file


def flip(draw: random.Random, content: bytearray, at: int) -> None:
    """Change one bit."""
    content[at] ^= 1 << draw.randrange(8)


def overwrite(draw: random.Random, content: bytearray, at: int) -> None:
    """Write any bytes over others."""
    count = draw.choice((1, 2, 4, 8, 32))
    content[at : at + count] = draw.choice((bytes(count), b"\xff" * count, draw.randbytes(count)))


def edit_length(draw: random.Random, content: bytearray, at: int) -> None:
    """Change a possible length or count at `at` or behind it: a small number in eight bytes or in four."""
    size = draw.choice((4, 8))
    found = content.find(bytes(size - 1), at + 1, at + 4096)
    place = found - 1 if found > 0 else at
    before = int.from_bytes(content[place : place + size], "little")
    after = draw.choice((draw.choice(INTERESTING), before + 1, before - 1, 2 * before, len(content) - place))
    content[place : place + size] = (after % (1 << 8 * size)).to_bytes(size, "little")


def cut_out(draw: random.Random, content: bytearray, at: int) -> None:
    """Remove a piece."""
    del content[at : at + draw.randint(1, 64)]


def repeat(draw: random.Random, content: bytearray, at: int) -> None:
    """Repeat a piece at another place."""
    to = draw.randrange(len(content))
    content[to:to] = content[at : at + draw.randint(1, 256)]


def truncate(draw: random.Random, content: bytearray, at: int) -> None:
    """Cut the file at `at`."""
    del content[at:]


Mutation = Callable[[random.Random, bytearray, int], None]
MUTATIONS: tuple[Mutation, ...] = (flip, overwrite, edit_length, edit_length, cut_out, repeat, truncate)


def mutate(draw: random.Random, files: list[Sound]) -> tuple[Sound, bytes, int]:
    """Return which file was damaged, its new content, and the length that the file is to have."""
    sound = draw.choice(files)
    content = bytearray(sound.content)
    if draw.random() < 0.1:  # spliced: the file continues as another one
        other, at = draw.choice(files).content, draw.randrange(len(content))
        content[at:] = other[draw.choice((at, draw.randrange(len(other)))) :]
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        if content:
            near = draw.random() < 0.8  # most changes are in the header, which is at most that long
            draw.choice(MUTATIONS)(draw, content, draw.randrange(min(len(content), 800 if near else 1 << 30)))
    return sound, bytes(content), HUGE_BYTES if draw.random() < 0.02 else len(content)


# The outcome


class Files:
    """A folder with sound files, beside which a damaged one is read."""

    def __init__(self, folder: Path, files: list[Sound]) -> None:
        self._files = files
        self._paths = {
            "model": folder / "model.gguf",
            "first": folder / "split-00001-of-00002.gguf",
            "second": folder / "split-00002-of-00002.gguf",
            "adapter": folder / "adapter.gguf",
            "projector": folder / "projector.gguf",
        }
        for each in files:
            self._paths[each.role].touch()
            self.put(each.role, each.content, len(each.content))
        for each in files:
            self.read(each.role)  # the file is sound

    def put(self, role: str, content: bytes, file_bytes: int) -> None:
        """Write the file of a role over the present one, because emptying it first costs milliseconds on many disks."""
        with self._paths[role].open("r+b") as file:
            file.write(content)
            file.truncate(file_bytes)

    def restore(self, role: str) -> None:
        """Write the sound file of a role again."""
        content = next(each.content for each in self._files if each.role == role)
        self.put(role, content, len(content))

    def read(self, role: str) -> ModelInfo | None:
        """Read the model that a role belongs to; return None if it is refused as it should be."""
        forget_headers()
        model = self._paths["first" if role in ("first", "second") else "model"]
        beside = [str(self._paths[role])]
        try:
            if role == "adapter":
                return read_metadata(str(model), adapters=beside)
            return read_metadata(str(model), projectors=beside if role == "projector" else ())
        except ModelNotFound:
            if role != "first":  # a first part may name other parts
                raise
        except InvalidModel as error:
            size = os.path.getsize(error.path)
            if not error.reason or not 0 <= (error.offset or 0) <= size:
                raise Unsound(f"{error!r} of a file of {size} bytes") from error
        return None


def check(info: ModelInfo) -> None:
    """Check what placement relies on."""
    weights = sum(info.layers_bytes) + info.input_bytes + info.output_bytes
    numbers = (info.context_trained, info.embedding_length, info.vocabulary, info.heads, *info.heads_kv)
    if not 0 < weights <= info.file_bytes:
        raise Unsound(f"{weights} bytes of weights in {info.file_bytes} bytes: {info!r}")
    if min(numbers) < 0 or max(numbers) >= 1 << 32 or len(info.heads_kv) != len(info.layers_bytes):
        raise Unsound(repr(info))


def try_one(place: Files, files: list[Sound], seed: int, number: int, result: Result) -> None:
    """Make one mutated file, read it, and note the outcome."""
    sound, content, file_bytes = mutate(random.Random(f"{seed}/{number}"), files)
    place.put(sound.role, content, file_bytes)
    begin = time.perf_counter()
    try:
        info = place.read(sound.role)
        taken_s = time.perf_counter() - begin
        if info is not None:
            check(info)
    except Exception as error:  # any exception is a failure that is looked for
        SAVED.mkdir(parents=True, exist_ok=True)
        saved = SAVED / f"{sound.role}-{seed}-{number}.gguf"
        saved.write_bytes(content)
        command = f"python -m tests.tools.fuzz_metadata --seed {seed} --first {number} --mutations 1"
        result.failures.append(f"{error!r}\n  {saved} ({file_bytes} bytes long), made again by: {command}")
        return
    finally:
        place.restore(sound.role)
    if info is None:
        result.refused += 1
    else:
        result.accepted += 1
    if taken_s > result.slowest_s:
        result.slowest_s, result.slowest = taken_s, number


def run(mutations: int, seed: int, first: int = 0, *, loud: bool = False) -> Result:
    """Try mutated files `first` to `first + mutations - 1` of a seed, up to the first failure."""
    files, result, said = sound_files(), Result(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Files(Path(folder), files)
        for number in range(first, first + mutations):
            try_one(place, files, seed, number, result)
            if loud and (now := time.monotonic()) > said + 1:
                print(f"{number - first + 1:,} of {mutations:,}", file=sys.stderr)
                said = now
            if result.failures:
                break
    return result


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="tests.tools.fuzz_metadata", description="damage GGUF files and read them")
    parser.add_argument("--mutations", type=int, default=100_000, help="how many (default: 100,000)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first (default: 0)")
    given = parser.parse_args()
    result = run(given.mutations, given.seed, given.first, loud=True)
    print(
        f"{result.accepted + result.refused:,} mutants of seed {given.seed}: {result.accepted:,} accepted, "
        f"{result.refused:,} refused, the slowest (number {result.slowest}) in {result.slowest_s * 1000:.1f} ms"
    )
    for failure in result.failures:
        print(failure, file=sys.stderr)
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
