"""The troubles: a killer of children, a client that changes limits, and slow readers of events."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from scheduler import Gap, QueueFull
from tests.tools.soak.clients import LIMIT_S, Client
from tests.tools.soak.objects import MIB

KILL_EVERY_S = 1.0
MOST_QUEUE = 512


class Killer(Client):
    """Kills children or stops them with SIGSTOP, and waits until the scheduler has noticed."""

    def turn(self) -> None:
        time.sleep(self.random.uniform(0, 2 * KILL_EVERY_S))
        alive = [runner for runner in self.scheduler.status().runners if runner.pid and runner.state != "expiring"]
        if not alive or self.gate.stopped:
            return
        victim = self.random.choice(alive)
        stop = self.random.random() < 0.25
        assert victim.pid is not None
        try:
            os.kill(victim.pid, signal.SIGSTOP if stop else signal.SIGKILL)
        except ProcessLookupError:
            return
        while_doing = "while it loaded" if victim.state == "loading" else "while it served"
        self.world.fault(f"child {'stopped' if stop else 'killed'} {while_doing}", victim.model)
        end = time.monotonic() + LIMIT_S
        while any(runner.id == victim.id for runner in self.scheduler.status().runners):
            if time.monotonic() > end:
                return self.world.violate(f"the death of {victim.model} was not noticed")
            time.sleep(0.02)


class Changer(Client):
    """Changes limits while all clients run, and floods the queue."""

    most_bytes: int
    paths: Sequence[Path]  # a model that takes a while to load

    def turn(self) -> None:
        time.sleep(self.random.uniform(0.1, 0.5))
        self.world.fault("limits changed", "warm-0")
        self.scheduler.configure(
            memory_limit=self.random.choice((self.most_bytes, self.most_bytes - 100 * MIB)),
            max_runners=self.random.choice((10, 14, 20)),
            keep_alive=self.random.choice((0.05, 1, 60)),
        )
        if self.random.random() < 0.1:
            self.flood()

    def flood(self) -> None:
        """Make more requests than may wait: those beyond the limit are refused at once, the others are cancelled."""
        self.world.fault("queue flooded", "warm-0")
        self.scheduler.configure(max_queue=20)
        try:
            futures: list[Future[None]] = [self.scheduler.preload(self.paths[0]) for _ in range(200)]
            waiting = [future for future in futures if not future.cancel()]
            for future in waiting:
                if isinstance(error := future.exception(LIMIT_S), QueueFull):
                    self.errors[type(error).__name__] += 1
        finally:
            self.scheduler.configure(max_queue=MOST_QUEUE)


class Reader(Client):
    """Reads events, and falls behind now and then; a reader that was dropped gets no more events."""

    def turn(self) -> None:
        with self.scheduler.events() as stream:
            for _ in range(500):
                entry = stream.take(0.05)
                if isinstance(entry, Gap):
                    self.world.fault("reader fell behind", "warm-0")
                if not self.gate.is_open:
                    return
                if self.random.random() < 0.002:
                    time.sleep(0.2)
