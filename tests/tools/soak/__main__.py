"""`python -m tests.tools.soak --minutes M --seed S`: soak, print the report, and write build/soak.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.tools.soak.objects import MIB
from tests.tools.soak.run import soak


def main() -> int:
    """Return 0 if the soak passed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.soak", description="Use a scheduler hard, and for long."
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(chosen.minutes * 60, chosen.seed, Path(folder), lambda line: print(line, flush=True))
    machine = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    path = Path("build/soak.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "seed": chosen.seed, **found}, indent=2) + "\n")
    show(found)
    print(f"written to {path}")
    return 0 if found["passed"] else 1


def show(found: dict[str, Any]) -> None:
    """Print a report."""
    print(
        f"\n{found['leases']:,} leases in {found['seconds']:,} s by {found['threads']} threads: "
        f"{found['leases_per_second']:,} a second; {found['loads']:,} loads of objects"
    )
    print(f"warm waits: p50 {found['warm_wait_us']['p50']:,} µs, p99 {found['warm_wait_us']['p99']:,} µs")
    print(f"\n{'fault':<36}{'injected':>10}{'survived':>10}")
    for kind, counts in found["faults"].items():
        print(f"{kind:<36}{counts['injected']:>10,}{counts['survived']:>10,}")
    print(f"\n{'what requests ended with':<36}{'times':>10}")
    for kind, count in found["errors"].items():
        print(f"{kind:<36}{count:>10,}")
    if memory := found["memory"]:
        first, last = memory["resident_bytes_first"] / MIB, memory["resident_bytes_last"] / MIB
        allowed = memory["resident_bytes_allowed"] / MIB
        print(
            f"\nresident memory at the first and the last rest: {first:.1f} and {last:.1f} MiB (+{allowed:.0f} allowed)"
        )
        print(
            f"allocated blocks: {memory['blocks_first']:,} and {memory['blocks_last']:,} "
            f"(+{memory['blocks_allowed']:,} allowed)"
        )
    for text in (*found["violations"], *found["unexpected"]):
        print(f"\nNOT AS IT MUST BE: {text}")
    print("\npassed" if found["passed"] else "\nFAILED")


if __name__ == "__main__":
    sys.exit(main())
