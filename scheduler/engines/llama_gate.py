"""The gate of a runner that keeps prompts or has adapters: clients reach the engine through it, but for both of these.

llama.cpp's server opens `POST /slots/…` to all its keys once it has a folder for slots: each client could write files,
and erase or replace the prompts of others. It opens `POST /lora-adapters` too, which changes the answers of all. So the
engine listens with a key that the scheduler alone has, and clients get the address and the key of this gate, which runs
in the engine's process. It refuses every path that could name a slot or change adapters with 403, puts the engine's key
in the place of the client's, and passes on the bytes of all else.

A request to an engine with adapters is passed on with their scales: those that follow a dot behind the client's key, or
those of the load. Where a request says none, llama.cpp would go on from a prompt that was computed with other adapters.

A connection serves one request, and the engine is told to close it after that: nothing behind the head that was
checked can be another request. A path in any but its plain spelling is refused, since the engine decodes paths.

Like `llama_child`, this module imports nothing of the project.
"""

from __future__ import annotations

import hmac
import json
import re
import selectors
import socket
import threading
import time
from contextlib import suppress
from typing import NamedTuple

HEAD_LIMIT_BYTES = 64 << 10
HEAD_TIMEOUT_S = 30.0
MOST_CONNECTIONS = 1024  # at once, as the engine has threads at most
CHUNK_BYTES = 64 << 10
PAUSE_S = 0.1  # where no connection can be taken
LAST_BYTES, LAST_TIMEOUT_S = 1 << 20, 1.0  # of a refused request, read before its connection ends
REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) (/[\w./:-]*)(?:\?[!-~]*)? HTTP/1\.[01]")
OF_THE_GATE = frozenset({b"authorization", b"connection", b"x-api-key"})  # fields that the engine gets from the gate
BODY_LIMIT_BYTES = 256 << 20
PLAIN_SCALE = re.compile(rb"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
CHOOSES = re.compile(rb"(?:/v1)?/(?:chat/completions|completions|responses)|/completion|/infill")  # paths with adapters
COMPUTES_NOTHING = re.compile(rb".*/(?:count_tokens|input_tokens)|/(?:de)?tokenize|/apply-template")
LENGTH = re.compile(rb"content-length:\s*(\d{1,9})\s*", re.IGNORECASE)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
FORBIDDEN = b'{"error":{"code":403,"message":"This server passes no such request on","type":"permission_error"}}'
REFUSAL = (
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
    % (len(FORBIDDEN), FORBIDDEN)
)

Restore = tuple[int, str, float]  # a slot, the name of its file, and how long reading it may take, in seconds


class Asked(NamedTuple):
    """A request's head, as far as the gate goes by it."""

    method: bytes
    path: bytes
    passed: bytes  # the head as the engine gets it
    scales: list[float]  # of adapters, as the client's key says; empty: it says nothing


class Gate:
    """Restores slots once the engine serves, and then passes clients' requests on; its threads end with the process.

    It is made before this process may no longer connect anywhere, since its threads must.
    """

    def __init__(self, key: str, engine_key: str, restores: list[Restore], scales: list[float]) -> None:
        self.restored: list[tuple[int, int]] = []  # slots and the tokens that the engine says it has restored
        self._key, self._engine_key = key.encode(), engine_key.encode()
        self._restores = restores
        self._scales = scales  # of the load, for each adapter
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._engine = ("", 0)
        self._serves, self._opened = threading.Event(), threading.Event()
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        threading.Thread(target=self._run, daemon=True).start()

    def open(self, engine_url: str) -> str:
        """Restore the slots of an engine that serves, let clients in, and return the gate's address."""
        host, _, port = engine_url.removeprefix("http://").rpartition(":")
        self._engine = (host, int(port))
        self._serves.set()
        self._opened.wait()
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _run(self) -> None:
        self._serves.wait()
        for slot, name, timeout_s in self._restores:
            tokens = self._restore(slot, name, timeout_s)
            self.restored.append((slot, tokens))
        self._opened.set()
        while True:
            self._places.acquire()
            try:
                client, _ = self._listener.accept()
            except OSError:  # the client has left already, or there are too many open files
                self._places.release()
                time.sleep(PAUSE_S)
                continue
            try:
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()
            except RuntimeError:  # the system allows no more threads now
                self._places.release()
                client.close()

    def _restore(self, slot: int, name: str, timeout_s: float) -> int:
        """Have the engine read a slot's file; return how many tokens the slot has now, by the engine's own count."""
        body = json.dumps({"filename": name}).encode()
        question = (
            b"POST /slots/%d?action=restore HTTP/1.0\r\nAuthorization: Bearer %s\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (slot, self._engine_key, len(body), body)
        )
        answer = b""
        try:
            with socket.create_connection(self._engine, timeout=timeout_s) as engine:
                engine.sendall(question)
                while part := engine.recv(CHUNK_BYTES):
                    answer += part
            tokens = json.loads(answer.partition(b"\r\n\r\n")[2]).get("n_restored", 0)
        except (OSError, ValueError, AttributeError):
            return 0
        return tokens if isinstance(tokens, int) else 0

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, suppress(OSError):
                client.settimeout(HEAD_TIMEOUT_S)
                head, rest = read_head(client)
                asked = checked(head, self._key, self._engine_key)
                if asked is not None and self._scales:
                    asked, rest = self._with_adapters(client, asked, rest)
                if asked is None:
                    refuse(client)
                    return
                client.settimeout(None)
                with socket.create_connection(self._engine) as engine:
                    engine.sendall(asked.passed + rest)
                    relay(client, engine)
        finally:
            self._places.release()

    def _with_adapters(self, client: socket.socket, asked: Asked, rest: bytes) -> tuple[Asked | None, bytes]:
        """Return a request that says which adapters are applied, with its whole body; None: it is not allowed.

        Where adapters are switched a request may choose, and may reuse a prompt (`cache_prompt`) since it says so.
        """
        switched = 0.0 in self._scales
        scales = asked.scales or self._scales
        if asked.method != b"POST" or COMPUTES_NOTHING.fullmatch(asked.path):
            return asked, rest
        if len(scales) != len(self._scales) or not (switched or scales == self._scales):
            return None, b""
        if not CHOOSES.fullmatch(asked.path):
            return (asked, rest) if scales == self._scales else (None, b"")
        body = read_body(client, asked.passed, rest)
        if not body.startswith(b"{") or not body.endswith(b"}"):
            return None, b""
        lora = json.dumps([{"id": id, "scale": scale} for id, scale in enumerate(scales)]).encode()
        inner = body[1:-1].strip()
        first = b'"cache_prompt":true,' if switched else b""  # what the client says comes behind it, and counts
        body = b'{%s%s%s"lora":%s}' % (first, inner, b"," if inner else b"", lora)
        fields = [
            each for each in asked.passed.split(b"\r\n") if not each.lower().startswith((b"content-length", b"expect"))
        ]
        fields.insert(1, b"Content-Length: %d" % len(body))
        return asked._replace(passed=b"\r\n".join(fields)), body


def read_head(client: socket.socket) -> tuple[bytes, bytes]:
    """Return a request's head, up to its empty line, and what came behind it; an empty head where there is none."""
    head = b""
    while b"\r\n\r\n" not in head:
        part = client.recv(CHUNK_BYTES)
        if not part or len(head) > HEAD_LIMIT_BYTES:
            return b"", b""
        head += part
    head, _, rest = head.partition(b"\r\n\r\n")
    return head, rest


def read_body(client: socket.socket, head: bytes, rest: bytes) -> bytes:
    """Return a request's body, without blanks around it; empty where its length is not told, or too large."""
    lengths = [found for line in head.split(b"\r\n") if (found := LENGTH.fullmatch(line))]
    if len(lengths) != 1 or int(lengths[0][1]) > BODY_LIMIT_BYTES or b"\r\ntransfer-encoding" in head.lower():
        return b""
    if b"\r\nexpect" in head.lower():
        client.sendall(CONTINUE)
    left = int(lengths[0][1]) - len(rest)
    parts = [rest]
    while left > 0 and (part := client.recv(CHUNK_BYTES)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts).strip() if left == 0 else b""


def checked(head: bytes, key: bytes, engine_key: bytes) -> Asked | None:
    """Return a request as the engine gets it, with the engine's key if the client has its own; None: not allowed."""
    line, *fields = head.split(b"\r\n")
    asked = REQUEST_LINE.fullmatch(line)
    if asked is None or b"slots" in (path := asked[2].lower()) or (asked[1] == b"POST" and b"lora" in path):
        return None
    passed, known, scales = [line], False, b""
    for field in fields:
        name, colon, value = field.partition(b":")
        if not colon or not name.strip() or field[:1].isspace() or b"\n" in field or b"\r" in field:
            return None  # a reader might take it for another line
        if (name := name.strip().lower()) not in OF_THE_GATE:
            passed.append(field)
        elif name != b"connection" and not known:
            said, _, scales = value.strip().removeprefix(b"Bearer ").strip().partition(b".")
            known = hmac.compare_digest(said, key)
    passed += [b"Authorization: Bearer " + engine_key] if known else []
    found = [*map(float, PLAIN_SCALE.findall(scales))] if known else []
    return Asked(asked[1], path, b"\r\n".join([*passed, b"Connection: close", b"", b""]), found)


def refuse(client: socket.socket) -> None:
    """Refuse a request, and read what is left of it: a reset would take the answer from the client."""
    client.sendall(REFUSAL)
    client.shutdown(socket.SHUT_WR)
    client.settimeout(LAST_TIMEOUT_S)
    left = LAST_BYTES
    while left > 0 and (part := client.recv(CHUNK_BYTES)):
        left -= len(part)


def relay(client: socket.socket, engine: socket.socket) -> None:
    """Pass bytes both ways until either end closes: the engine after its answer, a client that leaves before that."""
    with selectors.DefaultSelector() as selector:
        for ends in ((client, engine), (engine, client)):
            ends[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a token does not wait for the next one
            selector.register(ends[0], selectors.EVENT_READ, ends)
        while True:
            for ready, _ in selector.select():
                one, other = ready.data
                if not (part := one.recv(CHUNK_BYTES)):
                    return
                other.sendall(part)
