"""Dry runs: what llama.cpp tells of a load, how it is read, remembered and used, and what happens when it is silent."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from fsm.domain.devices import MIB
from fsm.domain.options import Options
from fsm.sizing.footprint import Footprint
from scheduler import Scheduler, Settings
from scheduler.concurrency.latch import Latch
from scheduler.engines import llama, llama_dry_run
from scheduler.engines.child_process import Program
from scheduler.engines.llama import LlamaEngine
from scheduler.engines.llama_dry_run import DryRuns
from scheduler.engines.llama_dry_run_child import caches, compute_bytes
from scheduler.engines.llama_protocol import sizes_of
from scheduler.engines.llama_sizing import EngineCache, EngineSizes, estimate, holds
from scheduler.engines.process_supervisor import ChildLauncher
from scheduler.errors.exceptions import InvalidModel
from scheduler.models.model_spec import ModelSpec
from tests.support.engine_models import write
from tests.support.gguf_bytes import tensor
from tests.support.leaks import no_leaks
from tests.support.models import a_model
from tests.support.tiny_models import write_tiny_model

Shapes = Mapping[str, Sequence[int]]

ASKED = Options(num_ctx=1024)
TOLD = {"event": "sized", "load": 0, "caches": [["full", [0, 1], 256, 4096]], "compute": 1024, "projector": 0}

# of a model with sliding layers, of which the last ones use an earlier layer's cache, in llama.cpp's words
LOG = """\
llama_context:        CPU  output buffer size =     1.00 MiB
llama_kv_cache_iswa: creating non-SWA KV cache, size = 4096 cells
llama_kv_cache: layer   0: filtered
llama_kv_cache: layer   1: dev = CPU
llama_kv_cache: layer   2: does not have KV cache
llama_kv_cache: reusing layers:
llama_kv_cache: - layer   2: reuse layer 0, is_swa = 1
llama_kv_cache:        CPU KV buffer size =     0.00 MiB
llama_kv_cache: size =   64.00 MiB (  4096 cells,   1 layers,  1/1 seqs), K (f16):   32.00 MiB, V (f16):   32.00 MiB
llama_kv_cache_iswa: creating     SWA KV cache, size = 1024 cells
llama_kv_cache: layer   0: dev = CPU
llama_kv_cache: size =   40.00 MiB (  1024 cells,   1 layers,  1/1 seqs), K (f16):   20.00 MiB, V (f16):   20.00 MiB
llama_memory_recurrent, layer   3: dev = CPU
llama_memory_recurrent: layer   4: skipped
llama_memory_recurrent:        CPU RS buffer size =     0.50 MiB
llama_memory_recurrent: size =    0.50 MiB (     1 cells,   5 layers,  1 seqs  0 rs_seq), R (f32):    0.50 MiB
llama_comp_state: layer   4: dev = CPU
llama_comp_state:        CPU csa state buffer size =     1.25 MiB
llama_comp_state: csa ratio = 4, state = 8 x 1024, streams = 1, rs_seq = 0, layers = 21, size =    1.25 MiB
sched_reserve:        CPU compute buffer size =   112.50 MiB
"""


Q2_0 = 42
BLOCK = struct.pack("<e", 0.05) + bytes([0b10010010] * 16)  # 64 elements of Q2_0


def rewritten(file: bytes, change: Callable[[str, gguf.ReaderTensor], tuple[int, bytes]], more: Shapes) -> bytes:
    """Return a file with the types and data that `change` gives its tensors, and with `more` of 32-bit zeros."""
    with tempfile.NamedTemporaryFile() as named:
        named.write(file)
        named.flush()
        reader = gguf.GGUFReader(named.name)
        tensors = [(each.name, [int(n) for n in each.shape], *change(each.name, each)) for each in reader.tensors]
        begin = min(each.field.offset for each in reader.tensors)
    tensors += [(name, [*shape], 0, bytes(4 * math.prod(shape))) for name, shape in more.items()]
    head, data = bytearray(file[:begin]), b""
    struct.pack_into("<Q", head, 8, len(tensors))
    for name, shape, kind, content in tensors:
        head += tensor(name, shape, kind, len(data))
        data += content + bytes(-len(content) % 32)
    return bytes(head) + bytes(-len(head) % 32) + data


def with_tensors(file: bytes, more: Shapes) -> bytes:
    return rewritten(file, lambda name, each: (int(each.tensor_type), each.data.tobytes()), more)


def with_types(file: bytes, part: bytes, kind: int) -> bytes:
    """Return a file whose matrices with `part` in their names are of another type, with blocks as Q2_0 has them."""

    def change(name: str, each: gguf.ReaderTensor) -> tuple[int, bytes]:
        if part.decode() in name and len(each.shape) > 1:
            return kind, BLOCK * (int(each.n_elements) // 64)
        return int(each.tensor_type), each.data.tobytes()

    return rewritten(file, change, {})


# what llama.cpp says


def test_a_log_tells_each_cache_with_its_kind_and_its_layers() -> None:
    """Caches are told apart: of whole contexts, of windows, and states; none is counted twice."""
    assert caches(LOG) == [
        ("full", [1], 4096, 64 * MIB),
        ("window", [0], 1024, 40 * MIB),
        ("state", [3], 1, MIB // 2),
        ("state", [4], 0, 5 * MIB // 4),
    ]
    assert compute_bytes(LOG) == 225 * MIB // 2


def test_a_log_without_caches_is_an_encoder_s() -> None:
    """An encoder has no cache, and its buffers are told all the same."""
    assert caches("sched_reserve:  CPU compute buffer size =  15.26 MiB\n") == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"caches": None},
        {"compute": 0},
        {"compute": "1"},
        {"compute": 1 << 60},
        {"projector": -1},
        {"caches": [["other", [0], 1, 1]]},
        {"caches": [["full", [-1], 1, 1]]},
        {"caches": [["full", ["0"], 1, 1]]},
        {"caches": [["full", [0], -1, 1]]},
        {"caches": [["full", [0], 1, 1 << 60]]},
        {"caches": [["full", [0], 1]]},
        {"caches": [7]},
    ],
)
def test_what_cannot_be_is_no_answer(wrong: dict[str, object]) -> None:
    """A child's answer is checked value by value, and one wrong value spoils it."""
    assert sizes_of(TOLD) == EngineSizes((EngineCache("full", (0, 1), 256, 4096),), 1024)
    assert sizes_of({**TOLD, **wrong}) is None


# how it is used


def test_what_is_told_takes_the_place_of_the_formulas() -> None:
    """Caches go to the layers that have them, by their heads; windows and states are copied for the next turn."""
    info = replace(a_model(), heads_kv=(1, 3, 2, 2), sliding_window=512)
    told = EngineSizes(
        (
            EngineCache("full", (0, 1), 4096, 4 * MIB),
            EngineCache("window", (2,), 1024, 2 * MIB),
            EngineCache("state", (3,), 0, MIB),
        ),
        7 * MIB,
    )
    footprint = estimate(info, Options(num_ctx=4096), told)
    assert footprint.caches_bytes == (MIB, 3 * MIB, 2 * MIB, MIB)
    assert footprint.checkpoints_bytes == 2 * (MIB + MIB)
    assert footprint.compute_bytes == 7 * MIB
    assert footprint.weights_bytes == info.layers_bytes


@pytest.mark.parametrize("layers", [(), (9,)])
def test_a_cache_of_no_known_layer_is_shared_by_all(layers: tuple[int, ...]) -> None:
    """No byte is lost of a cache whose layers are not told, or are not the file's."""
    told = EngineSizes((EngineCache("full", layers, 256, 8 * MIB),), MIB)
    assert estimate(a_model(), Options(), told).caches_bytes == (2 * MIB,) * 4


def test_a_projector_takes_what_is_told_of_it() -> None:
    """U26: a projector counts with its weights and with what it computes with, not with its file's size alone."""
    info = replace(a_model(vision=True), projectors_bytes=9 * MIB)
    assert estimate(info, Options()).projectors_bytes == 9 * MIB
    assert estimate(info, Options(), EngineSizes((), MIB, 29 * MIB)).projectors_bytes == 29 * MIB


@pytest.mark.parametrize(
    ("change", "version", "known"),
    [
        ({}, "2026.10.11549", True),
        ({}, "2026.11.1", False),
        ({"architecture": "gemma4"}, "2026.10.11549", False),
        ({"architecture": "something new"}, "2026.10.11549", False),
        ({"projectors_bytes": MIB}, "2026.10.11549", False),
    ],
)
def test_the_formulas_count_where_they_were_verified(change: dict[str, Any], version: str, known: bool) -> None:
    """U20, U22–U24: an architecture or a version of llama.cpp that was not verified is asked about."""
    assert holds(replace(a_model(), **change), version) is known


# the real thing


@pytest.fixture
def engine() -> Iterator[LlamaEngine]:
    """Yield an engine that leaves nothing behind."""
    pytest.importorskip("xllamacpp")
    with no_leaks():
        engine = LlamaEngine()
        yield engine
        engine.close()


def footprint_of(engine: LlamaEngine, path: Path, asked: Options = ASKED) -> Footprint:
    return engine.inspect(ModelSpec(path.stem, str(path)), [asked]).resolutions[0].loads[0].footprint


def test_an_answer_is_remembered(engine: LlamaEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is asked about once: another inspection, with options that change no size, starts no process."""
    path = write(tmp_path, "gemma4")
    first = footprint_of(engine, path)
    monkeypatch.setattr(ChildLauncher, "start", lambda *arguments: pytest.fail("a process was started"))
    assert footprint_of(engine, path) == first
    assert footprint_of(engine, path, replace(ASKED, num_thread=3, num_gpu=0)) == first
    assert engine.problems == ()


def test_all_loads_of_a_profile_are_answered_at_once(engine: LlamaEngine, tmp_path: Path) -> None:
    """A request that names nothing may be loaded in several ways, and one process tells the memory of all of them."""
    path = write(tmp_path, "gemma4")
    began = time.monotonic()
    (resolution,) = engine.inspect(ModelSpec("m", str(path)), [Options(num_ctx=32768)]).resolutions
    assert len(resolution.loads[0].batches) == 1 and time.monotonic() - began < llama_dry_run.TIMEOUT_S
    larger = resolution.loads[0].batches[0].load
    assert larger.footprint.compute_bytes > 1.5 * resolution.loads[0].footprint.compute_bytes


def test_u28_what_takes_more_slots_is_asked_for_with_them(engine: LlamaEngine, tmp_path: Path) -> None:
    """U28: four slots of a model that keeps states take four times its states."""
    path = write(tmp_path, "mamba2")
    one, four = (footprint_of(engine, path, replace(ASKED, num_parallel=slots)) for slots in (1, 4))
    assert sum(four.caches_bytes) == pytest.approx(4 * sum(one.caches_bytes), rel=0.02)


ENCODER = {"v.blk.0.attn_q.weight": (8,), "mm.mm_input_projection.weight": (64, 32)}
UNUSABLE: Mapping[str, tuple[Callable[[bytes], bytes], str, str]] = {  # a change, llama.cpp's words, and ours
    "a tensor is missing": (lambda file: file.replace(b"attn_norm", b"attn_n0rm"), "attn_norm", "another conversion"),
    "an architecture is unknown": (lambda file: file.replace(b"llama", b"lxama"), "'lxama'", "upgrade"),
    "an encoder is in the file": (lambda file: with_tensors(file, ENCODER), "wrong number of tensors", "mmproj"),
    "a tensor is too many": (lambda file: with_tensors(file, {"blk.0.more.weight": (8,)}), "wrong number", "another"),
    "a type is unknown": (lambda file: with_types(file, b"ffn_up", 99), "invalid ggml type 99", "upgrade"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_u31_a_file_that_llama_cpp_refuses_is_told_before_a_load(
    engine: LlamaEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """U31: a file with what is not known here is shown to llama.cpp, and refused with its words and what to do."""
    change, theirs, ours = UNUSABLE[what]
    path = tmp_path / "odd.gguf"
    path.write_bytes(change(write_tiny_model(path).read_bytes()))
    for _ in range(2):  # the second time without llama.cpp
        with pytest.raises(InvalidModel) as refused:
            engine.inspect(ModelSpec("odd", str(path)), [ASKED])
        assert theirs in refused.value.reason and ours in refused.value.reason
        assert engine.problems == ()
        monkeypatch.setattr(ChildLauncher, "start", lambda *arguments: pytest.fail("a process was started"))
    path.write_bytes(write_tiny_model(path).read_bytes())
    assert engine.inspect(ModelSpec("odd", str(path)), [ASKED]).resolutions


def test_u31_a_machine_without_memory_is_no_fault_of_the_files(
    engine: LlamaEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """U31: where llama.cpp cannot load for want of memory or files, the model is estimated and named, not refused."""
    path = write(tmp_path, "gemma4")
    program = tmp_path / "child.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(llama.DRY_RUN_CHILD.parent)!r}); import llama_dry_run_child as child\n"
        "load = child.Engine.load\n"
        "def fails(engine, request):\n"
        "    engine._take_in(4, b'llama_model_load: error loading model: something\\n', None)\n"
        "    engine._take_in(4, b'llama_model_load: error loading model: std::bad_alloc\\n', None)\n"
        "child.Engine.load = fails; child.main()\n"
    )
    monkeypatch.setattr(llama, "DRY_RUN_CHILD", program)
    assert footprint_of(engine, path).compute_bytes > 0
    (problem,) = engine.problems
    assert path.stem in problem and "bad_alloc" in problem and "estimated" in problem


@pytest.mark.parametrize("part", [b"ffn_up", b"token_embd", b"blk.1.ffn_down", b"weight"])
def test_u30_types_that_the_gguf_package_does_not_know_are_served(tmp_path: Path, part: bytes) -> None:
    """U30: a model of a type that llama.cpp has and the gguf package has not is served, in any of its matrices."""
    pytest.importorskip("xllamacpp")
    path = write_tiny_model(tmp_path / "m.gguf")
    path.write_bytes(with_types(path.read_bytes(), part, Q2_0))
    with Scheduler(Settings(gpus=False, cpu_threads=1, measurement_file=None, lock_folder=None)) as scheduler:
        assert scheduler.fit(path, num_ctx=256).verdict == "fits"
        with scheduler.acquire(path, num_ctx=256, timeout=60) as lease:
            assert lease.complete("abc", max_tokens=2) is not None
        assert scheduler.status().problems[1:] == ()


def test_a_refused_load_leaves_the_others_their_answers(
    engine: LlamaEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that llama.cpp refuses is told with its reason, and the loads beside it have their answers."""
    path = write(tmp_path, "grok")
    refused = replace(ASKED, cache_type_k="q8_0", cache_type_v="q8_0")  # llama.cpp forces flash attention off
    _, accepted = engine.inspect(ModelSpec(path.stem, str(path)), [refused, ASKED]).resolutions
    (problem,) = engine.problems
    assert "quantized V cache" in problem
    monkeypatch.setattr(ChildLauncher, "start", lambda *arguments: pytest.fail("a process was started"))
    assert footprint_of(engine, path) == accepted.loads[0].footprint


def test_more_slots_than_are_asked_about_take_as_much_for_each(engine: LlamaEngine, tmp_path: Path) -> None:
    """A dry run takes the states of its slots, so few are asked about; the caches of all slots are alike."""
    path = write(tmp_path, "mamba2")
    four, many = (footprint_of(engine, path, replace(ASKED, num_parallel=slots)) for slots in (4, 32))
    assert sum(many.caches_bytes) == pytest.approx(8 * sum(four.caches_bytes))
    assert many.checkpoints_bytes == pytest.approx(8 * four.checkpoints_bytes)
    assert many.compute_bytes >= four.compute_bytes


def test_many_loads_of_a_long_path_find_room_in_a_pipe(engine: LlamaEngine, tmp_path: Path) -> None:
    """What is asked is small, however long the path: only what differs is said of each load."""
    folder = tmp_path / ("é" * 120) / ("ü" * 120)
    folder.mkdir(parents=True)
    path = write(folder, "gemma4")
    asked = [replace(ASKED, num_ctx=256 * number) for number in range(1, llama_dry_run.MOST_LOADS + 1)]
    assert len(engine.inspect(ModelSpec("m", str(path)), asked).resolutions) == len(asked)
    assert engine.problems == ()


# silence


class _Asked:
    """A program in place of the dry run's."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.count = 0

    def __call__(self, loads: Sequence[Any]) -> Program:
        self.count += 1
        return Program((sys.executable, "-c", self.code), {}, b"\n")


@pytest.fixture
def processes() -> Iterator[ChildLauncher]:
    """Yield a launcher that leaves nothing behind."""
    with no_leaks():
        launcher = ChildLauncher()
        yield launcher
        assert launcher.close()


LOADS: Mapping[Options, Any] = {Options(num_ctx=tokens): None for tokens in (1, 2)}
SAYS_ONE = f"import sys; print({json.dumps(json.dumps(TOLD))}); sys.stderr.write('why\\n'); sys.exit(3)"


def test_half_an_answer_is_half_used(processes: ChildLauncher) -> None:
    """A child that dies after its first answer has given one; the other is named, and not asked about for a while."""
    program = _Asked(SAYS_ONE)
    runs = DryRuns(processes, program)
    for _ in range(2):
        assert list(runs.sizes("m", "mark", LOADS)) == [Options(num_ctx=1)]
        assert runs.problems == ("llama.cpp did not tell which memory m takes (status 3 why): it is estimated",)
    assert program.count == 1


def test_a_problem_goes_with_the_answer_to_the_very_question(
    processes: ChildLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that is told at last is no problem any more; answers about other loads and models change nothing."""
    monkeypatch.setattr(llama_dry_run, "SILENCE_S", 0.0)
    program = _Asked("import sys; sys.exit(1)")
    runs = DryRuns(processes, program)
    one, two = ({Options(num_ctx=tokens): None} for tokens in (1, 2))
    runs.sizes("m", "mark", one)
    program.code = SAYS_ONE
    assert runs.sizes("m", "mark", two) and runs.sizes("m", "other mark", one)
    assert len(runs.problems) == 1
    assert runs.sizes("m", "mark", one)
    assert runs.problems == ()


def test_what_a_file_says_of_itself_cannot_reach_a_terminal(processes: ChildLauncher) -> None:
    """U64: an error that quotes a file, of any length, is shown without its escape sequences, and cut short."""
    line = json.dumps({"event": "failed", "reason": "bad \x1b]0;owned\x07 " + 9999 * "x"})
    runs = DryRuns(processes, _Asked(f"print({line!r})"))
    runs.sizes("m", "mark", LOADS)
    (problem,) = runs.problems
    assert problem.isprintable() and len(problem) < 500


def test_threads_that_ask_the_same_share_one_answer(processes: ChildLauncher) -> None:
    """One dry run is made at a time, and what it tells is there for all."""
    program = _Asked(f"import time; time.sleep(0.3); {SAYS_ONE}")
    runs = DryRuns(processes, program)
    with ThreadPoolExecutor(6) as pool:
        told = [*pool.map(lambda number: runs.sizes("m", "mark", {Options(num_ctx=1): None}), range(6))]
    assert program.count == 1 and all(told)


def test_the_time_is_for_all_loads_together(processes: ChildLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent llama.cpp is asked once, however many loads there are, and then not for a while."""
    monkeypatch.setattr(llama_dry_run, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(llama_dry_run, "MOST_LOADS", 1)
    program = _Asked("import time; time.sleep(600)")
    runs = DryRuns(processes, program)
    for _ in range(3):
        assert runs.sizes("m", "mark", {Options(num_ctx=tokens): None for tokens in range(9)}) == {}
    assert program.count == 1


def test_a_thread_that_is_interrupted_leaves_no_child(
    processes: ChildLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the dry run too."""

    def interrupted(self: Latch, timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(Latch, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        DryRuns(processes, _Asked("import time; time.sleep(600)")).sizes("m", "mark", LOADS)
    monkeypatch.undo()


def test_a_child_that_hangs_is_waited_for_some_seconds_and_ended(
    processes: ChildLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request waits for a dry run for a few seconds, and no process is left."""
    monkeypatch.setattr(llama_dry_run, "TIMEOUT_S", 0.3)
    runs = DryRuns(processes, _Asked("import time; time.sleep(600)"))
    began = time.monotonic()
    assert runs.sizes("m", "mark", LOADS) == {}
    assert time.monotonic() - began < 10
    assert "no answer within 0.3 s" in runs.problems[0]


@pytest.mark.parametrize("line", ["7", "{}", '{"event": "sized", "load": 9}', '{"event": "refused"}', "\\udce9"])
def test_a_line_that_is_no_answer_is_passed_over(processes: ChildLauncher, line: str) -> None:
    """A child may print anything: what is not of the protocol is ignored."""
    program = _Asked(f"print({line!r}); {SAYS_ONE}")
    assert list(DryRuns(processes, program).sizes("m", "mark", LOADS)) == [Options(num_ctx=1)]


def test_a_closed_engine_asks_nothing(processes: ChildLauncher) -> None:
    """After the close no process is started, and the formulas count."""
    processes.close()
    runs = DryRuns(processes, _Asked(SAYS_ONE))
    assert runs.sizes("m", "mark", LOADS) == {}
    assert "closed" in runs.problems[0]


def test_answers_and_problems_are_bounded(processes: ChildLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are forgotten first."""
    monkeypatch.setattr(llama_dry_run, "MOST_SILENT", 2)
    monkeypatch.setattr(llama_dry_run, "MOST_TOLD", 1)
    program = _Asked(SAYS_ONE)
    runs = DryRuns(processes, program)
    for number in range(3):
        runs.sizes(f"m{number}", f"mark{number}", LOADS)
    assert [("m1" in problem, "m2" in problem) for problem in runs.problems] == [(True, False), (False, True)]
    runs.sizes("m2", "mark2", {Options(num_ctx=1): {}})
    assert program.count == 3
    runs.sizes("m0", "mark0", {Options(num_ctx=1): {}})
    assert program.count == 4


def test_the_status_says_what_is_only_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`status().problems` names a model whose memory llama.cpp did not tell, and the model is served all the same."""
    pytest.importorskip("xllamacpp")
    path = write(tmp_path, "plamo3")
    monkeypatch.setattr(llama, "DRY_RUN_CHILD", tmp_path / "no such program.py")
    settings = Settings(gpus=False, cpu_threads=1, measurement_file=None, lock_folder=None)
    with Scheduler(settings) as scheduler:
        with scheduler.acquire(path, num_ctx=256, timeout=60) as lease:
            assert lease.complete("a", max_tokens=1) is not None
        (problem,) = scheduler.status().problems[-1:]
        assert path.stem in problem and "estimated" in problem


def test_a_dry_run_takes_no_memory_for_weights(tmp_path: Path) -> None:
    """A model of 12 GiB is asked about by a process that never has a tenth of it."""
    pytest.importorskip("xllamacpp")
    sizes = {"layers": 60, "width": 4096, "feed_forward": 16384, "heads": 32, "heads_kv": 8, "head": 128}
    path = write(tmp_path, "granite", sizes)
    assert path.stat().st_size > 12 << 30
    code = (
        "import resource, sys; from scheduler.engines.llama import LlamaEngine; "
        "from scheduler.models.model_spec import ModelSpec; from fsm.domain.options import Options\n"
        "engine = LlamaEngine(); engine.inspect(ModelSpec('m', sys.argv[1]), [Options(num_ctx=1024)])\n"
        "assert not engine.problems, engine.problems\n"
        "engine.close(); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 512 * 1024  # KiB
