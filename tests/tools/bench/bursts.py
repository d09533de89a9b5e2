"""Bursts of cold requests beside a warm client: how long it waits, how many plans there are, what the burst costs.

Every runner is in use, so each cold request, for a model of its own, waits and leaves again. Each burst runs in a
process of its own, and once more with Python's collector of cycles turned off. BEFORE=FOLDER names another checkout of
this project, whose bursts take turns with this one's.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[3]
CASES = ((10, 50), (10, 1000), (100, 50), (100, 1000))  # runners, cold requests
ROUNDS = 7
PAUSE_S = 0.001  # between two warm requests
WITHOUT_COLLECTOR = "collector-off"
FIGURES = ("worst_ms", "p99_ms", "plans", "plan_ms", "cpu_s", "collected_ms")


def burst(runners: int, requests: int) -> dict[str, float]:
    """Return the figures of one burst; of the project only what older checkouts have too is used."""
    import fsm.core
    from scheduler import PythonModel, Scheduler, Settings

    plans: list[float] = []  # milliseconds of the thread that made each
    make_plan = fsm.core.make_plan

    def timed(*args: Any, **how: Any) -> Any:
        begin = time.thread_time()
        plan = make_plan(*args, **how)
        plans.append((time.thread_time() - begin) * 1000)
        return plan

    steps: Counter[str] = Counter()  # by event
    step = fsm.core.Core.step

    def counted(core: Any, now: float, event: Any) -> Any:
        commands = step(core, now, event)
        steps[type(event).__name__] += 1
        return commands

    fsm.core.make_plan, fsm.core.Core.step = timed, counted  # type: ignore[method-assign]  # of this process alone
    pauses = [0.0]  # milliseconds; all threads wait
    begun = time.perf_counter()

    def collects(phase: str, _: object) -> None:
        nonlocal begun
        if phase == "start":
            begun = time.perf_counter()
        else:
            pauses.append((time.perf_counter() - begun) * 1000)

    gc.callbacks.append(collects)
    models = [PythonModel(f"model {n}", load=object, memory={"cpu": "1MiB"}) for n in range(runners + requests)]
    with Scheduler(
        Settings(
            memory_limit=runners << 20, keep_alive=-1, measurement_file=None, lock_folder=None, max_queue=2 * requests
        )
    ) as scheduler:
        leases = [scheduler.acquire(model) for model in models[:runners]]
        waits: list[float] = []
        over = threading.Event()

        def ask() -> None:
            while not over.is_set():
                begin = time.perf_counter()
                scheduler.acquire(models[0]).release()
                waits.append((time.perf_counter() - begin) * 1000)
                time.sleep(PAUSE_S)

        client = threading.Thread(target=ask)
        client.start()
        time.sleep(0.2)
        waits.clear()
        plans.clear()
        begin = time.process_time()
        futures = [scheduler.submit(model) for model in models[runners:]]
        wait_for(lambda: steps["Inspected"] == runners + requests)
        for future in futures:
            future.cancel()
        wait_for(lambda: steps["Cancel"] == requests)
        cpu_s = time.process_time() - begin
        over.set()
        client.join()
        for lease in leases:
            lease.release()
    waits.sort()
    worst, p99 = waits[-1], waits[int(len(waits) * 0.99)]
    return dict(zip(FIGURES, (worst, p99, len(plans), statistics.median(plans), cpu_s, max(pauses)), strict=True))


def wait_for(condition: Callable[[], bool]) -> None:
    """Return once a condition holds, and what follows from it is over."""
    while not condition():
        time.sleep(0.01)
    time.sleep(0.05)


def in_a_process(tree: Path, runners: int, requests: int, *how: str) -> dict[str, float]:
    """Return the figures of a burst in a new process, with the project as it is in `tree`."""
    command = [sys.executable, "-P", __file__, str(runners), str(requests), *how]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, env=environment, cwd=tree, check=True, stdout=subprocess.PIPE, timeout=1800)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def run() -> dict[str, Any]:
    """Return the medians of each case, and print them; with BEFORE those of that checkout too, measured in turns."""
    ways: dict[str, tuple[Path, tuple[str, ...]]] = {"now": (HERE, ()), "no gc": (HERE, (WITHOUT_COLLECTOR,))}
    if "BEFORE" in os.environ:
        ways["before"] = Path(os.environ["BEFORE"]), ()
    print(
        "bursts of cold requests: a warm client's longest wait and its 99th percentile, plans, time of the processor,"
    )
    print("the longest collection of cycles")
    heads = ("runners", "requests", "", "worst ms", "p99 ms", "plans", "plan ms", "CPU s", "gc ms")
    print("".join(f"{head:>10}" for head in heads))
    rows = []
    for runners, requests in CASES:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, (tree, how) in ways.items():
                found[name].append(in_a_process(tree, runners, requests, *how))
        for name, rounds in found.items():
            medians = {figure: statistics.median(one[figure] for one in rounds) for figure in FIGURES}
            rows.append({"runners": runners, "requests": requests, "way": name} | medians)
            figures = "".join(f"{figure:>10.2f}" for figure in medians.values())
            print(f"{runners:>10}{requests:>10}{name:>10}{figures}")
    return {"rows": rows}


if __name__ == "__main__":
    if WITHOUT_COLLECTOR in sys.argv:
        gc.disable()
    print(json.dumps(burst(int(sys.argv[1]), int(sys.argv[2]))))
