"""The demonstration's clients: threads that send requests, wait, and show the answers."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence

from fsm.machine.runner import RunnerId
from scheduler.api.lease import Lease
from scheduler.api.scheduler import Scheduler
from scheduler.cli.demo.models import Player
from scheduler.cli.demo.report import Answer, Feature, Record, wait_text
from scheduler.cli.demo.view import View
from scheduler.concurrency.clock import monotonic_clock
from scheduler.errors.exceptions import SchedulerError

PATIENCE_S = 600.0  # for a grant, and for silence in an answer: the user's own models may be large

_HOLD_S = 300.0  # a client that keeps a runner busy ends after this time at the latest
_LOOK_S = 0.1  # between two checks of a thread
_ANSWER_TOKENS = 40
_STREAM_TOKENS = 64
_SHOWN = 100  # characters of an answer


class Client:
    """One client: a thread that can be waited for, with a wait that Ctrl-C can interrupt."""

    def __init__(self, name: str, job: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=job, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the client is still at work."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Return when the client is done."""
        while self._thread.is_alive():
            self._thread.join(_LOOK_S)


class Clients:
    """All clients; what becomes of each request is noted in the record and shown."""

    def __init__(self, scheduler: Scheduler, record: Record, view: View) -> None:
        self.over = False  # no client waits for answers any more: a failure after this is not shown
        self._scheduler = scheduler
        self._record = record
        self._view = view
        self._turns = itertools.count()
        self._numbers = itertools.count(1)

    def begin(self, job: Callable[[], None]) -> Client:
        """Return a new client that does a job."""
        return Client(f"client {next(self._numbers)}", job)

    def together(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Have each job done by a client of its own, at the same time, and wait for all clients."""
        for client in [self.begin(job) for job in jobs]:
            client.wait()

    def ask(self, player: Player, keep_alive_s: float | None = None) -> None:
        """Send a model one question, and note the answer."""

        def use(lease: Lease) -> str:
            turn = next(self._turns)
            if player.spec.embedding:
                first, second = player.sentences(turn)
                one, other = lease.embed([first, second], timeout=PATIENCE_S)
                return f"“{first}” and “{second}”: {likeness(one, other):.2f} alike"
            return lease.chat(player.question(turn), max_tokens=_ANSWER_TOKENS, temperature=0.0, timeout=PATIENCE_S)

        self._request(player, keep_alive_s, use)

    def hold(self, player: Player, busy: threading.Event, served: threading.Event) -> None:
        """Keep a runner busy with one answer after another, until the runner is leaving or `served` is set.

        `busy` is set once the runner is busy.
        """

        def use(lease: Lease) -> str:
            """Answer until the runner is leaving; return the last text."""
            busy.set()
            text, end = "", monotonic_clock() + _HOLD_S
            while monotonic_clock() < end and not (served.is_set() or self._record.is_leaving(lease.runner)):
                if player.spec.embedding:
                    lease.embed(player.sentences(0)[0], timeout=PATIENCE_S)
                    text = "many sentences, one after another"
                else:
                    question = player.question(next(self._turns))
                    text = "".join(lease.stream(question, max_tokens=_STREAM_TOKENS, timeout=PATIENCE_S))
            return text

        self._request(player, None, use)

    def _request(self, player: Player, keep_alive_s: float | None, use: Callable[[Lease], str]) -> None:
        """Acquire a lease, use it, release it, and note what became of the request."""
        asked_at = granted_at = monotonic_clock()
        runner: RunnerId | None = None
        text = error = ""
        try:
            with self._scheduler.acquire(player.spec, keep_alive=keep_alive_s, timeout=PATIENCE_S) as lease:
                granted_at = monotonic_clock()
                runner = lease.runner
                text = use(lease)
        except (SchedulerError, OSError) as caught:
            if self.over:
                return
            error = str(caught)
        client = threading.current_thread().name
        answer = Answer(client, player.name, runner, asked_at, granted_at, monotonic_clock(), text, error)
        self._record.answers.append(answer)
        if text.strip() and not player.spec.embedding:
            self._record.checklist.see(Feature.answer, answer.ended_at)
        self._show(answer)

    def _show(self, answer: Answer) -> None:
        at = f"{answer.ended_at - self._record.begin:6.2f} s"
        if answer.error:
            self._view.say(f"{at}  {answer.model} failed: {answer.error}", "red")
            return
        waited = wait_text(answer.granted_at - answer.asked_at)
        self._view.say(f"{at}  {answer.client} waited {waited} for {answer.model}: {trimmed(answer.text)}", "green")


def likeness(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the cosine of the angle between two vectors."""
    lengths = math.hypot(*one) * math.hypot(*other)
    return sum(map(float.__mul__, one, other)) / lengths if lengths else 0.0


def trimmed(text: str) -> str:
    """Return the beginning of a text in one line, without characters that a terminal might obey."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"
