"""Where the scheduler of a node is reached, and with which key."""

from __future__ import annotations

from dataclasses import dataclass, field

NAMESPACE = "loadmaster"  # of the actors in Ray


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The HTTP front of one node; another life of the node has another key, and most likely another port."""

    node: str  # the node's id in Ray
    url: str
    key: str = field(repr=False)
