"""Load-time options: which requests share a runner, and which need a reload."""

from __future__ import annotations

import pytest

from fsm.domain.options import Options
from fsm.machine.runner import RunnerState
from fsm.messages.commands import Grant, Inspect
from fsm.messages.events import Loaded
from fsm.messages.reasons import WaitFor
from tests.support.models import a_model
from tests.support.pool import PoolUnderTest, a_pool, acquire, exited, granted, launched, loaded, pin, preload, release


def a_pool_of_models(**how: object) -> PoolUnderTest:
    """Return a pool whose model "a" has metadata and options that matter."""
    return a_pool(capacity="16GiB", **how).declare("a", a_model())


def options_of(pool: PoolUnderTest, runner: int) -> Options:
    return pool.launches[runner].options


def test_what_a_process_is_started_with_is_explicit() -> None:
    """Every automatic value is resolved before the launch, so that later requests can be compared with it."""
    pool = a_pool_of_models().loading("a", request=1)
    assert options_of(pool, 1) == Options(
        num_ctx=4096, num_batch=512, num_parallel=1, cache_type_k="f16", cache_type_v="f16", draft_num_predict=0,
        context_shift=False,
    )  # fmt: skip


def test_s01_a_context_below_4_becomes_4() -> None:
    """S01: a request with a context below 4 is served by a runner with a context of 4."""
    pool = a_pool_of_models().loading("a", request=1, num_ctx=1)
    assert options_of(pool, 1).num_ctx == 4
    assert granted(pool.feed(loaded(1))) == [1]


def test_s01_a_vision_model_gets_at_least_2048() -> None:
    """S01: a vision model is launched with a context of at least 2048."""
    pool = a_pool_of_models().declare("a", a_model(vision=True)).loading("a", request=1, num_ctx=512)
    assert options_of(pool, 1).num_ctx == 2048


def test_s22_embedders_take_one_request_at_a_time() -> None:
    """S22: an embedder is launched with one slot, which serves a request for four."""
    pool = a_pool_of_models().declare("a", a_model(embedding=True)).loading("a", request=1, num_parallel=4)
    assert options_of(pool, 1).num_parallel == 1
    assert granted(pool.feed(loaded(1))) == [1]


def test_s22_there_is_always_one_slot() -> None:
    """S22: a request for no slot is launched with one slot."""
    pool = a_pool_of_models().loading("a", request=1, num_parallel=0)
    assert options_of(pool, 1).num_parallel == 1


@pytest.mark.parametrize("asked", [{"num_ctx": 2048}, {"num_ctx": 4096}, {}, {"num_gpu": -1}, {"cache_type_k": "f16"}])
def test_s30_a_runner_serves_what_it_covers(asked: dict[str, object]) -> None:
    """S30: a runner serves a smaller or equal context, no options, a negative num_gpu and its resolved options."""
    pool = a_pool_of_models().idle("a")
    assert pool.feed(acquire("a", request=1, **asked)) == [Grant(1, 1)]


@pytest.mark.parametrize(
    "asked",
    [
        {"num_ctx": 4097},
        {"num_parallel": 2},
        {"num_thread": 3},
        {"num_batch": 256},
        {"cache_type_v": "f32"},
        {"use_mmap": False},
        {"flash_attention": True},
        {"draft_num_predict": 4},
        {"context_shift": True},
    ],
)
def test_s30_any_other_option_that_is_named_needs_a_reload(asked: dict[str, object]) -> None:
    """S30: another named option stops the runner, and the next one has that option."""
    pool = a_pool_of_models().idle("a")
    assert launched(pool.feed(acquire("a", request=1, **asked))) == ["a"]
    (name, value) = next(iter(asked.items()))
    assert getattr(options_of(pool, 2), name) == value


def test_s30_those_who_ask_for_less_join_a_load() -> None:
    """S30: a request for a smaller context waits for the load of a larger one."""
    pool = a_pool_of_models().loading("a", request=1, num_ctx=8192)
    assert pool.feed(acquire("a", request=2, num_ctx=2048)) == []
    assert granted(pool.feed(loaded(1))) == [1, 2]


def test_n09_what_the_engine_really_got_is_what_later_requests_are_compared_with() -> None:
    """N09: waiting requests are served by what the engine loaded, and a later request for more is not."""
    pool = a_pool_of_models().loading("a", request=1, num_ctx=8192)
    assert pool.feed(loaded(1, num_ctx=2048)) == [Grant(1, 1)]
    assert pool.feed(acquire("a", request=2, num_ctx=2048)) == [Grant(2, 1)]
    assert granted(pool.feed(acquire("a", request=3, num_ctx=4096))) == []


def test_n09_automatic_values_never_cause_a_reload() -> None:
    """N09: a request that names no options is granted the runner that is there."""
    pool = a_pool_of_models().idle("a", num_ctx=4096, num_thread=7)
    assert pool.feed(acquire("a", request=1)) == [Grant(1, 1)]


@pytest.mark.parametrize("named", [{"num_gpu": 0}, {"use_mmap": True}, {"main_gpu": 0}, {"num_gpu": 0, "main_gpu": 1}])
def test_u06_naming_what_a_runner_on_the_host_has_is_no_reload(named: dict[str, int]) -> None:
    """U06: without GPUs a model has no layers on them and is mapped; a request that says so is served."""
    pool = a_pool_of_models().idle("a")
    assert pool.feed(acquire("a", request=1, **named)) == [Grant(1, 1)]


@pytest.mark.parametrize("named", [{"num_gpu": 5}, {"num_gpu": 999}, {"main_gpu": 1}, {"num_gpu": 99, "main_gpu": 1}])
def test_u06_naming_what_a_runner_on_a_gpu_has_is_no_reload(named: dict[str, int]) -> None:
    """U06: a model that is whole on the second GPU has all the layers that a request may name, on that GPU."""
    pool = a_pool_of_models(gpus=("8MiB", "24GiB")).idle("a")
    assert sum(layers for _, layers in pool.launches[1].placement.gpu_layers) == 5
    assert pool.feed(acquire("a", request=1, **named)) == [Grant(1, 1)]
    assert len(pool.launches) == 1


@pytest.mark.parametrize("named", [{"num_gpu": 0}, {"num_gpu": 4}, {"main_gpu": 0}])
def test_u06_another_number_of_layers_or_another_gpu_is_a_reload(named: dict[str, int]) -> None:
    """U06: what the runner has not is loaded."""
    pool = a_pool_of_models(gpus=("20GiB", "24GiB")).idle("a")
    pool.feed(acquire("a", request=1, **named))
    pool.settle()
    assert pool.launches[2].options.num_gpu == named.get("num_gpu")
    assert pool.launches[2].options.main_gpu == named.get("main_gpu")


def test_u06_a_gpu_that_was_preferred_and_could_not_be_had_is_no_reload() -> None:
    """U06: who prefers a GPU that is too small, and who prefers the one that was taken then, share the runner."""
    pool = a_pool_of_models(gpus=("8MiB", "24GiB")).idle("a", main_gpu=0)
    assert pool.feed(acquire("a", request=1, main_gpu=1, num_ctx=512)) == [Grant(1, 1)]
    assert pool.feed(acquire("a", request=2, main_gpu=0, num_ctx=256)) == [Grant(2, 1)]


@pytest.mark.parametrize("chosen", [True, False])
def test_u06_what_the_engine_has_chosen_can_be_named(chosen: bool) -> None:
    """U06: once the engine has told whether it uses flash attention, only the other wish needs a load."""
    pool = a_pool_of_models().loading("a", request=1)
    pool.feed(Loaded(1, flash_attention=chosen), release(1))
    assert pool.feed(acquire("a", request=2, flash_attention=chosen)) == [Grant(2, 1)]
    pool.feed(release(2), acquire("a", request=3, flash_attention=not chosen))
    pool.settle()
    assert pool.launches[2].options.flash_attention is not chosen


def test_u06_a_wish_that_the_engine_does_not_follow_is_no_endless_reload() -> None:
    """U06: an engine that forces flash attention off serves all who have named it with one load."""
    pool = a_pool_of_models().loading("a", request=1, flash_attention=True)
    pool.feed(Loaded(1, flash_attention=False), release(1))
    assert pool.feed(acquire("a", request=2, flash_attention=True, num_ctx=512)) == [Grant(2, 1)]


@pytest.mark.parametrize("less", [{"num_ctx": 512}, {"num_ctx": 4095, "num_thread": 7}])
def test_u07_what_one_request_named_is_not_for_the_others(less: dict[str, int]) -> None:
    """U07: a request that names no context has the usual one, although a smaller one was named before it."""
    pool = a_pool_of_models().idle("a", **less)
    pool.feed(acquire("a", request=1))
    pool.settle()
    assert pool.launches[2].options.num_ctx == 4096


def test_u07_a_pinned_runner_serves_with_less_than_usual() -> None:
    """U07: a pinned runner is not moved, so a request that names nothing takes what it has and is not refused."""
    pool = a_pool_of_models().idle("a", num_ctx=512)
    pool.feed(pin("a"))
    assert granted(pool.feed(acquire("a", request=1))) == [1]


def test_u07_more_than_usual_serves() -> None:
    """U07: what was loaded for a larger context or more slots serves a request that names nothing."""
    pool = a_pool_of_models().idle("a", num_ctx=8192, num_parallel=2)
    assert pool.feed(acquire("a", request=1)) == [Grant(1, 1)]


def test_u07_who_names_nothing_has_no_more_to_expect_than_the_others_who_do_not() -> None:
    """U07: a context that the engine or a lack of memory made smaller serves all requests that name none."""
    pool = a_pool_of_models().loading("a", request=1)
    pool.feed(loaded(1, num_ctx=1024))
    assert pool.feed(acquire("a", request=2)) == [Grant(2, 1)]
    assert pool.feed(acquire("a", request=3, num_parallel=1)) == [Grant(3, 1)]


def test_u07_a_small_context_is_served_by_the_usual_one() -> None:
    """U07: two clients, one that names a small context and one that names none, share one runner after two loads."""
    pool = a_pool_of_models().idle("a", num_ctx=512)
    pool.feed(acquire("a", request=1))
    pool.settle().feed(loaded(2), release(1))
    for request in range(2, 8):
        options = {"num_ctx": 512} if request % 2 else {}
        assert pool.feed(acquire("a", request=request, **options)) == [Grant(request, 2)]
        pool.feed(release(request))


def test_a_wish_beyond_the_models_limits_is_served_by_what_it_comes_to() -> None:
    """A request beyond the model's limits is served by a runner at those limits."""
    pool = a_pool_of_models().idle("a", num_ctx=8192)
    assert pool.feed(acquire("a", request=1, num_ctx=100_000)) == [Grant(1, 1)]
    pool.inspects = False
    assert pool.feed(acquire("a", request=2, num_ctx=100_000)) == [Grant(2, 1)]


def test_a_wish_that_comes_to_the_same_joins_a_load() -> None:
    """A request beyond the model's limits waits for a load at those limits."""
    pool = a_pool_of_models().loading("a", request=1, num_ctx=8192)
    pool.feed(acquire("a", request=2, num_ctx=100_000))
    assert pool.waits_for(2) == WaitFor.load
    assert granted(pool.feed(loaded(1))) == [1, 2]


def test_two_waiters_that_come_to_the_same_share_one_load() -> None:
    """Two requests beyond the model's limits share one launch."""
    pool = a_pool_of_models(inspects=False)
    pool.feed(acquire("a", request=1, num_ctx=100_000), acquire("a", request=2, num_ctx=200_000))
    assert launched(pool.feed(pool.sample(), pool.inspection("a"))) == ["a"]
    assert granted(pool.feed(pool.inspection("a"), loaded(1))) == [1, 2]


def test_d08_a_reload_has_the_options_of_its_own_request() -> None:
    """D08: a reload has the options of the request that caused it, and the snapshot shows them."""
    pool = a_pool_of_models().idle("a", num_ctx=512)
    pool.feed(acquire("a", request=1, num_ctx=1024), exited(1), loaded(2))
    assert [view.options.num_ctx for view in pool.core.snapshot().runners] == [1024]


def test_another_identity_of_the_same_file_lives_beside_it() -> None:
    """S30: an embedder and a chat model of one file are two models and are loaded beside each other."""
    pool = a_pool_of_models().declare("a|embedding", a_model(embedding=True)).idle("a").idle("a|embedding")
    assert [view.state for view in pool.core.snapshot().runners] == [RunnerState.idle] * 2


def test_a_preload_with_other_options_reloads() -> None:
    """A preload with other options reloads the model like any other request."""
    pool = a_pool_of_models().idle("a", num_ctx=512)
    pool.feed(preload("a", request=1, num_ctx=1024), exited(1))
    assert pool.feed(loaded(2)) == [Grant(1, 2)]
    assert pool.state("a") is RunnerState.idle


def test_the_keep_alive_of_a_load_is_that_of_the_last_who_named_one() -> None:
    """A load that serves several requests has the keep-alive of the last one that named one."""
    pool = a_pool_of_models().loading("a", request=1, keep_alive="1m")
    pool.feed(acquire("a", request=2, keep_alive="2m"), acquire("a", request=3), loaded(1))
    pool.feed(release(1), release(2), release(3))
    assert [view.expires_at - pool.now for view in pool.core.snapshot().runners] == [120.0]


def test_a_file_is_read_for_the_next_load_while_the_first_goes_on() -> None:
    """A file is inspected for a reload while the first load of the model goes on."""
    pool = a_pool(capacity="16GiB", inspects=False).declare("a", a_model())
    pool.feed(acquire("a", 1, num_ctx=2048), acquire("a", 2, num_ctx=8192))
    assert pool.feed(pool.inspection("a"))[-1] == Inspect("a")
    assert pool.life("a").state is RunnerState.loading
