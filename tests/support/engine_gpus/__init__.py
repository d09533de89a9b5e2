"""Real llama.cpp on stand-in GPUs: child processes whose library has devices that call themselves CUDA0, CUDA1, …

    with engine_gpus(), a_scheduler() as scheduler:
        with scheduler.acquire(path): ...

Each child has as many GPUs as CUDA_VISIBLE_DEVICES names, computes on the processor, and reports where its layers,
caches and buffers are, as with GPUs. The report is llama.cpp's own; only the memory is not a GPU's.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scheduler.engines import llama, llama_server_binary

SOURCE = Path(__file__).with_name("stand_in.c")
CHILD = """
import ctypes, os, runpy, sys
sys.path.append({library!r})
import xllamacpp
visible = os.environ["CUDA_VISIBLE_DEVICES"]
stand_in = ctypes.CDLL({stand_in!r})
count = len(visible.split(",")) if visible else 0
assert stand_in.add_gpus(xllamacpp.xllamacpp.__file__.encode(), count, {integrated}, {overlap}) == count
runpy.run_path({child!r}, run_name="__main__")
"""
SERVER_CHILD = """
import os, runpy
os.environ |= {{"LD_PRELOAD": {stand_in!r}, "STAND_IN_GPUS": "{integrated} {overlap}"}}
runpy.run_path({child!r}, run_name="__main__")
"""


@functools.cache
def build() -> Path:
    """Build the stand-in once with the machine's compiler; skip the test where compiler or llama.cpp do not fit."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the stand-in for the engine's GPUs needs Linux and a C compiler, and there is none")
    pytest.importorskip("xllamacpp")
    import xllamacpp

    folder = Path(tempfile.mkdtemp(prefix="loadmaster-gpus-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    built = folder / "stand_in.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", built, SOURCE], check=True, capture_output=True)
    path = xllamacpp.xllamacpp.__file__
    ctypes.CDLL(path)  # llama.cpp finds the symbols of the library from now on
    if ctypes.CDLL(str(built)).add_gpus(path.encode(), 0, 0, 0) < 0:
        pytest.skip("this llama.cpp has its devices' functions in an order that the stand-in does not know")
    return built


@contextmanager
def engine_gpus(*, integrated: bool = False, overlap: bool = True) -> Iterator[None]:
    """Give GPUs to child processes that start meanwhile; with `overlap` they take several passes at once."""
    stand_in, kinds = str(build()), {"integrated": int(integrated), "overlap": int(overlap)}
    programs = ((llama, CHILD), (llama_server_binary, SERVER_CHILD))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        for module, text in programs:
            child = Path(name) / f"{module.__name__}.py"
            words = {"library": llama.find_library(), "stand_in": stand_in, "child": str(module.CHILD)}
            child.write_text(text.format(**words, **kinds))
            patch.setattr(module, "CHILD", child)
        yield
