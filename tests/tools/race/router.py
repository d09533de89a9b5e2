"""Contestants over HTTP: llama.cpp's own server, which loads and unloads models by itself, and ours."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2

from scheduler import Scheduler
from scheduler.http import create_app
from tests.support.running import running
from tests.tools.race.contestants import PATIENCE_S, Course, Opened, Tally, settings
from tests.tools.race.trace import Ask, Asker, Killed

START_S = 60.0
STOP_S = 30.0
_SPAWNS = "spawning server instance with name="  # its log line of each load
_BROKEN = ("proxy error", "could not establish connection", "failed to read connection")  # the child had gone


def find_binary(named: str | None) -> tuple[str, str]:
    """Return the path of `llama-server` and "", or "" and the reason why there is none; nothing is downloaded."""
    wanted = named or os.environ.get("LLAMA_SERVER") or "llama-server"
    found = shutil.which(wanted)
    if found is None:
        where = f"{wanted} is no program" if wanted != "llama-server" else "it is not on PATH"
        return "", f"no llama-server: {where}; name one with --llama-server PATH or LLAMA_SERVER=PATH"
    told = subprocess.run([found, "--help"], capture_output=True, text=True, timeout=START_S, check=False)
    if "--models-max" not in told.stdout + told.stderr:
        return "", f"{found} has no router mode (--models-max): a newer llama-server is needed"
    return found, ""


@contextmanager
def router(course: Course, binary: str, more: Sequence[str] = ()) -> Iterator[Opened]:
    """A router with its defaults but for the number of models, and for `more` arguments."""
    with router_at(course, binary, more) as (url, log), fresh_client(url) as client:
        yield Opened(http_asker(client, course), lambda: log.read_text(errors="replace").count(_SPAWNS))


@contextmanager
def router_at(course: Course, binary: str, more: Sequence[str] = ()) -> Iterator[tuple[str, Path]]:
    """Run a router and yield its address and its log."""
    port = _free_port()
    with TemporaryDirectory(prefix="race-router-") as folder:
        log = Path(folder) / "log"
        arguments = [
            binary, "--host", "127.0.0.1", "--port", str(port), "--offline",
            "--models-dir", str(course.folder), "--models-max", str(course.room), *more,
        ]  # fmt: skip
        hidden = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
        environment = {**hidden, "LLAMA_CACHE": folder}  # else it would offer models of earlier downloads
        with log.open("wb") as output:
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
                start_new_session=True,
            )  # fmt: skip
        try:
            _await(process, port, log)
            yield f"http://127.0.0.1:{port}", log
        finally:
            _stop(process)


@contextmanager
def over_http(course: Course) -> Iterator[Opened]:
    """The scheduler behind its own server, in this process."""
    with Scheduler(settings(course, models=course.folder)) as scheduler, running(create_app(scheduler)) as url:
        tally = Tally(scheduler.events())
        with fresh_client(url) as client:
            yield Opened(http_asker(client, course), lambda: tally.loads, tally.details)


def fresh_client(url: str) -> httpx2.Client:
    """Return a client with a new connection for every request, since a kept one that was closed would be an error."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    return httpx2.Client(base_url=url, timeout=PATIENCE_S, limits=limits, trust_env=False)


def http_asker(client: httpx2.Client, course: Course) -> Asker:
    """Return a function that requests by HTTP, as OpenAI's chat completions do."""

    def ask(ask: Ask) -> None:
        messages = [{"role": "user", "content": ask.question}]
        body = {"model": ask.model, "messages": messages, **course.parameters()}
        headers = {"serve_multiplexed_model_id": ask.model}
        try:
            answer = client.post("/v1/chat/completions", json=body, headers=headers)
        except httpx2.TransportError as error:
            raise Killed(f"the answer broke off: {error!r}") from error
        if answer.status_code != httpx2.codes.OK:
            text = f"{answer.status_code}: {answer.text}"
            raise Killed(text) if any(sign in text.lower() for sign in _BROKEN) else RuntimeError(text)
        if not answer.json()["choices"]:
            raise RuntimeError("an answer without a choice")

    return ask


def _await(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == httpx2.codes.OK:
                return
        except httpx2.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"the router did not start: {log.read_text(errors='replace')[-500:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the router, and kill the rest of its process group."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
