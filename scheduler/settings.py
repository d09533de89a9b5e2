"""Every limit and time the scheduler has, from arguments or the environment, checked and normalised once."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple, TypedDict, Unpack, cast

from fsm.eviction import POLICIES, EvictionPolicy
from scheduler.errors import InvalidSettings, format_bytes, format_duration

ENVIRONMENT_PREFIX = "LOADMASTER_"

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgtp])(i?))?(?:b|bytes?)?", re.IGNORECASE)
_SIZE_ALLOWED = 'a number of bytes like "600MiB", "1.5GB" or 1048576, not negative'
_SIZE_LIMIT = 2**63

_DURATION_PART = r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d)\s*"
_DURATION = re.compile(rf"(-?)\s*((?:{_DURATION_PART})+)")
_DURATION_ALLOWED = 'a duration like "5m", "1h30m", "250ms" or a number of seconds; negative or "forever": without end'
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_bytes(text: str | int, *, name: str = "size") -> int:
    """Return a number of bytes: "600MiB" and "600Mi" are binary, "600MB" and "600M" decimal, bare numbers are bytes.

    Raises `InvalidSettings`, under `name`, for anything else and for what is negative.
    """
    if isinstance(text, int) and not isinstance(text, bool) and 0 <= text < _SIZE_LIMIT:
        return text
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise InvalidSettings(name, text, _SIZE_ALLOWED)
    number, power, binary = match.groups()
    if power is None and "." in number:  # half a byte: the unit was forgotten
        raise InvalidSettings(name, text, _SIZE_ALLOWED)
    factor = 1 if power is None else (1024 if binary else 1000) ** ("kmgtp".index(power.lower()) + 1)
    count = Decimal(number) * factor
    if count >= _SIZE_LIMIT:
        raise InvalidSettings(name, text, f"{_SIZE_ALLOWED}, and below 8 EiB")
    return int(count)


def parse_duration(text: str | float, *, name: str = "duration") -> float:
    """Return seconds from "5m", "1h30m", "250ms", "30s" or a bare number of seconds; negative means `math.inf`.

    Raises `InvalidSettings`, under `name`, for anything else.
    """
    if isinstance(text, str):
        return _parse_duration_text(text, name)
    if isinstance(text, bool) or not isinstance(text, (int, float)) or math.isnan(text):
        raise InvalidSettings(name, text, _DURATION_ALLOWED)
    return math.inf if text < 0 else float(text)


def _parse_duration_text(text: str, name: str) -> float:
    plain = text.strip().lower()
    if plain == "forever":
        return math.inf
    if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", plain):
        return math.inf if plain.startswith("-") and float(plain) else abs(float(plain))
    match = _DURATION.fullmatch(plain)
    if match is None:
        raise InvalidSettings(name, text, _DURATION_ALLOWED)
    duration_s = sum(float(count) * _UNIT_SECONDS[unit] for count, unit in re.findall(_DURATION_PART, match[2]))
    return math.inf if match[1] and duration_s else duration_s


class SettingsArguments(TypedDict, total=False):
    """The keyword arguments of `Settings`, before they are parsed; durations in seconds or as text."""

    memory_limit: str | int | None
    max_queue: int
    max_runners: int
    keep_alive: str | float
    max_wait: str | float
    min_residency: str | float | None
    load_timeout: str | float
    recovery_timeout: str | float
    stop_grace: str | float
    close_timeout: str | float
    loads_per_device: int
    loads_on_host: int
    eviction: str | EvictionPolicy
    cpu_threads: int | None
    gpus: bool
    probe_interval: str | float
    probe_timeout: str | float
    event_buffer: int


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class Settings:
    """Every limit and time, normalised: sizes in bytes, durations in seconds (`math.inf`: without end).

    `settings_table()` says what each means. Arguments are `SettingsArguments`; what is not named has its default,
    and the environment is not read: see `from_environment`. Raises `InvalidSettings` for the first value not allowed.
    """

    memory_limit: int | None
    max_queue: int
    max_runners: int
    keep_alive: float
    max_wait: float
    min_residency: float | None
    load_timeout: float
    recovery_timeout: float
    stop_grace: float
    close_timeout: float
    loads_per_device: int
    loads_on_host: int
    eviction: EvictionPolicy
    cpu_threads: int | None
    gpus: bool
    probe_interval: float
    probe_timeout: float
    event_buffer: int

    def __init__(self, **arguments: Unpack[SettingsArguments]) -> None:
        given: dict[str, object] = {**arguments}
        for row in SETTINGS:
            object.__setattr__(self, row.name, row.parse(row.name, given.pop(row.name, row.default)))
        for name, value in given.items():
            raise InvalidSettings(name, value, f"one of the settings: {', '.join(row.name for row in SETTINGS)}")

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] | None = None, /, **arguments: Unpack[SettingsArguments]
    ) -> Settings:
        """Return settings where arguments win over the environment (LOADMASTER_MAX_QUEUE …), and that over defaults.

        `environment` is the process's own unless given; a variable that is empty counts as not set.
        """
        variables = os.environ if environment is None else environment
        chosen: dict[str, Any] = {}
        for row in SETTINGS:
            text = variables.get(row.variable, "").strip()
            if text and row.name not in arguments:
                chosen[row.name] = row.parse(row.variable, text)
        chosen.update(arguments)
        return cls(**chosen)


class Setting(NamedTuple):
    """One row of the table: `parse(name, value)` returns the normalised value or raises `InvalidSettings`."""

    name: str
    default: object
    parse: Callable[[str, Any], object]
    meaning: str

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return ENVIRONMENT_PREFIX + self.name.upper()


def _count(minimum: int) -> Callable[[str, Any], int]:
    def parse(name: str, value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise InvalidSettings(name, value, f"a whole number of at least {minimum}")
        return value

    return parse


def _duration(*, zero: bool = True) -> Callable[[str, Any], float]:
    def parse(name: str, value: Any) -> float:
        duration_s = parse_duration(value, name=name)
        if duration_s == 0 and not zero:
            raise InvalidSettings(name, value, "a duration longer than 0")
        return duration_s

    return parse


def _memory(name: str, value: Any) -> int:
    count = parse_bytes(value, name=name)
    if count == 0:
        raise InvalidSettings(name, value, "a number of bytes above 0")
    return count


def _flag(name: str, value: Any) -> bool:
    match value.lower() if isinstance(value, str) else value:
        case True | "1" | "true" | "yes" | "on":
            return True
        case False | "0" | "false" | "no" | "off":
            return False
        case _:
            raise InvalidSettings(name, value, "true or false")


def _eviction(name: str, value: Any) -> EvictionPolicy:
    policy = POLICIES.get(value) if isinstance(value, str) else value
    if not callable(getattr(policy, "order", None)):
        raise InvalidSettings(name, value, f"{' or '.join(map(repr, POLICIES))}, or a policy of your own")
    return cast(EvictionPolicy, policy)


def _optional(parse: Callable[[str, Any], object]) -> Callable[[str, Any], object]:
    return lambda name, value: None if value is None else parse(name, value)


SETTINGS = (
    Setting("memory_limit", None, _optional(_memory), "host memory that models may take in all; none: all there is"),
    Setting("max_queue", 512, _count(1), "requests that may wait; one more is refused at once"),
    Setting("max_runners", 0, _count(0), "runners alive at once; 0: 3 for each GPU, and at least 3"),
    Setting("keep_alive", "5m", _duration(), "how long an idle model stays loaded; 0: not at all, negative: for ever"),
    Setting("max_wait", "120s", _duration(), "how long a request waits before a busy runner drains for it"),
    Setting(
        "min_residency", None, _optional(_duration()), "how long a loaded model is safe; none: as long as its load took"
    ),
    Setting("load_timeout", "5m", _duration(zero=False), "how long a load may go without progress"),
    Setting("recovery_timeout", "5s", _duration(), "how long to wait for a device to show freed memory"),
    Setting("stop_grace", "2s", _duration(), "how long a process has to end before it is killed"),
    Setting("close_timeout", "10s", _duration(), "how long leases may last after close"),
    Setting("loads_per_device", 1, _count(1), "loads at once on one GPU"),
    Setting("loads_on_host", 2, _count(1), "loads at once on the host"),
    Setting("eviction", "lru", _eviction, 'which idle runner goes first: "lru", "keep-alive" or a policy object'),
    Setting("cpu_threads", None, _optional(_count(1)), "threads of each runner; none: the engine decides"),
    Setting("gpus", True, _flag, "whether GPUs are used"),
    Setting("probe_interval", "10s", _duration(zero=False), "how often a runner is asked whether it still answers"),
    Setting("probe_timeout", "10s", _duration(zero=False), "how long it may take to answer"),
    Setting("event_buffer", 1000, _count(1), "events kept for each slow reader before the oldest are dropped"),
)


def settings_table() -> str:
    """Return the settings as a Markdown table: name, environment variable, default and meaning."""
    lines = ["| setting | environment variable | default | meaning |", "| --- | --- | --- | --- |"]
    for row in SETTINGS:
        match row.default:
            case None:
                default = "none"
            case bool():
                default = str(row.default).lower()
            case _:
                default = str(row.default)
        lines.append(f"| `{row.name}` | `{row.variable}` | {default} | {row.meaning} |")
    return "\n".join(lines) + "\n"


__all__ = [
    "Settings",
    "SettingsArguments",
    "format_bytes",
    "format_duration",
    "parse_bytes",
    "parse_duration",
    "settings_table",
]
