"""Sizes, durations and settings."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsm.core import Core
from fsm.eviction.policies import Candidate, ExpectedReloadCost, KeepAliveOrder
from scheduler import Scheduler
from scheduler.config.paths import default_prompt_folder
from scheduler.config.settings import (
    SETTINGS,
    ChangeableArguments,
    Settings,
    SettingsArguments,
    format_bytes,
    format_duration,
    parse_bytes,
    parse_duration,
    settings_table,
)
from scheduler.errors.exceptions import InvalidSettings


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("600MiB", 600 << 20),
        ("1.5GB", 1_500_000_000),
        ("8 GiB", 8 << 30),
        ("8gi", 8 << 30),
        ("2G", 2_000_000_000),
        ("0.5KiB", 512),
        ("512 bytes", 512),
        (1048576, 1048576),
        (0, 0),
    ],
)
def test_sizes_are_read_in_binary_and_decimal_units(text: str | int, count: int) -> None:
    """A unit with an i is a power of 1024, and one without a power of 1000."""
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1", -1, "-1GiB", "1.5", "1,5GB", "8 GiBs", "1e9", "0x10", "٣GiB", "99999999PiB", True, None, 1.5],
)
def test_nonsense_is_no_size(text: Any) -> None:
    """A text that is no size is refused with the argument, the value and an example."""
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
    """S23: a duration is text such as "5m", or seconds."""
    assert parse_duration(text) == duration_s


@pytest.mark.parametrize("text", [-1, -0.5, "-1", "-5m", "forever", math.inf, -math.inf])
def test_s18_s23_negative_durations_are_for_ever(text: str | float) -> None:
    """S18, S23: a negative duration is infinite."""
    assert parse_duration(text) == math.inf


@pytest.mark.parametrize("text", ["", "m", "5 minutes", "5m!", "1h-30m", "nan", math.nan, True, None, "٣m", "1:30"])
def test_nonsense_is_no_duration(text: Any) -> None:
    """A text that is no duration is refused with the argument and an example."""
    with pytest.raises(InvalidSettings, match=r"keep_alive cannot be .*1h30m"):
        parse_duration(text, name="keep_alive")


@given(st.integers(0, 2**62))
def test_a_formatted_size_can_be_read_again(count: int) -> None:
    """A formatted size is read as the same size within the decimal that is shown."""
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.06)


@given(st.floats(0.001, 1e8) | st.just(math.inf))
def test_a_formatted_duration_can_be_read_again(duration_s: float) -> None:
    """A formatted duration is read as the same duration within what is shown."""
    assert parse_duration(format_duration(duration_s)) == pytest.approx(duration_s, rel=0.06, abs=0.0006)


def test_s23_idle_models_stay_for_five_minutes_unless_told() -> None:
    """S23: the default keep-alive is five minutes."""
    assert Settings().keep_alive == 300.0


def test_s10_the_number_of_runners_is_automatic_unless_told() -> None:
    """S10: the default limit of runners is 0, which is automatic."""
    assert Settings().max_runners == 0


def test_values_are_normalised_under_their_own_names() -> None:
    """Settings hold bytes and seconds under the names of the arguments."""
    settings = Settings(memory_limit="8GiB", keep_alive="-1", max_wait="90s", min_residency=3)
    assert (settings.memory_limit, settings.keep_alive, settings.max_wait, settings.min_residency) == (
        8 << 30,
        math.inf,
        90.0,
        3.0,
    )


def test_settings_can_be_replaced() -> None:
    """A changed copy of settings differs in nothing else."""
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
        ("max_queue", 2**63),
        ("num_ctx", 10**400),
        ("max_runners", -1),
        ("memory_limit", 0),
        ("memory_limit", "lots"),
        ("load_timeout", 0),
        ("max_loads_per_gpu", 0),
        ("cpu_threads", 0),
        ("gpus", "maybe"),
        ("eviction", "random"),
        ("eviction", 3),
        ("event_buffer", 1.5),
        ("num_ctx", -1),
        ("num_ctx", True),
        ("num_parallel", "two"),
        ("flash_attention", "automatic"),
        ("cache_type", "q8"),
        ("cache_type", 8),
        ("spread_over_gpus", None),
        ("gpu_reserve", -1),
        ("models", 3),
        ("models", None),
        ("models", [None]),
        ("models", b"/models"),
        ("models", "/mod\0els"),
        ("models", "~no-user-of-this-name/models"),
        ("max_qeueu", 5),
    ],
)
def test_a_value_that_is_not_allowed_is_named(name: str, value: object) -> None:
    """A value that is not allowed, or a misspelt name, is refused with the name, the value and what is allowed."""
    with pytest.raises(InvalidSettings) as caught:
        Settings(**{name: value})  # type: ignore[arg-type]  # wrong on purpose
    assert (caught.value.name, caught.value.value) == (name, value)


def test_policies_are_found_by_name() -> None:
    """A policy's name becomes the policy."""
    assert Settings().eviction is Core().policy, "the settings and the core have different defaults"
    assert (Settings().eviction, Settings(eviction="keep-alive").eviction) == (ExpectedReloadCost(), KeepAliveOrder())


def test_a_policy_may_be_an_object() -> None:
    """An object with an order method is taken as a policy."""

    class Newest:
        name = "newest"

        def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
            return sorted(candidates, key=lambda candidate: -candidate.used_at)

    newest = Newest()
    assert Settings(eviction=newest).eviction is newest


def test_a_policys_class_is_no_policy() -> None:
    """A policy's class is refused, because an instance is needed."""
    with pytest.raises(InvalidSettings, match=r"eviction cannot be .*an object, as ExpectedReloadCost\(\) is"):
        Settings(eviction=ExpectedReloadCost)  # type: ignore[arg-type]  # wrong on purpose


def test_arguments_win_over_the_environment_and_that_over_defaults() -> None:
    """A setting is its argument, else its variable, else its default."""
    environment = {"LOADMASTER_MAX_QUEUE": "7", "LOADMASTER_KEEP_ALIVE": "10s", "LOADMASTER_GPUS": "off"}
    settings = Settings.from_environment(environment, max_queue=9)
    assert (settings.max_queue, settings.keep_alive, settings.gpus, settings.max_wait) == (9, 10.0, False, 120.0)


def test_an_argument_of_none_wins_too() -> None:
    """An argument of None is a value where it has a meaning, such as no limit."""
    assert Settings.from_environment({"LOADMASTER_MEMORY_LIMIT": "1GiB"}, memory_limit=None).memory_limit is None


def test_an_empty_variable_is_not_set() -> None:
    """An empty variable counts as not set."""
    assert Settings.from_environment({"LOADMASTER_MEMORY_LIMIT": " "}).memory_limit is None


@pytest.mark.parametrize("text", ["'30s'", '"30s"', " 30s\t", "\"30s '"])
def test_quotes_and_spaces_around_a_variable_are_not_part_of_it(text: str) -> None:
    """Quotes and spaces around a variable's value are removed, as the reference does."""
    for variable in ("LOADMASTER_KEEP_ALIVE", "OLLAMA_KEEP_ALIVE"):
        assert Settings.from_environment({variable: text}).keep_alive == 30.0


@pytest.mark.parametrize("name", ["memory_limit", "min_residency", "cpu_threads", "flash_attention", "cache_type"])
def test_none_can_be_said_in_the_environment(name: str) -> None:
    """The word none in a variable means None where the table of settings allows it."""
    assert getattr(Settings.from_environment({f"LOADMASTER_{name.upper()}": "none"}), name) is None


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("OLLAMA_KEEP_ALIVE", "90", "keep_alive", 90.0),
        ("OLLAMA_KEEP_ALIVE", "1h30m", "keep_alive", 5400.0),
        ("OLLAMA_KEEP_ALIVE", "0", "keep_alive", 0.0),
        ("OLLAMA_KEEP_ALIVE", "-1", "keep_alive", math.inf),
        ("OLLAMA_KEEP_ALIVE", "-5m", "keep_alive", math.inf),
        ("OLLAMA_MAX_QUEUE", "64", "max_queue", 64),
        ("OLLAMA_MAX_LOADED_MODELS", "2", "max_runners", 2),
        ("OLLAMA_MAX_LOADED_MODELS", "0", "max_runners", 0),
        ("OLLAMA_LOAD_TIMEOUT", "600", "load_timeout", 600.0),
        ("OLLAMA_LOAD_TIMEOUT", "10m", "load_timeout", 600.0),
        ("OLLAMA_LOAD_TIMEOUT", "-1", "load_timeout", math.inf),
        ("OLLAMA_NUM_PARALLEL", "4", "num_parallel", 4),
        ("OLLAMA_NUM_PARALLEL", "0", "num_parallel", None),
        ("OLLAMA_CONTEXT_LENGTH", "8192", "num_ctx", 8192),
        ("OLLAMA_CONTEXT_LENGTH", "0", "num_ctx", None),
        ("OLLAMA_FLASH_ATTENTION", "1", "flash_attention", True),
        ("OLLAMA_FLASH_ATTENTION", "f", "flash_attention", False),
        ("OLLAMA_KV_CACHE_TYPE", "Q8_0", "cache_type", "q8_0"),
        ("OLLAMA_SCHED_SPREAD", "T", "spread_over_gpus", True),
        ("OLLAMA_GPU_OVERHEAD", "536870912", "gpu_reserve", 512 << 20),
    ],
)
def test_s10_s23_the_references_variables_mean_what_they_mean_there(
    variable: str, text: str, name: str, value: object
) -> None:
    """S10, S23: the reference's variables have their meaning there, special values included."""
    assert Settings.from_environment({variable: text}) == Settings(**{name: value})  # type: ignore[arg-type]  # by name


@pytest.mark.parametrize("text", ["0", "0s"])
def test_n12_a_load_time_out_of_0_is_without_end_in_the_references_variable_only(text: str) -> None:
    """N12: a load timeout of 0 is infinite in the reference's variable, and is refused in ours."""
    assert Settings.from_environment({"OLLAMA_LOAD_TIMEOUT": text}).load_timeout == math.inf
    with pytest.raises(InvalidSettings, match="LOADMASTER_LOAD_TIMEOUT"):
        Settings.from_environment({"LOADMASTER_LOAD_TIMEOUT": text})


@pytest.mark.parametrize("name", ["gpu_reserve", "gpu_limit"])
@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("2GiB", (("", 2 << 30),)),
        ({"GPU-a": "2GiB", "GPU-b": 1 << 20}, (("GPU-a", 2 << 30), ("GPU-b", 1 << 20))),
        ("1GiB, GPU-a = 2GiB", (("", 1 << 30), ("GPU-a", 2 << 30))),
        ((("GPU-a", 5 << 20),), (("GPU-a", 5 << 20),)),
    ],
)
def test_u13_memory_of_gpus_is_set_for_all_or_by_their_ids(name: str, value: object, meant: object) -> None:
    """U13: a reserve and a limit of GPUs are one size for all of them, or sizes by their ids."""
    assert getattr(Settings(**{name: value}), name) == meant  # type: ignore[arg-type]  # by name


@pytest.mark.parametrize("value", ["GPU-a=", "GPU-a=much", {"GPU-a": -1}, {7: "1GiB"}])
def test_u13_memory_of_gpus_that_is_no_size_is_refused(value: object) -> None:
    """U13: what is no size of a GPU is refused by the setting's name."""
    with pytest.raises(InvalidSettings, match="gpu_limit"):
        Settings(gpu_limit=value)  # type: ignore[arg-type]  # refused


def test_our_own_variable_wins_over_the_references() -> None:
    """Our variable wins over the reference's, an argument wins over both, and a loser is not read."""
    environment = {"LOADMASTER_NUM_CTX": "0", "OLLAMA_CONTEXT_LENGTH": "8192", "OLLAMA_MAX_QUEUE": "many"}
    settings = Settings.from_environment(environment, max_queue=9)
    assert (settings.num_ctx, settings.max_queue) == (None, 9)


def test_an_empty_variable_of_ours_leaves_the_word_to_the_reference() -> None:
    """An empty variable of ours counts as not set, so that the reference's is used."""
    environment = {"LOADMASTER_KEEP_ALIVE": "", "OLLAMA_KEEP_ALIVE": "1m"}
    assert Settings.from_environment(environment).keep_alive == 60.0


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("OLLAMA_KEEP_ALIVE", "soon"),
        ("OLLAMA_MAX_QUEUE", "0"),
        ("OLLAMA_MAX_QUEUE", "-1"),
        ("OLLAMA_NUM_PARALLEL", "auto"),
        ("OLLAMA_LOAD_TIMEOUT", "long"),
        ("OLLAMA_SCHED_SPREAD", "always"),
        ("OLLAMA_KV_CACHE_TYPE", "q3"),
        ("OLLAMA_GPU_OVERHEAD", "-1"),
    ],
)
def test_a_wrong_value_in_the_references_variable_is_refused_by_its_name(variable: str, text: str) -> None:
    """A wrong value in a variable of the reference is refused by the variable's name, and not ignored."""
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environment({variable: text})
    assert (caught.value.name, caught.value.value) == (variable, text)


def test_the_references_variables_are_no_two_settings() -> None:
    """Each variable of the reference is used by one setting, and the folder of its store by none."""
    references = [row.reference for row in SETTINGS if row.reference]
    assert len(references) == len(set(references))
    assert "OLLAMA_MODELS" not in references
    assert Settings.from_environment({"OLLAMA_MODELS": "/models"}) == Settings()


def test_folders_are_one_path_or_several() -> None:
    """Folders are one text with the separator of PATH or several paths, with "~" expanded and empty ones left out."""
    here, home = Path.cwd() / "models", Path.home()
    assert Settings(models=Path("models")).models == Settings(models="models").models == (here,)
    assert Settings(models=["~", home / "a:b"]).models == (home, home / "a:b")
    text = os.pathsep.join(["~/x", "", "models"])
    assert Settings.from_environment({"LOADMASTER_MODELS": text}).models == (home / "x", here)
    assert Settings().models == Settings(models="").models == ()


@pytest.mark.parametrize("name", ["models", "lock_folder", "measurement_file", "recording_file", "engine_log"])
def test_a_path_stays_where_it_was_when_the_working_folder_changes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is made absolute when the settings are made."""
    monkeypatch.chdir(tmp_path)
    value = getattr(Settings(**{name: "here"}), name)  # type: ignore[arg-type]  # by name
    assert value == ((tmp_path / "here",) if name == "models" else tmp_path / "here")


@pytest.mark.parametrize("name", ["models", "lock_folder", "measurement_file", "recording_file", "engine_log"])
def test_a_relative_path_in_a_working_folder_that_is_gone_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path in a deleted working folder is refused with what to give in its place."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(InvalidSettings, match=f"{name} cannot be 'here': .*absolute.* working folder is gone"):
        Settings(**{name: "here"})  # type: ignore[arg-type]  # by name
    assert getattr(Settings(**{name: "/here"}), name)  # type: ignore[arg-type]  # by name


def test_as_many_slots_as_a_runner_can_have_are_allowed() -> None:
    """A number of slots above what a runner can have is refused in the settings."""
    assert Settings(num_parallel=256).num_parallel == 256
    for settings in (
        lambda: Settings(num_parallel=257),
        lambda: Settings.from_environment({"OLLAMA_NUM_PARALLEL": "257"}),
    ):
        with pytest.raises(InvalidSettings, match=r"(?i)num_parallel cannot be '?257'?: .* from 0 to 256"):
            settings()


OPTIONAL = (
    "memory_limit", "min_residency", "cpu_threads", "num_ctx", "num_batch", "num_parallel", "flash_attention",
    "cache_type", "models", "lock_folder", "measurement_file", "recording_file",
    "engine_log",
)  # fmt: skip


@pytest.mark.parametrize("text", ["none", "None", "NONE"])
@pytest.mark.parametrize("name", OPTIONAL)
def test_none_is_understood_in_any_case(name: str, text: str) -> None:
    """The word none is read in any case, in variables and in arguments."""
    for settings in (Settings.from_environment({f"LOADMASTER_{name.upper()}": text}), Settings(**{name: text})):  # type: ignore[arg-type]  # by name
        assert not getattr(settings, name)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in OPTIONAL
        if name not in ("models", "recording_file", "lock_folder", "measurement_file", "engine_log")
    ],
)
def test_who_is_told_what_is_allowed_is_told_of_none_too(name: str) -> None:
    """The refusal of a wrong value names None as allowed where it is."""
    with pytest.raises(InvalidSettings, match=r'or "none"$'):
        Settings.from_environment({f"LOADMASTER_{name.upper()}": "nonsense"})


def test_what_can_change_while_running_is_changed_in_a_copy() -> None:
    """Limits that may change while running are changed in a copy, parsed like arguments."""
    settings = Settings(max_wait="1m", memory_limit="8GiB")
    changed = settings.changed(memory_limit=None, keep_alive="10s", max_queue=3)
    assert changed == Settings(max_wait="1m", keep_alive=10, max_queue=3)
    assert settings.memory_limit == 8 << 30


@pytest.mark.parametrize(("name", "value"), [("max_wait", "1m"), ("gpus", False), ("max_qeueu", 5)])
def test_what_cannot_change_while_running_is_refused(name: str, value: object) -> None:
    """A setting that cannot change while running is refused with the names of those that can."""
    with pytest.raises(InvalidSettings, match="memory_limit, max_queue, max_runners, max_leases, keep_alive") as caught:
        Settings().changed(**{name: value})  # type: ignore[arg-type]  # wrong on purpose
    assert (caught.value.name, caught.value.value) == (name, value)


def test_a_wrong_value_changes_nothing() -> None:
    """A wrong value of a change is refused by its name and changes nothing."""
    with pytest.raises(InvalidSettings, match="max_queue cannot be 0"):
        Settings().changed(max_runners=2, max_queue=0)


def test_a_wrong_variable_is_named_by_its_own_name() -> None:
    """A wrong value of a variable is refused by the variable's name."""
    with pytest.raises(InvalidSettings, match="LOADMASTER_MAX_HOST_LOADS cannot be 'two'"):
        Settings.from_environment({"LOADMASTER_MAX_HOST_LOADS": "two"})


FORMER = {row.former: row.name for row in SETTINGS if row.former}
A_VALUE = {
    "loads_per_device": 3, "loads_on_host": 3, "context_by_gpus": True, "spread": True, "footprints": "/a.sqlite3",
    "record": "/a.jsonl", "record_limit": "1MiB",
}  # fmt: skip


def test_every_former_name_is_tested() -> None:
    """Every former name in the table of settings has a value here."""
    assert FORMER.keys() == A_VALUE.keys()


@pytest.mark.parametrize(("former", "name"), FORMER.items())
def test_a_setting_of_a_former_name_is_taken_with_one_warning(former: str, name: str) -> None:
    """A former name of a setting works as argument, attribute and variable, with one warning at the caller."""
    value, expected = A_VALUE[former], Settings(**{name: A_VALUE[former]})  # type: ignore[arg-type]  # by name
    variable, former_variable = f"LOADMASTER_{name.upper()}", f"LOADMASTER_{former.upper()}"
    uses: list[tuple[Callable[[], object], object, str]] = [
        (lambda: Settings(**{former: value}), expected, name),  # type: ignore[arg-type]  # by name
        (lambda: Settings.from_environment({}, **{former: value}), expected, name),  # type: ignore[arg-type]  # by name
        (lambda: Settings.from_environment({former_variable: str(value)}), expected, variable),
        (lambda: getattr(expected, former), getattr(expected, name), f"Settings.{name}"),
    ]
    for use, result, told in uses:
        with pytest.warns(DeprecationWarning) as caught:
            assert use() == result
        assert len(caught) == 1 and f"is called {told} now" in str(caught[0].message)
        assert caught[0].filename == __file__


@pytest.mark.parametrize(("former", "name"), FORMER.items())
def test_a_setting_of_both_names_is_refused(former: str, name: str) -> None:
    """A setting of both names is refused, unless one is an empty variable or the argument wins over it."""
    value = A_VALUE[former]
    variable, former_variable = f"LOADMASTER_{name.upper()}", f"LOADMASTER_{former.upper()}"
    with pytest.raises(InvalidSettings, match=f"^{former} cannot be .* left out where {name}, its new name,"):
        Settings(**{former: value, name: value})  # type: ignore[arg-type]  # by name
    with pytest.raises(InvalidSettings, match=f"^{former_variable} cannot be .* left out where {variable}, its new"):
        Settings.from_environment({former_variable: str(value), variable: str(value)})
    with warnings.catch_warnings(action="error"):
        Settings.from_environment({former_variable: " ", variable: str(value)})
        Settings.from_environment({former_variable: str(value)}, **{name: value})  # type: ignore[arg-type]  # by name


def test_a_wrong_value_is_named_by_the_former_name_where_that_was_given() -> None:
    """A wrong value under a former name is refused by the former name."""
    with pytest.warns(DeprecationWarning), pytest.raises(InvalidSettings, match=r"^loads_on_host cannot be 0"):
        Settings(loads_on_host=0)  # type: ignore[call-arg]  # a former name
    with pytest.warns(DeprecationWarning), pytest.raises(InvalidSettings, match=r"^LOADMASTER_LOADS_ON_HOST cannot be"):
        Settings.from_environment({"LOADMASTER_LOADS_ON_HOST": "two"})


def test_a_variable_of_a_former_name_wins_over_the_references() -> None:
    """A variable with a setting's former name wins over the reference's variable, as one with the new name does."""
    with pytest.warns(DeprecationWarning, match="LOADMASTER_SPREAD_OVER_GPUS"):
        assert not Settings.from_environment({"LOADMASTER_SPREAD": "off", "OLLAMA_SCHED_SPREAD": "on"}).spread_over_gpus


def test_a_mistyped_former_variable_is_refused_with_the_new_one() -> None:
    """The refusal of a misspelt former name suggests the new name."""
    with pytest.raises(InvalidSettings, match="as LOADMASTER_MEASUREMENT_FILE is"):
        Settings.from_environment({"LOADMASTER_FOOTPRINT": "none"})


def test_a_scheduler_points_a_warning_at_the_program_that_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning about a former variable points at the program that makes the scheduler."""
    monkeypatch.setenv("LOADMASTER_LOADS_ON_HOST", "3")
    with pytest.warns(DeprecationWarning, match="LOADMASTER_MAX_HOST_LOADS") as caught, Scheduler() as scheduler:
        assert scheduler.settings.max_host_loads == 3
    assert [each.filename for each in caught] == [__file__]


def test_what_was_never_a_setting_is_no_attribute() -> None:
    """An attribute that was never a setting raises AttributeError."""
    with pytest.raises(AttributeError, match="'Settings' object has no attribute 'max_qeueu'"):
        Settings().max_qeueu  # type: ignore[attr-defined]  # noqa: B018  # wrong on purpose


def test_the_environment_is_the_processs_own_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings read the process's own environment unless another one is given."""
    monkeypatch.setenv("LOADMASTER_MEMORY_LIMIT", "3GiB")
    assert Settings.from_environment().memory_limit == 3 << 30


def test_every_setting_is_declared_everywhere() -> None:
    """The table, the fields and the typed arguments name the same settings in the same order."""
    names = [row.name for row in SETTINGS]
    assert names == [each.name for each in fields(Settings)] == list(get_type_hints(SettingsArguments))
    assert [row.name for row in SETTINGS if row.changeable] == list(get_type_hints(ChangeableArguments))


def test_the_documentation_has_a_line_for_every_setting() -> None:
    """The documented table of settings has the name, variables, default and changeability of every setting."""
    lines = settings_table().splitlines()
    assert len(lines) == len(SETTINGS) + 2
    assert any(
        line.startswith("| `keep_alive` | `LOADMASTER_KEEP_ALIVE` | `OLLAMA_KEEP_ALIVE` | 5m | can change |")
        for line in lines
    )
    assert any(line.startswith("| `models` | `LOADMASTER_MODELS` |  | none | fixed |") for line in lines)


@pytest.mark.parametrize(
    ("asked", "folder", "limit_bytes"),
    [
        ("3GiB", default_prompt_folder(), 3 << 30),
        (3 << 30, default_prompt_folder(), 3 << 30),
        ("/var/lib/prompts", Path("/var/lib/prompts"), 8 << 30),
        (Path("/var/lib/prompts"), Path("/var/lib/prompts"), 8 << 30),
    ],
)
def test_prompts_are_kept_by_a_size_or_in_a_folder(asked: Any, folder: Path, limit_bytes: int) -> None:
    """A size is kept in the user's own folder, and a folder holds up to 8 GiB; by default nothing is kept."""
    settings = Settings(keep_prompts=asked)
    assert settings.keep_prompts is not None
    assert (settings.keep_prompts.path, settings.keep_prompts.limit_bytes) == (folder, limit_bytes)
    assert Settings.from_environment({"LOADMASTER_KEEP_PROMPTS": str(asked)}) == settings
    assert settings.with_arguments(max_queue=9).keep_prompts == settings.keep_prompts
    assert Settings().keep_prompts is None


@pytest.mark.parametrize("asked", ["8GiBB", "prompts", "yes", True, 512, "", -1])
def test_what_is_no_size_and_no_folder_keeps_no_prompts(asked: Any) -> None:
    """A typing error in a size is no folder."""
    with pytest.raises(InvalidSettings, match="keep_prompts cannot be"):
        Settings(keep_prompts=asked)
