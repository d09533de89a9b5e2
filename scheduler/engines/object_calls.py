"""The calls for an object in a process of its own, as a program makes them."""

from __future__ import annotations

import itertools
import select
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from scheduler.concurrency.latch import Latch
from scheduler.engines.object_protocol import Part, decoded, pickled, receive, send
from scheduler.errors.exceptions import ObjectError


class _Answer:
    """A call under way."""

    def __init__(self) -> None:
        self.done = Latch()
        self.told: Mapping[str, Any] = {}
        self.lost = ""  # why there is no answer


class ObjectCalls:
    """The calls for one object in its process; any thread may call, several at once."""

    def __init__(self, model: str, connection: socket.socket) -> None:
        self._model = model
        self._connection = connection
        self._numbers = itertools.count()
        self._sending = threading.Lock()
        self._lock = threading.Lock()  # guards `_answers` and `_over`
        self._answers: dict[int, _Answer] = {}
        self._over = ""  # why there are no more answers

    def call(self, name: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Return what a method of the object returns, or the object itself as it is called, where the name is empty.

        Raises `ObjectError` for what it raises, ConnectionError where its process is gone, and what `pickle` raises for
        an argument that cannot be sent.
        """
        told = self._asked(pickled((name, tuple(arguments), dict(named))))
        if (error := told.get("error")) is not None:
            raise ObjectError(self._model, str(error["kind"]), str(error["message"]), str(error["trace"]))
        return told.get("value")

    def answers(self, timeout_s: float | None) -> bool:
        """Return whether the process answers; raises TimeoutError where it does not in time."""
        ready = select.poll()
        ready.register(self._connection, select.POLLOUT)
        if not ready.poll(None if timeout_s is None else 1000 * timeout_s):
            raise TimeoutError
        self._asked([], timeout_s)
        return True

    def read(self) -> None:
        """Take in answers until the connection ends; raises what `receive` and `decoded` raise."""
        while True:
            told = decoded(receive(self._connection))
            with self._lock:
                answer = self._answers.pop(told["number"], None)
            if answer is not None:
                answer.told = told
                answer.done.set()

    def end(self, reason: str) -> None:
        """Let every call fail: the process is gone."""
        with self._lock:
            self._over = reason
            left, self._answers = list(self._answers.values()), {}
        for answer in left:
            answer.lost = reason
            answer.done.set()
        self.cut()  # first: a thread may be sending
        with self._sending:
            self._connection.close()

    def cut(self) -> None:
        """End the connection, whatever is sent on it at this moment."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _asked(self, call: Sequence[Part], timeout_s: float | None = None) -> Mapping[str, Any]:
        answer, number = _Answer(), next(self._numbers)
        with self._lock:
            if self._over:
                raise ConnectionError(self._over)
            self._answers[number] = answer
        try:
            if not self._sending.acquire(timeout=-1 if timeout_s is None else timeout_s):
                raise TimeoutError
            try:
                send(self._connection, [str(number).encode(), *call])
            except OSError:  # it is ending: why is told at its end
                pass
            except BaseException:  # half a call was sent
                self.cut()
                raise
            finally:
                self._sending.release()
            if not answer.done.wait(timeout_s):
                raise TimeoutError
        finally:
            with self._lock:
                self._answers.pop(number, None)
        if answer.lost:
            raise ConnectionError(answer.lost)
        return answer.told


class ObjectProxy:
    """Stands for an object in another process: a lease's `value`. Its methods are called there, and so is the object.

    Arguments are pickled. Answers are numbers, texts, bytes, numpy arrays, and lists, tuples and dicts of these; what
    the object raises comes as an `ObjectError`.
    """

    def __init__(self, call: Callable[[str, Sequence[Any], Mapping[str, Any]], Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._call("", arguments, named)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(f"{name} of an object in a process of its own cannot be used")
        return lambda *arguments, **named: self._call(name, arguments, named)
