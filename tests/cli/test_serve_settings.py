"""What a server is told: each setting by flag, file and environment, in this order."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from scheduler.cli.serve_settings import ROWS, SERVE_SETTINGS, Refused, ServeSettings, add_flags, read_settings
from scheduler.config.settings import SERVER_VARIABLES, SETTINGS, Settings
from scheduler.errors.exceptions import InvalidSettings
from scheduler.http.settings import SERVER_SETTINGS, server_table

ROOT = Path(__file__).resolve().parents[2]
# A value of each setting as text, and the same value as it is read; a path is a path in the working folder.
VALUES: Mapping[str, str] = {
    "host": "localhost", "port": "8080", "api_key_file": "key", "no_key": "true", "tls_cert": "cert", "tls_key": "key",
    "root_path": "/llm", "forwarded_allow_ips": "10.0.0.1", "log_format": "json", "workers": "1",
    "api_key": "k3y", "allow_hosts": "a.example", "allow_origins": "https://a.example", "dashboard": "false",
    "dashboard_actions": "true", "sign_of_life": "2s", "patience": "3m", "body_limit": "2MiB", "body_timeout": "4s",
    "max_connections": "7", "ray": "auto",
    "memory_limit": "3GiB", "max_queue": "9", "max_runners": "3", "max_leases": "2", "keep_alive": "7m",
    "max_wait": "11s", "min_residency": "3s", "load_timeout": "9m", "recovery_timeout": "6s", "stop_grace": "3s",
    "close_timeout": "12s", "max_loads_per_gpu": "2", "max_host_loads": "3", "prefetch": "false", "eviction": "lru",
    "prestart": "false", "cpu_threads": "3", "gpus": "false", "integrated_gpus": "true",
    "probe_interval": "11s", "probe_timeout": "12s",
    "event_buffer": "99", "num_ctx": "999", "num_batch": "99", "auto_context_from_vram": "true", "num_parallel": "2",
    "flash_attention": "true", "cache_type": "q8_0", "spread_over_gpus": "true", "require_gpu": "true",
    "gpu_reserve": "1GiB", "gpu_limit": "2GiB", "models": "folder", "lock_folder": "locks",
    "measurement_file": "measured", "recording_file": "recorded", "recording_limit": "1MiB", "engine_log": "log",
    "keep_prompts": "3GiB", "llama_server": "./llama-server",
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_text("from-the-file\n")
    return tmp_path


def flags(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(arguments))


def read(*arguments: str, file: str | None = None, **variables: str) -> ServeSettings:
    if file is not None:
        Path("serve.toml").write_text(file)
        arguments = ("--config", "serve.toml", *arguments)
    return read_settings(flags(*arguments), variables)


def value_of(settings: ServeSettings, name: str) -> object:
    if name in settings.own:
        return settings.own[name]
    return getattr(settings.server if hasattr(settings.server, name) else settings.scheduler, name)


def test_each_setting_is_read_from_flag_file_and_variable() -> None:
    """A setting has the same value by its flag, its key of the file, and its variable, and it is not the default."""
    usual = read()
    for row in ROWS:
        if row.name == "rules":
            continue
        text = VALUES[row.name]
        flag = f"--{row.name.replace('_', '-')}"
        flag = flag.removesuffix("s") if row.name.startswith("allow_") else flag
        named = [flag, text]
        if isinstance(row.default, bool):
            named = [flag if text == "true" else flag.replace("--", "--no-")]
        by_file, by_variable = read(file=f'{row.name} = "{text}"'), read(**{row.variable: text})
        assert value_of(by_file, row.name) == value_of(by_variable, row.name), row.name
        if row.name not in ("api_key", "workers"):
            assert value_of(read(*named), row.name) == value_of(by_file, row.name) != value_of(usual, row.name), (
                row.name
            )


def test_a_key_is_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """Other users of the machine see command lines, so that the key itself is none of their parts."""
    with pytest.raises(SystemExit):
        flags("--api-key=k3y")


def test_flags_count_more_than_the_file_and_the_file_more_than_variables() -> None:
    """Of a setting that several name, the flag's value counts, then the file's, then the variable's, then Ollama's."""
    variables = {"LOADMASTER_KEEP_ALIVE": "3m", "OLLAMA_KEEP_ALIVE": "4m"}
    file = "keep_alive = '2m'"
    assert read("--keep-alive", "1m", file=file, **variables).scheduler.keep_alive == 60
    assert read(file=file, **variables).scheduler.keep_alive == 120
    assert read(file="", **variables).scheduler.keep_alive == 180
    assert read(OLLAMA_KEEP_ALIVE="4m").scheduler.keep_alive == 240
    assert read().scheduler.keep_alive == 300


def test_leases_are_limited_by_slots_unless_told() -> None:
    """`max_leases` is "slots" for a server, where nothing names it."""
    assert read().scheduler.max_leases == "slots"
    assert read(LOADMASTER_MAX_LEASES="3").scheduler.max_leases == 3
    assert read("--max-leases", "0").scheduler.max_leases == 0


def test_variables_of_a_server_do_not_disturb_a_scheduler() -> None:
    """A program beside the server has the same environment: the server's variables set nothing, and are no mistake."""
    assert {row.variable for row in (*SERVE_SETTINGS, *SERVER_SETTINGS)} == SERVER_VARIABLES
    assert Settings.from_environment(dict.fromkeys(SERVER_VARIABLES, "x")) == Settings.from_environment({})
    with pytest.raises(InvalidSettings, match="LOADMASTER_HOSTS"):
        read(LOADMASTER_HOSTS="a")


def test_the_settings_of_the_command_are_listed() -> None:
    """The page has the generated table of what the command alone has, and a file of its section can be read."""
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    assert server_table(SERVE_SETTINGS) in page
    example = page.partition("```toml\n")[2].partition("```")[0]
    settings = read(file=example.replace("/etc/loadmaster/key", "key"))
    assert [model.name for model in settings.models] == ["chat", "embedder", "qwen3:8b"]
    assert settings.server.api_key == "from-the-file" and settings.server.rules["*"]["num_ctx"].most == 8192


def test_the_recipe_of_a_container_starts_the_command() -> None:
    """The variables of the Containerfile are settings, and the examples' flags are flags."""
    page = (ROOT / "docs" / "recipes" / "container.md").read_text(encoding="utf-8")
    recipe = page.partition("```dockerfile\n")[2].partition("```")[0]
    variables = dict(re.findall(r"(LOADMASTER_\w+)=(\S+)", recipe))
    assert 'ENTRYPOINT ["loadmaster", "serve"]' in recipe and "USER 10001" in recipe
    settings = read("--allow-host", "loadmaster", **{**variables, "LOADMASTER_API_KEY_FILE": "key"})
    assert (settings.own["host"], settings.scheduler.models) == ("0.0.0.0", (Path("/models"),))
    assert len(variables) == 3 and "loadmaster" in settings.server.allow_hosts


def test_no_two_settings_have_one_name() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) == len(SETTINGS) + len(SERVER_SETTINGS) + len(SERVE_SETTINGS)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0", ("0.0.0.0", 11434)),
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        (":8080", ("", 8080)),
        ("http://host.example", ("host.example", 80)),
        ("https://host.example/path", ("host.example", 443)),
        ("http://host.example:9/", ("host.example", 9)),
        ("[::1]", ("::1", 11434)),
        ("[::1]:9", ("::1", 9)),
        ("::1", ("::1", 11434)),
        ("http://", ("127.0.0.1", 80)),
        ("'localhost'", ("localhost", 11434)),
    ],
)
def test_ollamas_address_means_what_it_means_there(text: str, address: tuple[str, int]) -> None:
    """`OLLAMA_HOST` names a host, a port, or both, with a scheme that has a usual port."""
    own = read(OLLAMA_HOST=text).own
    assert (own["host"], own["port"]) == address


@pytest.mark.parametrize("text", ["a:b", "1.2.3.4:99999", "[::1", "http://a:b"])
def test_an_address_that_is_none_is_named(text: str) -> None:
    with pytest.raises(InvalidSettings, match="OLLAMA_HOST"):
        read(OLLAMA_HOST=text)


def test_the_variable_of_the_server_counts_more_than_ollamas() -> None:
    own = read(OLLAMA_HOST="0.0.0.0:1", LOADMASTER_PORT="2").own
    assert (own["host"], own["port"]) == ("0.0.0.0", 2)


def test_the_key_file_counts_unless_the_key_is_named_more_strongly() -> None:
    """A key in a file counts more than one from the environment; a key file of the environment less than a key."""
    assert read("--api-key-file", "key", LOADMASTER_API_KEY="k").server.api_key == "from-the-file"
    assert read(file="api_key = 'k'", LOADMASTER_API_KEY_FILE="key").server.api_key == "k"
    assert read("--api-key-file", "key", file="api_key = 'k'").server.api_key == "from-the-file"
    assert read(LOADMASTER_API_KEY="k").server.api_key == "k"
    assert read("--api-key-file", "none", LOADMASTER_API_KEY="k").server.api_key == "k"


@pytest.mark.parametrize("content", ["", " \n", "two words", "ümlaut", "k" * 5000])
def test_a_key_file_without_a_key_is_refused_and_not_shown(folder: Path, content: str) -> None:
    """An empty key file is not the same as none, and what is in a wrong one is not printed."""
    (folder / "key").write_text(content)
    with pytest.raises((Refused, InvalidSettings)) as raised:
        read("--api-key-file", "key")
    assert not content.strip() or content not in str(raised.value)


def test_paths_in_a_file_are_seen_from_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths of a file are seen from there, wherever the server was started; those of flags from here."""
    (folder / "elsewhere").mkdir()
    (folder / "serve.toml").write_text(
        "lock_folder = 'locks'\nmeasurement_file = 'none'\napi_key_file = 'key'\n"
        "models.folders = ['a', '/b']\nmodels.m = { path = 'm.gguf', adapters = 'l.gguf', projectors = ['/p.gguf'], "
        "named_adapters = { sql = 's.gguf' } }"
    )
    monkeypatch.chdir(folder / "elsewhere")
    settings = read_settings(flags("--config", "../serve.toml", "--engine-log", "log"), {})
    here = Path("..").absolute()
    found = settings.scheduler
    assert [path.resolve() for path in found.models] == [folder / "a", Path("/b")]
    assert (found.lock_folder, found.measurement_file) == (here / "locks", None)
    assert found.engine_log == folder / "elsewhere" / "log"
    (model,) = settings.models
    assert model.path is not None and Path(model.path).resolve() == folder / "m.gguf"
    assert [Path(path).resolve() for path in model.changes["adapters"]] == [folder / "l.gguf"]
    assert model.changes["projectors"] == ("/p.gguf",)
    assert Path(model.changes["named_adapters"]["sql"]).resolve() == folder / "s.gguf"


def test_folders_may_be_named_without_a_table() -> None:
    """`models` of the file is the setting where it is no table, and a model may have the name `folders`."""
    assert read(file="models = '/a:/b'").scheduler.models == (Path("/a"), Path("/b"))
    assert read(file="models = ['/a']").scheduler.models == (Path("/a"),)
    settings = read(file="[models.folders]\npath = '/m.gguf'")
    assert settings.scheduler.models == () and [model.name for model in settings.models] == ["folders"]


def test_rules_are_a_table_of_the_file() -> None:
    """Rules for clients come from the file, and are what `create_app` takes."""
    settings = read(file="[rules.'*']\nnum_ctx = { max = 8192 }")
    assert settings.server.rules["*"]["num_ctx"].most == 8192
    assert settings.server_arguments()["rules"] == settings.server.rules


def test_a_program_is_named_by_a_file_of_this_user_alone(folder: Path) -> None:
    """A file that names a program is refused where others may write to it; without one it is read."""
    named = 'llama_server = "bin/llama-server"'
    assert read(file=named).scheduler.llama_server == folder / "bin" / "llama-server"
    assert read(file='llama_server = "sh"').scheduler.llama_server == Path(shutil.which("sh") or "")
    (folder / "serve.toml").chmod(0o662)
    with pytest.raises(Refused, match="names a program"):
        read(file=named)
    assert read(file="max_queue = 9").scheduler.max_queue == 9
    command = '[models.a]\ncommand = ["serve", "{port}"]\nmemory = { cpu = "1GiB" }'
    with pytest.raises(Refused, match="names a program, and others may write to it: chmod go-w"):
        read(file=command)
    (folder / "serve.toml").chmod(0o600)
    folder.chmod(0o777)
    with pytest.raises(Refused, match=f"others may write to its folder: chmod go-w {folder}"):
        read(file=command)
    folder.chmod(0o700)
    settings = read(file=command)
    assert settings.commands["a"].memory == {"cpu": 1 << 30} and not settings.models


def test_the_way_to_a_file_that_names_a_program_is_of_this_user_alone(folder: Path) -> None:
    """A folder above it, and the folder of a link to it, say what the file is: others may not write to them."""
    others, inner = folder / "others", folder / "others" / "inner"
    inner.mkdir(parents=True)
    for place in (folder, inner):
        (place / "own.toml").write_text('[models.a]\ncommand = ["serve", "{port}"]\nmemory = { cpu = "1GiB" }')
        (place / "own.toml").chmod(0o600)
    (others / "link.toml").symlink_to("../own.toml")
    (folder / "second.toml").symlink_to(others / "link.toml")
    ways = [inner / "own.toml", others / "link.toml", folder / "second.toml"]
    for way in ways:
        assert read("--config", str(way)).commands
    others.chmod(0o777)
    for way in ways:
        with pytest.raises(Refused, match=f"others may write to its folder: chmod go-w {others}"):
            read("--config", str(way))
