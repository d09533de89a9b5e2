"""The digest that a node takes of its own scheduler, for the fronts that choose among nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fsm.cluster.digest import NodeDigest, NodeId, Offer
from fsm.cluster.digest_of_core import digest_of
from fsm.machine.request import ModelId
from scheduler.api.scheduler import Scheduler


def take_digest(scheduler: Scheduler, node: NodeId, offers: Mapping[ModelId, Offer]) -> NodeDigest:
    """Return what a node tells of itself now; `offers` are the models of its catalogue, by `ModelSpec.id`.

    `at` is of the scheduler's own clock. Also works while the scheduler closes and afterwards: then the digest says so.
    Raises `SchedulerForked` in a fork.
    """
    broker = scheduler._broker
    slots = scheduler.settings.num_parallel or 1
    digest = broker.query(lambda core: digest_of(scheduler._clock(), core, node, offers, slots))
    over = broker.closing or scheduler._driver.broken is not None
    return replace(digest, closing=True) if over else digest
