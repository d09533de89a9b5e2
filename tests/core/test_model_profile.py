"""What the core asks an engine about a model, and what it keeps of the answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fsm.domain.devices import Placement
from fsm.domain.options import Options
from fsm.machine.runner import Runner, RunnerId
from fsm.messages.commands import Inspect
from fsm.messages.reasons import WaitFor
from fsm.sizing.footprint import Footprint
from fsm.sizing.model_profile import LargerBatch, Resolution, ResolvedLoad
from fsm.state.model_record import MOST_RESOLUTIONS, ModelRecord
from scheduler.engines.llama_profile import LlamaSettings, profile_of
from tests.support.models import a_model
from tests.support.pool import PoolUnderTest, a_pool, acquire, cancel, exited, launched, loaded, release, stopped

SMALL, LARGE, BIG = Options(num_ctx=2048), Options(num_ctx=8192), Options(num_ctx=65536)


def slow_pool(**how: object) -> PoolUnderTest:
    """Return a pool with one model, whose inspections end when the test says so."""
    return a_pool("16GiB", inspects=False, **how).declare("a", a_model())


def test_an_inspection_is_ordered_for_the_options_of_all_requests_that_wait() -> None:
    """Requests that came before the order are in it; a request that comes later has another inspection."""
    pool = slow_pool()
    assert pool.feed(acquire("a", 1, num_ctx=2048)) == [Inspect("a", (SMALL,))]
    assert pool.feed(acquire("a", 2, num_ctx=8192)) == []  # one inspection at a time
    commands = pool.feed(pool.inspection("a", [SMALL]))
    assert launched(commands) == ["a"] and Inspect("a", (LARGE,)) in commands
    pool.feed(pool.inspection("a", [LARGE]))
    assert pool.waits_for(2) == WaitFor.other_load


def test_options_that_are_resolved_are_not_asked_for_again() -> None:
    """A new load is inspected, since the file may have changed, but no option is resolved a second time."""
    pool = slow_pool()
    pool.feed(acquire("a", 1), pool.inspection("a", [Options()]), loaded(1), release(1), exited(1))
    assert pool.feed(acquire("a", 2)) == [Inspect("a")]
    assert launched(pool.feed(pool.inspection("a", []))) == ["a"]


def test_another_file_is_asked_about_from_the_beginning() -> None:
    """A profile with another fingerprint drops the resolutions, and the requests that wait are resolved again."""
    pool = slow_pool()
    pool.feed(acquire("a", 1), pool.inspection("a", [Options()]), loaded(1), release(1), exited(1))
    pool.declare("a", a_model((3 * 2**20,) * 4))
    pool.feed(acquire("a", 2))
    assert pool.feed(pool.inspection("a", [])) == [Inspect("a", (Options(),))]
    commands = pool.feed(pool.inspection("a", [Options()]))
    assert launched(commands) == ["a"] and pool.launches[2].placement != pool.launches[1].placement


def test_options_of_a_loaded_model_are_resolved_before_it_is_loaded_again() -> None:
    """A request that names more than the model can have is served by the runner, once its options are resolved."""
    pool = slow_pool()
    pool.feed(acquire("a", 1, num_ctx=8192), pool.inspection("a", [LARGE]), loaded(1), release(1))
    commands = pool.feed(acquire("a", 2, num_ctx=10**6))
    assert commands == [Inspect("a", (Options(num_ctx=10**6),))]
    commands = pool.feed(pool.inspection("a", [Options(num_ctx=10**6)]))
    assert stopped(commands) == [] and 2 in pool.answers


def test_resolutions_are_bounded_but_for_requests_that_wait() -> None:
    """The oldest resolutions are dropped, and those of waiting requests are kept however many they are."""
    model, profile = ModelRecord("a"), profile_of(a_model(), ())
    asked = [Options(num_ctx=4 + number) for number in range(50)]
    resolutions = tuple(Resolution(options, (ResolvedLoad(options, Footprint()),)) for options in asked)
    for one in resolutions:
        model.apply_inspection(replace(profile, resolutions=(one,)), 1, kept=[asked[0]])
    assert [*model.resolutions] == [asked[0], *asked[-MOST_RESOLUTIONS:]]
    model.apply_inspection(replace(profile, resolutions=resolutions), 1, kept=asked)
    assert set(model.resolutions) == set(asked)


def test_no_younger_request_takes_the_memory_of_a_known_model_whose_options_are_not_resolved_yet() -> None:
    """While new options of a known model are resolved, memory is reserved for it by the options that are known."""
    pool = a_pool("1GiB", inspects=False, max_runners=9).declare("large", a_model((200 * 2**20,) * 3))
    pool.declare("small", "600MiB").feed(acquire("large", 1), pool.inspection("large", [Options()]))
    pool.feed(loaded(1), release(1), exited(1), acquire("small", 3), acquire("large", 2, num_ctx=2048), cancel(3))
    pool.feed(acquire("small", 4))
    assert launched(pool.feed(pool.inspection("small"))) == []
    assert launched(pool.feed(pool.inspection("large", [SMALL]))) == ["large"]


def test_an_automatic_context_is_stepped_down_although_other_options_were_resolved_last() -> None:
    """The smaller contexts of a request that names none are those of any request that names none."""
    model, profile = ModelRecord("a"), profile_of(a_model(context_trained=65536), [Options(num_parallel=2)], BIG)
    model.apply_inspection(profile, 1)
    failed = Runner(RunnerId(1), "a", Options(num_ctx=65536), Placement(()), 0.0, 0.0)
    failed.equivalent_requests.add(Options())
    assert model.step_down(failed) and model.context_limit == 32768
    failed.equivalent_requests = {Options(num_ctx=65536)}
    assert not model.step_down(failed)


def test_a_launch_carries_the_settings_of_its_load() -> None:
    """The engine is told the settings that were planned, those of the larger batch where that is taken."""
    pool = a_pool("16GiB").declare("a", a_model(context_trained=65536)).loading("a", 1)
    assert LlamaSettings.decoded(pool.launches[1].settings).num_micro_batch == 512
    on_gpu = a_pool("16GiB", ("16GiB",)).declare("a", a_model(context_trained=65536)).loading("a", 1, num_ctx=40000)
    assert LlamaSettings.decoded(on_gpu.launches[1].settings).num_micro_batch == 2048


def test_a_resolution_has_a_load_for_any_machine() -> None:
    """A resolution without a load, or whose last load needs GPUs of some size, is a fault of its engine."""
    load = ResolvedLoad(Options(), Footprint())
    larger, without = replace(load, least_gpu_bytes=1), replace(load, footprint=None)
    for loads in ((), (larger,), (without,), (replace(load, batches=(LargerBatch(without, 0.5, 0),)),)):
        with pytest.raises(ValueError, match=r"any machine|no footprint"):
            Resolution(Options(), loads)
