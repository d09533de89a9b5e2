"""The choice of a node: what holds for all digests, and what is expected of a few."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fsm.cluster import choice
from fsm.cluster.choice import SILENT_S, Sent, Wanted, Way, choose, would_wait_longer
from fsm.cluster.digest import ContentId, Copy, DeviceDigest, Evictable, ModelDigest, NodeDigest, NodeId
from fsm.cluster.router import Router
from fsm.domain.devices import HOST
from fsm.domain.options import Options
from fsm.state.runner_match import LoadedAs

GB = 10**9
NOW = 1000.0
MODEL, OTHER = ContentId("m"), ContentId("o")
ASK = Wanted(MODEL, answer_s=4.0)
NODES = [NodeId(f"node-{number}") for number in range(5)]
NOTHING: dict[NodeId, dict[ContentId, Sent]] = {}


def node(
    name: str = "n", model: ModelDigest | None = None, *, free: int = 8, capacity: int = 16, **more: Any
) -> NodeDigest:
    """Return a node of one kind of memory, in GB; its model has 4 GB, 4 slots and a load of 5 s unless one is given."""
    of_model = ModelDigest(slots=4, bytes=(("cpu", 4 * GB),), load_s=5.0) if model is None else model
    device = DeviceDigest(HOST, "cpu", capacity * GB, free * GB)
    return replace(NodeDigest(NodeId(name), NOW, (device,), {MODEL: of_model}), **more)


def loaded(leases: int = 0, *, slots: int = 4, queued: int = 0, load_s: float = 5.0) -> ModelDigest:
    size = (("cpu", 4 * GB),)
    return ModelDigest(slots=slots, queued=queued, load_s=load_s, bytes=size, copy=Copy(leases, bytes=size))


seconds = st.floats(0.0, 300.0)
sizes = st.lists(
    st.tuples(st.sampled_from(("cpu", "gpu")), st.integers(0, 30 * GB)), max_size=2, unique_by=lambda x: x[0]
)
amounts = sizes.map(lambda found: tuple(sorted(found)))
copies = st.builds(
    Copy,
    st.integers(0, 9),
    st.none() | seconds,
    st.sampled_from((LoadedAs(), LoadedAs(Options(num_ctx=4096)))),
    amounts,
    st.booleans(),
)
models = st.builds(
    ModelDigest, st.just(("m",)), st.integers(0, 8), st.integers(0, 20), st.none() | st.floats(0.0, 60.0), amounts,
    st.integers(0, 30 * GB), st.just(0.0) | seconds, st.none() | copies,
)  # fmt: skip
devices = st.builds(
    DeviceDigest, st.just(HOST), st.sampled_from(("cpu", "gpu")), st.integers(0, 48 * GB), st.integers(-GB, 48 * GB)
)  # fmt: skip
contents = st.dictionaries(st.sampled_from((MODEL, OTHER)), models)
digests = st.builds(
    NodeDigest, st.sampled_from(NODES), st.floats(NOW - 60.0, NOW + 1.0), st.lists(devices, max_size=3).map(tuple),
    contents,
    st.lists(st.builds(Evictable, amounts, seconds, st.sampled_from((None, MODEL, OTHER))), max_size=3).map(tuple),
    amounts, st.integers(0, 4), st.integers(0, 3), st.booleans(),
)  # fmt: skip
clusters = st.lists(digests, max_size=5, unique_by=lambda one: one.node)
sent = st.dictionaries(
    st.sampled_from(NODES),
    st.dictionaries(
        st.sampled_from((MODEL, OTHER)), st.builds(Sent, st.integers(-3, 9), st.floats(NOW - 60.0, NOW)), max_size=2
    ),
)
requests = st.builds(Wanted, st.just(MODEL), st.sampled_from((Options(), Options(num_ctx=8192))), st.floats(0.0, 60.0))
ages = st.floats(0.0, 40.0)
fleets = st.lists(  # of nodes that have the model, loaded or not
    st.builds(
        lambda number, leases, age_s: node(
            f"node-{number}", None if leases is None else loaded(leases), at=NOW - age_s
        ),
        st.integers(0, 5), st.none() | st.integers(0, 9), ages,
    ),
    max_size=4, unique_by=lambda one: one.node,
)  # fmt: skip
Sendings = dict[NodeId, dict[ContentId, Sent]]


@given(clusters, sent, requests, st.randoms(use_true_random=False))
def test_the_choice_is_the_same_whatever_the_order_of_the_digests(
    cluster: list[NodeDigest], sent: Sendings, request: Wanted, draw: object
) -> None:
    """Equal digests, in any order, give equal choices: fronts that know the same choose the same."""
    chosen = choose(cluster, sent, request, NOW)
    draw.shuffle(cluster)  # type: ignore[attr-defined]
    assert choose(cluster, sent, request, NOW) == chosen


@given(clusters, sent, requests)
def test_only_nodes_that_have_the_model_and_stay_are_chosen(
    cluster: list[NodeDigest], sent: Sendings, request: Wanted
) -> None:
    """Every node that has the model and does not close is in the list once, and no other node is."""
    chosen = [one.node for one in choose(cluster, sent, request, NOW)]
    assert sorted(chosen) == sorted(one.node for one in cluster if MODEL in one.models and not one.closing)


@given(clusters, sent, requests)
def test_expected_seconds_are_times(cluster: list[NodeDigest], sent: Sendings, request: Wanted) -> None:
    """No figure of a digest, 0 included, leads to less than no time, or to no number."""
    for one in choose(cluster, sent, request, NOW):
        assert one.seconds >= 0.0 and one.cost_s >= 0.0
        assert math.isfinite(one.seconds) == (one.way not in (Way.never, Way.refused))


@given(clusters, sent, requests)
def test_a_free_slot_is_better_than_any_load(cluster: list[NodeDigest], sent: Sendings, request: Wanted) -> None:
    """Where a node that has told of itself lately has a free slot, no node is before it that would load the model."""
    heard = {one.node for one in cluster if NOW - one.at <= SILENT_S}
    ways = [one.way for one in choose(cluster, sent, request, NOW) if one.node in heard]
    if Way.ready in ways:
        assert not {Way.fits, Way.evicts, Way.waits}.intersection(ways[: ways.index(Way.ready)])


def test_a_free_slot_is_better_than_the_quickest_load() -> None:
    """The same holds for the oldest digest that counts, and for a load that was measured to take no time."""
    quick = node("quick", replace(node().models[MODEL], load_s=0.0))
    for old in [node(f"old-{number}", loaded(3), at=NOW - SILENT_S) for number in range(8)]:
        assert choose([quick, old], NOTHING, ASK, NOW)[0].way is Way.ready


@example([node("between", loaded(6, slots=5))], 0.0, 5, 0)
@given(fleets, ages, st.integers(0, 9), st.integers(0, 9))
def test_a_request_less_never_makes_a_node_worse(
    others: list[NodeDigest], age_s: float, leases: int, queued: int
) -> None:
    """A node with one lease or one waiting request less is expected to serve no later, and is chosen no later."""
    before = choose([*others, node("it", loaded(leases, queued=queued), at=NOW - age_s)], NOTHING, ASK, NOW)
    for fewer in (loaded(max(0, leases - 1), queued=queued), loaded(leases, queued=max(0, queued - 1))):
        _assert_no_worse(before, choose([*others, node("it", fewer, at=NOW - age_s)], NOTHING, ASK, NOW))


@given(fleets, ages, ages, st.none() | st.integers(0, 9))
def test_a_younger_digest_never_makes_a_node_worse(
    others: list[NodeDigest], age_s: float, other_age_s: float, leases: int | None
) -> None:
    """The same figures are worth as much or more where they are of a later time (no load is under way)."""
    model = node().models[MODEL] if leases is None else loaded(leases)
    older, younger = (node("it", model, at=NOW - age) for age in sorted((age_s, other_age_s), reverse=True))
    _assert_no_worse(choose([*others, older], NOTHING, ASK, NOW), choose([*others, younger], NOTHING, ASK, NOW))


def _assert_no_worse(before: list[choice.Choice], after: list[choice.Choice]) -> None:
    (was, place), (now, new_place) = (
        next((one, place) for place, one in enumerate(chosen) if one.node == "it") for chosen in (before, after)
    )
    assert now.seconds <= was.seconds
    assert new_place <= place


@given(st.integers(2, 12), st.integers(0, 11), st.integers(0, 10**6))
def test_when_a_node_leaves_only_its_models_move(count: int, leaving: int, first: int) -> None:
    """Of nodes that are level, a model's node stays the same when another one leaves or comes."""
    cluster = [node(f"node-{number}") for number in range(count)]
    gone = cluster[leaving % count]
    for number in range(first, first + 20):
        content = ContentId(f"model-{number}")
        level = [replace(one, models={content: one.models[MODEL]}) for one in cluster]
        before = choose(level, NOTHING, Wanted(content), NOW)[0].node
        after = choose([one for one in level if one.node != gone.node], NOTHING, Wanted(content), NOW)
        assert before in (gone.node, after[0].node if after else None)


def test_cold_models_are_spread_over_the_nodes() -> None:
    """Of nodes that are level, each gets about its part of the models."""
    counts = dict.fromkeys((f"node-{number}" for number in range(4)), 0)
    for number in range(400):
        content = ContentId(f"model-{number}")
        level = [replace(node(name), models={content: node().models[MODEL]}) for name in counts]
        counts[choose(level, NOTHING, Wanted(content), NOW)[0].node] += 1
    assert min(counts.values()) > 60


@given(clusters, requests, seconds)
def test_a_node_judges_itself_as_fronts_do(cluster: list[NodeDigest], request: Wanted, bound_s: float) -> None:
    """A node says no by a fresh digest exactly where the choice expects more than the bound of it."""
    for one in cluster:
        chosen = choose([one], NOTHING, request, one.at)
        assert would_wait_longer(one, request, bound_s) == (not chosen or chosen[0].seconds > bound_s)


# -- the ways, one by one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("digest", "way", "expected_s"),
    [
        (node(model=loaded(3)), Way.ready, 0.0),
        (node(model=loaded(4)), Way.busy, 1.0),
        (node(model=loaded(4, queued=4)), Way.busy, 5.0),
        (node(model=replace(loaded(), copy=Copy(0, 2.5))), Way.loading, 2.5),
        (node(), Way.fits, 5.0),
        (node(free=2, evictable=(Evictable((("cpu", 2 * GB),), 3.0),)), Way.evicts, 5.0 + choice.STOP_S),
        (node(free=2), Way.waits, 5.0 + choice.STOP_S + choice.BUSY_S),
        (node(free=5, awaited_bytes=(("cpu", 2 * GB),)), Way.waits, 5.0 + choice.STOP_S + choice.BUSY_S),
        (node(capacity=3), Way.never, math.inf),
        (node(model=replace(loaded(), copy=None, refused_for_s=9.0)), Way.refused, math.inf),
    ],
)
def test_the_way_follows_from_the_digest(digest: NodeDigest, way: Way, expected_s: float) -> None:
    """Slots, loads and memory give the way and the seconds."""
    (found,) = choose([digest], NOTHING, ASK, NOW)
    assert found.way is way
    assert found.seconds == pytest.approx(expected_s)


def test_what_was_sent_since_is_counted() -> None:
    """Requests that the digest does not show take slots, cause loads, take memory, and keep idle runners."""
    ready = node(model=loaded(2))
    assert choose([ready], {ready.node: {MODEL: Sent(2, NOW)}}, ASK, NOW)[0].way is Way.busy
    (begun,) = choose([node()], {NodeId("n"): {MODEL: Sent(1, NOW - 2.0)}}, ASK, NOW)
    assert begun.way is Way.loading and begun.seconds == pytest.approx(3.0)
    other = ModelDigest(bytes=(("cpu", 6 * GB),), load_s=5.0)
    both = node(models={MODEL: node().models[MODEL], OTHER: other})
    assert choose([both], NOTHING, ASK, NOW)[0].way is Way.fits
    assert choose([both], {both.node: {OTHER: Sent(1, NOW)}}, ASK, NOW)[0].way is Way.waits
    idle = node(
        free=2,
        models={MODEL: node().models[MODEL], OTHER: loaded()},
        evictable=(Evictable((("cpu", 4 * GB),), 3.0, OTHER),),
    )
    assert choose([idle], NOTHING, ASK, NOW)[0].way is Way.evicts
    assert choose([idle], {idle.node: {OTHER: Sent(1, NOW)}}, ASK, NOW)[0].way is Way.waits


def test_a_runner_with_too_little_context_has_to_be_loaded_again() -> None:
    """A copy whose options do not serve the request is no ready copy; one that serves it is."""
    contexts = {"small": 4096, "large": 16384}
    small, large = (
        node(name, replace(loaded(), copy=Copy(0, None, LoadedAs(Options(num_ctx=num_ctx)), (("cpu", 4 * GB),))))
        for name, num_ctx in contexts.items()
    )
    ways = {one.node: one.way for one in choose([small, large], NOTHING, Wanted(MODEL, Options(num_ctx=8192)), NOW)}
    assert ways == {"small": Way.evicts, "large": Way.ready}


def test_a_model_that_a_node_never_loaded_takes_as_long_as_elsewhere() -> None:
    """Load seconds that one node has measured count for the others; where none has, the file's size does."""
    unknown = node("new", ModelDigest(file_bytes=6 * GB))
    found = {one.node: one.seconds for one in choose([unknown, node("old")], NOTHING, ASK, NOW)}
    assert [found["new"], found["old"]] == pytest.approx([5.0, 5.0])
    assert choose([unknown], NOTHING, ASK, NOW)[0].seconds == pytest.approx(1.0 + 6.0)


def test_a_silent_node_comes_last() -> None:
    """A node that has not told of itself for long is asked after a node that would have to load the model."""
    silent = node("silent", loaded(), at=NOW - SILENT_S - 1.0)
    assert [one.node for one in choose([silent, node("loads")], NOTHING, ASK, NOW)] == ["loads", "silent"]


# -- a model's copies, told by a front --------------------------------------------------------------------------------


def a_front(*digests: NodeDigest) -> Router:
    router = Router()
    for digest in digests:
        router.heard(digest, NOW)
    return router


def test_a_hot_model_gets_a_second_copy_and_loses_it_again() -> None:
    """A queue that costs more than a load sends a request elsewhere; without it one copy serves all again."""
    front = a_front(node("a"), node("b"))
    front.answers_s[MODEL] = 4.0
    nodes = [front.forward(NOW, front.choose(NOW, MODEL)[0].node, MODEL).node for _ in range(12)]
    first = nodes[0]
    until = nodes.index("b" if first == "a" else "a")
    assert 4 <= until < 12, nodes  # the first copy's slots are filled before
    hot = {name: node(name, loaded(4, queued=4 if name == first else 0)) for name in "ab"}
    assert a_front(*hot.values()).choose(NOW, MODEL)[0].node != first
    cool = {name: node(name, loaded(1)) for name in "ab"}
    again = a_front(*cool.values())
    assert len({again.forward(NOW, again.choose(NOW, MODEL)[0].node, MODEL).node for _ in range(3)}) == 1


def test_a_digest_settles_what_was_sent_before_it() -> None:
    """A request is counted until a later digest shows it, or until it ends; the end of an earlier one counts too."""
    front = a_front(node("a", loaded(0, slots=1)))
    one = front.forward(NOW, NodeId("a"), MODEL)
    assert front.choose(NOW, MODEL)[0].way is Way.busy
    front.heard(node("a", loaded(1, slots=1)), NOW + 1.0)
    assert front.choose(NOW + 1.0, MODEL)[0].seconds == pytest.approx(choice.USUAL_ANSWER_S)
    front.answered(one, 3.0)
    front.ended(one)
    assert front.choose(NOW + 2.0, MODEL)[0].way is Way.ready
    assert front.answers_s[MODEL] == 3.0
    front.heard(node("a", loaded(1, slots=1)), NOW)
    assert front.digests[NodeId("a")].at == NOW + 1.0


# -- planted faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fault", "check"),
    [
        ("LEAST_LOAD_S", 0.0, test_a_free_slot_is_better_than_the_quickest_load),
        ("AGE_LIMIT_S", 60.0, test_a_free_slot_is_better_than_the_quickest_load),
        ("AGE_PART", -0.001, test_a_younger_digest_never_makes_a_node_worse),
        ("SILENT_S", math.inf, test_a_silent_node_comes_last),
        ("_rendezvous", lambda node, _: node, test_cold_models_are_spread_over_the_nodes),
        ("_step", lambda expected_s: -expected_s, test_a_request_less_never_makes_a_node_worse),
        ("_fits", lambda missing: True, test_what_was_sent_since_is_counted),
        ("_load_s_elsewhere", lambda *_: 0.0, test_a_model_that_a_node_never_loaded_takes_as_long_as_elsewhere),
        ("match", lambda *_: True, test_a_runner_with_too_little_context_has_to_be_loaded_again),
    ],
)
def test_a_fault_in_the_choice_is_found(
    name: str, fault: object, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that is put into the choice makes the test fail that is for it."""
    monkeypatch.setattr(choice, name, fault)
    with pytest.raises(AssertionError):
        check()
