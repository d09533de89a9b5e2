"""What to do for those who wait, oldest first, on a scratch account; of the pool, only why lines wait is changed.

Every plan is made from nothing. A victim is a plan until it expires, so whatever becomes idle first serves the waiter,
and a waiter that leaves costs nobody anything. A later line starts only in what the earlier ones leave (`supply`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial

from fsm.domain.devices import HOST, DeviceId, Placement
from fsm.domain.model_info import Options
from fsm.eviction.policies import Candidate, EvictionPolicy
from fsm.eviction.victim_selection import MOST_SETS, Amount, SelectionProblem, VictimSet, choose_victims
from fsm.machine.request import ModelId, Purpose, RequestSpec
from fsm.machine.runner import EXPIRING, LOADING, Runner, RunnerId
from fsm.messages.reasons import DeviceShrunk, NeededFor, RunnerLimit, RunnerStep, WaitFor, WaitForRunners, WaitReason
from fsm.messages.refusals import UnsupportedOption
from fsm.placement.search import Gpu, Offload, PlacementDemand
from fsm.planning.automatic_options import resolved_demand, with_batch
from fsm.planning.availability import DRAINED, LATER, NOW, SOON, AvailabilityProfile, Requirement
from fsm.planning.eviction_candidates import Candidates
from fsm.planning.infeasibility import infeasible_reason
from fsm.planning.load_slots import LoadSlots, loads_on
from fsm.planning.plan import Plan, PlannedPlacement
from fsm.sizing.footprint import Footprint
from fsm.state.core_state import CoreState
from fsm.state.model_record import ModelRecord
from fsm.state.request_queue import RequestGroup
from fsm.state.runner_match import match

NO_MODEL = ModelId("")  # of lines for memory of the program's own
LINES_AHEAD = 16  # for so many lines room is made at a time; those behind only take what is there for the taking


def make_plan(state: CoreState, policy: EvictionPolicy, newcomers: Collection[RequestSpec]) -> Plan:
    """Return what to do for the lines, in order, until nothing is left that any of them could have.

    Those behind are not looked at, but for `newcomers`: whoever has just come is judged at once, wherever it stands.
    """
    planner = _Planner(state, policy)
    planner.evict_excess()
    for group in state.groups_in_order():
        if planner.nothing_left():
            break
        if not planner.is_behind_same_model(group, newcomers):
            planner.plan_group(group)
    ahead = {group.spec for group in planner.plan.evaluated}
    for spec in state.specs_by_model.get(NO_MODEL, ()):  # memory of the program's own takes no process's place
        if spec not in ahead:
            planner.plan_group(state.groups[spec])
            ahead.add(spec)
    for spec in newcomers:
        if spec in state.groups and spec not in ahead:
            planner.evaluate(state.groups[spec], WaitFor.earlier_requests)
    planner.plan.policy_failure = planner.candidates.policy_failure
    return planner.plan


class _Planner:
    def __init__(self, state: CoreState, policy: EvictionPolicy) -> None:
        self.pool = state
        self.plan = Plan()
        ledger = state.ledger
        devices = ledger.devices.values()  # in the order in which they were read, which `main_gpu` counts in
        self.gpus = [Gpu(one.id, one.memory, one.instance, one.library) for one in devices if one.kind == "gpu"]
        expiring = [runner for runner in state.runners.values() if runner.state is EXPIRING]
        self.leaving = [runner for runner in expiring if not state.is_overdue(runner)]
        self.plan.replan_at = min(
            (one.stop_deadline for one in self.leaving if one.stop_deadline > state.now), default=math.inf
        )
        self.overdue = {runner.id for runner in expiring if state.is_overdue(runner)}
        movable = [runner for runner in state.runners.values() if not state.is_unmovable(runner)]
        self.availability = AvailabilityProfile(ledger, self.gpus, state.max_runners() - state.processes, movable)
        self.availability.add(SOON, [runner for runner in self.leaving if not runner.leases])
        self.availability.add(DRAINED, [runner for runner in self.leaving if runner.leases])
        self.unmovable = len(state.runners) - len(movable)
        self.claimed: set[RunnerId] = set()  # victims of earlier lines
        self.sets_left = MOST_SETS
        self.successors: Counter[ModelId] = Counter()  # lines for a model behind the first of them
        self.loading = [runner for runner in state.runners.values() if runner.state is LOADING]
        self.awaited = {runner.id for runner in self.loading if state.groups_served_by(runner)}
        self.alone = next((runner for runner in self.loading if state.models[runner.model].load_exclusively), None)
        if self.alone is not None:
            self.availability.process_slots[NOW] = 0  # nobody begins beside it
        self.load_slots = LoadSlots(state.config, (runner.placement for runner in self.loading))
        self.candidates = Candidates(state, policy, self.awaited)
        self.waiting = 0  # lines for which room is to be made
        self.ahead: Counter[DeviceId] = Counter()  # of them, those that lack memory of a device

    def evict_excess(self) -> None:
        """Give up idle runners where more are alive, or more is held, than may be; those in use follow when they rest.

        The number counts only where it is set: the automatic one is a rule of thumb that follows the devices, and what
        is not read at the moment may be back at the next.
        """
        limit, ledger, runners = self.pool.config.max_runners, self.pool.ledger, self.pool.runners
        if limit:
            self._shed(RunnerLimit(limit), -self.availability.process_slots[LATER], dict.fromkeys(runners, 1))
        for device in sorted(ledger.overcommitted & ledger.devices.keys()):
            held = {id: ledger.accounts["runner", id].held_bytes(device) for id in runners}
            going = self.claimed.union(runner.id for runner in self.leaving)
            staying = ledger.held_bytes(device) - sum(held[id] for id in going)
            self._shed(DeviceShrunk(device), staying - ledger.devices[device].capacity_bytes, held)

    def _shed(self, reason: RunnerLimit | DeviceShrunk, excess: int, worth: Mapping[RunnerId, int]) -> None:
        """Give up as few idle runners as are worth the excess together, or all that are worth something."""
        may = [
            one
            for one in self.candidates.evictable_until(-math.inf, self.claimed)
            if not one.leases and worth[one.runner]
        ]
        choice = self._choose(
            may, (), lambda victims: sum(worth[victim.runner] for victim in victims) >= excess,
            lambda victim: (worth[victim.runner],),
        )  # fmt: skip
        victims = self._unclaimed(may if choice is None else choice.victims)
        self.plan.victims.update((runner.id, reason) for runner in victims)
        self.claimed.update(runner.id for runner in victims)
        self.availability.add(SOON, victims)

    def nothing_left(self) -> bool:
        """Whether no line behind could have anything: enough wait already, and nothing is free or can be given up."""
        if self.waiting < LINES_AHEAD:
            return False
        idle = [self.pool.runners[id] for id in self.candidates.idle - self.claimed]
        if self.availability.process_slots[DRAINED] + sum(runner.process for runner in idle) <= 0:
            return True
        there = self.availability.available_after(DRAINED, idle)
        return all(amount <= 0 and self.ahead[device] >= LINES_AHEAD for device, amount in there.items())

    def is_behind_same_model(self, group: RequestGroup, newcomers: Collection[RequestSpec]) -> bool:
        """Tell whether a line is far behind others for its model, and has been judged before: those go first."""
        if self.successors[group.spec.model] < LINES_AHEAD or group.spec in newcomers:
            return False
        current = self.pool.models[group.spec.model].current
        if current is not None and current.id in self.awaited and match(current, group.spec.options):
            return False
        group.wait(WaitFor.same_model)
        return True

    def plan_group(self, group: RequestGroup) -> None:
        """Plan one line."""
        self.availability.reserve_earlier(self.pool.rank(group.head))
        if (judged := self.evaluate(group)) is None:
            return
        options, need = judged
        if group.spec.purpose is Purpose.memory:
            self._consider_memory(group, need)
            return
        model = self.pool.models[group.spec.model]
        if model.id in self.availability.reserved_by_model:  # it has one runner at a time
            group.wait(WaitFor.same_model)
            self.successors[model.id] += 1
            self.availability.reserve_successor(model.id, need)
        elif model.current is not None and model.current.id in self.awaited:
            group.wait(WaitFor.other_load, self.pool.expected_at(model.current))
            self.availability.reserved_by_model[model.id] = self.availability.held_by(model.current)
            self.availability.reserve_successor(model.id, need)
        else:
            self._consider_runner(group, model, options, need)

    def evaluate(self, group: RequestGroup, waits_for: WaitReason | None = None) -> tuple[Options, Requirement] | None:
        """Return what a line needs and the best way to place it; None where that is not the question, or is unknown.

        Then it is refused, or served as it is, or waits for its model's load or metadata.
        """
        self.plan.evaluated.append(group)
        if waits_for:
            group.wait(waits_for)
        if group.spec.purpose is Purpose.memory:
            options, demand, current = group.spec.options, PlacementDemand(Footprint(fixed=group.spec.memory)), None
        else:
            model = self.pool.models[group.spec.model]
            current = model.current
            if current is not None and current.id in self.awaited and match(current, group.spec.options):
                group.wait(WaitFor.load, self.pool.expected_at(current))
                return None
            if not model.inspected_since_launch:
                group.wait(WaitFor.metadata)
                self.plan.inspections.append(model)
                if model.info is not None and not waits_for and len(self.pool.groups) > 1:
                    self._reserve_stale_estimate(model, group.spec.options)
                return None
            options, demand = resolved_demand(
                model, group.spec.options, self.pool, self.availability.potential, self.gpus
            )
            self.plan.options[group.spec] = options
            if current is not None and match(current, group.spec.options, options):
                self.plan.matches.append((group, current))
                return None
            if (objection := model.impossible(options)) is not None:
                self.plan.refusals.append((group, UnsupportedOption(model.id, *objection)))
                return None
        offload = self._offload(group, demand, current)
        return (
            None
            if offload is None
            else (options, Requirement(demand, offload, group.spec.purpose is not Purpose.memory))
        )

    def _consider_memory(self, group: RequestGroup, need: Requirement) -> None:
        head, *others = group.requests.values()  # each is as old as it is: once the first has it the next is first
        self.availability.queued_members = sorted(
            [*self.availability.queued_members, *((self.pool.rank(request), need) for request in others)],
            key=lambda one: one[0],
        )
        if self.availability.find_placement(NOW, need) is None:
            self._plan_eviction(group, need, ())
        else:
            self.plan.memory.append(head)
            self.availability.reserve(NOW, tuple(self.pool.ledger.by_memory(group.spec.memory).items()), 0)

    def _reserve_stale_estimate(self, model: ModelRecord, asked: Options) -> None:
        """Book what a model will need by what was last read of it: it may have changed, but most likely it has not."""
        _, demand = resolved_demand(model, asked, self.pool, self.availability.potential, self.gpus)
        if (offload := self.availability.best_offload(demand)) is not None:
            self.availability.reserved_by_model.setdefault(model.id, self.availability.held_by(model.current))
            self.availability.reserve_successor(model.id, Requirement(demand, offload))

    def _consider_runner(self, group: RequestGroup, model: ModelRecord, options: Options, need: Requirement) -> None:
        forced = self._mandatory_victims(model)
        others = [runner for runner in self.pool.runners.values() if runner.id not in self.overdue]
        accompanied = model.load_exclusively and bool(self.plan.launches or not all(map(self.pool.pinned, others)))
        places = self.availability.process_slots[NOW]
        if model.load_exclusively:
            self.availability.process_slots[NOW] = 0  # nobody begins beside it; else there might always be somebody
        if not forced and not accompanied and places > 0:
            free = self.availability.bytes[NOW]
            placement = self.load_slots.find_placement(need.demand, need.offload, free, self.gpus)
            if placement is not None:
                asked, planned = group.spec.options, (options, placement)
                options, placement = with_batch(model, asked, self.pool.config, planned, free, self.gpus)
                self.plan.options[group.spec] = options
                self.plan.placements[group.spec] = PlannedPlacement(placement, tuple(sorted(free.items())))
                self.plan.launches.append((group, options, placement))
                self.availability.reserve(NOW, placement.bytes, 1)
                self.availability.reserved_by_model[model.id] = dict(placement.bytes)
                self.load_slots.add(placement)
                return
        self.availability.reserved_by_model[model.id] = dict(need.amounts(self._plan_eviction(group, need, forced)))

    def _plan_eviction(self, group: RequestGroup, need: Requirement, forced: Sequence[Runner]) -> Placement:
        """Choose what to give up for a line that does not start now, and book what it will need."""
        may, choice = self._select(group, need, forced)
        chosen = self.candidates.timed(self._bound(group), choice.victims) if choice is not None else []
        at = max((victim.free_at for victim in chosen), default=math.inf)
        victims = self._unclaimed(chosen)
        there = (
            one
            for one in (SOON, DRAINED)
            if at <= self.pool.now and self.availability.find_placement(one, need, victims)
        )
        horizon = next(there, LATER)  # from when on there is room with what the victims leave
        goes = horizon == SOON or (horizon == DRAINED and any(victim.leases for victim in chosen))
        before = self.availability.bytes[DRAINED].copy()
        self.claimed.update(runner.id for runner in victims)
        for runner in victims:
            self.availability.add(max(horizon, DRAINED if runner.leases else SOON), [runner])
        enough = choice is not None and not chosen  # on its way, or there
        startable = enough and self.availability.find_placement(NOW, need) is not None
        final, horizon = self.availability.earliest_fit(need, SOON if enough or goes else horizon)
        free = tuple(sorted(self.availability.bytes[horizon].items()))
        self.availability.reserve(horizon, need.amounts(final), need.process)
        self.ahead.update(device for device, amount in final.bytes if amount > before.get(device, 0))
        if choice is None:
            group.wait(*self._blocking_reason())
        elif goes:
            self._give_up(group, chosen)
        elif at > self.pool.now and chosen:
            self._wait_for(group, chosen, at, may)
        else:
            chosen += self._wait(group, final, horizon, startable=startable)
        self.plan.contended.update(victim.runner for victim in chosen if not goes)
        self.plan.placements[group.spec] = PlannedPlacement(final, free, tuple(chosen), tuple(may), choice)
        return final

    def _select(
        self, group: RequestGroup, need: Requirement, forced: Sequence[Runner]
    ) -> tuple[list[Candidate], VictimSet | None]:
        """Return who may be given up for a line, and who is: rather idle ones now than what others leave later."""
        bound = self._bound(group)
        must = [self.candidates.candidate(runner, bound) for runner in forced]
        taken = self.claimed.union(runner.id for runner in forced)
        self.waiting += 1
        if self._suffices(need, DRAINED, must):
            return [], VictimSet(tuple(must), 0.0, 1)
        may = self.candidates.evictable_until(bound, taken)
        memories = self.availability.memories(need)
        where = [device for device in memories if device != HOST] or memories
        if all(self.ahead[device] >= LINES_AHEAD for device in where):  # far back: it is given what nobody uses
            may = [one for one in may if one.runner in self.candidates.idle]
        lacking = need.process - sum(one.process for one in self._unclaimed(must))
        at_rest = [one for one in may if not one.leases and one.free_at <= self.pool.now]
        hopes = (
            self.availability.bytes[LATER] != self.availability.bytes[DRAINED]
            or len(set(self.availability.process_slots[DRAINED:])) > 1
        )
        for horizon, ones in ((DRAINED, at_rest), (LATER, may))[not hopes :]:
            least = max(0, lacking - self.availability.process_slots[horizon]) if need.process else 0
            if choice := self._choose(ones, must, partial(self._suffices, need, horizon), self._frees(memories), least):
                return may, choice
        return may, None

    def _suffices(self, need: Requirement, horizon: int, victims: Iterable[Candidate]) -> bool:
        return self.availability.find_placement(horizon, need, self._unclaimed(victims)) is not None

    def _give_up(self, group: RequestGroup, chosen: Sequence[Candidate]) -> None:
        group.wait(WaitForRunners(_models(chosen), RunnerStep.leave))
        for victim in chosen:
            self.plan.victims.setdefault(victim.runner, NeededFor(group.spec.model))

    def _wait_for(self, group: RequestGroup, chosen: Sequence[Candidate], at: float, may: Iterable[Candidate]) -> None:
        """Wait until all of them may go: none is unloaded for a room that another still holds.

        Whenever another may go, the choice is made again: whoever may first serves the waiter.
        """
        group.wait(WaitForRunners(_models(chosen), RunnerStep.idle), at)
        moments = (at, self._bound(group), *(one.free_at for one in may))
        self.plan.replan_at = min(self.plan.replan_at, *(moment for moment in moments if moment > self.pool.now))

    def _blocking_reason(self) -> tuple[WaitReason, float]:
        """Return why nobody can be chosen to make room, and until when as far as that is known."""
        runners = self.pool.runners
        if self.waiting > 1 or not (self.overdue or self.awaited):
            return WaitFor.earlier_requests, math.inf
        if self.overdue:
            return WaitForRunners(_models(runners[id] for id in sorted(self.overdue)), RunnerStep.drain), math.inf
        loads = [runners[id] for id in sorted(self.awaited)]
        return WaitForRunners(_models(loads), RunnerStep.load_then_idle), min(map(self.pool.expected_at, loads))

    def _wait(self, group: RequestGroup, placement: Placement, horizon: int, *, startable: bool) -> Sequence[Candidate]:
        """Enough is on its way already, or only a place among the loads is missing: give up a load nobody waits for."""
        if horizon == LATER:
            group.wait(WaitFor.earlier_requests)
            return ()
        by = min(
            (runner.stop_deadline for runner in self.leaving if runner.stop_deadline > self.pool.now), default=math.inf
        )
        if horizon == DRAINED:
            group.wait(WaitForRunners(self._draining(placement), RunnerStep.drain), by)
            return ()
        if any(not runner.leases for runner in self.leaving):
            group.wait(WaitFor.memory, by)
        elif self.alone is not None:
            reason = WaitForRunners((self.alone.model,), RunnerStep.load_alone)
            group.wait(reason, self.pool.expected_at(self.alone))
        else:
            group.wait(*self._blocking_reason())
        if group.spec.purpose is Purpose.memory:
            return ()
        full = self.load_slots.full(placement)
        self.load_slots.add(placement)  # it starts in a moment: its place among the loads is not for younger ones
        on_full = [runner for runner in self.loading if full & set(loads_on(runner.placement))]
        if full:
            group.wait(WaitFor.load_slot, min(map(self.pool.expected_at, on_full), default=math.inf))
        for runner in on_full if startable else ():
            if runner.id not in self.claimed | self.awaited and not self.pool.pinned(runner):
                self.plan.victims[runner.id] = NeededFor(group.spec.model, load_slot=True)
                self.claimed.add(runner.id)
                return [self.candidates.candidate(runner, self._bound(group))]
        return ()

    def _draining(self, placement: Placement) -> tuple[ModelId, ...]:
        """Return who is given up and still in use, of those who hold what is needed there."""
        accounts, devices = self.pool.ledger.accounts, [device for device, amount in placement.bytes if amount]
        draining = [runner for runner in self.leaving if runner.leases]
        holding = [one for one in draining if any(map(accounts["runner", one.id].held_bytes, devices))]
        return _models(holding or draining)

    def _offload(self, group: RequestGroup, demand: PlacementDemand, current: Runner | None) -> Offload | None:
        """Return the best way that is possible at all; None: the line is refused, since there is none."""
        no_place = group.spec.purpose is not Purpose.memory and self.unmovable >= self.pool.max_runners()
        reload_pinned = current is not None and self.pool.pinned(current)
        if not (no_place or reload_pinned) and (possible := self.availability.best_offload(demand)) is not None:
            return possible
        refusal, need = infeasible_reason(self.pool, self.gpus, group.spec.model, demand, self.availability.potential)
        if need is not None:
            self.plan.placements[group.spec] = PlannedPlacement(
                need, tuple(sorted(self.availability.potential.items()))
            )
        self.plan.refusals.append((group, refusal))
        return None

    def _mandatory_victims(self, model: ModelRecord) -> list[Runner]:
        """Return what must go whatever fits: the model's own runner with other options; after out of memory, all."""
        if model.load_exclusively:
            runners = [runner for runner in self.pool.runners.values() if runner.current]
            return [runner for runner in runners if runner.id not in self.awaited and not self.pool.pinned(runner)]
        return [model.current] if model.current is not None else []

    def _bound(self, group: RequestGroup) -> float:
        """Return until when a line waits for others' convenience."""
        return group.head.queued_at + self.pool.config.max_wait_s

    def _choose(
        self,
        may: Sequence[Candidate],
        must: Sequence[Candidate],
        suffices: Callable[[Sequence[Candidate]], bool],
        frees: Callable[[Candidate], Amount],
        least: int = 0,
    ) -> VictimSet | None:
        question = SelectionProblem(suffices, frees, least, max(0, self.sets_left))
        choice = choose_victims(self.pool.now, may, must, question)
        self.sets_left -= choice.tried if choice else 0
        return choice

    def _frees(self, memories: Sequence[DeviceId]) -> Callable[[Candidate], Amount]:
        """Return what tells how much a candidate frees of each memory."""
        accounts = self.pool.ledger.accounts
        return lambda victim: tuple(map(accounts["runner", victim.runner].held_bytes, memories))

    def _unclaimed(self, victims: Iterable[Candidate]) -> list[Runner]:
        """Return the runners that no earlier line counts on; a forced one may be such a line's victim already."""
        return [self.pool.runners[victim.runner] for victim in victims if victim.runner not in self.claimed]


def _models(runners: Iterable[Runner | Candidate]) -> tuple[ModelId, ...]:
    return tuple(runner.model for runner in runners)
