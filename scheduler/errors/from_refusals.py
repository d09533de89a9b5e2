"""The user's errors for the core's refusals, and the words for decisions, which may be refusals."""

from __future__ import annotations

from typing import assert_never

from fsm.messages.decision_log import Decision
from fsm.messages.reasons import NoAnswer, ProcessExited
from fsm.messages.refusals import (
    Cancelled,
    DeadlineInfeasible,
    DoesNotFitRefusal,
    InvalidModelRefusal,
    LoadFailedRefusal,
    LoadTimeoutRefusal,
    ModelNotFoundRefusal,
    QueueFullRefusal,
    Refusal,
    SchedulerClosed,
    TimedOut,
    UnsupportedOption,
    WouldDeadlockRefusal,
)
from scheduler.errors import exceptions, wording


def error_of(refusal: Refusal, name: wording.Name) -> exceptions.SchedulerError:
    """Return the exception that tells the user what a refusal says."""
    match refusal:
        case QueueFullRefusal(limit, retry_after_s):
            return exceptions.QueueFull(limit, retry_after_s)
        case ModelNotFoundRefusal(path):
            return exceptions.ModelNotFound(path)
        case InvalidModelRefusal(path, reason, offset):
            return exceptions.InvalidModel(path, reason, offset)
        case DoesNotFitRefusal(model, needed, available, reason):
            total = sum(count for _, count in needed)
            advice = wording.remedy(reason, f"{wording.SMALLER}, or raise the limit")
            if advice and not model:  # a reservation: no smaller model would help
                advice = "reserve less"
            words = wording.infeasible_reason(reason, name)
            return exceptions.DoesNotFit(name(model), total, dict(available), words, advice)
        case UnsupportedOption(_, option, value, reason):
            return exceptions.UnsupportedOption(option, value, wording.UNSUPPORTED[reason])
        case LoadFailedRefusal(model, reason, retry_after_s, out_of_memory):
            served = isinstance(reason, NoAnswer) or (isinstance(reason, ProcessExited) and reason.loaded)
            words = wording.failure_reason(reason)
            return exceptions.LoadFailed(name(model), words, retry_after_s or None, out_of_memory, served)
        case LoadTimeoutRefusal(model, stalled_s):
            return exceptions.LoadTimeout(name(model), stalled_s)
        case TimedOut(model, timeout_s, waiting_for):
            return exceptions.AcquireTimeout(name(model), timeout_s, wording.wait_reason(waiting_for, name))
        case DeadlineInfeasible(model, timeout_s, least_s, load_s, begun_s, resident_s):
            return exceptions.TimeoutTooShort(name(model), timeout_s, least_s, load_s, begun_s, resident_s)
        case WouldDeadlockRefusal(model, holders):
            return exceptions.WouldDeadlock(name(model), tuple(map(name, holders)))
        case Cancelled(model):
            return exceptions.RequestCancelled(name(model))
        case SchedulerClosed():
            return exceptions.SchedulerClosed()
        case _:
            assert_never(refusal)


def decision_words(entry: Decision, name: wording.Name) -> str:
    """Return the reason of a decision in words."""
    if entry.why is None:
        return wording.victims(entry.runners, name)
    if isinstance(entry.why, Refusal):
        return str(error_of(entry.why, name))
    return wording.decision_reason(entry.why, name)


def decision_line(entry: Decision, name: wording.Name) -> str:
    """Return a decision, with its reason, as a sentence of one line that is safe to show."""
    return wording.decision_line(entry, name, decision_words(entry, name))
