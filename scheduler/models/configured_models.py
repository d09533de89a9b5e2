"""Models that a configuration file names: by their own path, or as another model with other defaults."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fsm.domain.options import Options
from scheduler.errors.exceptions import InvalidModel, InvalidSettings, UnsupportedOption
from scheduler.models.catalog import Catalog, check_name
from scheduler.models.model_spec import ModelSpec

_FILES = ("adapters", "projectors")
_KEYS = (
    "path", "base", "aliases", "options", "keep_alive", "pin", "priority", "devices", "max_leases", "embedding",
    "named_adapters", "adapter", "draft",
)  # fmt: skip
_OPTIONS = tuple(each.name for each in fields(Options) if each.name != "devices")


@dataclass(frozen=True, slots=True)
class ConfiguredModel:
    """A model of a file: its path, or the name of the model that it is based on, and what it changes of that."""

    name: str
    path: str | None
    base: str  # its own name, where the file changes a model that there is
    aliases: tuple[str, ...]
    options: Mapping[str, Any]
    changes: Mapping[str, Any]  # other fields of its ModelSpec

    def spec(self, others: Catalog) -> ModelSpec:
        """Return the model as it is now, based on a model of `others`; raises what `Catalog.find` raises."""
        if self.path is None:
            found = replace(others.find(self.base), name=self.name)
        elif os.path.isfile(self.path):
            found = ModelSpec(self.name, self.path)
        else:
            raise InvalidModel(self.path, "there is no such file")
        return replace(found, options=replace(found.options, **self.options), **self.changes)


def configured_model(name: str, values: Mapping[str, Any], folder: Path) -> ConfiguredModel:
    """Return a model from its table in a file; relative paths are seen from `folder`, which the file is in.

    Raises `InvalidSettings` and `UnsupportedOption`. The values that a request may have too are checked by its parser.
    """
    check_name(name)
    if not isinstance(values, Mapping):
        raise InvalidSettings("this", values, "a table")
    for key, value in values.items():
        if key not in (*_KEYS, *_FILES):
            raise InvalidSettings(key, value, f"one of {', '.join((*_KEYS, *_FILES))}")
    path, base, options = values.get("path"), values.get("base"), values.get("options", {})
    for key, value in (("path", path), ("base", base)):
        if value is not None and (not isinstance(value, str) or not value):
            raise InvalidSettings(key, value, "a text that is not empty")
    if path is not None and base is not None:
        raise InvalidSettings("base", base, "left out where there is a path")
    if not isinstance(options, Mapping):
        raise InvalidSettings("options", options, "a table")
    for key, value in options.items():
        if key not in _OPTIONS:
            raise UnsupportedOption(key, value, f"there is no such option; there are {', '.join(_OPTIONS)}")
    aliases = _texts("aliases", values.get("aliases", ()))
    for alias in aliases:
        check_name(alias)
    changes = {key: value for key, value in values.items() if key not in ("path", "base", "aliases", "options")}
    for key in _FILES:
        if key in changes:
            changes[key] = tuple(_seen_from(folder, file) for file in _texts(key, changes[key]))
    if "draft" in changes:
        changes["draft"] = _seen_from(folder, _texts("draft", changes["draft"])[0])
    if isinstance(named := changes.get("named_adapters"), Mapping):
        found = {adapter: _texts(f"named_adapters.{adapter}", file)[0] for adapter, file in named.items()}
        changes["named_adapters"] = {adapter: _seen_from(folder, file) for adapter, file in found.items()}
    return ConfiguredModel(
        name, None if path is None else _seen_from(folder, path), base or name, aliases, options, changes
    )


def _texts(key: str, value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise InvalidSettings(key, value, "a text, or several as a list")
    return tuple(texts)


def _seen_from(folder: Path, path: str) -> str:
    return os.path.join(folder, os.path.expanduser(path))


class ConfiguredModels:
    """A resolver of the models that a file names; aliases lead to a model and are not listed."""

    def __init__(self, location: str, others: Catalog) -> None:
        self.location = location
        self._others = others  # where models are that those of the file are based on
        self._models: Mapping[str, ConfiguredModel] = {}  # by name and by alias; replaced, never changed

    def replace(self, models: Iterable[ConfiguredModel]) -> None:
        """Have these models from now on, in place of those before; raises `InvalidSettings` for a name used twice."""
        found: dict[str, ConfiguredModel] = {}
        for model in models:
            for name in (model.name, *model.aliases):
                if found.setdefault(name, model) is not model:
                    raise InvalidSettings(
                        "aliases", name, f"a name that no other model has, and {found[name].name} has it"
                    )
        self._models = found

    def specs(self) -> list[ModelSpec]:
        """Return the models as they are now; raises what `Catalog.find` raises."""
        return [model.spec(self._others) for name, model in self._models.items() if name == model.name]

    def find(self, name: str) -> ModelSpec | None:
        """Return the model of that name or alias, or None."""
        model = self._models.get(name)
        return None if model is None else model.spec(self._others)

    def names(self) -> list[str]:
        """Return the names of the models."""
        return [name for name, model in self._models.items() if name == model.name]
