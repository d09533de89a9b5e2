"""The report of a race: a table of medians with ratios, and the aims."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

OURS = "a"
LIMITS = {"b": 0.3, "b1": 0.5}  # the most that our total time may be, as a part of a peer's
_ROWS = ("total_s", "loads", "p50_s", "p95_s", "p99_s", "max_s", "errors", "killed")


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the median of each figure over the rounds, and the sum of the errors."""
    found: dict[str, float] = {}
    for name in _ROWS:
        values = [float(run[name]) for run in runs]
        found[name] = sum(values) if name in ("errors", "killed") else statistics.median(values)
    return found


def table(results: Mapping[str, Sequence[Mapping[str, Any]]], names: Mapping[str, str]) -> str:
    """Return a Markdown table of the contestants; a ratio is the total time as a multiple of ours."""
    lines = [
        "| | total, s | × ours | loads | p50, s | p95, s | × ours | p99, s | longest, s | errors | killed in use |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    ours = medians(results[OURS]) if results.get(OURS) else None
    for key, runs in results.items():
        one = medians(runs)
        total = f"{one['total_s'] / ours['total_s']:.2f}" if ours else "–"
        tail = f"{one['p95_s'] / ours['p95_s']:.2f}" if ours and ours["p95_s"] else "–"
        lines.append(
            f"| {names[key]} | {one['total_s']:.1f} | {total} | {one['loads']:.0f} | {one['p50_s']:.2f} | "
            f"{one['p95_s']:.2f} | {tail} | {one['p99_s']:.2f} | {one['max_s']:.2f} | {one['errors']:.0f} | "
            f"{one['killed']:.0f} |"
        )
    return "\n".join(lines)


def aims(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return each aim that can be judged with these contestants: its text, its figure, and whether it is met."""
    if not results.get(OURS):
        return []
    ours = medians(results[OURS])
    found = [{"aim": "no errors of ours", "measured": ours["errors"], "limit": 0, "met": not ours["errors"]}]
    tails = []
    for key, limit in LIMITS.items():
        if not results.get(key):
            continue
        peer = medians(results[key])
        ratio = round(ours["total_s"] / peer["total_s"], 3)
        aim = f"total time over that of {key}"
        found.append({"aim": aim, "measured": ratio, "limit": limit, "met": ratio <= limit})
        tails.append(peer["p95_s"])
    if tails:
        ratio = round(ours["p95_s"] / min(tails), 3) if min(tails) else 0.0
        found.append({"aim": "p95 over the best peer's", "measured": ratio, "limit": 1.0, "met": ratio <= 1.0})
    return found
