"""How tests wait for other threads and processes: for a condition, with a limit, and never for a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

LIMIT_S = 20.0  # ten times what anything waited for takes on a busy machine: a load of 0.1 s, or a few times that


def assert_soon(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Fail unless other threads or processes bring a condition about in time."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "the condition did not hold in time"
        threading.Event().wait(0.005)
