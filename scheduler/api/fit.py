"""Where a model would be loaded, and why: the core's preview in the user's terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from fsm.domain.devices import HOST, DeviceId
from fsm.domain.options import Options
from fsm.eviction.policies import Candidate
from fsm.machine.request import ModelId
from fsm.messages.refusals import DoesNotFitRefusal, InvalidModelRefusal
from fsm.preview import Preview, Share, preview
from fsm.sizing.load_history import NOTHING, LoadHistory
from scheduler.api.fit_advice import Inspection, advise
from scheduler.config.json_values import json_value
from scheduler.errors.exceptions import InvalidModel, ModelNotFound
from scheduler.errors.formatting import format_bytes, format_duration, shown
from scheduler.errors.from_refusals import error_of
from scheduler.errors.wording import Name, infeasible_reason, remedy, wait_reason

if TYPE_CHECKING:
    from fsm.core import Core, DeviceView
    from scheduler.runtime.request_parser import ParsedRequest

Verdict = Literal["warm", "fits", "evicts", "waits", "refused", "never"]


@dataclass(frozen=True, slots=True)
class FitDevice:
    """The part of one device in a fit, in bytes; an integrated GPU's bytes are the host's."""

    id: str
    name: str
    weights_bytes: int  # as predicted, like the next three
    cache_bytes: int
    compute_bytes: int
    other_bytes: int  # the process itself and its prompt cache; all of what an object declares
    takes_bytes: int  # the sum of these four, or what was measured
    needed_bytes: int  # what must be free for the model, headroom included; 0 where it is loaded, or being loaded
    free_bytes: int  # what the verdict goes by: the free memory once the victims have left
    gpu_layers: int  # layers that go to this GPU


@dataclass(frozen=True, slots=True)
class FitVictim:
    """A runner that would be evicted."""

    model: str  # the model's name
    runner: int
    held_bytes: int  # on all devices
    leases: int
    leaves_in_s: float  # when the runner is stopped or begins to drain, at the latest


@dataclass(frozen=True, slots=True)
class FitAdvice:
    """Other options for the request, and what would become of it with them."""

    options: Mapping[str, int | str]  # the keywords to add to those of the request, or to replace them with
    fit: Fit  # without advice of its own


@dataclass(frozen=True, slots=True)
class Fit:
    """The outcome that a request would have at one moment; `str()` of a fit is a sentence."""

    model: str  # the model's name
    verdict: Verdict
    options: Options  # explicit, as far as they are known
    devices: tuple[
        FitDevice, ...
    ] = ()  # the devices that take part, the host first; empty where nothing is planned for the model yet
    layers: int = 0  # layers that could go to GPUs; 0: there are no GPUs, or the model has no layers
    measured: bool = False  # the bytes were measured on a runner placed the same way, or on the runner that serves
    victims: tuple[FitVictim, ...] = ()  # the runners that would be evicted; non-empty iff the verdict is "evicts"
    reason: str = ""  # what the request waits for, or why it is refused or never fits
    advice: tuple[FitAdvice, ...] = ()  # other options with which the model fits, or fits better; the least harm first
    remedy: str = ""  # what else helps where the model never fits, if something is in its way

    @property
    def fits(self) -> bool:
        """Whether the model is loaded, or would be, sooner or later."""
        return self.verdict not in ("refused", "never")

    @property
    def gpu_layers(self) -> int:
        """Layers that go to GPUs."""
        return sum(device.gpu_layers for device in self.devices)

    def __str__(self) -> str:
        return shown(self._words())

    def _words(self) -> str:
        match self.verdict:
            case "warm":
                held = ", ".join(f"{format_bytes(each.takes_bytes)} on {each.name}" for each in self._giving())
                return f"{self.model} is loaded, and takes {held}"
            case "fits":
                return f"{self.model} fits{self._where()}"
            case "evicts":
                return f"{self.model} fits once {self._victims()}{self._where()}"
            case "waits":
                return f"{self.model} waits for {self.reason}{self._where()}"
            case "refused":
                return f"{self.model} would be refused: {self.reason}"
            case "never":
                short = [each for each in self.devices if each.needed_bytes > each.free_bytes]
                amounts = ", ".join(
                    f"{format_bytes(each.needed_bytes)} must be free on {each.name} and at most "
                    f"{format_bytes(max(0, each.free_bytes))} can be made free"
                    for each in short
                )
                return f"{self.model} does not fit: {self.reason}{f' ({amounts})' if amounts else ''}"

    def to_json(self) -> dict[str, Any]:
        """Return the fit as JSON values, with its sentence and whether it fits; an infinite time becomes None."""
        return {**json_value(self), "fits": self.fits, "gpu_layers": self.gpu_layers, "sentence": str(self)}

    def _giving(self) -> list[FitDevice]:
        return [device for device in self.devices if device.takes_bytes]

    def _where(self) -> str:
        amounts = [
            f"{format_bytes(each.takes_bytes)} of {format_bytes(max(0, each.free_bytes))} free on {each.name}"
            for each in self._giving()
            if each.needed_bytes
        ]
        layers = f"{self.gpu_layers} of {self.layers} layers on GPUs, " if self.gpu_layers < self.layers else ""
        measured = ", as measured before" if self.measured else ""
        return f": {layers}{', '.join(amounts)}{measured}" if amounts else ""

    def _victims(self) -> str:
        """Return the victims and their times: "coder (1.2 GiB) and chat (300 MiB, in use, in 2m at most) have left"."""
        named = []
        for victim in self.victims:
            use = ", in use" if victim.leases else ""
            when = f", in {format_duration(victim.leaves_in_s)} at most" if victim.leaves_in_s > 0 else ""
            name = "its runner with other options" if victim.model == self.model else victim.model
            named.append(f"{name} ({format_bytes(victim.held_bytes)}{use}{when})")
        *others, last = named
        return f"{', '.join(others)} and {last} have left" if others else f"{last} has left"


def fit_of(
    now: float,
    core: Core,
    parsed: ParsedRequest,
    inspect: Inspection,
    name: Name,
    known: LoadHistory = NOTHING,
) -> Fit:
    """Return what would become of a request at `now`; `core` belongs to the caller alone, and is not changed.

    `inspect` inspects the model for some options, and `known` holds the measurements of its file. Raises what `inspect`
    raises, unless a runner that was loaded before serves the request.
    """

    def named(id: ModelId) -> str:
        """Return the name to show for a model: the requested model need not be registered."""
        return parsed.name if id == parsed.spec.model else name(id)

    devices = {device.id: device for device in core.snapshot().devices}
    try:
        profile = inspect([*core.options_asked_of(parsed.spec.model), parsed.spec.options])
    except (ModelNotFound, InvalidModel) as error:  # a loaded runner serves all the same
        found = preview(now, core, parsed.spec, InvalidModelRefusal(error.path, str(error)))
        if isinstance(found.refusal, InvalidModelRefusal):
            raise
        return _fit(now, devices, parsed.name, found, named)
    found = preview(now, core, parsed.spec, profile, known)
    fit = _fit(now, devices, parsed.name, found, named)
    advice = []
    for each in advise(now, core, parsed.spec, profile, inspect, found, known):
        other = _fit(now, devices, parsed.name, each.preview, named)
        advice.append(FitAdvice(_changes(parsed.spec.options, each.options), other))
    return replace(fit, advice=tuple(advice))


def _fit(now: float, devices: Mapping[DeviceId, DeviceView], model: str, found: Preview, name: Name) -> Fit:
    layers: dict[DeviceId, int] = {}
    for gpu, count in found.gpu_layers:
        memory = devices[gpu].memory if gpu in devices else gpu
        layers[memory] = layers.get(memory, 0) + count
    reason = helps = ""
    match found.refusal:
        case None if found.waits_for is not None:
            reason = wait_reason(found.waits_for, name)
        case None:
            pass
        case DoesNotFitRefusal(reason=why):
            reason, helps = infeasible_reason(why, name), remedy(why, "")
        case refusal:
            reason = str(error_of(refusal, name))
    return Fit(
        model,
        found.outcome.value,
        found.options,
        tuple(_device(devices.get(share.device), share, layers.get(share.device, 0)) for share in found.shares),
        found.layers,
        found.measured,
        tuple(_victim(now, victim, name) for victim in found.victims),
        reason,
        remedy=helps,
    )


def _device(device: DeviceView | None, share: Share, gpu_layers: int) -> FitDevice:
    part = share.part
    return FitDevice(
        share.device,
        "the host" if share.device == HOST else device.name if device is not None else share.device,
        part.weights_bytes,
        part.cache_bytes,
        part.compute_bytes,
        part.other_bytes,
        share.takes_bytes,
        share.needed_bytes,
        share.free_bytes,
        gpu_layers,
    )


def _victim(now: float, victim: Candidate, name: Name) -> FitVictim:
    leaves_in_s = max(0.0, victim.free_at - now)
    return FitVictim(name(victim.model), victim.runner, victim.held_bytes, victim.leases, leaves_in_s)


def _changes(asked: Options, advised: Options) -> dict[str, int | str]:
    named = {each.name: getattr(advised, each.name) for each in fields(Options)}
    return {name: value for name, value in named.items() if value != getattr(asked, name)}
