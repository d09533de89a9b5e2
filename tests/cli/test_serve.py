"""`loadmaster serve` as a process on real models: its start, its logs, its file, its end, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from scheduler.cli import main as cli
from scheduler.cli import serve
from scheduler.cli.serve_settings import read_settings
from tests.support.leaks import no_leaks
from tests.support.stores import ollama_model
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import LIMIT_S, assert_soon

PROMPT = "the answer to a secret question"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
LONG: dict[str, Any] = {"model": "slow", "prompt": "hello", "stream": True, "max_tokens": 20000, "ignore_eos": True}
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")


class Server:
    """A server in a process of its own: what it writes, where it listens, and its end."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def says(self, *words: str) -> bool:
        """Tell whether one line has all these words."""
        return any(all(word in line for word in words) for line in self.lines)

    def hears(self, number: signal.Signals, *words: str) -> None:
        """Send a signal, and wait for a line with these words."""
        self.process.send_signal(number)
        assert_soon(lambda: self.says(*words))

    @property
    def url(self) -> str:
        assert_soon(lambda: self.says("serving") or self.process.poll() is not None)
        (line,) = [line for line in self.lines if "serving" in line]
        return line.split(" at ")[1].split(";")[0]

    def ended(self) -> int:
        """Wait for the end, and return the exit status."""
        status = self.process.wait(LIMIT_S)
        self._reader.join(LIMIT_S)
        return status

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


Start = Callable[..., Server]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `tiny`, and with `slow`, which takes long for a long answer."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "tiny.gguf", context=4096)
    write_tiny_model(folder / "slow.gguf", layers=8, width=512, context=32768, seed=3)
    return folder


@contextmanager
def started(
    *arguments: object, models: Path | None = None, files: tuple[int, int] | None = None, **variables: str
) -> Iterator[Server]:
    """Start a server with these arguments and variables, at any free port; end it if the block has not.

    `files` are the soft and the hard limit of open files.
    """
    command = [sys.executable, "-m", "scheduler.cli", "serve", "--port", "0", "--no-gpus", *map(str, arguments)]
    command += ["--models", str(models)] if models is not None else []
    usual = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA_")}
    environment = {**usual, "HOME": "/nonexistent", **variables}
    if files is not None:
        command = ["sh", "-c", f'ulimit -Sn {files[0]}; ulimit -Hn {files[1]}; exec "$@"', "sh", *command]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        server = Server(process)
        try:
            yield server
        finally:
            process.kill()
            server.ended()


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Server]:
    """A server for tests that leave it as it was."""
    with started(models=models) as server:
        yield server


def post(server: Server, path: str, body: object, **headers: str) -> httpx2.Response:
    return httpx2.post(f"{server.url}{path}", json=body, headers=headers, timeout=60, trust_env=False)


def get(server: Server, path: str, **headers: str) -> httpx2.Response:
    return httpx2.get(f"{server.url}{path}", headers=headers, timeout=60, trust_env=False)


@contextmanager
def answering(server: Server) -> Iterator[Iterator[bytes]]:
    """Yield the rest of a long answer whose first part has come."""
    with httpx2.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60, trust_env=False) as response:
        parts = response.iter_raw()
        while b"data: " not in next(parts):  # comments, while it waits
            pass
        yield parts


# -- its start ---------------------------------------------------------------------------------------------------------


def test_it_says_where_it_serves_and_answers(served: Server) -> None:
    """The ready line counts the models and has the address; a chat is answered there."""
    assert served.url.startswith("http://127.0.0.1:") and served.says("serving 2 models at")
    answer = post(served, "/v1/chat/completions", CHAT)
    assert (answer.status_code, answer.json()["model"]) == (200, "tiny")


def test_a_start_that_takes_long_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a start does is said once the start has taken long, and no more after its end."""
    said: list[tuple[object, ...]] = []
    monkeypatch.setattr(serve.log, "info", lambda *words: said.append(words))
    start = serve._Start()
    start.doing("one thing")
    start.close()
    assert said == []
    monkeypatch.setattr(serve, "_SILENT_S", 0.0)
    start = serve._Start()
    start.doing("another thing")
    assert_soon(lambda: said)
    start.close()
    assert said == [("starting: %s", "another thing")]


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(models: Path, tmp_path: Path, abstract: bool) -> None:
    """The server tells systemd that it is ready, that it reads its file, and that it ends."""
    file = tmp_path / "serve.toml"
    file.write_text("")
    name = f"@loadmaster-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(name.replace("@", "\0"))
        notify.settimeout(LIMIT_S)
        with started("--config", file, models=models, NOTIFY_SOCKET=name) as server:
            assert notify.recv(999) == b"READY=1"
            assert get(server, "/health").status_code == 200
            server.process.send_signal(signal.SIGHUP)
            assert notify.recv(999).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert notify.recv(999) == b"READY=1"
            server.process.send_signal(signal.SIGTERM)
            assert notify.recv(999) == b"STOPPING=1"
            assert server.ended() == 0


def test_the_command_needs_the_extra_only_to_serve(models: Path) -> None:
    """Neither the library nor the command's help imports the server; without it, one line says what to install."""
    program = "import sys; sys.modules['uvicorn'] = None; from scheduler.cli.main import main; "
    quiet = f"{program}assert 'starlette' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", quiet]).returncode == 0
    done = subprocess.run(
        [sys.executable, "-c", f"{program}sys.exit(main(['serve', '--models', {str(models)!r}]))"],
        capture_output=True, text=True,
    )  # fmt: skip
    line = "loadmaster: the package uvicorn is missing: pip install 'loadmaster[server]'\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_many_connections_are_taken_where_few_files_may_be_open(models: Path) -> None:
    """The server raises the limit of open files, which is low for most users, to what its connections need."""
    with started(models=models, files=(100, 4096)) as server, ExitStack() as stack:
        port = int(server.url.rpartition(":")[2])
        for _ in range(150):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), LIMIT_S))
        assert post(server, "/v1/chat/completions", CHAT).status_code == 200


def test_a_client_that_is_gone_without_a_word_is_noticed() -> None:
    """Connections are probed, and end where nothing is taken for a minute, as of a machine that has lost its power."""
    settings = read_settings({"port": 0})
    (listening,) = serve._bound(settings, serve._addresses("127.0.0.1", 0))
    with listening, socket.create_connection(listening.getsockname(), LIMIT_S), listening.accept()[0] as accepted:
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) < 60
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


# -- its logs ----------------------------------------------------------------------------------------------------------


def access_lines(server: Server, path: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, server.lines) if line.get("path") == path]


def test_every_line_can_be_json_and_none_has_a_prompt(models: Path) -> None:
    """With `--log-format json` each line is an object; one tells of each request; prompts and keys are in none."""
    with started("--log-format", "json", models=models, LOADMASTER_API_KEY="k3y-0f-clients") as server:
        key = {"Authorization": "Bearer k3y-0f-clients"}
        assert post(server, "/v1/chat/completions", CHAT, **key).status_code == 200
        assert post(server, "/v1/chat/completions", {**CHAT, "model": "none"}, **key).status_code == 404
        assert post(server, "/v1/chat/completions", {**CHAT, "messages": PROMPT}, **key).status_code >= 400
        assert post(server, "/v1/completions", {"model": "tiny", "prompt": PROMPT}, **key).status_code == 200
        assert post(server, f"/v1/{'x' * 999}\n?q={PROMPT}".replace("\n", "%0A"), CHAT, **key).status_code == 404
        assert get(server, "/v1/models", Authorization="Bearer wrong").status_code == 401
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0
        found, unknown, wrong = access_lines(server, "/v1/chat/completions")
        assert (found["method"], found["status"], found["model"]) == ("POST", 200, "tiny")
        assert found["wait_s"] >= found["load_s"] > 0 and found["answer_s"] > 0
        assert found["tokens_in"] > len(PROMPT) and found["tokens_out"] == 4
        assert (unknown["status"], unknown["error"]) == (404, "model_not_found") and "model" not in unknown
        assert wrong["status"] == 400 or wrong["status"] == 500
        assert all("load_s" not in line for line in access_lines(server, "/v1/completions"))  # it was warm
        assert [line["status"] for line in access_lines(server, "/v1/models")] == [401]
        assert {"time", "level", "logger"} <= json.loads(server.lines[0]).keys()
        assert max(map(len, server.lines)) < 1000
        assert not server.says("secret question") and not server.says("k3y-0f-clients")


def test_lines_of_text_have_the_same_fields(served: Server) -> None:
    """A line of text has the time, the request, its status, and the other fields by their names."""
    post(served, "/v1/completions", {"model": "tiny", "prompt": PROMPT, "max_tokens": 2})
    words = ("POST /v1/completions 200 model=tiny wait_s=", " answer_s=", f" tokens_in={len(PROMPT)} tokens_out=2")
    assert_soon(lambda: served.says(*words))
    assert not served.says("secret question")


def test_a_client_that_leaves_is_logged(served: Server) -> None:
    """The line of a request whose client has left says so, with status 499 where the response had not begun."""
    with answering(served):
        pass
    assert_soon(lambda: served.says("POST /v1/completions 200", "left=true"))
    with pytest.raises(httpx2.ReadTimeout):
        content = {**LONG, "stream": False}
        httpx2.post(f"{served.url}/v1/completions", json=content, timeout=0.5, trust_env=False)
    assert_soon(lambda: served.says("POST /v1/completions 499", "left=true"))


# -- its file ----------------------------------------------------------------------------------------------------------


def test_the_file_names_models_and_is_read_again(models: Path, tmp_path: Path) -> None:
    """Models of the file have aliases and options; SIGHUP takes what can change, and says what stays."""
    (tmp_path / "nested").mkdir()
    for name in ("tiny", "second"):
        shutil.copy(models / "tiny.gguf", tmp_path / "nested" / f"{name}.gguf")
    file = tmp_path / "serve.toml"
    first = """
        keep_alive = "1h"
        [models]
        folders = ["nested"]
        [models.chat]
        path = "nested/tiny.gguf"
        aliases = ["gpt-4o"]
        options = { num_ctx = 256, num_parallel = 1 }
    """
    file.write_text(first)
    with started("--config", file) as server:
        assert [one["id"] for one in get(server, "/v1/models").json()["data"]] == ["chat", "second", "tiny"]
        for name in ("chat", "gpt-4o"):
            assert post(server, "/v1/chat/completions", {**CHAT, "model": name}).json()["model"] == name
        too_long = {"model": "gpt-4o", "prompt": "a" * 300, "max_tokens": 1}
        assert post(server, "/v1/completions", too_long).status_code == 400
        assert post(server, "/v1/completions", {**too_long, "model": "other"}).status_code == 404

        more = "[models.other]\nbase = 'second'\npin = true\noptions.num_ctx = 1024\n"
        file.write_text(first.replace('"1h"', '"2h"\npatience = "1m"') + more)
        server.hears(signal.SIGHUP, "it names 2 models; keep_alive changed; patience cannot change before a restart")
        assert post(server, "/v1/completions", {**too_long, "model": "other"}).status_code == 200

        file.write_text("port = 'none'")
        server.hears(signal.SIGHUP, "ERROR port in ", "everything stays as it was")
        file.write_text("[models.other]\nbase = 'nothing'")
        server.hears(signal.SIGHUP, "ERROR the model 'other' in ", "everything stays as it was")
        assert post(server, "/v1/completions", {**too_long, "model": "other"}).status_code == 200
        file.write_text("")
        server.hears(signal.SIGHUP, "it names 0 models; keep_alive changed; models cannot change before a restart")
        assert_soon(lambda: post(server, "/v1/completions", {**too_long, "model": "other"}).status_code == 404)


def test_without_a_file_a_hang_up_ends_it(models: Path) -> None:
    """A server without a file ends when its terminal is closed."""
    with started(models=models) as server:
        assert get(server, "/health").status_code == 200
        server.process.send_signal(signal.SIGHUP)
        assert server.ended() == 0


# -- its end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_at_the_end_answers_finish_and_new_requests_are_refused(models: Path, number: signal.Signals) -> None:
    """The first signal lets a stream finish, refuses others in their protocol's terms, and ends with status 0."""
    with started("--close-timeout", "1m", models=models) as server, answering(server) as parts:
        server.hears(number, "ending: answers may take up to 1m more")
        refused = post(server, "/v1/chat/completions", CHAT)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert "ending" in refused.json()["error"]["message"]
        assert post(server, "/v1/messages", CHAT).json()["error"]["type"] == "overloaded_error"
        assert get(server, "/health").status_code == 200
        assert get(server, "/ready").status_code == 503
        assert len(b"".join(parts[0] for parts in zip(parts, range(20), strict=False))) > 0
        assert server.process.poll() is None
    # the block has left the stream, so that nothing is waited for any more


def test_an_answer_may_not_take_longer_than_told(models: Path) -> None:
    """After `close_timeout` a stream ends with an error in its protocol, and the server with status 0."""
    with started("--close-timeout", "0.5s", models=models) as server, answering(server) as parts:
        server.process.send_signal(signal.SIGTERM)
        last = b"".join(parts)
        assert b'"error":' in last and last.endswith(b"data: [DONE]\n\n")
        assert server.ended() == 0


def test_it_ends_when_the_last_answer_has_ended(models: Path) -> None:
    """The end comes with the last answer, and not with the limit."""
    with started("--close-timeout", "10m", models=models) as server:
        with answering(server):
            server.hears(signal.SIGTERM, "ending: answers may take up to 10m more")
            assert server.process.poll() is None
        assert server.ended() == 0


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_it_at_once(models: Path, second: signal.Signals) -> None:
    """The second signal ends the process with the signal's status, and its runners with it."""
    with started("--close-timeout", "10m", models=models) as server, answering(server):
        children = server.children()
        assert children
        server.hears(signal.SIGTERM, "ending")
        server.process.send_signal(second)
        assert server.ended() == 128 + second
        assert_soon(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))


# -- who may call ------------------------------------------------------------------------------------------------------


def test_a_key_from_a_file_is_asked_for(models: Path, tmp_path: Path) -> None:
    """The key in the file, without its line break, is asked for by everything but /health; another machine may call."""
    (tmp_path / "key").write_text("from-the-file\n")
    arguments = ("--api-key-file", tmp_path / "key", "--host", "0.0.0.0")
    with started(*arguments, models=models, LOADMASTER_API_KEY="from-the-environment") as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        for key, status in (("from-the-file", 200), ("from-the-environment", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx2.get(f"{url}/v1/models", headers=headers, trust_env=False).status_code == status
        assert httpx2.get(f"{url}/health", trust_env=False).status_code == 200
        assert server.says("WARNING", "not encrypted", "--tls-cert")


@needs_openssl
def test_connections_can_be_encrypted(models: Path, tmp_path: Path) -> None:
    """With a certificate and its key the server speaks TLS, and warns of nothing."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    tls = ("--tls-cert", certificate, "--tls-key", key)
    with started("--host", "0.0.0.0", "--no-key", *tls, models=models) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(certificate))
        assert httpx2.get(f"{url}/health", verify=trusted, trust_env=False).status_code == 200
        assert not server.says("WARNING")


def test_a_proxy_may_publish_it_under_a_path(models: Path) -> None:
    """With `--root-path` the paths that the proxy has cut are served."""
    with started("--root-path", "/llm/", "--forwarded-allow-ips", "127.0.0.1", models=models) as server:
        assert get(server, "/v1/models", **{"X-Forwarded-For": "10.0.0.1"}).status_code == 200
        assert_soon(lambda: server.says("GET /v1/models 200"))


def test_ollamas_variables_count(models: Path, tmp_path: Path) -> None:
    """`OLLAMA_HOST` names host and port, `OLLAMA_ORIGINS` web pages, `OLLAMA_MODELS` the store; flags count more."""
    ollama_model(tmp_path, "registry.ollama.ai/library/pulled:latest", (models / "tiny.gguf").read_bytes())
    origins = "https://ui.example,chrome-extension://*"
    ollama = {"OLLAMA_HOST": "localhost:1", "OLLAMA_ORIGINS": origins, "OLLAMA_MODELS": str(tmp_path)}
    with started(models=models, **ollama) as server:
        names = [one["id"] for one in get(server, "/v1/models").json()["data"]]
        assert names == ["slow", "tiny", "pulled:latest"]
        for origin in ("https://ui.example", "chrome-extension://abc"):
            assert get(server, "/v1/models", Origin=origin).headers["access-control-allow-origin"] == origin
        assert get(server, "/v1/models", Origin="https://other.example").status_code == 403


def test_collections_of_garbage_look_at_nothing_that_was_there_before_it_served(models: Path) -> None:
    """What was imported is out of Python's collections while it serves, and back in them afterwards."""
    program = (
        "import gc, sys; from scheduler.cli.main import main; from scheduler.http.server import HttpServer; "
        "HttpServer.run = lambda self, sockets: print(len(gc.get_objects()) < 1000 < gc.get_freeze_count()); "
        f"main(['serve', '--port', '0', '--no-gpus', '--models', {str(models)!r}]); print(gc.get_freeze_count())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0"]


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.fixture
def refusal(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that returns the one line with which a start is refused, and the status with it."""
    for name in [name for name in os.environ if name.startswith("OLLAMA_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def refused(*arguments: object, file: str | None = None, **variables: str) -> str:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        if file is not None:
            (tmp_path / "serve.toml").write_text(file)
            arguments = ("--config", "serve.toml", *arguments)
        with no_leaks():
            try:
                status = cli.main(["serve", "--port", "0", "--no-gpus", *map(str, arguments)])
            except SystemExit as left:
                status = int(left.code or 0)
        output = capsys.readouterr()
        assert (status, output.out) == (2, "")
        assert output.err.startswith("loadmaster") and output.err.count("\n") == 1
        return output.err

    return refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--models", "none"), "the folder .*none cannot be read .*: name another with --models"),
        (("--models", "."), "there is no model in the folder .*: put GGUF files there"),
        (("--config", "none.toml"), "the file none.toml cannot be read .*--config"),
        (("--api-key-file", "no.key"), "the key file .*no.key cannot be read .*let this user read it"),
        (("--host", "0.0.0.0"), r"other machines reach the host 0\.0\.0\.0: .*--api-key-file FILE.*--no-key"),
        (("--host", ""), "other machines reach every address"),
        (("--host", "192.0.2.1", "--no-key"), "'192.0.2.1' is no address of this machine"),
        (("--host", "no.such.host.invalid"), "the host 'no.such.host.invalid' is not known"),
        (("--tls-cert", "a.pem"), "both --tls-cert and --tls-key"),
        (("--tls-cert", "a.pem", "--tls-key", "b.pem"), "the certificate .*a.pem and its key .* cannot be used"),
        (("--workers", "2"), "--workers cannot be '2': .*several workers would be several schedulers"),
        (("--port", "http"), "--port cannot be 'http': it must be a whole number"),
        (("--memory-limit", "lots"), "--memory-limit cannot be 'lots'"),
        (("--log-format", "xml"), "--log-format cannot be 'xml'"),
        (("--root-path", "a b"), "--root-path cannot be 'a b'"),
        (("--loud",), "--loud"),
    ],
)
def test_a_flag_that_cannot_be_is_one_line(refusal: Any, arguments: tuple[str, ...], said: str) -> None:
    """What cannot be served is one line that says what to do, with status 2."""
    assert re.search(said, refusal(*arguments))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("memory_limt = '2GiB'", "serve.toml has 'memory_limt', which is no setting: is memory_limit meant?"),
        ("memory_limit = 'lots'", "memory_limit in serve.toml cannot be 'lots'"),
        ("api_key = 'a b'", "api_key in serve.toml cannot be '…'"),
        ("= 1", "serve.toml is no TOML"),
        ("api_key_file = 'empty'", "cannot be read"),
        ("no_key = true\napi_key = 'a'", "there is a key, and --no-key"),
        ("[models.a]\npath = 'none.gguf'", "the model 'a' in serve.toml: .*there is no such file"),
        ("[models.a]\nbase = 'none'", "the model 'a' in serve.toml: .*none"),
        ("[models.a]\nbase = 'b'\npath = 'b'", "the model 'a' in serve.toml: base cannot be 'b': .*left out"),
        ("[models.a]\nsize = 1", "the model 'a' in serve.toml: size cannot be 1"),
        ("[models.a]\noptions.num_ctxx = 1", "the model 'a' in serve.toml: .*num_ctxx"),
        ("[models.a]\npath = 'tiny.gguf'\noptions.num_ctx = 'x'", "the model 'a' in serve.toml: .*num_ctx"),
        ("[models.a]\npath = 'tiny.gguf'\nkeep_alive = 'x'", "the model 'a' in serve.toml: keep_alive cannot be 'x'"),
        ("[models.a]\npath = 'tiny.gguf'\npin = 'x'", "the model 'a' in serve.toml: pin cannot be 'x'"),
        ("[models.a]\naliases = ['../b']\npath = 'b'", "the model 'a' in serve.toml: .*model"),
        ("models.a = {path = 'tiny.gguf'}\nmodels.b = {aliases = ['a']}", "aliases cannot be 'a'"),
        ("[models.a]\ncommand = 'serve'", "the model 'a' in serve.toml: command cannot be 'serve': .*a list"),
        ("[models.a]\ncommand = ['serve']\naliases = ['b']", "aliases is nothing of a command; there are .*memory"),
        ("models.a = 1", "the model 'a' in serve.toml: this cannot be 1"),
        ("[rules.'*']\nnum_ctx = 1", r"rules in serve.toml.\*.num_ctx cannot be 1"),
    ],
)
def test_a_file_that_cannot_be_is_one_line(refusal: Any, models: Path, tmp_path: Path, file: str, said: str) -> None:
    """What the file says wrongly is one line that names the file and the model."""
    shutil.copy(models / "tiny.gguf", tmp_path)
    assert re.search(said, refusal(file=file))


def test_variables_that_cannot_be_are_named(refusal: Any) -> None:
    """A wrong value of the environment is told by the name of its variable."""
    assert "WEB_CONCURRENCY cannot be '4'" in refusal(WEB_CONCURRENCY="4")


def test_a_port_in_use_is_named(refusal: Any, models: Path) -> None:
    """A port where another program listens is one line."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} is in use" in refusal("--port", port, "--models", models)


def test_an_empty_key_file_is_named(refusal: Any, tmp_path: Path) -> None:
    """A key file without a key does not mean that there is no key."""
    (tmp_path / "key").write_text("\n")
    assert "key is empty: write a key into it" in refusal("--api-key-file", "key")
