"""Bytes that a model is expected to take, beside bytes that it takes: predicted, after one load, after a full context.

Each load is a program of its own, and only the store connects them. The bytes taken are the most resident bytes of the
runner's process by psutil, while its contexts and then its prompt cache are filled.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from fsm.domain.options import Options
from tests.support.lives import Life, live
from tests.tools.memory.rows import REAL, Row, write_row

CONTEXT = 256
ROWS = {
    "SmolLM2": Row(REAL, Options(num_ctx=CONTEXT)),
    "llama, no flash attention": Row("llama", Options(num_ctx=CONTEXT, flash_attention=False)),
    "llama, embeds": Row("llama", Options(num_ctx=CONTEXT), embedding=True),
    "llama, 4 slots, q8_0": Row(
        "llama", Options(num_ctx=CONTEXT, num_parallel=4, cache_type_k="q8_0", cache_type_v="q8_0")
    ),
    "llama Q4_0, mapped": Row("llama Q4_0", Options(num_ctx=CONTEXT, use_mmap=True)),
    "qwen3, q8_0": Row("qwen3", Options(num_ctx=2 * CONTEXT, cache_type_k="q8_0", cache_type_v="q8_0")),
    "qwen3moe": Row("qwen3moe", Options(num_ctx=CONTEXT)),
    "gemma3": Row("gemma3", Options(num_ctx=2 * CONTEXT)),
    "mamba2": Row("mamba2", Options(num_ctx=CONTEXT)),
}


def lives_of(row: Row, folder: Path) -> tuple[Life, Life, Life]:
    """Return three programs' figures: one that loads, one that fills its contexts, and one that fills them again."""
    store, model = folder / f"{row.model}.sqlite3", write_row(folder, row)
    store.unlink(missing_ok=True)
    return tuple(live(store, model, row, fills=fills) for fills in (False, True, True))  # type: ignore[return-value]  # three


def run() -> dict[str, Any]:
    """Return the figures and print them."""
    figures: dict[str, Any] = {}
    print("footprints: expected beyond what is taken, by what was known of the model before")
    with tempfile.TemporaryDirectory() as folder:
        for name, row in ROWS.items():
            loaded, filled, again = lives_of(row, Path(folder))
            assert not loaded.measured and filled.measured and again.measured
            predicted = loaded.expected_bytes / filled.taken_bytes - 1
            print(
                f"  {name:<26} takes {filled.taken_bytes / 2**20:6.1f} MiB: predicted {predicted:+.1%}, "
                f"after one load {filled.off:+.1%}, after one full context {again.off:+.1%}"
            )
            sys.stdout.flush()
            figures[name] = {
                "taken_bytes": filled.taken_bytes,
                "predicted": round(predicted, 4),
                "after_one_load": round(filled.off, 4),
                "after_one_full_context": round(again.off, 4),
            }
    for known in ("predicted", "after_one_load", "after_one_full_context"):
        parts = [each[known] for each in figures.values()]
        print(f"  {known.replace('_', ' ')}: {min(parts):+.1%} to {max(parts):+.1%}")
    return figures
