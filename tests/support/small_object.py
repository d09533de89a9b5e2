"""An object as a program may have it, for a process of its own: it imports next to nothing."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any


class OddError(Exception):
    """An exception that does not tell its words."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class Thing:
    """An object as a program may have it."""

    def __init__(self, name: str = "thing") -> None:
        self.name = name
        self.held = b""
        self.barrier = threading.Barrier(8)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return [self.name, *arguments, named]

    def echo(self, value: Any) -> Any:
        return value

    def double(self, array: Any) -> Any:
        return 2 * array

    def raises(self) -> None:
        raise KeyError("no such part")

    def raises_odd(self) -> None:
        raise OddError

    def nested(self, levels: int) -> Any:
        return (self.nested(levels - 1),) if levels else ()

    def reads(self) -> str:
        return input()

    def writes_nonsense(self) -> None:
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                    os.write(int(name), b"\xff" * 8)
        signal.pause()

    def empty_text(self) -> Any:
        import numpy

        return [numpy.str_(""), numpy.zeros(2, "U1")[:0]]

    def masked(self) -> Any:
        import numpy.ma

        return numpy.ma.masked_array([1, 2], [0, 1])

    def itself(self) -> Thing:
        return self

    def where(self) -> tuple[int, str]:
        return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]

    def take(self, mebibytes: int) -> None:
        self.held = os.urandom(1 << 20) * mebibytes

    def hang(self) -> None:
        print("hangs", flush=True)
        signal.pause()

    def crash(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)
        threading.Event().wait()  # another thread may be the one that takes the signal

    def stopped(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        signal.pause()

    def meet(self) -> int:
        return self.barrier.wait(20.0)


def no_thing() -> Thing:
    raise ValueError("no such file")


def no_long_thing() -> Thing:
    raise ValueError("\N{SNOWMAN}" * 20_000)


def noted(path: Path, thing: Thing) -> None:
    path.write_text(thing.name)
