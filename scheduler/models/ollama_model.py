"""What Ollama's models come with beside their files: load-time options, what chats begin with, sampling parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scheduler.errors.exceptions import InvalidModel, UnsupportedOption
from scheduler.models.chat_defaults import ChatDefaults

MANIFEST_BYTES = 4 << 20  # most bytes of a manifest or any other text; usual ones have about 1 KiB

_COUNTS = ("num_ctx", "num_batch", "num_thread")  # the parameters of an Ollama model that Options have too;
_OTHERS = ("num_gpu", "main_gpu", "use_mmap")  # the other parameters are about sampling
# The engine's names of parameters about sampling; those of other names have no effect there.
_NUMBERS = {
    **{name: name for name in ("temperature", "top_p", "min_p", "typical_p", "repeat_penalty")},
    **{name: name for name in ("presence_penalty", "frequency_penalty", "mirostat_tau", "mirostat_eta")},
}
_WHOLE_NUMBERS = {
    **{name: name for name in ("top_k", "repeat_last_n", "seed", "mirostat")},
    "num_predict": "max_tokens",
    "num_keep": "n_keep",
}
SAMPLING_NAMES = frozenset({*_NUMBERS, *_WHOLE_NUMBERS, "stop"})  # Ollama's own
_NO_TEMPLATE = "{{ .Prompt }}"  # Ollama's template of a model that has none


def read_json(path: Path) -> Any:
    """Return the content of a small JSON file; raises `InvalidModel`."""
    try:
        return json.loads(_read(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else error
        raise InvalidModel(str(path), f"it is no JSON that can be read, {reason}") from error


def read_text(path: Path) -> str:
    """Return the content of a small text file; raises `InvalidModel`."""
    try:
        return _read(path).decode()
    except (OSError, ValueError) as error:
        raise InvalidModel(str(path), f"it is no text that can be read, {error}") from error


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(MANIFEST_BYTES + 1)
    if len(content) > MANIFEST_BYTES:
        raise InvalidModel(str(path), f"it is larger than {MANIFEST_BYTES} bytes, which no manifest is")
    return content


def read_parameters(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the parameters of all files, of which a later one counts more; raises `InvalidModel`."""
    found: dict[str, Any] = {}
    for path in paths:
        if not isinstance(params := read_json(path), dict):
            raise InvalidModel(str(path), "these parameters of an Ollama model are no object")
        options_of(params, path)
        found |= params
    return found


def options_of(params: Mapping[str, Any], path: Path) -> dict[str, int | bool | None]:
    """Return the load-time options among an Ollama model's parameters; raises `InvalidModel` for the file at `path`."""
    try:
        return load_options(params)
    except UnsupportedOption as error:
        reason = f"the parameter {error.name} of an Ollama model cannot be {str(error.value)[:80]!r}"
        raise InvalidModel(str(path), reason) from None


def load_options(params: Mapping[str, Any]) -> dict[str, int | bool | None]:
    """Return the load-time options among parameters in Ollama's terms; a count of 0 means automatic there.

    Raises `UnsupportedOption` for a value that cannot be.
    """
    options: dict[str, int | bool | None] = {}
    for name in (*_COUNTS, *_OTHERS):
        value = params.get(name)
        if value is None:
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) != (name == "use_mmap") or abs(value) >= 1 << 31:
            kind = "True or False" if name == "use_mmap" else "a whole number"
            raise UnsupportedOption(name, params[name], f"it must be {kind}")
        options[name] = None if name in _COUNTS and value < 1 else value
    return options


def chat_defaults(
    params: Mapping[str, Any],
    *,
    systems: Sequence[Path] = (),
    messages: Sequence[Path] = (),
    templates: Sequence[Path] = (),
    others: Sequence[str] = (),
) -> ChatDefaults:
    """Return what the files of an Ollama model say of its chats; `others` are kinds of files without a use here.

    Raises `InvalidModel` for a file that cannot be read.
    """
    sampling, unknown = sampling_parameters(params)
    said = [each for path in messages for each in _messages(path)]
    texts = {path: text for path in templates if (text := read_text(path)).strip() != _NO_TEMPLATE}
    unapplied = [
        f"its template ({path}): chats are written by the chat template in the model's own file" for path in texts
    ]
    unapplied += [f"its parameter {name}" for name in unknown]
    unapplied += [f"its {kind} layer" for kind in others]
    system = "\n".join(read_text(path) for path in systems)
    return ChatDefaults(system, tuple(said), sampling, tuple(unapplied), "\n".join(texts.values()))


def sampling_parameters(params: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the parameters about sampling by the engine's names, and the names of those that it would not obey."""
    found: dict[str, Any] = {}
    unknown = []
    for name, value in params.items():
        if name in (*_COUNTS, *_OTHERS) or value is None:
            continue
        if name == "stop" and (isinstance(value, str) or _are_texts(value)):
            found["stop"] = [value] if isinstance(value, str) else value
        elif name in _NUMBERS and _is_number(value):
            found[name] = value
        elif name in _WHOLE_NUMBERS and _is_number(value) and float(value).is_integer():
            found[_WHOLE_NUMBERS[name]] = max(-1, int(value)) if name == "num_predict" else int(value)
        else:
            unknown.append(name)
    return found, unknown


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _messages(path: Path) -> list[dict[str, Any]]:
    found = read_json(path)
    if not isinstance(found, list) or not all(isinstance(each, dict) and "role" in each for each in found):
        raise InvalidModel(str(path), "these messages of an Ollama model are no list of messages")
    return found
