"""llama.cpp's own projection of a load, beside ours."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fsm.domain.devices import MIB
from fsm.domain.options import Options
from scheduler.engines.llama_options import resolve
from scheduler.engines.llama_sizing import estimate
from scheduler.models.gguf_metadata import read_metadata

CONTEXT = 2048
TIMEOUT_S = 120.0
ROUNDS = 100

# llama.cpp has no call for the projection alone: a load is begun, and is ended when its log has the figures.
CHILD = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_batch, params.n_ubatch = sys.argv[1], int(sys.argv[2]), 512, 512
params.port, params.ui, params.warmup, params.verbosity, params.fit_params = 0, False, False, 4, True
xllamacpp.Server(params)
"""
_SUM = re.compile(r"- Host +\| +(\d+) = ")
_TOOK = re.compile(r"fitting params to free memory took ([\d.]+) seconds")


@dataclass(frozen=True, slots=True)
class DryRun:
    """Two projections of the same load: weights, cache and compute buffer in bytes."""

    model: str
    theirs_bytes: int
    theirs_s: float  # from the start of its process
    ours_bytes: int
    ours_s: float  # with the file's header in memory


def compare(name: str, path: Path) -> DryRun:
    """Return both projections for a context of 2048 tokens."""
    theirs_bytes, theirs_s = _theirs(path)
    begin = time.perf_counter()
    for _ in range(ROUNDS):
        info = read_metadata(str(path))
        footprint = estimate(info, resolve(info, Options(num_ctx=CONTEXT, num_gpu=0, use_mmap=True)))
    ours_s = (time.perf_counter() - begin) / ROUNDS
    ours_bytes = sum(footprint.layers_bytes) + footprint.input_bytes + footprint.output_bytes + footprint.compute_bytes
    return DryRun(name, theirs_bytes, theirs_s, ours_bytes, ours_s)


def _theirs(path: Path) -> tuple[int, float]:
    begin = time.perf_counter()
    command = [sys.executable, "-c", CHILD, str(path), str(CONTEXT)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        total_bytes = 0
        try:
            for line in child.stderr:
                if found := _SUM.search(line):
                    total_bytes = int(found[1]) * MIB
                if _TOOK.search(line):
                    return total_bytes, time.perf_counter() - begin
        finally:
            child.kill()
    raise RuntimeError("llama.cpp says nothing of its projection")
