"""What may be done by hand: load, expire, pin and unpin a model."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from fsm.machine.runner import RunnerId
from scheduler.engines.engine_model import EngineModel
from scheduler.engines.python import PythonModel
from scheduler.errors.exceptions import ModelNotFound
from scheduler.http.errors import ErrorAnswer
from scheduler.http.exchange import Exchange, object_of
from scheduler.http.openai import PROTOCOL
from scheduler.http.protocol_module import Body
from scheduler.http.runner_routes import RunnerRoute, model_of
from scheduler.http.service import Service, refuse
from scheduler.http.settings import ServerSettings
from scheduler.models.model_spec import ModelSpec

Model = ModelSpec | PythonModel[Any] | EngineModel

NOT_ALLOWED = ErrorAnswer(
    403,
    "actions_not_allowed",
    "without a key, models are loaded, expired, pinned and unpinned from this machine only, and with the setting "
    "dashboard_actions",
)


def may_act(settings: ServerSettings, exchange: Exchange) -> bool:
    """Tell whether a client that the guard has let in may act: with the key, or from this machine where that is set."""
    return settings.api_key is not None or (settings.dashboard_actions and _is_local(exchange.client))


def _is_local(client: str | None) -> bool:
    try:
        return client is None or ipaddress.ip_address(client).is_loopback  # None: over a socket of this machine
    except ValueError:
        return False


def _acting(act: Callable[[Service, Model], Awaitable[str]]) -> Callable[[Service, Exchange], Awaitable[None]]:
    async def respond(service: Service, exchange: Exchange) -> None:
        if not may_act(service.settings, exchange):
            await refuse(exchange, PROTOCOL, NOT_ALLOWED)
            return
        content = await exchange.body(service.settings.body_limit, service.settings.body_timeout)
        done = await act(service, await _model_of(service, object_of(content)))
        await exchange.respond_json(200, {"status": done})

    respond.__doc__ = act.__doc__
    return respond


async def _model_of(service: Service, asked: Mapping[str, Any]) -> Model:
    """Return the model of a `runner` by its id, as the status has it, or else the one that `model` names."""
    runner = asked.get("runner")
    if not isinstance(runner, int) or isinstance(runner, bool):
        return await service.find(model_of(asked))
    service.observer.catch_up()
    life = service.observer.lives.get(RunnerId(runner))
    if life is None:
        raise ModelNotFound(f"of runner {runner}")
    return service.scheduler.model(life.model)


async def _load(service: Service, model: Model) -> str:
    """Load a model; what is known at once is told, and the load goes on."""
    loading = asyncio.wrap_future(service.scheduler.preload(model))
    loading.add_done_callback(lambda done: done.cancelled() or done.exception())
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(loading), service.settings.sign_of_life)
    return "loaded" if loading.done() else "loading"


async def _expire(service: Service, model: Model) -> str:
    """Unload a model, after its leases."""
    service.scheduler.expire(model)
    return "expired"


async def _pin(service: Service, model: Model) -> str:
    """Keep a model from eviction."""
    service.scheduler.pin(model)
    return "pinned"


async def _unpin(service: Service, model: Model) -> str:
    """Let a model be evicted again."""
    service.scheduler.unpin(model)
    return "unpinned"


ROUTES: tuple[RunnerRoute, ...] = ()
ENDPOINTS = (
    (("POST",), "/loadmaster/load", _acting(_load)),
    (("POST",), "/loadmaster/expire", _acting(_expire)),
    (("POST",), "/loadmaster/pin", _acting(_pin)),
    (("POST",), "/loadmaster/unpin", _acting(_unpin)),
)
BODIES = {path: Body("model runner", "") for _, path, _ in ENDPOINTS}
__all__ = ["BODIES", "ENDPOINTS", "PROTOCOL", "ROUTES"]
