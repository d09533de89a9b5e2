"""A timeline of runners: states as spans, and a picture of the spans above the memory that runners took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fsm.domain.devices import MIB
from fsm.machine.request import ModelId
from fsm.machine.runner import EXPIRING, IDLE, LOADING, READY, UNLOADED, RunnerId, RunnerState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Their lightness differs as much as their hue, so that they can be told apart in grey as well.
COLOURS = {LOADING: "#f0b429", READY: "#1f4e79", IDLE: "#d3e3f0", EXPIRING: "#c4572f"}

_WIDTH_IN = 11.0  # inches, as all sizes of the picture
_ROW_IN = 0.26
_MEMORY_IN = 1.7
_MARGIN_IN = 1.25  # title, axis and legend together
_MARKS = "#6b6b6b"
_LEGEND: Mapping[str, Any] = MappingProxyType(
    {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "frameon": False, "borderaxespad": 0.2}
)


@dataclass(frozen=True, slots=True)
class Span:
    """A runner was in one state from `start_s` to `end_s`, in seconds from the timeline's beginning."""

    runner: RunnerId
    model: str  # the model's name
    state: RunnerState
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class MemoryPoint:
    """The memory of all runners at one moment, `at_s` seconds from the timeline's beginning."""

    at_s: float
    held_bytes: int  # reserved, or measured where that is more
    resident_bytes: int  # as last measured


class Timeline:
    """Collects when each runner came to which state, in order, and draws it.

    `begin` is the scheduler's time that counts as 0; `name` gives the name to show for a model's identity. Only one
    thread at a time may use a timeline.
    """

    def __init__(self, begin: float, name: Callable[[ModelId], str] = str) -> None:
        self._begin = begin
        self._name = name
        self._models: dict[RunnerId, ModelId] = {}  # in the order in which the runners were started
        self._changes: dict[RunnerId, list[tuple[float, RunnerState]]] = {}  # when the runner came to which state
        self._memory: list[MemoryPoint] = []
        self._marks: list[tuple[float, str]] = []

    def add(self, at: float, runner: RunnerId, model: ModelId, state: RunnerState) -> None:
        """Add a runner's change of state at `at`, in the scheduler's time."""
        self._models[runner] = model
        self._changes.setdefault(runner, []).append((at, state))

    def add_memory(self, at: float, held_bytes: int, resident_bytes: int) -> None:
        """Add the bytes of all runners at `at`, in the scheduler's time."""
        self._memory.append(MemoryPoint(at - self._begin, held_bytes, resident_bytes))

    def add_mark(self, at: float, text: str) -> None:
        """Add a mark with a word or number of its own at a moment, in the scheduler's time."""
        self._marks.append((at - self._begin, text))

    @property
    def memory(self) -> Sequence[MemoryPoint]:
        """The memory of all runners, in order."""
        return tuple(self._memory)

    def spans(self, now: float) -> tuple[Span, ...]:
        """Return every stay in a state, runner by runner in order; a stay that goes on ends `now`.

        `now` is in the scheduler's time. `unloaded` is final and has no span.
        """
        return tuple(
            Span(
                runner,
                self._name(self._models[runner]),
                state,
                at - self._begin,
                max(at, until) - self._begin,
            )
            for runner, changes in self._changes.items()
            for (at, state), (until, _) in zip(changes, [*changes[1:], (now, UNLOADED)], strict=True)
            if state is not UNLOADED
        )

    def draw(
        self, path: str | PathLike[str], now: float, *, limit_bytes: int | None = None, title: str = "Runners"
    ) -> None:
        """Draw one row per runner, one colour per state, and below them the memory where there is any, to `path`.

        The file's ending gives the format; folders are made. The same entries give the same bytes. Raises ImportError
        where matplotlib is not installed, OSError where the file cannot be written.
        """
        import matplotlib

        spans = self.spans(now)
        lines = [f"{self._name(model)} · {runner}" for runner, model in self._models.items()]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "loadmaster", "font.size": 9.0}):
            figure, rows, memory = _canvas(len(lines) + bool(self._marks), bool(self._memory))
            rows.set_title(title, loc="left", fontweight="bold")
            _draw_rows(rows, spans, lines)
            if memory is not None:
                _draw_memory(memory, self._memory, limit_bytes)
            _draw_marks(rows, memory, self._marks, len(lines))
            last = rows if memory is None else memory
            last.set_xlabel("seconds")
            last.set_xlim(0.0, max([now - self._begin, *(span.end_s for span in spans)]) or 1.0)
            plain = {"Date": None} if Path(path).suffix.lower() == ".svg" else {}  # else no two files are the same
            figure.savefig(path, metadata=plain, dpi=110)


def _canvas(rows: int, memory: bool) -> tuple[Figure, Axes, Axes | None]:
    """Return a figure with a plot for so many rows, and a plot for the memory below it on the same scale of time."""
    from matplotlib.figure import Figure

    heights = [max(rows, 1) * _ROW_IN, *([_MEMORY_IN] if memory else [])]
    figure = Figure(figsize=(_WIDTH_IN, sum(heights) + _MARGIN_IN), layout="constrained")
    plots = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    return figure, plots[0, 0], plots[1, 0] if memory else None


def _draw_rows(plot: Axes, spans: Sequence[Span], lines: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    row_of: dict[RunnerId, int] = {}
    for span in spans:
        row = row_of.setdefault(span.runner, len(row_of))
        bar = [(span.start_s, span.end_s - span.start_s)]
        plot.broken_barh(bar, (row - 0.38, 0.76), facecolor=COLOURS[span.state], edgecolor="#404040", linewidth=0.4)
    plot.set_yticks(range(len(lines)), lines)
    plot.set_ylim(max(len(lines), 1) - 0.4, -0.6)  # the first runner on top
    plot.tick_params(axis="y", length=0)
    _tidy(plot)
    keys = [Patch(facecolor=COLOURS[state], edgecolor="#404040", linewidth=0.4, label=state.value) for state in COLOURS]
    plot.legend(handles=keys, ncols=len(keys), **_LEGEND)


def _draw_marks(rows: Axes, memory: Axes | None, marks: Sequence[tuple[float, str]], row: int) -> None:
    """Draw dotted lines through both plots, named in a row of their own below all others."""
    if not marks:
        return
    rows.set_ylim(row + 0.6, -0.6)
    for at_s, text in marks:
        rows.text(at_s, row, f" {text}", verticalalignment="center", color=_MARKS)
        for plot in (rows, memory):
            if plot is not None:
                plot.axvline(at_s, color=_MARKS, linestyle=":", linewidth=0.9, zorder=0.5)


def _draw_memory(plot: Axes, points: Sequence[MemoryPoint], limit_bytes: int | None) -> None:
    times = [point.at_s for point in points]
    held = [point.held_bytes / MIB for point in points]
    resident = [point.resident_bytes / MIB for point in points]
    plot.fill_between(times, held, step="post", color="#9aa5ad", alpha=0.35, linewidth=0, label="promised")
    plot.step(times, resident, where="post", color="#1f4e79", linewidth=1.3, label="resident")
    if limit_bytes is not None:
        plot.axhline(limit_bytes / MIB, color="#8c1c13", linestyle="--", linewidth=1.1, label="limit")
    plot.set_ylabel("MiB")
    plot.set_ylim(0.0, max([*held, *resident, (limit_bytes or 0) / MIB]) * 1.12 or 1.0)
    _tidy(plot)
    plot.legend(ncols=3, **_LEGEND)


def _tidy(plot: Axes) -> None:
    plot.grid(axis="x", color="#d9d9d9", linewidth=0.5)
    plot.set_axisbelow(True)
    for side in ("top", "right", "left"):
        plot.spines[side].set_visible(False)
