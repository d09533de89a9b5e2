"""The configuration of one seed of a simulation: devices, models, request specifications, limits, policy, faults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from fsm.domain.devices import HOST, MIB, DeviceId, DeviceSample
from fsm.domain.options import SLOTS, Options
from fsm.eviction.policies import Candidate, EvictionPolicy, ExpectedReloadCost, KeepAliveOrder, LeastRecentlyUsed
from fsm.machine.request import ModelId, Purpose, RequestSpec
from fsm.sizing.footprint import Footprint
from fsm.state.core_config import CoreConfig
from fsm.verification.declared_model import DeclaredModel
from fsm.verification.sim_faults import Faults, draw_faults

GIB = 1024 * MIB
CORES = 8  # of the host
NAMED_LEASES = (None, 1, SLOTS, 0, None, 2)  # limits of leases that requests for a model name
NAMED_FLASH = (None, None, None, True, None, False, None)  # flash attention that request specifications name
INTEGRATED = DeviceId("gpu-integrated")

Model = Footprint | DeclaredModel

OPTIONS = (
    Options(), Options(), Options(), Options(), Options(num_ctx=2048), Options(num_ctx=8192), Options(num_gpu=0),
    Options(num_gpu=1), Options(num_gpu=99), Options(main_gpu=1), Options(num_parallel=2), Options(num_thread=2),
    Options(num_ctx=10**6), Options(num_parallel=1000), Options(devices=("gpu0",)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Capricious:
    """A policy of a user's own: an order that changes with time, leaves out a candidate now and then, and may raise."""

    raises: bool
    name: str = "capricious"

    def order(self, now: float, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the candidates in an order that only the arguments decide."""
        whim = int(now * 7)
        if self.raises and whim % 5 == 0:
            raise LookupError("no candidate may be evicted")
        ordered = sorted(candidates, key=lambda one: (one.runner * 31 + whim) % 17)
        return ordered[: len(ordered) - (whim % 7 == 0)]


@dataclass(frozen=True, slots=True)
class SimConfig:
    """What holds for a whole seed."""

    limits: CoreConfig
    defaults: Options  # of the engine
    policy: EvictionPolicy
    devices: tuple[DeviceSample, ...]  # all free, the host first
    models: tuple[tuple[ModelId, Model], ...]
    specs: tuple[RequestSpec, ...]  # earlier specifications are asked for more often
    keep_alives_s: tuple[float | None, ...]  # that a request may name
    timeouts_s: tuple[float | None, ...]
    faults: Faults
    arrival_s: float  # between two requests, on average
    hold_s: float  # how long a lease is held, on average
    load_s: float  # how long a load takes, on average
    look_s: float  # between two readings of the devices
    max_leases: Mapping[ModelId, int | None]  # that the requests for a model name


def draw_sim_config(draw: Random) -> SimConfig:
    """Return the configuration of one seed."""
    devices = _devices(draw)
    models = tuple((ModelId(f"model-{number}"), draw_model(draw, devices)) for number in range(draw.randint(1, 6)))
    names = tuple(name for name, _ in models)
    # limits of leases, memory, flash attention and kept prompts follow from it: what else a seed draws stays as it is
    number = len(devices) + 2 * len(models)
    return SimConfig(
        defaults=draw.choice((Options(), Options(), Options(num_ctx=65536))),
        max_leases={name: NAMED_LEASES[(number + place) % 6] for place, name in enumerate(names)},
        limits=replace(
            _limits(draw),
            max_leases=(0, 0, 1, 3)[number % 4],
            memory_limited=number % 3 == 0,
            keeps_prompts=number % 2 == 0,
        ),
        policy=_policy(draw),
        devices=devices,
        models=models,
        specs=tuple(_with_flash(spec, number + place) for place, spec in enumerate(_specs(draw, names, devices))),
        keep_alives_s=draw.choice(((None,), (None, None, 0.0, 5.0, math.inf))),
        timeouts_s=draw.choice(((None,), (None, None, 0.0, 10.0, 100.0))),
        faults=draw_faults(draw),
        arrival_s=draw.choice((0.1, 0.5, 2.0, 10.0)),
        hold_s=draw.choice((0.1, 1.0, 10.0)),
        load_s=draw.choice((0.5, 5.0)),
        look_s=draw.choice((1.0, 1.0, 5.0, 20.0)),
    )


def draw_model(draw: Random, devices: Sequence[DeviceSample]) -> Model:
    """Return a model: an object of declared bytes, layers of any size, or layers whose sizes follow from options."""
    most = sum(device.capacity_bytes for device in devices if not device.integrated)
    size = max(MIB, int(most * 0.9 * draw.random() ** 3))
    kind = draw.choice(("fixed", "layers", "resolved"))
    if kind == "fixed":
        on = draw.choice((HOST, HOST, devices[-1].id))
        return Footprint(fixed=((on, size),))
    layers = draw.randint(1, 4)
    if kind == "layers":
        each, host = size // (layers + 1), min(size // 4, 200 * MIB)
        return Footprint((each,) * layers, (each // 8,) * layers, each, 0, each // 8, process_bytes=host)
    token_bytes, context = draw.choice((1024, 65536)), draw.choice((4096, 131072))
    return DeclaredModel((size // (layers + 1),) * layers, token_bytes, context, one_slot=draw.random() < 0.3)


def _devices(draw: Random) -> tuple[DeviceSample, ...]:
    capacity = draw.choice((2, 4, 8, 32)) * GIB
    devices = [DeviceSample(HOST, "cpu", "host", capacity, capacity, cores=CORES)]
    for number in range(draw.choice((0, 0, 1, 1, 2, 3))):
        size = draw.choice((1, 4, 8)) * GIB
        instance = draw.random() < 0.05
        devices.append(DeviceSample(DeviceId(f"gpu{number}"), "gpu", f"gpu {number}", size, size, False, instance))
    if draw.random() < 0.15:
        devices.append(DeviceSample(INTEGRATED, "gpu", "integrated", capacity, capacity, integrated=True))
    return tuple(devices)


def _limits(draw: Random) -> CoreConfig:
    return CoreConfig(
        max_queue=0 if draw.random() < 0.03 else draw.choice((3, 8, 16, 32)),
        max_runners=draw.choice((0, 0, 1, 2, 4)),
        keep_alive_s=draw.choice((0.0, 5.0, 300.0, math.inf)),
        max_wait_s=draw.choice((2.0, 30.0, 120.0)),
        min_residency_s=draw.choice((None, None, 0.0, 10.0)),
        load_timeout_s=draw.choice((30.0, 300.0)),
        max_loads_per_gpu=draw.choice((1, 2)),
        max_host_loads=draw.choice((1, 2)),
        priority_s=draw.choice((0.0, 60.0)),
        spread_over_gpus=draw.random() < 0.1,
        require_gpu=draw.random() < 0.1,
        claims=draw.random() < 0.3,
        persists_measurements=draw.random() < 0.3,
        claim_timeout_s=draw.choice((5.0, 60.0)),
    )


def _policy(draw: Random) -> EvictionPolicy:
    order = LeastRecentlyUsed(), KeepAliveOrder(), Capricious(False), Capricious(True)
    return draw.choice((ExpectedReloadCost(), *order))


def _specs(draw: Random, names: Sequence[ModelId], devices: Sequence[DeviceSample]) -> tuple[RequestSpec, ...]:
    specs = []
    for _ in range(draw.randint(1, 3)):
        for name in names:
            purpose = Purpose.preload if draw.random() < 0.1 else Purpose.lease
            specs.append(RequestSpec(name, draw.choice(OPTIONS), purpose, draw.choice((0, 0, 0, 1, -2))))
    for _ in range(draw.choice((0, 0, 1, 2))):
        device = draw.choice(devices)
        amount = int(device.capacity_bytes * draw.random() ** 2)
        specs.append(RequestSpec(ModelId(""), Options(), Purpose.memory, 0, ((device.id, amount),)))
    draw.shuffle(specs)
    return tuple(specs)


def _with_flash(spec: RequestSpec, place: int) -> RequestSpec:
    if spec.purpose is Purpose.memory:
        return spec
    return replace(spec, options=replace(spec.options, flash_attention=NAMED_FLASH[place % len(NAMED_FLASH)]))
