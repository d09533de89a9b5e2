"""The queued requests that want the same, and the order in which they are planned."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fsm.domain.record import Record
from fsm.machine.request import Request, RequestId, RequestSpec
from fsm.messages.reasons import WaitFor, WaitReason

QueueRank = tuple[float, RequestId]  # the earlier the smaller


@dataclass(slots=True, eq=False)
class RequestGroup(Record):
    """The queued requests that want the same, in the order in which they came; never empty."""

    spec: RequestSpec
    requests: dict[RequestId, Request] = field(default_factory=dict)
    waits_for: WaitReason = WaitFor.plan  # as of the last plan
    until: float = math.inf  # when that is expected to be over, or looked at again; infinite: unknown
    told: WaitReason | None = None  # what was last noted of it in the journal

    def wait(self, reason: WaitReason, until: float = math.inf) -> None:
        """Say what it waits for, and until when as far as that is known."""
        self.waits_for, self.until = reason, until

    @property
    def head(self) -> Request:
        """The one that has waited longest."""
        return next(iter(self.requests.values()))
