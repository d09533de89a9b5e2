"""A model that any program serves over HTTP: the command that starts it, its port, and what it takes."""

from __future__ import annotations

import hashlib
import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Final

from fsm.domain.devices import HOST, DeviceId
from fsm.domain.options import Options
from fsm.machine.request import ModelId
from scheduler.config.quantities import parse_bytes
from scheduler.engines.engine_model import EngineModel
from scheduler.errors.exceptions import InvalidSettings
from scheduler.models.chat_defaults import NO_DEFAULTS, ChatDefaults

ANY_GPU: Final = DeviceId("gpu")  # in `memory`: whichever one GPU has room
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_KNOWN: Final = ("port", "name")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LIST = "a list: a program by its absolute path or its name on PATH, and its arguments, never a line of a shell"


@dataclass(frozen=True)
class CommandModel(EngineModel):
    """A program that serves over HTTP: started when a request needs it, awaited, probed, and ended with all it started.

    `{port}` in `command`, in the values of `env` and in `stop` stands for a free port of this machine, or for `port`;
    `{name}` for a name of the runner's own, as containers need one. It serves once its `health` path answers with a
    status from 200 to 299, or, without one, once its port is open.

    Raises `InvalidSettings` for what cannot be a command, in a sentence that says what can.
    """

    engine: ClassVar[str] = "command"
    takes_options: ClassVar[bool] = False
    chat: ClassVar[ChatDefaults] = NO_DEFAULTS

    command: Sequence[str]
    memory: Mapping[str, str | int] = field(default_factory=dict, kw_only=True)  # {"cpu": "1GiB", "gpu": "8GiB"}
    port: int | None = field(default=None, kw_only=True)  # None: a free one, which the command is told by {port}
    health: str | None = field(default=None, kw_only=True)  # a path like "/health"; None: that its port is open
    env: Mapping[str, str] = field(default_factory=dict, kw_only=True, repr=False)  # may hold secrets
    pass_env: Sequence[str] = field(default=(), kw_only=True)  # names of variables that it gets of this program's
    stop: str | Sequence[str] = field(default="SIGTERM", kw_only=True)  # a signal, or a command as for containers
    api_key_env: str | None = field(default=None, kw_only=True)  # the variable that the program reads its key from
    options: Options = field(default=Options(), init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "command", _command("command", self.command))
        object.__setattr__(self, "memory", _memory(self.memory))
        object.__setattr__(self, "env", _environment(self.env))
        object.__setattr__(self, "pass_env", tuple(map(_variable, _texts("pass_env", self.pass_env))))
        if isinstance(self.stop, str):
            if self.stop not in signal.Signals.__members__:
                raise InvalidSettings("stop", self.stop, 'the name of a signal, as "SIGINT" is, or a command as a list')
        else:
            object.__setattr__(self, "stop", _command("stop", self.stop))
        if self.api_key_env is not None:
            _variable(self.api_key_env)
        if self.health is not None and not re.fullmatch(r"/[!-~]*", str(self.health)):
            raise InvalidSettings("health", self.health, 'a path like "/health"')
        texts = (*self.command, *self.env.values())
        if self.port is None and not any("{port}" in text for text in texts):
            raise InvalidSettings("port", None, "a number, or in the command as {port}, for which a free port is put")
        if self.port is not None and (type(self.port) is not int or not 0 < self.port < 1 << 16):
            raise InvalidSettings("port", self.port, "a number from 1 to 65535")
        if ANY_GPU in self.memory:
            object.__setattr__(self, "options", Options(require_gpu=True))

    def __hash__(self) -> int:
        return hash(self.id)

    @cached_property
    def id(self) -> ModelId:
        """The model's identity, in which nothing of its environment can be read."""
        own = [repr(getattr(self, each.name)) for each in fields(self) if each.compare]
        digest = hashlib.blake2s("\0".join(own).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        return ModelId(f"{self.engine}:{self.name}:{digest}")

    @property
    def runs_elsewhere(self) -> bool:
        """Whether a command ends it, as for a container: then its processes are not children of this program's."""
        return not isinstance(self.stop, str)

    @property
    def declared(self) -> dict[DeviceId, int]:
        """The bytes that it is declared to take, by device."""
        return {DeviceId(device): int(amount) for device, amount in self.memory.items()}

    @property
    def gpus(self) -> tuple[DeviceId, ...]:
        """The GPUs that are named by their ids."""
        return tuple(device for device in self.declared if device not in (HOST, ANY_GPU))


def filled(text: str, values: Mapping[str, str]) -> str:
    """Return a text with its placeholders filled in."""
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)


def _command(name: str, value: object) -> tuple[str, ...]:
    parts = _texts(name, value, _LIST)
    if not parts or not parts[0] or any("\0" in part for part in parts):
        raise InvalidSettings(name, value, _LIST)
    if os.sep in parts[0] and not os.path.isabs(parts[0]):
        raise InvalidSettings(name, parts[0], "a program by its absolute path, since the working folder may change")
    for part in parts:
        _check_placeholders(name, part)
    return parts


def _check_placeholders(name: str, text: str) -> None:
    for found in _PLACEHOLDER.findall(text):
        if found == "key":
            allowed = (
                "without a key, since all users of this machine see arguments; have the program read its key from a "
                "variable, and name that one by api_key_env"
            )
            raise InvalidSettings(name, "{key}", allowed)
        if found not in _KNOWN:
            raise InvalidSettings(name, f"{{{found}}}", "without it: only {port} and {name} are filled in")


def _texts(name: str, value: Any, allowed: str = "a list of texts") -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
        raise InvalidSettings(name, value, allowed)
    return tuple(value)


def _variable(value: object) -> str:
    if not isinstance(value, str) or not _VARIABLE.fullmatch(value):
        raise InvalidSettings("a variable", value, "a name like HF_TOKEN")
    return value


def _environment(value: Any) -> dict[str, str]:
    """Return the variables; messages show none of their values."""
    if not isinstance(value, Mapping):
        raise InvalidSettings("env", type(value).__name__, "values by the names of variables")
    for name, text in value.items():
        _variable(name)
        if not isinstance(text, str) or "\0" in text:
            raise InvalidSettings(f"env[{name!r}]", type(text).__name__, "a text")
        _check_placeholders("env", text)
    return dict(value)


def _memory(value: Any) -> dict[str, int]:
    allowed = 'sizes by device: {"cpu": "1GiB"}, and with "gpu" or a GPU\'s id if it uses one'
    if not isinstance(value, Mapping) or not value or not all(isinstance(device, str) and device for device in value):
        raise InvalidSettings("memory", value, allowed)
    parsed = {device: parse_bytes(size, name=f"memory[{device!r}]") for device, size in sorted(value.items())}
    if ANY_GPU in parsed and len(parsed.keys() - {HOST, ANY_GPU}):
        raise InvalidSettings("memory", value, f'{allowed}; not both "gpu" and the ids of GPUs')
    return parsed
