"""Measurements of earlier runs, of this program or others: what is taken over, persisted, and decided by them."""

from __future__ import annotations

import json
from functools import partial

import pytest

from fsm.core import Core
from fsm.domain.devices import HOST, Amounts
from fsm.domain.options import Options
from fsm.machine.request import ModelId, Purpose, RequestSpec
from fsm.messages.commands import Command, PersistMeasurement, Reject
from fsm.messages.events import Event, Loaded
from fsm.messages.refusals import DoesNotFitRefusal, ModelNotFoundRefusal, QueueFullRefusal
from fsm.placement.search import MEASURED_HEADROOM
from fsm.preview import Outcome, preview
from fsm.sizing.load_history import LAST_LOADS, LoadHistory, LoadTimes, MeasuredBytes
from fsm.state.model_record import ModelRecord
from scheduler.api.fit_advice import advise
from scheduler.engines.llama_options import resolve
from scheduler.engines.llama_profile import profile_of
from scheduler.models.model_info import ModelInfo
from scheduler.recording.codec import decode_command, decode_event, decode_state, encode
from tests.support.models import MIB, a_model
from tests.support.pool import PoolUnderTest, a_pool, acquire, amount, exited, expire, filled, loaded, release

MODEL = a_model()
ASKED = {"num_ctx": 1024}


def explicit(**options: int) -> Options:
    return resolve(MODEL, Options(**(options or ASKED)))


def knowing(size: str | int = 0, *loads_s: float, split: Amounts = (), model: ModelInfo = MODEL) -> LoadHistory:
    """Return a history: what a runner with the options of `ASKED` takes of the host, and how long loads took."""
    took = (
        (MeasuredBytes(explicit(), split, ((HOST, amount(size) if isinstance(size, str) else size),)),) if size else ()
    )
    return LoadHistory(took, (LoadTimes(split, loads_s),) if loads_s else ())


def a_pool_that(known: LoadHistory | None = None, capacity: str = "8GiB", **limits: object) -> PoolUnderTest:
    """Return a pool that persists measurements, and whose store knows `known` of the model "a"."""
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
    """A measurement of the store replaces the prediction, with the small headroom of a measurement."""
    pool = a_pool_that(knowing("64MiB"))
    pool.loading("a", request=1, **ASKED)
    assert promised(pool) == 64 * MIB
    assert pool.launches[1].placement.measured
    tight = a_pool_that(knowing("64MiB"), capacity=f"{int(64 * (1 + MEASURED_HEADROOM)) + 1}MiB")
    tight.loading("a", request=1, **ASKED)
    assert promised(tight) == 64 * MIB


@pytest.mark.parametrize("asked", [{"num_ctx": 2048}, {"num_ctx": 1024, "num_thread": 2}])
def test_what_was_loaded_otherwise_is_predicted(asked: dict[str, int]) -> None:
    """A measurement holds only for the options that it was made with."""
    pool = a_pool_that(knowing("64MiB"))
    pool.loading("a", request=1, **asked)
    assert promised(pool) != 64 * MIB and not pool.launches[1].placement.measured


def test_what_was_measured_with_another_split_is_not_used() -> None:
    """A measurement of another split is not used, because the model took other memory there."""
    pool = a_pool_that(knowing("64MiB", split=(("gpu7", 5),)))
    pool.loading("a", request=1, **ASKED)
    assert not pool.launches[1].placement.measured


def test_what_is_known_refuses_at_once_what_a_prediction_would_have_tried() -> None:
    """A model whose measurement exceeds the memory is refused at once and not loaded."""
    pool = a_pool_that(knowing("9GiB"))
    (refusal,) = [one.refusal for one in pool.feed(acquire("a", request=1, **ASKED)) if isinstance(one, Reject)]
    assert isinstance(refusal, DoesNotFitRefusal)


def test_what_this_process_measured_beats_the_store() -> None:
    """A measurement of this process wins over what the store has, also after a later inspection."""
    pool = a_pool_that(knowing("64MiB"))
    pool.loading("a", request=1, **ASKED)
    pool.feed(Loaded(1, None, ((HOST, 32 * MIB),)), filled(1), release(1), expire("a"), exited(1))
    pool.known["a"] = knowing("96MiB")
    pool.loading("a", request=2, **ASKED)
    assert promised(pool, 2) == 32 * MIB


def test_what_other_programs_measured_meanwhile_is_taken_over_where_nothing_is_known() -> None:
    """Each inspection takes over measurements of other programs where the core has none."""
    pool = a_pool_that()
    pool.ready("a", lease=1, **ASKED)
    pool.feed(release(1), expire("a"), exited(1))
    pool.known["a"] = LoadHistory((MeasuredBytes(explicit(num_ctx=512), (), ((HOST, 48 * MIB),)),))
    pool.loading("a", request=2, num_ctx=512)
    assert promised(pool, 2) == 48 * MIB


def test_a_file_that_was_replaced_takes_over_what_is_known_of_the_new_one_only() -> None:
    """After a file was replaced, measurements and load times of the old file are not used."""
    pool = a_pool_that(knowing("64MiB", 5.0, 7.0))
    pool.loading("a", request=1, **ASKED)
    pool.feed(loaded(1), release(1), expire("a"), exited(1))
    pool.declare("a", a_model(layers_bytes=(3 * MIB,) * 4))
    del pool.known["a"]
    pool.loading("a", request=2, **ASKED)
    assert not pool.launches[2].placement.measured
    assert pool.core._state.models["a"].load_s is None


def test_an_inspection_that_failed_teaches_nothing() -> None:
    """An inspection that failed leaves no model record, whatever the store knows."""
    pool = a_pool_that(knowing("64MiB"))
    pool.declare("a", ModelNotFoundRefusal("/a"))
    pool.feed(acquire("a", request=1, **ASKED))
    assert "a" not in pool.core._state.models


# -- what is persisted ------------------------------------------------------------------------------------------------


def test_nothing_is_told_where_nobody_keeps_it() -> None:
    """Without the setting no measurement is persisted."""
    pool = a_pool().declare("a", MODEL)
    pool.loading("a", request=1)
    pool.feed(Loaded(1, None, ((HOST, 32 * MIB),), 0, ((HOST, MIB),)), filled(1), release(1), expire("a"), exited(1))
    assert not told(pool.commands)


def test_a_load_is_told_with_the_most_that_its_engine_says_will_come() -> None:
    """A load persists what the runner takes plus what its engine says will come, before any context is full."""
    pool = a_pool_that()
    pool.loading("a", request=1, **ASKED)
    pool.now += 3.0
    commands = pool.feed(Loaded(1, None, ((HOST, 32 * MIB),), 0, ((HOST, 8 * MIB),)))
    assert told(commands) == [PersistMeasurement(1, ((HOST, 40 * MIB),), 3.0)]


def test_without_a_word_of_the_engines_only_the_load_is_told() -> None:
    """Without the engine's figure a load persists only its time, and the exit persists the bytes that were reserved."""
    pool = a_pool_that()
    pool.loading("a", request=1, **ASKED)
    predicted = promised(pool)
    assert told(pool.feed(Loaded(1, None, ((HOST, 2 * MIB),)))) == [PersistMeasurement(1, (), 0.0)]
    assert told(pool.feed(release(1), expire("a"), exited(1))) == [PersistMeasurement(1, ((HOST, predicted),))]


def test_a_full_context_is_told_and_no_end_that_shows_no_more() -> None:
    """A full context persists its bytes at once, and an exit that shows no more persists nothing."""
    pool = a_pool_that()
    pool.loading("a", request=1, **ASKED)
    pool.feed(Loaded(1, None, ((HOST, 32 * MIB),), 0, ((HOST, 8 * MIB),)))
    assert told(pool.feed(filled(1, cpu="1MiB"))) == [PersistMeasurement(1, ((HOST, 33 * MIB),))]
    assert not told(pool.feed(release(1), expire("a"), exited(1)))


def test_growth_after_that_is_told_at_the_end() -> None:
    """Growth after a full context is persisted at the exit."""
    pool = a_pool_that()
    pool.loading("a", request=1, **ASKED)
    pool.feed(Loaded(1, None, ((HOST, 32 * MIB),), 0, ((HOST, 8 * MIB),)), filled(1))
    pool.occupied[1] = {HOST: 50 * MIB}
    pool.feed(pool.sample())
    assert told(pool.feed(release(1), expire("a"), exited(1))) == [PersistMeasurement(1, ((HOST, 50 * MIB),))]


def test_what_is_to_come_is_counted_beside_a_prediction_that_was_too_small() -> None:
    """Bytes to come are added to what a runner took beyond its prediction, for the next runner of the model."""
    pool = a_pool_that()
    pool.loading("a", request=1, **ASKED)
    predicted = promised(pool)
    pool.feed(Loaded(1, None, ((HOST, predicted),), 0, ((HOST, 8 * MIB),)))
    assert pool.core._state.ledger.held_bytes(HOST) == predicted
    pool.feed(release(1), expire("a"), exited(1))
    pool.loading("a", request=2, **ASKED)
    assert promised(pool, 2) == predicted + 8 * MIB


def test_a_load_takes_nothing_back_of_what_a_full_context_showed() -> None:
    """A load does not lower what an earlier full context has shown."""
    pool = a_pool_that(knowing("36MiB"))
    pool.loading("a", request=1, **ASKED)
    commands = pool.feed(Loaded(1, None, ((HOST, 32 * MIB),), 0, ((HOST, 8 * MIB),)))
    assert told(commands) == [PersistMeasurement(1, ((HOST, 36 * MIB),), 0.0)]


def test_a_device_that_nobody_measures_leaves_all_bytes_unknown() -> None:
    """Where a device of the placement was not measured, no bytes are persisted."""
    pool = a_pool_that(gpus=("8GiB",))
    pool.loading("a", request=1, **ASKED)
    assert pool.launches[1].placement.gpu_layers
    pool.occupied[1] = {}
    commands = pool.core.step(pool.now, Loaded(1, None, ((HOST, 32 * MIB),), 0, ((HOST, 8 * MIB),)))
    assert [command.took for command in told(commands)] == [()]


def test_a_load_that_failed_is_no_load() -> None:
    """A load that failed persists neither bytes nor a time."""
    pool = a_pool_that()
    pool.loading("a", request=1, **ASKED)
    pool.feed(exited(1))
    assert not told(pool.commands)
    assert pool.core._state.models["a"].load_s is None


def test_a_runner_of_an_older_file_tells_nothing() -> None:
    """A runner of a replaced file persists nothing, even if it ends after the new file was inspected."""
    pool = a_pool_that()
    pool.ready("a", lease=1, **ASKED)
    before = len(told(pool.commands))
    pool.declare("a", a_model(layers_bytes=(3 * MIB,) * 4))
    pool.feed(acquire("a", request=2, num_thread=3), filled(1), release(1), exited(1))
    assert len(told(pool.commands)) == before


# -- seconds ----------------------------------------------------------------------------------------------------------


def test_the_usual_load_is_the_median_of_the_last_few() -> None:
    """The usual load time is the median of the last few loads, so that one slow load does not change it."""
    model = ModelRecord(ModelId("a"))
    assert model.load_s is None
    for load_s in (2.0, 90.0, 3.0):
        model.note_load((), load_s)
    assert model.load_s == 3.0
    for _ in range(LAST_LOADS):
        model.note_load((), 8.0)
    assert model.load_s == 8.0


def test_each_split_has_its_own_usual_load() -> None:
    """Each split has its own usual load time, and a split without loads has the median of the others."""
    model, gpu = ModelRecord(ModelId("a")), (("gpu0", 5),)
    for load_s in (10.0, 12.0):
        model.note_load((), load_s)
    model.note_load(gpu, 2.0)
    assert (model.usual_load_s(()), model.usual_load_s(gpu), model.usual_load_s((("gpu1", 5),))) == (11.0, 2.0, 10.0)


def test_loads_of_earlier_programs_count_until_there_are_newer_ones() -> None:
    """Load times of earlier programs are taken over once, and newer loads replace them."""
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
    """A full queue estimates when to ask again from load times of earlier programs."""
    pool = a_pool_that(knowing(0, 40.0, 40.0), max_queue=1)
    pool.loading("a", request=1, **ASKED)
    (rejected,) = pool.feed(acquire("b", request=2))
    assert rejected == Reject(2, QueueFullRefusal(1, 40.0))


def test_a_policy_is_told_the_usual_load() -> None:
    """A candidate has the usual load time and not the last one."""
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


# -- preview and advice -----------------------------------------------------------------------------------------------


def test_a_preview_knows_what_a_load_would_know() -> None:
    """A preview uses a measurement of the store and leaves the core as it was."""
    pool = a_pool_that()
    want = RequestSpec(ModelId("a"), Options(**ASKED), Purpose.lease, 0)
    before = encode(pool.core.checkpoint())
    profile = profile_of(MODEL, [want.options])
    found = preview(0.0, pool.core, want, profile, knowing("64MiB"))
    assert found.measured and found.shares[0].takes_bytes == 64 * MIB
    assert not preview(0.0, pool.core, want, profile).measured
    assert encode(pool.core.checkpoint()) == before


def test_advice_knows_it_too() -> None:
    """Advice uses measurements: one context may be known not to fit and another to fit."""
    pool = a_pool_that(capacity="60MiB")
    want = RequestSpec(ModelId("a"), Options(), Purpose.lease, 0)
    whole, half = explicit(num_ctx=4096), explicit(num_ctx=2048)
    known = LoadHistory((MeasuredBytes(whole, (), ((HOST, 9 << 30),)), MeasuredBytes(half, (), ((HOST, 7 * MIB),))))
    profile = profile_of(MODEL, [want.options])
    found = preview(0.0, pool.core, want, profile, known)
    assert found.measured and found.outcome is Outcome.never
    advice = advise(0.0, pool.core, want, profile, partial(profile_of, MODEL), found, known)
    advised = {each.options.num_ctx: each.preview for each in advice}
    assert advised[2048].measured and advised[2048].shares[0].takes_bytes == 7 * MIB


# -- recordings -------------------------------------------------------------------------------------------------------


def test_a_recording_with_remembered_figures_replays_without_the_store() -> None:
    """A recording with taken-over measurements replays to the same commands and the same state without the store."""
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
    core.decision_log = []  # as the harness has it: what was noted last is part of the state
    assert len(script) > 8 and any("PersistMeasurement" in line for line in script)
    for line in script:
        now, event, commands = json.loads(line)
        assert core.step(now, decode_event(event)) == [decode_command(command) for command in commands]
    assert encode(core.checkpoint()) == encode(pool.core.checkpoint())


def test_a_copy_learns_by_itself() -> None:
    """A copy of the core adds load times of its own and not to the original."""
    pool = a_pool_that(knowing("64MiB", 3.0))
    pool.loading("a", request=1, **ASKED)
    copy = pool.core.copy()
    before = encode(pool.core.checkpoint())
    copy.step(pool.now + 9.0, Loaded(1, None, ((HOST, 32 * MIB),), 0, ((HOST, 8 * MIB),)))
    assert encode(pool.core.checkpoint()) == before
    assert copy._state.models["a"].loads == {(): (3.0, 9.0)}
