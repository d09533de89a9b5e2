"""`python -m tests.tools.bench [name …]`: run the benchmarks and write build/bench.json."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

from tests.tools.bench import (
    bursts,
    cold,
    cores,
    footprints,
    growth,
    http_clients,
    http_server,
    imports,
    memory,
    metadata,
    prefetch,
    prompts,
    threads,
    warm,
)

BENCHMARKS = {
    "warm": warm.run,
    "threads": threads.run,
    "cold": cold.run,
    "cores": cores.run,
    "prefetch": prefetch.run,
    "prompts": prompts.run,
    "memory": memory.run,
    "metadata": metadata.run,
    "server": http_server.run,
    "growth": growth.run,
    "bursts": bursts.run,
    "http": http_clients.run,
    "imports": imports.run,
    "footprints": footprints.run,
}


def main() -> int:
    """Run the named benchmarks, or all of them."""
    names = sys.argv[1:] or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        print(f"there is no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    machine = {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
    }
    results: dict[str, object] = {"machine": machine}
    for name in names:
        results[name] = BENCHMARKS[name]()
    path = Path("build/bench.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
