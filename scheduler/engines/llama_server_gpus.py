"""Which GPUs a `llama-server` can use, by which names, and the list that it gives of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from scheduler.devices.gpus import CUDA, Gpu, Listed, joined
from scheduler.engines.child_runner import VISIBLE_GPUS, shown
from scheduler.errors.exceptions import EngineMissing
from scheduler.errors.formatting import printable

if TYPE_CHECKING:
    from fsm.domain.devices import DeviceId
    from scheduler.engines.llama_server_binary import Question, ServerBinary, ServerFacts

log = logging.getLogger("loadmaster")

TIMEOUT_S: Final = 20.0  # then a question is given up
AGAIN_S: Final = 1.0  # the list is asked again at most this often
NAMES_S: Final = 60.0  # and this often where drivers have the figures, and only names may have changed
SHARE: Final = 0.25  # of the time, at most, for which a server is asked while decisions wait for readings
WAIT_S: Final = 1.0  # how long a reading waits for the list
PROJECTOR: Final = "MTMD_BACKEND_DEVICE"  # of a process that sees other GPUs too: where its projector goes
# a process whose layers are on the host shows itself no GPU: to wake them takes time and memory
NO_GPUS: Final[Mapping[str, str]] = {VISIBLE_GPUS: "", "GGML_VK_VISIBLE_DEVICES": ""}


class ServerList:
    """The server's list of GPUs, as an `EngineList`: asked once, and anew for a reading that wants its figures."""

    def __init__(self, binary: ServerBinary, clock: Callable[[], float] = time.monotonic) -> None:
        self._binary = binary
        self._clock = clock
        self._wanted = False
        self._entries: tuple[Listed, ...] | None = None  # as last told
        self._told_of: object = None  # the facts that they began with
        self._question: Question | None = None  # that has no answer yet
        self._asked_at = self._again_at = 0.0

    def want(self) -> None:
        """Note that the next reading should have figures of that moment."""
        self._wanted = True

    def read(self, *, figures: bool) -> tuple[tuple[Listed, ...] | None, bool]:
        """Return the entries, None before any were told, and whether they were told for this reading.

        A list that cannot be had leaves the last one, and one that comes late is of the next reading. Blocks for
        `WAIT_S` seconds at most, but for the first question.
        """
        try:
            begun_at, facts = self._clock(), self._binary.facts()
        except EngineMissing:
            return self._entries, False
        except (RuntimeError, OSError) as error:  # closed, in a fork, or no thread or descriptor is left
            log.info("%s was not asked for its GPUs: %s", self._binary.path, error)
            return self._entries, False
        if facts is not self._told_of:
            self._told_of, self._question = facts, None
            self._take(facts.devices, begun_at)
            return self._entries, True
        wait_s = 0.0
        if self._question is None and self._wanted and begun_at >= self._again_at + (0 if figures else NAMES_S):
            self._question, self._asked_at = self._binary.ask_list(), begun_at
            wait_s = WAIT_S if figures else 0.0  # no load waits for names, which seldom change
        fresh = self._question is not None and self._answered(self._question, wait_s)
        return self._entries, fresh

    def _answered(self, question: Question, wait_s: float) -> bool:
        """Wait for an answer, and take it over; return whether it has come, and has a list."""
        if not question.wait(wait_s):
            if self._clock() >= self._asked_at + TIMEOUT_S:
                question.stop()  # its end is an answer without a list
            return False
        self._question = entries = None
        with suppress(EngineMissing):  # the file has gone meanwhile
            entries = self._binary.list_of(question)
        if entries is None:
            self._again_at = self._clock() + NAMES_S
            return False
        self._take(entries, self._asked_at)
        return True

    def _take(self, entries: tuple[Listed, ...], begun_at: float) -> None:
        self._entries, self._wanted, now = entries, False, self._clock()
        self._again_at = now + max(AGAIN_S, (now - begun_at) / SHARE)


class ServerGpus:
    """The GPUs of the machine as one server can use them; any thread may use it."""

    def __init__(self, binary: ServerBinary, gpus: Callable[[], Sequence[Gpu]], *, lists: bool) -> None:
        self._binary = binary
        self._gpus = gpus  # returns those of the last reading
        self._lists = lists  # whether that reading has the server's own names
        self._facts: ServerFacts | None = None  # None: not asked yet

    @property
    def problems(self) -> tuple[str, ...]:
        """The GPUs that the server cannot use, in a sentence; none before it was asked."""
        if (facts := self._facts) is None:
            return ()
        unusable = [gpu.id for gpu in self._named(facts) if not gpu.library]
        if not unusable:
            return ()
        backends = facts.backends
        has = f"it has {', '.join(backends)} only" if backends else "it has no backend for GPUs"
        return (
            f"{printable(self._binary.path)} cannot use {', '.join(unusable)}: {has}, so models go elsewhere; name a "
            "llama-server that was built for these GPUs",
        )

    def usable(self) -> tuple[str, ...] | None:
        """Return the libraries of the GPUs that the server can use; None where there are no GPUs.

        The libraries are those of the reading. One is left out where the server can use only some of its GPUs. Raises
        what `ServerBinary.facts` raises, and may block as long.
        """
        gpus = self._gpus()
        if not gpus:
            return None
        self._facts = facts = self._binary.facts()
        named = {gpu.id for gpu in self._named(facts) if gpu.library}
        return tuple(sorted({gpu.library for gpu in gpus} - {gpu.library for gpu in gpus if gpu.id not in named}))

    def names(self, ids: Iterable[DeviceId]) -> tuple[list[str], Mapping[str, str]]:
        """Return the server's names for GPUs, and the variables with which its process has these names.

        Raises RuntimeError for a GPU that the server does not list any more.
        """
        ids = [*ids]
        if not ids:
            return [], NO_GPUS
        known = {gpu.id: gpu for gpu in self._named(self._binary.facts())}
        if all(known[id].library == CUDA and known[id].cuda_id if id in known else shown([id]) for id in ids):
            return [f"{CUDA}{place}" for place in range(len(ids))], shown(ids)
        found = [known[id].listed if id in known else "" for id in ids]
        if not all(found):
            raise RuntimeError(f"{self._binary.path} does not list all of {', '.join(ids)} any more")
        return found, {PROJECTOR: found[0]}

    def _named(self, facts: ServerFacts) -> Sequence[Gpu]:
        """Return the GPUs of the reading with this server's names and libraries: empty where it cannot use them."""
        if self._lists:
            return self._gpus()
        known = self._gpus()
        own = {gpu.id: gpu for gpu in joined(known, facts.devices, integrated=True).gpus}
        return [own.get(gpu.id, replace(gpu, library="")) for gpu in known]
