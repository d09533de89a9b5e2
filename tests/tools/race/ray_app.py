"""The program of Ray's contestant: run by a Python that has Ray, started by one line of its input, ended by its end."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

STOP_GRACE_S = 2.0


class Model:
    """One model in a child process of our own engine, which is stopped when Ray unloads the model."""

    def __init__(self, engine: Any, name: str, path: str) -> None:
        from fsm.domain.devices import Placement
        from fsm.domain.options import Options
        from scheduler.models.model_spec import ModelSpec

        self.endpoint: Any = None
        self.failure = ""
        self._done = threading.Event()
        spec = ModelSpec(name, path)
        load = engine.inspect(spec, [Options(num_gpu=0)]).resolutions[0].loads[0]
        self._process = engine.launch(spec, load.options, load.settings, Placement(()), self)

    def progressed(self) -> None:
        """Ignore progress."""

    def loaded(self, endpoint: Any, num_ctx: int | None, memory: Any, flash_attention: bool | None = None) -> None:
        """Note that the runner serves."""
        self.endpoint = endpoint
        self._done.set()

    def failed(self, error: BaseException) -> None:
        """Ignore it: the exit says the same in words."""

    def exited(self, code: int | None, detail: str, out_of_memory: bool) -> None:
        """Note that the runner has gone."""
        self.failure = detail
        self._done.set()

    def wait(self) -> None:
        """Return when the runner serves."""
        self._done.wait()
        if self.endpoint is None:
            raise RuntimeError(self.failure)

    def __del__(self) -> None:
        self._process.stop(STOP_GRACE_S)


def deployment(task: dict[str, Any]) -> Any:
    """Return the application: replicas with a bounded number of models each."""
    from ray import serve

    @serve.deployment(num_replicas=task["replicas"], max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})
    class Host:
        def __init__(self) -> None:
            sys.path.extend(task["paths"])
            import httpx2

            from scheduler.engines.llama import LlamaEngine

            self.engine = LlamaEngine()
            # Each request has a connection of its own: a kept one that was closed meanwhile would look like a crash.
            limits = httpx2.Limits(max_keepalive_connections=0)
            self.client = httpx2.AsyncClient(timeout=None, limits=limits, trust_env=False)

        @serve.multiplexed(max_num_models_per_replica=task["room"])
        async def model(self, name: str) -> Model:
            with open(Path(task["folder"]) / "loads", "a") as file:
                file.write(name + "\n")
            model = Model(self.engine, name, task["models"][name])
            await asyncio.to_thread(model.wait)
            return model

        async def __call__(self, request: Any) -> Any:
            from starlette.responses import Response

            body = await request.json()
            endpoint = (await self.model(serve.get_multiplexed_model_id())).endpoint  # as in Ray's documentation
            headers = {"Authorization": f"Bearer {endpoint.key}"}
            try:
                answer = await self.client.post(f"{endpoint.url}/v1/chat/completions", json=body, headers=headers)
            except Exception as error:
                return Response(f"proxy error: {error!r}", 500)
            return Response(answer.content, answer.status_code, media_type="application/json")

    return Host.bind()


def main() -> None:
    """Serve until the end of the input."""
    task = json.loads(sys.stdin.readline())
    sys.path.extend(task["paths"])
    import ray
    from ray import serve

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=len(os.sched_getaffinity(0)))
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(deployment(task), route_prefix="/")
    (Path(task["folder"]) / "url").write_text(f"http://127.0.0.1:{port}\n")
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
