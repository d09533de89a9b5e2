"""The words for reasons: every reason has words, with the models' names."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from fsm.domain.devices import HOST, Placement
from fsm.machine.request import ModelId, RequestId
from fsm.machine.runner import LOADING, READY, RunnerId, RunnerState
from fsm.messages import refusals
from fsm.messages.decision_log import ConsideredDevice, ConsideredRunner, Decision, Transition
from fsm.messages.reasons import (
    BackedOff,
    ClaimMissed,
    ExpireReason,
    FailureReason,
    Infeasible,
    InfeasibleReason,
    KeptReason,
    LoadStalled,
    Measured,
    MemoryHeld,
    NeededFor,
    NoAnswer,
    NoSuchDevice,
    Prefetched,
    ProcessExited,
    Queued,
    RunnerLimit,
    RunnerStep,
    TransitionReason,
    Waited,
    WaitFor,
    WaitForRunners,
    WaitReason,
)
from fsm.sizing.model_profile import UnsupportedReason
from scheduler.errors import wording
from scheduler.errors.exceptions import DoesNotFit, LoadFailed, TimeoutTooShort
from scheduler.errors.from_refusals import error_of
from scheduler.runtime import event_stream
from tests.support.reasons import GPU, MODEL, OTHER, every

GIB = 1024**3
NAMES = {MODEL: "chat", OTHER: MODEL, ModelId(""): "the program's own memory"}  # a name may be another model's identity


def name(id: ModelId) -> str:
    return NAMES[id]


def a_runner(why: KeptReason | None, *, goes_in_s: float = 0.0, cost_s: float | None = None) -> ConsideredRunner:
    return ConsideredRunner(
        RunnerId(1), MODEL, ((HOST, GIB),), RunnerState.idle, 0, 7.0, cost_s, why is None, why, goes_in_s
    )


def said(union: Any, words: Any) -> dict[object, str]:
    return {reason: words(reason) for reason in every(union)}


WORDS: dict[str, dict[object, str]] = {
    "waits": said(WaitReason, lambda reason: wording.wait_reason(reason, name)),
    "transitions": said(TransitionReason, lambda reason: wording.transition_reason(reason, name, ModelId("third"))),
    "failures": said(FailureReason, wording.failure_reason),
    "infeasible": said(InfeasibleReason, lambda reason: wording.infeasible_reason(reason, name)),
    "unsupported": said(UnsupportedReason, wording.UNSUPPORTED.__getitem__),
    "kept": said(KeptReason, lambda why: wording.kept_reason(a_runner(why, goes_in_s=90.0))),
    "decisions": said(
        WaitReason | Queued | Waited | Prefetched | Measured | ClaimMissed | BackedOff,
        lambda reason: wording.decision_reason(reason, name),
    ),
    "problems": said(ClaimMissed, wording.problem),
}
each_kind = pytest.mark.parametrize("kind", WORDS)


@each_kind
def test_every_reason_has_words(kind: str) -> None:
    """Every reason has words that are not empty and not the value itself."""
    for reason, words in WORDS[kind].items():
        assert words.strip() and "_" not in words and "{" not in words, reason


@each_kind
def test_two_reasons_are_never_told_alike(kind: str) -> None:
    """Two different reasons have different words, unless they differ only in what people need not know."""
    told: dict[str, object] = {}
    for reason, words in WORDS[kind].items():
        other = told.setdefault(words, reason)
        assert type(other) is type(reason) is ProcessExited or other is reason, f"{other} and {reason}: {words}"


@each_kind
def test_no_identity_is_told(kind: str) -> None:
    """Each identity is replaced by its name once, so that a name that is another model's identity stays."""
    for reason, words in WORDS[kind].items():
        assert OTHER not in words
        named = getattr(reason, "models", getattr(reason, "unmovable", ()))
        assert words.count(MODEL) == tuple(named).count(OTHER), reason


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (WaitFor.earlier_requests, "earlier requests"),
        (WaitFor.memory, "memory being freed"),
        (WaitForRunners((MODEL,), RunnerStep.idle), "chat to become idle"),
        (WaitForRunners((MODEL, OTHER), RunnerStep.drain), f"chat, {MODEL} to finish"),
    ],
)
def test_a_wait_says_what_for(reason: WaitReason, words: str) -> None:
    """A wait's words have what is waited for, with the names of the models."""
    assert wording.wait_reason(reason, name) == words


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (NeededFor(MODEL), "chat needs its memory"),
        (NeededFor(MODEL, load_slot=True), "chat needs its load slot"),
        (NeededFor(ModelId("")), "the program needs its memory"),
        (RunnerLimit(1), "no more than 1 runner may be alive"),
        (RunnerLimit(2), "no more than 2 runners may be alive"),
    ],
)
def test_a_runner_that_leaves_says_for_what(reason: ExpireReason, words: str) -> None:
    """An expiry's words have the model by its name, or the limit, for which the runner is stopped."""
    assert wording.transition_reason(reason, name, OTHER) == words


def test_a_runner_that_is_replaced_says_so() -> None:
    """A runner that leaves for a request for its own model leaves because the model is loaded with other options."""
    assert wording.transition_reason(NeededFor(MODEL), name, MODEL) == "its model is loaded with other options"


@pytest.mark.parametrize(
    ("reason", "words", "served"),
    [
        (ProcessExited(-9, "killed by SIGKILL\nlast words", True), "killed by SIGKILL\nlast words", True),
        (ProcessExited(3, "", False), "its process exited with 3", False),
        (ProcessExited(None, "", False), "its process never started", False),
        (NoAnswer(10.0), "it did not answer within 10s", True),
        (NoAnswer(10.0, disconnected=True), "its connections broke, and it did not answer within 10s", True),
        (LoadStalled(300.0), "its load showed no progress for 5m", False),
    ],
)
def test_a_failure_is_told_with_what_the_engine_said(reason: FailureReason, words: str, served: bool) -> None:
    """A failure's words have what the engine said, and whether the load had succeeded."""
    error = error_of(refusals.LoadFailedRefusal(MODEL, reason, 10.0), name)
    assert isinstance(error, LoadFailed)
    assert (error.model, error.reason, error.served, error.retry_after_s) == ("chat", words, served, 10.0)


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        (Infeasible.no_required_gpu, "ask for it without a GPU (require_gpu, num_gpu)"),
        (Infeasible.no_gpu, "ask for it without a GPU (require_gpu, num_gpu)"),
        (MemoryHeld((MODEL,), pinned=False), "end that process, or use a smaller"),
        (MemoryHeld((MODEL,), pinned=True), "unpin some of them, or use a smaller"),
        (Infeasible.held_elsewhere, "free some of it, or use a smaller"),
        (Infeasible.too_large, "use a smaller model, context or cache type, or raise the limit"),
        (RunnerLimit(2, (MODEL,)), "use a smaller model, context or cache type, or raise the limit"),
    ],
)
def test_the_advice_is_one_that_helps(reason: InfeasibleReason, advice: str) -> None:
    """Advice fits the reason: no smaller context for a missing GPU, and no higher limit for memory that others hold."""
    error = error_of(refusals.DoesNotFitRefusal(MODEL, ((HOST, 1),), (), reason), name)
    assert isinstance(error, DoesNotFit) and error.advice.startswith(advice)
    assert f"{wording.infeasible_reason(reason, name)}; {advice}" in str(error)
    assert str(error_of(refusals.DoesNotFitRefusal(ModelId(""), (), (), reason), name)).endswith("; reserve less")


def test_where_there_is_no_such_device_those_that_there_are_are_the_advice() -> None:
    """The advice for a missing device is the devices that are there."""
    error = error_of(refusals.DoesNotFitRefusal(MODEL, ((GPU, 1),), (), NoSuchDevice(GPU, (HOST,))), name)
    assert str(error).endswith("there is no device 'gpu0'; there is cpu")
    assert wording.infeasible_reason(NoSuchDevice(GPU, ()), name).endswith("there is none")


def test_a_lease_that_is_lost_with_the_scheduler_says_so() -> None:
    """A lease that is lost with the scheduler says so, and not that its runner failed."""
    assert wording.revoke_reason(None) == "the scheduler was closed"
    assert wording.revoke_reason(NoAnswer(1.0)) == wording.failure_reason(NoAnswer(1.0))


def test_a_wait_for_a_load_is_told_alike_wherever_it_is_told() -> None:
    """A wait for a load is told with the same words in an error and in a status."""
    assert TimeoutTooShort("a", 1.0, 2.0, 3.0).waiting_for == wording.wait_reason(WaitFor.load, name)


@pytest.mark.parametrize(
    ("needed", "free", "taken", "words"),
    [
        (GIB, 2 * GIB, True, ""),
        (3 * GIB, 2 * GIB, False, "it lacks 1 GiB"),
        (GIB, 2 * GIB, False, "it has enough"),
        (0, 5 * GIB, False, "it is not needed"),
        (0, GIB, False, "1 GiB are not enough for all of it"),
        (0, -GIB, False, "0 bytes are not enough for all of it"),
    ],
)
def test_a_device_says_why_nothing_goes_there(needed: int, free: int, taken: bool, words: str) -> None:
    """A device's words have why nothing is placed there, by the needed and the free bytes."""
    one = ConsideredDevice(HOST, needed, free, taken)
    assert wording.device_reason(one, (one, ConsideredDevice(GPU, 4 * GIB, 8 * GIB, True))) == words


def test_victims_are_named_with_what_they_cost() -> None:
    """Victims are named with their costs where the policy gives some."""
    kept = a_runner(KeptReason.in_use, cost_s=9.0)
    assert wording.victims((a_runner(None), kept), name) == "chat"
    costly = (a_runner(None, cost_s=1.25), a_runner(None, cost_s=2.0), kept)
    assert wording.victims(costly, name) == "chat, chat, which is expected to cost 3.25 s of loading"


def test_what_was_measured_is_told_beside_what_was_predicted() -> None:
    """A measurement's words have the measured and the predicted bytes, and whether an earlier run measured them."""
    figures = ((HOST, 6 * GIB, 4 * GIB, 5 * GIB),)
    assert wording.decision_reason(Measured(figures, known=False, filled=True), name) == (
        "a request filled a context; cpu: 6 GiB predicted, 4 GiB measured, 5 GiB held"
    )
    known = wording.decision_reason(Measured(figures, known=True, filled=False), name)
    assert known == "cpu: 6 GiB measured before, 4 GiB measured, 5 GiB held"


def test_a_placement_is_told_by_layers_and_bytes() -> None:
    """A placement's words have layers and bytes by device."""
    placement = Placement(((HOST, GIB), (GPU, 3 * GIB)), ((GPU, 33),))
    assert wording.decision_reason(placement, name) == "33 layers on gpu0, 1 GiB of cpu, 3 GiB of gpu0"


def test_what_a_policy_raised_is_told_as_it_is() -> None:
    """What a policy raised is told as it is."""
    assert wording.problem("ValueError()") == (
        "the eviction policy raised ValueError(): the oldest runners go first instead"
    )


def test_events_have_words_beside_the_values() -> None:
    """Events of runners and devices have words beside their values, and a refusal has its error's."""
    listened = event_stream.EventStream(9, name)
    devices = (ConsideredDevice(HOST, GIB, 0, False),)
    refusal = refusals.DoesNotFitRefusal(MODEL, ((HOST, GIB),), ((HOST, 0),), MemoryHeld((OTHER,), pinned=True))
    listened.offer(
        [
            Transition(1.0, RunnerId(1), MODEL, "serve", LOADING, READY, NeededFor(MODEL), 1),
            Decision(2.0, "rejected", MODEL, refusal, RequestId(3), None, 4.0, (a_runner(KeptReason.pinned),), devices),
            Decision(3.0, "evicts", MODEL, None, runners=(a_runner(None),)),
        ]
    )
    moved, rejected, evicts = (listened.take(0) for _ in range(3))
    assert (
        isinstance(moved, event_stream.Transition)
        and isinstance(rejected, event_stream.Decision)
        and isinstance(evicts, event_stream.Decision)
    )
    assert (moved.at, moved.destination, moved.leases, moved.why) == (1.0, READY, 1, NeededFor(MODEL))
    assert moved.reason == "its model is loaded with other options"
    assert (rejected.what, rejected.request, rejected.until, rejected.why) == ("rejected", 3, 4.0, refusal)
    assert rejected.reason == str(error_of(refusal, name))
    assert ([one.reason for one in rejected.runners], [one.reason for one in rejected.devices]) == (
        ["it is pinned"],
        ["it lacks 1 GiB"],
    )
    assert (evicts.reason, evicts.runners[0].taken, evicts.runners[0].reason) == ("chat", True, "")


def test_a_pattern_without_names_gets_the_words_where_they_always_were() -> None:
    """The fields of an event come in the order of the documentation in a pattern, the reason as text."""
    listened = event_stream.EventStream(9, name)
    listened.offer([Transition(1.0, RunnerId(1), MODEL, "serve", LOADING, READY, NeededFor(MODEL), 1)])
    match listened.take(0):
        case event_stream.Transition(at, _, _, trigger, _, destination, reason, leases):
            assert (at, trigger, destination, reason, leases) == (
                1.0,
                "serve",
                READY,
                "its model is loaded with other options",
                1,
            )
        case other:
            raise AssertionError(other)
    for kind in (event_stream.Transition, event_stream.Decision, event_stream.ConsideredRunner):
        assert set(kind.__match_args__) == {field.name for field in fields(kind)}
