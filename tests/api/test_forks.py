"""A fork beside threads that are in the middle of something: the child's own scheduler works."""

from __future__ import annotations

import os
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler import PythonModel, Scheduler, Settings
from scheduler.models import gguf_header
from scheduler.models.gguf_metadata import read_metadata
from tests.support.real import write_models
from tests.support.waiting import LIMIT_S

LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Event, threading.Semaphore)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), "a") / "a.gguf"


def _inside(value: Any) -> Iterator[Any]:
    """Yield what a value of ours, a class of ours or a container leads to."""
    if isinstance(value, dict):
        yield from [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif type(value).__module__.partition(".")[0] in ("scheduler", "fsm"):
        names = {name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())}
        yield from [getattr(value, name) for name in names if hasattr(value, name)]
        yield from vars(value).values() if hasattr(value, "__dict__") else ()
    elif isinstance(value, type) and value.__module__.partition(".")[0] in ("scheduler", "fsm"):
        yield from [each for each in vars(value).values() if not isinstance(each, types.FunctionType)]


def test_u68_no_module_has_a_lock() -> None:
    """No lock can be reached from the variables of a module: a fork would inherit it as another thread holds it."""
    modules = [each for name, each in sys.modules.items() if name.partition(".")[0] in ("scheduler", "fsm")]
    left = [(f"{each.__name__}.{name}", value) for each in modules for name, value in vars(each).items()]
    seen: set[int] = set()
    found = []
    while left:
        name, value = left.pop()
        if id(value) in seen or isinstance(value, types.ModuleType | str | int | float):
            continue
        seen.add(id(value))
        if isinstance(value, LOCKS):
            found.append(name)
        left.extend((name, each) for each in _inside(value))
    assert len(seen) > 1000 and found == []


CHILD: dict[str, Callable[[Path], object]] = {
    "fit": lambda model: Scheduler(Settings(gpus=False)).fit(model),
    "names": lambda model: Scheduler(Settings(gpus=False, models=model.parent)).fit("a"),
    "objects": lambda model: Scheduler(Settings(gpus=False)).acquire(PythonModel("a", load=object)).release(),
}


@pytest.mark.parametrize("name", CHILD)
def test_u68_a_fork_beside_threads_that_read_headers_uses_a_scheduler_of_its_own(name: str, model: Path) -> None:
    """A scheduler that a child makes works, whatever the threads of the parent were in at the fork."""
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            gguf_header._cache.clear()
            read_metadata(str(model))

    threads = [threading.Thread(target=read, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            assert _forked(lambda: CHILD[name](model)) == 0
    finally:
        over.set()
        for thread in threads:
            thread.join(LIMIT_S)


def _forked(action: Callable[[], object]) -> int:
    with warnings.catch_warnings():  # of a fork beside threads, which is the subject
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(LIMIT_S))
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_u68_headers_that_were_read_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache keeps the headers that were used last, up to its limit, with many threads at once too."""
    monkeypatch.setattr(gguf_header, "CACHED_HEADERS", 3)
    cache = gguf_header._Cache()
    header: Any = object()
    keys = [(str(number), 0, 0, 0, 0) for number in range(5)]
    for key in keys[:3]:
        cache.put(key, header)
    assert cache.get(keys[0]) is header
    cache.put(keys[3], header)
    assert [cache.get(key) is header for key in keys] == [True, False, True, True, False]

    def use() -> None:
        for number in range(3000):
            key = (str(number % 7), 0, 0, 0, 0)
            assert cache.get(key) in (None, header)
            cache.put(key, header)

    failed: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert not failed and len(cache._headers) <= 3
