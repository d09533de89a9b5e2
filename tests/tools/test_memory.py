"""Predictions against real children, in a few rows of docs/memory.md, and the document itself."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fsm.domain.devices import MIB
from fsm.domain.options import Options
from scheduler.engines.llama_child import buffers
from scheduler.engines.llama_options import maps_file
from scheduler.models.gguf_metadata import read_metadata
from scheduler.models.model_info import ModelInfo
from tests.support.written_models import Design, write_model
from tests.tools.memory.measure import measure
from tests.tools.memory.report import HEADERS, LEAST_BYTES, MOST_PART, TEMPLATE, Result, table_row
from tests.tools.memory.rows import DESIGNS, REAL, ROWS, Row, predict, projectors_of, write_row

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "memory.md"

QUICK = {
    "sliding": Row("gemma3", Options(num_ctx=1024, num_parallel=2, cache_type_k="q8_0", cache_type_v="q8_0")),
    "hybrid": Row("granitehybrid", Options(num_ctx=1024)),
    "experts": Row("qwen3moe", Options(num_ctx=512, flash_attention=False)),
    "embeds": Row("llama", Options(num_ctx=512), embedding=True),
    "encoder": Row("bert", Options(num_ctx=512), embedding=True),
    "reordered": Row("llama Q4_0", Options(num_ctx=512), projector=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder in which each model is written once."""
    return tmp_path_factory.mktemp("models")


def test_the_document_has_the_words_of_its_template() -> None:
    """What is written by hand is in the template: `make memory` writes the document anew and loses none of it."""
    document = DOCUMENT.read_text(encoding="utf-8")
    parts = re.split(r"\{\w+\}", TEMPLATE.read_text(encoding="utf-8"))
    assert [part for part in parts if part not in document] == []


# N11


A_MODEL = ModelInfo(
    architecture="llama",
    context_trained=8192,
    embedding_length=512,
    feed_forward_length=1536,
    vocabulary=8192,
    heads=8,
    heads_kv=(2,) * 12,
    key_length=64,
    value_length=64,
    sliding_window=0,
    layers_bytes=(10 * MIB,) * 12,
    input_bytes=MIB,
    output_bytes=MIB,
    file_bytes=122 * MIB,
    embedding=False,
    vision=False,
    types_bytes=(("Q8_0", 120 * MIB),),
)


def test_n11_a_file_is_mapped_unless_it_would_be_there_twice() -> None:
    """N11: a file is mapped unless most of its weights are reordered and no GPU has a part of them."""
    reordered = replace(A_MODEL, types_bytes=(("Q4_K", 70 * MIB), ("Q6_K", 50 * MIB)))
    mixed = replace(A_MODEL, types_bytes=(("Q4_K", 50 * MIB), ("Q6_K", 70 * MIB)))
    assert maps_file(A_MODEL, Options(), on_host=True)
    assert maps_file(mixed, Options(), on_host=True)
    assert not maps_file(reordered, Options(), on_host=True)
    assert maps_file(reordered, Options(), on_host=False)


@pytest.mark.parametrize("use_mmap", [True, False])
def test_n11_a_request_s_own_word_overrules(use_mmap: bool) -> None:
    """N11: the request's own option wins, whatever the model."""
    reordered = replace(A_MODEL, types_bytes=(("Q4_0", 120 * MIB),))
    assert {maps_file(each, Options(use_mmap=use_mmap), True) for each in (A_MODEL, reordered)} == {use_mmap}


# metadata


def test_each_layer_says_how_it_remembers(tmp_path: Path) -> None:
    """Each layer's type is read: sliding layers by file or architecture, recurrent layers by their tensors."""
    gemma = read_metadata(str(write_model(tmp_path / "g.gguf", Design("gemma3", layers=7))))
    assert gemma.sliding_layers == (True,) * 5 + (False, True) and gemma.recurrent_layers == ()
    lfm = read_metadata(str(write_model(tmp_path / "l.gguf", Design("lfm2", layers=4))))
    assert lfm.recurrent_layers == (True, True, True, False) and lfm.heads_kv == (0, 0, 0, 2)
    assert lfm.recurrence.short_conv == 3 and lfm.sliding_layers == ()


def test_types_and_experts_are_read(tmp_path: Path) -> None:
    """The bytes by type are those of matrices, and experts have a width of their own."""
    info = read_metadata(str(write_model(tmp_path / "m.gguf", Design("qwen3moe", layers=2, quantisation="Q4_0"))))
    assert (info.experts, info.experts_used, info.expert_length, info.feed_forward_length) == (8, 2, 512, 1024)
    assert (info.quantisation, info.output_type, info.tied, info.gated) == ("Q4_0", "Q4_0", False, True)
    assert dict(info.types_bytes).keys() == {"F32", "Q4_0"}  # the tensor that chooses experts is F32
    encoder = read_metadata(str(write_model(tmp_path / "b.gguf", Design("bert", layers=2))), embedding=True)
    assert (encoder.pooling, encoder.gated) == ("mean", False)


# the child's own report


LOG = """\
0.00.1 I load_tensors:   CPU_Mapped model buffer size =    22.69 MiB
0.00.1 I load_tensors:   CPU_REPACK model buffer size =    21.00 MiB
0.00.1 I load_tensors:        CUDA0 model buffer size =  1024.50 MiB
0.00.1 I llama_context:  CUDA_Host  output buffer size =     0.25 MiB
0.00.1 I llama_kv_cache:      CUDA1 KV buffer size =     3.00 MiB
0.00.1 I llama_memory_recurrent:        CPU RS buffer size =     2.00 MiB
0.00.1 I llama_kv_cache: size =    3.00 MiB (   512 cells,  12 layers,  1/1 seqs), K (f16): 1.50 MiB, V (f16): 1.50 MiB
0.00.1 I sched_reserve:      CUDA0 compute buffer size =     5.50 MiB
0.00.1 I clip_ctx: CLIP using CUDA0 backend
0.00.1 I load_hparams: model size:         6.49 MiB
0.00.1 I reserve_compute_meta:      CUDA0 compute buffer size =     0.75 MiB
a prompt that says: CPU model buffer size =   999.00 MiB
"""


def test_a_child_finds_its_buffers_in_llama_cpp_s_log() -> None:
    """A child finds its buffers in llama.cpp's log by device and kind, those of a projector included."""
    told = [(device, kind, amount / MIB) for device, kind, amount in buffers(LOG)]
    assert [(device, kind) for device, kind, _ in told] == [
        ("CPU", "weights"), ("CPU", "weights"), ("CUDA0", "weights"), ("CPU", "output"), ("CUDA1", "cache"),
        ("CPU", "cache"), ("CUDA0", "compute"), ("CUDA0", "projector"), ("CUDA0", "projector"),
    ]  # fmt: skip
    assert [amount for _, _, amount in told] == pytest.approx(
        [22.69, 21, 1024.5, 0.25, 3, 2, 5.5, 6.49, 0.75], abs=0.01
    )


# against real children


@pytest.mark.skipif(sys.platform != "linux", reason="resident sizes elsewhere mean something else")
@pytest.mark.parametrize("name", QUICK)
def test_n14_a_prediction_is_near_what_is_reported(folder: Path, name: str) -> None:
    """N14: predicted cache and buffers are within a tenth or 2 MiB of the reported ones, the process within a tenth."""
    pytest.importorskip("xllamacpp")
    row = QUICK[name]
    path, projectors = write_row(folder, row), projectors_of(folder, row)
    predicted, measured = predict(path, row, projectors), measure(path, row, projectors)
    assert Result(row, predicted, measured).holds, (predicted, measured)
    assert measured.cache_bytes == pytest.approx(predicted.cache_bytes, abs=0.02 * MIB)  # llama.cpp prints hundredths
    assert measured.projector_bytes == pytest.approx(predicted.footprint.projectors_bytes, rel=0.1)


# the document


def rows_of(document: str) -> list[list[str]]:
    """Return the cells of the document's first table."""
    lines = document.split(" | ".join(HEADERS), 1)[1].splitlines()[2:]
    table = lines[: next(number for number, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_document_has_every_row_within_bounds() -> None:
    """The document has every row, within its bounds."""
    rows = rows_of(DOCUMENT.read_text(encoding="utf-8"))
    assert len(rows) == len(ROWS) >= 24
    for cells in rows:
        pairs = [tuple(map(float, cell.split(" / "))) for cell in (cells[5], cells[6], cells[8])]
        reported = pairs[0][1] + pairs[1][1]
        off = abs(pairs[0][0] + pairs[1][0] - reported)
        assert off <= max(LEAST_BYTES / MIB, MOST_PART * reported) + 0.1, cells
        assert abs(pairs[2][0] / pairs[2][1] - 1) <= MOST_PART + 0.001, cells


def test_the_document_says_what_is_predicted_today(folder: Path) -> None:
    """The document has today's predictions; a change of a formula needs `make memory` again."""
    documented = dict(zip(ROWS, rows_of(DOCUMENT.read_text(encoding="utf-8")), strict=True))
    for row, cells in documented.items():
        if row.model == REAL:
            continue
        path, projectors = write_row(folder, row), projectors_of(folder, row)
        today = table_row(row, predict(path, row, projectors), None)
        assert [cell.split(" / ")[0] for cell in cells[: len(today)]] == today, row


def test_the_rows_differ_in_what_matters() -> None:
    """The rows have four architectures and more, contexts of 512 to 8192, three cache types, and one and four slots."""
    options = [row.options for row in ROWS]
    assert len({DESIGNS[row.model].architecture for row in ROWS if row.model != REAL}) >= 4
    assert {512, 8192} <= {each.num_ctx for each in options}
    assert {each.cache_type_k for each in options} == {"f16", "q8_0", "q4_0"}
    assert {each.num_parallel for each in options} == {1, 4} and {row.embedding for row in ROWS} == {True, False}
    assert len(set(ROWS)) == len(ROWS)
