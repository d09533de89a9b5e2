"""Engines: what turns a placed model into a running one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fsm.domain.devices import HOST

if TYPE_CHECKING:
    from fsm.domain.devices import DeviceId, Placement
    from fsm.domain.model_info import ModelInfo, Options
    from fsm.sizing.footprint import Footprint
    from scheduler.engines.runner_client import RunnerClient


BufferKind = Literal["weights", "cache", "compute", "output", "projector"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """What an engine says of itself that it has allocated, or mapped, of one kind on one device."""

    device: DeviceId
    kind: BufferKind
    bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """What one runner occupies at a moment, as far as its engine can tell; bytes."""

    resident: Mapping[DeviceId, int] = field(default_factory=dict)  # by device; of a GPU what the engine's buffers take
    mapped_bytes: int = 0  # of the host's: pages of files, weights above all, that the host counts as free
    to_come: Mapping[DeviceId, int] = field(default_factory=dict)  # most that is yet to come; said when it has loaded

    @property
    def private_bytes(self) -> int:
        """What it occupies of the host for itself."""
        return max(0, self.resident.get(HOST, 0) - self.mapped_bytes)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a runner's server answers, for those who have the key; the key is made for one life and shown nowhere."""

    url: str  # scheme, host and port
    key: str = field(repr=False)
    client: RunnerClient | None = field(default=None, repr=False, compare=False)  # None: made when it is first needed


class RunnerListener(Protocol):
    """How an engine tells what happens to one runner; any thread may call it, and no call blocks.

    An engine never calls it from inside `Engine.launch` or `Process.stop`.
    """

    def progressed(self) -> None:
        """The load is alive; as often as the engine likes."""

    def loaded(self, endpoint: Endpoint | object, num_ctx: int | None, memory: Memory) -> None:
        """It serves, at an endpoint or as the object itself; at most once.

        `num_ctx` is the context that each slot really got, in tokens, or None; `memory` is what it occupies.
        """

    def exited(self, code: int | None, detail: str, out_of_memory: bool) -> None:
        """It is gone, asked for or not, started or not: exactly once, and the last call.

        `code` is the exit status, the negative signal, or None where it never started; `detail` says it in words.
        """


class Process(Protocol):
    """The handle of one runner, from its launch on; any thread may use it."""

    @property
    def pid(self) -> int | None:
        """The process that runs it; None before it has started, and for an object of this process."""

    def stop(self, grace_s: float) -> None:
        """Have it end, by force after `grace_s`; returns at once, ends in `Report.exited`, twice is harmless."""

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """What the engine says it has allocated; empty where it does not say, or not yet."""

    def memory(self) -> Memory:
        """Return what it occupies now; nothing when it is gone."""

    def context_filled(self, timeout_s: float) -> Mapping[DeviceId, int] | None:
        """Tell whether it has taken most of what it will ever take; blocks for as long as `timeout_s`.

        None: not yet, or it cannot tell. Else the bytes by device that it may still take beside that.
        """

    def healthy(self, timeout_s: float) -> bool:
        """Return whether it answers; blocks for as long as `timeout_s`."""


class Engine(Protocol):
    """What knows how to run one kind of model; it decides nothing about when or where."""

    def require(self) -> None:
        """Raise `EngineMissing` if what it needs is not installed."""

    def inspect(self, model: Any) -> ModelInfo | Footprint:
        """Return what the model would need; raises `ModelNotFound` or `InvalidModel`."""

    def launch(self, model: Any, options: Options, placement: Placement, report: RunnerListener) -> Process:
        """Start a runner with these resolved options, and return while it starts.

        Ends in exactly one `Report.exited`, unless it raises: then nothing was started and nothing is reported.
        """

    def close(self, timeout_s: float) -> None:
        """End every runner that is left, by force, and the engine's own threads; bounded in time."""
