"""What is known of earlier lives of a model, in this process or before it: bytes taken, and seconds loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from fsm.domain.devices import Amounts
from fsm.domain.model_info import Options

LAST_LOADS = 8  # that are kept of each split: enough for a median that one slow load does not move
MOST_KINDS = 256  # of one model's runners, told apart by their options, of which measurements are kept

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class MeasuredBytes:
    """What runners take that are loaded with these explicit options and split."""

    options: Options
    split: Amounts  # layers by GPU
    bytes: Amounts  # by device: the most that is to be expected of the next one


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """How long loads with this split took."""

    split: Amounts
    seconds: tuple[float, ...]  # of the last few, the newest last


@dataclass(frozen=True, slots=True)
class LoadHistory:
    """Everything that a store knows of one model's file, as of an inspection."""

    sizes: tuple[MeasuredBytes, ...] = ()
    loads: tuple[LoadTimes, ...] = ()


NOTHING = LoadHistory()


def note_bounded(known: dict[Key, Value], key: Key, value: Value) -> None:
    """Note a value; of very many keys the oldest goes, so that a program that asks for ever new options has an end."""
    known[key] = value
    if len(known) > MOST_KINDS:
        del known[next(iter(known))]


def with_load(seconds: tuple[float, ...], load_s: float) -> tuple[float, ...]:
    """Return the last few loads, one more among them."""
    return (*seconds, load_s)[-LAST_LOADS:]


def usual_load_s(loads: Iterable[tuple[float, ...]]) -> float | None:
    """Return what is to be expected: the median, which one load from a cold disk, or beside others, does not move."""
    known = sorted(load_s for seconds in loads for load_s in seconds)
    return (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2 if known else None
