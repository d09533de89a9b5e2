"""What may go wrong around a core, and how often: for each seed of a simulation a set of rates of its own.

Each fault is off in about half of all seeds ("swarm"): what only happens while something else does not would stay
hidden if every fault always happened at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from random import Random

SPARED = 0.12  # share of the seeds in which no fault happens
OFF = 0.5  # probability that a fault is off, in each other seed
MOST = 0.6  # no rate is higher


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities, each for one occasion; 0: a seed is spared from it."""

    slow_load: float = 0.0  # a load takes thirty times as long, and shows that it is alive
    failed_load: float = 0.0  # the process ends before it serves
    full_load: float = 0.0  # the process runs out of memory before it serves
    hung_load: float = 0.0  # the process neither serves nor ends
    crash: float = 0.0  # a process that serves ends
    hang: float = 0.0  # a process that serves answers no more
    full: float = 0.0  # a process that serves runs out of memory
    stuck: float = 0.0  # a process that was told to stop does so much later
    swollen: float = 0.0  # a process takes more memory than was reserved for it
    memory_late: float = 0.0  # memory is missing for seconds after its process has gone
    memory_lost: float = 0.0  # or for hours
    strangers: float = 0.0  # other programs take memory, and give it back
    vanishing: float = 0.0  # a GPU is no longer read, and comes back later
    shrinking: float = 0.0  # there is less of a device than before, or more
    stale: float = 0.0  # a device does not answer: its last figures are repeated
    contended: float = 0.0  # a claim has to wait for another program
    unclaimable: float = 0.0  # a claim is never answered
    changed: float = 0.0  # a model's file is another one than before
    bad: float = 0.0  # a model's file is no model, for this once
    gone: float = 0.0  # or is not there
    cancels: float = 0.0  # a request is cancelled
    forgets: float = 0.0  # a lease is released much later
    twice: float = 0.0  # a lease is released twice
    floods: float = 0.0  # many requests come at once
    meddles: float = 0.0  # a model is expired or pinned, limits change, or a runner's event is untrue
    duplicate: float = 0.0  # an event comes once more, perhaps in another life
    gap: float = 0.0  # nothing happens for a long time, and then everything at once; a thousandth of it per event
    closes: float = 0.0  # the scheduler is closed in the middle


def draw_faults(draw: Random) -> Faults:
    """Return the rates of one seed."""
    if draw.random() < SPARED:
        return Faults()
    return Faults(*(0.0 if draw.random() < OFF else MOST * draw.random() ** 3 for _ in fields(Faults)))


def in_words(faults: Faults) -> str:
    """Return the faults that are on, with their rates."""
    on = {field.name: getattr(faults, field.name) for field in fields(Faults)}
    return ", ".join(f"{name} {rate:.3f}" for name, rate in on.items() if rate) or "none"
