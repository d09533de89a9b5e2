"""The log of the server: one line for each request, and every line as text or as JSON. Prompts are in none of them."""

from __future__ import annotations

import json
import logging
import queue
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from logging.handlers import QueueHandler, QueueListener

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scheduler.errors.formatting import printable
from scheduler.http.exchange import CLIENT_LEFT
from scheduler.http.guard import path_of

log = logging.getLogger("loadmaster.access")

_LONGEST_PATH = 200  # characters
_MOST_LINES = 10_000  # that wait to be written; more are dropped
_NOTED = ("model", "node", "wait_s", "load_s", "answer_s", "tokens_in", "tokens_out", "error", "left")


class AccessLog:
    """An ASGI application in front of another, which writes a line for each request when it has been answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes: dict[str, object] = scope.setdefault("loadmaster", {})
        method, path, began, status = scope["method"], path_of(scope), time.monotonic(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            wait_s = notes.get("wait_s", 0.0)
            answer_s = time.monotonic() - began - (wait_s if isinstance(wait_s, float) else 0.0)
            notes.setdefault("answer_s", answer_s)
            _write(method, path, status or (CLIENT_LEFT if notes.get("left") else 500), notes)


def _write(method: str, path: str, status: int, notes: Mapping[str, object]) -> None:
    access: dict[str, object] = {"method": method, "path": path[:_LONGEST_PATH], "status": status}
    for name in _NOTED:
        if (value := notes.get(name)) is not None:
            access[name] = round(value, 4) if isinstance(value, float) else value
    rest = (f"{name}={_plain(value)}" for name, value in access.items() if name in _NOTED)
    words = " ".join((method, printable(path[:_LONGEST_PATH]), str(status), *rest))
    log.info("%s", words, extra={"access": access})


def _plain(value: object) -> str:
    text = printable(str(value).lower() if isinstance(value, bool) else str(value))
    return json.dumps(text, ensure_ascii=False) if set(text) & set(' "=') else text


class TextLines(logging.Formatter):
    """Lines for people: the time in UTC, the level where it is no mere information, and the words."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a line, or several for an exception."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        return f"{_time_of(record)} {level}{super().format(record)}"


class JsonLines(logging.Formatter):
    """Lines for programs: an object with time, level, logger and message, or with the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line of JSON."""
        told: dict[str, object] = {
            "time": _time_of(record), "level": record.levelname.lower(), "logger": record.name,
        }  # fmt: skip
        access = getattr(record, "access", None)
        told.update(access if access is not None else {"message": super().format(record)})
        return json.dumps(told)


def _time_of(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"


class _Queue(QueueHandler):
    """Hands lines to a thread that writes them: a slow reader of the log delays no request."""

    def enqueue(self, record: logging.LogRecord) -> None:
        """Take a line, or drop it where too many wait."""
        with suppress(queue.Full):
            self.queue.put_nowait(record)


class _Listener(QueueListener):
    """Writes the lines of a queue, the last ones too where the queue is full."""

    def enqueue_sentinel(self) -> None:
        """Have the thread end behind the lines that wait."""
        self.queue.put(None)  # type: ignore[attr-defined]  # it is a queue.Queue


@contextmanager
def logging_to_stderr(log_format: str) -> Iterator[None]:
    """Write what this program logs to standard error, as `log_format` says: "text" or "json"."""
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(JsonLines() if log_format == "json" else TextLines())
    lines = _Queue(queue.Queue(_MOST_LINES))
    listener = _Listener(lines.queue, stream)
    root, ours = logging.getLogger(), logging.getLogger("loadmaster")
    level = ours.level
    root.addHandler(lines)
    ours.setLevel(logging.INFO)
    listener.start()
    try:
        yield
    finally:
        root.removeHandler(lines)
        ours.setLevel(level)
        listener.stop()
        lines.close()
