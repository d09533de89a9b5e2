"""The settings of the HTTP server: one table for the keywords of `create_app`, for flags, and for the file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from scheduler.config.settings import Setting
from scheduler.config.value_parsers import count, duration, flag, size
from scheduler.errors.exceptions import InvalidSettings
from scheduler.http.rules import Rules, parse_rules

ANY = "*"


class ServerArguments(TypedDict, total=False):
    """The keywords of `create_app`, before they are parsed; durations in seconds or as text."""

    api_key: str | None
    allow_hosts: str | Iterable[str]
    allow_origins: str | Iterable[str]
    dashboard: bool
    dashboard_actions: bool
    sign_of_life: str | float
    patience: str | float
    body_limit: str | int
    body_timeout: str | float
    max_connections: int
    rules: Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class ServerSettings:
    """The settings, normalised: sizes in bytes, durations in seconds. Raises `InvalidSettings`."""

    api_key: str | None
    allow_hosts: tuple[str, ...]
    allow_origins: tuple[str, ...]
    dashboard: bool
    dashboard_actions: bool
    sign_of_life: float
    patience: float
    body_limit: int
    body_timeout: float
    max_connections: int
    rules: Rules

    def __init__(self, **arguments: Unpack[ServerArguments]) -> None:
        given: dict[str, object] = {**arguments}
        for row in SERVER_SETTINGS:
            object.__setattr__(self, row.name, row.parse(row.name, given.pop(row.name, row.default)))
        for name, value in given.items():
            known = ", ".join(row.name for row in SERVER_SETTINGS)
            raise InvalidSettings(name, value, f"one of the settings of the server: {known}")


def names(name: str, value: Any) -> tuple[str, ...]:
    """Return names, in lower case: several, or one text of them with commas in between."""
    parts = value.split(",") if isinstance(value, str) else value
    parts = list(parts) if isinstance(parts, Iterable) else [None]
    if not all(isinstance(part, str) for part in parts):
        raise InvalidSettings(name, value, "names, or one text of them with commas in between")
    return tuple(part.strip().lower() for part in parts if part.strip())


def _key(name: str, value: Any) -> str | None:
    """Return a key that a header can hold, or None; the error does not show it."""
    if value is None or (isinstance(value, str) and re.fullmatch(r"[!-~]+", value)):
        return value
    raise InvalidSettings(name, "…", "a text of ASCII characters without spaces, or None")


SERVER_SETTINGS = (
    Setting("api_key", None, _key, "key that clients must send, as a bearer token or as x-api-key"),
    Setting(
        "allow_hosts", (), names,
        'names by which clients may address the server beside localhost and addresses; "*": any',
    ),
    Setting(
        "allow_origins", (), names,
        'origins whose web pages may call the server, as https://host:port; a "*" stands for any characters',
        "OLLAMA_ORIGINS",
    ),
    Setting("dashboard", True, flag, "whether there is a page at /"),
    Setting("dashboard_actions", False, flag, "whether the page may load and unload models where no key is set"),
    Setting("sign_of_life", "0.5s", duration(), "how long a streamed request waits before its response begins"),
    Setting(
        "patience", "10m", duration(zero=False),
        "how long a request that is not streamed waits for its model, unless it says; negative: for ever",
    ),
    Setting("body_limit", "128MiB", size, "the largest body of a request"),
    Setting("body_timeout", "60s", duration(zero=False), "how long a client may pause while it sends a body"),
    Setting("max_connections", 1000, count(1), "requests at once; one more is refused"),
    Setting("rules", {}, parse_rules, "what clients may ask for, by model and option: locked values, floors, ceilings"),
)  # fmt: skip


def server_table(rows: Sequence[Setting] = SERVER_SETTINGS) -> str:
    """Return the settings as a Markdown table: name, default, meaning."""
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for row in rows:
        default = "none" if row.default in (None, (), {}, "") else str(row.default)
        default = default.lower() if isinstance(row.default, bool) else default
        lines.append(f"| `{row.name}` | {default} | {row.meaning} |")
    return "\n".join(lines) + "\n"
