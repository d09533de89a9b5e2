"""The demonstration, act by act: several clients use real models in a memory that does not hold all of them."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import psutil

from scheduler.api.scheduler import Scheduler
from scheduler.cli.demo.clients import Clients
from scheduler.cli.demo.models import Cast, DemoError, Player, engine_check, make_cast, packaged_players, players_in
from scheduler.cli.demo.report import Feature, Record, missing, summary
from scheduler.cli.demo.view import View, open_view
from scheduler.concurrency.clock import monotonic_clock
from scheduler.config.settings import Settings
from scheduler.errors.formatting import format_bytes, format_duration, shown
from scheduler.recording.timeline import Timeline
from scheduler.runtime.event_stream import Decision, Gap, Transition

INTERRUPTED = 130  # as a shell reports Ctrl-C

_MAX_WAIT = "2s"  # a busy runner drains for a request that has waited longer
_KEEP_ALIVE = "10m"  # until the last act: longer than the demonstration
_LOOK_S = 0.1  # between two reads of the scheduler's status
_BREATH_S = 0.3  # between two acts
_SHARING = 3  # clients that request one model at once


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The options of the command line; sizes in bytes, times in seconds."""

    models: Path | None = None  # a folder; None: the demonstration's own models
    out: Path = Path("build")  # the folder of the timeline
    memory_limit_bytes: int | None = None  # None: about half of the models fit
    keep_alive_s: float = 1.5  # in the last act
    requests: int = 9  # in the act in which all clients send requests at once


def run_demo(options: DemoOptions) -> int:
    """Run the demonstration and return an exit status: 1 if something was not seen or failed, 130 after Ctrl-C.

    Raises `SchedulerError` where the demonstration cannot begin.
    """
    engine_check()
    with _terminated_cleanly(), contextlib.ExitStack() as stack:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            if options.models is None:
                # Beside the results, not among the system's temporary files: hard links are more likely possible there.
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="models-", dir=options.out))
                players: tuple[Player, ...] = packaged_players(Path(folder))
            else:
                players, notes = players_in(options.models)
                for note in notes:
                    print(shown(note), file=sys.stderr)
        except OSError as error:
            raise DemoError(f"the demonstration cannot begin: {error}") from error
        available_bytes = psutil.virtual_memory().available
        return _Stage(options, make_cast(players, options.memory_limit_bytes, available_bytes)).run()


@contextlib.contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """End the program in an orderly way on a signal, or when its terminal closes, so that no file is left behind."""
    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    with contextlib.ExitStack() as stack:
        for number in numbers:
            stack.enter_context(_handled(number, lambda number, _: sys.exit(128 + number)))
        yield


class _Stage:
    """One performance."""

    def __init__(self, options: DemoOptions, cast: Cast) -> None:
        self._options = options
        self._cast = cast
        begin = monotonic_clock()
        self._record = Record(begin, cast.players, Timeline(begin, self._name))
        self._view: View = open_view(self._record)
        self._scheduler = Scheduler(_settings(cast))
        self._events = self._scheduler.events()
        self._watcher = threading.Thread(target=self._watch, name="demo-watcher", daemon=True)
        self._clients = Clients(self._scheduler, self._record, self._view)
        self._numbers = itertools.count(1)  # of the acts

    def run(self) -> int:
        """Play all acts, and then show what was seen."""
        complete = False
        try:
            self._watcher.start()
            self._acts()
            complete = True
        except KeyboardInterrupt:
            self._view.say("")
            self._view.say("Interrupted: stopping every runner …", "bold")
        finally:
            self._clients.over = True
            self._end()
        return self._conclude(complete)

    def _end(self) -> None:
        with _handled(signal.SIGINT, signal.SIG_IGN):  # the end is bounded in time
            self._scheduler.close()
            if self._watcher.ident is not None:
                self._watcher.join()
            self._view.close()

    def _conclude(self, complete: bool) -> int:
        expected = _expected(self._cast)
        now = monotonic_clock()
        lines = ["", *summary(self._record, now, expected, complete=complete), ""]
        for line in [*lines, self._draw(now)]:
            self._view.say(line, _style(line))
        if not complete:
            return INTERRUPTED
        return 1 if self._record.failures() or missing(self._record, expected) else 0

    def _draw(self, now: float) -> str:
        path = self._options.out / "timeline.svg"
        title = "What every runner did, and the memory all of them took"
        try:
            self._record.timeline.draw(path, now, limit_bytes=self._cast.limit_bytes, title=title)
        except ImportError:
            return "No timeline was drawn, since matplotlib is not installed: pip install 'loadmaster[plot]'"
        except OSError as error:
            return f"No timeline was drawn: {error}"
        return f"Timeline: {path}"

    # -- the acts -----------------------------------------------------------------------------------------------------

    def _acts(self) -> None:
        self._introduce()
        self._act("Clients request models that are not loaded; clients of the same model share its runner")
        first, *others = self._cast.residents
        self._clients.together([partial(self._clients.ask, player) for player in (*[first] * _SHARING, *others)])
        self._act("The same models again: their runners were kept, so no client waits")
        self._clients.together([partial(self._clients.ask, player) for player in self._cast.residents])
        if (newcomer := self._cast.newcomer) is not None:
            self._act(f"{newcomer.name} does not fit beside them: the runner that was idle longest is evicted")
            self._clients.together([partial(self._clients.ask, newcomer)])
            self._act(f"All are busy, and a client requests {newcomer.name}: after {_MAX_WAIT} a busy runner drains")
            self._drain(newcomer)
        self._act(f"All clients request all models: {self._options.requests} requests from {_SHARING} clients")
        self._rush()
        keep_alive = format_duration(self._options.keep_alive_s)
        self._act(f"No more requests: after a keep-alive of {keep_alive} every runner is unloaded")
        self._fade()

    def _introduce(self) -> None:
        say = self._view.say
        say(f"{len(self._cast.players)} models, and {format_bytes(self._cast.limit_bytes)} of memory for all of them:")
        for player in self._cast.players:
            say(f"  {player.name:<12} {_describe(player):<36} about {format_bytes(player.predicted_bytes)}")

    def _act(self, title: str) -> None:
        """Begin the next act, a breath after the act before."""
        if (number := next(self._numbers)) > 1:
            time.sleep(_BREATH_S)
        self._record.timeline.add_mark(monotonic_clock(), f"act {number}")
        self._view.say("")
        self._view.say(f"{number}. {title}", "bold")

    def _drain(self, newcomer: Player) -> None:
        """Keep every resident busy, and then request the newcomer, which does not fit beside them."""
        served = threading.Event()
        holders = []
        loaded = self._loaded()
        for player in sorted(self._cast.residents, key=lambda player: player.name not in loaded):
            busy = threading.Event()
            holder = self._clients.begin(partial(self._clients.hold, player, busy, served))
            holders.append(holder)
            while not busy.wait(_LOOK_S) and holder.alive:
                pass
        try:
            self._clients.together([partial(self._clients.ask, newcomer)])
        finally:
            served.set()
        for holder in holders:
            holder.wait()

    def _rush(self) -> None:
        players = self._cast.players

        def visit(client: int) -> None:
            for number in range(client, self._options.requests, _SHARING):
                self._clients.ask(players[(number // _SHARING + client) % len(players)])

        self._clients.together([partial(visit, client) for client in range(_SHARING)])

    def _fade(self) -> None:
        """Use every loaded model once more, with a short keep-alive, and wait until all are unloaded."""
        loaded = self._loaded()
        keep_alive_s = self._options.keep_alive_s
        fading = [player for player in self._cast.players if player.name in loaded] or [self._cast.residents[0]]
        self._clients.together([partial(self._clients.ask, player, keep_alive_s) for player in fading])
        end = monotonic_clock() + keep_alive_s + 30.0
        while self._scheduler.status().runners and monotonic_clock() < end:
            time.sleep(_LOOK_S)

    def _loaded(self) -> set[str]:
        """Return the names of the models that need no load."""
        return {runner.model for runner in self._scheduler.status().runners if runner.state in ("ready", "idle")}

    # -- watching -----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Note every event until the scheduler has closed, and its status in between."""
        looked_at = -math.inf
        over = False
        while not over:
            entry = self._events.take(_LOOK_S)
            match entry:
                case Transition():
                    self._record.add_entry(entry)
                    self._view.changed(entry.at - self._record.begin, entry)
                case Decision():
                    self._record.add_entry(entry)
                case Gap(missed):
                    self._record.missed += missed
                case None:
                    over = self._events.ended
            now = monotonic_clock()
            if over or now - looked_at >= _LOOK_S:
                looked_at = now
                status = self._scheduler.status()
                self._record.add_status(now, status)
                self._view.show(now - self._record.begin, status)

    def _name(self, id: str) -> str:
        return next((player.name for player in self._cast.players if player.spec.id == id), id)


@contextlib.contextmanager
def _handled(number: int, handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> Iterator[None]:
    """Handle a signal in another way for a while; only the main thread can do this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _settings(cast: Cast) -> Settings:
    """Return settings that do not depend on the environment, since the acts depend on them."""
    return Settings(
        memory_limit=cast.limit_bytes,
        max_wait=_MAX_WAIT,
        keep_alive=_KEEP_ALIVE,
        max_runners=len(cast.players) + 2,  # memory limits the runners, and not their number
        close_timeout="1s",
        gpus=False,
        event_buffer=10_000,
        measurement_file=None,  # it shows how what is measured replaces what was predicted
    )


def _expected(cast: Cast) -> Collection[Feature]:
    """Return the features that can be seen with this cast."""
    never = set() if cast.newcomer is not None else {Feature.eviction, Feature.drain}
    if all(player.spec.embedding for player in cast.residents):
        never.add(Feature.answer)
    return [feature for feature in Feature if feature not in never]


def _describe(player: Player) -> str:
    options = player.spec.options
    parts = [
        "embeds" if player.spec.embedding else "",
        f"context {options.num_ctx}",
        f"{options.num_parallel} slots" if options.num_parallel else "",
        f"{options.cache_type_k} cache" if options.cache_type_k else "",
    ]
    return ", ".join(part for part in parts if part)


def _style(line: str) -> str:
    if line.startswith("  ✓"):
        return "green"
    if line.startswith(("  ✗", "  failed")):
        return "red"
    return "" if line.startswith(" ") else "bold"
