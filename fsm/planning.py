"""What to do for those who wait, oldest first, on a scratch account; of the pool, only the lines' words are changed.

Every plan is made from nothing. A victim is a plan until it expires, so whatever becomes idle first serves the waiter,
and a waiter that leaves costs nobody anything. A later line starts only in what the earlier ones leave: backfilling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fsm.commands import DoesNotFit, Refusal, Unsupported
from fsm.eviction import Candidate, EvictionPolicy, choose
from fsm.footprint import Footprint
from fsm.ledger import Placement
from fsm.model import HOST, Amounts, DeviceId, Options
from fsm.options import serves
from fsm.placement import Demand, Gpu, Offload, needed, place
from fsm.pool import Line, Model, Pool, runner_serves
from fsm.request import ModelId, Purpose, Request, Want
from fsm.runner import EXPIRING, LOADING, READY, Runner, RunnerId


@dataclass(frozen=True, slots=True)
class Room:
    """Where the runner that a line waits for goes, or would, and what leaves before."""

    placement: Placement
    free: Amounts  # what it was judged by, by device: free, or to be had once the victims have left
    victims: tuple[Candidate, ...] = ()  # each goes when all of them may


@dataclass(slots=True)
class Plan:
    """What is to be done now, and when to look again."""

    inspections: list[Model] = field(default_factory=list)
    launches: list[tuple[Line, Options, Placement]] = field(default_factory=list)
    memory: list[Request] = field(default_factory=list)  # the program's own, to be granted
    victims: dict[RunnerId, str] = field(default_factory=dict)  # to expire, and why
    matches: list[tuple[Line, Runner]] = field(default_factory=list)  # served after all, as the same
    refusals: list[tuple[Line, Refusal]] = field(default_factory=list)
    rooms: dict[Want, Room] = field(default_factory=dict)  # of what is to be loaded, now, later or never
    wanted: set[RunnerId] = field(default_factory=set)  # busy, and others wait for its memory
    policy_failure: str = ""  # the exception that the policy raised; the oldest runners go first instead
    look_at: float = math.inf  # when a wait's bound or a residency ends


def make_plan(pool: Pool, policy: EvictionPolicy) -> Plan:
    """Return what to do for every line, in order."""
    planner = _Planner(pool, policy)
    planner.shed()
    for line in pool.lines_in_order():
        planner.consider(line)
    return planner.plan


class _Planner:
    def __init__(self, pool: Pool, policy: EvictionPolicy) -> None:
        self.pool = pool
        self.policy = policy
        self.plan = Plan()
        ledger = pool.ledger
        devices = ledger.devices.values()  # in the order in which they were read, which `main_gpu` counts in
        self.gpus = [Gpu(one.id, one.memory, one.instance) for one in devices if one.kind == "gpu"]
        self.free = {one.id: ledger.free_bytes(one.id) for one in devices if not one.integrated}  # at this moment
        expiring = [runner for runner in pool.runners.values() if runner.state is EXPIRING]
        self.leaving = [runner for runner in expiring if pool.now < runner.due_at]  # the others may never end
        self.plan.look_at = min((runner.due_at for runner in self.leaving), default=math.inf)
        self.overdue = {runner.id for runner in expiring if runner not in self.leaving}
        self.stuck = {runner.id for runner in expiring if runner.id in self.overdue and not runner.leases}
        self.total = self._with(self.free, self.leaving)  # with what is on its way out, less what earlier lines need
        movable = [
            runner for runner in pool.runners.values() if not pool.pinned(runner) and runner.id not in self.stuck
        ]
        self.potential = self._with(self.free, movable)
        self.claimed: set[RunnerId] = set()  # victims of earlier lines
        self.planned: set[ModelId] = set()  # models that an earlier line is to get a runner of
        self.places = pool.max_runners() - pool.alive()  # processes that may be started now
        self.places_total = self.places + sum(runner.process for runner in self.leaving)
        self.loading: dict[DeviceId, int] = {}
        loading = [runner for runner in pool.runners.values() if runner.state is LOADING]
        self.awaited = {runner.id for runner in loading if pool.lines_for(runner)}
        for runner in loading:
            self._count_load(runner.placement)

    def shed(self) -> None:
        """Give up idle runners where more are alive, or more is held, than may be; those in use follow when they rest.

        The number counts only where it is set: the automatic one is a rule of thumb that follows the devices, and what
        is not read at the moment may be back at the next.
        """
        limit, ledger, runners = self.pool.limits.max_runners, self.pool.ledger, self.pool.runners
        if limit:
            self._shed(f"no more than {limit} runners may be alive", -self.places_total, dict.fromkeys(runners, 1))
        for device in sorted(ledger.shrunk & ledger.devices.keys()):
            held = {id: ledger.accounts["runner", id].held_bytes(device) for id in runners}
            going = self.claimed.union(runner.id for runner in self.leaving)
            staying = ledger.held_bytes(device) - sum(held[id] for id in going)
            reason = f"there is less memory on {device} than before"
            self._shed(reason, staying - ledger.devices[device].capacity_bytes, held)

    def _shed(self, reason: str, excess: int, worth: Mapping[RunnerId, int]) -> None:
        """Give up as few idle runners as are worth the excess together, or all that are worth something."""
        may = [one for one in self._candidates(None, ()) if not one.leases and worth[one.runner]]
        chosen = choose(may, (), lambda victims: sum(worth[victim.runner] for victim in victims) >= excess)
        victims = self._unclaimed(may if chosen is None else chosen)
        self.plan.victims.update((runner.id, reason) for runner in victims)
        self.claimed.update(runner.id for runner in victims)
        self.total = self._with(self.total, victims)
        self.places_total += sum(runner.process for runner in victims)

    def consider(self, line: Line) -> None:
        """Plan one line."""
        if line.want.purpose is Purpose.memory:
            self._consider_memory(line)
            return
        model = self.pool.models[line.want.model]
        current = model.current
        awaited = current is not None and current.id in self.awaited
        if current is not None and awaited and runner_serves(current, line.want):
            line.waits_for = "its model to load"
            return
        if not model.fresh:
            line.waits_for = "its model's metadata"
            self.plan.inspections.append(model)
            return
        options, demand = model.demand(line.want.options, self.pool.limits)
        if current is not None and (options == current.told or serves(current.options, options)):
            self.plan.matches.append((line, current))
            return
        if (objection := model.impossible(options)) is not None:
            self.plan.refusals.append((line, Unsupported(model.id, *objection)))
            return
        if (offload := self._offload(line, demand, current)) is None:
            return
        if awaited:
            line.waits_for = "a load of its model with other options"
        elif model.id in self.planned:  # it has one runner at a time
            line.waits_for = "an earlier request for its model"
        else:
            self.planned.add(model.id)
            self._consider_runner(line, model, options, demand, offload)

    def _consider_memory(self, line: Line) -> None:
        demand = Demand(Footprint(fixed=line.want.memory))
        for request in line.requests.values():
            if (offload := self._offload(line, demand, None)) is None:
                return
            if place(demand, offload, self._usable(), self.gpus) is None:
                self._make_room(line, demand, offload, (), needs_process=False)
                return
            self.plan.memory.append(request)
            self._take(self.pool.ledger.booked(line.want.memory).items())

    def _consider_runner(self, line: Line, model: Model, options: Options, demand: Demand, offload: Offload) -> None:
        forced = self._forced(model)
        others = [runner for runner in self.pool.runners.values() if runner.id not in self.overdue]
        accompanied = model.alone and not all(map(self.pool.pinned, others))
        if not forced and not accompanied and self.places > 0:
            placement = place(demand, offload, self._usable(), self.gpus)
            if placement and not self._full(placement):
                self.plan.rooms[line.want] = Room(placement, tuple(sorted(self._usable().items())))
                self.plan.launches.append((line, options, placement))
                self._take(placement.bytes)
                self._count_load(placement)
                self.places -= 1
                self.places_total -= 1
                return
        self._make_room(line, demand, offload, forced, needs_process=True)
        if model.alone:
            self.places = 0  # else there might always be somebody beside it

    def _make_room(
        self, line: Line, demand: Demand, offload: Offload, forced: Sequence[Runner], *, needs_process: bool
    ) -> None:
        """Choose what to give up for a line that does not start now, and book what it will need."""

        def suffices(victims: Sequence[Candidate]) -> bool:
            runners = self._unclaimed(victims)
            enough = not needs_process or self.places_total + sum(runner.process for runner in runners) > 0
            return enough and place(demand, offload, self._with(self.total, runners), self.gpus) is not None

        must = [self._candidate(runner, line.head) for runner in forced]
        may = self._candidates(line.head, exclude=forced)
        chosen = choose(may, must, suffices)
        victims = self._unclaimed(chosen or ())
        self.claimed.update(runner.id for runner in victims)
        self.total = self._with(self.total, victims)
        self.places_total += sum(runner.process for runner in victims) - needs_process
        final = place(demand, offload, self.total, self.gpus) or place(demand, offload, self.potential, self.gpus)
        assert final is not None, "a line that can never fit is refused before"
        free = tuple(sorted(self.total.items()))
        for device, amount in needed(final, exact=bool(demand.footprint.fixed)):
            self.total[device] = self.total.get(device, 0) - amount
        if chosen is None:
            line.waits_for = "those before it"
        elif chosen:
            self._commit(line, chosen)
        else:
            chosen = self._wait(line, final)
        self.plan.rooms[line.want] = Room(final, free, tuple(chosen or ()))

    def _commit(self, line: Line, chosen: Sequence[Candidate]) -> None:
        """Give the victims up once all of them may go: none is unloaded for a room that another still holds."""
        at = max(victim.free_at for victim in chosen)
        names = ", ".join(victim.model for victim in chosen)
        if at <= self.pool.now:
            line.waits_for = f"{names} to leave"
            reason = f"{line.want.model or 'the program'} needs its memory"
            for victim in chosen:
                self.plan.victims.setdefault(victim.runner, reason)
            return
        line.waits_for = f"{names} to become idle"
        self.plan.look_at = min(self.plan.look_at, at)
        self.plan.wanted.update(victim.runner for victim in chosen if victim.leases)

    def _wait(self, line: Line, placement: Placement) -> Sequence[Candidate]:
        """Enough is on its way already, or only a place among the loads is missing: give up a load nobody waits for."""
        draining = [runner.model for runner in self.pool.runners.values() if runner.state is EXPIRING and runner.leases]
        line.waits_for = f"{', '.join(draining)} to finish" if draining else "memory that is on its way back"
        full = self._full(placement)
        if line.want.purpose is not Purpose.memory and not draining:
            self._count_load(placement)  # it starts in a moment: its place among the loads is not for younger ones
        if full:
            line.waits_for = "another load to end"
            for runner in self.pool.runners.values():
                unwanted = runner.state is LOADING and runner.id not in self.claimed | self.awaited
                if unwanted and not self.pool.pinned(runner) and full & set(self._loading_on(runner.placement)):
                    self.plan.victims[runner.id] = f"{line.want.model} needs its place among the loads"
                    self.claimed.add(runner.id)
                    return [self._candidate(runner, line.head)]
        return ()

    def _offload(self, line: Line, demand: Demand, current: Runner | None) -> Offload | None:
        """Return the best way that is possible at all; None: the line is refused, since there is none."""
        reload_pinned = current is not None and self.pool.pinned(current)
        if not reload_pinned and not self._no_place_ever(line):
            for offload in demand.offloads(self.gpus):
                if place(demand, offload, self.potential, self.gpus):
                    return offload
        self.plan.refusals.append((line, self._refusal(line, demand)))
        return None

    def _no_place_ever(self, line: Line) -> bool:
        taken = sum(self.pool.pinned(runner) for runner in self.pool.runners.values()) + len(self.stuck)
        return line.want.purpose is not Purpose.memory and taken >= self.pool.max_runners()

    def _refusal(self, line: Line, demand: Demand) -> DoesNotFit:
        everything = self._with(self.free, self.pool.runners.values())
        capacity = {device: self.pool.ledger.devices[device].capacity_bytes for device in self.free}
        offload, need = self._least_lacking(demand, dict.fromkeys((*capacity, HOST), 2**62))
        if need is not None:
            self.plan.rooms[line.want] = Room(need, tuple(sorted(self.potential.items())))
        pins = sorted({runner.model for runner in self.pool.runners.values() if self.pool.pinned(runner)})
        stuck = sorted({self.pool.runners[id].model for id in self.stuck})
        devices = self.pool.ledger.devices
        unknown = sorted({device for device, _ in demand.footprint.fixed} - devices.keys())
        if unknown:
            reason = f"there is no device {unknown[0]!r}; there is {', '.join(devices) or 'none'}"
        elif stuck and place(
            demand, offload, self._with(self.potential, map(self.pool.runners.__getitem__, self.stuck)), self.gpus
        ):
            reason = f"its memory is held by what was stopped and does not end: {', '.join(stuck)}"
        elif place(demand, offload, everything, self.gpus) and pins:
            reason = f"it would fit only by moving what is pinned: {', '.join(pins)}"
        elif place(demand, offload, capacity, self.gpus):
            reason = "other programs, or the program's own reservations, hold the memory"
        elif not self.gpus and offload is not Offload.none:
            reason = f"{'a GPU is required' if demand.require_gpu else 'it is to be on GPUs'}, and there is none"
        else:
            reason = "it is larger than the memory there is"
        amounts = needed(need, exact=bool(demand.footprint.fixed)) if need else demand.footprint.fixed
        return DoesNotFit(line.want.model, amounts, tuple(sorted(self.potential.items())), reason)

    def _least_lacking(self, demand: Demand, boundless: dict[DeviceId, int]) -> tuple[Offload, Placement | None]:
        """Return the way to place it that lacks least, and what it would need."""

        def lacking_bytes(need: Placement | None) -> int:
            exact = bool(demand.footprint.fixed)
            amounts = needed(need, exact=exact) if need else ()
            return sum(max(0, amount - self.potential.get(device, 0)) for device, amount in amounts)

        ways = [(offload, place(demand, offload, boundless, self.gpus)) for offload in demand.offloads(self.gpus)]
        return min((way for way in ways if way[1]), key=lambda way: lacking_bytes(way[1]), default=ways[-1])

    def _forced(self, model: Model) -> list[Runner]:
        """Return what must go whatever fits: the model's own runner with other options; after out of memory, all."""
        if model.alone:
            runners = [runner for runner in self.pool.runners.values() if runner.current]
            return [runner for runner in runners if runner.id not in self.awaited and not self.pool.pinned(runner)]
        return [model.current] if model.current is not None else []

    def _candidates(self, head: Request | None, exclude: Sequence[Runner]) -> list[Candidate]:
        """Return what may be given up for `head`, the first choice first: loads nobody wants, idle, busy."""
        runners = [
            runner
            for runner in self.pool.runners.values()
            if runner.current and runner.id not in self.claimed | self.awaited
            and runner not in exclude and not self.pool.pinned(runner)
        ]  # fmt: skip
        candidates = [self._candidate(runner, head) for runner in runners]
        try:
            preferred = self.policy.order(self.pool.now, list(candidates))
            # each of them once: one left out may be all that could make room, and who waits for it would for ever
            ordered = [one for one in dict.fromkeys((*preferred, *candidates)) if one in candidates]
        except Exception as error:  # a policy may be the user's own
            self.plan.policy_failure = repr(error)
            ordered = list(candidates)
        return sorted(ordered, key=lambda candidate: (candidate.leases > 0, candidate.free_at > self.pool.now))

    def _candidate(self, runner: Runner, head: Request | None) -> Candidate:
        bound = -math.inf
        if head is not None and runner.state is READY:
            bound = head.queued_at + self.pool.limits.max_wait_s
        account = self.pool.ledger.accounts["runner", runner.id]
        return Candidate(
            runner.id, runner.model, sum(map(account.held_bytes, self.pool.ledger.devices)), runner.keep_alive_s,
            runner.used_at, self.pool.models[runner.model].load_s if runner.loaded_at is not None else None,
            len(runner.leases), max(self.pool.now, bound, runner.resident_until),
        )  # fmt: skip

    def _unclaimed(self, victims: Iterable[Candidate]) -> list[Runner]:
        """Return the runners that no earlier line counts on; a forced one may be such a line's victim already."""
        return [self.pool.runners[victim.runner] for victim in victims if victim.runner not in self.claimed]

    def _with(self, free: dict[DeviceId, int], runners: Iterable[Runner]) -> dict[DeviceId, int]:
        accounts = [self.pool.ledger.accounts["runner", runner.id] for runner in runners]
        return {device: amount + sum(one.held_bytes(device) for one in accounts) for device, amount in free.items()}

    def _usable(self) -> dict[DeviceId, int]:
        return {device: min(amount, self.total[device]) for device, amount in self.free.items()}

    def _take(self, amounts: Iterable[tuple[DeviceId, int]]) -> None:
        for device, amount in amounts:
            self.free[device] = self.free.get(device, 0) - amount
            self.total[device] = self.total.get(device, 0) - amount

    def _loading_on(self, placement: Placement) -> list[DeviceId]:
        return [device for device, amount in placement.bytes if device != HOST and amount] or [HOST]

    def _count_load(self, placement: Placement) -> None:
        for device in self._loading_on(placement):
            self.loading[device] = self.loading.get(device, 0) + 1

    def _full(self, placement: Placement) -> set[DeviceId]:
        """Return the devices on which as many load as may, of those that it loads on."""
        limits = self.pool.limits
        return {
            device
            for device in self._loading_on(placement)
            if self.loading.get(device, 0) >= (limits.loads_on_host if device == HOST else limits.loads_per_gpu)
        }
