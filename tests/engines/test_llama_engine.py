"""Models in child processes, with the real engine and tiny models: how runners serve, fail, end and report."""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import urlsplit

import psutil
import pytest

from fsm.domain.devices import HOST, DeviceId, Placement, Threads
from fsm.domain.options import Options
from scheduler.devices.cpu_cores import usable_cores
from scheduler.engines import llama as llama_engine
from scheduler.engines import llama_child
from scheduler.engines.child_process import Child, Exit, Program
from scheduler.engines.child_runner import DETAIL_BYTES, describe
from scheduler.engines.interface import Endpoint, Memory
from scheduler.engines.llama import LlamaEngine, LlamaProcess
from scheduler.engines.llama_child import parameters, uses_flash_attention
from scheduler.errors.exceptions import InvalidModel, ModelNotFound
from scheduler.models.model_spec import ModelSpec
from tests.support.leaks import no_leaks
from tests.support.own_server import an_engine, chosen
from tests.support.tiny_models import write_adapter, write_tiny_model

LIMIT_S = 20.0  # a load takes about 0.1 s
NOTICED_S = 5.0  # fifty times the 100 ms within which an exit is noticed, and half of what a probe may take to
ORPHANED_S = 10.0  # ten times the second within which no child of a killed host is left
GRACE_S = 60.0  # no test waits for it
ON_HOST = Placement(((HOST, 1),))
SMALL = Options(num_ctx=256, num_parallel=1, num_thread=1)
SMALL_AUTOMATIC = Options(num_ctx=256, num_parallel=1)  # its threads are set at the launch


class Told:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.progress = 0
        self.loads: list[tuple[Any, int | None, dict[DeviceId, int]]] = []
        self.exits: list[tuple[int | None, str, bool]] = []

    def progressed(self) -> None:
        self.progress += 1

    def loaded(
        self, endpoint: Endpoint | object, num_ctx: int | None, memory: Memory, flash_attention: bool | None = None
    ) -> None:
        self.loads.append((endpoint, num_ctx, dict(memory.resident)))

    def failed(self, error: BaseException) -> None:
        raise AssertionError("a child tells its failures by its exit")

    def exited(self, code: int | None, detail: str, out_of_memory: bool) -> None:
        self.exits.append((code, detail, out_of_memory))

    def endpoint(self) -> Endpoint:
        """Wait until the runner serves; return its endpoint."""
        wait_until(lambda: self.loads or self.exits)
        assert not self.exits, self.exits
        endpoint = self.loads[0][0]
        assert isinstance(endpoint, Endpoint)
        return endpoint

    def exit(self) -> tuple[int | None, str, bool]:
        """Wait for the exit; return it."""
        wait_until(lambda: self.exits)
        assert len(self.exits) == 1
        return self.exits[0]


def wait_until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "the condition did not hold in time"
        threading.Event().wait(0.005)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ask(
    endpoint: Endpoint, path: str, body: object = None, *, key: str | None = None, origin: str | None = None
) -> tuple[int, Any, dict[str, str]]:
    """Return status, JSON and headers of an answer; the endpoint's key is sent unless another one is given."""
    address = urlsplit(endpoint.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=LIMIT_S)
    headers = {"Authorization": f"Bearer {endpoint.key if key is None else key}", "Content-Type": "application/json"}
    if origin is not None:
        headers["Origin"] = origin
    try:
        content = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, content, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model that was trained with a context of 1024 tokens."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf", context=1024)


@pytest.fixture
def engine(served_by: str) -> Iterator[LlamaEngine]:
    """Yield an engine, the wheel's and that of a `llama-server`."""
    with no_leaks():
        engine = an_engine()
        yield engine
        engine.close()


@pytest.fixture
def wheel() -> Iterator[LlamaEngine]:
    """Yield the wheel's engine, for tests of its own program."""
    with no_leaks():
        engine = LlamaEngine()
        yield engine
        engine.close()


def launch(
    engine: LlamaEngine, file: Path, options: Options = SMALL, placement: Placement = ON_HOST, **identity: Any
) -> tuple[LlamaProcess, Told]:
    told = Told()
    return start(engine, ModelSpec("tiny", str(file), **identity), options, placement, told), told


def start(engine: LlamaEngine, model: ModelSpec, options: Options, placement: Placement, told: Told) -> LlamaProcess:
    """Launch a model as the core would: with the options and the settings that an inspection found."""
    load = engine.inspect(model, [options]).resolutions[0].loads[0]
    return engine.launch(model, load.options, load.settings, placement, told)


def launch_and_wait(engine: LlamaEngine, file: Path, **identity: Any) -> tuple[LlamaProcess, Told]:
    process, told = launch(engine, file, **identity)
    told.endpoint()
    return process, told


def test_it_answers_whoever_has_the_key(engine: LlamaEngine, file: Path) -> None:
    """A completion is answered for the key, under the model's name and not its path."""
    _, told = launch_and_wait(engine, file)
    status, answer, _ = ask(told.endpoint(), "/v1/completions", {"prompt": "ab", "max_tokens": 3})
    assert status == 200
    assert answer["usage"]["completion_tokens"] >= 1
    assert answer["model"] == "tiny"
    assert told.progress > 0


def test_it_refuses_whoever_has_not(engine: LlamaEngine, file: Path) -> None:
    """Without the key or with another one a request is answered with 401, apart from the health probe."""
    _, told = launch_and_wait(engine, file)
    endpoint = told.endpoint()
    for key in ("", "another"):
        assert ask(endpoint, "/v1/completions", {"prompt": "ab"}, key=key)[0] == 401
        assert ask(endpoint, "/props", key=key)[0] == 401
    assert ask(endpoint, "/health", key="")[0] == 200
    assert endpoint.url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    "options",
    [Options(num_batch=1), Options(num_batch=3, num_parallel=4), Options(num_ctx=4, num_batch=1, num_parallel=4)],
)
def test_a_small_batch_does_not_abort_the_engine(engine: LlamaEngine, file: Path, options: Options) -> None:
    """A batch has at least two tokens and one of each slot: llama.cpp aborts where it cannot add them at once."""
    _, told = launch(engine, file, replace(options, num_thread=1))
    assert ask(told.endpoint(), "/completion", {"prompt": "a", "n_predict": 2})[0] == 200


def test_an_abort_of_the_engine_is_told_without_a_backtrace(engine: LlamaEngine, file: Path) -> None:
    """Where a debugger is installed, ggml would print the backtrace of every thread after the reason of an abort."""
    process, _ = launch(engine, file)
    assert process.child is not None and process.child.program.environment["GGML_NO_BACKTRACE"] == "1"


def test_a_web_page_may_not_read_its_answers(engine: LlamaEngine, file: Path) -> None:
    """An answer to a page of another origin has no header that lets the browser show it."""
    _, told = launch_and_wait(engine, file)
    _, _, headers = ask(told.endpoint(), "/v1/models", origin="http://evil.example")
    assert not [name for name in headers if name.startswith("access-control")]


def test_what_others_asked_is_not_shown(engine: LlamaEngine, file: Path) -> None:
    """With the key, slots are off and metrics are counts only."""
    _, told = launch_and_wait(engine, file)
    assert ask(told.endpoint(), "/slots")[0] == 501
    assert ask(told.endpoint(), "/metrics", key="another")[0] == 401
    assert ask(told.endpoint(), "/v1/completions", {"prompt": "secret", "max_tokens": 3})[0] == 200
    request = urllib.request.Request(f"{told.endpoint().url}/metrics")
    request.add_header("Authorization", f"Bearer {told.endpoint().key}")
    with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
        shown = [line for line in answer.read().decode().splitlines() if line and not line.startswith("#")]
    assert shown and all(re.fullmatch(r"llamacpp:\w+ [\d.e+-]+", line) for line in shown)


def test_the_key_is_nowhere_to_be_seen(engine: LlamaEngine, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is in no argument, environment or repr, and each runner has another key."""
    process, told = launch_and_wait(engine, file)
    endpoint, child = told.endpoint(), psutil.Process(process.pid)
    assert len(endpoint.key) >= 32
    assert endpoint.key not in " ".join(child.cmdline())
    assert endpoint.key not in str(child.environ())
    assert process.child is not None
    assert endpoint.key not in f"{endpoint} {process.child.program} {process}"
    _, other = launch_and_wait(engine, file)
    assert other.endpoint().key != endpoint.key


def test_the_child_sees_little_of_the_environment(
    engine: LlamaEngine, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child's environment has no tokens, no settings of llama.cpp or Python, and no GPU for a model on the host."""
    for name in ("HF_TOKEN", "LLAMA_ARG_PORT", "PYTHONPATH", "LLAMA_API_KEY"):
        monkeypatch.setenv(name, "/secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    process, _ = launch_and_wait(engine, file)
    environment = psutil.Process(process.pid).environ()
    assert "/secret" not in environment.values()
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["PATH"] == os.environ["PATH"]


def test_the_context_is_that_of_each_slot(engine: LlamaEngine, file: Path) -> None:
    """Two slots of 512 tokens have 512 tokens each, and the report has that figure."""
    _, told = launch(engine, file, Options(num_ctx=512, num_parallel=2, num_thread=1))
    _, properties, _ = ask(told.endpoint(), "/props")
    assert properties["total_slots"] == 2
    assert properties["default_generation_settings"]["n_ctx"] == 512
    assert told.loads[0][1] == 512


def test_options_reach_the_engine(wheel: LlamaEngine, file: Path) -> None:
    """Every named option reaches llama.cpp, and without mapping the file is not in the child's memory."""
    options = Options(
        num_ctx=256, num_batch=64, num_thread=2, num_parallel=1, use_mmap=False, flash_attention=True,
        cache_type_k="bf16", cache_type_v="f32",
    )  # fmt: skip
    process, told = launch(wheel, file, options)
    told.endpoint()
    assert process.child is not None
    request = json.loads(process.child.program.input)
    named = {name: request[name] for name in ("num_batch", "num_thread", "use_mmap", "flash_attention", "cache_type_k")}
    assert named == {
        "num_batch": 64, "num_thread": 2, "use_mmap": False, "flash_attention": True, "cache_type_k": "bf16",
    }  # fmt: skip
    assert not [mapping for mapping in psutil.Process(process.pid).memory_maps() if mapping.path == str(file)]


def test_layers_go_to_the_gpus_of_the_placement(wheel: LlamaEngine, file: Path) -> None:
    """The child sees the placement's GPUs only, in its order, and splits the layers as placed."""
    gpus = ((DeviceId("GPU-b"), 2), (DeviceId("GPU-a"), 1))
    placement = Placement(((DeviceId("GPU-a"), 1), (DeviceId("GPU-b"), 1)), gpu_layers=gpus)
    process = start(wheel, ModelSpec("tiny", str(file)), SMALL, placement, Told())
    assert process.child is not None
    assert process.child.program.environment["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-a"
    assert json.loads(process.child.program.input)["gpu_layers"] == [2, 1]


def test_llama_cpp_does_not_fit_what_was_placed(file: Path) -> None:
    """llama.cpp's own pass to fit a model is switched off."""
    import xllamacpp  # the library that a child imports

    engine = LlamaEngine()
    process, _ = launch(engine, file)
    engine.close()
    assert process.child is not None
    told = parameters(xllamacpp, json.loads(process.child.program.input), verbosity=2)
    assert (told.fit_params, xllamacpp.CommonParams().fit_params) == (False, True)


def test_threads_are_those_that_were_dealt(file: Path) -> None:
    """An engine without given threads uses the option's, or else the cores."""

    def threads(options: Options, dealt: Threads | None = None) -> tuple[int, int]:
        engine = LlamaEngine()
        placement = replace(ON_HOST, threads=dealt)
        process = start(engine, ModelSpec("tiny", str(file)), options, placement, Told())
        engine.close()
        assert process.child is not None
        request = json.loads(process.child.program.input)
        return request["num_thread"], request["num_thread_prompt"]

    assert threads(Options(), Threads(2, 5)) == (2, 5)
    assert threads(Options(num_thread=2)) == (2, 2)
    assert threads(Options()) == (usable_cores(), usable_cores())


needs_shares = pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="Linux does not group by session")


@needs_shares
@pytest.mark.parametrize("nice", [llama_child.LOADING_NICE, 0])
def test_a_load_holds_back_beside_others_and_not_for_long(
    wheel: LlamaEngine, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nice: int
) -> None:
    """Beside runners in use a load has a small share of the processors, and the usual one from the next pulse on.

    The share is seen by a library that fails once it has the share, before it has used much of the processors.
    """
    if nice:
        monkeypatch.setattr(
            "scheduler.engines.process_supervisor.PULSE_S", 10 * LIMIT_S
        )  # else its share is raised again meanwhile
    (tmp_path / "xllamacpp.py").write_text(
        f"while not open('/proc/self/autogroup').read().endswith('nice {nice}\\n'): pass\n"
        "raise ImportError('as it should be')\n"
    )
    monkeypatch.setattr(llama_engine, "find_library", lambda: str(tmp_path))
    _, told = launch(wheel, file, SMALL, replace(ON_HOST, holds_back=True))
    assert "as it should be" in told.exit()[1]


@needs_shares
def test_a_load_beside_no_runner_in_use_holds_nothing_back(
    wheel: LlamaEngine, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load has the usual share of the processors from the first where no runner is in use, whatever else runs."""
    monkeypatch.setattr("scheduler.engines.process_supervisor.PULSE_S", 10 * LIMIT_S)
    (tmp_path / "xllamacpp.py").write_text("raise ImportError(open('/proc/self/autogroup').read())")
    monkeypatch.setattr(llama_engine, "find_library", lambda: str(tmp_path))
    _, told = launch(wheel, file, SMALL)
    assert "nice 0" in told.exit()[1]


@needs_shares
def test_once_it_serves_it_has_as_much_as_others(engine: LlamaEngine, file: Path) -> None:
    """A runner that serves has the same share of the processors as other programs."""
    process, told = launch(engine, file, placement=replace(ON_HOST, holds_back=True))
    told.endpoint()
    wait_until(lambda: Path(f"/proc/{process.pid}/autogroup").read_text().strip().endswith("nice 0"))


def test_the_threads_that_were_dealt_are_there(engine: LlamaEngine, file: Path) -> None:
    """An answer is computed by one thread, and by five where five were given, whatever the cores."""

    def added(dealt: Threads) -> int:
        told = Told()
        process = start(engine, ModelSpec("tiny", str(file)), SMALL_AUTOMATIC, replace(ON_HOST, threads=dealt), told)
        told.endpoint()
        before = psutil.Process(process.pid).num_threads()
        ask(told.endpoint(), "/completion", {"prompt": "a", "n_predict": 4, "ignore_eos": True})
        return psutil.Process(process.pid).num_threads() - before

    assert added(Threads(5, 1)) - added(Threads(1, 1)) == 4


def test_how_threads_wait_is_set_on_purpose(engine: LlamaEngine, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How threads wait is set for the child, whatever the program's environment has."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("GOMP_SPINCOUNT", "infinite")
    process, _ = launch_and_wait(engine, file)
    environment = psutil.Process(process.pid).environ()
    waiting = {name: value for name, value in environment.items() if "OMP" in name}
    assert waiting == {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "300"}


def test_an_embedder_embeds(engine: LlamaEngine, file: Path) -> None:
    """An embedder whose file names no pooling is pooled by the mean, and takes an input as long as its context."""
    _, told = launch_and_wait(engine, file, embedding=True)
    status, answer, _ = ask(told.endpoint(), "/v1/embeddings", {"input": "a" * 250})
    assert status == 200
    assert len(answer["data"][0]["embedding"]) == 64


def test_an_adapter_is_loaded(engine: LlamaEngine, file: Path, tmp_path: Path) -> None:
    """An adapter beside the model is loaded with it."""
    adapter = str(write_adapter(tmp_path / "adapter.gguf", 1))
    _, told = launch_and_wait(engine, file, adapters=(adapter,))
    _, adapters, _ = ask(told.endpoint(), "/lora-adapters")
    assert [(each["path"], each["scale"]) for each in adapters] == [(adapter, 1.0)]


def test_memory_is_measured_from_the_load_to_the_end(engine: LlamaEngine, file: Path) -> None:
    """The report of a load has the resident bytes, and a runner that has gone has none."""
    process, told = launch_and_wait(engine, file)
    assert told.loads[0][2][HOST] > 10 << 20
    assert process.memory().resident[HOST] > 10 << 20
    process.stop(GRACE_S)
    told.exit()
    assert process.memory().resident == {}


def test_a_file_that_is_not_there_is_not_launched(engine: LlamaEngine, tmp_path: Path) -> None:
    """A file that has gone since its inspection is not launched."""
    with pytest.raises(ModelNotFound):
        launch(engine, tmp_path / "none.gguf")
    (tmp_path / "junk.gguf").write_bytes(b"junk" * 100)
    with pytest.raises(InvalidModel):
        launch(engine, tmp_path / "junk.gguf")


def test_a_failed_load_is_told_in_the_words_of_llama_cpp(engine: LlamaEngine, file: Path, tmp_path: Path) -> None:
    """A failed load's error has the cause from the child's log."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes().replace(b"output_norm.weight", b"blk.0.attn_k.scale"))
    _, told = launch(engine, broken)
    code, detail, out_of_memory = told.exit()
    assert code == 1 and not out_of_memory
    assert detail.startswith("exited with status 1 while loading\n")
    assert "tensor 'output_norm.weight' not found" in detail.splitlines()[1]
    assert not re.search(r"^\d+\.\d\d\.", detail, re.MULTILINE)


def test_options_that_llama_cpp_cannot_combine_are_told_in_its_words(engine: LlamaEngine, file: Path) -> None:
    """A failed load's error shows the line that says why first, although the line does not call itself an error."""
    _, told = launch(engine, file, Options(num_ctx=256, cache_type_k="q8_0"))
    assert "K cache type q8_0 with block size 32 does not divide" in told.exit()[1].splitlines()[1]


def test_an_option_that_llama_cpp_does_not_know_fails_the_load(wheel: LlamaEngine, file: Path) -> None:
    """A load with an option that llama.cpp does not know fails with the known ones."""
    _, told = launch(wheel, file, Options(num_ctx=256, cache_type_k="q9_9"))
    assert "'q9_9' is not one of" in told.exit()[1]


def test_an_engine_that_is_not_installed_says_how_to_install_it(
    wheel: LlamaEngine, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load without the engine installed fails with the command that installs it."""
    monkeypatch.setattr(llama_engine, "find_library", lambda: None)
    _, told = launch(wheel, file)
    assert "pip install 'loadmaster[llama]'" in told.exit()[1]


def test_a_kill_while_it_loads_counts_as_out_of_memory(engine: LlamaEngine, file: Path) -> None:
    """A kill of a loading child counts as out of memory, because the kernel ends processes in that way."""
    process, told = launch(engine, file)
    wait_until(lambda: process.pid)
    os.kill(process.pid or 0, signal.SIGKILL)
    wait_until(lambda: told.exits, NOTICED_S)
    assert told.exit()[0] == -signal.SIGKILL
    assert told.exit()[1].startswith("killed by SIGKILL while loading")
    assert told.exit()[2]
    assert not told.loads


def test_a_kill_while_it_serves_is_a_crash(engine: LlamaEngine, file: Path) -> None:
    """A kill of a serving child is a crash that is noticed at once."""
    process, told = launch_and_wait(engine, file)
    os.kill(process.pid or 0, signal.SIGKILL)
    wait_until(lambda: told.exits, NOTICED_S)
    code, detail, out_of_memory = told.exit()
    assert code == -signal.SIGKILL and not out_of_memory
    assert detail.startswith("killed by SIGKILL while serving")
    assert not process.healthy(1.0)


def test_a_stop_ends_it(engine: LlamaEngine, file: Path) -> None:
    """A stop ends a loading and a serving child, and the exit says that it was asked for."""
    process, told = launch_and_wait(engine, file)
    loading, told_of_loading = launch(engine, file)
    for each in (process, loading):
        each.stop(GRACE_S)
        each.stop(GRACE_S)
    assert told.exit()[1:] == ("stopped while serving", False)
    assert told_of_loading.exit()[1] in ("stopped while loading", "stopped while serving", "stopped before it began")


def test_one_that_hangs_is_not_healthy(engine: LlamaEngine, file: Path) -> None:
    """A child that hangs does not answer the probe, and can be stopped."""
    process, told = launch_and_wait(engine, file)
    assert process.healthy(LIMIT_S)
    os.kill(process.pid or 0, signal.SIGSTOP)  # takes effect a little later
    wait_until(lambda: not process.healthy(0.2))
    process.stop(GRACE_S)
    assert told.exit()[1] == "stopped while serving"


def test_one_that_is_hard_at_work_is_healthy() -> None:
    """A server whose connections are all taken by long answers counts as healthy although its probe waits."""
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy,
    ):
        process = LlamaProcess(Told(), "key")
        process.child = Child(Program((), {}), process)
        process.child.pid = busy.pid
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        try:
            process.printed(json.dumps({"event": "loaded", "url": url, "num_ctx": 1}))
            assert process.healthy(1.0)
        finally:
            busy.kill()
        busy.wait()
        assert not process.healthy(0.2)


def test_a_program_that_is_out_of_files_holds_it_against_no_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program without free file descriptors counts its runners as healthy and keeps their last measurement."""

    def fail(*_: object, **__: object) -> object:
        raise OSError(errno.EMFILE, "Too many open files")

    process = LlamaProcess(Told(), "key")
    process._serves = True
    process.child = Mock(pid=os.getpid())
    monkeypatch.setattr("http.client.HTTPConnection.connect", fail)
    monkeypatch.setattr("psutil.Process.__init__", fail)
    assert process.healthy(1.0) and process.memory() == Memory()
    process._serves = False
    assert process.on_tick()
    monkeypatch.setattr("importlib.util.find_spec", fail)
    LlamaEngine().require()


def test_it_outlives_the_thread_that_launched_it(engine: LlamaEngine, file: Path) -> None:
    """A child outlives the thread that launched it, because a thread that stays starts all children."""
    launched: list[tuple[LlamaProcess, Told]] = []
    thread = threading.Thread(target=lambda: launched.append(launch_and_wait(engine, file)))
    thread.start()
    thread.join()
    process, told = launched[0]
    assert process.healthy(LIMIT_S)
    assert not told.exits


def test_a_load_that_stands_still_makes_no_progress(engine: LlamaEngine, file: Path) -> None:
    """A load makes progress by what it reads or occupies, and a stopped one makes none."""
    process, told = launch(engine, file)
    wait_until(lambda: process.pid)
    os.kill(process.pid or 0, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    if not told.loads:
        process.on_tick()
        before = told.progress
        assert process.on_tick()
        assert told.progress == before
    os.kill(process.pid or 0, signal.SIGCONT)
    told.endpoint()
    assert not process.on_tick()


def test_ctrl_c_is_for_the_host_alone(engine: LlamaEngine, file: Path) -> None:
    """Ctrl-C in the terminal does not reach a child."""
    process, told = launch_and_wait(engine, file)
    assert os.getpgid(process.pid or 0) == process.pid
    assert os.getsid(process.pid or 0) == process.pid
    if chosen() is None:  # a `llama-server` acts upon the signal, where it is sent to it alone
        os.kill(process.pid or 0, signal.SIGINT)
    assert process.healthy(LIMIT_S)
    assert not told.exits


def test_close_ends_every_child_and_tells_of_it(served_by: str, file: Path) -> None:
    """After a close no child, thread or descriptor is left, each exit was reported, and nothing is launched."""
    with no_leaks():
        engine = an_engine()
        _, loaded = launch_and_wait(engine, file)
        _, loading = launch(engine, file)
        engine.close()
        assert [len(loaded.exits), len(loading.exits)] == [1, 1]
        with pytest.raises(RuntimeError):
            launch(engine, file)


def test_a_host_that_is_killed_takes_its_children_with_it(served_by: str, file: Path) -> None:
    """A second after the host was killed no child is left."""
    script = """
        import sys, threading
        from tests.engines.test_llama_engine import an_engine, launch_and_wait
        from pathlib import Path
        process, told = launch_and_wait(an_engine(), Path(sys.argv[1]))
        print(process.pid, flush=True)
        threading.Event().wait()
    """
    arguments = [sys.executable, "-c", textwrap.dedent(script), str(file)]
    with no_leaks(), subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        child = int(host.stdout.readline())
        assert not is_gone(child)
        host.kill()
        wait_until(lambda: is_gone(child), ORPHANED_S)


def child_alone(file: Path, **changes: Any) -> subprocess.Popen[str]:
    """Start the child's program without an engine, with the input that an engine writes."""
    engine, told = LlamaEngine(), Told()
    process = start(engine, ModelSpec("tiny", str(file)), SMALL, ON_HOST, told)
    engine.close()
    assert process.child is not None
    pipe = subprocess.PIPE
    child = subprocess.Popen(process.child.program.arguments, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert child.stdin is not None
    child.stdin.write(json.dumps(json.loads(process.child.program.input) | changes) + "\n")
    child.stdin.flush()
    return child


def test_the_child_ends_with_its_input(file: Path) -> None:
    """A child ends with the end of its input, and prints the protocol only."""
    with no_leaks(), child_alone(file) as child:
        assert child.stdout is not None and child.stdin is not None
        events = [json.loads(child.stdout.readline())["event"] for _ in range(3)]
        assert events == ["importing", "loading", "loaded"]
        child.stdin.close()
        assert child.wait(LIMIT_S) == 0
        assert child.stdout.read() == ""


def test_a_child_whose_parent_is_gone_does_not_load(file: Path) -> None:
    """A child whose parent ended before the kernel watches it does not load."""
    with child_alone(file, parent=1) as child:
        assert child.wait(LIMIT_S) == 0
        assert child.stdout is not None and child.stdout.read() == ""


RAN_OUT = (
    "alloc_buffer: allocating 512.00 MiB on device 0: cudaMalloc failed: out of memory",
    "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 68719476736",
    "terminate called after throwing an instance of 'std::bad_alloc'",
    "ggml_vulkan: Device memory allocation failed: vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
    "error: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
)


@pytest.mark.parametrize("line", RAN_OUT)
def test_n13_memory_that_ran_out_is_found_in_the_output(line: str) -> None:
    """N13: a lack of memory is found in the output in the words of several engines, and the line is in the error."""
    told = Told()
    LlamaProcess(told, "key").ended(Exit(1, tail=f"0.00.010.100 I fine\n0.00.010.200 E {line}\n"))
    code, detail, out_of_memory = told.exit()
    assert (code, out_of_memory) == (1, True)
    assert detail == f"exited with status 1 while loading\n{line}"


def test_n13_a_description_is_bounded_and_holds_no_key() -> None:
    """N13: at most 8 KiB of a child's output are reported, and never the key."""
    told = Told()
    tail = "".join(f"error {number}: wrong key s3cret\n" for number in range(1000))
    LlamaProcess(told, "s3cret").ended(Exit(-signal.SIGABRT, tail=tail))
    _, detail, out_of_memory = told.exit()
    assert detail.startswith("killed by SIGABRT while loading\n") and not out_of_memory
    assert len(detail) <= DETAIL_BYTES
    assert "s3cret" not in detail


class Served(LlamaProcess):
    """A process that has served, without a child."""

    def __init__(self, told: Told) -> None:
        super().__init__(told, "key")
        self._serves = True


@pytest.mark.parametrize(
    ("line", "said", "of_memory"),
    [
        (f"0.00.010.200 E {line}", line, True) for line in RAN_OUT
    ] + [
        ("/src/ggml/src/ggml.c:17: GGML_ASSERT(n > 0) failed", "ggml.c:17: GGML_ASSERT", False),
        ("/src/ggml-cuda/ggml-cuda.cu:98: CUDA error", "ggml-cuda.cu:98: CUDA error", False),
        ("CUDA error: out of memory", "CUDA error: out of memory", True),
        ("terminate called after throwing an instance of 'std::logic_error'",) * 2 + (False,),
    ],
)  # fmt: skip
def test_n13_a_runner_that_served_says_where_it_failed(line: str, said: str, of_memory: bool) -> None:
    """N13: a runner that failed while serving reports the place in the engine's source, and a lack of memory."""
    told = Told()
    Served(told).ended(Exit(-signal.SIGABRT, tail=f"E all is lost\n{line}\n"))
    _, detail, out_of_memory = told.exit()
    assert (detail, out_of_memory) == (f"killed by SIGABRT while serving\n{said}", of_memory)


@pytest.mark.parametrize(
    "line",
    [
        "parse: error parsing grammar: expecting name at SECRET out of memory",
        '0.00.010.200 E srv    operator(): got exception: {"message":"Unexpected user saying SECRET, std::bad_alloc"}',
        "SECRET: failed to allocate",
        "failed to allocate memory for SECRET",
        "CUDA error: SECRET",
        "/src/ggml.c:17: GGML_ASSERT(SECRET) failed",
        "what():  SECRET",
        "terminate called after throwing an instance of 'std::SECRET' error",
    ],
)
def test_what_was_asked_of_a_runner_is_not_among_its_last_words(line: str) -> None:
    """Requests that llama.cpp quotes in its errors are not reported and decide nothing."""
    told = Told()
    Served(told).ended(Exit(-signal.SIGABRT, tail=f"{line}\nSECRET\n"))
    _, detail, out_of_memory = told.exit()
    assert "SECRET" not in detail and not out_of_memory


def test_without_errors_the_last_lines_are_shown() -> None:
    """A child that ends without an error line reports its last lines."""
    output = "\n".join(f"line {number}" for number in range(20))
    assert describe(Exit(3), output, loading=False).splitlines() == [
        "exited with status 3 while serving", "line 15", "line 16", "line 17", "line 18", "line 19",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "uses"),
    [
        ("0.00.018.623 I resolve_fused_ops: Flash Attention enabled", True),
        ("0.00.018.623 I resolve_fused_ops: Flash Attention not supported, set to disabled", False),
        ("0.00.016.040 I llama_context: flash_attn            = auto", None),
    ],
)
def test_u06_the_log_tells_what_llama_cpp_has_chosen(line: str, uses: bool | None) -> None:
    """U06: flash attention that was left to llama.cpp is told by the line in which it has decided."""
    assert uses_flash_attention(f"0.00.001.000 I load: something\n{line}\n0.00.020.000 I main: more\n") is uses
