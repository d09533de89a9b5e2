"""Parsers for the values of settings: each takes a setting's name and value, and returns the value normalised.

All raise `InvalidSettings`, by that name, for a value that is not allowed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from fsm.eviction.policies import POLICIES, EvictionPolicy
from scheduler.config.paths import default_prompt_folder
from scheduler.config.quantities import parse_bytes, parse_duration
from scheduler.errors.exceptions import InvalidSettings

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")  # llama.cpp's names, all of them
LARGEST_NUMBER = 2**63
LEAST_MEMORY_BYTES = 1 << 20  # no device, and no limit that a model fits into, has less
PROMPTS_BYTES = 8 << 30  # kept in a folder that is named without a size

Parse = Callable[[str, Any], object]


def count(minimum: int, most: int = LARGEST_NUMBER - 1) -> Callable[[str, Any], int]:
    """Return a parser of whole numbers from `minimum` to `most`, which may be texts."""
    limits = f"of at least {minimum}, and below 2**63" if most >= LARGEST_NUMBER - 1 else f"from {minimum} to {most}"

    def parse(name: str, value: Any) -> int:
        number = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value) else value
        if not isinstance(number, int) or isinstance(number, bool) or not minimum <= number <= most:
            raise InvalidSettings(name, value, f"a whole number {limits}")
        return number

    return parse


def leases(name: str, value: Any) -> int | Literal["slots"]:
    """Return a limit of leases, 0 for none, or "slots"."""
    if isinstance(value, str) and value.lower() == "slots":
        return "slots"
    try:
        return count(0)(name, value)
    except InvalidSettings as error:
        raise InvalidSettings(name, value, f'{error.allowed}, or "slots"') from None


def duration(*, zero: bool = True) -> Callable[[str, Any], float]:
    """Return a parser of durations, `zero` allowed or not; it returns seconds."""

    def parse(name: str, value: Any) -> float:
        duration_s = parse_duration(value, name=name)
        if duration_s == 0 and not zero:
            raise InvalidSettings(name, value, "a duration longer than 0")
        return duration_s

    return parse


def size(name: str, value: Any) -> int:
    """Return a size in bytes."""
    return parse_bytes(value, name=name)


def per_gpu(name: str, value: Any) -> tuple[tuple[str, int], ...]:
    """Return pairs of the id of a GPU and a size in bytes; "" stands for every GPU that is not named.

    One size is for all; several are a mapping, or a text like "1GiB,GPU-5f3c=2GiB".
    """
    if isinstance(value, str) and "=" in value:
        parts = [part.rpartition("=") for part in value.split(",") if part.strip()]
        value = {gpu.strip(): amount.strip() for gpu, _, amount in parts}
    sizes = value if isinstance(value, Mapping) else dict(value) if isinstance(value, tuple) else {"": value}
    if not all(isinstance(gpu, str) for gpu in sizes):
        raise InvalidSettings(name, value, "a size, or sizes by the ids of GPUs")
    return tuple((gpu, memory_or_none(name, amount)) for gpu, amount in sizes.items())


def memory(name: str, value: Any) -> int:
    """Return the size of memory in bytes, 1 MiB at least: a smaller one has lost its unit."""
    size_bytes = size(name, value)
    if size_bytes < LEAST_MEMORY_BYTES:
        raise InvalidSettings(name, value, "at least 1 MiB, as 24GiB is: a number without a unit is in bytes")
    return size_bytes


def memory_or_none(name: str, value: Any) -> int:
    """Return the size of memory in bytes as `memory` does, or 0."""
    return 0 if size(name, value) == 0 else memory(name, value)


def flag(name: str, value: Any) -> bool:
    """Return True or False for a bool or the texts that stand for one."""
    match value.lower() if isinstance(value, str) else value:
        case True | "1" | "t" | "true" | "yes" | "on":
            return True
        case False | "0" | "f" | "false" | "no" | "off":
            return False
        case _:
            raise InvalidSettings(name, value, "true or false")


def eviction(name: str, value: Any) -> EvictionPolicy:
    """Return the policy of that name, or a policy of the user's own."""
    policy = POLICIES.get(value) if isinstance(value, str) else value
    if isinstance(policy, type):
        raise InvalidSettings(name, value, f"an object, as {policy.__name__}() is, and not its class")
    if not callable(getattr(policy, "order", None)):
        raise InvalidSettings(name, value, f"{' or '.join(map(repr, POLICIES))}, or a policy of your own")
    return cast(EvictionPolicy, policy)


def optional(parse: Parse) -> Parse:
    """Return a parser that takes None, or the text "none", as None, and other values as `parse` does."""

    def read(name: str, value: Any) -> object:
        if value is None or _says_none(value):
            return None
        try:
            return parse(name, value)
        except InvalidSettings as error:
            raise InvalidSettings(name, value, f'{error.allowed}, or "none"') from None

    return read


def automatic(most: int = LARGEST_NUMBER - 1) -> Parse:
    """Return a parser of whole numbers from 1 to `most`; 0 and None are automatic."""
    parse = optional(count(0, most))
    return lambda name, value: parse(name, value) or None


def _says_none(value: object) -> bool:
    return isinstance(value, str) and value.lower() == "none"


def cache_type(name: str, value: Any) -> str:
    """Return a type of the KV cache."""
    if not isinstance(value, str) or value.lower() not in CACHE_TYPES:
        raise InvalidSettings(name, value, f"one of {', '.join(CACHE_TYPES)}")
    return value.lower()


def folders(name: str, value: Any) -> tuple[Path, ...]:
    """Return the paths of one or several folders: a sequence, or one text with the system's separator of PATH."""
    if _says_none(value):
        return ()
    parts = value.split(os.pathsep) if isinstance(value, str) else [value] if isinstance(value, os.PathLike) else value
    return _paths(name, value, parts, f'folders: paths, or one text of them with {os.pathsep!r} in between, or "none"')


def file(name: str, value: Any, allowed: str = "the path of a file") -> Path:
    """Return the path of a file; `allowed` says what else the setting takes."""
    paths = _paths(name, value, [value] if isinstance(value, str | os.PathLike) else [], allowed)
    if len(paths) != 1:
        raise InvalidSettings(name, value, allowed)
    return paths[0]


def program(name: str, value: Any) -> Path:
    """Return the path of a program; a text without a separator of paths is looked up as shells do."""
    allowed = "the path of a program, or the name of one that is on PATH"
    if isinstance(value, str) and os.sep not in value:
        if (found := shutil.which(value)) is None:
            raise InvalidSettings(name, value, allowed)
        value = found
    return file(name, value, allowed)


@dataclass(frozen=True, slots=True)
class PromptFolder:
    """Where prompts are kept, and how many bytes of them."""

    path: Path
    limit_bytes: int = PROMPTS_BYTES


def prompt_folder(name: str, value: Any) -> PromptFolder:
    """Return where prompts are kept, by a size or a folder; a text is a folder where it has a separator of paths."""
    if isinstance(value, PromptFolder):
        return value
    if isinstance(value, os.PathLike) or (isinstance(value, str) and os.sep in value):
        return PromptFolder(file(name, value, "the path of a folder"))
    try:
        return PromptFolder(default_prompt_folder(), memory(name, value))
    except InvalidSettings as error:
        raise InvalidSettings(name, value, f"{error.allowed}, or the path of a folder, with a {os.sep} in it") from None


def _paths(name: str, value: object, parts: Any, allowed: str) -> tuple[Path, ...]:
    """Return absolute paths, since the working folder may change."""
    try:
        paths = [os.fspath(part) for part in parts]
        if all(isinstance(path, str) and "\0" not in path for path in paths):
            return tuple(Path(path).expanduser().absolute() for path in paths if path)
    except (TypeError, RuntimeError):  # no path, or the home of an unknown user
        pass
    except OSError:
        raise InvalidSettings(name, value, "absolute, since the working folder is gone") from None
    raise InvalidSettings(name, value, allowed)
