"""Every limit and setting of the core."""

from __future__ import annotations

from dataclasses import dataclass

USE_PER_LOAD = 9.0  # seconds of use for each second of loading: a tenth of the time goes into loads


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """Counts and seconds; infinite where a limit is off."""

    max_queue: int = 512  # requests that may wait
    max_runners: int = 0  # runners whose process may be alive; 0: memory decides
    max_leases: int = 0  # of one runner, where no request names another for its model; 0: none; SLOTS: by its slots
    keep_alive_s: float = 300.0  # how long a runner stays idle, unless a request names a keep-alive
    max_wait_s: float = 120.0  # how long a waiting request leaves busy runners alone
    min_residency_s: float | None = None  # how long a loaded runner is not evicted; None: by its load time
    idle_grace_part: float = 0.05  # of its load time: a runner is kept so long after its last use, for the next request
    idle_grace_limit_s: float = 1.0  # and no longer than this
    load_timeout_s: float = 300.0  # a load that shows no progress for so long is stalled
    stop_timeout_s: float = 15.0  # a runner that was stopped so long ago is stuck: no plan counts on its memory
    recovery_timeout_s: float = 5.0  # how long the wait for memory lasts after a process has gone
    recovery_interval_s: float = 0.25  # between two readings of the devices in that wait
    recovery_fraction: float = 0.75  # of the bytes that the runner occupied, that must be back
    max_loads_per_gpu: int = 1
    max_host_loads: int = 2
    prefetches: int = 2  # models whose files are read ahead while they wait for memory; 0: none
    priority_s: float = 60.0  # one step of priority counts as so many seconds of waiting: every request is served
    cpu_threads: int = 0  # of each runner whose request names none; 0: its part of the host's cores
    spread_over_gpus: bool = False  # a model is split over all GPUs even where one GPU takes it
    require_gpu: bool = False  # a model is refused rather than placed on the host in part or whole
    memory_limited: bool = False  # a limit is set on the host's memory: pages of mapped files count as any other memory
    plans_later: bool = False  # the next Tick plans for all events before it; else the step of each event plans
    claims: bool = False  # whether launches claim their devices among all programs on the machine
    persists_measurements: bool = False  # whether measurements are kept in a store, for later programs
    keeps_prompts: bool = False  # whether prompts of a runner that is given up are kept for the next one like it
    claim_timeout_s: float = 60.0  # how long a launch waits for its claim; then it goes ahead without it
    back_off_s: float = 10.0  # after a failed load; doubles with each failure
    back_off_limit_s: float = 300.0
    good_life_s: float = 60.0  # the failures before a runner that crashes after so long do not count

    def residency_s(self, load_s: float) -> tuple[float, float]:
        """Return the minimum residency after a load of `load_s`, in seconds: while idle, and while in use.

        Where no minimum residency is set, a runner stays idle for as long as its load took, so that two models under
        steady traffic alternate at a useful pace. In use it stays so long that at most a tenth of the time goes into
        loads, even where other requests are always past their bound. Neither is longer than `max_wait_s`.
        """
        if self.min_residency_s is not None:
            return self.min_residency_s, self.min_residency_s
        return min(load_s, self.max_wait_s), min(USE_PER_LOAD * load_s, self.max_wait_s)
