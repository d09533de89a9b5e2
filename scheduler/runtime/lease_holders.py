"""Which leases each thread and each asyncio task holds, so that a request which would wait for its own caller is told.

A lease belongs to the thread or task that it was granted in, and from `with` on to the one that entered it. A lease
that may be released by another thread or task while its holder waits is never counted on: one with an open stream, one
with a callback, and one that others can reach.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from types import CellType
from typing import NamedTuple, Protocol
from weakref import ReferenceType, ref

from fsm.machine.request import RequestId

_OWN_THREADS = "loadmaster-"  # how names of the scheduler's own threads begin
_OWN_REFERENCES = 2  # to a lease in a `with` block: that of the block, and a name


class HeldLease(Protocol):
    """A lease, as far as it matters here."""

    def _kept(self) -> bool:
        """Tell whether the lease is released by its holder alone, as far as the lease knows."""


class Held(NamedTuple):
    """The leases that an asker holds, and those of them that it keeps until it has an answer."""

    holds: tuple[RequestId, ...] = ()
    keeps: tuple[RequestId, ...] = ()


NOTHING_HELD = Held()


def this_asker() -> object:
    """Return what stands for the asyncio task that runs here, and does not keep it alive, or else for this thread."""
    loop = asyncio._get_running_loop()
    task = asyncio.current_task(loop) if loop is not None else None
    return threading.get_ident() if task is None else ref(task)


class LeaseHolders:
    """The leases of each thread and task, by the requests that they were granted for."""

    def __init__(self) -> None:
        self._leases: dict[object, dict[RequestId, ReferenceType[HeldLease]]] = {}

    def hold(self, asker: object, id: RequestId, lease: HeldLease) -> None:
        """Note that a thread or task holds a lease."""
        self._leases.setdefault(asker, {})[id] = ref(lease)

    def drop(self, asker: object, id: RequestId) -> None:
        """Forget that a lease is held; harmless where it is not."""
        held = self._leases.get(asker)
        if held is not None:
            held.pop(id, None)
            if not held:
                self._leases.pop(asker, None)

    def held(self, asker: object) -> Held:
        """Return the leases of a thread or task."""
        if (held := self._leases.get(asker)) is None:
            return NOTHING_HELD
        leases = [(id, lease) for id, one in list(held.items()) if (lease := one()) is not None]
        return Held(tuple([id for id, _ in leases]), tuple([id for id, lease in leases if lease._kept()]))

    def are_out_of_reach(self, keeps: tuple[RequestId, ...]) -> bool:
        """Tell whether nothing but the blocks that this thread or task is in can release the leases that it keeps.

        A lease that is referred to more often than by its block and one name may have been handed on. So may a lease
        that a function inside another, or of its module, can name, where other threads or tasks are there to call it.
        """
        held = self._leases.get(this_asker(), {})
        alone = _alone()
        for one in [held[id] for id in keeps if id in held]:
            if (lease := one()) is None:
                return False
            if sys.getrefcount(lease) - _uncounted() > _OWN_REFERENCES:
                return False
            if not alone and any(map(_is_a_shared_name, gc.get_referrers(lease))):
                return False
        return True


def _uncounted() -> int:
    """Return how many references `sys.getrefcount` counts of an object that nothing but a local name refers to."""
    lease = object()
    return sys.getrefcount(lease)


def _is_a_shared_name(referrer: object) -> bool:
    return isinstance(referrer, CellType) or (isinstance(referrer, dict) and "__builtins__" in referrer)


def _alone() -> bool:
    """Tell whether the program has no other thread, and no other task in this thread's loop."""
    this = threading.current_thread()
    others = [one for one in threading.enumerate() if one is not this and not one.name.startswith(_OWN_THREADS)]
    loop = asyncio._get_running_loop()
    return not others and (loop is None or len(asyncio.all_tasks(loop)) <= 1)
