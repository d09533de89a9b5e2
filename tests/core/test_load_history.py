"""What earlier lives showed, in this process or before it: what is taken over, what is told, and what it decides."""

from __future__ import annotations

import json

import pytest

from fsm.core import Core
from fsm.domain.devices import HOST, Amounts
from fsm.domain.model_info import ModelInfo, Options
from fsm.machine.request import ModelId, Purpose, RequestSpec
from fsm.messages.commands import Command, PersistMeasurement, Reject
from fsm.messages.events import Event, Loaded
from fsm.messages.refusals import DoesNotFitRefusal, ModelNotFoundRefusal, QueueFullRefusal
from fsm.placement.search import MEASURED_HEADROOM
from fsm.preview import Outcome, preview
from fsm.sizing.load_history import LAST_LOADS, LoadHistory, LoadTimes, MeasuredBytes
from fsm.sizing.load_options import resolve
from fsm.state.model_record import ModelRecord
from scheduler.api.fit_advice import advise
from scheduler.recording.codec import decode_command, decode_event, decode_state, encode
from tests.support.models import MIB, a_model
from tests.support.pool import PoolUnderTest, a_pool, acquire, amount, exited, expire, filled, loaded, release

MODEL = a_model()
ASKED = {"num_ctx": 1024}


def explicit(**options: int) -> Options:
    return resolve(MODEL, Options(**(options or ASKED)))


def knowing(size: str | int = 0, *loads_s: float, split: Amounts = (), model: ModelInfo = MODEL) -> LoadHistory:
    """Return what a store says: what a runner takes of the host if it is loaded as `asked`, and how long loads took."""
    took = (
        (MeasuredBytes(explicit(), split, ((HOST, amount(size) if isinstance(size, str) else size),)),) if size else ()
    )
    return LoadHistory(took, (LoadTimes(split, loads_s),) if loads_s else ())


def a_pool_that(known: LoadHistory | None = None, capacity: str = "8GiB", **limits: object) -> PoolUnderTest:
    """Return a pool that tells what is to be remembered, and whose store says `known` of the model a."""
    pool = a_pool(capacity, persists_measurements=True, **limits)
    pool.declare("a", MODEL)
    if known is not None:
        pool.known["a"] = known
    return pool


def promised(pool: PoolUnderTest, runner: int = 1) -> int:
    return dict(pool.launches[runner].placement.bytes)[HOST]


def told(commands: list[Command]) -> list[PersistMeasurement]:
    return [command for command in commands if isinstance(command, PersistMeasurement)]


# -- bytes that are taken over ----------------------------------------------------------------------------------------


def test_what_a_store_knows_is_promised_in_place_of_the_prediction() -> None:
    """With the small headroom of what was measured."""
    pool = a_pool_that(knowing("64MiB"))
    pool.loading("a", request=1, **ASKED)
    assert promised(pool) == 64 * MIB
    assert pool.launches[1].placement.measured
    tight = a_pool_that(knowing("64MiB"), capacity=f"{int(64 * (1 + MEASURED_HEADROOM)) + 1}MiB")
    tight.loading("a", request=1, **ASKED)
    assert promised(tight) == 64 * MIB


@pytest.mark.parametrize("asked", [{"num_ctx": 2048}, {"num_ctx": 1024, "num_thread": 2}])
def test_what_was_loaded_otherwise_is_predicted(asked: dict[str, int]) -> None:
    """Figures hold for the very options that they were measured with."""
    pool = a_pool_that(knowing("64MiB"))
    pool.loading("a", request=1, **asked)
    assert promised(pool) != 64 * MIB and not pool.launches[1].placement.measured


def test_what_was_measured_with_another_split_is_not_used() -> None:
    """A model that was on a GPU took something else of the host."""
    pool = a_pool_that(knowing("64MiB", split=(("gpu7", 5),)))
    pool.loading("a", request=1, **ASKED)
    assert not pool.launches[1].placement.measured


def test_what_is_known_refuses_at_once_what_a_prediction_would_have_tried() -> None:
    """A model that is known to take more than there is costs nobody a load."""
    pool = a_pool_that(knowing("9GiB"))
    (refusal,) = [one.refusal for one in pool.feed(acquire("a", request=1, **ASKED)) if isinstance(one, Reject)]
    assert isinstance(refusal, DoesNotFitRefusal)


def test_what_this_process_measured_beats_the_store() -> None:
    """And stays: what a store says later is of others, or this process's own, and older."""
    pool = a_pool_that(knowing("64MiB"))
    pool.loading("a", request=1, **ASKED)
    pool.feed(Loaded(1, None, ((HOST, 32 * MIB),)), filled(1), release(1), expire("a"), exited(1))
    pool.known["a"] = knowing("96MiB")
    pool.loading("a", request=2, **ASKED)
    assert promised(pool, 2) == 32 * MIB


def test_what_other_programs_measured_meanwhile_is_taken_over_where_nothing_is_known() -> None:
    """Each inspection brings what there is."""
    pool = a_pool_that()
    pool.ready("a", lease=1, **ASKED)
    pool.feed(release(1), expire("a"), exited(1))
    pool.known["a"] = LoadHistory((MeasuredBytes(explicit(num_ctx=512), (), ((HOST, 48 * MIB),)),))
    pool.loading("a", request=2, num_ctx=512)
    assert promised(pool, 2) == 48 * MIB


def test_a_file_that_was_replaced_takes_over_what_is_known_of_the_new_one_only() -> None:
    """What the old one took, and how long it loaded, is nobody's business any more."""
    pool = a_pool_that(knowing("64MiB", 5.0, 7.0))
    pool.loading("a", request=1, **ASKED)
    pool.feed(loaded(1), release(1), expire("a"), exited(1))
    pool.declare("a", a_model(layers_bytes=(3 * MIB,) * 4))
    del pool.known["a"]
    pool.loading("a", request=2, **ASKED)
    assert not pool.launches[2].placement.measured
    assert pool.core._state.models["a"].load_s is None


def test_an_inspection_that_failed_teaches_nothing() -> None:
    """Whatever a store says of it."""
    pool = a_pool_that(knowing("64MiB"))
    pool.declare("a", ModelNotFoundRefusal("/a"))
    pool.feed(acquire("a", request=1, **ASKED))
    assert "a" not in pool.core._state.models


# -- what is told -----------------------------------------------------------------------------------------------------


def test_nothing_is_told_where_nobody_keeps_it() -> None:
    """As without a setting for it."""
    pool = a_pool().declare("a", MODEL)
    pool.loading("a", request=1)
    pool.feed(Loaded(1, None, ((HOST, 32 * MIB),), 0, ((HOST, MIB),)), filled(1), release(1), expire("a"), exited(1))
    assert not told(pool.commands)


def test_a_load_is_told_with_the_most_that_its_engine_says_will_come() -> None:
    """What it takes, and what it computes in and may keep: no context has to be filled to know that."""
    pool = a_pool_that()
    pool.loading("a", request=1, **ASKED)
    pool.now += 3.0
    commands = pool.feed(Loaded(1, None, ((HOST, 32 * MIB),), 0, ((HOST, 8 * MIB),)))
    assert told(commands) == [PersistMeasurement(1, ((HOST, 40 * MIB),), 3.0)]


def test_without_a_word_of_the_engines_only_the_load_is_told() -> None:
    """What was predicted is nothing to remember; at the end of its life there is more to go by."""
    pool = a_pool_that()
    pool.loading("a", request=1, **ASKED)
    predicted = promised(pool)
    assert told(pool.feed(Loaded(1, None, ((HOST, 2 * MIB),)))) == [PersistMeasurement(1, (), 0.0)]
    assert told(pool.feed(release(1), expire("a"), exited(1))) == [PersistMeasurement(1, ((HOST, predicted),))]


def test_a_full_context_is_told_and_no_end_that_shows_no_more() -> None:
    """So that a process that is killed afterwards has not lived in vain."""
    pool = a_pool_that()
    pool.loading("a", request=1, **ASKED)
    pool.feed(Loaded(1, None, ((HOST, 32 * MIB),), 0, ((HOST, 8 * MIB),)))
    assert told(pool.feed(filled(1, cpu="1MiB"))) == [PersistMeasurement(1, ((HOST, 33 * MIB),))]
    assert not told(pool.feed(release(1), expire("a"), exited(1)))


def test_growth_after_that_is_told_at_the_end() -> None:
    """Whatever its engine said."""
    pool = a_pool_that()
    pool.loading("a", request=1, **ASKED)
    pool.feed(Loaded(1, None, ((HOST, 32 * MIB),), 0, ((HOST, 8 * MIB),)), filled(1))
    pool.occupied[1] = {HOST: 50 * MIB}
    pool.feed(pool.sample())
    assert told(pool.feed(release(1), expire("a"), exited(1))) == [PersistMeasurement(1, ((HOST, 50 * MIB),))]


def test_what_is_to_come_is_counted_beside_a_prediction_that_was_too_small() -> None:
    """The next one is promised all of it, though this one's promise is never raised."""
    pool = a_pool_that()
    pool.loading("a", request=1, **ASKED)
    predicted = promised(pool)
    pool.feed(Loaded(1, None, ((HOST, predicted),), 0, ((HOST, 8 * MIB),)))
    assert pool.core._state.ledger.held_bytes(HOST) == predicted
    pool.feed(release(1), expire("a"), exited(1))
    pool.loading("a", request=2, **ASKED)
    assert promised(pool, 2) == predicted + 8 * MIB


def test_a_load_takes_nothing_back_of_what_a_full_context_showed() -> None:
    """An engine's word counts all of what it computes in, and what was measured does not."""
    pool = a_pool_that(knowing("36MiB"))
    pool.loading("a", request=1, **ASKED)
    commands = pool.feed(Loaded(1, None, ((HOST, 32 * MIB),), 0, ((HOST, 8 * MIB),)))
    assert told(commands) == [PersistMeasurement(1, ((HOST, 36 * MIB),), 0.0)]


def test_a_device_that_nobody_measures_leaves_all_bytes_unknown() -> None:
    """What is remembered is complete, or is not."""
    pool = a_pool_that(gpus=("8GiB",))
    pool.loading("a", request=1, **ASKED)
    assert pool.launches[1].placement.gpu_layers
    pool.occupied[1] = {}
    commands = pool.core.step(pool.now, Loaded(1, None, ((HOST, 32 * MIB),), 0, ((HOST, 8 * MIB),)))
    assert [command.took for command in told(commands)] == [()]


def test_a_load_that_failed_is_no_load() -> None:
    """Neither its bytes nor its time say anything."""
    pool = a_pool_that()
    pool.loading("a", request=1, **ASKED)
    pool.feed(exited(1))
    assert not told(pool.commands)
    assert pool.core._state.models["a"].load_s is None


def test_a_runner_of_an_older_file_tells_nothing() -> None:
    """It may end long after the new file was read."""
    pool = a_pool_that()
    pool.ready("a", lease=1, **ASKED)
    before = len(told(pool.commands))
    pool.declare("a", a_model(layers_bytes=(3 * MIB,) * 4))
    pool.feed(acquire("a", request=2, num_thread=3), filled(1), release(1), exited(1))
    assert len(told(pool.commands)) == before


# -- seconds ----------------------------------------------------------------------------------------------------------


def test_the_usual_load_is_the_median_of_the_last_few() -> None:
    """One load from a cold disk, or beside others, moves nothing."""
    model = ModelRecord(ModelId("a"))
    assert model.load_s is None
    for load_s in (2.0, 90.0, 3.0):
        model.note_load((), load_s)
    assert model.load_s == 3.0
    for _ in range(LAST_LOADS):
        model.note_load((), 8.0)
    assert model.load_s == 8.0


def test_each_split_has_its_own_usual_load() -> None:
    """A GPU's is not the host's; where nothing is known of one, the others say what they can."""
    model, gpu = ModelRecord(ModelId("a")), (("gpu0", 5),)
    for load_s in (10.0, 12.0):
        model.note_load((), load_s)
    model.note_load(gpu, 2.0)
    assert (model.usual_load_s(()), model.usual_load_s(gpu), model.usual_load_s((("gpu1", 5),))) == (11.0, 2.0, 10.0)


def test_loads_of_earlier_programs_count_until_there_are_newer_ones() -> None:
    """They are taken over once; what this process adds is not taken over again with the next inspection."""
    pool = a_pool_that(knowing(0, 4.0, 6.0))
    pool.loading("a", request=1, **ASKED)
    model = pool.core._state.models["a"]
    assert model.load_s == 5.0
    pool.now += 20.0
    pool.feed(loaded(1), release(1), expire("a"), exited(1))
    pool.known["a"] = knowing(0, 4.0, 6.0, 20.0)
    pool.loading("a", request=2, **ASKED)
    assert model.loads == {(): (4.0, 6.0, 20.0)}


def test_a_full_queue_says_when_to_come_back_by_what_is_known() -> None:
    """Even before anything was loaded here."""
    pool = a_pool_that(knowing(0, 40.0, 40.0), max_queue=1)
    pool.loading("a", request=1, **ASKED)
    (rejected,) = pool.feed(acquire("b", request=2))
    assert rejected == Reject(2, QueueFullRefusal(1, 40.0))


def test_a_policy_is_told_the_usual_load() -> None:
    """And not how long the last one took."""
    seen: list[float | None] = []

    class Curious:
        def order(self, now: float, candidates: list[object]) -> list[object]:
            seen.extend(one.load_s for one in candidates)  # type: ignore[attr-defined]  # candidates
            return candidates

    pool = a_pool_that(knowing("5GiB", 3.0, 3.0), policy=Curious())
    pool.loading("a", request=1, **ASKED)
    pool.now += 60.0
    pool.feed(loaded(1), release(1), acquire("b", request=2))
    assert seen and set(seen) == {3.0}


# -- asked beforehand -------------------------------------------------------------------------------------------------


def test_a_preview_knows_what_a_load_would_know() -> None:
    """Bytes, and that they were measured; the core that is asked stays as it was."""
    pool = a_pool_that()
    want = RequestSpec(ModelId("a"), Options(**ASKED), Purpose.lease, 0)
    before = encode(pool.core.checkpoint())
    found = preview(0.0, pool.core, want, MODEL, knowing("64MiB"))
    assert found.measured and found.shares[0].takes_bytes == 64 * MIB
    assert not preview(0.0, pool.core, want, MODEL).measured
    assert encode(pool.core.checkpoint()) == before


def test_advice_knows_it_too() -> None:
    """What was measured to be too much with one context may be known to fit with another."""
    pool = a_pool_that(capacity="60MiB")
    want = RequestSpec(ModelId("a"), Options(), Purpose.lease, 0)
    whole, half = explicit(num_ctx=4096), explicit(num_ctx=2048)
    known = LoadHistory((MeasuredBytes(whole, (), ((HOST, 9 << 30),)), MeasuredBytes(half, (), ((HOST, 7 * MIB),))))
    found = preview(0.0, pool.core, want, MODEL, known)
    assert found.measured and found.outcome is Outcome.never
    advised = {each.options.num_ctx: each.preview for each in advise(0.0, pool.core, want, MODEL, found, known)}
    assert advised[2048].measured and advised[2048].shares[0].takes_bytes == 7 * MIB


# -- recorded ---------------------------------------------------------------------------------------------------------


def test_a_recording_with_remembered_figures_replays_without_the_store() -> None:
    """All that a decision knew came in by events: what comes out is the same, to the byte, and so is the state."""
    script: list[str] = []
    pool = a_pool_that(knowing("64MiB", 3.0, 5.0))
    step = pool.core.step

    def recorded(now: float, event: Event) -> list[Command]:
        commands = step(now, event)
        script.append(json.dumps([now, encode(event), [encode(command) for command in commands]]))
        return commands

    pool.core.step = recorded  # type: ignore[method-assign]  # what a recorder does
    state = decode_state(json.loads(json.dumps(encode(pool.core.checkpoint()))))
    pool.loading("a", request=1, **ASKED)
    pool.now += 3.0
    pool.feed(Loaded(1, None, ((HOST, 32 * MIB),), 0, ((HOST, 8 * MIB),)), filled(1), release(1), expire("a"))
    pool.feed(exited(1))
    pool.loading("a", request=2, **ASKED)
    core = Core.restore(state)
    assert len(script) > 8 and any("PersistMeasurement" in line for line in script)
    for line in script:
        now, event, commands = json.loads(line)
        assert core.step(now, decode_event(event)) == [decode_command(command) for command in commands]
    assert encode(core.checkpoint()) == encode(pool.core.checkpoint())


def test_a_copy_learns_by_itself() -> None:
    """What one core remembers is not the other's."""
    pool = a_pool_that(knowing("64MiB", 3.0))
    pool.loading("a", request=1, **ASKED)
    copy = pool.core.copy()
    before = encode(pool.core.checkpoint())
    copy.step(pool.now + 9.0, Loaded(1, None, ((HOST, 32 * MIB),), 0, ((HOST, 8 * MIB),)))
    assert encode(pool.core.checkpoint()) == before
    assert copy._state.models["a"].loads == {(): (3.0, 9.0)}
