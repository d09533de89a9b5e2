"""How to ask for a model so that it fits: other options, each of them previewed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import le
from typing import assert_never

from fsm.core import Core
from fsm.domain.model_info import ModelInfo, Options
from fsm.machine.request import RequestSpec
from fsm.preview import Outcome, Preview, preview
from fsm.sizing.footprint import Footprint
from fsm.sizing.load_history import NOTHING, LoadHistory
from fsm.sizing.load_options import CACHE_BLOCK, UNQUANTISED, resolve

MOST_TRIES = 30  # previews that one advice may cost; each is a copy of the core and two steps
MOST_ADVICE = 3

_QUANTISED = "q8_0"  # what it costs in quality is hardly measurable; smaller types are another matter
_SMALL_CONTEXT = 2048  # tokens; halved further only at last, or where it is no larger to begin with, or embeds
_SMALLEST_CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Advice:
    """Another way to ask for a model, and what becomes of it then."""

    options: Options  # all that the request is to name
    preview: Preview


def advise(
    now: float, core: Core, want: RequestSpec, info: ModelInfo | Footprint, found: Preview, known: LoadHistory = NOTHING
) -> tuple[Advice, ...]:
    """Return how to ask so that it fits, the least harm first; empty where it does, or no option would help.

    Of what never fits, that is with which options it would, if need be once others have left; of what evicts or
    waits, with which it need not; of what goes to GPUs in part, with which all of it would. `found` is the preview of
    `want` itself. Each advice was previewed in turn; none is listed that does no less harm than one before it.
    """
    if isinstance(info, Footprint) or _worth(found) == _BEST:
        return ()
    defaults = core.snapshot().limits.defaults
    explicit = resolve(info, found.options, defaults)
    advice: list[Advice] = []
    harms: list[tuple[int, ...]] = []  # of each advice
    tries = 0
    ways = _ways(info, want.options, explicit, _gpu_ways(explicit, found))
    last = (options for options in _last_ways(info, want.options, explicit) if not advice)
    for options in chain(ways, last):
        harm = _harm(explicit, resolve(info, options, defaults))
        if not any(harm) or any(all(map(le, least, harm)) for least in harms):
            continue
        if tries == MOST_TRIES or len(advice) == MOST_ADVICE:
            break
        tries += 1
        other = preview(now, core, replace(want, options=options), info, known)
        if _worth(other) > _worth(found):
            advice.append(Advice(options, other))
            harms.append(harm)
    return tuple(advice)


def _worth(found: Preview) -> tuple[int, bool]:
    """Return how well somebody is served: it never fits, or not at once, or at once; and in part, or whole."""
    match found.outcome:
        case Outcome.never:
            return 0, False
        case Outcome.evicts | Outcome.waits:
            return 1, not found.in_part
        case Outcome.fits:
            return 2, not found.in_part
        case Outcome.warm | Outcome.refused:  # it is loaded; what is refused at this moment is no question of size
            return _BEST
        case _:
            assert_never(found.outcome)


_BEST = (2, True)


def _ways(info: ModelInfo, asked: Options, explicit: Options, gpu_ways: Sequence[int]) -> Iterator[Options]:
    """Yield other ways to ask, the least harm first: cache types, the context, slots, where it goes, and several."""
    assert explicit.num_ctx is not None and explicit.num_parallel is not None, "made explicit by resolve"
    small = info.embedding or explicit.num_ctx <= _SMALL_CONTEXT
    contexts = _halves(explicit.num_ctx, _SMALLEST_CONTEXT if small else _SMALL_CONTEXT, most=5)
    slots = _halves(explicit.num_parallel, 1, most=3)
    ways = [asked]
    if _can_be_quantised(info, explicit):
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


def _last_ways(info: ModelInfo, asked: Options, explicit: Options) -> Iterator[Options]:
    """Yield ways to ask that only help where no other does: contexts that are of little use."""
    least = replace(asked, num_parallel=1) if (explicit.num_parallel or 1) > 1 else asked
    ways = [least]
    if _can_be_quantised(info, explicit):
        ways.append(replace(least, cache_type_k=_QUANTISED, cache_type_v=_QUANTISED))
    for way in ways:
        yield from (replace(way, num_ctx=context) for context in (_SMALL_CONTEXT // 2, _SMALLEST_CONTEXT))


def _gpu_ways(explicit: Options, found: Preview) -> tuple[int, ...]:
    """Return other numbers of layers to put on GPUs; what was asked for is left to the core if it never fits."""
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


def _can_be_quantised(info: ModelInfo, explicit: Options) -> bool:
    """Whether the cache may have a quantised type where it has a larger one; for values flash attention must be on."""
    whole_blocks = not (info.key_length % CACHE_BLOCK or info.value_length % CACHE_BLOCK)
    larger = explicit.cache_type_k in UNQUANTISED or explicit.cache_type_v in UNQUANTISED
    return whole_blocks and larger and explicit.flash_attention is not False


def _harm(explicit: Options, other: Options) -> tuple[int, ...]:
    """Return how much worse other options are, by kind; 0: not at all."""
    return (
        (explicit.num_ctx or 0) - (other.num_ctx or 0),
        (explicit.num_parallel or 0) - (other.num_parallel or 0),
        int((explicit.cache_type_k, explicit.cache_type_v) != (other.cache_type_k, other.cache_type_v)),
        int(explicit.num_gpu != other.num_gpu),
    )
