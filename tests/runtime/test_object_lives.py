"""Objects whose `load` is another under a known name, and what an error tells of a `load` that raised."""

from __future__ import annotations

import gc
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from scheduler import LoadFailed, PythonModel, Scheduler, Settings
from scheduler.runtime.object_lives import ObjectLives
from tests.support.waiting import assert_soon

LIMIT_S = 60.0


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    with Scheduler(Settings(gpus=False, measurement_file=None, lock_folder=None)) as made:
        yield made


def value(scheduler: Scheduler, load: Callable[[], object], **how: Any) -> object:
    """Acquire an object of the same name each time; return it."""
    with scheduler.acquire(PythonModel("index", load=load, **how), timeout=LIMIT_S) as lease:
        return lease.value


def test_u44_another_load_is_another_life(scheduler: Scheduler) -> None:
    """The object that was loaded before is not granted any more, and is unloaded."""
    gone: list[object] = []
    assert value(scheduler, lambda: "first", unload=gone.append) == "first"
    assert value(scheduler, lambda: "second") == "second"
    assert_soon(lambda: gone == ["first"])
    assert_soon(lambda: [runner.model for runner in scheduler.status().runners] == ["index"])
    assert value(scheduler, lambda: "first") == "first"


def test_u44_a_lease_on_the_object_before_holds_it(scheduler: Scheduler) -> None:
    """A lease keeps the object that it was granted, while others get the new one; it leaves after that lease."""
    with scheduler.acquire(PythonModel("index", load=lambda: "first"), timeout=LIMIT_S) as lease:
        assert value(scheduler, lambda: "second") == "second"
        assert lease.value == "first" and not lease.lost
    assert_soon(lambda: [runner.state for runner in scheduler.status().runners] == ["idle"])
    assert value(scheduler, lambda: "second") == "second"


def test_u44_a_load_that_was_mended_is_loaded_at_once(scheduler: Scheduler) -> None:
    """The back-off belongs to the load that failed, also once its object was dropped."""

    def fails() -> object:
        raise KeyError("wieghts")

    for _ in range(2):
        with pytest.raises(LoadFailed):
            value(scheduler, fails)
    assert_soon(lambda: not scheduler.debug_state().named_models)
    assert value(scheduler, lambda: "mended") == "mended"
    with pytest.raises(LoadFailed, match="wieghts"):
        value(scheduler, fails)
    with pytest.raises(LoadFailed, match="wieghts"):
        value(scheduler, fails)


def test_u44_a_load_that_hangs_is_not_waited_for(scheduler: Scheduler) -> None:
    """A corrected load is started while the one before hangs."""
    gate = threading.Event()
    waiting = scheduler.submit(PythonModel("index", load=gate.wait))
    assert value(scheduler, lambda: "mended") == "mended"
    gate.set()
    waiting.result(LIMIT_S).release()


def test_u44_a_pin_by_name_stays(scheduler: Scheduler) -> None:
    """What was pinned by its name is pinned in its next life, and the life before is not."""
    value(scheduler, lambda: "first")
    scheduler.pin(PythonModel("index", load=object))
    assert value(scheduler, lambda: "second") == "second"
    assert_soon(lambda: [(each.state, each.pinned) for each in scheduler.status().runners] == [("idle", True)])
    scheduler.unpin(PythonModel("index", load=object))
    assert [each.pinned for each in scheduler.status().runners] == [False]
    scheduler.expire(PythonModel("index", load=object))
    assert_soon(lambda: not scheduler.status().runners)


class Loader:
    """A callable object, and one with a method to load by."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self) -> object:
        return self.load()

    def load(self) -> object:
        return bytes(self.size)


def of_size(size: int) -> Callable[[], object]:
    return lambda: bytes(size)


MAKERS: dict[str, Callable[[int], Callable[[], object]]] = {
    "a closure": of_size,
    "a partial": lambda size: partial(bytes, size),
    "a partial of a function": lambda size: partial(lambda one: bytes(one), size),
    "a method": lambda size: Loader(size).load,
    "a callable object": Loader,
    "a default": lambda size: eval(f"lambda size={size}: bytes(size)"),
    "code": lambda size: eval(f"lambda: bytes({size})"),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_u44_the_same_load_made_anew_is_the_same_life(make: Callable[[int], Callable[[], object]]) -> None:
    """A program may make its objects anew for each request: equal loads are one life, and others are not."""
    lives = ObjectLives()
    kept = PythonModel("a", load=make(3))
    first, _ = lives.meet(kept)
    again, ended = lives.meet(PythonModel("a", load=make(3)))
    assert (again.id, ended) == (first.id, None) and lives.current(PythonModel("a", load=object)).id == first.id
    other, ended = lives.meet(PythonModel("a", load=make(4)))
    assert ended == first.id != other.id and other.name == "a"
    assert lives.meet(PythonModel("b", load=make(3)))[1] is None
    del kept


def test_u44_a_name_can_be_no_life_of_another() -> None:
    """No name makes an identity that another name's later life has."""
    lives = ObjectLives()
    lives.meet(PythonModel("a", load=lambda: 1))
    later, _ = lives.meet(PythonModel("a", load=lambda: 2))
    for name in (later.id, later.id.removeprefix("python"), f"{later.life}:a", "python:a"):
        assert PythonModel(name, load=object).id != later.id


def test_u44_nothing_that_was_loaded_or_loads_is_kept(scheduler: Scheduler) -> None:
    """An object that is not used any more is dropped, with what its `load` refers to, also where it has raised."""

    class Weights:
        pass

    weights = Weights()
    seen = weakref.ref(weights)

    def load(weights: Weights = weights) -> object:
        raise RuntimeError("halfway")

    with pytest.raises(LoadFailed) as caught:
        value(scheduler, load)
    del weights, load, caught

    def dropped() -> bool:
        gc.collect()
        return seen() is None

    assert_soon(dropped)


def test_u44_an_error_has_the_exception_of_the_load_as_its_cause(scheduler: Scheduler) -> None:
    """The cause tells where in the user's code it was raised, of each way to ask, and also while it is backed off."""

    def deeper() -> object:
        return {}["wieghts"]

    model = PythonModel("index", load=lambda: deeper())
    errors: list[BaseException | None] = []
    for ask in (lambda: scheduler.acquire(model), lambda: scheduler.submit(model).result(LIMIT_S),
                lambda: scheduler.preload(model).result(LIMIT_S)):  # fmt: skip
        with pytest.raises(LoadFailed) as caught:
            ask()
        errors.append(caught.value.__cause__)
    assert all(isinstance(error, KeyError) for error in errors)
    assert errors[0] is not None
    frames = traceback.extract_tb(errors[0].__traceback__)
    assert [frame.name for frame in frames] == ["<lambda>", "deeper"]
