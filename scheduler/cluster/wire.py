"""Digests as lines of JSON, from a node to those that choose among nodes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from fsm.cluster.digest import NodeDigest
from scheduler.config.json_values import json_value
from scheduler.http.exchange import as_json


def line_of(digest: NodeDigest) -> bytes:
    """Return a digest as a line, which is the same where nothing has changed."""
    return as_json(json_value(replace(digest, at=0.0), defaults=False)) + b"\n"


def digest_of_line(line: bytes) -> NodeDigest:
    """Return the digest in a line; raises `ValueError`."""
    try:
        digest: NodeDigest = _value(NodeDigest, json.loads(line))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"it is no digest: {error}") from None
    return digest


def _value(kind: Any, told: Any) -> Any:
    """Return a value of a type from what `json_value` has made of it."""
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: _value(hints[name], each) for name, each in told.items()})
    arguments = get_args(kind)
    match get_origin(kind):
        case origin if origin is tuple:
            if arguments[1:] == (...,):
                return tuple([_value(arguments[0], each) for each in told])
            return tuple([_value(one, each) for one, each in zip(arguments, told, strict=True)])
        case origin if isinstance(origin, type) and issubclass(origin, Mapping):
            return {key: _value(arguments[1], each) for key, each in told.items()}
        case origin if origin in (UnionType, Union):
            return None if told is None else _value(next(one for one in arguments if one is not NoneType), told)
        case _:
            return told


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
