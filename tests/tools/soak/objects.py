"""The fast stand-in engine: objects that count their memory, and that load slowly, badly or not at all."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from scheduler import PythonModel

MIB = 2**20


class Thing:
    """What a lease gives access to; while a client uses it, it must stay loaded."""

    __slots__ = ("loaded", "name", "users")

    def __init__(self, name: str) -> None:
        self.name = name
        self.loaded = True
        self.users = 0  # guarded by the world's lock


@dataclass(slots=True)
class World:
    """What must hold of all objects together, and the faults that were made."""

    most_bytes: int  # the most that may be allocated
    faulty: bool = True  # loads and unloads fail at random
    lock: threading.Lock = field(default_factory=threading.Lock)  # guards everything below
    random: random.Random = field(default_factory=random.Random)
    allocated_bytes: int = 0  # from the begin of a load to the end of an unload
    peak_bytes: int = 0
    loads: int = 0
    faults: Counter[str] = field(default_factory=Counter)  # by kind
    victims: dict[str, set[str]] = field(default_factory=dict)  # the models that each kind hit
    violations: list[str] = field(default_factory=list)

    def fault(self, kind: str, model: str) -> None:
        """Note a fault of a model."""
        with self.lock:
            self.faults[kind] += 1
            self.victims.setdefault(kind, set()).add(model)

    def chance(self, part: float) -> bool:
        """Return whether a fault is due that comes in such a part of all cases."""
        with self.lock:
            return self.faulty and self.random.random() < part

    def allocate(self, amount_bytes: int) -> None:
        """Take memory, or free it where the amount is below 0."""
        with self.lock:
            self.allocated_bytes += amount_bytes
            self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
            if self.allocated_bytes > self.most_bytes:
                self.violations.append(f"{self.allocated_bytes} bytes are allocated, {self.most_bytes} may be")

    def violate(self, text: str) -> None:
        """Note a violation."""
        with self.lock:
            self.violations.append(text)

    def use(self, thing: object, by: int) -> None:
        """Begin to use a thing, or stop where `by` is -1; the thing must be loaded."""
        if not isinstance(thing, Thing) or not thing.loaded:
            return self.violate(f"{getattr(thing, 'name', thing)} was leased and is not loaded")
        with self.lock:
            thing.users += by
        return None


@dataclass(frozen=True, slots=True)
class Habits:
    """How a type of object behaves; parts of all cases, seconds."""

    size_bytes: int
    load_s: float = 0.0
    unload_s: float = 0.0
    load_fails: float = 0.0
    out_of_memory: float = 0.0
    unload_fails: float = 0.0
    stalls_s: float = 0.0  # a load may take so long without progress; 0: never
    pin: bool = False


def an_object(world: World, name: str, habits: Habits) -> PythonModel:
    """Return a model with these habits."""

    def load() -> Thing:
        world.allocate(habits.size_bytes)
        try:
            with world.lock:
                world.loads += 1
            if habits.stalls_s and world.chance(0.02):
                world.fault("load stalled", name)
                time.sleep(habits.stalls_s)
            time.sleep(habits.load_s)
            if habits.load_fails and world.chance(habits.load_fails):
                world.fault("load raised", name)
                raise RuntimeError("no such layer")
            if habits.out_of_memory and world.chance(habits.out_of_memory):
                world.fault("load ran out of memory", name)
                raise MemoryError
        except BaseException:
            world.allocate(-habits.size_bytes)
            raise
        return Thing(name)

    def unload(thing: Thing) -> None:
        try:
            if thing.users:
                world.violate(f"{name} was unloaded in use")
            thing.loaded = False
            time.sleep(habits.unload_s)
            if habits.unload_fails and world.chance(habits.unload_fails):
                world.fault("unload raised", name)
                raise RuntimeError("it does not let go")
        finally:
            world.allocate(-habits.size_bytes)

    return PythonModel(name, load, unload, {"cpu": habits.size_bytes}, pin=habits.pin)


KINDS = {  # how many objects of each type, with their habits; together they take more than there is room for
    "warm": (4, Habits(MIB, pin=True)),
    "steady": (8, Habits(40 * MIB)),
    "small": (8, Habits(8 * MIB)),
    "slow": (3, Habits(30 * MIB, load_s=0.03, unload_s=0.02)),
    "failing": (4, Habits(20 * MIB, load_fails=0.5)),
    "greedy": (3, Habits(60 * MIB, out_of_memory=0.2)),
    "clinging": (3, Habits(20 * MIB, unload_s=0.005, unload_fails=0.5)),
    "stalling": (1, Habits(20 * MIB, stalls_s=7.0)),
}


def objects(world: World) -> dict[str, list[PythonModel]]:
    """Return every model of the stand-in engine, by type."""
    return {
        kind: [an_object(world, f"{kind}-{number}", habits) for number in range(count)]
        for kind, (count, habits) in KINDS.items()
    }
