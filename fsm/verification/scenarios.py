"""The named scenarios of the search: each is small, and about one thing."""

from __future__ import annotations

import math
from dataclasses import replace

from fsm.domain.devices import HOST, MIB, DeviceId
from fsm.domain.options import Options
from fsm.machine.request import ModelId, Purpose, RequestSpec
from fsm.messages.events import Configure
from fsm.sizing.footprint import Footprint
from fsm.state.core_config import CoreConfig
from fsm.verification.declared_model import DeclaredModel
from fsm.verification.environment import Scenario

GIB = 1024 * MIB
A, B, C = map(ModelId, "abc")
GPU0, GPU1, GPU2 = map(DeviceId, ("gpu0", "gpu1", "gpu2"))
HOST_8 = ((HOST, 8 * GIB),)
# All different, so that no two deadlines fall together by chance. Nothing rests for a time unless a scenario says so;
# nothing is kept for its next user, which would be one more deadline of the kind of a residency, for every use;
# memory is looked at once more before the wait for it is over: of times only the order is told apart, and a look every
# quarter of a second would be the same state again and again.
LIMITS = CoreConfig(
    keep_alive_s=math.inf, max_wait_s=20.0, min_residency_s=3.0, load_timeout_s=50.0, recovery_interval_s=4.0,
    recovery_timeout_s=5.0, back_off_s=11.0, good_life_s=60.0, idle_grace_part=0.0,
)  # fmt: skip
LATER = replace(LIMITS, plans_later=True)  # as in a scheduler: a Tick plans, and other events may come before it


def _on_host(gib: int) -> Footprint:
    return Footprint(fixed=((HOST, gib * GIB),))


def _layered(layers: int, mib: int) -> Footprint:
    return Footprint((mib * MIB,) * layers, (0,) * layers, process_bytes=64 * MIB)


def _resolved(mib: int) -> DeclaredModel:
    """Return a model of two layers, which can be had with more than one context."""
    return DeclaredModel((mib * MIB,) * 2)


def _lease(model: ModelId, options: Options = Options(), priority: int = 0) -> RequestSpec:  # noqa: B008  # it is frozen
    return RequestSpec(model, options, Purpose.lease, priority)


def _preload(model: ModelId) -> RequestSpec:
    return RequestSpec(model, Options(), Purpose.preload, 0)


def _memory(gib: int) -> RequestSpec:
    return RequestSpec(ModelId(""), Options(), Purpose.memory, 0, ((HOST, gib * GIB),))


TWO_GPUS = ((HOST, 2 * GIB), (GPU0, 6 * GIB), (GPU1, 6 * GIB))
ONE_PLACE = ((A, _on_host(6)), (B, _on_host(6)))
EITHER = (_lease(A), _lease(B))
SMALL, LARGE = Options(num_ctx=2048), Options(num_ctx=8192)

SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "one-place", "two models on a device that holds one, two requests",
        HOST_8, ONE_PLACE, EITHER, 2, 400_000, LIMITS,
    ),
    Scenario(
        "three-requests", "two models on a device that holds one, three requests",
        HOST_8, ONE_PLACE, EITHER, 3, 200_000, LIMITS, expires=False,
    ),
    Scenario(
        "four-requests", "two models on a device that holds one, four requests",
        HOST_8, ONE_PLACE, EITHER, 4, 300_000, LIMITS, expires=False, closes=False,
    ),
    Scenario(
        "all-at-once", "four requests, loads that run out of memory, models asked to leave, and the close",
        HOST_8, ONE_PLACE, EITHER, 4, 100_000, LIMITS, out_of_memory=True,
    ),
    Scenario(
        "two-gpus", "three models on two GPUs that hold one each, whose memory comes back late",
        TWO_GPUS, tuple((model, _layered(2, 2048)) for model in (A, B, C)),
        tuple(map(_lease, (A, B, C))), 3, 60_000, LIMITS, strangers_bytes=GIB,
    ),
    Scenario(
        "three-gpus", "three models that load at once, on GPUs of which each is roomier than the next",
        ((HOST, 2 * GIB), (GPU0, 12 * GIB), (GPU1, 10 * GIB), (GPU2, 4 * GIB)),
        tuple((model, _layered(2, 1024)) for model in (A, B, C)), tuple(map(_lease, (A, B, C))), 3, 10_000, LIMITS,
        closes=False,
    ),
    Scenario(
        "early-return", "a GPU whose memory is back before the exit of a process is told",
        ((HOST, GIB), (GPU0, GIB)), ((A, _layered(2, 256)), (B, _layered(2, 128))), EITHER, 2, 40_000, LIMITS,
        gives_back=True, closes=False,
    ),
    Scenario(
        "reload", "a model with a small context and a large one, measured, beside another",
        ((HOST, GIB), (GPU0, GIB)), ((A, _resolved(200)), (B, _resolved(200))),
        (_lease(A, SMALL), _lease(A, LARGE), _lease(B)), 3, 40_000, LATER, fills=True,
    ),
    Scenario(
        "read-ahead", "files that are read while a GPU is waited for, with more or less memory to spare",
        ((HOST, GIB), (GPU0, GIB)), ((A, _resolved(300)), (B, _resolved(300))), EITHER, 3, 40_000, LIMITS,
        other_devices=((HOST, 600 * MIB), (GPU0, GIB)), expires=False, closes=False,
    ),
    Scenario(
        "keep-alive", "runners that rest for a time, for no time, and for ever, and whose prompts are kept",
        HOST_8, ONE_PLACE, EITHER, 2, 40_000,
        replace(LIMITS, keep_alive_s=70.0, keeps_prompts=True),
        keep_alives_s=(None, 0.0, math.inf),
    ),
    Scenario(
        "time-outs", "requests that wait for a limited time, or not at all",
        HOST_8, ONE_PLACE, EITHER, 3, 40_000, LIMITS, timeouts_s=(None, 0.0, 7.0), expires=False, closes=False,
    ),
    Scenario(
        "pins", "models that are pinned and let go, requests that are worth more than others",
        HOST_8, ONE_PLACE, (*EITHER, _lease(B, priority=1)), 3, 50_000, LIMITS, pins=True, closes=False,
    ),
    Scenario(
        "out-of-memory", "loads and runners that run out of memory, where two fit beside each other",
        HOST_8, ((A, _on_host(4)), (B, _on_host(4))), EITHER, 2, 50_000, LIMITS, out_of_memory=True, closes=False,
    ),
    Scenario(
        "hangs", "runners that answer no more, loads that are slow",
        HOST_8, ONE_PLACE, EITHER, 2, 60_000, LATER, hangs=True,
    ),
    Scenario(
        "replaced-files", "models whose files are replaced while they load, serve and rest",
        HOST_8, ONE_PLACE, EITHER, 2, 30_000, LATER, expires=False, closes=False, replaces=True,
    ),
    Scenario(
        "own-memory", "memory of the program's own, and models that are loaded for later",
        HOST_8, ((A, _on_host(4)), (B, _on_host(4))), (_lease(A), _preload(B), _memory(4)), 3, 50_000, LATER,
        expires=False,
    ),
    Scenario(
        "claims", "launches that claim their devices among all programs on the machine",
        HOST_8, ((A, _on_host(6)), (B, _on_host(2))), EITHER, 2, 50_000,
        replace(LIMITS, claims=True),
    ),
    Scenario(
        "claims-of-both", "launches that claim one GPU, or two together",
        TWO_GPUS, ((A, _layered(2, 4096)), (B, _layered(2, 2048))), EITHER, 3, 50_000,
        replace(LIMITS, claims=True),
    ),
    Scenario(
        "shrinking", "a device that shrinks and grows again, and a model that needs none of it",
        HOST_8, ((A, _on_host(4)), (B, _on_host(4)), (C, Footprint())), (*EITHER, _lease(C)), 3, 40_000, LIMITS,
        other_devices=((HOST, 5 * GIB),),
        closes=False,
    ),
    Scenario(
        "better-place", "a GPU that comes and goes, and requests that name no layers, or none on GPUs",
        ((HOST, 8 * GIB), (GPU0, 6 * GIB)), ((A, _layered(2, 2048)),), (_lease(A), _lease(A, Options(num_gpu=0))),
        2, 60_000, LATER, other_devices=((HOST, 8 * GIB),), closes=False,
    ),
    Scenario(
        "moments-of-rest", "runners that are kept for their next user, and by what their load took",
        HOST_8, ONE_PLACE, EITHER, 2, 40_000,
        replace(LIMITS, min_residency_s=None, idle_grace_part=0.1, idle_grace_limit_s=1.0),
        expires=False,
    ),
    Scenario(
        "configure", "limits that are changed while everything runs, and a queue of one place",
        HOST_8, ((A, _on_host(4)), (B, _on_host(4))), EITHER, 3, 50_000, LATER, expires=False, closes=False,
        configures=(
            Configure(max_queue=1, max_runners=1), Configure(max_queue=2, max_runners=2),
            Configure(keep_alive_s=70.0), Configure(keep_alive_s=0.0),
        ),
    ),
    Scenario(
        "leases", "runners that may hold one lease at a time, or two, and requests that are worth more than others",
        HOST_8, ONE_PLACE, (*EITHER, _lease(A, priority=1)), 4, 60_000,
        replace(LIMITS, max_leases=1),
        expires=False, closes=False, configures=(Configure(max_leases=1), Configure(max_leases=2)),
    ),
    Scenario(
        "own-leases", "callers that ask for more while they keep leases, with room for one model or two",
        HOST_8, ((A, _on_host(6)), (B, _on_host(6)), (C, _on_host(1))), tuple(map(_lease, (A, B, C))), 3, 40_000,
        replace(LATER, max_leases=1), expires=False, closes=False, keeps=True,
    ),
    Scenario(
        "plans-later", "requests that wait for a limited time, or not at all, and plans that come after other events",
        HOST_8, ONE_PLACE, EITHER, 3, 60_000,
        LATER,
        timeouts_s=(None, 0.0), expires=False,
    ),
    Scenario(
        "claims-before-plans", "device claims, and memory of the program's own, with plans that come later",
        HOST_8, ((A, _on_host(6)), (B, _on_host(2))), (*EITHER, _memory(4)), 3, 60_000,
        replace(LATER, claims=True),
        expires=False,
    ),
    Scenario(
        "full-queue", "a queue of one place",
        HOST_8, ONE_PLACE, EITHER, 3, 60_000,
        replace(LIMITS, max_queue=1),
        expires=False, closes=False,
    ),
)  # fmt: skip
