"""What `loadmaster serve` is told: by flags, else by a file, else by the environment, else the defaults."""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from scheduler.config.settings import SETTINGS, Setting, Settings
from scheduler.config.value_parsers import count, file, flag, optional
from scheduler.engines.command_model import CommandModel
from scheduler.errors.exceptions import InvalidSettings, SchedulerError
from scheduler.errors.formatting import printable
from scheduler.http.settings import SERVER_SETTINGS, ServerArguments, ServerSettings, names
from scheduler.models.configured_models import ConfiguredModel, configured_model

_PORT = 11434
_LARGEST_FILE = 1 << 20  # bytes
_LARGEST_KEY_FILE = 1 << 12
_AROUND_VALUES = " \t\"'"  # what shells and service files leave around a value
_PATHS = frozenset({"models", "lock_folder", "measurement_file", "recording_file", "engine_log", "keep_prompts"})
_PATHS |= {"api_key_file", "tls_cert", "tls_key", "llama_server"}
_PATHS_OR_NOT = frozenset({"keep_prompts", "llama_server"})  # where a text without a separator is no path
_PROGRAM = "llama_server"  # what is run: only this user may say so
_OF_OTHERS = 0o022  # bits of a mode that let others write
_NO_PATHS = ("auto", "none")
_SECRET = "api_key"
_NO_FLAGS = (_SECRET, "rules")  # other users see command lines; a table is for a file
_BY_FLAG, _BY_FILE, _BY_ENVIRONMENT, _BY_DEFAULT = range(4)  # what has set a value, the strongest first


class Refused(Exception):
    """What a command does not do: one line that says why, and what to do about it."""

    def __str__(self) -> str:
        return printable(super().__str__())


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or " " in value:
        raise InvalidSettings(name, value, "a text without spaces")
    return value


def _root_path(name: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"(/[\w.~-]+)*/?", value, re.ASCII):
        raise InvalidSettings(name, value, "a path like /models")
    return value.rstrip("/")


def _log_format(name: str, value: Any) -> str:
    if value not in ("text", "json"):
        raise InvalidSettings(name, value, '"text" or "json"')
    return str(value)


def _workers(name: str, value: Any) -> int:
    if value not in (1, "1"):
        raise InvalidSettings(
            name, value, "1, since several workers would be several schedulers, each with models and memory of its own"
        )
    return 1


def _ollama_host(name: str, value: Any) -> str:
    return _ollama_address(name, value)[0]


def _ollama_port(name: str, value: Any) -> int:
    return _ollama_address(name, value)[1]


def _ollama_address(name: str, value: Any) -> tuple[str, int]:
    """Return host and port as Ollama reads them: [scheme://]host[:port][/path]; no host before the port: all."""
    scheme, there, rest = str(value).rpartition("://")
    usual = {"http": 80, "https": 443}.get(scheme, _PORT) if there else _PORT
    address = rest.partition("/")[0]
    found = re.fullmatch(
        r"\[(?P<v6>[^\[\]]*)\](?::(?P<port>\d{1,5}))?|(?P<host>[^:\[\]]*)(?::(?P<port_too>\d{1,5}))?", address
    )
    if found is None:
        with suppress(ValueError):
            return str(ipaddress.IPv6Address(address)), usual  # without brackets
        raise InvalidSettings(name, value, "an address like 127.0.0.1:11434")
    port = int(found["port"] or found["port_too"] or usual)
    if port > 65535:
        raise InvalidSettings(name, value, "an address whose port is below 65536")
    host = found["v6"] or found["host"] or ""
    return (host if host or ":" in address else "127.0.0.1"), port


SERVE_SETTINGS = (
    Setting(
        "host", "127.0.0.1", _text, "address to listen at; empty: all addresses of this machine",
        "OLLAMA_HOST", _ollama_host,
    ),
    Setting("port", _PORT, count(0, 65535), "port to listen at; 0: any that is free", "OLLAMA_HOST", _ollama_port),
    Setting("api_key_file", None, optional(file), "file with the key that clients must send"),
    Setting("no_key", False, flag, "serve without a key where other machines reach the address"),
    Setting("tls_cert", None, optional(file), "file with the certificate, and those that lead to it, as PEM"),
    Setting("tls_key", None, optional(file), "file with the key of the certificate, as PEM"),
    Setting("root_path", "", _root_path, "path under which a proxy publishes the server, and which it leaves out"),
    Setting(
        "forwarded_allow_ips", (), names, 'addresses of proxies whose X-Forwarded headers count; "*": of any client',
    ),
    Setting(
        "ray", None, optional(_text),
        "address of a Ray cluster, on whose machines the models are; auto: the one that this machine belongs to",
    ),
    Setting("log_format", "text", _log_format, "how lines are logged: text or json"),
    Setting("workers", 1, _workers, "1: a server is one process", "WEB_CONCURRENCY"),
)  # fmt: skip
ROWS = (*SERVE_SETTINGS, *SERVER_SETTINGS, *SETTINGS)
_LISTS = {"models": "--models", "allow_hosts": "--allow-host", "allow_origins": "--allow-origin"}
_LISTS["forwarded_allow_ips"] = "--forwarded-allow-ips"


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Everything that a server is told, checked."""

    file: Path | None
    scheduler: Settings
    server: ServerSettings
    own: Mapping[str, Any]  # by the names of SERVE_SETTINGS
    models: tuple[ConfiguredModel, ...]
    commands: Mapping[str, CommandModel]  # by name: the models that commands serve
    named: Mapping[str, Any]  # settings of the scheduler that flags or the file name, without the environment's

    def server_arguments(self) -> ServerArguments:
        """Return the keywords of `create_app`."""
        return cast(ServerArguments, {row.name: getattr(self.server, row.name) for row in SERVER_SETTINGS})


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser a flag for each setting; a flag that is not named leaves nothing."""
    parser.allow_abbrev = False  # what is meant as a key is not to be taken for the name of its file
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file of settings and models; see docs/server.md"
    )
    for title, rows in (("the server", (*SERVE_SETTINGS, *SERVER_SETTINGS)), ("the scheduler", SETTINGS)):
        group = parser.add_argument_group(title)
        for row in rows:
            if row.name not in _NO_FLAGS:
                _add_flag(group, row)


def _add_flag(group: argparse._ArgumentGroup, row: Setting) -> None:
    name, meaning = _flag_of(row.name), row.meaning.replace("%", "%%")
    if row.name in _LISTS:
        group.add_argument(
            name, dest=row.name, nargs="+", action="extend", default=argparse.SUPPRESS, metavar="VALUE", help=meaning
        )
    elif row.name == "ray":
        group.add_argument(
            name, dest=row.name, nargs="?", const="auto", default=argparse.SUPPRESS, metavar="ADDRESS", help=meaning
        )
    elif row.default is False and row.name.startswith("no_"):
        group.add_argument(name, dest=row.name, action="store_true", default=argparse.SUPPRESS, help=meaning)
    elif isinstance(row.default, bool):
        switch = argparse.BooleanOptionalAction
        group.add_argument(name, dest=row.name, action=switch, default=argparse.SUPPRESS, help=meaning)
    else:
        group.add_argument(name, dest=row.name, default=argparse.SUPPRESS, metavar="VALUE", help=meaning)


def _flag_of(name: str) -> str:
    return _LISTS.get(name, f"--{name.replace('_', '-')}")


def read_settings(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> ServeSettings:
    """Return what the flags, the file that they name and the environment say.

    Raises `InvalidSettings`, by the name of a flag, a key of the file or a variable, and `Refused`.
    """
    path: Path | None = flags.get("config")
    content = {} if path is None else _content_of(path)
    models = content.pop("models", {})
    if not isinstance(models, Mapping):  # folders alone, as the setting has them
        models = {"folders": models}
    models = dict(models)
    if "folders" in models and not isinstance(models["folders"], Mapping):
        content["models"] = models.pop("folders")
    given: dict[str, tuple[Any, int]] = {}
    for row in ROWS:
        if path is not None and row.name in content:
            value = _seen_from(path.absolute().parent, row.name, content.pop(row.name))
            given[row.name] = row.parse(f"{row.name} in {path}", value), _BY_FILE
        if row.name in flags:
            given[row.name] = row.parse(_flag_of(row.name), flags[row.name]), _BY_FLAG
    for unknown in content:
        closest = difflib.get_close_matches(unknown, [row.name for row in ROWS], 1, cutoff=0)
        raise Refused(f"{path} has {unknown!r}, which is no setting: is {closest[0]} meant?")
    chosen: dict[str, Any] = {row.name: given[row.name][0] for row in SETTINGS if row.name in given}
    settings = Settings.from_environment({"LOADMASTER_MAX_LEASES": "slots", **environment}, **chosen)
    for row in (*SERVE_SETTINGS, *SERVER_SETTINGS):
        given.setdefault(row.name, _from_environment(row, environment))
    own = {row.name: given[row.name][0] for row in SERVE_SETTINGS}
    server: dict[str, Any] = {row.name: given[row.name][0] for row in SERVER_SETTINGS}
    server[_SECRET] = _key(given)
    if own["host"]:  # a name that it listens by is a name that it may be called by
        server["allow_hosts"] = (*server["allow_hosts"], own["host"].lower())
    commands = {name: _command(cast(Path, path), name, models.pop(name)) for name in _names_of_commands(models)}
    configured = tuple(_configured(cast(Path, path), name, values) for name, values in models.items())
    if twice := next((alias for one in configured for alias in one.aliases if alias in commands), None):
        raise Refused(f"{path}: the name {twice!r} is an alias and a command: name one of them otherwise")
    return ServeSettings(path, settings, ServerSettings(**server), own, configured, commands, chosen)


def _content_of(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as opened:
            content, state = opened.read(_LARGEST_FILE + 1), os.fstat(opened.fileno())
        if len(content) > _LARGEST_FILE:
            raise Refused(f"the file {path} is larger than 1 MiB, which no file of settings is")
        found = tomllib.loads(content.decode())
        models = found.get("models")
        if _PROGRAM in found or (isinstance(models, Mapping) and _names_of_commands(models)):
            _check_writers(path, state)
        return found
    except OSError as error:
        raise Refused(f"the file {path} cannot be read ({error.strerror}): name another with --config") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"the file {path} is no TOML: {error}") from None


def _check_writers(path: Path, state: os.stat_result) -> None:
    """Raise `Refused` for a file that names a program where others than this user and root may say what it names."""
    places = [path.absolute()]
    while places[-1].is_symlink():  # a link says what the file is, and so does each folder on the way to it
        places.append(places[-1].parent / places[-1].readlink())
    places.append(path.resolve())
    owned = [("it", state), *(("a link to it", place.lstat()) for place in places)]
    owned += [("its folder", place.parent.stat()) for place in places]
    for what, found in owned:
        if found.st_uid not in (0, os.geteuid()):
            raise Refused(f"the file {path} names a program, and {what} is another user's: chown it to this one")
    folders = dict.fromkeys(folder for place in places for folder in place.parents)
    for what, name, found in (("it", path, state), *(("its folder", folder, folder.stat()) for folder in folders)):
        if found.st_mode & _OF_OTHERS and not (what != "it" and found.st_mode & stat.S_ISVTX):
            raise Refused(f"the file {path} names a program, and others may write to {what}: chmod go-w {name}")


def _names_of_commands(models: Mapping[str, Any]) -> list[str]:
    return [name for name, values in models.items() if isinstance(values, Mapping) and "command" in values]


def _command(path: Path, name: str, values: Mapping[str, Any]) -> CommandModel:
    known = [each.name for each in fields(CommandModel) if each.init and each.name != "name"]
    for key in values:
        if key not in known:
            raise Refused(f"the model {name!r} in {path}: {key} is nothing of a command; there are {', '.join(known)}")
    try:
        return CommandModel(name, **values)
    except SchedulerError as error:
        raise Refused(f"the model {name!r} in {path}: {error}") from None


def _from_environment(row: Setting, environment: Mapping[str, str]) -> tuple[Any, int]:
    """Return a value of the environment, else the default, and which of both it is."""
    for variable, parse in ((row.variable, row.parse), (row.reference, row.reference_parse or row.parse)):
        if variable and (text := environment.get(variable, "").strip(_AROUND_VALUES)):
            return parse(variable, text), _BY_ENVIRONMENT
    return row.parse(row.name, row.default), _BY_DEFAULT


def _key(given: Mapping[str, tuple[Any, int]]) -> str | None:
    """Return the key of clients: the one in the key file, unless a stronger source names the key itself."""
    (path, by_file), (key, by_text) = given["api_key_file"], given[_SECRET]
    if path is None or by_text < by_file:
        return cast("str | None", key)
    try:
        with path.open("rb") as opened:
            text = opened.read(_LARGEST_KEY_FILE + 1).decode(errors="replace").strip()
    except OSError as error:
        raise Refused(f"the key file {path} cannot be read ({error.strerror}): let this user read it") from None
    if not text:
        raise Refused(f"the key file {path} is empty: write a key into it, as from `openssl rand -hex 32`")
    if len(text) > _LARGEST_KEY_FILE:
        raise Refused(f"the key file {path} is larger than 4 KiB, which no key is: name another with --api-key-file")
    row = next(row for row in SERVER_SETTINGS if row.name == _SECRET)
    return cast(str, row.parse(f"the key in {path}", text))


def _seen_from(folder: Path, name: str, value: Any) -> Any:
    """Return the paths of a value of a file in `folder`: relative ones are seen from there."""
    if name not in _PATHS or value in _NO_PATHS or (name in _PATHS_OR_NOT and os.sep not in str(value)):
        return value
    if isinstance(value, list):
        return [_seen_from(folder, name, part) for part in value]
    if not isinstance(value, str) or not value:
        return value
    parts = value.split(os.pathsep) if name == "models" else [value]
    return os.pathsep.join(os.path.join(folder, os.path.expanduser(part)) for part in parts)


def _configured(path: Path, name: str, values: Any) -> ConfiguredModel:
    try:
        return configured_model(name, values, path.absolute().parent)
    except SchedulerError as error:
        raise Refused(f"the model {name!r} in {path}: {error}") from None
