"""Examples of reasons: every member of a union, made from the types of its fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from enum import Enum
from itertools import product
from typing import Any, get_args, get_type_hints

from fsm.domain.devices import HOST, DeviceId
from fsm.machine.request import ModelId, RequestId

MODEL, OTHER = ModelId("/models/a.gguf"), ModelId("python:b")
GPU = DeviceId("gpu0")
VALUES: dict[object, tuple[object, ...]] = {
    bool: (False, True),
    int: (1, 3),
    int | None: (None, -9),
    float: (0.25, 90.0),
    str: ("", "last words\nof a process"),
    ModelId: (MODEL, ModelId("")),
    RequestId: (RequestId(7),),
    DeviceId: (GPU,),
    tuple[ModelId, ...]: ((MODEL,), (MODEL, OTHER)),
    tuple[DeviceId, ...]: ((GPU,), (HOST, GPU)),
    tuple[tuple[DeviceId, int, int, int], ...]: (((HOST, 2**30, 2**31, 3), (GPU, 4, 5, 6)),),
}


def every(union: Any) -> Iterator[Any]:
    """Yield every member of the enums of a union, and every dataclass of it with each choice of values."""
    for kind in get_args(union) or (union,):
        if is_dataclass(kind):
            hints = get_type_hints(kind).values()
            yield from (kind(*values) for values in product(*map(_values, hints)))
        else:
            yield from kind


def _values(hint: Any) -> tuple[object, ...]:
    return tuple(hint) if isinstance(hint, type) and issubclass(hint, Enum) else VALUES[hint]
