"""What would happen if somebody asked now, told by the core itself: a copy of it is asked, and nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from itertools import chain
from operator import le
from typing import assert_never

from fsm.commands import DoesNotFit, Grant, Refusal, Reject
from fsm.core import Core
from fsm.events import Acquire, Inspected, Tick
from fsm.eviction import Candidate
from fsm.footprint import Footprint, Part, parts
from fsm.model import HOST, Amounts, DeviceId, ModelInfo, Options
from fsm.options import CACHE_BLOCK, UNQUANTISED, resolve
from fsm.placement import Demand, needed
from fsm.plan import Plan
from fsm.pool import Pool, runner_serves
from fsm.remembered import NOTHING, Remembered
from fsm.request import Purpose, RequestId, Want
from fsm.runner import Runner

MOST_TRIES = 30  # previews that one advice may cost; each is a copy of the core and two steps
MOST_ADVICE = 3

_QUANTISED = "q8_0"  # what it costs in quality is hardly measurable; smaller types are another matter
_SMALL_CONTEXT = 2048  # tokens; halved further only at last, or where it is no larger to begin with, or embeds
_SMALLEST_CONTEXT = 512


class Outcome(Enum):
    """What becomes of a request."""

    warm = "warm"  # a runner that is loaded serves it
    fits = "fits"  # it is loaded at once
    evicts = "evicts"  # others leave first
    waits = "waits"  # for what is under way: a load, memory that comes back, those before it
    refused = "refused"  # at this moment, whatever its size: the queue is full, its loads failed, the end has come
    never = "never"  # there is no room for it, whoever leaves


@dataclass(frozen=True, slots=True)
class Share:
    """What one device gives, in bytes."""

    device: DeviceId  # an integrated GPU's share is the host's
    part: Part  # as predicted, by kind
    takes_bytes: int  # the sum of it, or what was measured
    needed_bytes: int  # what must be free for it: headroom included
    free_bytes: int  # what it is judged by: what is free, and what the victims leave


@dataclass(frozen=True, slots=True)
class Preview:
    """What becomes of a request, where its runner goes, and who leaves for it."""

    outcome: Outcome
    options: Options  # explicit, as far as is known
    shares: tuple[Share, ...] = ()  # the host's first; empty where nothing is planned for it yet
    gpu_layers: Amounts = ()
    layers: int = 0  # that can go to GPUs, the output among them; 0: there are none, or no GPUs
    measured: bool = False  # what it takes was measured on a runner placed the same way, or on the one that serves
    victims: tuple[Candidate, ...] = ()  # non-empty iff it evicts
    waits_for: str = ""  # in words; non-empty iff it waits
    refusal: Refusal | None = None  # DoesNotFit if never, another kind if it is refused

    @property
    def in_part(self) -> bool:
        """Whether it is left to the core how many layers go to GPUs, and not all do."""
        automatic = self.options.num_gpu is None or self.options.num_gpu < 0
        return automatic and sum(count for _, count in self.gpu_layers) < self.layers


def preview(now: float, core: Core, want: Want, info: ModelInfo | Footprint, known: Remembered = NOTHING) -> Preview:
    """Return what would become of `want`, asked `now`, if an inspection found `info` and `known`; `core` stays.

    What is due by now is taken to have happened. `want` is for a lease or a preload.
    """
    assert want.purpose is not Purpose.memory, "memory has no model"
    scratch = core.copy()
    pool, scratch.plans = scratch.pool, []
    pool.limits = replace(pool.limits, claims=False)  # what other programs do at this moment is no part of the answer
    scratch.step(now, Tick())
    scratch.plans.clear()
    request = RequestId(max(pool.requests, default=0) + 1)
    commands = scratch.step(now, Acquire(request, want))
    if (model := pool.models.get(want.model)) is not None and model.inspecting:
        commands += scratch.step(now, Inspected(want.model, info, known))
    for command in commands:
        match command:
            case Grant(answered, runner) if answered == request and runner is not None:
                return _served(pool, want, pool.runners[runner], Outcome.warm)
            case Reject(answered, DoesNotFit() as refusal) if answered == request:
                return replace(_planned(pool, want, scratch.plans, Outcome.never), refusal=refusal)
            case Reject(answered, refusal) if answered == request:
                return Preview(Outcome.refused, want.options, refusal=refusal)
            case _:
                pass
    if any(line.want == want for plan in scratch.plans for line, *_ in plan.launches):
        return _planned(pool, want, scratch.plans, Outcome.fits)
    carried_out = [plan for plan in scratch.plans if not (plan.matches or plan.refusals)]  # else it was made anew
    found = _planned(pool, want, carried_out, Outcome.waits)
    current = pool.models[want.model].current
    if current is not None and runner_serves(current, want):
        found = _served(pool, want, current, Outcome.waits)
    return found if found.victims else replace(found, waits_for=pool.lines[want].waits_for)


def _planned(pool: Pool, want: Want, plans: Sequence[Plan], outcome: Outcome) -> Preview:
    """Return what was planned for a line: the first plan with victims counts, since the next has them gone already."""
    model = pool.models[want.model]
    rooms = [(plan.rooms[want], plan.options[want]) for plan in plans if want in plan.rooms]
    if not rooms:
        return Preview(outcome, want.options)
    room, asked = next((found for found in rooms if found[0].victims), rooms[-1])
    if room.victims:
        outcome = Outcome.evicts
    options, demand = model.demand(asked, pool.limits)
    exact = bool(demand.footprint.fixed)
    needs, placement = dict(needed(room.placement, exact=exact)), room.placement
    shares = _shares(pool, demand.footprint, placement.gpu_layers, dict(placement.bytes), needs, dict(room.free))
    layers = _layers(pool, demand)
    return Preview(outcome, options, shares, placement.gpu_layers, layers, placement.measured, room.victims)


def _served(pool: Pool, want: Want, runner: Runner, outcome: Outcome) -> Preview:
    """Return what the runner takes that serves the request, or will."""
    model, ledger, split = pool.models[want.model], pool.ledger, runner.placement.gpu_layers
    account = ledger.accounts["runner", runner.id]
    _, demand = model.demand(runner.told, pool.limits)
    takes = {device: account.held_bytes(device) for device in account.promised}
    free = {device: ledger.free_bytes(device) for device in ledger.devices}
    shares = _shares(pool, demand.footprint, split, takes, {}, free)
    layers = _layers(pool, demand)
    measured = runner.placement.measured or account.settled
    return Preview(outcome, runner.options, shares, split, layers, measured)


def _layers(pool: Pool, demand: Demand) -> int:
    gpus = any(sample.kind == "gpu" for sample in pool.ledger.devices.values())
    return demand.layers if gpus and not demand.footprint.fixed else 0


def _shares(
    pool: Pool,
    footprint: Footprint,
    split: Amounts,
    takes: Mapping[DeviceId, int],
    needs: Mapping[DeviceId, int],
    free: Mapping[DeviceId, int],
) -> tuple[Share, ...]:
    """Return what each memory gives: an integrated GPU's part is the host's."""
    found: dict[DeviceId, Part] = {}
    for device, part in parts(footprint, split).items():
        memory = pool.ledger.devices[device].memory if device in pool.ledger.devices else device
        found[memory] = _sum(found.get(memory, Part()), part)
    return tuple(
        Share(device, found.get(device, Part()), takes.get(device, 0), needs.get(device, 0), free.get(device, 0))
        for device in sorted(found.keys() | takes.keys(), key=lambda device: (device != HOST, device))
    )


def _sum(one: Part, other: Part) -> Part:
    return Part(*(getattr(one, each.name) + getattr(other, each.name) for each in fields(Part)))


@dataclass(frozen=True, slots=True)
class Advice:
    """Another way to ask for a model, and what becomes of it then."""

    options: Options  # all that the request is to name
    preview: Preview


def advise(
    now: float, core: Core, want: Want, info: ModelInfo | Footprint, found: Preview, known: Remembered = NOTHING
) -> tuple[Advice, ...]:
    """Return how to ask so that it fits, the least harm first; empty where it does, or no option would help.

    Of what never fits, that is with which options it would, if need be once others have left; of what evicts or
    waits, with which it need not; of what goes to GPUs in part, with which all of it would. `found` is the preview of
    `want` itself. Each advice was previewed in turn; none is listed that does no less harm than one before it.
    """
    if isinstance(info, Footprint) or _worth(found) == _BEST:
        return ()
    defaults = core.pool.limits.defaults
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
