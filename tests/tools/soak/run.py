"""One soak from beginning to end: build, run, rest now and then, recover, and look at what is left."""

from __future__ import annotations

import faulthandler
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock

from fsm.core import Core
from scheduler import PythonModel, Scheduler, SchedulerError, Settings
from tests.support.invariants import check_scheduler
from tests.support.leaks import no_leaks
from tests.support.tiny_models import write_tiny_model
from tests.tools.soak.clients import LIMIT_S, Client, Gate, LoopClient, MixedClient, RealClient, WarmClient
from tests.tools.soak.measure import Memory, Waits, memory
from tests.tools.soak.objects import MIB, World, objects
from tests.tools.soak.troubles import MOST_QUEUE, Changer, Killer, Reader

MOST_BYTES = 500 * MIB
MOST_RESTS = 8  # rests, in which nothing is under way and held memory can be seen
SAY_S = 5.0  # between two lines of progress
CAST = {"warm": 6, "mixed": 6, "loop": 1, "real": 2, "killer": 1, "changer": 1, "reader": 1}  # threads
FORGOTTEN_WITHIN_S = 30.0  # after the clients rest: loads and stops may still be under way


def settings(folder: Path) -> Settings:
    """Return settings under which faults happen, and are noticed, within seconds."""
    return Settings(
        gpus=False, cpu_threads=1, memory_limit=MOST_BYTES, max_runners=20, max_queue=MOST_QUEUE, keep_alive="60s",
        max_wait="2s", min_residency=0, load_timeout="5s", stop_grace="0.5s", probe_interval="1s", probe_timeout="3s",
        lock_folder=folder, measurement_file=folder.with_name("footprints.sqlite3"), event_buffer=200, max_host_loads=6,
        recovery_timeout="0.5s",
    )  # fmt: skip


class Soak:
    """The scheduler under test and all clients."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.world = World(MOST_BYTES)
        self.world.random.seed(f"{seed} world")
        self.kinds = objects(self.world)
        self.paths = [write_tiny_model(folder / f"tiny-{number}.gguf", seed=number) for number in range(3)]
        self.locks = folder / "locks"
        self.scheduler = Scheduler(settings(self.locks))
        self.scheduler._driver.query(_shorten_back_off)
        self.gate = Gate()
        self.rests: list[Memory] = []
        self.clients = [self._client(kind, f"{seed} {kind} {i}") for kind, count in CAST.items() for i in range(count)]

    def _client(self, kind: str, seed: str) -> Client:
        kinds: dict[str, type[Client]] = {
            "warm": WarmClient, "mixed": MixedClient, "loop": LoopClient, "real": RealClient, "killer": Killer,
            "changer": Changer, "reader": Reader,
        }  # fmt: skip
        client = kinds[kind](seed.split(" ", 1)[1].replace(" ", "-"), seed, self.gate, self.scheduler, self.world)
        match client:
            case WarmClient():
                client.models = self.kinds["warm"]
            case MixedClient() | LoopClient():
                client.models = [model for kind, models in self.kinds.items() if kind != "warm" for model in models]
            case RealClient():
                client.paths = self.paths
            case Changer():
                client.paths, client.most_bytes = self.paths, MOST_BYTES
            case _:
                pass
        return client

    # -- its course ---------------------------------------------------------------------------------------------------

    def run(self, seconds: float, say: Callable[[str], None]) -> None:
        """Run all clients for so long, with a rest now and then."""
        for model in self.kinds["warm"]:
            self.scheduler.acquire(model, keep_alive=-1).release()
        begin = time.monotonic()
        for client in self.clients:
            client.start()
        count = max(2, min(MOST_RESTS, int(seconds / SAY_S)))
        rests = [begin + seconds * (number + 1) / count for number in range(count)]
        said = begin
        while rests and not self.world.violations:
            time.sleep(min(0.1, max(0.0, rests[0] - time.monotonic())))
            if time.monotonic() >= rests[0]:
                rests.pop(0)
                self.rest()
            if (now := time.monotonic()) - said >= SAY_S:
                said = now
                say(self.progress(now - begin))
        self.gate.stop()
        for client in self.clients:
            client.join(LIMIT_S)
            if client.is_alive():
                faulthandler.dump_traceback(sys.stderr)
                self.world.violate(f"{client.name} hangs")

    def rest(self) -> None:
        """Make all clients rest; then no lease and no waiting request may be left, and memory is measured."""
        if not self.gate.close(len(self.clients), LIMIT_S):
            faulthandler.dump_traceback(sys.stderr)
            self.world.violate("some clients did not rest")
        self.world_is_at_rest()
        self.rests.append(memory())
        self.gate.open()

    def world_is_at_rest(self) -> None:
        """Wait for loads and stops under way; then look for leases and reservations without a holder."""
        end = time.monotonic() + FORGOTTEN_WITHIN_S
        while left := self.held():
            if time.monotonic() > end:
                return self.world.violate(f"at rest, and yet: {left}")
            time.sleep(0.02)
        try:
            check_scheduler(self.scheduler)
        except AssertionError as error:
            self.world.violate(f"the account is wrong: {error}")

    def held(self) -> list[str]:
        """Return what is not as it is without requests."""
        status = self.scheduler.status()
        left = [f"{runner.model} has {runner.leases} leases" for runner in status.runners if runner.leases]
        left += [f"{runner.model} is {runner.state}" for runner in status.runners if runner.state != "idle"]
        left += [f"a request for {wait.model} waits" for wait in status.queue]
        tickets = len(self.scheduler.debug_state().requests)
        return left + [f"{tickets} tickets"] * bool(tickets)

    def recover(self) -> set[str]:
        """End the troubles; return the models that can be loaded again, which all must be."""
        self.world.faulty = False
        self.scheduler.configure(memory_limit=MOST_BYTES, max_queue=MOST_QUEUE, max_runners=20)
        served = set()
        models: Sequence[PythonModel | Path] = [*(model for kind in self.kinds.values() for model in kind), *self.paths]
        for model in models:
            name = model.name if isinstance(model, PythonModel) else model.stem
            end = time.monotonic() + LIMIT_S
            while name not in served and time.monotonic() < end:
                try:
                    self.scheduler.acquire(model, timeout=LIMIT_S).release()
                    served.add(name)
                except SchedulerError:  # the back-off is not over
                    time.sleep(0.1)
            if name not in served:
                self.world.violate(f"{name} cannot be had any more")
        self.world_is_at_rest()
        return served

    def close(self) -> None:
        """Close the scheduler; then nothing may be held."""
        self.scheduler.close("5s")
        check_scheduler(self.scheduler)
        books = self.scheduler.debug_state()
        left = {
            "tickets": len(books.requests), "runners": len(books.snapshot.runners),
            "requests": len(books.snapshot.queue) + len(books.snapshot.held),
            "allocated_bytes": self.world.allocated_bytes,
            "locks": len([path for path in self.locks.glob("*") if _is_held(path)]),
        }  # fmt: skip
        if any(left.values()):
            self.world.violate(f"left over: {left}")

    # -- the report ---------------------------------------------------------------------------------------------------

    @property
    def leases(self) -> int:
        return sum(client.leases for client in self.clients)

    def progress(self, elapsed_s: float) -> str:
        """Return a line of progress."""
        mib = self.rests[-1].resident_bytes / MIB if self.rests else 0
        unexpected = sum(len(client.unexpected) for client in self.clients)
        return (
            f"{elapsed_s:6.0f} s  {self.leases:>11,} leases  {self.leases / elapsed_s:>8,.0f}/s  "
            f"{self.world.faults.total():>7,} faults  {unexpected} unexpected  {mib:5.0f} MiB at rest"
        )

    def report(self, seconds: float, served: set[str]) -> dict[str, Any]:
        """Return the report, in names and numbers."""
        waits = Waits.of(client.waits for client in self.clients)
        errors = sum((client.errors for client in self.clients), Counter[str]())
        world = self.world
        faults = {
            kind: {"injected": count, "survived": count if world.victims[kind] <= served else 0}
            for kind, count in sorted(world.faults.items())
        }
        growth = self.rests[0].growth(self.rests[-1]) if self.rests else {}
        if growth.get("grown"):
            world.violate(f"memory has grown: {growth}")
        unexpected = [text for client in self.clients for text in client.unexpected]
        return {
            "passed": not world.violations and not unexpected,
            "seconds": round(seconds, 1), "threads": len(self.clients), "leases": self.leases,
            "leases_per_second": round(self.leases / seconds), "loads": world.loads,
            "warm_wait_us": {"p50": waits.percentile_us(50), "p99": waits.percentile_us(99)},
            "faults": faults, "errors": dict(sorted(errors.items())), "memory": growth,
            "idle_clients": [client.name for client in self.clients if not client.turns],
            "violations": world.violations[:20], "unexpected": unexpected[:20],
        }  # fmt: skip


def soak(seconds: float, seed: int, folder: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Return the report of one soak; `passed` is whether everything was as it must be.

    `seed` draws the requests and faults; the order in which threads come to them is the system's.
    """
    logger, level = logging.getLogger("loadmaster"), logging.getLogger("loadmaster").level
    logger.setLevel(logging.CRITICAL)  # faults are warned of by the thousand
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # leases are forgotten on purpose
            return _soak(seconds, seed, folder, say)
    finally:
        logger.setLevel(level)


def _soak(seconds: float, seed: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    served: set[str] = set()
    one = None
    begin = time.monotonic()
    taken = seconds
    try:
        with no_leaks():
            one = Soak(seed, folder)
            try:
                begin = time.monotonic()
                one.run(seconds, say)
                taken = time.monotonic() - begin
                served = one.recover()
            finally:
                one.close()
    except AssertionError as error:
        if one is None:
            raise
        one.world.violate(str(error))
    return one.report(taken, served)


def _shorten_back_off(core: Core) -> None:
    """Shorten the back-off, because most requests of a soak would be refused otherwise."""
    core._state.config = replace(core._state.config, back_off_s=0.05, back_off_limit_s=0.5)


def _is_held(path: Path) -> bool:
    """Return whether a process holds a lock file."""
    try:
        with filelock.FileLock(path, blocking=False):
            return False
    except filelock.Timeout:
        return True
