"""Which file a model is, whatever its name and its machine: equal files are known by a sample of what is in them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace

from fsm.cluster.digest import ContentId, Offer
from fsm.machine.request import ModelId
from scheduler.models.model_spec import FileStates, ModelSpec

_SAMPLES = 32  # of a file, at equal distances, the first and the last bytes among them
_SAMPLE_BYTES = 16 * 1024
_DIGITS = 16
_MOST_KNOWN = 4096  # models
_OF_ONE = "+"  # between a content and the name of one of several equal files
_EMBEDDER = "-embedding"  # behind the content of a model that is loaded as an embedder


class Contents:
    """The contents of models, read once until their files change. Safe to use from any thread."""

    def __init__(self) -> None:
        self._known: dict[ModelId, tuple[FileStates, ContentId]] = {}

    def of(self, spec: ModelSpec) -> ContentId | None:
        """Return the content of a model; None where its files cannot be read."""
        states = spec.file_states()
        if states is None:
            return None
        known = self._known.get(spec.id)
        if known is not None and known[0] == states:
            return known[1]
        with suppress(OSError):
            content = ContentId(_sampled(spec.files) + (_EMBEDDER if spec.embedding else ""))
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[spec.id] = states, content
            return content
        return None

    def offers(self, models: Mapping[str, ModelSpec], embedded: Iterable[ModelSpec]) -> dict[ModelId, Offer]:
        """Return what a node offers: models by their names, and those that were asked for as embedders.

        Equal files at several places are several models of the node, each with a runner of its own: the content of each
        ends with its name.
        """
        found: dict[ModelId, Offer] = {}
        for name, spec in models.items():
            if (offer := found.get(spec.id)) is not None:
                found[spec.id] = replace(offer, names=(*offer.names, name))
            elif (content := self.of(spec)) is not None:
                found[spec.id] = Offer(content, (name,), sum(size for _, _, size, _ in spec.file_states() or ()))
        for spec in embedded:
            if spec.id not in found and (content := self.of(spec)) is not None:
                found[spec.id] = Offer(content)
        counts = Counter(offer.content for offer in found.values())
        return {
            id: offer if counts[offer.content] == 1 else replace(offer, content=_of_one(offer))
            for id, offer in found.items()
        }


def plain(content: ContentId) -> str:
    """Return a content without the name of one of several equal files."""
    return content.partition(_OF_ONE)[0]


def embedder_of(content: ContentId) -> ContentId:
    """Return the content of the same files as an embedder."""
    files, mark, name = content.partition(_OF_ONE)
    return content if files.endswith(_EMBEDDER) else ContentId(files + _EMBEDDER + mark + name)


def _of_one(offer: Offer) -> ContentId:
    return ContentId(offer.content + _OF_ONE + min(offer.names, default=""))


def _sampled(files: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in files:
        with open(name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(b"%d:" % size)
            for part in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * part // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:_DIGITS]
