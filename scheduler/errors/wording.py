"""The words for every reason of the core: made only here, for people to read, and never searched by a program.

`name` gives the name to show for a model's identity. Words of engines, the system and eviction policies are passed on
as they are, but for control characters, which are escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from types import MappingProxyType
from typing import ParamSpec, assert_never

from fsm.domain.devices import Placement
from fsm.domain.options import MOST_SLOTS, MOST_THREADS
from fsm.machine.request import ModelId
from fsm.machine.runner import LOADING
from fsm.messages.decision_log import ConsideredDevice, ConsideredRunner, Decision, DecisionKind, Transition
from fsm.messages.reasons import (
    AskedBy,
    BackedOff,
    ClaimMissed,
    DeviceShrunk,
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
    RanOutOfMemory,
    RunnerLimit,
    RunnerReason,
    RunnerStep,
    TransitionReason,
    Waited,
    WaitFor,
    WaitForRunners,
    WaitReason,
)
from fsm.sizing.model_profile import UnsupportedReason
from scheduler.errors.formatting import format_bytes, format_duration, one_line, shown

Name = Callable[[ModelId], str]
Arguments = ParamSpec("Arguments")


def _safe(words: Callable[Arguments, str]) -> Callable[Arguments, str]:
    """Escape the control characters in the words that a function returns."""

    @wraps(words)
    def escaped(*arguments: Arguments.args, **named: Arguments.kwargs) -> str:
        return shown(words(*arguments, **named))

    return escaped


SMALLER = "use a smaller model, context or cache type"
_WITHOUT_GPU = "ask for it without a GPU (require_gpu, num_gpu)"

WAITS: Mapping[WaitFor, str] = MappingProxyType(
    {
        WaitFor.plan: "its turn",
        WaitFor.metadata: "its model's metadata",
        WaitFor.load: "its model to load",
        WaitFor.other_load: "the load of its model with other options",
        WaitFor.earlier_requests: "earlier requests",
        WaitFor.same_model: "an earlier request for its model",
        WaitFor.lease: "a lease on its model to be released",
        WaitFor.memory: "memory being freed",
        WaitFor.load_slot: "a load slot",
        WaitFor.claim: "the claim of its devices among all programs",
        WaitFor.other_program: "another program that loads a model",
    }
)
STEPS: Mapping[RunnerStep, str] = MappingProxyType(
    {
        RunnerStep.leave: "to leave",
        RunnerStep.idle: "to become idle",
        RunnerStep.drain: "to finish",
        RunnerStep.load_then_idle: "to load, and then to become idle",
        RunnerStep.release: "to be released by callers that wait for other leases themselves",
        RunnerStep.load_alone: "to load with no other load beside it",
    }
)
RUNNERS: Mapping[RunnerReason, str] = MappingProxyType(
    {
        RunnerReason.granted: "a lease was granted",
        RunnerReason.released: "its last lease was released",
        RunnerReason.loaded: "it is loaded, and no request waits for a lease",
        RunnerReason.preloaded: "it was preloaded",
        RunnerReason.no_keep_alive: "its keep-alive is 0",
        RunnerReason.keep_alive_over: "its keep-alive is over",
        RunnerReason.abandoned: "no request waits for it any more",
        RunnerReason.asked: "its model was expired",
        RunnerReason.files_replaced: "its model's files were replaced",
        RunnerReason.asked_while_awaited: "its model was expired after the requests that waited for it",
        RunnerReason.better_place: "more of its layers can go to GPUs now",
        RunnerReason.closing: "the scheduler closes",
        RunnerReason.memory_freed: "its memory is free again",
        RunnerReason.memory_overdue: "its memory was not free again in time",
    }
)
INFEASIBLE: Mapping[Infeasible, str] = MappingProxyType(
    {
        Infeasible.held_elsewhere: "other programs, or the program's own reservations, hold the memory",
        Infeasible.no_gpu: "it is to be on GPUs, and there is none",
        Infeasible.no_required_gpu: "a GPU is required, and there is none",
        Infeasible.too_large: "it is larger than the memory there is",
    }
)
UNSUPPORTED: Mapping[UnsupportedReason, str] = MappingProxyType(
    {
        UnsupportedReason.too_many_slots: f"a runner has at most {MOST_SLOTS} slots",
        UnsupportedReason.too_many_threads: f"a runner has at most {MOST_THREADS} threads",
        UnsupportedReason.partial_blocks: "the model's heads are no whole blocks of the type",
        UnsupportedReason.needs_flash_attention: "values can be quantised only with flash attention",
        UnsupportedReason.no_such_gpu: "there is no such GPU now; the status shows those that there are",
        UnsupportedReason.needs_all_layers: "all layers are required on GPUs: name no fewer, or leave it out",
    }
)
KEPT: Mapping[KeptReason, str] = MappingProxyType(
    {
        KeptReason.goes_last: "it is to be evicted when nothing else is missing",
        KeptReason.goes_later: "it is to be evicted in {goes_in}, or when it is idle",
        KeptReason.overdue: "it was stopped, but does not end",
        KeptReason.expiring: "it is expiring already",
        KeptReason.evicted: "it was evicted for this request, and is leaving",
        KeptReason.pinned: "it is pinned",
        KeptReason.other_victim: "it is evicted for another request",
        KeptReason.awaited: "other requests wait for its load",
        KeptReason.not_needed: "no runner has to be evicted",
        KeptReason.in_use: "it is in use",
        KeptReason.just_loaded: "it has only just been loaded",
        KeptReason.just_used: "it was used a moment ago",
        KeptReason.not_enough: "evicting all runners that may be evicted would not be enough",
        KeptReason.others_cost_less: "evicting other runners is expected to cost less",
        KeptReason.others_come_first: "other runners come first in the policy's order, and suffice",
    }
)


DECISIONS: Mapping[DecisionKind, str] = MappingProxyType(
    {
        "queued": "{subject} is queued: {reason}",
        "waits": "{subject} waits {reason}",
        "evicts": "{subject} evicts {reason}",
        "placed": "{subject} is placed: {reason}",
        "launched": "{subject} is started {reason}",
        "prefetched": "{subject} reads ahead {reason}",
        "granted": "{subject} is granted: {reason}",
        "rejected": "{subject} is refused: {reason}",
        "measured": "{subject} was measured: {reason}",
        "backs off": "{subject} backs off: {reason}",
    }
)


@_safe
def wait_reason(reason: WaitReason, name: Name) -> str:
    """Return what a request waits for, as in "it waits for …"."""
    match reason:
        case WaitFor():
            return WAITS[reason]
        case WaitForRunners(models, step):
            return f"{_names(models, name)} {STEPS[step]}"
        case _:
            assert_never(reason)


@_safe
def transition_reason(reason: TransitionReason, name: Name, own: ModelId) -> str:
    """Return why a runner of the model `own` changed its state."""
    match reason:
        case RunnerReason():
            return RUNNERS[reason]
        case AskedBy(request):
            return f"request {request} waits for it"
        case NeededFor(model) if model == own:
            return "its model is loaded with other options"
        case NeededFor(model, load_slot):
            return f"{name(model) if model else 'the program'} needs its {'load slot' if load_slot else 'memory'}"
        case RunnerLimit():
            return _runner_limit(reason, name)
        case DeviceShrunk(device):
            return f"there is less memory on {device} than before"
        case RanOutOfMemory(model):
            return f"{name(model)} ran out of memory"
        case ProcessExited() | NoAnswer() | LoadStalled():
            return failure_reason(reason)
        case _:
            assert_never(reason)


@_safe
def failure_reason(reason: FailureReason) -> str:
    """Return why a runner is gone, or unusable; the text may have several lines, of which the first says most."""
    match reason:
        case ProcessExited(code, text):
            return text or ("its process never started" if code is None else f"its process exited with {code}")
        case NoAnswer(timeout_s, disconnected):
            broke = "its connections broke, and " if disconnected else ""
            return f"{broke}it did not answer within {format_duration(timeout_s)}"
        case LoadStalled(timeout_s):
            return f"its load showed no progress for {format_duration(timeout_s)}"
        case _:
            assert_never(reason)


@_safe
def revoke_reason(reason: FailureReason | None) -> str:
    """Return why a lease is lost."""
    return "the scheduler was closed" if reason is None else failure_reason(reason)


@_safe
def infeasible_reason(reason: InfeasibleReason, name: Name) -> str:
    """Return why a request can never be satisfied."""
    match reason:
        case Infeasible():
            return INFEASIBLE[reason]
        case NoSuchDevice(device, devices):
            return f"there is no device {device!r}; there is {', '.join(devices) or 'none'}"
        case RunnerLimit():
            return _runner_limit(reason, name)
        case MemoryHeld(models, pinned):
            stuck = "its memory is held by runners that were stopped and do not end"
            held = "it would fit only by evicting pinned models" if pinned else stuck
            return f"{held}: {_names(models, name)}"
        case _:
            assert_never(reason)


def remedy(reason: InfeasibleReason, otherwise: str) -> str:
    """Return what helps where a request can never be satisfied; `otherwise` where only the size could be changed.

    The text is empty where the reason itself names the devices that exist.
    """
    match reason:
        case Infeasible.no_gpu | Infeasible.no_required_gpu:
            return _WITHOUT_GPU
        case Infeasible.held_elsewhere:
            return f"free some of it, or {SMALLER}"
        case MemoryHeld(pinned=pinned):
            return f"{'unpin some of them' if pinned else 'end that process'}, or {SMALLER}"
        case Infeasible.too_large | RunnerLimit():
            return otherwise
        case NoSuchDevice():
            return ""
        case _:
            assert_never(reason)


def kept_reason(considered: ConsideredRunner) -> str:
    """Return why a runner is not evicted; empty where it is."""
    if considered.why is None:
        return ""
    return KEPT[considered.why].format(goes_in=format_duration(considered.goes_in_s))


def device_reason(considered: ConsideredDevice, devices: Iterable[ConsideredDevice]) -> str:
    """Return why a model is not placed on one of the `devices` that were considered; empty where it is."""
    needed, free = considered.needed_bytes, considered.free_bytes
    if considered.taken:
        return ""
    if needed:
        return f"it lacks {format_bytes(needed - free)}" if needed > free else "it has enough"
    whole = sum(one.needed_bytes for one in devices)
    return "it is not needed" if whole <= free else f"{format_bytes(max(0, free))} are not enough for all of it"


@_safe
def victims(runners: Iterable[ConsideredRunner], name: Name) -> str:
    """Return which runners are evicted, and what that is expected to cost where the policy gives costs."""
    going = [one for one in runners if one.taken]
    names, costs = _names((one.model for one in going), name), [one.cost_s for one in going if one.cost_s is not None]
    return f"{names}, which is expected to cost {sum(costs):.2f} s of loading" if costs else names


@_safe
def decision_reason(
    reason: WaitReason | Queued | Waited | Placement | ClaimMissed | Prefetched | Measured | BackedOff, name: Name
) -> str:
    """Return why a decision is as it is, for decisions that are not refusals."""
    match reason:
        case WaitFor() | WaitForRunners():
            return f"for {wait_reason(reason, name)}"
        case Queued(waiting):
            return "1 request waits" if waiting == 1 else f"{waiting} requests wait"
        case Waited(waited_s):
            return f"it waited {waited_s:.3f} s"
        case Placement(amounts, gpu_layers):
            layers = [f"{count} layers on {device}" for device, count in gpu_layers]
            return ", ".join([*layers, *(f"{format_bytes(size)} of {device}" for device, size in amounts)])
        case ClaimMissed():
            return f"although {claim_missed(reason)}"
        case Prefetched(size):
            return f"{format_bytes(size)} of its files while it waits"
        case Measured(amounts, known, filled):
            before = "measured before" if known else "predicted"
            figures = [
                f"{on}: {format_bytes(predicted)} {before}, {format_bytes(most)} measured, {format_bytes(held)} held"
                for on, predicted, most, held in amounts
            ]
            return "; ".join((["a request filled a context"] if filled else []) + figures)
        case BackedOff(failures, back_off_s, these_options):
            times = "it failed" if failures == 1 else f"it failed {failures} times in a row"
            options = " with these options" if these_options else ""
            return f"{times}{options}, and is not loaded{options and ' so'} for {format_duration(back_off_s)}"
        case _:
            assert_never(reason)


def transition_line(entry: Transition, name: Name) -> str:
    """Return a transition, with its reason, as a sentence of one line that is safe to show."""
    what = f"is {entry.destination.value}"
    if entry.trigger == "crash":
        what = "has failed to load" if entry.source is LOADING else "has crashed"
    reason = transition_reason(entry.why, name, entry.model)
    return one_line(f"runner {entry.runner} of {name(entry.model)} {what}: {reason}")


def decision_line(entry: Decision, name: Name, reason: str) -> str:
    """Return a decision, with its reason in words, as a sentence of one line that is safe to show."""
    subject = name(entry.model)
    if entry.request is not None:
        subject = f"request {entry.request} for {subject}"
    elif entry.runner is not None:
        subject = f"runner {entry.runner} of {subject}"
    return one_line(DECISIONS[entry.what].format(subject=subject, reason=reason))


@_safe
def claim_missed(reason: ClaimMissed) -> str:
    """Return which device claims a launch went ahead without."""
    devices = ", ".join(reason.devices)
    return f"other programs that load models did not release {devices} within {format_duration(reason.timeout_s)}"


@_safe
def problem(found: str | ClaimMissed) -> str:
    """Return what went wrong around decisions; a text is what the eviction policy raised."""
    match found:
        case str():
            return f"the eviction policy raised {found}: the oldest runners go first instead"
        case ClaimMissed():
            return claim_missed(found)
        case _:
            assert_never(found)


def _names(models: Iterable[ModelId], name: Name) -> str:
    return ", ".join(map(name, models))


def _runner_limit(reason: RunnerLimit, name: Name) -> str:
    kept = f", and these cannot be evicted: {_names(reason.unmovable, name)}" if reason.unmovable else ""
    return f"no more than {reason.limit} {'runner' if reason.limit == 1 else 'runners'} may be alive{kept}"
