"""What to do for those who wait, oldest first, on a scratch account; of the pool, only the lines' words are changed.

Every plan is made from nothing. A victim is a plan until it expires, so whatever becomes idle first serves the waiter,
and a waiter that leaves costs nobody anything. A later line starts only in what the earlier ones leave: backfilling.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from fsm.automatic import is_the_same, wish_of, with_batch
from fsm.candidates import Candidates
from fsm.choosing import MOST_SETS, Amount, Choice, Question, choose
from fsm.commands import Unsupported
from fsm.eviction import Candidate, EvictionPolicy
from fsm.footprint import Footprint
from fsm.ledger import Placement
from fsm.loading import Loads, loads_on
from fsm.model import HOST, DeviceId, Options
from fsm.placement import Demand, Gpu, Offload, needed, place
from fsm.plan import Plan, Room
from fsm.pool import Line, Model, Pool, Turn, runner_serves
from fsm.refusing import why_never
from fsm.request import ModelId, Purpose, Want
from fsm.runner import EXPIRING, LOADING, Runner, RunnerId

NO_MODEL = ModelId("")  # of lines for memory of the program's own
BEFORE, EARLIER = "those before it", "an earlier request for its model"
NOTHING: Mapping[DeviceId, int] = {}
LINES_AHEAD = 16  # for so many lines room is made at a time; those behind only take what is there for the taking


def make_plan(pool: Pool, policy: EvictionPolicy, newcomers: Collection[Want]) -> Plan:
    """Return what to do for the lines, in order, until nothing is left that any of them could have.

    Those behind are not looked at, but for `newcomers`: whoever has just come is judged at once, wherever it stands.
    """
    planner = _Planner(pool, policy)
    planner.shed()
    for line in pool.lines_in_order():
        if planner.exhausted():
            break
        if not planner.follows(line, newcomers):
            planner.consider(line)
    ahead = {line.want for line in planner.plan.looked_at}
    for want in pool.wants.get(NO_MODEL, ()):  # memory of the program's own takes no process's place
        if want not in ahead:
            planner.consider(pool.lines[want])
            ahead.add(want)
    for want in newcomers:
        if want in pool.lines and want not in ahead:
            planner.judge(pool.lines[want], BEFORE)
    planner.plan.policy_failure = planner.candidates.policy_failure
    return planner.plan


class _Planner:
    def __init__(self, pool: Pool, policy: EvictionPolicy) -> None:
        self.pool = pool
        self.plan = Plan()
        ledger = pool.ledger
        devices = ledger.devices.values()  # in the order in which they were read, which `main_gpu` counts in
        self.gpus = [Gpu(one.id, one.memory, one.instance, one.library) for one in devices if one.kind == "gpu"]
        self.free = {one.id: ledger.free_bytes(one.id) for one in devices if not one.integrated}  # at this moment
        expiring = [runner for runner in pool.runners.values() if runner.state is EXPIRING]
        self.leaving = [runner for runner in expiring if not pool.is_overdue(runner)]
        self.plan.look_at = min((one.due_at for one in self.leaving if one.due_at > pool.now), default=math.inf)
        self.overdue = {runner.id for runner in expiring if pool.is_overdue(runner)}
        self.total = self._with(self.free, self.leaving)  # with what is on its way out, less what earlier lines need
        movable = [runner for runner in pool.runners.values() if not pool.is_unmovable(runner)]
        self.potential = self._with(self.free, movable)
        self.unmovable = len(pool.runners) - len(movable)
        self.claimed: set[RunnerId] = set()  # victims of earlier lines
        self.sets_left = MOST_SETS
        self.planned: set[ModelId] = set()  # models that an earlier line is to get a runner of
        self.places = pool.max_runners() - pool.processes  # processes that may be started now
        self.places_total = self.places + sum(runner.process for runner in self.leaving)
        loading = [runner for runner in pool.runners.values() if runner.state is LOADING]
        self.awaited = {runner.id for runner in loading if pool.lines_for(runner)}
        self.loads = Loads(pool.limits, (runner.placement for runner in loading))
        self.candidates = Candidates(pool, policy, self.awaited)
        self.waiting = 0  # lines for which room is to be made
        self.ahead: Counter[DeviceId] = Counter()  # of them, those that lack memory of a device
        self.behind: list[tuple[Turn, Demand, Offload]] = []  # who is not first in a line for memory, in order

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
        may = [one for one in self.candidates.until(-math.inf, self.claimed) if not one.leases and worth[one.runner]]
        choice = self._choose(
            may, (), lambda victims: sum(worth[victim.runner] for victim in victims) >= excess,
            lambda victim: (worth[victim.runner],),
        )  # fmt: skip
        victims = self._unclaimed(may if choice is None else choice.victims)
        self.plan.victims.update((runner.id, reason) for runner in victims)
        self.claimed.update(runner.id for runner in victims)
        self.total = self._with(self.total, victims)
        self.places_total += sum(runner.process for runner in victims)

    def exhausted(self) -> bool:
        """Whether no line behind could have anything: enough wait already, and nothing is free or can be given up."""
        if self.waiting < LINES_AHEAD:
            return False
        idle = [self.pool.runners[id] for id in self.candidates.idle - self.claimed]
        if self.places_total + sum(runner.process for runner in idle) <= 0:
            return True
        total = self._with(self.total, idle)
        return all(amount <= 0 and self.ahead[device] >= LINES_AHEAD for device, amount in total.items())

    def follows(self, line: Line, newcomers: Collection[Want]) -> bool:
        """Tell whether a line is behind another for its model, and has been judged before: that one goes first."""
        if line.want.model not in self.planned or line.want in newcomers:
            return False
        current = self.pool.models[line.want.model].current
        if current is not None and current.id in self.awaited and runner_serves(current, line.want):
            return False
        line.wait(EARLIER)
        return True

    def consider(self, line: Line) -> None:
        """Plan one line."""
        self._book_older(line)
        if (judged := self.judge(line)) is None:
            return
        options, demand, offload = judged
        if line.want.purpose is Purpose.memory:
            self._consider_memory(line, demand, offload)
            return
        model = self.pool.models[line.want.model]
        if model.id in self.planned:  # it has one runner at a time
            line.wait(EARLIER)
            return
        self.planned.add(model.id)
        if model.current is not None and model.current.id in self.awaited:
            line.wait("a load of its model with other options", self.pool.expected_at(model.current))
            own = self.pool.ledger.accounts["runner", model.current.id]  # which makes room for it in the end
            self._book(demand, offload, {device: own.held_bytes(device) for device in self.total})
        else:
            self._consider_runner(line, model, options, demand, offload)

    def judge(self, line: Line, waits_for: str = "") -> tuple[Options, Demand, Offload] | None:
        """Return what a line needs and the best way to place it; None where that is not the question, or is unknown.

        Then it is refused, or served as it is, or waits for its model's load or metadata.
        """
        self.plan.looked_at.append(line)
        if waits_for:
            line.wait(waits_for)
        if line.want.purpose is Purpose.memory:
            options, demand, current = line.want.options, Demand(Footprint(fixed=line.want.memory)), None
        else:
            model = self.pool.models[line.want.model]
            current = model.current
            if current is not None and current.id in self.awaited and runner_serves(current, line.want):
                line.wait("its model to load", self.pool.expected_at(current))
                return None
            if not model.fresh:
                line.wait("its model's metadata")
                self.plan.inspections.append(model)
                return None
            options, demand = wish_of(model, line.want.options, self.pool, self.potential, self.gpus)
            self.plan.options[line.want] = options
            if current is not None and is_the_same(current, options, line.want.options):
                self.plan.matches.append((line, current))
                return None
            if (objection := model.impossible(options)) is not None:
                self.plan.refusals.append((line, Unsupported(model.id, *objection)))
                return None
        offload = self._offload(line, demand, current)
        return None if offload is None else (options, demand, offload)

    def _consider_memory(self, line: Line, demand: Demand, offload: Offload) -> None:
        head, *others = line.requests.values()  # each is as old as it is: once the first has it the next is first
        self.behind += [(self.pool.turn(request), demand, offload) for request in others]
        self.behind.sort(key=lambda one: one[0])
        if place(demand, offload, self._usable(), self.gpus) is None:
            self._make_room(line, demand, offload, (), needs_process=False)
        else:
            self.plan.memory.append(head)
            self._take(self.pool.ledger.booked(line.want.memory).items())

    def _book_older(self, line: Line) -> None:
        """Book what those will need who are not first in a line for memory, and came before this line."""
        while self.behind and self.behind[0][0] < self.pool.turn(line.head):
            _, demand, offload = self.behind.pop(0)
            self._book(demand, offload)

    def _book(self, demand: Demand, offload: Offload, own: Mapping[DeviceId, int] = NOTHING) -> Placement:
        """Take what somebody will need, beyond what its own runner holds, out of what younger ones may have."""
        total = {device: amount + own.get(device, 0) for device, amount in self.total.items()}
        final = place(demand, offload, total, self.gpus) or place(demand, offload, self.potential, self.gpus)
        assert final is not None, "a line that can never fit is refused before"
        for device, amount in needed(final, exact=bool(demand.footprint.fixed)):
            self.total[device] = self.total.get(device, 0) - max(0, amount - own.get(device, 0))
        return final

    def _consider_runner(self, line: Line, model: Model, options: Options, demand: Demand, offload: Offload) -> None:
        forced = self._forced(model)
        others = [runner for runner in self.pool.runners.values() if runner.id not in self.overdue]
        accompanied = model.alone and not all(map(self.pool.pinned, others))
        if not forced and not accompanied and min(self.places, self.places_total) > 0:
            placement = self.loads.place(demand, offload, self._usable(), self.gpus)
            if placement is not None:
                asked, planned = line.want.options, (options, placement)
                options, placement = with_batch(model, asked, self.pool.limits, planned, self._usable(), self.gpus)
                self.plan.options[line.want] = options
                self.plan.rooms[line.want] = Room(placement, tuple(sorted(self._usable().items())))
                self.plan.launches.append((line, options, placement))
                self._take(placement.bytes)
                self.loads.add(placement)
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

        bound = self._bound(line)
        must = [self.candidates.candidate(runner, bound) for runner in forced]
        taken = self.claimed.union(runner.id for runner in forced)
        may = self.candidates.until(bound, taken) if not suffices(must) else []
        self.waiting += 1
        before, memories = dict(self.total), self._memories(demand, offload)
        where = [device for device in memories if device != HOST] or memories
        if all(self.ahead[device] >= LINES_AHEAD for device in where):  # far back: it is given what nobody uses
            may = [one for one in may if one.runner in self.candidates.idle]
        lacking = 1 - self.places_total - sum(one.process for one in self._unclaimed(must)) if needs_process else 0
        choice = self._choose(may, must, suffices, self._frees(memories), max(0, lacking))
        chosen: Sequence[Candidate] | None = self.candidates.timed(bound, choice.victims) if choice else None
        victims = self._unclaimed(chosen or ())
        self.claimed.update(runner.id for runner in victims)
        self.total = self._with(self.total, victims)
        self.places_total += sum(runner.process for runner in victims) - needs_process
        free = tuple(sorted(self.total.items()))
        final = self._book(demand, offload)
        self.ahead.update(device for device, amount in final.bytes if amount > before.get(device, 0))
        if chosen is None:
            line.wait(*self._hindrance())
        elif chosen:
            self._commit(line, chosen, may)
        else:
            chosen = self._wait(line, final, startable=place(demand, offload, self.free, self.gpus) is not None)
        self.plan.rooms[line.want] = Room(final, free, tuple(chosen or ()), tuple(may), choice)

    def _commit(self, line: Line, chosen: Sequence[Candidate], may: Sequence[Candidate]) -> None:
        """Give the victims up once all of them may go: none is unloaded for a room that another still holds.

        Whenever another may go, the choice is made again: whoever may first serves the waiter.
        """
        at = max(victim.free_at for victim in chosen)
        names = ", ".join(victim.model for victim in chosen)
        if at <= self.pool.now:
            line.wait(f"{names} to leave")
            reason = f"{line.want.model or 'the program'} needs its memory"
            for victim in chosen:
                self.plan.victims.setdefault(victim.runner, reason)
            return
        line.wait(f"{names} to become idle", at)
        moments = (at, self._bound(line), *(one.free_at for one in may))
        self.plan.look_at = min(self.plan.look_at, *(moment for moment in moments if moment > self.pool.now))
        self.plan.wanted.update(victim.runner for victim in chosen if victim.leases)

    def _hindrance(self) -> tuple[str, float]:
        """Return why nobody can be chosen to make room, in words, and until when as far as that is known."""
        runners = self.pool.runners
        if self.waiting > 1:
            return BEFORE, math.inf
        if self.overdue:
            return f"{', '.join(runners[id].model for id in sorted(self.overdue))} to finish", math.inf
        loads = [runners[id] for id in sorted(self.awaited)]
        until = min(map(self.pool.expected_at, loads), default=math.inf)
        return f"{', '.join(load.model for load in loads)} to load, and then to become idle" if loads else BEFORE, until

    def _wait(self, line: Line, placement: Placement, *, startable: bool) -> Sequence[Candidate]:
        """Enough is on its way already, or only a place among the loads is missing: give up a load nobody waits for."""
        ledger, devices = self.pool.ledger, [device for device, amount in placement.bytes if amount]
        draining = [
            runner.model
            for runner in self.leaving
            if runner.leases and any(map(ledger.accounts["runner", runner.id].held_bytes, devices))
        ]
        by = min((runner.due_at for runner in self.leaving if runner.due_at > self.pool.now), default=math.inf)
        if draining or self.leaving:
            line.wait(f"{', '.join(draining)} to finish" if draining else "memory that is on its way back", by)
        else:
            line.wait(*self._hindrance())
        full = self.loads.full(placement)
        if line.want.purpose is Purpose.memory:
            return ()
        if not draining:
            self.loads.add(placement)  # it starts in a moment: its place among the loads is not for younger ones
        on_full = [
            runner
            for runner in self.pool.runners.values()
            if runner.state is LOADING and full & set(loads_on(runner.placement))
        ]
        if full and not draining:
            line.wait("another load to end", min(map(self.pool.expected_at, on_full), default=math.inf))
        for runner in on_full if startable else ():
            if runner.id not in self.claimed | self.awaited and not self.pool.pinned(runner):
                self.plan.victims[runner.id] = f"{line.want.model} needs its place among the loads"
                self.claimed.add(runner.id)
                return [self.candidates.candidate(runner, self._bound(line))]
        return ()

    def _offload(self, line: Line, demand: Demand, current: Runner | None) -> Offload | None:
        """Return the best way that is possible at all; None: the line is refused, since there is none."""
        reload_pinned = current is not None and self.pool.pinned(current)
        if not reload_pinned and not self._no_place_ever(line):
            for offload in demand.offloads(self.gpus):
                if place(demand, offload, self.potential, self.gpus):
                    return offload
        refusal, need = why_never(self.pool, self.gpus, line.want.model, demand, self.potential)
        if need is not None:
            self.plan.rooms[line.want] = Room(need, tuple(sorted(self.potential.items())))
        self.plan.refusals.append((line, refusal))
        return None

    def _no_place_ever(self, line: Line) -> bool:
        return line.want.purpose is not Purpose.memory and self.unmovable >= self.pool.max_runners()

    def _forced(self, model: Model) -> list[Runner]:
        """Return what must go whatever fits: the model's own runner with other options; after out of memory, all."""
        if model.alone:
            runners = [runner for runner in self.pool.runners.values() if runner.current]
            return [runner for runner in runners if runner.id not in self.awaited and not self.pool.pinned(runner)]
        return [model.current] if model.current is not None else []

    def _bound(self, line: Line) -> float:
        """Return until when a line waits for others' convenience."""
        return line.head.queued_at + self.pool.limits.max_wait_s

    def _choose(
        self,
        may: Sequence[Candidate],
        must: Sequence[Candidate],
        suffices: Callable[[Sequence[Candidate]], bool],
        frees: Callable[[Candidate], Amount],
        least: int = 0,
    ) -> Choice | None:
        question = Question(suffices, frees, least, max(0, self.sets_left))
        choice = choose(self.pool.now, may, must, question)
        self.sets_left -= choice.tried if choice else 0
        return choice

    def _memories(self, demand: Demand, offload: Offload) -> list[DeviceId]:
        """Return where what is demanded may come to lie."""
        if demand.footprint.fixed:
            return sorted(self.pool.ledger.booked(demand.footprint.fixed))
        return [HOST] if offload is Offload.none else list(self.free)

    def _frees(self, memories: Sequence[DeviceId]) -> Callable[[Candidate], Amount]:
        """Return what tells how much a candidate frees of each memory."""
        accounts = self.pool.ledger.accounts
        return lambda victim: tuple(map(accounts["runner", victim.runner].held_bytes, memories))

    def _unclaimed(self, victims: Iterable[Candidate]) -> list[Runner]:
        """Return the runners that no earlier line counts on; a forced one may be such a line's victim already."""
        return [self.pool.runners[victim.runner] for victim in victims if victim.runner not in self.claimed]

    def _with(self, free: dict[DeviceId, int], runners: Iterable[Runner]) -> dict[DeviceId, int]:
        return self.pool.ledger.freed(free, [("runner", runner.id) for runner in runners])

    def _usable(self) -> dict[DeviceId, int]:
        return {device: min(amount, self.total[device]) for device, amount in self.free.items()}

    def _take(self, amounts: Iterable[tuple[DeviceId, int]]) -> None:
        for device, amount in amounts:
            self.free[device] = self.free.get(device, 0) - amount
            self.total[device] = self.total.get(device, 0) - amount
