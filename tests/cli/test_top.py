"""The commands `loadmaster ps` and `loadmaster top`, which show what a server does."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import ioctl
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from scheduler.cli.main import main
from scheduler.cli.top import View
from scheduler.http import create_app
from scheduler.testing import FakeMachine
from tests.support.running import running

KEY = "the-key-of-the-server"
PATIENCE_S = 60.0


@contextmanager
def busy_server(**options: Any) -> Iterator[tuple[str, FakeMachine]]:
    """Yield the address of a server with an idle model, one in use, one that loads, and a request that waits."""
    with FakeMachine(memory="10GiB", keep_alive="1h", auto_advance=False) as fake:
        fake.model("resting", size="1GiB").model("busy", size="4GiB").model("slow", size="2GiB", load="1h")
        fake.model("waiting", size="6GiB")
        app = create_app(fake.scheduler, **options)  # which is told of all that follows
        futures = [fake.scheduler.submit(name) for name in ("resting", "busy")]
        fake.advance("1s")
        resting, busy = (future.result(5) for future in futures)
        resting.release()
        late = [fake.scheduler.submit("slow", num_ctx=512), fake.scheduler.submit("waiting")]
        fake.advance("1s")
        with running(app) as url:
            yield url, fake
        for future in late:
            future.cancel()
        busy.release()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scheduler.cli", *arguments], capture_output=True, text=True, timeout=PATIENCE_S * 2
    )


def test_ps_shows_devices_runners_and_the_queue() -> None:
    """Each runner has its state and what ends it, each waiting request its reason."""
    with busy_server() as (url, _):
        done = run("ps", url)
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if len(line.split()) > 1}
    assert (
        "idle" in lines["resting"] and "1 GiB of cpu" in lines["resting"] and "its keep-alive, in" in lines["resting"]
    )
    assert "ready" in lines["busy"] and "not while it has leases" in lines["busy"]
    assert re.search("3 +slow +loading", done.stdout) and "its model to load" in lines["slow"]
    assert "to become idle" in lines["waiting"] and lines["waiting"].split()[0] in ("1", "2")
    assert "cpu" in done.stdout and "10 GiB" in done.stdout


def test_ps_prints_the_status_as_json() -> None:
    """With `--json` it is what the server tells."""
    with busy_server() as (url, fake):
        told = json.loads(run("ps", "--json", url.removeprefix("http://")).stdout)
        assert told.keys() == fake.scheduler.status().to_json().keys()
    assert [runner["model"] for runner in told["runners"]] == ["resting", "busy", "slow"]


def test_ps_sends_the_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that asks for a key gets it; without one the command says where to put it."""
    with busy_server(api_key=KEY) as (url, _):
        refused = run("ps", url)
        monkeypatch.setenv("LOADMASTER_API_KEY", KEY)
        assert run("ps", url).returncode == 0
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"loadmaster: {url}: the server asks for a key: set LOADMASTER_API_KEY\n"


@pytest.mark.parametrize("command", ["ps", "top"])
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///etc/passwd", "the address of a server"),
        ("http://", "the address of a server"),
        ("http://[::1", "the address of a server"),
        ("http://127.0.0.1:99999", "the address of a server"),
        ("127.0.0.1:{closed}", "no server of loadmaster answers (Connection refused)"),
        ("http://127.0.0.1:1/a b", "no server of loadmaster answers"),
    ],
)
def test_what_is_no_server_is_told_in_one_line(
    command: str, url: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong address, and one at which nothing answers, end with status 2."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert main([command, url.format(closed=port)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and words in error and error.count("\n") == 1


@pytest.mark.parametrize("key", ["line\nbreak", "ümlaut"])
def test_a_key_that_cannot_be_sent_is_not_shown(
    key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key is a secret in errors too."""
    monkeypatch.setenv("LOADMASTER_API_KEY", key)
    assert main(["ps", "http://127.0.0.1:1"]) == 2
    assert key.split("\n")[0] not in capsys.readouterr().err


class Other(BaseHTTPRequestHandler):
    """A server of another kind."""

    answer: tuple[int, bytes] = 200, b""
    location = ""
    asked: tuple[str, ...] = ()

    def do_GET(self) -> None:
        type(self).asked += (f"{self.path} {self.headers.get('Authorization')}",)
        status, content = self.answer
        self.send_response(status)
        if self.location:
            self.send_header("Location", self.location)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def other_server(status: int, content: bytes, location: str = "") -> Iterator[tuple[str, type[Other]]]:
    kind = type("Kind", (Other,), {"answer": (status, content), "location": location})
    with HTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", kind
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (404, b"404 page not found", "404"),
        (200, b"<html>", "answers"),
        (200, b'{"a": 1}', "no status"),
        (500, b"", "500"),
    ],
)
def test_another_server_is_no_server(
    status: int, content: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What answers otherwise than a server of loadmaster is told to be none, in one line."""
    with other_server(status, content) as (url, _):
        assert main(["ps", url]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_redirect_takes_no_key_along(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that sends the client elsewhere gets an error, and the place elsewhere nothing."""
    monkeypatch.setenv("LOADMASTER_API_KEY", KEY)
    with other_server(200, b"{}") as (elsewhere, target), other_server(302, b"", f"{elsewhere}/status") as (url, first):
        assert main(["ps", url]) == 2
    assert first.asked == (f"/status Bearer {KEY}",) and target.asked == ()


def test_texts_of_a_server_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences in what a server tells are shown as text."""
    hostile = {"problems": ["\x1b]0;title\x07"], "devices": [], "queue": [], "runners": []}
    with other_server(200, json.dumps(hostile).encode()) as (url, _):
        assert main(["ps", url]) == 0
    assert "\x1b]" not in (out := capsys.readouterr().out) and r"\x1b]0;title\x07" in out


# -- top ---------------------------------------------------------------------------------------------------------------


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
        command = [sys.executable, "-m", "scheduler.cli", *arguments]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "50"}
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        self.modes, self._theirs = termios.tcgetattr(theirs), theirs
        self.text = ""

    def shows(self, *words: str, since: int = 0) -> None:
        """Wait until the terminal has shown the words, after what it had shown before if `since` says so."""
        until = time.monotonic() + PATIENCE_S
        while not all(word in self.text[since:] for word in words):
            assert time.monotonic() < until, f"{words} are not all in {self.text[-9000:]!r}"
            self.read()

    def read(self) -> None:
        there, _, _ = select.select([self._ours], [], [], 0.2)
        if there:
            self.text += os.read(self._ours, 65536).decode(errors="replace")

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def ended(self) -> tuple[int, bool]:
        """Return the exit status, and whether the terminal is as it was before."""
        until = time.monotonic() + PATIENCE_S
        while self.process.poll() is None and time.monotonic() < until:
            self.read()
        return self.process.wait(1), termios.tcgetattr(self._theirs)[3] == self.modes[3]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    opened = Terminal(*arguments)
    try:
        yield opened
    finally:
        opened.close()


def press_q(shown: Terminal) -> None:
    shown.press("xq")


def press_ctrl_c(shown: Terminal) -> None:
    shown.process.send_signal(signal.SIGINT)


@pytest.mark.parametrize("end", [press_q, press_ctrl_c])
def test_top_shows_what_happens_until_it_is_ended(end: Callable[[Terminal], None]) -> None:
    """What is loaded, what waits and why, and what was decided are there, and change; the terminal is as before."""
    with busy_server() as (url, fake), terminal("top", url) as shown:
        shown.shows("resting", "not while it has leases", "to become idle", "Decisions", "for waiting waits for")
        before = len(shown.text)
        fake.scheduler.pin("resting")
        shown.shows("nothing: it is pinned", since=before)
        end(shown)
        assert shown.ended() == (0, True)
        assert "\x1b[?1049h" in shown.text and "\x1b[?1049l" in shown.text  # the screen of before is back


def test_top_says_that_the_server_has_gone() -> None:
    """A server that ends is told as such, and `top` stays, with what it showed last."""
    with busy_server() as (url, fake), terminal("top", url) as shown:
        shown.shows("resting")
        before = len(shown.text)
        fake.close()
        shown.shows("the server closes", since=before)
        press_q(shown)
        assert shown.ended()[0] == 0


def test_top_needs_a_terminal() -> None:
    """In a pipe it says what to use instead."""
    with busy_server() as (url, _):
        done = run("top", url)
    assert done.returncode == 2 and "`loadmaster ps` prints the same once" in done.stderr


def test_a_server_of_another_version_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that lack what they should have end in words, and in no traceback."""

    class Strange:
        url = "http://here"

        def events(self) -> Iterator[tuple[str, Any]]:
            yield "status", {"runners": [{"id": 1}], "queue": [], "devices": [], "problems": []}

    class Waited(Exception):
        pass

    def wait(seconds: float) -> None:
        raise Waited

    monkeypatch.setattr(time, "sleep", wait)
    view = View(Strange())  # type: ignore[arg-type]
    with pytest.raises(Waited):
        view.follow()
    assert "of another version" in view._problem
