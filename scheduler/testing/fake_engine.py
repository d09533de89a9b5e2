"""Models by declaration: they take the bytes and the seconds that a test says, and fail when it says so."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2

from fsm.domain.devices import HOST, Amounts, DeviceId, DeviceSample, Placement
from fsm.domain.options import Options
from fsm.sizing.footprint import Footprint
from fsm.sizing.model_profile import EngineSettings
from scheduler.devices.device_reader import DeviceReader
from scheduler.engines.interface import Buffer, Endpoint, Engine, Memory, RunnerListener
from scheduler.engines.python import PythonModel
from scheduler.engines.runner_client import EVENTS, RunnerClient
from scheduler.errors.exceptions import ModelNotFound
from scheduler.models.model_spec import ModelSpec
from scheduler.testing.virtual_time import VirtualTime

URL = "http://fake.invalid"

Answer = str | Callable[[str], str]  # of every chat, or made from the last message or the prompt


@dataclass(frozen=True, slots=True)
class Failure:
    """How a runner ends that does not end well."""

    reason: str
    out_of_memory: bool


@dataclass(slots=True)
class FakeModel:
    """What a test has declared of a model."""

    name: str
    takes: Amounts  # bytes by device
    load_s: float
    answer: Answer
    vector: tuple[float, ...]
    failures: deque[Failure] = field(default_factory=deque)  # of the next loads


class FakeProcess:
    """One runner: it loads for a while, serves, and is gone as soon as it is stopped. All on the thread of its time."""

    pid: int | None = None
    buffers: tuple[Buffer, ...] = ()

    def __init__(self, engine: FakeEngine, model: FakeModel, loads: PythonModel | None, report: RunnerListener) -> None:
        self.model = model
        self.loaded = False
        self.over = False
        self._engine = engine
        self._object = loads  # None: it is a server
        self._value: Any = None
        self._report = report
        self._client = RunnerClient(URL, "", transport=httpx2.MockTransport(self._answer))

    def memory(self) -> Memory:
        """Return the declared bytes once it has loaded."""
        return Memory(dict(self.model.takes) if self.loaded and not self.over else {})

    def context_filled(self, timeout_s: float) -> None:
        """Return None: what was declared is all that is ever known."""

    def healthy(self, timeout_s: float) -> bool:
        """Return whether it is there."""
        return not self.over

    def stop(self, grace_s: float) -> None:
        """Have it end, without a delay."""
        self._engine.time.after(0.0, lambda: self.end(0, "stopped"))

    def finish_load(self) -> None:
        """Serve, or fail if a failure was ordered."""
        if self.over:
            return
        if self.model.failures:
            failure = self.model.failures.popleft()
            self.end(1, failure.reason, failure.out_of_memory)
            return
        if self._object is not None:
            try:
                self._value = self._object.load()
            except Exception as error:
                self.end(1, f"load() raised {error!r}", isinstance(error, MemoryError))
                return
        self.loaded = True
        serves = self._value if self._object is not None else Endpoint(URL, "", client=self._client)
        self._report.loaded(serves, None, self.memory())

    def end(self, code: int, reason: str, out_of_memory: bool = False) -> None:
        """Be gone; once."""
        if self.over:
            return
        self.over = True
        if self.loaded and self._object is not None and self._object.unload is not None:
            try:
                self._object.unload(self._value)
            except Exception as error:
                code, reason = 1, f"unload() raised {error!r}"
        self._value = None
        self._client.close()
        self._engine.processes.remove(self)
        self._report.exited(code, reason, out_of_memory)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        """Answer as llama.cpp's server does."""
        if self.over:
            raise httpx2.ConnectError("the runner is gone", request=request)
        asked = json.loads(request.content)
        if "query" in asked:
            scores = [_score(asked["query"], document) for document in asked["documents"]]
            results = [{"index": index, "relevance_score": score} for index, score in enumerate(scores)]
            return httpx2.Response(200, json={"results": results})
        if request.url.path == "/tokenize":
            return httpx2.Response(200, json={"tokens": list(asked["content"].encode())})
        if "input" in asked:
            vectors = [{"index": index, "embedding": self.model.vector} for index in range(len(asked["input"]))]
            return httpx2.Response(200, json={"data": vectors})
        said = asked["messages"][-1]["content"] if "messages" in asked else asked["prompt"]
        text = self.model.answer if isinstance(self.model.answer, str) else self.model.answer(said)
        tokens = {"prompt_tokens": len(said), "completion_tokens": len(text)}
        part = {"delta": {"content": text}} if "messages" in asked else {"text": text}
        event = json.dumps({"choices": [{**part, "finish_reason": "stop"}], "usage": tokens})
        return httpx2.Response(200, text=f"data: {event}\n\ndata: [DONE]\n\n", headers={"Content-Type": EVENTS})


def _score(query: str, document: str) -> float:
    """Return the part of a query's words that a document has."""
    words = set(query.split())
    return len(words.intersection(document.split())) / max(1, len(words))


class FakeEngine(Engine):
    """Runs declared models, and Python objects, whose `load` and `unload` are really called."""

    def __init__(self, time: VirtualTime) -> None:
        self.time = time
        self.models: dict[str, FakeModel] = {}  # by name
        self.loads: list[str] = []  # names, in the order in which loads began
        self.processes: list[FakeProcess] = []  # that are not over, in the order in which they were launched

    def inspect(self, model: ModelSpec | PythonModel, asked: Sequence[Options]) -> Footprint:
        """Return what was declared; raises `ModelNotFound` for a model file of no declared name."""
        return Footprint(fixed=self._declared(model).takes)

    def launch(
        self,
        model: ModelSpec | PythonModel,
        options: Options,
        settings: EngineSettings,
        placement: Placement,
        report: RunnerListener,
    ) -> FakeProcess:
        """Begin to load."""
        declared = self._declared(model)
        process = FakeProcess(self, declared, model if isinstance(model, PythonModel) else None, report)
        self.processes.append(process)
        self.loads.append(declared.name)
        self.time.after(declared.load_s, process.finish_load)
        return process

    def close(self, timeout_s: float) -> None:
        """End every runner that is left."""
        for process in list(self.processes):
            process.end(0, "closed")

    def _declared(self, model: ModelSpec | PythonModel) -> FakeModel:
        found = self.models.get(model.name)
        if isinstance(model, PythonModel):
            return replace(found or FakeModel(model.name, (), 0.0, "", ()), takes=model.declared)
        if found is None:
            raise ModelNotFound(model.path)
        return found


class FakeResolver:
    """Finds declared models by name."""

    location = "the models that the test has declared"

    def __init__(self, models: Mapping[str, FakeModel]) -> None:
        self._models = models

    def find(self, name: str) -> ModelSpec | None:
        """Return a declared model; its path leads to no file."""
        return ModelSpec(name, f"/fake/{name}") if name in self._models else None

    def names(self) -> Iterable[str]:
        """Return every declared name."""
        return tuple(self._models)


class FakeDevices(DeviceReader):
    """Devices of declared size, on which nothing but the fake runners takes memory."""

    def __init__(self, capacities: Mapping[DeviceId, int], limit_bytes: int | None, engine: FakeEngine) -> None:
        super().__init__(memory_limit_bytes=limit_bytes, gpus=False)
        self._capacities = {HOST: 0} | dict(capacities)
        self._engine = engine

    def sample(self) -> tuple[DeviceSample, ...]:
        """Return the host and then each GPU."""
        return tuple(self._sample(id, capacity) for id, capacity in self._capacities.items())

    def _sample(self, id: DeviceId, capacity: int) -> DeviceSample:
        held = sum(process.memory().resident.get(id, 0) for process in list(self._engine.processes))
        if id == HOST and self._memory_limit_bytes is not None:
            capacity = min(capacity, self._memory_limit_bytes)
        return DeviceSample(id, "cpu" if id == HOST else "gpu", id, capacity, max(0, capacity - held))
