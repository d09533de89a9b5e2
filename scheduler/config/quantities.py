"""Sizes and durations as people write them."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from scheduler.errors.exceptions import InvalidSettings

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgtp])(i?))?(?:b|bytes?)?", re.IGNORECASE)
_SIZE_ALLOWED = 'a number of bytes like "600MiB", "1.5GB" or 1048576, not negative'
_SIZE_LIMIT = 2**63
_LEAST_BARE = 1 << 20  # of a text without a unit: a smaller one most likely means GiB or MiB

_DURATION_PART = r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d)\s*"
_DURATION = re.compile(rf"(-?)\s*((?:{_DURATION_PART})+)")
_DURATION_ALLOWED = 'a duration like "5m", "1h30m", "250ms" or a number of seconds; negative or "forever": without end'
LONGEST_WAIT_S = float((2**31 - 1) // 1000)  # 24 days: sockets and selectors count milliseconds in 31 bits
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_bytes(text: str | int, *, name: str = "size") -> int:
    """Return a number of bytes: "600MiB" and "600Mi" are binary, "600MB" and "600M" decimal, bare numbers are bytes.

    A text that is a bare number under 1 MiB has most likely lost its unit, and is refused.

    Raises `InvalidSettings`, under `name`, for any other value and for a negative one.
    """
    if isinstance(text, int) and not isinstance(text, bool) and 0 <= text < _SIZE_LIMIT:
        return text
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise InvalidSettings(name, text, _SIZE_ALLOWED)
    number, power, binary = match.groups()
    if power is None and "." in number:  # half a byte: the unit was forgotten
        raise InvalidSettings(name, text, _SIZE_ALLOWED)
    if number == str(text).strip() and 0 < int(number) < _LEAST_BARE:
        raise InvalidSettings(name, text, f"{_SIZE_ALLOWED}; name the unit of a number this small")
    factor = 1 if power is None else (1024 if binary else 1000) ** ("kmgtp".index(power.lower()) + 1)
    count = Decimal(number) * factor
    if count >= _SIZE_LIMIT:
        raise InvalidSettings(name, text, f"{_SIZE_ALLOWED}, and below 8 EiB")
    return int(count)


def parse_duration(text: str | float, *, name: str = "duration") -> float:
    """Return seconds from "5m", "1h30m", "250ms", "30s" or a bare number of seconds; negative means `math.inf`.

    Raises `InvalidSettings`, under `name`, for any other value.
    """
    if isinstance(text, str):
        return _parse_duration_text(text, name)
    try:
        duration_s = math.nan if isinstance(text, bool) or not isinstance(text, (int, float)) else float(text)
    except OverflowError:  # a whole number beyond all floats
        duration_s = math.nan
    if math.isnan(duration_s):
        raise InvalidSettings(name, text, _DURATION_ALLOWED)
    return math.inf if duration_s < 0 else duration_s


def wait_limit(duration_s: float) -> float | None:
    """Return seconds as waits of the operating system take them: None, which is without end, for long durations."""
    return None if duration_s > LONGEST_WAIT_S else duration_s


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
