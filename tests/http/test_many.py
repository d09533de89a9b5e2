"""Many clients at once: every one is answered, whatever it waits for."""

from __future__ import annotations

import asyncio
import json
from urllib.parse import urlsplit

from tests.http.conftest import Serve, Served, eventually

CLIENTS = 200


async def ask(served: Served, model: str) -> bytes:
    """Ask for a stream and return all that comes."""
    address = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    body = json.dumps({"model": model, "prompt": "a", "max_tokens": 3, "ignore_eos": True, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    return answer


async def ask_all(served: Served) -> list[bytes]:
    """Ask for as many streams at once as there are clients, of three models in turns."""
    return await asyncio.gather(*(ask(served, ("m", "other", "deep/er")[number % 3]) for number in range(CLIENTS)))


def test_every_one_of_many_streams_is_answered(serve: Serve) -> None:
    """With room for one runner at a time, the streams of three models are all answered to their end."""
    served = serve({"max_runners": 1}, sign_of_life="0.2s")
    answers = asyncio.run(ask_all(served))
    wrong = [answer for answer in answers if b"HTTP/1.1 200 " not in answer or b"data: [DONE]" not in answer]
    assert not wrong, wrong[0][-500:]
    eventually(lambda: not any(runner.leases for runner in served.scheduler.status().runners))
