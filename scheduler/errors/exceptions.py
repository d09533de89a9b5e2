"""The errors that users see: every error carries its figures as fields and says what to do about it.

All of them are `SchedulerError`. `status` is the HTTP status a server would answer with: 400 for an option or input
that the engine does not take, 404 for a missing file, 499 for a cancelled request, 502 for a runner that is gone, 503
for what may be had later (a full queue, a failed load, a close), 504 for a time limit that passed, 500 otherwise.
Constructors take exactly the fields, by position or by name; every error survives pickling.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from scheduler.errors.formatting import format_bytes, format_duration, shown
from scheduler.errors.former_names import warn_of_former_name

_LONGEST_VALUE = 200  # characters of a passed value that are shown
OUT_OF_FILES = "this program has too many open files; close some, or raise its limit (ulimit -n)"


def is_out_of_files(error: BaseException | None) -> bool:
    """Return whether an operation failed because this program, or the machine, has too many open files."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _shown(value: object) -> str:
    """Return a passed value as a text of bounded length."""
    try:
        text = repr(value)
    except Exception:  # of an object of the user's own, or of a number with thousands of digits
        text = f"this {type(value).__name__}"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


@dataclass(eq=False)
class SchedulerError(Exception):
    """The base of all errors that this library raises for its users.

    `status` is the HTTP status a server would answer with.
    """

    status: ClassVar[int] = 500

    def __str__(self) -> str:
        return shown(self._words())

    def _words(self) -> str:
        """Return the message; a name or a reason in it may hold any characters."""
        return super().__str__()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by fields, since `args` holds only the arguments that were passed by position."""
        values = tuple(getattr(self, each.name) for each in fields(self) if each.init)
        notes = getattr(self, "__notes__", None)
        return (type(self), values) if notes is None else (type(self), values, {"__notes__": notes})


@dataclass(eq=False)
class QueueFull(SchedulerError):
    """As many requests wait as may wait; this request was refused at once and nothing was changed."""

    limit: int
    retry_after_s: float
    status: ClassVar[int] = 503

    def _words(self) -> str:
        return (
            f"{self.limit} requests are waiting already, which is the limit: "
            f"try again in {format_duration(self.retry_after_s)}, or raise max_queue"
        )


@dataclass(eq=False, init=False)
class ModelNotFound(SchedulerError):
    """There is no such model: no file at this path, or no model of this name.

    For a name, `looked_in` says where it was looked for, and `suggestions` gives names that there are, the likeliest
    first. `closest` is the former name of `suggestions`, for which it is still taken, with a warning.
    """

    path: str
    looked_in: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()
    status: ClassVar[int] = 404

    def __init__(
        self,
        path: str,
        looked_in: tuple[str, ...] = (),
        suggestions: tuple[str, ...] = (),
        *,
        closest: tuple[str, ...] | None = None,
    ) -> None:
        if closest is not None:
            warn_of_former_name("ModelNotFound(closest=…)", "ModelNotFound(suggestions=…)")
        self.path, self.looked_in, self.suggestions = path, looked_in, suggestions or closest or ()

    @property
    def closest(self) -> tuple[str, ...]:
        """The former name of `suggestions`."""
        warn_of_former_name("ModelNotFound.closest", "ModelNotFound.suggestions")
        return self.suggestions

    def _words(self) -> str:
        if not self.looked_in and not self.suggestions:
            return f"there is no model {self.path!r}: check the name, and that the file exists and can be read"
        where = f" in {'; '.join(self.looked_in)}" if self.looked_in else ""
        names = " or ".join(map(repr, self.suggestions))
        advice = f"did you mean {names}?" if names else "check the name; `loadmaster models` lists what there is"
        return f"there is no model {self.path!r}{where}: {advice}"


@dataclass(eq=False)
class InvalidModel(SchedulerError):
    """The model's file cannot be loaded; `offset` is the place of the fault in the file, in bytes, if that is known."""

    path: str
    reason: str
    offset: int | None = None

    def _words(self) -> str:
        where = "" if self.offset is None else f" at byte {self.offset}; download or convert the file again"
        return f"{self.path!r} cannot be loaded: {self.reason}{where}"


@dataclass(eq=False)
class DoesNotFit(SchedulerError):
    """The model can never fit: the request was refused at once, and no runner was evicted for it.

    `free_bytes` gives, for each device, the memory that would be free if everything that may be evicted were gone;
    `advice` says what helps, where anything does.
    """

    model: str
    needed_bytes: int
    free_bytes: Mapping[str, int]
    reason: str
    advice: str = ""

    def __post_init__(self) -> None:
        self.free_bytes = dict(self.free_bytes)

    def _words(self) -> str:
        devices = ", ".join(f"{format_bytes(free)} on {device}" for device, free in self.free_bytes.items())
        advice = f"; {self.advice}" if self.advice else ""
        need = f"needs {format_bytes(self.needed_bytes)} and at most {devices or 'nothing'} can be made free"
        return f"{self.model!r} {need if self.needed_bytes else 'has no place'}: {self.reason}{advice}"


@dataclass(eq=False)
class LoadFailed(SchedulerError):
    """The runner did not load, or crashed again.

    `retry_after_s` is the back-off, None: a request may try again at once.

    `served` says that the runner had loaded before it failed.
    """

    model: str
    reason: str
    retry_after_s: float | None = None
    out_of_memory: bool = False
    served: bool = False
    status: ClassVar[int] = 503

    def _words(self) -> str:
        cause = "it ran out of memory: " if self.out_of_memory else ""
        advice = "try again" if self.retry_after_s is None else f"try again in {format_duration(self.retry_after_s)}"
        smaller = ", or ask for a smaller context" if self.out_of_memory else ""
        failed = f"{self.model!r} failed again after it was loaded" if self.served else f"loading {self.model!r} failed"
        return f"{failed}: {cause}{self.reason}; {advice}{smaller}"


@dataclass(eq=False)
class LoadTimeout(LoadFailed):
    """The load made no progress for too long and was stopped, `waited_s` seconds after it began."""

    reason: str = field(init=False, default="it made no progress")
    retry_after_s: float | None = field(init=False, default=None)
    out_of_memory: bool = field(init=False, default=False)
    served: bool = field(init=False, default=False)
    waited_s: float

    def _words(self) -> str:
        return (
            f"loading {self.model!r} was stopped after {format_duration(self.waited_s)} because it made no progress: "
            "try again, or raise load_timeout"
        )


@dataclass(eq=False)
class RunnerCrashed(SchedulerError):
    """The runner's process ended, or stopped answering, while it was leased; the lease is void.

    `closed` says that the runner ended with the scheduler, which grants no more leases.
    """

    model: str
    runner: int
    reason: str
    closed: bool = False
    status: ClassVar[int] = 502

    def _words(self) -> str:
        advice = "" if self.closed else "; acquire the model again"
        return f"runner {self.runner} of {self.model!r} is gone: {self.reason}{advice}"


@dataclass(eq=False)
class LeaseReleased(SchedulerError):
    """The lease was released; its runner may serve other leases or be gone."""

    model: str

    def _words(self) -> str:
        return f"the lease on {self.model!r} was released: acquire the model again"


@dataclass(eq=False)
class SchedulerBroken(SchedulerError):
    """A decision raised an exception, which is a bug of this library: the scheduler decides nothing after that."""

    cause: str

    def _words(self) -> str:
        return f"the scheduler has stopped after an internal error ({self.cause}): please report it, and make a new one"


@dataclass(eq=False)
class RequestCancelled(SchedulerError):
    """The request was cancelled while it waited; everything that it held was released."""

    model: str
    status: ClassVar[int] = 499

    def _words(self) -> str:
        return f"the request for {self.model!r} was cancelled: acquire it again if it is still needed"


@dataclass(eq=False)
class AcquireTimeout(SchedulerError, TimeoutError):
    """The caller's timeout passed before a runner was granted; the request has left the queue."""

    model: str
    timeout_s: float
    waiting_for: str
    status: ClassVar[int] = 504

    def _words(self) -> str:
        return (
            f"{self.model!r} was not granted within {format_duration(self.timeout_s)}, waiting for {self.waiting_for}: "
            "wait longer, or release leases sooner"
        )


@dataclass(eq=False)
class TimeoutTooShort(AcquireTimeout):
    """The caller's timeout is shorter than what the request must wait: refused at once, and no runner was evicted.

    The request would have waited for `least_s` seconds at least: the quickest load that was measured of this file, with
    these options, took `load_s` (0: not known), and the load that the request would wait for began `begun_s` seconds
    ago (None: it has not begun). Before the load, for `resident_s`, runners that leave no room keep the setting
    `min_residency`.
    """

    waiting_for: str = field(init=False, default="its model to load")
    least_s: float
    load_s: float
    begun_s: float | None = None
    resident_s: float = 0.0
    status: ClassVar[int] = 503

    def _words(self) -> str:
        if self.resident_s:
            return (
                f"{self.model!r} cannot be granted within {format_duration(self.timeout_s)}: other models keep their "
                f"place for {format_duration(self.resident_s)} (the setting min_residency); wait for more than "
                f"{format_duration(self.least_s)}"
            )
        begun = "" if self.begun_s is None else f", {format_duration(self.begun_s)} of which have passed"
        return (
            f"{self.model!r} cannot be granted within {format_duration(self.timeout_s)}: its quickest load took "
            f"{format_duration(self.load_s)}{begun}; wait for more than {format_duration(self.least_s)}, or preload it"
        )


@dataclass(eq=False)
class AnswerTimeout(SchedulerError, TimeoutError):
    """An answer took longer than its caller allows; the runner has stopped its work on it and goes on serving.

    `whole` says that the time for the whole answer passed, `total_timeout`; else the runner was silent for `limit_s`.
    """

    limit_s: float
    whole: bool = False
    status: ClassVar[int] = 504

    def _words(self) -> str:
        limit = format_duration(self.limit_s)
        if self.whole:
            return f"the answer was not complete within {limit}: raise total_timeout, or ask for less"
        return f"the runner was silent for {limit}: raise timeout"


@dataclass(eq=False)
class WouldDeadlock(SchedulerError):
    """The request would have waited for its own caller: refused at once, and no runner was evicted.

    There is no room for the model beside those of `holders`, on which the caller keeps leases while it waits: each was
    entered in a `with` block by the very thread, or asyncio task, that asks.
    """

    model: str
    holders: tuple[str, ...]

    def _words(self) -> str:
        names = " and ".join(map(repr, self.holders))
        return (
            f"{self.model!r} would never be granted: there is no room for it beside {names}, on which this thread or "
            "task keeps a lease while it waits; release that lease first, or acquire all of them with acquire_all"
        )


def not_beside(refused: WouldDeadlock) -> DoesNotFit:
    """Return the error of models that were asked for together and do not fit beside each other."""
    names = " and ".join(map(repr, refused.holders))
    reason = f"there is no room for it beside {names}, with which it was asked for"
    return DoesNotFit(refused.model, 0, {}, reason, "ask for fewer models at once")


@dataclass(eq=False)
class SchedulerClosed(SchedulerError):
    """The scheduler is closed, or closing: it takes no requests, and the requests that waited end with this error."""

    status: ClassVar[int] = 503

    def _words(self) -> str:
        return "the scheduler is closed: make a new one"


@dataclass(eq=False)
class SchedulerForked(SchedulerError):
    """The process was forked: its copy of a scheduler is not usable, and the parent's scheduler is not affected."""

    def _words(self) -> str:
        return "this scheduler belongs to the process that was forked: make a new one here"


@dataclass(eq=False)
class UnsupportedOption(SchedulerError, ValueError):
    """The engine does not support this value of an option."""

    name: str
    value: object
    reason: str
    status: ClassVar[int] = 400

    def _words(self) -> str:
        return f"option {self.name}={_shown(self.value)} is not supported: {self.reason}"


@dataclass(eq=False)
class InvalidSettings(SchedulerError, ValueError):
    """A setting or argument has a value that is not allowed; `allowed` says which values are."""

    name: str
    value: object
    allowed: str
    status: ClassVar[int] = 400

    def _words(self) -> str:
        return f"{self.name} cannot be {_shown(self.value)}: it must be {self.allowed}"


@dataclass(eq=False)
class EngineMissing(SchedulerError):
    """The engine is not installed; `how` is the command or step that installs it."""

    engine: str
    how: str

    def _words(self) -> str:
        return f"the engine {self.engine!r} is not installed: {self.how}"


@dataclass(eq=False)
class EngineUnusable(EngineMissing):
    """The engine that was named is there, and cannot be used; `how` says why, and what to do."""

    def _words(self) -> str:
        return f"the engine {self.engine!r} cannot be used: {self.how}"


@dataclass(eq=False)
class EngineError(SchedulerError):
    """The runner answered a request with an error; it goes on serving.

    `status_code` is the HTTP status of the answer (500 if the error came inside a stream), `message` the engine's
    words.
    """

    status_code: int
    message: str

    def __post_init__(self) -> None:
        if self.status_code in (400, 413, 422, 501):  # wrong input, or (501) a use that this runner was not loaded for
            self.status = 400  # type: ignore[misc]  # set on the instance: it depends on the answer

    def _words(self) -> str:
        return f"the engine answered with status {self.status_code}: {self.message}"


@dataclass(eq=False)
class ObjectError(SchedulerError):
    """An object in a process of its own raised an exception, in a call or in its load; it goes on serving after a call.

    `kind` is the name of the exception's class, `message` its words, `trace` the traceback as text.
    """

    model: str
    kind: str
    message: str
    trace: str = field(default="", repr=False)

    def _words(self) -> str:
        return f"{self.model!r} raised {self.kind}: {self.message}"


__all__ = [
    "AcquireTimeout",
    "AnswerTimeout",
    "DoesNotFit",
    "EngineError",
    "EngineMissing",
    "EngineUnusable",
    "InvalidModel",
    "InvalidSettings",
    "LeaseReleased",
    "LoadFailed",
    "LoadTimeout",
    "ModelNotFound",
    "ObjectError",
    "QueueFull",
    "RequestCancelled",
    "RunnerCrashed",
    "SchedulerBroken",
    "SchedulerClosed",
    "SchedulerError",
    "SchedulerForked",
    "TimeoutTooShort",
    "UnsupportedOption",
    "WouldDeadlock",
    "format_bytes",
    "format_duration",
]
