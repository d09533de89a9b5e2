"""The future of a request, whose callbacks run on threads of their own."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")

log = logging.getLogger("loadmaster")


class RequestFuture(Future[Result]):
    """A future that is completed without a wait for its callbacks, so that they delay no other request.

    The callbacks that are added before the future is done run one after the other, in order, on a thread of the pool
    for callbacks. One that is added later runs at once, as with any future.
    """

    def __init__(self, call: Callable[[Callable[[], object]], None]) -> None:
        super().__init__()
        self._call = call  # runs a callback of the user's on a thread that may block
        self._added: deque[Callable[[Future[Result]], object]] = deque()
        super().add_done_callback(_call_added)  # bound to nothing: in a cycle, a lost lease would stay

    def add_own_callback(self, callback: Callable[[Future[Result]], object]) -> None:
        """Add a callback that does not block; it runs on the thread that completes or cancels the future."""
        super().add_done_callback(callback)

    def add_done_callback(self, fn: Callable[[Future[Result]], Any]) -> None:
        """Add a callback, which may block."""
        if self.done():
            super().add_done_callback(fn)
            return
        self._added.append(fn)
        if self.done():  # meanwhile
            self._call_added()

    def _call_added(self) -> None:
        if self._added:
            self._call(self._run_added)

    def _run_added(self) -> None:
        while self._added:
            try:
                callback = self._added.popleft()
            except IndexError:  # another thread has taken it
                return
            try:
                callback(self)
            except BaseException:  # sys.exit() in a callback ends the callback, and not the thread
                log.exception("a callback of a future failed")


def _call_added(done: Future[Any]) -> None:
    assert isinstance(done, RequestFuture)
    done._call_added()
