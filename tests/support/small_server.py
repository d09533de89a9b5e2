"""A program that serves over HTTP, as a user's own does: run by its path, it imports nothing of this project.

small_server.py PORT [--fail TEXT] [--wait SECONDS] [--leave] [--deaf] [--silent]
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BEGAN = time.monotonic()
WAIT_S = float(sys.argv[sys.argv.index("--wait") + 1]) if "--wait" in sys.argv else 0.0
LEFT: list[int] = []  # processes that it has started and that have left its group


class Handler(BaseHTTPRequestHandler):
    """Answers with what it was given."""

    def do_GET(self) -> None:
        ready = time.monotonic() - BEGAN >= WAIT_S
        if self.path == "/health" and not ready:
            return self.answer(503, "not yet")
        if self.path == "/end":
            os._exit(3)
        told = {"environment": dict(os.environ), "arguments": sys.argv[1:], "left": LEFT, "group": os.getpgid(0)}
        self.answer(200, {**told, "authorization": self.headers.get("Authorization")})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": f"{self.path} {json.dumps(asked, sort_keys=True)}"}
        self.answer(200, {"model": asked.get("model"), "choices": [{"index": 0, "message": message}]})

    def answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if "--fail" in sys.argv:
    print("reading the model", flush=True)
    sys.exit(f"error: {sys.argv[sys.argv.index('--fail') + 1]}")
if "--leave" in sys.argv:
    LEFT.append(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
if "--deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, lambda *_: os._exit(0))
print("serves", os.environ.get("ITS_KEY", "nothing secret"), flush=True)
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
