"""An object as a program may have it, for a process of its own: it imports next to nothing."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any


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

    def stopped(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        signal.pause()

    def meet(self) -> int:
        return self.barrier.wait(20.0)


def no_thing() -> Thing:
    raise ValueError("no such file")


def noted(path: Path, thing: Thing) -> None:
    path.write_text(thing.name)
