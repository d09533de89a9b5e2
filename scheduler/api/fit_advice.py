"""Advice on how to request a model so that it fits: other options, each of them previewed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import le
from typing import assert_never

from fsm.core import Core
from fsm.domain.options import Options
from fsm.machine.request import RequestSpec
from fsm.preview import Outcome, Preview, preview
from fsm.sizing.footprint import Footprint
from fsm.sizing.load_history import NOTHING, LoadHistory
from fsm.sizing.model_profile import ModelProfile
from scheduler.engines.llama_options import UNQUANTISED

MOST_TRIES = 30  # previews that one advice may cost; each is a copy of the core and two steps
MOST_ADVICE = 3

Inspection = Callable[[Sequence[Options]], ModelProfile | Footprint]  # inspects one model for some options

_QUANTISED = "q8_0"  # costs hardly any measurable quality; smaller types do
# tokens; halved further only as the last resort, or for a context that is no larger to begin with, or an embedder
_SMALL_CONTEXT = 2048
_SMALLEST_CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Advice:
    """Other options for a request, and what would become of it with them."""

    options: Options  # all options that the request has to name
    preview: Preview


def advise(
    now: float,
    core: Core,
    spec: RequestSpec,
    profile: ModelProfile | Footprint,
    inspect: Inspection,
    found: Preview,
    known: LoadHistory = NOTHING,
) -> tuple[Advice, ...]:
    """Return other options with which a model fits, the least harm first.

    The result is empty where the model fits, or no option would help. With these options a model that never fits would
    fit, if need be after evictions; a request that evicts or waits would do neither; a model that goes to GPUs in part
    would go whole. `profile` and `found` are the inspection and the preview of `spec` itself. Each advice was previewed
    in turn, and each does less harm of some kind than every advice before it.
    """
    if isinstance(profile, Footprint) or _worth(found) == _BEST:
        return ()
    own = _resolved(profile, spec.options)
    explicit = own if own is not None and found.options == spec.options else found.options
    advice: list[Advice] = []
    harms: list[tuple[int, ...]] = []  # of each advice
    tries = 0
    ways = tuple(_ways(spec.options, explicit, _gpu_ways(explicit, found), small=profile.embedding))
    last = tuple(_last_ways(spec.options, explicit))
    others = _with_others(profile, inspect([*ways, *last]))
    for options in chain(ways, (options for options in last if not advice)):
        if (other_options := _resolved(others, options)) is None:
            continue
        harm = _harm(explicit, other_options)
        if not any(harm) or any(all(map(le, least, harm)) for least in harms):
            continue
        if tries == MOST_TRIES or len(advice) == MOST_ADVICE:
            break
        tries += 1
        other = preview(now, core, replace(spec, options=options), others, known)
        if _worth(other) > _worth(found):
            advice.append(Advice(options, other))
            harms.append(harm)
    return tuple(advice)


def _with_others(profile: ModelProfile, others: ModelProfile | Footprint) -> ModelProfile:
    assert isinstance(others, ModelProfile), "the same model is inspected again"
    return replace(profile, resolutions=profile.resolutions + others.resolutions)


def _worth(found: Preview) -> tuple[int, bool]:
    """Return how well a request is served: never, after a wait, or at once; and in part, or whole."""
    match found.outcome:
        case Outcome.never:
            return 0, False
        case Outcome.evicts | Outcome.waits:
            return 1, not found.in_part
        case Outcome.fits:
            return 2, not found.in_part
        case Outcome.warm | Outcome.refused:
            # the model is loaded; a refusal at this moment has nothing to do with its size
            return _BEST
        case _:
            assert_never(found.outcome)


_BEST = (2, True)


def _resolved(profile: ModelProfile, asked: Options) -> Options | None:
    """Return the options of the load that needs no GPUs of a certain size; None where the engine would refuse them."""
    one = next(resolution for resolution in profile.resolutions if resolution.asked == asked)
    return None if one.unsupported else next(load.options for load in one.loads if not load.least_gpu_bytes)


def _ways(asked: Options, explicit: Options, gpu_ways: Sequence[int], *, small: bool) -> Iterator[Options]:
    """Yield other options, the least harm first: cache types, context, slots, placement, and several of them."""
    if explicit.num_ctx is None or explicit.num_parallel is None:
        return  # its engine knows no contexts and no slots
    least = _SMALLEST_CONTEXT if small or explicit.num_ctx <= _SMALL_CONTEXT else _SMALL_CONTEXT
    contexts = _halves(explicit.num_ctx, least, most=5)
    slots = _halves(explicit.num_parallel, 1, most=3)
    ways = [asked]
    if _can_be_smaller(explicit):
        ways.append(replace(asked, cache_type_k=_QUANTISED, cache_type_v=_QUANTISED))
    yield from ways
    for way in ways:
        yield from (replace(way, num_ctx=context) for context in contexts)
    yield from (replace(asked, num_parallel=count) for count in slots[:-1])
    for way in ways if slots else ():
        alone = replace(way, num_parallel=1)
        yield alone
        yield from (replace(alone, num_ctx=context) for context in contexts)
    for way in ways:
        yield from (replace(way, num_gpu=layers) for layers in gpu_ways)


def _last_ways(asked: Options, explicit: Options) -> Iterator[Options]:
    """Yield options that only help where no others do: contexts that are of little use."""
    least = replace(asked, num_parallel=1) if (explicit.num_parallel or 1) > 1 else asked
    ways = [least]
    if _can_be_smaller(explicit):
        ways.append(replace(least, cache_type_k=_QUANTISED, cache_type_v=_QUANTISED))
    for way in ways:
        yield from (replace(way, num_ctx=context) for context in (_SMALL_CONTEXT // 2, _SMALLEST_CONTEXT))


def _gpu_ways(explicit: Options, found: Preview) -> tuple[int, ...]:
    """Return other numbers of layers to put on GPUs; a requested number that never fits is left to the core."""
    if not found.layers:
        return ()
    if explicit.num_gpu is not None and explicit.num_gpu >= 0:
        return (-1,) if found.outcome is Outcome.never else ()
    if found.outcome not in (Outcome.evicts, Outcome.waits):
        return ()  # the core has tried them all
    return tuple(found.layers * quarters // 4 for quarters in (3, 2, 1, 0))


def _halves(number: int, least: int, *, most: int) -> list[int]:
    """Return a half, a quarter and so on down to `least`, or every second or third of these where that is too many."""
    halves = []
    while number // 2 >= least:
        number //= 2
        halves.append(number)
    step = max(1, -(-len(halves) // most))
    return halves[::-1][::step][::-1]


def _can_be_smaller(explicit: Options) -> bool:
    """Return whether the cache has a type that is not quantised."""
    return not {explicit.cache_type_k, explicit.cache_type_v}.isdisjoint(UNQUANTISED)


def _harm(explicit: Options, other: Options) -> tuple[int, ...]:
    """Return how much worse other options are, by kind; 0: not at all."""
    return (
        (explicit.num_ctx or 0) - (other.num_ctx or 0),
        (explicit.num_parallel or 0) - (other.num_parallel or 0),
        int((explicit.cache_type_k, explicit.cache_type_v) != (other.cache_type_k, other.cache_type_v)),
        int(explicit.num_gpu != other.num_gpu),
    )
