"""The core against every named property and a model of leases and runners, under events that Hypothesis draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from fsm.domain.devices import HOST
from fsm.machine.runner import RunnerState
from fsm.messages.commands import (
    Claim,
    Command,
    Finished,
    Grant,
    Inspect,
    Launch,
    Reject,
    ReleaseClaim,
    RevokeLease,
    Stop,
)
from fsm.messages.events import (
    Acquire,
    Cancel,
    ClaimContended,
    ClaimGranted,
    Close,
    Configure,
    Event,
    Exited,
    Inspected,
    Release,
    Tick,
)
from fsm.messages.refusals import InvalidModelRefusal
from tests.support.models import a_model
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    cancel,
    close,
    exited,
    expire,
    filled,
    layered,
    loaded,
    memory,
    out_of_memory,
    pin,
    preload,
    progress,
    release,
    unpin,
    unresponsive,
)

MIB = 2**20
MODELS = st.sampled_from("abcdgh")
OPTIONS = st.sampled_from([{}, {}, {}, {"num_ctx": 2048}, {"num_ctx": 8192}, {"num_ctx": 10**6}, {"num_thread": 2}])
KEEP_ALIVES = st.sampled_from([None, None, 0, 5, 600, "forever"])
TIMEOUTS = st.sampled_from([None, None, 0, 30, 1000])
PRIORITIES = st.sampled_from([0, 0, 0, 2])
SIZES = st.sampled_from(["1GiB", "3GiB", "9GiB"])
PICK = st.integers(0, 10**6)  # an index into a collection, taken modulo its length


def new_pool(*, claims: bool = False) -> PoolUnderTest:
    """Return a pool with a host of 8 GiB and a GPU of 4 GiB, in which only rules answer commands."""
    sizes = {"a": "2GiB", "b": "3GiB", "c": "6GiB"}
    answers = {"inspects": False, "samples": False, "shares": False}
    pool = a_pool("8GiB", gpus=("4GiB",), sizes=sizes, claims=claims, **answers)
    pool.declare("d", a_model(layers_bytes=(256 * MIB,) * 4)).declare("g", layered(4, "512MiB"))
    return pool.declare("h", layered(6, "1GiB", output="512MiB"))


class CoreMachine(RuleBasedStateMachine):
    """An independent model of the core, kept in a few dictionaries that events and commands alone fill."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.pool = new_pool()
        self.asked: dict[int, str] = {}  # request -> model
        self.answered: set[int] = set()
        self.held: dict[int, int | None] = {}  # request -> runner; None: memory of the program's own
        self.alive: dict[int, str] = {}  # runner -> model, from Launch to Exited
        self.gone: list[int] = []  # runners after Exited
        self.serving: set[int] = set()  # runners that were Loaded before they were told to stop
        self.inspecting: list[str] = []
        self.claiming: dict[int, float] = {}  # Claim -> when, of claims that are neither granted nor released
        self.had: set[int] = set()  # claims that are granted and not released
        self.closing = self.finished = False

    @initialize(claims=st.booleans())
    def choose_whether_to_claim(self, claims: bool) -> None:
        self.pool = new_pool(claims=claims)

    # -- the model ----------------------------------------------------------------------------------------------------

    def feed(self, *events: Event) -> None:
        for event in events:
            if isinstance(event, ClaimGranted) and self.claiming.pop(event.number, None) is not None:
                self.had.add(event.number)
            commands = self.pool.feed(event)
            self.learn_event(event)
            for command in commands:
                self.learn(command)

    def runners_in(self, *states: RunnerState) -> set[int]:
        return {view.id for view in self.pool.core.snapshot().runners if view.state in states}

    def learn_event(self, event: Event) -> None:
        match event:
            case Release() | Cancel():
                self.held.pop(event.request, None)
            case Exited() if event.runner in self.alive:
                del self.alive[event.runner]
                self.gone.append(event.runner)
            case Close():
                self.closing = True
                self.held = {request: runner for request, runner in self.held.items() if runner is not None}
            case _:
                pass

    def learn(self, command: Command) -> None:
        match command:
            case Grant():
                self.answered.add(command.request)
                if self.pool.purposes[command.request] != "preload":
                    self.held[command.request] = command.runner
            case Reject():
                self.answered.add(command.request)
            case RevokeLease():
                del self.held[command.request]
            case Launch():
                self.alive[command.runner] = command.model
            case Claim():
                self.claiming[command.number] = self.pool.now
            case ReleaseClaim():
                self.claiming.pop(command.number, None)
                self.had.discard(command.number)
            case Stop():
                self.serving.discard(command.runner)
            case Inspect():
                self.inspecting.append(command.model)
            case Finished():
                self.finished = True
            case _:
                pass

    # -- rules: requests ----------------------------------------------------------------------------------------------

    @rule(target=requests, model=MODELS, options=OPTIONS, keep=KEEP_ALIVES, timeout=TIMEOUTS, priority=PRIORITIES)
    def ask(self, model: str, options: dict[str, int], keep: object, timeout: object, priority: int) -> int:
        return self.put(acquire, model, options, keep_alive=keep, timeout=timeout, priority=priority)

    @rule(target=requests, model=MODELS, options=OPTIONS, keep=KEEP_ALIVES)
    def ask_for_a_preload(self, model: str, options: dict[str, int], keep: object) -> int:
        return self.put(preload, model, options, keep_alive=keep)

    @rule(target=requests, host=SIZES, on_gpu=st.booleans())
    def ask_for_memory(self, host: str, on_gpu: bool) -> int:
        return self.put(lambda _, request: memory(request, **{"gpu0" if on_gpu else "cpu": host}), "", {})

    def put(self, how: Callable[..., Acquire], model: str, options: dict[str, int], **more: object) -> int:
        request = len(self.asked) + 1
        self.asked[request] = model
        event = how(model, request, **more, **options)
        self.pool.purposes[request] = event.spec.purpose.name
        self.feed(event)
        return request

    @rule(request=consumes(requests))
    def give_back(self, request: int) -> None:
        self.feed(release(request))

    @rule(request=requests)
    def give_back_twice(self, request: int) -> None:
        self.feed(release(request), release(request))

    @rule(request=consumes(requests))
    def leave(self, request: int) -> None:
        self.feed(cancel(request))
        assert request in self.answered

    @rule(request=requests)
    def ask_again_with_a_known_id(self, request: int) -> None:
        if request not in self.answered or request in self.held:
            self.feed(acquire("a", request))

    @rule(model=MODELS, how=st.sampled_from([expire, expire, pin, unpin]))
    def say_a_word_about_a_model(self, model: str, how: Callable[[str], Event]) -> None:
        self.feed(how(model))

    @rule(max_runners=st.integers(0, 3), max_queue=st.sampled_from([0, 2, 9, 9]))
    def configure(self, max_runners: int, max_queue: int) -> None:
        self.feed(Configure(max_queue, max_runners))

    # -- rules: the environment ---------------------------------------------------------------------------------------

    @rule()
    def answer_everything(self) -> None:
        """The environment answers every command, and nothing fails."""
        while self.inspecting:
            self.inspect(0, bad=False)
        while self.claiming:
            self.have(0)
        for runner in sorted(self.runners_in(RunnerState.loading)):
            self.serving.add(runner)
            self.feed(loaded(runner))
        for runner in sorted(self.pool.stops & set(self.alive)):
            self.feed(exited(runner))
        self.feed(self.pool.sample())

    @rule(target=requests, model=MODELS, options=OPTIONS, keep=KEEP_ALIVES)
    def ask_and_be_answered(self, model: str, options: dict[str, int], keep: object) -> int:
        request = self.put(acquire, model, options, keep_alive=keep)
        self.answer_everything()
        self.answer_everything()
        return request

    @precondition(lambda self: self.inspecting)
    @rule(pick=PICK, bad=st.sampled_from([False] * 5 + [True]))
    def inspect(self, pick: int, bad: bool) -> None:
        model = self.inspecting.pop(pick % len(self.inspecting))
        found = Inspected(model, InvalidModelRefusal(model, "cut short")) if bad else self.pool.inspection(model)
        self.feed(self.pool.sample(), found)

    @precondition(lambda self: self.claiming)
    @rule(pick=PICK)
    def have(self, pick: int) -> None:
        self.feed(self.pool.sample())
        if self.claiming:
            self.feed(ClaimGranted(self.one_of(self.claiming, pick)))

    @precondition(lambda self: self.claiming)
    @rule(pick=PICK)
    def contend(self, pick: int) -> None:
        self.feed(ClaimContended(self.one_of(self.claiming, pick)))

    @rule(number=st.integers(1, 9), kind=st.sampled_from([ClaimGranted, ClaimContended]))
    def answer_a_claim_late(self, number: int, kind: type[ClaimGranted | ClaimContended]) -> None:
        late = self.pool.core.late
        if number not in self.claiming:
            self.feed(kind(number))
            assert self.pool.core.late == late + 1

    @precondition(lambda self: set(self.alive) - self.serving)
    @rule(pick=PICK)
    def load(self, pick: int) -> None:
        runner = self.one_of(set(self.alive) - self.serving, pick)
        if runner in self.runners_in(RunnerState.loading):
            self.serving.add(runner)
        self.feed(loaded(runner))

    @precondition(lambda self: self.alive)
    @rule(pick=PICK, code=st.sampled_from([0, 1, -9]), for_memory=st.booleans())
    def exit(self, pick: int, code: int, for_memory: bool) -> None:
        self.feed(exited(self.one_of(self.alive, pick), code, out_of_memory=for_memory))

    @precondition(lambda self: self.pool.stops & set(self.alive))
    @rule(pick=PICK)
    def exit_as_told(self, pick: int) -> None:
        self.feed(exited(self.one_of(self.pool.stops & set(self.alive), pick)))

    @precondition(lambda self: self.alive)
    @rule(pick=PICK, how=st.sampled_from([unresponsive, out_of_memory, progress]))
    def report(self, pick: int, how: Callable[[int], Event]) -> None:
        self.feed(how(self.one_of(self.alive, pick)))

    @precondition(lambda self: self.gone)
    @rule(pick=PICK, how=st.sampled_from([loaded, filled, exited, unresponsive, out_of_memory, progress]))
    def report_late(self, pick: int, how: Callable[[int], Event]) -> None:
        late = self.pool.core.late
        self.feed(how(self.one_of(self.gone, pick)))
        assert self.pool.core.late == late + 1

    @precondition(lambda self: self.pool.occupied)
    @rule(pick=PICK, part=st.sampled_from([0.25, 0.5, 0.9, 1.0, 1.1]), mapped=st.sampled_from([0, 0.5]))
    def occupy(self, pick: int, part: float, mapped: float) -> None:
        """A process occupies another part of what was reserved for it at its launch."""
        runner = self.one_of(self.pool.occupied, pick)
        held = {device: int(size * part) for device, size in self.pool.launches[runner].placement.bytes}
        self.pool.occupied[runner] = held
        self.pool.mapped[runner] = int(held.get(HOST, 0) * mapped)
        self.feed(self.pool.sample())

    @precondition(lambda self: self.alive)
    @rule(pick=PICK, to_come=st.sampled_from(["0B", "1GiB"]))
    def fill_a_context(self, pick: int, to_come: str) -> None:
        self.feed(filled(self.one_of(self.alive, pick), cpu=to_come))

    @rule(host=st.integers(0, 4), gpu=st.integers(0, 4))
    def strangers(self, host: int, gpu: int) -> None:
        self.pool.strangers = {"cpu": host * amount("1GiB"), "gpu0": gpu * amount("1GiB")}
        self.feed(self.pool.sample())

    @rule(seconds=st.sampled_from([0, 0.25, 1, 5, 60, 121, 400]))
    def pass_time(self, seconds: float) -> None:
        until = self.pool.now + seconds
        while (deadline := self.pool.core.deadline()) <= until:
            self.pool.now = max(self.pool.now, deadline)
            self.feed(Tick())
        self.pool.now = until

    @precondition(lambda self: len(self.asked) > 15)
    @rule(timeout=st.sampled_from([0, 10, math.inf]))
    def close(self, timeout: float) -> None:
        self.feed(close(timeout))

    @staticmethod
    def one_of(choices: Collection[int], pick: int) -> int:
        return sorted(choices)[pick % len(choices)]

    # -- what must always be true -------------------------------------------------------------------------------------

    @invariant()
    def everybody_waits_or_has_been_answered(self) -> None:
        assert {view.request for view in self.pool.core.snapshot().queue} == set(self.asked) - self.answered

    @invariant()
    def runners_are_as_believed(self) -> None:
        views = {view.id: view for view in self.pool.core.snapshot().runners}
        assert set(self.alive) <= set(views), "a runner is forgotten while its process lives"
        for id, view in views.items():
            assert view.leases == list(self.held.values()).count(id)
            assert view.process == (id in self.alive)
        assert {runner for runner in self.held.values() if runner is not None} <= set(self.alive)

    @invariant()
    def nobody_is_kept_out_for_nothing(self) -> None:
        loading = {id for id in self.alive if self.pool.core._state.runners[id].loaded_at is None}
        assert len(self.had) <= len(loading), "devices are claimed that nothing loads on"
        assert all(self.pool.now < made_at + 60.0 for made_at in self.claiming.values()), "a claim waits without an end"

    @invariant()
    def what_is_held_is_what_was_predicted_until_it_was_measured(self) -> None:
        for view in self.pool.core.snapshot().runners:
            predicted, peak = dict(view.predicted), dict(view.peak)
            for device, size in view.held:
                most = max(predicted.get(device, 0), peak.get(device, 0))
                least = peak.get(device, most) if view.settled else most
                assert least <= size <= most

    @invariant()
    def whoever_waits_waits_for_something(self) -> None:
        stirring = self.inspecting or self.claiming or self.alive or self.held or self.pool.core.deadline() < math.inf
        assert stirring or not self.pool.core.snapshot().queue, "no event will ever answer the requests that wait"

    # -- the end ------------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not self.closing:
            self.feed(*(unpin(model) for model in "abcdgh"))
            self.settle(lambda: self.asked.keys() <= self.answered and not self.held)
        self.feed(close(10))
        self.settle(lambda: self.finished)
        assert self.finished, "the core never finished"
        assert self.pool.core.snapshot().runners == ()
        assert self.asked.keys() <= self.answered
        assert not self.pool.claims, "a claim is held after the end"

    def settle(self, is_over: Callable[[], bool]) -> None:
        """Let the environment answer, leases be released and time pass until the core is done."""
        for _ in range(200):
            if is_over():
                return
            self.answer_everything()
            for request in sorted(self.held):
                self.feed(release(request))
            self.pass_time(1.0 if not is_over() else 0)
        raise AssertionError(f"it does not settle: {self.pool.core.snapshot()}")


CoreMachine.TestCase.settings = settings(settings.default, stateful_step_count=60)
TestCore = CoreMachine.TestCase
