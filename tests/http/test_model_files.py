"""What is told of models' files: digests come in the background, and hold until a file changes."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from scheduler import ModelSpec
from scheduler.http import model_files
from scheduler.http.model_files import ModelFacts, ModelFiles
from tests.support.tiny_models import write_tiny_model
from tests.support.written_projector import write_projector


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


async def told(files: ModelFiles, spec: ModelSpec) -> ModelFacts:
    (facts,) = await files.facts([spec])
    assert facts is not None
    return facts


async def hashed(files: ModelFiles, spec: ModelSpec) -> str:
    """Return the digest of a model once all digests are computed."""
    await told(files, spec)
    if files._hashing is not None:
        await files._hashing
    return (await told(files, spec)).digest


def test_a_digest_is_computed_behind_the_first_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then another of the same length stands for the file; a changed file has a new one."""
    monkeypatch.setattr(model_files, "_CHUNK_BYTES", 65536)
    path = write_tiny_model(tmp_path / "m.gguf")
    spec = ModelSpec("m", str(path))

    async def digests() -> tuple[str, str, str, str]:
        files = ModelFiles()
        first = (await told(files, spec)).digest
        assert (await told(files, spec)).digest == first
        second = await hashed(files, spec)
        write_tiny_model(path, seed=1)
        third = (await told(files, spec)).digest
        return first, second, third, await hashed(files, spec)

    before = sha256(path.read_bytes())
    first, second, third, fourth = asyncio.run(digests())
    assert (second, fourth) == (before, sha256(path.read_bytes()))
    assert len({first, second, third, fourth}) == 4 and {len(first), len(third)} == {64}


def test_several_files_have_a_digest_of_their_digests(tmp_path: Path) -> None:
    model, projector = write_tiny_model(tmp_path / "m.gguf"), write_projector(tmp_path / "mmproj.gguf", 64)
    spec = ModelSpec("m", str(model), projectors=(str(projector),))
    of_each = [sha256(path.read_bytes()) for path in (model, projector)]
    assert asyncio.run(hashed(ModelFiles(), spec)) == sha256("\n".join(of_each).encode())


@pytest.mark.parametrize("name", ["{}", "sha256-{}"])
def test_a_file_that_is_named_by_its_digest_is_not_read_for_it(tmp_path: Path, name: str) -> None:
    """The Hugging Face cache and Ollama's store name files so; a link with another name leads there."""
    path = write_tiny_model(tmp_path / "m.gguf")
    digest = sha256(path.read_bytes())
    path.rename(tmp_path / name.format(digest))
    path.symlink_to(tmp_path / name.format(digest))

    async def at_once() -> tuple[str, bool]:
        files = ModelFiles()
        return (await told(files, ModelSpec("m", str(path)))).digest, files._hashing is None

    assert asyncio.run(at_once()) == (digest, True)


def test_files_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    good = write_tiny_model(tmp_path / "m.gguf")

    async def found() -> list[ModelFacts | None]:
        files = ModelFiles()
        paths = (tmp_path / "no.gguf", good, tmp_path / "gone.gguf")
        facts = await files.facts([ModelSpec("m", str(path)) for path in paths])
        return facts

    assert [facts is not None for facts in asyncio.run(found())] == [False, True, False]


def test_the_end_of_the_loop_ends_the_computing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file stays open, and nothing waits for the rest."""
    monkeypatch.setattr(model_files, "_CHUNK_BYTES", 16)  # takes long
    spec = ModelSpec("m", str(write_tiny_model(tmp_path / "m.gguf")))
    before = {*os.listdir("/proc/self/fd")}

    async def begun() -> asyncio.Task[None] | None:
        files = ModelFiles()
        await told(files, spec)
        await asyncio.sleep(0.1)
        assert files._hashing is not None and not files._hashing.done()
        return files._hashing

    hashing = asyncio.run(begun())
    assert hashing is not None and hashing.cancelled()
    assert {*os.listdir("/proc/self/fd")} <= before


def test_a_file_that_goes_is_no_fault(tmp_path: Path) -> None:
    spec = ModelSpec("m", str(write_tiny_model(tmp_path / "m.gguf")))

    async def gone() -> bool:
        files = ModelFiles()
        await told(files, spec)
        os.unlink(spec.path)
        assert files._hashing is not None
        await files._hashing
        return not files._digests

    assert asyncio.run(gone())
