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
MOST_LEVELS = 200  # of lists in lists: Python's own limit is near 330
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
    """Return the parts of a call; raises ValueError for one that is too large."""
    buffers: list[pickle.PickleBuffer] = []
    pickle_of = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return _sendable([pickle_of, *(buffer.raw() for buffer in buffers)])


def unpickled(parts: Sequence[bytearray]) -> Any:
    """Return what a parent has pickled."""
    return pickle.loads(parts[0], buffers=parts[1:])


def encoded(answer: dict[str, object]) -> list[Part]:
    """Return the parts of an answer.

    Raises TypeError for a value of a kind that may not leave the process, and ValueError for one that is too large.
    """
    buffers: list[Part] = []
    head = {name: _plain(value, buffers, 0) for name, value in answer.items()}
    return _sendable([json.dumps(head).encode(), *buffers])


def decoded(parts: Sequence[bytearray]) -> dict[str, Any]:
    """Return an answer; raises ValueError, and other exceptions of Python's own, for what is none."""
    head = json.loads(bytes(parts[0]))
    if not isinstance(head, dict):
        raise ValueError("an answer is no object")
    return {name: _value(value, parts[1:]) for name, value in head.items()}


def _sendable(parts: list[Part]) -> list[Part]:
    """Return the parts of a frame; raises ValueError where the other end would refuse them."""
    if len(parts) > MOST_PARTS or any(memoryview(part).nbytes > MOST_BYTES for part in parts):
        raise ValueError(
            f"too much for one call: at most {MOST_PARTS - 1} arrays and texts of bytes are sent at once, "
            f"each of at most {MOST_BYTES >> 30} GiB"
        )
    return parts


def _plain(value: Any, buffers: list[Part], level: int) -> object:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if level == MOST_LEVELS:
        raise ValueError(f"lists, tuples and dicts in more than {MOST_LEVELS} of their kind cannot be sent")
    if kind is list:
        return [_plain(each, buffers, level + 1) for each in value]
    if kind is tuple:
        return {"tuple": [_plain(each, buffers, level + 1) for each in value]}
    if kind is dict:
        pairs = [[_plain(name, buffers, level + 1), _plain(each, buffers, level + 1)] for name, each in value.items()]
        return {"dict": pairs}
    if kind in (bytes, bytearray):
        buffers.append(value)
        return {"bytes": len(buffers) - 1}
    return _of_numpy(value, buffers)


def _of_numpy(value: Any, buffers: list[Part]) -> object:
    """Return what is sent for a numpy array or number; an array of a class of its own may hold more than its bytes."""
    kind, numpy = type(value), sys.modules.get("numpy")
    name = f"{kind.__module__}.{kind.__qualname__}"
    if numpy is not None and (kind in (numpy.ndarray, numpy.memmap) or isinstance(value, numpy.generic)):
        name = f"{name} of {value.dtype}"
        if value.dtype.kind in KINDS:
            found = value if value.dtype.itemsize else numpy.zeros(value.shape, f"{value.dtype.kind}1")  # empty texts
            buffers.append(found.tobytes())
            array = [found.dtype.str, list(found.shape), len(buffers) - 1]
            return {"number" if isinstance(value, numpy.generic) else "array": array}
    raise TypeError(
        f"a {name} cannot leave the object's process: return numbers, texts, bytes, "
        "numpy arrays of numbers, and lists, tuples and dicts of these"
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
