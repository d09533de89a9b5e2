"""Placement against a search of every placement, on small instances drawn by Hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fsm.domain.devices import HOST, DeviceSample
from fsm.placement.search import Gpu, Offload, PlacementDemand, find_placement, needed
from fsm.sizing.footprint import Footprint
from tests.support.brute_force import Way, cut, groups, takes_of, ways
from tests.support.pool import a_pool, acquire, launched, refused

SMALL = st.integers(0, 6)
LAYER = st.sampled_from([0, 1, 2, 3, 5, 9])


TWO = (Gpu("gpu0", "gpu0"), Gpu("gpu1", "gpu1"))


@dataclass(frozen=True)
class Case:
    """A model, GPUs, and the free memory."""

    footprint: Footprint
    gpus: tuple[Gpu, ...]
    free: dict[str, int]


@st.composite
def footprints(draw: st.DrawFn) -> Footprint:
    """Draw a footprint with up to four repeating layers."""
    blocks = draw(st.integers(1, 4))
    sizes = st.lists(LAYER, min_size=blocks, max_size=blocks).map(tuple)
    return Footprint(
        draw(sizes), draw(sizes), draw(LAYER), draw(st.sampled_from([0, 0, 4])), draw(st.sampled_from([0, 1, 4])),
        draw(SMALL), draw(SMALL), 0, 0, draw(SMALL), draw(st.sampled_from([0, 0, 2])),
        draw(st.sampled_from([0, 0, 1, 4])), draw(st.sampled_from([0, 0, 2])),
    )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw up to three GPUs of all kinds, or four of one kind."""
    count = draw(st.sampled_from([1, 2, 2, 3, 3, 4]))
    kinds = st.sampled_from(["discrete"] * 4 + ["integrated", "instance", "other library"])
    gpus, free = [], {HOST: draw(st.integers(0, 90))}
    for place_in_order in range(count):
        id, kind = f"gpu{place_in_order}", draw(kinds) if count < 4 else "discrete"
        shared = kind == "integrated"
        gpus.append(Gpu(id, HOST if shared else id, kind == "instance", "Vulkan" if kind[0] == "o" else "CUDA"))
        if not shared:
            free[id] = draw(st.integers(-2, 60))
    return Case(draw(footprints()), tuple(gpus), free)


def found(case: Case, offload: Offload, **how: object) -> Way | None:
    """Return the placement that the core finds, in bytes by memory without zeros."""
    placement = find_placement(PlacementDemand(case.footprint, **how), offload, case.free, case.gpus)
    if placement is None:
        return None
    return Way(placement.gpu_layers, {memory: size for memory, size in placement.bytes if size})


def possible(case: Case, offload: Offload, num_gpu: int | None = None) -> list[Way]:
    """Return every placement of this kind that fits."""
    units = len(case.footprint.weights_bytes) + 1
    every = ways(case.footprint, case.gpus, case.free)
    match offload:
        case Offload.whole:
            return [way for way in every if way.layers == units]
        case Offload.partial:
            return [way for way in every if way.layers == num_gpu or (num_gpu is None and 0 < way.layers < units)]
        case Offload.none:
            return [way for way in every if not way.split]


def is_one_of(way: Way, candidates: Sequence[Way]) -> bool:
    """Return whether the search has the placement too, with the same bytes on each memory."""
    return any(
        way.split == other.split and way.takes == {memory: size for memory, size in other.takes.items() if size}
        for other in candidates
    )


@pytest.mark.slow
@settings(max_examples=500)
@given(cases(), st.sampled_from(Offload), st.booleans(), st.none() | st.integers(0, 4))
def test_what_fits_is_placed_and_what_does_not_is_not(
    case: Case, offload: Offload, spread: bool, main_gpu: int | None
) -> None:
    """A placement is found exactly where one fits, and is one of those that the search finds."""
    way, candidates = found(case, offload, spread=spread, main_gpu=main_gpu), possible(case, offload)
    assert (way is None) == (not candidates)
    assert way is None or is_one_of(way, candidates)


UNIT = st.sampled_from([1, 2**26, 2**29, 2**30])  # bytes: from where a margin is a quarter to where it is a twentieth


def scaled(case: Case, unit: int) -> Case:
    """Return a case with all its bytes in another unit."""
    sizes = {each.name: getattr(case.footprint, each.name) for each in fields(Footprint)}
    larger = {
        name: tuple(unit * part for part in size) if isinstance(size, tuple) else unit * size
        for name, size in sizes.items()
        if not isinstance(size, bool)
    }
    return Case(Footprint(**larger), case.gpus, {memory: unit * size for memory, size in case.free.items()})


@pytest.mark.slow
@settings(max_examples=500)
@given(cases(), UNIT, st.sampled_from(Offload), st.booleans())
def test_u01_nothing_is_refused_that_fits_by_its_bytes_and_a_margin(
    small: Case, unit: int, offload: Offload, spread: bool
) -> None:
    """U01: on devices that nothing else uses, a placement is found exactly where one fits with a small margin."""
    case = scaled(small, unit)
    demand = PlacementDemand(case.footprint, spread=spread)
    placement = find_placement(demand, offload, case.free, case.gpus, case.free)
    units = len(case.footprint.weights_bytes) + 1
    every = [way for way in ways(case.footprint, case.gpus, case.free, alone=True) if kind_of(way, units) is offload]
    assert (placement is None) == (not every)
    if placement is not None:
        way = Way(placement.gpu_layers, {memory: size for memory, size in placement.bytes if size})
        assert is_one_of(way, every)
        assert offload is not Offload.partial or way.layers == max(other.layers for other in every)


@given(cases(), UNIT)
def test_u01_what_can_be_made_free_is_only_ever_less_than_the_headroom(small: Case, unit: int) -> None:
    """U01: with more that can be made free, no placement is found that was not; with boundless, the quarter counts."""
    case = scaled(small, unit)
    demand = PlacementDemand(case.footprint)
    boundless = dict.fromkeys(case.free, 2**70)
    for offload in Offload:
        alone = find_placement(demand, offload, case.free, case.gpus, case.free)
        beside = find_placement(demand, offload, case.free, case.gpus, boundless)
        assert beside == find_placement(demand, offload, case.free, case.gpus)
        assert beside is None or alone is not None


def kind_of(way: Way, units: int) -> Offload:
    return Offload.none if not way.split else Offload.whole if way.layers == units else Offload.partial


@given(cases(), st.integers(1, 5))
def test_a_number_of_layers_that_is_named_is_placed_wherever_it_fits(case: Case, num_gpu: int) -> None:
    """A named number of layers is placed wherever it fits, with exactly so many layers."""
    units = len(case.footprint.weights_bytes) + 1
    if num_gpu < units:
        way, candidates = found(case, Offload.partial, num_gpu=num_gpu), possible(case, Offload.partial, num_gpu)
        assert (way is None) == (not candidates)
        assert way is None or is_one_of(way, candidates)


@given(cases(), st.none() | st.integers(0, 3))
def test_a_whole_model_takes_as_few_gpus_as_possible(case: Case, main_gpu: int | None) -> None:
    """N04: a whole model takes as few GPUs as possible, and the named one if as many GPUs suffice with it."""
    if (way := found(case, Offload.whole, main_gpu=main_gpu)) is None:
        return
    fewest = [other for other in possible(case, Offload.whole) if len(other.split) == len(way.split)]
    assert not [other for other in possible(case, Offload.whole) if len(other.split) < len(way.split)]
    if main_gpu is not None and main_gpu < len(case.gpus):
        named = case.gpus[main_gpu].id
        assert named in dict(way.split) or not any(named in dict(other.split) for other in fewest)


@given(cases())
def test_of_single_gpus_a_discrete_one_goes_first_and_then_the_one_with_most_free(case: Case) -> None:
    """N04: of single GPUs that take a whole model, a discrete one with most free memory is used."""
    singles = [other for other in possible(case, Offload.whole) if len(other.split) == 1]
    if singles:
        gpus = {gpu.id: gpu for gpu in case.gpus}
        best = min(
            (gpus[other.split[0][0]] for other in singles),
            key=lambda gpu: (gpu.memory == HOST, -case.free[gpu.memory], gpu.id),
        )
        way = found(case, Offload.whole)
        assert way is not None and way.split[0][0] == best.id


@pytest.mark.slow
@settings(max_examples=500)
@given(cases(), st.booleans())
def test_in_part_as_many_layers_as_possible_are_offloaded(case: Case, spread: bool) -> None:
    """In part, as many layers as possible are offloaded, over as few GPUs as possible."""
    if (way := found(case, Offload.partial, spread=spread)) is None:
        return
    most = max(other.layers for other in possible(case, Offload.partial))
    fewest = min(len(other.split) for other in possible(case, Offload.partial) if other.layers == most)
    assert way.layers == most
    assert spread or len(way.split) == fewest


@given(cases())
def test_spread_takes_no_fewer_gpus(case: Case) -> None:
    """N04: `spread` takes no fewer GPUs than a placement without it."""
    together, spread = found(case, Offload.whole), found(case, Offload.whole, spread=True)
    assert (together is None) == (spread is None)
    if together is not None and spread is not None:
        assert len(spread.split) >= len(together.split)


@given(cases())
def test_the_same_question_has_the_same_answer(case: Case) -> None:
    """The order of a mapping changes no placement, and the order of GPUs changes no more than their names."""
    for offload in Offload:
        way = found(case, offload)
        assert found(replace(case, free=dict(reversed(case.free.items()))), offload) == way
        turned = found(replace(case, gpus=case.gpus[::-1]), offload)
        assert (turned is None) == (way is None)
        assert way is None or turned is None or (turned.layers, len(turned.split)) == (way.layers, len(way.split))


@given(cases(), st.data())
def test_what_was_measured_counts_instead_of_what_is_predicted(case: Case, data: st.DataObject) -> None:
    """A measured split needs 3 % over what it took, whether that is more or less than predicted."""
    units = len(case.footprint.weights_bytes) + 1
    splits = [
        tuple((gpu.id, size) for gpu, size in zip(group, ranges, strict=True))
        for group in groups(case.gpus)
        for ranges in cut(units, len(group))
    ]
    chosen = data.draw(st.lists(st.sampled_from(splits), max_size=2, unique=True)) if splits else []
    known = {}
    for split in chosen:
        took = data.draw(st.integers(0, 60))
        known[split] = tuple((memory, took) for memory in sorted(takes_of(case.footprint, split, case.gpus)))
    demand = PlacementDemand(case.footprint, known=known)
    placement = find_placement(demand, Offload.whole, case.free, case.gpus)
    seen_to_fit = [
        split for split, took in known.items() if all(size + 3 * size // 100 <= case.free[m] for m, size in took)
    ]
    if placement is None:
        assert not seen_to_fit
        return
    assert all(amount <= case.free.get(memory, 0) for memory, amount in needed(demand, placement))
    assert placement.measured == (placement.gpu_layers in known)


@given(cases())
@example(Case(Footprint((5, 5, 1), (0, 0, 0)), TWO, {HOST: 9, "gpu0": 9, "gpu1": 7}))
def test_the_core_refuses_nothing_that_fits(case: Case) -> None:
    """The core launches a model on empty devices with the best placement, or refuses it at once with figures."""
    pool = a_pool("1B").declare("a", case.footprint)
    free = {memory: max(0, size) for memory, size in case.free.items()}
    samples = [DeviceSample(HOST, "cpu", HOST, free[HOST], free[HOST])]
    for gpu in case.gpus:
        size = free[gpu.memory]
        samples.append(
            DeviceSample(
                gpu.id, "gpu", gpu.id, size, size, gpu.memory == HOST, instance=gpu.instance, library=gpu.library
            )
        )
    plain = pool.sample
    pool.sample = lambda number=None: replace(plain(number), devices=tuple(samples))  # type: ignore[method-assign]
    every = ways(case.footprint, case.gpus, free, alone=True)
    commands = pool.feed(acquire("a", request=1))
    if not every:
        assert refused(commands)
        return
    assert launched(commands) == ["a"]
    layers = sum(count for _, count in pool.launches[1].placement.gpu_layers)
    assert layers == max(way.layers for way in every)
