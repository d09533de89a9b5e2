"""The environment of a simulation: clients, processes, devices and files on virtual time, with their faults.

The environment is told the commands of the core, and answers with events, each at its time. An event may be late by
then: the environment does not hold it back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from random import Random

from fsm.domain.devices import HOST, DeviceId, DeviceSample
from fsm.domain.options import Options
from fsm.machine.request import ModelId, Purpose, RequestId
from fsm.machine.runner import RunnerId
from fsm.messages.commands import (
    Claim,
    Command,
    Finished,
    Grant,
    Inspect,
    Launch,
    NotifyContention,
    PersistMeasurement,
    Prefetch,
    Reject,
    ReleaseClaim,
    RevokeLease,
    Sample,
    Stop,
)
from fsm.messages.events import (
    Acquire,
    Cancel,
    ClaimContended,
    ClaimGranted,
    Close,
    Configure,
    ContextFilled,
    Event,
    Exited,
    Expire,
    FilesReplaced,
    Inspected,
    Loaded,
    OutOfMemory,
    Pin,
    Progress,
    Release,
    Resident,
    Sampled,
    Unpin,
    Unresponsive,
)
from fsm.messages.reasons import NoAnswer
from fsm.messages.refusals import InvalidModelRefusal, ModelNotFoundRefusal
from fsm.sizing.footprint import Footprint
from fsm.sizing.model_profile import ModelProfile
from fsm.verification.declared_model import profile_of
from fsm.verification.sim_config import INTEGRATED, Model, SimConfig, draw_model

Thunk = Callable[[], Event | None]

SLOWER = 30  # a slow load takes so many times as long
LONGER = 20  # a forgotten lease is held so many times as long
LIFE_S = 60.0  # how long a process serves before its fault happens, on average
NESTED = 16  # one request of so many is of a caller that keeps all leases there are
LONG_S = 1000.0  # the latest end of a process that is stuck
PROMPTS_S = 3.0  # what a runner's prompts take to be had again, at most six times as much
LOST_S = 5000.0  # how long lost memory is missing
CHANGES_S = 15.0  # between two changes of a device, on average
CRASHED, KILLED = -11, -9
NO_ANSWER = NoAnswer(10.0)

# What may come once more. An Acquire is not: its id would be used again once it is over.
REPEATABLE = frozenset(
    (
        Cancel, Release, Inspected, Progress, Loaded, ContextFilled, OutOfMemory, FilesReplaced, Unresponsive,
        Exited, Sampled, ClaimContended, ClaimGranted, Close,
    )
)  # fmt: skip


@dataclass(slots=True, eq=False)
class Process:
    """A process that was launched and has not ended."""

    launch: Launch
    takes: dict[DeviceId, int]  # bytes, once it is loaded
    begun: float
    load_s: float  # infinite: it hangs
    loaded: bool = False

    def resident(self, now: float) -> Resident:
        """Return what the process occupies: more and more while it loads."""
        if self.loaded:
            return tuple(self.takes.items())
        part = min(1.0, (now - self.begun) / self.load_s)
        return tuple((device, int(size * part)) for device, size in self.takes.items())


@dataclass(slots=True)
class Ghost:
    """Memory of a process that has ended, which the devices do not show as free yet."""

    until: float
    amounts: dict[DeviceId, int]


@dataclass(slots=True)
class SimEnvironment:
    """Everything around a core; `heap` is never empty."""

    config: SimConfig
    draw: Random
    now: float = 0.0
    heap: list[tuple[float, int, Thunk]] = field(default_factory=list)
    processes: dict[RunnerId, Process] = field(default_factory=dict)
    files: dict[ModelId, Model] = field(default_factory=dict)
    ghosts: list[Ghost] = field(default_factory=list)
    strangers: dict[DeviceId, int] = field(default_factory=dict)
    capacities: dict[DeviceId, int] = field(default_factory=dict)
    missing: set[DeviceId] = field(default_factory=set)
    last: dict[DeviceId, DeviceSample] = field(default_factory=dict)  # as they were read last
    asked: dict[RequestId, Purpose] = field(default_factory=dict)  # until refused or given back
    held: dict[RequestId, None] = field(default_factory=dict)  # granted, until lost or given back
    requests: int = 0
    preloads: int = 0  # granted
    launched: int = 0  # the last runner
    wanted: int = 0  # the last Sample that was asked for
    posted_at: float = 0.0  # readings come in the order in which they were begun
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def begin(self) -> None:
        """Have the devices read, and clients come."""
        self.files.update(self.config.models)
        self.capacities.update((device.id, device.capacity_bytes) for device in self.config.devices)
        self.after(0.0, lambda: self._sampled(0))
        self.after(0.01, self._client)
        self.after(self.config.look_s, self._look)
        self.after(CHANGES_S, self._change_devices)

    def after(self, delay_s: float, thunk: Thunk) -> None:
        """Have `thunk` called later."""
        heappush(self.heap, (self.now + delay_s, next(self._numbers), thunk))

    def next_at(self) -> float:
        """Return when the next event comes."""
        return self.heap[0][0]

    def next_event(self) -> Event | None:
        """Let the next thing happen; return the event that the core is told, if any."""
        at, _, thunk = heappop(self.heap)
        self.now = max(self.now, at)
        event = thunk()
        if event is not None and type(event) in REPEATABLE and self._happens(self.config.faults.duplicate):
            delay_s = 0.0 if isinstance(event, Sampled) else self._about(self.draw.choice((0.1, 5.0, 100.0)))
            self.after(delay_s, lambda: event)
        return event

    def perform(self, command: Command) -> None:
        """Carry out a command of the core; the events that follow from it come later."""
        match command:
            case Grant(id, runner):
                self._granted(id)
            case Reject(id) | RevokeLease(id):
                self.asked.pop(id, None)
                self.held.pop(id, None)
            case Launch():
                self._launch(command)
            case Stop(runner):
                late = self._happens(self.config.faults.stuck)
                self.after(self._about(LONG_S / 2 if late else 0.3), lambda: self._exit(runner, 0))
            case Sample(number):
                self.wanted = number
                self.after(self._about(0.05), lambda: self._read(number))
            case Inspect(model, options):
                self.after(self._about(0.05), lambda: self._inspect(model, options))
            case Claim(number):
                self._claim(number)
            case NotifyContention(_, requests):
                for id in requests:
                    if self.draw.random() < 0.3:
                        self.after(self._about(0.1), lambda id=id: self._give_back(id))  # type: ignore[misc]  # binds now
            case ReleaseClaim() | Prefetch() | PersistMeasurement() | Finished():
                pass

    def _happens(self, rate: float) -> bool:
        return rate > 0.0 and self.draw.random() < rate

    def _about(self, mean_s: float) -> float:
        return mean_s * 2.0 * self.draw.random()

    # -- clients ------------------------------------------------------------------------------------------------------

    def _client(self) -> Event | None:
        """A client asks for a model, or meddles."""
        faults = self.config.faults
        self.after(self._about(self.config.arrival_s), self._client)
        if self._happens(faults.floods / 10):
            for _ in range(self.draw.randrange(5, 40)):
                self.after(self._about(0.01), self._ask)
        if self._happens(faults.meddles / 4):
            return self._meddle()
        if self._happens(faults.closes / 100):
            return Close(self.draw.choice((0.0, 5.0, 30.0)))
        return self._ask()

    def _ask(self) -> Event:
        config, draw = self.config, self.draw
        self.requests += 1
        id = RequestId(self.requests)
        spec = config.specs[int(len(config.specs) * draw.random() ** 2)]
        self.asked[id] = spec.purpose
        if self._happens(config.faults.cancels):
            self.after(self._about(draw.choice((0.01, 1.0, 60.0))), lambda: self._leave(id))
        most = config.max_leases.get(spec.model)
        kept = tuple(self.held) if self.requests % NESTED == 0 else ()  # its caller holds leases meanwhile
        event = Acquire(id, spec, draw.choice(config.keep_alives_s), draw.choice(config.timeouts_s), most, kept, kept)
        if self._happens(config.faults.duplicate):
            self.after(self._about(1.0), lambda: event if id in self.asked else None)
        return event

    def _granted(self, id: RequestId) -> None:
        if self.asked[id] is Purpose.preload:
            del self.asked[id]
            self.preloads += 1
            return
        self.held[id] = None
        faults = self.config.faults
        hold_s = self._about(self.config.hold_s) * (LONGER if self._happens(faults.forgets) else 1)
        self.after(hold_s, lambda: self._give_back(id))
        if self._happens(faults.twice):
            self.after(hold_s + self._about(1.0), lambda: self._give_back(id))

    def _give_back(self, id: RequestId) -> Event:
        self.asked.pop(id, None)
        self.held.pop(id, None)
        return Release(id)

    def _leave(self, id: RequestId) -> Event:
        self.asked.pop(id, None)
        self.held.pop(id, None)
        return Cancel(id)

    def _meddle(self) -> Event:
        draw = self.draw
        model = draw.choice(self.config.models)[0]
        match draw.randrange(6):
            case 0:
                self.after(self._about(30.0), lambda: Unpin(model))
                return Pin(model)
            case 1:
                keep_alive_s = draw.choice((None, None, 0.0, 20.0))
                limited = (None, True, False)[self.requests % 3]
                return Configure(draw.choice((None, 2, 9)), draw.choice((None, 0, 1, 3)), keep_alive_s, limited)
            case 2 | 3:
                return self._stray()
            case _:
                return Expire(model)

    def _stray(self) -> Event:
        """Return an unexpected event of one of the last runners."""
        id = RunnerId(max(1, self.launched - self.draw.randrange(4)))
        kinds = (Progress(id), ContextFilled(id), OutOfMemory(id), FilesReplaced(id), Unresponsive(id, NO_ANSWER))
        return self.draw.choice(kinds)

    # -- processes ----------------------------------------------------------------------------------------------------

    def _launch(self, launch: Launch) -> None:
        faults, id = self.config.faults, launch.runner
        self.launched = id
        load_s = self._about(self.config.load_s) + 0.01
        part = 1.0 + self.draw.random() / 4 if self._happens(faults.swollen) else 0.7 + 0.3 * self.draw.random()
        takes = {device: int(size * part) for device, size in launch.placement.bytes}
        process = self.processes[id] = Process(launch, takes, self.now, load_s)
        if self._happens(faults.slow_load):
            process.load_s *= SLOWER
            self.after(10.0, lambda: self._progress(process))
        if self._happens(faults.hung_load):
            process.load_s = float("inf")
            if self.draw.random() < 0.3:
                self.after(self._about(10.0), lambda: Unresponsive(id, NO_ANSWER))
        elif self._happens(faults.failed_load):
            code = self.draw.choice((1, None))
            self.after(process.load_s, lambda: self._exit(id, code))
        elif self._happens(faults.full_load):
            if self.draw.random() < 0.5:
                self.after(process.load_s / 2, lambda: OutOfMemory(id))
            self.after(process.load_s, lambda: self._exit(id, KILLED, full=True))
        else:
            self.after(process.load_s, lambda: self._loaded(process))

    def _progress(self, process: Process) -> Event | None:
        id = process.launch.runner
        if (
            process.loaded or id not in self.processes or process.load_s == float("inf")
        ):  # a process that hangs shows nothing
            return None
        self.after(10.0, lambda: self._progress(process))
        return Progress(id)

    def _loaded(self, process: Process) -> Event | None:
        id, faults, draw = process.launch.runner, self.config.faults, self.draw
        if id not in self.processes:
            return None
        process.loaded = True
        if self._happens(faults.crash):
            self.after(self._about(LIFE_S), lambda: self._exit(id, CRASHED))
        if self._happens(faults.hang):
            self.after(self._about(LIFE_S), lambda: self._said(Unresponsive(id, NO_ANSWER)))
        if self._happens(faults.full):
            self.after(self._about(LIFE_S), lambda: self._said(OutOfMemory(id)))
        if draw.random() < 0.5:
            to_come = (
                tuple((device, size // 8) for device, size in process.takes.items()) if draw.random() < 0.5 else ()
            )
            self.after(self._about(20.0), lambda: self._said(ContextFilled(id, to_come)))
        told = process.launch.options.num_ctx
        context = told // 2 if told is not None and draw.random() < 0.05 else None
        resident = tuple(process.takes.items()) if draw.random() < 0.8 else ()
        mapped = int(process.takes.get(HOST, 0) * draw.random() / 2) if resident else 0
        named = process.launch.options.flash_attention  # else llama.cpp chooses, and may report it
        flash_attention = (None, True, False)[id % 3] if named is None else None
        return Loaded(id, context, resident, mapped, flash_attention=flash_attention)

    def _said(self, event: Unresponsive | OutOfMemory | ContextFilled) -> Event | None:
        return event if event.runner in self.processes else None

    def _exit(self, id: RunnerId, code: int | None, *, full: bool = False) -> Event | None:
        process = self.processes.pop(id, None)
        if process is None:
            return None
        amounts = dict(process.resident(self.now))
        if self._happens(self.config.faults.memory_late):
            self.ghosts.append(Ghost(self.now + self._about(5.0), amounts))
        if self._happens(self.config.faults.memory_lost / 4):
            self.ghosts.append(Ghost(self.now + LOST_S, amounts))
        return Exited(id, code, "", full)

    # -- files and other programs -------------------------------------------------------------------------------------

    def _inspect(self, model: ModelId, asked: tuple[Options, ...]) -> Event | None:
        """Have the devices read, and then the file."""
        faults = self.config.faults
        outcome: ModelProfile | Footprint | ModelNotFoundRefusal | InvalidModelRefusal
        if self._happens(faults.changed / 4):
            self.files[model] = draw_model(self.draw, self.config.devices)
        outcome = profile_of(self.files[model], asked, self.config.defaults)
        if self._happens(faults.bad / 2):
            outcome = InvalidModelRefusal(model, "cut short", 4)
        if self._happens(faults.gone / 2):
            outcome = ModelNotFoundRefusal(model)
        self._read(self.wanted)
        inspected = Inspected(model, outcome)
        self.after(self.posted_at - self.now, lambda: inspected)
        return None

    def _claim(self, number: int) -> None:
        faults = self.config.faults
        wait_s = self._about(0.1)
        if self._happens(faults.contended):
            self.after(0.01, lambda: ClaimContended(number))
            wait_s = self._about(40.0)
        if not self._happens(faults.unclaimable):
            self.after(wait_s, lambda: self._claimed(number))

    def _claimed(self, number: int) -> Event | None:
        self._read(self.wanted)
        self.after(self.posted_at - self.now, lambda: ClaimGranted(number))
        return None

    # -- devices ------------------------------------------------------------------------------------------------------

    def _look(self) -> Event | None:
        self.after(self.config.look_s, self._look)
        self._read(self.wanted)
        return None

    def _read(self, number: int) -> None:
        """Read the devices now; the core is told a moment later, in the order of the readings."""
        sampled = self._sampled(number)
        self.posted_at = max(self.posted_at, self.now + self._about(0.02))
        self.after(self.posted_at - self.now, lambda: sampled)

    def _sampled(self, number: int) -> Sampled:
        now = self.now
        if self.ghosts:
            self.ghosts = [ghost for ghost in self.ghosts if ghost.until > now]
        used = dict(self.strangers)
        resident = [(id, process.resident(now)) for id, process in self.processes.items()]
        for amounts in (*(held for _, held in resident), *(tuple(ghost.amounts.items()) for ghost in self.ghosts)):
            for device, size in amounts:
                used[device] = used.get(device, 0) + size
        devices = []
        for one in self.config.devices:
            if one.id in self.missing:
                continue
            if one.id in self.last and self._happens(self.config.faults.stale):
                devices.append(replace(self.last[one.id], fresh=False))
                continue
            capacity = self.capacities[one.memory]
            free = max(0, capacity - used.get(one.memory, 0))
            self.last[one.id] = sample = DeviceSample(
                one.id, one.kind, one.name, capacity, free, one.integrated, one.instance, cores=one.cores
            )
            devices.append(sample)
        measured = tuple(entry for entry in resident if entry[1])
        mapped = tuple((id, held[0][1] // 3) for id, held in measured if held[0][0] == HOST)
        prompts = tuple((id, PROMPTS_S * (id % 7)) for id, _ in measured if self.config.limits.keeps_prompts)
        return Sampled(tuple(devices), measured, max(number, 0), mapped, prompts)

    def _change_devices(self) -> None:
        """Other programs come and go, and so do devices."""
        self.after(self._about(CHANGES_S), self._change_devices)
        faults, draw = self.config.faults, self.draw
        device = draw.choice(self.config.devices)
        if self._happens(faults.strangers):
            self.strangers[device.id] = int(device.capacity_bytes * draw.random())
        elif draw.random() < 0.5:
            self.strangers.pop(device.id, None)
        if device.id in self.missing:
            self.missing.remove(device.id)
        elif device.id != HOST and self._happens(faults.vanishing / 2):
            self.missing.add(device.id)
        if device.id != INTEGRATED and self._happens(faults.shrinking / 2):
            self.capacities[device.id] = int(device.capacity_bytes * (0.3 + 0.7 * draw.random()))
        elif draw.random() < 0.5:
            self.capacities[device.id] = device.capacity_bytes
