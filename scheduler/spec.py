"""What a user asks for: a model file with everything that makes it a different runner."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike, fspath, path

from fsm.model import Options
from fsm.request import ModelId


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model under a name, with the defaults its requests have.

    The file, adapters, projectors and `embedding` are its identity: requests that agree on these share one runner.
    `options` are the load-time options of requests that name none; `keep_alive` is a duration ("5m", seconds; negative:
    for ever).
    """

    name: str
    path: str
    adapters: tuple[str, ...] = ()
    projectors: tuple[str, ...] = ()
    embedding: bool = False
    options: Options = field(default_factory=Options)
    keep_alive: str | float | None = None
    pin: bool = False  # never given up for others
    priority: int = 0  # higher goes first among those that wait
    id: ModelId = field(init=False)  # the same for specs of the same identity

    def __hash__(self) -> int:
        return hash(self.id)

    def __post_init__(self) -> None:
        def absolute(name: str | PathLike[str]) -> str:
            return path.abspath(path.expanduser(fspath(name)))

        object.__setattr__(self, "path", absolute(self.path))
        object.__setattr__(self, "adapters", tuple(map(absolute, self.adapters)))
        object.__setattr__(self, "projectors", tuple(map(absolute, self.projectors)))
        parts = [self.path, *self.adapters, *(f"projector:{name}" for name in self.projectors)]
        object.__setattr__(self, "id", ModelId("|".join(parts) + ("|embedding" if self.embedding else "")))
