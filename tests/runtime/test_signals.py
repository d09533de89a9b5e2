"""Signal handlers may use the scheduler at any moment, and Ctrl-C may come at any: nothing hangs or is left over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fsm.domain.devices import HOST
from fsm.machine.request import ModelId
from fsm.messages.commands import Claim, Prefetch, Sample
from fsm.messages.decision_log import Decision
from fsm.messages.reasons import Queued
from scheduler import Lease, PythonModel, Scheduler, Settings
from scheduler.api import scheduler as scheduler_module
from tests.support.interrupts import as_main, interrupted
from tests.support.leaks import no_leaks
from tests.support.real import write_models
from tests.support.waiting import LIMIT_S


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with no_leaks():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), "a") / "a.gguf"


def a_scheduler(**more: Any) -> Scheduler:
    return Scheduler(Settings(**{"gpus": False, "cpu_threads": 1, "stop_grace": "100ms", **more}))


def decide(scheduler: Scheduler) -> None:
    """Do everything that is done under the core's lock, and wait for it, as for a step."""
    executor, entry = scheduler._executor, Decision(0.0, "queued", ModelId("a"), Queued(1))

    def look(_: object) -> None:
        for pool in (executor.worker_pool, executor.callback_pool):
            pool.put(lambda: None)
        scheduler._driver._perform(Sample(0))
        scheduler._driver._perform(Prefetch(()))
        scheduler._hub.publish([entry])
        assert executor.measurements is not None
        executor.measurements._put(lambda: None)

    scheduler._driver.query(look)


CALLS: dict[str, Callable[[Scheduler, Lease, Path], object]] = {
    "status": lambda scheduler, lease, model: scheduler.status(),
    "fit": lambda scheduler, lease, model: scheduler.fit(model),
    "configure": lambda scheduler, lease, model: scheduler.configure(memory_limit=None),
    "reserve": lambda scheduler, lease, model: scheduler.reserve("cpu", "1MiB").release(),
    "submit": lambda scheduler, lease, model: scheduler.submit(PythonModel("a", load=object)).result().release(),
    "events": lambda scheduler, lease, model: scheduler.events().take(0.001),
    "on_wanted": lambda scheduler, lease, model: lease.on_wanted(lambda: None),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_decision_waits_for_nothing_that_an_interrupted_thread_holds(name: str, model: Path) -> None:
    """A handler that waits for a decision is answered, wherever the main thread is in its own call."""
    with a_scheduler() as scheduler, scheduler.acquire(PythonModel("a", load=object)) as lease:
        moments: list[int] = []

        def call() -> None:
            moments.append(interrupted(lambda: CALLS[name](scheduler, lease, model), lambda _: decide(scheduler)))

        as_main(scheduler._driver, call)
        assert moments[0] > 5


COMMANDS: dict[str, Callable[[Scheduler], object]] = {
    "claim": lambda scheduler: scheduler._driver._perform(Claim(10**9, (HOST,))),
    "a job after the close": lambda scheduler: scheduler._executor.worker_pool.put(lambda: None),
    "an answer after the close": lambda scheduler: scheduler._executor.deliver(lambda: None),
    "every command": decide,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_u72_nothing_under_the_lock_of_the_core_waits_for_a_thread_to_start(name: str, tmp_path: Path) -> None:
    """A decision needs no lock that the main thread holds inside Thread.start(), where a signal may interrupt it."""
    scheduler, begin, done = a_scheduler(lock_folder=tmp_path), threading.Event(), threading.Event()
    if name.endswith("after the close"):
        scheduler.close()

    def perform() -> None:
        begin.wait(LIMIT_S)
        if name == "every command":
            decide(scheduler)
        else:
            scheduler._driver.query(lambda _: COMMANDS[name](scheduler))
        done.set()

    thread = threading.Thread(target=perform, daemon=True)
    thread.start()
    with threading._active_limbo_lock:  # type: ignore[attr-defined]  # as Thread.start() does for a moment
        begin.set()
        performed = done.wait(LIMIT_S)
    thread.join(LIMIT_S)
    scheduler.close()
    assert performed, "a decision waits for the main thread"


@pytest.mark.parametrize("every", [3, 7])
@pytest.mark.parametrize("call", [Scheduler.status, lambda scheduler: scheduler.close(0)], ids=["look", "close"])
def test_a_handler_may_look_and_close_while_its_thread_closes(every: int, call: Callable[[Scheduler], object]) -> None:
    """A handler that looks and closes while its thread closes is answered at once."""
    scheduler = a_scheduler()
    scheduler.acquire(PythonModel("a", load=object)).release()

    def handle(moment: int) -> None:
        if moment % every == 0:
            call(scheduler)

    as_main(scheduler._driver, lambda: interrupted(scheduler.close, handle))
    assert not scheduler.status().runners


# -- Ctrl-C that the program survives ----------------------------------------------------------------------------------


def test_ctrl_c_while_a_reading_is_asked_for_stops_no_later_one() -> None:
    """Ctrl-C while a reading is requested, at whichever instruction, does not stop the next reading."""
    with a_scheduler() as scheduler:
        sampler, moment, whole = scheduler._executor.sampler, 0, False

        def interrupt(now: int) -> None:
            if now == moment:
                raise KeyboardInterrupt

        def ask() -> None:
            nonlocal moment, whole
            while not whole:
                moment += 1
                try:
                    whole = interrupted(lambda: sampler.refresh(LIMIT_S), interrupt) < moment
                except KeyboardInterrupt:
                    assert sampler.refresh(LIMIT_S)

        as_main(scheduler._driver, ask, 5 * LIMIT_S)


LAST_STEPS = ["_prober.close", "_executor.close", "_driver.stop", "_recorder.close", "_devices.close"]


@pytest.mark.parametrize("step", LAST_STEPS)
def test_ctrl_c_in_the_last_steps_of_a_close_skips_no_other(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C in the last steps of a close, listeners hear the end, and the exit ends the rest."""
    scheduler = a_scheduler(recording_file=tmp_path / "recording.jsonl")
    *path, name = step.split(".")
    owner: Any = scheduler
    for part in path:
        owner = getattr(owner, part)
    listener = threading.Thread(target=list, args=(scheduler.events(),), daemon=True)
    listener.start()
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            scheduler.close(0)
        listener.join(LIMIT_S)
        assert not listener.is_alive(), "the listener waits for ever"
    assert scheduler in scheduler_module._open_schedulers
    scheduler_module._close_all()
    assert scheduler not in scheduler_module._open_schedulers


def test_a_step_of_a_close_that_fails_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A step of a close that raises is logged, and the other steps are made."""
    with a_scheduler() as scheduler:
        close = scheduler._devices.close
        monkeypatch.setattr(scheduler._prober, "close", lambda timeout_s: 1 / 0)
    assert [each.getMessage() for each in caplog.records] == ["a step of the close failed"]
    monkeypatch.undo()
    assert scheduler._devices.close == close
    scheduler.close()


def test_ctrl_c_at_any_moment_of_a_close_leaves_nothing_after_the_next() -> None:
    """After Ctrl-C at any moment of a close, the next close ends the rest."""
    moments = iter(range(1, 10_000, 7))
    whole = False
    while not whole:
        scheduler, moment = a_scheduler(), next(moments)
        scheduler.acquire(PythonModel("a", load=object)).release()

        def interrupt(now: int, moment: int = moment) -> None:
            if now == moment:
                raise KeyboardInterrupt

        def close(scheduler: Scheduler = scheduler, moment: int = moment) -> None:
            nonlocal whole
            try:
                whole = interrupted(lambda: scheduler.close(0), interrupt) < moment  # type: ignore[arg-type]
            except KeyboardInterrupt:
                scheduler.close(0)

        as_main(scheduler._driver, close)
