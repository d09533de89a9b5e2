"""The fake machine for tests of programs that embed the scheduler: declared models on virtual time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from scheduler import (
    AcquireTimeout,
    DoesNotFit,
    InvalidSettings,
    LoadFailed,
    LoadTimeout,
    ModelNotFound,
    ModelSpec,
    PythonModel,
    RunnerCrashed,
    SchedulerBroken,
    SchedulerClosed,
)
from scheduler.testing import FakeMachine
from scheduler.testing.fixtures import fake_machine  # noqa: F401  # the fixture
from tests.support.leaks import no_leaks
from tests.support.waiting import assert_soon

# -- time -------------------------------------------------------------------------------------------------------------


def test_time_moves_by_itself_until_a_request_is_answered() -> None:
    """A cold request takes the seconds of its load, a warm one none."""
    with no_leaks(), FakeMachine() as fake:
        fake.model("chat", size="4GiB", load="3s")
        with fake.scheduler.acquire("chat"):
            assert fake.now == 3.0
        with fake.scheduler.acquire("chat", timeout="1s"):
            assert fake.now == 3.0
        assert fake.loads == ["chat"]


def test_time_stands_still_while_no_request_waits() -> None:
    """A keep-alive ends by `advance` alone, at its own moment."""
    with no_leaks(), FakeMachine(keep_alive="5m") as fake:
        fake.model("chat", load="3s")
        fake.scheduler.acquire("chat").release()
        fake.advance("299s")
        assert fake.running == ["chat"]
        fake.advance("1s")
        assert fake.running == []
        assert fake.now == 303.0


def test_without_auto_advance_time_moves_when_it_is_told() -> None:
    """Without automatic advance a load is under way until the test advances the time."""
    with no_leaks(), FakeMachine(auto_advance=False) as fake:
        fake.model("chat", load="3s")
        future = fake.scheduler.submit("chat")
        assert fake.loading == ["chat"]
        fake.advance("2s")
        assert (fake.loading, fake.running, future.done()) == (["chat"], [], False)
        fake.advance("1s")
        assert fake.running == ["chat"]
        future.result(10).release()


def test_events_and_status_tell_virtual_time() -> None:
    """Events and statuses have virtual times, as the scheduler's decisions do."""
    with no_leaks(), FakeMachine(keep_alive="60s") as fake:
        fake.model("chat", load="3s")
        events = fake.scheduler.events()
        fake.scheduler.acquire("chat").release()
        fake.advance("20s")
        (runner,) = fake.scheduler.status().runners
        assert (runner.load_s, runner.expires_in_s) == (3.0, 40.0)
    assert {entry.at for entry in events} == {0.0, 3.0, 23.0}  # type: ignore[union-attr]  # no gap


def test_a_time_limit_passes_at_once_in_real_time() -> None:
    """A request's time limit passes at once in real time while a busy runner holds its memory."""
    with no_leaks(), FakeMachine("6GiB") as fake:
        fake.model("chat", size="4GiB").model("code", size="4GiB")
        lease = fake.scheduler.acquire("chat")  # in no block: it might be released elsewhere
        with pytest.raises(AcquireTimeout):
            fake.scheduler.acquire("code", timeout="30s")
        assert fake.now == 30.0
        lease.release()
        assert fake.loads == ["chat"]


def test_threads_of_a_program_meet_at_moments_that_the_test_chooses() -> None:
    """A busy runner drains after `max_wait`, and its release lets the request of another thread in."""
    with no_leaks(), FakeMachine("6GiB", auto_advance=False, max_wait="2m", min_residency=0) as fake:
        fake.model("chat", size="4GiB").model("code", size="4GiB", load="5s")
        lease = fake.scheduler.acquire("chat")
        future = fake.scheduler.submit("code")
        fake.advance("119s")
        assert [runner.state for runner in fake.scheduler.status().runners] == ["ready"]
        fake.advance("1s")
        assert [runner.state for runner in fake.scheduler.status().runners] == ["expiring"]
        lease.release()
        fake.advance("5s")
        with future.result(10):
            assert (fake.now, fake.running) == (125.0, ["code"])


def test_a_request_of_another_thread_waits_for_the_release_whatever_the_time_is() -> None:
    """A request waits for a lease to be released, although virtual time has passed every deadline."""
    with no_leaks(), FakeMachine("6GiB", max_wait="2m", min_residency=0) as fake:
        fake.model("chat", size="4GiB").model("code", size="4GiB", load="5s")
        lease = fake.scheduler.acquire("chat")
        future = fake.scheduler.submit("code")
        assert_soon(lambda: fake.now >= 120.0)
        assert fake.running == ["chat"]
        assert not lease.lost
        lease.release()
        with future.result(10):
            assert fake.running == ["code"]


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["chat", Path("models/chat.gguf"), "/srv/chat.gguf", ModelSpec("chat", "any.gguf")])
def test_a_model_is_found_by_its_name(named: str | Path | ModelSpec) -> None:
    """A model is found by name, path and spec."""
    with no_leaks(), FakeMachine() as fake:
        fake.model("chat")
        with fake.scheduler.acquire(named) as lease:
            assert lease.model == "chat"


def test_a_model_that_was_not_declared_is_not_found() -> None:
    """A model that was not declared is not found by path or by name, and the error has the declared names."""
    with no_leaks(), FakeMachine() as fake:
        fake.model("chat")
        with pytest.raises(ModelNotFound) as caught:
            fake.scheduler.acquire("chta")
        assert (caught.value.looked_in, caught.value.suggestions) == (
            ("the models that the test has declared",),
            ("chat",),
        )
        with pytest.raises(ModelNotFound):
            fake.scheduler.acquire(Path("models/chta.gguf"))


def test_memory_is_what_was_declared() -> None:
    """Memory of the host and of GPUs is as declared: a model that never fits is refused, and one that fits evicts."""
    with no_leaks(), FakeMachine({"cpu": "2GiB", "gpu0": "8GiB"}, min_residency=0) as fake:
        fake.model("large", size={"gpu0": "6GiB"}).model("other", size={"gpu0": "5GiB", "cpu": "1GiB"})
        fake.model("huge", size={"gpu0": "9GiB"})
        fake.scheduler.acquire("large").release()
        fake.scheduler.acquire("other").release()
        assert (fake.loads, fake.running) == (["large", "other"], ["other"])
        with pytest.raises(DoesNotFit):
            fake.scheduler.acquire("huge")
        assert [device.held_bytes >> 30 for device in fake.scheduler.status().devices] == [1, 5]


def test_a_memory_limit_can_change() -> None:
    """`configure` with another memory limit waits for a reading, as on a real machine."""
    with no_leaks(), FakeMachine("8GiB") as fake:
        fake.model("chat", size="4GiB")
        fake.scheduler.preload("chat").result(10)
        fake.scheduler.configure(memory_limit="2GiB")
        assert fake.running == []


def test_an_object_is_really_loaded_and_unloaded() -> None:
    """An object is loaded and unloaded for real, with the memory that it declares and the seconds of the test."""
    unloaded: list[str] = []
    model = PythonModel("index", load=lambda: "an index", unload=unloaded.append, memory={"cpu": "1GiB"})
    with no_leaks(), FakeMachine() as fake:
        fake.model("index", load="7s")
        with fake.scheduler.acquire(model, keep_alive=0) as lease:
            assert (lease.value, fake.now) == ("an index", 7.0)
            assert fake.scheduler.status().devices[0].held_bytes == 1 << 30
        assert fake.running == []
        assert unloaded == ["an index"]


def test_an_object_whose_load_raises_fails_to_load() -> None:
    """An object whose load raises fails to load with what was raised."""

    def load() -> object:
        raise OSError("no such index")

    with no_leaks(), FakeMachine() as fake, pytest.raises(LoadFailed, match="no such index"):
        fake.scheduler.acquire(PythonModel("index", load=load))


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_lease_answers_what_was_declared() -> None:
    """Every method of a lease answers what was declared, through the real client."""
    with no_leaks(), FakeMachine() as fake:
        fake.model("chat", answer=lambda text: text.upper(), vector=[0.5, 0.25])
        with fake.scheduler.acquire("chat") as lease:
            assert lease.chat("hello") == "HELLO"
            assert lease.chat([{"role": "user", "content": "hello"}]) == "HELLO"
            assert lease.complete("once") == "ONCE"
            assert "".join(lease.stream("hello")) == "HELLO"
            assert (lease.chat("hello").finish_reason, lease.chat("hello").usage["prompt_tokens"]) == ("stop", 5)
            assert lease.embed(["one", "two"]) == [[0.5, 0.25], [0.5, 0.25]]
            assert lease.rerank("a harbour", ["the harbour", "a harbour", "none"]) == [0.5, 1.0, 0.0]
            assert lease.tokenize("abc") == [97, 98, 99]


def test_an_event_loop_is_served() -> None:
    """An event loop can request leases and use them."""

    async def main(fake: FakeMachine) -> list[str]:
        async with fake.scheduler.acquire_async("chat") as lease:
            return [await lease.achat("hello"), *[piece async for piece in lease.astream("hello")]]

    with no_leaks(), FakeMachine() as fake:
        fake.model("chat", load="3s", answer="Hi!")
        assert asyncio.run(main(fake)) == ["Hi!", "Hi!"]


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_load_fails_when_it_is_told_to() -> None:
    """A load that is told to fail fails at the end of its load time, and its model loads after the back-off."""
    with no_leaks(), FakeMachine() as fake:
        fake.model("chat", load="3s")
        fake.fail_load("chat", "no such tensor")
        with pytest.raises(LoadFailed, match="no such tensor") as caught:
            fake.scheduler.acquire("chat")
        assert fake.now == 3.0
        fake.advance(caught.value.retry_after_s)
        fake.scheduler.acquire("chat").release()
        assert fake.loads == ["chat", "chat"]


def test_a_load_that_runs_out_of_memory_says_so() -> None:
    """A load runs out of memory as often as it is told to."""
    with no_leaks(), FakeMachine() as fake:
        fake.model("chat")
        fake.fail_load("chat", out_of_memory=True, times=9)
        with pytest.raises(LoadFailed) as caught:
            fake.scheduler.acquire("chat")
        assert caught.value.out_of_memory


def test_a_load_longer_than_the_load_timeout_is_stalled() -> None:
    """A load that is longer than the load timeout is stopped, because a fake load shows no progress."""
    with no_leaks(), FakeMachine(load_timeout="5m") as fake:
        fake.model("chat", load="6m")
        with pytest.raises(LoadTimeout):
            fake.scheduler.acquire("chat")
        assert fake.now == 300.0


def test_a_runner_dies_when_it_is_told_to() -> None:
    """A runner that is told to crash loses its lease, and the next request gets another runner."""
    with no_leaks(), FakeMachine() as fake:
        fake.model("chat", answer="Hi!")
        with fake.scheduler.acquire("chat") as lease:
            fake.crash("chat")
            assert lease.lost
            with pytest.raises(RunnerCrashed, match="ordered by the test"):
                lease.chat("hello")
        fake.scheduler.acquire("chat").release()
        assert fake.loads == ["chat", "chat"]
        with pytest.raises(LookupError):
            fake.crash("code")


# -- its end ----------------------------------------------------------------------------------------------------------


def test_a_close_breaks_leases_without_waiting_in_real_time() -> None:
    """The time limit of a close is virtual, so that leases are revoked without a wait in real time."""
    with no_leaks():
        fake = FakeMachine(close_timeout="10m").model("chat")
        lease = fake.scheduler.acquire("chat")
        fake.close()
        fake.close()
        assert lease.lost
        assert fake.now == 600.0
        assert fake.running == []
        with pytest.raises(SchedulerClosed):
            fake.scheduler.acquire("chat")
        lease.release()


def test_a_failed_decision_does_not_hang_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose core has raised closes like a scheduler."""
    with no_leaks(), FakeMachine() as fake:
        fake.model("chat").model("code")
        fake.scheduler.acquire("chat").release()
        monkeypatch.setattr(fake.scheduler._driver, "_step", lambda now, event: 1 / 0)
        with pytest.raises(SchedulerBroken):
            fake.scheduler.acquire("code")
        assert fake.running == ["chat"]


def test_the_fixture_is_a_machine(fake_machine: FakeMachine) -> None:  # noqa: F811
    """The fixture gives a test a fake machine, to which it adds its models."""
    fake_machine.model("chat", size="4GiB", load="3s")
    fake_machine.scheduler.acquire("chat").release()
    assert fake_machine.running == ["chat"]


def test_endless_time_and_undeclared_models_are_refused() -> None:
    """Time never passes for ever, and only loads of declared models can be made to fail."""
    with FakeMachine() as machine:
        with pytest.raises(InvalidSettings, match="a duration that ends"):
            machine.advance(-1)
        with pytest.raises(LookupError, match="no model ghost was declared"):
            machine.fail_load("ghost")
