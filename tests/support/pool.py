"""The core under test: events in, commands out, on simulated time, in a simulated environment of devices and processes.

    pool = a_pool(capacity="8GiB").ready("a", lease=1)
    pool.feed(acquire("b", request=2))            # no room: "a" will be evicted
    pool.advance("120s")                          # the bound on b's wait: "a" drains
    assert pool.feed(acquire("a", request=3)) == []
    assert pool.feed(release(lease=1)) == [Stop(runner=1)]

Models are objects of declared size (6 GiB unless said otherwise) that are inspected at once; a load and a stop take
until the test says `loaded` and `exited`. In every test every property of the state, of the transition and of the trace
(docs/invariants.md) is asked after every step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from fsm.core import Core
from fsm.domain.devices import HOST, DeviceId, DeviceSample, Placement
from fsm.domain.options import Options
from fsm.eviction.policies import EvictionPolicy
from fsm.machine.request import Purpose, RequestSpec
from fsm.machine.runner import STOPPING, Runner, RunnerId, RunnerState
from fsm.messages.commands import Claim, Command, Grant, Inspect, Launch, Reject, ReleaseClaim, Sample, Stop
from fsm.messages.decision_log import Entry
from fsm.messages.events import (
    Acquire,
    Cancel,
    ClaimGranted,
    Close,
    ContextFilled,
    Event,
    Exited,
    Expire,
    Inspected,
    Loaded,
    OutOfMemory,
    Pin,
    Progress,
    Release,
    Sampled,
    Tick,
    Unpin,
    Unresponsive,
)
from fsm.messages.reasons import NoAnswer, WaitReason
from fsm.messages.refusals import Refusal
from fsm.planning.plan import Plan
from fsm.sizing.footprint import Footprint
from fsm.sizing.load_history import NOTHING, LoadHistory
from fsm.sizing.model_profile import ModelProfile
from fsm.state.core_config import CoreConfig
from fsm.verification.environment import IdHighWater
from fsm.verification.state_invariants import check_state
from fsm.verification.trace_auditor import TraceAuditor
from fsm.verification.transition_invariants import check_step
from scheduler.engines.llama_profile import profile_of
from scheduler.models.model_info import ModelInfo

START = 1000.0  # seconds; not 0, so that a time that was not set shows
_SCALES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def amount(text: str | int) -> int:
    """Return bytes: "8GiB", or a number of them."""
    return int(_scaled(text))


def seconds(text: str | float) -> float:
    """Return seconds: "120s", "5m", "forever", or a number of them."""
    return math.inf if text == "forever" else _scaled(text)


def _scaled(text: str | float) -> float:
    if not isinstance(text, str):
        return text
    match = re.fullmatch(r"([0-9.]+)(\w+)", text)
    assert match is not None, text
    return float(match[1]) * _SCALES[match[2]]


# -- events -----------------------------------------------------------------------------------------------------------


def acquire(
    model: str,
    request: int,
    *,
    keep_alive: str | float | None = None,
    timeout: str | float | None = None,
    priority: int = 0,
    purpose: Purpose = Purpose.lease,
    **options: Any,
) -> Acquire:
    """Return a request for a lease of `model`; further arguments are load-time options."""
    want = RequestSpec(model, Options(**options), purpose, priority)
    keep_alive_s = None if keep_alive is None else seconds(keep_alive)
    return Acquire(request, want, keep_alive_s, None if timeout is None else seconds(timeout))


def preload(model: str, request: int, **how: Any) -> Acquire:
    """Return a request that loads `model` and takes no lease."""
    return acquire(model, request, purpose=Purpose.preload, **how)


def memory(request: int, *, priority: int = 0, **sizes: str) -> Acquire:
    """Return a request for memory of the program's own: `cpu="2GiB", gpu0="1GiB"`."""
    amounts = tuple((DeviceId(device), amount(size)) for device, size in sizes.items())
    return Acquire(request, RequestSpec("", Options(), Purpose.memory, priority, amounts))


def release(lease: int) -> Release:
    return Release(lease)


def cancel(request: int) -> Cancel:
    return Cancel(request)


def expire(model: str) -> Expire:
    return Expire(model)


def pin(model: str) -> Pin:
    return Pin(model)


def unpin(model: str) -> Unpin:
    return Unpin(model)


def loaded(runner: int, num_ctx: int | None = None) -> Loaded:
    """Return the event that a runner serves; the environment fills in what it occupies."""
    return Loaded(runner, num_ctx)


def filled(runner: int, **to_come: str) -> ContextFilled:
    """Return the event that a context of a runner was filled; `cpu="64MiB"` may still be to come."""
    return ContextFilled(runner, tuple((DeviceId(device), amount(size)) for device, size in to_come.items()))


def progress(runner: int) -> Progress:
    return Progress(runner)


def exited(runner: int, code: int | None = 0, reason: str = "", *, out_of_memory: bool = False) -> Exited:
    return Exited(runner, code, reason, out_of_memory)


def out_of_memory(runner: int) -> OutOfMemory:
    return OutOfMemory(runner)


def unresponsive(runner: int) -> Unresponsive:
    return Unresponsive(runner, NoAnswer(10.0))


def close(timeout: str | float = "30s") -> Close:
    return Close(seconds(timeout))


def layered(layers: int, each: str, *, output: str = "0B", host: str = "0B", compute: str = "0B") -> Footprint:
    """Return the footprint of a model of so many layers, each so large."""
    return Footprint(
        (amount(each),) * layers, (0,) * layers, amount(output), 0, amount(compute), process_bytes=amount(host)
    )


# -- the core under test ----------------------------------------------------------------------------------------------


class PoolUnderTest:
    """A core, its time, and an environment that answers it; every method feeds events alone."""

    def __init__(
        self,
        core: Core,
        capacity: int,
        gpus: Sequence[int],
        *,
        each: int,
        sizes: Mapping[str, int],
        inspects: bool,
        samples: bool,
        shares: bool,
        integrated: bool,
        defaults: Options,
        larger_contexts: bool,
    ) -> None:
        self.core = core
        self.now = START
        self.each = each  # bytes of a model without a declaration
        self.outcomes: dict[str, ModelInfo | Footprint | Refusal] = {}  # what an inspection finds
        for model, size in sizes.items():
            self.declare(model, size)
        self.inspects = inspects  # every Inspect is answered at once
        self.samples = samples  # every Sample is answered at once
        self.shares = shares  # every Claim is granted at once
        self.capacities = {HOST: capacity} | {DeviceId(f"gpu{i}"): size for i, size in enumerate(gpus)}
        self.integrated = integrated
        self.defaults = defaults  # of the engine
        self.larger_contexts = larger_contexts
        self.cores = 0  # of the host; 0: unknown
        self.strangers: dict[DeviceId, int] = {}  # bytes by device that other programs hold
        self.occupied: dict[int, dict[DeviceId, int]] = {}  # bytes by device of each process that has loaded
        self.mapped: dict[int, int] = {}  # bytes of the host by process that are pages of its file
        self.commands: list[Command] = []  # every command of the core
        self.answers: dict[int, Command] = {}  # by request
        self.asked: set[int] = set()  # requests
        self.auditor = TraceAuditor(limits=core._state.config)
        self.past = IdHighWater()
        self.purposes: dict[int, str] = {}  # by request, for tests that need it
        self.launches: dict[int, Launch] = {}  # by runner
        self.stops: set[int] = set()
        self.claims: dict[int, Claim] = {}  # by number, from Claim to ReleaseClaim
        self.known: dict[str, LoadHistory] = {}  # what a store knows of models
        self._next_request = 1001  # ids of requests that a test does not number

    # -- events and time ----------------------------------------------------------------------------------------------

    def feed(self, *events: Event) -> list[Command]:
        """Step through `events` at the present moment; return the commands that the environment does not answer."""
        left = []
        for event in events:
            left += self._step(event)
        return left

    def advance(self, duration: str | float) -> list[Command]:
        """Let time pass, with a Tick at each deadline on the way."""
        left = []
        until = self.now + seconds(duration)
        while (deadline := self.core.deadline()) <= until:
            self.now = max(self.now, deadline)
            left += self._step(Tick())
        self.now = until
        return left

    def sample(self, number: int | None = None) -> Sampled:
        """Return what a reading of all devices would find now."""
        free = dict(self.capacities)
        for held in (self.strangers, *self.occupied.values()):
            for device, size in held.items():
                free[device] -= size
        mapped = {runner: size for runner, size in self.mapped.items() if runner in self.occupied}
        free[HOST] += sum(mapped.values())  # page cache
        devices = tuple(
            DeviceSample(HOST, "cpu", HOST, size, max(0, free[HOST]), cores=self.cores)
            if id == HOST
            else DeviceSample(id, "gpu", id, size, max(0, free[id]), self.integrated)
            for id, size in self.capacities.items()
        )
        resident = tuple((runner, tuple(held.items())) for runner, held in self.occupied.items())
        number = self.core._state.samples if number is None else number
        return Sampled(devices, resident, number, tuple(mapped.items()))

    def _step(self, event: Event) -> list[Command]:
        match event:
            case Acquire():
                self.asked.add(event.request)
            case Loaded() if event.runner in self.launches:
                held = dict(event.resident) or dict(self.launches[event.runner].placement.bytes)
                self.occupied[event.runner] = held
                event = replace(event, resident=tuple(held.items()))
            case Exited():
                self.occupied.pop(event.runner, None)
            case _:
                pass
        commands = self._checked_step(event)
        for command in commands:
            self._record(command)
        left, replies = [], []
        for command in commands:
            if isinstance(command, Inspect) and self.inspects:
                found = self.inspection(command.model, command.options)
                replies += [self.sample(None if self.samples else 0), found]
            elif isinstance(command, Sample) and self.samples:
                replies.append(self.sample())
            elif isinstance(command, Claim) and self.shares:
                replies += [self.sample(None if self.samples else 0), ClaimGranted(command.number)]
            else:
                left.append(command)
        for reply in replies:
            left += self._step(reply)
        return left

    def _checked_step(self, event: Event) -> list[Command]:
        """Have the core take in an event, and ask every property; what a test reads along is kept for it."""
        core, before = self.core, self.core.copy()
        decision_log, plans = core.decision_log, core.plans
        entries: list[Entry] = []
        planned: list[Plan] = []
        core.decision_log, core.plans = entries, planned
        commands = core.step(self.now, event)
        check_state(core)
        check_step(before, event, commands, core, self.past)
        self.auditor.step(self.now, event, commands, entries, core._state.queued)
        self.past = self.past.after(event, commands)
        core.decision_log, core.plans = decision_log, plans
        if decision_log is not None:
            decision_log += entries
        if plans is not None:
            plans += planned
        return commands

    def _record(self, command: Command) -> None:
        self.commands.append(command)
        match command:
            case Grant() | Reject():
                self.answers[command.request] = command
            case Launch():
                self.launches[command.runner] = command
            case Stop():
                self.stops.add(command.runner)
            case Claim():
                self.claims[command.number] = command
            case ReleaseClaim():
                del self.claims[command.number]
            case _:
                pass

    # -- models -------------------------------------------------------------------------------------------------------

    def declare(self, model: str, size: str | int | Footprint | ModelInfo | Refusal) -> Self:
        """Set what an inspection of `model` finds: bytes of host memory, a model's metadata, or a refusal."""
        if isinstance(size, str | int):
            size = Footprint(fixed=((HOST, amount(size)),))
        self.outcomes[model] = size
        return self

    def outcome(self, model: str) -> ModelInfo | Footprint | Refusal:
        return self.outcomes.get(model) or Footprint(fixed=((HOST, self.each),))

    def inspection(self, model: str, asked: Sequence[Options] | None = None) -> Inspected:
        """Return the end of an inspection that was ordered for these options, or else for those of waiting requests."""
        asked = self.core._state.options_asked_of(model) if asked is None else asked
        return Inspected(model, self.inspect(model, asked), self.known.get(model, NOTHING))

    def inspect(self, model: str, asked: Sequence[Options]) -> ModelProfile | Footprint | Refusal:
        """Return what an inspection of a model finds that was ordered for these options."""
        outcome = self.outcome(model)
        if isinstance(outcome, ModelInfo):
            return profile_of(outcome, asked, self.defaults, larger_contexts=self.larger_contexts)
        return outcome

    def launch(self, runner: int, model: str) -> Launch:
        """Return the Launch of a model of declared size that is requested without options."""
        footprint = self.outcome(model)
        assert isinstance(footprint, Footprint)
        return Launch(runner, model, Options(), Placement(footprint.fixed))

    # -- short cuts ---------------------------------------------------------------------------------------------------

    def request_id(self) -> int:
        """Return an id that no request has used."""
        self._next_request += 1
        return self._next_request - 1

    def loading(self, model: str, request: int | None = None, **how: Any) -> Self:
        """Launch `model` for a request."""
        self.feed(acquire(model, request or self.request_id(), **how))
        assert self.state(model) is RunnerState.loading, f"{model} is {self.state(model)}"
        return self

    def ready(self, model: str, lease: int | None = None, **how: Any) -> Self:
        """Load and lease `model`."""
        lease = lease or self.request_id()
        if self.feed(acquire(model, lease, **how)) != [Grant(lease, self.runner(model))]:
            self.feed(loaded(self.runner(model)))
        assert self.core._state.requests[lease].runner == self.runner(model)
        return self

    def idle(self, model: str, **how: Any) -> Self:
        """Load `model`, lease it and release the lease."""
        lease = self.request_id()
        self.ready(model, lease, **how).feed(release(lease))
        assert self.state(model) is RunnerState.idle, f"{model} is {self.state(model)}"
        return self

    def expiring(self, model: str, lease: int | None = None, **how: Any) -> Self:
        """Drain `model` where a lease is named; else stop it, with its process not gone yet."""
        self.ready(model, lease, **how) if lease else self.idle(model, **how)
        self.feed(expire(model))
        return self

    # -- what can be seen ---------------------------------------------------------------------------------------------

    def runner(self, model: str) -> RunnerId:
        """Return the latest runner of `model`; 0 where there was none."""
        return RunnerId(max((id for id, launch in self.launches.items() if launch.model == model), default=0))

    def life(self, model: str) -> Runner:
        """Return the core's record of the latest runner of `model`, which is not unloaded."""
        return self.core._state.runners[self.runner(model)]

    def state(self, model: str) -> RunnerState:
        """Return the state of the latest runner of `model`."""
        runner = self.core._state.runners.get(self.runner(model))
        return runner.state if runner else RunnerState.unloaded

    def refusal(self, request: int) -> Any:
        """Return what a request was refused with."""
        answer = self.answers[request]
        assert isinstance(answer, Reject), answer
        return answer.refusal

    def waiting(self) -> list[int]:
        """Return the requests that wait, in order."""
        return [view.request for view in self.core.snapshot().queue]

    def waits_for(self, request: int) -> WaitReason:
        """Return what a request waits for."""
        return next(view.waits_for for view in self.core.snapshot().queue if view.request == request)

    def free(self, device: str = HOST) -> int:
        """Return the bytes that can still be reserved on a device."""
        return self.core._state.ledger.free_bytes(DeviceId(device))

    def settle(self) -> Self:
        """Exit every process that was told to stop, until none is left."""
        runners = self.core._state.runners
        while ending := [id for id, runner in runners.items() if runner.process_state is STOPPING]:
            self.feed(*map(exited, ending))
        return self


def a_pool(
    capacity: str = "8GiB",
    gpus: Sequence[str] = (),
    *,
    each: str = "6GiB",
    sizes: Mapping[str, str] | None = None,
    policy: EvictionPolicy | None = None,
    inspects: bool = True,
    samples: bool = True,
    shares: bool = True,
    integrated: bool = False,
    defaults: Options = Options(),  # noqa: B008  # it is frozen
    auto_context_from_vram: bool = False,
    **limits: Any,
) -> PoolUnderTest:
    """Return an empty core with a host of `capacity` and `gpus`, whose devices have been read once."""
    pool = PoolUnderTest(
        Core(CoreConfig(**limits), policy),
        amount(capacity),
        [amount(size) for size in gpus],
        each=amount(each),
        sizes={model: amount(size) for model, size in (sizes or {}).items()},
        inspects=inspects,
        samples=samples,
        shares=shares,
        integrated=integrated,
        defaults=defaults,
        larger_contexts=auto_context_from_vram,
    )
    pool.feed(pool.sample())
    return pool


def refused(commands: Sequence[Command]) -> dict[int, type[Refusal]]:
    """Return the type of refusal of each request that `commands` refuse."""
    return {command.request: type(command.refusal) for command in commands if isinstance(command, Reject)}


def granted(commands: Sequence[Command]) -> list[int]:
    """Return the requests that `commands` grant, in order."""
    return [command.request for command in commands if isinstance(command, Grant)]


def launched(commands: Sequence[Command]) -> list[str]:
    """Return the models that `commands` launch, in order."""
    return [command.model for command in commands if isinstance(command, Launch)]


def stopped(commands: Sequence[Command]) -> list[int]:
    """Return the runners that `commands` stop, in order."""
    return [command.runner for command in commands if isinstance(command, Stop)]
