"""The interface of engines, which load placed models and run them. `scheduler.engines` has it for other packages.

An engine derives from `Engine` and tells three things: what a model is and takes, as a `ModelProfile` or a `Footprint`;
that a runner goes on loading, serves, or is gone, by the `RunnerListener` of its launch; and what the runner takes
now, by the `Process` that a launch returns. It is told where the runner goes and with which options. It decides
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fsm.domain.devices import HOST
from fsm.sizing.footprint import Footprint
from fsm.sizing.model_profile import ModelProfile
from scheduler.errors.exceptions import InvalidModel, SchedulerError

if TYPE_CHECKING:
    from fsm.domain.devices import DeviceId, Placement
    from fsm.domain.options import Options
    from fsm.machine.request import ModelId
    from fsm.sizing.model_profile import EngineSettings
    from scheduler.engines.runner_client import RunnerClient


BufferKind = Literal["weights", "cache", "compute", "output", "projector"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory of one kind on one device that an engine reports as allocated or mapped."""

    device: DeviceId
    kind: BufferKind
    bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory that one runner occupies at a moment, in bytes, as far as its engine can tell."""

    resident: Mapping[DeviceId, int] = field(default_factory=dict)  # by device; on a GPU, the engine's buffers
    mapped_bytes: int = 0  # pages of files on the host, above all weights, that the host counts as free
    # the most by which it will grow, by device; reported when the model has loaded
    to_come: Mapping[DeviceId, int] = field(default_factory=dict)

    @property
    def private_bytes(self) -> int:
        """The bytes of the host that the runner does not share with the page cache."""
        return max(0, self.resident.get(HOST, 0) - self.mapped_bytes)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of a runner's server and its key; the key is made for one runner and shown nowhere."""

    url: str  # scheme, host and port
    key: str = field(repr=False)
    ranks: bool = False  # whether it scores documents for a query, and has no vectors of texts
    client: RunnerClient | None = field(default=None, repr=False, compare=False)  # None: made when it is first needed


def with_scales(key: str, scales: Sequence[float]) -> str:
    """Return a runner's key as a request has it that says by how much each adapter is applied."""
    return f"{key}.{','.join(map(repr, scales))}" if scales else key


class RunnerListener(Protocol):
    """Receives an engine's reports about one runner; any thread may call it, and no call blocks.

    An engine never calls it from inside `Engine.launch` or `Process.stop`.
    """

    def progressed(self) -> None:
        """Report that the load is alive; an engine may call this as often as it likes."""

    def loaded(
        self, endpoint: Endpoint | object, num_ctx: int | None, memory: Memory, flash_attention: bool | None = None
    ) -> None:
        """Report, at most once, that the runner serves, at an endpoint or as the object itself.

        `num_ctx` is the context that each slot really got, in tokens, or None. `memory` is what the runner occupies.
        `flash_attention` tells whether the engine uses it, where it could choose; None: not reported.
        """

    def failed(self, error: BaseException) -> None:
        """Report, before the exit, the exception that ended the load: the user's error has it as its cause."""

    def exited(self, code: int | None, detail: str, out_of_memory: bool) -> None:
        """Report, exactly once and last, that the runner is gone, whether it was stopped or not, started or not.

        `code` is the exit status, the negative signal, or None where the runner never started. `detail` describes the
        exit in words.
        """


class Process(Protocol):
    """The engine's handle of one runner, from its launch on; any thread may use it.

    A process whose prompts can be kept for the next runner like it has a property `prompts` beside these: `Prompts`
    while it serves, and None before and after. A runner that is several processes has a property `pids`: all of them,
    as far as they are known, so that what they hold on GPUs is counted.
    """

    @property
    def pid(self) -> int | None:
        """The id of the process that runs it; None before its start, and for an object in this process."""

    def stop(self, grace_s: float) -> None:
        """End the runner, by force after `grace_s` seconds; returns at once.

        The end is reported by `RunnerListener.exited`. A second call is harmless.
        """

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """The memory that the engine reports as allocated; empty where the engine does not report it, or not yet."""

    def memory(self) -> Memory:
        """Return the memory that the runner occupies now; all zero when it is gone."""

    def context_filled(self, timeout_s: float) -> Mapping[DeviceId, int] | None:
        """Return the bytes by device that the runner may still grow by, once a context was filled; None before that.

        None also where the engine cannot tell. Blocks for at most `timeout_s` seconds.
        """

    def healthy(self, timeout_s: float) -> bool:
        """Return whether the runner answers; blocks for at most `timeout_s` seconds."""


class Prompts(Protocol):
    """What a runner has computed of prompts, where it can be kept for the next runner like it."""

    @property
    def again_s(self) -> float:
        """How long it takes to have the prompts again once the runner is given up, in seconds, as of the last look."""

    @property
    def restored_tokens(self) -> int:
        """The tokens that the runner got back of an earlier one, by its engine's own count."""

    def look(self, timeout_s: float) -> None:
        """Find `again_s` out; blocks for little longer than `timeout_s` seconds."""

    def save(self) -> None:
        """Save the prompts before the runner is stopped; blocks for some seconds at most."""

    def forget(self) -> None:
        """Keep nothing of this runner, nor of an earlier one of its model."""


class Engine(Protocol):
    """Runs models of one kind; the scheduler decides when and where. Any thread may call it, several at once.

    What has a body here is inherited by an engine that derives from this class.
    """

    @property
    def problems(self) -> tuple[str, ...]:
        """What the engine could not find out of models, or cannot do here, in sentences: `status()` shows them."""
        return ()

    def require(self) -> None:
        """Raise `EngineMissing` if what the engine needs is not there; called for each request, so it must be quick."""
        return

    def version(self, model: Any) -> str:
        """Return what tells this engine from others that would take other memory for the model; may block."""
        return ""

    def inspect(self, model: Any, asked: Sequence[Options]) -> ModelProfile | Footprint:
        """Return what the model is, and how it would be loaded for each of the options `asked`.

        A footprint stands for a model that takes the same with all options. Raises `ModelNotFound` or `InvalidModel`.
        """

    def launch(
        self, model: Any, options: Options, settings: EngineSettings, placement: Placement, report: RunnerListener
    ) -> Process:
        """Start a runner with these resolved options and settings, as `inspect` told them, and return while it starts.

        Every launch ends in exactly one `RunnerListener.exited`, unless this raises: then no runner was started, and
        there is no report.
        """

    def look_round(self, room: Callable[[], int]) -> None:
        """Do what is due about once a second; `room` tells how many bytes of the host's memory are free."""
        return

    def forget_prompts(self, model: ModelId) -> None:
        """Remove what is kept of a model's prompts, if anything is."""
        return

    def close(self, timeout_s: float) -> None:
        """End every runner that is left, by force, and the engine's own threads, within `timeout_s` seconds.

        A launch after that raises.
        """


def inspect(engine: Engine, model: Any, asked: Sequence[Options]) -> ModelProfile | Footprint:
    """Return what an engine tells of a model, checked; raises what `Engine.inspect` raises.

    Raises `InvalidModel` where that is no profile, or lacks options: the engine would be asked for them for ever.
    """
    told = engine.inspect(model, asked)
    if not isinstance(told, ModelProfile | Footprint):
        raise InvalidModel(model.name, f"its engine told {type(told).__name__!r}, which is no profile and no footprint")
    if isinstance(told, ModelProfile) and (missing := {*asked}.difference(one.asked for one in told.resolutions)):
        raise InvalidModel(model.name, f"its engine has not resolved {', '.join(map(str, missing))}")
    return told


def version_of(engine: Engine, model: object) -> str:
    """Return the version that an engine tells for a model; the empty text where it cannot be used."""
    try:
        return engine.version(model)
    except SchedulerError:  # its inspection of the model tells
        return ""


def prompts_of(process: Process | None) -> Prompts | None:
    """Return the prompts of a runner that serves; None where they cannot be kept: most engines know of none."""
    found: Prompts | None = getattr(process, "prompts", None)
    return found


def pids_of(process: Process) -> tuple[int, ...]:
    """Return the processes of a runner, as far as they are known: one for most engines, none for an object here."""
    found: tuple[int, ...] | None = getattr(process, "pids", None)
    return found if found is not None else () if process.pid is None else (process.pid,)
