"""What is known of one model: its metadata, its runner, its failures, what its runners took."""

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

MOST_DEMANDS = 2048  # of one model that are remembered: more than its options that are waited for, mostly
CONTEXT_STEPS = (32768, 4096)  # to which an automatic context goes down, tokens: the reference's


@dataclass(slots=True, eq=False)
class ModelRecord(Record):
    """What is known of one model, whether or not a runner of it lives."""

    id: ModelId
    info: ModelInfo | Footprint | None = None  # as of the last Inspected
    inspected_since_launch: bool = (
        False  # inspected since the last launch; before each, since the file may have changed
    )
    inspecting: bool = False  # an Inspect is under way
    current: Runner | None = None  # its one runner that is loading, ready or idle
    pinned: bool = False
    failures: int = 0  # loads failed and crashes in a row
    blocked_until: float = -math.inf  # backed off: nobody is let wait for it before
    failure: FailureReason | None = None  # the last one
    load_exclusively: bool = False  # a load ran out of memory: everything else goes before the next one
    loads: dict[Amounts, tuple[float, ...]] = field(default_factory=dict)  # split -> seconds of the last few
    context_limit: int | None = None  # of automatic contexts, after one ran out of memory; until a runner has lived
    first_runner_of_file: int = 1  # runners with lower ids were of another file
    # (options, split) -> bytes that the next runner is promised: measured, and what was known to be still to come
    measured: dict[tuple[Options, Amounts], Amounts] = field(default_factory=dict)
    shortest_load: dict[Options, tuple[float, float, int]] = field(
        default_factory=dict
    )  # load, when last, and of how many
    # of this info, as asked; derived: found again where it is not there
    demands: dict[Options, tuple[Options, PlacementDemand]] = field(default_factory=dict, metadata={"derived": True})
    rested_at: float = -math.inf  # the last use of its last runner, or when a lease was asked for since
    idle_intervals: Histogram = field(default_factory=dict)  # how long it rested before a lease was asked for

    def demand(self, asked: Options, limits: CoreConfig) -> tuple[Options, PlacementDemand]:
        """Return the explicit options and the demand of a runner for `asked`; the model has been inspected."""
        if (known := self.demands.get(asked)) is None:
            assert self.info is not None, f"{self.id} is planned before it was inspected"
            if isinstance(self.info, Footprint):
                known = asked, PlacementDemand(self.info, require_gpu=limits.require_gpu)
            else:
                options = replace(resolve(self.info, asked, self._defaults(limits)), require_gpu=None)
                seen = {split: amounts for (measured, split), amounts in self.measured.items() if measured == options}
                known = (
                    options,
                    PlacementDemand(
                        estimate(self.info, options),
                        options.num_gpu,
                        options.main_gpu,
                        seen,
                        spread=limits.spread_over_gpus,
                        require_gpu=limits.require_gpu or bool(asked.require_gpu),
                    ),
                )
            if len(self.demands) == MOST_DEMANDS:
                self.demands.clear()
            self.demands[asked] = known
        return known

    def _defaults(self, limits: CoreConfig) -> Options:
        """Return what is automatic: the limits' defaults, the context stepped down where it had to be."""
        if self.context_limit is None or limits.defaults.num_ctx is None:
            return limits.defaults
        return replace(limits.defaults, num_ctx=min(self.context_limit, limits.defaults.num_ctx))

    def step_down(self, failed: Runner) -> bool:
        """Make automatic contexts smaller after a load ran out of memory with one; return whether that is possible."""
        automatic = any(asked.num_ctx is None for asked in failed.equivalent_requests)
        smaller = [step for step in CONTEXT_STEPS if step < (failed.launch_options.num_ctx or 0)]
        if not automatic or not smaller:
            return False
        self.context_limit = smaller[0]
        self.demands.clear()
        return True

    def impossible(self, options: Options) -> tuple[str, int | bool | str, UnsupportedReason] | None:
        """Return which of these explicit options the engine would refuse for this model, its value, and why."""
        return impossible(self.info, options) if isinstance(self.info, ModelInfo) else None

    def apply_inspection(self, info: ModelInfo | Footprint, next_runner: int, known: LoadHistory = NOTHING) -> None:
        """Take over what an inspection found; what was measured of another file no longer holds.

        Of what a store has `known` of this file only that is taken over of which nothing is known here.
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
        """How long it usually takes to load, wherever that is; None where that is not known."""
        return usual_load_s(self.loads.values())

    def usual_load_s(self, split: Amounts) -> float | None:
        """Return how long it usually takes to load with this split, or else with any."""
        return usual_load_s([self.loads[split]] if split in self.loads else self.loads.values())

    def note_load(self, split: Amounts, load_s: float) -> None:
        """Remember how long a load took."""
        self.loads[split] = with_load(self.loads.get(split, ()), load_s)

    def record_arrival(self, now: float, common: Histogram) -> None:
        """Note that a lease is asked for, and how long the model had rested."""
        runner = self.current
        if runner is None or runner.state is LOADING:
            if self.rested_at > -math.inf:
                count_interval(now - self.rested_at, self.idle_intervals, common)
            self.rested_at = now
        elif runner.state is IDLE:
            count_interval(now - runner.used_at, self.idle_intervals, common)
