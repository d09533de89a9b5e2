"""How ways to choose a node compare: one table, over all seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.tools.cluster_simulation.world import BIG, OURS, TWO_CHOICES

HEAD = (
    "| nodes | traffic | route | digests, s | mean wait, s | p95 | p99 | loads | reload seconds "
    "| ÷ one big node | p99 ÷ two choices |"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One trace with one route."""

    nodes: int
    kind: str
    seed: int
    route: str
    digest_s: float
    mean_s: float
    p95_s: float
    p99_s: float
    loads: int
    reload_s: float
    refusals: int
    broken: int


@dataclass(frozen=True, slots=True)
class Line:
    """All seeds of one kind of traffic on so many nodes with one route; percentiles are means over seeds."""

    mean_s: float
    p95_s: float
    p99_s: float
    loads: float
    reload_s: float
    broken: float


Key = tuple[int, str, str, float]  # nodes, traffic, route, seconds between digests


def summarise(rows: Sequence[Row]) -> dict[Key, Line]:
    """Return the lines by nodes, traffic, route and digests."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.nodes, row.kind, row.route, row.digest_s), []).append(row)
    return {key: _line(group) for key, group in groups.items()}


def _line(rows: Sequence[Row]) -> Line:
    fields = ("mean_s", "p95_s", "p99_s", "loads", "reload_s", "broken")
    return Line(*(sum(getattr(row, field) for row in rows) / len(rows) for field in fields))


def ratios(lines: dict[Key, Line], key: Key) -> tuple[float, float]:
    """Return reload seconds over those of one big node, and the p99 over that of two choices; 0 for 0 over 0."""
    nodes, kind, *_ = key
    big, two = lines[nodes, kind, BIG, 0.0], lines[nodes, kind, TWO_CHOICES, 0.0]
    return _over(lines[key].reload_s, big.reload_s), _over(lines[key].p99_s, two.p99_s)


def _over(one: float, other: float) -> float:
    return one / other if other else (0.0 if not one else float("inf"))


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    lines = summarise(rows)
    yield HEAD
    yield "| ---: | --- | --- " + "| ---: " * 8 + "|"
    for key in sorted(lines, key=lambda each: (each[0], each[1])):
        nodes, kind, route, digest_s = key
        line, (reloads, waits) = lines[key], ratios(lines, key)
        name, age = (f"**{route}**", f"{digest_s:g}") if route == OURS else (route, "")
        yield (
            f"| {nodes} | {kind} | {name} | {age} | {line.mean_s:.2f} | {line.p95_s:.1f} "
            f"| {line.p99_s:.1f} | {line.loads:,.0f} | {line.reload_s:,.0f} | {reloads:.2f} | {waits:.2f} |"
        )
