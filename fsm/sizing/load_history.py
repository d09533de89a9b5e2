"""The load history of a model, in this process or before: the bytes its runners took, and the seconds of loads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from fsm.domain.devices import Amounts
from fsm.domain.options import Options

LAST_LOADS = 8  # loads that are kept of each split: enough for a median that one slow load does not move
MOST_KINDS = 256  # kinds of one model's runners, by their options, of which measurements are kept

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class MeasuredBytes:
    """The bytes that runners take with these explicit options and this split."""

    options: Options
    split: Amounts  # layers by GPU
    bytes: Amounts  # by device: the most that is expected of the next runner


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """How long loads with this split took."""

    split: Amounts
    seconds: tuple[float, ...]  # of the last few loads, the newest last


@dataclass(frozen=True, slots=True)
class LoadHistory:
    """Everything that a store knows of one model's file, as of an inspection."""

    sizes: tuple[MeasuredBytes, ...] = ()
    loads: tuple[LoadTimes, ...] = ()


NOTHING = LoadHistory()


def note_bounded(known: dict[Key, Value], key: Key, value: Value) -> None:
    """Keep a value; beyond `MOST_KINDS` keys the oldest is dropped, since a program may ask for ever new options."""
    known[key] = value
    if len(known) > MOST_KINDS:
        del known[next(iter(known))]


def with_load(seconds: tuple[float, ...], load_s: float) -> tuple[float, ...]:
    """Return the seconds of the last few loads, with one more load."""
    return (*seconds, load_s)[-LAST_LOADS:]


def usual_load_s(loads: Iterable[tuple[float, ...]]) -> float | None:
    """Return the median seconds of loads, which one load from a cold disk, or beside others, does not move."""
    known = sorted(load_s for seconds in loads for load_s in seconds)
    return (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2 if known else None
