"""What importing costs: processor time and resident memory of whole processes, beside a Python that does nothing."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from typing import Any

ROUNDS = 11
PROGRAMS = {
    "python -c pass": "pass",
    "import scheduler": "import scheduler",
    "from scheduler import Scheduler": "from scheduler import Scheduler",
    "loadmaster --help": "from scheduler.cli.main import main; main(['--help'])",
}
# The most memory of this process alone: what the kernel tells a parent counts the parent's own too.
_TELL = "import atexit, sys; atexit.register(lambda: sys.stderr.write(open('/proc/self/status').read())); "


def cost(code: str) -> tuple[float, float]:
    """Return the milliseconds of the processor and the most MiB that a Python with this code takes."""
    command = [sys.executable, "-c", _TELL + code]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = re.search(r"VmHWM:\s+(\d+) kB", process.stderr.read())
        assert told is not None, code
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return (used.ru_utime + used.ru_stime) * 1000, int(told[1]) / 1024


def run() -> dict[str, Any]:
    """Return and print the medians of each program, and how many times that of a bare Python its time is."""
    for code in PROGRAMS.values():
        cost(code)  # writes the compiled files, where Python may
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for _ in range(ROUNDS):
        for name, code in PROGRAMS.items():
            seen[name].append(cost(code))
    results: dict[str, Any] = {}
    bare_ms, bare_mib = (statistics.median(each) for each in zip(*seen["python -c pass"], strict=True))
    for name, costs in seen.items():
        ms, mib = (statistics.median(each) for each in zip(*costs, strict=True))
        results[name] = {"cpu_ms": round(ms, 1), "times_bare": round(ms / bare_ms, 2), "mib": round(mib, 1)}
        print(f"{name:32} {ms:6.1f} ms, {ms / bare_ms:5.2f} × bare; {mib:5.1f} MiB, {mib - bare_mib:4.1f} above bare")
    return results
