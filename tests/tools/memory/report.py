"""docs/memory.md, from what was predicted and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fsm.domain.devices import MIB
from scheduler.engines.llama_options import REPACKED
from scheduler.engines.llama_sizing import (
    CHECKPOINTS,
    MERGE_BYTES,
    PROCESS_BYTES,
    PROMPT_CACHE_BYTES,
    PROMPT_CACHE_PART,
    TOKEN_BYTES,
    UNIGRAM_TOKEN_BYTES,
    VERIFIED_VERSION,
)
from tests.tools.memory import measure
from tests.tools.memory.architectures import Compared
from tests.tools.memory.rows import Predicted, Row

MOST_PART = 0.1  # by which a prediction may be wrong
LEAST_BYTES = 2 * MIB  # of buffers, by which a prediction may be wrong however small they are

TEMPLATE = Path(__file__).with_name("template.md")
HEADERS = ("model", "context", "slots", "cache", "special", "cache, MiB", "compute, MiB", "both", "process, MiB", "off")
RULE = "| --- | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |"


@dataclass(frozen=True, slots=True)
class Result:
    """A row with its prediction and its measurement."""

    row: Row
    predicted: Predicted
    measured: measure.Measured

    @property
    def buffers_off(self) -> float:
        """The part by which cache and compute buffer were overestimated, of what llama.cpp reports."""
        reported_bytes = self.measured.cache_bytes + self.measured.compute_bytes
        return (self.predicted.cache_bytes + self.predicted.compute_bytes) / reported_bytes - 1

    @property
    def whole_off(self) -> float:
        """The part by which the process was overestimated, of its resident size."""
        return self.predicted.whole_bytes / self.measured.resident_bytes - 1

    @property
    def holds(self) -> bool:
        """Whether the row is within the bounds."""
        reported_bytes = self.measured.cache_bytes + self.measured.compute_bytes
        within = max(LEAST_BYTES, MOST_PART * reported_bytes)
        return abs(self.buffers_off) * reported_bytes <= within and abs(self.whole_off) <= MOST_PART


def table_row(row: Row, predicted: Predicted, measured: measure.Measured | None) -> list[str]:
    """Return a row's cells up to the difference of its buffers; without measurements the predictions alone."""

    def both(predicted_bytes: int, measured_bytes: int | None) -> str:
        shown = f"{predicted_bytes / MIB:.1f}"
        return shown if measured_bytes is None else f"{shown} / {measured_bytes / MIB:.1f}"

    special = [word for word, holds in (("embeds", row.embedding), ("projector", row.projector)) if holds]
    special += ["no flash attention"] if row.options.flash_attention is False else []
    special += ["mapped"] if row.options.use_mmap else []
    named = [row.model, f"{row.options.num_ctx}", f"{row.options.num_parallel}", f"{row.options.cache_type_k}"]
    return [
        *named,
        ", ".join(special),
        both(predicted.cache_bytes, measured.cache_bytes if measured else None),
        both(predicted.compute_bytes, measured.compute_bytes if measured else None),
    ]


def report(
    results: Sequence[Result], mappings: Mapping[str, Sequence[measure.Mapping]], compared: Sequence[Compared]
) -> str:
    """Return the whole document."""
    return TEMPLATE.read_text(encoding="utf-8").format(
        repacked=", ".join(sorted(REPACKED)),
        process_mib=PROCESS_BYTES // MIB,
        token_bytes=TOKEN_BYTES,
        unigram_token_bytes=UNIGRAM_TOKEN_BYTES,
        merge_bytes=MERGE_BYTES,
        prompt_cache_part=PROMPT_CACHE_PART,
        prompt_cache_mib=PROMPT_CACHE_BYTES // MIB,
        checkpoints=CHECKPOINTS,
        table=_table(results),
        pages=_pages(results),
        mappings=_mapping(mappings),
        version=VERIFIED_VERSION,
        architectures=_architectures(compared),
        untried=_untried(compared),
    )


def _table(results: Sequence[Result]) -> str:
    lines = ["| " + " | ".join(HEADERS) + " |", RULE]
    for each in results:
        cells = table_row(each.row, each.predicted, each.measured)
        whole = f"{each.predicted.whole_bytes / MIB:.1f} / {each.measured.resident_bytes / MIB:.1f}"
        lines.append("| " + " | ".join([*cells, f"{each.buffers_off:+.1%}", whole, f"{each.whole_off:+.1%}"]) + " |")
    buffers, process = _worst(results, lambda each: each.buffers_off), _worst(results, lambda each: each.whole_off)
    worst = [
        f"- Worst for cache and compute buffers: {_name(buffers.row)}, {buffers.buffers_off:+.1%}.",
        f"- Worst for the whole process: {_name(process.row)}, {process.whole_off:+.1%}.",
    ]
    return "\n".join([f"## {len(results)} configurations, predicted / measured", "", *lines, "", *worst])


def _worst(results: Sequence[Result], off: Callable[[Result], float]) -> Result:
    return max(results, key=lambda each: abs(off(each)))


def _name(row: Row) -> str:
    options, embeds = row.options, " that embeds" if row.embedding else ""
    return f"{row.model}{embeds} with {options.num_parallel} x {options.num_ctx} tokens in {options.cache_type_k}"


def _pages(results: Sequence[Result]) -> str:
    lines = ["| model | weights, reported | pages of files | private |", "| --- | ---: | ---: | ---: |"]
    seen: set[str] = set()
    for each in results:
        if each.row.model not in seen:
            seen.add(each.row.model)
            measured = each.measured
            sizes = measured.weights_bytes, measured.mapped_bytes, measured.resident_bytes - measured.mapped_bytes
            lines.append(f"| {each.row.model} | " + " | ".join(f"{size / MIB:.1f}" for size in sizes) + " |")
    return "\n".join(lines)


def _mapping(mappings: Mapping[str, Sequence[measure.Mapping]]) -> str:
    lines = ["| model | file | load, s | resident, MiB | private, MiB |", "| --- | --- | ---: | ---: | ---: |"]
    for name, ways in mappings.items():
        for way, kind in zip(ways, ("mapped", "read"), strict=True):
            private_bytes = way.resident_bytes - way.mapped_bytes
            sizes = f"{way.resident_bytes / MIB:.0f} | {private_bytes / MIB:.0f}"
            lines.append(f"| {name} | {kind} | {way.load_s:.2f} | {sizes} |")
    return "\n".join(lines)


def _architectures(compared: Sequence[Compared]) -> str:
    lines = [
        "| architecture | by | cache, 1 x 2048 f16 | compute, T = 512 | cache, 4 x 1024 q8_0 | compute, T = 64 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for each in compared:
        if not each.untried:
            cells = [str(pair) for pair in each.pairs] + ["", ""] * (2 - len(each.pairs) // 2)
            by = "formula" if each.by_formula else "dry run"
            lines.append(f"| {each.architecture} | {by} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _untried(compared: Sequence[Compared]) -> str:
    return "\n".join(f"- `{each.architecture}`: {each.untried}" for each in compared if each.untried)
