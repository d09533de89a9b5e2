"""The application inside another program's: under any prefix, beside other routes, with and without a lifespan."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import fastapi
import httpx2
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from scheduler import Scheduler
from scheduler.http import create_app
from tests.http.conftest import eventually
from tests.support.running import running

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("prefix", ["", "/models", "/a/b"])
@pytest.mark.parametrize("outer", ["starlette", "fastapi"])
def test_it_may_be_mounted_under_any_prefix(model_folder: Path, prefix: str, outer: str) -> None:
    """Routes, the key and errors in the terms of their protocol are those that it has alone."""
    with Scheduler(gpus=False, models=model_folder) as scheduler:
        inner = create_app(scheduler, api_key="k")
        app: Any = Starlette(routes=[Mount(prefix, inner)])
        if outer == "fastapi":
            app = fastapi.FastAPI()
            app.mount(prefix, inner)
        with running(app) as url:
            url += prefix
            assert httpx2.get(f"{url}/health").status_code == 200
            assert httpx2.get(f"{url}/v1/models").status_code == 401
            assert httpx2.post(f"{url}/v1/messages", json={}).json()["type"] == "error"
            key = {"x-api-key": "k"}
            body = {"model": "m", "messages": HELLO, "max_tokens": 2, "stream": True}
            with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, headers=key, timeout=60) as answer:
                assert answer.status_code == 200 and "data: [DONE]" in [*answer.iter_lines()]
            assert httpx2.get(f"{url}/nothing", headers=key).json()["error"]["code"] == "not_found"


def test_a_program_around_it_has_a_response_to_a_client_that_left(model_folder: Path) -> None:
    """Middleware that wants a response gets one, also where the client left before there was any."""
    app, seen = fastapi.FastAPI(), list[int]()

    @app.middleware("http")
    async def note(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        seen.append(response.status_code)
        return response

    with Scheduler(gpus=False, models=model_folder) as scheduler:
        app.mount("/llm", create_app(scheduler))
        body = {"model": "slow", "prompt": "a", "max_tokens": 20000, "ignore_eos": True}
        with running(app) as url:
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(f"{url}/llm/v1/completions", json=body, timeout=0.5)
            eventually(lambda: seen == [499])


def test_a_websocket_is_closed(model_folder: Path) -> None:
    """There is nothing to talk to over one, and the server around is told so."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    with Scheduler(gpus=False, models=model_folder) as scheduler:
        scope: Any = {"type": "websocket", "path": "/events", "headers": []}
        asyncio.run(create_app(scheduler)(scope, send, send))  # type: ignore[arg-type]  # nothing is received
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_importing_the_library_imports_no_server() -> None:
    """The server's packages are imported where the server is."""
    packages = {"starlette", "uvicorn", "python_multipart", "prometheus_client", "opentelemetry"}
    code = f"import sys, scheduler, scheduler.cli.main; print({packages} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
