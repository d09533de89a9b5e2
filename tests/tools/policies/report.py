"""How policies compare: a table, and a chart."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

COLOURS = {"keep-alive": "#9a9a9a", "lru": "#f0b429", "reuse": "#1f4e79", "foreknowing": "#d3e3f0"}
ABOUT = {"keep-alive": "the reference's order", "foreknowing": "Belady's rule, with the future known"}


@dataclass(frozen=True, slots=True)
class Row:
    """One trace at one capacity with one policy."""

    kind: str
    seed: int
    capacity_gb: float
    policy: str
    reload_s: float
    bound_s: float  # what no policy can beat
    reloads: int
    mean_wait_s: float
    longest_wait_s: float
    refused: int


@dataclass(frozen=True, slots=True)
class Summary:
    """All seeds of one kind at one capacity with one policy."""

    ratio: float  # of the seconds of all seeds together to those of the bounds
    least: float  # of any seed
    most: float
    spread: float  # the standard deviation over the seeds
    mean_wait_s: float


def summarise(rows: Sequence[Row]) -> dict[tuple[str, float, str], Summary]:
    """Return the summaries by kind, capacity and policy, without those in which no model was reloaded."""
    groups: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        if row.bound_s > 0:
            groups.setdefault((row.kind, row.capacity_gb, row.policy), []).append(row)
    return {key: _summary(group) for key, group in groups.items()}


def _summary(rows: Sequence[Row]) -> Summary:
    ratios = [row.reload_s / row.bound_s for row in rows]
    together = sum(row.reload_s for row in rows) / sum(row.bound_s for row in rows)
    spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
    return Summary(together, min(ratios), max(ratios), spread, statistics.mean(row.mean_wait_s for row in rows))


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table in Markdown: reload seconds ÷ the lower bound."""
    found = summarise(rows)
    names = list(dict.fromkeys(row.policy for row in rows))
    seeds = len({row.seed for row in rows})
    yield f"reload seconds ÷ lower bound: all seeds together (lowest to highest seed; {seeds} seeds)"
    yield "| traffic | memory | " + " | ".join(names) + " |"
    yield "| --- | --- |" + " --- |" * len(names)
    for kind, capacity in dict.fromkeys((kind, capacity) for kind, capacity, _ in found):
        cells = [found[kind, capacity, name] for name in names]
        texts = [f"{one.ratio:.2f} ({one.least:.2f}-{one.most:.2f})" for one in cells]
        yield f"| {kind} | {capacity:g} GB | " + " | ".join(texts) + " |"
    refused = sum(row.refused for row in rows)
    if refused:
        yield f"{refused} requests were refused: their models are larger than the memory"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a chart: a group of bars for each kind and capacity, whiskers from the lowest seed to the highest."""
    from matplotlib.figure import Figure

    found = summarise(rows)
    names = list(dict.fromkeys(row.policy for row in rows))
    names.sort(key=list(COLOURS).index if set(names) <= set(COLOURS) else names.index)
    groups = list(dict.fromkeys((kind, capacity) for kind, capacity, _ in found))
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        cells = [found[kind, capacity, name] for kind, capacity in groups]
        at = [group + (place - (len(names) - 1) / 2) * width for group in range(len(groups))]
        heights = [one.ratio for one in cells]
        whiskers = [
            [max(0.0, one.ratio - one.least) for one in cells], [max(0.0, one.most - one.ratio) for one in cells]
        ]  # fmt: skip
        label = f"{name}: {ABOUT[name]}" if name in ABOUT else name
        bars = axes.bar(at, heights, width, label=label, color=COLOURS.get(name), yerr=whiskers, ecolor="#6b6b6b")
        axes.bar_label(bars, [f"{height:.2f}" for height in heights], padding=2, fontsize=7)
    axes.axhline(1.0, color="#6b6b6b", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_yticks([1, 1.5, 2, 3, 5, 10, 20], ["1", "1.5", "2", "3", "5", "10", "20"])
    axes.set_xticks(range(len(groups)), [f"{kind}\n{capacity:g} GB" for kind, capacity in groups])
    axes.set_ylabel("reload seconds ÷ lower bound")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, metadata={"Date": None})
