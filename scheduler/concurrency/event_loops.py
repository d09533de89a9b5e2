"""A warning where a call blocks the event loop that runs on its own thread."""

from __future__ import annotations

import asyncio
import sys
import warnings

_NOT_THE_PROGRAM = ("scheduler", "contextlib")  # packages that are passed over in search of the program's own line


running_loop = asyncio._get_running_loop  # the loop that runs on this thread, or None; takes some 30 ns


def warn_if_loop_runs(call: str, instead: str) -> None:
    """Warn where an event loop runs on this thread: all its tasks stand still while a blocking call lasts.

    The warning names the line of the program's own code. None is given in a notebook: its kernel has a loop on the
    thread of the cells, and that loop waits for every cell anyway.
    """
    if running_loop() is not None and "ipykernel" not in sys.modules:
        text = f"{call} blocks the event loop of this thread, with every task on it: {instead}"
        warnings.warn(text, RuntimeWarning, stacklevel=_level_of_the_program())


def _level_of_the_program() -> int:
    """Return the `stacklevel` with which the caller of this function warns of the program's own line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_PROGRAM:
        level, frame = level + 1, frame.f_back
    return level
