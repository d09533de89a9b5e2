"""The clients: threads of their own that make requests, each with a random generator of its own."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scheduler import (
    AcquireTimeout,
    DoesNotFit,
    LeaseReleased,
    LoadFailed,
    PythonModel,
    QueueFull,
    RunnerCrashed,
    Scheduler,
    UnsupportedOption,
)
from tests.tools.soak.measure import Waits
from tests.tools.soak.objects import MIB, World

EXPECTED = (AcquireTimeout, LoadFailed, QueueFull, RunnerCrashed)  # what a request may end with beside faults
LIMIT_S = 60.0  # far more than any wait takes, so that a hang is found
BURST = 50  # warm leases in a row
PAUSE_S = 0.001  # between two bursts, so that every client has a turn
SHORT: dict[str, Any] = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}


class Gate:
    """A gate that lets clients go on, or makes all of them rest."""

    def __init__(self) -> None:
        self.stopped = False
        self._open = threading.Event()
        self._open.set()
        self._condition = threading.Condition()
        self._resting = 0

    def passes(self) -> bool:
        """Wait while the gate is closed; return False when the soak is over."""
        if not self._open.is_set():
            with self._condition:
                self._resting += 1
                self._condition.notify_all()
            self._open.wait()
            with self._condition:
                self._resting -= 1
        return not self.stopped

    @property
    def is_open(self) -> bool:
        """Whether clients may go on."""
        return self._open.is_set() and not self.stopped

    def close(self, clients: int, timeout_s: float) -> bool:
        """Close the gate; return whether so many clients rest in time."""
        self._open.clear()
        with self._condition:
            return self._condition.wait_for(lambda: self._resting >= clients, timeout_s)

    def open(self) -> None:
        """Let all clients go on."""
        self._open.set()

    def stop(self) -> None:
        """End all clients."""
        self.stopped = True
        self._open.set()


class Client(threading.Thread):
    """A client that repeats its turn; an unexpected error is kept and fails the soak."""

    def __init__(self, name: str, seed: str, gate: Gate, scheduler: Scheduler, world: World) -> None:
        super().__init__(name=f"soak-{name}", daemon=True)
        self.gate = gate
        self.scheduler = scheduler
        self.world = world
        self.random = random.Random(seed)
        self.waits = Waits()  # of warm requests
        self.leases = 0
        self.turns = 0
        self.errors: Counter[str] = Counter()  # expected errors, by type
        self.unexpected: list[str] = []

    def run(self) -> None:
        """Take turns until the soak is over."""
        while self.gate.passes():
            try:
                self.turn()
            except EXPECTED as error:
                self.errors[type(error).__name__] += 1
            except BaseException:
                self.unexpected.append(traceback.format_exc())
                if len(self.unexpected) > 20:
                    return
            self.turns += 1

    def turn(self) -> None:
        """Take one turn."""
        raise NotImplementedError

    def expect(self, kind: type[BaseException], action: Callable[[], object]) -> None:
        """Make a call that must end with an error of that type."""
        try:
            action()
        except kind as error:
            self.errors[type(error).__name__] += 1
        else:
            self.world.violate(f"{kind.__name__} was expected")


class WarmClient(Client):
    """A client that leases a model which is always loaded, as fast as possible."""

    models: Sequence[PythonModel]

    def turn(self) -> None:
        acquire, clock, add = self.scheduler.acquire, time.perf_counter_ns, self.waits.add
        for _ in range(BURST):
            model = self.models[self.leases % len(self.models)]
            begin = clock()
            lease = acquire(model)
            add(clock() - begin)
            self.leases += 1
            if not lease.value.loaded or lease.value.name != model.name:
                self.world.violate(f"a lease on {model.name} gave {lease.value.name}, loaded: {lease.value.loaded}")
            lease.release()
        time.sleep(PAUSE_S)


class MixedClient(Client):
    """A client that requests any model in any way, and misuses the API."""

    models: Sequence[PythonModel]  # models that come and go

    def turn(self) -> None:
        model = self.random.choice(self.models)
        name, action = self.random.choice(self.actions())
        if name:
            self.world.fault(name, model.name)
        action(model)

    def actions(self) -> list[tuple[str, Callable[[PythonModel], None]]]:
        """Return the actions, each as often as it is drawn, with the fault that it is counted as."""
        return [
            *[("", self.use)] * 8,
            ("", self.use_a_future),
            ("", self.use_two),
            ("", self.preload),
            ("", self.look),
            ("", lambda model: self.scheduler.expire(model)),
            ("", self.reserve),
            ("", self.pin_for_a_moment),
            ("", self.listen),
            ("cancelled while it waited", self.cancel),
            ("a time-out of its own", self.hurry),
            ("released twice", self.release_twice),
            ("lease lost", self.lose),
            ("exception in a with block", self.fail_inside),
            ("callback raised", self.listen_badly),
            ("nonsense asked for", self.ask_for_nonsense),
        ]

    def use(self, model: PythonModel) -> None:
        self.hold(self.scheduler.acquire(model, timeout=LIMIT_S, priority=self.random.randrange(3)))

    def hold(self, lease: Any) -> None:
        """Use what was leased for a moment, then release it."""
        self.leases += 1
        thing = lease.value
        self.world.use(thing, 1)
        time.sleep(self.random.choice((0.0, 0.0, 0.001, 0.003)))
        self.world.use(thing, -1)
        lease.release()

    def use_a_future(self, model: PythonModel) -> None:
        self.hold(self.scheduler.submit(model, keep_alive=self.random.choice((0, 0.05, 60))).result(LIMIT_S))

    def use_two(self, model: PythonModel) -> None:
        """Hold one model and request another one, which may have to time out."""
        with self.scheduler.acquire(model, timeout=LIMIT_S):
            self.leases += 1
            self.hold(self.scheduler.acquire(self.random.choice(self.models), timeout=0.2))

    def preload(self, model: PythonModel) -> None:
        self.scheduler.preload(model).result(LIMIT_S)

    def look(self, model: PythonModel) -> None:
        self.scheduler.fit(model)
        self.scheduler.status()

    def reserve(self, _: PythonModel) -> None:
        self.scheduler.reserve("cpu", 10 * MIB, timeout=0.2).release()

    def pin_for_a_moment(self, model: PythonModel) -> None:
        self.scheduler.pin(model)
        time.sleep(0.002)
        self.scheduler.unpin(model)

    def listen(self, model: PythonModel) -> None:
        lease = self.scheduler.acquire(model, timeout=LIMIT_S)
        lease.on_wanted(lambda: None)
        lease.on_lost(lambda: self.world.violate(f"a lease on {model.name} was lost"))
        self.hold(lease)

    def cancel(self, model: PythonModel) -> None:
        futures = [self.scheduler.submit(model) for _ in range(5)]
        for future in futures:
            if not future.cancel():
                self.hold(future.result(LIMIT_S))

    def hurry(self, model: PythonModel) -> None:
        self.hold(self.scheduler.acquire(model, timeout=self.random.choice((0, 0.001, 0.01))))

    def release_twice(self, model: PythonModel) -> None:
        lease = self.scheduler.acquire(model, timeout=LIMIT_S)
        self.hold(lease)
        lease.release()
        self.expect(LeaseReleased, lambda: lease.value)

    def lose(self, model: PythonModel) -> None:
        """Forget a lease, which the garbage collector releases."""
        self.scheduler.acquire(model, timeout=LIMIT_S)
        self.leases += 1

    def fail_inside(self, model: PythonModel) -> None:
        try:
            with self.scheduler.acquire(model, timeout=LIMIT_S):
                self.leases += 1
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass

    def listen_badly(self, model: PythonModel) -> None:
        lease = self.scheduler.acquire(model, timeout=LIMIT_S)
        lease.on_wanted(lambda: 1 / 0)
        self.hold(lease)

    def ask_for_nonsense(self, model: PythonModel) -> None:
        self.expect(UnsupportedOption, lambda: self.scheduler.acquire(model, num_ctx=64))
        self.expect(DoesNotFit, lambda: self.scheduler.reserve("cpu", "1000TiB"))


class LoopClient(Client):
    """A client with an event loop of many tasks, some of which are cancelled."""

    models: Sequence[PythonModel]

    def turn(self) -> None:
        asyncio.run(self.tasks())

    async def tasks(self) -> None:
        tasks = [asyncio.create_task(self.one(self.random.choice(self.models))) for _ in range(20)]
        await asyncio.sleep(0.005)
        for task in self.random.sample(tasks, 6):
            if task.cancel():
                self.world.fault("task cancelled", self.models[0].name)
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, (*EXPECTED, asyncio.CancelledError)):
                self.errors[type(outcome).__name__] += 1
            elif isinstance(outcome, BaseException):
                raise outcome

    async def one(self, model: PythonModel) -> None:
        async with self.scheduler.acquire_async(model, timeout=LIMIT_S) as lease:
            self.leases += 1
            self.world.use(lease.value, 1)
            try:
                await asyncio.sleep(0.001)
            finally:
                self.world.use(lease.value, -1)


class RealClient(Client):
    """A client that requests a few tokens of real children."""

    paths: Sequence[Path]

    def turn(self) -> None:
        with self.scheduler.acquire(self.random.choice(self.paths), timeout=LIMIT_S) as lease:
            self.leases += 1
            if self.random.random() < 0.3:
                self.world.fault("stream left early", Path(lease.model).stem)
                with lease.stream([{"role": "user", "content": "hello"}], timeout=LIMIT_S, **SHORT) as pieces:
                    next(pieces)
            elif not lease.chat([{"role": "user", "content": "hello"}], timeout=LIMIT_S, **SHORT):
                self.world.violate("a child said nothing")
        time.sleep(0.01)
