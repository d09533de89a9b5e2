"""What the commands `ps` and `top` ask a server for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any, Never
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from scheduler.errors.exceptions import InvalidSettings, SchedulerError

KEY_VARIABLE = "LOADMASTER_API_KEY"
_TIMEOUT_S = 10.0  # without a word: a server sends its status each second
_LONGEST_LINE = 16 * 1024 * 1024  # bytes
_BROKEN = (OSError, HTTPException, ValueError)  # ValueError: an answer that is no JSON


@dataclass(eq=False)
class ServerError(SchedulerError):
    """A server cannot be asked."""

    url: str
    reason: str

    def _words(self) -> str:
        return f"{self.url}: {self.reason}"


class _NoRedirect(HTTPRedirectHandler):
    """Follows no redirect, as the key would go along."""

    def redirect_request(self, *_: object) -> None:
        """Take the redirect for an error."""


_opener = build_opener(ProxyHandler({}), _NoRedirect)


class ServerClient:
    """A server at an address, asked with the key from the environment. Raises `InvalidSettings` for what is none."""

    def __init__(self, url: str) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        try:
            parts = urlsplit(self.url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address:
            raise InvalidSettings("URL", url, "the address of a server, as http://127.0.0.1:11434 is")
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise InvalidSettings(KEY_VARIABLE, "…", "a text of ASCII characters")  # it is a secret, and not shown

    def status(self) -> dict[str, Any]:
        """Return the status; raises `ServerError`."""
        with closing(self._open("/status")) as answer:
            try:
                return _checked(json.loads(answer.read()))
            except _BROKEN as error:
                self._fail(error)

    def events(self) -> Iterator[tuple[str, Any]]:
        """Yield what happens as kinds and values, until the server closes; raises `ServerError`."""
        with closing(self._open("/events")) as answer:
            kind = ""
            try:
                while line := answer.readline(_LONGEST_LINE):
                    name, _, text = line.decode().rstrip("\r\n").partition(": ")
                    if name == "event":
                        kind = text
                    elif name == "data":
                        yield kind, json.loads(text)
            except _BROKEN as error:
                self._fail(error)

    def _open(self, path: str) -> HTTPResponse:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            return _opener.open(Request(self.url + path, headers=headers), timeout=_TIMEOUT_S)  # type: ignore[no-any-return]
        except HTTPError as error:
            with error:
                raise ServerError(self.url, _refused(error.code)) from None
        except _BROKEN as error:
            self._fail(error)

    def _fail(self, error: Exception) -> Never:
        cause = error.reason if isinstance(error, URLError) else error
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        raise ServerError(self.url, f"no server of loadmaster answers ({reason})") from None


def _refused(status: int) -> str:
    match status:
        case 401:
            return f"the server asks for a key: set {KEY_VARIABLE}"
        case 404:
            return "there is no server of loadmaster (404)"
        case _:
            return f"the server refuses to tell its status ({status})"


def _checked(status: Any) -> dict[str, Any]:
    if not isinstance(status, dict) or not {"runners", "queue", "devices", "problems"} <= status.keys():
        raise ValueError("what it tells is no status")
    return status
