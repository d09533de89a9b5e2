"""Dataclasses in slots: records of the state, copied field by field, and the messages of every request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from operator import attrgetter
from typing import Protocol, Self, TypeVar, dataclass_transform, get_origin, get_type_hints

_CONTAINERS = (dict, list, set)

Kind = TypeVar("Kind")


@dataclass_transform(frozen_default=True)
def message(kind: type[Kind]) -> type[Kind]:
    """Make a class a dataclass in slots that is frozen for the type checker alone, and compared and hashed as others.

    For the messages of warm requests: a dataclass that is frozen at run time takes up to five times as long to make.
    """
    return dataclass(slots=True, unsafe_hash=True)(kind)


class _Copied(Protocol):
    def copy(self) -> _Copied: ...


class Record:
    """A dataclass whose copy has containers of its own; the items in them, and all other values, are shared."""

    __slots__: tuple[str, ...] = ()

    def copy(self) -> Self:
        """Return a copy, made from the fields as they are."""
        values_of, containers = _fields_of(type(self))  # type: ignore[arg-type]  # a class is hashable
        values = [*values_of(self)]
        for place in containers:
            values[place] = values[place].copy()
        return type(self)(*values)  # a dataclass takes its fields in their order


@cache
def _fields_of(kind: type) -> tuple[Callable[[Record], tuple[_Copied, ...]], tuple[int, ...]]:
    """Return a function that reads every field of a class, and the indexes of the fields whose types are containers."""
    names = [field.name for field in fields(kind)]
    kinds = get_type_hints(kind)
    containers = [place for place, name in enumerate(names) if get_origin(kinds[name]) in _CONTAINERS]
    return attrgetter(*names), tuple(containers)
