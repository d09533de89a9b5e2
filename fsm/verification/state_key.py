"""One key for all states of a core that differ only in names, in ids of earlier runners, and in how far off times are.

All times in the past are alike; of times in the future only the order counts. Ids of requests, runners and claims are
replaced by their order; models of one kind are interchangeable. The first state that is found with a key stands for all
others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import blake2b
from marshal import dumps
from types import MappingProxyType

from fsm.core import Core
from fsm.machine.request import ModelId, Request, RequestSpec, RequestState
from fsm.machine.runner import IDLE, RUNNING, Runner
from fsm.planning.relocation import looks_from, moves_from
from fsm.state.core_state import CoreState, OpenClaim
from fsm.state.memory_ledger import Account, Ledger
from fsm.state.model_record import ModelRecord
from fsm.state.request_queue import RequestGroup
from fsm.verification.environment import moments

KEY_BYTES = 16
WITHOUT_SHARING = 2  # the version of marshal's format in which what is equal is written the same
MOST_FAILURES = 2  # a model that failed more often is backed off for longer, which the order of times shows
BEHIND, NEVER = 0, -1  # of times

Part = tuple[object, ...]

# Why a field is not in the key, by record; every other field is, by itself or in what is made of it.
LEFT_OUT: Mapping[type, Mapping[str, str]] = MappingProxyType(
    {
        CoreState: {
            "queued": "the sum of the request groups, which `check_state` compares",
            "ranks": "follows from the request groups, which `check_state` compares",
            "unread_ranks": "likewise",
            "specs_by_model": "follows from the request groups, which `check_state` compares",
            "processes": "the sum of the runners that have one, which `check_state` compares",
            "next_runner": "ids are replaced by their order; that they grow is checked by a property",
            "next_claim": "as the runners' ids",
            "idle_intervals": "for the policy, which is nondeterministic",
            "samples": "a reading is told from an early one by the runners' `last_sample` alone",
            "busy_on_host": "the sum of the ready runners on the host, which `check_state` compares",
            "peak_busy_on_host": "for the number of threads, which nothing else follows from",
            "read_at": "`looks_from` says what follows from it",
            "steps": "numbers for people to read",
        },
        ModelRecord: {
            "current": "the runner whose state says so, which `check_state` compares",
            "failure": "for people to read",
            "loads": "whether there are any, and bounds of requests, are in it; else for the policy, and an estimate",
            "shortest_load": "a request that it refuses at once would be refused when its time is up",
            "rested_at": "for the policy, which is nondeterministic",
            "idle_intervals": "for the policy, which is nondeterministic",
            "demands": "follows from what the model is made of, its context limit, and what was measured",
        },
        Runner: {
            "model": "the runner stands with its model",
            "fully_offloaded": "follows from its placement and what its model is made of",
            "better_place_since": "`moves_from` says what follows from it",
            "launched_at": "how long its load took: the residency that follows is a time of its own",
            "prompts_s": "for the policy, which is nondeterministic",
            "used_at": "for the policy, which is nondeterministic; how long it is idle is told where it has no clock",
        },
        Request: {
            "spec": "the request stands in its group; once granted nothing reads it",
            "runner": "it is among the leases",
            "holds": "for people to read: what a request waits for",
            "asked": "nothing follows from it but which holders are told",
        },
        RequestSpec: {"model": "the group stands with its model"},
        RequestGroup: dict.fromkeys(("waits_for", "until", "told", "evicted"), "for people to read"),
        Account: {"predicted": "follows from the options of the launch and what its model is made of"},
        Ledger: {},
        OpenClaim: {},
    }
)


class StateKeys:
    """Makes the keys of one search; what is only compared is numbered in the order in which it is first seen."""

    def __init__(self, kinds: Mapping[ModelId, object], *, configures: bool = False, exact_times: bool = False) -> None:
        self.configures = configures  # a keep-alive may be changed, and then counts from when a runner began to rest
        self.exact_times = exact_times  # times are told apart by how far off they are, not by their order alone
        self._numbers: dict[object, int] = {}
        self._shared: dict[int, tuple[object, int]] = {}  # by identity, which is quicker; kept, so that none is reused
        self.kinds = {id: self.number(kind) for id, kind in kinds.items()}

    def key(self, core: Core) -> bytes:
        """Return the key of a core's state."""
        parts = (*_View(core._state, self).parts(), core.finished)
        return blake2b(dumps(parts, WITHOUT_SHARING), digest_size=KEY_BYTES).digest()  # type: ignore[arg-type]  # tuples of what it takes

    def number(self, thing: object) -> int:
        """Return the number of `thing` and of everything equal to it."""
        return self._numbers.setdefault(thing, len(self._numbers))

    def shared(self, thing: object) -> int:
        """Return the number of something immutable that many states share."""
        known = self._shared.get(id(thing))
        if known is None:
            known = self._shared[id(thing)] = thing, self.number(thing)
        return known[1]


class _View:
    """A state with its times and ids replaced by their order."""

    __slots__ = ("ahead", "canonical", "claims", "requests", "runners", "state", "times", "turns")

    def __init__(self, state: CoreState, canonical: StateKeys) -> None:
        self.state = state
        self.canonical = canonical
        self.requests: dict[int, int] = {id: place for place, id in enumerate(sorted(state.requests))}
        self.runners: dict[int, int] = {id: place for place, id in enumerate(state.runners)}
        under = {runner.claim for runner in state.runners.values()}
        self.claims = {number: place for place, number in enumerate(sorted({0, *state.claims, *under}))}
        self.ahead = {model: (place, size) for place, (model, size) in enumerate(state.prefetching)}
        self.times = self._order_of_times()
        self.turns = self._turns()

    def parts(self) -> Part:
        """Return everything that a decision may depend on, as numbers and words that sort."""
        state, ledger, canonical = self.state, self.state.ledger, self.canonical
        runners: dict[str, list[Part]] = {}
        for runner in state.runners.values():
            runners.setdefault(runner.model, []).append(self._runner(runner))
        groups: dict[str, list[Part]] = {}
        for group in state.groups.values():
            groups.setdefault(group.spec.model, []).append(self._group(group))
        models = sorted(
            (*self._model(model), runners.get(model.id, []), sorted(groups.get(model.id, [])))
            for model in state.models.values()
        )
        return (
            models, sorted(groups.get("", [])), list(map(canonical.number, ledger.devices.values())),
            sorted(ledger.available_before.items()),
            sorted(ledger.overcommitted), self._memory(ledger), [self._claim(claim) for claim in state.claims.values()],
            self._timers(), self.times[looks_from(state)], state.closing, state.plan_due,
            canonical.shared(state.config),
        )  # fmt: skip

    def _order_of_times(self) -> dict[float, float]:
        state, exact = self.state, self.canonical.exact_times
        times = set(moments(state))
        for runner in state.runners.values():
            times.update(
                (
                    runner.resident_until,
                    runner.drain_protected_until,
                    runner.idle_grace_until,
                    moves_from(runner),
                    runner.stop_deadline,
                    runner.recovery_deadline,
                )
            )
        times.add(looks_from(state))
        times.update(map(self._bound, state.requests.values()))
        times.update(claim.by for claim in state.claims.values())
        order: dict[float, float] = dict.fromkeys(times, BEHIND)
        for place, time in enumerate(sorted(time for time in times if state.now < time < math.inf), 1):
            order[time] = round(time - state.now, 6) if exact else place
        order[math.inf] = NEVER
        return order

    def _bound(self, request: Request) -> float:
        """Return when busy runners have to drain for a request; of one that is granted, nothing is left of it."""
        if request.state is not RequestState.queued:
            return -math.inf
        return min(request.queued_at + self.state.config.max_wait_s, self.state.own_bound(request))

    def _turns(self) -> dict[int, int]:
        """Return the order in which requests are planned: by age, priority being worth some of it."""
        worth = self.state.config.priority_s
        ages = sorted(
            (request.queued_at - worth * spec.priority, request.id)
            for spec, group in self.state.groups.items()
            for request in group.requests.values()
        )
        return {id: place for place, (_, id) in enumerate(ages)}

    def _timers(self) -> list[Part]:
        """Return every deadline, also a deadline whose request, runner or claim has gone."""
        places: Mapping[str, Mapping[int, int]] = {
            "request": self.requests, "keep-alive": self.runners, "load": self.runners, "memory": self.runners,
            "claim": self.claims,
        }  # fmt: skip
        none: Mapping[int, int] = {}
        return sorted(
            (kind, places.get(kind, none).get(id, -1), self.times[at]) for at, (kind, id) in self.state.timers.items()
        )

    def _memory(self, ledger: Ledger) -> list[Part]:
        """Return the program's own reservations."""
        return sorted(
            (self.requests.get(id, -1), _account(account))
            for (kind, id), account in ledger.accounts.items()
            if kind == "memory"
        )

    def _claim(self, claim: OpenClaim) -> Part:
        flags = claim.had, claim.missed, claim.contended
        return self.claims[claim.number], sorted(claim.devices), self.times[claim.by], flags

    def _model(self, model: ModelRecord) -> Part:
        canonical, current = self.canonical, model.current
        doubted = model.failures and current is not None and current.loaded_at is not None
        good_at = (current.loaded_at or 0.0) + self.state.config.good_life_s if current and doubted else math.inf
        return (
            canonical.kinds.get(model.id, -1), canonical.shared(model.profile), model.inspected_since_launch,
            sorted(map(canonical.shared, model.resolutions)),
            model.inspecting,
            model.pinned, -1 if model.max_leases is None else model.max_leases,
            min(model.failures, MOST_FAILURES), self.times[good_at], self.times[model.blocked_until],
            model.load_exclusively, model.without_defaults, bool(model.loads), model.projector_on_host,
            model.last_context, model.context_growths, model.context_limit or 0,
            sorted((gpu, amount) for gpu, (amount, _) in model.ran_out.items()),
            sorted(
                (canonical.shared(asked), min(one.failures, MOST_FAILURES), self.times[one.until])
                for asked, one in model.back_offs.items()
            ),
            sorted((canonical.shared(asked), gpu) for id, asked, gpu in self.state.failed_loads if id == model.id),
            sorted(map(canonical.number, model.measured.items())),
            self.ahead.get(model.id, ()),
        )  # fmt: skip

    def _runner(self, runner: Runner) -> Part:
        canonical, times = self.canonical, self.times
        model = self.state.models[runner.model]
        return (
            self.runners[runner.id], runner.state.value, canonical.shared(runner.launch_options),
            canonical.shared(runner.effective_options), canonical.number(runner.placement), runner.keep_alive_s,
            runner.uses_default_keep_alive, sorted(map(canonical.shared, runner.equivalent_requests)),
            canonical.shared(runner.usual_options), canonical.shared(runner.chosen_options),
            canonical.shared(runner.asked),
            sorted(self.requests.get(id, -1) for id in runner.leases), runner.loaded_at is None,
            times[runner.resident_until], times[runner.drain_protected_until], times[runner.idle_grace_until],
            times[moves_from(runner)], runner.files_replaced,
            runner.process_state.value, runner.expire_when_served, runner.out_of_memory, runner.contended,
            runner.last_sample > 0,
            list(runner.available_before.items()),
            list(runner.recovery_targets.items()), times[runner.stop_deadline], times[runner.recovery_deadline],
            self.claims[runner.claim], runner.id < model.first_runner_of_file, self._rests_for(runner),
            runner.keeps_prompts and runner.process_state is RUNNING,
            _account(self.state.ledger.accounts["runner", runner.id]),
        )  # fmt: skip

    def _rests_for(self, runner: Runner) -> float:
        """Return how long it has rested, where no clock tells and a keep-alive that is changed counts from then on."""
        counts = self.canonical.configures and runner.state is IDLE and runner.keep_alive_s == math.inf
        return round(self.state.now - runner.used_at, 6) if counts else 0.0

    def _group(self, group: RequestGroup) -> Part:
        spec = group.spec
        waiting = [
            (
                self.requests[request.id], self.turns[request.id], request.survived,
                -1.0 if request.keep_alive_s is None else request.keep_alive_s, self.times[self._bound(request)],
                sorted(self.requests.get(id, -1) for id in request.keeps),
            )
            for request in group.requests.values()
        ]  # fmt: skip
        new = spec in self.state.unevaluated
        return waiting, self.canonical.shared(spec.options), spec.purpose.value, spec.priority, spec.memory, new


def _account(account: Account) -> Part:
    return (
        list(account.reserved.items()), list(account.resident.items()), list(account.peak.items()),
        list(account.resident_at_last_sample.items()), list(account.expected_growth.items()),
        list(account.projected_peak.items()),
        account.mapped_bytes, account.loaded, account.peak_observed,
    )  # fmt: skip
