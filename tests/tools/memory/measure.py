"""The memory of a real child: loaded by the engine, then filled until it holds as much as it can."""

from __future__ import annotations

import json
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fsm.domain.devices import HOST, Placement
from fsm.domain.options import Options
from scheduler.engines.interface import Endpoint, Memory
from scheduler.engines.llama import LlamaProcess
from scheduler.models.model_spec import ModelSpec
from tests.support.own_server import an_engine
from tests.tools.memory.rows import Row

TIMEOUT_S = 600.0
MARGIN = 8  # tokens that are left for an answer
SHORT = 512  # tokens of the prompts that are sent once every slot is full


class Heard:
    """A listener for one runner."""

    def __init__(self) -> None:
        self.endpoint: Endpoint | None = None
        self.ended = ""
        self._told = threading.Event()

    def progressed(self) -> None:
        """Note nothing: the runner loads."""

    def loaded(
        self, endpoint: Endpoint | object, num_ctx: int | None, memory: Memory, flash_attention: bool | None = None
    ) -> None:
        """Note that the runner serves."""
        assert isinstance(endpoint, Endpoint)
        self.endpoint = endpoint
        self._told.set()

    def failed(self, error: BaseException) -> None:
        """Ignore it: the exit says the same in words."""

    def exited(self, code: int | None, detail: str, out_of_memory: bool) -> None:
        """Note the exit."""
        self.ended = detail
        self._told.set()

    def wait(self) -> Endpoint:
        """Return the endpoint once the runner serves."""
        assert self._told.wait(TIMEOUT_S), "the model did not load in time"
        assert self.endpoint is not None, self.ended
        return self.endpoint


@dataclass(frozen=True, slots=True)
class Measured:
    """The bytes that one row's child took."""

    weights_bytes: int  # this and the next four: buffers, as llama.cpp reports them
    cache_bytes: int
    compute_bytes: int
    output_bytes: int
    projector_bytes: int
    resident_bytes: int  # of the process, the most while its contexts and prompt cache were filled
    mapped_bytes: int  # of these, pages of files: weights, programs, libraries
    load_s: float


@contextmanager
def running(model: ModelSpec, options: Options) -> Iterator[tuple[LlamaProcess, Endpoint, float]]:
    """Load a model on the host; yield its process, its endpoint, and the seconds of its load."""
    engine, heard = an_engine(), Heard()
    begin = time.perf_counter()
    load = engine.inspect(model, [options]).resolutions[0].loads[0]
    process = engine.launch(model, load.options, load.settings, Placement(((HOST, 0),)), heard)
    try:
        endpoint = heard.wait()
        yield process, endpoint, time.perf_counter() - begin
    finally:
        process.stop(0.0)
        engine.close()


def measure(path: Path, row: Row, projectors: tuple[str, ...] = ()) -> Measured:
    """Load a row's model and fill it: every slot once, and then as many prompts as its prompt cache takes."""
    model = ModelSpec("m", str(path), projectors=projectors, embedding=row.embedding)
    with running(model, row.explicit()) as (process, endpoint, load_s):
        kinds = {each.kind: each.bytes for each in process.buffers}
        memory = max(
            (process_memory(process) for _ in fill(endpoint, row)), key=lambda each: each.rss
        )  # some of it is freed as prompts replace others
        return Measured(
            kinds.get("weights", 0),
            kinds.get("cache", 0),
            kinds.get("compute", 0),
            kinds.get("output", 0),
            kinds.get("projector", 0),
            memory.rss,
            memory.shared,
            load_s,
        )


def process_memory(process: LlamaProcess) -> Any:
    """Return what a process occupies at the moment, in psutil's terms."""
    return psutil.Process(process.pid).memory_info()


def fill(endpoint: Endpoint, row: Row) -> Iterator[None]:
    """Send prompts until every slot and the prompt cache are full; yield after each."""
    context, slots = row.options.num_ctx or 0, row.options.num_parallel or 1
    lengths = [context - MARGIN] * slots + [min(context - MARGIN, SHORT)] * (0 if row.embedding else 2)
    for number, length in enumerate(lengths):
        tokens = [7 + (number + 1) * position % 199 for position in range(length)]  # no two begin alike
        tokens[0] = 10 + number
        if row.embedding:
            ask(endpoint, "/v1/embeddings", {"input": tokens})
        else:
            ask(endpoint, "/completion", {"prompt": tokens, "n_predict": 2, "id_slot": number % slots})
        yield


def ask(endpoint: Endpoint, path: str, body: dict[str, object]) -> None:
    """Send one request and wait for its answer."""
    headers = {"Authorization": f"Bearer {endpoint.key}", "Content-Type": "application/json"}
    request = urllib.request.Request(endpoint.url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        answer.read()


@dataclass(frozen=True, slots=True)
class Mapping:
    """One way to load a file whose pages are in memory."""

    load_s: float  # the median of several
    resident_bytes: int
    mapped_bytes: int


def measure_mapping(path: Path, use_mmap: bool, repeats: int = 5) -> Mapping:
    """Load a model several times, with its file mapped or read."""
    path.read_bytes()
    taken: list[float] = []
    resident_bytes = mapped_bytes = 0
    for _ in range(repeats):
        options = Options(num_ctx=512, num_gpu=0, use_mmap=use_mmap)
        with running(ModelSpec("m", str(path)), options) as (process, endpoint, load_s):
            ask(endpoint, "/completion", {"prompt": [20, 30, 40], "n_predict": 1})
            taken.append(load_s)
            memory = psutil.Process(process.pid).memory_info()
            resident_bytes, mapped_bytes = memory.rss, memory.shared
    return Mapping(statistics.median(taken), resident_bytes, mapped_bytes)
