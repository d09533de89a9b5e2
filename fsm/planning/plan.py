"""What a plan says: what to do now for those who wait, where each will go, and when to look again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fsm.domain.devices import Amounts, Placement
from fsm.domain.model_info import Options
from fsm.eviction.policies import Candidate
from fsm.eviction.victim_selection import VictimSet
from fsm.machine.request import Request, RequestSpec
from fsm.machine.runner import Runner, RunnerId
from fsm.messages.reasons import ExpireReason, WaitReason
from fsm.messages.refusals import Refusal
from fsm.state.model_record import ModelRecord
from fsm.state.request_queue import RequestGroup


@dataclass(frozen=True, slots=True)
class PlannedPlacement:
    """Where the runner that a line waits for goes, or would, and what leaves before."""

    placement: Placement
    free: Amounts  # what it was judged by, by device: free, or to be had once the victims have left
    victims: tuple[Candidate, ...] = ()  # each goes when all of them may
    considered: tuple[Candidate, ...] = ()  # for being victims, the first choice first; none where none is needed
    victim_set: VictimSet | None = None  # how the victims were chosen


@dataclass(slots=True)
class Plan:
    """What is to be done now, and when to look again."""

    inspections: list[ModelRecord] = field(default_factory=list)
    launches: list[tuple[RequestGroup, Options, Placement]] = field(default_factory=list)
    memory: list[Request] = field(default_factory=list)  # the program's own, to be granted
    victims: dict[RunnerId, ExpireReason] = field(default_factory=dict)  # to expire, and why
    matches: list[tuple[RequestGroup, Runner]] = field(default_factory=list)  # served after all, as the same
    refusals: list[tuple[RequestGroup, Refusal]] = field(default_factory=list)
    placements: dict[RequestSpec, PlannedPlacement] = field(
        default_factory=dict
    )  # of what is to be loaded, now, later or never
    options: dict[RequestSpec, Options] = field(default_factory=dict)  # explicit, of what has a room
    contended: set[RunnerId] = field(default_factory=set)  # others wait for its memory, and it may not go yet
    policy_failure: str = ""  # the exception that the policy raised; the oldest runners go first instead
    replan_at: float = math.inf  # when a wait's bound or a residency ends
    evaluated: list[RequestGroup] = field(default_factory=list)  # the groups behind them wait as before
    waits: dict[RequestSpec, tuple[WaitReason, float]] = field(default_factory=dict)  # for what, and until when
