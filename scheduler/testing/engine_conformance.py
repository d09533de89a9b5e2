"""What every engine must do, as tests: another package runs them on its own engine.

    class TestMyEngine(EngineConformance):
        def make_engine(self) -> Engine:
            return MyEngine()

        def make_model(self) -> object:
            return MyModel("small")

They are methods that pytest collects, and need nothing of pytest: `check_engine` runs all of them without it. The model
should be a small one, since it is loaded some ten times.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fsm.domain.devices import HOST, DeviceId, Placement
from fsm.domain.options import Options
from fsm.sizing.footprint import Footprint, bytes_by_device
from fsm.sizing.model_profile import ModelProfile, ResolvedLoad
from scheduler.engines.interface import Endpoint, Engine, Memory, Process, inspect

_PAUSE_S = 0.02


class Reports:
    """A listener that keeps what it is told, and by which thread."""

    def __init__(self) -> None:
        self.loads: list[tuple[object, int | None, Memory]] = []
        self.exits: list[tuple[int | None, str, bool]] = []
        self.late: list[str] = []  # reports after the exit
        self.inside: list[str] = []  # reports from inside a call of the engine
        self.calling: int | None = None  # the thread that calls the engine at this moment

    def progressed(self) -> None:
        """Note it."""
        self._note("progressed")

    def loaded(
        self, endpoint: Endpoint | object, num_ctx: int | None, memory: Memory, flash_attention: bool | None = None
    ) -> None:
        """Keep it."""
        self._note("loaded")
        self.loads.append((endpoint, num_ctx, memory))

    def failed(self, error: BaseException) -> None:
        """Note it."""
        self._note("failed")

    def exited(self, code: int | None, detail: str, out_of_memory: bool) -> None:
        """Keep it."""
        self._note("exited")
        self.exits.append((code, detail, out_of_memory))

    def _note(self, what: str) -> None:
        if self.exits:
            self.late.append(what)
        if self.calling == threading.get_ident():
            self.inside.append(what)


class EngineConformance(ABC):
    """The tests, for a class that makes an engine and a model of it."""

    limit_s = 60.0  # for a load, and for the end of a runner
    options = Options()  # of the requests

    @abstractmethod
    def make_engine(self) -> Engine:
        """Return a new engine, which each test closes."""

    @abstractmethod
    def make_model(self) -> Any:
        """Return a small model of it."""

    def placement(self, footprint: Footprint) -> Placement:
        """Return where the model goes: on the host, unless this is overridden."""
        return Placement(tuple((id, part.total_bytes) for id, part in bytes_by_device(footprint, ()).items()))

    # -- what it tells ------------------------------------------------------------------------------------------------

    def test_what_it_tells_of_a_model_is_complete_and_stays(self) -> None:
        """A profile has a resolution for each of the options, explicit, and is told the same way again."""
        with self._engine() as engine:
            engine.require()
            model, asked = self.make_model(), [self.options, Options(num_thread=1)]
            told = inspect(engine, model, asked)
            assert told == inspect(engine, model, asked), "it tells another profile the second time"
            assert isinstance(engine.version(model), str) and engine.version(model) == engine.version(model)
            assert all(isinstance(problem, str) for problem in engine.problems)
            if isinstance(told, ModelProfile):
                again = [load.options for one in told.resolutions for load in one.loads]
                resolved = inspect(engine, model, again)
                assert isinstance(resolved, ModelProfile)
                for before, after in zip(again, resolved.resolutions, strict=True):
                    assert after.loads[0].options == before, "resolving explicit options changes them"

    def test_a_runner_loads_serves_and_is_gone(self) -> None:
        """It reports one load and then one exit, takes memory in between only, and answers while it serves."""
        with self._engine() as engine:
            process, reports = self._launch(engine)
            self._await(lambda: reports.loads or reports.exits, "neither a load nor an exit was reported")
            assert not reports.exits, reports.exits
            endpoint, num_ctx, memory = reports.loads[0]
            self._check_load(endpoint, num_ctx, memory)
            assert process.healthy(self.limit_s)
            filled = process.context_filled(1.0)
            assert filled is None or _are_amounts(filled)
            self._stop(process, reports)
            process.stop(0.0)  # harmless
            self._await(lambda: reports.exits, "no exit was reported")
            code, detail, out_of_memory = reports.exits[0]
            assert (code is None or isinstance(code, int)) and isinstance(detail, str) and out_of_memory is False
            self._await(lambda: not any(process.memory().resident.values()), "it has memory after its exit")
            self._at_rest(reports, loads=1)

    def test_a_stop_before_the_load_is_over_ends_it(self) -> None:
        """A runner that is stopped right after its launch exits, and reports nothing after that."""
        with self._engine() as engine:
            process, reports = self._launch(engine)
            self._stop(process, reports)
            self._await(lambda: reports.exits, "no exit was reported")
            self._at_rest(reports)

    def test_runners_of_one_model_know_nothing_of_each_other(self) -> None:
        """Two runners of a model serve at once, and the end of one leaves the other alone."""
        with self._engine() as engine:
            (first, told), (second, told_second) = self._launch(engine), self._launch(engine)
            self._await(lambda: (told.loads or told.exits) and (told_second.loads or told_second.exits), "no load")
            assert not told.exits and not told_second.exits, (told.exits, told_second.exits)
            self._stop(first, told)
            self._await(lambda: told.exits, "no exit was reported")
            assert second.healthy(self.limit_s) and not told_second.exits
            self._stop(second, told_second)
            self._await(lambda: told_second.exits, "no exit was reported")

    def test_a_close_ends_every_runner(self) -> None:
        """After a close each runner has exited, a second close is harmless, and a launch raises or exits at once."""
        with self._engine() as engine:
            _, reports = self._launch(engine)
            self._await(lambda: reports.loads or reports.exits, "no load was reported")
            engine.look_round(lambda: 1 << 30)
            engine.close(self.limit_s)
            self._await(lambda: reports.exits, "no exit was reported")
            self._at_rest(reports)
            try:
                _, late = self._launch(engine)
            except Exception:
                return
            self._await(lambda: late.exits, "a launch after the close did not end")

    # -- helpers ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        engine = self.make_engine()
        try:
            yield engine
        finally:
            engine.close(self.limit_s)

    def _launch(self, engine: Engine) -> tuple[Process, Reports]:
        model, reports = self.make_model(), Reports()
        told = inspect(engine, model, [self.options])
        load = ResolvedLoad(Options(), told) if isinstance(told, Footprint) else told.resolutions[0].loads[0]
        reports.calling = threading.get_ident()
        try:
            process = engine.launch(model, load.options, load.settings, self.placement(load.footprint), reports)
        finally:
            reports.calling = None
        return process, reports

    def _stop(self, process: Process, reports: Reports) -> None:
        reports.calling = threading.get_ident()
        try:
            process.stop(self.limit_s)
        finally:
            reports.calling = None

    def _check_load(self, endpoint: object, num_ctx: int | None, memory: Memory) -> None:
        if isinstance(endpoint, Endpoint):
            assert endpoint.url.startswith(("http://", "https://")), endpoint.url
            assert not endpoint.key or endpoint.key not in repr(endpoint)
        assert num_ctx is None or num_ctx > 0
        assert _are_amounts(memory.resident) and _are_amounts(memory.to_come)
        assert 0 <= memory.mapped_bytes <= max(memory.mapped_bytes, memory.resident.get(HOST, 0))

    def _at_rest(self, reports: Reports, *, loads: int | None = None) -> None:
        """Check that what was reported is in order, and that nothing follows."""
        time.sleep(_PAUSE_S)
        assert len(reports.exits) == 1, reports.exits
        assert len(reports.loads) <= 1 and loads in (None, len(reports.loads)), reports.loads
        assert not reports.late, f"reported after the exit: {reports.late}"
        assert not reports.inside, f"reported from inside launch or stop: {reports.inside}"

    def _await(self, condition: Callable[[], object], otherwise: str) -> None:
        end = time.monotonic() + self.limit_s
        while not condition():
            assert time.monotonic() < end, f"{otherwise} within {self.limit_s:g} s"
            time.sleep(_PAUSE_S)


def check_engine(make_engine: Callable[[], Engine], make_model: Callable[[], Any], *, limit_s: float = 60.0) -> None:
    """Run all tests of `EngineConformance` without pytest; raises AssertionError for the first that fails."""

    class Checked(EngineConformance):
        def make_engine(self) -> Engine:
            return make_engine()

        def make_model(self) -> Any:
            return make_model()

    tests = Checked()
    tests.limit_s = limit_s
    for name in sorted(dir(tests)):
        if name.startswith("test_"):
            getattr(tests, name)()


def _are_amounts(amounts: Mapping[DeviceId, int]) -> bool:
    return all(
        isinstance(device, str) and isinstance(amount, int) and amount >= 0 for device, amount in amounts.items()
    )
