"""Previews and advice: a request gets what its preview shows."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from fsm.core import Core
from fsm.domain.devices import HOST, DeviceId, DeviceSample
from fsm.domain.options import Options
from fsm.machine.request import Purpose, RequestSpec
from fsm.machine.runner import RunnerState
from fsm.messages.commands import Command, Grant, Launch, Reject
from fsm.messages.events import Acquire, Inspected, Loaded, Sampled, Tick
from fsm.messages.reasons import MemoryHeld, WaitFor
from fsm.messages.refusals import DoesNotFitRefusal, SchedulerClosed
from fsm.preview import Outcome, Preview, preview
from fsm.sizing.footprint import Footprint
from fsm.sizing.model_profile import ModelProfile
from scheduler.api.fit_advice import MOST_ADVICE, MOST_TRIES, advise
from scheduler.engines.llama_profile import profile_of
from scheduler.models.model_info import ModelInfo
from tests.core.test_machine import MODELS, OPTIONS, CoreMachine
from tests.support.models import a_model
from tests.support.pool import (
    PoolUnderTest,
    a_pool,
    acquire,
    amount,
    close,
    exited,
    expire,
    layered,
    loaded,
    pin,
    release,
)

MIB = 2**20


def look(pool: PoolUnderTest, model: str, **options: object) -> Preview:
    """Preview a request for `model` in a pool."""
    want = acquire(model, 0, **options).spec
    return preview(pool.now, pool.core, want, inspection_of(pool, want))


def inspection_of(pool: PoolUnderTest, want: RequestSpec) -> ModelProfile | Footprint:
    """Return what an inspection finds that was ordered for a request, and for the requests that wait."""
    found = pool.inspect(want.model, [*pool.core.options_asked_of(want.model), want.options])
    assert isinstance(found, ModelProfile | Footprint)
    return found


def a_large_model(*, context: int = 32768, head: int = 32, **how: object) -> ModelInfo:
    """Return a model of 8 layers whose cache takes as much as its weights at 4096 tokens: 64 MiB."""
    info = a_model((8 * MIB,) * 8, context_trained=context, **how)
    return replace(info, heads=8, heads_kv=(16,) * 8, key_length=head, value_length=head)


# -- outcomes ----------------------------------------------------------------------------------------------------------


def test_what_has_room_fits() -> None:
    """A model with room fits, and its preview has the bytes needed with headroom and the free bytes of each device."""
    found = look(a_pool("8GiB").declare("g", layered(4, "1GiB", host="512MiB")), "g")
    (share,) = found.shares
    assert (found.outcome, share.device, share.takes_bytes) == (Outcome.fits, HOST, amount("4.5GiB"))
    assert (share.part.weights_bytes, share.part.other_bytes) == (amount("4GiB"), amount("512MiB"))
    assert (share.needed_bytes, share.free_bytes) == (amount("4.5GiB") * 5 // 4, amount("8GiB"))


def test_what_has_room_on_a_gpu_is_shown_there() -> None:
    """A model with room on a GPU is shown with its layers by GPU and its bytes by memory."""
    pool = a_pool("8GiB", gpus=("8GiB",)).declare("g", layered(4, "1GiB", output="512MiB", host="512MiB"))
    found = look(pool, "g")
    takes = {share.device: share.takes_bytes for share in found.shares}
    assert takes == {HOST: amount("512MiB"), "gpu0": amount("4.5GiB")}
    assert (found.gpu_layers, found.layers, found.in_part) == ((("gpu0", 5),), 5, False)


def test_the_part_of_an_integrated_gpu_is_the_hosts() -> None:
    """N03: an integrated GPU's bytes are shown with the host's."""
    pool = a_pool("8GiB", gpus=("8GiB",), integrated=True).declare("g", layered(4, "1GiB", host="512MiB"))
    found = look(pool, "g")
    assert [(share.device, share.takes_bytes, share.part.weights_bytes) for share in found.shares] == [
        (HOST, amount("4.5GiB"), amount("4GiB"))
    ]
    assert found.gpu_layers == (("gpu0", 5),)


def test_what_does_not_fit_whole_is_shown_in_part() -> None:
    """A model that does not fit whole is shown in part."""
    found = look(a_pool("8GiB", gpus=("3GiB",)).declare("g", layered(4, "1GiB")), "g")
    assert (found.outcome, found.gpu_layers, found.in_part) == (Outcome.fits, (("gpu0", 3),), True)


def test_a_loaded_runner_that_serves_is_warm() -> None:
    """A request that a loaded runner serves is warm, and takes what the runner holds."""
    found = look(a_pool("8GiB").idle("a"), "a")
    assert found.outcome is Outcome.warm
    assert [(share.takes_bytes, share.needed_bytes) for share in found.shares] == [(amount("6GiB"), 0)]


def test_idle_victims_are_named_and_go_at_once() -> None:
    """Idle victims are named with what they hold, and free their memory at once."""
    pool = a_pool("8GiB").idle("a")
    found = look(pool, "b")
    (victim,) = found.victims
    assert (found.outcome, victim.model, victim.held_bytes) == (Outcome.evicts, "a", amount("6GiB"))
    assert (victim.leases, victim.free_at) == (0, pool.now)
    assert [share.free_bytes for share in found.shares] == [amount("8GiB")]


def test_busy_victims_come_with_the_bound_on_the_wait() -> None:
    """A busy victim frees its memory at the bound on the wait."""
    pool = a_pool("8GiB", max_wait_s=120.0).ready("a")
    (victim,) = look(pool, "b").victims
    assert (victim.leases, victim.free_at) == (1, pool.now + 120.0)


def test_a_load_nobody_waits_for_gives_its_place_up() -> None:
    """A load that no request waits for is a victim where its load slot is needed."""
    pool = a_pool("8GiB", each="1GiB", max_host_loads=1)
    pool.feed(acquire("a", 1, timeout=10))
    pool.advance("11s")
    found = look(pool, "b")
    assert (found.outcome, [victim.model for victim in found.victims]) == (Outcome.evicts, ["a"])


def test_other_options_than_the_loaded_ones_evict_the_models_own_runner() -> None:
    """A reload with other options shows the model's own runner as a victim."""
    pool = a_pool("8GiB").declare("d", a_model()).idle("d", num_ctx=1024)
    found = look(pool, "d", num_ctx=2048)
    assert (found.outcome, [victim.model for victim in found.victims]) == (Outcome.evicts, ["d"])


def test_a_load_under_way_is_waited_for() -> None:
    """A request for a model that loads waits for that load, and takes what is reserved for it."""
    found = look(a_pool("8GiB").loading("a"), "a")
    assert (found.outcome, found.waits_for) == (Outcome.waits, WaitFor.load)
    assert [share.takes_bytes for share in found.shares] == [amount("6GiB")]


def test_memory_on_its_way_back_is_waited_for() -> None:
    """A request whose memory is being freed waits for memory and has no victims."""
    found = look(a_pool("8GiB").expiring("a"), "b")
    assert (found.outcome, found.waits_for, found.victims) == (Outcome.waits, WaitFor.memory, ())


def test_those_before_it_are_waited_for() -> None:
    """A request behind an older one waits for earlier requests."""
    pool = a_pool("8GiB").ready("a")
    pool.feed(acquire("b", 50))
    found = look(pool, "c")
    assert (found.outcome, found.waits_for, found.victims) == (Outcome.waits, WaitFor.earlier_requests, ())


def test_what_never_fits_says_why() -> None:
    """A model that never fits has the core's refusal, and its bytes by device."""
    pool = a_pool("8GiB").declare("g", layered(4, "4GiB"))
    found = look(pool, "g")
    assert isinstance(found.refusal, DoesNotFitRefusal) and found.outcome is Outcome.never
    assert [(share.needed_bytes, share.free_bytes) for share in found.shares] == [
        (amount("16GiB") * 21 // 20, amount("8GiB"))
    ]


def test_what_would_fit_without_a_pin_says_so() -> None:
    """A model that would fit without a pinned runner has a refusal that names the pin."""
    pool = a_pool("8GiB").idle("a")
    pool.feed(pin("a"))
    found = look(pool, "b")
    assert isinstance(found.refusal, DoesNotFitRefusal) and found.refusal.reason == MemoryHeld(("a",), pinned=True)


def test_a_closed_scheduler_refuses() -> None:
    """A closed core refuses every preview."""
    pool = a_pool("8GiB")
    pool.feed(close())
    found = look(pool, "a")
    assert (found.outcome, found.refusal) == (Outcome.refused, SchedulerClosed())


def test_what_is_due_has_happened() -> None:
    """A keep-alive that is over counts as over in a preview, although the core has had no tick."""
    pool = a_pool("8GiB").idle("a", keep_alive=5)
    pool.now += 6  # the core has had no tick yet
    assert look(pool, "b").outcome is Outcome.waits


def test_what_is_launched_by_now_is_waited_for() -> None:
    """A load that is due counts as launched in a preview, so that the request waits for it."""
    pool = a_pool("8GiB", samples=False).idle("a")
    pool.feed(acquire("b", 1), exited(pool.runner("a")))
    pool.feed(pool.sample(0))  # it was asked for before the exit and read after it
    assert look(pool, "b").waits_for == WaitFor.memory
    pool.now += 6  # the core has had no tick yet
    assert look(pool, "b").waits_for == WaitFor.load


def test_a_victim_that_somebody_before_is_granted_is_in_use() -> None:
    """A victim that an older request is granted in the preview is shown as busy."""
    pool = a_pool("8GiB", max_wait_s=120.0).declare("d", a_model(context_trained=8192)).idle("d", num_ctx=8192)
    pool.inspects = False
    pool.feed(acquire("d", 1, num_ctx=10**6))
    (victim,) = look(pool, "d", num_parallel=2).victims
    assert (victim.model, victim.leases, victim.free_at) == ("d", 1, pool.now + 120.0)


def test_what_was_measured_replaces_the_prediction() -> None:
    """N14: a measurement of a runner replaces the prediction in a preview, with a smaller headroom."""
    pool = a_pool("8GiB").declare("d", a_model())
    assert look(pool, "d").measured is False
    pool.loading("d", 1).feed(Loaded(pool.runner("d"), None, ((HOST, amount("5GiB")),)), release(1), expire("d"))
    (share,) = look(pool.settle(), "d").shares
    assert look(pool, "d").measured and share.takes_bytes == amount("5GiB") > share.part.total_bytes
    assert share.needed_bytes < amount("5.2GiB")


def test_a_core_that_shares_its_devices_previews_without_a_claim() -> None:
    """A preview makes no claim, and other programs' loads are no part of it."""
    pool = a_pool("8GiB", claims=True, shares=False)
    assert look(pool, "a").outcome is Outcome.fits
    assert (pool.core._state.claims, pool.auditor.trace.claims) == ({}, 0)


# -- the preview is the truth ------------------------------------------------------------------------------------------


class PreviewMachine(CoreMachine):
    """After any events a request is previewed, and then told to a copy of the core."""

    @rule(model=MODELS, options=OPTIONS, preload=st.booleans(), priority=st.sampled_from([0, 0, 2]))
    def look_and_ask(self, model: str, options: dict[str, int], preload: bool, priority: int) -> None:
        core, now = self.pool.core, self.pool.now
        before = core.snapshot()
        want = RequestSpec(model, Options(**options), Purpose.preload if preload else Purpose.lease, priority)
        found = preview(now, core, want, inspection_of(self.pool, want))
        assert core.snapshot() == before, "a preview changes nothing"
        core = core.copy()
        core._state.config = replace(core._state.config, claims=False)  # claims would be granted, and the launch go on
        core.step(now, Tick())
        request = len(self.asked) + 1
        answers = core.step(now, Acquire(request, want))
        if any(known.id == model and known.inspecting for known in core._state.models.values()):
            answers += core.step(now, Inspected(model, self.pool.inspect(model, core.options_asked_of(model))))
        self.compare(found, core, Acquire(request, want), answers)

    @staticmethod
    def compare(found: Preview, core: Core, asked: Acquire, answers: list[Command]) -> None:
        """Raise AssertionError where the answers differ from the preview."""
        mine = [each for each in answers if isinstance(each, Grant | Reject) and each.request == asked.request]
        states = {id: runner.state for id, runner in core._state.runners.items()}
        match found.outcome:
            case Outcome.warm:
                assert [type(each) for each in mine] == [Grant]
            case Outcome.fits:
                launches = [each for each in answers if isinstance(each, Launch)]
                (launch,) = [each for each in launches if each.model == asked.spec.model]
                assert (mine, launch.options) == ([], found.options)
                assert launch.placement.gpu_layers == found.gpu_layers
                assert {s.device: s.takes_bytes for s in found.shares if s.takes_bytes} == {
                    device: amount for device, amount in launch.placement.bytes if amount
                }
            case Outcome.evicts:
                assert mine == [] and found.victims
                now = all(victim.free_at <= core._state.now for victim in found.victims)
                assert all((states[v.runner] is RunnerState.expiring) == now for v in found.victims)
            case Outcome.waits:
                assert mine == [] and found.waits_for and not found.victims
            case Outcome.refused | Outcome.never:
                assert mine == [Reject(asked.request, found.refusal)]
                assert isinstance(found.refusal, DoesNotFitRefusal) == (found.outcome is Outcome.never)


PreviewMachine.TestCase.settings = settings(settings.default, stateful_step_count=50)
TestPreview = PreviewMachine.TestCase


@given(
    host=st.integers(4, 12),
    gpu=st.integers(0, 6),
    residents=st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=3, unique_by=lambda each: each[0]),
    layers=st.integers(2, 10),
)
def test_what_evicts_goes_where_it_was_shown_once_they_have_left(
    host: int, gpu: int, residents: list[tuple[str, bool]], layers: int
) -> None:
    """A launch after the evictions has the placement that the preview showed."""
    gpus = (f"{gpu}GiB",) if gpu else ()
    pool = a_pool(f"{host}GiB", gpus=gpus, each="2GiB").declare("new", layered(layers, "512MiB", host="256MiB"))
    for model, busy in residents:
        if look(pool, model).outcome is Outcome.fits:
            (pool.ready if busy else pool.idle)(model)
    found = look(pool, "new")
    if found.outcome is not Outcome.evicts:
        return
    left = pool.feed(acquire("new", 1))
    left += pool.advance(max(victim.free_at for victim in found.victims) - pool.now)
    for runner in [pool.core._state.runners[victim.runner] for victim in found.victims]:
        pool.feed(*(release(lease) for lease in sorted(runner.leases)))
    pool.settle()
    (launch,) = [each for each in pool.commands if isinstance(each, Launch) and each.model == "new"]
    assert launch.placement.gpu_layers == found.gpu_layers
    takes = {share.device: share.takes_bytes for share in found.shares}
    assert {device: takes[device] for device, _ in launch.placement.bytes} == dict(launch.placement.bytes)


# -- advice ------------------------------------------------------------------------------------------------------------


def needs(info: ModelInfo, **options: object) -> int:
    """Return the least host memory with which a model with these options is loaded."""
    (share,) = look(a_pool("64GiB").declare("d", info), "d", **options).shares
    return share.takes_bytes + share.takes_bytes // 20


def a_limited_pool(capacity: int, **how: Any) -> PoolUnderTest:
    """Return a pool with a limit on its memory, so that pages of mapped files count too."""
    return a_pool(capacity, memory_limited=True, **how)


def advised(pool: PoolUnderTest, **options: object) -> list[tuple[dict[str, Any], Outcome]]:
    """Return the advice for a request for "d": the changed options, and the outcome of each."""
    want = acquire("d", 0, **options).spec
    profile = inspection_of(pool, want)
    found = preview(pool.now, pool.core, want, profile)
    advice = advise(pool.now, pool.core, want, profile, partial(pool.inspect, "d"), found)
    return [(changes(want.options, each.options), each.preview.outcome) for each in advice]


def changes(asked: Options, advised: Options) -> dict[str, object]:
    """Return the options that the advice changes."""
    names = [each.name for each in fields(Options)]
    return {name: getattr(advised, name) for name in names if getattr(advised, name) != getattr(asked, name)}


QUANTISED = {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}


def test_what_fits_needs_no_advice() -> None:
    """A request that fits has no advice."""
    assert advised(a_pool("8GiB").declare("d", a_model())) == []


def test_the_least_harm_is_advised_first() -> None:
    """Advice names a quantised cache first, then the largest context that fits, then fewer slots."""
    info = a_large_model()
    asked = {"num_ctx": 8192, "num_parallel": 4}
    pool = a_limited_pool(needs(info, **asked, **QUANTISED)).declare("d", info)
    assert look(pool, "d", **asked).outcome is Outcome.never
    assert advised(pool, **asked) == [
        (QUANTISED, Outcome.fits),
        ({"num_ctx": 4096}, Outcome.fits),
        ({"num_parallel": 2}, Outcome.fits),
    ]


def test_a_quantised_cache_allows_a_larger_context() -> None:
    """Where the context has to be smaller either way, a larger one with a quantised cache is advised too."""
    info = a_large_model()
    pool = a_limited_pool(needs(info, num_ctx=8192, **QUANTISED)).declare("d", info)
    assert needs(info, num_ctx=8192) > needs(info, num_ctx=8192, **QUANTISED) > needs(info, num_ctx=4096)
    assert advised(pool, num_ctx=16384) == [
        ({"num_ctx": 4096}, Outcome.fits),
        ({"num_ctx": 8192, **QUANTISED}, Outcome.fits),
    ]


def test_everything_at_once_is_advised_if_nothing_less_will_do() -> None:
    """One slot, a small context and a quantised cache are advised together where nothing less fits."""
    info = a_large_model()
    least = {"num_ctx": 2048, "num_parallel": 1, **QUANTISED}
    pool = a_limited_pool(needs(info, **least)).declare("d", info)
    assert advised(pool, num_ctx=32768, num_parallel=8) == [(least, Outcome.fits)]


@pytest.mark.parametrize(("head", "options"), [(16, {}), (32, {"flash_attention": False})])
def test_a_cache_that_cannot_be_quantised_is_not_advised_to_be(head: int, options: dict[str, bool]) -> None:
    """A quantised cache is not advised for heads that are no multiple of 32, nor without flash attention."""
    info = a_large_model(head=head)
    pool = a_limited_pool(needs(info, num_ctx=5120, **options)).declare(
        "d", info
    )  # more than 8192 tokens of q8_0 would take
    assert advised(pool, num_ctx=8192, **options) == [({"num_ctx": 4096}, Outcome.fits)]


@pytest.mark.parametrize(
    ("trained", "embedding", "least"), [(131072, False, 2048), (2048, False, 512), (4096, True, 512)]
)
def test_a_context_is_advised_down_to_what_is_of_use(trained: int, embedding: bool, least: int) -> None:
    """The largest useful context that fits is advised, which is smaller for an embedder."""
    info = a_large_model(head=16, context=trained, embedding=embedding)
    pool = a_limited_pool(needs(info, num_ctx=least)).declare("d", info)
    assert advised(pool, num_ctx=trained) == [({"num_ctx": least}, Outcome.fits)]
    assert advised(a_limited_pool(needs(info, num_ctx=256)).declare("d", info), num_ctx=trained) == []


def test_a_context_of_little_use_is_advised_where_nothing_else_helps() -> None:
    """A context of little use is advised where no other change helps."""
    info = a_large_model(head=16, context=8192)
    pool = a_limited_pool(needs(info, num_ctx=512)).declare("d", info)
    assert advised(pool, num_ctx=8192) == [({"num_ctx": 512}, Outcome.fits)]


def test_nothing_is_advised_where_nothing_helps() -> None:
    """Nothing is advised where the weights alone are too large."""
    assert advised(a_pool("32MiB").declare("d", a_large_model()), num_ctx=4096, num_parallel=4) == []


def test_an_object_has_no_options_to_advise() -> None:
    """An object has no options to advise."""
    pool = a_pool("4GiB")
    want = acquire("a", 0).spec
    profile = inspection_of(pool, want)
    assert advise(pool.now, pool.core, want, profile, partial(pool.inspect, "a"), look(pool, "a")) == ()


def test_what_evicts_is_told_how_it_need_not() -> None:
    """A request that would evict is advised a smaller context that fits beside the loaded runners."""
    info = a_large_model()
    roomy = needs(info, num_ctx=8192) * 5 // 4  # so that no other runner has to leave first
    pool = a_limited_pool(roomy + amount("64MiB"), sizes={"a": "64MiB"}).declare("d", info).idle("a")
    pool.core._state.config = replace(pool.core._state.config, max_runners=9)
    assert look(pool, "d", num_ctx=16384).outcome in (Outcome.evicts, Outcome.never)
    advice = advised(pool, num_ctx=16384)
    assert ({"num_ctx": 8192}, Outcome.fits) in advice


def test_a_loaded_runner_with_less_context_is_named() -> None:
    """A loaded runner with a smaller context is advised, because it serves without a reload."""
    pool = a_pool("8GiB").declare("d", a_large_model()).idle("d", num_ctx=4096)
    assert look(pool, "d", num_ctx=8192).outcome is Outcome.evicts
    assert ({"num_ctx": 4096}, Outcome.warm) in advised(pool, num_ctx=8192)


def test_what_goes_to_a_gpu_in_part_is_told_how_all_of_it_would() -> None:
    """A model that would go in part is advised a smaller cache with which it goes whole."""
    info = a_large_model()
    whole = look(a_pool("8GiB", gpus=("8GiB",)).declare("d", info), "d", num_ctx=4096)
    needed = next(share.needed_bytes for share in whole.shares if share.device == "gpu0")
    pool = a_pool("8GiB", gpus=(needed + MIB,)).declare("d", info)
    assert look(pool, "d", num_ctx=8192).in_part
    assert ({"num_ctx": 4096}, Outcome.fits) in advised(pool, num_ctx=8192)


def test_fewer_layers_on_a_gpu_are_advised_where_somebody_would_have_to_leave_it() -> None:
    """Fewer layers on a GPU are advised where the model would otherwise evict a runner from the GPU."""
    info = a_large_model()
    pool = a_pool("8GiB", gpus=("200MiB",)).declare("d", info)
    pool.declare("a", Footprint(fixed=((DeviceId("gpu0"), 140 * MIB),))).idle("a")
    assert look(pool, "d", num_ctx=512).outcome is Outcome.evicts
    ((change, outcome),) = advised(pool, num_ctx=512)
    assert (list(change), outcome) == (["num_gpu"], Outcome.fits) and 0 < change["num_gpu"] < 9


def test_layers_that_a_gpu_does_not_take_are_left_to_the_core() -> None:
    """Automatic layers are advised where a named number of layers never fits."""
    info = a_large_model()
    pool = a_pool("8GiB", gpus=("64MiB",)).declare("d", info)
    assert look(pool, "d", num_gpu=8).outcome is Outcome.never
    assert advised(pool, num_gpu=8)[-1] == ({"num_gpu": -1}, Outcome.fits)


class CountedCore(Core):
    """A core that counts its copies."""

    copies = 0

    def copy(self) -> Self:
        self.copies += 1
        return super().copy()


def a_core(host: int, gpu: int, held: Footprint | None = None) -> CountedCore:
    """Return a core with so many MiB and, if given, an idle model."""
    gpus = [DeviceSample(DeviceId("gpu0"), "gpu", "", gpu * MIB, gpu * MIB)] if gpu else []
    core = CountedCore()
    core.step(1.0, Sampled((DeviceSample(HOST, "cpu", "", host * MIB, host * MIB), *gpus)))
    for event in (acquire("a", 1), Inspected("a", held), loaded(1), release(1)) if held is not None else ():
        core.step(1.0, event)
    return core


def test_advice_costs_a_bounded_number_of_tries() -> None:
    """Advice makes a bounded number of copies of the core, even where no change helps."""
    info = a_model((1024 * MIB,) * 8, context_trained=131072)
    info = replace(info, key_length=32, value_length=32)
    core = a_core(65536, 65536, Footprint(fixed=((HOST, 60000 * MIB), (DeviceId("gpu0"), 60000 * MIB))))
    want = acquire("d", 0, num_ctx=65536, num_parallel=8).spec
    profile = profile_of(info, [want.options])
    found = preview(1.0, core, want, profile)
    core.copies = 0
    assert (found.outcome, advise(1.0, core, want, profile, partial(profile_of, info), found)) == (Outcome.evicts, ())
    assert core.copies <= MOST_TRIES


@given(
    host=st.integers(16, 2048),
    gpu=st.integers(0, 1024),
    layers=st.integers(1, 40),
    num_ctx=st.sampled_from([None, 512, 3000, 8192, 131072, 10**6]),
    num_parallel=st.integers(1, 16),
    num_gpu=st.sampled_from([None, -1, 0, 3, 99]),
    head=st.sampled_from([16, 64]),
    held=st.sampled_from([0, 0, 0.4, 0.9]),
)
def test_every_advice_fits_when_it_is_followed(
    host: int,
    gpu: int,
    layers: int,
    num_ctx: int | None,
    num_parallel: int,
    num_gpu: int | None,
    head: int,
    held: float,
) -> None:
    """Each advised request is launched by the core or evicts for it, and without advice no change would help."""
    info = replace(a_model((8 * MIB,) * layers, context_trained=131072), key_length=head, value_length=head)
    core = a_core(host, gpu, layered(1, f"{int(host * held * 0.8)}MiB") if held else None)
    want = acquire("d", 0, num_ctx=num_ctx, num_parallel=num_parallel, num_gpu=num_gpu).spec
    profile = profile_of(info, [want.options])
    found = preview(1.0, core, want, profile)
    core.copies = 0
    advice = advise(1.0, core, want, profile, partial(profile_of, info), found)
    assert len(advice) <= MOST_ADVICE and core.copies <= MOST_TRIES
    for each in advice:
        assert each.preview.outcome in (Outcome.fits, Outcome.evicts) and changes(want.options, each.options)
        real = core.copy()
        real.step(1.0, Acquire(2, replace(want, options=each.options)))
        answers = real.step(1.0, Inspected("d", profile_of(info, [each.options])))
        assert answers and not any(isinstance(answer, Reject) for answer in answers)
        assert any(isinstance(answer, Launch) for answer in answers) == (each.preview.outcome is Outcome.fits)
    if found.outcome is Outcome.never and not advice and num_gpu is None:
        least = Options(num_ctx=2048, num_parallel=1, **(QUANTISED if head == 64 else {}))
        small = num_ctx is None or num_ctx > 4096  # a smaller context is kept as it is, or halved further
        smallest = preview(1.0, core, replace(want, options=least), profile_of(info, [least]))
        assert not small or smallest.outcome is Outcome.never
