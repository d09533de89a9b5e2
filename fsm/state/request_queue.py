"""Request groups: the queued requests with the same specification, and the order in which groups are planned."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fsm.domain.record import Record
from fsm.machine.request import Request, RequestId, RequestSpec
from fsm.machine.runner import RunnerId
from fsm.messages.reasons import WaitFor, WaitReason

QueueRank = tuple[float, RequestId]  # the smaller, the earlier a group is planned


@dataclass(slots=True, eq=False)
class RequestGroup(Record):
    """The queued requests with the same specification, in the order in which they came; never empty."""

    spec: RequestSpec
    requests: dict[RequestId, Request] = field(default_factory=dict)
    waits_for: WaitReason = WaitFor.plan  # as of the last plan
    until: float = math.inf  # when the wait is expected to be over, or planned again; infinite: unknown
    told: WaitReason | None = None  # the last reason that is in the decision log
    evicted: tuple[RunnerId, ...] = ()  # runners that were evicted for the group, in order; some may have gone

    def wait(self, reason: WaitReason, until: float = math.inf) -> None:
        """Set what the group waits for, and until when as far as that is known."""
        self.waits_for, self.until = reason, until

    @property
    def head(self) -> Request:
        """The request that has waited longest."""
        return next(iter(self.requests.values()))
