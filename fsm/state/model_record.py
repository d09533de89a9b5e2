"""The record of one model: its metadata, its runner, its failures, and the measurements of its runners."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from fsm.domain.devices import Amounts
from fsm.domain.model_info import ModelInfo, Options
from fsm.domain.record import Record
from fsm.eviction.reuse_prediction import Histogram, count_interval
from fsm.machine.request import ModelId
from fsm.machine.runner import IDLE, LOADING, Runner
from fsm.messages.reasons import FailureReason
from fsm.placement.search import PlacementDemand
from fsm.sizing.footprint import Footprint
from fsm.sizing.load_history import NOTHING, LoadHistory, note_bounded, usual_load_s, with_load
from fsm.sizing.load_options import UnsupportedReason, impossible, resolve
from fsm.sizing.memory_estimate import estimate
from fsm.state.core_config import CoreConfig

MOST_DEMANDS = 2048  # of one model that are kept: mostly more than there are options that its requests name
CONTEXT_STEPS = (32768, 4096)  # tokens to which an automatic context is stepped down: the reference's


@dataclass(slots=True, eq=False)
class ModelRecord(Record):
    """What the core knows of one model, whether or not a runner of it is loaded."""

    id: ModelId
    info: ModelInfo | Footprint | None = None  # as of the last Inspected
    inspected_since_launch: bool = False  # each launch needs an inspection, since the file may have changed
    inspecting: bool = False  # an Inspect is under way
    current: Runner | None = None  # its one runner that is loading, ready or idle
    pinned: bool = False
    failures: int = 0  # failed loads and crashes in a row
    blocked_until: float = -math.inf  # end of the back-off: requests that come before are refused
    failure: FailureReason | None = None  # the last failure
    load_exclusively: bool = False  # a load ran out of memory: all other runners leave before the next load
    loads: dict[Amounts, tuple[float, ...]] = field(default_factory=dict)  # split -> seconds of the last few loads
    context_limit: int | None = None  # of automatic contexts, since one ran out of memory; until a loaded runner ends
    first_runner_of_file: int = 1  # runners with lower ids were of another file
    # (options, split) -> bytes to reserve for the next runner: measured, with the expected growth
    measured: dict[tuple[Options, Amounts], Amounts] = field(default_factory=dict)
    # options -> seconds of the shortest load, the time of the last one, and the number of loads
    shortest_load: dict[Options, tuple[float, float, int]] = field(default_factory=dict)
    # options as requested -> explicit options and demand by `info`; derived: computed again where missing
    demands: dict[Options, tuple[Options, PlacementDemand]] = field(default_factory=dict, metadata={"derived": True})
    rested_at: float = -math.inf  # the last use of its last runner, or the last request for a lease since
    idle_intervals: Histogram = field(default_factory=dict)  # how long it was unused before a request for a lease

    def demand(self, asked: Options, limits: CoreConfig) -> tuple[Options, PlacementDemand]:
        """Return the explicit options and the demand of a runner for the options `asked`; the model was inspected."""
        if (known := self.demands.get(asked)) is None:
            assert self.info is not None, f"{self.id} is planned before it was inspected"
            if isinstance(self.info, Footprint):
                known = asked, PlacementDemand(self.info, require_gpu=limits.require_gpu)
            else:
                options = replace(resolve(self.info, asked, self._defaults(limits)), require_gpu=None)
                seen = {split: amounts for (measured, split), amounts in self.measured.items() if measured == options}
                demand = PlacementDemand(
                    estimate(self.info, options),
                    options.num_gpu,
                    options.main_gpu,
                    seen,
                    spread=limits.spread_over_gpus,
                    require_gpu=limits.require_gpu or bool(asked.require_gpu),
                )
                known = options, demand
            if len(self.demands) == MOST_DEMANDS:
                self.demands.clear()
            self.demands[asked] = known
        return known

    def _defaults(self, limits: CoreConfig) -> Options:
        """Return the default options, with the context stepped down after a load that ran out of memory."""
        if self.context_limit is None or limits.defaults.num_ctx is None:
            return limits.defaults
        return replace(limits.defaults, num_ctx=min(self.context_limit, limits.defaults.num_ctx))

    def step_down(self, failed: Runner) -> bool:
        """Limit automatic contexts after a load with one ran out of memory; return False if none is smaller."""
        automatic = any(asked.num_ctx is None for asked in failed.equivalent_requests)
        smaller = [step for step in CONTEXT_STEPS if step < (failed.launch_options.num_ctx or 0)]
        if not automatic or not smaller:
            return False
        self.context_limit = smaller[0]
        self.demands.clear()
        return True

    def impossible(self, options: Options) -> tuple[str, int | bool | str, UnsupportedReason] | None:
        """Return the name of an explicit option that the engine would refuse for this model, its value, and why."""
        return impossible(self.info, options) if isinstance(self.info, ModelInfo) else None

    def apply_inspection(self, info: ModelInfo | Footprint, next_runner: int, known: LoadHistory = NOTHING) -> None:
        """Take over the metadata that an inspection found; measurements of another file no longer hold.

        Measurements in a store's history (`known`) of this file are taken over where the record has none.
        """
        if info != self.info:
            self.info, self.first_runner_of_file = info, next_runner
            self.measured.clear()
            self.loads.clear()
            self.shortest_load.clear()
            self.demands.clear()
        for took in known.sizes:
            if (took.options, took.split) not in self.measured:
                note_bounded(self.measured, (took.options, took.split), took.bytes)
                self.demands.clear()
        for loads in known.loads:
            self.loads.setdefault(loads.split, loads.seconds)
        self.inspected_since_launch = True

    @property
    def load_s(self) -> float | None:
        """Seconds that a load of the model usually takes, with any split; None where no load is known."""
        return usual_load_s(self.loads.values())

    def usual_load_s(self, split: Amounts) -> float | None:
        """Return the seconds that a load usually takes with this split, or else with any; None where none is known."""
        return usual_load_s([self.loads[split]] if split in self.loads else self.loads.values())

    def note_load(self, split: Amounts, load_s: float) -> None:
        """Keep the seconds that a load took."""
        self.loads[split] = with_load(self.loads.get(split, ()), load_s)

    def record_arrival(self, now: float, common: Histogram) -> None:
        """Count a request for a lease, and how long the model was unused before it."""
        runner = self.current
        if runner is None or runner.state is LOADING:
            if self.rested_at > -math.inf:
                count_interval(now - self.rested_at, self.idle_intervals, common)
            self.rested_at = now
        elif runner.state is IDLE:
            count_interval(now - runner.used_at, self.idle_intervals, common)
