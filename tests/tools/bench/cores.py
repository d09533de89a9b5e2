"""Several models that answer at once on the host's cores: how threads wait, how many a model has, and loads beside it.

First the engine by itself, over its ways of waiting: one, two and three children at once, each with as many threads as
there are cores, or with one. Then three children of the scheduler's, which divides the cores. Last how evenly tokens
of a warm model come while another loads, and how long a load takes beside other programs. The best of each row of the
first table is what every figure is compared with.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

from scheduler import Lease, Scheduler, Settings
from scheduler.devices.cpu_cores import usable_cores
from scheduler.engines.llama import child_environment
from tests.tools.bench.cold import model_path
from tests.tools.bench.measure import percentile

ROUNDS = 3
TOKENS = 100
AT_ONCE = (1, 2, 3)
LIMIT_S = 30.0  # an answer that takes longer counts as this
LOADS = 6
PROMPT = "Once upon a time"

# The engine with given threads, polling and priority: it prints where it serves and ends with its input.
_SERVER = """
import os, sys, xllamacpp
model, threads, poll, priority = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port = model, 1024, 1, 0
params.fit_params = params.warmup = False
params.offline = True
params.verbosity = 1
for cpu in (params.cpuparams, params.cpuparams_batch):
    cpu.n_threads, cpu.poll, cpu.priority = threads, poll, xllamacpp.ggml_sched_priority(priority)
out = os.dup(1)
os.dup2(2, 1)
server = xllamacpp.Server(params)
os.write(out, (server.listening_address + "\\n").encode())
sys.stdin.read()
os._exit(0)
"""


class Server:
    """One child that serves the real model."""

    def __init__(self, threads: int, waiting: Mapping[str, str], poll: int = 50, priority: int = 0) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        arguments = [sys.executable, "-c", _SERVER, str(model_path()), *map(str, (threads, poll, priority))]
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**environment, **waiting},
        )  # fmt: skip
        self.url = ""

    def answer(self, tokens: int = TOKENS) -> None:
        """Answer with so many tokens, whatever they are; give up after a limit."""
        if not self.url:
            assert self.process.stdout is not None
            self.url = self.process.stdout.readline().strip()
        question = {"prompt": PROMPT, "n_predict": tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
        body, headers = json.dumps(question).encode(), {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{self.url}/completion", body, headers), None, LIMIT_S):
                pass
        except TimeoutError:
            pass


def together(answers: Sequence[Callable[[], object]]) -> float:
    """Return the seconds until all calls that begin at once have returned."""
    with ThreadPoolExecutor(len(answers)) as threads:
        begin = time.perf_counter()
        for done in [threads.submit(answer) for answer in answers]:
            done.result()
        return time.perf_counter() - begin


def ways(cores: int) -> dict[str, tuple[Any, ...]]:
    """Return the variants to compare: threads of each child, its environment, and llama.cpp's polling and priority."""
    ours = {name: value for name, value in child_environment({}).items() if "OMP" in name}
    spins = {f"{cores} threads, {spins} spins": (cores, {"GOMP_SPINCOUNT": str(spins)}) for spins in (100, 1000, 3000)}
    return {
        "1 thread": (1, {}),
        f"{cores} threads, as it comes": (cores, {}),
        f"{cores} threads, active": (cores, {"OMP_WAIT_POLICY": "active"}),
        f"{cores} threads, passive": (cores, {"OMP_WAIT_POLICY": "passive"}),
        **spins,
        f"{cores} threads, ours": (cores, ours),
        f"{cores} threads, ours, poll 0": (cores, ours, 0),
        f"{cores} threads, ours, priority low": (cores, ours, 50, -1),
    }


def grid(rounds: int) -> dict[str, dict[int, float]]:
    """Return the median seconds of each variant with one, two and three children at once, taken in turns."""
    compared = ways(usable_cores())
    taken: dict[str, dict[int, list[float]]] = {name: {count: [] for count in AT_ONCE} for name in compared}
    for _ in range(rounds):
        for name, way in compared.items():
            servers = [Server(*way) for _ in range(max(AT_ONCE))]
            try:
                for server in servers:
                    server.answer(4)
                for count in AT_ONCE:
                    taken[name][count].append(together([server.answer for server in servers[:count]]))
            finally:
                for server in servers:
                    server.process.kill()
                    server.process.wait()
    return {name: {count: statistics.median(row[count]) for count in AT_ONCE} for name, row in taken.items()}


@contextmanager
def models(count: int) -> Iterator[list[Path]]:
    """Yield so many files of the real model, each a model of its own."""
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"model-{number}.gguf" for number in range(count)]
        for path in paths:
            try:
                os.link(model_path(), path)
            except OSError:  # on another file system
                shutil.copy(model_path(), path)
        yield paths


def say(lease: Lease, tokens: int = TOKENS) -> list[float]:
    """Make a model answer; return the seconds from each of its tokens to the next."""
    question: dict[str, Any] = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    with lease.stream([{"role": "user", "content": PROMPT}], **question) as pieces:
        times = [time.perf_counter() for _ in pieces]
    return [after - before for before, after in itertools.pairwise(times)]


def dealt(rounds: int) -> tuple[list[int], dict[int, float]]:
    """Return the threads that the scheduler gave each of three models, and their median seconds at once."""
    taken: dict[int, list[float]] = {count: [] for count in AT_ONCE}
    with models(max(AT_ONCE)) as paths, Scheduler(Settings(gpus=False, measurement_file=None)) as scheduler:
        leases = [scheduler.acquire(path, keep_alive=-1) for path in paths]
        for lease in leases:
            say(lease, 4)
        for _ in range(rounds):
            for count in AT_ONCE:
                taken[count].append(together([lambda lease=lease: say(lease) for lease in leases[:count]]))  # type: ignore[misc]  # its default is its type
        threads = [runner.options.num_thread or 0 for runner in scheduler.status().runners]
        for lease in leases:
            lease.release()
    return threads, {count: statistics.median(seconds) for count, seconds in taken.items()}


@contextmanager
def loading_again_and_again(scheduler: Scheduler, path: Path) -> Iterator[None]:
    """Load and unload a model for as long as the block lasts."""
    ended = Event()

    def load() -> None:
        while not ended.is_set():
            scheduler.acquire(path, keep_alive=0).release()

    loader = Thread(target=load)
    loader.start()
    try:
        yield
    finally:
        ended.set()
        loader.join()


def beside_loads() -> dict[str, float]:
    """Return the 99th percentile of the seconds between a warm model's tokens, alone and while another model loads."""
    alone: list[float] = []
    loading: list[float] = []
    settings = Settings(gpus=False, measurement_file=None)
    with models(2) as (warm, cold), Scheduler(settings) as scheduler, scheduler.acquire(warm) as lease:
        say(lease)
        for _ in range(LOADS):
            alone += say(lease)
            with loading_again_and_again(scheduler, cold):
                loading += say(lease)
    found = {"alone_s": percentile(alone, 99), "loading_s": percentile(loading, 99)}
    found |= {"alone_median_s": statistics.median(alone), "loading_median_s": statistics.median(loading)}
    return found | {"ratio": found["loading_s"] / found["alone_s"]}


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Run so many other programs that use all processors they can, each in a session of its own."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for program in busy:
            program.kill()
            program.wait()


def beside_programs() -> dict[str, float]:
    """Return the median seconds of a load and its stop, alone and beside as many busy programs as there are cores."""

    def a_load() -> float:
        begin = time.perf_counter()
        scheduler.acquire(path, keep_alive=0).release()
        return time.perf_counter() - begin

    with models(1) as (path,), Scheduler(Settings(gpus=False, measurement_file=None)) as scheduler:
        a_load()
        alone = statistics.median(a_load() for _ in range(LOADS))
        with busy_programs(usable_cores()):
            beside = statistics.median(a_load() for _ in range(LOADS))
    return {"alone_s": alone, "beside_s": beside, "ratio": beside / alone}


def run() -> dict[str, Any]:
    """Return the figures, and print them as multiples of the best."""
    rows = grid(ROUNDS)
    threads, ours = dealt(ROUNDS)
    rows[f"scheduled, {' + '.join(map(str, threads))} threads"] = ours
    best = {count: min(row[count] for row in rows.values()) for count in AT_ONCE}
    print(
        f"{TOKENS} tokens of the real model on {usable_cores()} cores, as multiples of the best: "
        f"{', '.join(f'{best[count]:.2f} s' for count in AT_ONCE)}"
    )
    print(f"{'':<40}" + "".join(f"{f'{count} at once':>12}" for count in AT_ONCE))
    for name, row in rows.items():
        print(f"  {name:<38}" + "".join(f"{row[count] / best[count]:>12.2f}" for count in AT_ONCE))
    neighbour = beside_loads()
    print(
        f"a warm model's tokens while another loads: 99th percentile {neighbour['ratio']:.2f} × of alone, "
        f"median {neighbour['loading_median_s'] / neighbour['alone_median_s']:.2f} ×"
    )
    others = beside_programs()
    print(f"a load beside {usable_cores()} programs that keep all cores busy: {others['ratio']:.1f} × of alone")
    return {"at_once_s": rows, "threads": threads, "beside_loads": neighbour, "beside_programs": others}
