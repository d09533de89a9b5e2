"""Engines of other packages, by name: registered by the program, or found as entry points."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any

from scheduler.errors.exceptions import EngineMissing, EngineUnusable, InvalidSettings

if TYPE_CHECKING:
    from scheduler.config.settings import Settings
    from scheduler.engines.interface import Engine

GROUP = "loadmaster.engines"  # of entry points

EngineFactory = Callable[["Settings"], "Engine"]

_registered: dict[str, EngineFactory] = {}


def register(name: str, factory: EngineFactory) -> None:
    """Have models whose `engine` is `name` run by what `factory` returns, once for each scheduler that needs it.

    It wins over an entry point of that name. A scheduler that has made its engine keeps that one.
    """
    if not isinstance(name, str) or not name:
        raise InvalidSettings("name", name, "a text that is not empty")
    if not callable(factory):
        raise InvalidSettings("factory", factory, "callable with the settings of a scheduler, and return an engine")
    _registered[name] = factory


def factory_of(name: str) -> EngineFactory:
    """Return what makes an engine; raises `EngineMissing` where there is none of that name."""
    if name in _registered:
        return _registered[name]
    for found in metadata.entry_points(group=GROUP, name=name):
        try:
            factory: Any = found.load()
        except Exception as error:  # whatever the package raises as it is imported
            raise EngineUnusable(name, f"{found.value} cannot be imported: {type(error).__name__}: {error}") from error
        if not callable(factory):
            raise EngineUnusable(name, f"{found.value} is no factory of engines")
        return factory  # type: ignore[no-any-return]  # what it returns is used as an engine
    raise EngineMissing(name, f"install the package that has it; no entry point of {GROUP} has this name")
