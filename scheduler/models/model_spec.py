"""The specification of a model: its file, with everything that makes it a model of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike, fspath, path, stat
from typing import Literal

from fsm.domain.options import Options
from fsm.machine.request import ModelId
from scheduler.config.value_parsers import program
from scheduler.errors.exceptions import InvalidModel, InvalidSettings, UnsupportedOption
from scheduler.models.chat_defaults import NO_DEFAULTS, ChatDefaults

Files = str | PathLike[str] | Iterable[str | PathLike[str]]  # one path or several
ChosenAdapters = str | Mapping[str, float]  # the name of an adapter, or several with their scales
FileStates = tuple[tuple[int, int, int, int], ...]  # of each file: device, number, bytes, time of its last change

FIRST_PART = re.compile(r"-00001-of-(\d{5})\.gguf$", re.IGNORECASE)  # ending of a split file's first part
ADAPTER_NAME = re.compile(r"\w[\w.-]*")
MOST_PARTS = 1024  # of a split file; the largest models have about a hundred


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model under a name, with the defaults of its requests.

    The real file that `path` leads to, the real files of adapters, projectors and draft, the names of adapters,
    `embedding` and `llama_server` are its identity: requests that agree on these share one runner, whatever names and
    symbolic links they used. A hard link is a file of its own. `options` are the load-time options of requests that
    name none; `keep_alive` is a duration ("5m", seconds; negative: for ever). Raises `InvalidSettings` or
    `UnsupportedOption` for an argument of a wrong type, and `InvalidModel` for a path that is not UTF-8.
    """

    name: str
    path: str
    adapters: tuple[str, ...] = ()  # LoRA files that are applied to every request
    projectors: tuple[str, ...] = ()
    embedding: bool = False
    options: Options = field(default_factory=Options)
    keep_alive: str | float | None = None
    pin: bool = False  # never evicted for other models
    priority: int = 0  # a request group of higher priority goes first
    devices: tuple[str, ...] | None = None  # ids of the GPUs that layers may go to, unless a request names others
    max_leases: int | Literal["slots"] | None = None  # leases of its runner at once; 0: no limit; None: the setting
    chat: ChatDefaults = NO_DEFAULTS  # what its chats begin with, and the parameters that callers do not name
    llama_server: str = ""  # your own `llama-server`, which serves it; empty: as the setting says
    named_adapters: Mapping[str, str] = field(
        default_factory=dict
    )  # LoRA files by name, each applied where it is chosen
    adapter: ChosenAdapters = field(default_factory=dict)  # chosen where a request names none
    draft: str = ""  # the file of a small model that guesses tokens ahead of this one; empty: none
    manifest: str = field(default="", compare=False)  # of a model in Ollama's store: the file that names its parts
    id: ModelId = field(init=False)  # the same for specs of the same identity; links are followed when the spec is made

    def __hash__(self) -> int:
        return hash(self.id)

    def __post_init__(self) -> None:
        check_text("path", fspath(self.path) if isinstance(self.path, PathLike) else self.path)
        object.__setattr__(self, "path", _absolute(self.path))
        object.__setattr__(self, "adapters", _several("adapters", self.adapters))
        object.__setattr__(self, "projectors", _several("projectors", self.projectors))
        object.__setattr__(self, "named_adapters", _named(self.named_adapters))
        object.__setattr__(self, "adapter", chosen_adapters(self.adapter, self.named_adapters))
        if self.draft:
            check_text("draft", fspath(self.draft) if isinstance(self.draft, PathLike) else self.draft)
            object.__setattr__(self, "draft", _absolute(self.draft))
        if self.llama_server:
            object.__setattr__(self, "llama_server", str(program("llama_server", self.llama_server)))
        check_name(self.name)
        check_switch("pin", self.pin)
        object.__setattr__(self, "devices", device_ids(self.devices))
        check_limit("max_leases", self.max_leases)
        if not isinstance(self.chat, ChatDefaults):
            raise InvalidSettings("chat", self.chat, "made of ChatDefaults, as in ChatDefaults(system='Be brief.')")
        if not isinstance(self.embedding, bool):
            raise UnsupportedOption("embedding", self.embedding, "it must be of type bool")
        if not isinstance(self.options, Options):
            raise InvalidSettings("options", self.options, "made of Options, as in options=Options(num_ctx=4096)")
        parts = [_real(self.path), *map(_real, self.adapters)]
        parts += [f"adapter {name}:{_real(file)}" for name, file in self.named_adapters.items()]
        parts += [f"projector:{_real(name)}" for name in self.projectors]
        parts += [f"draft:{_real(self.draft)}"] if self.draft else []
        parts += ["embedding"] if self.embedding else []
        parts += [f"llama-server:{_real(self.llama_server)}"] if self.llama_server else []
        # no part begins with the separator, so that a doubled one inside a path cannot be taken for it
        object.__setattr__(self, "id", ModelId("|".join(part.replace("|", "||") for part in parts)))

    @property
    def files(self) -> tuple[str, ...]:
        """The files that a load reads, in order: the model's own with all its parts, then all others."""
        own = [self.path]
        if split := FIRST_PART.search(self.path):
            stem, count = self.path[: split.start()], int(split[1])
            own += [f"{stem}-{part:05}-of-{count:05}.gguf" for part in range(2, min(count, MOST_PARTS) + 1)]
        return (*own, *self.all_adapters, *self.projectors, *([self.draft] if self.draft else []))

    @property
    def all_adapters(self) -> tuple[str, ...]:
        """The files of adapters, in the order in which the engine has them."""
        return (*self.adapters, *self.named_adapters.values())

    @property
    def scales(self) -> tuple[float, ...]:
        """By how much each of all adapters is applied; empty where there is none to choose from."""
        if not self.named_adapters:
            return ()
        chosen = chosen_adapters(self.adapter, self.named_adapters)
        return (*(1.0 for _ in self.adapters), *(chosen.get(name, 0.0) for name in self.named_adapters))

    def file_states(self) -> FileStates | None:
        """Return what tells the files from others under the same paths; None where a file cannot be looked at."""
        try:
            found = [stat(name) for name in self.files]
        except (OSError, ValueError):
            return None
        return tuple((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns) for each in found)

    def resolved(self) -> ModelSpec:
        """Return the spec with links followed as they lead now, so that the loaded file is the one of its identity."""
        return replace(
            self,
            path=_loadable(self.path),
            adapters=tuple(map(_real, self.adapters)),
            named_adapters={name: _real(file) for name, file in self.named_adapters.items()},
            projectors=tuple(map(_real, self.projectors)),
            draft=_real(self.draft) if self.draft else "",
        )


def device_ids(value: object) -> tuple[str, ...] | None:
    """Return ids of GPUs, sorted, each once; raises `UnsupportedOption` for what is no list of ids, or an empty one."""
    if value is None:
        return None
    names = value if isinstance(value, list | tuple | set | frozenset) else None
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UnsupportedOption("devices", value, 'it must be a list of GPUs by their ids, as in ["GPU-5f3c…"]')
    return tuple(sorted(set(names)))


def check_text(name: str, value: object) -> None:
    """Raise `InvalidSettings` for a value that is no text, or empty, since messages about the model show it."""
    if not isinstance(value, str) or not value:
        raise InvalidSettings(name, value, "a text that is not empty")


def check_name(value: object) -> None:
    """Raise `InvalidSettings` for a name that is not valid UTF-8 text, since it is written to files and to engines."""
    check_text("name", value)
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise InvalidSettings("name", value, "a text that can be written as UTF-8") from None


def check_switch(name: str, value: object) -> None:
    """Raise `InvalidSettings` for a value that is neither True nor False; "no" would count as True."""
    if not isinstance(value, bool):
        raise InvalidSettings(name, value, "True or False")


def check_limit(name: str, value: object) -> None:
    """Raise `InvalidSettings` for a limit that is neither None, "slots", nor a whole number of at least 0."""
    if value not in (None, "slots") and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise InvalidSettings(name, value, 'a whole number of at least 0, "slots", or None')


def chosen_adapters(value: object, there: Mapping[str, str]) -> Mapping[str, float]:
    """Return the scales of the adapters that are chosen, by name; raises `UnsupportedOption` where one is not there."""
    chosen = {value: 1.0} if isinstance(value, str) else value
    if not isinstance(chosen, Mapping):
        raise UnsupportedOption("adapter", value, 'it must be a name, or scales by name, as in {"sql": 0.5}')
    for name, scale in chosen.items():
        if name not in there:
            known = f"it has {', '.join(there)}" if there else "its ModelSpec has no named_adapters"
            raise UnsupportedOption("adapter", name, f"the model has no adapter of this name; {known}")
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
            raise UnsupportedOption("adapter", scale, f"the scale of {name} must be a number")
    return {name: float(scale) for name, scale in sorted(chosen.items())}


def _named(value: object) -> Mapping[str, str]:
    """Return adapters by name, in the order of their names, with absolute paths."""
    there = value if isinstance(value, Mapping) else {"": ""}
    for name, file in there.items():
        if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name) or not isinstance(file, str | PathLike):
            raise InvalidSettings("named_adapters", value, 'files by name, as in {"sql": "sql.gguf"}')
    return {name: _absolute(there[name]) for name in sorted(there)}


def _several(option: str, value: Files) -> tuple[str, ...]:
    """Return the paths that an option names, one or several."""
    try:
        names = [fspath(name) for name in ((value,) if isinstance(value, str | PathLike) else value)]
    except TypeError:
        names = [""]
    if not all(isinstance(name, str) and name for name in names):
        raise UnsupportedOption(option, value, "it must be a path, or several")
    return tuple(map(_absolute, names))


def _absolute(name: str | PathLike[str]) -> str:
    """Return the absolute path; raises `InvalidModel` for a path that the engine could not be given."""
    try:
        found = path.abspath(path.expanduser(fspath(name)))
    except OSError:
        reason = "its path is relative, and the working folder is gone; name it by its absolute path"
        raise InvalidModel(fspath(name), reason) from None
    try:
        found.encode()
    except UnicodeEncodeError:
        raise InvalidModel(found, "its path is not UTF-8; rename it") from None
    return found


def _real(name: str) -> str:
    """Return the real path; an impossible path stays as it is, and is refused when it is opened."""
    try:
        return path.realpath(name)
    except ValueError:  # a zero byte
        return name


def _loadable(name: str) -> str:
    """Return the real path of a model, under a name by which the other parts of a split file are found."""
    real = _real(name)
    if FIRST_PART.search(name) and not FIRST_PART.search(real):  # each part is a link to a file without a name
        return path.join(_real(path.dirname(name)), path.basename(name))
    return real
