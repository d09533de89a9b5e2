"""Warm acquire and release, beside the floor of the operations that they need."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from tempfile import TemporaryDirectory
from typing import Any

from fsm.domain.devices import Amounts, Placement
from fsm.domain.options import Options
from fsm.machine.request import ModelId
from fsm.machine.runner import RUNNER_TABLE, Runner, RunnerId
from scheduler import PythonModel, Scheduler, Settings
from tests.tools.bench.measure import microseconds, summary

REPEATS = 20_000
PACED_S = 5.0
MODEL = PythonModel("object", load=object, memory={"cpu": "1MiB"})


def off_main(action: Any) -> Any:
    """Run `action` on another thread and return what it returns."""
    box: list[Any] = []
    thread = threading.Thread(target=lambda: box.append(action()))
    thread.start()
    thread.join()
    return box[0]


def floor() -> list[float]:
    """Time two triggers of `transitions`, one lock, and one future that is made, completed and read."""
    nowhere: Amounts = ()
    runner = Runner(RunnerId(1), ModelId("floor"), Options(), Placement(nowhere), 300.0, 0.0)
    RUNNER_TABLE.fire(runner, "rest")
    serve, rest = RUNNER_TABLE._triggers["serve"], RUNNER_TABLE._triggers["rest"]
    lock = threading.Lock()

    def once() -> None:
        serve(runner)
        rest(runner)
        with lock:
            pass
        future: Future[int] = Future()
        future.set_result(1)
        future.result()

    return microseconds(once, REPEATS)


def acquire_and_release(scheduler: Scheduler) -> list[float]:
    """Time one client on a warm model."""
    return microseconds(lambda: scheduler.acquire(MODEL).release(), REPEATS)


def beside_busy_threads(scheduler: Scheduler) -> list[float]:
    """Time a client that requests a hundred times a second while four threads compute in Python."""
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            sum(range(2000))

    threads = [threading.Thread(target=compute, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    taken, end = [], time.perf_counter() + PACED_S
    while time.perf_counter() < end:
        time.sleep(0.01)
        begin = time.perf_counter_ns()
        scheduler.acquire(MODEL).release()
        taken.append((time.perf_counter_ns() - begin) / 1000)
    stop.set()
    for thread in threads:
        thread.join()
    return taken


def while_it_is_recorded() -> list[float]:
    """Time one client on a warm model while every decision is recorded to a file."""
    with (
        TemporaryDirectory() as folder,
        Scheduler(Settings(keep_alive=-1, measurement_file=None, recording_file=f"{folder}/bench.jsonl")) as scheduler,
    ):
        scheduler.acquire(MODEL).release()
        taken: list[float] = off_main(lambda: acquire_and_release(scheduler))
    return taken


def run() -> dict[str, Any]:
    """Return the figures in µs, and print them."""
    with Scheduler(Settings(keep_alive=-1, measurement_file=None)) as scheduler:
        scheduler.acquire(MODEL).release()
        least = summary(off_main(floor))
        idle = summary(off_main(lambda: acquire_and_release(scheduler)))
        with scheduler.acquire(MODEL):
            leased = summary(off_main(lambda: acquire_and_release(scheduler)))
            paced = summary(off_main(lambda: beside_busy_threads(scheduler)))
        main = summary(acquire_and_release(scheduler))
    recorded = summary(while_it_is_recorded())
    ratio = idle["p50"] / least["p50"]
    print("warm acquire + release, one thread (µs)                 p50      p99    p99.9")
    for name, row in (
        ("floor: two triggers, a lock, a future", least),
        (f"idle runner ({ratio:.2f} × the floor)", idle),
        ("leased runner", leased),
        ("leased, paced, beside four busy threads", paced),
        ("idle runner, from the main thread", main),
        ("idle runner, recorded", recorded),
    ):
        print(f"  {name:<48} {row['p50']:>8.1f} {row['p99']:>8.1f} {row['p99.9']:>8.1f}")
    return {
        "floor_us": least, "idle_us": idle, "leased_us": leased, "paced_us": paced, "main_thread_us": main,
        "recorded_us": recorded,
        "idle_over_floor": round(ratio, 3),
    }  # fmt: skip
