"""The views of the demonstration: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import _thread
import os
import sys
import threading
from collections import deque
from collections.abc import Sequence
from typing import Protocol, TextIO

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fsm.domain.devices import HOST, MIB
from fsm.machine.runner import EXPIRING
from scheduler.api.status import RunnerStatus, Status
from scheduler.cli.demo.report import Record
from scheduler.cli.output import SafeConsole
from scheduler.errors.formatting import format_duration, shown
from scheduler.runtime.event_stream import Transition

_QUEUE_ROWS = 4
_RECENT = 5  # transitions in view
_BAR = 36  # columns
_STYLES = {"loading": "yellow", "ready": "bold cyan", "idle": "blue", "expiring": "red", "unloaded": "dim"}


class View(Protocol):
    """Shows what the demonstration does; any thread may call it."""

    def say(self, line: str, style: str = "") -> None:
        """Show a line that stays."""

    def changed(self, at_s: float, entry: Transition) -> None:
        """Show that a runner changed its state, so many seconds from the beginning."""

    def show(self, at_s: float, status: Status) -> None:
        """Show the runners, the queue and the memory."""

    def close(self) -> None:
        """Leave the terminal as it was; after this only `say` is called."""


def open_view(record: Record, output: TextIO | None = None) -> View:
    """Return the view that `output` (standard output, unless given) can show."""
    output = output or sys.stdout
    if output.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb"):
        return LiveView(record, output)
    return PlainView(record, output)


def change_text(record: Record, entry: Transition) -> str:
    """Return a change of state in one line, without control codes."""
    runner = f"{record.name(entry.model)} · {entry.runner}"
    source = f"{entry.source.value} → " if entry.source is not None else "→ "
    busy = f"; it still has {entry.leases} to answer" if entry.leases and entry.destination is EXPIRING else ""
    return f"{runner:<16} {source + entry.destination.value:<20} {entry.reason}{busy}"


class PlainView:
    """A view with one line for each transition and answer."""

    def __init__(self, record: Record, output: TextIO) -> None:
        self._record = record
        self._output = output
        self._lock = threading.Lock()

    def say(self, line: str, style: str = "") -> None:
        """Show a line that stays."""
        with self._lock:
            try:
                print(shown(line), file=self._output, flush=True)
            except BrokenPipeError:
                # the reader has gone, for example `| head`: end as with Ctrl-C, and write nothing more
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._output.fileno())
                _thread.interrupt_main()

    def changed(self, at_s: float, entry: Transition) -> None:
        """Show that a runner changed its state."""
        self.say(f"{at_s:6.2f} s  {change_text(self._record, entry)}")

    def show(self, at_s: float, status: Status) -> None:
        """Do nothing: the lines show everything."""

    def close(self) -> None:
        """Do nothing: the terminal was not changed."""


class LiveView:
    """A view with tables of runners and waiting requests, kept below the lines that stay."""

    def __init__(self, record: Record, output: TextIO) -> None:
        self._record = record
        self._console = SafeConsole(file=output, highlight=False)
        self._recent: deque[Text] = deque(maxlen=_RECENT)
        self._live = Live(console=self._console, transient=True, auto_refresh=False)

    def say(self, line: str, style: str = "") -> None:
        """Show a line that stays, cut to the terminal's width while tables are shown below it."""
        text = Text(line, style=style)
        if self._live.is_started:
            self._console.print(text, no_wrap=True, overflow="ellipsis")
        else:
            self._console.print(text, soft_wrap=True)

    def changed(self, at_s: float, entry: Transition) -> None:
        """Show that a runner changed its state."""
        text = f"{at_s:6.2f} s  {change_text(self._record, entry)}"
        self._recent.append(Text(text, style=_STYLES[entry.destination.value], no_wrap=True, overflow="ellipsis"))

    def show(self, at_s: float, status: Status) -> None:
        """Show the runners, the queue and the memory."""
        self._live.start()  # a second time does nothing
        parts: list[RenderableType] = [
            Text(),
            _memory_line(at_s, status),
            _runner_table(status.runners, len(self._record.players)),
            self._queue_table(status),
            *self._recent,
            *[Text()] * (_RECENT - len(self._recent)),
        ]
        self._live.update(Group(*parts), refresh=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._live.stop()

    def _queue_table(self, status: Status) -> Table:
        table = _table(waits=18, since=9, until=24)
        for wait in status.queue[:_QUEUE_ROWS]:
            waited = format_duration(round(wait.waited_s, 1))
            table.add_row(Text(wait.model), waited, Text(wait.waits_for))
        rest = len(status.queue) - _QUEUE_ROWS
        _fill(table, _QUEUE_ROWS + 1 - min(len(status.queue), _QUEUE_ROWS), f"and {rest} more" if rest > 0 else "")
        return table


def _memory_line(at_s: float, status: Status) -> Text:
    device = next((device for device in status.devices if device.id == HOST), None)
    if device is None:
        return Text(f"{at_s:6.2f} s")
    resident = sum(runner.resident_bytes.get(HOST, 0) for runner in status.runners)
    columns = [round(_BAR * min(1.0, part / device.capacity_bytes)) for part in (resident, device.held_bytes)]
    line = Text(f"{at_s:6.2f} s  memory ")
    line.append("█" * columns[0], style="blue")
    line.append("▒" * max(0, columns[1] - columns[0]), style="blue")
    line.append("·" * (_BAR - max(columns)), style="dim")
    sizes = f"{resident / MIB:.0f} resident, {device.held_bytes / MIB:.0f} promised"
    return line.append(f"  {sizes}, of {device.capacity_bytes / MIB:.0f} MiB")


def _runner_table(runners: Sequence[RunnerStatus], rows: int) -> Table:
    table = _table(runner=18, state=9, leases=8, memory=13, leaves=7, process=7)
    for runner in runners:
        resident = runner.resident_bytes.get(HOST, 0) / MIB
        promised = runner.promised_bytes.get(HOST, 0) / MIB
        table.add_row(
            Text(f"{runner.model} · {runner.id}"),
            Text(runner.state, style=_STYLES[runner.state]),
            "●" * min(runner.leases, 8) or "–",
            f"{resident:.0f} of {promised:.0f} MiB",
            f"in {format_duration(round(runner.expires_in_s, 1))}" if runner.state == "idle" else "",
            str(runner.pid or ""),
        )
    _fill(table, rows - len(runners), "")
    return table


def _table(**widths: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column, width in widths.items():
        table.add_column(column, min_width=width, no_wrap=True, overflow="ellipsis")
    return table


def _fill(table: Table, rows: int, first: str) -> None:
    """Add empty rows so that the table keeps its height."""
    for row in range(rows):
        table.add_row(first if row == 0 else "")
