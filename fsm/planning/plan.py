"""The plan: what is to be done now for the request groups that wait, and when to plan again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fsm.domain.devices import Amounts, Placement
from fsm.eviction.policies import Candidate
from fsm.machine.request import Request, RequestSpec
from fsm.machine.runner import Runner, RunnerId
from fsm.messages.reasons import ExpireReason, KeptReason, WaitReason
from fsm.messages.refusals import Refusal
from fsm.sizing.model_profile import ResolvedLoad
from fsm.state.model_record import ModelRecord
from fsm.state.request_queue import RequestGroup


@dataclass(frozen=True, slots=True)
class PlannedPlacement:
    """Where the runner of a request group goes, or would go, and which victims leave before."""

    placement: Placement
    needed: Amounts  # bytes by device that must be free for it, headroom included
    free: Amounts  # bytes by device that the placement was judged by: free, or available once the victims have left
    victims: tuple[Candidate, ...] = ()  # no victim leaves before all of them may
    considered: tuple[Candidate, ...] = ()  # candidates, the first choice first; empty where no victim is needed
    # why each runner is not evicted for the group, None for its victims; only where a decision log is kept
    kept: Mapping[RunnerId, KeptReason | None] = field(default_factory=dict)


@dataclass(slots=True)
class Plan:
    """What is to be done now, and when to plan again."""

    inspections: list[ModelRecord] = field(default_factory=list)
    launches: list[tuple[RequestGroup, ResolvedLoad, Placement]] = field(default_factory=list)
    memory: list[Request] = field(default_factory=list)  # requests for memory of the program's own, to be granted
    victims: dict[RunnerId, ExpireReason] = field(default_factory=dict)  # runners to expire, and why
    evicted: dict[RequestSpec, tuple[RunnerId, ...]] = field(default_factory=dict)  # of these, by the group they go for
    barred: Mapping[RunnerId, KeptReason] = field(default_factory=dict)  # why a runner can be no victim at all
    matches: list[tuple[RequestGroup, Runner]] = field(default_factory=list)  # groups that a runner serves after all
    refusals: list[tuple[RequestGroup, Refusal]] = field(default_factory=list)
    placements: dict[RequestSpec, PlannedPlacement] = field(default_factory=dict)  # of loads now, later or never
    loads: dict[RequestSpec, ResolvedLoad] = field(default_factory=dict)  # of every planned placement
    contended: set[RunnerId] = field(default_factory=set)  # a group waits for the runner's memory; it may not go yet
    policy_failure: str = ""  # the exception that the policy raised; the oldest runners go first instead
    replan_at: float = math.inf  # when the bound of a wait or a minimum residency ends
    evaluated: list[RequestGroup] = field(default_factory=list)  # the groups behind them wait as before
    waits: dict[RequestSpec, tuple[WaitReason, float]] = field(default_factory=dict)  # the reason, and until when
