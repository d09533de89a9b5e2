"""The requests of a race, their clients and their outcomes, the same for every contestant."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MOST_ERRORS_SHOWN = 3
_QUESTIONS = (
    "Say hello to a new colleague.",
    "What does a baker do?",
    "Why is sleep important?",
    "How many days does a week have?",
    "Tell me a fact about the moon.",
    "Why do bees visit flowers?",
    "What is a harbour for?",
    "How do I cook rice?",
)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of the sequence."""

    number: int
    model: str
    question: str


@dataclass(frozen=True, slots=True)
class Answered:
    """The outcome of a request; seconds of one clock."""

    ask: Ask
    begun_at: float
    granted_at: float | None  # None: the contestant does not report when a runner was there
    ended_at: float
    error: str = ""
    killed: bool = False  # its runner was there, and ended before the answer was complete

    @property
    def took_s(self) -> float:
        """The seconds from the request to the end of the answer."""
        return self.ended_at - self.begun_at


class Killed(Exception):
    """The runner was granted to a request and ended before its answer was complete."""


Asker = Callable[[Ask], float | None]  # answers, and returns when the runner was there; raises on failure


def a_trace(requests: int, models: Sequence[str], *, exponent: float, seed: int) -> list[Ask]:
    """Return a sequence in which the k-th most popular model has weight 1 / k ** exponent.

    The popularity of each model is drawn too, so that an order by name is neither the best nor the worst.
    """
    chance = random.Random(seed)
    ranked = chance.sample(list(models), len(models))
    weights = [1 / rank**exponent for rank in range(1, len(ranked) + 1)]
    names = chance.choices(ranked, weights, k=requests)
    return [Ask(number, name, f"({number}) {chance.choice(_QUESTIONS)}") for number, name in enumerate(names)]


def loads_one_by_one(trace: Sequence[Ask], room: int, *, foresight: bool) -> int:
    """Return the loads of the sequence without concurrency, by least recent use or by Belady's rule."""
    held: dict[str, int] = {}  # when each model was last used
    loads = 0
    for place, ask in enumerate(trace):
        if ask.model not in held:
            loads += 1
            if len(held) == room:
                coming = [later.model for later in trace[place:]]
                if foresight:
                    victim = max(held, key=lambda name: coming.index(name) if name in coming else len(coming))
                else:
                    victim = min(held, key=held.__getitem__)
                del held[victim]
        held[ask.model] = place
    return loads


def run_clients(
    trace: Sequence[Ask], clients: int, asker: Asker, clock: Callable[[], float], told: Callable[[int], None]
) -> list[Answered]:
    """Run a closed loop of clients through the sequence: each takes the next request once it has its answer."""
    answers: list[Answered] = []
    lock = threading.Lock()
    remaining = iter(trace)

    def client() -> None:
        while True:
            with lock:
                ask = next(remaining, None)
            if ask is None:
                return
            answered = _ask(ask, asker, clock)
            with lock:
                answers.append(answered)
                told(len(answers))

    threads = [threading.Thread(target=client, name=f"client {n + 1}", daemon=True) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():  # so that Ctrl-C is handled
            thread.join(0.5)
    return sorted(answers, key=lambda one: one.ask.number)


def _ask(ask: Ask, asker: Asker, clock: Callable[[], float]) -> Answered:
    begun_at = clock()
    try:
        granted_at = asker(ask)
    except Killed as error:
        return Answered(ask, begun_at, None, clock(), str(error), True)
    except Exception as error:  # the race goes on whatever a contestant raises
        return Answered(ask, begun_at, None, clock(), f"{type(error).__name__}: {error}")
    return Answered(ask, begun_at, granted_at, clock())


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value below which so many of a hundred lie, interpolated between two values."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def figures(answers: Sequence[Answered], loads: int, seconds: float) -> dict[str, object]:
    """Return the figures of one run; the times are those of requests that were answered."""
    took = [one.took_s for one in answers if not one.error]
    waits = [one.granted_at - one.begun_at for one in answers if one.granted_at is not None]
    errors = [one for one in answers if one.error]
    found: dict[str, object] = {
        "total_s": round(seconds, 3),
        "loads": loads,
        "requests": len(answers),
        "errors": len(errors),
        "killed": sum(one.killed for one in errors),
        "error_texts": sorted({one.error[:200] for one in errors})[:MOST_ERRORS_SHOWN],
    }
    for percent in (50, 95, 99):
        found[f"p{percent}_s"] = round(percentile(took, percent), 4)
    found["max_s"] = round(max(took, default=0.0), 4)
    if waits:
        found["wait_p50_s"] = round(percentile(waits, 50), 4)
        found["wait_p95_s"] = round(percentile(waits, 95), 4)
        found["answer_mean_s"] = round(statistics.fmean(took) - statistics.fmean(waits), 4)
    return found


def clock() -> float:
    """Return seconds that never go back."""
    return time.perf_counter()
