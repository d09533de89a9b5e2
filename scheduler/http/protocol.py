"""What a protocol has to say for itself: how errors and signs of life look in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from typing import Protocol as Interface

from scheduler.http.errors import ErrorAnswer

EVENTS = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a request waits for: at a `position` of the queue (0: first), or for its load, `progress` of 1 done."""

    state: str  # "queued" or "loading"
    waits_for: str = ""
    position: int | None = None
    progress: float | None = None
    eta_s: float | None = None

    def line(self) -> str:
        """Return this in words, on one line."""
        if self.state == "loading":
            part = "" if self.progress is None else f" {self.progress:.0%}"
            return f"loading{part}"
        place = "" if self.position is None else f" at position {self.position + 1}"
        reason = f", for {self.waits_for}" if self.waits_for else ""
        return f"waiting{place}{reason}".replace("\n", " ").replace("\r", " ")


class Protocol(Interface):
    """A protocol that clients speak."""

    content_type: str  # of a streamed answer

    def error(self, answer: ErrorAnswer) -> Mapping[str, Any]:
        """Return the body of an answer that is an error."""

    def error_event(self, answer: ErrorAnswer) -> bytes:
        """Return the end of a stream that breaks."""

    def missing(self, lines: bytes, model: str) -> bytes | None:
        """Return what the engine's stream lacks before its first lines; None: its beginning is still to come."""

    def sign_of_life(self, waiting: Waiting) -> bytes:
        """Return a part of a stream that clients skip; empty where the protocol has none."""
