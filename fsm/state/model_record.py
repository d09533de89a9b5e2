"""The record of one model: its metadata, its runner, its failures, and the measurements of its runners."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from fsm.domain.devices import Amounts, DeviceId
from fsm.domain.options import Options
from fsm.domain.record import Record
from fsm.eviction.reuse_prediction import Histogram, count_interval
from fsm.machine.request import ModelId
from fsm.machine.runner import IDLE, LOADING, Runner
from fsm.messages.reasons import FailureReason
from fsm.placement.search import PlacementDemand, shown_parts
from fsm.sizing.footprint import Footprint
from fsm.sizing.load_history import NOTHING, LoadHistory, note_bounded, usual_load_s, with_load
from fsm.sizing.model_profile import ModelProfile, Resolution, ResolvedLoad
from fsm.state.core_config import CoreConfig

MOST_RESOLUTIONS = 2  # that are kept beside those of waiting requests: each load is inspected, and recordings hold them
GROWTHS_THAT_GO_ON = 2  # a context that has grown twice is expected to grow again
MOST_DEMANDS = 2048  # of one model that are kept: mostly more than there are options that its requests name

DemandKey = tuple[Options, bool, bool, tuple[str, ...] | None]


@dataclass(frozen=True, slots=True)
class BackOff:
    """The back-off of options with which loads failed."""

    failures: int  # in a row
    until: float  # requests that come before are refused
    reason: FailureReason  # of the last one


@dataclass(slots=True, eq=False)
class ModelRecord(Record):
    """What the core knows of one model, whether or not a runner of it is loaded."""

    id: ModelId
    profile: ModelProfile | Footprint | None = None  # as of the last Inspected; a Footprint is the same for all options
    resolutions: dict[Options, Resolution] = field(default_factory=dict)  # of this profile, by options as requested
    inspected_since_launch: bool = False  # each launch needs an inspection, since the file may have changed
    inspecting: bool = False  # an Inspect is under way
    current: Runner | None = None  # its one runner that is loading, ready or idle
    pinned: bool = False
    max_leases: int | None = None  # as requests named it last; 0: none; SLOTS: by its slots; None: that of all models
    failures: int = 0  # failed loads and crashes in a row
    blocked_until: float = -math.inf  # end of the back-off: requests that come before are refused
    failure: FailureReason | None = None  # the last failure
    # options of a load -> their own back-off: loads failed with them, and the file has loaded with others
    back_offs: dict[Options, BackOff] = field(default_factory=dict)
    without_defaults: bool = False  # a load failed with defaults of settings; since then the model is loaded without
    load_exclusively: bool = False  # a load ran out of memory: all other runners leave before the next load
    loads: dict[Amounts, tuple[float, ...]] = field(default_factory=dict)  # split -> seconds of the last few loads
    # memory of a GPU -> bytes that it may take there, since when: a load with more ran out of memory
    ran_out: dict[DeviceId, tuple[int, float]] = field(default_factory=dict)
    projector_on_host: bool = False  # since a load of this file with it on a GPU ran out of memory
    last_context: int = 0  # that the request of the last launch named, if it named one
    context_growths: int = 0  # launches in a row, each for a request that named more context than the one before
    context_limit: int | None = None  # of automatic contexts, since one ran out of memory; until a loaded runner ends
    first_runner_of_file: int = 1  # runners with lower ids were of another file
    # (options, split) -> bytes to reserve for the next runner: measured, with the expected growth
    measured: dict[tuple[Options, Amounts], Amounts] = field(default_factory=dict)
    # options -> seconds of the shortest load, the time of the last one, and the number of loads
    shortest_load: dict[Options, tuple[float, float, int]] = field(default_factory=dict)
    # (explicit options, whether a GPU is required, whether the host's memory is limited, GPUs) -> demand; derived
    demands: dict[DemandKey, PlacementDemand] = field(default_factory=dict, metadata={"derived": True})
    rested_at: float = -math.inf  # the last use of its last runner, or the last request for a lease since
    idle_intervals: Histogram = field(default_factory=dict)  # how long it was unused before a request for a lease

    @property
    def declared(self) -> bool:
        """Whether it takes declared bytes, and has no layers."""
        return isinstance(self.profile, Footprint) and bool(self.profile.fixed)

    def resolution(self, asked: Options) -> Resolution | None:
        """Return how requests for the options `asked` are loaded; None where the engine was not asked for them."""
        if isinstance(self.profile, Footprint):
            return Resolution(asked, (ResolvedLoad(asked, self.profile),))
        return self.resolutions.get(asked)

    def is_read_for(self, asked: Options) -> bool:
        """Tell whether the files were read since the last launch, and the engine was asked for the options `asked`."""
        return self.inspected_since_launch and self.resolution(asked) is not None

    @property
    def last_resolution(self) -> Resolution | None:
        """The resolution that was made last, of any options; None where none is known."""
        return next(reversed(self.resolutions.values()), None)

    def growths(self, asked: Options) -> int:
        """Return how many launches in a row were for a larger context than the one before, if the next is for this."""
        grows = asked.num_ctx is not None and 0 < self.last_context < asked.num_ctx
        same = asked.num_ctx == self.last_context
        return self.context_growths + 1 if grows else self.context_growths if same else 0

    def with_room(self, asked: Options) -> Options | None:
        """Return options with room for a context that keeps growing: the next power of two; None where none does."""
        if asked.num_ctx is None or self.growths(asked) < GROWTHS_THAT_GO_ON:
            return None
        return replace(asked, num_ctx=1 << asked.num_ctx.bit_length())

    def loads_for(self, resolution: Resolution) -> tuple[ResolvedLoad, ...]:
        """Return the loads of a resolution, without the contexts that are too large since one ran out of memory."""
        loads = resolution.plain_loads if self.without_defaults and resolution.plain_loads else resolution.loads
        limit = self.context_limit
        if limit is None or resolution.asked.num_ctx is not None:
            return loads
        return tuple(load for load in loads if (load.options.num_ctx or 0) <= limit) or loads[-1:]

    def load_of(self, runner: Runner) -> tuple[Options, bool]:
        """Return the options of the load that a runner was launched for, and whether it had doubtful defaults.

        Its own batch may be a larger one.
        """
        launched = runner.launch_options
        if (resolution := self.resolution(runner.asked)) is None:
            return launched, False
        plain = resolution.plain_loads
        for load in (*plain, *resolution.loads):
            if launched == load.options or launched in [batch.load.options for batch in load.batches]:
                return load.options, bool(plain) and load not in plain
        return launched, False

    def blocked(self, load: ResolvedLoad, now: float) -> BackOff | None:
        """Return the back-off that a load is in by its options; None where it is in none."""
        back_off = self.back_offs.get(load.options)
        return back_off if back_off is not None and now < back_off.until else None

    def fallback_load(self, resolution: Resolution) -> ResolvedLoad:
        """Return the load of a resolution that needs no GPUs of a certain size."""
        return next(load for load in self.loads_for(resolution) if not load.least_gpu_bytes)

    def demand(self, load: ResolvedLoad, asked: Options, limits: CoreConfig) -> PlacementDemand:
        """Return the demand of a load for a request that names the options `asked`."""
        key = load.options, limits.require_gpu or bool(asked.require_gpu), limits.memory_limited, asked.devices
        if (known := self.demands.get(key)) is None:
            known = self.demand_of(load, asked, limits)
            if len(self.demands) == MOST_DEMANDS:
                self.demands.clear()
            self.demands[key] = known
        return known

    def demand_of(self, load: ResolvedLoad, asked: Options, limits: CoreConfig) -> PlacementDemand:
        """Return the same, not kept: for options that no request has named."""
        options, footprint, require_gpu = load.options, load.footprint, limits.require_gpu or bool(asked.require_gpu)
        if self.projector_on_host:
            on_host_bytes = footprint.input_bytes + footprint.projectors_bytes
            footprint = replace(footprint, projectors_bytes=0, input_bytes=on_host_bytes)
        if limits.memory_limited:
            footprint = replace(footprint, mapped=False, mapped_on_host=False)
        devices = None if asked.devices is None else frozenset(map(DeviceId, asked.devices))
        if isinstance(self.profile, Footprint):
            return PlacementDemand(footprint, require_gpu=limits.require_gpu, devices=devices)
        seen = {split: amounts for (measured, split), amounts in self.measured.items() if measured == options}
        alike = {
            split: amounts
            for (measured, split), amounts in self.measured.items()
            if anywhere(measured) == anywhere(options)
        }
        shown = shown_parts(footprint, alike)
        spread = limits.spread_over_gpus
        libraries = self.profile.gpu_libraries if self.profile is not None else None
        return PlacementDemand(
            footprint, options.num_gpu, options.main_gpu, seen, spread, require_gpu, shown,
            devices=devices, libraries=libraries,
        )  # fmt: skip

    def step_down(self, failed: Runner) -> bool:
        """Limit automatic contexts after a load with one ran out of memory; return False if none is smaller."""
        if all(asked.num_ctx is not None for asked in failed.equivalent_requests):
            return False
        # the contexts of a request that names none follow from the file, and not from its other options
        automatic = [one for one in self.resolutions.values() if one.asked.num_ctx is None]
        contexts = [load.options.num_ctx or 0 for one in automatic for load in one.loads]
        smaller = [context for context in contexts if context < (failed.launch_options.num_ctx or 0)]
        self.context_limit = max(smaller, default=self.context_limit)
        return bool(smaller)

    def apply_inspection(
        self,
        profile: ModelProfile | Footprint,
        next_runner: int,
        known: LoadHistory = NOTHING,
        kept: Collection[Options] = (),
    ) -> None:
        """Take over the profile that an inspection found; resolutions and measurements of another file no longer hold.

        Measurements in a store's history (`known`) of this file are taken over where the record has none. Resolutions
        of the options in `kept` are kept, however many they are.
        """
        resolutions: tuple[Resolution, ...] = ()
        if isinstance(profile, ModelProfile):
            profile, resolutions = replace(profile, resolutions=()), profile.resolutions
        if profile != self.profile:
            self.profile, self.first_runner_of_file = profile, next_runner
            self.resolutions.clear()
            self.measured.clear()
            self.ran_out.clear()
            self.projector_on_host = False
            self.back_offs.clear()
            self.last_context = self.context_growths = 0
            self.without_defaults = False
            self.loads.clear()
            self.shortest_load.clear()
            self.demands.clear()
        self.resolutions |= {resolution.asked: resolution for resolution in resolutions}
        for asked in [asked for asked in self.resolutions if asked not in kept][:-MOST_RESOLUTIONS]:
            del self.resolutions[asked]
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


def anywhere(options: Options) -> Options:
    """Return options without those that say where a runner goes: with the others the same, it takes the same."""
    return replace(options, num_gpu=None, main_gpu=None)
