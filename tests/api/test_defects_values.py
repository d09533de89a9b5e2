"""Values at their ends: time limits that are infinite, zero or beyond all clocks, and names that mean nothing."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import psutil
import pytest

from scheduler import (
    DoesNotFit,
    EventStream,
    InvalidModel,
    InvalidSettings,
    Lease,
    ModelSpec,
    Options,
    PythonModel,
    Scheduler,
    Settings,
    UnsupportedOption,
)
from scheduler.config.settings import SettingsArguments, parse_duration
from scheduler.models import gguf_metadata as metadata_module
from scheduler.models.catalog import Catalog
from scheduler.models.gguf_metadata import read_metadata
from scheduler.models.model_spec import MOST_PARTS
from scheduler.runtime.request_parser import MOST_PRIORITY, AcquireOptions, RequestParser
from tests.support.leaks import no_leaks
from tests.support.real import send, settings
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import assert_soon

ENDLESS: tuple[Any, ...] = (math.inf, 1e300, 1e12, 3e9, 3e6, "forever", -1, "40d")  # 2**31 ms are less than 25 days
LONG_S = 30 * 86400.0  # the shortest of them is longer
ONE_TOKEN: dict[str, Any] = {"max_tokens": 1, "temperature": 0}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tiny model that loads."""
    return write_tiny_model(tmp_path_factory.mktemp("values") / "tiny.gguf", context=256)


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    """Yield a scheduler for objects."""
    with no_leaks(), Scheduler(Settings(gpus=False, memory_limit="1000MiB")) as scheduler:
        yield scheduler


@pytest.fixture
def lease(file: Path) -> Iterator[Lease]:
    """Yield a lease on a runner that serves."""
    with no_leaks(), Scheduler(settings(num_ctx=256)) as scheduler, scheduler.acquire(file) as lease:
        yield lease


def a_model(**fields: Any) -> PythonModel:
    return PythonModel("a", load=object, memory={"cpu": "1MiB"}, **fields)


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", [10**400, -(10**400), MOST_PRIORITY + 1, True, 1.0, "1"])
def test_a_priority_beyond_reason_is_refused(scheduler: Scheduler, priority: Any) -> None:
    """A priority that is too large is refused, in a request and in a model."""
    wrong: tuple[tuple[PythonModel, Any], ...] = ((a_model(), {"priority": priority}), (a_model(priority=priority), {}))
    for model, asking in wrong:
        with pytest.raises(InvalidSettings, match="a whole number from -1000000 to 1000000"):
            scheduler.acquire(model, **asking)
    scheduler.acquire(a_model(), priority=-MOST_PRIORITY).release()


def test_none_is_a_keyword_that_is_not_named(scheduler: Scheduler) -> None:
    """A program may pass all keywords on: None names no option, no part of a model and no priority."""
    for name in AcquireOptions.__annotations__:
        scheduler.acquire(a_model(), **{name: None}).release()  # type: ignore[misc]  # made up of names
    parser = RequestParser(Catalog([]), lambda model: None, pin=lambda model: None)
    spec = ModelSpec("a", "/a.gguf", options=Options(num_ctx=8192), priority=3, keep_alive="5m")
    asked = parser.parse(spec, {"num_ctx": None, "priority": None, "keep_alive": None})[1]
    assert asked == parser.parse(spec, {})[1] and asked.spec.options.num_ctx == 8192


@pytest.mark.parametrize("name", ["num_ctx", "num_batch", "num_parallel", "num_gpu", "main_gpu", "num_thread"])
def test_a_number_that_no_recording_can_hold_is_refused(file: Path, name: str) -> None:
    """A number of more than 63 bits is refused, and the largest that is allowed is refused for what it asks for."""
    parser = RequestParser(Catalog([]), lambda model: None, pin=lambda model: None)
    for asked, asking in ((file, {name: 2**63}), (ModelSpec("a", str(file), options=Options(**{name: 10**400})), {})):
        with pytest.raises(UnsupportedOption, match="between -2\\*\\*63 and 2\\*\\*63"):
            parser.parse_cached(asked, asking)  # type: ignore[arg-type]  # made up of names
    parser.parse_cached(file, {name: 2**63 - 1})  # type: ignore[misc]  # the same


def test_what_equals_a_value_that_was_taken_is_refused_all_the_same(file: Path) -> None:
    """True is refused although it equals 1, which was accepted right before."""
    parser = RequestParser(Catalog([]), lambda model: None, pin=lambda model: None)
    parser.parse_cached(file, {"timeout": 1, "require_gpu": False})
    wrong: tuple[Any, ...] = ({"timeout": True, "require_gpu": False}, {"timeout": 1, "require_gpu": 0})
    for asking in wrong:
        with pytest.raises((InvalidSettings, UnsupportedOption)):
            parser.parse_cached(file, asking)


# -- time limits -------------------------------------------------------------------------------------------------------


def test_a_runner_may_be_silent_for_ever(lease: Lease) -> None:
    """An infinite time limit of an answer is accepted, and so is one that is longer than a socket's."""
    for timeout in ENDLESS:
        assert lease.complete("a", timeout=timeout, **ONE_TOKEN) == lease.complete("a", **ONE_TOKEN)
        assert isinstance(lease.chat("a", timeout=timeout, **ONE_TOKEN), str)
        with lease.stream("a", timeout=timeout, **ONE_TOKEN) as pieces:
            assert all(isinstance(piece, str) for piece in pieces)


TALKS: dict[str, Callable[[Lease, Any], object]] = {
    "chat": lambda lease, timeout: lease.chat("a", timeout=timeout),
    "complete": lambda lease, timeout: lease.complete("a", timeout=timeout),
    "embed": lambda lease, timeout: lease.embed("a", timeout=timeout),
    "stream": lambda lease, timeout: lease.stream("a", timeout=timeout),
    "achat": lambda lease, timeout: lease.achat("a", timeout=timeout).send(None),
    "acomplete": lambda lease, timeout: lease.acomplete("a", timeout=timeout).send(None),
    "aembed": lambda lease, timeout: lease.aembed("a", timeout=timeout).send(None),
    "astream": lambda lease, timeout: lease.astream("a", timeout=timeout),
}


def test_a_silence_that_means_nothing_is_refused(lease: Lease) -> None:
    """A limit of zero or less on a runner's silence is refused."""
    nonsense: tuple[Any, ...] = (0, "0s", math.nan, 10**400, "soon", True, [1])
    for talk in TALKS.values():
        for timeout in nonsense:
            with pytest.raises(InvalidSettings, match="timeout cannot be"):
                talk(lease, timeout)
    assert not lease.lost


def test_a_silence_may_be_text(lease: Lease) -> None:
    """The limit on a runner's silence may be text, like other time limits."""
    assert isinstance(lease.complete("a", timeout="20s", **ONE_TOKEN), str)


def test_every_setting_that_is_a_duration_may_be_endless_or_huge(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With any duration setting infinite or huge, a model is loaded, serves, is probed and is stopped."""
    hints = get_type_hints(SettingsArguments)
    durations = {name for name, hint in hints.items() if float in get_args(hint)}
    assert {"keep_alive", "stop_grace", "probe_timeout"} <= durations
    for value in ("forever", 1e300, "40d"):
        given: dict[str, Any] = dict.fromkeys(durations - {"close_timeout"}, value)
        with no_leaks(), Scheduler(settings(num_ctx=256, **given)) as scheduler:
            with scheduler.acquire(file) as lease:
                assert isinstance(lease.complete("a", **ONE_TOKEN), str)
            scheduler.expire(file)
            assert_soon(lambda scheduler=scheduler: not scheduler.status().runners)  # type: ignore[misc]
        scheduler.close(timeout=value)
    assert not caplog.records


def test_a_runner_is_probed_again_and_again_without_a_time_limit(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A probe without a time limit ends when the runner answers, and later probes find later failures."""
    arguments = {"probe_timeout": "forever", "probe_interval": "50ms"}
    with no_leaks(), Scheduler(settings(num_ctx=256, **arguments)) as scheduler, scheduler.acquire(file) as lease:
        (life,) = scheduler._executor.runner_handles.values()
        process, asked = life.process, []
        assert process is not None
        healthy = process.healthy

        def counted(timeout_s: float) -> bool:
            asked.append(timeout_s)
            if len(asked) == 2:
                raise RuntimeError("a probe that fails is not the last one")
            return healthy(timeout_s)

        process.healthy = counted  # type: ignore[method-assign]  # it goes on to the real one
        assert_soon(lambda: len(asked) > 4)
        assert not lease.lost and set(asked) == {math.inf}
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [RuntimeError]


def test_a_child_without_a_time_limit_to_end_is_waited_for(file: Path) -> None:
    """A child with an infinite grace is waited for, and other children are started and end meanwhile."""
    with no_leaks(), Scheduler(settings(num_ctx=256, stop_grace="forever")) as scheduler:
        with scheduler.acquire(file) as lease:
            pid = lease.pid
            assert pid is not None
        watcher = scheduler._registry.engines[0]._processes._watcher  # type: ignore[attr-defined]  # the first is llama.cpp's
        assert_soon(lambda: all(run.pulse_at is None for run in watcher._runs.values()))  # nothing else wakes it
        send(pid, signal.SIGSTOP)
        scheduler.expire(file)
        assert_soon(lambda: not psutil.pid_exists(pid))
        with scheduler.acquire(file) as lease:
            assert isinstance(lease.complete("a", **ONE_TOKEN), str)


@pytest.mark.parametrize("timeout", ENDLESS)
def test_requests_wait_for_ever(scheduler: Scheduler, timeout: Any) -> None:
    """An infinite time limit is accepted by acquire, reserve, preload and configure."""
    scheduler.acquire(a_model(keep_alive=timeout), timeout=timeout, keep_alive=timeout).release()
    scheduler.reserve("cpu", 1, timeout=timeout).release()
    scheduler.configure(keep_alive=timeout)
    (runner,) = scheduler.status().runners
    assert runner.state == "idle"
    assert runner.expires_in_s > LONG_S


@pytest.mark.parametrize("timeout", ENDLESS)
def test_the_next_event_is_waited_for_for_ever(scheduler: Scheduler, timeout: Any) -> None:
    """The next event may be waited for without an end, and so may the end of the events."""
    events = scheduler.events()
    pending = scheduler.submit(a_model())
    assert events.take(timeout) is not None
    pending.result().release()
    events.close()
    while events.take(timeout) is not None:
        continue
    assert events.ended


def test_an_event_is_not_waited_for(scheduler: Scheduler) -> None:
    """With a limit of 0, an event is returned only if it is there."""
    assert scheduler.events().take(0) is None


@pytest.mark.parametrize("number", [10**400, -(10**400)])
def test_a_number_beyond_all_clocks_is_no_duration(scheduler: Scheduler, number: int) -> None:
    """A number beyond all clocks is refused by the argument's name."""
    waits: list[Callable[[], object]] = [
        lambda: parse_duration(number, name="keep_alive"),
        lambda: Settings(max_wait=number),
        lambda: scheduler.configure(keep_alive=number),
        lambda: scheduler.acquire(a_model(), keep_alive=number),
        lambda: scheduler.acquire(a_model(), timeout=number),
        lambda: scheduler.reserve("cpu", 1, timeout=number),
        lambda: scheduler.close(number),
        lambda: EventStream(1, str).take(number),
    ]
    for wait in waits:
        with pytest.raises(InvalidSettings):
            wait()


# -- what is no model, no setting, no device ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", [5, None, 1.5, b"a", ["a"], ("a",), {}, object()])
def test_what_names_no_model_is_refused_with_what_does(scheduler: Scheduler, model: Any) -> None:
    """A value that names no model is refused in every call, with the values that do."""
    for ask in (scheduler.acquire, scheduler.fit, scheduler.submit, scheduler.preload, scheduler.expire, scheduler.pin):
        with pytest.raises(UnsupportedOption, match="a path, a name, a ModelSpec or a PythonModel"):
            ask(model)


@pytest.mark.parametrize(
    ("variable", "closest"),
    [
        ("LOADMASTER_MEMORY_LIMT", "LOADMASTER_MEMORY_LIMIT"),
        ("LOADMASTER_memory_limit", "LOADMASTER_MEMORY_LIMIT"),
        ("LOADMASTER_KEEPALIVE", "LOADMASTER_KEEP_ALIVE"),
        ("LOADMASTER_MAX_LOADED_MODELS", "LOADMASTER_"),
        ("LOADMASTER_", "LOADMASTER_"),
    ],
)
def test_a_variable_of_ours_that_is_none_is_refused_with_the_closest(variable: str, closest: str) -> None:
    """A misspelt variable of ours is refused with the closest name, because a limit would not be set otherwise."""
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environment({variable: "1GiB"})
    assert (caught.value.name, caught.value.value) == (variable, "1GiB")
    assert closest in str(caught.value)


def test_an_empty_variable_of_no_setting_is_not_set() -> None:
    """An empty variable of no setting is ignored, and variables of other programs are not looked at."""
    assert Settings.from_environment({"LOADMASTER_OLD": "", "LOADMASTERY": "1"}) == Settings()


@pytest.mark.parametrize("ask", ["acquire", "fit", "submit", "preload"])
def test_several_projectors_are_refused(scheduler: Scheduler, file: Path, ask: str) -> None:
    """Several projectors are refused, because the engine loads only one."""
    with pytest.raises(UnsupportedOption, match="one projector"):
        getattr(scheduler, ask)(file, projectors=("a.gguf", "b.gguf"))


def test_a_device_that_is_not_there_is_named_with_those_that_are(scheduler: Scheduler) -> None:
    """An unknown device is named with the known ones, and no smaller model is advised."""
    asks: list[Callable[[], object]] = [
        lambda: scheduler.reserve("gpu-9", "1MiB"),
        lambda: scheduler.acquire(PythonModel("b", load=object, memory={"cpu": "1MiB", "gpu-9": "1MiB"})),
    ]
    for ask in asks:
        with pytest.raises(DoesNotFit) as caught:
            ask()
        assert caught.value.reason == "there is no device 'gpu-9'; there is cpu"
        assert "smaller" not in str(caught.value) and "there is no device 'gpu-9'; there is cpu" in str(caught.value)


# -- split models ------------------------------------------------------------------------------------------------------


def a_split(folder: Path, count: int, parts: int) -> Path:
    """Write the first parts of a model that claims to have `count` parts; return the first."""
    for part in range(1, parts + 1):
        path = folder / f"m-{part:05}-of-{count:05}.gguf"
        write_tiny_model(path)
        _say_that_it_is_split(path, part - 1, count)
    return folder / f"m-00001-of-{count:05}.gguf"


def _say_that_it_is_split(path: Path, number: int, count: int) -> None:
    """Add the keys of a part to a GGUF file."""
    content = bytearray(path.read_bytes())
    keys = int.from_bytes(content[16:24], "little")
    content[16:24] = (keys + 3).to_bytes(8, "little")
    added = b""
    for key, value in (("split.no", number), ("split.count", count), ("split.tensors.count", 10**6)):
        added += len(key).to_bytes(8, "little") + key.encode() + (4).to_bytes(4, "little") + value.to_bytes(4, "little")
    path.write_bytes(bytes(content[:24]) + added + bytes(content[24:]) + b"\0" * 64)


@pytest.fixture
def read_parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of the files whose headers are read, in order."""
    read: list[str] = []
    header = metadata_module.read_header

    def noted(path: str) -> Any:
        read.append(path)
        return header(path)

    monkeypatch.setattr(metadata_module, "read_header", noted)
    return read


def test_a_model_of_too_many_parts_is_refused_by_its_first(tmp_path: Path, read_parts: list[str]) -> None:
    """A model that claims too many parts is refused by its first part."""
    first = a_split(tmp_path, MOST_PARTS + 1, 2)
    with pytest.raises(InvalidModel, match=f"at most {MOST_PARTS:,}"):
        read_metadata(str(first))
    assert read_parts == [str(first)]


def test_each_part_is_checked_as_it_comes(tmp_path: Path, read_parts: list[str]) -> None:
    """Each part is checked when it is read, so that the parts after a bad one are not read."""
    first = a_split(tmp_path, 3, 3)
    with pytest.raises(InvalidModel, match="also in a part before it"):
        read_metadata(str(first))
    assert len(read_parts) == 2
