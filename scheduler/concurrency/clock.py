"""Time, as the core is told it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that never go back; where they begin means nothing."""

    def __call__(self) -> float:
        """Return the time now."""


monotonic_clock: Clock = time.monotonic
