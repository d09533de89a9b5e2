"""The process of one Python object: it loads the object, answers the calls of its parent, and unloads it.

It is run by its path, with the number of the socket that its calls come by. Its parent sends two frames first
(`object_protocol`): what prepares the interpreter, as `multiprocessing` does it, and `load` and `unload`. On standard
output it writes lines of the runner's protocol: "loading", then "loaded", or "failed" with `kind`, `message`, `trace`
and `of_memory`. What the object prints goes to standard error.

Standard input stays open: its end is the order to leave, and a byte the order to unload the object first.
"""

from __future__ import annotations

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
TOLD_CHARACTERS = 12_000  # of an exception: a line of the protocol has room for it


def told_of(error: BaseException) -> dict[str, object]:
    """Return what is told of an exception that the object raised: nothing but texts."""
    trace = "".join(traceback.format_exception(error))
    message = str(error) or repr(error)
    return {"kind": type(error).__name__, "message": message[:TOLD_CHARACTERS], "trace": trace[-TOLD_CHARACTERS:]}


class Calls:
    """Answers the calls for one object, several at once."""

    def __init__(self, connection: socket.socket, value: Any) -> None:
        self._connection = connection
        self._value = value
        self._sending = threading.Lock()
        self._pool = ThreadPoolExecutor(MOST_CALLS)

    def run(self) -> bool:
        """Answer calls until the parent wants no more; return whether the object is to be unloaded."""
        watched = select.poll()
        for each in (self._connection.fileno(), 0):
            watched.register(each, select.POLLIN)
        while True:
            if 0 in dict(watched.poll()):
                return bool(os.read(0, 1))
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


def serve(protocol: int, connection: socket.socket) -> Never:
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
    calls = Calls(connection, value)
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


def main() -> None:
    """Run as the process of an object."""
    protocol = take_over_output()
    settle()
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    preparation = unpickled(receive(connection))
    if preparation.pop("parent") == os.getppid():
        tell(protocol, "loading")
        vars(process.current_process())["_inheriting"] = True  # else the program's file might start objects in its turn
        spawn.prepare(preparation)
        del vars(process.current_process())["_inheriting"]
        serve(protocol, connection)


if __name__ == "__main__":
    main()
