"""The commands `loadmaster ps` and `loadmaster top`: what a server has loaded, and what waits, once or live."""

from __future__ import annotations

import os
import select
import sys
import termios
import threading
import time
import tty
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scheduler.cli.output import SafeConsole, print_json
from scheduler.cli.server_client import ServerClient, ServerError
from scheduler.errors.formatting import format_bytes, format_duration, one_line
from scheduler.errors.wording import DECISIONS

_BAR = 24  # characters
_DECISIONS = 8
_ROUTINE = ("queued", "granted")  # come with every request
_FRAME_S = 0.25
_RETRY_S = 2.0

Values = Mapping[str, Any]


def run_ps(url: str, *, as_json: bool) -> int:
    """Print the status of a server, and return the exit status."""
    status = ServerClient(url).status()
    if as_json:
        print_json(status)
    else:
        SafeConsole(soft_wrap=not sys.stdout.isatty()).print(tables(status))
    return 0


def run_top(url: str) -> int:
    """Show the status of a server until q or Ctrl-C, and return the exit status."""
    view = View(ServerClient(url))
    view.client.status()  # a server that cannot be asked is told in one line
    console = SafeConsole()
    if not console.is_terminal:
        raise ServerError(view.client.url, "top needs a terminal: `loadmaster ps` prints the same once")
    threading.Thread(target=view.follow, daemon=True).start()
    try:
        with keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
            while not pressed("qQ"):
                live.update(view.shown(), refresh=True)
    except KeyboardInterrupt:
        pass
    return 0


class View:
    """What is known of a server; `follow` runs on a thread of its own."""

    def __init__(self, client: ServerClient) -> None:
        self.client = client
        self._status: Values | None = None
        self._problem = ""
        self._decisions: deque[str] = deque(maxlen=_DECISIONS)

    def follow(self) -> None:
        """Take what happens, without an end; a connection that is lost is made again."""
        while True:
            try:
                self._decisions.clear()
                for kind, told in self.client.events():
                    self._problem = ""
                    self._take(kind, told)
                self._problem = "the server closes"
            except ServerError as error:
                self._problem = str(error)
            except (KeyError, TypeError, AttributeError):
                self._problem = f"{self.client.url}: what it tells is not understood: it may be of another version"
            time.sleep(_RETRY_S)

    def shown(self) -> RenderableType:
        """Return what is to be shown now."""
        head = Text.assemble((f"loadmaster at {self.client.url}", "bold"), "   q: quit")
        parts: list[RenderableType] = [head]
        if self._problem:
            parts.append(Text(self._problem, "bold red"))
        if self._status is not None:
            parts.append(tables(self._status))
        if decided := list(self._decisions):
            parts.append(Text("\nDecisions", "bold"))
            parts += [Text(line, overflow="ellipsis", no_wrap=True) for line in reversed(decided)]
        return Group(*parts)

    def _take(self, kind: str, told: Any) -> None:
        match kind:
            case "past":
                self._decisions.extend(map(sentence, told["decisions"]))
            case "status":
                tables(told)  # what is not understood is found out here
                self._status = told
            case "decision" if told["what"] not in _ROUTINE:
                self._decisions.append(sentence(told))


def sentence(decision: Values) -> str:
    """Return a decision, with its reason, as a sentence of one line."""
    subject = decision["model"]
    if decision["request"] is not None:
        subject = f"request {decision['request']} for {subject}"
    elif decision["runner"] is not None:
        subject = f"runner {decision['runner']} of {subject}"
    words = DECISIONS.get(decision["what"], "{subject}: {reason}")
    return one_line(words.format(subject=subject, reason=decision["reason"]))


def tables(status: Values) -> RenderableType:
    """Return a status as tables: devices, runners, and the queue with what each request waits for."""
    parts: list[RenderableType] = [Text(f"problem: {one_line(text)}", "red") for text in status["problems"]]
    parts.append(_table("Devices", ("device", "memory", "held", "free", "others", ""), map(_device, status["devices"])))
    heads = ("runner", "model", "state", "leases", "memory", "what ends it")
    parts.append(_table("Runners", heads, map(_runner, status["runners"])))
    waits = ("position", "model", "waits for", "since", "expected in", "gives up in")
    parts.append(_table("Queue", waits, map(_wait, status["queue"])))
    return Group(*parts)


def _table(title: str, heads: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Table:
    table = Table(box=None, title=title, title_justify="left", title_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        number = head in ("leases", "position", "held", "free", "others", "since", "expected in", "gives up in")
        table.add_column(head, justify="right" if number else "left", header_style="dim", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _device(device: Values) -> tuple[str, ...]:
    capacity, held, missing = device["capacity_bytes"], device["held_bytes"], device["missing_bytes"]
    full = [round(_BAR * amount / capacity) if capacity else 0 for amount in (held, held + missing)]
    bar = "█" * min(full[0], _BAR) + "▒" * (min(full[1], _BAR) - min(full[0], _BAR))
    sizes = (format_bytes(one) for one in (capacity, held, device["free_bytes"], missing))
    return device["id"], *sizes, bar.ljust(_BAR, "░")


def _runner(runner: Values) -> tuple[str, ...]:
    held = ", ".join(f"{format_bytes(size)} of {device}" for device, size in runner["held_bytes"].items() if size)
    expected = sum(runner["promised_bytes"].values())
    state = runner["state"]
    if state == "loading" and expected:
        state = f"loading {min(99, 100 * sum(runner['resident_bytes'].values()) // expected)} %"
    return str(runner["id"]), runner["model"], state, str(runner["leases"]), held, _ending(runner)


def _ending(runner: Values) -> str:
    """Return what ends a runner.

    1. It was stopped, or leaves already.
    2. It is pinned, loads, or is in use: nothing does.
    3. Its keep-alive does, or without one the need of others.
    """
    leases, expires_in_s = runner["leases"], runner["expires_in_s"]
    if runner["stuck"]:  # 1
        return "it was stopped, but does not end"
    if runner["state"] == "expiring":
        return f"it leaves after {leases} {'lease' if leases == 1 else 'leases'}" if leases else "it leaves"
    if runner["pinned"]:  # 2
        return "nothing: it is pinned"
    if runner["state"] == "loading":
        return ""
    if leases:
        return "not while it has leases"
    if expires_in_s is None:  # 3
        return "only memory that others need"
    return f"its keep-alive, in {_whole(expires_in_s)}"


def _wait(wait: Values) -> tuple[str, ...]:
    times = (_whole(wait[name]) for name in ("waited_s", "until_s", "gives_up_in_s"))
    return str(wait["position"] + 1), wait["model"], one_line(wait["waits_for"]), *times


def _whole(seconds: float | None) -> str:
    return "" if seconds is None else format_duration(max(0, round(seconds)))


@contextmanager
def keys() -> Iterator[Any]:
    """Yield a function that waits for a moment and tells whether one of some keys was pressed; keys are not shown."""
    if not sys.stdin.isatty():
        yield lambda wanted: time.sleep(_FRAME_S)
        return
    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)

    def pressed(wanted: str) -> bool:
        there, _, _ = select.select([number], [], [], _FRAME_S)
        typed = os.read(number, 64).decode(errors="replace") if there else " "
        return not typed or bool({*typed} & {*wanted})  # nothing typed: the terminal has gone

    tty.setcbreak(number)
    try:
        yield pressed
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)
