"""What goes between a program and an object in a process of its own: calls one way, answers the other.

A frame is the number of its parts, their sizes, and then the parts. A call is a pickle, with buffers of arrays beside
it: the child trusts its parent. An answer is JSON, with the bytes of texts of bytes and of arrays beside it: nothing
that a child sends is unpickled or run.

Like `llama_child`, this module imports nothing of the project.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import sys
from collections.abc import Sequence
from socket import socket
from typing import Any

MOST_PARTS = 1 << 20
MOST_BYTES = 1 << 32  # of one part
KINDS = "biufcSUmM"  # of numpy's types: numbers, texts and times, and no objects
_TYPE = re.compile(rf"[<>|=]?[{KINDS}]\d{{1,9}}(\[\w{{1,9}}\])?")

Part = bytes | bytearray | memoryview


def send(connection: socket, parts: Sequence[Part]) -> None:
    """Send a frame; raises OSError where the other end is gone."""
    sizes = [memoryview(part).nbytes for part in parts]
    connection.sendall(struct.pack(f"!I{len(parts)}Q", len(parts), *sizes))
    for part in parts:
        connection.sendall(part)


def receive(connection: socket) -> list[bytearray]:
    """Receive a frame; raises EOFError at the end, and ValueError for what is no frame."""
    (count,) = struct.unpack("!I", _exactly(connection, 4))
    if count > MOST_PARTS:
        raise ValueError("too many parts")
    sizes = struct.unpack(f"!{count}Q", _exactly(connection, 8 * count))
    if any(size > MOST_BYTES for size in sizes):
        raise ValueError("too large a part")
    return [_exactly(connection, size) for size in sizes]


def _exactly(connection: socket, size: int) -> bytearray:
    received = bytearray(size)
    left = memoryview(received)
    while left.nbytes:
        if not (count := connection.recv_into(left)):
            raise EOFError
        left = left[count:]
    return received


def pickled(value: object) -> list[Part]:
    """Return the parts of a call."""
    buffers: list[pickle.PickleBuffer] = []
    pickle_of = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return [pickle_of, *(buffer.raw() for buffer in buffers)]


def unpickled(parts: Sequence[bytearray]) -> Any:
    """Return what a parent has pickled."""
    return pickle.loads(parts[0], buffers=parts[1:])


def encoded(answer: dict[str, object]) -> list[Part]:
    """Return the parts of an answer; raises TypeError for a value of a kind that may not leave the process."""
    buffers: list[Part] = []
    head = {name: _plain(value, buffers) for name, value in answer.items()}
    return [json.dumps(head).encode(), *buffers]


def decoded(parts: Sequence[bytearray]) -> dict[str, Any]:
    """Return an answer; raises ValueError, and other exceptions of Python's own, for what is none."""
    head = json.loads(bytes(parts[0]))
    if not isinstance(head, dict):
        raise ValueError("an answer is no object")
    return {name: _value(value, parts[1:]) for name, value in head.items()}


def _plain(value: Any, buffers: list[Part]) -> object:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [_plain(each, buffers) for each in value]
    if kind is tuple:
        return {"tuple": [_plain(each, buffers) for each in value]}
    if kind is dict:
        return {"dict": [[_plain(name, buffers), _plain(each, buffers)] for name, each in value.items()]}
    if kind in (bytes, bytearray):
        buffers.append(value)
        return {"bytes": len(buffers) - 1}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic) and value.dtype.kind in KINDS:
        buffers.append(value.tobytes())
        array = [value.dtype.str, list(value.shape), len(buffers) - 1]
        return {"array" if isinstance(value, numpy.ndarray) else "number": array}
    raise TypeError(
        f"a {kind.__module__}.{kind.__qualname__} cannot leave the object's process: return numbers, texts, bytes, "
        "numpy arrays, and lists, tuples and dicts of these"
    )


def _value(plain: Any, buffers: Sequence[bytearray]) -> Any:
    if isinstance(plain, list):
        return [_value(each, buffers) for each in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    match kind:
        case "tuple":
            return tuple(_value(each, buffers) for each in content)
        case "dict":
            return {_value(name, buffers): _value(each, buffers) for name, each in content}
        case "bytes":
            return bytes(buffers[content])
        case "array" | "number":
            type_name, shape, place = content
            if not _TYPE.fullmatch(type_name):
                raise ValueError("no type of numbers")
            import numpy  # the child has it, and its parent may not

            array = numpy.frombuffer(buffers[place], numpy.dtype(type_name)).reshape(shape)
            return array if kind == "array" else array[()]
        case _:
            raise ValueError("an answer is malformed")
