"""What a client is told of an error: one status and one code for each kind, in the words of each protocol."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scheduler.errors import exceptions
from scheduler.errors.exceptions import (
    AcquireTimeout,
    AnswerTimeout,
    DoesNotFit,
    EngineError,
    InvalidModel,
    LeaseReleased,
    LoadFailed,
    ModelNotFound,
    QueueFull,
    RequestCancelled,
    RunnerCrashed,
    SchedulerClosed,
    SchedulerError,
    TimeoutTooShort,
)
from scheduler.errors.kinds import snake_case

ERROR_HEADER = "x-loadmaster-error"  # with the code, which not every protocol has in its errors
_BY_ANSWER = (EngineError,)  # kinds whose status depends on what the engine has answered
# Where the status that an error has as an exception is not the one that a client is answered with.
_STATUS: Mapping[type[SchedulerError], int] = {DoesNotFit: 507, InvalidModel: 400}
# A request that is made again as it is may be answered another time.
_MAY_HELP = (QueueFull, LoadFailed, RunnerCrashed, SchedulerClosed, AcquireTimeout, AnswerTimeout, RequestCancelled)
# Before the name of a file: a client is not told of this machine's folders, but of the server's own paths.
_FOLDERS = re.compile(r"(?<![\w:/.])/(?!(?:v1|api)/)(?:[^/\s'\";:,]+/)+")
_RETRY_S = 5.0  # of a server that is about to close: another may be there by then


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """What a client is told: an HTTP status, a code for programs, a message for people, and figures."""

    status: int
    code: str
    message: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    retry_after_s: float | None = None
    may_retry: bool = False  # whether the same request may be answered another time

    def headers(self) -> dict[str, str]:
        """Return the headers that tell clients whether and when to try again.

        The clients of OpenAI and Anthropic repeat requests after an error of the server unless they are told not to.
        """
        if not self.may_retry:
            return {"x-should-retry": "false"}
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


def answer_to(error: SchedulerError) -> ErrorAnswer:
    """Return what the client is told of an error."""
    status = _STATUS.get(type(error), error.status)
    may_retry = _may_retry(type(error))
    retry_after_s = getattr(error, "retry_after_s", None)
    if isinstance(error, SchedulerClosed) or (isinstance(error, RunnerCrashed) and error.closed):
        status, retry_after_s = 503, _RETRY_S
    figures: dict[str, Any] = {}
    match error:
        case DoesNotFit():
            figures = {"needed_bytes": error.needed_bytes, "free_bytes": error.free_bytes, "advice": error.advice}
        case ModelNotFound():
            return ErrorAnswer(404, "model_not_found", _not_found(error), {"suggestions": list(error.suggestions)})
        case EngineError():
            return ErrorAnswer(status, "engine_error", error.message, may_retry=status >= 500)
        case QueueFull():
            figures = {"limit": error.limit}
    message = _FOLDERS.sub("", _words_of(error))
    return ErrorAnswer(status, code_of(type(error)), message, figures, retry_after_s, may_retry)


def _words_of(error: SchedulerError) -> str:
    """Return the message, with advice for a client in place of advice for the program that has the scheduler."""
    match error:
        case SchedulerClosed():
            return "the server is ending: ask again in a moment"
        case RunnerCrashed(closed=False):
            return f"runner {error.runner} of {error.model!r} is gone: {error.reason}; ask again"
        case LeaseReleased():
            return f"the lease on {error.model!r} was released: ask again"
        case _:
            return str(error)


def _may_retry(kind: type[SchedulerError]) -> bool:
    return issubclass(kind, _MAY_HELP) and not issubclass(kind, TimeoutTooShort)


def error_table() -> str:
    """Return the errors as a Markdown table: name, status, code, and whether a retry may help."""
    lines = ["| error | status | code | a retry may help |", "| --- | --- | --- | --- |"]
    for name in exceptions.__all__:
        kind = getattr(exceptions, name)
        if not isinstance(kind, type) or not issubclass(kind, SchedulerError) or kind is SchedulerError:
            continue
        status = "400 or 500, by the engine's" if kind in _BY_ANSWER else str(_STATUS.get(kind, kind.status))
        retry = "after a 500" if kind in _BY_ANSWER else "yes" if _may_retry(kind) else "no"
        lines.append(f"| `{name}` | {status} | `{code_of(kind)}` | {retry} |")
    return "\n".join(lines) + "\n"


def code_of(kind: type[SchedulerError]) -> str:
    """Return the code of a kind of error: `does_not_fit` for `DoesNotFit`."""
    return snake_case(kind.__name__)


def _not_found(error: ModelNotFound) -> str:
    names = " or ".join(map(repr, error.suggestions))
    return f"there is no model {error.path!r}" + (f": did you mean {names}?" if names else "")
