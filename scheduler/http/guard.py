"""Who may call the server: by the name it is called by, the web page that calls, the key, and how many call at once.

A browser sends requests for any web page, and the address of a local server is no secret. So a request that names
another host, as after DNS rebinding, and one that a page of another origin sends, whatever its content type, are
refused before anything is looked at. Clients that are no browsers send neither header.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scheduler.http.errors import ErrorAnswer
from scheduler.http.exchange import Exchange
from scheduler.http.protocol import Protocol
from scheduler.http.service import refuse
from scheduler.http.settings import ANY, ServerSettings

_PREFLIGHT = {
    "access-control-allow-methods": "GET, HEAD, POST, DELETE, OPTIONS",
    "access-control-allow-headers": "*, authorization",  # the star does not stand for authorization
    "access-control-max-age": "600",
}
_RETRY_S = 1.0


class Guard:
    """An ASGI application in front of another, which only requests that may come reach."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        protocol_of: Callable[[str], Protocol],
        is_open: Callable[[str, str], bool],
    ) -> None:
        self._app = app
        self._settings = settings
        self._protocol_of = protocol_of  # by a path
        self._is_open = is_open  # whether a method and path need no key
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange, path = Exchange(scope, receive, send), path_of(scope)
        origin = exchange.headers.get("origin", "").lower()
        allowed = bool(origin) and self._is_allowed(origin)
        if allowed:
            send = _with_origin(send, exchange.headers["origin"])
            exchange = Exchange(scope, receive, send)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in exchange.headers:
                await exchange.respond(204, b"", _PREFLIGHT)
                return
        refusal = self._refusal(scope["method"], path, exchange.headers, allowed)
        if refusal is not None:
            await refuse(exchange, self._protocol_of(path), refusal)
            return
        self._under_way += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way -= 1

    def _refusal(self, method: str, path: str, headers: Headers, allowed: bool) -> ErrorAnswer | None:
        if not self._is_known(headers.get("host", "")):
            host = printable_host(headers.get("host", ""))
            return ErrorAnswer(403, "host_not_allowed", f"the host {host!r} is not allowed: name it in allow_hosts")
        if not allowed and _is_foreign(method, headers):
            return ErrorAnswer(
                403, "origin_not_allowed", "a web page of another origin calls: name the origin in allow_origins"
            )
        key = self._settings.api_key
        if key is not None and not self._is_open(method, path) and not has_key(headers, key):
            return ErrorAnswer(401, "invalid_api_key", "a valid API key is needed, as a bearer token or as x-api-key")
        if self._under_way >= self._settings.max_connections:
            return ErrorAnswer(503, "too_many_requests", "too many requests are under way", {}, _RETRY_S, True)
        return None

    def _is_known(self, host: str) -> bool:
        name = _name_of(host)
        known = self._settings.allow_hosts
        return ANY in known or name in known or name == "localhost" or _is_address(name)

    def _is_allowed(self, origin: str) -> bool:
        return any(_matches(origin, one) for one in self._settings.allow_origins)


def path_of(scope: Scope) -> str:
    """Return the path of a request below the place where the application is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root) else path


def printable_host(host: str) -> str:
    """Return the name of a host as far as it can be shown."""
    return host[:100] if host.isprintable() else ""


def _matches(origin: str, allowed: str) -> bool:
    """Tell whether an origin is one that is allowed, in which a star stands for any characters, as for Ollama."""
    parts = allowed.split(ANY)
    return re.fullmatch(".*".join(map(re.escape, parts)), origin) is not None


def _name_of(host: str) -> str:
    """Return the name or address in a host, in lower case; empty where it has none."""
    if set(host) & set("/?#@\\ "):
        return ""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # half an IPv6 address
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_foreign(method: str, headers: Headers) -> bool:
    """Tell whether a page of another origin sends a request; a click on a link to a page here is not meant."""
    site = headers.get("sec-fetch-site", "none")
    if (origin := headers.get("origin")) is not None:
        return origin.lower().partition("://")[2] != headers.get("host", "").lower()
    link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
    return site not in ("none", "same-origin") and not link


def has_key(headers: Headers, key: str) -> bool:
    """Tell whether a request has a key, as a bearer token or as x-api-key."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = (token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", ""))
    same = [secrets.compare_digest(each.encode(errors="replace"), key.encode()) for each in given]
    return any(same)


def _with_origin(send: Send, origin: str) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            headers["access-control-allow-origin"] = origin
            headers["access-control-expose-headers"] = "*"
            headers.add_vary_header("origin")
        await send(message)

    return sent
