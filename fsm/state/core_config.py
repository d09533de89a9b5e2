"""Every limit the core works by."""

from __future__ import annotations

from dataclasses import dataclass, field

from fsm.domain.model_info import Options

USE_PER_LOAD = 9.0  # seconds of use that make a second of loading worth while


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """Counts and seconds; infinite where a limit is off."""

    max_queue: int = 512  # requests that may wait
    max_runners: int = 0  # runners whose process may be alive; 0: three a GPU, at least three
    keep_alive_s: float = 300.0  # how long an unused runner rests, unless a request says otherwise
    max_wait_s: float = 120.0  # how long a waiting request leaves busy runners alone
    min_residency_s: float | None = None  # a loaded runner keeps its place so long; None: by what its load took
    idle_grace_part: float = (
        0.05  # of its load: so long a runner is kept after its last use, since users ask again at once
    )
    idle_grace_limit_s: float = 1.0  # and no longer than this
    load_timeout_s: float = 300.0  # a load that shows no progress for so long is stalled
    stop_timeout_s: float = 15.0  # a runner that was stopped so long ago is stuck: nobody counts on its memory
    recovery_timeout_s: float = 5.0  # how long memory is waited for after a process has gone
    recovery_interval_s: float = 0.25  # between two looks at it
    recovery_fraction: float = 0.75  # of the bytes it held, that must be back
    max_loads_per_gpu: int = 1
    max_host_loads: int = 2
    prefetches: int = 2  # models whose files are read ahead while they wait for memory; 0: none
    priority_s: float = 60.0  # one step of priority is worth so many seconds of waiting: everyone's turn comes
    defaults: Options = field(default_factory=Options)  # of what requests leave open; automatic: never a reload
    cpu_threads: int = 0  # of each runner that is asked for without; 0: its part of the host's cores
    spread_over_gpus: bool = False  # a model is dealt over all GPUs even where one takes it
    auto_context_from_vram: bool = False  # where no context is named, it follows from the GPUs' memory
    require_gpu: bool = False  # a model is refused rather than placed on the host in part or whole
    claims: bool = False  # whether launches claim their devices among all programs on the machine
    persists_measurements: bool = False  # whether what lives show is told to a store, for programs to come
    claim_timeout_s: float = 60.0  # how long a claim is waited for; then the launch goes ahead without it
    back_off_s: float = 10.0  # after a failed load; doubles with each
    back_off_limit_s: float = 300.0
    good_life_s: float = 60.0  # a runner that served so long before it crashed starts its model's count anew

    def residency_s(self, load_s: float) -> tuple[float, float]:
        """Return how long a runner keeps its place at least after a load: while nobody uses it, and while it is in use.

        Where that is not set: as long as the load took, so that two models under steady traffic take turns of some use;
        and in use so long that at most a tenth of the time goes into loads, even where others have always waited for
        too long. Neither is more than others may be let wait.
        """
        if self.min_residency_s is not None:
            return self.min_residency_s, self.min_residency_s
        return min(load_s, self.max_wait_s), min(USE_PER_LOAD * load_s, self.max_wait_s)
