"""Sizes, durations and settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsm.eviction import Candidate, KeepAliveOrder, LeastRecentlyUsed
from scheduler.errors import InvalidSettings
from scheduler.settings import (
    SETTINGS,
    Settings,
    SettingsArguments,
    format_bytes,
    format_duration,
    parse_bytes,
    parse_duration,
    settings_table,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("600MiB", 600 << 20),
        ("1.5GB", 1_500_000_000),
        ("8 GiB", 8 << 30),
        ("8gi", 8 << 30),
        ("2G", 2_000_000_000),
        ("0.5KiB", 512),
        ("512", 512),
        ("512 bytes", 512),
        (1048576, 1048576),
        (0, 0),
    ],
)
def test_sizes_are_read_in_binary_and_decimal_units(text: str | int, count: int) -> None:
    """With an i the unit is a power of 1024, without it of 1000."""
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1", -1, "-1GiB", "1.5", "1,5GB", "8 GiBs", "1e9", "0x10", "٣GiB", "99999999PiB", True, None, 1.5],
)
def test_nonsense_is_no_size(text: Any) -> None:
    """The error names the argument, its value and what would be one."""
    with pytest.raises(InvalidSettings, match=r"memory_limit cannot be .*600MiB") as caught:
        parse_bytes(text, name="memory_limit")
    assert caught.value.value is text


@pytest.mark.parametrize(
    ("text", "duration_s"),
    [
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        ("250ms", 0.25),
        ("1m1ms", 60.001),
        ("2.5s", 2.5),
        ("30", 30.0),
        (30, 30.0),
        ("1d", 86400.0),
        ("0", 0.0),
        ("-0", 0.0),
        (0, 0.0),
    ],
)
def test_s23_durations_are_text_or_bare_seconds(text: str | float, duration_s: float) -> None:
    """S23: "5m" or seconds."""
    assert parse_duration(text) == duration_s


@pytest.mark.parametrize("text", [-1, -0.5, "-1", "-5m", "forever", math.inf, -math.inf])
def test_s18_s23_negative_durations_are_for_ever(text: str | float) -> None:
    """S18, S23: negative means infinite, everywhere."""
    assert parse_duration(text) == math.inf


@pytest.mark.parametrize("text", ["", "m", "5 minutes", "5m!", "1h-30m", "nan", math.nan, True, None, "٣m", "1:30"])
def test_nonsense_is_no_duration(text: Any) -> None:
    """The error names the argument and what would be one."""
    with pytest.raises(InvalidSettings, match=r"keep_alive cannot be .*1h30m"):
        parse_duration(text, name="keep_alive")


@given(st.integers(0, 2**62))
def test_a_formatted_size_can_be_read_again(count: int) -> None:
    """It is within the one decimal that is shown."""
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.06)


@given(st.floats(0.001, 1e8) | st.just(math.inf))
def test_a_formatted_duration_can_be_read_again(duration_s: float) -> None:
    """It is within what is shown."""
    assert parse_duration(format_duration(duration_s)) == pytest.approx(duration_s, rel=0.06, abs=0.0006)


def test_s23_idle_models_stay_for_five_minutes_unless_told() -> None:
    """S23: the default keep-alive."""
    assert Settings().keep_alive == 300.0


def test_s10_the_number_of_runners_is_automatic_unless_told() -> None:
    """S10: 0 leaves it to the devices."""
    assert Settings().max_runners == 0


def test_values_are_normalised_under_their_own_names() -> None:
    """What was text is bytes and seconds when it is read."""
    settings = Settings(memory_limit="8GiB", keep_alive="-1", max_wait="90s", min_residency=3)
    assert (settings.memory_limit, settings.keep_alive, settings.max_wait, settings.min_residency) == (
        8 << 30,
        math.inf,
        90.0,
        3.0,
    )


def test_settings_can_be_replaced() -> None:
    """Normalised values are taken as they are, so a changed copy differs in nothing else."""
    settings = Settings(memory_limit="8GiB", keep_alive="forever", eviction="keep-alive")
    assert replace(settings, max_queue=7) == Settings(
        memory_limit="8GiB", keep_alive=-1, eviction="keep-alive", max_queue=7
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_queue", 0),
        ("max_queue", True),
        ("max_queue", None),
        ("max_runners", -1),
        ("memory_limit", 0),
        ("memory_limit", "lots"),
        ("load_timeout", 0),
        ("loads_per_device", 0),
        ("cpu_threads", 0),
        ("gpus", "maybe"),
        ("eviction", "random"),
        ("eviction", 3),
        ("event_buffer", 1.5),
        ("max_qeueu", 5),
    ],
)
def test_a_value_that_is_not_allowed_is_named(name: str, value: object) -> None:
    """The error has the name, the value and what is allowed; a mistyped name is one too."""
    with pytest.raises(InvalidSettings) as caught:
        Settings(**{name: value})  # type: ignore[arg-type]  # wrong on purpose
    assert (caught.value.name, caught.value.value) == (name, value)


def test_policies_are_found_by_name() -> None:
    """A name becomes the policy itself."""
    assert (Settings().eviction, Settings(eviction="keep-alive").eviction) == (LeastRecentlyUsed(), KeepAliveOrder())


def test_a_policy_may_be_an_object() -> None:
    """Whatever can order candidates is taken as it is."""

    class Newest:
        name = "newest"

        def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
            return sorted(candidates, key=lambda candidate: -candidate.used_at)

    newest = Newest()
    assert Settings(eviction=newest).eviction is newest


def test_arguments_win_over_the_environment_and_that_over_defaults() -> None:
    """Each setting is looked for in this order."""
    environment = {"LOADMASTER_MAX_QUEUE": "7", "LOADMASTER_KEEP_ALIVE": "10s", "LOADMASTER_GPUS": "off"}
    settings = Settings.from_environment(environment, max_queue=9)
    assert (settings.max_queue, settings.keep_alive, settings.gpus, settings.max_wait) == (9, 10.0, False, 120.0)


def test_an_argument_of_none_wins_too() -> None:
    """None is a value where it has a meaning: here, no limit."""
    assert Settings.from_environment({"LOADMASTER_MEMORY_LIMIT": "1GiB"}, memory_limit=None).memory_limit is None


def test_an_empty_variable_is_not_set() -> None:
    """As shells and service files leave them."""
    assert Settings.from_environment({"LOADMASTER_MEMORY_LIMIT": " "}).memory_limit is None


def test_a_wrong_variable_is_named_by_its_own_name() -> None:
    """The reader of the message has to know where to look."""
    with pytest.raises(InvalidSettings, match="LOADMASTER_LOADS_ON_HOST cannot be 'two'"):
        Settings.from_environment({"LOADMASTER_LOADS_ON_HOST": "two"})


def test_the_environment_is_the_processs_own_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """No argument is needed where the process was configured from outside."""
    monkeypatch.setenv("LOADMASTER_MEMORY_LIMIT", "3GiB")
    assert Settings.from_environment().memory_limit == 3 << 30


def test_every_setting_is_declared_everywhere() -> None:
    """The table, the fields and the typed arguments name the same settings in the same order."""
    names = [row.name for row in SETTINGS]
    assert names == [each.name for each in fields(Settings)] == list(get_type_hints(SettingsArguments))


def test_the_documentation_has_a_line_for_every_setting() -> None:
    """Name, variable and default come from the one table."""
    lines = settings_table().splitlines()
    assert len(lines) == len(SETTINGS) + 2
    assert any(line.startswith("| `keep_alive` | `LOADMASTER_KEEP_ALIVE` | 5m |") for line in lines)
