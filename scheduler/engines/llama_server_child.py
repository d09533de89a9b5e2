"""What a process does before it becomes the user's own `llama-server`, or asks one what it can do.

Like `llama_child` it is run by its path, and its parent writes one JSON object on a line of standard input (`Order`
defines it) and keeps that stream open. The process prepares itself as a runner's does: it ends with its parent, leaves
no core file, and cannot connect to anything. Then it executes the server in its own place, so that its id, its memory
and its exit are the server's own. The key comes to the server through a pipe that is read once: no argument, variable
or file has it.

On standard output it writes lines of the runner's protocol until then: "importing", or "failed" with a reason. What the
server writes goes to standard error, all of it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from contextlib import suppress
from typing import Never, TypedDict

sys.path.append(os.path.dirname(os.path.abspath(__file__)))

from llama_child import (
    LOADING_NICE,
    PARENT_CHECK_S,
    connect_to_nothing,
    read_line,
    settle,
    share,
    take_over_output,
    tell,
)


class Order(TypedDict):
    """What the parent orders."""

    parent: int  # the process whose end ends this one
    arguments: list[str]  # the server's path first
    key: str  # of every request to the server; empty: it serves nothing
    holds_back: bool  # as in `Request`
    guarded: bool  # whether it may connect to nothing: not while a driver may need a helper


def pipe_of(key: str) -> str:
    """Return the path under which the process to come reads the key, once."""
    reads, writes = os.pipe()
    os.write(writes, key.encode() + b"\n")  # a pipe has room for it
    os.close(writes)
    os.set_inheritable(reads, True)
    return f"/dev/fd/{reads}"


def end_with(parent: int) -> None:
    """Have a process of its own end this one with its parent, or with standard input, where the kernel does not.

    It belongs to the group of this process, and so it ends with it.
    """
    if sys.platform == "linux" or not hasattr(os, "fork"):
        return
    server = os.getpid()
    if os.fork():
        return
    with suppress(OSError):
        while not (select.select([0], [], [], PARENT_CHECK_S)[0] and not os.read(0, 1 << 16)):
            os.kill(parent, 0)
    os.kill(server, signal.SIGKILL)
    os._exit(0)


def execute(protocol: int, order: Order) -> Never:
    """Become the server; where that cannot be, tell why."""
    if order["holds_back"]:
        share(LOADING_NICE)
    tell(protocol, "importing")
    arguments = order["arguments"]
    try:
        end_with(order["parent"])
        if order["key"]:
            arguments = [*arguments, "--api-key-file", pipe_of(order["key"])]
        if order["guarded"]:
            connect_to_nothing()
        os.execv(arguments[0], arguments)  # the pipe of the protocol is closed by it
    except OSError as error:
        tell(protocol, "failed", reason=f"it could not be run: {error.strerror or error}")
    os._exit(1)


def main() -> None:
    """Run as the program of a process that becomes a server."""
    protocol = take_over_output()
    settle()
    line = read_line()
    order: Order | None = json.loads(line) if line else None
    if order is not None and order["parent"] == os.getppid():
        execute(protocol, order)


if __name__ == "__main__":
    main()
