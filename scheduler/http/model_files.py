"""What is told of the files of models: their card, size, age and digest."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from scheduler.errors.exceptions import SchedulerError
from scheduler.models.model_card import ModelCard, read_card
from scheduler.models.model_spec import FileStates, ModelSpec

log = logging.getLogger("loadmaster")

_DIGEST = re.compile(r"(?:sha256-)?([0-9a-f]{64})")  # as Ollama's store and the Hugging Face cache name their files
_CHUNK_BYTES = 8 << 20
_MOST_KNOWN = 4096  # models, and digests


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is told of a model's files."""

    card: ModelCard
    modified_at: float  # seconds since 1970
    digest: str  # 64 hexadecimal digits


class ModelFiles:
    """Reads what is told of models' files, in threads, and keeps it until the files change.

    The digest of a model in Ollama's store is the one that Ollama shows: of its manifest. The digest of another model
    is the SHA-256 of its file, or, where it has several files, of their digests. It is computed once, in the
    background, in half of the time. Until then a digest is shown that stands for the state of the files.
    """

    def __init__(self) -> None:
        self._cards: dict[tuple[str, FileStates], ModelCard] = {}
        self._digests: dict[tuple[int, int, int, int], str] = {}  # by the state of a file
        self._to_hash: dict[str, None] = {}  # paths, in order
        self._hashing: asyncio.Task[None] | None = None  # ends with its event loop

    async def facts(self, specs: Iterable[ModelSpec]) -> list[ModelFacts | None]:
        """Return what is told of models; None of one whose files cannot be read."""
        to_hash: list[str] = []
        found = await asyncio.to_thread(lambda: [self._facts(spec, to_hash) for spec in specs])
        self._to_hash.update(dict.fromkeys(to_hash))
        if self._to_hash and (self._hashing is None or self._hashing.done()):
            self._hashing = asyncio.create_task(self._hash())
        return found

    async def card(self, spec: ModelSpec) -> ModelCard:
        """Return what a model's files tell of it; raises `ModelNotFound` or `InvalidModel`."""
        return await asyncio.to_thread(lambda: self._card(spec, spec.file_states()))

    def _card(self, spec: ModelSpec, states: FileStates | None) -> ModelCard:
        key = (spec.id, states or ())
        if states is None or (card := self._cards.get(key)) is None:
            card = read_card(spec)
            if len(self._cards) >= _MOST_KNOWN:
                self._cards = {}
            self._cards[key] = card
        return card

    def _facts(self, spec: ModelSpec, to_hash: list[str]) -> ModelFacts | None:
        """Return what is told of a model, and add the files whose digests are not known."""
        states = spec.file_states()
        if states is None:
            return None
        with suppress(SchedulerError, OSError):
            card = self._card(spec, states)
            if spec.manifest:
                with open(spec.manifest, "rb") as file:
                    modified_at, digest = os.fstat(file.fileno()).st_mtime, hashlib.sha256(file.read()).hexdigest()
            else:
                modified_at, digest = states[0][3] / 1e9, self._digest(spec, states, to_hash)
            return ModelFacts(card, modified_at, digest)
        return None

    def _digest(self, spec: ModelSpec, states: FileStates, to_hash: list[str]) -> str:
        digests = []
        for path, state in zip(spec.files, states, strict=True):
            named = _DIGEST.fullmatch(os.path.basename(os.path.realpath(path)))
            if (digest := named[1] if named else self._digests.get(state)) is None:
                to_hash.append(path)
            else:
                digests.append(digest)
        if len(digests) < len(states):
            return hashlib.sha256(repr(states).encode()).hexdigest()
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    async def _hash(self) -> None:
        while self._to_hash:
            path = next(iter(self._to_hash))
            try:
                with open(path, "rb") as file:
                    await self._hash_file(file)
            except OSError as error:
                log.debug("%r has no digest: %s", path, error)
            finally:
                self._to_hash.pop(path, None)

    async def _hash_file(self, file: Any) -> None:
        digest, state = hashlib.sha256(), _state(file)

        def read() -> tuple[int, float]:
            began = time.monotonic()
            part = file.read(_CHUNK_BYTES)
            digest.update(part)
            with suppress(AttributeError, OSError):  # the pages that no runner has mapped make room for others again
                os.posix_fadvise(file.fileno(), 0, file.tell(), os.POSIX_FADV_DONTNEED)
            return len(part), time.monotonic() - began

        while True:
            count, took_s = await asyncio.to_thread(read)
            if not count:
                break
            await asyncio.sleep(took_s)
        if _state(file) == state:
            if len(self._digests) >= _MOST_KNOWN:
                self._digests.clear()
            self._digests[state] = digest.hexdigest()


def _state(file: Any) -> tuple[int, int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
