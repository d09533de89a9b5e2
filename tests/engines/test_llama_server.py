"""A `llama-server` of the user's own: which one can be used, what it is told, and what it is asked.

Most tests have a script in its place, which tells what a server does. Those with a real one skip without LLAMA_SERVER;
`served_by` has the other tests of the engine run with it too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from fsm.domain.devices import HOST, MIB, DeviceId, Placement
from fsm.domain.options import Options
from scheduler import EngineMissing, EngineUnusable, InvalidModel, LoadFailed, ModelSpec, Scheduler
from scheduler.devices.gpus import Gpu
from scheduler.engines import llama_server_binary
from scheduler.engines.interface import version_of
from scheduler.engines.llama_server import LlamaServerEngine
from scheduler.engines.llama_server_options import NEEDED, arguments, known_options, missing
from scheduler.models.measurements import identity_of
from tests.support.leaks import no_leaks
from tests.support.own_server import the_server
from tests.support.real import settings
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import LIMIT_S

NVIDIAS = Gpu(DeviceId("GPU-a"), "NVIDIA a card", 8 * MIB, 8 * MIB, vendor="NVIDIA", cuda_id=True)
HELP = "".join(f"{name:<40}what it does\n" for name in NEEDED if name != "--flash-attn") + (
    "-fa,   --flash-attn [on|off|auto]       set Flash Attention use\n"
)
CUDA_LIST = "Available devices:\n  CUDA0: a card (8 MiB, 8 MiB free)\n"
SCRIPT = """#!/bin/sh
echo "$*" >> "$0.asked"
case "$*" in
--version) echo 'version: {version}' >&2 ;;
*--list-devices) cat "$0.devices" ;;
*--model*) echo "$*" > "$0.probe"; cat "$0.places"; exit 1 ;;
--help) cat "$0.help" ;;
esac
"""


def a_server(
    folder: Path, *, version: str = "9999 (abc)", help: str = HELP, devices: str = CUDA_LIST, places: str = ""
) -> Path:
    """Write a program that tells what a `llama-server` does."""
    path = folder / "llama-server"
    path.write_text(SCRIPT.format(version=version))
    path.chmod(0o755)
    for name, text in (("help", help), ("devices", devices), ("places", places)):
        path.with_name(f"llama-server.{name}").write_text(text)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tiny model."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "a.gguf", context=1024)


def asked(path: Path, **more: Any) -> LlamaServerEngine:
    """Return an engine whose server was asked, and close it; raises what its requests would."""
    engine = LlamaServerEngine(path, **more)
    try:
        engine.binary.facts()
    finally:
        engine.close()
    return engine


# -- which one can be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("missing", EngineMissing, "name the file of a llama-server by the setting llama_server"),
        ("folder", EngineUnusable, "name the program itself"),
        ("not executable", EngineUnusable, "chmod +x"),
    ],
)
def test_a_path_that_is_no_program_is_refused_at_once(
    tmp_path: Path, kind: str, error: type[EngineMissing], words: str
) -> None:
    """What can be seen of a file is told before anything is run, with what to do."""
    path = tmp_path / "server"
    if kind == "folder":
        path.mkdir()
    elif kind == "not executable":
        path.write_text("#!/bin/sh")
    with pytest.raises(error, match=words.replace("+", r"\+")) as caught:
        LlamaServerEngine(path).require()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x7fELF of another processor", "no program for this machine"),
        (b"#!/bin/sh\necho 'libcudart.so: cannot open shared object file' >&2; exit 127", "libcudart.so: cannot open"),
        (b"#!/bin/sh\nexit 3", "status 3"),
    ],
)
def test_a_program_that_is_no_server_is_refused_in_its_own_words(tmp_path: Path, content: bytes, words: str) -> None:
    """What cannot be run, or tells no version, is refused with the reason, and no process is left."""
    path = tmp_path / "server"
    path.write_bytes(content)
    path.chmod(0o755)
    with no_leaks(), pytest.raises(EngineUnusable, match=words):
        asked(path)


def test_an_old_server_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    """A server without an option that is needed is refused, as is one whose flash attention is a mere switch."""
    old = HELP.replace("--device", "--gadget").replace(" [on|off|auto]", "")
    with pytest.raises(EngineUnusable, match=r"9999 \(abc\) does not know --device, --flash-attn: get a llama-server"):
        asked(a_server(tmp_path, help=old))


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that hangs is refused after a while, and ended."""
    monkeypatch.setattr(llama_server_binary, "TIMEOUT_S", 0.2)
    path = tmp_path / "server"
    path.write_text("#!/bin/sh\nexec sleep 60")
    path.chmod(0o755)
    with no_leaks(), pytest.raises(EngineUnusable, match=r"did not tell its version within 0\.2 s"):
        asked(path)


def test_each_request_of_an_unusable_server_gets_that_error(tmp_path: Path, model: Path) -> None:
    """The first request, which asks the server, and the next one have the same error; another server is asked anew."""
    path = a_server(tmp_path, help="-h  help")
    with no_leaks(), Scheduler(settings(llama_server=path)) as scheduler:
        for _ in range(2):
            with pytest.raises(EngineUnusable, match="does not know"):
                scheduler.acquire(model, timeout=LIMIT_S)
        with pytest.raises(EngineUnusable, match="does not know"):
            scheduler.fit(model)
        a_server(tmp_path)
        os.utime(path, ns=(1, 1))
        with pytest.raises(LoadFailed):  # it is a script, and serves nothing
            scheduler.acquire(model, timeout=LIMIT_S)


def test_it_is_asked_once(tmp_path: Path, model: Path) -> None:
    """Every question is asked once, whatever is inspected, and again where the file is another one."""
    path = a_server(tmp_path)
    engine = LlamaServerEngine(path, gpus=lambda: [NVIDIAS])
    spec = ModelSpec("a", str(model))
    for _ in range(2):
        profile = engine.inspect(spec, [Options()])
        assert profile.gpu_libraries == ("CUDA",) and engine.problems == ()
    assert len((tmp_path / "llama-server.asked").read_text().splitlines()) == 3
    before = identity_of(spec, version_of(engine, spec))
    a_server(tmp_path, version="10000 (abd)")
    assert identity_of(spec, version_of(engine, spec)) != before != identity_of(spec)
    engine.close()


def test_a_server_without_a_backend_for_the_gpus_says_so(tmp_path: Path, model: Path) -> None:
    """U05: GPUs that the server cannot use are none, and `status().problems` says which backends it has."""
    devices = "Available devices:\n  Vulkan0: AMD Radeon (8 MiB, 8 MiB free)\n"
    engine = LlamaServerEngine(a_server(tmp_path, devices=devices), gpus=lambda: [NVIDIAS], keeps_prompts=True)
    assert engine.inspect(ModelSpec("a", str(model)), [Options()]).gpu_libraries == ()
    engine.close()
    no_backend, no_prompts = engine.problems
    assert "cannot use GPU-a: it has Vulkan only" in no_backend
    assert "prompts are not kept" in no_prompts


# -- what it is told ---------------------------------------------------------------------------------------------------


REQUEST: dict[str, Any] = {
    "parent": 1, "library": None, "key": "secret", "name": "a,b", "model": "/m.gguf",
    "adapters": [("/l1.gguf", 1.0), ("/l2.gguf", 1.0)],
    "projector": "/p.gguf", "projector_on_gpu": False, "embedding": False, "pooling": None, "num_ctx": 512,
    "draft": None, "draft_num_predict": 0, "context_shift": False,
    "num_parallel": 2, "num_batch": 64, "num_micro_batch": 32, "prompt_cache_mib": 7, "num_checkpoints": 3,
    "num_thread": 2, "num_thread_prompt": 4, "use_mmap": False, "flash_attention": True, "cache_type_k": "q8_0",
    "cache_type_v": "f16", "holds_back": False, "gpu_layers": [], "prompts": None, "engine_key": None,
}  # fmt: skip


def told(help: str = HELP, gpus: Sequence[str] = (), **changes: Any) -> str:
    """Return what a server is told for a request, as one text."""
    request: Any = REQUEST | changes
    return " ".join(["", *arguments(request, known_options(help), gpus), ""])


def test_options_become_arguments() -> None:
    """Every option is an argument, a context is that of all slots, and the key is none of them."""
    line = told()
    for part in (
        "--ctx-size 1024", "--parallel 2", "--batch-size 64", "--ubatch-size 32", "--threads 2", "--threads-batch 4",
        "--cache-type-k q8_0", "--cache-type-v f16", "--flash-attn on", "--model /m.gguf", "--alias a_b",
        "--lora /l1.gguf --lora /l2.gguf", "--mmproj /p.gguf --no-mmproj-offload", "--no-mmap", "--device none",
        "--host 127.0.0.1 --port 0", "--offline", "--no-slots", "--no-webui",
    ):  # fmt: skip
        assert f" {part} " in line, part
    assert "secret" not in line and "--embeddings" not in line
    assert " --embeddings --pooling rank " in told(embedding=True, pooling="rank")
    on_gpus = told(gpus=["CUDA0", "CUDA1"], gpu_layers=[3, 2], flash_attention=None)
    assert " --device CUDA0,CUDA1 --gpu-layers 5 --tensor-split 3,2 " in on_gpus and " --flash-attn auto " in on_gpus


def test_tokens_are_guessed_as_the_wheel_guesses_them() -> None:
    """By a draft model, on the host or on the first GPU, or by the text itself; a server that cannot says so."""
    newer = HELP + "--spec-type TYPES   which\n"
    line = told(newer, draft_num_predict=4, draft="/d.gguf")
    assert " --spec-type draft-simple --spec-draft-model /d.gguf --spec-draft-n-max 4 --spec-draft-device none " in line
    there: dict[str, Any] = {"gpu_layers": [3], "projector": None, "projector_on_gpu": True}
    on_gpu = told(newer, ["Vulkan0"], draft_num_predict=4, draft="/d.gguf", **there)
    assert " --spec-draft-device Vulkan0 --spec-draft-ngl all " in on_gpu
    line = told(newer, draft_num_predict=20)
    assert " --spec-type ngram-simple --spec-ngram-simple-size-m 20 --spec-ngram-simple-size-n 12 " in line
    assert "--spec" not in told(newer, draft="/d.gguf")
    with pytest.raises(ValueError, match="too old to guess"):
        told(draft_num_predict=4)


def test_newer_servers_are_told_more() -> None:
    """What older servers do not do is switched off in newer ones, by the names that they know."""
    newer = HELP + "".join(
        f"{line}\n"
        for line in (
            "-fit,  --fit [on|off]   fit", "-lm,   --load-mode MODE                  how", "-cram, --cache-ram N  size",
            "-kvu,  --kv-unified, -no-kvu, --no-kv-unified", "-ctxcp, --ctx-checkpoints, --swa-checkpoints N  count",
            "--ui,  --webui, --no-ui, --no-webui     whether", "--cors-origins ORIGINS  allowed",
        )
    )  # fmt: skip
    line = told(newer)
    for part in (
        "--fit off", "--load-mode none", "--cache-ram 7", "--no-kv-unified", "--ctx-checkpoints 3", "--no-ui",
        "--cors-origins localhost",
    ):  # fmt: skip
        assert f" {part} " in line, part
    assert "--no-mmap" not in line


def test_what_a_server_would_not_take_is_refused() -> None:
    """A value that the server does not list, or that it would split, is refused before it is run."""
    listed = HELP.replace("--pooling", "--pooling {none,mean}")
    with pytest.raises(ValueError, match=r"'rank' is not one of .* --pooling: none, mean"):
        told(listed, embedding=True, pooling="rank")
    with pytest.raises(ValueError, match="comma"):
        told(adapters=[("/a,b.gguf", 1.0)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks on this system")
def test_where_the_kernel_watches_no_parent_another_process_does(tmp_path: Path) -> None:
    """Elsewhere than on Linux the server ends with its standard input, which ends with its parent."""
    script = "import runpy, sys; sys.platform = 'darwin'; runpy.run_path(sys.argv[1], run_name='__main__')"
    order = {"parent": os.getpid(), "arguments": ["/bin/sleep", "60"], "key": "", "holds_back": False, "guarded": False}
    command = [sys.executable, "-I", "-S", "-c", script, str(llama_server_binary.CHILD)]
    pipe = subprocess.PIPE
    with no_leaks(), subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps(order) + "\n")
        child.stdin.flush()
        assert json.loads(child.stdout.readline())["event"] == "importing"
        child.stdin.close()
        assert child.wait(LIMIT_S) == -9


# -- with a real one ---------------------------------------------------------------------------------------------------


def test_the_real_help_is_understood() -> None:
    """A real server knows all that is needed, and lists the values of its options."""
    help = subprocess.run([the_server(), "--help"], capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout
    known = known_options(help)
    assert not missing(known)
    assert {"f16", "q8_0"} <= {*known["--cache-type-k"]} and "rank" in known["--pooling"]


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    with no_leaks(), Scheduler(settings()) as scheduler:
        yield scheduler


def test_a_model_may_have_a_server_of_its_own(scheduler: Scheduler, model: Path) -> None:
    """One file by two programs is two models, and both say the same."""
    said, programs = [], []
    for spec in (ModelSpec("a", str(model)), ModelSpec("b", str(model), llama_server=str(the_server()))):
        with scheduler.acquire(spec, num_ctx=256, timeout=LIMIT_S) as lease:
            said.append(lease.complete("hello", temperature=0, max_tokens=8, ignore_eos=True))
            (runner,) = [one for one in scheduler.status().runners if one.model == spec.name]
            programs.append(Path(psutil.Process(runner.pid).exe()).name)
    assert said[0] == said[1] and programs[1] == "llama-server" != programs[0]


def test_a_value_that_the_server_does_not_know_fails_the_load(model: Path) -> None:
    """A launch with such a value raises, with the values that the server knows."""
    engine = LlamaServerEngine(the_server())
    spec = ModelSpec("a", str(model))
    load = engine.inspect(spec, [Options(num_ctx=256, cache_type_k="q9_9")]).resolutions[0].loads[0]
    with no_leaks(), pytest.raises(InvalidModel, match=r"'q9_9' is not one of .* --cache-type-k: f32, f16"):
        engine.launch(spec, load.options, load.settings, Placement(((HOST, 1),)), Mock())
    engine.close()
