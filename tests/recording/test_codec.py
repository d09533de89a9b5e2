"""The codec of the core's state: what is written and read again is the same, whatever happened before."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, cast, get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from fsm.core import Core, CoreCheckpoint
from fsm.domain.devices import HOST, DeviceId, DeviceSample, Placement
from fsm.domain.options import Options
from fsm.eviction.policies import DEFAULT_POLICY, KeepAliveOrder
from fsm.machine.request import ModelId, Purpose, RequestId, RequestSpec
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
    Sampled,
    Tick,
    Unpin,
    Unresponsive,
)
from fsm.messages.reasons import ClaimMissed, FailureReason, InfeasibleReason, NoAnswer, WaitReason
from fsm.messages.refusals import (
    Cancelled,
    DeadlineInfeasible,
    DoesNotFitRefusal,
    InvalidModelRefusal,
    LoadFailedRefusal,
    LoadTimeoutRefusal,
    ModelNotFoundRefusal,
    QueueFullRefusal,
    Refusal,
    SchedulerClosed,
    TimedOut,
    UnsupportedOption,
    WouldDeadlockRefusal,
)
from fsm.sizing.footprint import Footprint
from fsm.sizing.load_history import LoadHistory, LoadTimes, MeasuredBytes
from fsm.sizing.model_profile import UnsupportedReason
from fsm.state.core_config import CoreConfig
from fsm.state.timers import Timers
from fsm.verification.declared_model import DeclaredModel
from fsm.verification.environment import IdHighWater, Scenario, enabled_events, sampled, time_of
from fsm.verification.state_invariants import check_state
from scheduler.engines.llama_profile import profile_of
from scheduler.models.model_info import Recurrence
from scheduler.recording.codec import (
    Unreadable,
    _fields,
    decode_command,
    decode_event,
    decode_state,
    encode,
    reachable,
    schema,
)
from tests.core.test_machine import CoreMachine
from tests.support.models import a_model
from tests.support.pool import a_pool, acquire, layered
from tests.support.reasons import every

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
OF_A_STEP = {"commands", "decision_log", "state", "replan"}  # of a step, or of the state


def through_json(value: object) -> Any:
    return json.loads(json.dumps(encode(value), allow_nan=False))


def restored(core: Core) -> Core:
    """Return a core that was written and read again."""
    return Core.restore(decode_state(through_json(core.checkpoint())), core.policy)


def parts_of(thing: object) -> Iterator[tuple[object, object]]:
    """Yield the parts of an object, however it holds them, without knowledge of how it is written."""
    match thing:
        case dict():
            yield from enumerate(pair for item in thing.items() for pair in item)
        case list() | tuple():
            yield from enumerate(thing)
        case set() | frozenset():
            yield "members", sorted(map(repr, thing))
        case _ if type(thing).__module__.startswith("fsm") and not isinstance(thing, Enum):
            slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
            for name in [*slots, *getattr(thing, "__dict__", {})]:
                if name not in ("commands", "decision_log", "demands"):  # of the last step, its notes, or derived again
                    yield name, getattr(thing, name)
        case _:
            pass


def differences(one: object, other: object, where: str = "core", seen: dict[int, int] | None = None) -> list[str]:
    """Return where two objects differ: in values, in types, in orders, and in which parts are the same object."""
    seen = {} if seen is None else seen
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} and {type(other).__name__}"]
    mutable = dataclasses.is_dataclass(one) and not cast(Any, type(one)).__dataclass_params__.frozen
    if mutable and id(one) in seen:
        return [] if seen[id(one)] == id(other) else [f"{where}: shared with others in one, not in the other"]
    seen[id(one)] = id(other)
    ones, others = list(parts_of(one)), list(parts_of(other))
    if not ones and not others:
        return [] if one == other or (type(one).__module__.startswith("fsm.") and repr(one) == repr(other)) else [
            f"{where}: {one!r} and {other!r}"
        ]  # fmt: skip
    if len(ones) != len(others):
        return [f"{where}: {len(ones)} and {len(others)} parts"]
    pairs = zip(ones, others, strict=True)
    return [text for (name, a), (_, b) in pairs for text in differences(a, b, f"{where}.{name}", seen)]


# -- examples of every type --------------------------------------------------------------------------------------------

WANT = RequestSpec(ModelId("/models/a.gguf"), Options(num_ctx=4096, use_mmap=False), Purpose.lease, -2)
SAMPLE = DeviceSample(DeviceId("gpu0"), "gpu", "a GPU, Größe \udcff", 8, 4, integrated=True, fresh=False)
AMOUNTS = ((HOST, 5), (DeviceId("gpu0"), 2**63))
EVENTS: list[Event] = [
    Acquire(RequestId(7), WANT, math.inf, 0.1), Acquire(RequestId(8), WANT, 0, None),
    Acquire(RequestId(9), RequestSpec(ModelId(""), Options(), Purpose.memory, 0, AMOUNTS)),
    Cancel(RequestId(7)), Release(RequestId(7)), Expire(WANT.model), Pin(WANT.model), Unpin(WANT.model),
    Configure(1, 2, math.inf), Configure(),
    Inspected(WANT.model, profile_of(replace(a_model(), recurrence=Recurrence(conv=4)), [WANT.options, Options()])),
    Inspected(WANT.model, profile_of(a_model(), [Options(num_ctx=8192), Options(num_parallel=999)])),
    Inspected(WANT.model, Footprint(fixed=AMOUNTS)), Inspected(WANT.model, ModelNotFoundRefusal("/nowhere")),
    Inspected(WANT.model, InvalidModelRefusal("/bad", "cut short", 17)), Progress(RunnerId(3)),
    Inspected(
        WANT.model, profile_of(a_model(), ()),
        LoadHistory((MeasuredBytes(WANT.options, (), AMOUNTS),), (LoadTimes(AMOUNTS, (0.1, 2)),)),
    ),
    Loaded(RunnerId(3), expected_growth=AMOUNTS),
    Loaded(RunnerId(3), 2048, AMOUNTS, 11), ContextFilled(RunnerId(3), AMOUNTS), OutOfMemory(RunnerId(3)),
    FilesReplaced(RunnerId(3)),
    Unresponsive(RunnerId(3), NoAnswer(0.1, True)), Exited(RunnerId(3), -9, "two\nlines", out_of_memory=True),
    Exited(RunnerId(3), None), Sampled((SAMPLE,), ((RunnerId(3), AMOUNTS),), 4, ((RunnerId(3), 9),)),
    ClaimContended(1), ClaimGranted(1), Tick(), Close(math.inf), Close(0.25),
]  # fmt: skip
REFUSALS: list[Refusal] = [
    QueueFullRefusal(512, 1.5), ModelNotFoundRefusal("/nowhere"), InvalidModelRefusal("/bad", "cut short"),
    *(DoesNotFitRefusal(WANT.model, AMOUNTS, (), reason) for reason in every(InfeasibleReason)),
    *(LoadFailedRefusal(WANT.model, reason, 10.0, out_of_memory=True) for reason in every(FailureReason)),
    *(TimedOut(WANT.model, 0.1 + 0.2, reason) for reason in every(WaitReason)),
    *(UnsupportedOption(WANT.model, "num_ctx", 1, reason) for reason in every(UnsupportedReason)),
    UnsupportedOption(WANT.model, "flash_attention", False, UnsupportedReason.needs_flash_attention),
    UnsupportedOption(WANT.model, "cache_type_k", "q9", UnsupportedReason.partial_blocks),
    LoadTimeoutRefusal(WANT.model, math.inf), DeadlineInfeasible(WANT.model, 0.1, 0.2, 0.3, None),
    WouldDeadlockRefusal(WANT.model, (WANT.model,)),
    Cancelled(WANT.model),
    SchedulerClosed(),
]  # fmt: skip
COMMANDS: list[Command] = [
    *(Reject(RequestId(7), refusal) for refusal in REFUSALS), Inspect(WANT.model), Stop(RunnerId(3)),
    Launch(RunnerId(3), WANT.model, Options(num_gpu=-1), Placement(AMOUNTS, ((DeviceId("gpu0"), 33),), True)),
    Sample(4), Claim(1, (HOST, DeviceId("gpu0"))), ReleaseClaim(1), Grant(RequestId(7), RunnerId(3)),
    Grant(RequestId(7), None), *(RevokeLease(RequestId(7), reason) for reason in (*every(FailureReason), None)),
    NotifyContention(RunnerId(3), (RequestId(7),)),
    Prefetch(((WANT.model, 2**40),)), PersistMeasurement(RunnerId(3), AMOUNTS, 0.1 + 0.2),
    PersistMeasurement(RunnerId(3)),
    Finished(),
]  # fmt: skip


def test_the_examples_are_of_every_kind() -> None:
    """There is an example of every event, command and refusal."""
    assert {type(event) for event in EVENTS} == set(get_args(Event))
    assert {type(command) for command in COMMANDS} == set(get_args(Command))
    assert {type(refusal) for refusal in REFUSALS} == set(get_args(Refusal))


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_the_same(event: Event) -> None:
    """An event is read as it was written, with infinite times, large numbers and names that no encoding holds."""
    assert differences(decode_event(through_json(event)), event) == []


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: type(command).__name__)
def test_a_command_comes_back_the_same(command: Command) -> None:
    """A command is read as it was written, refusals included."""
    assert differences(decode_command(through_json(command)), command) == []


def test_a_time_is_written_exactly() -> None:
    """Every finite time is written to the last bit, and infinite ones as such."""
    for time in (0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, math.inf):
        back = decode_event(through_json(Close(time)))
        assert isinstance(back, Close) and back.timeout_s.hex() == time.hex()


def test_what_has_its_default_is_left_out() -> None:
    """Fields with their default are left out of a line."""
    assert through_json(Acquire(RequestId(1), RequestSpec(ModelId("a"), Options(), Purpose.lease, 0))) == {
        "is": "Acquire", "request": 1,
        "spec": {"is": "RequestSpec", "model": "a", "options": {"is": "Options"}, "purpose": "lease", "priority": 0},
    }  # fmt: skip


def test_what_is_no_part_of_the_core_cannot_be_written() -> None:
    """A value that is no part of the core, or a time that is no number, cannot be written."""
    for value in (object(), Inspected(WANT.model, Path("/")), Close(math.nan)):
        with pytest.raises(TypeError, match="cannot be recorded"):
            encode(value)


# -- what is not an encoding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "None"), (7, "7"), ([], r"\[\]"), ({}, "{}"), ({"is": "Evil"}, "Evil"), ({"is": ["Tick"]}, "Tick"),
        ({"is": "Grant", "request": 1}, "Grant"), ({"is": "Release"}, "request"), ({"is": "Tick", "x": 1}, "no 'x'"),
        ({"is": "Release", "request": "1"}, "expected int"), ({"is": "Release", "request": True}, "expected int"),
        ({"is": "Release", "request": 1.0}, "expected int"), ({"is": "Close", "timeout_s": "soon"}, "a number"),
        ({"is": "Close", "timeout_s": False}, "a number"), ({"is": "Close", "timeout_s": [1]}, "a number"),
        ({"is": "Loaded", "runner": 1, "resident": [["cpu"]]}, "2 values"),
        ({"is": "Loaded", "runner": 1, "resident": {"cpu": 1}}, "a list"),
        ({"is": "Inspected", "model": "a", "outcome": {"is": "SchedulerClosed"}}, "ModelProfile"),
        ({"is": "Acquire", "request": 1, "spec": {"is": "RequestSpec", "model": "a", "options": {"is": "Options"},
          "purpose": "theft", "priority": 0}}, "theft"),
        ({"is": "Sampled", "devices": [{"is": "DeviceSample", "id": "x", "kind": "tpu", "name": "x",
          "capacity_bytes": 1, "free_bytes": 1}]}, "tpu"),
    ],
)  # fmt: skip
def test_what_is_no_event_is_refused(value: object, said: str) -> None:
    """A value that is no event is refused with what was expected in its place."""
    with pytest.raises(Unreadable, match=said):
        decode_event(value)


def test_a_state_refers_only_to_what_came_before() -> None:
    """A state that names a runner that was not written, or has it twice, is refused."""
    pool = a_pool().idle("a")
    written = json.dumps(encode(pool.core.checkpoint()))
    assert '{"is": "Runner", "again": 1}' in written
    for wrong in (
        '{"is": "Runner", "again": 2}',
        '{"is": "Runner", "again": "1"}',
        '{"is": "Runner", "again": 1, "x": 1}',
    ):
        with pytest.raises(Unreadable):
            decode_state(json.loads(written.replace('{"is": "Runner", "again": 1}', wrong)))
    whole = through_json(pool.core.checkpoint())
    whole["state"]["runners"][0][1] = whole["state"]["models"][0][1]["current"]
    with pytest.raises(Unreadable, match="once"):
        decode_state(whole)


# -- the whole state ---------------------------------------------------------------------------------------------------


def test_every_field_of_every_class_of_the_core_is_written() -> None:
    """Every field that the core holds is in its checkpoint, but for the policy, the plans and a step's own fields."""
    core = a_pool().ready("a").core
    kinds = set(reachable(CoreCheckpoint))
    checkpoint = {field.name for field in dataclasses.fields(CoreCheckpoint)}
    assert {name.removeprefix("_") for name in vars(core)} - checkpoint == {"policy", "context", "plans"}
    slots = {name for kind in type(core._context).__mro__ for name in getattr(kind, "__slots__", ())}
    assert slots - OF_A_STEP == {"claim_failure"}
    assert Timers in kinds and {type(core._state), type(core._state.ledger)} <= kinds
    for kind in kinds:
        if dataclasses.is_dataclass(kind):  # a dataclass holds nothing outside of its fields
            names = {field.name for field in dataclasses.fields(kind)}
            held = {name for base in kind.__mro__ for name in getattr(base, "__slots__", ())}
            assert held == names and not hasattr(object.__new__(kind), "__dict__"), kind


@pytest.mark.parametrize("kind", sorted({*reachable(CoreCheckpoint), *reachable(Event), *reachable(Command)}, key=repr))
def test_every_field_has_a_type_that_can_be_read(kind: type) -> None:
    """Every field has a type that can be read from JSON without doubt."""
    if dataclasses.is_dataclass(kind):
        assert _fields(kind).keys() == {field.name for field in dataclasses.fields(kind) if not field.metadata}


def test_what_a_core_holds_beside_its_pool_comes_back() -> None:
    """Each field that the core holds beside its state is restored and written again."""
    values = {"int": 3, "bool": True, "str": "words", "ClaimMissed | None": ClaimMissed((HOST,), 60.0)}
    names = {field.name: str(field.type) for field in dataclasses.fields(CoreCheckpoint) if field.name != "state"}
    state = replace(Core().checkpoint(), **{name: values[kind] for name, kind in names.items()})  # type: ignore[arg-type]  # of its type each
    again = Core.restore(decode_state(through_json(state))).checkpoint()
    assert encode(again) == encode(state) != encode(Core().checkpoint())


def test_the_schema_is_the_same_in_every_process() -> None:
    """The schema depends on the classes alone, and is the same in every process."""
    code = "from scheduler.recording.codec import schema; print(schema())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == schema()


def test_a_restored_core_keeps_the_order_in_which_deadlines_come_up() -> None:
    """A restored core keeps the order in which timers come up, also of timers that were set again."""
    core = a_pool().core
    timers = core._state.timers
    timers.set(("keep-alive", 1), core._state.now + 1)
    timers.set(("keep-alive", 1), core._state.now + 9)
    timers.set(("keep-alive", 2), core._state.now + 5)
    back = restored(core)._state.timers
    due = core._state.now + 10
    assert [timers.copy().take_due(due), timers.take_due(due)] == [back.copy().take_due(due), back.take_due(due)]


class Walk:
    """Events in any order, in an environment in which every fault happens now and then."""

    def __init__(self, seed: int) -> None:
        sizes = (("a", "1GiB"), ("b", "2GiB"), ("c", "3GiB"))
        models: list[tuple[ModelId, Footprint | DeclaredModel]] = [
            (ModelId(name), layered(4, size)) for name, size in sizes
        ]
        models.append((ModelId("d"), DeclaredModel((256 * MIB,) * 4)))
        asked = ((None, Purpose.lease, 0), (2048, Purpose.lease, 1), (None, Purpose.preload, 0))
        wants = [RequestSpec(model, Options(num_ctx=num_ctx), *how) for model, _ in models for num_ctx, *how in asked]
        wants.append(RequestSpec(ModelId(""), Options(), Purpose.memory, 0, ((HOST, 2**30),)))
        self.chance = random.Random(seed)
        self.past = IdHighWater()
        self.scenario = Scenario(
            name="any", about="", most=0, models=tuple(models), specs=tuple(wants), requests=9,
            devices=((HOST, 8 * 2**30), (DeviceId("gpu0"), 6 * 2**30)), keep_alives_s=(None, 0.0, 5.0, math.inf),
            limits=CoreConfig(claims=seed % 2 == 0, max_runners=seed % 3), timeouts_s=(None, 10.0), out_of_memory=True,
            hangs=True, fills=True, pins=True, closes=False,
            other_devices=((HOST, 6 * 2**30), (DeviceId("gpu0"), 3 * 2**30)),
            configures=(Configure(max_runners=2), Configure(max_runners=0, keep_alive_s=7.0)),
        )  # fmt: skip

    def step(self, core: Core, step: Callable[[float, Event], Sequence[Command]]) -> tuple[float, Event]:
        """Tell a core one enabled event through `step`; return the time and the event."""
        if core._state.now == -math.inf:
            now, event = 0.0, cast(Event, sampled(core, self.scenario))
        else:
            event = self.chance.choice(list(enabled_events(core, self.scenario, self.past)))
            now = time_of(core, event) + self.chance.choice((0.0, 0.0, 0.25, 3.0))
        self.past = self.past.after(event, list(step(now, event)))
        return now, event


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_restored_core_goes_on_as_the_one_it_was_written_from(seed: int) -> None:
    """A restored core is equal in every part after each step, and answers the next event with the same commands."""
    walk = Walk(seed)
    core = Core(walk.scenario.limits, KeepAliveOrder() if seed % 4 == 1 else None)
    for _ in range(120):
        twin = restored(core)
        assert differences(twin, core) == []
        assert twin.checkpoint().state is not twin._state
        paired = Paired(core)
        paired.twins.append(twin)
        walk.step(core, paired.step)
        assert encode(twin.checkpoint()) == encode(core.checkpoint())
        check_state(twin)


def test_what_is_found_again_from_the_rest_is_not_written() -> None:
    """What can be derived again is not written, and a restored core decides the same."""
    pool = a_pool(each="1GiB").idle("a")
    model = pool.core._state.models[ModelId("a")]
    asked = [Options(num_ctx=num_ctx) for num_ctx in range(512, 1512)]
    model.apply_inspection(profile_of(a_model(), asked), 1, kept=asked)
    empty = encode(pool.core.checkpoint())
    for options in asked:
        model.demand(model.resolutions[options].loads[0], options, pool.core._state.config)
    assert len(model.demands) >= 1000 and encode(pool.core.checkpoint()) == empty
    core, twin = pool.core, restored(pool.core)
    assert not twin._state.models[ModelId("a")].demands
    for request, num_ctx in enumerate((512, 1511, 700, 4096), 50):
        event = Acquire(RequestId(request), RequestSpec(ModelId("a"), Options(num_ctx=num_ctx), Purpose.lease, 0))
        assert twin.step(pool.now, event) == core.step(pool.now, event)
    assert encode(twin.checkpoint()) == encode(core.checkpoint())


class Paired:
    """Cores that are told the same events and must answer the same: one core and its restored copies."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.twins: list[Core] = []

    def step(self, now: float, event: Event) -> list[Command]:
        said = self.core.step(now, event)
        for twin in self.twins:
            assert twin.step(now, event) == said
        return said

    def __getattr__(self, name: str) -> object:
        return getattr(self.core, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("core", "twins"):
            object.__setattr__(self, name, value)
            return
        setattr(self.core, name, value)
        for twin in self.twins if name == "decision_log" else ():
            twin.decision_log = [] if value is not None else None  # what was noted last is part of the state


class RecordedMachine(CoreMachine):
    """The core under any events that Hypothesis draws, written and read again at any time."""

    @rule(go_on_from_it=st.booleans())
    def write_it_down(self, go_on_from_it: bool) -> None:
        paired: Any = self.pool.core
        if not isinstance(paired, Paired):
            paired = self.pool.core = Paired(paired)  # type: ignore[assignment]  # it says and does the same
        twin = restored(paired.core)
        assert differences(twin, paired.core) == []
        paired.twins = [*paired.twins[-1:], twin]
        if go_on_from_it:  # the rest of the run is a restored core's
            paired.core, paired.twins[-1] = paired.twins[-1], paired.core

    def teardown(self) -> None:
        if isinstance(paired := self.pool.core, Paired):
            for twin in paired.twins:
                assert differences(twin, paired.core) == []
        super().teardown()


TestRecordedMachine = RecordedMachine.TestCase
TestRecordedMachine.settings = settings(settings.default, max_examples=30, stateful_step_count=50)


def test_a_policy_is_not_part_of_a_state() -> None:
    """A policy is no part of a state, because it may be a user's code; it is given when a core is restored."""
    pool = a_pool("12GiB", each="5GiB").idle("a").idle("b")
    twin = Core.restore(pool.core.checkpoint(), KeepAliveOrder())
    assert twin.policy.name == "keep-alive" and Core.restore(pool.core.checkpoint()).policy is DEFAULT_POLICY
    assert twin.step(pool.now, acquire("c", 99)) == pool.core.step(pool.now, acquire("c", 99))
