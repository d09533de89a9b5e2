"""The reports of a llama.cpp child, by its protocol and as a server, with every value checked."""

from __future__ import annotations

import http.client
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeGuard, get_args
from urllib.parse import urlsplit

from fsm.domain.devices import HOST, DeviceId
from fsm.domain.options import MOST_SLOTS
from scheduler.engines.interface import Buffer, BufferKind
from scheduler.engines.llama_sizing import CacheKind, EngineCache, EngineSizes

BUFFERS_LIMIT: Final = 256  # buffers that are read: a few for each GPU and kind
BYTES_LIMIT: Final = 1 << 50  # no buffer is larger
LAYERS_LIMIT: Final = 1 << 16
ANSWER_LIMIT_BYTES: Final = 1 << 16  # of the metrics, which take 3 KiB

_KINDS: Mapping[str, BufferKind] = {kind: kind for kind in get_args(BufferKind)}
_CACHE_KINDS: Mapping[str, CacheKind] = {kind: kind for kind in get_args(CacheKind)}
_URL = re.compile(r"http://127\.0\.0\.1:\d{1,5}")
_LARGEST = re.compile(rb"^llamacpp:n_tokens_max (\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The report of a child that serves."""

    url: str
    num_ctx: int | None  # the context that each slot really got, in tokens; None: not reported
    buffers: tuple[Buffer, ...]  # empty: not reported
    flash_attention: bool | None  # whether it is used; None: not reported
    engine_url: str  # of the engine itself, where clients have a gate; empty: they have none
    restored: Mapping[int, int]  # slot -> tokens of its prompt that the engine has restored


def loaded_of(message: Mapping[str, Any], gpus: Mapping[str, DeviceId]) -> Loaded | None:
    """Return what a serving child reports; None if its address is not of this machine.

    `gpus` are the GPUs that it uses, by its own names.
    """
    url, context = message.get("url"), message.get("num_ctx")
    if not isinstance(url, str) or not _URL.fullmatch(url):
        return None
    num_ctx = context if isinstance(context, int) and not isinstance(context, bool) and context > 0 else None
    used, engine_url = message.get("flash_attention"), message.get("engine_url")
    return Loaded(
        url,
        num_ctx,
        buffers_of(message.get("buffers"), gpus),
        used if isinstance(used, bool) else None,
        engine_url if isinstance(engine_url, str) and _URL.fullmatch(engine_url) else "",
        restored_of(message.get("restored")),
    )


def restored_of(told: object) -> Mapping[int, int]:
    """Return how many tokens each slot got back; entries of `told` that are not valid are left out."""
    found = {}
    for entry in told[:MOST_SLOTS] if isinstance(told, list) else ():
        match entry:
            case [int(slot), int(tokens)] if 0 <= slot < MOST_SLOTS and tokens >= 0:
                found[slot] = tokens
    return found


def buffers_of(told: object, gpus: Mapping[str, DeviceId]) -> tuple[Buffer, ...]:
    """Return a child's buffers, added up by device and kind; entries of `told` that are not valid are left out.

    `gpus` are by the names that the child has for them. Memory under any other name is left out too.
    """
    found: dict[tuple[DeviceId, BufferKind], int] = {}
    for entry in told[:BUFFERS_LIMIT] if isinstance(told, list) else ():
        match entry:
            case [str(name), str(kind), int(amount)] if kind in _KINDS and 0 < amount <= BYTES_LIMIT:
                device = HOST if name == "CPU" else gpus.get(name)
            case _:
                continue
        if device is not None:
            found[device, _KINDS[kind]] = found.get((device, _KINDS[kind]), 0) + amount
    return tuple(Buffer(device, kind, amount) for (device, kind), amount in sorted(found.items()))


def sizes_of(message: Mapping[str, Any]) -> EngineSizes | None:
    """Return what a dry run tells of one load; None where it tells no compute buffer, or something that cannot be."""
    told, compute_bytes, projector_bytes = message.get("caches"), message.get("compute"), message.get("projector")
    if not isinstance(told, list) or not _is_amount(compute_bytes) or not _is_amount(projector_bytes):
        return None
    caches = []
    for entry in told:
        match entry:
            case [str(kind), [*layers], int(cells), int(amount)] if kind in _CACHE_KINDS and cells >= 0:
                if not _is_amount(amount) or not all(map(_is_layer, layers)):
                    return None
                caches.append(EngineCache(_CACHE_KINDS[kind], tuple(layers), cells, amount))
            case _:
                return None
    return EngineSizes(tuple(caches), compute_bytes, projector_bytes) if compute_bytes else None


def _is_amount(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and 0 <= value <= BYTES_LIMIT


def _is_layer(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < LAYERS_LIMIT


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
