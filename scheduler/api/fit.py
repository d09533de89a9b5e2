"""What would be loaded where, and why: the core's preview in the user's terms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from fsm.domain.devices import HOST, DeviceId
from fsm.domain.model_info import Options
from fsm.eviction.policies import Candidate
from fsm.machine.request import ModelId
from fsm.messages.refusals import DoesNotFitRefusal
from fsm.preview import Preview, Share, preview
from fsm.sizing.load_history import NOTHING, LoadHistory
from scheduler.api.fit_advice import advise
from scheduler.errors.formatting import format_bytes, format_duration
from scheduler.errors.from_refusals import error_of
from scheduler.errors.wording import Name, infeasible_reason, remedy, wait_reason

if TYPE_CHECKING:
    from fsm.core import Core, DeviceView
    from fsm.domain.model_info import ModelInfo
    from fsm.sizing.footprint import Footprint
    from scheduler.runtime.model_registry import ParsedRequest

Verdict = Literal["warm", "fits", "evicts", "waits", "refused", "never"]


@dataclass(frozen=True, slots=True)
class FitDevice:
    """What one device would give, in bytes; an integrated GPU's share is the host's."""

    id: str
    name: str
    weights_bytes: int  # as predicted, like the next three
    cache_bytes: int
    compute_bytes: int
    other_bytes: int  # the process itself, its prompt cache; all of what an object declares
    takes_bytes: int  # the sum of them, or what was measured
    needed_bytes: int  # what must be free for it: headroom included; 0 where it is loaded, or being loaded
    free_bytes: int  # what it is judged by: what is free, once the victims have left
    gpu_layers: int  # that go to this GPU


@dataclass(frozen=True, slots=True)
class FitVictim:
    """A runner that would be given up."""

    model: str  # its name
    runner: int
    held_bytes: int  # on all devices
    leases: int
    leaves_in_s: float  # when it may be told to leave, at the latest; those who use it may then finish


@dataclass(frozen=True, slots=True)
class FitAdvice:
    """Another way to ask, and what would become of it."""

    options: Mapping[str, int | str]  # the keywords to name in place of those that were, or beside them
    fit: Fit  # without advice of its own


@dataclass(frozen=True, slots=True)
class Fit:
    """What would become of a request at one moment; `str()` of it is a sentence."""

    model: str  # its name
    verdict: Verdict
    options: Options  # explicit, as far as is known
    devices: tuple[
        FitDevice, ...
    ] = ()  # those that take part, the host first; empty where nothing is planned for it yet
    layers: int = 0  # that could go to GPUs; 0: there are no GPUs, or it has no layers
    measured: bool = False  # what it takes was measured on a runner placed the same way, or on the one that serves
    victims: tuple[FitVictim, ...] = ()  # who would leave; non-empty iff the verdict is "evicts"
    reason: str = ""  # what it waits for, or why it is refused or never fits
    advice: tuple[FitAdvice, ...] = ()  # how to ask so that it fits, or fits better; the least harm first
    remedy: str = ""  # what else helps where it never fits, if something is in its way

    @property
    def fits(self) -> bool:
        """Whether it is loaded, or would be, sooner or later."""
        return self.verdict not in ("refused", "never")

    @property
    def gpu_layers(self) -> int:
        """Layers that go to GPUs."""
        return sum(device.gpu_layers for device in self.devices)

    def __str__(self) -> str:
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
                    f"{format_bytes(max(0, each.free_bytes))} can be had"
                    for each in short
                )
                return f"{self.model} does not fit: {self.reason}{f' ({amounts})' if amounts else ''}"

    def to_json(self) -> dict[str, Any]:
        """Return it as what `json` takes, the sentence and whether it fits included; what is without end is None."""
        return {**_plain(self), "fits": self.fits, "gpu_layers": self.gpu_layers, "sentence": str(self)}

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
        """Who leaves first, and when: "coder (1.2 GiB) and chat (300 MiB, in use, in 2m at most) have left"."""
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
    question: ParsedRequest,
    info: ModelInfo | Footprint,
    name: Name,
    known: LoadHistory = NOTHING,
) -> Fit:
    """Return what would become of a question at `now`; `core` is nobody else's, and stays as it is.

    `known` is what a store remembers of the model's file.
    """

    def named(id: ModelId) -> str:
        """Return the name to show: the model that is asked about need not be known otherwise."""
        return question.name if id == question.spec.model else name(id)

    devices = {device.id: device for device in core.snapshot().devices}
    found = preview(now, core, question.spec, info, known)
    fit = _fit(now, devices, question.name, found, named)
    advice = []
    for each in advise(now, core, question.spec, info, found, known):
        other = _fit(now, devices, question.name, each.preview, named)
        advice.append(FitAdvice(_changes(question.spec.options, each.options), other))
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


def _plain(value: object) -> Any:
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return None if value == math.inf else value
