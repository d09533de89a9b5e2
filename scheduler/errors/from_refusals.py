"""From the core's refusals to the user's errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol, assert_never

from fsm.machine.request import ModelId
from fsm.messages.refusals import (
    Cancelled,
    Closed,
    DoesNotFit,
    InvalidModel,
    LoadFailed,
    LoadTimeout,
    ModelNotFound,
    NotInTime,
    QueueFull,
    Refusal,
    TimedOut,
    Unsupported,
)
from scheduler.errors import exceptions


class Names(Protocol):
    """Who knows the models' names."""

    def name(self, id: ModelId) -> str:
        """Return the name of an identity."""

    def named(self, text: str) -> str:
        """Return a text with names in place of identities."""


def renamed(text: str, names: Mapping[ModelId, str]) -> str:
    """Return a text with names in place of identities, each replaced once: a name may be another one's identity."""
    found = sorted(filter(None, (id for id in names if id in text)), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, found)), lambda id: names[ModelId(id[0])], text) if found else text


def error_of(refusal: Refusal, names: Names) -> exceptions.SchedulerError:
    """Return the exception that tells the user what a refusal says."""
    name = names.name
    match refusal:
        case QueueFull(limit, retry_after_s):
            return exceptions.QueueFull(limit, retry_after_s)
        case ModelNotFound(path):
            return exceptions.ModelNotFound(path)
        case InvalidModel(path, reason, offset):
            return exceptions.InvalidModel(path, reason, offset)
        case DoesNotFit(model, needed, available, reason):
            total = sum(count for _, count in needed)
            advice = "" if model or ";" in reason else "; reserve less"  # no model of it could be smaller
            return exceptions.DoesNotFit(name(model), total, dict(available), names.named(reason) + advice)
        case Unsupported(_, option, value, reason):
            return exceptions.UnsupportedOption(option, value, reason)
        case LoadFailed(model, reason, retry_after_s, out_of_memory):
            return exceptions.LoadFailed(name(model), reason, retry_after_s or None, out_of_memory)
        case LoadTimeout(model, stalled_s):
            return exceptions.LoadTimeout(name(model), stalled_s)
        case TimedOut(model, timeout_s, waiting_for):
            return exceptions.AcquireTimeout(name(model), timeout_s, names.named(waiting_for))
        case NotInTime(model, timeout_s, least_s, load_s, begun_s):
            return exceptions.TimeoutTooShort(name(model), timeout_s, least_s, load_s, begun_s)
        case Cancelled(model):
            return exceptions.RequestCancelled(name(model))
        case Closed():
            return exceptions.SchedulerClosed()
        case _:
            assert_never(refusal)
