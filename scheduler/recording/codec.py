"""The encoding of events, commands and the core's whole state as values that JSON can hold, and back, exactly.

One encoding serves all of them. It is derived from the classes, so that a new field or a new event needs no code here:

* A dataclass is an object: its class's name under "is", then its fields. A field with its default value is left out,
  and so is a field that its metadata mark as derived: the other fields are enough to restore them.
* The members of a union are told apart by these names; a value with none of the expected names is refused.
* Sets are lists in a fixed order, mappings are lists of pairs in their own order, enums are their values.
* An infinite time is "inf" or "-inf", since JSON has no number for it; "not a number" cannot be written.
* A runner or a request is written where it comes first in a state, and by its id under "again" everywhere else.

`schema` changes whenever a class does, so that a file of another version can be recognised.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Literal, NewType, Union, cast, get_args, get_origin, get_type_hints
from zlib import crc32

from fsm.core import CoreCheckpoint
from fsm.machine.request import Request
from fsm.machine.runner import Runner
from fsm.messages.commands import Command
from fsm.messages.events import Event

_PLAIN = frozenset({types.NoneType, bool, int, str})
SHARED = (Runner, Request)  # referred to from several places, and one object in all of them
_REQUIRED = ("required",)  # in place of a missing default; no field has such a value
_INFINITE = {"inf": math.inf, "-inf": -math.inf}


class Unreadable(ValueError):
    """The value that was read is not an encoding of what was expected."""


@dataclass(slots=True)
class _Seen:
    """The shared records of one document, by class and id."""

    known: dict[tuple[str, object], object] = field(default_factory=dict)


def encode(value: object) -> object:
    """Return an event, a command, a state or a part of one as JSON values; raises TypeError for any other value."""
    return _encode(value, _Seen())


def decode_event(value: object) -> Event:
    """Return the event that was encoded; raises `Unreadable`."""
    return cast(Event, _decoder(Event)(value, _Seen()))


def decode_command(value: object) -> Command:
    """Return the command that was encoded; raises `Unreadable`."""
    return cast(Command, _decoder(Command)(value, _Seen()))


def decode_state(value: object) -> CoreCheckpoint:
    """Return the state that was encoded, for `Core.restore`; raises `Unreadable`."""
    return cast(CoreCheckpoint, _decoder(CoreCheckpoint)(value, _Seen()))


@cache
def schema() -> str:
    """Return a short text that stands for every class, field, type and default that an encoding depends on."""
    found: dict[str, object] = {}
    for root in (Event, Command, CoreCheckpoint):
        for kind in reachable(root):
            if issubclass(kind, Enum):
                found[kind.__name__] = [member.value for member in kind]
            else:
                found[kind.__name__] = [(each.name, each.type, _default(each)) for each in _written(kind)]
    return f"{crc32(repr(sorted(found.items())).encode()):08x}"


def reachable(kind: object) -> Iterator[type]:
    """Yield each dataclass and each enum that a type may contain, once."""
    done: set[object] = set()
    ahead = [kind]
    while ahead:
        one = _plain(ahead.pop())
        if one in done:
            continue
        done.add(one)
        if isinstance(one, type) and is_dataclass(one):
            yield one
            hints = get_type_hints(one)
            ahead += [hints[each.name] for each in _written(one)]
        elif isinstance(one, type) and issubclass(one, Enum):
            yield one
        elif get_origin(one) is not Literal:
            ahead += [inner for inner in get_args(one) if inner is not Ellipsis]


def _written(kind: type) -> list[Field[object]]:
    return [each for each in fields(cast("type[CoreCheckpoint]", kind)) if "derived" not in each.metadata]


# -- encoding ---------------------------------------------------------------------------------------------------------


def _encode(value: object, seen: _Seen) -> object:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is float:
        return _encode_float(cast(float, value))
    if kind is tuple or kind is list:
        return [_encode(one, seen) for one in cast("list[object]", value)]
    if kind is dict:
        return [[_encode(key, seen), _encode(one, seen)] for key, one in cast("dict[object, object]", value).items()]
    if kind is set or kind is frozenset:
        return sorted((_encode(one, seen) for one in cast("set[object]", value)), key=repr)
    if isinstance(value, Enum):
        return cast(object, value.value)
    if not is_dataclass(kind):
        raise TypeError(f"{kind.__qualname__} cannot be recorded: {value!r:.100}")
    encoded: dict[str, object] = {"is": kind.__name__}
    if kind in SHARED:
        key = (kind.__name__, cast(Runner, value).id)
        if key in seen.known:
            return encoded | {"again": key[1]}
        seen.known[key] = value
    for name, default, of in _defaults(kind):
        one = getattr(value, name)
        if one is not default and (type(one) is not of or one != default):
            encoded[name] = one if type(one) in _PLAIN else _encode(one, seen)
    return encoded


def _encode_float(value: float) -> object:
    if math.isfinite(value):
        return value
    if math.isnan(value):
        raise TypeError("a time that is not a number cannot be recorded")
    return "inf" if value > 0 else "-inf"


@cache
def _defaults(kind: type) -> tuple[tuple[str, object, type], ...]:
    found = [(each.name, _default(each)) for each in _written(kind)]
    return tuple((name, default, type(default)) for name, default in found)


def _default(each: Field[object]) -> object:
    if each.default_factory is not MISSING:
        return each.default_factory()
    return _REQUIRED if each.default is MISSING else each.default


# -- decoding ---------------------------------------------------------------------------------------------------------

_Decode = Callable[[object, _Seen], object]


def _plain(kind: object) -> object:
    while isinstance(kind, NewType):
        kind = kind.__supertype__
    return kind


@cache
def _decoder(kind: object) -> _Decode:
    """Return a function that decodes values of a type, made at its first use since types may be nested."""
    kind = _plain(kind)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Union or origin is types.UnionType:
        return _union(inner)
    if origin is Literal:
        return lambda value, seen: _checked(value, value in inner if isinstance(value, str) else False, str(inner))
    if origin is tuple and inner[-1:] == (Ellipsis,):
        each = _decoder(inner[0])
        return lambda value, seen: tuple(each(one, seen) for one in _list(value))
    if origin is tuple:
        return _tuple(tuple(map(_decoder, inner)))
    if origin in (list, set, frozenset):
        make, each = cast("type[list[object]]", origin), _decoder(inner[0])
        return lambda value, seen: make(each(one, seen) for one in _list(value))
    if origin is dict or origin is Mapping:
        return _dict(_decoder(inner[0]), _decoder(inner[1]))
    if isinstance(kind, type):
        return _of_class(kind)
    raise TypeError(f"{kind} cannot be recorded")


def _of_class(kind: type) -> _Decode:
    if is_dataclass(kind):
        return lambda value, seen: _record(kind, value, seen)
    if issubclass(kind, Enum):
        members = {member.value: member for member in kind}
        return lambda value, seen: members[
            _checked(value, isinstance(value, str) and value in members, str([*members]))
        ]
    if kind is float:
        return lambda value, seen: _float(value)
    if kind in (int, str, bool, types.NoneType):
        return lambda value, seen: _checked(value, type(value) is kind, kind.__name__)
    raise TypeError(f"{kind} cannot be recorded")


def _checked(value: object, right: bool, expected: str) -> object:
    if not right:
        raise Unreadable(f"expected {expected}, not {value!r:.100}")
    return value


def _list(value: object) -> list[object]:
    return cast("list[object]", _checked(value, isinstance(value, list), "a list"))


def _float(value: object) -> float:
    if isinstance(value, str):
        return _INFINITE[cast(str, _checked(value, value in _INFINITE, "a number"))]
    right = type(value) is int or (type(value) is float and math.isfinite(value))
    return cast(float, _checked(value, right, "a number"))


def _tuple(parts: tuple[_Decode, ...]) -> _Decode:
    def decode(value: object, seen: _Seen) -> object:
        values = _list(value)
        _checked(value, len(values) == len(parts), f"{len(parts)} values")
        return tuple(part(one, seen) for part, one in zip(parts, values, strict=True))

    return decode


def _dict(key: _Decode, value_of: _Decode) -> _Decode:
    pair = _tuple((key, value_of))

    def decode(value: object, seen: _Seen) -> object:
        pairs = [cast("tuple[object, object]", pair(one, seen)) for one in _list(value)]
        found = dict(pairs)
        _checked(value, len(found) == len(pairs), "each key once")
        return found

    return decode


def _union(members: tuple[object, ...]) -> _Decode:
    plain = [_plain(member) for member in members]
    records = {one.__name__: _decoder(one) for one in plain if isinstance(one, type) and is_dataclass(one)}
    others = [one for one in plain if one is not types.NoneType and not is_dataclass(one)]
    if len(others) > 1 and not _PLAIN.issuperset(others):
        raise TypeError(f"{members} cannot be told apart")
    readers = [_decoder(one) for one in others]

    def decode(value: object, seen: _Seen) -> object:
        """Decode a value of any member of the union."""
        if value is None and types.NoneType in plain:
            return None
        if isinstance(value, dict) and isinstance(name := value.get("is"), str) and name in records:
            return records[name](value, seen)
        if isinstance(value, dict) or not others:
            raise Unreadable(f"expected one of {', '.join(records) or 'others'}, not {value!r:.100}")
        return readers[others.index(type(value)) if type(value) in others else 0](value, seen)

    return decode


def _record(kind: type, value: object, seen: _Seen) -> object:
    if not isinstance(value, dict) or value.get("is") != kind.__name__:
        raise Unreadable(f"expected {kind.__name__}, not {value!r:.100}")
    if kind in SHARED and "again" in value:
        known = seen.known.get((kind.__name__, _checked(value["again"], type(value["again"]) is int, "an id")))
        return _checked(known, known is not None and len(value) == 2, f"a {kind.__name__} that came before")
    decoders = _fields(kind)
    if unknown := value.keys() - decoders.keys() - {"is"}:
        raise Unreadable(f"{kind.__name__} has no {', '.join(sorted(map(repr, unknown)))}")
    try:
        made = kind(**{name: decoders[name](one, seen) for name, one in value.items() if name != "is"})
    except TypeError as error:
        raise Unreadable(f"{kind.__name__}: {error}") from error
    if kind in SHARED:
        key = (kind.__name__, cast(Runner, made).id)
        _checked(value, key not in seen.known, f"each {kind.__name__} once")
        seen.known[key] = made
    return cast(object, made)


@cache
def _fields(kind: type) -> dict[str, _Decode]:
    hints = get_type_hints(kind)
    return {each.name: _decoder(hints[each.name]) for each in _written(kind)}
