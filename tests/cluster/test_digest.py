"""What a node tells of itself, by its core and by its scheduler."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fsm.cluster.choice import Wanted, Way, choose, would_wait_longer
from fsm.cluster.digest import ContentId, DeviceDigest, NodeDigest, NodeId, Offer
from fsm.cluster.digest_of_core import digest_of
from fsm.domain.devices import HOST
from fsm.domain.options import SLOTS, Options
from fsm.machine.request import ModelId
from scheduler.cluster.digests import take_digest
from scheduler.cluster.wire import digest_of_line, line_of
from scheduler.testing import FakeMachine
from tests.support.models import a_model
from tests.support.pool import PoolUnderTest, a_pool, acquire, cancel, granted, loaded, pin

GIB = 2**30
NODE = NodeId("here")


def offers(*names: str) -> dict[ModelId, Offer]:
    return {ModelId(name): Offer(ContentId(f"sha-{name}"), (name,), 3 * GIB, 7.0) for name in names}


def digest(pool: PoolUnderTest, *names: str) -> NodeDigest:
    return digest_of(pool.now, pool.core, NODE, offers(*names))


def held(size_gib: int) -> tuple[tuple[str, int], ...]:
    return (("cpu", size_gib * GIB),)


def test_a_model_that_was_never_asked_for_is_told_by_its_offer() -> None:
    """Of a model in the catalogue alone, its names, file and earlier load times are told."""
    told = digest(a_pool(capacity="8GiB"), "a")
    model = told.models[ContentId("sha-a")]
    assert (model.names, model.load_s, model.file_bytes, model.bytes) == (("a",), 7.0, 3 * GIB, ())
    assert (model.slots, model.queued, model.copy) == (1, 0, None)


@pytest.mark.parametrize(("max_leases", "told"), [(0, 3), (SLOTS, 3), (2, 2)])
def test_a_model_that_is_not_loaded_will_have_the_usual_slots(max_leases: int, told: int) -> None:
    """A cold model answers as many requests at once as the node's setting says, or as leases are limited to."""
    pool = a_pool(capacity="8GiB", max_leases=max_leases)
    pool.feed(acquire("known", request=1), cancel(1))
    node = digest_of(pool.now, pool.core, NODE, offers("known", "unknown"), slots=3)
    assert {model.slots for model in node.models.values()} == {told}


def test_runners_are_told_as_copies() -> None:
    """A runner that loads, serves or rests is its model's copy, with leases, bytes and what is left of its load."""
    pool = a_pool(capacity="20GiB", sizes={"busy": "5GiB", "rests": "4GiB", "loads": "3GiB"})
    pool.ready("busy", lease=1).idle("rests")
    pool.feed(acquire("loads", request=2))
    told = digest(pool, "busy", "rests", "loads")
    copies = {name: told.models[ContentId(f"sha-{name}")].copy for name in ("busy", "rests", "loads")}
    assert copies["busy"] is not None and (copies["busy"].leases, copies["busy"].ready_in_s) == (1, None)
    assert copies["rests"] is not None and (copies["rests"].leases, copies["rests"].bytes) == (0, held(4))
    assert copies["loads"] is not None and copies["loads"].ready_in_s == 0.0  # no load of it was seen yet
    assert told.devices == (DeviceDigest(HOST, "cpu", 20 * GIB, 8 * GIB),)
    assert [one.content for one in told.evictable] == ["sha-rests"]
    assert (told.loading, told.models[ContentId("sha-loads")].queued) == (1, 1)


def test_the_rest_of_a_load_follows_from_earlier_loads() -> None:
    """Once a load of the model was seen, the rest of the next one is told."""
    pool = a_pool(capacity="8GiB", sizes={"a": "5GiB", "b": "5GiB"}, min_residency_s=0.0, idle_grace_part=0.0)
    pool.feed(acquire("a", request=1))
    pool.advance(6.0)
    pool.feed(loaded(1))
    assert digest(pool, "a").models[ContentId("sha-a")].load_s == 6.0


def test_a_pinned_runner_is_not_evictable() -> None:
    """A pinned model's idle runner holds memory that is not offered to others."""
    pool = a_pool(capacity="8GiB", sizes={"a": "5GiB"}).idle("a")
    pool.feed(pin("a"))
    told = digest(pool, "a")
    assert told.evictable == ()
    copy = told.models[ContentId("sha-a")].copy
    assert copy is not None and copy.pinned


def test_what_waits_for_memory_is_told() -> None:
    """A model that waits for a busy runner to leave takes the memory that it waits for, as far as others see."""
    pool = a_pool(capacity="8GiB", sizes={"a": "6GiB", "b": "5GiB"}).ready("a", lease=1)
    pool.feed(acquire("b", request=2))
    told = digest(pool, "a", "b")
    assert told.awaited_bytes == held(5)
    assert choose([told], {}, Wanted(ContentId("sha-b")), pool.now)[0].way is Way.waits
    assert would_wait_longer(told, Wanted(ContentId("sha-b")), 20.0)


def test_gpus_are_told_by_kind() -> None:
    """Bytes are told by kind of device, and devices one by one."""
    pool = a_pool(capacity="8GiB", gpus=["6GiB", "4GiB"])
    told = digest(pool)
    assert [(one.id, one.kind) for one in told.devices] == [(HOST, "cpu"), ("gpu0", "gpu"), ("gpu1", "gpu")]
    assert told.capacity_bytes("gpu") == 10 * GIB and told.loads_at_once == 2


def test_a_scheduler_tells_of_itself() -> None:
    """The digest of a real scheduler follows its leases, queue and close."""
    with FakeMachine("8GiB", max_leases=2).model("a", size="5GiB", load=3.0).model("b", size="6GiB") as machine:
        scheduler = machine.scheduler
        a, b = scheduler.catalog.find("a"), scheduler.catalog.find("b")
        known = {a.id: Offer(ContentId("A"), ("a", "alias")), b.id: Offer(ContentId("B"), ("b",), 6 * GIB)}
        with scheduler.acquire("a"):
            told = take_digest(scheduler, NODE, known)
            model = told.models[ContentId("A")]
            assert (model.names, model.slots, model.load_s) == (("a", "alias"), 2, 3.0)
            assert model.copy is not None and model.copy.leases == 1
            assert choose([told], {}, Wanted(ContentId("A")), told.at)[0].way is Way.ready
            assert choose([told], {}, Wanted(ContentId("B")), told.at)[0].way is Way.waits
        scheduler.close()
        assert take_digest(scheduler, NODE, known).closing


def test_a_digest_of_fifty_models_is_small() -> None:
    """A digest of 50 models, loaded or not, crosses processes in at most 10 KB."""
    names = [f"library/model-{number}:q4_k_m" for number in range(50)]
    pool = a_pool(capacity="200GiB", sizes=dict.fromkeys(names, "5GiB"))
    for name in names[:20]:
        pool.idle(name)
    told = digest(pool, *names)
    assert len(line_of(told)) <= 10_000
    assert digest_of_line(line_of(told)) == replace(told, at=0.0)


@pytest.mark.parametrize("gpus", [("24GiB",), ()])
@pytest.mark.parametrize(
    "named",
    [
        {},
        {"num_gpu": 99, "main_gpu": 0, "use_mmap": True},  # as many clients of Ollama ask
        {"num_gpu": 4},
        {"num_ctx": 512, "num_parallel": 2},
        {"require_gpu": True},
        {"devices": ("gpu1",)},
    ],
)
def test_a_front_matches_options_as_the_core_does(named: dict[str, object], gpus: tuple[str, ...]) -> None:
    """A request is served at once, as a front expects, if the core grants it the runner that there is."""
    pool = a_pool("16GiB", gpus).declare("a", a_model()).idle("a", num_ctx=8192)
    told = digest_of_line(line_of(digest(pool, "a")))
    [choice] = choose([told], {}, Wanted(ContentId("sha-a"), Options(**named)), pool.now)
    assert (choice.way is Way.ready) == (granted(pool.feed(acquire("a", 2, **named))) == [2])
