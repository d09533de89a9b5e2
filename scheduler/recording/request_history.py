"""The history of each request of a recording: the reasons and times of its waits, and its answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from fsm.machine.request import RequestId

BEFORE = "what is not in this file"
GRANTED_BEFORE = "granted before"
UNSEEN = "answered while nothing was recorded"


@dataclass(slots=True)
class Wait:
    """The history of one request."""

    request: RequestId
    model: str
    asked_at_s: float
    purpose: str
    answer: str = ""  # empty: the request still waits
    holds: bool = False  # the request holds what it was granted
    waited_s: float = 0.0
    # what the request waited for, and how many seconds each time
    reasons: list[tuple[str, float]] = field(default_factory=list)

    def waits_for(self, reason: str, at_s: float) -> bool:
        """Note what the request waits for from now on; return whether that is new."""
        if self.reasons and self.reasons[-1][0] == reason:
            return False
        self.lasts_until(at_s)
        self.reasons.append((reason, 0.0))
        return True

    def lasts_until(self, at_s: float) -> None:
        """Add the time until a moment to the wait that was noted last."""
        self.waited_s = at_s - self.asked_at_s
        if self.reasons:
            reason, _ = self.reasons[-1]
            before = sum(took_s for _, took_s in self.reasons[:-1])
            self.reasons[-1] = (reason, self.waited_s - before)
