"""Every limit and time the scheduler has, from arguments or the environment, checked and normalised once."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, Unpack

from fsm.domain.options import MOST_SLOTS, MOST_THREADS
from fsm.eviction.policies import DEFAULT_POLICY, EvictionPolicy
from scheduler.config.paths import default_measurement_file, shared_lock_folder
from scheduler.config.quantities import parse_bytes, parse_duration
from scheduler.config.signatures import with_keywords
from scheduler.config.value_parsers import (
    Parse,
    PromptFolder,
    automatic,
    cache_type,
    count,
    duration,
    eviction,
    file,
    flag,
    folders,
    leases,
    memory,
    optional,
    per_gpu,
    program,
    prompt_folder,
    size,
)
from scheduler.errors.exceptions import InvalidSettings
from scheduler.errors.formatting import format_bytes, format_duration
from scheduler.errors.former_names import warn_of_former_name

ENVIRONMENT_PREFIX = "LOADMASTER_"
# What the command `loadmaster serve` reads of the environment beside these settings; for a scheduler it sets nothing.
_OF_THE_SERVER = """
    allow_hosts allow_origins api_key api_key_file body_limit body_timeout dashboard dashboard_actions
    forwarded_allow_ips host log_format max_connections no_key patience port ray root_path rules sign_of_life tls_cert
    tls_key workers
"""
SERVER_VARIABLES = frozenset(ENVIRONMENT_PREFIX + name.upper() for name in _OF_THE_SERVER.split())
SMALLEST_RECORD_BYTES = 64 * 1024
_AROUND_VALUES = " \t\"'"  # what shells and service files leave around a value


class ChangeableArguments(TypedDict, total=False):
    """The settings that can be changed while running, before they are parsed; durations in seconds or as text."""

    memory_limit: str | int | None
    max_queue: int
    max_runners: int
    max_leases: int | Literal["slots"]
    keep_alive: str | float


class SettingsArguments(ChangeableArguments, total=False):
    """The keyword arguments of `Settings`, before they are parsed; durations in seconds or as text."""

    max_wait: str | float
    min_residency: str | float | None
    load_timeout: str | float
    recovery_timeout: str | float
    stop_grace: str | float
    close_timeout: str | float
    max_loads_per_gpu: int
    max_host_loads: int
    prefetch: bool
    prestart: bool
    eviction: str | EvictionPolicy
    cpu_threads: int | None
    gpus: bool
    integrated_gpus: bool
    probe_interval: str | float
    probe_timeout: str | float
    event_buffer: int
    num_ctx: int | None
    num_batch: int | None
    auto_context_from_vram: bool
    num_parallel: int | None
    flash_attention: bool | None
    cache_type: str | None
    spread_over_gpus: bool
    require_gpu: bool
    gpu_reserve: str | int | Mapping[str, str | int]
    gpu_limit: str | int | Mapping[str, str | int] | None
    models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    lock_folder: str | os.PathLike[str] | None
    measurement_file: str | os.PathLike[str] | None
    recording_file: str | os.PathLike[str] | None
    recording_limit: str | int
    engine_log: str | os.PathLike[str] | None
    keep_prompts: str | int | os.PathLike[str] | PromptFolder | None
    llama_server: str | os.PathLike[str] | None


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class Settings:
    """Every limit and time, normalised: sizes in bytes, durations in seconds (`math.inf`: without end).

    `settings_table()` says what each means. Arguments are `SettingsArguments`; what is not named has its default,
    and the environment is not read: see `from_environment`. Raises `InvalidSettings` for the first value not allowed.
    A setting's former name is taken too, as an argument, a variable and an attribute, with a `DeprecationWarning`.
    """

    memory_limit: int | None
    max_queue: int
    max_runners: int
    max_leases: int | Literal["slots"]
    keep_alive: float
    max_wait: float
    min_residency: float | None
    load_timeout: float
    recovery_timeout: float
    stop_grace: float
    close_timeout: float
    max_loads_per_gpu: int
    max_host_loads: int
    prefetch: bool
    prestart: bool
    eviction: EvictionPolicy
    cpu_threads: int | None
    gpus: bool
    integrated_gpus: bool
    probe_interval: float
    probe_timeout: float
    event_buffer: int
    num_ctx: int | None
    num_batch: int | None
    auto_context_from_vram: bool
    num_parallel: int | None
    flash_attention: bool | None
    cache_type: str | None
    spread_over_gpus: bool
    require_gpu: bool
    gpu_reserve: tuple[tuple[str, int], ...]  # bytes by the id of a GPU; "" stands for each that is not named
    gpu_limit: tuple[tuple[str, int], ...] | None
    models: tuple[Path, ...]
    lock_folder: Path | None
    measurement_file: Path | None
    recording_file: Path | None
    recording_limit: int
    engine_log: Path | None
    keep_prompts: PromptFolder | None
    llama_server: Path | None

    def __init__(self, **arguments: Unpack[SettingsArguments]) -> None:
        given: dict[str, object] = {**arguments}
        for row in SETTINGS:
            name = _name_used(row.name, row.former, given)
            object.__setattr__(self, row.name, row.parse(name, given.pop(name, row.default)))
        for name, value in given.items():
            raise InvalidSettings(name, value, f"one of the settings: {', '.join(row.name for row in SETTINGS)}")

    if not TYPE_CHECKING:  # a former name is no attribute for a type checker

        def __getattr__(self, name: str) -> object:
            """Return the setting of this former name."""
            for row in SETTINGS:
                if name and name == row.former:
                    warn_of_former_name(f"Settings.{name}", f"Settings.{row.name}")
                    return getattr(self, row.name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] | None = None, /, **arguments: Unpack[SettingsArguments]
    ) -> Settings:
        """Return settings from arguments, else LOADMASTER_MAX_QUEUE …, else OLLAMA_MAX_QUEUE …, else the defaults.

        `environment` is the process's own unless given; a variable that is empty counts as not set, and quotes around
        a value are not part of it. Raises `InvalidSettings` by the name of the variable, whichever of the two it is,
        and for a LOADMASTER_ variable of no setting.
        """
        variables = os.environ if environment is None else environment
        given = {name: text for name, value in variables.items() if (text := value.strip(_AROUND_VALUES))}
        _check_names(given)
        chosen: dict[str, Any] = {}
        for row in SETTINGS:
            if row.name in arguments or row.former in arguments:
                continue
            variable = _name_used(row.variable, row.former_variable, given)
            readers = {variable: row.parse, row.reference: row.reference_parse or row.parse}
            if (name := next((name for name in readers if name in given), None)) is not None:
                chosen[row.name] = readers[name](name, given[name])
        chosen.update(arguments)
        return cls(**chosen)

    def with_arguments(self, **arguments: Unpack[SettingsArguments]) -> Settings:
        """Return these settings with some replaced by `arguments`; raises `InvalidSettings`."""
        kept = {row.name for row in SETTINGS if row.name not in arguments and row.former not in arguments}
        given: dict[str, Any] = {name: getattr(self, name) for name in kept} | {**arguments}
        return Settings(**given)

    def changed(self, **changes: Unpack[ChangeableArguments]) -> Settings:
        """Return these settings with some changed, as it is allowed while running; raises `InvalidSettings`."""
        given: dict[str, Any] = {**changes}
        changeable = [row.name for row in SETTINGS if row.changeable]
        for name, value in given.items():
            if name not in changeable:
                raise InvalidSettings(name, value, f"one of what can change while running: {', '.join(changeable)}")
        return self.with_arguments(**given)


def _check_names(given: Mapping[str, str]) -> None:
    """Raise `InvalidSettings` for a variable of ours that sets nothing: a typing error is not to lift a limit."""
    known = {row.variable: row.variable for row in SETTINGS}
    known |= {row.former_variable: row.variable for row in SETTINGS if row.former}
    for name in sorted(given):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known and name not in SERVER_VARIABLES:
            (closest,) = difflib.get_close_matches(name.upper(), known, 1, cutoff=0)
            raise InvalidSettings(
                name, given[name], f"the variable of a setting, as {known[closest]} is: check its name"
            )


def _name_used(name: str, former: str, given: Mapping[str, object]) -> str:
    """Return the name by which a setting is given: `former`, with a warning, where it is, and else `name`.

    Raises `InvalidSettings` where both are given.
    """
    if not former or former not in given:
        return name
    if name in given:
        raise InvalidSettings(former, given[former], f"left out where {name}, its new name, is given too")
    warn_of_former_name(former, name)
    return former


class Setting(NamedTuple):
    """One row of the table: `parse(name, value)` returns the normalised value or raises `InvalidSettings`."""

    name: str
    default: object
    parse: Parse
    meaning: str
    reference: str = ""  # the environment variable of Ollama's that means the same
    reference_parse: Parse | None = None  # where its values do not mean quite the same
    changeable: bool = False  # while running
    former: str = ""  # its name before, which still works and warns

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def former_variable(self) -> str:
        """The environment variable of its former name; empty where it has none."""
        return ENVIRONMENT_PREFIX + self.former.upper() if self.former else ""


def _lock_folder(name: str, value: Any) -> Path:
    if value == "auto":
        return shared_lock_folder()
    paths = folders(name, value)
    if len(paths) != 1:
        raise InvalidSettings(name, value, '"auto" or a folder')
    return paths[0]


def _measurement_file(name: str, value: Any) -> Path:
    return default_measurement_file() if value == "auto" else file(name, value, '"auto" or the path of a file')


def _recording_limit(name: str, value: Any) -> int:
    limit_bytes = size(name, value)
    if limit_bytes < SMALLEST_RECORD_BYTES:
        raise InvalidSettings(name, value, f"at least {format_bytes(SMALLEST_RECORD_BYTES)}")
    return limit_bytes


def _endless_from_zero(name: str, value: Any) -> float:
    """Take the reference's load time-out, of which 0 means without end."""
    return parse_duration(value, name=name) or math.inf


SETTINGS = (
    Setting(
        "memory_limit", None, optional(memory),
        "host memory that models may take in all, pages of mapped files included; none: all there is",
        changeable=True,
    ),
    Setting(
        "max_queue", 512, count(1), "requests that may wait; one more is refused at once",
        "OLLAMA_MAX_QUEUE", changeable=True,
    ),
    Setting(
        "max_runners", 0, count(0), "runners alive at once; 0: as many as memory allows",
        "OLLAMA_MAX_LOADED_MODELS", changeable=True,
    ),
    Setting(
        "max_leases", 0, leases,
        "leases of one runner at once, where its model names no limit; 0: no limit, slots: as many as it has slots",
        changeable=True,
    ),
    Setting(
        "keep_alive", "5m", duration(), "how long an idle model stays loaded; 0: not at all, negative: for ever",
        "OLLAMA_KEEP_ALIVE", changeable=True,
    ),
    Setting("max_wait", "120s", duration(), "how long a request waits before a busy runner drains for it"),
    Setting(
        "min_residency", None, optional(duration()), "how long a loaded model is safe; none: by what its load took"
    ),
    Setting(
        "load_timeout", "5m", duration(zero=False), "how long a load may go without progress; negative: for ever",
        "OLLAMA_LOAD_TIMEOUT", _endless_from_zero,
    ),
    Setting("recovery_timeout", "5s", duration(), "how long to wait for a device to show freed memory"),
    Setting("stop_grace", "2s", duration(), "how long a process has to end before it is killed"),
    Setting("close_timeout", "10s", duration(), "how long leases may last after close"),
    Setting("max_loads_per_gpu", 1, count(1), "loads at once on one GPU", former="loads_per_device"),
    Setting("max_host_loads", 2, count(1), "loads at once on the host", former="loads_on_host"),
    Setting("prefetch", True, flag, "whether files of models that wait for memory are read into the page cache"),
    Setting(
        "prestart", True, flag, "whether a process is kept ready for the next load, some 24 MiB, where there is room"
    ),
    Setting(
        "eviction", DEFAULT_POLICY.name, eviction,
        'which idle runners go first: "reuse", "lru", "keep-alive" or a policy object',
    ),
    Setting(
        "cpu_threads", None, optional(count(1, MOST_THREADS)), "threads of each runner; none: its part of the cores"
    ),
    Setting("gpus", True, flag, "whether GPUs are used"),
    Setting(
        "integrated_gpus", False, flag,
        "whether GPUs within processors are used through any library, and not through CUDA, ROCm and Metal alone",
        "OLLAMA_IGPU_ENABLE",
    ),
    Setting("probe_interval", "10s", duration(zero=False), "how often a runner is asked whether it still answers"),
    Setting("probe_timeout", "10s", duration(zero=False), "how long it may take to answer"),
    Setting("event_buffer", 1000, count(1), "events kept for each slow reader before the oldest are dropped"),
    Setting(
        "num_ctx", 0, automatic(), "context of one slot where a request names none, in tokens; 0: automatic",
        "OLLAMA_CONTEXT_LENGTH",
    ),
    Setting(
        "num_batch", 0, automatic(), "tokens of a prompt computed at once where a request names none; 0: automatic",
    ),
    Setting(
        "auto_context_from_vram", False, flag,
        "whether an automatic context is by the GPUs' memory: 262144 from 47 GiB on, 32768 from 23 GiB on",
        former="context_by_gpus",
    ),
    Setting(
        "num_parallel", 0, automatic(MOST_SLOTS), "slots of a runner where a request names none; 0: automatic",
        "OLLAMA_NUM_PARALLEL",
    ),
    Setting(
        "flash_attention", None, optional(flag), "flash attention where a request does not say; none: automatic",
        "OLLAMA_FLASH_ATTENTION",
    ),
    Setting(
        "cache_type", None, optional(cache_type), "type of the KV cache where a request names none; none: f16",
        "OLLAMA_KV_CACHE_TYPE",
    ),
    Setting(
        "spread_over_gpus", False, flag, "whether a model goes on all GPUs even where one takes it",
        "OLLAMA_SCHED_SPREAD", former="spread",
    ),
    Setting("require_gpu", False, flag, "whether a model is refused rather than placed on the host, in part or whole"),
    Setting(
        "gpu_reserve", 0, per_gpu,
        "memory to keep free on each GPU that has its own, beside what other programs take, or by the ids of GPUs",
        "OLLAMA_GPU_OVERHEAD",
    ),
    Setting(
        "gpu_limit", None, optional(per_gpu),
        "memory of each GPU that models may take, whatever other programs take, or by the ids of GPUs; none: all of it",
    ),
    Setting("models", (), folders, "folders in which models are found by name; several as in PATH"),
    Setting(
        "lock_folder", "auto", optional(_lock_folder),
        "where programs that load on one device take turns; auto: among this user's, none: they do not",
    ),
    Setting(
        "measurement_file", "auto", optional(_measurement_file),
        "file of what models took and how long they loaded; auto: in this user's cache folder, none: it is forgotten",
        former="footprints",
    ),
    Setting(
        "recording_file", None, optional(file), "file to which every decision is recorded, for `loadmaster replay`",
        former="record",
    ),
    Setting(
        "recording_limit", "64MiB", _recording_limit, "size of that file and of the one before it, FILE.1, together",
        former="record_limit",
    ),
    Setting(
        "engine_log", None, optional(file),
        "file for what llama.cpp writes to its log, which only its owner may read: it may hold prompts",
    ),
    Setting(
        "keep_prompts", None, optional(prompt_folder),
        "size that prompts of unloaded models may take on the disk until their models are loaded again, or folder for "
        "up to 8GiB of them; none: they are forgotten",
    ),
    Setting(
        "llama_server", None, optional(program),
        "your own `llama-server`, which serves models in place of the wheel's llama.cpp; a name is looked up on PATH",
    ),
)  # fmt: skip


settings_keywords = with_keywords(SettingsArguments, {row.name: row.default for row in SETTINGS})
changeable_keywords = with_keywords(ChangeableArguments)
for _function in (Settings.__init__, Settings.from_environment.__func__):  # type: ignore[attr-defined]  # a class method
    settings_keywords(_function)
with_keywords(SettingsArguments)(Settings.with_arguments)
changeable_keywords(Settings.changed)


def settings_table() -> str:
    """Return the settings as a Markdown table: name, both environment variables, default, changeable, meaning."""
    lines = [
        "| setting | environment variable | Ollama's | default | while running | meaning |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in SETTINGS:
        match row.default:
            case None | ():
                default = "none"
            case bool():
                default = str(row.default).lower()
            case _:
                default = str(row.default)
        reference = f"`{row.reference}`" if row.reference else ""
        change = "can change" if row.changeable else "fixed"
        lines.append(f"| `{row.name}` | `{row.variable}` | {reference} | {default} | {change} | {row.meaning} |")
    return "\n".join(lines) + "\n"


__all__ = [
    "ChangeableArguments",
    "PromptFolder",
    "Settings",
    "SettingsArguments",
    "changeable_keywords",
    "format_bytes",
    "format_duration",
    "parse_bytes",
    "parse_duration",
    "settings_keywords",
    "settings_table",
]
