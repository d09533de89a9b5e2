"""Sixteen threads on warm models: how many leases a second, and none lost or given twice."""

from __future__ import annotations

import threading
import time
from typing import Any

from scheduler import PythonModel, Scheduler, Settings

THREADS = 16
SECONDS = 4.0
MODELS = [PythonModel(f"object-{number}", load=object, memory={"cpu": "1MiB"}) for number in range(4)]


def run() -> dict[str, Any]:
    """Return the rate and the number of leases left over, and print them."""
    counts = [0] * THREADS
    with Scheduler(Settings(keep_alive=-1, measurement_file=None, max_runners=len(MODELS))) as scheduler:
        for model in MODELS:
            scheduler.preload(model).result()
        end = time.perf_counter() + SECONDS

        def client(number: int) -> None:
            while time.perf_counter() < end:
                with scheduler.acquire(MODELS[counts[number] % len(MODELS)]):
                    counts[number] += 1

        threads = [threading.Thread(target=client, args=(number,)) for number in range(THREADS)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rate = sum(counts) / (time.perf_counter() - begin)
        left = sum(runner.leases for runner in scheduler.status().runners)
        late = scheduler.debug_state().late_events
    print(
        f"{THREADS} threads on {len(MODELS)} warm models: {rate:,.0f} leases a second; "
        f"left over {left}, released twice {late}"
    )
    return {"threads": THREADS, "leases_per_second": round(rate), "left_over": left, "late_events": late}
