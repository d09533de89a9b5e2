"""The core on virtual time in drawn environments: what always holds, faults that are found, and failed seeds."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from random import Random

import pytest

from fsm.core import Core
from fsm.domain.devices import HOST, DeviceId, Placement
from fsm.domain.options import Options
from fsm.machine.request import ModelId, Purpose, RequestId, RequestSpec
from fsm.machine.runner import EXPIRING, LOADING, READY, STOPPING, UNLOADED, RunnerId
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
from fsm.messages.decision_log import Entry, Transition
from fsm.messages.events import (
    Acquire,
    Cancel,
    ClaimContended,
    ClaimGranted,
    Close,
    Configure,
    Event,
    Exited,
    Expire,
    Loaded,
    OutOfMemory,
    Progress,
    Release,
    Tick,
)
from fsm.messages.refusals import (
    Cancelled,
    DeadlineInfeasible,
    DoesNotFitRefusal,
    LoadFailedRefusal,
    QueueFullRefusal,
    SchedulerClosed,
    TimedOut,
)
from fsm.state.core_config import CoreConfig
from fsm.state.timers import Key
from fsm.verification.decision_coverage import Coverage
from fsm.verification.property import Violated
from fsm.verification.sim_faults import Faults, draw_faults
from fsm.verification.simulator import Outcome, failure_of, simulate
from fsm.verification.trace_auditor import TraceAuditor, of_bounded_trace, of_trace
from tests.tools import fuzz_core

AuditStep = tuple[Event, tuple[Command, ...], tuple[Entry, ...], int]  # the number is that of the requests that wait

SEEDS, STEPS = 100, 700
PLANTED_SEEDS = 20


@pytest.fixture(scope="module")
def covered() -> Coverage:
    """Run some short seeds, in each of which every property has to hold."""
    coverage = Coverage()
    for seed in range(SEEDS):
        outcome = simulate(Random(seed), STEPS, every=4, coverage=coverage, plans_later=seed % 2 == 1)
        assert outcome.violation is None, f"python -m tests.tools.fuzz_core --first {seed} --seeds 1 --steps {STEPS}"
    return coverage


@pytest.mark.slow
def test_every_row_of_every_table_is_fired(covered: Coverage) -> None:
    """Every row of every table is fired, and every property holds meanwhile."""
    assert covered.rows_never_fired() == []


@pytest.mark.slow
def test_every_kind_of_event_command_and_refusal_comes(covered: Coverage) -> None:
    """Events, commands and refusals of every type occur."""
    assert covered.kinds_never_seen() == []


def test_coverage_of_seeds_adds_up_as_if_it_were_one() -> None:
    """The coverage of several seeds adds up to that of one run of them all."""
    together, added = Coverage(), Coverage()
    for seed in range(4):
        alone = Coverage()
        for coverage in (together, alone):
            simulate(Random(seed), 300, coverage=coverage)
        added.append(alone)
    assert added == together
    assert list(added.first_at) == list(together.first_at)


def test_an_empty_coverage_misses_everything() -> None:
    """An empty coverage names every row, event, command and refusal as missing."""
    assert len(Coverage().rows_never_fired()) == 17
    assert "Acquire" in Coverage().kinds_never_seen() and "ReleaseClaim" in Coverage().kinds_never_seen()


@pytest.mark.slow
def test_a_seed_gives_the_same_world_in_another_process() -> None:
    """A seed gives the same environment in another process, so that no order of a set decides."""
    program = (
        "from random import Random; from fsm.verification.simulator import simulate;"
        "from fsm.verification.decision_coverage import Coverage;"
        "c = Coverage(); o = [simulate(Random(s), 300, coverage=c) for s in range(6)];"
        "print(sorted(map(str, c.triples.items())), [(x.steps, x.virtual_s) for x in o])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_each_fault_is_off_in_some_seeds_and_on_in_others() -> None:
    """Swarm testing: each fault is switched off in some seeds and has different rates in others."""
    drawn = [draw_faults(Random(seed)) for seed in range(200)]
    assert Faults() in drawn
    for name in Faults.__slots__:
        assert {getattr(faults, name) > 0 for faults in drawn} == {True, False}


# Seeds that failed once, by what was wrong; each has a test of the core too.
REGRESSIONS = {"a policy that leaves out whom it would keep, and who waits for that memory for ever": (68, 700)}


@pytest.mark.parametrize("found", REGRESSIONS)
def test_a_seed_that_failed_once_holds(found: str) -> None:
    """A seed that failed once holds now."""
    seed, steps = REGRESSIONS[found]
    assert simulate(Random(seed), steps).violation is None


# -- faults that are found --------------------------------------------------------------------------------------------


class Resurrecting(Core):
    """A core that grants expiring runners."""

    def _acquire(self, event: Acquire) -> None:
        for runner in self._state.runners.values():
            if runner.model == event.spec.model and runner.leases and not runner.current:
                self._context.commands.append(Grant(event.request, runner.id))
                return
        super()._acquire(event)


class Forgetful(Core):
    """A core that forgets a request whose time limit is over."""

    def step(self, now: float, event: Event) -> list[Command]:
        commands = super().step(now, event)
        return [c for c in commands if not (isinstance(c, Reject) and isinstance(c.refusal, TimedOut))]


class Twice(Core):
    """A core that stops a runner again at a late release."""

    def _leave(self, event: Release | Cancel) -> None:
        super()._leave(event)
        for runner in self._state.runners.values():
            if runner.process_state is STOPPING:
                self._context.commands.append(Stop(runner.id))


class Hanging(Core):
    """A core that makes no plan after an exit: safe, but waiting requests are never answered."""

    def _carry_out_plans(self) -> None:
        if not (any(runner.id > 1 for runner in self._state.runners.values()) and self._state.groups):
            super()._carry_out_plans()


class Loading(Core):
    """A core that lets a load go on after a close, and never finishes."""

    def _close(self, timeout_s: float) -> None:
        loads = [runner for runner in self._state.runners.values() if runner.state is LOADING]
        for runner in loads:
            runner.state = EXPIRING
        super()._close(timeout_s)
        for runner in loads:
            runner.state = LOADING


class Lenient(Core):
    """A core that revokes no lease when the time limit of a close is over."""

    def _time_is_up(self, key: Key) -> None:
        if key[0] != "close":
            super()._time_is_up(key)


def first_failure(make: type[Core], what: str = "") -> Outcome:
    """Return the first failure that is told by `what`: one fault may show in several ways."""
    for seed in range(PLANTED_SEEDS):
        outcome = simulate(Random(seed), STEPS, make=make, every=10)
        if outcome.violation is not None and what in outcome.violation.what:
            return outcome
    raise AssertionError("not found")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "what", "most"),
    [
        (Resurrecting, "granted", 16),
        (Forgetful, "lost", 8),
        (Twice, "a runner is stopped once", 12),
        (Hanging, "no event will ever come", 25),
        (Loading, "left over at the end: ", 8),
        (Lenient, "no event will ever come", 15),
    ],
)
def test_a_planted_fault_is_found_and_its_trace_is_short(make: type[Core], what: str, most: int) -> None:
    """A planted fault of safety or liveness is found, and its trace of hundreds of events is shrunk to a few."""
    outcome = first_failure(make, what)
    assert outcome.violation is not None
    assert len(outcome.violation.trace) <= min(most, outcome.steps)
    events = [(step.now, step.event) for step in outcome.violation.trace]
    assert what in (failure_of(outcome.config, make, events) or "")
    assert failure_of(outcome.config, Core, events) is None


def test_a_failure_comes_with_the_command_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failure is printed with the command that repeats it, the faults, the limits and the trace in words."""
    monkeypatch.setattr(fuzz_core, "simulate", lambda *args, **more: simulate(*args, make=Forgetful, **more))
    assert fuzz_core.main(["--seeds", "20", "--steps", "300"]) == 1
    printed = capsys.readouterr().out
    seed = printed.split("seed ")[1].split(":")[0]
    assert f"-m tests.tools.fuzz_core --first {seed} --seeds 1 --steps 300" in printed
    assert "faults: " in printed and "Acquire(request=" in printed


def test_a_run_that_finds_nothing_says_what_it_covered(capsys: pytest.CaptureFixture[str]) -> None:
    """A run without a failure prints its steps, time, speed, decisions and what never fired."""
    assert fuzz_core.main(["--seeds", "3", "--steps", "200"]) == 0
    printed = capsys.readouterr().out
    for part in ("virtual hours", "steps a second", "decisions: ", "rows of tables that never fired: "):
        assert part in printed


def test_a_run_ends_once_nothing_new_has_come_for_long(capsys: pytest.CaptureFixture[str]) -> None:
    """With `--quiet`, a run ends after so many steps without anything new, whatever its number of seeds."""
    assert fuzz_core.main(["--seeds", "1000000", "--steps", "200", "--quiet", "100"]) == 0
    assert "seeds 1 to 1000000" not in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--seeds", "--steps", "--check-every", "--quiet", "--processes"])
@pytest.mark.parametrize("number", ["0", "-5", "many"])
def test_a_number_that_runs_nothing_is_refused(option: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A number of seeds or steps that runs nothing is refused."""
    with pytest.raises(SystemExit) as ended:
        fuzz_core.main([f"{option}={number}"])
    assert ended.value.code == 2
    assert f"{option}: '{number}' is not a whole number of at least 1" in capsys.readouterr().err


# -- the trace auditor, which has to notice what the core never does --------------------------------------------------

LEASE = RequestSpec(ModelId("a"), Options(), Purpose.lease, 0)
ASKED = Acquire(RequestId(1), LEASE)
LAUNCH = Launch(RunnerId(1), ModelId("a"), Options(), Placement(()))
LAUNCHED = Transition(0.0, RunnerId(1), ModelId("a"), "launch", None, LOADING, "", 0)
GIVEN_UP = Transition(0.0, RunnerId(1), ModelId("a"), "expire", READY, EXPIRING, "", 0)
UNLOADED_SOON = Transition(0.0, RunnerId(1), ModelId("a"), "unload", EXPIRING, UNLOADED, "", 0)
LOADED, TICK, STOP, GRANT = Loaded(RunnerId(1)), Tick(), Stop(RunnerId(1)), Grant(RequestId(1), RunnerId(1))
SAVING_STOP = Stop(RunnerId(1), keep_prompts=True)
REFUSED = Reject(RequestId(1), DoesNotFitRefusal(ModelId("a"), (), (), ""))
IN_A_HURRY = Acquire(RequestId(1), LEASE, None, 9.0)
HOPELESS = Reject(RequestId(1), DeadlineInfeasible(ModelId("a"), 9.0, 8.0, 8.0, None))
BEGUN = (ASKED, (LAUNCH,), (LAUNCHED,), 1)
SERVING = (BEGUN, (LOADED, (GRANT,), (), 0))
ENDED = Exited(RunnerId(1), 0)
FAILED = Transition(0.0, RunnerId(1), ModelId("a"), "crash", LOADING, EXPIRING, "", 0)
AGAIN = Launch(RunnerId(2), ModelId("a"), Options(), Placement(()))
ASK, EXPIRE = NotifyContention(RunnerId(1), (RequestId(1),)), Expire(ModelId("a"))
LATE = Reject(RequestId(1), LoadFailedRefusal(ModelId("a"), "", 301.0))
ON_GPU = Launch(RunnerId(1), ModelId("a"), Options(), Placement(((DeviceId("gpu0"), 1),)))
LAYERED = replace(ON_GPU, placement=replace(ON_GPU.placement, gpu_layers=((DeviceId("gpu0"), 1),)))
LAYERED_AGAIN = replace(LAYERED, runner=RunnerId(2))
RAN_OUT = Exited(RunnerId(1), 1, out_of_memory=True)
CLAIM = Claim(1, (DeviceId("gpu0"),))

READ_AHEAD, LESS, MORE = (Prefetch(((ModelId("a"), size),)) for size in (5, 3, 7))
MEMORY = Acquire(RequestId(1), RequestSpec(ModelId(""), Options(), Purpose.memory, 0))
CLOSE, FINISH, REVOKE = Close(1.0), Finished(), RevokeLease(RequestId(1), "")
NO_TIME = Acquire(RequestId(1), LEASE, None, 0.0)
TIMED_OUT = Reject(RequestId(1), TimedOut(ModelId("a"), 1.0, ""))

# What the message of a violation begins with, and the steps of which the last one shows the violation.
BLUNDERS: dict[str, tuple[AuditStep, ...]] = {
    "every request is answered once: a request is lost": ((ASKED, (), (), 0),),
    "every request is answered once: request 1 is answered twice": ((ASKED, (REFUSED, REFUSED), (), 0),),
    "a grant is of a runner that serves": (BEGUN, (TICK, (GRANT,), (), 0)),
    "an expiring runner is never granted": (
        BEGUN, (LOADED, (), (), 1), (TICK, (), (GIVEN_UP,), 1), (TICK, (GRANT,), (), 0)
    ),
    "a request is granted what it asks for: request 1 wants memory": ((MEMORY, (GRANT,), (), 0),),
    "a request is granted what it asks for: request 1: not a runner": ((ASKED, (GRANT,), (), 0),),
    "no request is granted after the close": (BEGUN, (CLOSE, (), (), 1), (LOADED, (GRANT,), (), 0)),
    "only a live process of an expiring runner is stopped: runner 1 is not": (*SERVING, (TICK, (STOP,), (), 0)),
    "only a live process of an expiring runner is stopped: runner 1: its process has gone": (
        BEGUN, (ENDED, (), (GIVEN_UP,), 1), (TICK, (STOP,), (), 1)
    ),
    "a busy runner is never stopped": (*SERVING, (TICK, (STOP,), (GIVEN_UP,), 0)),
    "a runner is stopped once": (BEGUN, (TICK, (STOP, STOP), (GIVEN_UP,), 1)),
    "prompts are saved of runners that had to leave": (BEGUN, (TICK, (SAVING_STOP,), (GIVEN_UP,), 1)),
    "a runner is unloaded after its process has gone": (BEGUN, (TICK, (STOP,), (GIVEN_UP, UNLOADED_SOON), 1)),
    "a busy runner is never unloaded": (*SERVING, (ENDED, (), (GIVEN_UP, UNLOADED_SOON), 0)),
    "a runner expires once": (BEGUN, (TICK, (), (GIVEN_UP, GIVEN_UP), 1)),
    "a model has one current runner": (BEGUN, (TICK, (), (LAUNCHED,), 1)),
    "a lease is taken back only from a runner that is lost: lease 1 on": (*SERVING, (TICK, (REVOKE,), (), 0)),
    "a lease is taken back only from a runner that is lost: lease 1 is not held": ((TICK, (REVOKE,), (), 0),),
    "a runner id is never used again": (BEGUN, (TICK, (LAUNCH,), (), 1)),
    "no runner is launched after the close": ((CLOSE, (), (), 0), (ASKED, (LAUNCH,), (LAUNCHED,), 1)),
    "the number of a reading is never used again": ((TICK, (Sample(1), Sample(1)), (), 0),),
    "device claims are numbered in order": ((TICK, (Claim(2, ()),), (), 0),),
    "devices are claimed only where that is on": ((TICK, (Claim(1, ()),), (), 0),),
    "a device claim is given back once": ((TICK, (ReleaseClaim(1),), (), 0),),
    "a model is inspected once at a time": ((TICK, (Inspect(ModelId("a")), Inspect(ModelId("a"))), (), 0),),
    "only holders are told that others wait": ((TICK, (ASK,), (), 0),),
    "a holder is told once that others wait": (*SERVING, (TICK, (ASK,), (), 0), (TICK, (ASK,), (), 0)),
    "the holders of a victim are told that others wait": (*SERVING, (TICK, (), (GIVEN_UP,), 0)),
    "a closed scheduler finishes when it is empty": (BEGUN, (CLOSE, (FINISH,), (), 1)),
    "a scheduler finishes once": ((CLOSE, (FINISH, FINISH), (), 0),),
    "a cancelled request is answered": ((ASKED, (), (), 1), (Cancel(RequestId(1)), (), (), 1)),
    "no request waits beyond its time out": ((NO_TIME, (), (), 1), (TICK, (), (), 1)),
    "no request waits for longer than it can take": ((ASKED, (), (), 1), *((TICK, (), (), 1),) * 6),
    "no more requests wait than may": ((Configure(max_queue=0), (), (), 0), (ASKED, (), (), 1)),
    "a request times out when its time is over": ((ASKED, (TIMED_OUT,), (), 0),),
    "a hopeless time out is told at once: request 1 is refused, although": ((IN_A_HURRY, (HOPELESS,), (), 0),),
    "a hopeless time out is told at once: request 1 is told": ((IN_A_HURRY, (), (), 1), (TICK, (HOPELESS,), (), 0)),
    "a refusal tells its true cause: the request was not cancelled": (
        (ASKED, (Reject(RequestId(1), Cancelled(ModelId("a"))),), (), 0),
    ),
    "a refusal tells its true cause: the scheduler is open": (
        (ASKED, (Reject(RequestId(1), SchedulerClosed()),), (), 0),
    ),
    "a refusal tells its true cause: the request had its place": (
        (ASKED, (), (), 1), (TICK, (Reject(RequestId(1), QueueFullRefusal(1, 1.0)),), (), 0)
    ),
    "back off is limited": ((ASKED, (LATE,), (), 0),),
    "a failed model is not loaded before its back off is over": (
        BEGUN, (ENDED, (), (FAILED,), 1), (TICK, (AGAIN,), (), 1)
    ),
    "a load after one that ran out of memory takes less": (
        (ASKED, (LAYERED,), (LAUNCHED,), 1), (RAN_OUT, (), (FAILED,), 1), (TICK, (LAYERED_AGAIN,), (), 1)
    ),
    "a load times out only without progress": (BEGUN, (Progress(RunnerId(1)), (), (), 1), (TICK, (), (FAILED,), 1)),
    "every runner expires when memory runs out": (*SERVING, (OutOfMemory(RunnerId(1)), (), (), 0)),
    "a model that is expired leaves": (BEGUN, (EXPIRE, (), (), 1), (LOADED, (GRANT,), (), 0)),
    "what is read ahead is told when it changes": ((ASKED, (READ_AHEAD, READ_AHEAD), (), 1),),
    "what is read ahead of a file only falls": ((ASKED, (LESS, MORE), (), 1),),
    "only files of models that are waited for are read ahead": ((TICK, (READ_AHEAD,), (), 0),),
    "no file of a loaded model is read ahead": (BEGUN, (TICK, (READ_AHEAD,), (), 1)),
    "what is persisted was measured": (BEGUN, (TICK, (PersistMeasurement(RunnerId(1)),), (), 1)),
}  # fmt: skip


@pytest.mark.parametrize("what", BLUNDERS)
def test_the_auditor_notices(what: str) -> None:
    """Each property of the trace auditor finds its violation, also one whose second event comes in a later step."""
    auditor = TraceAuditor(longest_wait_s=5.0, limits=CoreConfig(claims=what.startswith("device claims are numbered")))
    *before, last = BLUNDERS[what]
    for now, (event, commands, entries, queued) in enumerate(before):
        auditor.step(float(now), event, commands, entries, queued)
    with pytest.raises(Violated, match=f"^{re.escape(what)}"):
        auditor.step(float(len(before)), *last)


def test_there_is_a_blunder_for_each_property_of_a_trace() -> None:
    """A property that no trace violates says nothing; the property of claims has blunders of its own below."""
    checks = [*of_trace.always, *of_bounded_trace.always]
    asked = {one.name for one, _ in itertools.chain(checks, *of_trace.by_cause.values())}
    assert {what.split(":")[0] for what in BLUNDERS} | {"a load begins under claims of all its devices"} == asked


LOST: dict[str, tuple[AuditStep, ...]] = {
    "never claimed": ((ASKED, (ON_GPU,), (LAUNCHED,), 1),),
    "contended": ((ASKED, (CLAIM,), (), 1), (ClaimContended(1), (ON_GPU,), (LAUNCHED,), 1)),
    "another device": ((ASKED, (Claim(1, (HOST,)),), (), 1), (ClaimGranted(1), (ON_GPU,), (LAUNCHED,), 1)),
    "given up too early": ((ASKED, (CLAIM,), (), 1), (TICK, (ReleaseClaim(1), ON_GPU), (LAUNCHED,), 1)),
}


@pytest.mark.parametrize("how", LOST)
def test_the_auditor_notices_a_launch_without_its_devices(how: str) -> None:
    """With claims, a launch without a claim that was granted or waited for long enough is found."""
    auditor = TraceAuditor(limits=CoreConfig(claims=True))
    *before, last = LOST[how]
    for now, (event, commands, entries, queued) in enumerate(before):
        auditor.step(float(now), event, commands, entries, queued)
    with pytest.raises(Violated, match="a load begins under claims of all its devices"):
        auditor.step(9.0, *last)


def test_a_launch_may_be_under_a_claim_or_after_a_long_wait_for_one() -> None:
    """A launch is right under a granted claim, or after a long wait that a claim of other devices may have begun."""
    had, missed = TraceAuditor(limits=CoreConfig(claims=True)), TraceAuditor(limits=CoreConfig(claims=True))
    had.step(0.0, ASKED, (CLAIM,), (), 1)
    had.step(9.0, ClaimGranted(1), (ON_GPU,), (LAUNCHED,), 1)
    missed.step(0.0, ASKED, (Claim(1, (HOST,)),), (), 1)
    missed.step(50.0, TICK, (ReleaseClaim(1), Claim(2, (DeviceId("gpu0"),))), (), 1)
    missed.step(60.0, TICK, (ReleaseClaim(2), ON_GPU), (LAUNCHED,), 1)
    assert had.trace.runners == missed.trace.runners == 1


def test_memory_of_the_programs_own_waits_for_no_process() -> None:
    """Seed 40109: memory of the program's own is granted though earlier groups reserved too many process slots."""
    assert simulate(Random(40109), 150).violation is None
