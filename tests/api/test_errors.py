"""Errors that users see: fields, HTTP statuses and sentences."""

from __future__ import annotations

import inspect
import pickle

import pytest

from scheduler.errors import exceptions
from scheduler.errors.exceptions import (
    AcquireTimeout,
    AnswerTimeout,
    DoesNotFit,
    EngineError,
    EngineMissing,
    EngineUnusable,
    InvalidModel,
    InvalidSettings,
    LeaseReleased,
    LoadFailed,
    LoadTimeout,
    ModelNotFound,
    ObjectError,
    QueueFull,
    RequestCancelled,
    RunnerCrashed,
    SchedulerBroken,
    SchedulerClosed,
    SchedulerError,
    SchedulerForked,
    TimeoutTooShort,
    UnsupportedOption,
    WouldDeadlock,
)
from scheduler.errors.formatting import format_bytes, format_duration

EXAMPLES: list[tuple[SchedulerError, int, tuple[str, ...]]] = [
    (QueueFull(512, retry_after_s=2.5), 503, ("512", "2.5s", "max_queue")),
    (ModelNotFound("/models/a.gguf"), 404, ("/models/a.gguf",)),
    (
        ModelNotFound("lama", ("the folder /models",), ("llama", "lamb")),
        404,
        ("'lama' in the folder /models", "'lamb'"),
    ),
    (AnswerTimeout(30.0), 504, ("30s", "silent", "timeout")),
    (AnswerTimeout(600.0, whole=True), 504, ("10m", "not complete", "total_timeout")),
    (InvalidModel("/models/a.gguf", "bad magic", offset=4), 500, ("/models/a.gguf", "bad magic", "byte 4")),
    (DoesNotFit("a", 3 << 30, {"cpu": 2 << 30}, "it is too big"), 500, ("3 GiB", "2 GiB on cpu", "it is too big")),
    (DoesNotFit("a", 0, {"cpu": 9}, "a GPU is required, and there is none"), 500, ("has no place: a GPU is required",)),
    (LoadFailed("a", "no tensors", 10.0, out_of_memory=True), 503, ("no tensors", "out of memory", "10s")),
    (LoadTimeout("a", waited_s=300.0), 503, ("5m", "load_timeout")),
    (RunnerCrashed("a", 7, "killed by signal 9"), 502, ("runner 7", "signal 9")),
    (LeaseReleased("a"), 500, ("'a'", "released", "acquire")),
    (SchedulerBroken("KeyError: 3"), 500, ("KeyError: 3", "report")),
    (RequestCancelled("a"), 499, ("cancelled",)),
    (AcquireTimeout("a", 1.5, waiting_for="memory of 'b'"), 504, ("1.5s", "memory of 'b'")),
    (TimeoutTooShort("a", 1.5, 7.0, 9.0, 2.0), 503, ("1.5s", "7s", "9s", "2s of which")),
    (TimeoutTooShort("a", 8.0, 25.0, 3.0, None, 22.0), 503, ("8s", "for 22s", "more than 25s", "min_residency")),
    (WouldDeadlock("a", ("b", "c")), 500, ("'a'", "beside 'b' and 'c'", "acquire_all")),
    (SchedulerClosed(), 503, ("closed",)),
    (SchedulerForked(), 500, ("forked", "new one")),
    (UnsupportedOption("num_parallel", 4, "embedders take 1"), 400, ("num_parallel=4", "embedders take 1")),
    (UnsupportedOption("num_ctx", 10**300, "less"), 400, ("num_ctx=1000", "0… is not supported: less")),
    (InvalidSettings("max_queue", 0, "at least 1"), 400, ("max_queue", "0", "at least 1")),
    (EngineMissing("llama", "pip install 'loadmaster[llama]'"), 500, ("llama", "pip install")),
    (EngineUnusable("/bin/llama-server", "it is too old"), 500, ("/bin/llama-server", "cannot be used", "too old")),
    (EngineError(500, "slot unavailable"), 500, ("500", "slot unavailable")),
    (ObjectError("m", "KeyError", "'part'"), 500, ("KeyError", "'part'")),
]
each_example = pytest.mark.parametrize(
    ("error", "status", "words"), EXAMPLES, ids=[type(error).__name__ for error, _, _ in EXAMPLES]
)


@each_example
def test_s34_every_kind_has_its_http_status(error: SchedulerError, status: int, words: tuple[str, ...]) -> None:
    """S34: wrong input 400, missing file 404, cancelled 499, a crash 502, what may be had later 503, a time-out 504."""
    assert error.status == status


@each_example
def test_the_sentence_names_the_numbers(error: SchedulerError, status: int, words: tuple[str, ...]) -> None:
    """The sentence of an error has the figures of its fields."""
    assert [word for word in words if word not in str(error)] == []


@each_example
def test_every_kind_survives_pickling(error: SchedulerError, status: int, words: tuple[str, ...]) -> None:
    """An error keeps its fields, text and notes when it is pickled."""
    error.add_note("seen by the child")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), repr(copy), str(copy), copy.__notes__) == (
        type(error),
        repr(error),
        str(error),
        ["seen by the child"],
    )


def test_every_kind_has_an_example() -> None:
    """Every type of error has an example here."""
    kinds = {each for _, each in inspect.getmembers(exceptions, inspect.isclass) if issubclass(each, SchedulerError)}
    assert kinds - {type(error) for error, _, _ in EXAMPLES} == {SchedulerError}


def test_every_kind_can_be_imported_by_its_public_name() -> None:
    """`__all__` names every error."""
    assert {type(error).__name__ for error, _, _ in EXAMPLES} <= set(exceptions.__all__)


def test_a_timeout_is_also_pythons_own() -> None:
    """`except TimeoutError` catches AcquireTimeout, whatever it was constructed with."""
    with pytest.raises(TimeoutError):
        raise AcquireTimeout(model="a", timeout_s=2, waiting_for="its load")


def test_a_load_timeout_is_a_failed_load() -> None:
    """A LoadTimeout is a LoadFailed with the same fields."""
    error: LoadFailed = LoadTimeout("a", 300.0)
    assert (error.model, error.out_of_memory, error.retry_after_s) == ("a", False, None)


@pytest.mark.parametrize("kind", [InvalidSettings, UnsupportedOption])
def test_wrong_input_is_a_value_error(kind: type[SchedulerError]) -> None:
    """`except ValueError` catches errors of wrong input."""
    assert issubclass(kind, ValueError)


def test_the_numbers_of_does_not_fit_are_a_copy() -> None:
    """The figures of DoesNotFit are a copy, so that a later change of the mapping does not change the error."""
    free = {"cpu": 1}
    error = DoesNotFit("a", 2, free, "it is too big")
    free["cpu"] = 5
    assert error.free_bytes == {"cpu": 1}


@pytest.mark.parametrize(("status_code", "status"), [(400, 400), (413, 400), (501, 400), (401, 500), (503, 500)])
def test_s34_an_engines_refusal_of_the_input_is_a_400(status_code: int, status: int) -> None:
    """S34: an engine's refusal of the input is a 400, and a wrong key or a busy engine is a 500."""
    assert EngineError(status_code, "no").status == status


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536 << 20, "1.5 GiB"),
        ((1 << 30) - 1, "1 GiB"),
        (-(2 << 20), "-2 MiB"),
        (5 << 60, "5120 PiB"),
    ],
)
def test_bytes_are_written_in_binary_units(count: int, text: str) -> None:
    """Bytes are written with one decimal at most, and never as 1024 of a smaller unit."""
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0, "0s"),
        (0.25, "250ms"),
        (0.9999, "1s"),
        (2.5, "2.5s"),
        (59.99, "1m"),
        (90, "1m30s"),
        (5400, "1h30m"),
        (0.9995, "1s"),
        (0.9994, "999ms"),
        (float("inf"), "forever"),
    ],
)
def test_durations_are_written_as_they_may_be_given(duration_s: float, text: str) -> None:
    """A duration is written as `parse_duration` reads it."""
    assert format_duration(duration_s) == text


def test_a_value_that_cannot_be_shown_is_told_by_its_kind() -> None:
    """A number of more than 4300 digits, which Python does not print, is told by its type."""
    assert str(InvalidSettings("priority", 10**9999, "smaller")) == "priority cannot be this int: it must be smaller"


def test_a_duration_beyond_all_clocks_is_written_too() -> None:
    """A duration beyond all clocks is written without an error."""
    assert format_duration(1e308).endswith("m56s")


def test_advice_follows_the_reason() -> None:
    """Advice follows the reason where there is some."""
    error = DoesNotFit("a", 1, {}, "it is too big", "use a smaller one")
    assert str(error).endswith(": it is too big; use a smaller one")
    assert str(DoesNotFit("a", 1, {}, "it is too big")).endswith(": it is too big")


def test_only_a_damaged_file_is_to_be_downloaded_again() -> None:
    """Only a file that is wrong at an offset is advised to be downloaded again."""
    assert str(InvalidModel("/a.gguf", "bad magic", 0)).endswith(
        "bad magic at byte 0; download or convert the file again"
    )
    assert str(InvalidModel("/a.gguf", "it is a directory")).endswith(": it is a directory")


def test_nobody_is_told_to_ask_a_scheduler_again_that_has_ended() -> None:
    """An error of a closed scheduler does not advise to ask again."""
    assert str(RunnerCrashed("m", 1, "killed", closed=True)) == "runner 1 of 'm' is gone: killed"
    assert str(RunnerCrashed("m", 1, "killed")).endswith("; acquire the model again")


def test_a_back_off_after_crashes_is_not_told_as_a_failed_load() -> None:
    """A back-off after crashes is not told as a failed load."""
    error = LoadFailed("m", "killed", 10.0, served=True)
    assert str(error) == "'m' failed again after it was loaded: killed; try again in 10s"
    assert str(LoadFailed("m", "killed")).startswith("loading 'm' failed: ")
