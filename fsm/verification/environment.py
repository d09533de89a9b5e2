"""The environment of a core in a search: which events may come next, and which come while no fault happens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from fsm.core import Core
from fsm.domain.devices import HOST, Amounts, DeviceSample
from fsm.machine.request import ModelId, RequestId, RequestSpec, RequestState
from fsm.machine.runner import LOADING, RUNNING, STOPPING, Runner, RunnerId
from fsm.messages.commands import Claim, Command, Launch
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
    Sampled,
    Tick,
    Unpin,
    Unresponsive,
)
from fsm.messages.reasons import NoAnswer
from fsm.sizing.footprint import Footprint
from fsm.state.core_config import CoreConfig
from fsm.state.core_state import CoreState
from fsm.state.memory_ledger import Ledger
from fsm.state.model_record import ModelRecord
from fsm.verification.declared_model import DeclaredModel, profile_of

CLOSE_S = 30.0  # how long a Close lets leases last
PROMPTS_S = 0.5  # what a runner's prompts take to be had again, and as much more for each runner before it
AT_ONCE_S = 0.0  # how long one that comes after it does
FAILED, KILLED = 1, -9  # exit statuses of a load that failed, and of one that the kernel ended
NO_ANSWER = NoAnswer(10.0)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What there is, and what may happen; the fewer of each, the more of it can be searched."""

    name: str
    about: str  # in words
    devices: Amounts  # capacities, the host first
    models: tuple[tuple[ModelId, Footprint | DeclaredModel], ...]
    specs: tuple[RequestSpec, ...]  # what may be asked for
    requests: int  # most that are queued or granted at once
    most: int  # states that are enough of it
    limits: CoreConfig = field(default_factory=CoreConfig)
    keep_alives_s: tuple[float | None, ...] = (None,)  # that a request may name
    timeouts_s: tuple[float | None, ...] = (None,)
    out_of_memory: bool = False  # loads may run out of memory, and runners that serve
    hangs: bool = False  # runners may stop answering, and loads show that they are alive
    fills: bool = False  # contexts may be filled, after which what was measured counts
    pins: bool = False
    expires: bool = True  # models may be expired
    closes: bool = True
    replaces: bool = False  # the files of models may be replaced while runners have loaded them
    other_devices: Amounts = ()  # the devices may come to these capacities, and back again
    configures: tuple[Configure, ...] = ()  # limits may be changed like this
    keeps: bool = False  # callers that keep all leases there are may ask for more
    strangers_bytes: int = 0  # of each GPU, that other programs may take while memory is waited for
    gives_back: bool = False  # memory of a GPU may be back before the exit of the process is told


@dataclass(frozen=True, slots=True)
class IdHighWater:
    """The highest number of each kind that was ever in use, remembered outside the core."""

    requests: int = 0
    runners: int = 0
    claims: int = 0

    def after(self, event: Event, commands: list[Command]) -> IdHighWater:
        """Return what is remembered after a step."""
        past = self
        if isinstance(event, Acquire) and event.request > past.requests:
            past = replace(past, requests=event.request)
        for command in commands:
            match command:
                case Launch(runner):
                    past = replace(past, runners=max(past.runners, runner))
                case Claim(number):
                    past = replace(past, claims=max(past.claims, number))
                case _:
                    pass
        return past


def begin(core: Core, scenario: Scenario) -> None:
    """Have a new core read the scenario's devices."""
    core.step(0.0, sampled(core, scenario))


def kinds(scenario: Scenario) -> Mapping[ModelId, object]:
    """Return what each model is to the scenario: models of one kind may be exchanged for one another."""
    return {
        id: (info, frozenset(replace(spec, model=ModelId("")) for spec in scenario.specs if spec.model == id))
        for id, info in scenario.models
    }


def moments(state: CoreState) -> Iterator[float]:
    """Yield every time at which something may become true without an event, past ones too: deadlines and bounds."""
    yield from (at for at, _ in state.timers.items())
    for model in state.models.values():
        yield model.blocked_until
        yield from (one.until for one in model.back_offs.values())
        if model.failures and model.current is not None and model.current.loaded_at is not None:
            yield model.current.loaded_at + state.config.good_life_s


def time_of(core: Core, event: Event) -> float:
    """Return when an event comes: now, or for a Tick at the first moment that is ahead."""
    now = core._state.now
    if not isinstance(event, Tick) or core.plan_due or any(at <= now for at, _ in core._state.timers.items()):
        return now
    return min((at for at in moments(core._state) if now < at < math.inf), default=now)


def enabled_events(core: Core, scenario: Scenario, past: IdHighWater) -> Iterator[Event]:
    """Yield every event that may come next."""
    state = core._state
    yield from _asked(state, scenario, past)
    for request in state.requests.values():
        if request.state is RequestState.granted:
            yield Release(request.id)
        yield Cancel(request.id)  # of a granted request too: the Grant and the Cancel crossed
    for model in state.models.values():
        if model.inspecting:
            yield from _inspections(state, model, scenario)
        if scenario.expires and model.current is not None:
            yield Expire(model.id)
        if scenario.pins:
            yield Unpin(model.id) if model.pinned else Pin(model.id)
    for runner in state.runners.values():
        if runner.process:
            yield from _of_a_process(state, runner, scenario)
    yield from _readings(core, scenario)
    for claim in state.claims.values():
        yield ClaimGranted(claim.number)
        if not claim.contended:
            yield ClaimContended(claim.number)
    if core.plan_due or state.timers.items() or time_of(core, Tick()) > state.now:
        yield Tick()
    yield from scenario.configures
    if scenario.closes:
        yield Close(AT_ONCE_S if state.closing else CLOSE_S)


def stale_events(core: Core, past: IdHighWater) -> Iterator[Event]:
    """Yield late events, about the latest requests, runners and claims that have ended; none changes anything.

    An Acquire repeats a known request, a Release names a request that is over or still queued, a runner's event comes
    after the exit of its process or repeats that it has loaded, and a second Close allows more time than the first.
    """
    state = core._state
    over = next(id for id in range(past.requests, -1, -1) if id not in state.requests)
    yield from (Release(RequestId(over)), Cancel(RequestId(over)))
    known = next(iter(state.requests.values()), None)
    if known is not None:
        yield Acquire(known.id, known.spec)
    for request in state.requests.values():
        if request.state is RequestState.queued:
            yield Release(request.id)
    for runner in state.runners.values():
        if runner.process and runner.loaded_at is not None:
            yield from (_loaded(runner), Progress(runner.id))
    alive = {runner.id for runner in state.runners.values() if runner.process}
    gone = RunnerId(next(id for id in range(past.runners, -1, -1) if id not in alive))
    yield from (Loaded(gone), Progress(gone), ContextFilled(gone), OutOfMemory(gone))
    yield from (FilesReplaced(gone), Unresponsive(gone, NO_ANSWER), Exited(gone, None))
    numbers = {*state.claims, *(runner.claim for runner in state.runners.values() if runner.claim)}
    ended = next(number for number in range(past.claims, -1, -1) if number not in numbers)
    yield from (ClaimGranted(ended), ClaimContended(ended))
    for model in state.models.values():
        if not model.inspecting and model.profile is not None:
            yield Inspected(model.id, model.profile)
        if model.current is None:
            yield Expire(model.id)
    if state.closing:
        yield Close(math.inf)


def fair_next_event(core: Core, scenario: Scenario) -> Event | None:
    """Return the next event while no fault happens and no request comes or is cancelled; None: all is over.

    Leases are released once nothing else is under way, and models are expired once no request waits. While the
    scheduler closes, no claim is granted, no load ends, no lease is released, and time passes for the leases alone.
    """
    state = core._state
    if core.plan_due:
        return Tick()
    for model in state.models.values():
        if model.inspecting:
            return next(_inspections(state, model, scenario))
    if not state.closing:
        for claim in state.claims.values():
            return ClaimGranted(claim.number)
        for runner in state.runners.values():
            if runner.process_state is RUNNING and runner.loaded_at is None:
                return _loaded(runner)
    for runner in state.runners.values():
        if runner.process_state is STOPPING:
            return Exited(runner.id, 0)
    gone = [runner for runner in state.runners.values() if not runner.process]
    if gone:
        reading = sampled(core, scenario)
        read = state.ledger.copy()
        read.sample(reading.devices)
        back = any(_is_back(read, runner) for runner in gone)
        return reading if back else Tick()  # other programs took memory meanwhile: the wait ends by its own time-out
    if state.closing:
        return Tick() if any(runner.leases for runner in state.runners.values()) else None
    for request in state.requests.values():
        if request.state is RequestState.granted:
            return Release(request.id)
    if state.groups:
        return Tick()
    for model in state.models.values():
        if model.current is not None:
            return Expire(model.id)
    return None


def _is_back(read: Ledger, runner: Runner) -> bool:
    """Tell whether a reading finds the memory of a runner free on each GPU that is there."""
    targets = [(gpu, for_us) for gpu, for_us in runner.recovery_targets.items() if gpu in read.devices]
    return all(read.total_available(gpu) >= for_us for gpu, for_us in targets)


def sampled(
    core: Core,
    scenario: Scenario,
    *,
    back: bool = True,
    early: bool = False,
    capacities: Amounts = (),
    strangers_bytes: int = 0,
    given_back: bool = False,
) -> Sampled:
    """Return what a reading of the devices finds: what a loaded process occupies is gone from what is free.

    With `back=False` the memory of ended processes is still missing; an `early` reading began before they ended.
    With `given_back` the memory that stopped processes had on GPUs is free before they have ended. Other programs hold
    `strangers_bytes` of each GPU.
    """
    now = tuple((sample.id, sample.capacity_bytes) for sample in core._state.ledger.devices.values())
    capacities = capacities or now or scenario.devices
    free = dict(capacities)
    resident = []
    for runner in core._state.runners.values():
        if runner.loaded_at is not None and (runner.process or not back):
            for device, size in runner.placement.bytes:
                back = given_back and device != HOST and runner.process_state is STOPPING
                free[device] = free.get(device, 0) - (0 if back else size)  # a device may be missing in the reading
        if runner.loaded_at is not None and (runner.process or early):
            resident.append((runner.id, runner.placement.bytes))
    devices = tuple(
        DeviceSample(id, "gpu", id, size, max(0, free[id] - strangers_bytes))
        if id != HOST
        else DeviceSample(id, "cpu", id, size, max(0, free[id]))
        for id, size in capacities
    )
    number = core._state.samples
    if early:
        number = min(runner.last_sample for runner in core._state.runners.values() if not runner.process) - 1
    told = core._state.config.keeps_prompts
    prompts = tuple((id, PROMPTS_S * (1 + place)) for place, (id, _) in enumerate(resident) if told)
    return Sampled(devices, tuple(resident), number, prompts=prompts)


def _asked(state: CoreState, scenario: Scenario, past: IdHighWater) -> Iterator[Event]:
    if len(state.requests) >= scenario.requests:
        return
    request = RequestId(past.requests + 1)
    if state.closing:
        yield from (Acquire(request, spec) for spec in scenario.specs)
        return
    for spec in scenario.specs:
        for keep_alive_s in scenario.keep_alives_s:
            for timeout_s in scenario.timeouts_s:
                yield Acquire(request, spec, keep_alive_s, timeout_s)
        granted = tuple(one.id for one in state.requests.values() if one.state is RequestState.granted)
        if scenario.keeps and granted:
            yield Acquire(request, spec, holds=granted, keeps=granted)


def _readings(core: Core, scenario: Scenario) -> Iterator[Event]:
    state = core._state
    if any(not runner.process for runner in state.runners.values()):
        yield sampled(core, scenario)
        yield sampled(core, scenario, back=False, early=True)
        if any(runner.recovery_targets for runner in state.runners.values()):
            yield sampled(core, scenario, back=False)
            if scenario.strangers_bytes:
                yield sampled(core, scenario, back=False, strangers_bytes=scenario.strangers_bytes)
    stopping = [runner for runner in state.runners.values() if runner.process_state is STOPPING]
    if scenario.gives_back and any(runner.loaded_at is not None for runner in stopping):
        yield sampled(core, scenario, given_back=True)
    if scenario.other_devices:
        now = [sample.capacity_bytes for sample in state.ledger.devices.values()]
        others = [scenario.devices, scenario.other_devices]
        yield from (sampled(core, scenario, capacities=one) for one in others if [size for _, size in one] != now)


def _of_a_process(state: CoreState, runner: Runner, scenario: Scenario) -> Iterator[Event]:
    """Yield what a process may do: load, even after it was told to stop; fail, run out of memory, hang, end."""
    if runner.loaded_at is None:
        yield _loaded(runner)
        if scenario.out_of_memory and runner.process_state is RUNNING:
            yield Exited(runner.id, KILLED, "", out_of_memory=True)
    elif scenario.out_of_memory and not runner.out_of_memory:
        yield OutOfMemory(runner.id)
    if scenario.fills and runner.loaded_at is not None and not state.ledger.accounts["runner", runner.id].peak_observed:
        yield ContextFilled(runner.id)
    if scenario.replaces and runner.current and not runner.files_replaced:
        yield FilesReplaced(runner.id)
    if scenario.hangs and runner.state is LOADING:
        yield Progress(runner.id)
    if scenario.hangs and runner.process_state is RUNNING:
        yield Unresponsive(runner.id, NO_ANSWER)
    yield Exited(runner.id, 0 if runner.process_state is STOPPING else FAILED)


def _loaded(runner: Runner) -> Loaded:
    return Loaded(runner.id, None, runner.placement.bytes)


def _inspections(state: CoreState, model: ModelRecord, scenario: Scenario) -> Iterator[Inspected]:
    """Yield the end of an inspection that was ordered for all requests, and of one for each of their options alone."""
    asked = [options for options in state.options_asked_of(model.id) if options not in model.resolutions]
    found = dict(scenario.models)[model.id]
    yield Inspected(model.id, profile_of(found, asked))
    for options in asked if len(asked) > 1 and isinstance(found, DeclaredModel) else ():
        yield Inspected(model.id, profile_of(found, [options]))
