"""The memory that the scheduler itself takes: idle, and for each runner and waiting request."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from typing import Any

from fsm.core import Core
from fsm.domain.devices import HOST, DeviceSample
from fsm.domain.options import Options
from fsm.machine.request import ModelId, Purpose, RequestId, RequestSpec
from fsm.machine.runner import RunnerId
from fsm.messages.events import Acquire, Inspected, Loaded, Sampled
from fsm.sizing.footprint import Footprint
from fsm.state.core_config import CoreConfig

RUNNERS = 200

_IDLE = """
import psutil
before = psutil.Process().memory_info().rss
from scheduler import Scheduler, Settings
imported = psutil.Process().memory_info().rss
scheduler = Scheduler(Settings(measurement_file=None))
print(imported - before, psutil.Process().memory_info().rss - imported)
scheduler.close()
"""


def bytes_per_runner() -> float:
    """Return the bytes that the core keeps for one idle runner and its model, by `tracemalloc`."""
    core = Core(CoreConfig(max_runners=RUNNERS + 1, max_host_loads=RUNNERS))
    core.step(0.0, Sampled((DeviceSample(HOST, "cpu", "host", 2**40, 2**40),)))
    tracemalloc.start()
    for number in range(1, RUNNERS + 1):
        want = RequestSpec(ModelId(f"/models/{number}.gguf"), Options(), Purpose.preload, 0)
        core.step(0.0, Acquire(RequestId(number), want))
        core.step(0.0, Inspected(want.model, Footprint(fixed=((HOST, 2**20),))))
        core.step(0.0, Loaded(RunnerId(number)))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return taken / RUNNERS


def run() -> dict[str, Any]:
    """Return the figures and print them."""
    done = subprocess.run([sys.executable, "-c", _IDLE], capture_output=True, text=True, check=True)
    imported, idle = map(int, done.stdout.split())
    runner = bytes_per_runner()
    print(
        f"memory: imports {imported / 2**20:.1f} MiB, an idle scheduler {idle / 2**20:.2f} MiB more, "
        f"the core's record of a runner and its model {runner / 1024:.1f} KiB"
    )
    return {"imports_bytes": imported, "idle_scheduler_bytes": idle, "bytes_per_runner": round(runner)}
