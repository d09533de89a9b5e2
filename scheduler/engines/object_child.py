"""The process of one Python object: it loads the object, answers the calls of its parent, and unloads it.

It is run by its path, with the number of the socket that its calls come by. Its parent sends two frames first
(`object_protocol`): what prepares the interpreter, as `multiprocessing` does it, and `load` and `unload`. On standard
output it writes lines of the runner's protocol: "loading", then "loaded", or "failed" with `kind`, `message`, `trace`
and `of_memory`. What the object prints goes to standard error.

Standard input stays open: its end is the order to leave, and a byte the order to unload the object first. What the
object reads there, and the programs that it starts, is nothing.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import process, spawn
from typing import Any, Never

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # it is there already where this is run by its path

from llama_child import settle, take_over_output, tell
from object_protocol import encoded, receive, send, unpickled

MOST_CALLS = 64  # at once
TOLD_BYTES = 24_000  # of each text about an exception: a line of the protocol has room for two


def told_of(error: BaseException) -> dict[str, object]:
    """Return what is told of an exception that the object raised: nothing but texts, whatever its class does."""
    try:
        message = "".join([str(error) or repr(error)])  # no class of a text of its own
    except BaseException:
        message = "(its words cannot be told: its __str__ raises)"
    try:
        trace = "".join(traceback.format_exception(error))
    except BaseException:
        trace = ""
    kept = -_length(trace[::-1])
    return {"kind": type(error).__name__[:200], "message": message[: _length(message)], "trace": trace[kept:]}


def _length(text: str) -> int:
    """Return how many characters of a text have room in what is told, where one may take twelve bytes."""
    kept = len(text)
    while (size := len(json.dumps(text[:kept]))) > TOLD_BYTES:
        kept = kept * TOLD_BYTES // size
    return kept


class Calls:
    """Answers the calls for one object, several at once; `orders` is the end of the pipe that the parent writes to."""

    def __init__(self, connection: socket.socket, orders: int, value: Any) -> None:
        self._connection = connection
        self._orders = orders
        self._value = value
        self._sending = threading.Lock()
        self._pool = ThreadPoolExecutor(MOST_CALLS)

    def run(self) -> bool:
        """Answer calls until the parent wants no more; return whether the object is to be unloaded."""
        watched = select.poll()
        for each in (self._connection.fileno(), self._orders):
            watched.register(each, select.POLLIN)
        while True:
            if self._orders in dict(watched.poll()):
                return bool(os.read(self._orders, 1))
            number, *call = receive(self._connection)
            if not call:  # whether this process answers
                self._send({"number": int(number)})
            else:
                self._pool.submit(self._answer, int(number), call)

    def _answer(self, number: int, call: list[bytearray]) -> None:
        try:
            name, arguments, named = unpickled(call)
            target = getattr(self._value, name) if name else self._value
            parts = encoded({"number": number, "value": target(*arguments, **named)})
        except BaseException as error:
            parts = encoded({"number": number, "error": told_of(error)})
        with self._sending:
            send(self._connection, parts)

    def _send(self, answer: dict[str, object]) -> None:
        with self._sending:
            send(self._connection, encoded(answer))


def serve(protocol: int, connection: socket.socket, orders: int) -> Never:
    """Load the object, answer calls, and end."""
    unload = None
    try:
        load, unload = unpickled(receive(connection))
        value = load()
    except BaseException as error:
        of_memory = isinstance(error, MemoryError) or any(
            kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__
        )
        tell(protocol, "failed", of_memory=of_memory, **told_of(error))
        os._exit(1)
    calls = Calls(connection, orders, value)
    tell(protocol, "loaded")
    status = 0
    try:
        if calls.run() and unload is not None:
            unload(value)
    except (EOFError, OSError):  # the parent is gone
        status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)


def take_over_input() -> int:
    """Return a descriptor of what was standard input; what reads standard input later finds its end."""
    orders, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return orders


def main() -> None:
    """Run as the process of an object."""
    protocol = take_over_output()
    settle()
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    orders = take_over_input()
    preparation = unpickled(receive(connection))
    if preparation.pop("parent") == os.getppid():
        tell(protocol, "loading")
        vars(process.current_process())["_inheriting"] = True  # else the program's file might start objects in its turn
        spawn.prepare(preparation)
        del vars(process.current_process())["_inheriting"]
        serve(protocol, connection, orders)


if __name__ == "__main__":
    main()
