"""The reports of a llama.cpp child, by its protocol and as a server, with every value checked."""

from __future__ import annotations

import http.client
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args
from urllib.parse import urlsplit

from fsm.domain.devices import HOST, DeviceId
from scheduler.engines.interface import Buffer, BufferKind

BUFFERS_LIMIT: Final = 256  # buffers that are read: a few for each GPU and kind
BYTES_LIMIT: Final = 1 << 50  # no buffer is larger
ANSWER_LIMIT_BYTES: Final = 1 << 16  # of the metrics, which take 3 KiB

_KINDS: Mapping[str, BufferKind] = {kind: kind for kind in get_args(BufferKind)}
_URL = re.compile(r"http://127\.0\.0\.1:\d{1,5}")
_GPU = re.compile(r"CUDA(\d{1,3})")
_LARGEST = re.compile(rb"^llamacpp:n_tokens_max (\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The report of a child that serves."""

    url: str
    num_ctx: int | None  # the context that each slot really got, in tokens; None: not reported
    buffers: tuple[Buffer, ...]  # empty: not reported


def loaded_of(message: Mapping[str, Any], gpus: Sequence[DeviceId]) -> Loaded | None:
    """Return what a serving child reports; None if its address is not of this machine.

    `gpus` are the GPUs that the child sees, in its order.
    """
    url, context = message.get("url"), message.get("num_ctx")
    if not isinstance(url, str) or not _URL.fullmatch(url):
        return None
    num_ctx = context if isinstance(context, int) and not isinstance(context, bool) and context > 0 else None
    return Loaded(url, num_ctx, buffers_of(message.get("buffers"), gpus))


def buffers_of(told: object, gpus: Sequence[DeviceId]) -> tuple[Buffer, ...]:
    """Return a child's buffers, added up by device and kind; entries of `told` that are not valid are left out.

    The child names GPUs as it sees them ("CUDA0" is the first of `gpus`). Memory under any other name is left out too.
    """
    found: dict[tuple[DeviceId, BufferKind], int] = {}
    for entry in told[:BUFFERS_LIMIT] if isinstance(told, list) else ():
        match entry:
            case [str(name), str(kind), int(amount)] if kind in _KINDS and 0 < amount <= BYTES_LIMIT:
                device = _device(name, gpus)
            case _:
                continue
        if device is not None:
            found[device, _KINDS[kind]] = found.get((device, _KINDS[kind]), 0) + amount
    return tuple(Buffer(device, kind, amount) for (device, kind), amount in sorted(found.items()))


def _device(name: str, gpus: Sequence[DeviceId]) -> DeviceId | None:
    if name == "CPU":
        return HOST
    gpu = _GPU.fullmatch(name)
    return gpus[int(gpu[1])] if gpu is not None and int(gpu[1]) < len(gpus) else None


def largest_sequence(url: str, key: str, timeout_s: float) -> int | None:
    """Return the most tokens, of prompt and answer together, that one of a server's slots ever held.

    None if the server does not answer within `timeout_s` seconds (it is gone or busy), or does not count tokens.
    """
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=timeout_s)
    try:
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {key}"})
        found = _LARGEST.search(connection.getresponse().read(ANSWER_LIMIT_BYTES))
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return None if found is None else int(found[1])
