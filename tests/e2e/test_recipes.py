"""The recipes: each program runs as it stands on the page, with tiny real models, and does what the page says."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from scheduler import Scheduler
from tests.api.test_lease_ends import computing
from tests.support.leaks import no_leaks
from tests.support.real import ROOM_FOR_ONE, is_gone, send, states, stopped_load, stopping_loads
from tests.support.tiny_models import CALL, END, TEMPLATE_WITH_TOOLS, write_tiny_model
from tests.support.waiting import assert_soon

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "recipes"
RECIPES = sorted(path.stem for path in PAGES.glob("*.md") if path.name != "README.md")
LIMIT_OF_PROGRAM_S = 120.0  # a program takes a few seconds

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PRINTED = re.compile(r"# → (.+)$", re.MULTILINE)


def program(name: str) -> str:
    """Return the one program of a page."""
    (source,) = _BLOCK.findall((PAGES / f"{name}.md").read_text(encoding="utf-8"))
    return str(source)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make models under the names that the recipes use, and one whose answers take minutes."""
    folder = tmp_path_factory.mktemp("recipes") / "models"
    folder.mkdir()
    for seed, name in enumerate(("smollm2", "embedder", "other")):
        write_tiny_model(folder / f"{name}.gguf", seed=seed, context=8192)
    write_tiny_model(folder / "endless.gguf", context=8192, layers=8, width=256, biases={END: -40})
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """Make an empty folder with the models beside."""
    (tmp_path / "models").symlink_to(models)
    return tmp_path


def command(name: str, *arguments: str, source: str = "") -> dict[str, Any]:
    """Return what `Popen` takes to run a page's program, or another source, by itself."""
    return {
        "args": [sys.executable, "-W", "error:::scheduler", "-c", source or program(name), *arguments],
        "env": {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
        "encoding": "utf-8",
    }


def printed(name: str, folder: Path, *arguments: str, typed: str = "", source: str = "") -> list[str]:
    """Run a page's program; return the lines that it printed, among them those that the page names, in order."""
    done = subprocess.run(
        **command(name, *arguments, source=source),
        cwd=folder,
        input=typed,
        capture_output=True,
        timeout=LIMIT_OF_PROGRAM_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    left = iter(lines)
    for expected in _PRINTED.findall(program(name)):
        assert any(line.endswith(expected) for line in left), f"{expected!r} is missing, or too late: {done.stdout}"
    return lines


def test_every_recipe_is_on_the_index() -> None:
    """The index names every page, and every page has one program, in lines of at most 120 characters."""
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert RECIPES and sorted(re.findall(r"\]\((\w+)\.md\)", index)) == RECIPES
    assert [
        line for name in RECIPES if name != "container" for line in program(name).splitlines() if len(line) > 120
    ] == []


# -- programs that run to their end -----------------------------------------------------------------------------------


def test_the_notes_that_are_closest_are_found(folder: Path) -> None:
    """A question that is a note of the program finds that note, and both models stay loaded."""
    note = "Boats longer than twelve metres moor at the outer pier."
    assert f"closest: {note}" in printed("rag", folder, *note.split())


@pytest.mark.parametrize(("tokens", "calls"), [(256, 3), (48, 0)], ids=["whole", "cut off"])
def test_an_agent_has_its_calls_answered_in_each_turn(tmp_path: Path, tokens: int, calls: int) -> None:
    """A model that calls a tool whenever it may has three calls answered in each turn, and then has to say something.

    A call that is cut off ends the turn, and the next turn goes on without it.
    """
    (tmp_path / "models").mkdir()
    caller: dict[str, Any] = {"template": TEMPLATE_WITH_TOOLS, "biases": {CALL: 40}}
    write_tiny_model(tmp_path / "models" / "smollm2.gguf", context=8192, **caller)
    source = program("agent").replace("max_tokens=256", f"max_tokens={tokens}")
    lines = printed("agent", tmp_path, typed="When is high water?\nAnd now?\n", source=source)
    assert [line.startswith("tide {'city': ") for line in lines] == [*[True] * calls, False] * 2


AS_A_KERNEL = """
import ast, asyncio, inspect, sys

async def kernel(source):
    names = {"__name__": "__main__"}
    for cell in source.split("# %%")[1:]:
        code = compile("#" + cell, "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        told = eval(code, names)
        if inspect.iscoroutine(told):
            await told

asyncio.run(kernel(sys.argv[1]))
"""


def test_the_cells_of_a_notebook_run_one_after_another(folder: Path) -> None:
    """Each cell runs on an event loop that goes on after it, as a notebook's kernel runs them."""
    printed("notebook", folder, program("notebook"), source=AS_A_KERNEL)


def test_a_runner_answers_clients_of_other_packages(folder: Path) -> None:
    """A client of the package openai, and LangChain's, are answered whole and in pieces."""
    pytest.importorskip("openai")
    pytest.importorskip("langchain_openai")
    assert printed("openai", folder)


# -- a batch ----------------------------------------------------------------------------------------------------------


def answers(folder: Path) -> list[str]:
    """Return the prompts that have an answer."""
    file = folder / "answers.jsonl"
    return [json.loads(line)["prompt"] for line in file.read_text().splitlines()] if file.exists() else []


def test_a_batch_that_ctrl_c_ends_goes_on_where_it_was(folder: Path) -> None:
    """Ctrl-C ends the batch, its threads and its runner without a traceback; the next run answers what is left."""
    with subprocess.Popen(**command("batch"), cwd=folder, stdout=-1, stderr=-1) as running:
        assert_soon(lambda: answers(folder), LIMIT_OF_PROGRAM_S)
        runners = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(signal.SIGINT)
        told = running.communicate(timeout=LIMIT_OF_PROGRAM_S)
    assert (running.returncode, told) == (130, ("", ""))
    assert runners and all(is_gone(each.pid) for each in runners)
    before = answers(folder)
    assert 0 < len(before) < 40
    printed("batch", folder)
    assert answers(folder)[: len(before)] == before
    assert len(answers(folder)) == len({*answers(folder)}) == 40


# -- a web service ----------------------------------------------------------------------------------------------------


class Service:
    """The page's web service, on a port of its own."""

    def __init__(self, url: str, scheduler: Scheduler) -> None:
        self.url = url
        self.scheduler = scheduler

    def ask(self, path: str, **question: Any) -> httpx2.Response:
        return httpx2.post(f"{self.url}{path}", json={"text": "hello", **question}, timeout=LIMIT_OF_PROGRAM_S)

    @contextmanager
    def client(self, path: str, **question: Any) -> Iterator[socket.socket]:
        """Send a question, and leave at the end of the block."""
        port = int(self.url.rpartition(":")[2])
        body = json.dumps({"text": "hello", **question})
        head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_OF_PROGRAM_S) as connection:
            connection.sendall(f"{head}\r\n\r\n{body}".encode())
            yield connection

    def queued(self) -> int:
        return len(self.scheduler.status().queue)

    def leases(self) -> dict[str, int]:
        return {runner.model: runner.leases for runner in self.scheduler.status().runners}


@pytest.fixture
def service(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """Serve the page's program in this process, so that its scheduler can be asked."""
    pytest.importorskip("fastapi")
    uvicorn = pytest.importorskip("uvicorn")
    monkeypatch.chdir(folder)
    module = types.ModuleType("app")
    monkeypatch.setitem(sys.modules, "app", module)  # where the types of its routes are looked up
    exec(compile(program("fastapi"), "app.py", "exec"), module.__dict__)
    with no_leaks():
        server = uvicorn.Server(uvicorn.Config(module.__dict__["app"], port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            assert_soon(lambda: server.started)
            port = server.servers[0].sockets[0].getsockname()[1]
            yield Service(f"http://127.0.0.1:{port}", module.__dict__["app"].state.scheduler)
        finally:
            server.should_exit = True
            thread.join(LIMIT_OF_PROGRAM_S)


PATHS = ["/chat", "/stream"]


def test_a_service_answers_whole_and_in_pieces(service: Service) -> None:
    """Both routes answer, and hold no lease afterwards."""
    whole = service.ask("/chat", max_tokens=8)
    assert (whole.status_code, [*whole.json()]) == (200, ["answer"])
    pieces = service.ask("/stream", max_tokens=8)
    assert (pieces.status_code, pieces.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert service.leases() == {"smollm2": 0}


@pytest.mark.parametrize("path", PATHS)
def test_a_service_tells_errors_by_their_status(service: Service, path: str) -> None:
    """An error has its own status on either route, also where it comes from the runner, and says when to come back."""
    unknown = service.ask(path, model="smolm2")
    assert (unknown.status_code, "did you mean 'smollm2'?" in unknown.json()["error"]) == (404, True)
    assert service.ask(path, model="../models/smollm2.gguf").status_code == 400
    assert service.ask(path, text="x" * 9000).status_code == 400  # longer than the context
    with service.scheduler.acquire("smollm2"):
        service.scheduler.configure(memory_limit=ROOM_FOR_ONE, max_queue=1)
        with service.client(path, model="other"):
            assert_soon(lambda: service.queued() == 1)
            full = service.ask(path, model="embedder")
    assert (full.status_code, int(full.headers["retry-after"]) > 0) == (503, True)


@pytest.mark.parametrize("path", PATHS)
def test_u52_a_client_that_leaves_the_queue_has_no_model_loaded(service: Service, path: str) -> None:
    """U52: the request of a client that has left is not queued any more, and its model is never loaded."""
    with service.scheduler.acquire("smollm2", num_parallel=2) as lease:  # as the service asks for it
        service.scheduler.configure(memory_limit=ROOM_FOR_ONE)
        with service.client(path, model="other"):
            assert_soon(lambda: service.queued() == 1)
        assert_soon(lambda: service.queued() == 0)
        kept = lease.runner
    assert service.ask("/chat", max_tokens=1).status_code == 200
    assert [(runner.id, runner.leases) for runner in service.scheduler.status().runners] == [(kept, 0)]


@pytest.mark.parametrize("path", PATHS)
def test_u52_a_client_that_leaves_during_a_load_waits_for_it_no_longer(service: Service, path: str) -> None:
    """U52: the load goes on for the next request, and no lease is granted to the client that has left."""
    with stopping_loads():
        with service.client(path):
            child = stopped_load(service.scheduler)
            assert service.queued() == 1
        assert_soon(lambda: service.queued() == 0)
    send(child, signal.SIGCONT)
    assert_soon(lambda: states(service.scheduler) == {"smollm2": "idle"})


@pytest.mark.parametrize("path", PATHS)
def test_u52_a_client_that_leaves_an_answer_ends_its_computation(service: Service, path: str) -> None:
    """U52: an answer that would take minutes is computed no further, and its lease is released."""
    with service.client(path, model="endless", max_tokens=4000) as connection:
        assert_soon(lambda: service.leases() == {"endless": 1}, LIMIT_OF_PROGRAM_S)
        if path == "/stream":
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK")
    assert_soon(lambda: service.leases() == {"endless": 0})
    with service.scheduler.acquire("endless") as lease:
        assert_soon(lambda: not computing(lease))


def test_several_workers_serve_and_end_together(folder: Path) -> None:
    """Two workers, each with a scheduler of its own, answer, and no process is left when their parent ends."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    (folder / "app.py").write_text(program("fastapi"), encoding="utf-8")
    arguments = ["app:app", "--workers", "2", "--port", "0"]
    start = {**command("fastapi"), "args": [sys.executable, "-m", "uvicorn", *arguments]}
    log = folder / "log"
    with log.open("w") as written, subprocess.Popen(**start, cwd=folder, stdout=written, stderr=written) as running:
        try:
            assert_soon(lambda: log.read_text().count("startup complete") == 2, LIMIT_OF_PROGRAM_S)
            url = re.findall(r"http://[\d.:]+", log.read_text())[0]
            for _ in range(4):
                told = httpx2.post(f"{url}/chat", json={"text": "hello", "max_tokens": 4}, timeout=LIMIT_OF_PROGRAM_S)
                assert told.status_code == 200
            children = psutil.Process(running.pid).children(recursive=True)
        finally:
            running.terminate()
            running.wait(LIMIT_OF_PROGRAM_S)
    assert len(children) >= 3  # two workers, and a runner at least
    assert_soon(lambda: all(is_gone(each.pid) for each in children))
    assert "Traceback" not in log.read_text()
