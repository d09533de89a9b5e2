"""The clock, whose time the core is given."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A clock in seconds that never goes back, from an arbitrary beginning."""

    def __call__(self) -> float:
        """Return the time now, in seconds."""


monotonic_clock: Clock = time.monotonic
