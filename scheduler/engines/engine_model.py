"""A model of an engine that another package or the program itself brings."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from fsm.domain.options import Options
from fsm.machine.request import ModelId
from scheduler.errors.exceptions import InvalidSettings
from scheduler.models.model_spec import check_limit, check_name, check_switch, device_ids


@dataclass(frozen=True)
class EngineModel:
    """What an engine of another package loads; derive from it, as a frozen dataclass, and name the engine.

    The name and all fields of the derived class are its identity, but for fields with `compare=False`: requests for
    equal models share one runner. What is here are the defaults of its requests, as those of a `ModelSpec` are.
    """

    engine: ClassVar[str] = ""  # the name that the engine is registered by
    takes_options: ClassVar[bool] = True  # whether requests may name load-time options

    name: str
    options: Options = field(default=Options(), kw_only=True, compare=False)
    keep_alive: str | float | None = field(default=None, kw_only=True, compare=False)
    pin: bool = field(default=False, kw_only=True, compare=False)  # never evicted for other models
    priority: int = field(default=0, kw_only=True, compare=False)
    devices: tuple[str, ...] | None = field(default=None, kw_only=True, compare=False)
    max_leases: int | Literal["slots"] | None = field(default=None, kw_only=True, compare=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        check_switch("pin", self.pin)
        check_limit("max_leases", self.max_leases)
        object.__setattr__(self, "devices", device_ids(self.devices))
        if not isinstance(self.options, Options):
            raise InvalidSettings("options", self.options, "made of Options, as in options=Options(num_ctx=4096)")
        if not self.engine:
            raise InvalidSettings("engine", self.engine, f"the name of an engine, as a class variable of {type(self)}")

    @property
    def id(self) -> ModelId:
        """The model's identity."""
        own = [f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if each.compare]
        return ModelId(f"{self.engine}:{', '.join(own)}")

    @property
    def files(self) -> tuple[str, ...]:
        """The files that a load reads, which may be read ahead while the model waits; none unless overridden."""
        return ()
