"""Bytes, durations and addresses as people read them."""

from __future__ import annotations

import math
import re
import unicodedata

_BYTE_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
_SECONDS_PER_UNIT = (("h", 3600), ("m", 60), ("s", 1))


def format_bytes(count: int) -> str:
    """Return a number of bytes for a person to read, in binary units: "512 bytes", "1.5 GiB"."""
    if abs(count) < 1024:
        return f"{count} bytes"
    value = float(count)
    power = 0
    while abs(value) >= 1023.95 and power < len(_BYTE_UNITS) - 1:  # one decimal would make it 1024.0 of a smaller unit
        value /= 1024
        power += 1
    return f"{value:.1f}".removesuffix(".0") + f" {_BYTE_UNITS[power]}"


def format_duration(duration_s: float) -> str:
    """Return a duration for a person to read: "250ms", "2.5s", "1h30m", or "forever" if it is infinite."""
    if math.isinf(duration_s):
        return "forever" if duration_s > 0 else "-forever"
    if duration_s < 0:
        return "-" + format_duration(-duration_s)
    if duration_s * 1000 < 999.5:
        return f"{duration_s * 1000:.0f}ms" if duration_s else "0s"
    if round(duration_s, 1) < 60:
        return f"{duration_s:.1f}".removesuffix(".0") + "s"
    rest = round(duration_s)
    text = ""
    for unit, unit_s in _SECONDS_PER_UNIT:
        count, rest = divmod(rest, unit_s)
        text += f"{count}{unit}" if count else ""
    return text


_ADDRESS = re.compile(r"https?://(?:127\.|localhost|\[::1\])[^\s\"\\]*")


def without_addresses(words: str) -> str:
    """Return a text without the addresses of servers on this machine: an address may be a runner's."""
    return _ADDRESS.sub("http://...", words)


def printable(text: str) -> str:
    """Return a text of one line that a terminal can only show.

    Control characters, and others that show nothing, are escaped as Python writes them: an escape sequence of a file's
    would set titles, hide lines or turn them round.
    """
    return text if text.isprintable() else "".join(map(_escaped, text))


def shown(text: str) -> str:
    """Return a text as `printable` does, with its line breaks and tabs."""
    return text if text.isprintable() else "".join(one if one in "\n\t" else _escaped(one) for one in text)


def _escaped(one: str) -> str:
    if one.isprintable() or unicodedata.category(one) == "Zs":  # of other alphabets' spaces too
        return one
    return one.encode("unicode_escape").decode("ascii")


def lines_of(text: str) -> list[str]:
    """Return the lines of a text, safe to show."""
    return [printable(line.strip()) for line in text.splitlines() if line.strip()]


def one_line(text: str) -> str:
    """Return a text, which may have several lines, as one line that is safe to show."""
    return "; ".join(lines_of(text))
