"""Any program as a model: what it is told, when it counts as loaded, what it takes, and that nothing is left of it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from fsm.domain.devices import Placement
from fsm.domain.options import Options
from scheduler import (
    CommandModel,
    DoesNotFit,
    EngineMissing,
    EngineUnusable,
    InvalidSettings,
    Lease,
    LoadFailed,
    LoadTimeout,
    Scheduler,
    Settings,
    UnsupportedOption,
)
from scheduler.engines.command import CommandEngine
from scheduler.engines.interface import Engine
from scheduler.http.app import application
from scheduler.http.service import Service
from scheduler.http.settings import ServerSettings
from scheduler.testing import EngineConformance
from scheduler.testing.engine_conformance import Reports
from tests.support.leaks import no_leaks
from tests.support.nvml import Gpu, StandIn, beside_stand_in
from tests.support.own_server import the_server
from tests.support.real import is_gone, settings
from tests.support.running import running
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import LIMIT_S, assert_soon

SERVER = str(Path(__file__).parents[1] / "support" / "small_server.py")


def a_command(*more: str, name: str = "a", **arguments: Any) -> CommandModel:
    """Return a model that the small server serves."""
    command = [sys.executable, "-I", "-S", SERVER, "{port}", *more]
    return CommandModel(name, command, **{"memory": {"cpu": "64MiB"}, "health": "/health", **arguments})


def told(lease: Lease, path: str = "/") -> dict[str, Any]:
    """Return what the small server tells of itself."""
    found: dict[str, Any] = json.load(urllib.request.urlopen(lease.url + path, timeout=LIMIT_S))
    return found


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    with no_leaks(), Scheduler(settings(stop_grace=0.3, recovery_timeout=0.3)) as scheduler:
        yield scheduler


class TestCommands(EngineConformance):
    """A small server of Python's library."""

    def make_engine(self) -> Engine:
        return CommandEngine()

    def make_model(self) -> CommandModel:
        return a_command()


# -- what it is told ---------------------------------------------------------------------------------------------------


def test_a_program_gets_its_port_its_key_and_few_variables(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Placeholders are filled in, the key is in the variable that was named, and no other variable is passed on."""
    monkeypatch.setenv("PASSED", "on")
    monkeypatch.setenv("SECRET_TOKEN", "kept")
    model = a_command(
        '{"json": 1}', env={"AT": "port {port}", "ITS": "{name}"}, pass_env=["PASSED", "UNSET"], api_key_env="ITS_KEY"
    )  # fmt: skip
    with scheduler.acquire(model) as lease:
        found = told(lease)
        environment, port = found["environment"], lease.url.rpartition(":")[2]
        assert found["arguments"] == [port, '{"json": 1}']
        assert environment["AT"] == f"port {port}" and environment["ITS"].startswith("a-")
        assert environment["ITS_KEY"] == lease.api_key and len(lease.api_key) > 32
        assert environment["PASSED"] == "on" and environment["CUDA_VISIBLE_DEVICES"] == ""
        assert not {"SECRET_TOKEN", "UNSET", "OMP_WAIT_POLICY"} & environment.keys()
        guard = psutil.Process(lease.pid)
        assert not any(lease.api_key in part for part in (*guard.cmdline(), *guard.environ().values()))


def test_requests_of_a_lease_reach_it(scheduler: Scheduler) -> None:
    """A chat goes to a server that was awaited by its port alone; where it has no key none is sent."""
    with scheduler.acquire(a_command(health=None)) as lease:
        assert lease.api_key == ""
        text = lease.chat("hello")
        assert text.startswith("/v1/chat/completions ") and '"hello"' in text
        with lease.openai() as client:
            assert client.chat.completions.create(model="x", messages=[{"role": "user", "content": "b"}]).model == "x"


def test_commands_have_no_load_time_options(scheduler: Scheduler) -> None:
    """An option of a load is refused, as no program is told of it."""
    with pytest.raises(UnsupportedOption, match="no load-time options"):
        scheduler.acquire(a_command(), num_ctx=512)


def test_equal_commands_share_a_runner_and_others_do_not(scheduler: Scheduler) -> None:
    """The command and all that it is told are its identity, in which no value of a variable can be read."""
    one, same, other = a_command(), a_command(keep_alive="1h"), a_command(env={"TOKEN": "s3cret"})
    assert one.id == same.id != other.id and hash(one) == hash(same)
    assert "s3cret" not in other.id + repr(other)
    with scheduler.acquire(one) as lease, scheduler.acquire(same) as second:
        assert lease.runner == second.runner


# -- its load ----------------------------------------------------------------------------------------------------------


def test_it_is_granted_once_it_is_well(scheduler: Scheduler) -> None:
    """A server that is up and says that it is not ready is waited for."""
    with scheduler.acquire(a_command("--wait", "0.4")) as lease:
        assert urllib.request.urlopen(f"{lease.url}/health", timeout=LIMIT_S).status == 200


def test_a_failed_load_tells_what_the_program_wrote(scheduler: Scheduler) -> None:
    """The last words of a program that ends while it loads are in the error, and its end counts at once."""
    with pytest.raises(LoadFailed, match="exited with status 1 while loading\nerror: no such voice"):
        scheduler.acquire(a_command("--fail", "no such voice"), timeout=LIMIT_S)


def test_a_program_that_is_never_well_is_given_up() -> None:
    """What it reads and writes because it is probed is no progress, so that a wrong `health` does not wait for ever."""
    with no_leaks(), Scheduler(settings(stop_grace=0.3, load_timeout=1.2)) as one:
        server = [sys.executable, "-I", "-S", "-m", "http.server", "--bind", "127.0.0.1", "{port}"]
        with pytest.raises(LoadTimeout):
            one.acquire(CommandModel("a", server, memory={"cpu": 0}, health="/nothing"), timeout=LIMIT_S)


def test_what_it_writes_goes_to_the_engine_log(tmp_path: Path) -> None:
    """Its output is kept line by line, without its key."""
    log = tmp_path / "engine.log"
    with no_leaks(), Scheduler(settings(engine_log=log)) as one, one.acquire(a_command(api_key_env="ITS_KEY")) as lease:
        key = lease.api_key
    text = log.read_text()
    assert f"a[{lease.pid}]: serves (key)\n" in text and key not in text


def test_a_port_in_use_is_told(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed port where another program listens fails the load, whatever that program answers."""
    monkeypatch.setattr("scheduler.engines.command.PORT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(LoadFailed, match=f"port {port} is in use"):
            scheduler.acquire(a_command(port=port))
    with scheduler.acquire(a_command(port=port, name="b")) as lease:
        assert lease.url.endswith(f":{port}")


def test_another_program_at_its_port_is_not_taken_for_it(scheduler: Scheduler) -> None:
    """A program that took the port in between is not talked to, although it listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        command = ["/bin/sh", "-c", "sleep 0.5; echo 'error: bind failed'; exit 1", "{port}"]
        model = CommandModel("a", command, memory={"cpu": 0})
        with pytest.MonkeyPatch.context() as patch, pytest.raises(LoadFailed, match=f"another program.*port {port}"):
            patch.setattr("scheduler.engines.command._port_of", lambda model: port)
            scheduler.acquire(model, timeout=LIMIT_S)


# -- what it takes -----------------------------------------------------------------------------------------------------


def test_the_memory_of_all_its_processes_is_counted(scheduler: Scheduler) -> None:
    """The guard, the program and what it has started are one runner's memory."""
    with scheduler.acquire(a_command("--leave")) as lease:
        handle = scheduler._executor.runner_handles[lease.runner]  # type: ignore[attr-defined]
        assert handle.process is not None
        held = handle.process.memory()
        family = [psutil.Process(lease.pid), *psutil.Process(lease.pid).children(recursive=True)]
        assert {each.pid for each in family} >= {*told(lease)["left"]} and len(family) == 3
        largest = max(each.memory_info().rss for each in family)
        assert largest < held.resident["cpu"] <= sum(each.memory_info().rss for each in family)


def test_a_model_that_does_not_fit_is_refused(scheduler: Scheduler) -> None:
    """What is declared counts as memory: more than there is never fits, and neither does a GPU where there is none."""
    for memory in ({"cpu": "900TiB"}, {"cpu": "1MiB", "gpu": "1GiB"}):
        with pytest.raises(DoesNotFit):
            scheduler.acquire(a_command(memory=memory))


@beside_stand_in()
def test_it_sees_the_gpus_that_it_was_given(nvml: StandIn) -> None:
    """A model that wants any GPU gets one with room, and what all its processes hold there is counted."""
    small, large = Gpu("GPU-1111-a", total=600 << 20), Gpu("GPU-2222-b", total=2 << 30)
    nvml.say(small, large)
    any_gpu = a_command("--leave", memory={"cpu": "64MiB", "gpu": "700MiB"})
    with Scheduler(Settings(stop_grace=0.3, recovery_timeout=0.3)) as one:
        assert one.fit(any_gpu).verdict == "fits"
        with one.acquire(any_gpu) as lease, one.acquire(a_command(memory={small.id: "64MiB"})) as named:
            assert told(lease)["environment"]["CUDA_VISIBLE_DEVICES"] == large.id
            assert told(named)["environment"]["CUDA_VISIBLE_DEVICES"] == small.id
            children = [each.pid for each in psutil.Process(lease.pid).children(recursive=True)]
            nvml.say(small, large.but(processes=dict.fromkeys(children, 100 << 20)))
            assert len(children) == 2
            assert_soon(lambda: held(one, lease).get(large.id) == 200 << 20)
        nvml.say(small, large)
        with pytest.raises(DoesNotFit):
            one.acquire(a_command(memory={"gpu": "3GiB"}))


def held(scheduler: Scheduler, lease: Lease) -> dict[str, int]:
    """Return what a lease's runner takes, by device."""
    return {**next(each for each in scheduler.status().runners if each.id == lease.runner).resident_bytes}


# -- its end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["--leave", "--deaf"])
def test_nothing_is_left_of_a_program(scheduler: Scheduler, how: str) -> None:
    """What it has started ends with it, also what has left its group, and also where it must be killed."""
    with scheduler.acquire(a_command("--leave", how)) as lease:
        left = told(lease)["left"]
        pids = [lease.pid, *left, *(each.pid for each in psutil.Process(lease.pid).children(recursive=True))]
    scheduler.expire(a_command("--leave", how))
    assert_soon(lambda: all(map(is_gone, pids)))


def test_nothing_is_left_of_a_program_that_ends_by_itself(scheduler: Scheduler) -> None:
    """A crash is reported to its holder, and ends what is left of it."""
    with scheduler.acquire(a_command("--leave")) as lease:
        left = told(lease)["left"]
        with pytest.raises(OSError):
            told(lease, "/end")
        assert_soon(lambda: lease.lost and all(map(is_gone, left)))


def test_nothing_is_left_of_what_it_starts_as_it_is_stopped(scheduler: Scheduler, tmp_path: Path) -> None:
    """A program that starts another one when it is told to end, and does not end, is killed with that one too."""
    started = tmp_path / "started"
    script = 'trap \'setsid sleep 600 & echo $! > "$1"\' TERM; "$2" -I -S "$3" "$0" & while :; do wait; done'
    command = ["/bin/sh", "-c", script, "{port}", str(started), sys.executable, SERVER]
    model = CommandModel("a", command, memory={"cpu": 0}, health="/health")
    scheduler.acquire(model).release()
    scheduler.expire(model)
    assert_soon(lambda: not scheduler.status().runners)
    assert is_gone(int(started.read_text()))


def test_a_signal_of_its_own_stops_it(scheduler: Scheduler) -> None:
    """A program that is deaf to SIGTERM is stopped by the signal that it knows, and not killed."""
    model = a_command("--deaf", stop="SIGINT")
    scheduler.acquire(model).release()
    scheduler.expire(model)
    assert_soon(lambda: not scheduler.status().runners)


def test_a_command_stops_what_runs_elsewhere(tmp_path: Path) -> None:
    """A command ends what is no child of this program, by the runner's own name, as a container's is."""
    stopped = tmp_path / "stopped"
    stop = ["/bin/sh", "-c", 'echo "$0" >> "$1"; pkill -INT -f "$2"', "{name}", str(stopped), f"{tmp_path}/[t]his"]
    model = a_command("--deaf", f"{tmp_path}/this", env={"NAME": "{name}"}, stop=stop)
    with no_leaks(), Scheduler(settings()) as one, one.acquire(model) as lease:
        name = told(lease)["environment"]["NAME"]
        assert one.status().runners[0].resident_bytes == {"cpu": 64 << 20}
    assert stopped.read_text().split() == [name]


def test_a_close_leaves_its_time_to_a_command_that_stops(tmp_path: Path) -> None:
    """A container is stopped also where that takes longer than the rest of a close may."""
    stopped = tmp_path / "stopped"
    stop = ["/bin/sh", "-c", 'sleep 1; echo over > "$0"; pkill -INT -f "$1"', str(stopped), f"{tmp_path}/[t]his"]
    reports, engine = Reports(), CommandEngine()
    model = a_command("--deaf", f"{tmp_path}/this", stop=stop)
    with no_leaks():
        engine.launch(model, Options(), (), Placement(()), reports)
        assert_soon(lambda: reports.loads)
        engine.close(0.2)
    assert stopped.exists() and reports.exits[0][0] == 0


def test_a_command_stops_also_what_was_left_by_its_program(tmp_path: Path) -> None:
    """A container does not end with a client that crashes, nor with one that only starts it."""
    stopped = tmp_path / "stopped"
    stop = ["/bin/sh", "-c", 'echo over > "$0"; echo error: no such container >&2', str(stopped)]
    model = CommandModel("a", ["/bin/sh", "-c", "echo started", "{port}"], memory={"cpu": 0}, stop=stop)
    words = r"status 0 while loading\nerror: it has ended, and has to stay in the foreground"
    with no_leaks(), Scheduler(settings()) as one, pytest.raises(LoadFailed, match=words):
        one.acquire(model, timeout=LIMIT_S)
    assert stopped.exists()


def test_it_ends_with_this_program(tmp_path: Path) -> None:
    """A program that is killed leaves no program of a model behind, and none of its children."""
    code = """
import sys, urllib.request
from scheduler import Scheduler, CommandModel
from tests.support.real import settings
from tests.engines.test_command import a_command
lease = Scheduler(settings()).acquire(a_command("--leave", "--deaf"))
print(urllib.request.urlopen(lease.url).read().decode(), flush=True)
sys.stdin.read()
"""
    host = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert host.stdout is not None
    found = json.loads(host.stdout.readline())
    pids = [*found["left"], found["group"]]
    assert not any(map(is_gone, pids))
    host.send_signal(signal.SIGKILL)
    host.communicate()
    assert_soon(lambda: all(map(is_gone, pids)))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"command": "serve --port {port}"}, "command cannot be .*a list"),
        ({"command": []}, "a list"),
        ({"command": ["bin/serve", "{port}"]}, "absolute path, since the working folder may change"),
        ({"command": ["serve", "{port}", "{modle}"]}, "'{modle}'.*only {port} and {name}"),
        ({"command": ["serve", "{port}", "{key}"]}, "all users of this machine see arguments.*api_key_env"),
        ({"command": ["serve"]}, "port cannot be None.*{port}"),
        ({"memory": {}}, "memory cannot be {}.*sizes by device"),
        ({"memory": {"gpu": 1, "GPU-1": 1}}, 'not both "gpu" and the ids'),
        ({"health": "health"}, 'a path like "/health"'),
        ({"stop": "TERM"}, "the name of a signal"),
        ({"stop": ["docker", "stop", "{id}"]}, "only {port} and {name}"),
        ({"port": 70000}, "from 1 to 65535"),
        ({"env": {"A": 1}}, "a text"),
        ({"env": {"A": "s3cret {b}"}}, "{b}"),
        ({"pass_env": "HF_TOKEN"}, "a list of texts"),
        ({"api_key_env": "MY KEY"}, "HF_TOKEN"),
    ],
)  # fmt: skip
def test_what_is_no_command_is_refused(arguments: dict[str, Any], words: str) -> None:
    """Each mistake is told in a sentence with what to do, and no value of a variable is shown."""
    given: dict[str, Any] = {"command": ["serve", "{port}"], "memory": {"cpu": "1GiB"}, **arguments}
    with pytest.raises(InvalidSettings, match=words) as caught:
        CommandModel("a", **given)
    assert "s3cret" not in str(caught.value)


def test_a_program_that_is_not_there_is_told(scheduler: Scheduler, tmp_path: Path) -> None:
    """A missing program, and a file that is none, are told before anything is started, with what to do."""
    plain = tmp_path / "plain"
    plain.touch()
    for program, error, words in [
        ("no-such-program", EngineMissing, "install it, or name it by its absolute path"),
        (str(tmp_path / "nothing"), EngineMissing, "no such program"),
        (str(tmp_path), EngineUnusable, "and not its folder"),
        (str(plain), EngineUnusable, r"chmod \+x"),
    ]:
        with pytest.raises(error, match=words):
            scheduler.acquire(CommandModel("a", [program, "{port}"], memory={"cpu": 0}))


# -- behind the server -------------------------------------------------------------------------------------------------


def test_the_server_passes_requests_on_to_it(scheduler: Scheduler) -> None:
    """OpenAI's routes reach a command by its name, with the client's fields alone; other routes refuse it."""
    service = Service(scheduler, ServerSettings())
    service.commands = {"b": a_command(name="b")}
    with running(application(service)) as url:
        chat = {"model": "b", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "id_slot": 1}
        answer = httpx2.post(f"{url}/v1/chat/completions", json=chat, trust_env=False).json()
        del chat["id_slot"]
        asked = f"/v1/chat/completions {json.dumps(chat, sort_keys=True)}"
        assert answer["choices"][0]["message"]["content"] == asked
        vectors = httpx2.post(f"{url}/v1/embeddings", json={"model": "b", "input": "a"}, trust_env=False).json()
        assert vectors["choices"][0]["message"]["content"].startswith('/v1/embeddings {"input": "a"')
        assert [one["id"] for one in httpx2.get(f"{url}/v1/models", trust_env=False).json()["data"]] == ["b"]
        assert httpx2.get(f"{url}/v1/models/b", trust_env=False).json()["id"] == "b"
        refused = httpx2.post(f"{url}/api/chat", json=chat, trust_env=False)
        assert refused.status_code == 400 and "only OpenAI's routes" in refused.text


# -- a real program ----------------------------------------------------------------------------------------------------


def test_a_llama_server_as_any_command(tmp_path: Path) -> None:
    """A real server of models is loaded, chats with its key alone, and is gone when it is asked to."""
    file = write_tiny_model(tmp_path / "a.gguf", context=512)
    command = [str(the_server()), "--port", "{port}", "-m", str(file), "-c", "256", "-t", "1"]
    model = CommandModel("a", command, memory={"cpu": "128MiB"}, health="/health", api_key_env="LLAMA_API_KEY")
    with no_leaks(), Scheduler(settings()) as one:
        with one.acquire(model) as lease:
            assert lease.chat("hello", max_tokens=4)
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"{lease.url}/props", timeout=LIMIT_S)
            pid = lease.pid
        one.expire(model)
        assert_soon(lambda: is_gone(pid))
