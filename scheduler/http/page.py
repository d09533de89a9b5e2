"""The page at `/` for people, and Ollama's word at the same place for programs.

The files of the page hold nothing of the scheduler's, so that no key is needed for them; what the page shows it asks
for with the key that is typed into it.
"""

from __future__ import annotations

from pathlib import Path

from scheduler.http.errors import ErrorAnswer
from scheduler.http.exchange import Exchange
from scheduler.http.openai import PROTOCOL
from scheduler.http.protocol_module import Body
from scheduler.http.runner_routes import RunnerRoute
from scheduler.http.service import Service, refuse

_FOLDER = Path(__file__).with_name("page")
_TYPES = {"page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
_POLICY = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
        "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
    )
)  # fmt: skip
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
    "vary": "accept",
}
_WORD = b"Ollama is running"  # by which Ollama's clients know that there is a server


def wants_page(exchange: Exchange) -> bool:
    """Tell whether a client asks for HTML, as a browser does."""
    accepted = exchange.headers.get("accept", "").lower().split(",")
    return any(part.split(";")[0].strip() == "text/html" for part in accepted)


async def respond_page(exchange: Exchange, name: str = "index.html") -> None:
    """Answer with a file of the page."""
    kind = _TYPES.get(name, "text/html")
    content = (_FOLDER / name).read_bytes()
    await exchange.respond(200, content, {**_HEADERS, "content-type": f"{kind}; charset=utf-8"})


async def _root(service: Service, exchange: Exchange) -> None:
    """Answer with the page, or with Ollama's word."""
    if service.settings.dashboard and wants_page(exchange):
        await respond_page(exchange)
    else:
        await exchange.respond(200, _WORD, {"content-type": "text/plain; charset=utf-8", "vary": "accept"})


async def _file(service: Service, exchange: Exchange) -> None:
    """Answer with a file that belongs to the page."""
    name = exchange.path_params["name"]
    if service.settings.dashboard and name in _TYPES:
        await respond_page(exchange, name)
    else:
        await refuse(exchange, PROTOCOL, ErrorAnswer(404, "not_found", "the page has no such file"))


def is_open(method: str, path: str) -> bool:
    """Tell whether a request is for the page itself, or for Ollama's word."""
    return method in ("GET", "HEAD") and (path in ("", "/") or path.removeprefix("/page/") in _TYPES)


ROUTES: tuple[RunnerRoute, ...] = ()
ENDPOINTS = (
    (("GET", "HEAD"), "/", _root),
    (("GET", "HEAD"), "/page/{name}", _file),
)
BODIES: dict[str, Body] = {}
__all__ = ["BODIES", "ENDPOINTS", "PROTOCOL", "ROUTES", "is_open", "respond_page", "wants_page"]
