"""Traffic like that of public traces, drawn from a seed, and a user's own traffic, read from a file.

Two kinds. `steady` is many clients of production models as ServeGen measured them (422 of them): popularity by Zipf's
law, a client active a part of the time only, gaps from a renewal process whose coefficient of variation is lognormal
(median 1.2, 90th percentile 5; three in four Gamma, the others Weibull), the rate swinging with the day, and groups of
models that are used together. `agents` is sessions of coding agents: about 4 turns of about 8 calls each that alternate
between one to three models.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

GB = 10**9
HOUR_S = 3600.0

MODELS = 24
SMALLEST_BYTES, LARGEST_BYTES = 0.4 * GB, 22.5 * GB
STORAGE_BYTES_S = 2.0 * GB  # how fast a model is read
START_S = 1.0  # what a load takes beside reading
TRACE_S = 24 * HOUR_S  # a day
REQUESTS = 8000  # of one trace, on average

_ON_S = 1200.0  # how long a client is active at a time, on average
_WEIBULL = 0.23  # of the clients: the gaps of the others are Gamma
_CV_MEDIAN, _CV_P90, _CV_MOST = 1.2, 5.0, 10.0
_P90 = 1.2816  # of the standard normal distribution
_COMPANIONS = 6  # models that are mostly used a moment after another one
_TURNS, _CALLS = 3.95, 7.83  # of a session, and of a turn
_CALL_S, _THINK_S = 6.0, 75.0  # medians of the gaps between two calls, and between two turns


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a trace."""

    at: float  # seconds from the begin of the trace
    model: str
    hold_s: float


@dataclass(frozen=True, slots=True)
class Trace:
    """Models with their bytes and load times, and the requests for them by time."""

    name: str
    bytes: Mapping[str, int]
    load_s: Mapping[str, float]
    asks: tuple[Ask, ...]  # by time


def draw_trace(kind: str, seed: int) -> Trace:
    """Return the trace of a seed; `kind` is one of `KINDS`."""
    draw = Random(f"{kind} {seed}")
    sizes, loads = {}, {}
    parts = iter(draw.sample(range(MODELS), MODELS))  # of the range of sizes, one part for each model
    for number in draw.sample(range(MODELS), MODELS):  # a name has no relation to a model's popularity
        size = SMALLEST_BYTES * (LARGEST_BYTES / SMALLEST_BYTES) ** ((next(parts) + draw.random()) / MODELS)
        name = f"model-{number:02}"
        sizes[name], loads[name] = int(size), START_S + size / STORAGE_BYTES_S
    names = list(sizes)  # the most popular first
    zipf = draw.uniform(0.9, 1.5)
    weights = [1 / (place + 1) ** zipf for place in range(MODELS)]
    asks = sorted(KINDS[kind](draw, names, weights), key=lambda ask: (ask.at, ask.model))
    return Trace(f"{kind} {seed}", sizes, loads, tuple(asks))


# -- production models ------------------------------------------------------------------------------------------------


def _steady(draw: Random, names: list[str], weights: list[float]) -> Iterator[Ask]:
    day = _day(draw)
    leaders = draw.sample(names[: MODELS // 2], _COMPANIONS)
    companions = dict(zip(draw.sample(names[MODELS // 2 :], _COMPANIONS), leaders, strict=True))
    own = {name: weight for name, weight in zip(names, weights, strict=True) if name not in companions}
    scale = REQUESTS / (sum(own.values()) + 0.5 * sum(own[leader] for leader in leaders))
    for name, weight in own.items():
        followers = [follower for follower, leader in companions.items() if leader == name]
        for at in _client(draw, weight * scale):
            asked = day(at)
            yield Ask(asked, name, draw.uniform(0.3, 1.5))
            for follower in followers:
                if draw.random() < 0.5:
                    yield Ask(asked + draw.expovariate(1 / 3.0), follower, draw.uniform(0.1, 0.5))


def _client(draw: Random, count: float) -> Iterator[float]:
    """Yield the times of a client's requests, about `count` of them: in spells, with gaps of its own distribution."""
    active = draw.uniform(0.1, 0.4)
    gap_s = TRACE_S * active / count
    spread = math.log(_CV_P90 / _CV_MEDIAN) / _P90
    variation = min(_CV_MOST, draw.lognormvariate(math.log(_CV_MEDIAN), spread))
    gap = _gaps(draw, gap_s, variation)
    on_s = max(_ON_S, 2 * gap_s)
    at, ends = -draw.random() * on_s / active, -math.inf
    while at < TRACE_S:
        if at >= ends:
            at = max(at, ends) + draw.expovariate(active / (on_s * (1 - active)))
            ends = at + draw.expovariate(1 / on_s)
        if 0 <= at < TRACE_S:
            yield at
        at += gap()


def _gaps(draw: Random, mean_s: float, variation: float) -> Callable[[], float]:
    """Return a function that draws the gaps of a renewal process with this mean and coefficient of variation."""
    if draw.random() < _WEIBULL:
        shape = _weibull_shape(variation)
        scale_s = mean_s / math.gamma(1 + 1 / shape)
        return lambda: draw.weibullvariate(scale_s, shape)
    shape = 1 / variation**2
    return lambda: draw.gammavariate(shape, mean_s / shape)


def _weibull_shape(variation: float) -> float:
    """Return the shape of the Weibull distribution with a coefficient of variation, by bisection."""
    low, high = 0.2, 10.0
    for _ in range(50):
        shape = (low + high) / 2
        ratio = math.gamma(1 + 2 / shape) / math.gamma(1 + 1 / shape) ** 2 - 1
        low, high = (shape, high) if ratio > variation**2 else (low, shape)
    return low


def _day(draw: Random) -> Callable[[float], float]:
    """Return a function that stretches time so that the rate swings, up to 1.3 to 2.2 times the average."""
    swing = draw.uniform(0.3, 0.95)
    phase = draw.random()
    turn_s = TRACE_S
    offset = swing * math.sin(2 * math.pi * phase) * turn_s / (2 * math.pi)

    def stretched(at: float) -> float:
        return at + swing * math.sin(2 * math.pi * (at / turn_s + phase)) * turn_s / (2 * math.pi) - offset

    return stretched


# -- agents -----------------------------------------------------------------------------------------------------------


def _agents(draw: Random, names: list[str], weights: list[float]) -> Iterator[Ask]:
    day = _day(draw)
    for _ in range(round(REQUESTS / (_TURNS * _CALLS))):
        team: list[str] = []
        for _ in range(draw.choice((1, 2, 2, 3))):
            others = [name for name in names if name not in team]
            team += draw.choices(others, [weights[names.index(name)] for name in others])
        yield from _session(draw, day(draw.random() * TRACE_S), team)


def _session(draw: Random, at: float, team: list[str]) -> Iterator[Ask]:
    for _ in range(_geometric(draw, _TURNS)):
        for _ in range(_geometric(draw, _CALLS)):
            model = team[0] if draw.random() < 0.6 else draw.choice(team)
            yield Ask(at, model, draw.uniform(0.5, 3.0))
            at += draw.lognormvariate(math.log(_CALL_S), 0.8)
        at += draw.lognormvariate(math.log(_THINK_S), 1.0)


def _geometric(draw: Random, mean: float) -> int:
    return 1 + int(math.log(1 - draw.random()) / math.log(1 - 1 / mean))


KINDS: Mapping[str, Callable[[Random, list[str], list[float]], Iterator[Ask]]] = {
    "steady": _steady,
    "agents": _agents,
}


# -- a user's own trace -----------------------------------------------------------------------------------------------


def read_trace(path: Path) -> Trace:
    """Return the trace in a CSV file with a line of names: `at_s`, `model`, `bytes`, and optionally `load_s`, `hold_s`.

    `at_s` is in seconds from any beginning. A model takes the most bytes and the longest load that are given for it; a
    load without a time takes as long as one of a generated trace. Raises ValueError where a line is wrong.
    """
    sizes: dict[str, int] = {}
    loads: dict[str, float] = {}
    asks = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, line in enumerate(csv.DictReader(file), 2):
            try:
                model, size = line["model"], int(float(line["bytes"]))
                load_s = float(line.get("load_s") or START_S + size / STORAGE_BYTES_S)
                ask = Ask(float(line["at_s"]), model, float(line.get("hold_s") or 1.0))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: line {number}: {error!r}") from error
            if not (math.isfinite(ask.at) and ask.hold_s >= 0 and size > 0 and load_s > 0):
                raise ValueError(f"{path}: line {number}: a figure that cannot be")
            sizes[model] = max(size, sizes.get(model, 0))
            loads[model] = max(load_s, loads.get(model, 0.0))
            asks.append(ask)
    if not asks:
        raise ValueError(f"{path}: it is empty")
    begun = min(ask.at for ask in asks)
    shifted = sorted((Ask(ask.at - begun, ask.model, ask.hold_s) for ask in asks), key=lambda ask: (ask.at, ask.model))
    return Trace(path.name, sizes, loads, tuple(shifted))
