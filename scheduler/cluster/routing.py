"""What a client asks for, as far as the choice of a node depends on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from fsm.cluster.digest import ContentId, NodeId
from fsm.domain.options import AUTOMATIC, Options
from scheduler.errors.exceptions import SchedulerError
from scheduler.http.exchange import object_of
from scheduler.http.rules import LOAD_OPTIONS
from scheduler.http.runner_routes import HEADER

Names = Mapping[str, Sequence[tuple[NodeId, ContentId]]]  # what nodes have under each name

_LATEST = ":latest"
_MARK = "@"  # between a name and the beginning of a content
_SHOWN = 8  # letters of a content
_FORM = "multipart/form-data"
_LISTED = "/v1/models/"
_EMBEDS = ("/embed", "/rerank")  # in paths


@dataclass(eq=False)
class AmbiguousModel(SchedulerError):
    """Nodes have different files under one name."""

    status: ClassVar[int] = 409
    model: str
    names: tuple[str, ...]  # that say which file they mean

    def _words(self) -> str:
        return f"nodes have different files under the name {self.model!r}: say which, {' or '.join(self.names)}"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request names: a model, and options that count for its load."""

    model: str | None = None
    options: Options = AUTOMATIC
    embeds: bool = False  # the model is loaded as an embedder


def asked_in(path: str, content: bytes, headers: Mapping[str, str]) -> Asked:
    """Return what a request names; what cannot be read names nothing, and the node says what is wrong with it."""
    if path.startswith(_LISTED):
        return Asked(path.removeprefix(_LISTED))
    if not content:
        return Asked()
    if headers.get("content-type", "").startswith(_FORM):
        return Asked(_model_of_form(content))
    try:
        body = object_of(content)
    except SchedulerError:
        return Asked()
    name = body.get("model") or body.get("name")
    options = body.get("options")
    return Asked(
        name if isinstance(name, str) else None, options_in(options if isinstance(options, Mapping) else {}, headers),
        embeds=any(word in path for word in _EMBEDS),
    )  # fmt: skip


def _model_of_form(content: bytes) -> str | None:
    """Return the field of a form that names the model: its part has no file in it."""
    for part in content.split(b"\r\n--"):
        head, _, value = part.partition(b"\r\n\r\n")
        if b'name="model"' in head and b"filename=" not in head:
            return value.decode(errors="replace")
    return None


def options_in(asked: Mapping[str, Any], headers: Mapping[str, str] = MappingProxyType({})) -> Options:
    """Return the load-time options that a request names; those that make no sense are for the node to refuse."""
    found = {name: asked[name] for name in LOAD_OPTIONS if asked.get(name) is not None}
    for name in LOAD_OPTIONS:
        if (text := headers.get(HEADER + name.replace("_", "-"))) is not None:
            found[name] = text
    chosen: dict[str, Any] = {}
    for name, value in found.items():
        with suppress(ValueError, TypeError):
            chosen[name] = int(value) if name.startswith(("num_", "main_")) else value
    return Options(**chosen) if chosen else AUTOMATIC


def parted(name: str) -> tuple[str, str]:
    """Return a name without what says which of several files is meant, and that; empty where nothing says it."""
    plain, mark, content = name.rpartition(_MARK)
    return (plain, content) if mark and plain else (name, "")


def marked(name: str, content: ContentId) -> str:
    """Return a name that says which of several files is meant."""
    return f"{name}{_MARK}{content[:_SHOWN]}"


def contents_of(name: str, known: Names) -> set[ContentId]:
    """Return the contents that nodes have under a name, which may say itself which one it means."""
    for wanted, begins in ((name, ""), (name.removesuffix(_LATEST), ""), parted(name)):
        if found := {content for _, content in known.get(wanted, ()) if content.startswith(begins)}:
            return found
    return set()
