"""Keeps the HTTP library's log of this library's own requests out of the program's log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_LOGGERS = ("httpx2", *(f"httpcore2.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))
_quiet: ContextVar[bool] = ContextVar("loadmaster_quiet", default=False)  # a request of this library's is under way


class _WithoutOurs(logging.Filter):
    """Drops the records of this library's requests; those of the program's own requests pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not _quiet.get()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the HTTP library logs in this block, by this thread or task, out of the log."""
    before = _quiet.get()
    _quiet.set(True)
    try:
        yield
    finally:
        _quiet.set(before)


def quiet_next(chunks: Iterator[bytes]) -> bytes | None:
    """Return the next chunk of an answer, None at its end; what is logged meanwhile is kept out of the log."""
    with quiet():
        return next(chunks, None)


_filter = _WithoutOurs()
for _name in _LOGGERS:  # a filter of a logger does not hold for the loggers below it
    logging.getLogger(_name).addFilter(_filter)
